"""Random changes of images: what they depend on, what they do, and what comes after them."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from bundle import image
from bundle.errors import BadInput, DataError
from finetune.augment import augmented, change, mixed
from finetune.data import load_dataset
from tests.finetune_loops import IMAGE, write_pictures

ALL = ("flip", "crop", "color")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return load_dataset(write_pictures(tmp_path_factory.mktemp("pictures")), "image")


def rows(dataset, kinds=ALL, seed=0, epoch=0, indices=range(40)):
    return list(augmented(dataset, np.array(indices), IMAGE, kinds, seed, epoch))


def picture(width=12, height=10):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_it_is_a_function_of_seed_epoch_and_position(pictures):
    """The same image of the same epoch is the same, whichever others it is asked for with; others are others."""
    first = rows(pictures)

    np.testing.assert_array_equal(first, rows(pictures))
    np.testing.assert_array_equal(first[5:9], rows(pictures, indices=range(5, 9)))
    np.testing.assert_array_equal(first[5:9], list(augmented(pictures, np.arange(40), IMAGE, ALL, 0, 0)[5:9]))
    for other in (rows(pictures, epoch=1), rows(pictures, seed=1)):
        assert sum(np.array_equal(a, b) for a, b in zip(first, other, strict=True)) < 3
    assert {row.shape for row in first} == {(8, 8, 3)}
    assert {row.dtype for row in first} == {np.dtype(np.uint8)}


def test_without_changes_it_is_the_preprocessing(pictures):
    """What is not changed is preprocessed as it will be when it is served, bit for bit."""
    expected = [image.preprocess(pictures.raw(i), IMAGE) for i in range(40)]

    np.testing.assert_array_equal(rows(pictures, kinds=()), expected)


def test_flip_is_of_one_in_two():
    """An image is as it was or mirrored, and about as often the one as the other."""
    before, mirrored = picture(), picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    after = [change(before, ("flip",), np.random.default_rng(seed)) for seed in range(200)]

    assert all(each in (before, mirrored) for each in after)
    assert 70 < sum(each == mirrored for each in after) < 130


def test_crop_is_a_part():
    """A crop is a rectangle of the image's own pixels, at least a third of it, and of moderate ratio."""
    whole = np.asarray(picture(40, 30))
    sizes = set()
    for seed in range(50):
        part = np.asarray(change(picture(40, 30), ("crop",), np.random.default_rng(seed)))
        down, across = part.shape[:2]
        sizes.add((down, across))
        windows = np.lib.stride_tricks.sliding_window_view(whole, (down, across, 3))[:, :, 0]
        assert (windows == part).all(axis=(2, 3, 4)).any()
        assert 0.45 < down * across / 1200 <= 1
        assert 0.7 < across / down < 1.4
    assert len(sizes) > 20


@pytest.mark.parametrize("size", [(1, 1), (300, 2), (2, 300)])
def test_crop_of_the_narrowest(size):
    """An image that no crop of the right ratio fits into stays whole."""
    assert change(picture(*size), ("crop",), np.random.default_rng(0)).size == size


def test_color_keeps_the_shape():
    """Brightness, contrast and saturation change the pixels and nothing else; grey stays grey."""
    changed = change(picture(), ("color",), np.random.default_rng(0))
    grey = np.asarray(change(picture().convert("L").convert("RGB"), ("color",), np.random.default_rng(0))).astype(int)

    assert changed.size == (12, 10)
    assert changed.mode == "RGB"
    assert np.abs(np.asarray(changed).astype(int) - np.asarray(picture())).mean() > 5
    assert np.ptp(grey, axis=2).max() <= 1


def test_order_of_the_kinds_does_not_matter():
    """The changes are made in one order, whichever order they are named in."""
    one, other = (change(picture(), kinds, np.random.default_rng(3)) for kinds in (ALL, ALL[::-1]))

    assert one == other


def test_a_broken_image_is_named(tmp_path):
    """An image that became unreadable is an error with its name."""
    dataset = load_dataset(write_pictures(tmp_path / "pictures", 8), "image")
    (tmp_path / "pictures" / "dark" / "0.png").write_bytes(b"nothing")
    position = list(dataset.names).index("dark/0.png")
    with pytest.raises(DataError, match=r"dark/0\.png.*not a PNG"):
        rows(dataset, indices=[position])


def test_decode_and_fit_are_the_preprocessing():
    """The two halves of the preprocessing make the whole, and each refuses what it cannot take."""
    buffer = BytesIO()
    picture().save(buffer, "PNG")
    raw = buffer.getvalue()

    np.testing.assert_array_equal(image.fit(image.decode(raw, IMAGE), IMAGE), image.preprocess(raw, IMAGE))
    with pytest.raises(BadInput, match="not a PNG"):
        image.decode(raw[4:], IMAGE)
    with pytest.raises(BadInput, match="too narrow"):
        image.fit(picture(1000, 2), IMAGE)


def test_mixed_rounds():
    """Mixing gives the weighted mean of two images, rounded to whole pixels."""
    chance = np.random.default_rng(0)
    images = torch.from_numpy(chance.integers(0, 256, (6, 4, 5, 3)).astype(np.uint8))
    permutation = torch.tensor([3, 1, 0, 5, 4, 2])
    expected = torch.round(0.3 * images.double() + 0.7 * images[permutation].double())

    result = mixed(images, permutation, 0.3)
    assert result.dtype == torch.uint8
    assert (result.double() - expected).abs().max() <= 1
    assert ((result.double() - expected) != 0).float().mean() < 0.01
    assert torch.equal(mixed(images, permutation, 1.0), images)
    assert torch.equal(mixed(images, permutation, 0.0), images[permutation])
