"""What heads contribute: values, measures on games whose answer is known, and on detectors with planted truths."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch

import headoff
from headoff.boxes import corners_of, pairwise_iou
from headoff.detections import Detections, detections_from
from headoff.detr import Detr, DetrConfig
from headoff.detr.config import BackboneConfig
from headoff.errors import AttentionError, SettingError
from headoff.gates import SITES
from headoff.images import Preprocessing
from headoff.importance.curves import removal_curves
from headoff.importance.games import Game
from headoff.importance.measures import IntegratedGradient, SampledShapley, resolve_measure, score_all
from headoff.importance.shapley import (
    all_coalitions,
    antithetic_permutations,
    marginal_contributions,
    permutation_coalitions,
    shapley_interactions,
    shapley_values,
)
from headoff.values import Objects, resolve_value

EXACT = ("removal", "alone", "gradient", "shapley_columns", "shapley_layers")


@pytest.fixture(scope="module")
def detector():
    return headoff.load("scenes")


@pytest.fixture(scope="module")
def image():
    return headoff.sample_image(0)


@pytest.fixture(scope="module")
def small():
    """A detector of 2 layers x 4 heads in float64, with weights large enough that heads matter."""
    torch.manual_seed(0)
    config = DetrConfig(
        backbone=BackboneConfig("basic", (1,), (16,), 8),
        width=32,
        heads=4,
        encoder_layers=1,
        decoder_layers=2,
        feedforward=32,
        queries=6,
        classes=3,
        preprocessing=Preprocessing(32, 32),
    )
    detector = Detr(config).double().eval().requires_grad_(False)
    for name, parameter in detector.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(2.5 if "decoder" in name else 1.5)
    return detector


@pytest.fixture(scope="module")
def noise():
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(1))
    return pixels.to(torch.uint8).numpy()


def game_on(detector, image, site="decoder_cross", values=("probability", "logit"), confidence=0.5):
    return Game.of(detector, image, site, [resolve_value(value) for value in values], confidence)


# Shapley values


def test_shapley_values_are_means_over_all_permutations():
    values = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.zeros(4, 3).double()
    for order in itertools.permutations(range(4)):
        coalition = 0
        for player in order:
            expected[player] += (values[coalition | 1 << player] - values[coalition]) / math.factorial(4)
            coalition |= 1 << player
    torch.testing.assert_close(shapley_values(values, 4), expected, rtol=0, atol=1e-12)
    total = values[15] - values[0]
    torch.testing.assert_close(shapley_values(values, 4).sum(0), total, rtol=0, atol=1e-12)


def test_interactions_are_differences_of_shapley_values_with_and_without_the_other():
    """Grabisch and Roubens: phi_i where j is always in, less phi_i where j never is."""
    values = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).double()
    found = shapley_interactions(values, 4)
    index = torch.arange(16)
    for i, j in itertools.permutations(range(4), 2):
        without = index[(index >> j & 1) == 0]
        rest = i - (i > j)
        expected = (
            shapley_values(values[without | 1 << j], 3)[rest] - shapley_values(values[without], 3)[rest]
        )
        torch.testing.assert_close(found[i, j], expected, rtol=0, atol=1e-12)
    assert not found.diagonal().any()


def test_permutations_are_walked_from_everyone_to_nobody():
    permutation = torch.tensor([2, 0, 1])
    expected = [[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert permutation_coalitions(permutation).int().tolist() == expected
    values = torch.tensor([10.0, 7.0, 3.0, 1.0])
    assert marginal_contributions(values, permutation).tolist() == [4.0, 2.0, 3.0]


def test_antithetic_permutations_depend_on_their_number_only():
    third = antithetic_permutations(48, seed=5, pair=3)
    assert all(torch.equal(a, b) for a, b in zip(third, antithetic_permutations(48, 5, 3), strict=True))
    assert third[0].flip(0).tolist() == third[1].tolist()
    assert sorted(third[0].tolist()) == list(range(48))
    assert third[0].tolist() != antithetic_permutations(48, 5, 4)[0].tolist()


# Measures on games whose answer is known


@dataclass
class KnownGame:
    """A game whose value is a function of the gates."""

    function: object
    shape: tuple[int, int] = (2, 3)
    values: list = field(default_factory=lambda: [resolve_value("probability")])
    store: None = None

    def __call__(self, coalitions):
        return [self.function(coalitions.double())]

    def gradients(self, gates):
        found = []
        for gate in gates.tolist():
            at = torch.full((1, *self.shape), gate, dtype=torch.float64, requires_grad=True)
            with torch.enable_grad():
                values = self.function(at)[0]
                found.append(
                    torch.stack([torch.autograd.grad(v, at, retain_graph=True)[0][0] for v in values])
                )
        return [torch.stack(found)]


WEIGHTS = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 4.0, 0.25]], [[0.5, 0.5, 3.0], [-1.0, 2.0, 1.0]]]).double()


def additive(gates):
    return torch.einsum("clh,olh->co", gates, WEIGHTS)


@pytest.mark.parametrize("name", ["removal", "alone", "gradient", "integrated_gradient", "shapley_layers"])
def test_of_an_additive_value_every_measure_is_the_head_s_weight(name):
    (found,) = score_all([resolve_measure(name)], KnownGame(additive))[name]
    torch.testing.assert_close(found.scores, WEIGHTS, rtol=0, atol=1e-12)
    if found.interactions is not None:
        assert found.interactions.abs().max() < 1e-12


def test_of_an_additive_value_columns_and_permutations_are_exact():
    game = KnownGame(additive)
    results = score_all([resolve_measure("shapley_columns"), SampledShapley(pairs=2)], game)
    (columns,), (sampled,) = results["shapley_columns"], results["shapley"]
    torch.testing.assert_close(columns.scores, WEIGHTS.sum(1, keepdim=True), rtol=0, atol=1e-12)
    assert columns.interactions.abs().max() < 1e-12
    torch.testing.assert_close(sampled.scores, WEIGHTS, rtol=0, atol=1e-12)
    assert sampled.errors.max() < 1e-12


def test_redundant_players_have_a_negative_interaction_and_complements_a_positive_one():
    def function(gates):
        a, b, c = gates[:, 0].unbind(-1)
        return torch.stack((torch.maximum(a, b), a * c), dim=1)

    (found,) = score_all([resolve_measure("shapley_layers")], KnownGame(function))["shapley_layers"]
    assert found.interactions[0, 0, 0, 1] == -1
    assert found.interactions[1, 0, 0, 2] == 1
    assert found.scores[0, 0].tolist() == pytest.approx([0.5, 0.5, 0])


def test_integrated_gradients_residual_is_what_the_scores_do_not_sum_to():
    def function(gates):
        return gates.sum((1, 2))[:, None].pow(3)

    (found,) = score_all([IntegratedGradient(4)], KnownGame(function))["integrated_gradient"]
    assert found.residuals.item() == pytest.approx(6**3 - found.scores.sum().item())
    (finer,) = score_all([IntegratedGradient(64)], KnownGame(function))["integrated_gradient"]
    assert abs(finer.residuals.item()) < 0.01 * abs(found.residuals.item())


def test_sampled_shapley_values_agree_with_exact_ones_within_their_errors():
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(64, generator=generator).double()

    def function(gates):
        return table[(gates.flatten(1) * 2 ** torch.arange(6)).sum(1).long()][:, None]

    measure = SampledShapley(pairs=400, seed=1)
    (found,) = score_all([measure], KnownGame(function))["shapley"]
    exact = shapley_values(table[:, None], 6).view(2, 3)
    deviation = (found.scores[0] - exact) / found.errors[0]
    assert deviation.abs().max() < 4
    assert 0 < found.errors.max() < 0.2
    torch.testing.assert_close(found.scores.sum(), table[63] - table[0], rtol=0, atol=1e-10)


# On detectors


@pytest.mark.parametrize("site", SITES)
def test_efficiency_holds_to_rounding_and_gradients_equal_finite_differences(small, noise, site):
    game = game_on(small, noise, site, confidence=0.2)
    assert len(game.objects) > 1
    results = score_all([resolve_measure(name) for name in EXACT if site != "x"], game)
    everything = torch.ones(1, *game.shape)
    on, off = (game(gates) for gates in (everything, 0 * everything))
    steps = torch.ones(2 * 4 * game.shape[0], *game.shape, dtype=torch.float64)
    numbers = torch.arange(len(steps) // 2)
    for sign, which in ((-1, 0), (1, 1)):
        steps[2 * numbers + which, numbers // 4, numbers % 4] += sign * 2**-10
    around = game(steps)
    for index in range(2):
        total = on[index][0] - off[index][0]
        assert total.abs().max() > 1e-3
        columns, layers = results["shapley_columns"][index], results["shapley_layers"][index]
        torch.testing.assert_close(columns.scores.sum((1, 2)), total, rtol=0, atol=1e-10)
        for layer in range(game.shape[0]):
            without = everything.clone()
            without[:, layer] = 0
            lost = on[index][0] - game(without)[index][0]
            torch.testing.assert_close(layers.scores[:, layer].sum(1), lost, rtol=0, atol=1e-10)
        # Central differences: an error of second order, and gates that float32 can represent.
        central = (around[index][1::2] - around[index][0::2]) * 2**9
        found = results["gradient"][index].scores.flatten(1).T
        torch.testing.assert_close(found, central, rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_each_ablation_kind(small, noise):
    """The derivative of g A V + (1 - g) r has r in it."""
    game = game_on(small, noise, confidence=0.2).under(
        headoff.ablation.ablation_draws("uniform", small, image=noise)
    )
    (found, _) = score_all([resolve_measure("gradient")], game)["gradient"]
    step = torch.ones(2, *game.shape, dtype=torch.float64)
    step[:, 0, 2] += torch.tensor([-(2**-10), 2**-10])
    values = game(step)[0]
    torch.testing.assert_close(found.scores[:, 0, 2], (values[1] - values[0]) * 2**9, rtol=1e-3, atol=1e-5)


def test_a_head_without_output_has_0_everywhere(detector, image):
    silent = headoff.load("scenes")
    width = silent.config.width // silent.config.heads
    for layer in silent.decoder.layers:
        layer.cross_attention.output.weight[:, 5 * width : 6 * width] = 0
    found = headoff.heads(
        silent, image, measures=(*EXACT[:4], "integrated_gradient"), values=("probability", "iou", "found"),
        ablations=("zero", "uniform"),
    )  # fmt: skip
    for key, scores in found.scores.items():
        assert scores.scores[..., 5].abs().max() < 1e-6, key
        if scores.interactions is not None:
            assert scores.interactions[..., 5, :].abs().max() < 1e-6, key
    assert found.get("shapley_columns").scores.abs().max() > 0.1


def test_copied_heads_have_equal_values_and_are_redundant(image):
    """Head 4 carries most of the evidence; here heads 4 and 6 both do half of what it does."""
    copied = headoff.load("scenes")
    width = copied.config.width // copied.config.heads
    source, copy = slice(4 * width, 5 * width), slice(6 * width, 7 * width)
    for layer in copied.decoder.layers:
        attention = layer.cross_attention
        for projection in (attention.query, attention.key, attention.value):
            projection.weight[copy], projection.bias[copy] = (
                projection.weight[source],
                projection.bias[source],
            )
        attention.output.weight[:, source] *= 0.5
        attention.output.weight[:, copy] = attention.output.weight[:, source]
    found = headoff.heads(
        copied, image, measures=("removal", "gradient", "shapley_columns"), values="probability",
        ablations="zero",
    )  # fmt: skip
    for scores in found.scores.values():
        torch.testing.assert_close(scores.scores[..., 4], scores.scores[..., 6], rtol=0, atol=1e-4)
    interactions = found.get("shapley_columns").interactions[:, 0]
    # Redundant for every object but one, for which it is near 0.
    assert interactions[:, 4, 6].median() < -0.02
    assert interactions[:, 4, 6].max() < 0.05


def test_one_batch_of_coalitions_gives_what_sweeps_give(detector, image):
    found = headoff.heads(detector, image, measures="removal", values="probability", ablations="zero")
    swept = headoff.sweep(detector, image, ["none", *headoff.single_heads()])
    survival = swept.survival().double()
    expected = (survival[:, :1] - survival[:, 1:]).unflatten(1, (6, 8))
    torch.testing.assert_close(found.get().scores, expected, rtol=0, atol=1e-5)


def test_the_memory_budget_changes_nothing_but_rounding(detector, image):
    options = {"measures": ("removal", "gradient"), "values": "probability", "ablations": "zero"}
    whole = headoff.heads(detector, image, **options)
    parts = headoff.heads(detector, image, memory_budget=2**21, **options)
    for key in whole.scores:
        torch.testing.assert_close(whole.scores[key].scores, parts.scores[key].scores, rtol=0, atol=1e-5)


def test_resampled_values_are_means_over_the_draws(detector, image):
    draws = headoff.ablation.ablation_draws("resample", detector, image=image)
    game = game_on(detector, image)
    gates = (torch.arange(8) > 3).expand(1, 6, 8)
    (mean, _) = game.under(draws)(gates)
    each = [game.under([draw])(gates)[0] for draw in draws]
    torch.testing.assert_close(mean, sum(each) / len(draws), rtol=0, atol=1e-7)
    assert len(draws) == 8
    assert torch.stack(each).std(0).max() > 1e-3


def test_an_interrupted_computation_goes_on_where_it_stopped(tmp_path, detector, image):
    options = {
        "measures": ("removal", SampledShapley(pairs=2)),
        "values": ("probability", "detections"),
        "ablations": "zero",
        "memory_budget": 2**21,
    }
    expected = headoff.heads(detector, image, **options)

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        headoff.heads(detector, image, store=tmp_path, progress=interrupt, **options)
    evaluated = []

    def count(call, proceed):
        evaluated.append(call)
        return proceed(call)

    with detector.intercepting(count):
        again = headoff.heads(detector, image, store=tmp_path, **options)
    half = len(evaluated)
    for key, scores in expected.scores.items():
        torch.testing.assert_close(again.scores[key].scores, scores.scores, rtol=0, atol=1e-6)
    with detector.intercepting(count):
        headoff.heads(detector, image, store=tmp_path, **options)
    baseline = len(evaluated) - half
    assert half > 3 * baseline  # a finished computation needs the baseline only
    with detector.intercepting(count):
        other = headoff.heads(detector, headoff.sample_image(1), store=tmp_path, **options)
    assert len(evaluated) - half - baseline > half  # nothing of another image is used
    assert other.objects.queries.tolist() != expected.objects.queries.tolist()
    (tmp_path / "zero.safetensors").write_bytes(b"damaged")
    mended = headoff.heads(detector, image, store=tmp_path, **options)
    assert torch.equal(mended.get("removal").scores, expected.get("removal").scores)


# Values


def test_values_are_what_outcomes_and_detections_say(detector, image):
    """Against the detections of a sweep, by other code."""
    configurations = ["none", "first 2", "first 3", "first 4", "L5", "only H4 on"]
    swept = headoff.sweep(detector, image, configurations)
    objects = Objects.of(swept.baseline, swept.boxes[0], swept.confidence)
    found = {
        name: resolve_value(name)(objects, swept.logits, swept.boxes)
        for name in ("probability", "logit", "iou", "found", "duplicates", "detections", "unmatched")
    }
    torch.testing.assert_close(found["probability"], swept.survival().T, rtol=0, atol=1e-5)
    for c, detections in enumerate(swept.detections):
        assert found["detections"][c].item() == len(detections)
        everything = detections_from(
            swept.logits[c], swept.boxes[c], swept.image_size, swept.class_names, 0.0
        )
        corners = corners_of(swept.boxes[c])
        for o, detection in enumerate(swept.baseline):
            ious = pairwise_iou(corners_of(objects.boxes[o : o + 1]), corners)[0]
            assert found["iou"][c, o].item() == pytest.approx(ious[detection.query].item(), abs=1e-6)
            assert found["logit"][c, o] == swept.logits[c, detection.query, detection.label]
            same = [d for d in everything if d.label == detection.label]
            best = max((d.score * ious[d.query].item() for d in same), default=0)
            assert found["found"][c, o].item() >= best - 1e-5
            also = [d for d in same if d.score > 0.5 and ious[d.query] >= 0.3]
            assert found["duplicates"][c, o].item() == max(len(also) - 1, 0)
    assert found["duplicates"].max() > 0


def test_unmatched_detections_are_in_no_objects_place(detector, image):
    """Only one of the image's objects is asked for, so that the others' detections belong to none."""
    swept = headoff.sweep(detector, image, ["none", "first 3", "L5"])
    b = swept.baseline
    first = Detections(b.queries[:1], b.labels[:1], b.scores[:1], b.boxes[:1], b.image_size, b.class_names)
    objects = Objects.of(first, swept.boxes[0], swept.confidence)
    found = resolve_value("unmatched")(objects, swept.logits, swept.boxes)[:, 0].tolist()
    for c, detections in enumerate(swept.detections):
        corners = corners_of(swept.boxes[c][detections.queries])
        ious = pairwise_iou(corners_of(objects.boxes), corners)
        alike = first.labels[:, None] == detections.labels
        unmatched = ~(((ious >= 0.3) & alike) | (ious >= 0.5)).any(0)
        assert found[c] == int(unmatched.sum())
    assert found[0] == len(b) - 1
    assert len(set(found)) > 1


def test_a_function_of_logits_and_boxes_is_a_value_of_the_image(detector, image):
    def total_width(logits, boxes):
        return boxes[:, 2].sum()

    found = headoff.heads(
        detector, image, measures=("removal", "gradient"), values=total_width, ablations="zero"
    )
    swept = headoff.sweep(detector, image, ["none", "L5H4"])
    widths = swept.boxes[:, :, 2].double().sum(1)
    assert found.get("removal").scores.shape == (1, 6, 8)
    assert found.get("removal").scores[0, 5, 4].item() == pytest.approx(
        (widths[0] - widths[1]).item(), abs=1e-4
    )
    assert found.image_values == {"total_width"}


# Curves


def test_curves_are_means_over_all_orders_and_values_along_one():
    values = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    curves = removal_curves(values, (2, 0, 1, 3), (3, 1, 0, 2))
    orders = torch.tensor(list(itertools.permutations(range(4))))
    along = torch.zeros(24, 5).double()
    for row, order in enumerate(orders.tolist()):
        for k in range(5):
            along[row, k] = values[15 - sum(1 << head for head in order[:k])]
    torch.testing.assert_close(curves.random, along.mean(0))
    for name, order in (("least_first", [2, 0, 1, 3]), ("most_first", [3, 1, 0, 2]), ("by_number", range(4))):
        index = (orders == torch.tensor(list(order))).all(1).nonzero().item()
        assert getattr(curves, name).tolist() == along[index].tolist()
    assert curves.best.tolist() == along.amax(0).tolist()
    assert curves.worst.tolist() == along.amin(0).tolist()
    for k, subset in enumerate(curves.best_subsets):
        assert len(subset) == k
        assert values[15 - sum(1 << head for head in subset)] == curves.best[k]
    assert ((curves.low >= curves.worst) & (curves.high <= curves.best) & (curves.low <= curves.random)).all()


def test_curves_of_the_numbered_order_are_the_cumulative_sweep(detector, image):
    found = headoff.heads(detector, image, measures="shapley_columns", values="probability", ablations="zero")
    swept = headoff.sweep(detector, image)
    expected = swept.survival().double().mean(0)
    curves = found.curves()
    torch.testing.assert_close(curves.by_number, expected, rtol=0, atol=1e-5)
    assert curves.least_first.sum() > curves.random.sum() > curves.most_first.sum()


# Results


def test_results_without_objects_are_empty(detector, image):
    found = headoff.heads(
        detector, image, measures="removal", values=("probability", "detections"), ablations="zero",
        confidence=1.0,
    )  # fmt: skip
    assert found.get("removal", "probability").scores.shape == (0, 6, 8)
    assert found.get("removal", "detections").scores.shape == (1, 6, 8)
    assert not found.mean_scores("removal", "probability").any()


def test_rows_orders_and_files_hold_the_scores(tmp_path, detector, image):
    found = headoff.heads(
        detector, image, measures=("removal", "shapley_columns"), values=("probability", "detections"),
        ablations="zero",
    )  # fmt: skip
    rows = list(found.rows("a.png"))
    objects = len(found.objects)
    assert len(rows) == (objects + 1) * (48 + 8)
    row = next(r for r in rows if (r["object"], r["layer"], r["head"]) == (1, 5, 3))
    assert row["score"] == found.get("removal", "probability").scores[1, 5, 3].item()
    assert {r["layer"] for r in rows if r["measure"] == "shapley_columns"} == {"all"}
    least = found.order(measure="shapley_columns")
    means = found.mean_scores("shapley_columns")[0]
    assert means[list(least)].tolist() == sorted(means.tolist())
    assert len(found.order(measure="removal", most_important_first=True)) == 6
    from safetensors.torch import load_file

    tensors = load_file(found.save(tmp_path / "heads.safetensors"))
    key = "zero/shapley_columns/probability/interactions"
    assert torch.equal(tensors[key], found.get("shapley_columns").interactions)
    assert found.as_dict()["scores"][0]["scores"] == found.get("removal", "probability").scores.tolist()


def test_errors_name_the_culprit_and_the_remedy(detector, image):
    def inference_only(query, key, value, attn_mask=None, *, head_gate=None):
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask)

    for options, message in [
        ({"measures": "removel"}, "did you mean 'removal'"),
        ({"values": "probabilty"}, "did you mean 'probability'"),
        ({"ablations": "men"}, "did you mean 'mean'"),
        ({"measures": ()}, "no measure to score"),
        ({"values": ()}, "no value to score"),
        ({"ablations": ()}, "no ablation kind to score"),
        ({"measures": ("removal", "removal")}, "named 2 times"),
        ({"measures": "gradient", "values": "iou"}, "needs a derivative"),
        ({"measures": "gradient", "values": "duplicates"}, "needs a derivative"),
        ({"site": "decoder"}, "decoder"),
        ({"values": lambda logits, boxes: boxes, "measures": "removal"}, "must be one number"),
        ({"confidence": 2}, "not a probability"),
    ]:
        with pytest.raises(headoff.HeadoffError, match=message):
            headoff.heads(detector, image, **options)
    with pytest.raises(SettingError, match="standard errors"):
        SampledShapley(pairs=1)
    with pytest.raises(SettingError, match="too many"):
        resolve_measure("shapley_layers").coalitions(6, 16)
    found = headoff.heads(detector, image, measures="removal", values="iou", ablations="zero")
    with pytest.raises(SettingError, match="there are no scores"):
        found.get("removal", "logit")
    with pytest.raises(SettingError, match=".safetensors"):
        found.save("heads.npz")
    patched = headoff.load("scenes", attention=inference_only)
    with pytest.raises(AttentionError, match="no backward pass"):
        headoff.heads(patched, image, measures="gradient", values="probability", ablations="zero")
    assert all_coalitions(2).tolist() == [[False, False], [True, False], [False, True], [True, True]]
