"""What `headoff evaluate` costs over the bare detector, and the memory it takes.

- `python tools/evaluation_cost.py throughput`: images a second, in turns with the bare detector in the same run
- `python tools/evaluation_cost.py memory`: peak memory of runs over few and many images and configurations
- `python tools/evaluation_cost.py score --keep FOLDER --sizes 1000 --copies 5`: what AP of the results costs that
  `memory --keep FOLDER` has left, of so many copies of the images
- `python tools/evaluation_cost.py files`: time to read a photo and to write a batch, and bytes of a detection
- `python tools/evaluation_cost.py threads`: whether the number of threads changes bits
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import headoff
from headoff.evaluation.batches import make_batches
from headoff.evaluation.engines import LocalEngine
from headoff.evaluation.manifest import MANIFEST, TRUTH
from headoff.evaluation.results import Results
from headoff.evaluation.run import evaluate
from headoff.evaluation.shards import FOLDER, KEY, ROWS, Shard, read_shards
from headoff.evaluation.sources import Files
from headoff.evaluation.work import Detected, Work
from headoff.scenes.dataset import draw_scene
from headoff.sweeps import decode_all


def throughput(settings: argparse.Namespace) -> None:
    """Images a second of three ways over the same batches of files, in turns."""
    detector = headoff.load(settings.model)
    torch.set_num_threads(settings.threads)
    side, _ = detector.preprocessing.resized_size(1, 1)
    configurations = headoff.cumulative(8)[: settings.configurations]
    gates = headoff.stack(configurations, detector.head_layout)
    with tempfile.TemporaryDirectory() as place:
        folder, images = Path(place), settings.images
        names = tuple(f"{index}.png" for index in range(images))
        for index, name in enumerate(names):
            Image.fromarray(draw_scene(index, side, "held_out").image).save(folder / name)
        sizes = np.full((images, 2), side)
        batches = make_batches(sizes, detector.preprocessing, settings.batch)
        work = Work(
            Files(folder, names, sizes), names, sizes, batches, detector.preprocessing, configurations,
            threads=settings.threads,
        )  # fmt: skip

        def bare(numbers: range, gates) -> None:
            for number in numbers:
                with torch.inference_mode():
                    pixels, _ = detector.preprocess([folder / names[index] for index in batches[number]])
                    decode_all(detector, detector.features(pixels), gates)

        def ours(numbers: range, workers: int | None) -> None:
            (folder / "results").mkdir(exist_ok=True)
            for _ in LocalEngine(workers).run(work, detector, list(numbers), folder / "results"):
                pass

        ways = {
            "bare, none off": lambda numbers: bare(
                numbers, headoff.stack([headoff.none_off()], detector.head_layout)
            ),
            f"bare, {len(configurations)} configurations": lambda numbers: bare(numbers, gates),
            "headoff evaluate": lambda numbers: ours(numbers, settings.workers),
            "headoff evaluate, no workers": lambda numbers: ours(numbers, 0),
        }
        for way in ways.values():
            way(range(2))
        wall: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(settings.turns):
            numbers = range(
                turn * len(batches) // settings.turns, (turn + 1) * len(batches) // settings.turns
            )
            count = sum(len(batches[number]) for number in numbers)
            for name, way in ways.items():
                started, used = time.perf_counter(), _cpu_seconds()
                way(numbers)
                wall[name].append((time.perf_counter() - started) / count)
                cpu[name].append((_cpu_seconds() - used) / count)
    base = [*ways][1]
    for name in ways:
        ratios = [
            statistics.median(mine / other for mine, other in zip(times[name], times[base], strict=True))
            for times in (wall, cpu)
        ]
        each, used = statistics.median(wall[name]), statistics.median(cpu[name])
        print(
            f"{name:28} {1 / each:6.1f} images/s, {1000 * used:.1f} ms of CPU; wall time {ratios[0]:.3f} and CPU time "
            f"{ratios[1]:.3f} of '{base}'"
        )


def _cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def memory(settings: argparse.Namespace) -> None:
    """Peak memory of whole runs, each in a process of its own."""
    for configurations in settings.sets:
        for images in settings.sizes:
            program = [
                "one",
                "--images",
                str(images),
                "--set",
                configurations,
                "--threads",
                str(settings.threads),
            ]
            if settings.keep is not None:
                program += ["--keep", str(settings.keep)]
            found = subprocess.run(
                [sys.executable, __file__, *program], check=True, capture_output=True, text=True
            )
            print(found.stdout.splitlines()[-1], flush=True)


def one(settings: argparse.Namespace) -> None:
    """A run, and reading its detections: peak memory after each, of this process and of its workers."""
    detector = headoff.load(settings.model)
    chosen = headoff.cumulative(8) if settings.set == "cumulative" else headoff.all_subsets(8)
    torch.set_num_threads(settings.threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place if settings.keep is None else settings.keep) / f"{settings.set}-{settings.images}"
        results = evaluate(
            detector,
            f"scenes:{settings.images}",
            configurations=chosen,
            out=folder,
            engine=LocalEngine(settings.workers),
        )
        seconds = time.perf_counter() - started
        ours, workers = _peak(resource.RUSAGE_SELF), _peak(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        rows = sum(len(results.detections(index)) for index in range(len(chosen)))
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        print(
            json.dumps(
                {
                    "images": settings.images,
                    "configurations": len(chosen),
                    "peak MiB": ours,
                    "peak MiB of a worker": workers,
                    "peak MiB after reading": _peak(resource.RUSAGE_SELF),
                    "images/s": round(settings.images / seconds, 1),
                    "seconds to read all": round(time.perf_counter() - started, 1),
                    "rows": rows,
                    "bytes a row": round(size / rows, 1),
                }
            )
        )


def score(settings: argparse.Namespace) -> None:
    """Time and memory of the scores of all configurations of results that are there, with copies of their images."""
    folder = settings.keep / f"{settings.set}-{settings.sizes[0]}"
    with tempfile.TemporaryDirectory(dir=settings.keep) as place:
        copied = copies(folder, Path(place), settings.copies)
        started, used = time.perf_counter(), _cpu_seconds()
        found = headoff.score(copied, processes=settings.processes)
        seconds, cpu = time.perf_counter() - started, _cpu_seconds() - used
        rows = sum(len(copied.detections(index)) for index in range(len(found)))
    print(
        json.dumps(
            {
                "images": len(found.images),
                "configurations": len(found),
                "rows": rows,
                "AP": round(found.baseline["AP"], 3),
                "seconds": round(seconds, 1),
                "seconds of CPU": round(cpu, 1),
                "peak MiB": _peak(resource.RUSAGE_SELF),
                "peak MiB of a process": _peak(resource.RUSAGE_CHILDREN),
            }
        )
    )


def copies(folder: Path, to: Path, count: int) -> Results:
    """The results of a folder as if there were `count` data sets of the same images, with other ids."""
    import pyarrow
    import pyarrow.parquet

    results = Results(folder)
    truth, n = results.truth, len(results.truth)
    far = [1 + int(ids.max()) for ids in (truth.image_ids, truth.annotation_ids)]
    every = range(count)
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(truth, name)] * count) for name in ("boxes", "labels", "areas", "crowd")
    }
    many = replace(
        truth,
        image_ids=np.concatenate([truth.image_ids + far[0] * copy for copy in every]),
        names=truth.names * count,
        sizes=np.tile(truth.sizes, (count, 1)),
        image=np.concatenate([truth.image + n * copy for copy in every]),
        annotation_ids=np.concatenate([truth.annotation_ids + far[1] * copy for copy in every]),
        **joined,
    )
    arrays: dict[str, Any] = {one.name: np.asarray(getattr(many, one.name)) for one in fields(many)}
    np.savez(to / TRUTH, **arrays)
    shutil.copy(folder / MANIFEST, to / MANIFEST)
    (to / FOLDER).mkdir()
    shards = list(read_shards(folder))
    for shard in shards:
        table = pyarrow.parquet.read_table(folder / FOLDER / shard.name)
        for copy in every:
            about = json.loads(table.schema.metadata[KEY])
            about["images"] = [index + n * copy for index in about["images"]]
            moved = pyarrow.array(table["image"].to_numpy() + np.int32(n * copy))
            changed = table.set_column(table.schema.get_field_index("image"), "image", moved)
            pyarrow.parquet.write_table(
                changed.replace_schema_metadata({KEY: json.dumps(about)}),
                to / FOLDER / replace(shard, number=shard.number + copy * len(shards)).name,
                row_group_size=shard.configurations_at_once * len(shard.images) * shard.detections,
            )
    return Results(to)


def files(settings: argparse.Namespace) -> None:
    """What one core takes to read photos of 640 x 480 for DETR (800 x 1066), and to write detections of 100 queries."""
    torch.set_num_threads(1)
    preprocessing = headoff.Preprocessing()
    names = tuple(f"{index}.jpg" for index in range(8))
    sizes = np.array([(480, 640)] * 8)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for index, name in enumerate(names):
            pixels = draw_scene(index, 640, "held_out").image[:480].astype(int)
            noise = np.random.default_rng(index).normal(0, 12, pixels.shape)  # about the bytes of a photo
            Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
        size = sum((folder / name).stat().st_size for name in names) / 8
        work = Work(
            Files(folder, names, sizes), names, sizes, [range(8)], preprocessing, headoff.cumulative(8)
        )
        seconds = _median(lambda: work.read(0), 15) / 8
        print(f"reading: {1000 * seconds:.1f} ms an image ({size / 1000:.0f} kB) on one core")
        for count in (9, 57, 256):
            generator = torch.Generator().manual_seed(0)
            scores = torch.rand(count, 8, 100, generator=generator)
            boxes = torch.rand(count, 8, 100, 4, generator=generator) * 640
            labels = torch.randint(0, 91, scores.shape, generator=generator)
            shard = Shard(0, range(8), {}, ["0" * 16] * 8, max(1, ROWS // 800), 100)
            found = Detected(shard, scores, labels, boxes, torch.arange(100).expand(scores.shape))
            (folder / FOLDER).mkdir(exist_ok=True)
            seconds = _median(lambda found=found: found.write(folder), 9)
            size = (folder / FOLDER / shard.name).stat().st_size / scores.numel()
            print(
                f"writing {count:3} configurations of 8 images: {1000 * seconds:.0f} ms, {size:.1f} bytes a detection"
            )


def _median(call, times: int) -> float:
    """Seconds of processor time, which other processes change little."""
    seconds = []
    for _ in range(times):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def threads(settings: argparse.Namespace) -> None:
    """Whether runs with 1, 2 and 4 threads have the same bits."""
    detector = headoff.load(settings.model)
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            evaluate(detector, f"scenes:{settings.images}", out=f"{folder}/{number}", threads=number)
            for number in (1, 2, 4)
        ]
        for number, run in zip((2, 4), runs[1:], strict=True):
            tables = [(runs[0].detections(index), run.detections(index)) for index in range(9)]
            same = sum(one.same_as(other) for one, other in tables)
            most = max(float(np.abs(one.scores - other.scores).max()) for one, other in tables)
            print(
                f"{number} threads and 1: {same} of 9 configurations the same, scores differ by {most:.1e} at most"
            )


def _peak(whose: int) -> int:
    return resource.getrusage(whose).ru_maxrss // 2**10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("throughput", "memory", "score", "files", "threads", "one"))
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 5000])
    parser.add_argument("--sets", nargs="+", default=["cumulative", "subsets"])
    parser.add_argument("--set", default="subsets", choices=("cumulative", "subsets"))
    parser.add_argument("--configurations", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument(
        "--keep", type=Path, help="memory: keep the results in this folder, and go on with what is there"
    )
    parser.add_argument("--copies", type=int, default=5, help="score: how often the images are there")
    parser.add_argument("--processes", type=int, default=None, help="score: by default as headoff.score has")
    settings = parser.parse_args()
    what = {"throughput": throughput, "memory": memory, "score": score, "files": files, "threads": threads}
    {**what, "one": one}[settings.what](settings)


if __name__ == "__main__":
    main()
