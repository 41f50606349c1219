"""A model with the attention under test in it, on the device under test: what all suites of the model run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headoff.attention import Attention, resolve_attention
from headoff.detr.checkpoints.load import load
from headoff.detr.detector import Detector, Features
from headoff.errors import HeadoffError, NonFiniteError
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding, Property
from headoff.harness.model.precision import InDtype
from headoff.harness.reference.cases import Subject


@contextmanager
def patched(
    subject: Subject, attention: Attention, device: torch.device, dtype: torch.dtype
) -> Iterator[Detector]:
    """The subject's model on `device`, its attention called in `dtype`, all else in float32 at least.

    The model is shared: one at a time. TF32 is off, so that float32 means the same everywhere.
    """
    detector = _model(subject.model, device, width_of(dtype))
    before = detector.attention
    detector.attention = InDtype(resolve_attention(attention), dtype)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield detector
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        detector.attention = before


def width_of(dtype: torch.dtype) -> torch.dtype:
    """What a model computes in whose attention runs in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def features_on(subject: Subject, device: torch.device, dtype: torch.dtype) -> Features:
    """The oracle's features, in what the model computes in where the attention runs in `dtype`."""
    return _features(subject, device, width_of(dtype))


@contextmanager
def failures_as(findings: list[Finding], property: Property, case: str) -> Iterator[None]:
    """Whatever the block raises becomes a finding: NaN and infinity as one of `property`, all else as a crash."""
    try:
        yield
    except NonFiniteError as error:
        findings.append(Finding(property, str(error), case=case))
    except Exception as error:  # an attention under test may raise anything
        findings.append(Finding("crash", _described(error), case=case))


def _described(error: Exception) -> str:
    """In one line, for people."""
    if isinstance(error, HeadoffError):
        return " ".join(str(error).split())
    return f"it raised {describe_exception(error)}"


@functools.cache
def _model(model: str, device: torch.device, dtype: torch.dtype) -> Detector:
    return load(model, device=device, dtype=dtype)


@functools.cache
def _features(subject: Subject, device: torch.device, dtype: torch.dtype) -> Features:
    features = subject.features
    return Features(
        features.tokens.to(device, dtype), features.positions.to(device, dtype), None, features.grid
    )
