"""Faults in the scale and the softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mutants.parts import blocks, plain, rounded, scale, scores
from mutants.registry import wrong


@wrong("scale", "the scores are not scaled")
def scale_missing():
    return plain(scale=lambda s: 1.0)


@wrong("scale", "the scores are scaled by the square root of the model's width", needs=("heads",))
def scale_of_model_width():
    return plain(scale=lambda s: 1 / math.sqrt(s.query.shape[1] * s.query.shape[-1]))


@wrong(
    "scale", "the channels are padded to a power of two, and those are counted", needs=("D no power of 2",)
)
def scale_of_padded_channels():
    return plain(scale=lambda s: 1 / math.sqrt(2 ** math.ceil(math.log2(s.query.shape[-1]))))


@wrong("scale", "the scale is that of 64 channels", needs=("D not 64",))
def scale_of_64_channels():
    return plain(scale=lambda s: 1 / 8)


@wrong("scale", "the scale is that of 16 channels, as in the bundled model", needs=("D not 16",))
def scale_of_16_channels():
    return plain(scale=lambda s: 1 / 4)


@wrong("scale", "the scale is 1 / D")
def scale_without_root():
    return plain(scale=lambda s: 1 / s.query.shape[-1])


@wrong("scale", "query and scores are both scaled")
def scale_applied_twice():
    return plain(scale=lambda s: scale(s) ** 2)


@wrong("scale", "query and key are both scaled by the fourth root, and one of them is forgotten")
def scale_half_applied():
    return plain(scale=lambda s: math.sqrt(scale(s)))


@wrong("scale", "the scale counts keys in place of channels", needs=("S not D",))
def scale_of_keys():
    return plain(scale=lambda s: 1 / math.sqrt(s.key.shape[2]))


@wrong("scale", "the scale is 0.1% too large", needs=("full precision",))
def scale_off_by_a_thousandth():
    return plain(scale=lambda s: scale(s) * 1.001)


@wrong("scale", "the scale passes through bfloat16", needs=("full precision", "D no power of 4"))
def scale_in_bfloat16():
    return plain(scale=lambda s: float(torch.tensor(scale(s)).bfloat16()))


@wrong("scale", "with a mask, the scale is lost", needs=("mask",))
def scale_missing_with_mask():
    return plain(scale=lambda s: scale(s) if s.mask is None else 1.0)


def quotient(terms: Tensor) -> Tensor:
    return terms / terms.sum(-1, keepdim=True)


def shifted(s) -> Tensor:
    return s.filled - s.filled.amax(-1, keepdim=True)


@wrong("softmax", "no maximum is subtracted", needs=("huge logits",))
def softmax_without_maximum():
    return plain(softmax=lambda s: quotient(s.filled.exp()))


@wrong(
    "softmax",
    "no maximum is subtracted, and what overflows is replaced by zero",
    needs=("huge logits",),
    shows=("context", "dq", "dk"),
)
def softmax_overflow_hidden():
    return plain(softmax=lambda s: quotient(s.filled.exp()).nan_to_num(0.0, 0.0, 0.0))


@wrong(
    "softmax",
    "one maximum is subtracted for the whole call, and rows far below it underflow",
    needs=("huge logits",),
)
def softmax_maximum_of_call():
    return plain(softmax=lambda s: quotient((s.filled - s.filled.amax().detach()).exp()))


@wrong("softmax", "the running maximum starts at 0 and not at -inf", needs=("huge logits",))
def softmax_maximum_from_zero():
    return plain(softmax=lambda s: quotient((s.filled - s.filled.amax(-1, True).clamp_min(0).detach()).exp()))


@wrong("softmax", "the maximum is that of the first 16 keys", needs=("huge logits", "S > 16"))
def softmax_maximum_of_first_block():
    return plain(softmax=lambda s: quotient((s.filled - s.filled[..., :16].amax(-1, True).detach()).exp()))


@wrong(
    "softmax", "each block of 16 keys subtracts its own maximum and nothing is rescaled", needs=("S > 16",)
)
def softmax_blocks_not_rescaled():
    def terms(s) -> Tensor:
        parts = [s.filled[..., block] for block in blocks(s.filled.shape[-1], 16)]
        return torch.cat([(part - part.amax(-1, True).clamp_min(-1e30)).exp() for part in parts], -1)

    return plain(softmax=lambda s: quotient(terms(s)))


@wrong(
    "softmax", "the accumulator is rescaled when the maximum grows, the denominator is not", needs=("S > 16",)
)
def softmax_denominator_not_rescaled():
    def total(s) -> Tensor:
        parts = [s.filled[..., block] for block in blocks(s.filled.shape[-1], 16)]
        running = torch.stack([part.amax(-1) for part in parts], -1).cummax(-1).values
        sums = [(part - running[..., i, None]).exp().sum(-1) for i, part in enumerate(parts)]
        return torch.stack(sums, -1).sum(-1, keepdim=True)

    return plain(softmax=lambda s: shifted(s).exp() / total(s))


@wrong("softmax", "splits of 16 keys are normalised each by itself and averaged", needs=("S > 16",))
def softmax_splits_averaged():
    def averaged(s) -> Tensor:
        parts = [s.filled[..., block].clamp_min(-1e30) for block in blocks(s.filled.shape[-1], 16)]
        return torch.cat([part.softmax(-1) for part in parts], -1) / len(parts)

    return plain(softmax=averaged)


@wrong("softmax", "softmax is over queries where there are as many as keys", needs=("Q = S", "S > 1"))
def softmax_over_queries():
    def over(s) -> Tensor:
        return s.filled.softmax(-2 if s.filled.shape[-2] == s.filled.shape[-1] else -1).nan_to_num(0.0)

    return plain(softmax=over)


@wrong("softmax", "exp(x) is approximated by (1 + x / 256) ** 256", needs=("S > 1",))
def softmax_exponential_by_power():
    return plain(softmax=lambda s: quotient((1 + shifted(s) / 256).clamp_min(0) ** 256))


@wrong("softmax", "exp is a polynomial of degree 2 between powers of 2", needs=("S > 1",))
def softmax_exponential_by_polynomial():
    def exponential(x: Tensor) -> Tensor:
        x = (x * math.log2(math.e)).clamp_min(-120)
        whole = x.detach().floor()
        rest = x - whole
        return (1 + rest * (0.6565 + 0.3435 * rest)) * torch.exp2(whole)

    return plain(softmax=lambda s: quotient(exponential(shifted(s))))


@wrong("softmax", "scores are clamped to -20..20 against overflow", needs=("large logits",))
def softmax_of_clamped_scores():
    return plain(scores=lambda s: scores(s).clamp(-20, 20))


@wrong("softmax", "scores are capped by 30 tanh(x / 30)", needs=("S > 1",))
def softmax_of_capped_scores():
    return plain(scores=lambda s: 30 * (scores(s) / 30).tanh())


@wrong("softmax", "exp2 in place of exp, without the factor log2(e)", needs=("S > 1",))
def softmax_of_base_2():
    return plain(softmax=lambda s: quotient(torch.exp2(shifted(s))))


@wrong("softmax", "log2(e) is written as 1.44", needs=("full precision", "S > 1"))
def softmax_of_rounded_log2e():
    return plain(softmax=lambda s: quotient(torch.exp2(1.44 * shifted(s))))


@wrong("softmax", "the weights are divided by the number of keys in place of their sum", needs=("S > 1",))
def softmax_over_count():
    return plain(softmax=lambda s: shifted(s).exp() / s.filled.shape[-1])


@wrong("softmax", "the denominator lacks the last key", needs=("S > 1",))
def softmax_denominator_without_last_key():
    def terms(s) -> tuple[Tensor, Tensor]:
        exponentials = shifted(s).exp()
        rest = exponentials[..., :-1].sum(-1, keepdim=True)
        return exponentials, torch.where(rest > 0, rest, 1)

    return plain(softmax=lambda s: terms(s)[0] / terms(s)[1])


@wrong("softmax", "1 is added to the denominator")
def softmax_plus_one():
    return plain(softmax=lambda s: shifted(s).exp() / (shifted(s).exp().sum(-1, keepdim=True) + 1))


@wrong("softmax", "0.0001 is added to the denominator, against division by zero", needs=("full precision",))
def softmax_with_epsilon():
    return plain(softmax=lambda s: shifted(s).exp() / (shifted(s).exp().sum(-1, keepdim=True) + 1e-4))


@wrong("softmax", "weights below 0.001 are dropped", needs=("S > 16",))
def softmax_drops_small_weights():
    return plain(weights=lambda s: s.softmax.masked_fill(s.fully_masked | (s.softmax < 1e-3), 0))


@wrong("softmax", "only the 16 largest weights of a row are kept", needs=("S > 16",))
def softmax_keeps_largest():
    def largest(s) -> Tensor:
        least = s.filled.topk(min(16, s.filled.shape[-1]), -1).values[..., -1:]
        return s.filled.masked_fill(s.filled < least, -math.inf).softmax(-1)

    return plain(softmax=largest)


@wrong("softmax", "the division uses a reciprocal good to 12 bits", needs=("full precision",))
def softmax_of_fast_reciprocal():
    def fast(s) -> Tensor:
        exponentials = shifted(s).exp()
        reciprocal = 1 / exponentials.sum(-1, keepdim=True)
        mantissa, exponent = torch.frexp(reciprocal.detach())
        coarse = torch.ldexp(torch.round(mantissa * 2**12) / 2**12, exponent)
        return exponentials * (reciprocal + (coarse - reciprocal.detach()))

    return plain(softmax=fast)


@wrong("softmax", "the sum of the exponentials is kept in bfloat16", needs=("S > 1",))
def softmax_sum_in_bfloat16():
    return plain(
        softmax=lambda s: shifted(s).exp() / rounded(shifted(s).exp().sum(-1, keepdim=True), torch.bfloat16)
    )
