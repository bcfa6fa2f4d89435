import numpy as np
import pytest

from bundle import preprocess, vector
from bundle.errors import BadInput
from bundle.manifest import MAX_NUMBERS, VectorInput

SPEC = VectorInput(column="flower", size=3, names=("sepal", "petal", "stem"))
NAMELESS = VectorInput(column="x", size=3)


def raw(*numbers):
    return np.array(numbers, "<f4").tobytes()


def test_a_vector_is_read_bit_for_bit():
    """Signed zeros, the smallest and the largest numbers come through, in native order."""
    numbers = np.array([-0.0, 1e-45, 3.4028235e38], np.float32)
    row = vector.decode(numbers.astype("<f4").tobytes(), SPEC)

    assert row.dtype == np.float32
    assert row.dtype.isnative
    assert row.flags.writeable
    assert row.tobytes() == numbers.tobytes()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", np.float64, np.int32, np.uint8])
def test_raw_bytes_are_little_endian_float32(dtype):
    """Whatever an array is in memory, its raw bytes are one thing."""
    assert vector.encode(np.array([1, 2, 3], dtype)) == raw(1, 2, 3)
    assert vector.encode(np.arange(6, dtype=dtype).reshape(2, 3).T[:, 0][:3]) == raw(0, 1, 2)


@pytest.mark.parametrize("data", [b"", b"\0" * 11, b"\0" * 13, raw(1, 2), raw(1, 2, 3, 4)])
def test_another_number_of_bytes_is_refused(data):
    """Both sizes are named."""
    with pytest.raises(BadInput, match=f"vector has {len(data)} bytes; expected 12, 3 numbers"):
        vector.decode(data, SPEC)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value):
    """The first such number is named by its position and value, and by its column where there is one."""
    with pytest.raises(BadInput, match=f"vector is not finite: number 1, 'petal', is {value}"):
        vector.decode(raw(0, value, np.nan), SPEC)
    with pytest.raises(BadInput, match=f"number 2 is {value}"):
        vector.decode(raw(0, 0, value), NAMELESS)


def test_a_batch_is_a_matrix():
    """Vectors have no length and are not padded."""
    encode = preprocess.encoder(SPEC, {}.__getitem__)
    got = preprocess.collate([encode(raw(1, 2, 3)), encode(raw(4, 5, 6))], SPEC)

    assert list(got) == ["features"]
    assert got["features"].dtype == np.float32
    assert got["features"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not preprocess.is_sequence(SPEC)
    assert preprocess.length(encode(raw(1, 2, 3)), SPEC) == 1


@pytest.mark.parametrize(
    "change", [{"size": 0}, {"size": -1}, {"size": MAX_NUMBERS + 1}, {"size": 10**30}, {"names": ("a", "b")}]
)
def test_impossible_vectors_are_refused(change):
    """Sizes are positive and within the limit, names are as many or none."""
    with pytest.raises(ValueError, match="must be positive"):
        VectorInput(**{"column": "x", "size": 3, **change})
