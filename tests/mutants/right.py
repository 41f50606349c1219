"""Right attentions in many styles; all of them must pass the checks that reject the wrong ones.

What they may do: sum in another order, return any strides, compute more precisely than asked, leave dtypes out
by raising TypeError, take the mask under another name, know nothing of gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from shutil import which

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from headoff.attention import conform, eager, gate_context, sdpa
from mutants.parts import BACKWARD, FORWARD, ByHand, blocks, by_hand, plain, rounded, run, start
from mutants.registry import ALL_DTYPES, right

SINGLE_AND_DOUBLE = (torch.float32, torch.float64)


def without_cuda() -> str | None:
    return None if torch.cuda.is_available() else "there is no CUDA device here"


def without_compiler() -> str | None:
    return None if any(map(which, ("cc", "gcc", "clang", "c++", "g++"))) else "there is no C compiler here"


def opened(attn_mask: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask without fully masked rows, in four dimensions and a dtype that torch takes; and where it had such rows."""
    if attn_mask is None:
        return None, None
    attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if attn_mask.dtype == torch.bool:
        fully_masked = ~attn_mask.any(-1, keepdim=True)
        return attn_mask | fully_masked, fully_masked
    attn_mask = attn_mask.to(like)
    fully_masked = (attn_mask == -math.inf).all(-1, keepdim=True)
    return attn_mask.masked_fill(fully_masked, 0.0), fully_masked


def closed(result: Tensor, fully_masked: Tensor | None) -> Tensor:
    """Zero in fully masked rows."""
    return result if fully_masked is None else result.masked_fill(fully_masked, 0.0)


def additive(attn_mask: Tensor, like: Tensor) -> Tensor:
    """Any mask as numbers to add to scores."""
    if attn_mask.dtype == torch.bool:
        return torch.zeros(attn_mask.shape, dtype=like.dtype, device=like.device).masked_fill(
            ~attn_mask, -math.inf
        )
    return attn_mask.to(like)


@right("eager", "the package's oracle itself")
def headoff_eager():
    return eager


@right("torch", "the package's fast path: torch's fused attention, heads that are off left out")
def headoff_sdpa():
    return sdpa


@right("torch", "torch's function as it is: no gate, no signature that Python can inspect")
def torch_function():
    return conform(scaled_dot_product_attention, "torch's attention")


def on_backend(backend: SDPBackend):
    # Math as well, for calls that the other does not take; it comes last by priority.
    allowed = [backend, SDPBackend.MATH]

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        mask, fully_masked = opened(attn_mask, query)
        with sdpa_kernel(allowed):
            return gate_context(
                closed(scaled_dot_product_attention(query, key, value, mask), fully_masked), head_gate
            )

    return attention


@right("torch", "torch's math backend")
def torch_math():
    return on_backend(SDPBackend.MATH)


@right("torch", "torch's flash backend")
def torch_flash():
    return on_backend(SDPBackend.FLASH_ATTENTION)


@right("torch", "torch's memory-efficient backend", missing=without_cuda)
def torch_efficient():
    return on_backend(SDPBackend.EFFICIENT_ATTENTION)


@right("torch", "torch's cuDNN backend", missing=without_cuda)
def torch_cudnn():
    return on_backend(SDPBackend.CUDNN_ATTENTION)


@right("eager", "query scaled first, the product transposed, the division last")
def eager_reordered():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        compute = torch.promote_types(query.dtype, torch.float32)
        scores = (key.to(compute) @ (query.to(compute) / math.sqrt(query.shape[-1])).mT).mT
        if attn_mask is not None:
            scores = scores + additive(attn_mask, scores)
        most = scores.detach().amax(-1, keepdim=True)
        terms = (scores - most.masked_fill(most == -math.inf, 0.0)).exp()
        total = terms.sum(-1, keepdim=True)
        result = (value.to(compute).mT @ terms.mT).mT / torch.where(total > 0, total, 1)
        return gate_context(result, head_gate).to(query.dtype)

    return attention


@right("einsum", "two einsums, the gate on the weights")
def einsum():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        scores = torch.einsum("bhqd,bhsd->bhqs", query, key) * query.shape[-1] ** -0.5
        mask, fully_masked = opened(attn_mask, scores)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = closed(torch.softmax(scores, -1), fully_masked)
        if head_gate is not None:
            weights = weights * head_gate.to(weights)
        return torch.einsum("bhqs,bhsd->bhqd", weights, value)

    return attention


@right("precision", "everything in float64, rounded at the end")
def float64_inside():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        inside = (x.double() for x in (query, key, value))
        return eager(*inside, attn_mask, head_gate=head_gate).to(query.dtype)

    return attention


@right("precision", "float32 inside half precision")
def float32_inside_half():
    return plain()


@right(
    "precision", "float32 scores and sums, weights rounded to the values' dtype, as flash-attention has it"
)
def weights_in_dtype_of_value():
    return plain(context=lambda s: rounded(s.weights, s.asked) @ s.value * s.gate)


@right(
    "online softmax",
    "keys in blocks with a running maximum; backward from log-sum-exp and delta, block by block",
)
def flash():
    return Flash.attention


class Flash(torch.autograd.Function):
    """Dao, "FlashAttention-2" (arXiv 2307.08691), algorithms 1 and 2, with the gate on the context."""

    KEYS = 16
    """Keys in a block."""

    @classmethod
    def attention(cls, query, key, value, attn_mask=None, *, head_gate=None):
        return cls.apply(query, key, value, attn_mask, head_gate)

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, head_gate):
        compute = torch.promote_types(query.dtype, torch.float32)
        q = query.to(compute) / math.sqrt(query.shape[-1])
        most = q.new_full((*q.shape[:3], 1), -math.inf)
        total = torch.zeros_like(most)
        result = torch.zeros_like(q)
        for block in blocks(key.shape[2], Flash.KEYS):
            scores = Flash.scores(q, key, attn_mask, block)
            now = torch.maximum(most, scores.amax(-1, keepdim=True))
            base = now.masked_fill(now == -math.inf, 0.0)
            terms = (scores - base).exp()
            shrink = (most - base).exp()
            total = total * shrink + terms.sum(-1, keepdim=True)
            result = result * shrink + terms @ value[:, :, block].to(compute)
            most = now
        seen = total > 0
        # exp(score - inf) is 0: that is how fully masked rows stay without weights in the backward pass.
        log_sum = torch.where(seen, most.masked_fill(~seen, 0.0) + total.log(), math.inf)
        result = gate_context(result / torch.where(seen, total, 1), head_gate)
        ctx.save_for_backward(query, key, value, attn_mask, head_gate, log_sum, result)
        return result.to(query.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, attn_mask, head_gate, log_sum, result = ctx.saved_tensors
        compute = result.dtype
        scale = 1 / math.sqrt(query.shape[-1])
        q = query.to(compute) * scale
        raw = grad_output.to(compute)
        delta = (raw * result).sum(-1, keepdim=True)
        gradient = gate_context(raw, head_gate)
        dq, dk, dv = (
            torch.zeros_like(q),
            torch.empty_like(key, dtype=compute),
            torch.empty_like(value, dtype=compute),
        )
        for block in blocks(key.shape[2], Flash.KEYS):
            weights = (Flash.scores(q, key, attn_mask, block) - log_sum).exp()
            dv[:, :, block] = weights.mT @ gradient
            dscores = weights * (gradient @ value[:, :, block].to(compute).mT - delta)
            dq += dscores @ key[:, :, block].to(compute) * scale
            dk[:, :, block] = dscores.mT @ q
        return *(x.to(query.dtype) for x in (dq, dk, dv)), None, None

    @staticmethod
    def scores(q: Tensor, key: Tensor, attn_mask: Tensor | None, block: slice) -> Tensor:
        scores = q @ key[:, :, block].to(q).mT
        if attn_mask is None:
            return scores
        return scores + additive(attn_mask.expand(*attn_mask.shape[:-1], key.shape[2])[..., block], scores)


@right("online softmax", "splits of the keys, each with its own softmax, put together by their log-sum-exps")
def split_keys():
    def split(s) -> Tensor:
        parts = [(s.masked[..., block], s.value[:, :, block]) for block in blocks(s.key.shape[2], 32)]
        sums = torch.stack(
            [scores.masked_fill(s.fully_masked, 0.0).logsumexp(-1, True) for scores, _ in parts]
        )
        shares = sums.softmax(0)
        result = torch.zeros_like(s.query)
        for share, log_sum, (scores, value) in zip(shares, sums, parts, strict=True):
            base = log_sum.masked_fill(log_sum == -math.inf, 0.0)
            result = result + share * ((scores.masked_fill(s.fully_masked, 0.0) - base).exp() @ value)
        return closed(result, s.fully_masked) * s.gate

    # The log-sum-exp of a split without keys is -inf, and its derivative 0 / 0: so the gradients are by hand.
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return Split.apply(query, key, value, attn_mask, head_gate, split)

    return attention


class Split(ByHand):
    """The context by the step that is passed last, the gradients by hand."""

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, head_gate, split):
        ctx.save_for_backward(query, key, value, attn_mask, head_gate)
        ctx.steps = FORWARD | BACKWARD
        steps = {
            name: step
            for name, step in FORWARD.items()
            if name in ("gate", "mask", "scale", "scores", "masked")
        }
        steps |= {"fully_masked": FORWARD["fully_masked"], "context": split}
        return run(steps, start(query, key, value, attn_mask, head_gate)).context.to(query.dtype)


@right("backward", "the gate in the gradient of the context, weights recomputed, all in plain products")
def gradient_gated():
    return by_hand()


@right("backward", "delta from the gated context and the raw gradient")
def delta_of_context():
    return by_hand(delta=lambda s: (s.gradient * s.context).sum(-1, keepdim=True))


@right("skipping", "only heads that are on for some query of some item are computed")
def heads_selected():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if head_gate is None:
            return eager(query, key, value, attn_mask)
        gate = head_gate.expand(*query.shape[:3], 1)
        on = (gate != 0).any(2).any(0).flatten().nonzero().flatten()
        mask = attn_mask
        if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:
            mask = mask.index_select(-3, on)
        some = eager(*(x.index_select(1, on) for x in (query, key, value)), mask, head_gate=gate[:, on])
        # Of the query, so that a call without a head that is on has gradients as well, and they are 0.
        return (query * 0).index_copy(1, on, some)

    return attention


@right("skipping", "one product for each item and head that is on, in a Python loop")
def heads_in_loop():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        batch, heads, queries, _ = query.shape
        gate = query.new_ones(()) if head_gate is None else head_gate
        gate = gate.expand(batch, heads, queries, 1)
        mask = None if attn_mask is None else attn_mask.expand(batch, heads, queries, key.shape[2])
        # The gradient of a tensor that is indexed in a loop would be as large as that tensor for every item.
        items = [[item.unbind() for item in x.unbind()] for x in (query, key, value)]
        rows = []
        for b in range(batch):
            for h in range(heads):
                if bool((gate[b, h] == 0).all()):
                    rows.append(items[0][b][h] * 0)
                    continue
                inputs = (x[b][h][None, None] for x in items)
                part = None if mask is None else mask[b, h][None, None]
                rows.append(eager(*inputs, part, head_gate=gate[b, h][None, None])[0, 0])
        return torch.stack(rows).view(query.shape)

    return attention


@right("gate", "where it does not depend on the query, the gate is folded into the value")
def gate_in_value():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if head_gate is None or (head_gate.dim() > 1 and head_gate.shape[-2] > 1):
            return eager(query, key, value, attn_mask, head_gate=head_gate)
        return eager(query, key, value * head_gate.to(value), attn_mask)

    return attention


@right("softmax", "exp of log_softmax")
def log_space():
    return plain(softmax=lambda s: s.filled.log_softmax(-1).exp())


@right("softmax", "powers of 2, log2(e) in the scale and in the mask, as kernels have it")
def powers_of_2():
    def terms(s) -> Tensor:
        scores = s.filled * math.log2(math.e)
        return torch.exp2(scores - scores.amax(-1, keepdim=True))

    return plain(softmax=lambda s: terms(s) / terms(s).sum(-1, keepdim=True))


@right("softmax", "a running maximum that is not differentiated, division after the product")
def divided_last():
    def terms(s) -> Tensor:
        return (s.filled - s.filled.detach().amax(-1, keepdim=True)).exp().masked_fill(s.fully_masked, 0)

    def divided(s) -> Tensor:
        total = s.softmax.sum(-1, keepdim=True)
        return s.gate * (s.softmax @ s.value) / torch.where(total > 0, total, 1)

    return plain(softmax=terms, context=divided)


@right("sizes", "keys padded to a multiple of 16 with zeros, hidden by the mask")
def keys_padded():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        missing = -key.shape[2] % 16
        mask = (
            torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
            if attn_mask is None
            else attn_mask
        )
        mask = additive(mask.expand(*mask.shape[:-1], key.shape[2]), query)
        mask = nn.functional.pad(mask, (0, missing), value=-math.inf)
        key, value = (nn.functional.pad(x, (0, 0, 0, missing)) for x in (key, value))
        return eager(query, key, value, mask, head_gate=head_gate)

    return attention


@right("sizes", "queries in chunks of 7")
def queries_in_chunks():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        rows = query.shape[2]

        def part(x: Tensor | None, chunk: slice) -> Tensor | None:
            return x[..., chunk, :] if x is not None and x.dim() > 1 and x.shape[-2] > 1 else x

        return torch.cat(
            [
                eager(
                    query[:, :, chunk], key, value, part(attn_mask, chunk), head_gate=part(head_gate, chunk)
                )
                for chunk in blocks(rows, 7)
            ],
            2,
        )

    return attention


@right("layout", "(T, B, H, D) inside, a transposed view of that returned")
def tokens_first():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        q, k, v = (x.permute(2, 0, 1, 3).contiguous() for x in (query, key, value))
        scores = torch.einsum("qbhd,sbhd->bhqs", q, k) / math.sqrt(q.shape[-1])
        mask, fully_masked = opened(attn_mask, scores)
        if mask is not None:
            scores = scores + additive(mask, scores)
        weights = closed(scores.softmax(-1), fully_masked)
        result = torch.einsum("bhqs,sbhd->qbhd", weights, v)
        return gate_context(result.permute(1, 2, 0, 3), head_gate)

    return attention


@right("layout", "items and heads folded into one dimension for baddbmm")
def batched_products():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        shape = (*query.shape[:3], key.shape[2])
        mask, fully_masked = opened(attn_mask, query)
        bias = query.new_zeros(shape) if mask is None else additive(mask, query).expand(shape)
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        scores = torch.baddbmm(bias.reshape(-1, *shape[2:]), q, k.mT, alpha=query.shape[-1] ** -0.5)
        weights = closed(scores.softmax(-1).view(shape), fully_masked).flatten(0, 1)
        return gate_context(torch.bmm(weights, v).view(query.shape), head_gate)

    return attention


@right("layout", "heads under vmap")
def vmapped():
    def one(query, key, value, bias):
        weights = (query @ key.mT / math.sqrt(query.shape[-1]) + bias).softmax(-1)
        return weights @ value

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        mask, fully_masked = opened(attn_mask, query)
        bias = query.new_zeros(1) if mask is None else additive(mask, query)
        bias = bias.expand(*query.shape[:3], key.shape[2])
        return gate_context(
            closed(torch.vmap(torch.vmap(one))(query, key, value, bias), fully_masked), head_gate
        )

    return attention


class Module(nn.Module):
    """Attention as a module."""

    def forward(self, query, key, value, attn_mask=None, *, head_gate=None):
        return eager(query, key, value, attn_mask, head_gate=head_gate)


@right("callable", "an nn.Module")
def module():
    return conform(Module().eval(), "module")


@right("callable", "a functools.partial that chooses a size of blocks")
def partial_of_function():
    def attention(query, key, value, attn_mask=None, *, head_gate=None, size):
        parts = [value[:, :, block] for block in blocks(value.shape[2], size)]
        return eager(query, key, torch.cat(parts, 2), attn_mask, head_gate=head_gate)

    return conform(partial(attention, size=5), "partial")


@right("callable", "the mask is called `mask`, stands last, and there is no gate")
def mask_by_keyword():
    def attention(query, key, value, dropout_p=0.0, is_causal=False, *, mask=None):
        return eager(query, key, value, mask)

    return conform(attention, "mask by keyword")


@right("callable", "the apply of an autograd function")
def apply_of_function():
    class Applied(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, attn_mask):
            ctx.save_for_backward(query, key, value, attn_mask)
            return eager(query, key, value, attn_mask)

        @staticmethod
        def backward(ctx, grad_output):
            *inputs, attn_mask = ctx.saved_tensors
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in inputs]
                return *torch.autograd.grad(eager(*leaves, attn_mask), leaves, grad_output), None

    return conform(Applied.apply, "apply")


@right("dtype", "float32 and float64; TypeError for half precision", dtypes=SINGLE_AND_DOUBLE)
def refuses_half():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if query.dtype not in SINGLE_AND_DOUBLE:
            raise TypeError(f"{query.dtype} is not supported: use float32 or float64")
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@right("dtype", "no float64, as most kernels", dtypes=tuple(d for d in ALL_DTYPES if d != torch.float64))
def refuses_float64():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if query.dtype == torch.float64:
            raise TypeError("torch.float64 is not supported: use float32")
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@right("memory", "checkpointed: the forward pass is repeated in the backward pass")
def checkpointed():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return checkpoint(
            lambda *inputs: eager(*inputs, attn_mask, head_gate=head_gate),
            query,
            key,
            value,
            use_reentrant=False,
        )

    return attention


@right("memory", "a workspace that is kept from call to call, written whole before it is read")
def workspace_kept():
    memory: dict[tuple, Tensor] = {}

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scores):
            known = scores.shape, scores.dtype, scores.device
            # What is kept serves later calls, and those that are made in inference mode cannot serve others.
            with torch.inference_mode(False):
                space = memory.setdefault(known, torch.empty_like(scores))
            torch.softmax(scores, -1, out=space)
            weights = space.clone()
            ctx.save_for_backward(weights)
            return weights

        @staticmethod
        def backward(ctx, grad_output):
            (weights,) = ctx.saved_tensors
            return weights * (grad_output - (weights * grad_output).sum(-1, keepdim=True))

    return plain(softmax=lambda s: Kept.apply(s.filled))


@right("memory", "constants are cached by what they depend on, and by all of it")
def constants_cached():
    @cache
    def scale(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # no backward pass could use it otherwise
            return torch.tensor(channels, dtype=dtype, device=device).rsqrt()

    return plain(scale=lambda s: scale(s.query.shape[-1], s.query.dtype, s.query.device))


def flex_mask(mask: Tensor, like: tuple[int, ...]) -> Callable[..., Tensor]:
    """A score modification that adds `mask`."""
    mask = mask.expand(like)
    return lambda score, b, h, q, k: score + mask[b, h, q, k]


@right(
    "flex",
    "flex_attention, the mask as a score modification, the gate on the context",
    missing=without_cuda,
    slow=True,
)
def flex():
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        mask, fully_masked = opened(attn_mask, query)
        shape = (*query.shape[:3], key.shape[2])
        modification = None if mask is None else flex_mask(additive(mask, query), shape)
        result = compiled(*(x.contiguous() for x in (query, key, value)), score_mod=modification)
        return gate_context(closed(result, fully_masked), head_gate)

    return attention


@right("flex", "flex_attention, not compiled, in the forward pass; the backward pass by hand", slow=True)
def flex_forward():
    class Flex(ByHand):
        @staticmethod
        def forward(ctx, query, key, value, attn_mask, head_gate, steps):
            ctx.save_for_backward(query, key, value, attn_mask, head_gate)
            ctx.steps = steps
            mask, fully_masked = opened(attn_mask, query)
            shape = (*query.shape[:3], key.shape[2])
            modification = None if mask is None else flex_mask(additive(mask, query), shape)
            result = flex_attention(query.detach(), key.detach(), value.detach(), score_mod=modification)
            return gate_context(closed(result, fully_masked), head_gate)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return Flex.apply(query, key, value, attn_mask, head_gate, FORWARD | BACKWARD)

    return attention


@right("compiled", "the oracle, compiled by Inductor", missing=without_compiler, slow=True)
def compiled():
    return conform(torch.compile(eager, dynamic=True), "compiled")


@right("compiled", "the oracle, traced by Dynamo and AOTAutograd and run by torch's own operators", slow=True)
def traced():
    return conform(torch.compile(eager, dynamic=True, backend="aot_eager"), "traced")
