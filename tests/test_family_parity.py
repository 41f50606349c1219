"""Detectors of transformers, loaded by headoff, compute what transformers computes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family_examples import IN_FLOAT64, KINDS, batch, loaded, reference

CASES = [pytest.param(kind, torch.float32, 1e-5, id=f"{kind} float32") for kind in KINDS]
CASES += [pytest.param(kind, torch.float64, 1e-9, id=f"{kind} float64") for kind in IN_FLOAT64]


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@torch.no_grad()
def test_logits_and_boxes_are_those_of_transformers(kind, dtype, tolerance, padded):
    pixels, mask = batch(dtype)
    theirs = reference(kind, dtype)(pixels, pixel_mask=mask.long() if padded else None)
    ours = loaded(kind, dtype)(pixels, mask if padded else None)
    assert theirs.logits.std() > 0.1  # a comparison of something
    torch.testing.assert_close(ours.logits[0], theirs.logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.boxes[0], theirs.pred_boxes, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [pytest.param("dab-detr", marks=pytest.mark.slow), "table-transformer"])
def test_padding_counts_in_the_first_model_of_a_process(kind):
    """What headoff registers with transformers is registered for all kinds, not only by those that call it."""
    test = f"test_logits_and_boxes_are_those_of_transformers({kind!r}, torch.float32, 1e-5, True)"
    program = f"import torch; from test_family_parity import *; {test}"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
