"""The report as text for a terminal, and as Markdown for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headoff.bench.records import Level, Report, Row, cases_of
from headoff.timing.machine import processor
from headoff.wording import format_bytes, format_seconds

TITLES: dict[Level, str] = {
    "attention": "Attention",
    "decoder": "Decoder",
    "sweep": "Sweep, from the picture to the outcomes",
    "relevance": "Relevance, from the picture to the maps",
    "blocked": "Relevance in little memory: cams kept, and blocked",
}
HEAD = ("contestant", "x reference", "interval", "time", "memory")
UNDER_ROOF = ("FLOP/s", "bytes/s", "limit", "of it")


def text_of(report: Report) -> str:
    """For a terminal: a block for each case, and at the end what was not timed."""
    blocks = [f"on {where(report)}", *_ceilings(report)]
    for level in report.levels:
        rows = report.level(level)
        blocks.append(f"\n{TITLES[level]}")
        for (dtype, case), some in cases_of(rows).items():
            timed = [row for row in some if row.was_timed]
            blocks.append(f"\n  {case} ({dtype})" + ("" if timed else ": nothing could be timed"))
            if timed:
                lines = [_head(timed), *(_cells(row) for row in _sorted(timed))]
                blocks += [f"    {line}" for line in _aligned(lines)]
                blocks += [f"    {row.contestant}: {row.note}" for row in timed if row.note]
    left_out = _left_out(report.rows)
    if left_out:
        blocks += ["\nnot timed", *(f"  {line}" for line in left_out)]
    return "\n".join(blocks)


def markdown_of(report: Report) -> str:
    """Tables for a page of documentation, with all that they depend on."""
    made = report.made_with
    lines = [
        f"    {made['command']}",
        "",
        f"{made['date']}, {where(report)}; headoff {made['headoff']}, torch {made['torch']}, triton {made['triton']}, "
        f"float32 products of precision `{made['float32 products']}`.",
        "",
        *(f"- {line}" for line in _ceilings(report)),
    ]
    for level in report.levels:
        rows = report.level(level)
        lines += ["", f"### {TITLES[level]}"]
        for dtype in dict.fromkeys(row.dtype for row in rows):
            some = [row for row in rows if row.dtype == dtype]
            lines += ["", *_markdown_table(some, dtype)]
            notes = [row for row in some if row.was_timed and row.note]
            lines += ["", *(f"- {row.case}, {row.contestant}: {row.note}" for row in notes)] if notes else []
    left_out = _left_out(report.rows)
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


def _ceilings(report: Report) -> list[str]:
    return [
        f"{dtype}: a large copy reaches {_rate(each.bytes, 'B/s')}, a matrix product {_rate(each.flops, 'FLOP/s')}"
        for dtype, each in report.ceilings.items()
    ]


def _markdown_table(rows: Sequence[Row], dtype: str) -> list[str]:
    """A line for each case; a column for each contestant that was timed in any."""
    timed = [row for row in rows if row.was_timed]
    if not timed:
        return [f"{dtype}: nothing could be timed."]
    names = list(dict.fromkeys(row.contestant for row in timed))
    lines = [
        "| " + " | ".join([f"{dtype}, x the reference", *names, "reference"]) + " |",
        "| " + " | ".join("---" for _ in range(len(names) + 2)) + " |",
    ]
    for (_, case), some in cases_of(timed).items():
        found = {row.contestant: row for row in some}
        reference = next((row.contestant for row in some if row.status == "reference"), some[0].reference)
        lines.append(
            "| " + " | ".join([case, *(_ratio(found.get(name)) for name in names), reference]) + " |"
        )
    return lines


def _ratio(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return "-"
    if row.low is None or row.high is None:
        return "1"
    return f"{_figures(row.ratio)} ({_figures(row.low)} to {_figures(row.high)})"


def _head(rows: Sequence[Row]) -> tuple[str, ...]:
    return (*HEAD, *UNDER_ROOF) if any(row.position for row in rows) else HEAD


def _cells(row: Row) -> tuple[str, ...]:
    assert row.seconds is not None and row.ratio is not None
    interval = (
        "reference" if row.low is None or row.high is None else f"{_figures(row.low)} to {_figures(row.high)}"
    )
    cells = (
        row.contestant,
        _figures(row.ratio),
        interval,
        format_seconds(row.seconds),
        format_bytes(row.memory),
    )
    if row.position is None:
        return cells
    place = row.position
    return (*cells, _rate(place.flops, ""), _rate(place.bytes, ""), place.limit, f"{place.share:.0%}")


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.ratio or 0.0)


def _left_out(rows: Sequence[Row]) -> list[str]:
    """Who was not timed, why, and where; a line for each reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if not row.was_timed:
            reasons.setdefault((row.contestant, row.status, row.note), []).append(f"{row.case} ({row.dtype})")
    timed = {row.contestant for row in rows if row.was_timed}
    return [
        f"{contestant}, {status} in {_places(places, contestant in timed)}: {note}"
        for (contestant, status, note), places in reasons.items()
    ]


def _places(places: Sequence[str], elsewhere: bool) -> str:
    if len(places) == 1:
        return places[0]
    return f"{len(places)} cases" if elsewhere else f"all {len(places)} cases"


def _figures(ratio: float) -> str:
    """Three figures, without an exponent where a ratio is of a usual size."""
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
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 7) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
