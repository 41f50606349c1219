"""With the attention under test the model's end-to-end gradients are the oracle's, for every configuration.

Of a class logit or a side of a box, with respect to the encoder's output (the memory), to its input tokens, and to the
pixels, to which both the gradient found and the expected one are sent through the same backbone. By plain autograd,
with all configurations as one batch, each item with gates of its own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headoff.gates import stack
from headoff.harness.finding import fail_on
from headoff.harness.model.gradients import (
    expected_gradients,
    gradient_errors,
    gradient_findings,
    gradient_tolerance,
    gradients_with,
)
from headoff.harness.model.mutations import require_rejected, some_heads, with_wrong_heads
from headoff.harness.model.patched import findings_about
from headoff.harness.plugin.scenes import parametrize_scenes
from headoff.harness.reference.cases import configuration_names, reference_case

SCENES = 1
"""Images that are tried: gradients of more of them say nothing new, and each takes seconds."""


def pytest_generate_tests(metafunc):
    parametrize_scenes(metafunc, some_scene=SCENES)


@pytest.fixture
def case(some_scene, under_test):
    return reference_case(under_test.settings, some_scene)


def findings_of(under_test, case):
    return under_test.in_model(gradient_findings, case)


@pytest.mark.parametrize("configuration", configuration_names())
def test_expected_gradients(case, under_test, configuration):
    """The largest error of a token's gradient is within what right implementations differ by."""
    fail_on(findings_about(findings_of(under_test, case), configuration))


def test_attention_is_called_at_every_site(case, under_test):
    """Once in every layer, for every forward pass."""
    fail_on(findings_about(findings_of(under_test, case), None))


def test_the_tolerance_rejects_wrong_gradients(case, under_test):
    """Zero gradients, those of the next configuration, and those with one head's gate wrong are rejected.

    One wrong head for each configuration; other seeds try others.
    """
    expected = expected_gradients(case)
    chosen = case.configurations
    allowed = gradient_tolerance(case, under_test.device, under_test.dtype).allowed
    heads = some_heads(case.layout, under_test.seed, len(chosen))
    gates = with_wrong_heads(stack(chosen, case.layout), case.layout, heads)
    wrong_gate = gradients_with(
        case.detector.attention, case, under_test.device, under_test.dtype, chosen, gates
    )
    nonzero = expected["memory"].flatten(1).any(-1).numpy()
    assert nonzero.sum() > len(chosen) / 2, "hardly any gradients: this image tests nothing"

    def changed(change):
        return replace(wrong_gate, memory=change(expected["memory"]), tokens=change(expected["tokens"]))

    accepted = []
    wrong = {
        "no gradient": changed(torch.zeros_like),
        "the gradient under the next configuration": changed(lambda gradient: gradient.roll(-1, 0)),
        "the gradient with one head's gate wrong": wrong_gate,
    }
    for what, found in wrong.items():
        errors = gradient_errors(case, chosen, found)
        # Where everything is off the expected gradient is zero, and so may all of these be.
        passes = nonzero & (np.maximum(errors["memory"], errors["tokens"]) <= allowed)
        accepted += [f"under '{chosen[index].name}' {what} passes" for index in passes.nonzero()[0]]
    require_rejected(under_test, case, "wrong gradients", accepted, len(wrong) * int(nonzero.sum()))
