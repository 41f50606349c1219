"""The training loop of the bundled models, from scratch, on drawn scenes, on CPU cores.

A model adds a `Recipe` and a `SceneTrainer` in a module of its own (`detr_training`, `deformable_training`). The loop
has what they share: pools of scenes, processes, the moving average of the weights, saving and continuing.

There is one process per core, and gradients are averaged: multi-threaded small operations are much slower as soon as
another program uses a core.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from tqdm import tqdm

from headoff.errors import CheckpointError, NonFiniteError
from headoff.scenes.losses import Targets
from headoff.scenes.pool import ScenePool

_SAVE_SECONDS = 120
_MANY_STEPS = 2**24
"""More than a run that hours limit makes."""


@dataclass(frozen=True)
class Moment:
    """A point of a run: the optimiser steps made so far, and the fraction of the run that is over, 0..1."""

    step: int
    progress: float


@dataclass(frozen=True)
class Recipe(ABC):
    """The hyperparameters that all models have.

    Attributes:
        steps: optimiser steps. 0 for a run that `hours` limits.
        hours: hours of training, without interruptions. The schedule then follows time, so that the run ends with the
            smallest rate however busy the machine is. 0 for a run that `steps` limits.
        batch: images per step, over all processes.
        learning_rate, weight_decay: of AdamW; the rate decays by a cosine after `warmup` steps.
        pool: scenes drawn in advance, per size.
        ema: decay of the moving average of the weights, per step.
        clip: largest norm of the gradient.
    """

    steps: int = 0
    hours: float = 0.0
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    warmup: int = 200
    pool: int = 24_576
    ema: float = 0.999
    clip: float = 5.0
    seed: int = 0

    written: ClassVar[str]
    """The name of the averaged weights in the folder of a run."""

    def moment(self, step: int, elapsed: float) -> Moment:
        """The moment after `step` steps and `elapsed` seconds."""
        return Moment(step, elapsed / (3600 * self.hours) if self.hours else step / self.steps)

    def seed_of(self, step: int) -> int:
        """The seed of the random numbers of a step."""
        return self.seed * (self.steps or _MANY_STEPS) + step

    def rate(self, moment: Moment) -> float:
        """Learning rate: a linear rise over the first steps, times a cosine from 1 to 1% over the run."""
        rise = min(1.0, (moment.step + 1) / self.warmup)
        return self.learning_rate * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * moment.progress)))

    @abstractmethod
    def sides(self, config: Any) -> set[int]:
        """All sides that the images have, in pixels."""

    @abstractmethod
    def side(self, config: Any, moment: Moment) -> int:
        """Side of the images at `moment`, in pixels."""

    @abstractmethod
    def trainer(self, config: Any) -> SceneTrainer:
        """A new model with its loss."""

    @abstractmethod
    def describe(self, config: Any) -> dict[str, Any]:
        """`config` for recipe.json."""


class SceneTrainer(nn.Module, ABC):
    """A model with the modules that only training needs."""

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The model, whose weights are averaged and written."""

    @abstractmethod
    def forward(
        self, images: Tensor, targets: Targets, recipe: Any, moment: Moment, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of uint8 images (B, 3, S, S); a dictionary of its parts for the log."""

    @abstractmethod
    def write(self, path: Path) -> None:
        """Write the model in float16 for `headoff.load`."""


def train(
    folder: Path,
    recipe: Recipe,
    config: Any,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Train a bundled model, or continue an interrupted run in `folder`.

    A run that `hours` limits may be continued with other hours: its schedule goes on at the fraction that is over then.

    Args:
        folder: for the pools, `recipe.json`, `state.pt` (everything needed to continue), `log.jsonl` (with the seconds
            of training so far, without interruptions) and, at the end, the averaged weights.
        recipe, config: of the model.
        workers: processes, each with one thread; by default one per core.

    Ctrl-C finishes the current step, saves, and raises KeyboardInterrupt.

    Returns:
        The path of the averaged weights in float16, for `headoff.load`.

    Raises:
        CheckpointError: `folder` has a run with another recipe.
        NonFiniteError: the loss is not finite.
    """
    workers = workers or os.cpu_count() or 1
    folder.mkdir(parents=True, exist_ok=True)
    _check_same_recipe(folder / "recipe.json", recipe, config)
    for size in sorted(recipe.sides(config)):
        ScenePool(folder, size, recipe.pool, workers=workers)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (workers, port, str(folder), recipe, config, progress)
    if workers == 1:
        _worker(0, *arguments)
        return folder / recipe.written
    processes = mp.spawn(_worker, arguments, nprocs=workers, join=False)
    try:
        while not processes.join():
            pass
    except mp.ProcessRaisedException as error:
        # The traceback of another process is text; its last line is the message.
        kind, _, sentence = str(error).strip().splitlines()[-1].partition(": ")
        if kind.endswith(NonFiniteError.__name__):
            raise NonFiniteError(sentence) from error
        raise
    except KeyboardInterrupt:
        # Ctrl-C in a terminal reaches all processes, which finish their step and save. Wait for them.
        for process in processes.processes:
            process.join()
        raise
    return folder / recipe.written


def _check_same_recipe(path: Path, recipe: Recipe, config: Any) -> None:
    wanted = json.loads(json.dumps({"recipe": asdict(recipe), "config": recipe.describe(config)}))
    if path.exists():
        found = json.loads(path.read_text())
        if recipe.hours and found["recipe"].get("hours"):
            found["recipe"]["hours"] = recipe.hours
        if found != wanted:
            raise CheckpointError(
                f"{path.parent} holds a training run with another recipe (see {path.name}); "
                "continue it with that recipe, or name an empty folder"
            )
    path.write_text(json.dumps(wanted, indent=2) + "\n")


def _worker(
    rank: int, workers: int, port: int, folder_name: str, recipe: Recipe, config: Any, progress: bool
) -> None:
    torch.set_num_threads(1)
    folder = Path(folder_name)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    torch.manual_seed(recipe.seed)
    trainer = recipe.trainer(config)
    average = {name: value.detach().clone() for name, value in trainer.trained.state_dict().items()}
    optimiser = torch.optim.AdamW(_parameter_groups(trainer, recipe), lr=recipe.learning_rate, fused=True)
    step, elapsed_before = 0, 0.0
    state_path = folder / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        trainer.load_state_dict(state["trainer"])
        optimiser.load_state_dict(state["optimiser"])
        average, step = state["average"], state["step"]
        elapsed_before = state.get("elapsed", 0.0)

    pools: dict[int, ScenePool] = {}
    last_saved = time.monotonic()
    began = last_saved - elapsed_before
    bar = tqdm(
        total=recipe.steps or None,
        initial=step,
        desc="training",
        unit="step",
        disable=rank > 0 or not progress,
        mininterval=5,
    )
    parameters = list(trainer.parameters())
    stop, stopping = _StopAfterStep(), False
    moment = recipe.moment(step, elapsed_before)
    while moment.progress < 1 and not stopping:
        # Every step has a separate generator, so that a continued run draws the same batches.
        generator = torch.Generator().manual_seed(recipe.seed_of(moment.step) * workers + rank)
        size = recipe.side(config, moment)
        if size not in pools:
            pools[size] = ScenePool(folder, size, recipe.pool)
        images, targets = pools[size].batch(recipe.batch // workers, generator)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(moment)
        optimiser.zero_grad(set_to_none=True)
        loss, parts = trainer(images, targets, recipe, moment, generator)
        if not math.isfinite(loss.item()):
            raise NonFiniteError(
                f"the training loss became {loss.item()} at step {moment.step}; lower the learning rate"
            )
        loss.backward()
        elapsed, stopping = _average_gradients(
            parameters, workers, time.monotonic() - began if rank == 0 else 0.0, stop.asked
        )
        norm = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], recipe.clip)
        optimiser.step()
        _update_average(average, trainer.trained, min(recipe.ema, (1 + moment.step) / (10 + moment.step)))
        bar.update()
        done, moment = moment, recipe.moment(moment.step + 1, elapsed)
        if rank == 0:
            if done.step % 20 == 0:
                entry = {"step": done.step, "size": size, "norm": round(norm.item(), 3), **parts}
                bar.set_postfix({name: f"{value:.2f}" for name, value in parts.items()}, refresh=False)
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps({**entry, "elapsed": round(elapsed, 1)}) + "\n")
            if stopping or time.monotonic() - last_saved > _SAVE_SECONDS or moment.progress >= 1:
                _save(
                    {
                        "trainer": trainer.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "average": average,
                        "step": moment.step,
                        "elapsed": elapsed,
                    },
                    state_path,
                )
                last_saved = time.monotonic()
    bar.close()
    stop.restore()
    if rank == 0 and moment.progress >= 1:
        trainer.trained.load_state_dict(average)
        trainer.write(folder / recipe.written)
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()
    if stopping and workers == 1:
        raise KeyboardInterrupt


def _parameter_groups(trainer: SceneTrainer, recipe: Recipe) -> list[dict]:
    """Weight decay for matrices and kernels only."""
    matrices = [p for p in trainer.parameters() if p.dim() > 1]
    vectors = [p for p in trainer.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


class _StopAfterStep:
    """Records Ctrl-C instead of raising KeyboardInterrupt, because an incomplete step could not be continued."""

    def __init__(self) -> None:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._request_stop)

    def _request_stop(self, *_: object) -> None:
        self.asked = True

    def restore(self) -> None:
        signal.signal(signal.SIGINT, self._before)


def _average_gradients(
    parameters: list[nn.Parameter], workers: int, elapsed: float, stop: bool
) -> tuple[float, bool]:
    """Average gradients over the processes.

    Returns to all of them the first one's seconds of training (the others give 0), and whether any was asked to stop.
    """
    if workers == 1:
        return elapsed, stop
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([elapsed, float(stop)])])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat[:-2].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient) / workers)
    return flat[-2].item(), bool(flat[-1] > 0)


@torch.no_grad()
def _update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _save(state: dict, path: Path) -> None:
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    unfinished.replace(path)
