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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from headoff.attention import Attention
from headoff.calls import AttentionAddress, AttentionCall, DeformableCall
from headoff.choices import SITES, Site
from headoff.deformable import Shapes
from headoff.detector import Detector, DetectorOutput, GatesSpec, check_pixels
from headoff.devices import autocast
from headoff.family.adapter import Adapter, find_adapter
from headoff.family.attention import INTERFACE, Place, intercept, register_interface
from headoff.family.memory import FamilyFeatures, FamilyMemory, moved
from headoff.family.passes import (
    DecoderCalled,
    Pass,
    by_row,
    current_pass,
    during,
    has_rows,
    in_parts,
    known_backbone,
    known_value,
    repeated,
    stop,
    unread,
)
from headoff.gates import Gates, HeadLayout, read_configurations, stack
from headoff.images import Preprocessing
from headoff.scoring import Scoring

TOKENS = "encoder_hidden_states"
"""What transformers' decoders call the memory's tokens."""


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
        for module in by_row(model.model.decoder, addresses):
            forward = module.forward
            if module not in addresses and any(module.children()):
                forward = partial(in_parts, forward)
            module.forward = partial(self._once, forward, addresses.get(module))
        self._projections = [
            module.get_submodule("value_proj")
            for module in modules["decoder_cross"]
            if hasattr(module, "value_proj")
        ]
        for module in self._projections:
            module.forward = partial(known_value, module, module.forward)
        for module in adapter.unread(model):
            module.forward = partial(unread, module, module.forward)
        model.model.backbone.forward = partial(known_backbone, model.model.backbone.forward)
        model.model.decoder.register_forward_pre_hook(stop, with_kwargs=True)
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
        here = Pass(gates, 1, mask is not None, backbone, stops=True)
        arguments: Mapping[str, Any] | None = None
        with during(here), autocast(self.device, self.autocast_dtype):
            try:
                self.model.model(pixel_values, pixel_mask=mask)
            except DecoderCalled as called:
                arguments = called.arguments
        assert arguments is not None, "the model did not call its decoder"
        # Some models make float32 queries, whatever their weights.
        arguments = moved(dict(arguments), self.device, self.dtype)
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
            x.shape[1] for name, x in arguments.items() if has_rows(x) and name not in self.adapter.per_query
        }
        # Interceptors and replacements get calls with the rows of all runs; and rows must be known by their number.
        known = self.is_intercepted or self.replacement is not None or sizes & {rows, plan.runs * rows}
        first = None if known else plan.first
        for name in self.adapter.per_query:
            arguments[name] = repeated(arguments[name], plan.runs)
        here = Pass(plan.gates, plan.runs, memory.is_padded, rows=rows, first=first, tokens=arguments[TOKENS])
        if memory.values is not None:
            tokens, dtype, values = memory.values
            if tokens is here.tokens and dtype == self.autocast_dtype:
                here.values = values
        with during(here), autocast(self.device, self.autocast_dtype):
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
        here = current_pass()
        if here.first is not None and address is not None and self._is_dense_at(address):
            if _order(address) >= here.first:
                here.first = None
        if here.first is None:
            return forward(*args, **kwargs)
        rows, runs = here.rows, here.runs

        def one(x: Tensor) -> Tensor:
            return x[:, :rows] if has_rows(x) and x.shape[1] == runs * rows else x

        def all_runs(x: Tensor) -> Tensor:
            return repeated(x, runs) if has_rows(x) and x.shape[1] == rows else x

        output = forward(
            *pytree.tree_map_only(Tensor, one, args), **pytree.tree_map_only(Tensor, one, kwargs)
        )
        return pytree.tree_map_only(Tensor, all_runs, output)

    def _is_dense_at(self, address: AttentionAddress) -> bool:
        return self._is_dense or address.site != "decoder_cross"

    def _gate(self, address: AttentionAddress, dtype: torch.dtype) -> Tensor | None:
        """The gate of a call (G, H, rows or 1, 1); None where all are on, or runs have not parted."""
        here = current_pass()
        gates = here.gates.get(address.site)
        if gates is None or (here.first is not None and _order(address) < here.first):
            return None
        return gates[:, address.layer].to(dtype).transpose(1, 2).unsqueeze(-1)

    def dense_context(
        self, address: AttentionAddress, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The context (B, H, T, D) of a call in a module of the model; `mask` as transformers makes it."""
        here = current_pass()
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
        here = current_pass()
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
