"""serve.shared_memory: regions that clients register, and what must not be possible with them."""

import os
import threading
import uuid

import grpc
import numpy as np
import pytest

from bundle.errors import BadInput
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve import shared_memory
from serve.config import ServeConfig
from serve.errors import AlreadyExists, LimitReached, NotFound, NotSupported
from serve.server import start
from serve.shared_memory import FOLDER, Regions
from tests.serve_bundles import identity

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs /dev/shm")
SIZE = 64


@pytest.fixture
def regions():
    return Regions(enabled=True)


@pytest.fixture
def key():
    """An object of 64 bytes that hold 0, 1, 2 ..."""
    path = FOLDER / f"edgeward-test-{uuid.uuid4().hex}"
    path.write_bytes(bytes(range(SIZE)))
    yield f"/{path.name}"
    path.unlink(missing_ok=True)


def test_a_part_is_read_and_written_where_it_lies(regions, key):
    """Offsets of the region and of the part add up, and nothing else is touched."""
    regions.register("r", key, 8, 32)
    part = regions.part("r", 4, 8)

    assert part.read() == bytes(range(12, 20))
    assert part.write(np.array([[7, 8]], np.int16).data) == 4

    held = (FOLDER / key[1:]).read_bytes()
    assert held == bytes(range(12)) + bytes([7, 0, 8, 0]) + bytes(range(16, SIZE))


@pytest.mark.parametrize("array", [np.float32(2), np.empty((0, 3), np.float32), np.ones((2, 2, 2), np.float32)])
def test_an_array_of_any_rank_is_written(regions, key, array):
    """Scalars, empty arrays and several axes go in as their bytes."""
    regions.register("r", key, 0, SIZE)

    assert regions.part("r", 0, SIZE).write(np.asarray(array).data) == array.nbytes
    assert regions.part("r", 0, array.nbytes).read() == array.tobytes()


def test_what_was_read_does_not_change(regions, key):
    """A client that writes while the model runs changes nothing of the request."""
    regions.register("r", key, 0, SIZE)
    read = regions.part("r", 0, SIZE).read()
    (FOLDER / key[1:]).write_bytes(bytes(SIZE))

    assert read == bytes(range(SIZE))


def test_status_tells_what_was_registered(regions, key):
    """One region by its name, all of them without one."""
    regions.register("a", key, 0, SIZE)
    regions.register("b", key[1:], 4, 8)

    assert [(r.name, r.key, r.offset, r.byte_size) for r in regions.status("")] == [
        ("a", key, 0, SIZE),
        ("b", key[1:], 4, 8),
    ]
    assert [r.name for r in regions.status("b")] == ["b"]
    with pytest.raises(NotFound, match="Unable to find system shared memory region: 'c'"):
        regions.status("c")


def test_unregister_forgets_one_or_all(regions, key):
    """A name that is not there is no error, and is free again afterwards."""
    for name in "abc":
        regions.register(name, key, 0, SIZE)
    regions.unregister("a")
    regions.unregister("a")

    assert [r.name for r in regions.status("")] == ["b", "c"]
    regions.unregister("")
    assert regions.status("") == []
    regions.register("a", key, 0, SIZE)


def test_a_part_in_use_outlives_its_region(regions, key):
    """Unregistered, and even unlinked: the request that has the part goes on, and only then is the object closed."""
    before = _descriptors()
    regions.register("r", key, 0, SIZE)
    part = regions.part("r", 0, 4)
    regions.unregister("r")
    (FOLDER / key[1:]).unlink()

    assert part.read() == bytes(range(4))
    assert part.write(b"abcd") == 4
    with pytest.raises(NotFound):
        regions.part("r", 0, 4)
    del part
    assert _descriptors() == before


def test_a_name_is_registered_once(regions, key):
    """The second one is told so, and the first stays as it is."""
    regions.register("r", key, 0, SIZE)
    with pytest.raises(AlreadyExists, match="'r' already in manager"):
        regions.register("r", key, 0, 8)

    assert regions.status("r")[0].byte_size == SIZE


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, SIZE + 1), (1, SIZE), (SIZE, 1), (SIZE + 1, 0), (0, 0), (2**64 - 32, 64), (32, 2**64 - 1), (0, 2**63)],
)
def test_a_region_lies_within_its_object(regions, key, offset, size):
    """Beyond the end, empty, or so large that 64 bits would wrap round: refused, and nothing stays open."""
    before = _descriptors()
    with pytest.raises(BadInput, match="failed to register shared memory region 'r': invalid args"):
        regions.register("r", key, offset, size)

    assert regions.status("") == []
    assert _descriptors() == before


@pytest.mark.parametrize(
    ("offset", "size"), [(33, 0), (32, 1), (0, 33), (-1, 4), (4, -1), (2**64 - 32, 64), (1, 2**64 - 1), (2**63, 0)]
)
def test_a_part_lies_within_its_region(regions, key, offset, size):
    """Also where the object would go on, and where 64 bits would wrap round."""
    regions.register("r", key, 0, 32)
    with pytest.raises(BadInput, match="Invalid offset"):
        regions.part("r", offset, size)


def test_a_part_is_no_larger_than_one_read(regions, key, monkeypatch):
    """Linux would read less of it, which would look as if the object had shrunk."""
    monkeypatch.setattr(shared_memory, "MAX_PART", 16)
    regions.register("r", key, 0, SIZE)

    assert regions.part("r", 0, 16).read() == bytes(range(16))
    with pytest.raises(BadInput, match="of which 16 is the most"):
        regions.part("r", 0, 17)


@pytest.mark.parametrize(
    "key",
    ["", "/", "//", "/.", "..", "/../etc/passwd", "//etc/passwd", "a/b", "/a/", "a\0b", "/sem.lock", "sem.lock",
     "/triton_python_backend_shm_region_1"],
)  # fmt: skip
def test_a_key_is_never_a_path(regions, key):
    """Slashes, dots and reserved names are refused before anything is opened."""
    with pytest.raises(BadInput, match="invalid args"):
        regions.register("r", key, 0, 1)


def test_only_a_shared_memory_object_is_opened(regions, key):
    """A link, a folder, a pipe and nothing at all look the same from outside, and none keeps the server waiting."""
    path = FOLDER / key[1:]
    path.unlink()
    told = set()
    for make in (lambda: None, lambda: path.symlink_to("/etc/hostname"), path.mkdir, lambda: os.mkfifo(path)):
        make()
        with pytest.raises(BadInput, match="Unable to open shared memory region") as refused:
            regions.register("r", key, 0, 1)
        told.add(str(refused.value))
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)

    assert len(told) == 1
    assert str(FOLDER) not in told.pop()


def test_a_key_that_is_too_long_is_no_object(regions):
    """The system refuses it, and we say it in our words."""
    with pytest.raises(BadInput, match="Unable to open"):
        regions.register("r", "k" * 300, 0, 1)


@pytest.mark.parametrize("name", ["", "n" * 256])
def test_a_region_needs_a_name(regions, key, name):
    """An empty name means all of them elsewhere; a long one would be kept for every region."""
    with pytest.raises(BadInput, match="1 to 255 characters"):
        regions.register(name, key, 0, SIZE)


def test_an_object_that_shrank_is_an_error(regions, key):
    """No signal ends the process, and the object does not grow again."""
    regions.register("r", key, 0, SIZE)
    part = regions.part("r", 0, SIZE)
    os.truncate(FOLDER / key[1:], 8)

    with pytest.raises(BadInput, match="'r' has shrunk"):
        part.read()
    with pytest.raises(BadInput, match="'r' has shrunk"):
        part.write(bytes(SIZE))
    assert os.stat(FOLDER / key[1:]).st_size == 8
    assert regions.part("r", 0, 8).read() == bytes(range(8))


def test_an_output_that_is_too_large_is_not_written(regions, key):
    """It would overwrite what stands behind the part."""
    regions.register("r", key, 0, SIZE)
    with pytest.raises(BadInput, match="an output of 5 bytes does not fit into the 4 bytes"):
        regions.part("r", 0, 4).write(bytes(5))

    assert regions.part("r", 0, SIZE).read() == bytes(range(SIZE))


def test_shared_memory_that_is_full_is_an_error(regions, tmp_path, monkeypatch):
    """A write that the system refuses is told, as it would be where a mapping ends the process."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    (tmp_path / "full").write_bytes(bytes(SIZE))
    regions.register("r", "/full", 0, SIZE)
    part = regions.part("r", 0, SIZE)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, part.region.descriptor)  # ENOSPC for every write ...
    monkeypatch.setattr(os, "fstat", lambda _: os.stat(tmp_path / "full"))  # ... on an object of the right size

    with pytest.raises(BadInput, match="cannot be written"):
        part.write(bytes(SIZE))
    os.close(full)


def test_a_client_cannot_use_up_the_descriptors(regions, key, monkeypatch):
    """At the limit no more is registered until something is unregistered."""
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 2)
    regions.register("a", key, 0, SIZE)
    regions.register("b", key, 0, SIZE)
    with pytest.raises(LimitReached, match="2 shared memory regions"):
        regions.register("c", key, 0, SIZE)
    regions.unregister("a")
    regions.register("c", key, 0, SIZE)


def test_switched_off_nothing_is_registered(key):
    """Register, unregister and use are not supported; there is nothing to tell."""
    regions = Regions(enabled=False)
    for call in (
        lambda: regions.register("r", key, 0, SIZE),
        lambda: regions.unregister(""),
        lambda: regions.part("r", 0, 1),
    ):
        with pytest.raises(NotSupported, match="Client shared memory is disabled"):
            call()
    assert regions.status("") == []


def test_threads_register_one_name_once(regions, key):
    """Of many that want a name at the same time, one gets it; no descriptor is lost."""
    before = _descriptors()
    start = threading.Barrier(8)
    got = []

    def register(number):
        start.wait(10)
        for name in map(str, range(20)):
            try:
                regions.register(name, key, 0, SIZE)
                got.append(name)
            except AlreadyExists:
                regions.part(name, 0, number).read()

    threads = [threading.Thread(target=register, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert sorted(got) == sorted(map(str, range(20)))
    regions.unregister("")
    assert _descriptors() == before


def test_bytes_in_shared_memory_count_as_bytes_in_work(tmp_path, key):
    """A short message that claims more of it than the server may have in work is refused, and the next is answered."""
    (tmp_path / "echo.onnx").write_bytes(identity(np.float32, [None]))
    os.truncate(FOLDER / key[1:], 8 << 20)  # it takes no memory until it is read
    config = ServeConfig(
        paths=(tmp_path / "echo.onnx",), port=0, device="cpu", threads=1, shared_memory=True, max_bytes=1 << 20
    )
    server = start(config)
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            stub.SystemSharedMemoryRegister(
                pb.SystemSharedMemoryRegisterRequest(name="r", key=key, offset=0, byte_size=8 << 20)
            )
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(_in_region(8 << 20))
            answer = stub.ModelInfer(_in_region(64))
    finally:
        server.stop(drain_s=0)

    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "are in work" in refused.value.details()  # not the client's own limit, which the answer would exceed
    assert answer.raw_output_contents[0] == bytes(range(64))


def _in_region(size):
    request = pb.ModelInferRequest(model_name="echo")
    sent = request.inputs.add(name="x", datatype="FP32", shape=[size // 4])
    sent.parameters["shared_memory_region"].string_param = "r"
    sent.parameters["shared_memory_byte_size"].int64_param = size
    return request


def _descriptors():
    return len(os.listdir("/proc/self/fd"))
