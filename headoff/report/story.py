"""The results of a sweep, in sentences."""

from collections.abc import Sequence

from headoff.detections import Detections
from headoff.figures.captions import heads_off_counts, listed, object_name
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
    if heads_off_counts(result.configurations) is None:
        return f"{opening} {_other_sentences(result, lost)}"
    return f"{opening} {_cumulative_sentences(result, lost)}"


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


def _named(baseline: Detections, outcome: ConfigurationOutcome, status: Status) -> str:
    names = [object_name(baseline, found.object) for found in outcome.outcomes if found.status is status]
    return listed(names) if len(names) <= _MOST_NAMED else counted(len(names), "object")


def _heads(count: int) -> str:
    return counted(count, "head")


def _all_heads(count: int) -> str:
    return "the one head" if count == 1 else f"all {count} heads"


def _change_verb(count: int) -> str:
    return "changes" if count == 1 else "change"
