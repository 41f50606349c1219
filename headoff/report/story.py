"""The results of a sweep, in sentences."""

from collections.abc import Sequence

from headoff.detections import Detections
from headoff.figures.captions import listed, object_name
from headoff.figures.changes import changes
from headoff.figures.subsets import heads_text, subsets_by_size
from headoff.gates import DEFAULT_SITE, CumulativeSweep, SingleHeadSweep, SubsetSweep, kind_of
from headoff.outcomes import ConfigurationOutcome, Outcome, Status
from headoff.sweeps import SweepResult
from headoff.wording import counted

_MOST_NAMED = 6
"""Most objects named in a sentence; more are counted, and the tables name them."""


def verdict(result: SweepResult) -> str:
    """The sweep in two or three sentences: `5 objects with none off. First lost at 3 heads off. ...`"""
    objects = len(result.baseline)
    opening = f"{counted(objects, 'object') if objects else 'No object'} with none off."
    if not len(result):
        return opening
    if not objects:
        most = max(len(outcome.unmatched) for outcome in result.outcomes)
        return f"{opening} " + (
            f"With heads off, up to {counted(most, 'unmatched detection')}."
            if most
            else "Nothing is found under any other configuration either."
        )
    lost = [outcome.counts[Status.LOST] for outcome in result.outcomes]
    kind = kind_of(result.configurations)
    if isinstance(kind, CumulativeSweep):
        told = _cumulative_sentences(result, lost)
    elif isinstance(kind, SingleHeadSweep):
        told = _single_head_sentence(result, kind, lost)
    elif isinstance(kind, SubsetSweep):
        told = _subset_sentences(result, kind)
    else:
        told = _other_sentences(result, lost)
    return f"{opening} {told}"


def _cumulative_sentences(result: SweepResult, lost: Sequence[int]) -> str:
    objects, last = len(result.baseline), len(result) - 1
    first = next((k for k, count in enumerate(lost) if count), None)
    if first is None:
        return f"None is lost, even with {_all_heads(last)} off."
    names = _named(result.baseline, result.outcomes[first], Status.LOST)
    if lost[last] < objects:
        parts = [f"{count} {status.value}" for status, count in result.outcomes[last].counts.items() if count]
        return f"First lost at {_heads(first)} off: {names}. With {_all_heads(last)} off: {', '.join(parts)}."
    gone = next(k for k in range(len(lost)) if all(count == objects for count in lost[k:]))
    if gone == first:
        return f"{'It is' if objects == 1 else 'All are'} lost at {_heads(first)} off."
    return f"First lost at {_heads(first)} off: {names}. All gone at {gone}."


def _single_head_sentence(result: SweepResult, sweep: SingleHeadSweep, lost: Sequence[int]) -> str:
    """How many heads lose an object when they are off alone, and which head changes most."""
    by_head = changes(result)
    places = {
        configuration: f"L{layer}H{head}"
        for layer, row in zip(sweep.layers, sweep.configurations, strict=True)
        for head, configuration in zip(sweep.heads, row, strict=True)
    }
    where = "" if sweep.site == DEFAULT_SITE else f" ({sweep.site})"
    opening = f"Of {_heads(len(places))}{where} switched off one at a time"
    losing = sum(lost[configuration] > 0 for configuration in places)
    if losing:
        # Of heads that lose equally many, the one whose removal lowers the probabilities most.
        worst = max(places, key=lambda c: (lost[c], -by_head[:, c].sum()))
        names = _in_brackets(result, worst, Status.LOST)
        lose = f"{losing} {'loses' if losing == 1 else 'lose'} an object"
        return f"{opening}, {lose}; {places[worst]} off loses {lost[worst]}{names}."
    unkept = [len(result.baseline) - outcome.counts[Status.KEPT] for outcome in result.outcomes]
    if any(unkept[configuration] for configuration in places):
        worst = max(places, key=lambda c: (unkept[c], -by_head[:, c].sum()))
        told = [
            f"{count} {status.value}{_in_brackets(result, worst, status)}"
            for status, count in result.outcomes[worst].counts.items()
            if count and status is not Status.KEPT
        ]
        return f"{opening}, none loses an object; {places[worst]} off changes most: {', '.join(told)}."
    worst = min(places, key=lambda c: by_head[:, c].min())
    index = int(by_head[:, worst].argmin())
    before, after = result.baseline[index].score, result.outcomes[worst].outcomes[index].query_score
    if f"{after:.2f}" >= f"{before:.2f}":
        return f"{opening}, none loses an object or lowers a probability by 0.01."
    return (
        f"{opening}, none loses an object; {places[worst]} off lowers {object_name(result.baseline, index)} most, "
        f"from {before:.2f} to {after:.2f}."
    )


def _subset_sentences(result: SweepResult, sweep: SubsetSweep) -> str:
    """The largest subset of heads that can be off with every object found, and the smallest that misses one."""
    objects, sizes = len(result.baseline), subsets_by_size(result, sweep)
    complete = sum(size.found.count(objects) for size in sizes)
    every = "it" if objects == 1 else "every object"
    largest = max((size for size in sizes if size.most == objects), key=lambda size: size.size)
    if complete == len(result):
        return f"All {counted(len(result), 'subset')} of {_heads(len(sweep.heads))} can be off with {every} found."
    smallest = next(size for size in sizes if size.fewest < objects)
    missed = objects - smallest.fewest
    most = f"up to {_heads(largest.size)} ({heads_text(largest.best)})" if largest.size else "no head"
    return (
        f"{complete} of {counted(len(result), 'subset')} of {_heads(len(sweep.heads))} can be off with {every} "
        f"found: {most}. "
        f"{heads_text(smallest.worst)} off is enough to miss {'it' if objects == 1 else missed}."
    )


def _other_sentences(result: SweepResult, lost: Sequence[int]) -> str:
    many = f"{counted(len(lost), 'configuration')}"
    losing = sum(1 for count in lost if count)
    if not losing:
        changed = sum(outcome.counts[Status.KEPT] < len(result.baseline) for outcome in result.outcomes)
        rest = f"; {changed} of them {_change_verb(changed)} something else" if changed else ""
        return f"None is lost under {'the' if len(lost) == 1 else 'any of the'} {many}{rest}."
    worst = max(range(len(lost)), key=lost.__getitem__)
    name = result.configurations[worst].name
    if len(lost) == 1:
        return f"{lost[0]} lost under '{name}'."
    more = sum(1 for count in lost if count == lost[worst]) - 1
    others = f" (as {counted(more, 'other')} {'does' if more == 1 else 'do'})" if more else ""
    return f"{losing} of {many} lose at least one; '{name}' loses {lost[worst]}{others}."


def sentences(baseline: Detections, detections: Detections, outcome: ConfigurationOutcome) -> list[str]:
    """What became of each object under one configuration; one sentence for each status that occurs."""

    def with_status(status: Status) -> list[Outcome]:
        return [found for found in outcome.outcomes if found.status is status]

    def name(found: Outcome) -> str:
        return object_name(baseline, found.object)

    def class_name(label: int | None) -> str:
        return "?" if label is None else baseline.class_names[label]

    lines = []
    if outcome.counts[Status.KEPT] == len(baseline) > 0:
        lines.append("All kept." if len(baseline) > 1 else f"{object_name(baseline, 0)} kept.")
    elif outcome.counts[Status.LOST] == len(baseline) > 1:
        lines.append("All lost.")
    else:
        phrases = {
            Status.KEPT: [name(found) for found in with_status(Status.KEPT)],
            Status.MOVED: [f"{name(found)} (IoU {found.iou:.2f})" for found in with_status(Status.MOVED)],
            Status.DUPLICATED: [
                f"{name(found)} ({len(found.detections)} times)" for found in with_status(Status.DUPLICATED)
            ],
            Status.RELABELLED: [
                f"{name(found)} as {class_name(found.new_label)}" for found in with_status(Status.RELABELLED)
            ],
            Status.LOST: [name(found) for found in with_status(Status.LOST)],
        }
        for status, words in phrases.items():
            if words:
                lines.append(f"{status.value.capitalize()}: {listed(words)}.")
    if outcome.unmatched:
        classes = listed(
            f"{detections[index].class_name} {detections[index].score:.2f}"
            for index in outcome.unmatched[:_MOST_NAMED]
        )
        rest = len(outcome.unmatched) - _MOST_NAMED
        lines.append(
            f"{counted(len(outcome.unmatched), 'unmatched detection')}: {classes}"
            f"{f' and {rest} more' if rest > 0 else ''}."
        )
    return lines or ["Nothing found."]


def _in_brackets(result: SweepResult, configuration: int, status: Status) -> str:
    """` (#1 dog and #3 ring)`: the objects with that status; nothing if they are too many to name."""
    outcome = result.outcomes[configuration]
    return f" ({_named(result.baseline, outcome, status)})" if outcome.counts[status] <= _MOST_NAMED else ""


def _named(baseline: Detections, outcome: ConfigurationOutcome, status: Status) -> str:
    names = [object_name(baseline, found.object) for found in outcome.outcomes if found.status is status]
    return listed(names) if len(names) <= _MOST_NAMED else counted(len(names), "object")


def _heads(count: int) -> str:
    return counted(count, "head")


def _all_heads(count: int) -> str:
    return "the one head" if count == 1 else f"all {count} heads"


def _change_verb(count: int) -> str:
    return "changes" if count == 1 else "change"
