"""Annotations in COCO's format, and the batches that images are computed in."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluate_examples import NAMES, SIZES, coco_contents

from headoff.detr.checkpoints.coco import COCO_CLASSES
from headoff.errors import SettingError
from headoff.evaluation.annotations import box_of_rle, ground_truth, read_annotations, scene_truth
from headoff.evaluation.batches import make_batches, shard_of
from headoff.images import Preprocessing
from headoff.scenes.dataset import CLASS_NAMES, draw_scene


def read(contents, limit=None):
    return ground_truth(contents, CLASS_NAMES, limit, "'boxes.json'")


def test_everything_that_files_have_is_read():
    truth, notes = read(coco_contents())
    assert truth.names == NAMES and truth.image_ids.tolist() == [10, 20, 30, 40, 50, 60, 70]
    assert truth.sizes.tolist() == [list(size) for size in SIZES]
    assert truth.class_names == CLASS_NAMES
    # By image; ids of categories are found by name, whatever its case.
    assert truth.annotation_ids.tolist() == [101, 102, 104, 100, 105]
    assert truth.image.tolist() == [0, 1, 2, 3, 6]
    star, circle = CLASS_NAMES.index("star"), CLASS_NAMES.index("circle")
    assert truth.labels.tolist() == [star, circle, star, circle, star]
    assert truth.crowd.tolist() == [False, True, False, False, False]
    assert truth.boxes.tolist() == [
        [1, 2, 4, 6],
        [0, 0, 2, 150],
        [1, 2, 21, 9],
        [10.5, 20, 40.5, 60],
        [1, 10, 2, 30],
    ]
    assert truth.areas.tolist() == [12, 300, 140, 700.25, 20]
    assert len(notes) == 1 and "zebra (1 annotation)" in notes[0]


def test_a_limit_leaves_the_first_images():
    truth, _ = read(coco_contents(), limit=2)
    assert truth.names == NAMES[:2] and truth.annotation_ids.tolist() == [101, 102]


def test_images_may_have_no_annotations_at_all():
    truth, notes = read({**coco_contents(), "annotations": []})
    assert len(truth) == len(NAMES) and truth.boxes.shape == (0, 4)
    assert "no precision" in notes[0]


def test_annotations_of_other_images_are_left_out():
    contents = coco_contents()
    contents["annotations"][0]["image_id"] = 9999
    truth, notes = read(contents)
    assert 100 not in truth.annotation_ids and any("1 annotation of images" in note for note in notes)


def test_boxes_that_cannot_be_right_are_noted():
    """They are kept, as other tools keep them."""
    contents = coco_contents()
    for one, box in zip(contents["annotations"], ([10, 20, 150, 200], [5, 5, 0, 9]), strict=False):
        one["bbox"] = box  # the first with corners, for an image of 150 x 200
    truth, notes = read(contents)
    assert len(truth.image) == 5
    noted = [note for note in notes if "such as" in note]
    assert noted == [
        "1 annotation of 'boxes.json', such as 101: boxes without width or height, which nothing can match",
        "1 annotation of 'boxes.json', such as 100: boxes beyond their images, although a box is left, top, "
        "width and height",
    ]


def test_pascal_vocs_names_are_cocos():
    """RT-DETR and others call COCO's classes by these."""
    contents = coco_contents()
    contents["categories"] = [
        {"id": 3, "name": "airplane"},
        {"id": 90, "name": "tv"},
        {"id": 17, "name": "person"},
    ]
    names = ("person", "aeroplane", "tvmonitor")
    assert ground_truth(contents, names)[0].labels.tolist() == [1, 0, 2, 1, 0, 1]
    contents["categories"][0]["name"] = "Sofa"
    assert ground_truth(contents, COCO_CLASSES)[0].labels[0] == COCO_CLASSES.index("couch")


def change(key, index, **values):
    def of(contents):
        contents[key][index].update(values)

    return of


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("annotations"), "'boxes.json' have no list 'annotations'"),
        (lambda c: c.update(images={}), "no list 'images'"),
        (lambda c: c.update(images=[]), "no images"),
        (lambda c: c["images"][1].pop("width"), "image 20 of 'boxes.json' has no 'width'"),
        (lambda c: c["images"][1].pop("id"), "has no 'id'"),
        (change("images", 1, height=0), "of 0 x 200 pixels"),
        (change("images", 1, height="tall"), "of nan x 200 pixels"),
        (change("images", 1, id=10), "two images of 'boxes.json' have the id 10"),
        (change("images", 1, id="20"), "id '20'.*no whole number"),
        (change("annotations", 1, id=100), "two annotations of 'boxes.json' have the id 100"),
        (change("annotations", 1, category_id=5), "annotation 101.*category 5"),
        (change("annotations", 1, bbox=[1, 2, 3]), "annotation 101 .* neither a `bbox`"),
        (change("annotations", 1, bbox=[1, 2, "wide", 3]), "annotation 101 .* no number"),
        (change("annotations", 1, area=float("nan")), "annotation 101 .* no number"),
        (change("categories", 0, name="circle"), "two categories .* name 'circle'"),
        (change("categories", 0, id=17), "two categories .* id 17"),
        (
            lambda c: c.update(categories=[{"id": i, "name": f"Circl{i}"} for i in (3, 17, 90)]),
            "knows none of the categories.*'Circl3'.*'circle'",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence(spoil, message):
    contents = coco_contents()
    spoil(contents)
    with pytest.raises(SettingError, match=message) as caught:
        read(contents)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("contents", [b"", b'{"images": [', b"\xff\xfe", b"[]", b"[" * 100_000])
def test_a_corrupt_file_is_one_sentence(tmp_path, contents):
    path = tmp_path / "boxes.json"
    path.write_bytes(contents)
    with pytest.raises(SettingError, match="boxes.json"):
        read_annotations(path, CLASS_NAMES)
    with pytest.raises(SettingError, match="no annotation file"):
        read_annotations(tmp_path / "other.json", CLASS_NAMES)


def test_boxes_of_run_lengths_are_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    for number in range(60):
        height, width = generator.integers(1, 40, 2)
        pixels = generator.random((height, width)) < (0, 0.02, 0.3, 1)[number % 4]
        encoded = mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
        counts = np.diff(
            np.flatnonzero(np.diff(pixels.T.ravel(), prepend=~pixels[0, 0], append=~pixels[-1, -1]))
        )
        runs = counts.tolist() if not pixels[0, 0] else [0, *counts.tolist()]
        expected = mask.toBbox(encoded).tolist()
        assert box_of_rle(encoded) == expected
        assert box_of_rle({"size": [height, width], "counts": runs}) == expected


def test_the_truth_of_scenes_is_that_of_drawn_scenes():
    truth = scene_truth(5, 3, 192)
    assert truth.image_ids.tolist() == [3, 4, 5, 6, 7]
    for index in range(5):
        scene = draw_scene(3 + index, 192, "held_out")
        of_image = truth.image == index
        assert truth.labels[of_image].tolist() == scene.labels.tolist()
        assert np.allclose(truth.boxes[of_image], scene.boxes, atol=2e-3)


def test_batches_have_every_image_once_and_like_sizes():
    generator = np.random.default_rng(0)
    sizes = generator.integers(100, 600, (101, 2))
    batches = make_batches(sizes, Preprocessing(), 8)
    assert sorted(index for batch in batches for index in batch) == list(range(101))
    assert all(list(batch) == sorted(batch) for batch in batches) and sorted(map(len, batches)) == [
        5,
        *[8] * 12,
    ]

    def padding(batches):
        """The pixels that batches have, relative to those of their images."""
        resized = [
            [Preprocessing().resized_size(*sizes[index].tolist()) for index in batch] for batch in batches
        ]
        padded = sum(len(batch) * max(h for h, _ in batch) * max(w for _, w in batch) for batch in resized)
        return padded / sum(h * w for batch in resized for h, w in batch)

    assert padding(batches) < 1.2 < 1.4 < padding([range(start, start + 8) for start in range(0, 96, 8)])
    assert make_batches(sizes, Preprocessing(), 8) == batches
    shards = [shard_of(len(batches), (index, 3)) for index in (1, 2, 3)]
    assert sorted(number for shard in shards for number in shard) == list(shard_of(len(batches), None))
    with pytest.raises(SettingError, match="no shard 4/3"):
        shard_of(13, (4, 3))


def test_json_files_are_read_as_such(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(coco_contents()))
    assert read_annotations(path, CLASS_NAMES)[0].names == NAMES
