"""Annotations of a data set as `GroundTruth`: a file in COCO's `instances` format, or held-out scenes.

Categories are found among the detector's classes by their names: their ids may have gaps, and differ between files.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headoff.errors import SettingError, did_you_mean, error_line
from headoff.evaluation.tables import GroundTruth
from headoff.wording import counted

BEYOND = 2
"""Pixels that a box may reach beyond its image without a note."""

OTHER_SPELLINGS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Names of PASCAL VOC, which some detectors have for classes of COCO."""


def read_annotations(
    path: str | Path, class_names: Sequence[str], limit: int | None = None
) -> tuple[GroundTruth, list[str]]:
    """The ground truth in a file in COCO's `instances` format.

    Args:
        path: the file. Of an image, `id`, `file_name`, `height` and `width` are needed; of an annotation `id`,
            `image_id`, `category_id`, and `bbox` or `segmentation`. A missing `area` is the box's; a missing `iscrowd`
            is 0.
        class_names: those of the detector, in the order of its labels.
        limit: the number of images, of those at the beginning of the file; None for all.

    Returns:
        The ground truth, and what is to be noted: a sentence each about what was left out.

    Raises:
        SettingError: the file cannot be read or is not of that format, an id occurs twice, a size or box is no number,
            or the detector knows none of the categories.
    """
    path = Path(path)
    try:
        contents = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SettingError(f"there is no annotation file {str(path)!r}: check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(
            f"annotations {str(path)!r} cannot be read ({error_line(error)}): download or write them again"
        ) from error
    return ground_truth(contents, class_names, limit, repr(str(path)))


def scene_truth(count: int, first_seed: int, side: int) -> GroundTruth:
    """The ground truth of held-out scenes of `side` x `side` pixels; the id of a scene is its seed."""
    from headoff.scenes.dataset import CLASS_NAMES, Scene, plan_scene
    from headoff.scenes.samples import coco_annotations

    blank = np.broadcast_to(np.uint8(0), (side, side, 3))
    plans = ((seed, plan_scene(seed, "held_out")) for seed in range(first_seed, first_seed + count))
    scenes = ((seed, f"{seed}.png", Scene(blank, plan.boxes(side), plan.labels())) for seed, plan in plans)
    return ground_truth(coco_annotations(scenes), CLASS_NAMES)[0]


def ground_truth(
    contents: Any, class_names: Sequence[str], limit: int | None = None, name: str = "the annotations"
) -> tuple[GroundTruth, list[str]]:
    """`read_annotations` of the contents of a file; `name` is for messages."""
    images, annotations, categories = _lists(contents, name)
    notes = []
    image_ids = _ids(images, "image", name)
    names = tuple(str(_field(one, "file_name", "image", name)) for one in images)
    sizes = _numbers(
        [[_field(one, side, "image", name) for side in ("height", "width")] for one in images], 2
    )
    if not len(images):
        raise SettingError(f"{name} have no images: give a file with at least one")
    if not (np.isfinite(sizes) & (sizes >= 1)).all():
        bad = int((~(np.isfinite(sizes) & (sizes >= 1))).any(1).argmax())
        raise SettingError(
            f"{name} say that image {names[bad]!r} is of {sizes[bad, 0]:g} x {sizes[bad, 1]:g} pixels: give the file's "
            "size"
        )
    labels_of = _labels_of(categories, class_names, name)

    index_of = {int(identity): index for index, identity in enumerate(image_ids)}
    end = len(images) if limit is None else min(limit, len(images))
    _ids(annotations, "annotation", name)
    unknown: Counter[str] = Counter()
    strangers = 0
    kept: list[tuple[int, int, Mapping[str, Any]]] = []
    for one in annotations:
        index = index_of.get(_field(one, "image_id", "annotation", name))
        category = _field(one, "category_id", "annotation", name)
        if category not in labels_of:
            raise SettingError(
                f"annotation {one['id']} of {name} has the category {category!r}, which is not among the categories: "
                "add it there"
            )
        label = labels_of[category]
        if isinstance(label, str):
            unknown[label] += 1
        elif index is None:
            strangers += 1
        elif index < end:
            kept.append((index, label, one))
    if unknown:
        listed = ", ".join(
            f"{one} ({counted(number, 'annotation')})" for one, number in unknown.most_common(5)
        )
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        notes.append(
            "annotations of classes that the detector does not know are left out, and count for nothing: "
            f"{listed}{more}"
        )
    if strangers:
        notes.append(f"{counted(strangers, 'annotation')} of images that are not in {name} are left out")
    if not kept:
        notes.append(
            "no image has an annotation of a class that the detector knows, so there is no precision"
        )

    kept.sort(key=lambda row: row[0])
    ids = np.array([one["id"] for _, _, one in kept], np.int64)
    boxes = _numbers([_box(one, name) for _, _, one in kept], 4)
    given = [one.get("area") for _, _, one in kept]
    areas = _numbers([[0 if area is None else area] for area in given], 1)[:, 0]
    bad = ~(np.isfinite(boxes).all(1) & np.isfinite(areas))
    if bad.any():
        raise SettingError(
            f"the box or area of annotation {ids[bad.argmax()]} of {name} is no number: give left, top, width and "
            "height in pixels"
        )
    limits = sizes[[index for index, _, _ in kept]][:, ::-1] + BEYOND
    corners = boxes[:, :2] + boxes[:, 2:]
    for odd, what in (
        ((boxes[:, 2:] <= 0).any(1), "without width or height, which nothing can match"),
        (
            ((boxes[:, :2] < -BEYOND) | (corners > limits)).any(1),
            "beyond their images, although a box is left, top, width and height",
        ),
    ):
        if odd.any():
            some = f"{counted(int(odd.sum()), 'annotation')} of {name}, such as {ids[odd.argmax()]}"
            notes.append(f"{some}: boxes {what}")
    no_area = np.array([area is None for area in given], np.bool_)
    truth = GroundTruth(
        class_names=tuple(class_names),
        image_ids=image_ids[:end],
        names=names[:end],
        sizes=sizes[:end].astype(np.int64),
        image=np.array([index for index, _, _ in kept], np.int64),
        boxes=np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1),
        labels=np.array([label for _, label, _ in kept], np.int64),
        areas=np.where(no_area, boxes[:, 2] * boxes[:, 3], areas),
        crowd=np.array([bool(one.get("iscrowd")) for _, _, one in kept], np.bool_),
        annotation_ids=ids,
    )
    return truth, notes


def _lists(contents: Any, name: str) -> list[list[dict[str, Any]]]:
    """Images, annotations and categories."""
    lists = []
    for key in ("images", "annotations", "categories"):
        found = contents.get(key) if isinstance(contents, Mapping) else None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise SettingError(
                f"{name} have no list {key!r}: give a file in COCO's `instances` format, with images, annotations and "
                "categories"
            )
        lists.append(found)
    return lists


def _field(one: Mapping[str, Any], key: str, what: str, name: str) -> Any:
    if one.get(key) is None:
        raise SettingError(
            f"{what} {one.get('id', '(without an id)')} of {name} has no {key!r}: add it, as in COCO's `instances` "
            "format"
        )
    return one[key]


def _ids(items: Sequence[Mapping[str, Any]], what: str, name: str) -> np.ndarray:
    """The ids of images or annotations, int64."""
    ids = [_field(one, "id", what, name) for one in items]
    strange = [one for one in ids if not isinstance(one, int)]
    if strange:
        raise SettingError(f"the {what} id {strange[0]!r} of {name} is no whole number: give numbers")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise SettingError(f"two {what}s of {name} have the id {twice}: give every {what} an id of its own")
    return np.array(ids, np.int64)


def _labels_of(
    categories: Sequence[Mapping[str, Any]], class_names: Sequence[str], name: str
) -> dict[Any, int | str]:
    """The label of each category id; the category's name where the detector has no such class."""
    known: dict[str, int] = {}
    for label, one in enumerate(class_names):
        if one != "N/A":
            known.setdefault(_folded(one), label)
    labels: dict[Any, int | str] = {}
    taken: dict[str, Any] = {}
    for category in categories:
        identity, title = (
            _field(category, "id", "category", name),
            str(_field(category, "name", "category", name)),
        )
        if identity in labels:
            raise SettingError(f"two categories of {name} have the id {identity}: give each an id of its own")
        if taken.setdefault(_folded(title), identity) != identity:
            raise SettingError(f"two categories of {name} have the name {title!r}: make them one")
        labels[identity] = known.get(_folded(title), title)
    if labels and all(isinstance(label, str) for label in labels.values()):
        title = str(next(iter(labels.values())))
        raise SettingError(
            f"the detector knows none of the categories of {name}, such as {title!r}"
            f"{did_you_mean(title, class_names)}: give its classes the names they have there, by --classes or "
            "class_names="
        )
    return labels


def _folded(class_name: str) -> str:
    folded = " ".join(class_name.casefold().replace("_", " ").split())
    return OTHER_SPELLINGS.get(folded, folded)


def _numbers(rows: Sequence[Sequence[Any]], columns: int) -> np.ndarray:
    """float64 (rows, columns); NaN for what is no number."""
    try:
        return np.array(rows, np.float64).reshape(len(rows), columns)
    except (TypeError, ValueError):
        fixed = [
            [float(x) if isinstance(x, int | float) else math.nan for x in row]
            if isinstance(row, list | tuple) and len(row) == columns
            else [math.nan] * columns
            for row in rows
        ]
        return np.array(fixed, np.float64).reshape(len(rows), columns)


def _box(one: Mapping[str, Any], name: str) -> Sequence[float]:
    """Left, top, width and height of an annotation: its `bbox`, or else that of its polygons or its RLE."""
    box = one.get("bbox")
    if isinstance(box, list) and len(box) == 4:
        return box
    segmentation = one.get("segmentation")
    try:
        if isinstance(segmentation, Mapping):
            return box_of_rle(segmentation)
        points = np.concatenate(
            [np.array(polygon, np.float64).reshape(-1, 2) for polygon in segmentation or ()]
        )
        low, high = points.min(0), points.max(0)
        return [*low, *(high - low)]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SettingError(
            f"annotation {one['id']} of {name} has neither a `bbox` of four numbers nor a "
            "`segmentation` by polygons or run lengths: add one"
        ) from error


def box_of_rle(rle: Mapping[str, Any]) -> list[float]:
    """Left, top, width and height of a mask as COCO's run lengths.

    These are `size` (height, width), and `counts` of pixels column by column, alternately outside and inside, as
    numbers or in COCO's text form.
    """
    height, _ = rle["size"]
    counts = rle["counts"]
    ends = np.cumsum(_run_lengths(counts) if isinstance(counts, str | bytes) else np.array(counts, np.int64))
    starts, stops = ends[0::2][: len(ends[1::2])], ends[1::2]
    starts, lasts = starts[stops > starts], stops[stops > starts] - 1
    if not len(starts):
        return [0.0, 0.0, 0.0, 0.0]
    left, right = starts.min() // height, lasts.max() // height
    # A run that goes on in the next column touches the bottom of one and the top of the other.
    wraps = (starts // height != lasts // height).any()
    top = 0 if wraps else (starts % height).min()
    bottom = height - 1 if wraps else (lasts % height).max()
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]


def _run_lengths(text: str | bytes) -> np.ndarray:
    """Run lengths from COCO's text form: numbers of 5 bits a character, from the lowest, the 6th bit says that more
    follow, the last 5th bit is the sign; from the third number on they are differences to the last but one.
    """
    codes = text.encode() if isinstance(text, str) else text
    numbers: list[int] = []
    value = shift = 0
    for code in codes:
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    return np.array(numbers, np.int64)
