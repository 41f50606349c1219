"""Attention callables: their contract, the oracle, SDPA, Triton, and the registry of names."""

from headoff.attention.contract import AdaptedAttention, Attention, conform, gate_context
from headoff.attention.eager import eager
from headoff.attention.registry import (
    AUTO,
    attention_label,
    attention_names,
    register_attention,
    resolve_attention,
)
from headoff.attention.sdpa import sdpa

__all__ = [
    "AUTO",
    "AdaptedAttention",
    "Attention",
    "attention_label",
    "attention_names",
    "conform",
    "eager",
    "gate_context",
    "register_attention",
    "resolve_attention",
    "sdpa",
]
