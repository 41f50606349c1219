"""The report as text for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from headoff.bench.results import Measurement, Report, by_case
from headoff.timing import processor
from headoff.wording import format_bytes, format_seconds

TITLES = {
    "attention": "Attention",
    "skipping": "Attention without the rows of heads that are off",
    "decoder": "Decoder",
    "sweep": "Sweep, from the image to the outcomes",
    "relevance": "Relevance, from the image to the maps",
}
HEAD = ("provider", "x reference", "interval", "time", "memory")
ROOFLINE_HEAD = ("FLOP/s", "bytes/s", "limit", "of it")


def text_of(report: Report) -> str:
    """For a terminal: a block for each case, and at the end what was not timed."""
    blocks = [f"on {where(report)}", *_peaks(report)]
    for suite in report.suites:
        blocks.append(f"\n{TITLES[suite]}")
        for (dtype, case), found in by_case(report.of_suite(suite)).items():
            timed = [one for one in found if one.was_timed]
            blocks.append(f"\n  {case} ({dtype})" + ("" if timed else ": nothing could be timed"))
            if timed:
                head = (*HEAD, *ROOFLINE_HEAD) if any(one.roofline for one in timed) else HEAD
                ranked = sorted(timed, key=lambda one: one.ratio or 0.0)
                blocks += [f"    {line}" for line in _aligned([head, *map(_cells, ranked)])]
                blocks += [f"    {one.provider}: {one.note}" for one in timed if one.note]
    left_out = _left_out(report.measurements)
    if left_out:
        blocks += ["\nnot timed", *(f"  {line}" for line in left_out)]
    return "\n".join(blocks)


def markdown_of(report: Report) -> str:
    """Tables for a page of documentation, with the command, date, versions and machine."""
    made = report.made_with
    lines = [
        f"    {made['command']}",
        "",
        f"{made['date']}, {where(report)}; headoff {made['headoff']}, torch {made['torch']}, triton {made['triton']}, "
        f"float32 products of precision `{made['float32 products']}`.",
        "",
        *(f"- {line}" for line in _peaks(report)),
    ]
    for suite in report.suites:
        found = report.of_suite(suite)
        lines += ["", f"### {TITLES[suite]}"]
        for dtype in dict.fromkeys(one.dtype for one in found):
            timed = [one for one in found if one.dtype == dtype and one.was_timed]
            lines += ["", *_markdown_table(timed, dtype)]
            notes = [f"- {one.case}, {one.provider}: {one.note}" for one in timed if one.note]
            lines += ["", *notes] if notes else []
    left_out = _left_out(report.measurements)
    if left_out:
        lines += ["", "Not timed:", "", *(f"- {line}" for line in left_out)]
    return "\n".join(lines) + "\n"


def where(report: Report) -> str:
    """The machine in a line."""
    machine = report.machine
    gpu = machine["gpu"]
    if gpu is None:
        return f"{processor(machine)} of {machine['cpu']['cores']} cores"
    clocks = f", {gpu['sm_clock']} of {gpu['max_sm_clock']} MHz" if gpu["sm_clock"] else ""
    return f"{processor(machine)} (driver {gpu['driver'] or 'unknown'}, CUDA {machine['cuda']}{clocks})"


def _peaks(report: Report) -> list[str]:
    return [
        f"{dtype}: a large copy reaches {_rate(peaks.bytes, 'B/s')}, a matrix product {_rate(peaks.flops, 'FLOP/s')}"
        for dtype, peaks in report.peaks.items()
    ]


def _markdown_table(timed: Sequence[Measurement], dtype: str) -> list[str]:
    """A line for each case, a column for each provider, and peak memory where it was measured."""
    if not timed:
        return [f"{dtype}: nothing could be timed."]
    names = list(dict.fromkeys(one.provider for one in timed))
    lines = [
        "| " + " | ".join([f"{dtype}, x the reference", *names, "reference"]) + " |",
        "| " + " | ".join("---" for _ in range(len(names) + 2)) + " |",
    ]
    for (_, case), found in by_case(timed).items():
        by_name = {one.provider: one for one in found}
        cells = [_markdown_cell(by_name.get(name)) for name in names]
        lines.append("| " + " | ".join([case, *cells, found[0].reference]) + " |")
    return lines


def _markdown_cell(found: Measurement | None) -> str:
    if found is None or found.ratio is None:
        return "-"
    interval = "" if found.low is None else f" ({_figures(found.low)} to {_figures(found.high)})"
    memory = "" if found.memory is None else f", {format_bytes(found.memory)}"
    return ("1" if found.low is None else _figures(found.ratio)) + interval + memory


def _cells(found: Measurement) -> tuple[str, ...]:
    assert found.seconds is not None
    cells = (
        found.provider,
        _figures(found.ratio),
        "reference" if found.low is None else f"{_figures(found.low)} to {_figures(found.high)}",
        format_seconds(found.seconds),
        format_bytes(found.memory),
    )
    if (point := found.roofline) is None:
        return cells
    return (*cells, _rate(point.flops, ""), _rate(point.bytes, ""), point.limit, f"{point.share:.0%}")


def _left_out(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each provider and reason: what was not timed, and where."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for one in measurements:
        if not one.was_timed:
            key = one.provider, one.status, one.note
            reasons.setdefault(key, []).append(f"{one.case} ({one.dtype})")
    return [
        f"{provider}, {status} in {cases[0] if len(cases) == 1 else f'{len(cases)} cases'}: {note}"
        for (provider, status, note), cases in reasons.items()
    ]


def _figures(ratio: float | None) -> str:
    """Three significant digits."""
    if ratio is None:
        return "-"
    return f"{ratio:.3f}" if 0.1 <= ratio < 10 else f"{ratio:.3g}"


def _rate(per_second: float, unit: str) -> str:
    if per_second == 0:
        return "-"
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if per_second >= factor:
            return f"{per_second / factor:.3g} {prefix}{unit}"
    return f"{per_second:.3g} {unit}".strip()


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text_columns = (HEAD.index("provider"), len(HEAD) + ROOFLINE_HEAD.index("limit"))
    return [
        "  ".join(
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
