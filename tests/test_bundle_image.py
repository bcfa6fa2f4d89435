import contextlib
import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from bundle.errors import BadInput
from bundle.image import check, preprocess
from bundle.manifest import ImageInput

ROOT = Path(__file__).parents[1]
SPEC = ImageInput(
    column="image", height=32, width=32, resize=36, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3
)
SIZES = [(64, 48), (48, 64), (37, 91), (640, 481), (33, 500), (20, 20), (36, 36), (36, 61), (5, 7)]  # width, height


def picture(width, height, mode="RGB", seed=0):
    """A gradient with noise, so that every resampling differs from every other."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([255 * x / width, 255 * y / height, 128 + 127 * np.sin(x / 3 + y / 5)], axis=2)
    noisy = np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oracle(image, spec=SPEC):
    interpolation = InterpolationMode(spec.interpolation)
    transform = Compose(
        [Resize(spec.resize, interpolation, antialias=True), CenterCrop((spec.height, spec.width))],
    )
    return np.asarray(transform(image.convert("RGB")))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_torchvisions(size, interpolation):
    """Resize and CenterCrop give torchvision's pixels bit for bit, whatever the size and the aspect."""
    image = picture(*size)
    spec = msgspec.structs.replace(SPEC, interpolation=interpolation)

    np.testing.assert_array_equal(preprocess(encode(image), spec), oracle(image, spec))


@pytest.mark.parametrize(("height", "width", "resize"), [(35, 32, 35), (31, 20, 40), (32, 35, 35), (1, 1, 7)])
@pytest.mark.parametrize("size", SIZES)
def test_odd_and_oblong_crops_are_torchvisions(size, height, width, resize):
    """The crop's half pixels are rounded as torchvision rounds them, on both axes."""
    image = picture(*size)
    spec = msgspec.structs.replace(SPEC, height=height, width=width, resize=resize)

    np.testing.assert_array_equal(preprocess(encode(image), spec), oracle(image, spec))


def test_decoded_jpeg_is_torchvisions_too():
    """A JPEG is decoded in full and then treated as any image."""
    raw = encode(picture(301, 200), "JPEG", quality=90)

    np.testing.assert_array_equal(preprocess(raw, SPEC), oracle(Image.open(io.BytesIO(raw))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    """An image that a camera stored sideways or mirrored is turned upright before anything else."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encode(picture(64, 48), kind, exif=exif)
    stored = Image.open(io.BytesIO(raw)).convert("RGB")
    turns = {
        1: lambda image: image,
        2: ImageOps.mirror,
        3: lambda image: image.rotate(180),
        4: ImageOps.flip,
        5: lambda image: ImageOps.mirror(image.rotate(-90, expand=True)),
        6: lambda image: image.rotate(-90, expand=True),
        7: lambda image: ImageOps.mirror(image.rotate(90, expand=True)),
        8: lambda image: image.rotate(90, expand=True),
    }

    np.testing.assert_array_equal(preprocess(raw, SPEC), oracle(turns[orientation](stored)))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage garbage"])
def test_unreadable_exif_is_no_reason_to_refuse(exif):
    """A whole image with broken metadata is taken as it lies, or refused as bad input, and nothing else."""
    raw = encode(picture(64, 48), "JPEG", exif=exif)

    try:
        pixels = preprocess(raw, SPEC)
    except BadInput:
        return
    np.testing.assert_array_equal(pixels, oracle(Image.open(io.BytesIO(raw))))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "L", {}),
        ("PNG", "1", {}),
        ("PNG", "LA", {}),
        ("PNG", "RGB", {"compress_level": 0}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"subsampling": 2, "optimize": True}),
    ],
)
def test_every_colour_mode_becomes_rgb(kind, mode, options):
    """Greyscale, one bit, CMYK and progressive files give what Pillow's conversion to RGB gives."""
    raw = encode(picture(64, 48).convert("L" if mode == "LA" else mode).convert(mode), kind, **options)

    np.testing.assert_array_equal(preprocess(raw, SPEC), oracle(Image.open(io.BytesIO(raw))))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))], ids=["opaque", "one colour", "bytes"])
def test_palette_is_looked_up_and_its_transparency_dropped(transparency):
    """A palette image gives its colours, whether or not some of them are transparent."""
    palette = picture(64, 48).quantize(200)
    options = {} if transparency is None else {"transparency": transparency}

    np.testing.assert_array_equal(preprocess(encode(palette, **options), SPEC), oracle(palette))


def test_alpha_is_dropped_and_not_blended():
    """The colours under transparency are kept: what is in the file, not what a viewer would show."""
    image = picture(64, 48)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64), np.uint8)))

    np.testing.assert_array_equal(preprocess(encode(alpha), SPEC), oracle(image))


def test_sixteen_bits_are_cut_to_the_upper_eight():
    """A 16-bit greyscale PNG is scaled, not saturated to white."""
    deep = np.random.default_rng(2).integers(0, 65536, (48, 64)).astype(np.uint16)

    expected = oracle(Image.fromarray((deep >> 8).astype(np.uint8)))
    np.testing.assert_array_equal(preprocess(encode(Image.fromarray(deep)), SPEC), expected)


def test_result_is_an_array_of_its_own():
    """The pixels are uint8, C-contiguous, writable, and shared with nobody."""
    raw = encode(picture(64, 48))
    first = preprocess(raw, SPEC)
    kept = first.copy()
    preprocess(raw, SPEC)[:] = 0

    assert first.dtype == np.uint8
    assert first.shape == (32, 32, 3)
    assert first.flags.c_contiguous
    assert first.flags.writeable
    assert first.flags.owndata
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("options", [{"kind": "PNG"}, {"kind": "JPEG"}, {"kind": "JPEG", "progressive": True}], ids=str)
def test_cut_off_image_is_refused(options):
    """However much of a file is missing, it is not taken for a whole one."""
    raw = encode(picture(64, 48), **options)

    for length in {*range(0, len(raw), 13), *range(max(0, len(raw) - 40), len(raw))}:
        with pytest.raises(BadInput):
            preprocess(raw[:length], SPEC)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_other_formats_are_refused(kind):
    """Only PNG and JPEG are decoded: every decoder is a surface to attack and to drift."""
    with pytest.raises(BadInput, match=r"^not a PNG or JPEG \(\d+ bytes\)\.$"):
        preprocess(encode(picture(64, 48), kind), SPEC)


@pytest.mark.parametrize("raw", [b"", b"\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"<svg></svg>"])
def test_bytes_that_are_no_image_are_refused(raw):
    """The message says how many bytes came, and nothing of this process."""
    with pytest.raises(BadInput) as refused:
        preprocess(raw, SPEC)

    assert "0x" not in str(refused.value)
    assert str(len(raw)) in str(refused.value)


@pytest.mark.parametrize("start", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF\0"])
def test_random_bytes_are_refused(start):
    """Noise behind any magic number is bad input, and never another error."""
    rng = np.random.default_rng(3)

    for _ in range(50):
        with pytest.raises(BadInput):
            preprocess(start + rng.bytes(int(rng.integers(1, 400))), SPEC)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of broken metadata, which is no error in a server
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_flipped_bytes_give_pixels_or_bad_input(kind):
    """A damaged file may still decode, but raises nothing other than BadInput."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encode(picture(40, 30), kind, exif=exif)
    rng = np.random.default_rng(4)

    for _ in range(300):
        damaged = bytearray(raw)
        damaged[rng.integers(len(raw))] ^= int(rng.integers(1, 256))
        with contextlib.suppress(BadInput):
            assert preprocess(bytes(damaged), SPEC).shape == (32, 32, 3)


def test_too_many_bytes_are_refused():
    """The limit holds for the encoded bytes, and the last allowed byte is allowed."""
    raw = encode(picture(64, 48))
    exact = msgspec.structs.replace(SPEC, max_bytes=len(raw))

    assert preprocess(raw, exact).shape == (32, 32, 3)
    with pytest.raises(BadInput, match=f"{len(raw)} bytes; the limit is {len(raw) - 1}"):
        preprocess(raw, msgspec.structs.replace(SPEC, max_bytes=len(raw) - 1))


def test_too_many_pixels_are_refused():
    """The limit holds for the decoded pixels, and the last allowed pixel is allowed."""
    raw = encode(picture(64, 48))

    assert preprocess(raw, msgspec.structs.replace(SPEC, max_pixels=64 * 48)).shape == (32, 32, 3)
    with pytest.raises(BadInput, match="64 × 48 pixels"):
        preprocess(raw, msgspec.structs.replace(SPEC, max_pixels=64 * 48 - 1))


def png(width, height, pixels):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (8000, 8000)])
def test_header_that_claims_too_much_is_refused_undecoded(size, monkeypatch):
    """A hundred bytes that claim gigapixels cost nothing: no pixel is decoded."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))

    with pytest.raises(BadInput, match="limit is 50000000"):
        preprocess(png(*size, zlib.compress(bytes(1000))), SPEC)


def test_highly_compressed_image_is_refused_undecoded(monkeypatch):
    """A real image of 100 megapixels in 100 kB is refused by its header."""
    bomb = png(10_000, 10_000, zlib.compress(bytes(10_001 * 10_000), 1))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))

    assert len(bomb) < 1_000_000
    with pytest.raises(BadInput, match="limit is 50000000"):
        preprocess(bomb, SPEC)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 1000)])
def test_sliver_is_refused(size):
    """An image that resizing would blow up a thousandfold is refused before it is resized."""
    with pytest.raises(BadInput, match="too narrow"):
        preprocess(encode(Image.new("RGB", size)), SPEC)


@pytest.mark.parametrize("size", [(64, 48), (100, 1), (101, 1), (1, 20_000), (8000, 8000)], ids=str)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_check_refuses_what_preprocessing_refuses(size, kind):
    """Of a whole file, and of the same cut off."""
    raw = encode(Image.new("L", size), kind)
    for data in (raw, raw[:-20], raw[:10], b""):
        assert refuses(check, data) == refuses(partial(preprocess, spec=SPEC), data)


def refuses(function, raw):
    try:
        function(raw)
    except BadInput:
        return True
    return False


def test_large_images_are_refused_in_silence():
    """Pillow's own warning would stand on stderr, where a server writes JSON."""
    code = (
        "import sys; from bundle.errors import BadInput; from bundle.image import check\n"
        "try: check(sys.stdin.buffer.read())\n"
        "except BadInput as error: print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], input=png(10_000, 10_000, b""), capture_output=True, check=True, cwd=ROOT
    )
    assert b"limit is 50000000" in ran.stdout
    assert ran.stderr == b""


def test_threads_agree():
    """Concurrent calls give what calls in turn give."""
    raws = [encode(picture(64 + i, 48, seed=i), ("PNG", "JPEG")[i % 2]) for i in range(8)] * 8
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda raw: preprocess(raw, SPEC), raws))

    for raw, pixels in zip(raws, together, strict=True):
        np.testing.assert_array_equal(pixels, preprocess(raw, SPEC))


@pytest.mark.parametrize(
    "change", [{"height": 0}, {"width": -5}, {"height": 37}, {"resize": 10_000}, {"std": (1, 0, 1)}, {"max_bytes": 0}]
)
def test_impossible_preprocessing_is_refused(change):
    """A specification that no image could satisfy does not become one."""
    fields = {**msgspec.structs.asdict(SPEC), **change}
    with pytest.raises(ValueError, match="must"):
        ImageInput(**fields)
