"""A model with the attention under test in it, on the device under test: what all suites of the model run.

The attention is called in the dtype under test, and all else computes in float32 at least. A low-precision kernel is
judged by its own rounding, and not by that of weights, norms and feed-forward blocks in the same low precision, which
would be many times larger and hide it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from headoff.attention import Attention, resolve_attention
from headoff.calls import Attend, AttentionAddress, AttentionCall
from headoff.deformable import DeformableAttention
from headoff.detector import Detector
from headoff.detr.checkpoints import ModelChoice
from headoff.detr.detector import Detr, Features
from headoff.errors import HeadoffError, NonFiniteError
from headoff.gates import SITES
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding, Property
from headoff.harness.reference.cases import ReferenceCase


@contextmanager
def patched(
    case: ReferenceCase, attention: Attention, device: torch.device, dtype: torch.dtype
) -> Iterator[Detr]:
    """The case's model on `device`, its attention called in `dtype`.

    The model is shared: one at a time. TF32 is off, so that float32 means the same everywhere.
    """
    detector = _model(case.model, device, model_dtype(dtype))
    before = detector.attention
    in_dtype: Any = InDtype(resolve_attention(attention), dtype)
    detector.attention = in_dtype
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield detector
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        detector.attention = before


def own_detector(case: ReferenceCase, attention: Attention, device: torch.device, dtype: torch.dtype) -> Detr:
    """The same as a new model, whose weights may be changed."""
    in_dtype: Any = InDtype(resolve_attention(attention), dtype)
    return case.model.load_detr(attention=in_dtype, device=device, dtype=model_dtype(dtype))


def model_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a model computes in whose attention is called in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def features_on(case: ReferenceCase, device: torch.device, dtype: torch.dtype) -> Features:
    """The oracle's features, in what the model computes in where the attention is called in `dtype`."""
    features, dtype = case.features, model_dtype(dtype)
    return Features(
        features.tokens.to(device, dtype), features.positions.to(device, dtype), None, features.grid
    )


@functools.cache
def _model(model: ModelChoice, device: torch.device, dtype: torch.dtype) -> Detr:
    return model.load_detr(device=device, dtype=dtype)


class CallCount:
    """How often a detector has called its attention at each address, and how often it has to.

    Args:
        detector: see `counting_calls`.
        encodes, decodes: how often the model runs its encoder and its decoder.
        at_least: whether more calls are right too, as a backward pass may repeat the forward pass.
    """

    def __init__(self, detector: Detector, encodes: int, decodes: int, at_least: bool = False) -> None:
        self.of: Counter[AttentionAddress] = Counter()
        self._layout = detector.head_layout
        self._times = {site: encodes if site == "encoder_self" else decodes for site in SITES}
        self._at_least = at_least

    @property
    def by_site(self) -> dict[str, int]:
        """Calls at each site, all layers together."""
        return {site: sum(n for address, n in self.of.items() if address.site == site) for site in SITES}

    def findings(self, case: str) -> list[Finding]:
        """One for each site where a layer has called its attention less often than it must, or more often."""
        findings = []
        for site, times in self._times.items():
            counts = {
                layer: self.of[AttentionAddress(site, layer)] for layer in range(self._layout.layers(site))
            }
            wrong = {
                layer: count
                for layer, count in counts.items()
                if count < times or (count > times and not self._at_least)
            }
            if wrong:
                layer, count = next(iter(wrong.items()))
                findings.append(
                    Finding(
                        "calls",
                        f"{site}: called {_times(count)} in layer {layer}, expected {_times(times)}"
                        + (f" (and in {len(wrong) - 1} other layers)" if len(wrong) > 1 else ""),
                        case=case,
                        error=float(count),
                        budget=float(times),
                        site=site,
                        layer=layer,
                    )
                )
        return findings


@contextmanager
def counting_calls(
    detector: Detector, encodes: int, decodes: int, at_least: bool = False
) -> Iterator[CallCount]:
    """Count the calls that the attention answers in this context; a call that raises is not counted."""
    calls = CallCount(detector, encodes, decodes, at_least)

    def count(call: AttentionCall, proceed: Attend) -> Tensor:
        context = proceed(call)
        calls.of[call.address] += 1
        return context

    with detector.intercepting(count):
        yield calls


class HasCalls(Protocol):
    """The result of a run of the model."""

    @property
    def calls(self) -> CallCount: ...


Result = TypeVar("Result", bound=HasCalls)


def findings_of_run(
    property: Property,
    case: str,
    run: Callable[[], Result],
    compare: Callable[[Result], list[Finding]],
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """What is wrong with a run of the model: an exception, calls that are missing, or what `compare` finds.

    Args:
        property: of a result that is not finite.
        case: for people.
        run: computes the result with the attention under test.
        compare: finds what is wrong with the result; exceptions in here are not the attention's.
        calls: the calls at each site are added to these.
    """
    findings: list[Finding] = []
    results: list[Result] = []
    with failures_as(findings, property, case):
        results.append(run())
    for result in results:
        if calls is not None:
            calls.update(result.calls.by_site)
        findings += result.calls.findings(case)
        findings += compare(result)
    return findings


@contextmanager
def failures_as(findings: list[Finding], property: Property, case: str) -> Iterator[None]:
    """Append what the block raises: NaN and infinity as a finding of `property`, all else as a crash."""
    try:
        yield
    except NonFiniteError as error:
        findings.append(Finding(property, str(error), case=case))
    except Exception as error:  # an attention under test may raise anything
        message = (
            " ".join(str(error).split())
            if isinstance(error, HeadoffError)
            else f"it raised {describe_exception(error)}"
        )
        findings.append(Finding("crash", message, case=case))


def findings_about(findings: Sequence[Finding], configuration: str | None) -> list[Finding]:
    """Those of one configuration, or for None those of no configuration.

    An exception is of no configuration, and about every one; missing calls are about none.
    """
    return [
        finding
        for finding in findings
        if finding.configuration == configuration
        or (finding.configuration is None and finding.property != "calls")
    ]


class InDtype:
    """`attention` of either contract, called in `dtype` by a model in another: tensors are converted, the context back.

    float16 cannot hold gradients as small as those of relevance. So the gradient of the context is multiplied by a
    power of two, the loss scale, and the gradients of the inputs are divided by it, as in mixed-precision training.
    """

    def __init__(self, attention: Attention | DeformableAttention, dtype: torch.dtype) -> None:
        self.attention = attention
        self.dtype = dtype

    # Any keywords: the detector adapts a callable whose signature does not name those of its contract.
    def __call__(self, *inputs: Any, **keywords: Any) -> Tensor:
        """`inputs` and `head_gate` as in the contract; bool masks and sizes of levels stay as they are."""
        first: Tensor = inputs[0]
        head_gate: Tensor | None = keywords.pop("head_gate", None)
        if head_gate is not None:
            head_gate = head_gate.to(self.dtype)[(None,) * (4 - head_gate.dim())]
        if first.dtype == self.dtype:
            return self.attention(*inputs, head_gate=head_gate, **keywords)
        scale = _LossScale()
        converted = [
            _ToDtype.apply(x, self.dtype, scale) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in inputs
        ]
        context = self.attention(*converted, head_gate=head_gate, **keywords)
        return _FromDtype.apply(context, first.dtype, scale)


class _LossScale:
    """Of one call: its backward pass sets the factor at the context and uses it at the inputs."""

    factor = 1.0


class _ToDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, scale: _LossScale) -> Tensor:
        ctx.dtype, ctx.scale = x.dtype, scale
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].to(ctx.dtype) / ctx.scale.factor, None, None


class _FromDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Tensor, dtype: torch.dtype, scale: _LossScale) -> Tensor:
        ctx.dtype, ctx.scale = context.dtype, scale
        return context.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grad_context,) = gradients
        if ctx.dtype == torch.float16:
            ctx.scale.factor = loss_scale(grad_context)
        return (grad_context * ctx.scale.factor).to(ctx.dtype), None, None


def loss_scale(grad_context: Tensor) -> float:
    """The power of two that brings the largest number of a gradient to between a half and one."""
    largest = float(grad_context.abs().max())
    return 2.0 ** -math.ceil(math.log2(largest)) if 0 < largest < math.inf else 1.0


def _times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count} times")
