"""Loading image files as RGB pictures, and preprocessing pictures for a detector.

`load_image` converts any still picture to an upright 8-bit RGB `PIL.Image`. `preprocess` resizes, normalises and pads
a batch of pictures as in the evaluation of the published DETR models. A file that cannot be read raises `ImageError`,
whose message is one sentence with the file's name and a remedy.
"""

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from headoff.errors import ImageError, SettingError, error_line

ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded: 100 megapixels, 300 MB as RGB. Checked before decoding."""

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes of image files for `find_images`, in lower case. `load_image` ignores suffixes and reads more formats."""

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
"""Filters for resizing, by name."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow opens EPS with Ghostscript and WMF with Windows: a picture must not start a program.
_DRAWINGS = {"EPS", "WMF"}


def load_image(source: ImageSource, *, upright: bool = True) -> Image.Image:
    """Load any still picture as an upright 8-bit RGB image.

    - EXIF orientation is applied, unless `upright` is false.
    - Of an animation or a file with several pages, the first frame is used.
    - Transparent pictures are drawn on white.
    - 16-bit greyscale is scaled to 8 bits (65535 becomes 255), not clipped. Modes without a defined range are scaled
      by their values: integers within 0..65535 as 16 bits, floats within 0..1 or 0..255 by that range, and other
      values from their minimum to their maximum.
    - Palettes, CMYK and other colour spaces are converted by Pillow. Embedded colour profiles are ignored, as in the
      training of the published models.

    Args:
        source: a path, a `PIL.Image` (which is not modified), or a numpy array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4) of bool, uint8, uint16 or floats in 0..1.
        upright: whether EXIF orientation is applied.

    Raises:
        ImageError: the picture cannot be read, or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, _name_of(source), upright=upright)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the array")
    if isinstance(source, str | os.PathLike):
        return _from_file(os.fsdecode(source), upright)
    kind = type(source).__name__
    raise ImageError(f"cannot make an image of a {kind}: give a path, a PIL image or a numpy array")


def read_image(contents: bytes, name: str, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load the contents of an image file, as `load_image` does.

    Args:
        contents: of the file.
        name: of the file, for messages.
        most_pixels: largest picture that is decoded.

    Raises:
        ImageError: the picture cannot be read, or has more pixels.
    """
    return _decoded(io.BytesIO(contents), repr(name), most_pixels)


def find_images(folder: str | os.PathLike[str], skip: Callable[[Path], bool] = lambda _: False) -> list[Path]:
    """The image files in `folder` and all folders below (by suffix, see `IMAGE_SUFFIXES`), sorted by path.

    Hidden files and folders are left out, and links to folders are not followed.

    Args:
        folder: where to search.
        skip: whether a folder below is left out.

    Raises:
        ImageError: a folder cannot be read, or there is no image.
    """
    root = Path(folder)
    try:
        found = sorted(_walk(root, skip))
    except FileNotFoundError:
        raise ImageError(f"there is no folder {str(root)!r}: check the path") from None
    except NotADirectoryError:
        raise ImageError(f"{str(root)!r} is a file, not a folder: give the folder that it is in") from None
    except (OSError, ValueError) as error:
        raise ImageError(
            f"folder {str(root)!r} cannot be read ({error_line(error)}): check path and permissions"
        ) from error
    if not found:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise ImageError(
            f"folder {str(root)!r} holds no image: put files with one of these suffixes there: {known}"
        )
    return found


def _walk(root: Path, skip: Callable[[Path], bool]) -> Iterator[Path]:
    def stop(error: OSError) -> NoReturn:
        raise error

    for place, folders, files in os.walk(root, onerror=stop):
        here = Path(place)
        # os.walk goes on with what is left in this list.
        folders[:] = [name for name in folders if not name.startswith(".") and not skip(here / name)]
        for path in map(here.joinpath, files):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
                yield path


@dataclass(frozen=True)
class Preprocessing:
    """How pictures are resized and normalised. The defaults are those of the published DETR models.

    Attributes:
        short_side: pixels of the short side after resizing.
        long_side: most pixels of the long side.
        mean, std: mean and standard deviation of R, G and B, whose range is 0..1.
        size: (height, width) to which every picture is resized, whatever its proportions; `short_side` and `long_side`
            are then those of the size. None to keep the proportions.
        resample: the filter, one of `RESAMPLING`.
        rounding: how the long side of a picture is computed whose long side is limited: from the rounded short side
            (`detr`, as in DETR's original code), or from the short side before rounding (`transformers`).
    """

    short_side: int = 800
    long_side: int = 1333
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    size: tuple[int, int] | None = None
    resample: str = "bilinear"
    rounding: Literal["detr", "transformers"] = "detr"

    def __post_init__(self) -> None:
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise SettingError(
                f"pictures cannot be resized to {self.size}: give height and width, both at least 1"
            )
        if self.size is not None:
            object.__setattr__(self, "short_side", min(self.size))
            object.__setattr__(self, "long_side", max(self.size))
        if self.resample not in RESAMPLING:
            raise SettingError(f"there is no filter {self.resample!r}: use {' or '.join(RESAMPLING)}")
        if self.rounding not in ("detr", "transformers"):
            raise SettingError(f"there is no rounding {self.rounding!r}: use 'detr' or 'transformers'")
        if self.short_side < 1 or self.long_side < 1:
            raise SettingError(
                f"pictures cannot be resized to a short side of {self.short_side} and a long side of at most "
                f"{self.long_side} pixels: both must be at least 1"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(deviation > 0 for deviation in self.std):
            raise SettingError(
                f"mean {self.mean} and std {self.std} must be three numbers each, std positive"
            )

    def with_short_side(self, pixels: int) -> "Preprocessing":
        """The same with another short side; the limit of the long side, or the fixed size, is scaled with it."""
        if self.size is not None:
            height, width = (max(1, round(side * pixels / min(self.size))) for side in self.size)
            return replace(self, size=(height, width))
        return replace(
            self, short_side=pixels, long_side=max(1, round(self.long_side * pixels / self.short_side))
        )

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels after resizing a picture of `height` x `width` pixels.

        The short side becomes `short_side`, or less if the long side would exceed `long_side`. Rounding is that of
        DETR's original code (`datasets/transforms.py`): the short side is rounded, the long side is computed from it
        and truncated, and a picture whose short side has the right size is not resized. If the short side of a very
        narrow picture would be 0, it is 1, and the long side is `long_side`. See `rounding` and `size` for the others.

        Raises:
            ImageError: the picture is empty.
        """
        low, high = min(height, width), max(height, width)
        if low < 1:
            raise ImageError(
                f"a picture of {height} x {width} pixels is empty: give one with at least 1 pixel"
            )
        if self.size is not None:
            return self.size
        short, exact = self.short_side, float(self.short_side)
        if high / low * short > self.long_side:
            exact = self.long_side * low / high
            short = round(exact)
        if short == 0:
            short, long = 1, self.long_side
        elif short == low:
            return height, width
        else:
            long = int((short if self.rounding == "detr" else exact) * high / low)
        return (long, short) if width < height else (short, long)


MOST_PIXELS = 100_000_000
"""Most pixels of a batch's resized images, each: encoding more would take all memory of any machine."""


def padded_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that holds all pictures of a batch, of their resized `sizes`.

    Raises:
        SettingError: it has more than `MOST_PIXELS`.
    """
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    if height * width > MOST_PIXELS:
        raise SettingError(
            f"images would be resized to {height} x {width} pixels, and more than {MOST_PIXELS // 10**6} million do "
            "not fit: give a smaller short_side (--short-side)"
        )
    return height, width


def preprocess(
    images: ImageSource | Sequence[ImageSource],
    preprocessing: Preprocessing | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values and mask of a batch of RGB pictures, which may differ in size.

    Pictures are resized (with antialiasing, as in the evaluation of the published models), scaled to 0..1,
    normalised, and padded with zeros at the bottom and the right. Everything is computed on the CPU in float32 or
    float64, so values do not depend on `device`.

    Args:
        images: a picture or several, each a path, a PIL image or an array, see `load_image`.
        preprocessing: sizes and normalisation; those of the published models by default.
        dtype: of the pixel values.
        device: of the results; None is the CPU.

    Returns:
        `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W) bool, True = picture, False = padding. H and W are the
        largest in the batch.

    Raises:
        ImageError: the batch is empty, or a picture cannot be read.
        SettingError: the dtype is not floating point.
    """
    preprocessing = preprocessing or Preprocessing()
    if not dtype.is_floating_point:
        raise SettingError(f"pixel values cannot be of {dtype}: give a floating point dtype")
    is_one = isinstance(images, str | os.PathLike | Image.Image | np.ndarray)
    several: Any = images if isinstance(images, Iterable) and not is_one else [images]
    # What is RGB has been through load_image, or is meant as it is.
    pictures = [
        image if isinstance(image, Image.Image) and image.mode == "RGB" else load_image(image)
        for image in several
    ]
    if not pictures:
        raise ImageError("there is no image to preprocess: give at least one")

    pixels, sizes = resize(pictures, preprocessing)
    pixel_values, pixel_mask = normalise(pixels, sizes, preprocessing, dtype)
    return _put(pixel_values, device), _put(pixel_mask, device)


def resize(
    pictures: Sequence[Image.Image], preprocessing: Preprocessing
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The first half of `preprocess`: RGB pictures, resized.

    Returns:
        uint8 (B, H, W, 3), padded with anything at the bottom and the right, and B (height, width) without the padding.

    Raises:
        SettingError: they would have more than `MOST_PIXELS`.
    """
    sizes = [preprocessing.resized_size(picture.height, picture.width) for picture in pictures]
    height, width = padded_size(sizes)
    pixels = torch.zeros(len(pictures), height, width, 3, dtype=torch.uint8)
    for i, (picture, (h, w)) in enumerate(zip(pictures, sizes, strict=True)):
        resized = picture.resize((w, h), RESAMPLING[preprocessing.resample])
        pixels[i, :h, :w] = torch.from_numpy(np.array(resized))
    return pixels, sizes


def normalise(
    pixels: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    preprocessing: Preprocessing,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The second half of `preprocess`, of what `resize` returns, on the device of `pixels`."""
    working = torch.promote_types(dtype, torch.float32)
    mean, std = (
        torch.tensor(values, dtype=working).to(pixels.device, non_blocking=True)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    pixel_values = pixels.permute(0, 3, 1, 2).to(working, memory_format=torch.contiguous_format)
    pixel_values.div_(255).sub_(mean).div_(std)
    pixel_mask = torch.ones(pixels.shape[:3], dtype=torch.bool, device=pixels.device)
    for i, (h, w) in enumerate(sizes):
        for padding in (slice(h, None), slice(None)), (slice(None), slice(w, None)):
            pixel_mask[i][padding] = False
            pixel_values[i][:, *padding] = 0
    return pixel_values.to(dtype), pixel_mask


def _put(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    target = torch.device("cpu") if device is None else torch.device(device)
    if target.type == "cuda":
        # A copy from pinned memory overlaps with the GPU's other work; torch frees the memory after the copy.
        return tensor.pin_memory().to(target, non_blocking=True)
    return tensor.to(target)


def _name_of(image: Image.Image) -> str:
    filename = getattr(image, "filename", "")
    return repr(os.fsdecode(filename)) if filename else "the image"


def _from_file(path: str, upright: bool) -> Image.Image:
    name = repr(path)
    if not path:
        raise ImageError("the path of the image is empty: give the path of an image file")
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name} is a folder: give an image file in it")
        if not stat.S_ISREG(status.st_mode):
            # Reading a pipe or a device might block forever.
            raise ImageError(f"{name} is not a regular file: save the image to a file first")
        if status.st_size == 0:
            raise ImageError(f"{name} is empty (0 bytes): copy or download it again")
        file = open(path, "rb")
    except FileNotFoundError:
        remedy = "download it to a file first" if "://" in path else "check the path"
        raise ImageError(f"there is no file {name}: {remedy}") from None
    except PermissionError:
        raise ImageError(
            f"{name} may not be read by this user: change its permissions or those of its folder"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be opened ({error_line(error)}): check the path") from error

    with file:
        return _decoded(file, name, MAX_PIXELS, upright)


def _decoded(file: IO[bytes], name: str, most_pixels: int, upright: bool = True) -> Image.Image:
    # Pillow's warnings (its size limit, unusual metadata, unusual palettes) do not matter here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            raise ImageError(f"{name} is not an image in a known format: convert it to JPEG or PNG") from None
        except Image.DecompressionBombError:
            raise ImageError(
                f"{name} has too many pixels (the limit is {most_pixels:,}): make it smaller first"
            ) from None
        except Exception as error:
            raise _corrupt_error(name, error) from error
        if image.format in _DRAWINGS:
            raise ImageError(f"{name} is a drawing ({image.format}), not pixels: convert it to PNG")
        return _to_rgb(image, name, most_pixels, upright)


def _corrupt_error(name: str, error: Exception) -> ImageError:
    return ImageError(
        f"{name} is truncated or corrupt ({error_line(error)}): copy it again or convert it to PNG"
    )


def _to_rgb(
    image: Image.Image, name: str, most_pixels: int | None = None, upright: bool = True
) -> Image.Image:
    width, height = image.size
    most_pixels = MAX_PIXELS if most_pixels is None else most_pixels
    if width < 1 or height < 1:
        raise ImageError(f"{name} is of {width} x {height} pixels: give an image of at least 1 x 1")
    if width * height > most_pixels:
        raise ImageError(
            f"{name} is of {width} x {height} pixels, more than {most_pixels:,}: make it smaller first"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Decoders raise various errors: OSError, SyntaxError, struct.error and others.
        try:
            image.load()
            turn = _UPRIGHT.get(_orientation(image)) if upright else None
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                image = _to_8_bit(image, name)
            elif image.has_transparency_data:
                image = _on_white(image)
            image = image.convert("RGB")
            if turn is not None:
                image = image.transpose(turn)
            # Without metadata, so that its orientation is not applied a second time.
            image.info.clear()
            return image
        except ImageError:
            raise
        except Exception as error:
            raise _corrupt_error(name, error) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 (upright) if the EXIF block is damaged, as the pixels may be good."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied greyscale can only be converted to LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Greyscale of more than 8 bits as mode L; see `load_image` for the scaling."""
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ImageError(f"{name} holds NaN or infinity: replace them by numbers first")
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f" and low >= 0 and high <= 255:
        bottom, top = 0, 1 if high <= 1 else 255
    elif values.dtype.kind != "f" and low >= 0 and high <= 65535:
        bottom, top = 0, 65535
    else:
        bottom, top = low, high if high > low else low + 1
    scaled = (values.astype(np.float64) - bottom) / (top - bottom) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"an array of shape {array.shape} is no image: give (height, width), (height, width, 3) or "
            "(height, width, 4), channels last"
        )
    if 0 in array.shape:
        raise ImageError(f"an array of shape {array.shape} is empty: give an image of at least 1 x 1")
    if array.dtype.kind == "f":
        # Negated, so that it also rejects NaN.
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError(
                "an array of floats must lie in 0..1 to be an image: scale it, or convert it to uint8"
            )
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = np.rint(array / 257).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is no image: convert it to uint8, or to floats in 0..1")
    return Image.fromarray(np.ascontiguousarray(array))
