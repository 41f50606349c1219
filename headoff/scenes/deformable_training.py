"""Training of the bundled deformable detector, a small RT-DETR (Zhao et al., CVPR 2024) of `transformers`.

Its queries are chosen from the image by the encoder, which makes it learn fast. These come to RT-DETR's own recipe
(with its denoising queries and varifocal loss), in training only:

- the encoder's proposals are matched to the objects over all tokens, and not over the chosen ones only, so that every
  token has a gradient from the first step;
- a dense loss on every encoder token, by heads of its own, with a weight that falls to zero;
- an initialisation for training from scratch: that of `transformers` expects pretrained weights, and makes the scales
  of the encoder's batch norms almost zero;
- small images first, and an exponential moving average of the weights.

Everything is float32: bfloat16 is ten times slower on CPU cores that have no instructions for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig
from transformers.models.rt_detr.modeling_rt_detr import RTDetrMLPPredictionHead

from headoff.images import Preprocessing
from headoff.scenes.dataset import CLASS_NAMES
from headoff.scenes.losses import Targets, dense_loss, match_by_sigmoid, varifocal_set_loss
from headoff.scenes.training import Moment, Recipe, SceneTrainer

_PREPROCESSING = Preprocessing()


def rt_detr_config(
    *,
    widths: tuple[int, int, int, int] = (32, 64, 128, 128),
    encoder_width: int = 96,
    width: int = 64,
    feedforward: int = 256,
    layers: int = 6,
    heads: int = 8,
    queries: int = 20,
) -> RTDetrConfig:
    """An RT-DETR of the smallest kind: one residual block a stage, strides 8, 16 and 32.

    Args:
        widths: channels of the stages of the backbone; its stem has those of the first.
        encoder_width, width: channels of encoder and decoder.
    """
    return RTDetrConfig(
        backbone_config=RTDetrResNetConfig(
            embedding_size=widths[0],
            hidden_sizes=list(widths),
            depths=[1] * len(widths),
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        freeze_backbone_batch_norms=False,
        encoder_hidden_dim=encoder_width,
        encoder_in_channels=list(widths[1:]),
        encoder_ffn_dim=feedforward,
        encoder_attention_heads=heads,
        hidden_expansion=0.5,
        d_model=width,
        num_queries=queries,
        decoder_in_channels=[encoder_width] * 3,
        decoder_ffn_dim=feedforward,
        decoder_layers=layers,
        decoder_attention_heads=heads,
        num_denoising=10,
        id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: index for index, name in enumerate(CLASS_NAMES)},
    )


SCENES_DEFORMABLE_CONFIG = rt_detr_config()


@dataclass(frozen=True)
class DeformableRecipe(Recipe):
    """The hyperparameters of training.

    Attributes:
        phases: sides of the images in pixels, each with the fraction of the run at which it begins. The last is that
            of the written image processor. Multiples of 32.
        dense_until: fraction of the run after which the dense loss has a weight of zero.
    """

    hours: float = 1.3
    phases: tuple[tuple[float, int], ...] = ((0.0, 96), (0.25, 128))
    dense_until: float = 0.6

    written: ClassVar[str] = "scenes-deformable"

    def sides(self, config: RTDetrConfig) -> set[int]:
        """All sides that the images have, in pixels."""
        return {side for _, side in self.phases}

    def side(self, config: RTDetrConfig, moment: Moment) -> int:
        """Side of the images at `moment`, in pixels."""
        return [side for start, side in self.phases if start <= moment.progress][-1]

    def trainer(self, config: RTDetrConfig) -> DeformableTrainer:
        """A new model with its loss."""
        return DeformableTrainer(config, self.phases[-1][1])

    def describe(self, config: RTDetrConfig) -> dict[str, Any]:
        """The sizes of the model, without what depends on the version of transformers."""
        return {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}

    def dense_weight(self, moment: Moment) -> float:
        """Weight of the dense loss at `moment`."""
        return max(0.0, 1 - moment.progress / self.dense_until)


class DeformableTrainer(SceneTrainer):
    """RT-DETR, with the heads of the dense loss."""

    def __init__(self, config: RTDetrConfig, side: int) -> None:
        super().__init__()
        self.model = RTDetrForObjectDetection(config)
        _initialise(self.model)
        self.model.to(memory_format=torch.channels_last)
        self.dense_class = nn.Linear(config.d_model, config.num_labels + 1)
        self.dense_box = RTDetrMLPPredictionHead(config.d_model, config.d_model, 4, num_layers=3)
        self.processor = RTDetrImageProcessor(
            size={"height": side, "width": side},
            do_normalize=True,
            image_mean=list(_PREPROCESSING.mean),
            image_std=list(_PREPROCESSING.std),
        )

    @property
    def trained(self) -> RTDetrForObjectDetection:
        """RT-DETR itself."""
        return self.model

    def write(self, path: Path) -> None:
        """Write a folder that `from_pretrained` takes: weights in float16, statistics of batch norms in float32."""
        # The dtype of config.json stays float32: half is for the file only, and loading makes it float32 again.
        state = {
            name: value.half() if value.is_floating_point() and "running" not in name else value
            for name, value in self.model.state_dict().items()
        }
        self.model.save_pretrained(path, state_dict=state)
        self.processor.save_pretrained(path)

    def forward(
        self,
        images: Tensor,
        targets: Targets,
        recipe: DeformableRecipe,
        moment: Moment,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of uint8 images (B, 3, S, S); a dictionary of its parts for the log."""
        mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (_PREPROCESSING.mean, _PREPROCESSING.std))
        pixels = ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
        labels = [
            {"class_labels": labels[valid], "boxes": boxes[valid]}
            for labels, boxes, valid in zip(targets.labels, targets.boxes, targets.valid, strict=True)
        ]
        tokens: list[Tensor] = []
        hook = self.model.model.enc_output.register_forward_hook(lambda *call: tokens.append(call[-1]))
        # The noise of denoising queries comes from torch's global generator.
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(generator.initial_seed())
            output = self.model.model(pixels, labels=labels)
        hook.remove()

        noisy, _ = output.denoising_meta_values["dn_num_split"]
        groups = output.denoising_meta_values["dn_num_group"]
        # (B, layers, noisy + Q, ..) to (layers, B, noisy + Q, ..)
        logits = output.intermediate_logits.transpose(0, 1)
        boxes = output.intermediate_reference_points.transpose(0, 1)
        losses = {
            "set": _set_loss(logits[:, :, noisy:], boxes[:, :, noisy:], targets),
            "encoder": _set_loss(
                output.enc_outputs_class[None], output.enc_outputs_coord_logits.sigmoid()[None], targets
            ),
            "denoise": _denoising_loss(logits[:, :, :noisy], boxes[:, :, :noisy], groups, targets),
        }
        loss = losses["set"] + losses["encoder"] + losses["denoise"]
        if (weight := recipe.dense_weight(moment)) > 0:
            losses["dense"] = self._dense_loss(tokens[0], images.shape[-1], targets)
            loss = loss + weight * losses["dense"]
        return loss, {name: part.item() for name, part in losses.items()}

    def _dense_loss(self, tokens: Tensor, side: int, targets: Targets) -> Tensor:
        """`dense_loss`, summed over the levels."""
        logits, boxes = self.dense_class(tokens), self.dense_box(tokens).sigmoid()
        grids = [side // stride for stride in self.model.config.feat_strides]
        cells = [grid * grid for grid in grids]
        parts = [
            dense_loss(level_logits, level_boxes, (grid, grid), targets)
            for grid, level_logits, level_boxes in zip(
                grids, logits.split(cells, 1), boxes.split(cells, 1), strict=True
            )
        ]
        return torch.stack(parts).sum()


def _set_loss(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    return varifocal_set_loss(logits, boxes, targets, match_by_sigmoid(logits, boxes, targets))


def _denoising_loss(logits: Tensor, boxes: Tensor, groups: int, targets: Targets) -> Tensor:
    """The loss of noisy queries (layers, B, groups * 2 * M, ..), the mean over the groups.

    A group has a query near each of the M objects, in their order, and then a distant one for each.
    """
    objects = targets.labels.shape[1]
    logits, boxes = (
        tensor.unflatten(2, (groups, 2 * objects)).movedim(2, 1).flatten(0, 1) for tensor in (logits, boxes)
    )
    known = torch.arange(objects).expand(*logits.shape[:2], -1)
    return varifocal_set_loss(logits, boxes, targets, known) / groups


def _initialise(model: RTDetrForObjectDetection) -> None:
    """Xavier for linear layers and He for convolutions; boxes that start at their anchors.

    Backbone, class heads, sampling offsets and attention weights keep what transformers gives them.
    """
    kept = ("sampling_offsets", "attention_weights", "class_embed", "enc_score_head")
    for name, module in model.model.named_modules():
        if name.startswith("backbone.") or any(part in name for part in kept):
            continue
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    for head in (model.model.enc_bbox_head, *model.model.decoder.bbox_embed):
        nn.init.zeros_(head.layers[-1].weight)
