"""`headoff compare`: two results folders of `headoff evaluate` side by side."""

from __future__ import annotations

import argparse
from typing import Any

from headoff.cli.options import named_path, probability, whole

EPILOG = """\
exit codes:
  0  compared, and no AP of B is lower than A's by more than --max-drop
  1  some AP is; without --max-drop never
  2  the folders cannot be compared: other annotations or classes, no images or configurations in common

--max-drop is about the AP on these images, not about the interval: both have seen the same images, so that nothing in
the difference is random. The interval says what other images of this kind would give.

examples:
  headoff compare results/sdpa results/my_kernel --max-drop 0.002
  headoff compare results/detr results/rt_detr --out comparison/
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="two results folders of `headoff evaluate` side by side, paired by image",
        description="Compare two results folders of `headoff evaluate` over the images and configurations that both "
        "have: AP, paired differences with 95% intervals, classes, outcomes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=named_path, metavar="A", help="results folder, the reference")
    parser.add_argument("b", type=named_path, metavar="B", help="results folder that is compared with it")
    parser.add_argument(
        "--out", type=named_path, metavar="FOLDER", help="also write tables, comparison.json and a page there"
    )
    parser.add_argument(
        "--max-drop",
        type=probability,
        metavar="AP",
        help="exit with 1 if an AP of B is lower than A's by more than this (0.002); with 2 if B lacks a configuration",
    )
    parser.add_argument(
        "--resamples", type=whole, metavar="N", help="samples of the bootstrap over images (default 200)"
    )
    parser.add_argument(
        "--confidence",
        type=probability,
        default=0.5,
        metavar="P",
        help="detections above P have outcomes; AP takes all (default 0.5)",
    )
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command."""
    from headoff.cli.progress import progress_bar
    from headoff.cli.tables import MAX_ROWS, SHORTENED_ROWS
    from headoff.errors import SettingError
    from headoff.evaluation.comparison import compare
    from headoff.evaluation.scores import RESAMPLES
    from headoff.report.comparison import comparison_headline, notes_on, write_comparison
    from headoff.wording import counted

    with progress_bar("scoring", "configuration") as update:
        found = compare(
            settings.a,
            settings.b,
            resamples=RESAMPLES if settings.resamples is None else settings.resamples,
            confidence=settings.confidence,
            progress=update,
        )
    if settings.max_drop is not None and found.only_a:
        raise SettingError(
            f"{str(settings.b)!r} lacks {counted(len(found.only_a), 'configuration')} of {str(settings.a)!r}, so "
            "--max-drop cannot be checked: evaluate the same ones"
        )
    print(f"A: {found.names[0]}\nB: {found.names[1]}")
    print(*notes_on(found))
    shown = len(found) if len(found) <= MAX_ROWS else SHORTENED_ROWS
    print(found.table(shown, ("lost",)))
    if shown < len(found):
        print(f"... and {len(found) - shown} more" + ("" if settings.out else "; --out writes all"))
    print(comparison_headline(found))
    if settings.out:
        print(f"comparison: {write_comparison(settings.out, found)}")
    if settings.max_drop is None:
        return 0
    drops = found.drops(settings.max_drop)
    if not drops:
        print(f"No AP is lower by more than {settings.max_drop:g}.")
        return 0
    worst = min(drops, key=lambda index: found.difference(index)[0])
    name = found.a.configurations[worst].configuration.name
    print(
        f"AP is lower by more than {settings.max_drop:g} under {counted(len(drops), 'configuration')}: most with "
        f"{name}, by {-found.difference(worst)[0]:.4f}."
    )
    return 1
