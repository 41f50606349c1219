"""What a sweep costs beside one plain forward of the same detector, side by side in one run.

    python benchmarks/sweep_speed.py                     R50 at 800x1066, random weights
    python benchmarks/sweep_speed.py --model scenes --height 192 --width 192

Prints the ratio of each sweep to one forward (median over interleaved repetitions), the cost of one further
configuration, what the notebook way costs (one full forward per configuration), and the peak memory of one
forward and of the 9-configuration sweep, each in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from peak_memory import peak_mib

from headoff.detr import Detector, DetrConfig
from headoff.detr.checkpoints import load
from headoff.gates import all_subsets, cumulative, none_off, single_heads, stack
from headoff.sweeps import decode_all


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=None, help="as headoff sweep takes it; default R50 with random weights"
    )
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--peak-of", choices=("forward", "sweep"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    detector = _detector(options)
    pixels = torch.randn(1, 3, options.height, options.width, device=options.device)
    jobs = _jobs(detector, pixels)
    if options.peak_of:
        name = "one forward" if options.peak_of == "forward" else "9 configurations"
        with torch.inference_mode():
            jobs[name]()
        print(peak_mib(options.device))
        return
    figures = measure(jobs, options.repetitions, options.device)
    figures["threads"] = torch.get_num_threads()
    peaks = {what: _peak_in_fresh_process(what) for what in ("forward", "sweep")}
    figures["peak forward MiB"], figures["peak sweep MiB"] = peaks["forward"], peaks["sweep"]
    figures["peak ratio"] = peaks["sweep"] / peaks["forward"]
    for name, value in figures.items():
        print(f"{name:45s} {value:10.3f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


def _detector(options: argparse.Namespace) -> Detector:
    if options.model:
        return load(options.model, attention=options.attention, device=options.device)
    torch.manual_seed(0)
    detector = Detector(DetrConfig(), attention=options.attention).eval().to(options.device)
    return detector.requires_grad_(False)


def _jobs(detector: Detector, pixels: torch.Tensor) -> dict[str, Callable[[], object]]:
    layout = detector.head_layout

    def job(configurations):
        gates = stack(configurations, layout)
        return lambda: decode_all(detector, detector.features(pixels), gates)

    return {
        "one forward": lambda: detector(pixels),
        "9 configurations": job(cumulative(layout.heads)),
        "49 configurations (single heads)": job(
            (none_off(), *single_heads(layout.decoder_layers, layout.heads))
        ),
        f"{2**layout.heads} configurations (all subsets)": job(all_subsets(layout.heads)),
    }


def measure(jobs: dict[str, Callable[[], object]], repetitions: int, device: str) -> dict[str, float]:
    """Median seconds of each job and their ratios to the first; jobs take turns, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    with torch.inference_mode():
        for repetition in range(repetitions + 1):
            for name, job in jobs.items():
                start = time.perf_counter()
                job()
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
                if repetition:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    first, *others = jobs
    figures = {f"{name}: seconds": statistics.median(each) for name, each in seconds.items()}
    for name in others:
        ratios = [a / b for a, b in zip(seconds[name], seconds[first], strict=True)]
        figures[f"{name} / {first}"] = statistics.median(ratios)
    extra = [(a - b) / 8 for a, b in zip(seconds["9 configurations"], seconds[first], strict=True)]
    figures["one further configuration: seconds"] = statistics.median(extra)
    figures["one further configuration / one forward"] = statistics.median(
        [a / b for a, b in zip(extra, seconds[first], strict=True)]
    )
    return figures


def _peak_in_fresh_process(what: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
