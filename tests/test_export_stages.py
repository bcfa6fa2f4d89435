"""`edgeward finetune` refuses what could not ship before it trains it, and shows whatever was measured."""

from pathlib import Path

import pytest
from rich.console import Console

from bundle.errors import GateFailed
from bundle.log import captured
from edgeward import stages
from finetune.config import TrainConfig, TrainResult
from tests.export_examples import write_table


@pytest.fixture
def config(tmp_path):
    """A small dense network on a small table; one epoch, one thread."""
    data = write_table(tmp_path / "table.csv", 0, count=200)
    features = tuple(f"f{i}" for i in range(6))
    return TrainConfig(
        "mlp",
        str(data),
        out=tmp_path / "checkpoint",
        widths=(8,),
        input_column=features,
        label_column=("kind",),
        epochs=1,
        threads=1,
    )


def test_too_slow_a_model_is_never_trained(config):
    """The limit is checked whatever the strategy, and nothing is left behind."""
    with pytest.raises(GateFailed, match="Nothing was trained"):
        stages.finetune(config, max_latency_ms=1e-6)
    assert [path.name for path in config.out.parent.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("preflight", [True, False])
def test_training_follows_the_preflight(config, preflight, capsys):
    """Of a network with new layers it is made unasked, and left out when it is not wanted."""
    with captured() as logs:
        stages.finetune(config, preflight=preflight)

    events = [entry["event"] for entry in logs]
    assert ("pre-flight" in events) == preflight
    assert events[-1] == "checkpoint written"
    assert (config.out / "checkpoint.json").is_file()
    assert "on the validation split" in capsys.readouterr().out


def shown(**fields):
    """What the command writes of a result."""
    result = TrainResult(
        out=Path("checkpoint"),
        trainable_parameters=10,
        total_parameters=20,
        examples={"train": 3, "validation": 1},
        seconds=1.0,
        **{"strategy": "full", "rungs": (), "facts": {}, **fields},
    )
    console = Console(width=160)
    with console.capture() as capture:
        console.print(stages._render(result))
    return capture.get()


def test_rungs_are_a_table_of_their_own():
    """Each strategy that was tried, what it reached, and what it cost; the first one gained nothing yet."""
    history = ({"epoch": 1.0, "accuracy": 0.5}, {"epoch": 2.0, "accuracy": 0.75})
    rungs = ({"strategy": "probe", "seconds": 1.5}, {"strategy": "last", "gain": 0.0625, "seconds": 20.0})
    text = shown(
        strategy="auto",
        metrics={"accuracy": 0.75, "macro_f1": 0.7},
        history=history,
        rungs=rungs,
        facts={"oov_tokens": 0.125},
    )

    assert "by auto, on validation accuracy 0.75, macro F1 0.7" in text
    for words in ("rungs", "probe", "last", "0.0625", "gain", "oov tokens 0.125"):
        assert words in text


def test_several_tasks_fit_the_table():
    """Of many columns the first of each task is shown; the line below has them all."""
    metrics = {f"{task}.{name}": 0.5 for task in ("one", "two", "three") for name in ("accuracy", "macro_f1", "loss")}
    text = shown(metrics={**metrics, "loss": 1.5}, history=({"epoch": 1.0, **metrics, "loss": 1.5},))
    table, line = text.split("checkpoint: ")

    assert "three.accuracy" in table
    assert "three.macro F1" not in table
    assert "three.macro F1 0.5" in line
    assert "epoch" in table
    assert "loss" in table
