"""Faithfulness of relevance maps: curves, controls, statistics, the store, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from relevance_examples import CONFIG, tiny_detector

import headoff
from headoff.cli import main
from headoff.detections import Detections
from headoff.detector import DetectorOutput
from headoff.detr import Detr
from headoff.detr.detector import Features, Memory
from headoff.errors import ImageError, SettingError
from headoff.faithfulness import (
    ExplainedImage,
    Measure,
    Perturbation,
    Quantity,
    Scores,
    Truth,
    faithfulness,
    known_methods,
    measure_names,
    resolve_measure,
)
from headoff.faithfulness.controls import CONTROLS as CONTROL_MAPS
from headoff.faithfulness.perturbation import (
    PIXEL_FILLS,
    TOKEN_FILLS,
    PixelPerturber,
    TokenPerturber,
    blurred,
    counts_of_cells,
    kept_cells,
    order_of_cells,
)
from headoff.faithfulness.sources import sources_of
from headoff.faithfulness.statistics import compare, estimates, holm, sign_flip_p
from headoff.faithfulness.truth import Annotations, truth_of_scene
from headoff.figures.faithfulness import faithfulness_figures
from headoff.relevance import d_rise, method_names, register_method, resolve_method
from headoff.relevance.token_grid import TokenGrid
from headoff.totals import bootstrap_interval

GRID = (4, 6)
CELL = 16


class PlantedDetector(Detr):
    """A detector of one object, whose class logit is the sum of the weights of the cells that are bright."""

    def __init__(self) -> None:
        super().__init__(replace(CONFIG, classes=2, queries=3))
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.rand(GRID, generator=generator).double() ** 3
        self.weights *= 12 / self.weights.sum()
        self.double().eval().requires_grad_(False)

    def stride(self, features) -> int:
        return CELL

    def features(self, pixel_values, pixel_mask=None) -> Features:
        bright = torch.nn.functional.avg_pool2d(pixel_values, CELL).mean(1).flatten(1)
        white = float(self.preprocess([picture()])[0].mean())
        tokens = torch.zeros(*bright.shape, self.config.width, dtype=self.dtype)
        tokens[..., 0] = bright / white * self.weights.flatten()
        return Features(tokens, torch.zeros_like(tokens), None, GRID)

    def encode_features(self, features, gate=None) -> Memory:
        return Memory(features.tokens, features.positions, features.attn_mask, features.grid)

    def decode(self, memory, gates=None) -> DetectorOutput:
        tokens = memory.tokens[..., 0]
        if memory.attn_mask is not None:
            tokens = tokens * memory.attn_mask[:, 0, 0]
        logits = torch.zeros(1, len(tokens), 3, 3, dtype=self.dtype)
        logits[..., 2] = 4.0
        logits[0, :, 1, 0] = tokens.sum(-1)
        boxes = torch.full((1, len(tokens), 3, 4), 0.5, dtype=self.dtype)
        return DetectorOutput(logits, boxes)


def picture() -> Image.Image:
    height, width = 64, 96
    return Image.new("RGB", (width, height), "white")


def planted(**options) -> ExplainedImage:
    image = ExplainedImage.of(PlantedDetector(), picture(), **options)
    assert len(image) == 1 and image.grid.shape == GRID
    weights = image.detector.weights[None]
    generator = image.generator("test")
    image._maps.update(
        true=weights,
        reversed=-weights,
        coarse=weights.round(),
        random=torch.rand(weights.shape, generator=generator, dtype=torch.float64),
    )
    return image


MEASURES = [
    *(("tokens", fill) for fill in ("removed", "zero")),
    *(("pixels", fill) for fill in ("grey",)),
]


@pytest.mark.parametrize(("place", "fill"), MEASURES)
def test_the_true_map_is_the_best_and_the_reversed_map_the_worst(place, fill):
    image = planted()
    found = Perturbation(place, fill).scores(image, ["true", "coarse", "random", "reversed"])
    deletion, insertion, deletion_found, insertion_found = torch.stack(
        [one.values[0] for one in found.values()]
    ).unbind(-1)
    assert deletion.argsort().tolist() == [0, 1, 2, 3]
    assert insertion.argsort(descending=True).tolist() == [0, 1, 2, 3]
    # There is one query with one box.
    torch.testing.assert_close(deletion_found, deletion)
    torch.testing.assert_close(insertion_found, insertion)


def test_curves_are_what_the_planted_weights_say():
    image = planted()
    found = Perturbation("tokens", "removed", steps=24, spacing="even").scores(image, ["true"])["true"]
    falling = image.detector.weights.flatten().sort(descending=True).values
    for curve, kept in (
        (found.curves[0, 0], falling.sum() - torch.cat((torch.zeros(1), falling.cumsum(0)))),
        (found.curves[0, 1], torch.cat((torch.zeros(1), falling.cumsum(0)))),
    ):
        expected = kept.exp() / (kept.exp() + 1 + np.exp(4))
        torch.testing.assert_close(curve, expected, rtol=1e-9, atol=1e-12)
    assert found.values[0, 0].item() == pytest.approx(np.trapezoid(found.curves[0, 0], dx=1 / 24))


def test_pixels_filled_with_their_surroundings_are_those_that_were_there():
    """The image has one colour, so nothing is taken away; until nothing is left, which is grey."""
    image = planted()
    kept = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) < 0.3
    kept[-1] = False
    found = PixelPerturber(image, "surroundings")(kept)[:, 0, 0]
    whole = image.values(["none"])[0, 0]
    torch.testing.assert_close(found[:-1], whole.expand(4))
    assert found[-1] < 0.1
    torch.testing.assert_close(PixelPerturber(image, "blur")(kept)[:, 0, 0], whole.expand(5))


def test_blurring_keeps_the_mean_and_spreads_a_point_as_a_gaussian():
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    spread = blurred(point, 3.0)[0, 0]
    assert spread.sum().item() == pytest.approx(1)
    offsets = torch.arange(41).double() - 20
    assert (spread.sum(0) * offsets**2).sum().item() == pytest.approx(9, rel=0.03)
    torch.testing.assert_close(spread, spread.T)


def test_insertion_is_deletion_in_the_reversed_order_from_right_to_left():
    image = small()
    image._maps["reversed"] = -image.maps("chefer")
    found = Perturbation("tokens", "removed", steps=5, spacing="even").scores(image, ["chefer", "reversed"])
    insertion, deletion = found["chefer"].curves[:, 1::2], found["reversed"].curves[:, ::2]
    torch.testing.assert_close(insertion, deletion.flip(-1), rtol=1e-9, atol=1e-12)


def test_positive_and_negative_perturbation_by_hand():
    """As in Chefer et al.: mask the most, or the least, relevant tokens, one image at a time, and sum the areas."""
    image = small()
    measure = Perturbation("tokens", "zero", steps=4, spacing="even")
    found = measure.scores(image, ["chefer"])["chefer"]
    features, cells = image.features, image.features.tokens.shape[1]
    for index, detection in enumerate(image.objects.detections):
        order = image.maps("chefer")[index].flatten().argsort(descending=True, stable=True)
        positive, negative = [], []
        for step in range(5):
            count = round(step * cells / 4)
            for values, masked in ((positive, order[:count]), (negative, order[cells - count :])):
                tokens = features.tokens.clone()
                tokens[:, masked] = 0
                memory = image.detector.encode_features(replace(features, tokens=tokens))
                logits = image.detector.decode(memory).logits[0, 0]
                values.append(float(logits.softmax(-1)[detection.query, detection.label]))
        assert found.values[index, 0].item() == pytest.approx(np.trapezoid(positive, dx=1 / 4), rel=1e-6)
        assert found.values[index, 1].item() == pytest.approx(np.trapezoid(negative, dx=1 / 4), rel=1e-6)


def small(configuration="none", **options) -> ExplainedImage:
    """A random float64 detector on random pixels."""
    detector = tiny_detector(dtype=torch.float64)
    pixels = np.random.default_rng(3).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    image = ExplainedImage.of(detector, pixels, configuration, confidence=0.2, **options)
    assert len(image) >= 2
    return image


@pytest.mark.parametrize("configuration", ["none", "first 2", "encoder_self H1"])
def test_removed_tokens_are_those_that_a_padding_mask_hides(configuration):
    image = small(configuration)
    kept = torch.rand(9, image.features.tokens.shape[1], generator=torch.Generator().manual_seed(0)) < 0.6
    kept[0], kept[1] = True, False
    found = TokenPerturber(image, "removed")(kept)
    for row, expected in zip(found, kept, strict=True):
        features = replace(image.features, attn_mask=expected[None, None, None])
        gate = image.gates.encoder_self
        memory = image.detector.encode_features(features, None if gate is None else gate[0])
        decoder_gates = replace(image.gates, encoder_self=None)
        output = image.detector.decode(memory, decoder_gates)
        for at, value in enumerate(("probability", "found")):
            truth = image.value(output.logits[:, 0], output.boxes[:, 0], value)[0]
            torch.testing.assert_close(row[:, at], truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0, :, 0], image.values([image.configuration])[0])


@pytest.mark.parametrize(
    ("place", "fill"), [*product(["tokens"], TOKEN_FILLS), *product(["pixels"], PIXEL_FILLS)]
)
def test_batches_do_not_change_numbers(place, fill):
    measure = Perturbation(place, fill, steps=4)
    one, many = (
        measure.scores(small("H1", memory_budget=budget), ["chefer", "random"]) for budget in (1, 2**30)
    )
    for method in one:
        torch.testing.assert_close(one[method].values, many[method].values, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one[method].curves, many[method].curves, rtol=1e-9, atol=1e-12)


def test_ties_are_broken_at_random_in_the_same_way_for_all_maps():
    maps = torch.tensor([[1.0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 0]])
    first, second = order_of_cells(maps, torch.Generator().manual_seed(0))
    assert first[:2].tolist() == [5, 0]
    assert [cell for cell in second.tolist() if cell not in (0, 5)] == first[2:].tolist()
    other = order_of_cells(maps, torch.Generator().manual_seed(1))[1]
    assert sorted(other.tolist()) == list(range(6)) and other.tolist() != second.tolist()


def test_steps_change_one_cell_more_at_least():
    points = Perturbation("tokens", "removed").points
    counts = counts_of_cells(points, 144)
    assert counts[0] == 0 and counts[-1] == 144 and bool((counts.diff() > 0).all())
    assert (counts[5:] / 144 - points[5:]).abs().max() <= 0.5 / 144
    assert counts_of_cells(points, 6).tolist() == [0, 1, 2, 3, 4, 5, *[6] * 15]
    kept = kept_cells(torch.tensor([2, 0, 1]), torch.tensor([0, 1, 3]))
    assert kept[0].int().tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert kept[1].int().tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 1]]


def test_random_numbers_depend_on_seed_image_and_purpose_only():
    image, other = small(), small(seed=1)
    draw = lambda of, *words: torch.rand(3, generator=of.generator(*words)).tolist()  # noqa: E731
    assert draw(image, "a") == draw(small(), "a")
    assert len({tuple(draw(*of)) for of in ((image, "a"), (image, "b"), (other, "a"))}) == 3


def test_controls():
    image = small()
    grid = image.grid
    assert image.maps("random").equal(small().maps("random"))
    assert not image.maps("random").equal(small(seed=1).maps("random"))
    assert image.maps("edges")[0].equal(image.maps("edges")[1])
    boxes = image.maps("box")
    rows, columns = grid.middles
    left, top, right, bottom = image.objects.detections[0].box
    peak = int(boxes[0].argmax())
    y, x = rows[peak // grid.shape[1]], columns[peak % grid.shape[1]]
    assert abs(float(y) - (top + bottom) / 2) <= grid.stride
    assert abs(float(x) - (left + right) / 2) <= grid.stride
    assert set(known_methods()) == {*headoff.relevance.method_names(), "random", "box", "edges"}


def test_means_over_cells_are_those_of_the_pixels_in_them():
    grid = TokenGrid((2, 3), 32, (60, 80), (90, 120))  # the last row and column exceed the image
    pixels = torch.rand(90, 120, generator=torch.Generator().manual_seed(0))
    rows, columns = ([round(edge) for edge in edges.tolist()] for edges in grid.edges)
    assert rows == [0, 48, 90] and columns == [0, 48, 96, 120]
    found = grid.mean_over_cells(pixels)
    for row, column in product(range(2), range(3)):
        cell = pixels[rows[row] : rows[row + 1], columns[column] : columns[column + 1]]
        assert found[row, column].item() == pytest.approx(cell.mean().item(), rel=1e-6)
    box = torch.tensor([10.0, 20.0, 100.0, 50.0])
    mask = torch.zeros(90, 120)
    mask[20:50, 10:100] = 1
    torch.testing.assert_close(grid.mean_over_cells(mask), grid.cover(box))


def test_detections_are_matched_with_true_objects():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 10, 10]])
    found = Detections(
        torch.arange(4),
        torch.tensor([1, 1, 1, 0]),
        torch.tensor([0.9, 0.8, 0.7, 0.6]),
        boxes,
        (99, 99),
        ("a", "b"),
    )
    truth = Truth(torch.tensor([[0.0, 0, 10, 10], [50, 50, 70, 70]]), torch.tensor([1, 1]))
    assert truth.match(found).tolist() == [0, -1, -1, -1]
    assert Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).match(found).tolist() == [-1] * 4


def test_masks_of_scenes_are_visible_pixels():
    truth = truth_of_scene(0, 96)
    assert truth.masks.sum(0).max() == 1  # a pixel is of one object
    for mask, (left, top, right, bottom) in zip(truth.masks, truth.boxes.tolist(), strict=True):
        rows, columns = mask.nonzero().unbind(1)
        assert left - 1 <= columns.min() and columns.max() <= right
        assert top - 1 <= rows.min() and rows.max() <= bottom


class Number(Measure):
    """Given numbers for each method."""

    name = "number"
    summary = "a number"
    quantities = (Quantity("number", "a number", "higher", "unit"),)

    def scores(self, image, methods):
        return {method: Scores(torch.full((len(image), 1), len(method)).double()) for method in methods}


def of_images(values) -> list[Scores]:
    return [Scores(torch.tensor(one, dtype=torch.float64).reshape(-1, 1)) for one in values]


def test_means_are_over_images_of_means_over_objects():
    (found,) = estimates(Number(), of_images([[1.0, 3.0], [4.0], [float("nan")], [8.0, float("nan")]]))
    assert found.value == pytest.approx((2 + 4 + 8) / 3)
    assert (found.images, found.objects) == (3, 4)
    (one,) = estimates(Number(), of_images([[1.0]]))
    assert one.value == 1 and np.isnan(one.low)
    numbers = np.random.default_rng(0).normal(size=50)
    (many,) = estimates(Number(), of_images([[x] for x in numbers]))
    low, high = bootstrap_interval(numbers[:, None], np.ones(50))
    assert (many.low, many.high) == pytest.approx((low[0], high[0]))


def test_sign_flips_are_the_permutation_test_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    gaps = np.random.default_rng(0).normal(0.4, 1, size=(2, 10))
    expected = [
        stats.permutation_test((row,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        for row in gaps
    ]
    assert sign_flip_p(gaps).tolist() == pytest.approx(expected)
    many = np.random.default_rng(1).normal(0.15, 1, size=(1, 200))
    expected = stats.permutation_test(
        (many[0],), np.mean, permutation_type="samples", n_resamples=9999
    ).pvalue
    assert sign_flip_p(many)[0] == pytest.approx(expected, abs=0.02)
    assert np.isnan(sign_flip_p(np.array([[1.0, np.nan]]))[0])


def test_holm():
    corrected = holm(np.array([0.01, 0.04, np.nan, 0.03, 0.005]))
    assert corrected[[4, 0, 3, 1]].tolist() == pytest.approx([0.02, 0.03, 0.06, 0.06])
    assert np.isnan(corrected[2])


def test_pairs_are_compared_on_the_images_that_both_have():
    by_method = {
        "a": dict(enumerate(of_images([[x] for x in range(20)]))),
        "b": dict(enumerate(of_images([[x + 1.0] for x in range(10)]))),
    }
    found = compare(Number(), by_method, 0)
    assert found.difference[0, 1] == -1 and found.difference[1, 0] == 1
    assert found.p[0, 1] == pytest.approx(2 / 2**10)

    class Pooled(Number):
        is_mean = False

    found = compare(Pooled(), by_method, 0)
    assert found.difference[0, 1] == -1 and found.p[0, 1] < 1e-6


OPTIONS = {"methods": ["raw", "random"], "measures": Perturbation("tokens", "removed", steps=4)}


@pytest.fixture(scope="module")
def detector():
    return headoff.load("scenes")


@pytest.fixture(scope="module")
def uninterrupted(detector):
    return faithfulness(detector, "scenes:3:7", **OPTIONS)


def assert_equal(found, other):
    assert [record.name for record in found.records] == [record.name for record in other.records]
    for one, two in zip(found.records, other.records, strict=True):
        assert one.objects == two.objects and one.scores.keys() == two.scores.keys()
        for key in one.scores:
            assert one.scores[key].values.equal(two.scores[key].values)
            assert one.scores[key].curves.equal(two.scores[key].curves)


def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(detector, uninterrupted, tmp_path, monkeypatch):
    def interrupt(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        faithfulness(detector, "scenes:3:7", store=tmp_path, progress=interrupt, **OPTIONS)
    assert len(list(tmp_path.iterdir())) == 2
    assert_equal(faithfulness(detector, "scenes:3:7", store=tmp_path, **OPTIONS), uninterrupted)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    # One file that is damaged, and one that is cut off, are computed again.
    contents = bytearray(files[0].read_bytes())
    contents[-1] ^= 1
    files[0].write_bytes(bytes(contents))
    files[1].write_bytes(files[1].read_bytes()[:100])
    assert_equal(faithfulness(detector, "scenes:3:7", store=tmp_path, **OPTIONS), uninterrupted)
    # Now everything is there, and nothing is computed.
    monkeypatch.setattr(ExplainedImage, "of", None)
    assert_equal(faithfulness(detector, "scenes:3:7", store=tmp_path, **OPTIONS), uninterrupted)


def test_the_store_knows_methods_by_their_settings(detector, tmp_path):
    """A method that is registered again under its name, with other settings, is another method."""
    original = resolve_method("d_rise")

    def found(method):
        register_method(method)
        try:
            return faithfulness(
                detector,
                "scenes:1:7",
                "d_rise",
                "detected_box",
                store=tmp_path,
            )
        finally:
            register_method(original)

    few, others = d_rise(6, seed=1), d_rise(6, seed=2)
    first, second = found(few), found(others)
    scores = [one.records[0].scores["d_rise", "detected_box"].values for one in (first, second)]
    assert not scores[0].equal(scores[1])
    assert first.records[0].seconds and second.records[0].seconds
    again = found(d_rise(6, seed=1))
    assert not again.records[0].seconds  # nothing was computed
    assert again.records[0].scores["d_rise", "detected_box"].values.equal(scores[0])


def test_settings_of_methods_are_the_same_in_another_process():
    """They are keys of files. An address in them would never be found again."""
    for name in method_names():
        assert " at 0x" not in json.dumps(resolve_method(name).settings), name


def test_a_method_on_fewer_images_is_not_ranked(uninterrupted):
    """One image on which it happens to do well proves nothing, and does not make all the others equal to it."""
    measure, better = "tokens_removed", "raw"
    records = tuple(
        replace(
            record,
            scores={
                **{key: one for key, one in record.scores.items() if key[0] != better or index == 0},
            },
        )
        for index, record in enumerate(uninterrupted.records)
    )
    found = replace(uninterrupted, records=records)
    assert uninterrupted.ranking(measure)[0] == better  # of all images
    assert found.ranked(measure) == found.ranking(measure) == found.best(measure) == ("random",)
    rows = {row[0]: row for _, _, rows in found.tables() for row in rows}
    assert rows[better][-1].endswith("not ranked") and "**" not in "".join(rows[better])
    assert "**" in "".join(rows["random"]) and "not ranked" not in rows["random"][-1]
    for _, figure in faithfulness_figures(found):  # every curve is in the legend all the same
        names = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        assert not names or any(better in name for name in names)


def test_the_order_of_images_does_not_matter(detector, uninterrupted):
    found = faithfulness(detector, ["scenes:1:9", "scenes:1:8", "scenes:1:7"], **OPTIONS)
    assert_equal(replace(found, records=found.records[::-1]), uninterrupted)


def test_workers_find_the_same(detector, uninterrupted):
    found = faithfulness(detector, "scenes:1:7", workers=2, **OPTIONS)
    for one, two in zip(found.records, uninterrupted.records, strict=False):
        for key in one.scores:  # one thread may round differently from several
            torch.testing.assert_close(one.scores[key].values, two.scores[key].values, rtol=0, atol=1e-5)
            # A shared tensor keeps a file open, and thousands of images have more tensors than files may be open.
            assert not one.scores[key].values.is_shared()


def test_the_result(detector, uninterrupted):
    assert uninterrupted.ranking("tokens_removed")[0] == "raw"
    assert set(uninterrupted.best("tokens_removed")) == {"raw", "random"}  # 3 images prove nothing
    rows = list(uninterrupted.rows())
    assert len(rows) == uninterrupted.objects * 2 * 4
    assert list(uninterrupted.to_dataframe()["value"]) == [row["value"] for row in rows]
    contents = json.loads(json.dumps(uninterrupted.as_dict(), allow_nan=False))
    (measure,) = contents["measures"]
    assert measure["settings"] == {"steps": 4, "spacing": "quadratic"}
    assert measure["quantities"][0]["estimates"]["raw"]["images"] == 3
    curve = uninterrupted.curve("raw", "tokens_removed", "insertion")
    assert curve.mean[0] < 0.1 < curve.mean[-1] and bool((curve.low <= curve.high).all())
    assert "| raw " in uninterrupted.table() and "Faithfulness: 2 methods" in repr(uninterrupted)
    limited = faithfulness(detector, "scenes:3:7", most={"raw": 1}, **OPTIONS)
    assert limited.estimate("raw", "tokens_removed").images == 1
    some = faithfulness(detector, "scenes:1:7", most={"raw/tokens_removed": 0}, **OPTIONS)
    assert list(some.records[0].scores) == [("random", "tokens_removed")]
    assert limited.estimate("random", "tokens_removed") == uninterrupted.estimate("random", "tokens_removed")


def test_images_without_objects_and_without_truth(detector, tmp_path):
    class NeedsBoxes(Number):
        name = "boxes"
        needs = "boxes"

    blank = np.full((192, 192, 3), 128, dtype=np.uint8)
    found = faithfulness(detector, [blank, "scenes:1:7"], ["raw"], [NeedsBoxes(), Number()], store=tmp_path)
    assert not found.records[0].objects and found.records[1].objects
    assert found.estimate("raw", "number").images == 1


def test_annotations_tell_the_true_objects(detector, tmp_path):
    from headoff.scenes.samples import write_scenes

    paths = write_scenes(tmp_path, [7, 8], 192)
    found = sources_of([*paths, picture()], detector, tmp_path / "annotations.json")
    assert [source.knows for source in found] == ["boxes", "boxes", ""]
    for source, seed in zip(found, (7, 8), strict=False):
        truth, exact = source.load()[1], truth_of_scene(seed, 192)
        torch.testing.assert_close(truth.boxes, exact.boxes, rtol=0, atol=2e-3)
        assert truth.labels.equal(exact.labels) and truth.masks is None


def test_masks_of_annotations_are_filled_polygons(tmp_path):
    square = {"bbox": [2, 3, 4, 5], "segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]]}
    contents = {
        "images": [{"id": 1, "file_name": "a/b.png", "width": 10, "height": 12}],
        "categories": [{"id": 9, "name": "star"}],
        "annotations": [
            {**square, "image_id": 1, "category_id": 9},
            {**square, "image_id": 1, "category_id": 9, "iscrowd": 1},
        ],
    }
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(contents))
    known = Annotations(file, ("circle", "star"))
    truth = known.of(tmp_path / "b.png")
    assert truth.boxes.tolist() == [[2, 3, 6, 8]] and truth.labels.tolist() == [1]
    expected = torch.zeros(1, 12, 10, dtype=torch.bool)
    expected[0, 3:8, 2:6] = True
    assert truth.masks.equal(expected)
    assert known.of(tmp_path / "c.png") is None
    with pytest.raises(SettingError, match="no object of a class that the detector knows"):
        Annotations(file, ("circle",))


def test_errors(detector, tmp_path):
    for message, images, options in (
        ("no relevance method or control 'cheffer'", "scenes:1", {"methods": "cheffer"}),
        ("not all different", "scenes:1", {"methods": ["raw", "raw"]}),
        ("no measure of faithfulness 'tokens_remove'", "scenes:1", {"measures": "tokens_remove"}),
        ("'scenes:x' names no scenes", "scenes:x", {}),
        ("no images", [], {}),
        ("'raww'.*is neither a method", "scenes:1", {"most": {"raww": 2}}),
        ("cannot get 0 images", "scenes:1", {"most": {"raw": 0}}),
        ("0 workers", "scenes:1", {"workers": 0}),
        ("cannot be read as annotations", "scenes:1", {"annotations": tmp_path / "none.json"}),
    ):
        with pytest.raises(SettingError, match=message):
            faithfulness(detector, images, **{"methods": "raw", **options})
    with pytest.raises(ImageError, match="no file"):
        faithfulness(detector, tmp_path / "none.png", "raw")
    with pytest.raises(SettingError, match="cannot be filled"):
        Perturbation("tokens", "grey")
    with pytest.raises(SettingError, match="1 steps"):
        Perturbation("tokens", "removed", steps=1)
    with pytest.raises(SettingError, match="ranks nothing"):
        Neither = type("Neither", (Number,), {"quantities": (Quantity("n", "n", "neither", ""),)})
        faithfulness(detector, "scenes:1:7", "raw", Neither()).ranking("number")
    with pytest.raises(SettingError, match="suit only a detector trained on scenes"):
        faithfulness(tiny_detector(), "scenes:1", "raw")


def test_every_measure_has_a_name_and_quantities():
    from headoff.choices import CONTROLS, DEFAULT_FAITHFULNESS, FAITHFULNESS_MEASURES

    assert measure_names() == FAITHFULNESS_MEASURES
    assert set(DEFAULT_FAITHFULNESS) <= set(FAITHFULNESS_MEASURES)
    assert CONTROLS == tuple(CONTROL_MAPS)
    for name in measure_names():
        measure = resolve_measure(name)
        assert measure.name == name and measure.quantities
        assert json.dumps(measure.settings)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["faithfulness", "scenes:2:7", "--method", "raw,random", "--out", str(out)]
    command += ["--measure", "tokens_removed", "--steps", "4"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| raw " in printed and "an image took" in printed
    files = {path.name for path in out.iterdir()}
    assert files == {
        *("faithfulness.json", "index.html", "objects.csv", "table.md", "images", "maps.png"),
        *("curves-tokens-removed.png", "methods-tokens-removed.png"),
    }
    contents = json.loads((out / "faithfulness.json").read_text())
    assert contents["provenance"]["images"] == "2"
    assert (out / "objects.csv").read_text().count("\n") == contents["objects"] * 2 * 4 + 1
    before = (out / "table.md").read_text()
    assert main([*command, "--figures", "none"]) == 0
    assert "an image took" not in capsys.readouterr().out
    assert (out / "table.md").read_text() == before and not (out / "index.html").exists()
    assert main([*command, "--method", "random", "--estimate"]) == 0
    assert "2 images: about " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "cheffer"], "did you mean 'chefer'"),
        (["--measure", "tokens"], "no measure of faithfulness"),
        (["--most", "raw"], "NAME=N"),
        (["--off", "first 99"], "first 99"),
        (["nowhere.png"], "nowhere.png"),
        (["--steps", "1"], "1 steps"),
        (["--annotations", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, message, tmp_path, capsys):
    assert main(["faithfulness", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "out" / "faithfulness.json").exists()
