"""`headoff roles`: what heads are for, measured over images."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

from headoff.cli.options import (
    add_ablation_options,
    add_confidence_option,
    add_detector_options,
    add_image_argument,
    add_out_option,
    add_site_option,
)
from headoff.cli.tables import table

if TYPE_CHECKING:
    from headoff.importance.roles import HeadRoles

EPILOG = """\
roles, each with the smallest effect that counts:
  class evidence          the class logit of an object falls without the head (0.5)
  box precision           the IoU with the box of none off falls without the head (0.05)
  suppresses duplicates   more detections of the same object without the head (0.05)

  A role is stated where the interval of the mean over images, for all heads and roles together (Bonferroni, 95%), lies
  beyond that. Where heads look is measured in roles.csv: effective number of tokens, shares inside the box, on its rim
  and outside, each side's share of the rim, the centre of attention, agreement between heads.

examples:
  headoff scenes draw --count 200 --out scenes && headoff roles scenes/
  headoff roles val2017/ --model detr-resnet-50 --ablate mean --references train.safetensors
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "roles",
        help="what heads are for, measured over images: what their removal does, and where they look",
        description="Measure over images what the removal of each head does to class evidence, boxes and duplicates, "
        "and where it looks. Writes a page, roles.json, roles.csv and figures.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_argument(parser, required=True)
    add_out_option(parser, "headoff-roles")
    group = parser.add_argument_group("what to switch off")
    add_site_option(group, "the attention whose heads are measured")
    add_ablation_options(group)
    add_confidence_option(parser)
    add_detector_options(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command."""
    from headoff.cli.configurations import describe_ablation
    from headoff.cli.detectors import load_detector, provenance
    from headoff.cli.images import images_at
    from headoff.cli.progress import progress_bar
    from headoff.files import lock
    from headoff.importance.roles import head_roles
    from headoff.report.roles import write_roles

    images = images_at(settings.images).paths
    detector = load_detector(settings)
    made_with = {
        **provenance(settings, detector),
        "images": str(len(images)),
        "confidence": f"{settings.confidence:g}",
        **describe_ablation(settings),
    }
    with lock(settings.out):
        with progress_bar("measuring", "image") as update:
            found = head_roles(
                detector,
                images,
                site=settings.site,
                ablation=settings.ablate,
                references=settings.references,
                confidence=settings.confidence,
                progress=update,
            )
        write_roles(settings.out, found, made_with)
    print(_summary(found))
    print(f"roles: {settings.out / 'index.html'}")
    return 0


def _summary(found: HeadRoles) -> str:
    """What the removal of heads in all layers costs, and the roles that are supported."""
    from headoff.importance.roles import ROLES
    from headoff.wording import counted

    layers, heads = found.shape
    header = ("head", *(role.value for role in ROLES), "roles")
    rows = []
    for head in range(heads):
        numbers = []
        for role in ROLES:
            of = found.column_effects[role.value]
            numbers.append(f"{of.mean[head]:+.2f} ({of.low[head]:+.2f}..{of.high[head]:+.2f})")
        rows.append(
            (f"H{head}", *numbers, "".join("CBD"[ROLES.index(role)] for role in found.roles(head)) or "-")
        )
    lines = [
        f"{counted(found.objects, 'object')} in {counted(found.images, 'image')}, heads of {found.site}",
        "what the removal of a head from all layers costs an object (95% interval):",
        table(header, rows),
        "roles: C class evidence, B box precision, D suppresses duplicates",
    ]
    for role in ROLES:
        single = [
            f"L{layer}H{h}" for layer in range(layers) for h in range(heads) if role in found.roles(h, layer)
        ]
        text = f"{role.name}, heads of one layer: {', '.join(single) or 'none'}"
        lines.append(textwrap.fill(text, 80, subsequent_indent="  "))
    return "\n".join(lines)
