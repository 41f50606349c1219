"""What is timed: attention at each site's shapes, the decoder, the sweep, relevance. Each for a number of heads off.

A workload makes a `TimedCall` for any attention, all with the same inputs, and names the tensors that a call returns,
so that they can be compared with the oracle's.

Attention itself is timed with the first k heads off in all rows. Detector and relevance are timed for any
configurations together: they share what they have in common, as they do in use.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, Self, get_args

import torch
from torch import Tensor

from headoff.attention import Attention
from headoff.bench.models import BenchmarkModel, with_attention
from headoff.detections import class_probabilities
from headoff.detr.detector import Detector, DetectorOutput, Memory
from headoff.gates import Configuration, Gates, Site, stack
from headoff.harness.finding import Property
from headoff.relevance import Explanation, explain
from headoff.sweeps import SweepResult, sweep
from headoff.timing.calls import TimedCall

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

CONFIGURATIONS = 9
"""Of the cumulative sweep: so many are decoded together, end to end in cross-attention, as batch items before it."""


@dataclass(frozen=True)
class Output:
    """One of the tensors that a call returned.

    - `rows` (n, m): compared row by row, each by its own peak, so that what is small is to be right as well
    - `property`: what is wrong with an attention that gets it wrong
    """

    rows: Tensor
    property: Property


class Workload(Protocol):
    """Something to be computed with an attention."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the attention's inputs."""

    @property
    def roundings(self) -> int:
        """Attention layers that an output comes through. Each rounds at least once."""

    @property
    def through_relus(self) -> Detector | None:
        """The detector whose ReLUs gradients come through on their way to an output, where they do."""

    def side(self, attention: Attention) -> TimedCall:
        """To be timed."""

    def outputs(self, result: Any) -> dict[str, Output]:
        """What a call of a side returned, by name."""

    def in_dtype(self, dtype: torch.dtype) -> Workload:
        """The same inputs, rounded to the dtype under test, in another."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionCall:
    """One attention call: what its workloads have in common.

    - `query` (B, H, Q, D), `key`, `value` (B, H, S, D), `d_context` as `query`
    - `head_gate` (B, H, Q, 1), or None
    """

    query: Tensor
    key: Tensor
    value: Tensor
    d_context: Tensor
    head_gate: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def roundings(self) -> int:
        return 1

    @property
    def through_relus(self) -> None:
        return None

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the same memory, requiring gradients."""
        query, key, value = (each.detach().requires_grad_() for each in (self.query, self.key, self.value))
        return query, key, value

    def in_dtype(self, dtype: torch.dtype) -> Self:
        tensors = ("query", "key", "value", "d_context")
        gate = None if self.head_gate is None else self.head_gate.to(dtype)
        return replace(self, head_gate=gate, **{name: getattr(self, name).to(dtype) for name in tensors})


@dataclass(frozen=True, eq=False, kw_only=True)
class OperatorWorkload(AttentionCall):
    """One attention call at a site's shapes, as the detector makes it.

    Backward, the graph is made in the preparation: what is timed is the way from the gradient of the context to those
    of query, key and value.
    """

    site: Site
    direction: Direction
    off: int

    @classmethod
    def of(
        cls, subject: BenchmarkModel, site: Site, direction: Direction, off: int, seed: int
    ) -> OperatorWorkload:
        """Random inputs, in the layout of the detector's projections: (B, T, H, D), seen as (B, H, T, D)."""
        config = subject.detector.config
        batch, queries, keys = {
            "encoder_self": (1, subject.tokens, subject.tokens),
            "decoder_self": (CONFIGURATIONS, config.queries, config.queries),
            "decoder_cross": (1, CONFIGURATIONS * config.queries, subject.tokens),
        }[site]
        device, dtype = subject.detector.device, subject.detector.dtype
        # Not Python's own hash of a text, which is another in every process.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{site} {seed}".encode()))
        per_token = config.heads, config.width // config.heads

        def random(length: int) -> Tensor:
            return (
                torch.randn(batch, length, *per_token, generator=generator).to(device, dtype).transpose(1, 2)
            )

        gate = torch.ones(batch, config.heads, queries, 1, device=device, dtype=dtype)
        gate[:, :off] = 0
        # With nothing off the detector passes no gate at all.
        return cls(
            site=site,
            direction=direction,
            off=off,
            query=random(queries),
            key=random(keys),
            value=random(keys),
            d_context=random(queries),
            head_gate=gate if off else None,
        )

    @property
    def name(self) -> str:
        return f"{self.site} {self.direction}, {self.off} heads off"

    def side(self, attention: Attention) -> TimedCall:
        if self.direction == "forward":
            return TimedCall(
                lambda: attention(self.query, self.key, self.value, None, head_gate=self.head_gate)
            )
        query, key, value = self.leaves()

        def gradients(context: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(context, (query, key, value), self.d_context, allow_unused=True)

        return TimedCall(gradients, lambda: (attention(query, key, value, None, head_gate=self.head_gate),))

    def outputs(self, result: Any) -> dict[str, Output]:
        if self.direction == "forward":
            return {"context": Output(result.flatten(0, 1).flatten(1), "context")}
        inputs: tuple[tuple[Property, Tensor], ...] = (
            ("dq", self.query),
            ("dk", self.key),
            ("dv", self.value),
        )
        found = {}
        for gradient, (name, of) in zip(result, inputs, strict=True):
            # An attention that left an input out of its graph says that its gradient is zero.
            rows = torch.zeros_like(of) if gradient is None else gradient
            found[str(name)] = Output(rows.flatten(0, 1).flatten(1), name)
        return found


@dataclass(frozen=True, eq=False)
class _DetectorWorkload:
    subject: BenchmarkModel
    configurations: tuple[Configuration, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.subject.detector.dtype

    @property
    def roundings(self) -> int:
        config = self.subject.detector.config
        return config.encoder_layers + 2 * config.decoder_layers

    @property
    def span(self) -> str:
        """The configurations, for people."""
        first, *_, last = [*self.configurations] * 2
        return first.name if len(self.configurations) == 1 else f"{first.name} to {last.name}"

    @cached_property
    def gates(self) -> Gates:
        return stack(self.configurations, self.subject.detector.head_layout)

    def in_dtype(self, dtype: torch.dtype) -> Any:
        return replace(self, subject=self.subject.in_dtype(dtype))


@dataclass(frozen=True, eq=False)
class DecoderWorkload(_DetectorWorkload):
    """One decode of all configurations; backward, from logits and boxes to the gradient of the memory."""

    direction: Direction
    memory: Memory
    cotangents: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        subject: BenchmarkModel,
        configurations: tuple[Configuration, ...],
        direction: Direction,
        seed: int,
    ) -> DecoderWorkload:
        """The gradients of logits and boxes are random."""
        config, like = subject.detector.config, subject.memory.tokens
        generator = torch.Generator().manual_seed(seed)
        cotangents = tuple(
            torch.randn(len(configurations), 1, config.queries, size, generator=generator).to(like)
            for size in (config.classes + 1, 4)
        )
        return cls(subject, configurations, direction, subject.memory, cotangents)

    @property
    def name(self) -> str:
        return f"decoder {self.direction}, {self.span}"

    @property
    def through_relus(self) -> Detector | None:
        return self.subject.detector if self.direction == "backward" else None

    def side(self, attention: Attention) -> TimedCall:
        detector, gates = with_attention(self.subject.detector, attention), self.gates
        if self.direction == "forward":

            def decode() -> DetectorOutput:
                with torch.inference_mode():
                    return detector.decode(self.memory, gates)

            return TimedCall(decode)
        tokens = self.memory.tokens.detach().requires_grad_()
        memory = replace(self.memory, tokens=tokens)

        def gradient(output: DetectorOutput) -> Tensor:
            return torch.autograd.grad((output.logits, output.boxes), tokens, self.cotangents)[0]

        return TimedCall(gradient, lambda: (detector.decode(memory, gates),))

    def outputs(self, result: Any) -> dict[str, Output]:
        if self.direction == "forward":
            return _answers(result.logits, result.boxes)
        return {"gradient of the memory": Output(result.flatten()[None], "gradients")}

    def in_dtype(self, dtype: torch.dtype) -> DecoderWorkload:
        memory = replace(
            self.memory, tokens=self.memory.tokens.to(dtype), positions=self.memory.positions.to(dtype)
        )
        cotangents = tuple(each.to(dtype) for each in self.cotangents)
        return replace(super().in_dtype(dtype), memory=memory, cotangents=cotangents)


@dataclass(frozen=True, eq=False)
class SweepWorkload(_DetectorWorkload):
    """`headoff.sweep`, from the picture to the outcomes."""

    @property
    def name(self) -> str:
        return f"sweep, {self.span}"

    @property
    def through_relus(self) -> None:
        return None

    def side(self, attention: Attention) -> TimedCall:
        detector = with_attention(self.subject.detector, attention)
        return TimedCall(lambda: sweep(detector, self.subject.picture, self.configurations))

    def outputs(self, result: SweepResult) -> dict[str, Output]:
        return _answers(result.logits, result.boxes)


@dataclass(frozen=True, eq=False)
class RelevanceWorkload(_DetectorWorkload):
    """`headoff.explain`, from the picture to the maps.

    Gradients pass every attention by its own backward pass, the baseline's as well as the patch's: of the package's
    own attentions `explain` would use a formula.
    """

    queries: tuple[int, ...]

    @classmethod
    def of(
        cls, subject: BenchmarkModel, configurations: tuple[Configuration, ...], objects: int
    ) -> RelevanceWorkload:
        """Explains the queries that are surest of an object, with nothing off."""
        exact = subject.in_dtype(torch.float64)
        with torch.no_grad():
            logits = with_attention(exact.detector, "eager").decode(exact.memory).logits[0, 0]
        surest = class_probabilities(logits)[:, :-1].amax(-1).argsort(descending=True)
        return cls(subject, configurations, tuple(surest[:objects].tolist()))

    @property
    def name(self) -> str:
        return f"relevance, {self.span}"

    @property
    def through_relus(self) -> Detector:
        return self.subject.detector

    def side(self, attention: Attention) -> TimedCall:
        detector, picture = with_attention(self.subject.detector, attention), self.subject.picture
        return TimedCall(
            lambda: explain(detector, picture, self.configurations, self.queries, backward="callable")
        )

    def outputs(self, result: Explanation) -> dict[str, Output]:
        maps = Output(result.maps.flatten(0, 2).flatten(1), "relevance")
        return {**_answers(result.logits, result.boxes), "maps": maps}


def _answers(logits: Tensor, boxes: Tensor) -> dict[str, Output]:
    """Row by row of (configurations, ...)."""
    return {
        "logits": Output(logits.flatten(1), "detections"),
        "boxes": Output(boxes.flatten(1), "detections"),
    }
