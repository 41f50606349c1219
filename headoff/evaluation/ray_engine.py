"""The engine `ray`: Ray Data reads the images in tasks, and computes in actors that hold the detector.

Actors write the batches themselves, so little goes through the process that waits for them. All nodes need headoff, and
the folders of images and results under the same paths.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headoff.callables import is_from_file
from headoff.detector import Detector
from headoff.errors import HeadoffError, SettingError, error_line
from headoff.evaluation.shards import Shard
from headoff.evaluation.work import ReadBatch, Work, Worker

READER_CPUS = 0.25
"""CPUs of Ray that a task takes which reads a batch, and an actor on a GPU."""

ACTORS_SHARE = 0.75
"""Of the CPUs that actors compute on, how much they take of Ray's. The rest is for reading: if actors took all, tasks
would wait for CPUs, and actors for tasks, indefinitely and without a message.
"""

MOST_ATTEMPTS = 4
"""How often a batch is begun whose actors die. Ray would go on indefinitely, without a message."""


@dataclass(frozen=True)
class RayEngine:
    """Ray Data, on this machine or on a cluster that runs.

    Attributes:
        address: of a cluster (`auto` for the one that this machine is a node of); None for a Ray of this process, which
            ends with it.
        workers: actors that compute; None for one on each GPU, or on as many CPUs as torch has threads.
        device: `cpu` or `cuda`; None for GPUs where Ray has some.
        load: makes the detector in an actor; None sends the detector there.
        cpus: of a Ray of this process; None for all.
    """

    address: str | None = None
    workers: int | None = None
    device: str | None = None
    load: Callable[[], Detector] | None = None
    cpus: int | None = None

    @contextmanager
    def connected(self, detector: Detector) -> Iterator[str]:
        """Within this context Ray is there; the device that it computes on.

        Raises:
            SettingError: Ray is not installed, cannot be reached, or lacks the device.
        """
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise SettingError("the engine `ray` needs Ray Data: pip install 'headoff[ray]'") from error
        _silence(ray)
        started = not ray.is_initialized()
        if started:
            own: dict[str, Any] = (
                {"num_cpus": self.cpus, "include_dashboard": False} if self.address is None else {}
            )
            try:
                with _no_stderr():
                    ray.init(
                        address=self.address or "local",
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        **own,
                    )
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise SettingError(
                    f"Ray cannot be reached at {self.address or 'this machine'} ({error_line(error)}): start it with "
                    "`ray start`, or check the address"
                ) from error
        try:
            gpus = any(node.get("GPU", 0) for node in _nodes(ray))
            if self.device == "cuda" and not gpus:
                raise SettingError(
                    "Ray has no GPU: give --device cpu, or the --address of a cluster with GPUs"
                )
            yield self.device or ("cuda" if gpus else "cpu")
        finally:
            if started:
                ray.shutdown()

    def run(self, work: Work, detector: Detector, batches: Sequence[int], folder: Path) -> Iterator[Shard]:
        """See `headoff.evaluation.engines.Engine`."""
        with self.connected(detector) as device:
            import ray

            most = min(self.workers or len(batches), len(batches))
            pool = Pool.of(_nodes(ray), work.threads, device == "cuda", most)
            load = self.load or Sent(ray.put(_pickled(detector)))
            attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
            rows = ray.data.from_items(
                [{"batch": number} for number in batches], override_num_blocks=len(batches)
            )
            shards = rows.map(_Read(work).row, num_cpus=READER_CPUS).map(
                _Compute,  # type: ignore[arg-type]
                fn_constructor_args=(work, load, device, folder.absolute(), attempts),
                concurrency=pool.actors,
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
            )
            try:
                for row in shards.iter_rows():
                    shard = pickle.loads(row["shard"])
                    if isinstance(shard, Exception):
                        raise shard
                    yield shard
            except ray.exceptions.RayError as error:
                raise SettingError(
                    f"Ray gave up ({_reason(error)}): see its logs; what was finished is kept, and the same command "
                    "goes on from there"
                ) from error


@dataclass(frozen=True)
class Pool:
    """Actors, and what each takes of Ray's resources."""

    actors: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, float]], threads: int, on_gpu: bool, most: int) -> Pool:
        """The pool for nodes with these resources, each of whose actors computes with `threads` on the CPU. Raises
        SettingError where they have no CPU.
        """
        cpus = [node["CPU"] for node in nodes if node.get("CPU", 0) > 0]
        if not cpus:
            raise SettingError("Ray has no CPU, which reading images needs: give it at least one")
        if on_gpu:
            gpus = int(sum(node.get("GPU", 0) for node in nodes))
            return cls(min(gpus, most), min(READER_CPUS, min(cpus) / 2), 1)
        fitting = sum(math.floor(number / threads) for number in cpus)
        # Where not even one fits, torch's threads share what there is.
        return cls(max(1, min(fitting, most)), ACTORS_SHARE * min(threads, max(cpus)), 0)


class Sent:
    """A detector in Ray's object store."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def __call__(self) -> Detector:
        import ray

        return pickle.loads(ray.get(self.reference))


class _Read:
    """Reads a batch, in a task."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        # An error is a result: Ray would wrap it in others, and log it.
        try:
            read: ReadBatch | HeadoffError = self.work.read(row["batch"])
        except HeadoffError as error:
            read = error
        return {"read": pickle.dumps(read)}


class _Attempts:
    """Counts how often each batch was begun, in an actor."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        self.begun[number] += 1
        return self.begun[number]


class _Compute:
    """Computes and writes batches, in an actor."""

    def __init__(
        self, work: Work, load: Callable[[], Detector], device: str, folder: Path, attempts: Any
    ) -> None:
        torch.set_num_threads(work.threads)
        self.folder, self.attempts = folder, attempts
        self.worker = Worker(work, load().to(device))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        found = pickle.loads(row["read"])
        try:
            if isinstance(found, ReadBatch):
                if ray.get(self.attempts.begin.remote(found.number)) > MOST_ATTEMPTS:
                    names = ", ".join(repr(self.worker.work.names[index]) for index in found.images[:3])
                    raise SettingError(
                        f"actors of Ray have died {MOST_ATTEMPTS} times while they computed a batch ({names}, ...): "
                        "give them more memory, or check the attention with --engine local"
                    )
                found = self.worker.compute(found).write(self.folder)
        except HeadoffError as error:
            found = error
        return {"shard": pickle.dumps(found)}


def _nodes(ray: Any) -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _pickled(detector: Detector) -> bytes:
    """The detector on the CPU, as any process can load it. Raises SettingError."""
    from ray import cloudpickle

    for attention in (detector.attention, detector.deformable_attention):
        # Other processes cannot import what was loaded from a file by its path.
        module = sys.modules.get(getattr(getattr(attention, "call", attention), "__module__", ""))
        if module is not None and is_from_file(module):
            cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(detector if detector.device.type == "cpu" else copy.deepcopy(detector).cpu())
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise SettingError(
            f"this detector cannot be sent to Ray's actors ({error_line(error)}): give RayEngine(load=...) a function "
            "that makes it"
        ) from error


def _reason(error: BaseException) -> str:
    """The first cause of an exception of Ray, which are nested."""
    cause = getattr(error, "cause", None) or error.__cause__
    return (
        _reason(cause) if isinstance(cause, BaseException) else f"{type(error).__name__}: {error_line(error)}"
    )


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Within this context, what Ray's own C++ code prints is lost. What matters is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _silence(ray: Any) -> None:
    """No progress bars and messages of Ray's own, which would be among ours."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
