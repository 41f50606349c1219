"""`FamilyDetector`: a detector of transformers whose heads can be gated.

transformers' own `forward` computes everything. An image is encoded by stopping it where it calls its decoder, whose
arguments are the memory. All configurations are decoded in one call of that decoder: their queries are concatenated
along the query axis, where only self-attention lets them see each other, and there every configuration is a batch item.
So the memory is not copied, and its values are projected once. Until the first gate acts, all configurations have the
same rows, and modules compute those of one.

Shapes: B images, G configurations, Q object queries, N memory tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from headoff.attention import Attention
from headoff.choices import SITES, Site
from headoff.deformable import Shapes
from headoff.detector import (
    AttentionAddress,
    AttentionCall,
    DeformableCall,
    Detector,
    DetectorOutput,
    GatesSpec,
    check_pixels,
)
from headoff.devices import autocast
from headoff.family.adapter import Adapter, find_adapter
from headoff.family.attention import INTERFACE, Place, intercept, register_interface
from headoff.family.levels import on_finest_grid, on_level
from headoff.gates import Gates, HeadLayout, read_configurations, stack
from headoff.images import Preprocessing
from headoff.scoring import Scoring


@dataclass(frozen=True, eq=False)
class FamilyMemory:
    """Encoder output of B images.

    Attributes:
        arguments: what transformers' model gives to its decoder.
        images: B.
        is_padded: whether an image is padded.
        values: tokens, the autocast dtype, and what each deformable cross-attention projects these tokens to under it;
            see `FamilyDetector.prepare`.
    """

    arguments: Mapping[str, Any]
    images: int
    is_padded: bool
    values: tuple[Tensor, torch.dtype | None, Mapping[nn.Module, Tensor]] | None = None

    def __len__(self) -> int:
        return self.images

    def clone(self) -> Self:
        return replace(self, arguments=_clone(self.arguments), values=None)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same on a device, floating point numbers in `dtype`."""
        return replace(self, arguments=_to(self.arguments, device, dtype), values=None)


@dataclass(frozen=True, eq=False)
class FamilyFeatures:
    """Backbone features of B images.

    Attributes:
        pixel_values: (B, 3, H, W).
        pixel_mask: (B, H, W) int64, 1 = image; None where nothing is padded.
        backbone: the output of transformers' backbone module.
        shapes: (h, w) of each level of the memory.
        memory: the memory with all heads on, and the attention callables that computed it.
    """

    pixel_values: Tensor
    pixel_mask: Tensor | None
    backbone: Any
    shapes: Shapes
    memory: tuple[FamilyMemory, tuple[Any, Any]]

    def __len__(self) -> int:
        return len(self.pixel_values)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the finest level."""
        return self.shapes[0]

    def to_grid(self, x: Tensor) -> Tensor:
        return on_finest_grid(x, self.shapes)

    @property
    def feature_maps(self) -> list[tuple[Tensor, Tensor]]:
        """The feature maps of the backbone's output (B, channels, h, w), with their masks (B, h, w), True = image."""
        leaves, places = self._feature_maps()
        return [(leaves[place], leaves[place + 1].bool()) for place in places]

    def with_feature_maps(self, maps: Sequence[Tensor]) -> Self:
        """The same with other feature maps (S, channels, h, w) of one image, from which the encoder runs again."""
        leaves, places = self._feature_maps()
        _, structure = pytree.tree_flatten(self.backbone)
        images = len(maps[0])
        leaves = [x.expand(images, *x.shape[1:]) for x in leaves]
        for place, feature_map in zip(places, maps, strict=True):
            leaves[place] = feature_map
        mask = self.pixel_mask
        return replace(
            self,
            pixel_values=self.pixel_values.expand(images, -1, -1, -1),
            pixel_mask=None if mask is None else mask.expand(images, -1, -1),
            backbone=pytree.tree_unflatten(leaves, structure),
            memory=(self.memory[0], (None, None)),
        )

    def _feature_maps(self) -> tuple[list[Any], list[int]]:
        """The tensors of the backbone's output, and the indices of its feature maps, which are before their masks."""
        leaves, _ = pytree.tree_flatten(self.backbone)
        return leaves, [
            index
            for index in range(len(leaves) - 1)
            if leaves[index].ndim == 4 and leaves[index + 1].ndim == 3
        ]

    def filled(self, kept: Tensor, fill: Literal["zero", "mean"]) -> Self:
        """P copies of one image, in which cells of the backbone's maps are replaced by zeros or by the map's mean.

        Args:
            kept: (P, h, w) bool, the cells of the finest level that are not. A coarser cell is replaced in proportion
                to its area.
            fill: by what.
        """

        def change(x: Tensor) -> Tensor:
            if x.ndim != 4:  # a mask
                return x
            share = on_level(kept.to(x), (x.shape[-2], x.shape[-1]))[:, None]
            other = x.mean((-2, -1), keepdim=True) if fill == "mean" else 0.0
            return x * share + other * (1 - share)

        # Maps, with or without masks, and for some models, in a tuple, positions or masks.
        maps, *rest = self.backbone if isinstance(self.backbone, tuple) else (self.backbone,)
        maps = pytree.tree_map_only(Tensor, change, maps)
        backbone = (maps, *rest) if isinstance(self.backbone, tuple) else maps
        return replace(
            self,
            pixel_values=self.pixel_values.expand(len(kept), -1, -1, -1),
            backbone=pytree.tree_map_only(Tensor, lambda x: x.expand(len(kept), *x.shape[1:]), backbone),
            memory=(self.memory[0], (None, None)),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same on a device, floating point numbers in `dtype`; the encoder runs again where it is asked to."""
        memory, _ = self.memory
        return replace(
            self,
            pixel_values=self.pixel_values.to(device, dtype),
            pixel_mask=_to(self.pixel_mask, device, dtype),
            backbone=_to(self.backbone, device, dtype),
            memory=(memory.to(device, dtype), (None, None)),
        )

    def clone(self) -> Self:
        memory, made_by = self.memory
        return replace(
            self,
            pixel_values=self.pixel_values.clone(),
            pixel_mask=_clone(self.pixel_mask),
            backbone=_clone(self.backbone),
            memory=(memory.clone(), made_by),
        )


@dataclass(frozen=True, eq=False)
class FamilyPlan:
    """The decoder's runs under C configurations, on the detector's device.

    Attributes:
        runs: G.
        gates: (G, layers, Q or 1, H) for each decoder site, or None where everything is on.
        member: (C,) int64, the run of each configuration; None if configuration c is run c.
        first: where the first gate acts, as `_order` has it; None if runs share nothing.
    """

    runs: int
    gates: Mapping[Site, Tensor | None]
    member: Tensor | None = None
    first: tuple[int, int] | None = None


@dataclass
class _Pass:
    """A pass through encoder or decoder, of which the modules within need to know.

    Attributes:
        gates: (G, layers, rows or 1, H) for each site, or None where everything is on.
        runs: G.
        is_padded: whether an image is padded.
        backbone: its output; None until it has run.
        stops: whether the pass ends where the decoder is called.
        rows: Q.
        first: see `FamilyPlan`; None from then on.
        tokens: of the memory.
        values: of `tokens`, by the modules that project them, as far as they are known.
    """

    gates: Mapping[Site, Tensor | None]
    runs: int
    is_padded: bool
    backbone: Any = None
    stops: bool = False
    rows: int = 0
    first: tuple[int, int] | None = None
    tokens: Tensor | None = None
    values: Mapping[nn.Module, Tensor] = field(default_factory=dict)


TOKENS = "encoder_hidden_states"
"""What transformers' decoders call the memory's tokens."""
ROWS = 1024
"""Rows of queries that the CPU computes at a time in modules of several layers."""

_OUTSIDE = _Pass({}, 1, False)
_pass: ContextVar[_Pass] = ContextVar("pass", default=_OUTSIDE)
"""The pass that this thread computes. Modules are those of all threads, and so have none of it."""


def _order(address: AttentionAddress) -> tuple[int, int]:
    """Attention calls of a decoder are in the order of these."""
    return address.layer, ("decoder_self", "decoder_cross").index(address.site)


def _made_again(
    model_type: str,
    config: Any,
    tensors: Mapping[str, Tensor],
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    kept: Mapping[str, Any],
) -> FamilyDetector:
    """See `FamilyDetector.__reduce__`."""
    import transformers

    adapter = find_adapter(model_type)
    config._attn_implementation = "eager"  # headoff's is not registered in every process
    model = getattr(transformers, adapter.class_name)(config)
    model.to(kept["device"], kept["dtype"])
    model.load_state_dict(tensors, assign=True)
    detector = FamilyDetector(model, adapter, class_names, preprocessing, attention=kept["attention"])
    detector.deformable_attention = kept["deformable_attention"]
    detector.assumptions = kept["assumptions"]
    detector.train(kept["training"]).requires_grad_(kept["requires_grad"])
    return detector


class FamilyDetector(Detector):
    """A detector of transformers.

    Args:
        model: the model for object detection, in evaluation mode. Its attention modules are changed, so that headoff
            computes their attention.
        adapter: what headoff knows of its type.
        class_names: one per class.
        preprocessing: how images become pixels.
        attention: see `Detector`.

    Raises:
        CheckpointError: the class names do not fit, or a module is not written as headoff knows it.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        attention: Attention | str = "sdpa",
    ) -> None:
        config = model.config
        super().__init__(class_names, config.num_labels, attention)
        self.adapter = adapter
        self.encoder_is_attention = adapter.encoder_is_attention
        self.model = model
        self._preprocessing = preprocessing
        modules: dict[Site, Sequence[nn.Module]] = {
            "encoder_self": adapter.encoder_attention(model),
            "decoder_self": adapter.decoder_self(model),
            "decoder_cross": adapter.decoder_cross(model),
        }
        heads = {site: _heads(modules[site][0]) if modules[site] else None for site in SITES}
        self._layout = HeadLayout(
            encoder_layers=len(modules["encoder_self"]),
            decoder_layers=len(modules["decoder_cross"]),
            heads=heads["decoder_cross"] or 0,
            queries=adapter.queries(config),
            encoder_heads=heads["encoder_self"],
            self_heads=heads["decoder_self"],
        )
        # Whether cross-attention is to all memory tokens, and not to sampling points.
        self._is_dense = not hasattr(modules["decoder_cross"][0], "sampling_offsets")
        addresses: dict[nn.Module, AttentionAddress] = {}
        for site in SITES:
            for layer, module in enumerate(modules[site]):
                address = addresses[module] = AttentionAddress(site, layer)
                intercept(module, Place(self, address))
        for module in _by_row(model.model.decoder, addresses):
            forward = module.forward
            if module not in addresses and any(module.children()):
                forward = partial(_in_parts, forward)
            module.forward = partial(self._once, forward, addresses.get(module))
        self._projections = [
            module.get_submodule("value_proj")
            for module in modules["decoder_cross"]
            if hasattr(module, "value_proj")
        ]
        for module in self._projections:
            module.forward = partial(_known_value, module, module.forward)
        for module in adapter.unread(model):
            module.forward = partial(_unread, module, module.forward)
        model.model.backbone.forward = partial(_known_backbone, model.model.backbone.forward)
        model.model.decoder.register_forward_pre_hook(_stop, with_kwargs=True)
        register_interface()
        config._attn_implementation = INTERFACE

    def __reduce__(self) -> tuple[Any, ...]:
        """The detector is made again from its weights: what it changed in the model's modules belongs to a process."""
        config = copy.deepcopy(self.model.config)
        arguments = (
            self.adapter.model_type,
            config,
            self.model.state_dict(),
            self.class_names,
            self.preprocessing,
        )
        kept = {
            "attention": self.attention,
            "deformable_attention": self.deformable_attention,
            "assumptions": self.assumptions,
            "device": self.device,
            "dtype": self.dtype,
            "training": self.training,
            "requires_grad": any(one.requires_grad for one in self.parameters()),
        }
        return _made_again, (*arguments, kept)

    @property
    def head_layout(self) -> HeadLayout:
        return self._layout

    @property
    def preprocessing(self) -> Preprocessing:
        return self._preprocessing

    @property
    def scoring(self) -> Scoring:
        return self.adapter.scoring(self.model.config)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def stride(self, features: FamilyFeatures) -> int:
        """Pixels of the resized image per cell of the finest level, along one side."""
        side, cells = features.pixel_values.shape[-2], features.grid[0]
        # A backbone rounds up. All strides that do not divide the side are powers of 2.
        return side // cells if side % cells == 0 else 2 ** round(torch.tensor(side / cells).log2().item())

    def decoder_bytes(self, features: FamilyFeatures) -> int:
        """Bytes of the decoder's activations for one configuration, as if attention weights were stored."""
        config = self.model.config
        layout = self._layout
        width = getattr(config, "d_model", None) or config.hidden_size
        hidden = getattr(config, "decoder_ffn_dim", 4 * width)
        tokens = sum(height * width for height, width in features.shapes)
        if self._is_dense:
            seen = layout.heads * tokens  # a weight for each
        else:
            # Of the four corners of a sampling point an embedding bag has indices and weights, and others the values.
            bag = features.pixel_values.device.type == "cpu"
            seen = 16 * len(features.shapes) * (4 * layout.heads if bag else width)
        numbers = hidden + 12 * width + layout.heads_at("decoder_self") * layout.queries + seen
        return len(features) * layout.queries * numbers * features.pixel_values.element_size()

    def features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> FamilyFeatures:
        check_pixels(pixel_values, pixel_mask)
        pixel_values = pixel_values.to(self.device, self.dtype)
        padded = pixel_mask is not None and not bool(pixel_mask.all())
        mask = pixel_mask.to(self.device, torch.int64) if padded and pixel_mask is not None else None
        memory, backbone = self._encode(pixel_values, mask)
        shapes = self.adapter.shapes(backbone, memory.arguments)
        made_by = self.attention, self.deformable_attention
        return FamilyFeatures(pixel_values, mask, backbone, shapes, (memory, made_by))

    def encode_features(self, features: FamilyFeatures, gate: Tensor | None = None) -> FamilyMemory:
        memory, made_by = features.memory
        if gate is not None:
            tokens = gate.shape[1]
            self.check_gate("encoder_self", gate, tokens)
            gate = gate.to(self.device, self.dtype)
        elif not self.is_intercepted and made_by == (self.attention, self.deformable_attention):
            return memory
        memory, _ = self._encode(features.pixel_values, features.pixel_mask, gate, features.backbone)
        return memory

    def _encode(
        self, pixel_values: Tensor, mask: Tensor | None, gate: Tensor | None = None, backbone: Any = None
    ) -> tuple[FamilyMemory, Any]:
        """Run the model until it calls its decoder: the memory, and the backbone's output, which may be given.

        `gate` (encoder layers, N or 1, H).
        """
        gates: dict[Site, Tensor | None] = {"encoder_self": None if gate is None else gate[None]}
        here = _Pass(gates, 1, mask is not None, backbone, stops=True)
        arguments: Mapping[str, Any] | None = None
        with _during(here), autocast(self.device, self.autocast_dtype):
            try:
                self.model.model(pixel_values, pixel_mask=mask)
            except _Called as called:
                arguments = called.arguments
        assert arguments is not None, "the model did not call its decoder"
        # Some models make float32 queries, whatever their weights.
        arguments = _to(dict(arguments), self.device, self.dtype)
        return FamilyMemory(arguments, len(pixel_values), mask is not None), here.backbone

    def prepare(self, memory: FamilyMemory) -> FamilyMemory:
        tokens = memory.arguments[TOKENS]
        with autocast(self.device, self.autocast_dtype):
            values = {module: module(tokens) for module in self._projections}
        return replace(memory, values=(tokens, self.autocast_dtype, values))

    def decode(self, memory: FamilyMemory, gates: GatesSpec | FamilyPlan | None = None) -> DetectorOutput:
        if gates is not None and not isinstance(gates, Gates | FamilyPlan):
            gates = stack(read_configurations(gates), self.head_layout)
        plan = self.plan(gates) if isinstance(gates, Gates) else gates or FamilyPlan(1, {})
        arguments = dict(memory.arguments)
        rows = arguments[self.adapter.per_query[0]].shape[1]
        sizes = {
            x.shape[1] for name, x in arguments.items() if _has_rows(x) and name not in self.adapter.per_query
        }
        # Interceptors and replacements get calls with the rows of all runs; and rows must be known by their number.
        known = self.is_intercepted or self.replacement is not None or sizes & {rows, plan.runs * rows}
        first = None if known else plan.first
        for name in self.adapter.per_query:
            arguments[name] = _repeated(arguments[name], plan.runs)
        here = _Pass(
            plan.gates, plan.runs, memory.is_padded, rows=rows, first=first, tokens=arguments[TOKENS]
        )
        if memory.values is not None:
            tokens, dtype, values = memory.values
            if tokens is here.tokens and dtype == self.autocast_dtype:
                here.values = values
        with _during(here), autocast(self.device, self.autocast_dtype):
            output = self.model.model.decoder(**arguments)
        logits, boxes = self.adapter.predict(self.model, arguments, output)
        logits, boxes = (x.unflatten(1, (plan.runs, -1)).transpose(0, 1) for x in (logits, boxes))
        if plan.member is not None:
            logits, boxes = logits.index_select(0, plan.member), boxes.index_select(0, plan.member)
        return DetectorOutput(logits, boxes)

    def plan(self, gates: Gates, *, share: bool = True) -> FamilyPlan:
        """See `Detector.plan`. Configurations whose gates are the same everywhere are one run."""
        self.check_decoder_gates(gates)
        sites: tuple[Site, ...] = ("decoder_self", "decoder_cross")
        given = [gate.flatten(1).cpu() for site in sites if (gate := gates.site(site)) is not None]
        member: Tensor | None = None
        if share and len(gates) > 1:
            rows = torch.cat(given, dim=1) if given else torch.zeros(len(gates), 1)
            distinct, member = torch.unique(rows, dim=0, return_inverse=True)
            if len(distinct) == len(gates):
                member = None
            else:
                first = [int((member == run).nonzero()[0]) for run in range(len(distinct))]
                gates = gates[first]
        acts = [
            _order(AttentionAddress(site, layer))
            for site in sites
            if (gate := gates.site(site)) is not None
            for layer in range(gate.shape[1])
            if bool((gate[:, layer] != 1).any())
        ]
        moved = gates.to(self.device, self.dtype)
        return FamilyPlan(
            len(gates),
            {site: moved.site(site) for site in sites},
            None if member is None else member.to(self.device),
            min(acts) if acts and share and len(gates) > 1 else None,
        )

    def _once(
        self, forward: Callable[..., Any], address: AttentionAddress | None, *args: Any, **kwargs: Any
    ) -> Any:
        """What a module of the decoder returns, with rows computed for one run while all runs have the same.

        `address` if the module is attention. Where a gate acts, deformable attention still computes one run, see
        `sampled_context`.
        """
        here = _pass.get()
        if here.first is not None and address is not None and self._is_dense_at(address):
            if _order(address) >= here.first:
                here.first = None
        if here.first is None:
            return forward(*args, **kwargs)
        rows, runs = here.rows, here.runs

        def one(x: Tensor) -> Tensor:
            return x[:, :rows] if _has_rows(x) and x.shape[1] == runs * rows else x

        def all_runs(x: Tensor) -> Tensor:
            return _repeated(x, runs) if _has_rows(x) and x.shape[1] == rows else x

        output = forward(
            *pytree.tree_map_only(Tensor, one, args), **pytree.tree_map_only(Tensor, one, kwargs)
        )
        return pytree.tree_map_only(Tensor, all_runs, output)

    def _is_dense_at(self, address: AttentionAddress) -> bool:
        return self._is_dense or address.site != "decoder_cross"

    def _gate(self, address: AttentionAddress, dtype: torch.dtype) -> Tensor | None:
        """The gate of a call (G, H, rows or 1, 1); None where all are on, or runs have not parted."""
        here = _pass.get()
        gates = here.gates.get(address.site)
        if gates is None or (here.first is not None and _order(address) < here.first):
            return None
        return gates[:, address.layer].to(dtype).transpose(1, 2).unsqueeze(-1)

    def dense_context(
        self, address: AttentionAddress, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The context (B, H, T, D) of a call in a module of the model; `mask` as transformers makes it."""
        here = _pass.get()
        gate = self._gate(address, query.dtype)
        attn_mask = _as_keys(mask) if here.is_padded and address.site != "decoder_self" else None
        runs = here.runs if here.first is None else 1
        if address.site != "decoder_self" or runs == 1:
            gate = _in_line(gate, query.shape[2])
            return self.context_of(AttentionCall(address, query, key, value, attn_mask, gate))
        images = len(query)
        query, key, value = (
            x.unflatten(2, (runs, -1)).transpose(1, 2).flatten(0, 1) for x in (query, key, value)
        )
        if gate is not None:
            gate = gate.repeat(images, 1, 1, 1)
        context = self.context_of(AttentionCall(address, query, key, value, None, gate))
        return context.unflatten(0, (images, runs)).transpose(1, 2).flatten(2, 3)

    def sampled_context(
        self,
        address: AttentionAddress,
        value: Tensor,
        spatial_shapes: Shapes,
        locations: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """The context (B, H, T, D) of deformable attention; arguments as in `headoff.deformable.contract`."""
        here = _pass.get()
        gate = self._gate(address, value.dtype)
        call = DeformableCall(address, value.transpose(1, 2), spatial_shapes, locations, weights, None)
        if here.first is None or gate is None:
            return self.context_of(call._replace(head_gate=_in_line(gate, locations.shape[1])))
        # Runs part here: their contexts differ by the gate alone.
        here.first = None
        return (self.context_of(call)[:, :, None] * gate.transpose(0, 1)).flatten(2, 3)


def _in_line(gate: Tensor | None, rows: int) -> Tensor | None:
    """The gate (G, H, Q or 1, 1) of `rows` queries, those of all runs, as (1, H, rows or 1, 1)."""
    if gate is None or len(gate) == 1:
        return gate
    return gate.expand(-1, -1, rows // len(gate), -1).transpose(0, 1).flatten(1, 2)[None]


def _by_row(module: nn.Module, attention: Container[nn.Module]) -> Iterator[nn.Module]:
    """Modules whose output has a row for each row of their input: those in `attention`, and the outermost without."""
    for child in module.children():
        if child in attention:
            yield child
        elif isinstance(child, nn.ModuleList) or any(one in attention for one in child.modules()):
            yield from _by_row(child, attention)
        else:
            yield child


def _in_parts(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a module of several layers returns, computed for a few runs at a time on the CPU.

    What such a module keeps between its layers fits into a cache then, which it does not for all runs.
    """
    rows = _pass.get().rows
    x = args[0] if len(args) == 1 and not kwargs else None
    if not rows or torch.is_grad_enabled() or not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] % rows:
        return forward(*args, **kwargs)
    size = rows * max(1, ROWS // rows)
    if x.shape[1] <= size or x.device.type != "cpu":
        return forward(x)
    parts = [forward(part) for part in x.split(size, 1)]
    return pytree.tree_map(lambda *outputs: torch.cat(outputs, 1), *parts)


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 1


def _repeated(x: Tensor, runs: int) -> Tensor:
    """(B, Q, ...) to (B, G * Q, ...)."""
    return x.repeat(1, runs, *(1,) * (x.ndim - 2))


def _heads(module: Any) -> int:
    """The number of heads of one of transformers' attention modules."""
    for name in ("n_heads", "num_heads", "num_attention_heads", "attention_heads"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return int(module.o_proj.in_features // module.head_dim)


def _as_keys(mask: Tensor | None) -> Tensor | None:
    """A padding mask of transformers, bool or additive, as bool (B, 1, 1, S), True = attend."""
    if mask is None:
        return None
    mask = mask[:, :1, :1]
    return mask if mask.dtype == torch.bool else mask == 0


def _to(values: Any, device: torch.device, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda x: x.to(device, dtype if x.is_floating_point() else None), values
    )


def _clone(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, values)


class _Called(Exception):
    """The module was called with these arguments."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def _stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the decoder: the end of a pass that only encodes."""
    if _pass.get().stops:
        assert not args, "transformers calls its decoders with keyword arguments"
        raise _Called(kwargs)


def _known_backbone(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of the backbone's `forward`, which runs once in a pass, or not at all where its output is given."""
    here = _pass.get()
    if here is _OUTSIDE:
        return forward(*args, **kwargs)
    if here.backbone is None:
        here.backbone = forward(*args, **kwargs)
    return here.backbone


def _unread(module: nn.Linear, forward: Callable[..., Any], x: Tensor) -> Tensor:
    """In place of the `forward` of a module whose output no `predict` reads: zeros that take no time."""
    return (
        forward(x) if _pass.get() is _OUTSIDE else x.new_zeros(()).expand(*x.shape[:-1], module.out_features)
    )


def _known_value(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> Tensor:
    """In place of the `forward` of a projection of the memory's tokens, which may be known."""
    here = _pass.get()
    known = here.values.get(module)
    return known if known is not None and x is here.tokens else forward(x)


@contextmanager
def _during(here: _Pass) -> Iterator[None]:
    """Within this context, modules are called in that pass."""
    token = _pass.set(here)
    try:
        yield
    finally:
        _pass.reset(token)
