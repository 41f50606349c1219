"""The bundled scenes, which are held out from training, with their true boxes in COCO's format."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from headoff.errors import OutputError, SettingError, error_line
from headoff.scenes.dataset import CLASS_NAMES, Scene, draw_scene

ANNOTATIONS = "annotations.json"


def sample_folder() -> Path:
    """Folder of the bundled scenes: `scene-000.png`, ... and `annotations.json`."""
    # A plain path suffices, because every installer that can install torch unpacks packages.
    return Path(str(importlib.resources.files("headoff.scenes"))) / "samples"


def sample_images() -> tuple[Path, ...]:
    """The bundled scenes, in order."""
    return tuple(sorted(sample_folder().glob("*.png")))


def sample_image(index: int = 0) -> Path:
    """The path of a bundled scene.

    Raises:
        SettingError: there is no such scene.
    """
    images = sample_images()
    if not 0 <= index < len(images):
        raise SettingError(f"sample {index} does not exist; there are {len(images)}, counted from 0")
    return images[index]


def sample_annotations() -> dict[str, Any]:
    """True boxes of the bundled scenes, in COCO's `instances` format."""
    return json.loads((sample_folder() / ANNOTATIONS).read_text())


def bundled_references() -> Path:
    """The reference set of the bundled detector, see `headoff.ablation`; it was gathered from other scenes."""
    return sample_folder().with_name("weights") / "references.safetensors"


def write_scenes(folder: Path, seeds: Iterable[int], size: int, split: str = "held_out") -> list[Path]:
    """Draw scenes into `folder` as PNG files, with one `annotations.json`; returns the paths of the images.

    Raises:
        OutputError: the folder cannot be written to.
    """
    paths = []
    drawn: list[tuple[int, str, Scene]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds):
            scene = draw_scene(seed, size, split)
            path = folder / f"scene-{number:03}.png"
            Image.fromarray(scene.image).save(path, optimize=True)
            drawn.append((seed, path.name, scene))
            paths.append(path)
        (folder / ANNOTATIONS).write_text(json.dumps(coco_annotations(drawn), indent=1) + "\n")
    except OSError as error:
        raise OutputError(
            f"the scenes cannot be written to {folder} ({error_line(error)}); name another folder"
        ) from error
    return paths


def coco_annotations(scenes: Iterable[tuple[int, str, Scene]]) -> dict[str, Any]:
    """Scenes (image id, file name, scene) in COCO's `instances` format; boxes are (left, top, width, height)."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for identity, name, scene in scenes:
        height, width = scene.image.shape[:2]
        images.append({"id": identity, "file_name": name, "height": height, "width": width})
        for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            left, top, right, bottom = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": identity,
                    "category_id": label,
                    "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
                    "area": round((right - left) * (bottom - top), 3),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}
