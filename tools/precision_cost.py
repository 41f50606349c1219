"""What average precision costs for a configuration, by steps, and what public implementations take for the same.

    python tools/precision_cost.py --images 5000 --classes 80
    python tools/precision_cost.py --images 5000 --classes 80 --others     COCOeval as well

Processor time, which other processes change little, with OMP_NUM_THREADS=1. Detections are
synthetic: COCO's 7.3 objects in an image, and 100 detections, of which one in eight is near an object.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from coco_oracle import coco_results, evaluated, synthetic  # noqa: E402

from headoff.evaluation.matching import TrueObjects, match  # noqa: E402
from headoff.evaluation.outcomes import Objects, count_outcomes  # noqa: E402
from headoff.evaluation.precision import Resamples, accumulate, influence, resample  # noqa: E402


def seconds_of(work: Callable[[], Any], turns: int) -> tuple[float, Any]:
    """The least processor time of several turns, and the result."""
    times, found = [], None
    for _ in range(turns):
        start = time.process_time()
        found = work()
        times.append(time.process_time() - start)
    return min(times), found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--others", action="store_true", help="pycocotools and faster-coco-eval as well")
    settings = parser.parse_args()
    truth, table = synthetic(
        0,
        images=settings.images,
        classes=settings.classes,
        objects=7.3,
        detections=200,  # at most, 100 in the mean
        crowds=0.01,
        quality=0.125,
        side=600,
    )
    print(
        f"{settings.images:,} images, {len(truth.image):,} objects of {settings.classes} classes, "
        f"{len(table):,} detections"
    )
    objects = TrueObjects.of(truth)
    samples = Resamples.of(objects, settings.resamples)
    baseline, found = Objects.detected(table, 0.72), Objects.detected(table, 0.74)  # 8 and 7 in an image
    images, classes = len(truth), len(truth.class_names)
    matches = match(objects, table)
    steps: dict[str, Callable[[], Any]] = {
        "matching": lambda: match(objects, table),
        "AP and AR": lambda: accumulate(objects, matches),
        f"bootstrap, {settings.resamples} samples": lambda: resample(objects, matches, samples),
        "contributions of images": lambda: influence(objects, matches),
        "outcomes": lambda: count_outcomes(baseline, found, images, classes),
    }
    total = 0.0
    for name, work in steps.items():
        seconds, _ = seconds_of(work, settings.turns)
        total += seconds
        print(f"{name:28} {seconds:8.2f} s")
    print(f"{'one configuration':28} {total:8.2f} s")
    if settings.others:
        import faster_coco_eval
        import pycocotools.coco
        from pycocotools.cocoeval import COCOeval

        results = coco_results(truth, table)
        ours = [*accumulate(objects, matches).metrics().values()]
        for name, module, evaluation in (
            ("faster-coco-eval", faster_coco_eval, faster_coco_eval.COCOeval_faster),
            ("pycocotools", pycocotools.coco, COCOeval),
        ):
            seconds, judge = seconds_of(
                lambda module=module, evaluation=evaluation: evaluated(module, evaluation, truth, results), 1
            )
            difference = np.nanmax(np.abs(np.array(ours) - judge.stats[:12]))
            print(f"{name:28} {seconds:8.2f} s  (AP only; largest difference to ours {difference:.1g})")


if __name__ == "__main__":
    main()
