"""What relevance maps of many configurations and objects cost, against the published notebook's way of working.

Both sides explain the same detector (a ResNet-50 DETR of random weights) on the same picture, for the cumulative
sweep: 9 configurations x 5 objects x 6 decoder layers by default. Each runs in a process of its own, so that its peak
memory is its own.

- engine: `RelevanceEngine`, from the picture to the maps, once for each of `--kernels`.
- notebook: per configuration two forward passes, per object one more and a full backward pass through
  everything, weight gradients included, then the rules on N x N matrices. It is measured on `--sample` objects of
  one configuration and multiplied up (its cost depends on neither), unless `--full`.

Times are the process's CPU time and wall time; memory is the largest resident size less that after the model was
loaded. On a GPU each engine runs once before it is measured, for kernels to be compiled, and memory is what torch's
allocator held. The maps of the first configuration and object are compared as well.

For a GPU, R50 and then DC5 with cams kept, and made anew: 2,048 MiB hold the cams of one map of DC5, 1,024 MiB do not.
(`headoff bench --only blocked` has both beside each other.)

    python benchmarks/relevance_speed.py --device cuda --kernels torch,triton --repeat 3
    python benchmarks/relevance_speed.py --device cuda --kernels torch,triton --repeat 3 --dc5
    python benchmarks/relevance_speed.py --device cuda --kernels torch,triton --repeat 3 --dc5 --memory-budget 1024
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak_memory import peak_mib
from torch import Tensor

from headoff.detr import BackboneConfig, Detector, DetrConfig
from headoff.detr.sharing import sharing_plan
from headoff.gates import cumulative, stack
from headoff.images import load_image
from headoff.relevance import RelevanceEngine, Target, class_logit


def make_detector(options: argparse.Namespace) -> Detector:
    """Random weights, the same in every process."""
    torch.manual_seed(0)
    return Detector(DetrConfig(backbone=BackboneConfig(dilate_last=options.dc5))).eval().to(options.device)


def make_picture(options: argparse.Namespace) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (options.height, options.width, 3), dtype=np.uint8)


class Clock:
    """CPU and wall seconds since it was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cpu, self.wall = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        cpu, wall = self._now()
        return {"cpu": cpu - self.cpu, "wall": wall - self.wall}


def run_engine(options: argparse.Namespace) -> dict[str, Any]:
    detector, picture = make_detector(options).requires_grad_(False), make_picture(options)
    before = peak_mib(options.device)
    if options.device != "cpu":
        maps_of(options, detector, picture)
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(options.device)
    first = maps_of(options, detector, picture)
    return {**clock.read(), "before": before, "peak": peak_mib(options.device), "map": first.tolist()}


def maps_of(options: argparse.Namespace, detector: Detector, picture: np.ndarray) -> Tensor:
    """Explain everything; the maps of the first configuration and object, (layers, h, w)."""
    pixels, mask = detector.preprocess([load_image(picture)])
    with torch.no_grad():
        features = detector.features(pixels, mask)
    engine = RelevanceEngine(
        detector,
        features,
        backward=options.backward,
        kernels=options.kernels,
        precision=options.precision,
        memory_budget=None if options.memory_budget is None else int(options.memory_budget * 2**20),
    )
    labels: list[int] = []

    def targets(index: int, logits: Tensor, boxes: Tensor) -> list[Target]:
        if not labels:  # nothing is off in the first configuration, and it says what is explained
            labels.extend(logits[:, :-1].argmax(-1).tolist())
        return [class_logit(query, labels[query]) for query in range(options.objects)]

    gates = stack(cumulative(options.heads)[: options.configurations], detector.head_layout)
    found = list(engine.run(gates, targets))
    assert found[0].pairs[0] is not None
    return found[0].pairs[0].rows.unflatten(-1, features.grid)


class KeepingAttention:
    """Eager attention that keeps its weights, and their gradients after a backward pass."""

    def __init__(self) -> None:
        self.weights: dict[Any, Tensor] = {}

    def __call__(self, address, query, key, value, attn_mask, head_gate):
        weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)
        if head_gate is not None:
            weights = weights * head_gate
        if weights.requires_grad:
            weights.retain_grad()
        self.weights[address] = weights
        return weights @ value


def forward(detector: Detector, pixels: Tensor, plan, attention: KeepingAttention):
    """The whole detector under one configuration; logits (Q, K + 1)."""
    features = detector.features(pixels)
    tokens = detector.encoder(features.tokens, features.positions, attention, None)
    positions = detector.query_embedding.weight
    states = detector.decoder(
        positions.new_zeros(1, 1, *positions.shape),
        positions,
        tokens,
        features.positions,
        attention,
        None,
        plan,
    )
    return detector.heads(states[-1]).logits[0, 0], features.grid


def notebook_maps(attention: KeepingAttention, layers: int) -> list[Tensor]:
    """The rules on whole matrices, in place as far as that goes."""

    def cam(site: str, layer: int) -> Tensor:
        weights = attention.weights[site, layer]
        return (weights.grad * weights.detach())[0].clamp(min=0).mean(0)

    def normalise(relevance: Tensor) -> Tensor:
        identity = torch.eye(len(relevance), device=relevance.device)
        excess = relevance - identity
        return excess / excess.sum(-1, keepdim=True) + identity

    count = attention.weights["encoder_self", 0].shape[-1]
    r_ii = torch.eye(count, device=attention.weights["encoder_self", 0].device)
    for layer in range(layers):
        r_ii = r_ii + cam("encoder_self", layer) @ r_ii
    r_qq, r_qi = torch.eye(attention.weights["decoder_self", 0].shape[-1], device=r_ii.device), 0
    maps = []
    for layer in range(layers):
        own = cam("decoder_self", layer)
        r_qi = r_qi + own @ r_qi if layer else 0
        r_qq = r_qq + own @ r_qq
        update = normalise(r_qq).T @ (cam("decoder_cross", layer) @ normalise(r_ii))
        update[update.isnan()] = 0
        r_qi = r_qi + update
        maps.append(r_qi)
    return maps


def run_notebook(options: argparse.Namespace) -> dict[str, Any]:
    detector, picture = make_detector(options), make_picture(options)
    before = peak_mib(options.device)
    gates = stack(cumulative(options.heads)[: options.configurations], detector.head_layout)
    configurations = options.configurations if options.full else 1
    objects = options.objects if options.full else min(options.sample, options.objects)
    forwards, backwards, first = [], [], None
    for configuration in range(configurations):
        gate = gates[configuration]
        plan = sharing_plan(gate.decoder_self, gate.decoder_cross, detector.config.decoder_layers, 1)
        clock = Clock(options.device)
        with torch.no_grad():
            for _ in range(2):
                pixels, _ = detector.preprocess([load_image(picture)])
                logits, grid = forward(detector, pixels, plan, KeepingAttention())
        forwards.append(clock.read())
        for query in range(objects):
            clock = Clock(options.device)
            attention = KeepingAttention()
            detector.zero_grad()
            logits, grid = forward(detector, pixels, plan, attention)
            logits[query, :-1].max().backward()
            with torch.no_grad():
                maps = notebook_maps(attention, detector.config.decoder_layers)
            backwards.append(clock.read())
            if first is None:
                first = torch.stack([each[query].unflatten(-1, grid) for each in maps]).tolist()
            # What one object needs is not to be held through the next one's forward pass.
            del attention, logits, maps
    pairs = options.configurations * options.objects

    def total(kind: str) -> float:
        mean = {
            name: sum(each[kind] for each in times) / len(times)
            for name, times in {"forwards": forwards, "backwards": backwards}.items()
        }
        return mean["forwards"] * options.configurations + mean["backwards"] * pairs

    return {
        "cpu": total("cpu"),
        "wall": total("wall"),
        "forwards": forwards[0][counts_on(options.device)],
        "backward": backwards[-1][counts_on(options.device)],
        "before": before,
        "peak": peak_mib(options.device),
        "map": first,
    }


def counts_on(device: str) -> str:
    """Which time says something: a GPU's process waits."""
    return "cpu" if device == "cpu" else "wall"


def in_process(side: str) -> dict[str, Any]:
    """One side's results, from a process of its own; `side` is notebook, or the kernels of an engine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        of_side = ["notebook"] if side == "notebook" else ["engine", "--kernels", side]
        subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--result", str(path), "--side", *of_side], check=True
        )
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configurations", type=int, default=9, help="of the cumulative sweep (default: 9)")
    parser.add_argument("--objects", type=int, default=5, help="queries explained (default: 5)")
    parser.add_argument("--height", type=int, default=800, help="of the picture (default: 800)")
    parser.add_argument("--width", type=int, default=1066, help="of the picture (default: 1066)")
    parser.add_argument("--dc5", action="store_true", help="4 times as many tokens")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads torch may use (default: 1)")
    parser.add_argument("--backward", default="auto", help="auto, analytic or callable (default: auto)")
    parser.add_argument(
        "--kernels",
        default="auto",
        help="of engines, with commas: auto, tiles, torch, triton (default: auto)",
    )
    parser.add_argument("--precision", default="ieee", help="of triton: ieee, tf32 or tf32x3 (default: ieee)")
    parser.add_argument("--memory-budget", type=float, help="of the engine, MiB (default: the engine's)")
    parser.add_argument(
        "--sample", type=int, default=2, help="objects the notebook's way is measured on (default: 2)"
    )
    parser.add_argument("--full", action="store_true", help="measure all of the notebook's way (minutes)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each side, in turns; the least counts")
    parser.add_argument(
        "--side", choices=["engine", "notebook", "both"], default="both", help="one side only"
    )
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.heads = 8
    if options.result is not None:
        torch.set_num_threads(options.threads)
        run = run_engine if options.side == "engine" else run_notebook
        # Clocks and counters of memory are those of the current device.
        with torch.cuda.device(options.device) if options.device != "cpu" else nullcontext():
            options.result.write_text(json.dumps(run(options)))
        return

    engines = [] if options.side == "notebook" else options.kernels.split(",")
    sides = engines + ([] if options.side == "engine" else ["notebook"])
    counts = counts_on(options.device)
    best: dict[str, dict[str, Any]] = {}
    for _ in range(options.repeat):
        for side in sides:
            found = in_process(side)
            if side not in best or found[counts] < best[side][counts]:
                best[side] = found
    for side in sides:
        found = best[side]
        extra = ""
        if side == "notebook":
            extra = f"  (2 forwards {found['forwards']:.2f} s, an object {found['backward']:.2f} s)"
        print(
            f"{side:9} CPU {found['cpu']:8.2f} s  wall {found['wall']:8.2f} s  peak {found['peak']:6.0f} MiB, "
            f"{found['peak'] - found['before']:6.0f} above the model{extra}"
        )
    for side in sides[:-1]:
        found, other = best[side], best[sides[-1]]
        difference = np.abs(np.array(found["map"]) - np.array(other["map"])).max() / np.max(other["map"])
        print(
            f"{sides[-1]} / {side}: CPU {other['cpu'] / found['cpu']:.1f}, wall {other['wall'] / found['wall']:.1f}, "
            f"peak {other['peak'] / found['peak']:.2f}; largest difference of a map, relative {difference:.1e}"
        )


if __name__ == "__main__":
    main()
