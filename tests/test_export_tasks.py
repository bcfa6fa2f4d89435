"""Several tasks of mixed kinds, some labels missing, from a checkpoint to a served answer that is proved."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bundle import preprocess
from bundle.errors import BundleError, DataError, GateFailed
from bundle.manifest import Latency, to_json
from bundle.model import load_model
from bundle.session import Session
from edgeward import bundles
from export import gate, goldens, search, source
from export.bench import Candidate
from export.build import REPORT, ExportConfig, export_checkpoint
from export.ladder import DYNAMIC, FP32, REFIT, STATIC
from export.memory import Memory
from export.report import Report, render
from finetune.checkpoint import load_checkpoint
from finetune.data import load_dataset
from finetune.target import Target
from tests.export_examples import clock, write_mlp

COLUMNS = ("kind", "tags:multilabel", "size:regression")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_mlp(tmp_path_factory.mktemp("tasks"), COLUMNS)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The result of an export with every variant tried, static int8 with one head or the other the fastest."""
    out = tmp_path_factory.mktemp("bundles") / "tasks"
    config = ExportConfig(checkpoint, out=out, max_drop=5, refit_head=True, effort="fast", threads=1)
    return export_checkpoint(config, timer=clock(1.0, 0.9, 0.5))


def held_out(checkpoint):
    """Raw examples of the gate split, and their targets."""
    loaded = load_checkpoint(checkpoint)
    splits = loaded.splits
    dataset = load_dataset(splits.data, "vector", input_column=splits.input_columns, label_column=splits.label_columns)
    indices = splits.indices(dataset, "gate")
    return [dataset.raw(int(i)) for i in indices], [target.take(indices) for target in dataset.targets]


def test_scores_are_those_of_the_served_answers(exported, checkpoint):
    """Scikit-learn says the same of what the bundle answers, on the examples whose label is known."""
    from sklearn import metrics

    raws, (kinds, tags, sizes) = held_out(checkpoint)
    answers = load_model(exported.bundle, device="cpu").predict(raws)
    labels = np.array([kinds.labels.index(label.decode()) for label in answers["kind.label"][:, 0]])
    known = kinds.known, tags.known, sizes.known
    served = exported.report.served

    assert [record.examples for record in exported.report.comparison] == [int(mask.sum()) for mask in known]
    assert all(0 < mask.sum() < len(raws) for mask in known)
    truth, answered = kinds.values[known[0]], labels[known[0]]
    assert served["kind.accuracy"] == pytest.approx(metrics.accuracy_score(truth, answered))
    assert served["kind.macro_f1"] == pytest.approx(metrics.f1_score(truth, answered, average="macro"))
    truth, answered = tags.values[known[1]], answers["tags.predicted"][known[1]]
    assert served["tags.exact_match"] == pytest.approx(metrics.accuracy_score(truth, answered))
    assert served["tags.micro_f1"] == pytest.approx(metrics.f1_score(truth, answered, average="micro"))
    truth, answered = sizes.values[known[2]], answers["size.value"][known[2], 0]
    assert served["size.rmse"] == pytest.approx(metrics.root_mean_squared_error(truth, answered), rel=1e-5)
    assert served["size.r2"] == pytest.approx(metrics.r2_score(truth, answered), rel=1e-5)
    assert served["size.r2"] > 0.7


def test_the_manifest_has_the_task_that_came_closest(exported):
    """report.json has a gate record for every task, the manifest the worst of them."""
    model = load_model(exported.bundle, device="cpu")
    report = exported.report

    assert [record.task for record in report.gate] == ["kind", "tags", "size"]
    assert report.gate == report.comparison
    assert model.variant.gate in report.gate
    assert model.variant.gate.drop_upper == max(record.drop_upper for record in report.gate)
    assert {name for golden in model.manifest.goldens for name in golden.logits[model.variant.name]} == {
        "kind.logits",
        "tags.logits",
        "size.logits",
    }
    assert to_json(msgspec.json.decode((exported.bundle / REPORT).read_bytes(), type=Report)) == to_json(report)


def test_provenance_repeats_the_command(exported, checkpoint):
    """Every option that was given or holds by default is in the manifest, as it would be typed."""
    command = exported.report.provenance.command
    expected = (
        "--version 1 --max-drop 5 --confidence 0.95 --target auto --effort fast --optimize latency --variant auto "
        "--calibration 200 --refit-head --threads 1"
    )
    assert " ".join(command) == f"edgeward export {checkpoint} --out {exported.bundle} {expected}"


def test_both_heads_are_in_the_report(exported):
    """What static int8 lost with and without a refitted head; of the two, one alone competes."""
    static, refit = exported.report.candidates[2:]
    outcomes = {one.name: one.outcome for one in (static, refit)}

    assert set(static.selection_drop) == set(refit.selection_drop) == {"kind.accuracy", "tags.exact_match", "size.rmse"}
    assert static.latency == refit.latency
    assert outcomes.pop(exported.report.shipped) == "shipped"
    assert list(outcomes.values()) == ["less accurate"]


def test_tables_name_every_task(exported):
    """On the terminal: each task's metrics, the verdict, and what inspect says of the bundle."""
    console = Console(width=240)
    with console.capture() as capture:
        console.print(render(exported.report))
        console.print(bundles._render(load_model(exported.bundle, device="cpu").manifest))
    text = capture.get()

    for words in (
        "kind accuracy",
        "tags exact match",
        "size RMSE",
        "size R²",
        "Gate PASS: ",
        "of 3 tasks",
        "any of x, y",
    ):
        assert words in text
    assert "vector of 6 numbers as 'features'" in text


def test_one_failing_task_fails_the_model(checkpoint, tmp_path):
    """A variant asked for by name must pass in all; the message names the task that did not."""
    config = ExportConfig(
        checkpoint, out=tmp_path / "b", variant="int8-static", max_drop=0.3, threads=1, report=tmp_path / "report.json"
    )
    with pytest.raises(GateFailed, match=r"(FAIL|INCONCLUSIVE): (kind|tags|size): .* No bundle was written"):
        export_checkpoint(config, timer=clock(1.0, 0.5))

    records = json.loads((tmp_path / "report.json").read_bytes())["gate"]
    assert {record["verdict"] for record in records} - {"PASS"}
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("column", "metric"), [("tags:multilabel", "exact_match"), ("size:regression", "rmse"), ("kind", "accuracy")]
)
def test_one_task_has_bare_names(column, metric, tmp_path):
    """Outputs, scores and records of a single task of any kind carry no prefix."""
    checkpoint = write_mlp(tmp_path, (column,), widths=())
    config = ExportConfig(checkpoint, out=tmp_path / "b", variant="int8-dynamic", max_drop=10, threads=1)
    report = export_checkpoint(config, timer=clock(1.0, 0.5)).report

    assert [(record.task, record.metric) for record in report.gate] == [(None, metric)]
    assert set(report.candidates[0].selection_drop) == {metric}
    assert metric in report.pytorch
    assert list(report.certifiable) == [metric] * (metric != "rmse")
    assert set(load_model(tmp_path / "b", device="cpu").manifest.goldens[0].logits["int8-dynamic"]) == {"logits"}


def test_refit_recovers_what_int8_shifted(checkpoint):
    """When the backbone's rounding moves all features, the old head suffers and the new one does not."""
    from export import graph, quantize, refit

    loaded = load_checkpoint(checkpoint)
    dataset = load_dataset(
        loaded.splits.data,
        "vector",
        input_column=loaded.splits.input_columns,
        label_column=loaded.splits.label_columns,
    )
    calibration = list(source.calibration_rows(loaded, dataset, 200))
    narrow = [row * np.float32(0.15) for row in calibration]  # ranges that real examples exceed: they are clipped
    spec, tasks = loaded.spec.input, loaded.spec.tasks
    split = source.reference_split(loaded, dataset, "gate", Memory((), enabled=False))
    plain = quantize.int8_minmax(graph.to_onnx(loaded.network, spec, tasks, calibration), spec, narrow)
    errors = []
    for compiled in (plain, refit.int8_static_refit(loaded, dataset, narrow)):
        session = Session(compiled, device="cpu", threads=1)
        logits = graph.joined(session.run(preprocess.collate(list(split.rows), spec)), tasks)
        errors.append(gate.judge_tasks(tasks, split.targets, split.logits, logits, budget=0.05)[2])

    plain_error, refitted = errors
    assert plain_error.verdict == "FAIL"
    assert refitted.drop < plain_error.drop / 2


def test_a_split_without_a_task_is_an_error(checkpoint):
    """Nothing can be said of a task whose labels are all missing from a held-out split."""
    loaded = load_checkpoint(checkpoint)
    dataset = load_dataset(
        loaded.splits.data,
        "vector",
        input_column=loaded.splits.input_columns,
        label_column=loaded.splits.label_columns,
    )
    held_out = loaded.splits.indices(dataset, "gate")
    dataset.targets[2].values[held_out] = np.nan
    with pytest.raises(DataError, match="the gate split holds 0 examples with a known 'size'"):
        source.check_known("gate", dataset.targets, held_out)


def test_refitting_what_is_not_wanted_is_refused(checkpoint, tmp_path):
    """--refit-head with another variant asked for by name would do nothing."""
    config = ExportConfig(checkpoint, out=tmp_path / "b", variant="fp32", refit_head=True)
    with pytest.raises(BundleError, match="int8-static-refit"):
        export_checkpoint(config)


def test_goldens_show_every_answer():
    """Ranges of numbers, sets of labels, and of several tasks what is new in most of them."""
    n = 80
    random = np.random.default_rng(0)
    sizes = random.normal(size=n)
    sizes[:5] = np.nan
    tags = random.integers(0, 2, (n, 2)).astype(np.float32)
    kinds = np.zeros(n, np.int64)
    kinds[-2:] = 1

    def picked(*targets):
        return goldens.pick(source.Split([], targets, np.zeros((n, 1)), np.arange(n)))

    size = Target("size", "regression", (), sizes)
    tag = Target("tags", "multilabel", ("x", "y"), tags)
    kind = Target("kind", "multiclass", ("a", "b"), kinds)
    edges = np.quantile(sizes[5:], np.arange(1, 8) / 8)
    ranges = np.searchsorted(edges, sizes[picked(size)])

    assert len(set(ranges.tolist())) >= 7
    assert len({tuple(tags[i]) for i in picked(tag)[:4]}) == 4
    assert set(kinds[picked(kind)[:2]]) == {0, 1}
    assert {78, 79} & set(picked(kind, tag, size))


def candidate(recipe, ratio, drop, count=400, won=0.0):
    """A variant that lost a share of the answers of PyTorch, so much more than it won."""
    answers = np.arange(count)
    truth, reference = np.zeros(count), answers >= count * (1 - won)
    record = gate.judge(truth, reference, answers < count * (drop + won), budget=0.05)
    chance = gate.chance_of_passing([record], scale=1)
    latency = Latency(p50_ms=ratio, fp32_p50_ms=1.0, ratio=ratio, ratio_lower=ratio, ratio_upper=ratio, threads=1)
    return Candidate(recipe, b"123", "cpu", True, 0, np.zeros((1, 1)), (record,), chance, drop, latency)


def test_of_two_heads_the_one_that_lost_more_does_not_compete():
    """They run the same kernels; accuracy decides between them, and not the clock."""
    config = ExportConfig(Path("checkpoint"), out=Path("bundle"))
    for (old, new), chosen in {(0.02, 0.01): "int8-static-refit", (0.01, 0.02): "int8-static"}.items():
        tried = [candidate(FP32, 1.0, 0), candidate(STATIC, 0.5, old), candidate(REFIT, 0.5, new)]
        assert search.choose(tried, config).name == chosen


def test_the_fastest_that_would_pass_is_chosen():
    """Before a faster one that lost much; where none would, the closest, if it is within the budget at all."""
    config = ExportConfig(Path("checkpoint"), out=Path("bundle"))
    fp32, sure = candidate(FP32, 1.0, 0), candidate(STATIC, 0.6, 0.01)
    unsure, hopeless = candidate(DYNAMIC, 0.3, 0.045, won=0.3), candidate(DYNAMIC, 0.3, 0.5)
    assert (unsure.within_budget, unsure.promising, sure.promising) == (True, False, True)
    assert search.choose([fp32, unsure, sure], config) is sure
    assert search.choose([fp32, unsure], config) is unsure
    assert search.choose([fp32, hopeless], config) is fp32
    assert search.choose([fp32, candidate(DYNAMIC, 0.98, 0)], config) is fp32


def test_a_slower_one_that_surely_passes_is_chosen_before_a_toss_up():
    """What the gate does not pass ships as fp32; where little is risked, the faster one is."""
    config = ExportConfig(Path("checkpoint"), out=Path("bundle"))
    fp32, sure = candidate(FP32, 1.0, 0), candidate(STATIC, 0.6, 0)
    toss_up = candidate(DYNAMIC, 0.5, 0.04, won=0.02)
    assert 0.5 < toss_up.chance < 0.8 < sure.chance
    assert search.choose([fp32, toss_up, sure], config) is sure
    assert search.choose([fp32, toss_up, replace(sure, latency=candidate(STATIC, 0.8, 0).latency)], config) is toss_up


def test_of_two_that_the_clock_cannot_tell_apart_the_more_accurate_is_chosen():
    """A faster median decides only where the intervals do not meet."""
    config = ExportConfig(Path("checkpoint"), out=Path("bundle"))
    fast, accurate = candidate(STATIC, 0.50, 0.02), candidate(DYNAMIC, 0.51, 0.01)
    tried = [candidate(FP32, 1.0, 0), fast, accurate]
    assert search.choose(tried, config) is fast
    wide = replace(fast, latency=msgspec.structs.replace(fast.latency, ratio_upper=0.52))
    assert search.choose([tried[0], wide, accurate], config) is accurate


def test_limits_of_time_and_size_bind():
    """What is over --max-latency-ms or --max-size-mb is not chosen, however accurate it is."""
    fp32, slow, fast = candidate(FP32, 1.0, 0), candidate(DYNAMIC, 0.6, 0), candidate(STATIC, 0.4, 0.02)
    limits = {"checkpoint": Path("checkpoint"), "out": Path("bundle")}
    assert search.choose([fp32, fast, slow], ExportConfig(**limits, max_latency_ms=0.5)) is fast
    assert search.choose([fp32, slow], ExportConfig(**limits, max_latency_ms=0.5)) is fp32
    assert not search.fits(slow, ExportConfig(**limits, max_size_mb=2e-6))
