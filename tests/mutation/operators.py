"""Mutation operators on Python's syntax tree: every single change that they allow in some functions of a module.

Made mechanically, without a look at what the code does. So most mutants are wrong, some are not, and some do not run.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

CAST = "_in_bfloat16"
"""Name of the function that a mutant with a cast calls; `mutation.sources` defines it."""

ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mod,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}

WITH_AXES = frozenset(
    "all amax any argsort cat cumsum expand flatten flip gather index_add index_copy index_select logsumexp max "
    "mean min narrow new_ones permute repeat roll scatter_add_ softmax log_softmax split stack sum transpose unbind "
    "unflatten unsqueeze view".split()
)
"""Functions whose numbers are axes or sizes."""

WITH_BOUNDS = frozenset("range slice min max blocks narrow arange clamp".split())
"""Functions whose arguments bound something."""

OPTIONAL = frozenset(
    "abs clamp clone contiguous detach div exp exp2 expand float flip log log2 masked_fill mul mul_ nan_to_num neg "
    "sqrt square sub_ to transpose".split()
)
"""Methods that may be left out, as what they return resembles what they are called on."""

OPTIONAL_FUNCTIONS = frozenset(
    {"gate_context", "closed", "rounded", "pad", "where", "maximum", "min", "max", "list"}
)

ALIKE = (
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("dq", "dk", "dv"),
    ("batch", "heads", "queries", "keys", "channels"),
    ("b", "h"),
    ("most", "largest", "safe", "now", "base"),
    ("terms", "weights", "dscores", "scores", "dweights"),
    ("total", "factor", "shrink", "log_sum", "delta"),
    ("height", "width"),
    ("x", "y"),
    ("left", "top"),
    ("row", "column"),
    ("along_x", "along_y"),
    ("slope_x", "slope_y"),
    ("start", "end"),
)
"""Names that are mistaken for each other where a function has both."""


@dataclass(frozen=True)
class Mutation:
    """One change of a module.

    Attributes:
        operator: kind of the change, of a few words.
        line: in the file.
        before, after: source of the smallest statement or expression that shows the change.
    """

    operator: str
    line: int
    before: str
    after: str
    _owner: int = field(repr=False)
    _field: str = field(repr=False)
    _place: int | None = field(repr=False)
    _new: Any = field(repr=False, compare=False)

    def applied(self, tree: ast.Module) -> ast.Module:
        """A changed copy of the tree that the mutation was made for."""
        changed = copy.deepcopy(tree)
        owner = list(ast.walk(changed))[self._owner]
        new = copy.deepcopy(self._new)
        if self._place is None:
            setattr(owner, self._field, new)
        else:
            getattr(owner, self._field)[self._place] = new
        return ast.fix_missing_locations(changed)


def mutations(tree: ast.Module, scope: Iterable[str]) -> list[Mutation]:
    """All mutations of the functions and classes called `scope`, in the order of the source."""
    wanted = set(scope)
    order = {id(node): number for number, node in enumerate(ast.walk(tree))}
    found: list[Mutation] = []

    def add(owner: ast.AST, name: str, place: int | None, old: ast.AST, operator: str, new: ast.AST) -> None:
        before, after = ast.unparse(old), ast.unparse(ast.fix_missing_locations(copy.deepcopy(new)))
        if before != after:
            line = getattr(old, "lineno", 0)
            found.append(Mutation(operator, line, before, after, order[id(owner)], name, place, new))

    def visit(node: ast.AST, locals_: frozenset[str], parents: tuple[ast.AST, ...]) -> None:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
                continue
            for place, child in enumerate(value) if isinstance(value, list) else ((None, value),):
                if not isinstance(child, ast.AST) or isinstance(
                    child, (ast.Raise, ast.JoinedStr, ast.Assert)
                ):
                    continue
                for operator, new in _changes(child, (*parents, node), name, locals_):
                    add(node, name, place, child, operator, new)
                inner = locals_ | _names(child) if isinstance(child, ast.FunctionDef) else locals_
                visit(child, inner, (*parents, node))

    reached: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in wanted - reached:
            reached.add(node.name)
            visit(node, _names(node) if isinstance(node, ast.FunctionDef) else frozenset(), ())
        elif (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in wanted
        ):
            reached.add(node.target.id)
            visit(node, frozenset(), ())
    assert reached == wanted, f"there are no {sorted(wanted - reached)}"
    return found


def _names(function: ast.FunctionDef) -> frozenset[str]:
    """Parameters and variables."""
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    stored = (n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return frozenset((*(p.arg for p in parameters), *stored))


def _changes(
    node: ast.AST, parents: tuple[ast.AST, ...], name: str, locals_: frozenset[str]
) -> Iterator[tuple[str, ast.AST]]:
    """Kinds of changes of `node`, the field `name` of the last parent, and what stands in its place."""
    parent = parents[-1]
    if isinstance(node, ast.BinOp):
        for other in ARITHMETIC.get(type(node.op), ()):
            yield "operator", ast.BinOp(node.left, other(), node.right)
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.BitAnd, ast.BitOr)):
            yield "term dropped", node.left
            if isinstance(node.op, (ast.Add, ast.Mult)):
                yield "term dropped", node.right
        if isinstance(node.op, ast.MatMult):
            yield "arguments swapped", ast.BinOp(node.right, node.op, node.left)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for comparison in COMPARISONS.get(type(node.ops[0]), ()):
            yield "comparison", ast.Compare(node.left, [comparison()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield "logic", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for value in node.values[:2]:
            yield "term dropped", value
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield "logic" if isinstance(node.op, (ast.Not, ast.Invert)) else "operator", node.operand
    elif isinstance(node, ast.IfExp):
        yield "logic", ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.AugAssign):
        for other in ARITHMETIC.get(type(node.op), ()):
            yield "operator", ast.AugAssign(node.target, other(), node.value)
        yield "term dropped", ast.Assign([node.target], node.value)
    if isinstance(node, (ast.Constant, ast.UnaryOp)) and not isinstance(parent, ast.UnaryOp):
        yield from _other_numbers(node, parents)
    if isinstance(node, ast.stmt):
        yield from _other_statements(node)
    if isinstance(node, ast.Call):
        yield from _other_calls(node)
    if isinstance(parent, ast.Call) and name == "args" and _called(parent) in WITH_BOUNDS:
        yield from _shifted(node)
    if isinstance(node, ast.Slice):
        for bound in ("lower", "upper"):
            if (limit := getattr(node, bound)) is not None:
                for operator, new in _shifted(limit):
                    yield (
                        operator,
                        ast.Slice(**{"lower": node.lower, "upper": node.upper, bound: new}, step=node.step),
                    )
    if isinstance(node, ast.Attribute):
        if node.attr in ("float32", "float64", "bfloat16", "float16") and isinstance(node.value, ast.Name):
            other_dtype = "bfloat16" if node.attr == "float32" else "float32"
            yield "dtype", ast.Attribute(node.value, other_dtype, node.ctx)
        if node.attr == "inf":
            yield "constant", ast.Constant(10.0)
        if node.attr == "mT":
            yield "term dropped", node.value
        for other_name in _mistaken(node.attr, _ALIKE_ATTRIBUTES):
            if isinstance(node.value, ast.Name) and node.value.id == "s" and isinstance(node.ctx, ast.Load):
                yield "wrong name", ast.Attribute(node.value, other_name, node.ctx)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in locals_:
        for other_name in _mistaken(node.id, ALIKE):
            if other_name in locals_:
                yield "wrong name", ast.Name(other_name, node.ctx)
                break
    if isinstance(node, (ast.Tuple, ast.List)) and isinstance(node.ctx, ast.Load):
        for place in range(len(node.elts) - 1):
            elements = list(node.elts)
            if not any(isinstance(e, ast.Starred) for e in elements[place : place + 2]):
                elements[place : place + 2] = reversed(elements[place : place + 2])
                yield "arguments swapped", type(node)(elements, node.ctx)


_ALIKE_ATTRIBUTES = (
    ("query", "key", "value"),
    ("scores", "masked", "filled"),
    ("softmax", "weights", "gated"),
    ("gradient", "gated_gradient", "context"),
    ("dweights", "dscores"),
)


def _mistaken(name: str, groups: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for group in groups:
        if name in group:
            place = group.index(name)
            yield from (*group[place + 1 :], *group[:place])


def _called(call: ast.Call) -> str:
    """The last name of what is called."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _other_numbers(
    node: ast.Constant | ast.UnaryOp, parents: tuple[ast.AST, ...]
) -> Iterator[tuple[str, ast.AST]]:
    try:
        number = ast.literal_eval(node)
    except (ValueError, TypeError):
        return
    if isinstance(number, bool):
        yield "constant", ast.Constant(not number)
    elif isinstance(number, int):
        holders = [p for p in parents[-3:] if isinstance(p, (ast.Subscript, ast.Call))]
        holder = holders[-1] if holders else None
        is_axis = isinstance(holder, ast.Subscript) or (
            isinstance(holder, ast.Call) and _called(holder) in WITH_AXES
        )
        for other in (number + 1, number - 1):
            yield "index or axis" if is_axis else "constant", ast.Constant(other)
    elif isinstance(number, float):
        for changed in (number * 1.01, number + 1.0) if number else (1.0, 1e-3):
            yield "constant", ast.Constant(changed)


def _other_statements(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.If):
        for truth in (True, False):
            if truth or node.orelse:
                yield "logic", ast.If(ast.Constant(truth), node.body, node.orelse)
        yield "statement dropped", ast.Pass()
    elif isinstance(node, (ast.AugAssign, ast.Continue)):
        yield "statement dropped", ast.Pass()
    elif isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield)):
        yield "statement dropped", ast.Pass()
    elif isinstance(node, ast.Assign):
        target = node.targets[0]
        read = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        if isinstance(target, ast.Subscript) or (isinstance(target, ast.Name) and target.id in read):
            yield "statement dropped", ast.Pass()
        if isinstance(target, ast.Name) and not isinstance(node.value, (ast.Constant, ast.Tuple, ast.Lambda)):
            yield "cast added", ast.Assign(node.targets, _cast(node.value))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield "cast added", ast.Return(_cast(node.value))


def _cast(value: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(CAST, ast.Load()), [value], [])


def _other_calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    called = _called(node)
    if (
        isinstance(node.func, ast.Attribute)
        and called in OPTIONAL
        and not isinstance(node.func.value, ast.Name)
    ):
        yield "term dropped", node.func.value
    elif isinstance(node.func, ast.Attribute) and called in OPTIONAL and node.func.value.id != "torch":
        yield "term dropped", node.func.value
    if called in OPTIONAL_FUNCTIONS:
        for argument in node.args[1:] if called == "where" else node.args[:2]:
            if not isinstance(argument, (ast.Starred, ast.GeneratorExp)):
                yield "term dropped", argument
    for place in range(min(len(node.args) - 1, 3)):
        if not any(isinstance(a, ast.Starred) for a in node.args[place : place + 2]):
            arguments = list(node.args)
            arguments[place : place + 2] = reversed(arguments[place : place + 2])
            yield "arguments swapped", ast.Call(node.func, arguments, node.keywords)
    for keyword in node.keywords:
        rest = [other for other in node.keywords if other is not keyword]
        yield "keyword removed", ast.Call(node.func, node.args, rest)


def _shifted(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """One further and one less; numbers are shifted elsewhere."""
    if isinstance(node, (ast.Constant, ast.UnaryOp, ast.Starred, ast.GeneratorExp)) or not isinstance(
        node, ast.expr
    ):
        return
    yield "boundary", ast.BinOp(node, ast.Add(), ast.Constant(1))
    yield "boundary", ast.BinOp(node, ast.Sub(), ast.Constant(1))
