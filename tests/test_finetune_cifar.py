"""CIFAR-10: its binary batches as they are, torchvision's copy, and every reason to refuse them."""

import hashlib
import pickle
import urllib.request
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from bundle.errors import DataError
from finetune.data import load_dataset
from tests.finetune_examples import write_cifar

RECORD = 3073


def pixels(dataset, index):
    return np.asarray(Image.open(BytesIO(dataset.raw(index))))


def test_batches_are_read_as_they_are(tmp_path):
    """Records of every batch in their order, labels by name, the test batch held out, pixels bit for bit as PNG."""
    dataset = load_dataset(write_cifar(tmp_path, train=100, test=40), "image")
    records = np.concatenate(
        [
            np.fromfile(tmp_path / name, dtype=np.uint8).reshape(-1, RECORD)
            for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")
        ]
    )
    (target,) = dataset.targets

    assert len(dataset) == 140
    assert dataset.held_out.tolist() == [False] * 100 + [True] * 40
    assert (target.name, target.labels) == ("label", tuple(f"digit {i}" for i in range(10)))
    np.testing.assert_array_equal(target.values, records[:, 0])
    assert (dataset.input_columns, dataset.label_columns) == ((), ())
    for index in (0, 49, 50, 99, 100, 139):
        np.testing.assert_array_equal(pixels(dataset, index), records[index, 1:].reshape(3, 32, 32).transpose(1, 2, 0))
        assert dataset.hashes[index] == hashlib.sha256(records[index, 1:].tobytes()).hexdigest()
    assert dataset.names[50] == "record 0 of data_batch_2.bin"


def test_colours_are_in_their_planes(tmp_path):
    """Red comes first, then green, then blue."""
    write_cifar(tmp_path, train=40, test=0)
    red = np.zeros((2, RECORD), dtype=np.uint8)
    red[:, 1:1025] = [[200], [201]]
    (tmp_path / "data_batch_3.bin").write_bytes(red.tobytes())

    dataset = load_dataset(tmp_path, "image")
    assert set(map(tuple, pixels(dataset, 40).reshape(-1, 3).tolist())) == {(200, 0, 0)}


def test_names_and_test_batch_may_be_missing(tmp_path):
    """Labels are then the numbers, and nothing is held out."""
    dataset = load_dataset(write_cifar(tmp_path, train=100, test=0, names=False), "image")

    assert dataset.held_out is None
    assert dataset.targets[0].labels == tuple(map(str, range(10)))


@pytest.mark.parametrize("cut", [1, RECORD - 1, None])
def test_file_of_the_wrong_size_is_refused(tmp_path, cut):
    """A batch that is cut off, or empty, is named with its size."""
    path = write_cifar(tmp_path, train=40, test=20) / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-cut] if cut else b"")
    with pytest.raises(DataError, match=rf"data_batch_2.bin has {path.stat().st_size} bytes, .* records of 3073 bytes"):
        load_dataset(tmp_path, "image")


def test_wrong_batches_are_refused(tmp_path):
    """Labels without a name, as in CIFAR-100 or a shifted file, no batch to train on, and texts."""
    write_cifar(tmp_path, train=40, test=20)
    with pytest.raises(DataError, match="is a folder, which holds images; texts come as"):
        load_dataset(tmp_path, "text")
    path = tmp_path / "test_batch.bin"
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, RECORD)
    records[7, 0] = 10
    records.tofile(path)
    with pytest.raises(DataError, match=r"record 7 of .*test_batch.bin has the label 10; there are 10"):
        load_dataset(tmp_path, "image")
    for batch in tmp_path.glob("data_batch_*.bin"):
        batch.unlink()
    (tmp_path / "data_batch_1.bin").mkdir()
    with pytest.raises(DataError, match=r"data_batch_1.bin cannot be read"):
        load_dataset(tmp_path, "image")
    (tmp_path / "data_batch_1.bin").rmdir()
    with pytest.raises(DataError, match=r"has a test_batch.bin but no data_batch_\*.bin"):
        load_dataset(tmp_path, "image")


def test_torchvision_has_the_same_examples(tmp_path, monkeypatch):
    """What torchvision unpacked into the cache gives the digests of the binary version, and keeps its location."""
    from torchvision.datasets import CIFAR10

    binary = load_dataset(write_cifar(tmp_path / "binary", train=100, test=40), "image")
    folder = tmp_path / "edgeward" / "cifar10" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    files = {}
    for name, source in [("data_batch_1", "data_batch_1"), ("data_batch_2", "data_batch_2"), ("test_batch",) * 2]:
        records = np.fromfile(tmp_path / "binary" / f"{source}.bin", dtype=np.uint8).reshape(-1, RECORD)
        files[name] = pickle.dumps({"data": records[:, 1:], "labels": records[:, 0].tolist()})
    files["batches.meta"] = pickle.dumps({"label_names": [f"digit {i}" for i in range(10)]})
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    dataset = load_dataset("torchvision:CIFAR10", "image")

    assert dataset.location == "torchvision:CIFAR10"
    assert (dataset.sha256, dataset.hashes) == (binary.sha256, binary.hashes)
    assert dataset.held_out.tolist() == binary.held_out.tolist()
    np.testing.assert_array_equal(pixels(dataset, 120), pixels(binary, 120))
    with pytest.raises(DataError, match="torchvision:CIFAR10 holds images; texts come as"):
        load_dataset("torchvision:CIFAR10", "text")


def test_without_a_network_the_binary_version_is_asked_for(tmp_path, monkeypatch):
    """A download that fails is one clear error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)  # the first call makes it, with the proxies of that moment
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # the discard port: nobody listens

    with pytest.raises(DataError, match=r"cifar10 and cannot be downloaded: .* a folder with CIFAR-10's binary"):
        load_dataset("torchvision:CIFAR10", "image")
