"""The contract of an attention callable, and adapting callables that meet only a part of it.

The contract, in one line::

    attention(query, key, value, attn_mask=None, *, head_gate=None) -> context

============  ==========================  ==================================================================
argument      shape                       meaning
============  ==========================  ==================================================================
query         (B, H, Q, D)                any float dtype, any strides, also 0 (an expanded batch)
key, value    (B, H, S, D)                in the dtype and on the device of `query`
attn_mask     broadcasts to (B, H, Q, S)  as in `torch.nn.functional.scaled_dot_product_attention`: bool
                                          (True = attend), or in the dtype of `query` and added to the scores;
                                          2 to 4 dimensions
head_gate     broadcasts to (B, H, Q, 1)  multiplies the weights after softmax: 1 = on, 0 = off, fractions
                                          are legal; of 4 dimensions, in the dtype and on the device of
                                          `query`
context       (B, H, Q, D)                (softmax(query key^T / sqrt(D) + attn_mask) * head_gate) @ value,
                                          in the dtype of `query`
============  ==========================  ==================================================================

Every caller converts `head_gate` to that dtype and shape, so `weights * head_gate` is all that a callable has to do.

Inputs are never modified. A row whose keys are all masked (False, or -inf) has a zero context row and zero
gradients, never NaN. A callable need not return attention weights: relevance is computed from query, key,
value, gate and the gradient of the context, which are available with every fused kernel.

A gate is one number for each batch item, head and query, and does not depend on the key. So it can also be applied
to the context: `(weights * gate) @ value == (weights @ value) * gate`. `conform` does that for a callable without a
`head_gate` parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor

from headoff.errors import AttentionError
from headoff.signatures import signature_of, takes_keyword, without_annotations

SIGNATURE = "(query, key, value, attn_mask=None, *, head_gate=None)"

MASK_NAMES = ("attn_mask", "mask")
"""Names that mark a parameter as the mask, at any place in a signature."""


class Attention(Protocol):
    """The type of an attention callable; see the docstring of this module."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor: ...


def gate_context(context: Tensor, head_gate: Tensor | None) -> Tensor:
    """`context` (B, H, Q, D) times `head_gate` (broadcastable to (B, H, Q, 1)), in the dtype of `context`."""
    if head_gate is None:
        return context
    return context * head_gate.to(context)


@dataclass(frozen=True)
class AdaptedAttention:
    """An `Attention` made from a callable with another mask parameter, or without a gate.

    Attributes:
        call: the callable.
        label: its name in messages and reports.
        mask_keyword: name of the mask parameter; None passes the mask as the fourth positional argument.
        takes_gate: whether `call` has a parameter `head_gate`. If not, its context is gated here.
    """

    call: Callable[..., Tensor]
    label: str
    mask_keyword: str | None = None
    takes_gate: bool = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        """Compute the context, see `headoff.attention.contract`.

        Raises:
            AttentionError: the callable returned no tensor, or one of another shape than the query.
        """
        mask = (attn_mask,) if self.mask_keyword is None else ()
        keywords = {} if self.mask_keyword is None else {self.mask_keyword: attn_mask}
        if self.takes_gate:
            keywords["head_gate"] = head_gate
        context = self.call(query, key, value, *mask, **keywords)
        self._check(context, query)
        return context if self.takes_gate else gate_context(context, head_gate)

    def _check(self, context: Any, query: Tensor) -> None:
        # Before the gate is applied: a context in (B, Q, H, D) order may broadcast against the gate, and give a
        # plausible but wrong result.
        if not isinstance(context, Tensor):
            raise AttentionError(
                f"{self.label} returned a {type(context).__name__}: it must return its context, one tensor "
                f"of shape (batch, heads, queries, channels)."
            )
        if context.shape != query.shape:
            raise AttentionError(
                f"{self.label} returned a context of shape {tuple(context.shape)} for a query of shape "
                f"{tuple(query.shape)}: it must keep the order (batch, heads, queries, channels)."
            )


def conform(call: Any, label: str) -> Attention:
    """`call` as an `Attention`: unchanged where it meets the contract, otherwise adapted.

    A callable that takes neither `head_gate` nor `**kwargs`, or whose signature Python cannot inspect (torch's SDPA),
    has its context gated by the caller. The mask parameter is the one named `attn_mask` or `mask`, or else the
    fourth, unless its default shows that it is something else (`dropout_p=0.0`).

    Args:
        call: what was given as an attention.
        label: its name, for messages.

    Raises:
        AttentionError: `call` is not callable, or (query, key, value, attn_mask) cannot be passed to it.
    """
    if isinstance(call, type):
        raise AttentionError(f"{label} is a class: pass an instance of it, or a function of {SIGNATURE}.")
    if not callable(call):
        raise AttentionError(f"{label} cannot be called: an attention is a function that takes {SIGNATURE}.")
    signature = signature_of(call)
    if signature is None:
        return AdaptedAttention(call, label)
    mask_keyword = _mask_keyword(signature, label)
    takes_gate = takes_keyword(signature, "head_gate")
    if takes_gate and mask_keyword is None and takes_keyword(signature, "attn_mask"):
        return cast(Attention, call)
    return AdaptedAttention(call, label, mask_keyword, takes_gate)


def _mask_keyword(signature: inspect.Signature, label: str) -> str | None:
    """The keyword to pass the mask by, or None to pass it as the fourth argument; raises if neither is possible."""
    keyword = None
    if not _fourth_is_mask(signature):
        named = [
            name for name in MASK_NAMES if name in signature.parameters and takes_keyword(signature, name)
        ]
        if not named and not _fourth_may_be_mask(signature) and takes_keyword(signature, MASK_NAMES[0]):
            named = [MASK_NAMES[0]]
        if not named and not _fourth_may_be_mask(signature):
            raise AttentionError(
                f"{label} takes {without_annotations(signature)}, with no place for the mask: give it a parameter "
                f"attn_mask=None."
            )
        keyword = named[0] if named else None
    try:
        if keyword is None:
            signature.bind(*"qkvm")
        else:
            signature.bind(*"qkv", **{keyword: "m"})
    except TypeError as error:
        raise AttentionError(
            f"{label} takes {without_annotations(signature)} and cannot be called as (query, key, value, attn_mask): "
            f"{error}; give the other parameters defaults, or pass a functools.partial."
        ) from None
    return keyword


def _positional_parameters(signature: inspect.Signature) -> list[inspect.Parameter]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in signature.parameters.values() if parameter.kind in positional]


def _fourth_is_mask(signature: inspect.Signature) -> bool:
    positional = _positional_parameters(signature)
    return len(positional) > 3 and positional[3].name in MASK_NAMES


def _fourth_may_be_mask(signature: inspect.Signature) -> bool:
    positional = _positional_parameters(signature)
    if len(positional) > 3:
        return positional[3].default in (None, inspect.Parameter.empty)
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values())
