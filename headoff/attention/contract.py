"""What an attention callable is, and how one that keeps only part of the contract is made to keep all of it.

The contract, in one line::

    attention(query, key, value, attn_mask=None, *, head_gate=None) -> context

============  ==========================  ==================================================================
argument      shape                       meaning
============  ==========================  ==================================================================
query         (B, H, Q, D)                any float dtype, any strides (a batch expanded with stride 0, too)
key, value    (B, H, S, D)                of the dtype and on the device of `query`
attn_mask     broadcasts to (B, H, Q, S)  as in `torch.nn.functional.scaled_dot_product_attention`: bool
                                          (True = attend), or of the dtype of `query` and added to the scores;
                                          2 to 4 dimensions
head_gate     broadcasts to (B, H, Q, 1)  multiplies the weights after softmax: 1 = on, 0 = off, fractions
                                          are legal; of 4 dimensions, of the dtype and on the device of
                                          `query`
context       (B, H, Q, D)                (softmax(query key^T / sqrt(D) + attn_mask) * head_gate) @ value,
                                          of the dtype of `query`
============  ==========================  ==================================================================

The caller converts `head_gate` to that form, so that `weights * head_gate` is all that a callable has to do with
it: the model does, and so does everything in this package that calls an attention.

Inputs are never modified. A row whose keys are all masked (False, or -inf) has a zero context row and zero
gradients, never NaN. Nothing else is asked for, no attention weights in particular: relevance needs query,
key, value, gate and the gradient of the context, and those are at hand with every fused kernel.

A gate is one number for each batch item, head and query, and does not depend on the key. So it may as well be
applied to the context: `(weights * gate) @ value == (weights @ value) * gate`. That is how a kernel that
knows nothing of gates is gated from outside; `conform` sees to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from headoff.errors import AttentionError

SIGNATURE = "(query, key, value, attn_mask=None, *, head_gate=None)"

MASK_NAMES = ("attn_mask", "mask")
"""The names by which a parameter is known for the mask wherever it stands in a signature."""


class Attention(Protocol):
    """The type of an attention callable; the module's docstring says what it takes and returns."""

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
    """`context` (B, H, Q, D) times `head_gate` (broadcasts to (B, H, Q, 1)), in its own dtype."""
    if head_gate is None:
        return context
    return context * head_gate.to(context)


@dataclass(frozen=True)
class AdaptedAttention:
    """An `Attention` made of a callable that takes its mask elsewhere, or knows nothing of gates.

    `mask_keyword` names the parameter to pass the mask by; None passes it in fourth place. `takes_gate`
    says that `call` applies `head_gate` by itself; without it the gate is applied to the context `call`
    returns.
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
        """As the contract says; `AttentionError` for a context that is no tensor, or misshapen."""
        mask = (attn_mask,) if self.mask_keyword is None else ()
        keywords = {} if self.mask_keyword is None else {self.mask_keyword: attn_mask}
        if self.takes_gate:
            keywords["head_gate"] = head_gate
        context = self.call(query, key, value, *mask, **keywords)
        self._check(context, query)
        return context if self.takes_gate else gate_context(context, head_gate)

    def _check(self, context: Any, query: Tensor) -> None:
        # Before the gate is applied, because a context in (B, Q, H, D) order may well broadcast against the
        # gate and come out plausible and wrong.
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
    """`call` as an `Attention`: itself where it keeps the contract, adapted where that can be done.

    Without a `head_gate` among its parameters (or `**kwargs`), `call` is taken for a plain callable
    shaped like torch's SDPA, and so is one without a signature that Python can inspect (torch's SDPA itself):
    its context is gated for it. The mask may be called `attn_mask` or `mask` and stand anywhere, or be
    the fourth parameter under any name, unless that one's default says that it is something else
    (`dropout_p=0.0`).
    Raises `AttentionError`, which names `label`, where (query, key, value, attn_mask) cannot be
    passed.
    """
    if isinstance(call, type):
        raise AttentionError(f"{label} is a class: pass an instance of it, or a function of {SIGNATURE}.")
    if not callable(call):
        raise AttentionError(f"{label} cannot be called: an attention is a function that takes {SIGNATURE}.")
    signature = _signature(call)
    if signature is None:
        return AdaptedAttention(call, label)
    mask_keyword = _mask_keyword(signature, label)
    takes_gate = _takes(signature, "head_gate")
    if takes_gate and mask_keyword is None and _takes(signature, "attn_mask"):
        return cast(Attention, call)
    return AdaptedAttention(call, label, mask_keyword, takes_gate)


def _signature(call: Any) -> inspect.Signature | None:
    """What `call` really takes, which may not be what Python first says; None where nobody can tell."""
    owner = getattr(call, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function) and call.__name__ == "apply":
        return _apply_signature(owner)
    # torch.compile hides the module it compiled behind (*args, **kwargs); so does the __call__ of any module.
    call = getattr(call, "_orig_mod", call)
    if isinstance(call, torch.nn.Module):
        call = call.forward
    try:
        return inspect.signature(call)
    except (ValueError, TypeError):
        return None


def _apply_signature(function: type[torch.autograd.Function]) -> inspect.Signature:
    """What the `apply` of an autograd function takes: what its `forward` does, and only by position."""
    parameters = list(inspect.signature(function.forward).parameters.values())
    if function.setup_context is torch.autograd.Function.setup_context:
        parameters = parameters[1:]  # ctx
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature(
        [
            parameter
            if parameter.kind is parameter.VAR_POSITIONAL
            else parameter.replace(kind=inspect.Parameter.POSITIONAL_ONLY)
            for parameter in parameters
            if parameter.kind not in by_name
        ]
    )


def _takes(signature: inspect.Signature, keyword: str) -> bool:
    """Whether `keyword=...` can be passed."""
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        return True
    return kinds.get(keyword) in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _mask_keyword(signature: inspect.Signature, label: str) -> str | None:
    """The keyword to pass the mask by, or None to pass it in fourth place; raises where neither will do."""
    keyword = None
    if not _fourth_is_mask(signature):
        named = [name for name in MASK_NAMES if name in signature.parameters and _takes(signature, name)]
        if not named and not _fourth_may_be_mask(signature) and _takes(signature, MASK_NAMES[0]):
            named = [MASK_NAMES[0]]
        if not named and not _fourth_may_be_mask(signature):
            raise AttentionError(
                f"{label} takes {_text(signature)}, with no place for the mask: give it a parameter "
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
            f"{label} takes {_text(signature)} and cannot be called as (query, key, value, attn_mask): "
            f"{error}; give the other parameters defaults, or pass a functools.partial."
        ) from None
    return keyword


def _by_position(signature: inspect.Signature) -> list[inspect.Parameter]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in signature.parameters.values() if parameter.kind in positional]


def _fourth_is_mask(signature: inspect.Signature) -> bool:
    by_position = _by_position(signature)
    return len(by_position) > 3 and by_position[3].name in MASK_NAMES


def _fourth_may_be_mask(signature: inspect.Signature) -> bool:
    by_position = _by_position(signature)
    if len(by_position) > 3:
        return by_position[3].default in (None, inspect.Parameter.empty)
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values())


def _text(signature: inspect.Signature) -> str:
    """The signature without its annotations, which would bury the names."""
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(bare))
