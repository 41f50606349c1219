"""Relevance methods by name.

A `CamMethod` computes cams from attention, and maps from cams. It has two implementations: `dense`, with whole
matrices and for one pair (`headoff.relevance.rules`), which is the oracle; and `rule`, `decoder` and `encoder` for the
engines. An `EngineMethod` computes maps in another way, by an engine of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

from headoff.choices import BEST_METHOD
from headoff.detector import Detector
from headoff.errors import SettingError, did_you_mean
from headoff.relevance import aggregation, rules
from headoff.relevance.attention_vjp import CamRule
from headoff.relevance.rules import DenseRelevance


@dataclass(frozen=True)
class Method:
    """A method that computes relevance maps.

    Attributes:
        name, summary: for people.
    """

    name: str
    summary: str

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but name and summary, as JSON types: equal for methods that compute the same.

        A function is named by its place, so that two functions made in one place (closures) look the same.
        """
        own = (field.name for field in fields(self) if field.name not in ("name", "summary"))
        return {name: _plain(getattr(self, name)) for name in own}

    def suits(self, detector: Detector) -> bool:
        """Whether the method knows detectors of this kind."""
        return True


@dataclass(frozen=True)
class CamMethod(Method):
    """A method that computes maps from attention.

    Attributes:
        rule: how the cam of one attention call is computed.
        decoder: `DecoderCams` to `Rows`.
        encoder: (`Rows`, `EncoderCams`, tokens) to `Rows`; None if the encoder plays no part, which makes the
            method much faster.
        dense: `Evidence` to `DenseRelevance`, the oracle.
        takes_zero_rows: whether these three functions take `zero_rows`.
    """

    rule: CamRule
    decoder: Callable[..., aggregation.Rows]
    encoder: Callable[..., aggregation.Rows] | None
    dense: Callable[..., DenseRelevance]
    takes_zero_rows: bool = False

    @property
    def needs_gradient(self) -> bool:
        """Whether maps depend on the gradient of the target, and not only on its query."""
        return self.rule != "attention"

    def options(self, zero_rows: rules.ZeroRows) -> dict[str, Any]:
        """Keyword arguments for `decoder`, `encoder` and `dense`."""
        return {"zero_rows": zero_rows} if self.takes_zero_rows else {}


@dataclass(frozen=True)
class EngineMethod(Method):
    """A method with an engine of its own.

    Attributes:
        engine: called as `engine(detector, features, method=..., picture=..., memory_budget=...)`, with the features of
            one image (`Detector.features`), the image (`PIL.Image`, or None where it is not known) and a limit in bytes
            (or None). Returns an object whose `run` is that of `RelevanceEngine`.
        signed: whether relevance can be negative: evidence against the target.
        takes: names of `RelevanceEngine`'s other options that the engine takes as well.
    """

    engine: Callable[..., Any]
    signed: bool = False
    takes: tuple[str, ...] = ()


def _plain(value: Any) -> Any:
    """A setting of a method as JSON types, the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    return [_plain(type(value)), _plain(getattr(value, "__dict__", {}))]


_methods: dict[str, Method] = {}
_AnyMethod = TypeVar("_AnyMethod", bound=Method)


def register_method(method: _AnyMethod) -> _AnyMethod:
    """Register a method under its name, for `resolve_method`; it replaces an earlier method of that name."""
    _methods[method.name] = method
    return method


def method_names(detector: Detector | None = None) -> tuple[str, ...]:
    """The registered names, the default first; with a detector, of the methods that suit it."""
    return tuple(name for name, method in _methods.items() if detector is None or method.suits(detector))


def cam_method_names() -> tuple[str, ...]:
    """The registered names of instances of `CamMethod`."""
    return tuple(name for name, method in _methods.items() if isinstance(method, CamMethod))


def resolve_cam_method(method: Method | str) -> CamMethod:
    """The method of that name.

    Raises:
        SettingError: there is no such method, or it computes no cams.
    """
    found = resolve_method(method)
    if not isinstance(found, CamMethod):
        raise SettingError(
            f"the relevance method {found.name!r} computes no cams of attention: use one of "
            f"{', '.join(cam_method_names())}"
        )
    return found


def resolve_method(method: Method | str) -> Method:
    """The method of that name; `best` is `headoff.choices.BEST_METHOD`.

    Raises:
        SettingError: there is no such method.
    """
    if isinstance(method, Method):
        return method
    if method == "best":
        return _methods[BEST_METHOD]
    if method in _methods:
        return _methods[method]
    raise SettingError(
        f"there is no relevance method {method!r}{did_you_mean(method, _methods)}: use one of "
        f"{', '.join(_methods)}, best"
    )


register_method(
    CamMethod(
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
    CamMethod(
        "chefer_no_normalisation",
        "without equations 8 and 9 (ablation)",
        "gradient",
        partial(aggregation.chefer_decoder, normalised=False),
        partial(aggregation.chefer_encoder, normalised=False),
        partial(rules.chefer, normalised=False),
    )
)
register_method(
    CamMethod(
        "chefer_no_self_attention",
        "without self-attention in equation 10: cross-attention cams only, mixed between queries (ablation)",
        "gradient",
        partial(aggregation.chefer_decoder, self_in_rule_10=False),
        None,
        partial(rules.chefer, self_in_rule_10=False),
    )
)
register_method(
    CamMethod(
        "chefer_no_aggregation",
        "every layer's update replaces the relevance instead of being added to it (ablation)",
        "gradient",
        aggregation.no_aggregation_decoder,
        aggregation.no_aggregation_encoder,
        rules.no_aggregation,
    )
)
register_method(
    CamMethod(
        "chefer_centred",
        "as chefer, with the gradient of the scores before softmax in equation 5: attention that has no effect gets no "
        "relevance",
        "centred",
        aggregation.chefer_decoder,
        aggregation.chefer_encoder,
        partial(rules.chefer, cam=rules.centred_cam),
        takes_zero_rows=True,
    )
)
register_method(
    CamMethod(
        "raw",
        "cross-attention weights of each decoder layer, mean over heads",
        "attention",
        aggregation.cross_only,
        None,
        rules.raw,
    )
)
register_method(
    CamMethod(
        "rollout",
        "attention rollout of encoder and decoder around the cross-attention of each decoder layer",
        "attention",
        partial(aggregation.no_aggregation_decoder, residual=True),
        partial(aggregation.no_aggregation_encoder, residual=True),
        rules.rollout,
    )
)
register_method(
    CamMethod(
        "attention_gradcam",
        "Grad-CAM of each decoder layer's cross-attention: heads weighted by their mean gradient",
        "gradcam",
        aggregation.cross_only,
        None,
        rules.attention_gradcam,
    )
)
