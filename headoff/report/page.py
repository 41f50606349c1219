"""The page of a sweep: one HTML file with everything in it.

The image is stored once. Boxes are elements on top of it; maps are data that the page's scripts draw. Without scripts
the page shows all configurations one below the other; with scripts it steps through them, and through all subsets of
heads by a switch for each head.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import count
from pathlib import PurePath
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from headoff.figures import plot_survival
from headoff.figures.canvas import figure_of
from headoff.figures.captions import View, object_name, one_line, views
from headoff.figures.changes import head_changes_by_object
from headoff.figures.colouring import MapStyle, subdued_css
from headoff.figures.palette import GRID, INK, MUTED, OBJECT_COLOURS, STATUS_STYLES, ink_on, object_colour
from headoff.figures.pictures import marks_of, small_picture
from headoff.figures.relevance import target_words
from headoff.figures.removal_curves import CURVES_CAPTION, plot_curves
from headoff.figures.survival import NARROW_WIDTH, narrow_height, shows_objects_apart, survival_chart
from headoff.images import ImageSource
from headoff.importance.curves import RemovalCurves
from headoff.outcomes import Status
from headoff.relevance.explanations import Explanation
from headoff.report.evidence import evidence, headline
from headoff.report.maps import as_script, page_maps
from headoff.report.story import sentences
from headoff.report.switches import switches
from headoff.report.tables import object_assignments
from headoff.sweeps import SweepResult
from headoff.templates import template as template_of

MOST_PICTURES = 256
"""Most configurations with a picture on the page: all subsets of eight heads. Others have numbers only."""

MOST_ACROSS = 64
"""Most configurations that are columns of a table."""

MANY = 12
"""With more configurations or objects than this, the page has a filter and counts."""

_ROOM = (1240, 780)
"""Width and height of the picture in CSS pixels, where the screen has them."""
_STATUS_MEANINGS = {
    Status.KEPT: "found once, in the same place",
    Status.MOVED: "found once, at some distance",
    Status.DUPLICATED: "found more than once",
    Status.RELABELLED: "another class is found in its place",
    Status.LOST: "not found",
}


def render_page(
    image: ImageSource,
    result: SweepResult,
    provenance: Mapping[str, str],
    explanation: Explanation | None = None,
    style: MapStyle | None = None,
    curves: RemovalCurves | None = None,
    others: Sequence[Explanation] = (),
) -> str:
    """The HTML of the page. See `headoff.report.write_report` for the arguments."""
    picture = small_picture(image)
    shown = views(result)
    pictured = shown[:MOST_PICTURES]
    board = switches(result, MOST_PICTURES)
    frames = []
    for index, view in enumerate(pictured):
        frames.append(
            {
                "id": f"c{index}",
                "view": view,
                "sentences": sentences(result.baseline, view.detections, view.outcome),
                "marks": marks_in_percent(result, view),
                "rows": _detection_rows(result, view),
            }
        )
    return template("sweep.html").render(
        title=PurePath(provenance.get("image", "")).name or "Sweep",
        verdict=headline(result, explanation),
        relevance=_relevance(explanation, result, style or MapStyle(), pictured, others),
        switches=board,
        switches_json=as_script(board) if board else "",
        frames=frames,
        left_out=len(shown) - len(pictured),
        many=len(shown) > MANY,
        background=background_uri(picture),
        pixelated=max(picture.size) < 400,
        width=picture_width(result.image_size),
        subdued=subdued_css(),
        aspect=f"{result.image_size[1]} / {result.image_size[0]}",
        charts=_charts(result) if len(shown) > 1 else [],
        curves=None if curves is None else _curves(curves),
        curves_caption=CURVES_CAPTION,
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
        # Many objects are counted in the table, and are rows of a second one.
        across=len(result.baseline) > MANY and len(shown) <= MOST_ACROSS,
        # Whether chart and table need the width of a large screen.
        wide=len(shown) > MOST_ACROSS,
        confidence=result.confidence,
        size=f"{result.image_size[1]} × {result.image_size[0]} pixels",
        provenance=provenance,
    )


@cache
def template(name: str) -> jinja2.Template:
    """A template of this package."""
    return template_of(name, _read)


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG file. Equal figures make equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


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


def marks_in_percent(result: SweepResult, view: View) -> list[dict[str, Any]]:
    """The boxes of a configuration, the best detection last, so that it is on top. Sides are in per cent."""
    height, width = result.image_size
    marks = []
    for mark in marks_of(view.detections, view.outcome, result.baseline, OBJECT_COLOURS):
        left, top, right, bottom = mark.box
        left, right = (100 * min(max(side / width, 0), 1) for side in (left, right))
        top, bottom = (100 * min(max(side / height, 0), 1) for side in (top, bottom))
        marks.append(
            {
                "line": mark.line.name.lower(),
                "colour": mark.colour,
                "ink": ink_on(mark.colour),
                "name": one_line(mark.name),
                "note": mark.note,
                "sides": [f"{side:.2f}" for side in (left, top, right - left, bottom - top)],
            }
        )
    return marks[::-1]


def picture_width(image_size: tuple[int, int]) -> int:
    """The greatest width of the picture in CSS pixels; very narrow and very flat images may exceed `_ROOM`.

    What is longer than 100 times its width is drawn wider than it is: it would have no pixel to draw on.
    """
    aspect = min(max(image_size[1] / image_size[0], 0.01), 100)
    width = min(_ROOM[0], _ROOM[1] * aspect)
    # A minimum width and height, so that labels fit, unless that makes the picture extremely long.
    return round(max(width, min(280, 2600 * aspect), min(110 * aspect, 1400)))


def _relevance(
    explanation: Explanation | None,
    result: SweepResult,
    style: MapStyle,
    pictured: Sequence[View],
    others: Sequence[Explanation],
) -> dict[str, Any] | None:
    if explanation is None:
        return None
    data = page_maps(explanation, result, style, [view.configuration for view in pictured], others)
    return {
        "evidence": evidence(explanation),
        "through_encoder": explanation.through_encoder,
        "levels": len(explanation.shapes),
        "has_points": explanation.points is not None,
        "data": data,
        "json": as_script(data),
        "methods": [one.method for one in (explanation, *others)],
        "signed": [one.method for one in (explanation, *others) if one.is_signed],
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
        charts.append({"wide": inline_svg(head_changes_by_object(result).axes[0], "survival-by-object")})
        if height is not None:
            narrow = head_changes_by_object(result, NARROW_WIDTH).axes[0]
            charts[1]["narrow"] = inline_svg(narrow, "survival-by-object-narrow")
    return charts


def _curves(curves: RemovalCurves) -> dict[str, str]:
    """The removal curves as SVG, for wide and for narrow screens."""
    narrow = Figure(figsize=(NARROW_WIDTH, 4.2), layout="constrained").add_subplot()
    return {
        "wide": inline_svg(plot_curves(curves), "curves"),
        "narrow": inline_svg(plot_curves(curves, narrow), "curves-narrow"),
    }


def background(picture: Image.Image) -> tuple[str, bytes]:
    """The image as a file, and its kind: `png` if it is small, else `webp`."""
    buffer = io.BytesIO()
    if max(picture.size) < 400:
        picture.save(buffer, "PNG")
        return "png", buffer.getvalue()
    picture.save(buffer, "WEBP", quality=82, method=4)
    return "webp", buffer.getvalue()


def background_uri(picture: Image.Image) -> str:
    """The image as a data URI."""
    return data_uri(*background(picture))


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
