"""The options that say what is switched off, shared by the commands that switch heads off."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from headoff.detr import Detector
from headoff.errors import SettingError
from headoff.gates import (
    DEFAULT_SITE,
    SITES,
    Configuration,
    Site,
    all_subsets,
    cumulative,
    none_off,
    single_heads,
)
from headoff.notation import OrderResolver, parse_configuration, parse_order

SETS = ("cumulative", "single", "subsets")

NOTATION = """\
  --off takes one configuration and can be repeated; nothing off is always shown beside them:
    'first 3'             the first 3 heads of every decoder layer
    'H2'                  head 2 of every layer          'L5'       all heads of layer 5
    'L4H2,L5H0-3'         head 2 of layer 4 and heads 0 to 3 of layer 5; all counted from 0
    'only L5H2 on'        everything off but this one
    '0,1,0,1,1,0,0,0'     an off vector: heads 1, 3 and 4 off (0.5 is half off)
    'L4H2=0.5'            a gate between 0 (off) and 1 (on)
    'query 17: L5H2'      for object query 17 alone
    'decoder_self L0H1'   in decoder self-attention instead of cross-attention
"""


def add_configuration_options(
    parser: argparse.ArgumentParser, default: str | None
) -> argparse._ArgumentGroup:
    """--off, --set, --order, --site; `default` is the set without any of them, None stands for nothing off alone."""
    group = parser.add_argument_group("what to switch off")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--off", action="append", metavar="CONFIGURATION", help="see below; can be repeated")
    one.add_argument(
        "--set",
        choices=SETS,
        default=default,
        help="cumulative, every single head of every layer, or all subsets of heads; "
        + (f"{default} by default" if default else "by default nothing is switched off"),
    )
    group.add_argument(
        "--order",
        metavar="ORDER",
        help="order of heads in the cumulative sweep: `7,6,5,4,3,2,1,0`, `reverse`, `random:SEED`",
    )
    group.add_argument(
        "--site", choices=SITES, default=DEFAULT_SITE, help=f"attention to gate (default {DEFAULT_SITE})"
    )
    return group


@dataclass(frozen=True)
class Choice:
    """What is to be switched off, known before there is a detector."""

    set: str | None
    site: Site
    off: tuple[Configuration, ...]
    order: OrderResolver | None

    @classmethod
    def of(cls, settings: argparse.Namespace) -> Choice:
        """Read the options. Raises GateError or SettingError for what cannot be, whatever the detector."""
        order = parse_order(settings.order) if settings.order else None
        off = tuple(parse_configuration(text) for text in settings.off or ())
        if order and (off or settings.set != "cumulative"):
            raise SettingError("--order belongs to the cumulative sweep: give it with --set cumulative alone")
        if settings.site != DEFAULT_SITE and off:
            raise SettingError(
                f"--site does not apply to --off; write the site in it: --off '{settings.site} ...'"
            )
        if settings.site != DEFAULT_SITE and settings.set is None:
            raise SettingError("--site says where --set switches heads off: give one of the sets as well")
        return cls(settings.set, settings.site, off, order)

    def configurations(self, detector: Detector) -> tuple[Configuration, ...]:
        """The configurations for a detector; nothing off is among them."""
        layout, site = detector.head_layout, self.site
        if self.off or self.set is None:
            return (none_off(), *self.off)
        if self.set == "single":
            return (none_off(), *single_heads(layout.layers(site), layout.heads, site=site))
        if self.set == "subsets":
            return all_subsets(layout.heads, site=site)
        return cumulative(layout.heads, self.order(layout.heads) if self.order else None, site=site)


def configurations_asked_for(settings: argparse.Namespace) -> dict[str, str]:
    """The same in words, for the report and for knowing it again."""
    if settings.off:
        asked = {"configurations": "; ".join(f"'{text}'" for text in settings.off)}
    else:
        asked = {"configurations": f"{settings.set} at {settings.site}" if settings.set else "nothing off"}
    if settings.order:
        asked["order"] = settings.order
    return asked
