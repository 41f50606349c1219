"""The methods by name: how cams are made of attention, and how cams make a map.

A method is written twice: `dense`, a plain reading on whole matrices, for one pair (`headoff.relevance.rules`), and
in parts for the engine, `decoder` and `encoder` on the cams that `rule` makes (`headoff.relevance.aggregation`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from headoff.errors import SettingError, did_you_mean
from headoff.relevance import aggregation, rules
from headoff.relevance.attention_vjp import CamRule
from headoff.relevance.rules import DenseRelevance


@dataclass(frozen=True)
class Method:
    """One way from attention to a map.

    Attributes:
        name, summary: for people.
        rule: how a cam is made of one attention.
        decoder: `DecoderCams` to `Rows`.
        encoder: (`Rows`, `EncoderCams`, tokens) to `Rows`; None where the encoder has no part in it, which makes a
            method much cheaper.
        dense: `Evidence` to `DenseRelevance`, the oracle.
        takes_zero_rows: whether all three take `zero_rows`.
    """

    name: str
    summary: str
    rule: CamRule
    decoder: Callable[..., aggregation.Rows]
    encoder: Callable[..., aggregation.Rows] | None
    dense: Callable[..., DenseRelevance]
    takes_zero_rows: bool = False

    @property
    def needs_gradient(self) -> bool:
        """Whether a map depends on the target's value, or on its query only."""
        return self.rule != "attention"

    def options(self, zero_rows: rules.ZeroRows) -> dict[str, Any]:
        """Keywords for `decoder`, `encoder` and `dense`."""
        return {"zero_rows": zero_rows} if self.takes_zero_rows else {}


_methods: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Let `resolve_method` find it by its name; a name that is taken is given to the new one."""
    _methods[method.name] = method
    return method


def method_names() -> tuple[str, ...]:
    """The registered names, the default first."""
    return tuple(_methods)


def resolve_method(method: Method | str) -> Method:
    """The method of that name. Raises SettingError, with the nearest name, where there is none."""
    if isinstance(method, Method):
        return method
    if method in _methods:
        return _methods[method]
    raise SettingError(
        f"there is no relevance method {method!r}{did_you_mean(method, _methods)}: use one of "
        f"{', '.join(_methods)}"
    )


register_method(
    Method(
        "chefer",
        "equations 5 to 11: gradient-weighted attention, aggregated over all layers and normalised",
        "gradient",
        aggregation.chefer_decoder,
        aggregation.chefer_encoder,
        rules.chefer,
        takes_zero_rows=True,
    )
)
register_method(
    Method(
        "chefer_no_normalisation",
        "without equations 8 and 9 (ablation)",
        "gradient",
        partial(aggregation.chefer_decoder, normalised=False),
        partial(aggregation.chefer_encoder, normalised=False),
        partial(rules.chefer, normalised=False),
    )
)
register_method(
    Method(
        "chefer_no_self_attention",
        "without self-attention in equation 10: cross-attention cams only, mixed between queries (ablation)",
        "gradient",
        partial(aggregation.chefer_decoder, self_in_rule_10=False),
        None,
        partial(rules.chefer, self_in_rule_10=False),
    )
)
register_method(
    Method(
        "chefer_no_aggregation",
        "every layer's update overwrites what it would be added to (ablation)",
        "gradient",
        aggregation.no_aggregation_decoder,
        aggregation.no_aggregation_encoder,
        rules.no_aggregation,
    )
)
register_method(
    Method(
        "chefer_centred",
        "as chefer, with the gradient of the scores before softmax in equation 5: no relevance for attention that "
        "cannot matter",
        "centred",
        aggregation.chefer_decoder,
        aggregation.chefer_encoder,
        partial(rules.chefer, cam=rules.centred_cam),
        takes_zero_rows=True,
    )
)
register_method(
    Method(
        "raw",
        "cross-attention weights of each decoder layer, mean over heads",
        "attention",
        aggregation.cross_only,
        None,
        rules.raw,
    )
)
register_method(
    Method(
        "rollout",
        "attention rollout of encoder and decoder around the cross-attention of each decoder layer",
        "attention",
        partial(aggregation.no_aggregation_decoder, residual=True),
        partial(aggregation.no_aggregation_encoder, residual=True),
        rules.rollout,
    )
)
register_method(
    Method(
        "attention_gradcam",
        "Grad-CAM of each decoder layer's cross-attention: heads weighted by their mean gradient",
        "gradcam",
        aggregation.cross_only,
        None,
        rules.attention_gradcam,
    )
)
