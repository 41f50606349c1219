"""With the attention under test the model's end-to-end gradients are the oracle's, for every configuration.

Of a class logit or a side of a box, with respect to the encoder's output (the memory), to its input tokens, and to the
pixels, to which both the gradient found and the true one are sent through the same backbone. By plain autograd, with
all configurations as one batch, each item with gates of its own.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from headoff.gates import stack
from headoff.harness.finding import fail_on
from headoff.harness.model.gradients import (
    FoundGradients,
    found_gradients,
    gradient_budget,
    gradient_errors,
    gradient_findings,
    true_gradients,
)
from headoff.harness.model.mutations import share_of_heads, with_wrong_heads
from headoff.harness.plugin.options import settings_from
from headoff.harness.reference import cases as subjects
from headoff.harness.reference.cases import configuration_names

SCENES = 1
"""Images that are tried: gradients of more of them say nothing new, and each takes seconds."""


def pytest_generate_tests(metafunc):
    if "some_scene" in metafunc.fixturenames:
        metafunc.parametrize("some_scene", subjects.names(settings_from(metafunc.config))[:SCENES])


@pytest.fixture
def subject(some_scene, under_test):
    return subjects.subject(under_test.settings, some_scene)


@pytest.fixture(scope="module")
def findings_of(under_test):
    """All that is wrong on a subject, found once."""

    @functools.cache
    def find(subject):
        return gradient_findings(
            under_test.attention, subject, under_test.device, under_test.dtype, calls=under_test.calls
        )

    return find


@pytest.mark.parametrize("configuration", configuration_names())
def test_expected_gradients(subject, configuration, findings_of):
    """The longest error of a token's gradient is within what right implementations differ by."""
    fail_on(
        [
            each
            for each in findings_of(subject)
            if each.configuration == configuration
            or (each.configuration is None and each.property != "calls")
        ]
    )


def test_attention_is_called_at_every_site(subject, findings_of):
    """Once in every layer, for every forward pass."""
    fail_on([each for each in findings_of(subject) if each.configuration is None])


def test_the_tolerance_refuses_wrong_gradients(subject, under_test):
    """Zero gradients, those of the next configuration, and those with one head's gate wrong are refused.

    One wrong head for each configuration; other seeds try others.
    """
    truth = true_gradients(subject)
    chosen = subject.configurations
    allowed = gradient_budget(subject, under_test.device, under_test.dtype)
    heads = share_of_heads(subject.layout, under_test.seed, len(chosen))
    gates = with_wrong_heads(stack(chosen, subject.layout), subject.layout, heads)
    wrong_gate = found_gradients(
        subject.detector.attention, subject, under_test.device, under_test.dtype, chosen, gates
    )
    some = truth["memory"].flatten(1).any(-1).numpy()
    accepted = []
    for what, found in (
        ("no gradient", replaced(wrong_gate, lambda each: torch.zeros_like(each), truth)),
        (
            "the gradient under the next configuration",
            replaced(wrong_gate, lambda each: each.roll(-1, 0), truth),
        ),
        ("the gradient with one head's gate wrong", wrong_gate),
    ):
        errors = gradient_errors(subject, chosen, found)
        # Where everything is off the truth is zero, and so may all of these be.
        passes = some & (np.maximum(errors["memory"], errors["tokens"]) <= allowed)
        accepted += [f"{chosen[index].name}: {what} passes" for index in passes.nonzero()[0]]
    assert some.sum() > len(chosen) / 2, "hardly any gradients: this image tests nothing"
    if accepted and (subject.model != subjects.BUNDLED or torch.finfo(under_test.dtype).bits < 32):
        pytest.skip(f"the tolerance cannot tell {len(accepted)} wrong gradients from rounding: {accepted[0]}")
    assert not accepted, "\n".join(accepted)


def replaced(found, change, truth) -> FoundGradients:
    """Gradients made of the true ones by `change`."""
    return FoundGradients(change(truth["memory"]), change(truth["tokens"]), found.calls, found.batches)
