"""Encoded image -> uint8 pixels: the only decoding, resizing and cropping in the repository."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import msgspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bundle.errors import BadInput
from bundle.manifest import ImageInput

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_LIMITS = {field.name: field.default for field in msgspec.structs.fields(ImageInput)}
_MAX_RATIO = 100  # of the longer side to the shorter
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk; Pillow decodes without it

# The limit is ours, and what a server says on stderr is one JSON object a line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def preprocess(raw: bytes, spec: ImageInput) -> np.ndarray:
    """One PNG or JPEG as the graph takes it.

    Resizing and cropping follow torchvision's `Resize(spec.resize)` (antialiased) and `CenterCrop`, bit for bit.

    Returns:
        uint8 (height, width, 3), C-contiguous, RGB. Transparency is dropped, 16 bits are cut to the upper 8.

    Raises:
        BadInput: the bytes are not a whole PNG or JPEG, or beyond spec.max_bytes or spec.max_pixels.
    """
    return fit(decode(raw, spec), spec)


def fit(image: Image.Image, spec: ImageInput) -> np.ndarray:
    """A decoded RGB image, resized and cropped; see preprocess.

    Raises:
        BadInput: it is too narrow to be resized.
    """
    width, height = image.size
    short = min(width, height)
    size = (int(spec.resize * width / short), int(spec.resize * height / short))  # the longer side is cut, not rounded
    if max(size) > _MAX_RATIO * spec.resize:
        raise BadInput(f"image of {width} × {height} pixels is too narrow to be resized to {spec.resize}.")
    image = image.resize(size, _RESAMPLING[spec.interpolation])
    left, top = round((size[0] - spec.width) / 2), round((size[1] - spec.height) / 2)
    image = image.crop((left, top, left + spec.width, top + spec.height))
    return np.array(image, dtype=np.uint8)


def decode(raw: bytes, spec: ImageInput) -> Image.Image:
    """One PNG or JPEG as it is meant to be seen: upright, RGB.

    Raises:
        BadInput: the bytes are not a whole PNG or JPEG, or beyond spec.max_bytes or spec.max_pixels.
    """
    with _as_bad_input(raw, spec.max_pixels):
        image = _open(raw, spec.max_bytes, spec.max_pixels)
        _load(image, raw)
        return _to_rgb(ImageOps.exif_transpose(image))


def check(raw: bytes) -> None:
    """Refuse what the preprocessing of no model with the usual limits takes, faster than by decoding all of it.

    Raises:
        BadInput: the bytes are not a whole PNG or JPEG, or beyond ImageInput's limits, or it is too narrow.
    """
    with _as_bad_input(raw, _LIMITS["max_pixels"]):
        image = _open(raw, _LIMITS["max_bytes"], _LIMITS["max_pixels"])
        if max(image.size) > _MAX_RATIO * min(image.size):
            raise BadInput(f"image of {image.width} × {image.height} pixels is too narrow to be resized.")
        image.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth of its size, but to its end
        _load(image, raw)


def _open(raw: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
    """A PNG or JPEG within the limits, of which nothing is decoded yet."""
    if len(raw) > max_bytes:
        raise BadInput(f"image has {len(raw)} bytes; the limit is {max_bytes}.")
    image = Image.open(BytesIO(raw), formats=("PNG", "JPEG"))
    if image.width * image.height > max_pixels:
        raise BadInput(f"image has {image.width} × {image.height} pixels; the limit is {max_pixels}.")
    return image


def _load(image: Image.Image, raw: bytes) -> None:
    image.load()
    if image.format == "PNG" and raw.rfind(_PNG_END) < 0:
        raise BadInput(f"PNG is cut off: its {len(raw)} bytes have no IEND chunk.")


@contextmanager
def _as_bad_input(raw: bytes, max_pixels: int) -> Iterator[None]:
    """Whatever Pillow raises inside the block is a BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(f"image has too many pixels; the limit is {max_pixels}.") from error
    except UnidentifiedImageError as error:  # its text is the address of our buffer
        raise BadInput(f"not a PNG or JPEG ({len(raw)} bytes).") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, … on broken files
        raise BadInput(f"not a readable PNG or JPEG ({len(raw)} bytes): {error}.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion saturates instead of scaling
        pixels = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(pixels >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # by way of RGBA: a palette whose transparency is bytes warns otherwise
        image = image.convert("RGBA")
    return image.convert("RGB")
