"""docs/gallery.md says of every adapter what `headoff verify` says; the adapters that need only torch run here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import headoff
from headoff.attention import resolve_attention
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.compare import operator_findings

ROOT = Path(headoff.__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import gallery  # noqa: E402

ENTRIES = {entry.name: entry for entry in gallery.ENTRIES}


@pytest.fixture(scope="module")
def sections():
    """Of the page, by the name of the adapter."""
    _, *parts = gallery.PAGE.read_text().split("\n## ")
    return {part.partition("\n")[0]: part for part in parts}


def test_the_page_has_every_adapter_as_it_is(sections):
    files = {path.stem for path in gallery.ADAPTERS.glob("*.py")}
    assert files == set(ENTRIES) == set(sections)
    table = gallery.PAGE.read_text()
    for name, entry in ENTRIES.items():
        assert f"| [{name}](#{name}) |" in table
        assert f"```python\n{entry.code}\n```" in sections[name], f"run tools/gallery.py --only {name}"


def test_what_is_said_to_be_wrong_is_shown_by_hand(sections):
    wrong = {name for name, text in sections.items() if "**wrong**" in text}
    by_hand = {path.stem for path in gallery.BY_HAND.glob("*.py")}
    assert wrong == by_hand
    for name in wrong:
        text = (gallery.BY_HAND / f"{name}.py").read_text()
        assert "import headoff" not in text and text.strip() in sections[name]


@pytest.mark.parametrize("name", ["sdpa_math", "sdpa_flash", "multi_head_attention_forward"])
def test_adapters_that_need_torch_alone_are_right_in_a_usual_case(name):
    attention = resolve_attention(f"{ENTRIES[name].file}:attention")
    case = OperatorCase(
        name="usual", batch=2, heads=3, queries=9, keys=14, mask="padding", gate="full", dtype=torch.float32
    )
    assert operator_findings(attention, case, torch.device("cpu")) == []
