"""Training of the bundled detector, from scratch, on drawn scenes, on CPU cores.

These make a small DETR learn in about an hour on two cores, in which plain DETR training does not learn at all:

- a dense loss on every encoder token, by the decoder's class and box heads: alone at first, without the decoder, then
  as an auxiliary loss whose weight falls to zero;
- queries that start from noisy true boxes (Li et al., DN-DETR, CVPR 2022), distant ones that must predict "no object"
  (Zhang et al., DINO, ICLR 2023), and a second group of ordinary queries (Chen et al., Group DETR, ICCV 2023). They are
  additional runs of the decoder in training only;
- cross-attention keys that are initialised equal to the queries, so that attention begins by comparing positions;
- small images first, an exponential moving average of the weights, and bfloat16 under autocast.

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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from tqdm import tqdm

from headoff.detector import DetectorOutput
from headoff.detr import Detr, DetrConfig, Memory
from headoff.detr.checkpoints import save_native
from headoff.detr.config import BackboneConfig
from headoff.detr.transformer import DecoderLayer
from headoff.errors import CheckpointError, NonFiniteError
from headoff.images import Preprocessing
from headoff.scenes.dataset import CLASS_NAMES
from headoff.scenes.losses import Targets, dense_loss, match, set_loss
from headoff.scenes.pool import ScenePool

SCENE_SIZE = 192
WEIGHTS = "scenes.safetensors"
_SAVE_SECONDS = 120

SCENES_CONFIG = DetrConfig(
    backbone=BackboneConfig(block="basic", depths=(1, 1, 2), widths=(32, 64, 128), stem=24),
    width=128,
    heads=8,
    feedforward=256,
    queries=20,
    classes=len(CLASS_NAMES),
    preprocessing=Preprocessing(short_side=SCENE_SIZE, long_side=2 * SCENE_SIZE),
)


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of training.

    Attributes:
        steps: optimiser steps.
        batch: images per step, over all processes.
        learning_rate, weight_decay: of AdamW; the rate decays by a cosine after `warmup` steps.
        small_size, small_until: side of the images, in pixels, during the first fraction of the steps.
        dense_only_until: fraction of the steps that trains backbone and encoder alone.
        dense_until: fraction of the steps after which the dense loss has a weight of zero.
        pool: scenes drawn in advance, per size.
        ema: decay of the moving average of the weights, per step.
        clip: largest norm of the gradient.
    """

    steps: int = 7200
    batch: int = 48
    learning_rate: float = 7e-4
    weight_decay: float = 1e-3
    warmup: int = 200
    small_size: int = 128
    small_until: float = 0.5
    dense_only_until: float = 0.07
    dense_until: float = 0.8
    pool: int = 24_576
    ema: float = 0.999
    clip: float = 5.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at `step`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def dense_weight(self, step: int) -> float:
        """Weight of the dense loss at `step`: 1 while it is the only loss, then falling linearly to 0."""
        progress = step / self.steps
        if progress < self.dense_only_until:
            return 1.0
        return max(0.0, 1 - (progress - self.dense_only_until) / (self.dense_until - self.dense_only_until))


class TrainingQueries(nn.Module):
    """The decoder's runs in training: the real queries, a second group, and noisy true objects."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.second_group = nn.Embedding(config.queries, config.width)
        self.label_content = nn.Embedding(config.classes, config.width)
        self.box_content = nn.Linear(4, config.width)
        self.queries = config.queries

    def forward(
        self, detector: Detr, targets: Targets, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Content and positions (B, 3, Q, d) of the three runs, and the object that each noisy query must find (B, Q).

        Query j < n starts near object j (at most 0.4 of half its size away) and must find it. The others start farther
        from object j modulo n (up to 1.5) and must predict "no object"; their object is -1.
        """
        batch, objects = targets.labels.shape
        slot = torch.arange(self.queries)
        counts = targets.valid.sum(1, keepdim=True)
        owner = slot % counts
        near = slot < counts
        labels = targets.labels.gather(1, owner)
        boxes = targets.boxes.gather(1, owner[..., None].expand(-1, -1, 4))

        uniform = torch.rand(batch, self.queries, 4, generator=generator)
        sign = torch.randint(0, 2, uniform.shape, generator=generator) * 2.0 - 1
        amount = torch.where(near[..., None], 0.4 * uniform, 0.8 + 0.7 * uniform) * sign
        noisy = boxes + amount * boxes[..., [2, 3, 2, 3]] / 2
        noisy = noisy.clamp(0.02, 0.98)
        flip = torch.rand(batch, self.queries, generator=generator) < 0.25
        labels = torch.where(
            flip, torch.randint(0, len(CLASS_NAMES), labels.shape, generator=generator), labels
        )

        device = detector.device
        width = detector.config.width
        positions = _box_positions(noisy[..., :2], width).to(device)
        content = self.label_content(labels.to(device)) + self.box_content(noisy.to(device))
        real = detector.query_embedding.weight.expand(batch, -1, -1)
        second = self.second_group.weight.expand(batch, -1, -1)
        zeros = torch.zeros_like(content)
        assigned_objects = torch.where(near, owner, -1)
        return (
            torch.stack((zeros, zeros, content), 1),
            torch.stack((real, second, positions), 1),
            assigned_objects,
        )


def _box_positions(centres: Tensor, width: int) -> Tensor:
    """The sine embedding of tokens at box centres (..., 2) in 0..1: (..., width)."""
    half = width // 2
    exponent = torch.arange(half).div(2, rounding_mode="floor") * (2 / half)
    angle = centres.flip(-1).unsqueeze(-1) * (2 * math.pi) * 10_000.0**-exponent
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-3)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """Attention for training: all heads on, no padding, in the dtype of its inputs.

    The bfloat16 backward pass of torch's fused CPU attention is 15 times slower than this (1.2 s of a 1.9 s step), and
    autocast would compute the softmax, on the largest tensors of the model, in float32.
    """
    assert attn_mask is None and head_gate is None
    with torch.autocast(query.device.type, enabled=False):
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value


class Trainer(nn.Module):
    """The detector with the modules that only training needs; `forward` is the loss of a batch."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.detector = Detr(config, CLASS_NAMES, attention=_attention, norm=nn.BatchNorm2d)
        self.queries = TrainingQueries(config)
        _initialise(self.detector)

    def forward(
        self, images: Tensor, targets: Targets, recipe: Recipe, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of uint8 images (B, 3, S, S); a dictionary of its parts for the log."""
        detector = self.detector
        preprocessing = detector.preprocessing
        mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (preprocessing.mean, preprocessing.std))
        pixels = (
            ((images.float() - mean) / std).to(detector.device).contiguous(memory_format=torch.channels_last)
        )
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
            features = detector.features(pixels)
            memory = detector.encode_features(features)
            alone = step < recipe.dense_only_until * recipe.steps
            states = None if alone else self._decode(memory, targets, generator)
            dense = None if recipe.dense_weight(step) == 0 else memory.tokens
        loss = pixels.new_zeros(())
        parts: dict[str, float] = {}
        on_device = Targets(*(t.to(pixels.device) for t in (targets.boxes, targets.labels, targets.valid)))
        if dense is not None:
            dense = dense.float()
            part = dense_loss(detector.class_head(dense), detector.box_head(dense), memory.grid, on_device)
            parts["dense"] = part.item()
            loss = loss + recipe.dense_weight(step) * part
        if states is not None:
            (queries_states, assigned_objects) = states
            output = DetectorOutput(detector.class_head(queries_states), detector.box_head(queries_states))
            # The first two runs: (layers, B, runs, Q, ..) to (sets, B, Q, ..)
            logits, boxes = (
                tensor[:, :, :2].movedim(2, 0).flatten(0, 1) for tensor in (output.logits, output.boxes)
            )
            part = set_loss(logits, boxes, on_device, match(logits, boxes, on_device)) / 2
            known = (
                _denoted_queries(assigned_objects, targets)
                .to(pixels.device)
                .expand(len(output.logits), -1, -1)
            )
            noise_part = set_loss(output.logits[:, :, 2], output.boxes[:, :, 2], on_device, known)
            parts["set"], parts["denoise"] = part.item(), noise_part.item()
            loss = loss + part + 0.5 * noise_part
        return loss, parts

    def _decode(self, memory: Memory, targets: Targets, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        detector = self.detector
        content, positions, assigned_objects = self.queries(detector, targets, generator)
        states = detector.decoder(
            content, positions, memory.tokens, memory.positions, detector.attend, memory.attn_mask
        )
        return states.float(), assigned_objects


def _denoted_queries(assigned_objects: Tensor, targets: Targets) -> Tensor:
    """(B, Q) objects of queries to (B, M) queries of objects."""
    objects = torch.arange(targets.labels.shape[1])
    return (assigned_objects[:, None] == objects[:, None]).int().argmax(-1)


def _initialise(detector: Detr) -> None:
    """Xavier for the transformer, as the reference code; attention that starts by comparing positions."""
    for parameter in (*detector.encoder.parameters(), *detector.decoder.parameters()):
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for layer in detector.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        attention = layer.cross_attention
        attention.key.weight.data.copy_(attention.query.weight.data)
        attention.key.bias.data.copy_(attention.query.bias.data)
    for module in detector.backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def train(
    folder: Path,
    recipe: Recipe | None = None,
    *,
    config: DetrConfig = SCENES_CONFIG,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Train the bundled detector, or continue an interrupted run in `folder`.

    Args:
        folder: for the pools, `recipe.json`, `state.pt` (everything needed to continue), `log.jsonl` (with the seconds
            of training so far, without interruptions) and, at the end, `scenes.safetensors`: the averaged weights in
            float16, ready for `headoff.load`.
        workers: processes, each with one thread; by default one per core.

    Ctrl-C finishes the current step, saves, and raises KeyboardInterrupt.

    Returns:
        The path of the averaged weights.

    Raises:
        CheckpointError: `folder` has a run with another recipe.
        NonFiniteError: the loss is not finite.
    """
    recipe = recipe or Recipe()
    workers = workers or os.cpu_count() or 1
    folder.mkdir(parents=True, exist_ok=True)
    _check_same_recipe(folder / "recipe.json", recipe, config)
    sizes = {recipe.small_size, config.preprocessing.short_side} if recipe.small_until > 0 else {SCENE_SIZE}
    for size in sorted(sizes):
        ScenePool(folder, size, recipe.pool, workers=workers)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (workers, port, str(folder), recipe, config, progress)
    if workers == 1:
        _worker(0, *arguments)
    else:
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
    return folder / WEIGHTS


def _check_same_recipe(path: Path, recipe: Recipe, config: DetrConfig) -> None:
    wanted = json.loads(json.dumps({"recipe": asdict(recipe), "config": config.as_dict()}))
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise CheckpointError(
            f"{path.parent} holds a training run with another recipe (see {path.name}); "
            "continue it with that recipe, or name an empty folder"
        )
    path.write_text(json.dumps(wanted, indent=2) + "\n")


def _worker(
    rank: int, workers: int, port: int, folder_name: str, recipe: Recipe, config: DetrConfig, progress: bool
) -> None:
    torch.set_num_threads(1)
    folder = Path(folder_name)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    torch.manual_seed(recipe.seed)
    trainer = Trainer(config)
    trainer.detector.backbone.to(memory_format=torch.channels_last)
    average = {name: value.detach().clone() for name, value in trainer.detector.state_dict().items()}
    optimiser = torch.optim.AdamW(_parameter_groups(trainer, recipe), lr=recipe.learning_rate, fused=True)
    start, elapsed_before = 0, 0.0
    state_path = folder / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        trainer.load_state_dict(state["trainer"])
        optimiser.load_state_dict(state["optimiser"])
        average, start = state["average"], state["step"]
        elapsed_before = state.get("elapsed", 0.0)

    pools: dict[int, ScenePool] = {}
    last_saved = time.monotonic()
    began = last_saved - elapsed_before
    bar = tqdm(
        total=recipe.steps,
        initial=start,
        desc="training",
        unit="step",
        disable=rank > 0 or not progress,
        mininterval=5,
    )
    parameters = list(trainer.parameters())
    stop, stopping = _StopAfterStep(), False
    for step in range(start, recipe.steps):
        # Every step has a separate generator, so that a continued run draws the same batches.
        generator = torch.Generator().manual_seed((recipe.seed * recipe.steps + step) * workers + rank)
        size = (
            recipe.small_size if step < recipe.small_until * recipe.steps else config.preprocessing.short_side
        )
        if size not in pools:
            pools[size] = ScenePool(folder, size, recipe.pool)
        images, targets = pools[size].batch(recipe.batch // workers, generator)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        optimiser.zero_grad(set_to_none=True)
        loss, parts = trainer(images, targets, recipe, step, generator)
        if not math.isfinite(loss.item()):
            raise NonFiniteError(
                f"the training loss became {loss.item()} at step {step}; lower the learning rate"
            )
        loss.backward()
        stopping = _average_gradients(parameters, workers, stop.asked)
        norm = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], recipe.clip)
        optimiser.step()
        _update_average(average, trainer.detector, min(recipe.ema, (1 + step) / (10 + step)))
        bar.update()
        if rank == 0:
            if step % 20 == 0:
                entry = {"step": step, "size": size, "norm": round(norm.item(), 3), **parts}
                bar.set_postfix({name: f"{value:.2f}" for name, value in parts.items()}, refresh=False)
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps({**entry, "elapsed": round(time.monotonic() - began, 1)}) + "\n")
            if stopping or time.monotonic() - last_saved > _SAVE_SECONDS or step + 1 == recipe.steps:
                _save(
                    {
                        "trainer": trainer.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "average": average,
                        "step": step + 1,
                        "elapsed": time.monotonic() - began,
                    },
                    state_path,
                )
                last_saved = time.monotonic()
        if stopping:
            break
    bar.close()
    stop.restore()
    if rank == 0 and not stopping:
        trainer.detector.load_state_dict(average)
        save_native(trainer.detector, folder / WEIGHTS)
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()
    if stopping and workers == 1:
        raise KeyboardInterrupt


def _parameter_groups(trainer: Trainer, recipe: Recipe) -> list[dict]:
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


def _average_gradients(parameters: list[nn.Parameter], workers: int, stop: bool) -> bool:
    """Average gradients over the processes; returns to all of them whether any was asked to stop."""
    if workers == 1:
        return stop
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([float(stop)])])
    dist.all_reduce(flat)
    stop = bool(flat[-1] > 0)
    for gradient, total in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient) / workers)
    return stop


@torch.no_grad()
def _update_average(average: dict[str, Tensor], detector: Detr, decay: float) -> None:
    for name, value in detector.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _save(state: dict, path: Path) -> None:
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    unfinished.replace(path)
