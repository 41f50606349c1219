"""Which packages of headoff may import which: data flows one way, see docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import headoff
from headoff.harness.reference import cache

PACKAGE = Path(headoff.__file__).parent

LAYERS = (
    {"errors", "versions", "wording", "choices", "signatures", "scoring", "boxes"},
    {"files", "devices", "callables", "dataframes", "images", "gates", "templates", "timing"},
    {"attention"},
    {"deformable"},
    {"calls"},
    {"detector"},
    {"detections", "encoded", "detr"},
    {"outcomes", "family", "scenes"},
    {"values"},
    {"ablation"},
    {"sweeps"},
    {"totals", "relevance"},
    {"importance"},
    {"effects", "faithfulness", "harness"},
    {"evaluation"},
    {"figures", "bench"},
    {"report"},
    {"live"},
    {"cli"},
    {"__main__"},
)
"""Modules and packages of headoff. Each imports those of the layers above it alone, and itself."""

DEFERRED = {
    # A name, a folder or a file says which of the two kinds of detector is loaded.
    ("detr", "family"),
    # How results show themselves in a notebook.
    ("sweeps", "figures"),
    ("relevance", "figures"),
    ("importance", "figures"),
    # Average precision of masks that are made of maps.
    ("faithfulness", "evaluation"),
    # Pictures of what is wrong, and pages of results.
    ("harness", "figures"),
    ("evaluation", "report"),
    # Imported before the attention under test, so that what it replaces is seen.
    ("harness", "bench"),
}
"""Imports of a later layer that a function may make when it is called."""

NO_NUMBERS = {
    *("callables", "choices", "dataframes", "devices", "errors", "figures"),
    *("files", "scenes", "signatures", "totals", "wording"),
}
"""What those of `headoff.harness.reference.cache` import, and whose changes move no expected number:
what is said and written, what images are found by (their contents are part of the key), and means over images."""

WITH_PYTEST = {"harness", "bench"}
WITH_RAY = {"evaluation"}


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports, and whether it does so when it is itself imported."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module == "headoff":
                yield from ((f"headoff.{alias.name}", at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                yield child.module, at_once
            checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or checked
            yield from walk(child, at_once and not inner)

    return walk(ast.parse(path.read_text()), True)


def imports() -> Iterator[tuple[str, str, str, bool]]:
    """(file, its module or package in headoff, what it imports, at once)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        unit = inside.parts[0].removesuffix(".py")
        if unit != "__init__":
            yield from ((str(inside), unit, name, at_once) for name, at_once in imports_of(path))


def test_imports_follow_the_layers():
    layer_of = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}
    wrong = []
    for file, unit, name, at_once in imports():
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if first != "headoff" or other in ("", "__version__", unit):
            continue
        earlier = layer_of[other] < layer_of[unit]
        if not earlier and (at_once or (unit, other) not in DEFERRED):
            wrong.append(f"{file} imports {name}: {other} is not in a layer above {unit}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_layer():
    units = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/*.py")
    }
    assert units - {"__init__", "suites"} == set().union(*LAYERS)


def test_what_expected_results_are_computed_by_is_hashed():
    """Otherwise a change would be judged by results that were kept from before."""
    hashed = {name.partition("/")[0].removesuffix(".py") for name in cache.SOURCES} - {"harness"}
    used = {
        name.split(".")[1]
        for _, unit, name, _ in imports()
        if unit in hashed and name.startswith("headoff.") and name != "headoff.__version__"
    }
    assert used - hashed == NO_NUMBERS


def test_only_the_harness_knows_pytest_and_only_evaluation_ray():
    using = {"pytest": set(), "ray": set()}
    for _, unit, name, _ in imports():
        if (first := name.partition(".")[0]) in using:
            using[first].add(unit)
    assert using == {"pytest": WITH_PYTEST, "ray": WITH_RAY}
