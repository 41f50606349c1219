"""Independent implementations agree: transformers' DETR and Table Transformer, torchvision's ResNets.

Random weights, tiny sizes. transformers writes the checkpoint, `headoff.load` reads it, outputs are compared,
so names, transposes and normalisations are all in the comparison. In float64 the versions and models of
transformers disagree about the dtype that positions are computed in, which is worth up to 4e-7.
"""

import json
import re

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from headoff.detr import BackboneConfig
from headoff.detr.backbone import ResNet
from headoff.detr.checkpoints import load

transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")

TOLERANCES = [(torch.float32, 2e-5), (torch.float64, 1e-6)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    ),
]


def randomise(model):
    """Weights of a size at which attention is not uniform and outputs are not all alike."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.ndim > 1:
                value.normal_(0, 1.3 / value[0].numel() ** 0.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value), alpha=0.2)


def reference(kind, layer_type="bottleneck"):
    """A tiny model of transformers, float32, eval mode. `kind` is `Detr` or `TableTransformer` (pre-norm)."""
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24, 32],
        depths=[2, 1, 1],
        layer_type=layer_type,
        out_features=["stage3"],
    )
    config = getattr(transformers, f"{kind}Config")(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=7,
        num_labels=5,
        auxiliary_loss=False,
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    randomise(model)
    return model


def batch(dtype, device="cpu"):
    """Three images padded to 64 x 96: a full one, one narrower, one lower and narrower."""
    torch.manual_seed(1)
    pixels, mask = torch.randn(3, 3, 64, 96, dtype=dtype), torch.ones(3, 64, 96, dtype=torch.bool)
    mask[1, :, 60:] = False
    mask[2, 37:] = False
    mask[2, :, 75:] = False
    return (pixels * mask[:, None]).to(device), mask.to(device)


def assert_agree(ours, theirs, tolerance):
    assert theirs.logits.std() > 0.1  # a comparison of something
    torch.testing.assert_close(ours.logits[0], theirs.logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.boxes[0], theirs.pred_boxes, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, folder) of each kind, saved once."""
    models = {}
    for kind, layer_type in (("Detr", "bottleneck"), ("Detr", "basic"), ("TableTransformer", "bottleneck")):
        folder = tmp_path_factory.mktemp(kind)
        model = reference(kind, layer_type)
        model.save_pretrained(folder)
        models[kind, layer_type] = model, folder
    return models


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float32", "float64"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize(
    "kind",
    [("Detr", "bottleneck"), ("Detr", "basic"), ("TableTransformer", "bottleneck")],
    ids=["post-norm", "basic-blocks", "pre-norm"],
)
def test_transformers(saved, kind, padded, dtype, tolerance, device):
    model, folder = saved[kind]
    model = model.to(device, dtype)
    pixels, mask = batch(dtype, device)
    with torch.no_grad():
        theirs = model(pixel_values=pixels, pixel_mask=mask.long() if padded else None)
    detector = load(folder, dtype=dtype, device=device)
    assert detector.config.pre_norm == (kind[0] == "TableTransformer")
    assert detector.config.heads == 4 and detector.class_names == tuple(f"LABEL_{i}" for i in range(5))
    assert_agree(detector(pixels, mask if padded else None), theirs, tolerance)
    model.to("cpu", torch.float32)


# --- every generation of names ------------------------------------------------------------------------------


def as_timm(name):
    """The same ResNet as timm names it, in the published facebook/detr-resnet-50."""
    name = re.sub(r"model\.embedder\.embedder\.convolution", "model.conv1", name)
    name = re.sub(r"model\.embedder\.embedder\.normalization", "model.bn1", name)
    name = re.sub(r"encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}.", name)
    name = name.replace("shortcut.convolution", "downsample.0").replace(
        "shortcut.normalization", "downsample.1"
    )
    name = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", name)
    return re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", name)


GENERATIONS = {
    "timm": as_timm,
    "timm-wrapped": lambda name: as_timm(name).replace("conv_encoder.model.", "model._backbone."),
    "new-backbone": lambda name: name.replace("backbone.conv_encoder.model.", "backbone.model."),
    "o_proj": lambda name: name.replace("out_proj", "o_proj"),
    "mlp": lambda name: re.sub(r"\.(fc\d)\.", r".mlp.\1.", name),
    "segmentation": lambda name: f"detr.{name}",
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_generations_of_names(saved, generation, tmp_path):
    model, folder = saved["Detr", "bottleneck"]
    tensors = load_file(folder / "model.safetensors")
    renamed = {GENERATIONS[generation](name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    if generation == "segmentation":
        renamed["mask_head.lay1.weight"] = torch.zeros(3)
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    ours, expected = load(tmp_path).state_dict(), load(folder).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_names_of_the_model_in_memory(saved, tmp_path):
    """What `torch.save(model.state_dict())` writes, without a configuration beside it."""
    model, folder = saved["Detr", "bottleneck"]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    ours, expected = load(tmp_path, heads=4), load(folder)
    assert ours.config == expected.config
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_a_dilated_configuration_is_heard(saved, tmp_path):
    _, folder = saved["Detr", "bottleneck"]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dilation": True}))
    assert load(tmp_path).config.backbone.dilate_last
    assert not load(tmp_path, dilated=False).config.backbone.dilate_last
    assert not load(folder).config.backbone.dilate_last


# --- backbones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "config"),
    [
        (
            lambda: torchvision.models.resnet50(
                replace_stride_with_dilation=[False, False, True], norm_layer=FrozenBatchNorm2d
            ),
            BackboneConfig(dilate_last=True),
        ),
        (
            lambda: torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d),
            BackboneConfig("basic", depths=(2, 2, 2, 2)),
        ),
    ],
    ids=["resnet50-dc5", "resnet18"],
)
def test_torchvision_resnets(theirs, config):
    theirs = theirs()
    randomise(theirs)
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()
    ours = ResNet(config)
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(1, 3, 70, 97)  # odd sizes: roundings of strides are part of it
    with torch.no_grad():
        features = ours(pixels)
        expected = theirs(pixels)
    assert features.shape[1] == ours.channels
    assert features.shape[2:] == tuple(-(-side // config.stride) for side in pixels.shape[2:])
    torch.testing.assert_close(features.flatten(1), expected, rtol=1e-5, atol=1e-5)


# --- the original layout ------------------------------------------------------------------------------------


class OriginalLayer(nn.Module):
    """A layer of either stack, of torch's own modules, whose names are those of the original checkpoints."""

    def __init__(self, width, heads, hidden, pre_norm, cross):
        super().__init__()
        self.pre_norm, self.cross = pre_norm, cross
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        if cross:
            self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.norm3 = nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, place, padding=None, memory=None, memory_place=None):
        def attend(query):
            return self.self_attn(query + place, query + place, query, key_padding_mask=own_padding)[0]

        def look(query):
            keys = memory + memory_place
            return self.multihead_attn(query + place, keys, memory, key_padding_mask=padding)[0]

        def feed(x):
            return self.linear2(self.linear1(x).relu())

        own_padding = None if self.cross else padding
        steps = [attend, look, feed] if self.cross else [attend, feed]
        norms = [self.norm1, self.norm2] + ([self.norm3] if self.cross else [])
        for step, norm in zip(steps, norms, strict=True):
            x = x + step(norm(x)) if self.pre_norm else norm(x + step(x))
        return x


class OriginalDetr(nn.Module):
    """DETR as its paper's appendix has it, in the original checkpoints' names."""

    def __init__(self, pre_norm, width=32, heads=8, hidden=48, queries=7, classes=5):
        super().__init__()
        body = torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 2, 1, 1], norm_layer=FrozenBatchNorm2d
        )
        body.avgpool = body.fc = nn.Identity()
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": body})])
        self.input_proj = nn.Conv2d(512, width, 1)
        self.transformer = nn.ModuleDict(
            {
                "encoder": nn.ModuleDict(
                    {
                        "layers": nn.ModuleList(
                            OriginalLayer(width, heads, hidden, pre_norm, False) for _ in range(2)
                        )
                    }
                    | ({"norm": nn.LayerNorm(width)} if pre_norm else {})
                ),
                "decoder": nn.ModuleDict(
                    {
                        "layers": nn.ModuleList(
                            OriginalLayer(width, heads, hidden, pre_norm, True) for _ in range(3)
                        ),
                        "norm": nn.LayerNorm(width),
                    }
                ),
            }
        )
        self.query_embed = nn.Embedding(queries, width)
        self.class_embed = nn.Linear(width, classes + 1)
        self.bbox_embed = nn.ModuleDict(
            {"layers": nn.ModuleList([nn.Linear(width, n) for n in (width, width, 4)])}
        )
        self.pre_norm = pre_norm

    @staticmethod
    def place(inside, width):
        """Sines and cosines of row and column over the image part (h, w), each scaled to 2 pi."""
        rows, columns = int(inside[:, 0].sum()), int(inside[0].sum())
        halves = []
        for axis, count in enumerate((rows, columns)):
            step = torch.arange(1, inside.shape[axis] + 1, dtype=torch.float64).clamp(max=count)
            step = step / (count + 1e-6) * 2 * torch.pi
            angle = step[:, None] / 10000 ** (torch.arange(0, width // 2, 2, dtype=torch.float64) * 2 / width)
            half = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
            halves.append(half[:, None] if axis == 0 else half[None])
        return torch.cat([half.expand(*inside.shape, -1) for half in halves], -1).flatten(0, 1)

    def forward(self, pixels, inside):
        body = self.backbone[0]["body"]
        x = body.maxpool(body.relu(body.bn1(body.conv1(pixels))))
        x = self.input_proj(body.layer4(body.layer3(body.layer2(body.layer1(x)))))
        token_inside = inside[:, ::32, ::32]
        place = torch.stack([self.place(one, x.shape[1]) for one in token_inside]).to(x)
        padding = ~token_inside.flatten(1)
        x = x.flatten(2).transpose(1, 2)
        for layer in self.transformer["encoder"]["layers"]:
            x = layer(x, place, padding)
        if self.pre_norm:
            x = self.transformer["encoder"]["norm"](x)
        query_place = self.query_embed.weight
        queries = torch.zeros_like(query_place).expand(len(x), -1, -1)
        for layer in self.transformer["decoder"]["layers"]:
            queries = layer(queries, query_place, padding, x, place)
        queries = self.transformer["decoder"]["norm"](queries)
        first, second, last = self.bbox_embed["layers"]
        return self.class_embed(queries), last(second(first(queries).relu()).relu()).sigmoid()


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
def test_original_layout(pre_norm, tmp_path):
    """Against torch.nn.MultiheadAttention, with padding; in float64 both compute positions in it."""
    model = OriginalDetr(pre_norm).eval()
    randomise(model)
    torch.save({"model": model.state_dict()}, tmp_path / "detr.pth")
    detector = load(tmp_path / "detr.pth", dtype=torch.float64)
    assert detector.config.pre_norm == pre_norm
    assert detector.config.backbone == BackboneConfig("basic", depths=(1, 2, 1, 1))
    pixels, mask = batch(torch.float64)
    with torch.no_grad():
        logits, boxes = model.double()(pixels, mask)
    ours = detector(pixels, mask)
    assert logits.std() > 0.1
    torch.testing.assert_close(ours.logits[0], logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.boxes[0], boxes, rtol=0, atol=1e-12)
