"""What an attention does wrong, found without the harness: in the numbers of one call, and across several calls."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from headoff.attention import Attention, eager
from headoff.harness.fallback import SdpaCount, exceptions_inside
from mutants.cases import Call, Case, distance, expanded, inputs
from mutants.registry import Effect

MARGIN = 4.0
"""Errors of wrong attentions must be this much larger than what is allowed: not wrong by bad luck."""


def effects_on_one_call(attention: Attention, case: Case, margin: float = 1.0) -> set[Effect]:
    """What is wrong with the numbers, dtypes and memory of one call of a fresh attention and its backward pass.

    Gradients are not looked at where the context is wrong. Numbers are wrong when their error is `margin` times what is
    allowed, and more.
    """
    call = case.call()
    copies = [x.detach().clone() for x in call.tensors]
    try:
        with settings_kept():
            context = call.run(attention)
    except Exception:
        return {"crash"}
    found: set[Effect] = set()
    if context.dtype != call.query.dtype:
        found.add("dtype")
    if expanded(context) or any(shares_memory(context, x) for x in call.tensors):
        found.add("layout")
    if not context.requires_grad:
        found.add("no gradient")
    error = distance(context, case.truth["context"])
    if error > margin * case.allowed["context"]:
        found.add("context")
    elif context.requires_grad and error <= case.allowed["context"]:
        leaves = {"dq": call.query, "dk": call.key, "dv": call.value}
        leaves = {name: x for name, x in leaves.items() if x.requires_grad}
        try:
            gradients = torch.autograd.grad(
                context, list(leaves.values()), call.gradient.to(context.dtype), allow_unused=True
            )
        except RuntimeError:
            return found | {"crash"}
        for name, gradient in zip(leaves, gradients, strict=True):
            # Of what the context does not depend on, the gradient is None; that is another way to say 0.
            gradient = torch.zeros_like(leaves[name]) if gradient is None else gradient
            if distance(gradient, case.truth[name]) > margin * case.allowed[name]:
                found.add(name)  # type: ignore[arg-type]
    if not all(same(x, copy) for x, copy in zip(call.tensors, copies, strict=True)):
        found.add("in-place")
    return found


def effects_across_calls(make: Callable[[], Attention], case: Case) -> set[Effect]:
    """What is wrong across calls with an attention whose single calls are right."""
    found: set[Effect] = set()
    with settings_kept() as changed:
        case.call().run(make())
    if changed:
        found.add("settings")
    if set(changed) - {"random state", "Python's random state"}:
        return found  # under other settings, all else may differ too
    attention = make()
    first, *repeated = [outcome(attention, case.call(), seed=seed) for seed in range(8)]
    if not all(alike(first, again) for again in repeated):
        return found | {"randomness"}
    state = (
        remembers,
        minds_first_call,
        overwrites,
        mixes_up_calls,
        believes_addresses,
    )
    if any(effect(make, case) for effect in state):
        found.add("state")
    if keeps(make, case):
        found.add("memory")
    if minds_threads(make, case):
        found.add("threads")
    if mistakes_gate_gradient(make, case):
        found.add("gate gradient")
    if minds_grad_mode(make, case):
        found.add("grad mode")
    if spoils_second_backward(make, case):
        found.add("second backward")
    if swallows(make(), case.call()) or passes_masks_on(make(), case):
        found.add("calls")
    return found


def remembers(make: Callable[[], Attention], case: Case) -> bool:
    """Whether a used attention does other than a fresh one, or changes earlier results."""
    batch, heads, queries, keys, channels = case.sizes
    smaller = (batch, heads, queries, max(1, keys - 5), channels)

    def others() -> list[Call]:
        bare = replace(case.call(), attn_mask=None, head_gate=None)
        return [case.call(seed=1), case.call(seed=2, sizes=smaller), bare, case.call(seed=3)]

    used = make()
    context = called(used, case.call())
    before = context.detach().clone()
    for later, again in zip(others(), others(), strict=True):
        if not alike(outcome(used, later), outcome(make(), again)):
            return True
    return not same(context, before)


def minds_first_call(make: Callable[[], Attention], case: Case) -> bool:
    """Whether a call is another one where the first of its sizes was in inference mode, another dtype or mask."""

    def in_inference_mode(used: Attention) -> None:
        with torch.inference_mode():
            called(used, case.call())

    def in_bfloat16(used: Attention) -> None:
        call = case.call()
        query, key, value = (x.detach().bfloat16() for x in inputs(call))
        # An attention need not take it.
        with suppress(TypeError):
            called(used, replace(call, query=query, key=key, value=value))

    def with_other_mask(change: Callable[[Tensor], Tensor]) -> Callable[[Attention], None]:
        def first(used: Attention) -> None:
            call = case.call()
            if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
                called(used, replace(call, attn_mask=change(call.attn_mask)))

        return first

    firsts = (
        in_inference_mode,
        in_bfloat16,
        with_other_mask(torch.ones_like),
        with_other_mask(lambda mask: mask.flip(-1)),
    )
    for first in firsts:
        used = make()
        first(used)
        try:
            if not alike(outcome(used, case.call()), outcome(make(), case.call())):
                return True
        except RuntimeError:
            return True
    return False


def overwrites(make: Callable[[], Attention], case: Case) -> bool:
    """Whether a result is another one after the next call, with no gradient asked for."""
    used = make()
    with torch.no_grad():
        context = called(used, case.call())
        before = context.clone()
        called(used, case.call(seed=1))
    return not same(context, before)


def keeps(make: Callable[[], Attention], case: Case) -> bool:
    """Whether more and more memory of contexts is held, whatever becomes of them."""
    used = make()
    with torch.no_grad():
        contexts = [StorageWeakRef(called(used, case.call()).untyped_storage()) for _ in range(40)]
    gc.collect()
    return len({context.cdata for context in contexts if not context.expired()}) > 20


def minds_threads(make: Callable[[], Attention], case: Case) -> bool:
    """Whether numbers are others, by more than roundings, where torch has another number of threads."""
    before = torch.get_num_threads()
    usual = case.call().run(make())
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            if distance(case.call().run(make()), usual) > case.allowed["context"]:
                return True
    finally:
        torch.set_num_threads(before)
    return False


def mistakes_gate_gradient(make: Callable[[], Attention], case: Case) -> bool:
    """Whether a gate that requires a gradient gets a wrong one; none at all is right, and so is to refuse.

    Where it is 0, too: what is off need not be computed.
    """
    call = case.call()
    if call.head_gate is None or not call.head_gate.is_floating_point():
        return False

    def of_gate(attention: Attention) -> Tensor | None:
        gate = call.head_gate.detach().clone().requires_grad_()
        context = called(attention, replace(call, head_gate=gate))
        return torch.autograd.grad(context, [gate], call.gradient.to(context.dtype), allow_unused=True)[0]

    try:
        found = of_gate(make())
    except Exception:
        return False
    expected = of_gate(eager)
    assert expected is not None
    on = call.head_gate != 0
    return found is not None and distance(found * on, expected * on) > 0.05 * float(expected.abs().max())


def passes_masks_on(attention: Attention, case: Case) -> bool:
    """Whether torch's own attention runs inside where there is a mask, and does not where there is none."""
    call = case.call()
    if call.attn_mask is None:
        return False
    with SdpaCount() as masked:
        called(attention, call)
    with SdpaCount() as plain:
        called(attention, replace(call, attn_mask=None))
    return bool(masked.calls) != bool(plain.calls)


def mixes_up_calls(make: Callable[[], Attention], case: Case) -> bool:
    """Whether the backward pass of a call is another one after the forward pass of another call."""
    used, call, alone = make(), case.call(), case.call()
    context = called(used, call)
    called(used, case.call(seed=1))
    return not alike(gradients(context, call), gradients(called(make(), alone), alone))


def believes_addresses(make: Callable[[], Attention], case: Case) -> bool:
    """Whether other numbers at the same addresses are not seen, with no gradient asked for."""
    call, other = case.call(), case.call(seed=1)
    if not all(x.is_contiguous() for x in call.tensors):
        return False
    used = make()
    with torch.no_grad():
        called(used, call)
        for x, y in zip(call.tensors, other.tensors, strict=True):
            x.copy_(y)
        return not same(called(used, call), called(make(), other))


def minds_grad_mode(make: Callable[[], Attention], case: Case) -> bool:
    """Whether numbers are other ones where no gradient is asked for, or where no input requires one."""
    with torch.no_grad():
        without = called(make(), case.call())
    frozen = case.call()
    for x in inputs(frozen):
        x.requires_grad_(False)
    usual = outcome(make(), case.call())[0]
    results = (without, called(make(), frozen))
    return not all(same(x, usual) or distance(x, usual) <= case.allowed["context"] for x in results)


def called(attention: Attention, call: Call) -> Tensor:
    """The context, and torch's settings as they were."""
    with settings_kept():
        return call.run(attention)


def spoils_second_backward(make: Callable[[], Attention], case: Case) -> bool:
    """Whether a second backward pass over the same graph gives other gradients; to refuse it is right."""
    call = case.call()
    context = called(make(), call)
    try:
        first, second = (gradients(context, call, retain_graph=True) for _ in range(2))
    except RuntimeError:  # compiled backward passes reuse the memory of what they have saved, and say so
        return False
    return not alike(first, second)


def outcome(attention: Attention, call: Call, *, seed: int = 0) -> tuple[Tensor | None, ...]:
    """Context and gradients."""
    with settings_kept():
        torch.manual_seed(seed)
        context = call.run(attention)
        return context.detach().clone(), *gradients(context, call)


def gradients(context: Tensor, call: Call, *, retain_graph: bool = False) -> tuple[Tensor | None, ...]:
    if not context.requires_grad:
        return ()
    leaves = [x for x in inputs(call) if x.requires_grad]
    gradient = call.gradient.to(context.dtype).clone()
    return torch.autograd.grad(context, leaves, gradient, allow_unused=True, retain_graph=retain_graph)


def swallows(attention: Attention, call: Call) -> bool:
    """Whether a call that returns has caught an exception which was raised in the code of the mutants."""
    here = str(Path(__file__).parent)
    return bool(exceptions_inside(lambda: called(attention, call), lambda file: file.startswith(here)))


def same(x: Tensor | None, y: Tensor | None) -> bool:
    """The same bits, or NaN in the same places."""
    if x is None or y is None:
        return x is y
    return (
        x.shape == y.shape
        and x.dtype == y.dtype
        and torch.equal(x.detach().nan_to_num(7.0), y.detach().nan_to_num(7.0))
    )


def alike(some: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]) -> bool:
    return len(some) == len(others) and all(map(same, some, others))


def shares_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


@contextmanager
def settings_kept() -> Iterator[list[str]]:
    """Puts torch's settings back; what was other than before is in the list afterwards."""
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    differing: list[str] = []
    try:
        yield differing
    finally:
        differing += [name for name, value in before.items() if not equal(SETTINGS[name][0](), value)]
        for name in differing:
            SETTINGS[name][1](before[name])


def equal(x: object, y: object) -> bool:
    return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y


def _benchmark(on: bool) -> None:
    torch.backends.cudnn.benchmark = on


def _onednn(on: bool) -> None:
    torch.backends.mkldnn.enabled = on


SETTINGS: dict[str, tuple[Callable[[], object], Callable]] = {
    "float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "random state": (torch.get_rng_state, torch.set_rng_state),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "flash attention": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "denormal numbers": (
        lambda: float(torch.full((1,), 1e-40) * 1) == 0,
        torch.set_flush_denormal,
    ),
    "oneDNN": (lambda: torch.backends.mkldnn.enabled, _onednn),
    "Python's random state": (random.getstate, random.setstate),
    "benchmarking": (lambda: torch.backends.cudnn.benchmark, _benchmark),
}
