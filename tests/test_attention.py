"""The attention callables compared with their formula: values and gradients."""

import math
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headoff.attention import conform, eager, sdpa, skipping
from headoff.attention.contract import Attention

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
    ),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RAGGED = (2, 3, 7, 13, 24)
SHAPES = [(1, 8, 100, 850, 32), (2, 2, 1, 17, 16), (2, 3, 7, 1, 64), (1, 1, 1, 1, 16), RAGGED]

GATES = {
    "no gate": None,
    "all on": lambda b, h, q: torch.ones(1, 1, 1, 1),
    "all off": lambda b, h, q: torch.zeros(h, 1, 1),
    "one head off": lambda b, h, q: (torch.arange(h) != 0).float().view(1, h, 1, 1),
    "by batch item": lambda b, h, q: (torch.arange(b * h) % 2).float().view(b, h, 1, 1),
    "by query": lambda b, h, q: (torch.arange(h * q) % 3 > 1).float().view(1, h, q, 1),
    "cumulative": lambda b, h, q: (torch.arange(h)[:, None] >= torch.arange(q) % (h + 1)).float()[
        None, ..., None
    ],
    "fractions": lambda b, h, q: torch.linspace(0, 1.5, b * h * q).view(b, h, q, 1),
    "boolean": lambda b, h, q: (torch.arange(h) != 0).view(1, h, 1, 1),
}

MASKS = {
    "no mask": None,
    "padding": lambda b, h, q, s: torch.arange(s) <= torch.arange(b).view(b, 1, 1, 1) * s // 2,
    "everywhere": lambda b, h, q, s: (torch.arange(b * h * q * s) % 3 > 0).view(b, h, q, s),
    "by head": lambda b, h, q, s: (torch.arange(h * s) % 4 > 0).view(1, h, 1, s),
    "by query": lambda b, h, q, s: torch.ones(q, s, dtype=torch.bool).tril(),
    "by key": lambda b, h, q, s: (torch.arange(s) % 2 == 0).view(1, s),
    "additive": lambda b, h, q, s: torch.linspace(-3, 3, b * q * s).view(b, 1, q, s),
    "additive, -inf": lambda b, h, q, s: torch.zeros(q, s).masked_fill(torch.eye(q, s) > 0, -math.inf),
    "rows without keys": lambda b, h, q, s: (torch.arange(q) % 2 > 0).view(1, 1, q, 1).expand(b, 1, q, s),
    "rows of -inf": lambda b, h, q, s: torch.zeros(q, s).index_fill(0, torch.tensor([0, q - 1]), -math.inf),
    "no keys at all": lambda b, h, q, s: torch.zeros(b, 1, 1, s, dtype=torch.bool),
}


@pytest.fixture(params=["eager", "sdpa", "sdpa, skipping always", "plain"])
def attention(request, monkeypatch) -> Attention:
    if request.param == "eager":
        return eager
    if request.param == "plain":
        return conform(lambda query, key, value, attn_mask: eager(query, key, value, attn_mask), "plain")
    if request.param == "sdpa, skipping always":
        for cost in ("ROW_COST", "KEY_COST", "FIXED_COST"):
            monkeypatch.setattr(skipping, cost, 0)
    return sdpa


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def inputs(shape=RAGGED, dtype=torch.float64, device="cpu", scale=1.0) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, keys, channels = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return tuple(
        torch.randn(batch, heads, length, channels, generator=generator, dtype=torch.float64)
        .mul(scale)
        .to(device, dtype)
        for length in (queries, keys, keys)
    )


def gate_of(name: str, shape=RAGGED, device="cpu") -> Tensor | None:
    make = GATES[name]
    return None if make is None else make(*shape[:3]).to(device)


def mask_of(name: str, shape=RAGGED, device="cpu") -> Tensor | None:
    make = MASKS[name]
    return None if make is None else make(*shape[:4]).to(device)


def truth(query, key, value, attn_mask=None, head_gate=None) -> Tensor:
    """The formula in float64, with a softmax that is a quotient of sums and no row that divides by zero."""
    query, key, value = query.double(), key.double(), value.double()
    scores = torch.einsum("bhqd,bhsd->bhqs", query, key) / query.shape[-1] ** 0.5
    shift = scores.detach().amax(-1, keepdim=True)
    factor = torch.ones((), dtype=torch.float64, device=query.device)
    if attn_mask is not None:
        factor = attn_mask.double() if attn_mask.dtype == torch.bool else attn_mask.double().exp()
    terms = (scores - shift).exp() * factor
    total = terms.sum(-1, keepdim=True)
    weights = terms / torch.where(total > 0, total, 1)
    if head_gate is not None:
        weights = weights * head_gate.double()
    return torch.einsum("bhqs,bhsd->bhqd", weights, value)


def error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item()


def rounding(query: Tensor, key: Tensor, value: Tensor) -> float:
    """How far rounding may take a context from the truth: a bound for values of the dtype of `query`.

    A score that is off by x makes its weight off by a factor of 1 + x. Scores are rounded in proportion to
    their size, a few times over (product, sum, scale); then weights and contexts are.
    """
    largest = (query.double() @ key.double().mT).abs().max().item() / math.sqrt(query.shape[-1])
    return 8 * torch.finfo(query.dtype).eps * (1 + largest) * value.abs().max().item()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gate", GATES)
def test_context_is_the_formula(attention, gate, mask, device):
    tensors = inputs(device=device)
    head_gate, attn_mask = gate_of(gate, device=device), mask_of(mask, device=device)
    context = attention(*tensors, attn_mask, head_gate=head_gate)
    assert context.shape == tensors[0].shape
    assert context.dtype == torch.float64
    assert error(context, truth(*tensors, attn_mask, head_gate)) <= rounding(*tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(attention, shape, device):
    tensors = inputs(shape, device=device)
    head_gate, attn_mask = gate_of("cumulative", shape, device), mask_of("padding", shape, device)
    context = attention(*tensors, attn_mask, head_gate=head_gate)
    assert error(context, truth(*tensors, attn_mask, head_gate)) <= rounding(*tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [RAGGED, (1, 8, 100, 850, 32)], ids=str)
def test_error_is_that_of_the_dtype(attention, shape, dtype, device):
    tensors = inputs(shape, dtype, device)
    head_gate, attn_mask = gate_of("fractions", shape, device), mask_of("padding", shape, device)
    expected = truth(*tensors, attn_mask, head_gate)
    context = attention(*tensors, attn_mask, head_gate=head_gate)
    assert context.dtype == dtype
    eager_error = error(eager(*tensors, attn_mask, head_gate=head_gate), expected)
    assert eager_error <= rounding(*tensors)
    # the floor: a result of any other order of summation may be rounded to the neighbouring number
    floor = torch.finfo(dtype).eps * expected.abs().max().item()
    assert error(context, expected) <= 2 * eager_error + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["rows without keys", "rows of -inf", "no keys at all"])
def test_rows_without_keys_are_exactly_zero(attention, mask, dtype, device):
    tensors = [tensor.requires_grad_() for tensor in inputs(dtype=dtype, device=device)]
    attn_mask = mask_of(mask, device=device)
    context = attention(*tensors, attn_mask)
    if attn_mask.dtype == torch.bool:
        empty = ~attn_mask.any(-1)
    else:
        empty = attn_mask.isneginf().all(-1)
    empty = empty.expand(context.shape[:-1])
    assert empty.any()
    assert torch.equal(context[empty], torch.zeros_like(context[empty]))
    gradients = torch.autograd.grad(context.sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(gradients[0][empty], torch.zeros_like(gradients[0][empty]))
    if empty.all():
        assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("mask", ["rows without keys", "rows of -inf", "no keys at all"])
def test_rows_without_keys_are_zero_whatever_torch_makes_of_them(mask, monkeypatch):
    """A backend may divide 0 by 0 in such rows, forward and backward."""

    def careless(query, key, value, attn_mask):
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if attn_mask.dtype == torch.bool:
            return scores.masked_fill(~attn_mask, -math.inf).softmax(-1) @ value
        return (scores + attn_mask).softmax(-1) @ value

    tensors = [tensor.requires_grad_() for tensor in inputs()]
    attn_mask = mask_of(mask)
    assert careless(*tensors, attn_mask).isnan().any()
    monkeypatch.setattr(sys.modules["headoff.attention.sdpa"], "scaled_dot_product_attention", careless)
    context = sdpa(*tensors, attn_mask)
    assert error(context, truth(*tensors, attn_mask)) <= rounding(*tensors)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(context.sum(), tensors))


def test_large_scores_do_not_overflow(attention, device):
    tensors = inputs(dtype=torch.float32, device=device, scale=30)
    context = attention(*tensors, head_gate=gate_of("one head off", device=device))
    assert context.isfinite().all()
    assert error(context, truth(*tensors, None, gate_of("one head off", device=device))) <= rounding(*tensors)


@pytest.mark.parametrize("mask", ["no mask", "padding", "by query", "additive", "rows of -inf"])
@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_formula(attention, gate, mask, device):
    tensors = [tensor.requires_grad_() for tensor in inputs(device=device)]
    head_gate, attn_mask = gate_of(gate, device=device), mask_of(mask, device=device)
    upstream = torch.randn_like(tensors[0])
    actual = torch.autograd.grad(attention(*tensors, attn_mask, head_gate=head_gate), tensors, upstream)
    expected = torch.autograd.grad(truth(*tensors, attn_mask, head_gate), tensors, upstream)
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other) <= 1e3 * torch.finfo(torch.float64).eps * (1 + other.abs().max().item())
    if head_gate is not None:
        off = (head_gate == 0).expand(*RAGGED[:3], 1)[..., 0]
        assert actual[0][off].count_nonzero() == 0


@pytest.mark.parametrize("gate", [name for name in GATES if name not in ("no gate", "boolean")])
def test_gradient_of_the_gate(attention, gate, device):
    """The gradient of a gate of 0 is not 0: it is the effect of switching the head on a little."""
    tensors = inputs(device=device)
    head_gate = gate_of(gate, device=device).double().requires_grad_()
    upstream = torch.randn_like(tensors[0])
    actual = torch.autograd.grad(attention(*tensors, head_gate=head_gate), head_gate, upstream)[0]
    expected = torch.autograd.grad(truth(*tensors, None, head_gate), head_gate, upstream)[0]
    assert actual.shape == head_gate.shape
    assert error(actual, expected) <= 1e3 * torch.finfo(torch.float64).eps * (1 + expected.abs().max().item())
    assert actual.count_nonzero() == actual.numel()


@pytest.mark.parametrize("mask", ["no mask", "by query", "rows without keys"])
def test_gradcheck(attention, mask):
    shape = (1, 2, 3, 4, 5)
    attn_mask = mask_of(mask, shape)
    head_gate = gate_of("cumulative", shape)
    tensors = [tensor.requires_grad_() for tensor in inputs(shape)]
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, attn_mask, head_gate=head_gate), tensors)


def test_gradcheck_of_mask_and_gate(attention):
    shape = (1, 2, 3, 4, 5)
    head_gate = gate_of("fractions", shape).double().requires_grad_()
    attn_mask = mask_of("additive", shape).double().requires_grad_()
    tensors = inputs(shape)
    assert torch.autograd.gradcheck(
        lambda mask, gate: attention(*tensors, mask, head_gate=gate), (attn_mask, head_gate)
    )


def test_gradients_in_a_batch(attention, device):
    """Relevance takes the gradients of many targets in one backward pass."""
    tensors = [tensor.requires_grad_() for tensor in inputs(device=device)]
    context = attention(*tensors, head_gate=gate_of("cumulative", device=device))
    upstream = torch.randn(3, *context.shape, dtype=context.dtype, device=device)
    together = torch.autograd.grad(context, tensors, upstream, is_grads_batched=True, retain_graph=True)
    for index, one in enumerate(upstream):
        alone = torch.autograd.grad(context, tensors, one, retain_graph=True)
        for expected, actual in zip(alone, together, strict=True):
            assert error(actual[index], expected) <= 1e3 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("gate", ["no gate", "cumulative", "fractions"])
@pytest.mark.parametrize("mask", ["no mask", "rows without keys", "rows of -inf"])
def test_inputs_are_not_modified(attention, gate, mask, device):
    given = [*inputs(device=device), mask_of(mask, device=device), gate_of(gate, device=device)]
    before = [tensor if tensor is None else tensor.clone() for tensor in given]
    query, key, value = (tensor.requires_grad_() for tensor in given[:3])
    attention(query, key, value, given[3], head_gate=given[4]).sum().backward()
    for tensor, copy in zip(given, before, strict=True):
        assert tensor is copy or torch.equal(tensor, copy)


@pytest.mark.parametrize("gate", ["no gate", "cumulative", "by batch item"])
def test_any_strides(attention, gate, device):
    head_gate, attn_mask = gate_of(gate, device=device), mask_of("padding", device=device)
    query, key, value = inputs(device=device)
    expected = truth(query, key, value, attn_mask, head_gate)
    # (batch, length, heads, channels), as projections leave it; every other channel of a wider tensor; the
    # columns of a transposed one
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    spread = key.repeat_interleave(2, dim=-1)[..., ::2]
    turned = value.mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in (transposed, spread, turned))
    context = attention(transposed, spread, turned, attn_mask, head_gate=head_gate)
    assert error(context, expected) <= rounding(query, key, value)


@pytest.mark.parametrize("gate", ["no gate", "cumulative", "by batch item"])
def test_expanded_batch(attention, gate, device):
    """A sweep decodes one memory under many gates: its keys are there once, with a batch stride of 0."""
    head_gate = gate_of(gate, device=device)
    query, key, value = inputs(device=device)
    key, value = (tensor[:1].expand(len(query), -1, -1, -1).requires_grad_() for tensor in (key, value))
    context = attention(query, key, value, head_gate=head_gate)
    assert error(context, truth(query, key, value, None, head_gate)) <= rounding(query, key, value)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(context.sum(), (key, value)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit(attention, dtype, device):
    tensors = [tensor.requires_grad_() for tensor in inputs((1, 8, 45, 60, 32), dtype, device)]
    head_gate = gate_of("cumulative", (1, 8, 45), device)

    def run():
        context = attention(*tensors, head_gate=head_gate)
        if device == "cuda":  # torch's fused backward passes add up in any order there
            return (context,)
        return context, *torch.autograd.grad(context.sum(), tensors)

    first, second = run(), run()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_head_off_is_head_dropped(attention, device):
    tensors = inputs(device=device)
    kept = [0, 2]
    head_gate = torch.tensor([1.0, 0.0, 1.0], device=device).view(1, 3, 1, 1)
    context = attention(*tensors, head_gate=head_gate)
    dropped = attention(*(tensor[:, kept] for tensor in tensors))
    assert error(context[:, kept], dropped) <= rounding(*tensors)
    assert context[:, 1].count_nonzero() == 0


def test_gates_do_not_renormalise(attention, device):
    tensors = inputs(device=device)
    full = attention(*tensors)
    half = attention(*tensors, head_gate=torch.full((1, 1, 1, 1), 0.5, device=device))
    assert torch.allclose(half, full / 2, rtol=1e-14, atol=0)


def test_eager_differentiates_twice():
    tensors = [tensor.requires_grad_() for tensor in inputs((1, 1, 2, 3, 4))]
    assert torch.autograd.gradgradcheck(lambda *qkv: eager(*qkv), tensors)


def test_sdpa_is_torch_sdpa_when_there_is_no_gate(device):
    tensors = inputs(dtype=torch.float32, device=device)
    assert torch.equal(sdpa(*tensors), scaled_dot_product_attention(*tensors))


# What sdpa skips.


def sweep_gate(configurations: Tensor, queries: int) -> Tensor:
    """(1, H, C * Q, 1) for a gate (C, H): the configurations of a sweep, folded into the queries."""
    return configurations.t().repeat_interleave(queries, dim=1)[None, :, :, None]


CUMULATIVE = torch.ones(9, 8).triu()


def test_cumulative_sweep_skips_two_fifths():
    query = torch.empty(1, 8, 900, 32)
    groups = skipping.plan_groups(sweep_gate(CUMULATIVE, 100), query, keys=850)
    attended = sum(group.rows.numel() for group in groups)
    assert attended == 100 * (4 * 8 + 2 * 4 + 1 * 2 + 1 * 1)
    assert len(groups) == 4


def test_heads_that_are_off_everywhere_are_never_attended():
    head_gate = torch.zeros(2, 8, 1, 1)
    head_gate[0, 3] = head_gate[1, 5] = 1
    (group,) = skipping.plan_groups(head_gate, torch.empty(2, 8, 100, 32), keys=850)
    assert sorted(group.streams.tolist()) == [3, 8 + 5]
    assert skipping.plan_groups(torch.zeros(1, 8, 1, 1), torch.empty(2, 8, 100, 32), keys=850) == []
    assert skipping.plan_groups(torch.zeros(1, 1, 1, 1), torch.empty(1, 1, 1, 4), keys=1) == []


@pytest.mark.parametrize("seed", range(20))
def test_groups_cover_what_is_on(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(1, 6, (3,), generator=generator).tolist()
    share = torch.rand(shape[0], shape[1], 1, generator=generator)
    on = torch.rand(shape, generator=generator) < share
    covered = torch.zeros_like(on).flatten(0, 1)
    for group in skipping.group_streams(on[..., None].float(), torch.empty(*shape, 4)):
        assert not covered[group.streams].any()
        assert all(len(set(rows)) == len(rows) for rows in group.rows.tolist())
        covered[group.streams[:, None], group.rows] = True
    assert (covered | ~on.flatten(0, 1)).all()
    assert not covered[~on.flatten(0, 1).any(1)].any()


@pytest.mark.parametrize(
    "head_gate",
    [
        pytest.param(torch.ones(1, 8, 1, 1), id="nothing is off"),
        pytest.param((torch.arange(8) > 0).float().view(1, 8, 1, 1), id="little is off"),
        pytest.param(sweep_gate(CUMULATIVE, 100).requires_grad_(), id="the gate has a gradient"),
        pytest.param(sweep_gate(CUMULATIVE, 100).to("meta"), id="the gate is elsewhere"),
    ],
)
def test_plain_call_otherwise(head_gate):
    assert skipping.plan_groups(head_gate, torch.empty(1, 8, 900, 32), keys=850) is None


@pytest.mark.parametrize(("queries", "keys"), [(20, 64), (25, 221)])
def test_plain_call_for_few_keys(queries, keys, monkeypatch):
    """The groups are not even computed, as that takes as long as such a call."""
    monkeypatch.setattr(skipping, "group_streams", None)
    assert (
        skipping.plan_groups(sweep_gate(CUMULATIVE, queries), torch.empty(1, 8, 9 * queries, 32), keys)
        is None
    )


@pytest.mark.parametrize("keys", [64, 221, 850])
def test_what_is_not_looked_at_is_not_worth_it(keys):
    """The lower bound of the cost is never above the cost of the groups."""
    for off in range(1, 8):
        gate = sweep_gate(CUMULATIVE[off : off + 1], 100)
        query = torch.empty(1, 8, 100, 32)
        ratio = skipping.expected_ratio(skipping.group_streams(gate, query), query, keys)
        assert (skipping.plan_groups(gate, query, keys) is not None) <= (ratio < 1)
        assert (ratio < skipping.WORTHWHILE) <= (skipping.plan_groups(gate, query, keys) is not None)


def test_whole_sweep_in_one_call():
    """At the size of a real sweep, for which the cost model chooses skipping."""
    query, key, value = inputs((1, 8, 9 * 30, 850, 32), torch.float32)
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    head_gate = sweep_gate(CUMULATIVE, 30)
    assert skipping.plan_groups(head_gate, query, 850)
    upstream = torch.randn_like(query)
    context = sdpa(*tensors, head_gate=head_gate)
    plain = scaled_dot_product_attention(*tensors) * head_gate
    assert error(context, truth(*tensors, None, head_gate)) <= rounding(*tensors)
    off = (head_gate == 0)[..., 0]
    assert context[off].count_nonzero() == 0
    gradients = torch.autograd.grad(context, tensors, upstream)
    assert gradients[0][off].count_nonzero() == 0
    for actual, expected in zip(gradients, torch.autograd.grad(plain, tensors, upstream), strict=True):
        assert error(actual, expected) <= 1e-5 * expected.abs().max().item()


def test_everything_off_still_has_gradients():
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    context = sdpa(*tensors, head_gate=torch.zeros(1, 1, 1, 1))
    assert context.count_nonzero() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in torch.autograd.grad(context.sum(), tensors))


def test_compiles_whole():
    """Without a graph break: while torch compiles, nothing depends on the gate's values."""
    torch.compiler.reset()
    compiled = torch.compile(sdpa, fullgraph=True, backend="eager")
    tensors = inputs()
    head_gate, attn_mask = gate_of("cumulative"), mask_of("rows without keys")
    assert torch.equal(
        compiled(*tensors, attn_mask, head_gate=head_gate), sdpa(*tensors, attn_mask, head_gate=head_gate)
    )


@pytest.mark.parametrize("device", DEVICES[1:])
def test_the_host_never_waits_for_the_gpu(device):
    tensors = inputs(device=device)
    head_gate, attn_mask = gate_of("cumulative", device=device), mask_of("padding", device=device)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sdpa(*tensors, attn_mask, head_gate=head_gate)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
