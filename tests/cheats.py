"""Attentions that cheat in benchmarks: right in single calls, and timed for something else than their work.

Every factory makes one that starts with an empty memory. They were written from descriptions of what was found in other
benchmarks (docs/harness.md, "Times"), and share no code with those.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time

import torch

from headoff.attention import eager

HONEST = 3
"""Calls that those which wait for the end of the warm-up answer by honest work."""


def _remembering(key):
    """Results are remembered by what `key` says of a call; gradients are computed honestly."""

    def make():
        remembered = {}

        def attention(query, key_, value, attn_mask=None, *, head_gate=None):
            if torch.is_grad_enabled():
                return eager(query, key_, value, attn_mask, head_gate=head_gate)
            known = key(query, key_, value)
            if known not in remembered:
                remembered[known] = eager(query, key_, value, attn_mask, head_gate=head_gate)
            return remembered[known].clone()

        return attention

    return make


by_address = _remembering(lambda *tensors: tuple(tensor.data_ptr() for tensor in tensors))
by_size = _remembering(lambda *tensors: tuple(tensor.shape for tensor in tensors))
by_coarse_fingerprint = _remembering(lambda query, *_: (query.shape, round(float(query.mean()), 1)))
by_one_element = _remembering(lambda query, key, value: float(query[0, 0, 0, 0] + value[0, 0, 0, 0]))
"""Never seen twice: it works honestly in every timed call, and gains nothing."""


def late_by_thread():
    """Another thread writes the result after the call has returned."""

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        context = torch.zeros_like(query)

        def work():
            time.sleep(0.002)
            with torch.no_grad():
                context.copy_(eager(query, key, value, attn_mask, head_gate=head_gate))

        if torch.is_grad_enabled():
            return eager(query, key, value, attn_mask, head_gate=head_gate)
        threading.Thread(target=work).start()
        return context

    return attention


class Lazy(torch.Tensor):
    """Computes what it was promised when a function of torch first uses it."""

    promise = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def kept(one):
            return one.promise() if isinstance(one, Lazy) and one.promise is not None else one

        with torch._C.DisableTorchFunctionSubclass():
            return function(*map(kept, args), **(kwargs or {}))


def lazy():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if torch.is_grad_enabled():
            return eager(query, key, value, attn_mask, head_gate=head_gate)
        context = torch.empty_like(query).as_subclass(Lazy)
        context.promise = lambda: eager(query, key, value, attn_mask, head_gate=head_gate)
        return context

    return attention


def by_helpers():
    """Half of the heads are computed by another thread while this one computes the other half."""

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        half, found = query.shape[1] // 2, {}

        def work(heads):
            with torch.set_grad_enabled(grad):
                for _ in range(4):  # long enough to be measured
                    found[heads.start] = eager(query[:, heads], key[:, heads], value[:, heads], attn_mask)

        grad = torch.is_grad_enabled()
        helper = threading.Thread(target=work, args=(slice(0, half),))
        helper.start()
        work(slice(half, None))
        helper.join()
        context = torch.cat([found[0], found[half]], 1)
        return context if head_gate is None else context * head_gate

    return attention


def from_other_tensors():
    """Takes its result from any other tensor of its size: the expected result, or the baseline's."""

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if torch.is_grad_enabled():
            return eager(query, key, value, attn_mask, head_gate=head_gate)
        own = {tensor.data_ptr() for tensor in (query, key, value)}
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        frame = sys._getframe(1)
        while frame is not None:
            tensors += [one for one in frame.f_locals.values() if type(one) is torch.Tensor]
            frame = frame.f_back
        for one in reversed(tensors):
            # The copies of a benchmark have a row for each head.
            if one.numel() == query.numel() and one.data_ptr() not in own and one.shape != query.shape:
                return one.detach().to(query.dtype).reshape(query.shape).clone()
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    return attention


def from_freed_memory():
    """Hopes that the allocator gives it the memory of the baseline's result."""

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if torch.is_grad_enabled():
            return eager(query, key, value, attn_mask, head_gate=head_gate)
        return torch.empty_like(query, memory_format=torch.contiguous_format)

    return attention


def _less_work(is_timed):
    """A tenth of the keys where `is_timed` says so."""

    def make():
        calls = 0

        def attention(query, key, value, attn_mask=None, *, head_gate=None):
            nonlocal calls
            calls += 1
            if is_timed(calls):
                some = max(1, key.shape[2] // 10)
                mask = None if attn_mask is None else attn_mask[..., :some]
                return eager(query, key[:, :, :some], value[:, :, :some], mask, head_gate=head_gate)
            return eager(query, key, value, attn_mask, head_gate=head_gate)

        return attention

    return make


def _is_called_by(name):
    frame = sys._getframe(1)
    while frame is not None:
        if name in frame.f_code.co_filename or name == frame.f_code.co_name:
            return True
        frame = frame.f_back
    return False


after_the_warm_up = _less_work(lambda calls: calls > HONEST)
every_other_call = _less_work(lambda calls: calls > HONEST and calls % 2)
by_the_stack = _less_work(lambda calls: _is_called_by("pedantic"))
by_threads = _less_work(lambda calls: torch.get_num_threads() == 1)
by_the_environment = _less_work(lambda calls: "PYTEST_CURRENT_TEST" in os.environ)
by_the_gradient_mode = _less_work(lambda calls: not torch.is_grad_enabled())


def _changing(change):
    """Right, and calls `change` once, in its third call."""

    def make():
        calls = 0

        def attention(query, key, value, attn_mask=None, *, head_gate=None):
            nonlocal calls
            calls += 1
            if calls == HONEST:
                change()
            return eager(query, key, value, attn_mask, head_gate=head_gate)

        return attention

    return make


def _spin():
    """Keep the interpreter busy for a while."""

    def work():
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            sum(range(1000))

    threading.Thread(target=work, daemon=True).start()


low_precision = _changing(lambda: torch.set_float32_matmul_precision("medium"))
more_threads = _changing(lambda: torch.set_num_threads(2))
slowing_the_baseline = _changing(_spin)


def on_a_side_stream():
    """CUDA: works in a stream that nothing waits for."""
    stream = torch.cuda.Stream()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if torch.is_grad_enabled():
            return eager(query, key, value, attn_mask, head_gate=head_gate)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            return eager(query, key, value, attn_mask, head_gate=head_gate)

    return attention
