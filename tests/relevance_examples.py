"""Small random detectors, features, gates and targets for the tests of relevance."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headoff.detr import BackboneConfig, Detr, DetrConfig
from headoff.detr.detector import Features
from headoff.gates import Gates
from headoff.images import Preprocessing
from headoff.relevance import Method, PairRelevance, RelevanceEngine, resolve_cam_method
from headoff.relevance.oracle import dense_evidence
from headoff.relevance.rules import DenseRelevance
from headoff.relevance.targets import Target, make_target

HEADS, QUERIES, CLASSES = 4, 5, 3
CONFIG = DetrConfig(
    backbone=BackboneConfig("basic", depths=(1, 1, 1), widths=(4, 8, 12), stem=4),
    width=16,
    heads=HEADS,
    encoder_layers=2,
    decoder_layers=3,
    feedforward=24,
    queries=QUERIES,
    classes=CLASSES,
    preprocessing=Preprocessing(short_side=64, long_side=128),
)


def mixed_target(logits: Tensor, boxes: Tensor) -> Tensor:
    """A target that all queries have a part in."""
    return (logits.softmax(-1)[:, :2] * boxes[:, :2]).sum() + boxes[0, 3]


TARGETS = ("class", "cx", "h", "class", mixed_target)
"""One for each query."""


def tiny_detector(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> Detr:
    """Random weights, larger than an initialisation's, so that every part has a say in the answer."""
    generator = torch.Generator().manual_seed(seed)
    detector = Detr(replace(CONFIG, **changes))
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.ndim > 1:
                value.normal_(0, 1.3 / value[0].numel() ** 0.5, generator=generator)
            elif value.is_floating_point():
                # Biases are initialised at random, from another generator.
                value.fill_(float(name.endswith("weight")))
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)
    return detector.to(dtype).eval().requires_grad_(False)


def features_of(detector: Detr, *, grid=(3, 5), padded: bool = False, seed: int = 1) -> Features:
    """Random tokens and positions; where `padded`, the last columns and the last row are padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, grid[0] * grid[1], detector.config.width)
    tokens, positions = (torch.randn(shape, generator=generator).to(detector.dtype) for _ in range(2))
    mask = None
    if padded:
        image = torch.ones(grid, dtype=torch.bool)
        image[-1], image[:, -2:] = False, False
        mask = image.flatten()[None, None, None]
    return Features(tokens, positions, mask, grid)


def random_gates(detector: Detr, count: int, *, per_query: bool = False, sites=None, seed: int = 2) -> Gates:
    """On, off and in between, at every site unless told."""
    generator = torch.Generator().manual_seed(seed)
    layout = detector.head_layout

    def draw(site: str) -> Tensor | None:
        if sites is not None and site not in sites:
            return None
        rows = layout.queries if per_query and site != "encoder_self" else 1
        shape = (count, layout.layers(site), rows, layout.heads)
        return torch.tensor([0.0, 0.3, 1.0, 1.0])[torch.randint(4, shape, generator=generator)]

    names = tuple(f"random {index}" for index in range(count))
    return Gates(names, *(draw(site) for site in ("encoder_self", "decoder_self", "decoder_cross")))


def targets_of(logits: Tensor, specs=TARGETS) -> list[Target]:
    return [make_target(spec, query, int(logits[query, :-1].argmax())) for query, spec in enumerate(specs)]


def engine_results(
    detector: Detr, features: Features, gates: Gates, specs=TARGETS, **options
) -> list[list[PairRelevance]]:
    """The engine's results by configuration, in the order of the gates, and target."""
    engine = RelevanceEngine(detector, features, **options)
    found = list(engine.run(gates, lambda _, logits, __: targets_of(logits, specs)))
    found.sort(key=lambda relevance: relevance.index)
    return [relevance.pairs for relevance in found]


def oracle_result(
    detector: Detr,
    features: Features,
    gates: Gates,
    target: Target,
    method: Method | str = "chefer",
    zero_rows="identity",
) -> DenseRelevance:
    """The oracle's answer for one configuration."""
    method = resolve_cam_method(method)
    return method.dense(dense_evidence(detector, features, gates, target), **method.options(zero_rows))


def assert_matches_oracle(detector, features, gates, specs=TARGETS, tolerance=1e-10, **options) -> int:
    """Every pair of the engine against the oracle; how many maps were not zero."""
    method = resolve_cam_method(options.get("method", "chefer"))
    evident = 0
    logits_of: dict[int, Tensor] = {}

    def targets(index, logits, boxes):
        logits_of[index] = logits
        return targets_of(logits, specs)

    for found in RelevanceEngine(detector, features, **options).run(gates, targets):
        for query, target in enumerate(targets_of(logits_of[found.index], specs)):
            pair = found.pairs[query]
            expected = oracle_result(
                detector, features, gates[found.index], target, method, options.get("zero_rows", "identity")
            )
            rows = expected.relevance[:, query]
            greatest = rows.abs().max()
            difference = (pair.rows - rows).abs().max()
            where = f"{gates.names[found.index]}, {target.name} of query {query}: {difference} of {greatest}"
            assert difference <= tolerance * greatest, where
            if greatest > 0:
                evident += 1
                if method.takes_zero_rows and options.get("zero_rows") != "reference":
                    assert pair.decoder_identity_rows.equal(expected.decoder_identity_rows), where
                    assert pair.encoder_identity_rows == expected.encoder_identity_rows, where
    return evident
