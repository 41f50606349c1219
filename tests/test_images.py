import io
import math
import os
import random
import struct
import warnings
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from headoff import images
from headoff.errors import ImageError, SettingError
from headoff.images import Preprocessing, find_images, load_image, preprocess

# A corner of each colour, so that every turn and flip shows.
COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [10, 20, 30], [200, 100, 50]]], np.uint8
)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(image):
    return np.asarray(image)


def message_of(source):
    with pytest.raises(ImageError) as caught:
        load_image(source)
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 250
    assert ": " in text  # culprit: remedy
    return text


class TestLoadImage:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "gif"])
    def test_lossless_formats_come_back_as_they_were(self, tmp_path, suffix):
        path = tmp_path / f"picture.{suffix}"
        Image.fromarray(COLOURS).save(path)
        for source in (path, str(path)):
            image = load_image(source)
            assert image.mode == "RGB"
            np.testing.assert_array_equal(pixels(image), COLOURS)

    def test_jpeg_is_read_whatever_its_suffix(self, tmp_path):
        path = tmp_path / "picture.png"
        Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(path, format="JPEG")
        assert abs(pixels(load_image(path)).astype(int) - 77).max() <= 2

    @pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
    @pytest.mark.parametrize(
        ("orientation", "undo"),
        [
            (1, lambda a: a),
            (2, lambda a: a[:, ::-1]),
            (3, lambda a: a[::-1, ::-1]),
            (4, lambda a: a[::-1]),
            (5, lambda a: a.transpose(1, 0, 2)),
            (6, lambda a: np.rot90(a, 1)),
            (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
            (8, lambda a: np.rot90(a, -1)),
            (0, lambda a: a),
            (9, lambda a: a),
        ],
    )
    def test_exif_orientation_is_undone(self, tmp_path, suffix, orientation, undo):
        upright = np.kron(COLOURS, np.ones((16, 16, 1), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"picture.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0}
        Image.fromarray(np.ascontiguousarray(undo(upright))).save(path, exif=exif, **options)
        image = load_image(path)
        assert image.size == (48, 32)
        assert abs(pixels(image).astype(int) - upright).max() <= (8 if suffix == "jpg" else 0)
        again = load_image(image)  # must not be turned a second time
        np.testing.assert_array_equal(pixels(again), pixels(image))

    def test_damaged_exif_does_not_cost_the_picture(self, tmp_path):
        path = tmp_path / "picture.png"
        Image.fromarray(COLOURS).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
        np.testing.assert_array_equal(pixels(load_image(path)), COLOURS)

    def test_alpha_is_laid_on_white(self, tmp_path):
        rgba = np.dstack([COLOURS, np.array([[255, 0, 128], [64, 255, 0]], np.uint8)])
        alpha = rgba[:, :, 3:] / 255
        expected = COLOURS * alpha + 255 * (1 - alpha)
        path = tmp_path / "picture.png"
        Image.fromarray(rgba).save(path)
        for source in (path, rgba, Image.fromarray(rgba)):
            assert abs(pixels(load_image(source)) - expected).max() <= 1

    def test_every_kind_of_transparency_is_laid_on_white(self, tmp_path):
        black = np.zeros((4, 4), np.uint8)
        cleared = Image.fromarray(black)
        palette = cleared.convert("P")
        colour = cleared.convert("RGB")
        grey_alpha = Image.merge("LA", [cleared, cleared])
        for name, image, options in [
            ("grey", cleared, {"transparency": 0}),
            ("palette", palette, {"transparency": 0}),
            ("palette-bytes", palette, {"transparency": bytes([0, 255])}),
            ("colour", colour, {"transparency": (0, 0, 0)}),
            ("grey-alpha", grey_alpha, {}),
        ]:
            path = tmp_path / f"{name}.png"
            image.save(path, **options)
            assert pixels(load_image(path)).min() == 255, name
        palette.save(tmp_path / "palette.gif", transparency=0)
        assert pixels(load_image(tmp_path / "palette.gif")).min() == 255
        for mode in ("La", "RGBa", "PA"):
            assert pixels(load_image(Image.new(mode, (4, 4), 0))).min() == 255, mode

    def test_opaque_pictures_of_every_mode(self):
        for mode, colour, expected in [
            ("1", 1, (255, 255, 255)),
            ("L", 100, (100, 100, 100)),
            ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
            ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
            ("YCbCr", (128, 128, 128), (128, 128, 128)),
            ("HSV", (0, 0, 255), (255, 255, 255)),
            ("LAB", (255, 128, 128), (255, 255, 255)),
            ("LA", (50, 255), (50, 50, 50)),
            ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
        ]:
            image = load_image(Image.new(mode, (3, 2), colour))
            assert image.mode == "RGB" and image.size == (3, 2)
            assert abs(pixels(image).astype(int) - expected).max() <= 1, mode

    def test_cmyk_jpeg(self, tmp_path):
        path = tmp_path / "picture.jpg"
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
        assert abs(pixels(load_image(path)).astype(int) - (255, 0, 0)).max() <= 4

    @pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
    def test_16_bit_greyscale_is_scaled_not_clipped(self, tmp_path, suffix):
        values = np.array([[0, 128, 129, 257], [1000, 32768, 65534, 65535]], np.uint16)
        path = tmp_path / f"picture.{suffix}"
        Image.fromarray(values).save(path)
        expected = np.rint(values / 257)
        for source in (path, values, Image.fromarray(values), Image.fromarray(values.astype(">u2"))):
            image = pixels(load_image(source))
            np.testing.assert_array_equal(image, np.repeat(expected[:, :, None], 3, axis=2))

    def test_modes_without_a_range_are_scaled_by_what_they_hold(self):
        for values, dtype, expected in [
            ([0, 257, 65535], np.int32, [0, 1, 255]),
            ([-100, 0, 100], np.int32, [0, 128, 255]),
            ([0, 500_000, 1_000_000], np.int32, [0, 128, 255]),
            ([-5, -5, -5], np.int32, [0, 0, 0]),
            ([0, 0.5, 1], np.float32, [0, 128, 255]),
            ([0, 1.5, 255], np.float32, [0, 2, 255]),
            ([-0.1, 0, 0.1], np.float32, [0, 128, 255]),
            ([0, 500, 1000], np.float32, [0, 128, 255]),
        ]:
            image = load_image(Image.fromarray(np.array([values], dtype)))
            assert pixels(image)[0, :, 0].tolist() == expected, values

    def test_float_files_and_nan(self, tmp_path):
        path = tmp_path / "picture.tiff"
        Image.fromarray(np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)).save(path)
        assert pixels(load_image(path))[:, :, 0].tolist() == [[0, 64], [128, 255]]
        Image.fromarray(np.array([[0.0, math.nan]], np.float32)).save(path)
        assert "NaN" in message_of(path)

    @pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
    def test_of_an_animation_the_first_frame_is_taken(self, tmp_path, suffix):
        frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
        path = tmp_path / f"picture.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        with Image.open(path) as image:
            assert image.n_frames == 3
        assert pixels(load_image(path))[5, 5].tolist() == [255, 0, 0]

    def test_arrays(self):
        np.testing.assert_array_equal(pixels(load_image(COLOURS)), COLOURS)
        np.testing.assert_array_equal(pixels(load_image(COLOURS[:, ::-1])), COLOURS[:, ::-1])
        np.testing.assert_array_equal(pixels(load_image(COLOURS / 255)), COLOURS)
        np.testing.assert_array_equal(pixels(load_image(COLOURS.astype(np.uint16) * 257)), COLOURS)
        assert pixels(load_image(COLOURS[:, :, :1])).shape == (2, 3, 3)
        assert pixels(load_image(np.eye(2, dtype=bool)))[:, :, 2].tolist() == [[255, 0], [0, 255]]

    def test_arrays_that_are_no_image(self):
        assert "channels last" in message_of(np.zeros((3, 5, 7), np.uint8))
        assert "channels last" in message_of(np.zeros(7, np.uint8))
        assert "int64" in message_of(np.zeros((5, 7), np.int64))
        assert "0..1" in message_of(np.full((5, 7), 2.0))
        assert "0..1" in message_of(np.full((5, 7), math.nan))
        assert "empty" in message_of(np.zeros((0, 7), np.uint8))
        assert "Tensor" in message_of(torch.zeros(3, 5, 7))
        assert "0 x 7" in message_of(Image.new("RGB", (0, 7)))

    def test_a_given_image_is_left_alone(self):
        image = Image.new("P", (3, 2), 1)
        image.info["transparency"] = 1
        load_image(image)
        assert image.mode == "P" and image.info == {"transparency": 1}
        upright = Image.fromarray(COLOURS)
        load_image(upright).putpixel((0, 0), (9, 9, 9))
        np.testing.assert_array_equal(pixels(upright), COLOURS)

    def test_one_pixel(self):
        assert pixels(load_image(np.full((1, 1), 7, np.uint8))).tolist() == [[[7, 7, 7]]]


class TestFilesThatAreNoImage:
    def test_missing(self, tmp_path):
        path = tmp_path / "nowhere.jpg"
        assert repr(str(path)) in message_of(path) and "no file" in message_of(path)
        assert "download" in message_of("https://example.org/a.jpg")
        assert "path" in message_of("")
        assert "cannot be opened" in message_of("a\0b.jpg")
        (tmp_path / "a.txt").touch()
        assert "cannot be opened" in message_of(tmp_path / "a.txt" / "b.jpg")

    def test_a_folder(self, tmp_path):
        assert "is a folder" in message_of(tmp_path)

    def test_zero_bytes(self, tmp_path):
        path = tmp_path / "picture.png"
        path.touch()
        assert "0 bytes" in message_of(path) and "picture.png" in message_of(path)

    def test_not_an_image(self, tmp_path):
        path = tmp_path / "picture.jpg"
        path.write_text("<html>404</html>")
        assert "not an image" in message_of(path) and "picture.jpg" in message_of(path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        assert "regular file" in message_of(tmp_path / "pipe.png")

    def test_no_permission(self, tmp_path, monkeypatch):
        path = tmp_path / "picture.png"
        Image.fromarray(COLOURS).save(path)

        def reject(*_, **__):  # root may read everything, so chmod would not do
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", reject)
        text = message_of(path)
        monkeypatch.undo()
        assert "permissions" in text and "picture.png" in text

    def test_drawings_do_not_start_a_program(self, tmp_path):
        path = tmp_path / "drawing.eps"
        Image.fromarray(COLOURS).save(path)
        assert "drawing" in message_of(path)

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
    def test_truncated(self, tmp_path, format):
        buffer = io.BytesIO()
        Image.fromarray(noise(40, 50)).save(buffer, format)
        path = tmp_path / "picture"
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        text = message_of(path)
        assert "truncated or corrupt" in text or (format == "WEBP" and "not an image" in text)

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
    def test_whatever_is_in_a_file_it_is_an_image_or_an_image_error(self, tmp_path, format):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise(9, 12)).save(
            buffer, format, **({} if format in ("BMP", "PPM") else {"exif": exif})
        )
        rng = random.Random(format)
        path = tmp_path / "picture"
        for _ in range(60):
            data = bytearray(buffer.getvalue())
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
            path.write_bytes(data[: rng.choice([len(data), rng.randrange(1, len(data))])])
            try:
                assert load_image(path).mode == "RGB"
            except ImageError as error:
                assert "\n" not in str(error)


class TestHugeImages:
    def png_header(self, width, height):
        """A PNG that says it is large, and holds nothing."""

        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")

    @pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (13_000, 10_000), (60_000, 60_000)])
    def test_too_many_pixels_are_refused_from_the_header(self, tmp_path, width, height):
        path = tmp_path / "huge.png"
        path.write_bytes(self.png_header(width, height))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            text = message_of(path)
        assert "huge.png" in text and "100,000,000" in text and "smaller" in text

    def test_below_the_limit_the_contents_are_read(self, tmp_path):
        # Above the size from which Pillow warns, which must not reach the user.
        path = tmp_path / "large.png"
        path.write_bytes(self.png_header(10_000, 10_000))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "truncated or corrupt" in message_of(path)

    def test_the_limit_holds_for_images_and_arrays(self, monkeypatch):
        monkeypatch.setattr(images, "MAX_PIXELS", 5)
        assert "3 x 2 pixels" in message_of(COLOURS)
        assert "3 x 2 pixels" in message_of(Image.fromarray(COLOURS))


class TestFindImages:
    def test_images_sorted_by_name(self, tmp_path):
        for name in ["b.JPG", "a.png", "c.webp", ".hidden.png", "notes.txt", "noextension"]:
            (tmp_path / name).touch()
        (tmp_path / "folder.png").mkdir()
        assert [path.name for path in find_images(tmp_path)] == ["a.png", "b.JPG", "c.webp"]
        assert find_images(str(tmp_path)) == find_images(tmp_path)

    def test_folders_below_are_searched_unless_hidden_or_left_out(self, tmp_path):
        for place in ("day/a.png", "day/deep/a.png", ".hidden/b.png", "left out/c.png", "z.png"):
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).touch()
        (tmp_path / "link").symlink_to(tmp_path)
        found = find_images(tmp_path, lambda folder: folder.name == "left out")
        assert [str(path.relative_to(tmp_path)) for path in found] == ["day/a.png", "day/deep/a.png", "z.png"]

    def test_nothing_to_find(self, tmp_path):
        with pytest.raises(ImageError, match=r"holds no image.*\.jpg"):
            find_images(tmp_path)
        with pytest.raises(ImageError, match="no folder"):
            find_images(tmp_path / "nowhere")
        (tmp_path / "a.png").touch()
        with pytest.raises(ImageError, match="a file, not a folder"):
            find_images(tmp_path / "a.png")
        with pytest.raises(ImageError, match="cannot be read"):
            find_images("a\0b")


def sides():
    rng = random.Random(0)
    yield from (
        (h, w) for h in (1, 2, 500, 799, 800, 801, 1333, 1334) for w in (1, 480, 640, 800, 1333, 4000)
    )
    for _ in range(3000):
        height = rng.randrange(1, 3000)
        yield height, max(1, int(height * 2 ** rng.uniform(-2, 2)))


class TestResizedSize:
    @pytest.mark.parametrize(("short", "long"), [(800, 1333), (480, 640), (100, 50)])
    def test_rule_in_exact_arithmetic(self, short, long):
        rule = Preprocessing(short_side=short, long_side=long).resized_size
        for height, width in sides():
            low, high = sorted((height, width))
            target = min(short, round(Fraction(long * low, high)))
            if target == low:
                expected = (low, high)
            elif target == 0:
                expected = (1, long)
            else:
                expected = (target, math.floor(Fraction(target * high, low)))
            assert rule(height, width) == (expected if height <= width else expected[::-1])

    @pytest.mark.parametrize(("short", "long"), [(800, 1333), (480, 640), (100, 50)])
    def test_rule_of_an_independent_implementation(self, short, long):
        """Exactly that of transformers while the long side is within its limit.

        Beyond, transformers computes the long side from the short side before rounding, the original from the
        rounded one, so only the short side is the same.
        """
        size_rule = pytest.importorskip("transformers.image_transforms").get_size_with_aspect_ratio
        rule = Preprocessing(short_side=short, long_side=long).resized_size
        limited = 0
        for height, width in sides():
            found, expected = rule(height, width), size_rule((height, width), short, long)
            low, high = sorted((height, width))
            if high / low * short <= long:
                assert found == expected
            elif min(expected) > 0:
                limited += 1
                assert min(found) == min(expected)
                # What half a pixel of the short side is of the long side.
                assert abs(max(found) - max(expected)) <= high / low / 2 + 1
        assert limited > 100

    def test_published_examples(self):
        rule = Preprocessing().resized_size
        assert rule(480, 640) == (800, 1066)
        assert rule(640, 480) == (1066, 800)
        assert rule(426, 640) == (800, 1201)
        assert rule(427, 640) == (800, 1199)
        assert rule(800, 1000) == (800, 1000)
        assert rule(1000, 1000) == (800, 800)
        assert rule(375, 1242) == (402, 1331)  # short side 402.47 rounded, long side 402 * 1242 / 375 cut off
        assert rule(1, 1) == (800, 800)

    def test_turned_pictures_have_turned_sizes(self):
        for height, width in sides():
            assert (
                Preprocessing().resized_size(height, width)
                == Preprocessing().resized_size(width, height)[::-1]
            )

    def test_no_side_vanishes_or_explodes(self):
        rule = Preprocessing().resized_size
        assert rule(1, 5000) == (1, 1333)
        assert rule(5000, 1) == (1333, 1)
        assert rule(1, 10_000_000) == (1, 1333)
        for long in range(1, 6000, 7):
            assert 1 <= min(rule(1, long)) and max(rule(1, long)) <= 2 * 1333

    def test_impossible_settings(self):
        with pytest.raises(ImageError, match="empty"):
            Preprocessing().resized_size(0, 5)
        for wrong in [{"short_side": 0}, {"long_side": 0}, {"std": (1.0, 0.0, 1.0)}, {"mean": (0.5,)}]:
            with pytest.raises(SettingError):
                Preprocessing(**wrong)


SMALL = Preprocessing(short_side=40, long_side=70)


def expected_pixels(array, preprocessing):
    """Resized with antialiasing by torchvision on tensors, which shares no code with Pillow's."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).double() / 255
    size = preprocessing.resized_size(*array.shape[:2])
    resized = functional.resize(tensor, list(size), antialias=True)
    return functional.normalize(resized, list(preprocessing.mean), list(preprocessing.std))


class TestPreprocess:
    @pytest.mark.parametrize(("height", "width"), [(30, 50), (97, 61), (41, 200), (40, 60), (1, 1), (1, 500)])
    def test_agrees_with_torchvision(self, height, width):
        array = noise(height, width)
        values, mask = preprocess([load_image(array)], SMALL)
        expected = expected_pixels(array, SMALL)
        assert values.shape == (1, *expected.shape) and values.dtype == torch.float32
        assert mask.shape == (1, *expected.shape[1:]) and mask.dtype == torch.bool and mask.all()
        # Pillow rounds to whole grey levels after each of two passes; 1/255 is 0.0175 at the smallest std.
        assert (values[0] - expected).abs().max() < 1.1 / 255 / min(SMALL.std)

    def test_numbers_without_resizing(self):
        array = noise(40, 60)
        (values,), _ = preprocess([load_image(array)], SMALL, dtype=torch.float64)
        expected = (array / 255 - np.array(SMALL.mean)) / np.array(SMALL.std)
        np.testing.assert_allclose(values.permute(1, 2, 0).numpy(), expected, atol=1e-12)

    def test_default_is_the_published_size(self):
        values, _ = preprocess([Image.new("RGB", (64, 48))])
        assert values.shape == (1, 3, 800, 1066)
        black = [-mean / std for mean, std in zip(Preprocessing().mean, Preprocessing().std, strict=True)]
        assert values[0, :, 5, 5].tolist() == pytest.approx(black)

    def test_pictures_of_different_sizes_are_padded_with_zeros(self):
        pictures = [load_image(noise(h, w, seed=h)) for h, w in [(30, 50), (50, 30), (20, 20)]]
        values, mask = preprocess(pictures, SMALL)
        sizes = [SMALL.resized_size(picture.height, picture.width) for picture in pictures]
        assert values.shape == (3, 3, 66, 66) and mask.shape == (3, 66, 66)
        for i, (picture, (h, w)) in enumerate(zip(pictures, sizes, strict=True)):
            (alone,), _ = preprocess([picture], SMALL)
            assert torch.equal(values[i, :, :h, :w], alone)
            assert mask[i, :h, :w].all() and mask[i].sum() == h * w
            assert (values[i][:, ~mask[i]] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_rounded_once(self, dtype):
        picture = load_image(noise(30, 50))
        values, mask = preprocess([picture], SMALL, dtype=dtype)
        assert values.dtype == dtype and mask.dtype == torch.bool
        assert torch.equal(values, preprocess([picture], SMALL)[0].to(dtype))

    def test_other_modes_are_converted(self):
        grey = Image.new("L", (4, 4), 100)
        assert torch.equal(preprocess(grey)[0], preprocess(grey.convert("RGB"))[0])

    def test_what_cannot_be_preprocessed(self):
        with pytest.raises(ImageError, match="at least one"):
            preprocess([])
        with pytest.raises(ImageError, match="cannot make an image of a int"):
            preprocess([3])
        with pytest.raises(SettingError, match="int64"):
            preprocess([Image.new("RGB", (4, 4))], dtype=torch.int64)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_gets_the_same_numbers(self):
        picture = load_image(noise(30, 50))
        here, there = preprocess([picture], SMALL), preprocess([picture], SMALL, device="cuda")
        for ours, theirs in zip(here, there, strict=True):
            assert theirs.device.type == "cuda" and torch.equal(ours, theirs.cpu())
