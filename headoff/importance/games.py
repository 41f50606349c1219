"""The detector on one image as a cooperative game: heads are the players, and the value of a coalition is what the
detector finds with all other heads off.

Shapes: C coalitions, L layers and H heads of the site, O objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headoff.ablation import Ablation
from headoff.calls import Attend, AttentionAddress, AttentionCall
from headoff.choices import Site
from headoff.detections import detections_from
from headoff.detector import Detector, DetectorOutput, Features
from headoff.encoded import EncodedImage
from headoff.errors import AttentionError, NonFiniteError, SettingError
from headoff.gates import Gates
from headoff.images import ImageSource
from headoff.importance.store import ValueStore
from headoff.sweeps import MEMORY_BUDGET, configurations_at_once, decode_all
from headoff.values import Objects, Value

_WITH_GRADIENT = "use another, such as 'probability', or a measure without gradients, such as 'removal'"


@dataclass
class Game:
    """An image under coalitions of heads of one site.

    Attributes:
        detector: the detector.
        features: of the image.
        site: where the heads are.
        objects: the baseline's objects.
        values: the value functions.
        memory_budget: limit of decoder activations in bytes.
        progress: called with the number of coalitions that were evaluated since the last call.
        draws, store: see `under`.
        memory: of the image with everything on in the encoder; None to encode it for each batch of coalitions.
    """

    detector: Detector
    features: Features
    site: Site
    objects: Objects
    values: Sequence[Value]
    memory_budget: int = MEMORY_BUDGET
    progress: Callable[[int], None] | None = None
    draws: Sequence[Ablation] = (Ablation("zero"),)
    store: ValueStore | None = None
    memory: Any = None

    @classmethod
    def of(
        cls,
        detector: Detector,
        image: ImageSource | EncodedImage,
        site: Site,
        values: Sequence[Value],
        confidence: float = 0.5,
        memory_budget: int = MEMORY_BUDGET,
    ) -> Game:
        """The game on an image, whose objects are the detections with nothing off.

        Raises:
            ImageError: the image cannot be read.
            SettingError: `confidence` is not a probability.
            NonFiniteError: a logit or box is not finite.
        """
        encoded = image if isinstance(image, EncodedImage) else EncodedImage.of(detector, image)
        logits, boxes = encoded.output.logits[0, 0], encoded.output.boxes[0, 0]
        size = (encoded.picture.height, encoded.picture.width)
        found = detections_from(logits, boxes, size, detector.class_names, confidence, detector.scoring)
        objects = Objects.of(found, boxes, confidence)
        return cls(detector, encoded.features, site, objects, values, memory_budget, memory=encoded.memory)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H)."""
        layout = self.detector.head_layout
        return layout.layers(self.site), layout.heads_at(self.site)

    def under(self, draws: Sequence[Ablation], store: ValueStore | None = None) -> Game:
        """The same game where heads that are off contribute what `draws` say; values are averaged over them.

        Args:
            draws: see `headoff.ablation.ablation_draws`.
            store: of the values of coalitions under `draws`.
        """
        return replace(self, draws=draws, store=store)

    def __call__(self, coalitions: Tensor) -> list[Tensor]:
        """The values of coalitions.

        Args:
            coalitions: (C, L, H) gates: True or 1 for heads that are on.

        Returns:
            For each value float64 (C, O), or (C, 1) for a value of the image, on the CPU.

        Raises:
            NonFiniteError: a value is NaN or infinite.
            OutputError: the store cannot be written.
        """
        widths = [1 if value.of_image else len(self.objects) for value in self.values]
        results = torch.zeros(len(coalitions), sum(widths), dtype=torch.float64)
        missing = torch.arange(len(coalitions))
        if self.store is not None and coalitions.dtype == torch.bool:
            known = self.store.find(coalitions)
            for index, row in enumerate(known):
                if row is not None:
                    results[index] = row
            missing = torch.tensor([i for i, row in enumerate(known) if row is None], dtype=torch.long)
        if not sum(widths):  # nothing was detected
            missing = missing[:0]
        self._advance(len(coalitions) - len(missing))
        at_once = configurations_at_once(self.detector, self.features, self.memory_budget)
        for batch in missing.split(at_once) if len(missing) else ():
            found = self._evaluate(coalitions[batch].float())
            self._check_finite(found.split(widths, dim=1))
            results[batch] = found
            if self.store is not None and coalitions.dtype == torch.bool:
                self.store.add(coalitions[batch], found)
            self._advance(len(batch))
        return list(results.split(widths, dim=1))

    def _evaluate(self, gates: Tensor) -> Tensor:
        """All values (C, V) of gates (C, L, H) that fit into memory together: the mean over the draws."""
        total = torch.zeros(())
        for draw in self.draws:
            with torch.inference_mode(), draw.applied_to(self.detector):
                output = self._decode(gates)
                logits, boxes = output.logits[:, 0], output.boxes[:, 0]
                found = [value(self.objects, logits, boxes).double().cpu() for value in self.values]
            total = total + torch.cat(found, dim=1).clone()
        return total / len(self.draws)

    def _check_finite(self, values: Sequence[Tensor]) -> None:
        for value, found in zip(self.values, values, strict=True):
            if not bool(found.isfinite().all()):
                raise NonFiniteError(
                    f"NaN or infinity in the value {value.name!r} of a coalition: check the attention, the weights "
                    "and the value"
                )

    def _advance(self, count: int) -> None:
        if self.progress is not None and count:
            self.progress(count)

    def _decode(self, gates: Tensor) -> DetectorOutput:
        return decode_all(
            self.detector,
            self.features,
            Gates(tuple(map(str, range(len(gates)))), **{self.site: gates[:, :, None]}),
            memory_budget=self.memory_budget,
            memory=self.memory,
        )

    def gradients(self, gates: Tensor) -> list[Tensor]:
        """The derivative of each value with respect to each head's gate, where all heads have the same gate.

        A head contributes g A V + (1 - g) r to the output projection, so the derivative is the sum over queries and
        channels of dO (A V - r), where dO is the gradient of the context. One backward pass serves all heads, and a
        batch of gates and objects; the attention needs no gradient with respect to its gate.

        Args:
            gates: (T,) float64, above 0.

        Returns:
            For each value float64 (T, O, L, H), or (T, 1, L, H) for a value of the image, on the CPU.

        Raises:
            SettingError: a value has no gradient.
            AttentionError: the attention has no backward pass.
            NonFiniteError: a derivative is NaN or infinite.
        """
        for value in self.values:
            if not value.differentiable:
                raise SettingError(f"the value {value.name!r} has no gradient: {_WITH_GRADIENT}")
        results = [
            torch.zeros(len(gates), 1 if value.of_image else len(self.objects), *self.shape).double()
            for value in self.values
        ]
        # A backward pass keeps about three times as much as a forward pass.
        at_once = max(1, configurations_at_once(self.detector, self.features, self.memory_budget) // 3)
        objects = max(len(self.objects), 1)
        pairs = torch.cartesian_prod(torch.arange(len(gates)), torch.arange(objects))
        # The encoder runs once in a batch, so there all pairs have the same gate.
        groups = pairs.split(objects if self.site == "encoder_self" else len(pairs))
        batches = [batch for group in groups for batch in group.split(at_once)]
        for draw in self.draws:
            for batch in batches:
                for result, found in zip(results, self._gradients(draw, batch, gates), strict=True):
                    where = batch if result.shape[1] else batch[:0]
                    if result.shape[1] == 1:
                        where, found = where[where[:, 1] == 0], found[where[:, 1] == 0]
                    result[where[:, 0], where[:, 1]] += found[: len(where)] / len(self.draws)
        for value, result in zip(self.values, results, strict=True):
            if not bool(result.isfinite().all()):
                raise NonFiniteError(
                    f"NaN or infinity in the derivative of the value {value.name!r}: check the backward pass of the "
                    "attention"
                )
        return results

    def _gradients(self, draw: Ablation, pairs: Tensor, gates: Tensor) -> list[Tensor]:
        """For each value its derivatives (runs, L, H). Run g of the decoder has the gate and is differentiated for the
        object that `pairs[g]` (runs, 2) names. For the encoder, which runs once, all pairs have the same gate.
        """
        layers, heads = self.shape
        runs = len(pairs)
        is_encoder = self.site == "encoder_self"
        gate = gates[pairs[:1, 0] if is_encoder else pairs[:, 0]]
        captured: dict[AttentionAddress, tuple[Tensor, Tensor]] = {}

        def capture(call: AttentionCall, proceed: Attend) -> Tensor:
            context = proceed(call)
            if call.requires_grad and not context.requires_grad:
                raise AttentionError(
                    "the attention has no backward pass, as autograd knows of no way from its query to its context: "
                    "give it one (torch.autograd.Function), or use measures without gradients, such as 'removal'"
                )
            if call.address.site != self.site:
                return context
            # The gradient of a context is that of zeros that are added to it.
            zeros = torch.zeros_like(context, requires_grad=True)
            ungated = context.detach() if call.head_gate is None else context.detach() / call.head_gate
            if draw.replacement is not None:
                ungated = ungated - draw.replacement(call).detach()
            captured[call.address] = zeros, ungated
            return context + zeros

        own = {
            self.site: None
            if bool((gate == 1).all())
            else gate.float()[:, None, None, None].expand(-1, layers, 1, heads)
        }
        with torch.enable_grad(), draw.applied_to(self.detector), self.detector.intercepting(capture):
            # Copies, as tensors of inference mode cannot be saved for a backward pass.
            if is_encoder or self.memory is None:
                gated = own.get("encoder_self")
                memory = self.detector.encode_features(
                    self.features.clone(), None if gated is None else gated[0]
                )
            else:
                memory = self.memory.clone()
            names = tuple(map(str, range(1 if is_encoder else runs)))
            decoder_gates = {site: own[site] for site in ("decoder_self", "decoder_cross") if site in own}
            plan = self.detector.plan(Gates(names, **decoder_gates), share=False)
            output = self.detector.decode(memory, plan)
            logits, boxes = output.logits[:, 0], output.boxes[:, 0]
            contexts = [captured[AttentionAddress(self.site, layer)] for layer in range(layers)]
            results = []
            for value in self.values:
                found = value(self.objects, logits, boxes)
                column = pairs[:, 1].clamp(max=found.shape[1] - 1)
                if not found.shape[1]:
                    results.append(torch.zeros(runs, layers, heads, dtype=torch.float64))
                elif is_encoder:
                    item = [_gate_gradients(found[0, o], contexts, 1) for o in column.tolist()]
                    results.append(torch.cat(item))
                else:
                    results.append(_gate_gradients(found[torch.arange(runs), column].sum(), contexts, runs))
        return results


def _gate_gradients(total: Tensor, contexts: Sequence[tuple[Tensor, Tensor]], runs: int) -> Tensor:
    """(runs, L, H) from pairs of added zeros and A V - r."""
    gradients = torch.autograd.grad(total, [zeros for zeros, _ in contexts], retain_graph=True)
    per_layer = [
        _per_run(gradient * ungated, runs).sum((2, 3))
        for gradient, (_, ungated) in zip(gradients, contexts, strict=True)
    ]
    return torch.stack(per_layer, dim=1).double().cpu()


def _per_run(x: Tensor, runs: int) -> Tensor:
    """(runs, H, T, D) of a call that has runs as batch items, or concatenated along the query axis."""
    return x if len(x) == runs else x[0].unflatten(1, (runs, -1)).transpose(0, 1)
