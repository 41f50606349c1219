"""What gates cost on detectors of the DETR family: many configurations compared with one forward of transformers.

    python tools/family_cost.py                  RT-DETR R50 at 640 x 640, Deformable DETR R50 at 800 x 1066
    python tools/family_cost.py --rounds 5 --threads 2 --only rt_detr

Weights are random, as no time depends on them. In each round transformers' own model computes one image, and headoff
encodes it, decodes 9 configurations (the cumulative sweep) and all 256 subsets of heads, and explains 3 objects under
the 9 configurations; the table has medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from headoff.family.adapter import find_adapter
from headoff.family.detector import FamilyDetector
from headoff.gates import all_subsets, cumulative, stack
from headoff.images import Preprocessing
from headoff.relevance.engines import make_engine
from headoff.relevance.targets import class_logit
from headoff.sweeps import decode_all

SIZES = {"rt_detr": (640, 640), "deformable_detr": (800, 1066)}


def model_of(model_type: str) -> Any:
    """transformers' model with the sizes of the published R50, in eval mode, with random weights."""
    torch.manual_seed(0)
    if model_type == "rt_detr":
        return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(num_labels=80)).eval()
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, num_labels=91
    )
    return transformers.DeformableDetrForObjectDetection(config).eval()


def seconds(call: Callable[[], Any]) -> float:
    """The time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def measure(model_type: str, rounds: int, subsets: bool, relevance: bool) -> None:
    """Print the rows of a model."""
    pixels = torch.randn(1, 3, *SIZES[model_type])
    theirs = model_of(model_type)
    adapter = find_adapter(model_type)
    names = [str(index) for index in range(theirs.config.num_labels)]
    detector = FamilyDetector(model_of(model_type), adapter, names, Preprocessing())
    layout = detector.head_layout

    def sweep(configurations: Any) -> Callable[[], Any]:
        gates = stack(configurations, layout)
        return lambda: decode_all(detector, detector.features(pixels), gates)

    calls: dict[str, Callable[[], Any]] = {
        "one forward of transformers": lambda: theirs(pixels),
        "headoff, none off": lambda: detector(pixels),
        "headoff, encoding": lambda: detector.features(pixels),
        "headoff, 9 configurations": sweep(cumulative(layout.heads)),
    }
    if subsets:
        calls["headoff, 256 subsets"] = sweep(all_subsets(layout.heads))
    if relevance:
        targets = [class_logit(query, 0) for query in range(3)]

        def explain() -> None:
            engine = make_engine(detector, detector.features(pixels))
            list(engine.run(stack(cumulative(layout.heads), layout), lambda *_: targets))

        calls["headoff, relevance, 9 x 3"] = explain
    times: dict[str, list[float]] = {name: [] for name in calls}
    calls["one forward of transformers"]()
    calls["headoff, none off"]()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
            print(f"{model_type}: {name}: {times[name][-1]:.2f} s", file=sys.stderr)
    base = statistics.median(times["one forward of transformers"])
    for name, found in times.items():
        median = statistics.median(found)
        print(f"| {model_type} | {name} | {median:.2f} s | {median / base:.2f} |", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds, of which the median counts (default 5)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--only", choices=sorted(SIZES), help="one of the models")
    parser.add_argument("--no-subsets", action="store_true", help="without the 256 subsets")
    parser.add_argument("--no-relevance", action="store_true", help="without relevance")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    print("| model | what | median | ratio |\n| --- | --- | --- | --- |")
    for model_type in [settings.only] if settings.only else SIZES:
        measure(model_type, settings.rounds, not settings.no_subsets, not settings.no_relevance)


if __name__ == "__main__":
    main()
