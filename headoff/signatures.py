"""What parameters a user's callable takes: functions, modules, compiled modules, autograd functions."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def signature_of(call: Any) -> inspect.Signature | None:
    """The signature of the function that does the work behind wrappers; None if it cannot be inspected."""
    owner = getattr(call, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function) and call.__name__ == "apply":
        return _apply_signature(owner)
    # A compiled module, and the __call__ of any module, has the signature (*args, **kwargs).
    call = getattr(call, "_orig_mod", call)
    if isinstance(call, torch.nn.Module):
        call = call.forward
    try:
        return inspect.signature(call)
    except (ValueError, TypeError):
        return None


def _apply_signature(function: type[torch.autograd.Function]) -> inspect.Signature:
    """The signature of the `apply` of an autograd function: that of its `forward`, positional only."""
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


def takes_keyword(signature: inspect.Signature, keyword: str) -> bool:
    """Whether the signature accepts `keyword=...`."""
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        return True
    return kinds.get(keyword) in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def without_annotations(signature: inspect.Signature) -> str:
    """The signature as text, without annotations, which would make it hard to read."""
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(bare))
