"""A sweep of all subsets of heads as data for the page's switches: what every subset does to every object."""

from typing import Any

from headoff.figures.palette import STATUS_STYLES
from headoff.gates import SubsetSweep, kind_of
from headoff.outcomes import Status
from headoff.report.maps import rounded
from headoff.sweeps import SweepResult


def switches(result: SweepResult, most: int) -> dict[str, Any] | None:
    """The data for the page's script; None unless the sweep is of all subsets, and of at most `most` of them.

    A subset is a number: bit h is set if the h-th of `heads` is off.

    Returns:
        `heads`; `steps`: the configuration of each subset; for each configuration `subsets`, its `statuses` (a letter
        for each object), the `probabilities` of the objects' classes at their queries, `duplicates` and `unmatched`.
    """
    sweep = kind_of(result.configurations)
    if not isinstance(sweep, SubsetSweep) or len(result) > most:
        return None
    subsets = [sum(1 << sweep.heads.index(head) for head in off) for off in sweep.off]
    return {
        "heads": sweep.heads,
        "steps": [subsets.index(subset) for subset in range(len(subsets))],
        "subsets": subsets,
        "objects": len(result.baseline),
        "statuses": [
            "".join(STATUS_STYLES[found.status].letter for found in one.outcomes) for one in result.outcomes
        ],
        "probabilities": rounded(result.survival().T.tolist()),
        "duplicates": [one.duplicates for one in result.outcomes],
        "unmatched": [len(one.unmatched) for one in result.outcomes],
        "letters": {
            STATUS_STYLES[status].letter: [status.value, STATUS_STYLES[status].fill] for status in Status
        },
    }
