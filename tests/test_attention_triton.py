"""The Triton kernels: compared with the formula, what they read and do not read, and which inputs they reject.

Kernels need a GPU, or Triton's interpreter, which must be chosen before Triton is imported. So without a GPU, one test
runs this file again in a separate process with TRITON_INTERPRET=1. Tests that run no kernel, and tests that compile
kernels for other GPUs, run in this process.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton_interpreter  # noqa: E402

import headoff  # noqa: E402
from headoff.attention import conform, eager, fused  # noqa: E402
from headoff.attention.fused import Tiling, Tilings, triton_attention  # noqa: E402
from headoff.errors import AttentionError, root_cause_line  # noqa: E402
from headoff.gates import cumulative, stack  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BROKEN = triton_interpreter.problem()
RUNS = (INTERPRETED and BROKEN is None) or DEVICE == "cuda"
if INTERPRETED:
    triton_interpreter.patch_language_once_a_launch()
runs_kernels = pytest.mark.skipif(
    not RUNS,
    reason=BROKEN
    or "kernels need a CUDA device, or TRITON_INTERPRET=1 (as test_all_of_this_interpreted sets it)",
)

needs_cuda = pytest.mark.skipif(
    DEVICE != "cuda", reason="there is no CUDA device here, or TRITON_INTERPRET=1 keeps kernels off it"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = (2, 2, 9, 35, 24)  # two tiles of keys,
ROWS = (1, 2, 20, 18, 24)  # and two of rows, of those of `tiny_tiles`

GATES = {
    "no gate": None,
    "all on": lambda b, h, q: torch.ones(()),
    "all off": lambda b, h, q: torch.zeros(h, 1, 1),
    "one head off": lambda b, h, q: (torch.arange(h) != 0).float().view(1, h, 1, 1),
    "by batch item": lambda b, h, q: (torch.arange(b * h) % 2).view(b, h, 1, 1),
    "by query": lambda b, h, q: (torch.arange(h * q) % 3 > 1).view(1, h, q, 1),
    "by run": lambda b, h, q: (torch.arange(q)[:, None] // 7 > torch.arange(h)).half().T[None, :, :, None],
    "fractions": lambda b, h, q: torch.linspace(-0.5, 1.5, b * h * q, dtype=torch.float64).view(b, h, q, 1),
}

MASKS = {
    "no mask": None,
    "padding": lambda b, h, q, s: torch.arange(s) < s - torch.arange(b).view(b, 1, 1, 1) * (s // 2 + 1),
    "a tile of keys": lambda b, h, q, s: torch.arange(s) >= 32,
    "everywhere": lambda b, h, q, s: (torch.arange(b * h * q * s) % 3 > 0).view(b, h, q, s),
    "by query": lambda b, h, q, s: torch.ones(q, s, dtype=torch.bool).tril(),
    "additive by key": lambda b, h, q, s: (
        torch.linspace(-3, 3, h * s).view(h, 1, s).index_fill(2, torch.arange(s // 2), -math.inf)
    ),
    "additive": lambda b, h, q, s: torch.linspace(-3, 3, b * q * s).double().view(b, 1, q, s),
    "additive, -inf": lambda b, h, q, s: torch.zeros(q, s).masked_fill(torch.eye(q, s) > 0, -math.inf),
    "rows without keys": lambda b, h, q, s: (torch.arange(q) % 2 > 0).view(1, 1, q, 1),
    "rows of -inf": lambda b, h, q, s: torch.zeros(q, s).index_fill(0, torch.tensor([0, q - 1]), -math.inf),
    "no keys at all": lambda b, h, q, s: torch.zeros(b, 1, 1, s, dtype=torch.bool),
}


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 16 rows and 32 keys, so that a small input has several, and ragged ones."""
    monkeypatch.setattr(fused, "tilings", lambda query, key: Tilings(*[Tiling(16, 32, 4, 2)] * 3))


def inputs(shape, dtype=torch.float32) -> list[Tensor]:
    batch, heads, queries, keys, channels = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        torch.randn(batch, heads, length, channels, generator=generator).to(DEVICE, dtype).requires_grad_()
        for length in (queries, keys, keys)
    ]


def upstream_of(query: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(query.shape, generator=generator).to(query)


def made(make, shape, sizes) -> Tensor | None:
    return None if make is None else make(*shape[:sizes]).to(DEVICE)


def results(attention, tensors, attn_mask=None, head_gate=None) -> list[Tensor]:
    """Context, and gradients of query, key and value."""
    context = attention(*tensors, attn_mask, head_gate=head_gate)
    return [context.detach(), *torch.autograd.grad(context, tensors, upstream_of(tensors[0]).to(context))]


def magnitudes(tensors, attn_mask, head_gate) -> list[float]:
    """The size of the summands of context and gradients, to which rounding errors of float32 sums are proportional."""
    query, key, value = (tensor.detach().double() for tensor in tensors)
    identity = torch.eye(key.shape[2], dtype=torch.float64, device=key.device).expand(*key.shape[:2], -1, -1)
    gate = None if head_gate is None else head_gate.double().abs()
    weights = eager(query, key, identity, attn_mask, head_gate=gate)  # with V = I the context is the weights
    upstream = upstream_of(query).abs()
    of_scores = 2 * weights * (upstream @ value.abs().mT) / math.sqrt(query.shape[-1])
    terms = (
        weights @ value.abs(), of_scores @ key.abs(), of_scores.mT @ query.abs(), weights.mT @ upstream,
    )  # fmt: skip
    return [term.max().item() for term in terms]


def excesses(attention, tensors, attn_mask=None, head_gate=None) -> list[float]:
    """Errors of context and gradients, divided by the allowed errors.

    The budget is 4 times the error of eager attention in the same dtype, and as a floor two roundings to that dtype
    of the largest result and 16 roundings to float32 of the largest sum of terms' magnitudes. Where one key is
    left, for instance, the gradient of the query is 0 = dP - delta, exactly in eager attention, whose two numbers
    are rounded alike, and to rounding in an attention that keeps no dP. Where scores are larger than 8, the weight
    exp(score - log_sum) that a backward pass recomputes has a relative error of as many roundings as they are large.
    """
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    gate = None if head_gate is None else head_gate.double()
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.double()
    truths = results(eager, doubles, mask, gate)
    baselines = results(eager, tensors, attn_mask, head_gate)
    sizes = magnitudes(tensors, mask, gate)
    found = results(attention, tensors, attn_mask, head_gate)
    eps, eps32 = torch.finfo(tensors[0].dtype).eps, torch.finfo(torch.float32).eps
    query, key, *_ = doubles
    largest_score = (query @ key.mT).abs().max().item() / math.sqrt(query.shape[-1])
    roundings = max(8.0, largest_score)
    ratios = []
    for one, baseline, truth, size in zip(found, baselines, truths, sizes, strict=True):
        assert one.dtype == baseline.dtype
        assert one.shape == truth.shape
        budget = 4 * error(baseline, truth) + eps * truth.abs().max().item() + roundings * eps32 * size
        wrong = error(one, truth)
        ratios.append(wrong / budget if budget else math.inf * wrong if wrong else 0.0)
    return ratios


def error(one: Tensor, truth: Tensor) -> float:
    wrong = (one.double() - truth).abs().max().item()
    return math.inf if math.isnan(wrong) else wrong


@pytest.mark.skipif(
    RUNS or INTERPRETED or BROKEN is not None, reason=BROKEN or "the kernels run in this process"
)
def test_all_of_this_interpreted(request):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    done = subprocess.run(
        command,
        env=environment | {"TRITON_INTERPRET": "1"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 40


@runs_kernels
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, tiny_tiles):
    shape = (
        SMALL if mask in ("everywhere", "additive by key") else (2, 1, *SMALL[2:])
    )  # two heads where they differ
    gate = "by query" if mask in ("padding", "additive by key") else "fractions"
    attn_mask, head_gate = made(MASKS[mask], shape, 4), made(GATES[gate], shape, 3)
    assert max(excesses(triton_attention, inputs(shape), attn_mask, head_gate)) <= 1


@runs_kernels
@pytest.mark.parametrize("gate", GATES)
def test_gates(gate, tiny_tiles):
    head_gate = made(GATES[gate], ROWS, 3)
    tensors = inputs(ROWS)
    assert max(excesses(triton_attention, tensors, None, head_gate)) <= 1
    if head_gate is not None:
        off = (head_gate == 0).expand(*ROWS[:3], 1)[..., 0]
        context, of_query, *_ = results(triton_attention, tensors, None, head_gate)
        assert context[off].count_nonzero() == 0
        assert of_query[off].count_nonzero() == 0


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 40, 70, 32), (2, 1, 1, 17, 40), (1, 1, 3, 1, 64), (1, 1, 20, 70, 128), (1, 2, 5, 9, 5)],
    ids=str,
)
def test_shapes_and_dtypes(shape, dtype):
    tensors = inputs(shape, dtype)
    # With one key the gradient of the query is 0: exactly where the context, of which delta is made, is an exact
    # multiple of the value, and to a rounding of the context otherwise.
    gate = "fractions" if shape[3] > 1 else "by query"
    attn_mask, head_gate = made(MASKS["padding"], shape, 4), made(GATES[gate], shape, 3)
    assert max(excesses(triton_attention, tensors, attn_mask, head_gate)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_rejects_what_is_wrong(dtype):
    """One head's gate for another's, the gradient of an ungated delta, a mask without its last key, 5% of scale."""
    tensors = inputs(SMALL, dtype)
    attn_mask, head_gate = made(MASKS["padding"], SMALL, 4), made(GATES["by batch item"], SMALL, 3)

    def other_head(query, key, value, attn_mask, *, head_gate):
        return eager(query, key, value, attn_mask, head_gate=head_gate.roll(1, 1))

    def blind(query, key, value, attn_mask, *, head_gate):
        attn_mask = attn_mask & (torch.arange(attn_mask.shape[-1], device=DEVICE) < 16)
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    def scaled(query, key, value, attn_mask, *, head_gate):
        return eager(query * 1.05, key, value, attn_mask, head_gate=head_gate)

    assert min(excesses(other_head, tensors, attn_mask, head_gate)) > 1
    assert min(excesses(blind, tensors, attn_mask, head_gate)) > 1
    if dtype != torch.bfloat16:  # whose own errors are that large
        assert min(excesses(scaled, tensors, attn_mask, head_gate)) > 1


@runs_kernels
def test_large_scores():
    tensors = [(tensor.detach() * 30).requires_grad_() for tensor in inputs(SMALL)]
    assert max(excesses(triton_attention, tensors)) <= 1


@runs_kernels
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_precision_of_float32_products(precision):
    """tf32 keeps 10 bits behind the leading one; the interpreter keeps all whatever it is asked for."""
    tensors = inputs((1, 1, 20, 35, 32))
    expected = results(eager, [tensor.detach().double().requires_grad_() for tensor in tensors])
    found = results(lambda *qkvm, head_gate: triton_attention(*qkvm, precision=precision), tensors)
    digits = 2**-10 if precision == "tf32" else 2**-20
    for one, truth, size in zip(found, expected, magnitudes(tensors, None, None), strict=True):
        assert error(one, truth) <= 4 * digits * size


@runs_kernels
def test_any_strides(tiny_tiles):
    query, key, value = (tensor.detach() for tensor in inputs(ROWS))
    head_gate = made(GATES["by run"], ROWS, 3)
    # As projections leave it; every other channel of a wider tensor; the columns of a transposed one.
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    spread = key.repeat_interleave(2, dim=-1)[..., ::2]
    turned = value.mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in (transposed, spread, turned))
    strided = [tensor.requires_grad_() for tensor in (transposed, spread, turned)]
    plain = [
        tensor.clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in (query, key, value)
    ]
    for one, other in zip(
        results(triton_attention, strided, None, head_gate),
        results(triton_attention, plain, None, head_gate),
        strict=True,
    ):
        assert torch.equal(one, other)
    # The gradient of a sum is one number, expanded.
    gradients = [torch.autograd.grad(triton_attention(*some).sum(), some) for some in (strided, plain)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    # What comes next joins the heads: nothing to copy, where the query came from a projection.
    assert triton_attention(*strided).transpose(1, 2).is_contiguous()


@runs_kernels
def test_expanded_memory_is_read_in_place():
    query, key, value = inputs((3, 2, 5, 20, 16))
    memory = [tensor.detach()[:1].requires_grad_() for tensor in (key, value)]
    head_gate = made(GATES["by batch item"], (3, 2, 5), 3)

    def shared(query, key, value, attn_mask, *, head_gate):
        key, value = key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1)
        assert key.stride(0) == value.stride(0) == 0
        return triton_attention(query, key, value, attn_mask, head_gate=head_gate)

    def copied(query, key, value, attn_mask, *, head_gate):
        return triton_attention(
            query, key.repeat(3, 1, 1, 1), value.repeat(3, 1, 1, 1), attn_mask, head_gate=head_gate
        )

    found = results(shared, [query, *memory], None, head_gate)
    expected = results(copied, [query, *memory], None, head_gate)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@runs_kernels
def test_heads_that_are_off_are_not_read(tiny_tiles):
    """NaN in their inputs has no effect on any output."""
    query, key, value = (tensor.detach() for tensor in inputs(SMALL))
    head_gate = made(GATES["by batch item"], SMALL, 3)
    off = (head_gate == 0)[..., 0, 0]
    upstream = upstream_of(query)
    for tensor in (query, key, value, upstream):
        tensor[off] = math.nan
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    for gate in (head_gate, head_gate.expand(*SMALL[:3], 1).contiguous()):  # off by head, and row by row
        context = triton_attention(*tensors, head_gate=gate)
        for one in (context, *torch.autograd.grad(context, tensors, upstream)):
            assert one.isfinite().all()
            assert one[off].count_nonzero() == 0
            assert one[~off].count_nonzero() > 0


@runs_kernels
def test_rows_that_are_off_are_not_read(tiny_tiles):
    """Not even in a block with rows that are on, so that results do not depend on where blocks begin."""
    query, key, value = inputs(ROWS)
    head_gate = made(GATES["by query"], ROWS, 3)
    off = (head_gate == 0).expand(*ROWS[:3], 1)[..., 0]
    expected = results(triton_attention, [query, key, value], None, head_gate)
    poisoned = query.detach().clone().masked_fill(off[..., None], math.nan).requires_grad_()
    found = results(triton_attention, [poisoned, key, value], None, head_gate)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@runs_kernels
@pytest.mark.parametrize("mask", ["padding", "additive by key"])
def test_blocks_of_hidden_keys_are_not_read(mask, tiny_tiles):
    query, key, value = inputs(SMALL)
    attn_mask = made(MASKS[mask], SMALL, 4)
    hidden = torch.arange(SMALL[3], device=DEVICE) < 32  # one tile
    if attn_mask.dtype == torch.bool:
        attn_mask = attn_mask & ~hidden
    else:
        attn_mask = attn_mask.masked_fill(hidden, -math.inf)
    expected = results(triton_attention, [query, key, value], attn_mask)
    poisoned = [
        tensor.detach().masked_fill(hidden[:, None], math.nan).requires_grad_() for tensor in (key, value)
    ]
    found = results(triton_attention, [query, *poisoned], attn_mask)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@runs_kernels
def test_more_blocks_than_one_group_holds(tiny_tiles):
    """Blocks of rows or keys are looked up 32 at a time."""
    for shape in ((1, 1, 3, 32 * 33 + 2, 16), (1, 1, 16 * 33 + 2, 3, 16)):
        tensors = inputs(shape)
        keys = torch.arange(shape[3], device=DEVICE)
        rows = torch.arange(shape[2], device=DEVICE)
        attn_mask = (keys < 2) | (keys == shape[3] - 1)
        head_gate = ((rows < 2) | (rows == shape[2] - 1)).view(1, 1, -1, 1)
        assert max(excesses(triton_attention, tensors, attn_mask.view(1, -1), head_gate)) <= 1


@runs_kernels
def test_rows_divided_into_shares(tiny_tiles, monkeypatch):
    monkeypatch.setattr(fused, "LEAST_SHARE", 16)
    shape = (2, 1, 50, 20, 16)
    tensors = inputs(shape)
    assert fused._shares(*tensors[:2], Tiling(16, 32, 4, 2)) == (2, 32)
    attn_mask, head_gate = made(MASKS["padding"], shape, 4), made(GATES["by run"], shape, 3)
    assert max(excesses(triton_attention, tensors, attn_mask, head_gate)) <= 1


@pytest.mark.parametrize("queries", [0, 1, 100, 511, 900, 1024, 25_600, 1_000_001])
@pytest.mark.parametrize("keys", [1, 850, 3_400])
def test_shares_cover_the_rows_once(queries, keys):
    query, key = torch.empty(1, 8, queries, 32, device="meta"), torch.empty(1, 8, keys, 32, device="meta")
    tiling = fused.tilings(query, key).key_value_gradient
    shares, share = fused._shares(query, key, tiling)
    assert share % tiling.queries == 0
    assert shares * share >= queries
    assert queries == 0 or (shares - 1) * share < queries
    assert shares == 1 or share >= fused.LEAST_SHARE


@runs_kernels
def test_repeats_bit_for_bit(tiny_tiles, monkeypatch):
    monkeypatch.setattr(fused, "LEAST_SHARE", 16)
    tensors = inputs(ROWS, torch.float16)
    head_gate = made(GATES["by run"], ROWS, 3)
    first, second = (results(triton_attention, tensors, None, head_gate) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@runs_kernels
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_some(wanted, tiny_tiles):
    tensors = inputs((1, 1, 20, 20, 16))
    expected = torch.autograd.grad(triton_attention(*tensors).square().sum(), tensors)
    some = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
    triton_attention(*some).square().sum().backward()
    for tensor, want, gradient in zip(some, wanted, expected, strict=True):
        assert torch.equal(tensor.grad, gradient) if want else tensor.grad is None


@runs_kernels
@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 16), (1, 2, 0, 4, 16), (1, 2, 3, 0, 16)], ids=str)
def test_nothing_to_attend(shape):
    tensors = inputs(shape)
    context, *gradients = results(triton_attention, tensors, None, torch.ones((), device=DEVICE))
    assert context.count_nonzero() == 0
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.count_nonzero() == 0


@runs_kernels
def test_without_gradients():
    shape = (1, 2, 5, 9, 16)
    tensors = inputs(shape)
    head_gate = torch.ones(1, 2, 1, 1, device=DEVICE, requires_grad=True)
    with_graph = triton_attention(*tensors, head_gate=head_gate.detach())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            context = triton_attention(*tensors, head_gate=head_gate)
        assert not context.requires_grad
        assert torch.equal(context, with_graph)


@runs_kernels
def test_inputs_are_not_modified(tiny_tiles):
    given = [*inputs(SMALL), made(MASKS["additive"], SMALL, 4), made(GATES["fractions"], SMALL, 3)]
    copies = [tensor.detach().clone() for tensor in given]
    results(triton_attention, given[:3], *given[3:])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))


@runs_kernels
def test_changed_inputs_are_noticed_before_the_backward_pass():
    tensors = inputs((1, 1, 3, 4, 16))
    head_gate = torch.ones(1, 1, 1, 1, device=DEVICE)
    context = triton_attention(*tensors, head_gate=head_gate)
    head_gate.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        context.sum().backward()


@runs_kernels
def test_differentiable_once():
    query, key, value = inputs((1, 1, 3, 4, 16))
    context = triton_attention(query, key, value)
    (gradient,) = torch.autograd.grad(context.sum(), query, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(triton_attention(query, key, value).sum(), query)[0])
    with pytest.raises(AttentionError, match="differentiable once"):
        (gradient + query.square()).sum().backward()


def on_device(shape, device, dtype=torch.bfloat16):
    tensors = [tensor.detach().to(device).requires_grad_() for tensor in inputs(shape, dtype)]
    return tensors, made(MASKS["padding"], shape, 4).to(device), made(GATES["by query"], shape, 3).to(device)


@needs_cuda
def test_the_host_waits_for_nothing():
    """Forward and backward, once all is compiled, with rows divided into shares."""
    tensors, attn_mask, head_gate = on_device((1, 2, 1100, 70, 32), "cuda")
    expected = results(triton_attention, tensors, attn_mask, head_gate)
    upstream = upstream_of(tensors[0])
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        context = triton_attention(*tensors, attn_mask, head_gate=head_gate)
        found = [context.detach(), *torch.autograd.grad(context, tensors, upstream)]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_cuda
def test_in_a_cuda_graph():
    """A captured call reads its inputs, including the gate, when it is replayed."""
    tensors, attn_mask, head_gate = on_device((1, 2, 70, 70, 32), "cuda")
    query, key, value = (tensor.detach() for tensor in tensors)
    with torch.no_grad():
        triton_attention(query, key, value, attn_mask, head_gate=head_gate)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            context = triton_attention(query, key, value, attn_mask, head_gate=head_gate)
        query.mul_(0.5)
        head_gate.copy_(head_gate.roll(1, 2))
        graph.replay()
        assert torch.equal(context, triton_attention(query, key, value, attn_mask, head_gate=head_gate))


@needs_cuda
def test_in_a_stream_of_its_own():
    tensors, attn_mask, head_gate = on_device((1, 2, 70, 70, 32), "cuda")
    expected = results(triton_attention, tensors, attn_mask, head_gate)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # whatever is in another stream is done before what is to be done here
        moved = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        found = results(triton_attention, moved, attn_mask, head_gate)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(
    DEVICE != "cuda" or torch.cuda.device_count() < 2, reason="there is no second CUDA device here"
)
def test_on_a_device_that_is_not_the_current_one():
    found, expected = (
        results(triton_attention, *on_device((1, 2, 70, 70, 32), device)) for device in ("cuda:1", "cuda:0")
    )
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(found, expected, strict=True))


@runs_kernels
def test_under_autocast():
    """Inputs are not converted, even 16-bit ones with a float32 gate; gradients have the dtypes of the inputs."""
    tensors, attn_mask, head_gate = on_device((1, 2, 20, 40, 16), DEVICE)
    expected = results(triton_attention, tensors, attn_mask, head_gate.float())
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(triton_attention, tensors, attn_mask, head_gate.float())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other)


@runs_kernels
def test_offsets_beyond_32_bits():
    """Four keys that are 2^30 elements apart, and a mask whose rows are; the memory between them is never accessed."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    query, key, value = (tensor.detach() for tensor in inputs((1, 1, 4, 4, 16), torch.float16))
    apart = 2**30
    far_key = torch.empty(3 * apart + 16, dtype=torch.float16, device=DEVICE)
    far_key = far_key.as_strided((1, 1, 4, 16), (0, 0, apart, 1))
    far_mask = torch.empty(3 * apart + 4, dtype=torch.bool, device=DEVICE).as_strided((4, 4), (apart, 1))
    far_key.copy_(key)
    far_mask.copy_(attn_mask := torch.ones(4, 4, dtype=torch.bool, device=DEVICE).tril())
    tensors = [query.requires_grad_(), key.requires_grad_(), value.requires_grad_()]
    expected = results(triton_attention, tensors, attn_mask)
    with torch.no_grad():
        assert torch.equal(triton_attention(query, far_key, value, far_mask), expected[0])
    context = triton_attention(query, far_key, value, far_mask)
    found = torch.autograd.grad(context, (query, value), upstream_of(query))
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found[1], expected[3])


@runs_kernels
def test_the_same_detections():
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    none_off, *_, four_off = cumulative(8)[:5]

    def outputs(attention, configuration, dtype=torch.float32):
        detector = headoff.load("scenes").to(DEVICE, dtype)
        with torch.no_grad():
            detector.attention = eager  # a third of the calls, and they tell nothing new
            memory = detector.encode(pixels.to(DEVICE, dtype))
            detector.attention = attention
            output = detector.decode(memory, stack([configuration], detector.head_layout))
        return output.logits, output.boxes

    for found, baseline, truth, other in zip(
        outputs(triton_attention, four_off),
        outputs(eager, four_off),
        outputs(eager, four_off, torch.float64),
        outputs(eager, none_off, torch.float64),
        strict=True,
    ):
        budget = 4 * error(baseline, truth)
        assert error(found, truth) <= budget
        assert error(other, truth) > 100 * budget


@runs_kernels
def test_refusals():
    query, key, value = (tensor.detach() for tensor in inputs((1, 2, 3, 4, 16)))
    gate = torch.ones(1, 2, 1, 1, device=DEVICE)
    rejected = {
        "shapes": lambda: triton_attention(query, key, value[:, :, :3]),
        "expanded batch": lambda: triton_attention(query.repeat(2, 1, 1, 1), key, value),
        "convert them to one": lambda: triton_attention(query, key.half(), value),
        "'eager'": lambda: triton_attention(query.double(), key.double(), value.double()),
        "1 to 128 channels, not 136": lambda: triton_attention(
            *(torch.zeros(1, 2, 3, 136, device=DEVICE) for _ in range(3))
        ),
        "no precision 'exact'": lambda: triton_attention(query, key, value, precision="exact"),
        "attn_mask of shape": lambda: triton_attention(query, key, value, torch.ones(3, 3, device=DEVICE)),
        "head_gate of shape": lambda: triton_attention(query, key, value, head_gate=gate.expand(1, 2, 1, 16)),
        "no gradient of head_gate": lambda: triton_attention(
            query, key, value, head_gate=gate.clone().requires_grad_()
        ),
        "no gradient of attn_mask": lambda: triton_attention(
            query, key, value, torch.zeros(3, 4, device=DEVICE).requires_grad_()
        ),
        "additive float": lambda: triton_attention(
            query, key, value, torch.ones(3, 4, dtype=torch.int64, device=DEVICE)
        ),
        "make it real": lambda: triton_attention(query, key, value, head_gate=gate.to(torch.complex64)),
        "one device": lambda: triton_attention(query, key.to("meta"), value),
    }
    for words, call in rejected.items():
        with pytest.raises(AttentionError, match=re.escape(words)):
            call()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_tensors_on_the_cpu_are_rejected():
    with pytest.raises(AttentionError, match="TRITON_INTERPRET=1"):
        triton_attention(*(torch.zeros(1, 1, 2, 16) for _ in range(3)))


def test_launches_that_fail_are_said_in_a_sentence(monkeypatch):
    class OutOfResources(Exception):
        pass

    def failing(*_, **__):
        try:
            raise OutOfResources("out of resource: shared memory,\n Required: 300000")
        except OutOfResources as error:
            raise RuntimeError("at 5:4:\n" + 40 * "    source\n") from error

    grids = type("Grids", (), {"__getitem__": lambda self, grid: failing})()
    monkeypatch.setattr(fused, "_kernels", lambda: SimpleNamespace(INTERPRETED=True, forward_kernel=grids))
    with pytest.raises(AttentionError) as caught:
        triton_attention(*(torch.zeros(1, 1, 2, 16) for _ in range(3)))
    assert str(caught.value) == (
        "the triton attention cannot run its forward_kernel on cpu (OutOfResources: out of resource: shared memory, "
        "Required: 300000): use the attention 'sdpa'."
    )
    long = root_cause_line(ValueError("where it is\n" + 40 * "    source\n" + "what it is"))
    assert long.startswith("ValueError: where it is source") and long.endswith("source what it is")
    assert len(long) < 220 and "\n" not in long


@pytest.mark.parametrize(("capability", "old"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_gpus_that_are_too_old(monkeypatch, capability, old):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = fused.unsupported_gpu.__wrapped__(torch.device("cuda", 0))
    assert (reason is not None) == old
    if old:
        assert reason == "the kernels need a GPU of compute capability 8.0, and this one's is 7.5"


def test_triton_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "headoff.attention.triton_kernels", None)
    monkeypatch.delattr(headoff.attention, "triton_kernels", raising=False)
    fused._kernels.cache_clear()
    with pytest.raises(AttentionError, match="install it"):
        triton_attention(*(torch.zeros(1, 1, 2, 16) for _ in range(3)))


def test_keeps_the_contract():
    assert conform(triton_attention, "triton") is triton_attention


class Recorder:
    """A substitute for the module of kernels that records the arguments of launches."""

    INTERPRETED = True  # so that tensors on the CPU will do

    def __init__(self) -> None:
        self.launches: dict[str, tuple[tuple, dict]] = {}

    def __getattr__(self, kernel):
        def launch(*arguments, **options):
            self.launches[kernel] = arguments, options

        return {(count,): launch for count in range(1, 10_000)}


def specialised(kernel, arguments, options):
    """Signature, constants and attributes of the kernel that Triton would compile for such a launch."""
    types, constants, attributes = {}, {}, {}
    pointers = {
        torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1",
    }  # fmt: skip

    def type_of(place, name, value):
        if isinstance(value, tuple):
            return tuple(type_of((*place, index), name, item) for index, item in enumerate(value))
        special = name not in kernel.do_not_specialize
        if value is None or isinstance(value, int) and value == 1 and special:
            constants[place] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor) or special and value % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        return pointers[value.dtype] if isinstance(value, Tensor) else "i32"

    for index, name in enumerate(kernel.arg_names):
        if index < len(arguments):
            types[name] = type_of((index,), name, arguments[index])
        else:
            types[name], constants[(index,)] = "constexpr", options[name]
    return types, constants, attributes


COMPILED = [
    (80, torch.bfloat16, 32, "padding", 96),
    pytest.param(90, torch.bfloat16, 32, "padding", 64, marks=pytest.mark.slow),
    (90, torch.float16, 128, "additive", 64),
    pytest.param(90, torch.float32, 32, "padding", 64, marks=pytest.mark.slow),
    (90, torch.float32, 128, "padding", 64),
    pytest.param(90, torch.float32, 128, "no mask", 0, marks=pytest.mark.slow),
]
"""Capability, dtype, channels, mask, and bytes of a thread that may be spilled."""


@pytest.mark.skipif(INTERPRETED, reason="there is nothing to compile")
@pytest.mark.parametrize(("capability", "dtype", "channels", "mask", "spilled"), COMPILED, ids=str)
def test_compiles_without_a_gpu(capability, dtype, channels, mask, spilled, monkeypatch):
    """Kernels compile to machine code that fits into registers and shared memory."""
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from headoff.attention import triton_kernels

    recorder = Recorder()
    monkeypatch.setattr(fused, "_kernels", lambda: recorder)
    shape = (1, 8, 900, 850, channels)
    tensors = [
        torch.zeros(1, length, 8, channels, dtype=dtype).transpose(1, 2).requires_grad_()
        for length in (900, 850, 850)
    ]
    attn_mask = None if MASKS[mask] is None else MASKS[mask](*shape[:4])
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(dtype)
    context = triton_attention(*tensors, attn_mask, head_gate=torch.ones(900, 8).T[None, :, :, None])
    torch.autograd.grad(context, tensors, torch.zeros_like(context))
    assert set(recorder.launches) == {"forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"}
    for name, (arguments, options) in recorder.launches.items():
        kernel = getattr(triton_kernels, name)
        source = ASTSource(kernel, *specialised(kernel, arguments, options))
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={option: options[option] for option in ("num_warps", "num_stages", "enable_fp_fusion")},
        )
        # What a program may have on compute capability 8.6 and 8.9, the least of those that do bfloat16.
        assert compiled.metadata.shared <= 99 * 2**10
        assert usage(compiler, capability, compiled.asm["ptx"]).spilled <= spilled, name


def usage(compiler, capability, ptx):
    """Registers a thread, and bytes of them that had to be spilled to memory, as ptxas says."""
    try:
        ptxas = compiler.get_ptxas(capability).path
    except TypeError:  # one for all, in older versions
        ptxas = compiler.get_ptxas().path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
        command = [
            ptxas,
            "-v",
            f"--gpu-name={architecture}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        completed = subprocess.run(command, capture_output=True, text=True, check=True)
    text = completed.stdout + completed.stderr
    return SimpleNamespace(
        registers=int(re.search(r"Used (\d+) registers", text)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", text)[1]),
    )
