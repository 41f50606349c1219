"""What `import headoff` offers, and that it is imported only when asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import headoff


def names_for_type_checkers() -> dict[str, str]:
    """Those imported under TYPE_CHECKING, by name, with their modules."""
    tree = ast.parse(Path(headoff.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {alias.name: str(node.module) for node in block.body for alias in node.names}  # type: ignore[attr-defined]


def test_every_name_is_there_and_type_checkers_see_the_same():
    assert names_for_type_checkers() == headoff._MODULE_OF
    assert sorted(headoff.__all__) == sorted(headoff._MODULE_OF)
    for name in headoff.__all__:
        assert getattr(headoff, name) is not None
        assert name in dir(headoff)


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sweeep'"):
        headoff.sweeep  # noqa: B018
    assert headoff.gates.first_off is headoff.first_off


@pytest.mark.parametrize("module", ["headoff", "headoff.harness.plugin.hooks"])
def test_torch_is_not_imported_for_nothing(module):
    program = f"import sys, {module}; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    root = str(Path(headoff.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
