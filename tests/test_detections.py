import json
import math

import numpy as np
import pytest
import torch

from headoff.boxes import corners_of, pairwise_iou
from headoff.detections import Detection, Detections, detections_from
from headoff.errors import HeadoffError, NonFiniteError, SettingError

NAMES = ("N/A", "person", "horse")


def output(queries=12, classes=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(queries, classes + 1, generator=generator) * 3
    boxes = torch.rand(queries, 4, generator=generator)
    return logits.to(dtype), boxes.to(dtype)


def by_hand(logits, boxes, height, width, confidence):
    """(query, label, score, box) of each detection, in plain numpy."""
    logits, boxes = logits.double().numpy(), boxes.double().numpy()
    rows = []
    for query, (row, (x, y, w, h)) in enumerate(zip(logits, boxes, strict=True)):
        exponentials = np.exp(row - row.max())
        probabilities = exponentials[:-1] / exponentials.sum()
        label = int(probabilities.argmax())
        if probabilities[label] > confidence:
            box = [
                min(max((x - w / 2) * width, 0), width),
                min(max((y - h / 2) * height, 0), height),
                min(max((x + w / 2) * width, 0), width),
                min(max((y + h / 2) * height, 0), height),
            ]
            rows.append((query, label, probabilities[label], box))
    return sorted(rows, key=lambda row: (-row[2], row[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("confidence", [0.0, 0.3, 0.5, 0.9])
def test_agrees_with_plain_numpy(dtype, confidence):
    logits, boxes = output(dtype=dtype)
    found = detections_from(logits, boxes, (300, 500), NAMES, confidence)
    expected = by_hand(logits, boxes, 300, 500, confidence)
    assert found.queries.tolist() == [row[0] for row in expected]
    assert found.labels.tolist() == [row[1] for row in expected]
    assert found.scores.tolist() == pytest.approx([row[2] for row in expected], rel=1e-6)
    for box, row in zip(found.boxes.tolist(), expected, strict=True):
        assert box == pytest.approx(row[3], abs=1e-4)
    assert (found.queries.dtype, found.labels.dtype) == (torch.int64, torch.int64)
    assert (found.scores.dtype, found.boxes.dtype) == (torch.float32, torch.float32)


def test_no_object_is_never_a_detection():
    logits = torch.tensor([[0.0, 1.0, 0.0, 9.0]])
    assert len(detections_from(logits, torch.full((1, 4), 0.5), (10, 10), NAMES, 0.5)) == 0
    everything = detections_from(logits, torch.full((1, 4), 0.5), (10, 10), NAMES, 0.0)
    assert everything.labels.tolist() == [1]


def test_confidence_is_exclusive_and_its_ends_are_legal():
    logits = torch.tensor([[0.0, 0.0, -1e4, -1e4]])  # two classes at exactly 0.5
    boxes = torch.full((1, 4), 0.5)
    assert len(detections_from(logits, boxes, (10, 10), NAMES, 0.5)) == 0
    assert len(detections_from(logits, boxes, (10, 10), NAMES, 0.499)) == 1
    certain = torch.tensor([[0.0, 1e4, 0.0, 0.0]])
    assert len(detections_from(certain, boxes, (10, 10), NAMES, 1)) == 0


def test_equal_scores_are_sorted_by_query():
    logits = torch.zeros(40, 4)
    logits[:, 1] = 5
    logits[7, 1] = 6
    found = detections_from(logits, torch.full((40, 4), 0.5), (10, 10), NAMES)
    assert found.queries.tolist() == [7, *range(7), *range(8, 40)]


def test_boxes_are_clipped_to_the_image():
    boxes = torch.tensor(
        [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 2.0, 2.0], [1.0, 0.5, 0.0, 1.0]]
    )
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0]]).expand(4, 4)
    found = detections_from(logits, boxes, (30, 50), NAMES)
    assert found.boxes.tolist() == [[0, 0, 25, 15], [25, 15, 50, 30], [0, 0, 50, 30], [50, 0, 50, 30]]


def test_huge_logits_do_not_overflow_in_half_precision():
    logits = torch.tensor([[0.0, 60000.0, 59000.0, -60000.0]], dtype=torch.float16)
    found = detections_from(logits, torch.full((1, 4), 0.5, dtype=torch.float16), (10, 10), NAMES)
    assert found.scores.tolist() == [1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_with_its_first_query(bad):
    logits, boxes = output()
    logits[5, 2] = logits[9, 0] = bad
    with pytest.raises(NonFiniteError, match="logits of query 5, the first of 2"):
        detections_from(logits, boxes, (10, 10), NAMES)
    logits, boxes = output()
    boxes[3, 1] = bad
    with pytest.raises(NonFiniteError, match="box of query 3"):
        detections_from(logits, boxes, (10, 10), NAMES)


@pytest.mark.parametrize("confidence", [-0.1, 1.1, math.nan, math.inf])
def test_impossible_confidence_is_rejected(confidence):
    logits, boxes = output()
    with pytest.raises(SettingError, match="confidence") as caught:
        detections_from(logits, boxes, (10, 10), NAMES, confidence)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, HeadoffError)


def test_shapes_that_do_not_fit_are_rejected():
    logits, boxes = output()
    with pytest.raises(SettingError, match="4 class names"):
        detections_from(logits, boxes, (10, 10), (*NAMES, "dog"))
    with pytest.raises(SettingError, match="12 queries"):
        detections_from(logits, boxes[:5], (10, 10), NAMES)
    with pytest.raises(SettingError, match="logits of shape"):
        detections_from(logits[None], boxes[None], (10, 10), NAMES)
    with pytest.raises(SettingError, match="empty"):
        detections_from(logits, boxes, (0, 10), NAMES)
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(SettingError, match="boxes of 1 detections"):
        Detections(one, one, torch.ones(1), torch.ones(4), (10, 10), NAMES)
    with pytest.raises(SettingError, match="same query"):
        Detections(one.repeat(2), one.repeat(2), torch.ones(2), torch.ones(2, 4), (10, 10), NAMES)


def test_items_queries_and_dictionaries_tell_the_same():
    logits, boxes = output()
    found = detections_from(logits, boxes, (300, 500), NAMES, 0.3)
    items = list(found)
    assert len(items) == len(found) > 2
    assert items[1] == found[1] == found.of_query(items[1].query)
    assert isinstance(items[0], Detection) and items[0].class_name == NAMES[items[0].label]
    silent = next(query for query in range(12) if query not in found.queries.tolist())
    assert found.of_query(silent) is None
    stored = json.loads(json.dumps(found.as_dict()))
    assert stored["image_size"] == {"height": 300, "width": 500}
    assert stored["detections"] == found.rows() == [item.as_dict() for item in items]
    with pytest.raises(IndexError):
        found[len(found)]


def test_inputs_are_left_alone_and_gradients_are_no_obstacle():
    logits, boxes = output()
    copies = logits.clone(), boxes.clone()
    found = detections_from(logits.requires_grad_(), boxes.requires_grad_(), (30, 50), NAMES, 0.1)
    assert not found.boxes.requires_grad and not found.scores.requires_grad
    assert torch.equal(logits, copies[0]) and torch.equal(boxes, copies[1])


def test_no_queries_give_no_detections():
    found = detections_from(torch.zeros(0, 4), torch.zeros(0, 4), (10, 10), NAMES)
    assert len(found) == 0 and list(found) == [] and found.boxes.shape == (0, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_output_on_a_gpu_gives_detections_on_the_cpu():
    logits, boxes = output()
    here, there = (
        detections_from(logits.to(device), boxes.to(device), (30, 50), NAMES, 0.3)
        for device in ("cpu", "cuda")
    )
    assert there.boxes.device.type == "cpu"
    assert here.rows() == there.rows()


def test_boxes_are_those_of_torchvision():
    theirs = pytest.importorskip("torchvision.ops")
    boxes = torch.rand(7, 4, dtype=torch.float64)
    corners = corners_of(boxes)
    assert torch.equal(corners, theirs.box_convert(boxes, "cxcywh", "xyxy"))
    torch.testing.assert_close(
        pairwise_iou(corners, corners[2:]), theirs.box_iou(corners, corners[2:]), rtol=0, atol=1e-15
    )
