"""Colours and symbols: one colour per object, the same in every picture, chart and page.

The first eight object colours can be distinguished with normal sight, protanopia and deuteranopia (OKLab distance of
at least 0.07 between any two, simulated as in Machado et al. 2009), and from a white and a black page. The next sixteen
are darker and lighter, and differ from all others for normal sight (0.05). Then they repeat, and objects are numbered.
"""

from dataclasses import dataclass

from headoff.outcomes import Status

_FIRST_COLOURS = (
    "#33BBEE",  # sky
    "#CC3311",  # red
    "#DDAA33",  # gold
    "#7E57C2",  # violet
    "#009988",  # teal
    "#F781BF",  # pink
    "#999933",  # olive
    "#AA3377",  # plum
)


def _mixed(colour: str, other: int, share: float) -> str:
    """`colour` with a share of black (0) or white (255)."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round((1 - share) * channel + share * other):02X}" for channel in channels)


OBJECT_COLOURS = (
    *_FIRST_COLOURS,
    *(_mixed(colour, 0, 0.45) for colour in _FIRST_COLOURS),
    *(_mixed(colour, 255, 0.5) for colour in _FIRST_COLOURS),
)

UNMATCHED_COLOUR = "#FFFFFF"
"""The colour of unmatched detections, which belong to no object."""

INK = "#1F2430"
"""The colour of text and axes. Dark pages replace it."""
MUTED = "#6B7280"
BLUE = "#1B6CA8"
"""The colour of the main quantity in charts of more than one object."""
GRID = "#D5D9E0"


@dataclass(frozen=True)
class StatusStyle:
    """How a status is drawn: `letter` and colour `fill` in tables, matplotlib `marker` in charts."""

    letter: str
    fill: str
    marker: str
    hollow: bool = False


STATUS_STYLES = {
    Status.KEPT: StatusStyle("K", "#B7DDD3", "o"),
    Status.MOVED: StatusStyle("M", "#B9D7F2", "o", hollow=True),
    Status.DUPLICATED: StatusStyle("D", "#D6C8EE", "s"),
    Status.RELABELLED: StatusStyle("R", "#F6DC9B", "D"),
    Status.LOST: StatusStyle("L", "#F0B3A6", "X"),
}


def object_colour(index: int) -> str:
    """The colour of object `index` in all pictures."""
    return OBJECT_COLOURS[index % len(OBJECT_COLOURS)]


def ink_on(colour: str) -> str:
    """Black or white, whichever is more readable on `colour` ("#RRGGBB")."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    # WCAG's contrast with black is (L + 0.05) / 0.05 and with white 1.05 / (L + 0.05): equal at 0.179.
    return "#000000" if luminance > 0.179 else "#FFFFFF"
