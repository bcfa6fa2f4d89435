"""The real pipeline, once a session, at the size of a toy: a tiny BERT on tweets and a tiny network on digits."""

import os
import signal
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ["GRPC_EXPERIMENTS"] = "-event_engine_listener"  # before anything imports grpc; as the command line does
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--asyncio", action="store_true", help="servers that may choose take asyncio")


@pytest.fixture(scope="session", autouse=True)
def _transport(pytestconfig):
    """Servers that a test starts in this process, and that may choose, take the completion queue, or all asyncio."""
    with pytest.MonkeyPatch.context() as patch:
        if pytestconfig.getoption("asyncio"):
            from serve import transport

            patch.setattr("serve.server._fastest", lambda: transport.Transport)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test takes anything from the user's cache, or leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def stub(server):
    """The generated stub of a test's server."""
    import grpc

    from protos import inference_pb2_grpc

    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def mood(tmp_path_factory) -> Path:
    """A bundle of texts with three labels, its graph made by hand."""
    from tests.serve_bundles import write_text_bundle

    return write_text_bundle(tmp_path_factory.mktemp("bundle") / "mood")


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory) -> Path:
    """A tiny BERT, every weight trained for two epochs on 900 real tweets."""
    from finetune.train import TrainConfig, train
    from tests.finetune_examples import write_bert, write_tweets

    folder = tmp_path_factory.mktemp("text")
    model, data = write_bert(folder / "bert"), write_tweets(folder / "tweets.csv", 900)
    config = TrainConfig(
        f"transformers:{model}",
        str(data),
        out=folder / "checkpoint",
        strategy="full",
        epochs=2,
        learning_rate=1e-3,
        max_length=48,
        split=(0.4, 0.1, 0.2, 0.3),
    )
    return train(config).out


@pytest.fixture(scope="session")
def image_checkpoint(tmp_path_factory) -> Path:
    """A tiny convolutional network, every weight trained for four epochs on 700 digits, some of them JPEG."""
    return _train_tiny(tmp_path_factory.mktemp("image"), split=(0.4, 0.1, 0.2, 0.3))


@pytest.fixture(scope="session")
def unproved_checkpoint(tmp_path_factory) -> Path:
    """The same with hardly an example to prove anything on: seven in the gate split.

    Seven equal answers leave a drop of up to 28 points open, on any machine.
    """
    return _train_tiny(tmp_path_factory.mktemp("unproved"), split=(0.4, 0.1, 0.49, 0.01))


def _train_tiny(folder: Path, split: tuple[float, float, float, float]) -> Path:
    from PIL import Image

    from finetune.train import TrainConfig, train
    from tests.finetune_examples import write_digits, write_factory

    data, factory = write_digits(folder / "digits", 700), write_factory(folder)
    for png in sorted(data.rglob("*.png"))[::3]:
        Image.open(png).save(png.with_suffix(".jpg"), quality=95)
        png.unlink()
    config = TrainConfig(
        f"python:{factory}:tiny",
        str(data),
        out=folder / "checkpoint",
        strategy="full",
        epochs=4,
        learning_rate=0.1,
        split=split,
    )
    return train(config).out


@pytest.fixture(scope="session")
def text_bundle(text_checkpoint, tmp_path_factory) -> Path:
    """The tiny BERT in dynamic int8, called `tweets`."""
    from export.build import ExportConfig, export_checkpoint

    out = tmp_path_factory.mktemp("bundles") / "tweets"
    config = ExportConfig(text_checkpoint, out=out, variant="int8-dynamic", max_drop=20)
    return export_checkpoint(config).bundle


@pytest.fixture(scope="session")
def image_bundle(image_checkpoint, tmp_path_factory) -> Path:
    """The tiny convolutional network in static int8, called `digits`."""
    from export.build import ExportConfig, export_checkpoint

    out = tmp_path_factory.mktemp("bundles") / "digits"
    config = ExportConfig(image_checkpoint, out=out, variant="int8-static", max_drop=20)
    return export_checkpoint(config).bundle


@pytest.fixture
def schedule():
    """Makes schedulers, and closes them."""
    from serve.queue import Policy
    from serve.scheduler import Scheduler
    from serve.statistics import Statistics
    from tests.scheduling import PATIENCE_S

    made = []

    def make(model, **policy):
        scheduler = Scheduler(model, Policy(**policy), statistics := Statistics())
        made.append((model, scheduler))
        scheduler.snapshot = statistics.snapshot
        return scheduler

    yield make
    for model, scheduler in made:
        model.let_go()
        assert scheduler.close(PATIENCE_S)


@pytest.fixture
def busy(schedule):
    """Makes schedulers whose one instance is in a run, and the run's model."""
    from tests.scheduling import Asked, Doubler

    def make(**policy):
        model = Doubler(blocked=True)
        scheduler = schedule(model, **policy)
        Asked(0, key=None).by(scheduler)
        model.await_run()
        return model, scheduler

    return make
