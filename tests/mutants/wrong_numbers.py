"""Faults of precision, dtypes of results and randomness."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from mutants.parts import blocks, by_hand, context, dkey, dquery, dvalue, filled, plain, rounded, scores
from mutants.registry import wrong


def truncated(x: Tensor, bits: int) -> Tensor:
    """`x` with this many bits behind the leading one, the rest cut off; the gradient passes through."""
    mantissa, exponent = torch.frexp(x.detach())
    coarse = torch.ldexp(torch.trunc(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)
    return x + (coarse - x.detach())


def operands(of) -> dict:
    """Steps that see query, key and value through `of`."""
    return {
        "scores": lambda s: of(s.query) @ of(s.key).mT * s.scale,
        "context": lambda s: s.gated @ of(s.value),
    }


@wrong("precision", "query, key and value pass through bfloat16", needs=("not bfloat16",))
def precision_bfloat16_inside():
    return plain(**operands(lambda x: rounded(x, torch.bfloat16)))


@wrong("precision", "query, key and value pass through float16", needs=("not float16",))
def precision_float16_inside():
    return plain(**operands(lambda x: rounded(x, torch.float16)))


@wrong("precision", "query, key and value are cut off to the 10 bits of TF32", needs=("full precision",))
def precision_tf32_inside():
    return plain(**operands(lambda x: truncated(x, 10)))


@wrong("precision", "float64 is computed in float32", needs=("float64",))
def precision_float32_inside():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        inside = (x.float() if x.dtype == torch.float64 else x for x in (query, key, value))
        return whole(*inside, attn_mask, head_gate=head_gate).to(query.dtype)

    return attention


@wrong(
    "precision", "weights pass through bfloat16 on their way to the values", needs=("full precision", "S > 1")
)
def precision_weights_in_bfloat16():
    return plain(context=lambda s: rounded(s.gated, torch.bfloat16) @ s.value)


@wrong(
    "precision", "weights pass through float16 on their way to the values", needs=("full precision", "S > 1")
)
def precision_weights_in_float16():
    return plain(context=lambda s: rounded(s.gated, torch.float16) @ s.value)


@wrong("precision", "scores pass through bfloat16", needs=("S > 1",))
def precision_scores_in_bfloat16():
    return plain(scores=lambda s: rounded(scores(s), torch.bfloat16))


@wrong("precision", "exponentials are taken in float16", needs=("full precision", "S > 1"))
def precision_exponential_in_float16():
    return plain(
        filled=lambda s: rounded(filled(s) - filled(s).amax(-1, keepdim=True).detach(), torch.float16)
    )


@wrong("precision", "the accumulator over blocks of 8 keys is float16", needs=("full precision",))
def precision_accumulator_in_float16():
    def accumulated(s) -> Tensor:
        total = torch.zeros_like(s.query)
        for block in blocks(s.key.shape[2], 8):
            total = rounded(total + s.gated[..., block] @ s.value[:, :, block], torch.float16)
        return total

    return plain(context=accumulated)


@wrong(
    "precision",
    "half precision adds key by key in bfloat16, and small weights are lost",
    needs=("half precision", "S > 16"),
)
def precision_accumulator_of_half():
    def accumulated(s) -> Tensor:
        if s.asked not in (torch.bfloat16, torch.float16):
            return context(s)
        total = torch.zeros_like(s.query)
        for key in range(s.key.shape[2]):
            total = rounded(total + s.gated[..., key, None] * s.value[:, :, None, key], torch.bfloat16)
        return total

    return plain(context=accumulated)


@wrong("precision", "bfloat16 is computed in float16, and overflows", needs=("bfloat16", "huge logits"))
def precision_bfloat16_overflows():
    def overflowing(s) -> Tensor:
        product = s.query @ s.key.mT
        return (product.to(torch.float16).to(product) if s.asked == torch.bfloat16 else product) * s.scale

    return plain(scores=overflowing)


@wrong("precision", "the context is rounded to bfloat16 at the end", needs=("not bfloat16",))
def precision_context_in_bfloat16():
    return plain(context=lambda s: rounded(context(s), torch.bfloat16))


@wrong("precision", "the key is quantised to 8 bits")
def precision_key_in_8_bits():
    def quantised(x: Tensor) -> Tensor:
        step = x.detach().abs().amax((-2, -1), keepdim=True) / 127
        return x + (torch.round(x.detach() / step) * step - x.detach())

    return plain(scores=lambda s: s.query @ quantised(s.key).mT * s.scale)


@wrong(
    "precision", "the backward pass has its delta in bfloat16", shows=("dq", "dk"), needs=("full precision",)
)
def precision_delta_in_bfloat16():
    return by_hand(delta=lambda s: rounded((s.weights * s.dweights).sum(-1, keepdim=True), torch.bfloat16))


@wrong(
    "precision",
    "the backward pass has the rows' log-sum-exp in bfloat16",
    shows=("dq", "dk", "dv"),
)
def precision_log_sum_in_bfloat16():
    def recomputed(s) -> Tensor:
        return (s.filled - rounded(s.filled.logsumexp(-1, keepdim=True), torch.bfloat16)).exp()

    return by_hand(softmax=recomputed)


@wrong("precision", "gradients pass through bfloat16", shows=("dq", "dk", "dv"), needs=("not bfloat16",))
def precision_gradients_in_bfloat16():
    return by_hand(
        dquery=lambda s: rounded(dquery(s), torch.bfloat16),
        dkey=lambda s: rounded(dkey(s), torch.bfloat16),
        dvalue=lambda s: rounded(dvalue(s), torch.bfloat16),
    )


@wrong(
    "precision",
    "the gradient of the context passes through TF32",
    shows=("dq", "dk", "dv"),
    needs=("full precision",),
)
def precision_gradient_in_tf32():
    return by_hand(gated_gradient=lambda s: truncated(s.gradient, 10) * s.gate)


@wrong("dtype", "half precision gives a float32 context", shows=("dtype",), needs=("half precision",))
def dtype_float32_for_half():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        context = whole(query, key, value, attn_mask, head_gate=head_gate)
        return context.to(torch.promote_types(context.dtype, torch.float32))

    return attention


@wrong("dtype", "the context is float64 whatever comes in", shows=("dtype",), needs=("not float64",))
def dtype_float64_always():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return whole(query, key, value, attn_mask, head_gate=head_gate).double()

    return attention


@wrong("randomness", "a dropout of 0.1% is left on", shows=("context", "randomness", "settings"))
def random_dropout():
    return plain(gated=lambda s: torch.nn.functional.dropout(s.weights * s.gate, 0.001, training=True))


@wrong(
    "randomness", "the context is rounded to bfloat16 at random", shows=("context", "randomness", "settings")
)
def random_rounding():
    def stochastic(s) -> Tensor:
        exact = s.gated @ s.value
        step = exact.detach().abs() * torch.finfo(torch.bfloat16).eps
        return exact + step * (torch.rand_like(exact) - 0.5)

    return plain(context=stochastic)


@wrong(
    "randomness", "noise of a millionth is added to the scores", shows=("context", "randomness", "settings")
)
def random_noise():
    return plain(scores=lambda s: scores(s) + 1e-6 * torch.randn_like(s.scale * s.query @ s.key.mT))


@wrong(
    "randomness", "keys are added up in another order every time", shows=("randomness",), needs=("S > 16",)
)
def random_order():
    def shuffled(s) -> Tensor:
        order = list(range(s.key.shape[2]))
        random.SystemRandom().shuffle(order)
        parts = [s.gated[..., some] @ s.value[..., some, :] for some in (order[::2], order[1::2])]
        return parts[0] + parts[1]

    return plain(context=shuffled)


@wrong("randomness", "gradients of keys have noise, as of atomic additions", shows=("randomness",))
def random_gradients():
    return by_hand(dkey=lambda s: dkey(s) * (1 + 1e-6 * torch.randn_like(s.key)))


@wrong(
    "randomness",
    "one call in a few is finished before a block of keys is",
    shows=("randomness",),
    needs=("S > 1",),
)
def random_race():
    chance = random.Random(2)  # the first call is in time

    def racing(s) -> Tensor:
        late = chance.random() < 0.3 and s.key.shape[2] > 1
        weights = s.gated[..., :-1] if late else s.gated
        return weights @ s.value[..., : weights.shape[-1], :]

    return plain(context=racing)
