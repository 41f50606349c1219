"""The page of a sweep: one HTML file with everything in it.

The image is stored once. The boxes of every configuration are a transparent picture that is shown on top of it. There
is one for wide screens and one for narrow ones, so that labels are readable on both. Without scripts the page shows
all pictures one below the other; with scripts it steps through the configurations.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import count
from pathlib import PurePath
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from headoff.figures import plot_detections, plot_survival
from headoff.figures.canvas import figure_of
from headoff.figures.captions import View, object_name, views
from headoff.figures.changes import head_changes_by_object
from headoff.figures.colouring import MapStyle
from headoff.figures.palette import GRID, INK, MUTED, STATUS_STYLES, object_colour
from headoff.figures.pictures import small_picture
from headoff.figures.relevance import target_words
from headoff.figures.survival import NARROW_WIDTH, narrow_height, shows_objects_apart, survival_chart
from headoff.images import ImageSource
from headoff.outcomes import Status
from headoff.relevance.explanations import Explanation
from headoff.report.evidence import evidence, headline
from headoff.report.maps import as_script, page_maps
from headoff.report.story import sentences
from headoff.report.tables import object_assignments
from headoff.sweeps import SweepResult
from headoff.wording import counted

MOST_PICTURES = 256
"""Most configurations with a picture on the page: all subsets of eight heads. Others have numbers only."""

MOST_DRAWN_TWICE = 64
"""Most pictures that are also drawn for narrow screens; with more, narrow screens show those for wide ones."""

MANY = 12
"""With more configurations or objects than this, the page has a filter and counts."""

_CSS_PIXELS = 96.0
_STATUS_MEANINGS = {
    Status.KEPT: "found once, in the same place",
    Status.MOVED: "found once, at some distance",
    Status.DUPLICATED: "found more than once",
    Status.RELABELLED: "another class is found in its place",
    Status.LOST: "not found",
}


@dataclass(frozen=True)
class Screen:
    """A kind of screen: space for a picture in CSS pixels, device pixels per CSS pixel, font size in points."""

    width: int
    height: int
    sharpness: float
    points: float

    def size(self, image_size: tuple[int, int]) -> tuple[float, float]:
        """(width, height) of the picture in CSS pixels; very narrow and very flat images may exceed it.

        What is longer than 100 times its width is drawn wider than it is: it would have no pixel to draw on.
        """
        aspect = min(max(image_size[1] / image_size[0], 0.01), 100)
        width = min(self.width, self.height * aspect)
        # A minimum width and height, so that labels fit, unless that makes the picture extremely long.
        width = max(width, min(280, 2600 * aspect), min(110 * aspect, 1400))
        return width, width / aspect


WIDE = Screen(width=860, height=660, sharpness=1.6, points=9.0)
NARROW = Screen(width=360, height=560, sharpness=2.4, points=8.0)


def render_page(
    image: ImageSource,
    result: SweepResult,
    provenance: Mapping[str, str],
    explanation: Explanation | None = None,
    style: MapStyle | None = None,
) -> str:
    """The HTML of the page. See `headoff.report.write_report` for the arguments."""
    picture = small_picture(image)
    shown = views(result)
    pictured = shown[:MOST_PICTURES]
    background = _background(picture)
    wide, narrow = WIDE.size(result.image_size), NARROW.size(result.image_size)
    frames = []
    for index, view in enumerate(pictured):
        frames.append(
            {
                "id": f"c{index}",
                "view": view,
                "sentences": sentences(result.baseline, view.detections, view.outcome),
                "wide": _overlay(result, view, WIDE),
                "narrow": _overlay(result, view, NARROW) if len(pictured) <= MOST_DRAWN_TWICE else "",
                "rows": _detection_rows(result, view),
            }
        )
    return template("sweep.html").render(
        title=PurePath(provenance.get("image", "")).name or "Sweep",
        verdict=headline(result, explanation),
        relevance=_relevance(explanation, result, style or MapStyle(), pictured),
        frames=frames,
        left_out=len(shown) - len(pictured),
        many=len(shown) > MANY,
        background=background,
        pixelated=max(picture.size) < 400,
        wide_width=round(wide[0]),
        narrow_width=round(narrow[0]),
        aspect=f"{result.image_size[1]} / {result.image_size[0]}",
        charts=_charts(result) if len(shown) > 1 else [],
        survival_caption=survival_chart(result).caption,
        objects=[
            {"name": object_name(result.baseline, index), "colour": object_colour(index), "index": index}
            for index in range(len(result.baseline))
        ],
        views=shown,
        counts=[{status.value: n for status, n in view.outcome.counts.items()} for view in shown],
        finds=[_findable(result, view) for view in shown],
        flat=result.image_size[1] > 3.2 * result.image_size[0],
        styles={status.value: (style, _STATUS_MEANINGS[status]) for status, style in STATUS_STYLES.items()},
        # With few objects, the table is easier to read than counts.
        statuses=[status.value for status in Status] if len(result.baseline) > MANY else [],
        confidence=result.confidence,
        size=f"{result.image_size[1]} × {result.image_size[0]} pixels",
        provenance=provenance,
    )


@cache
def template(name: str) -> jinja2.Template:
    """A template of this package. Values are escaped, as names come from checkpoints and files."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = counted
    return environment.get_template(name)


def data_uri(kind: str, contents: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(contents).decode()}"


def inline_svg(ax: Axes, name: str) -> str:
    """The figure of `ax` as an <svg> element whose colours are the page's CSS variables, for light and dark pages.

    Prolog, metadata and name spaces are removed. Ids are replaced by `name` and a number, so that they are unique in
    the page, and equal charts have equal text.
    """
    figure = figure_of(ax)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    numbers: dict[str, str] = {}
    counter = count()
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    for old in re.findall(r'\bid="([^"]+)"', text):
        if old in used:
            numbers.setdefault(old, f"{name}-{next(counter)}")
    text = re.sub(r'\s?\bid="([^"]+)"', lambda m: f' id="{numbers[m[1]]}"' if m[1] in numbers else "", text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', lambda m: m[1] + numbers[m[2]], text)
    for colour, variable in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--line")):
        text = re.sub(re.escape(colour), f"var({variable})", text, flags=re.IGNORECASE)
    # The chart scales with the page; a chart of many configurations has a minimum width, to be readable.
    width = figure.get_figwidth()
    least = f' style="min-width: {width * 72:.0f}px"' if width > 8 else ""
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf"\1{least}", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return re.sub(r"\n\s*", "\n", text).strip()


def _overlay(result: SweepResult, view: View, screen: Screen) -> str:
    """The boxes of a configuration on a transparent background, as a data URI."""
    width, height = screen.size(result.image_size)
    figure = Figure(
        figsize=(width / _CSS_PIXELS, height / _CSS_PIXELS),
        dpi=_CSS_PIXELS * screen.sharpness,
        facecolor="none",
    )
    ax = figure.add_axes((0, 0, 1, 1), facecolor="none")
    crowded = 0.85 if len(view.detections) > 15 else 1.0
    plot_detections(
        None,
        view.detections,
        ax,
        outcome=view.outcome,
        baseline=result.baseline,
        font_size=screen.points * crowded,
    )
    # Except for rounding, the picture has the image's shape; an equal aspect would leave a gap.
    ax.set_aspect("auto")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    buffer = io.BytesIO()
    drawing = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    # 200 shades suffice for a few flat colours with soft edges, and make a crowded picture five times smaller.
    shades = drawing.quantize(200, method=Image.Quantize.FASTOCTREE).convert("RGBA")
    shades.save(buffer, "WEBP", lossless=True, quality=40, method=1)
    return data_uri("webp", buffer.getvalue())


def _relevance(
    explanation: Explanation | None, result: SweepResult, style: MapStyle, pictured: Sequence[View]
) -> dict[str, Any] | None:
    if explanation is None:
        return None
    data = page_maps(explanation, result, style, [view.configuration for view in pictured])
    return {
        "evidence": evidence(explanation),
        "data": data,
        "json": as_script(data),
        "method": explanation.method,
        "target": target_words(explanation),
        "repicked": {"class": "the class", "object": "query and class"}.get(explanation.pick, ""),
        "left_out": len(explanation) - len(data["configurations"]),
    }


def _charts(result: SweepResult) -> list[dict[str, str]]:
    """The survival charts as SVG, each with one for narrow screens if that would be readable."""
    charts = [{"wide": inline_svg(plot_survival(result), "survival")}]
    height = narrow_height(result)
    if height is not None:
        narrow = Figure(figsize=(NARROW_WIDTH, height), layout="constrained").add_subplot()
        charts[0]["narrow"] = inline_svg(plot_survival(result, narrow), "survival-narrow")
    if shows_objects_apart(result):
        by_object = head_changes_by_object(result)
        charts.append({"wide": inline_svg(by_object.axes[0], "survival-by-object")})
    return charts


def _background(picture: Image.Image) -> str:
    """The image as a data URI: PNG if it is small, else WebP."""
    buffer = io.BytesIO()
    if max(picture.size) < 400:
        picture.save(buffer, "PNG")
        return data_uri("png", buffer.getvalue())
    picture.save(buffer, "WEBP", quality=82, method=4)
    return data_uri("webp", buffer.getvalue())


def _detection_rows(result: SweepResult, view: View) -> list[dict[str, Any]]:
    assignments = object_assignments(view.outcome)
    rows = []
    for index, detection in enumerate(view.detections):
        number, status = assignments.get(index, (None, "unmatched"))
        rows.append(
            {
                "object": number,
                "colour": None if number is None else object_colour(number),
                "name": detection.class_name,
                "score": f"{detection.score:.3f}",
                "status": status,
                "query": detection.query,
                "box": ", ".join(f"{side:.0f}" for side in detection.box),
            }
        )
    return rows


def _findable(result: SweepResult, view: View) -> str:
    """The text that the page's filter searches."""
    lines = sentences(result.baseline, view.detections, view.outcome)
    return " ".join([view.title, view.text, *lines]).lower()


def _read(name: str) -> str:
    return (resources.files("headoff.report") / "templates" / name).read_text(encoding="utf-8")
