"""Sweep results made by hand, for tests of figures and reports."""

import numpy as np
import torch
from PIL import Image

from headoff.detections import detections_from
from headoff.gates import cumulative
from headoff.outcomes import outcomes_of
from headoff.scenes.dataset import CLASS_NAMES, draw_scene
from headoff.sweeps import SweepResult

QUERIES = 100


def result_of(logits, boxes, image_size, names, configurations, baseline=0, confidence=0.5):
    """A result from (C, Q, K+1) logits and (C, Q, 4) boxes; nothing is off in configuration `baseline`."""
    found = [
        detections_from(one, box, image_size, names, confidence)
        for one, box in zip(logits, boxes, strict=True)
    ]
    outcomes = [outcomes_of(found[baseline], each, one) for each, one in zip(found, logits, strict=True)]
    return SweepResult(
        tuple(configurations), logits, boxes, tuple(found), found[baseline], tuple(outcomes), confidence
    )


def example(
    boxes, labels, image_size, names=CLASS_NAMES, configurations=None, seed=0, confidence=0.5
) -> SweepResult:
    """Objects (n, 4, cxcywh in 0..1) whose evidence fades: later configurations move, double, rename, lose.

    With none off each is found by its own query; every status occurs somewhere if objects are many.
    """
    configurations = cumulative() if configurations is None else tuple(configurations)
    generator = torch.Generator().manual_seed(seed)
    count, classes, objects = len(configurations), len(names), len(boxes)
    logits = torch.zeros(count, QUERIES, classes + 1)
    logits[..., -1] = 6.0
    out = torch.full((count, QUERIES, 4), 0.1)
    for index in range(objects):
        strength = 4 + 6 * torch.rand((), generator=generator)
        fall = 0.4 + 1.4 * torch.rand((), generator=generator)
        kind = index % 5
        drift = 0.05 * torch.randn(4, generator=generator)
        for c in range(count):
            step = c / max(count - 1, 1) * 8
            logits[c, index, labels[index]] = 6 + strength - fall * step
            moved = torch.as_tensor(boxes[index]).float()
            if kind == 1:
                moved = moved * (1 + 0.10 * step * torch.tensor([0, 0, 1.0, 0.4]))
            if kind == 2 and step >= 4:
                logits[c, index, (labels[index] + 1) % classes] = 12.0
            if kind == 3 and step >= 2:
                twin = objects + index
                logits[c, twin, labels[index]] = 9 + strength - fall * step
                out[c, twin] = moved + torch.tensor([0.02, -0.015, 0.03, 0.02])
            out[c, index] = (moved + drift * step / 8 * (kind != 1)).clamp(0.01, 0.99)
        if kind == 4 and count > 1:
            stray = QUERIES - 1 - index // 5
            logits[count // 2 :, stray, labels[index]] = 8.0
            out[:, stray] = torch.tensor([0.86, 0.12 + 0.08 * (index // 5), 0.2, 0.16])
    return result_of(logits, out, image_size, names, configurations, confidence=confidence)


def scene_example(seed=16, configurations=None):
    """A scene, and an example sweep of its objects."""
    scene = draw_scene(seed, 192, "held_out")
    left, top, right, bottom = torch.as_tensor(scene.boxes).double().div(192).unbind(1)
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], 1)
    labels = [int(label) for label in scene.labels]
    return scene.image, example(boxes, labels, (192, 192), configurations=configurations)


def crowd(count, image_size=(600, 800), names=CLASS_NAMES, seed=1, configurations=None):
    """`count` objects anywhere, at borders too, and a picture of noise for them."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=generator)
    boxes[:, 2:] = 0.06 + 0.2 * boxes[:, 2:]
    labels = torch.randint(0, len(names), (count,), generator=generator).tolist()
    return photo(image_size, seed), example(boxes, labels, image_size, names, configurations, seed)


def photo(image_size, seed=0):
    """Smooth colours with a grain, which compress about as badly as a photograph."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image_size
    coarse = (torch.rand(7, 9, 3, generator=generator) * 255).byte().numpy()
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = torch.randint(-14, 15, (height, width, 1), generator=generator, dtype=torch.int16).numpy()
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
