"""The search remembers what it computed, keeps layers in fp32 where that pays, and ships by what is asked for."""

import json

import onnx
import pytest

import bundle
import export
import finetune
from bundle.errors import EdgewardError, GateFailed
from bundle.model import load_model
from bundle.store import open_bundle
from export import bench, graph, ladder, memory, placement, quantize, search, source, timing
from export.build import PAGE, ExportConfig, export_checkpoint
from export.timing import Timing
from tests.export_examples import clock, write_mlp


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Dense layers on vectors of numbers, one label."""
    return write_mlp(tmp_path_factory.mktemp("search"), ("kind",), widths=(16, 16))


def never(*_, **__):
    raise AssertionError("it was computed again")


def test_a_second_export_remembers_the_first(checkpoint, tmp_path, monkeypatch):
    """With another budget nothing is compiled, run over the selection split or timed again, and the figures agree."""
    first = export_checkpoint(ExportConfig(checkpoint, out=tmp_path / "a", max_drop=5, effort="fast", threads=1))
    for function in ("int8_dynamic", "int8_static", "prepared"):
        monkeypatch.setattr(quantize, function, never)
    monkeypatch.setattr(bench, "predict_logits", lambda *a, **k: never())
    monkeypatch.setattr(timing, "fastest", never)
    monkeypatch.setattr(bench.Candidate, "predict", lambda self, split, source: split.logits)  # of the gate split
    second = export_checkpoint(ExportConfig(checkpoint, out=tmp_path / "b", max_drop=6, effort="fast", threads=1))

    assert second.report.budget == 0.06
    assert [one.latency for one in second.report.candidates] == [one.latency for one in first.report.candidates]
    assert [one.selection for one in second.report.candidates] == [one.selection for one in first.report.candidates]


def test_another_machine_answers_for_itself(checkpoint, tmp_path, monkeypatch):
    """One graph is compiled for all machines; what the reference answers on one is nothing that another remembers."""
    config = ExportConfig(checkpoint, out=tmp_path / "b", threads=1, calibration=77)
    source.open_source(config)
    monkeypatch.setattr(graph, "to_onnx", never)
    monkeypatch.setattr(graph, "check_parity", never)
    monkeypatch.setattr(source.evaluate, "logits", never)
    source.open_source(config)

    monkeypatch.setattr(memory, "cpu_name", lambda: "another")
    with pytest.raises(AssertionError, match="computed again"):
        source.open_source(config)
    monkeypatch.undo()
    monkeypatch.setattr(graph, "to_onnx", never)
    monkeypatch.setattr(memory, "isa_class", lambda: "another")
    source.open_source(config)


@pytest.mark.parametrize("package", [bundle, export, finetune])
def test_other_code_remembers_nothing(package, tmp_path, monkeypatch):
    """A change of the code that makes the graph, or that runs the reference, is another memory."""
    before = source._code.__wrapped__()
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    assert source._code.__wrapped__() != before


def test_an_interrupted_export_goes_on(checkpoint, tmp_path, monkeypatch):
    """What was compiled before the interruption is not compiled again, and nothing half-written was left."""
    config = ExportConfig(checkpoint, out=tmp_path / "b", max_drop=5, effort="fast", threads=1, calibration=123)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "int8_static", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(config, timer=clock())
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(quantize, "int8_dynamic", never)
    assert export_checkpoint(config, timer=clock(1.0, 0.9, 0.5)).report.shipped == "int8-static"


def test_without_the_cache_everything_is_computed(checkpoint, tmp_path, monkeypatch):
    """--no-cache neither reads nor writes."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    config = ExportConfig(checkpoint, out=tmp_path / "b", variant="int8-dynamic", max_drop=5, threads=1, cache=False)
    export_checkpoint(config, timer=clock(1.0, 0.5))
    assert not folder.exists()


def test_a_variant_that_cannot_be_compiled_is_in_the_report(checkpoint, tmp_path, monkeypatch):
    """The others are tried all the same; asked for by name it is an error."""
    from bundle.errors import ModelError

    def broken(*_, **__):
        raise ModelError("Gemm 'node_linear' cannot be quantized: no.")

    monkeypatch.setattr(quantize, "int8_static", broken)
    options = {"max_drop": 5, "threads": 1, "cache": False}
    config = ExportConfig(checkpoint, out=tmp_path / "b", effort="fast", **options)
    report = export_checkpoint(config, timer=clock(1.0, 0.5)).report
    failed = report.candidates[-1]

    assert (failed.name, failed.outcome, report.shipped) == ("int8-static", "failed", "int8-dynamic")
    assert "node_linear" in failed.because
    with pytest.raises(ModelError, match="node_linear"):
        export_checkpoint(ExportConfig(checkpoint, out=tmp_path / "c", variant="int8-static", **options))


def test_a_budget_of_nothing_is_a_budget(checkpoint, tmp_path, capsys):
    """What cannot be shown to be better than the reference does not pass it, and the report is whole."""
    config = ExportConfig(checkpoint, out=tmp_path / "b", max_drop=0, effort="fast", threads=1)
    result = export_checkpoint(config, timer=clock(1.0, 0.9, 0.5))

    assert result.report.budget == 0
    assert (result.bundle / PAGE).stat().st_size > 0
    assert "can pass a budget of 0" in capsys.readouterr().err


def test_limits_are_kept_or_nothing_is_written(checkpoint, tmp_path):
    """When not even what may ship is as fast as asked for, the report says by how much, and exit is 3."""
    config = ExportConfig(
        checkpoint,
        out=tmp_path / "b",
        max_drop=5,
        effort="fast",
        threads=1,
        max_latency_ms=0.1,
        report=tmp_path / "r.json",
    )
    with pytest.raises(GateFailed, match=r"at most 0.1 ms .*No bundle was written") as caught:
        export_checkpoint(config, timer=clock(1.0, 0.9, 0.5))
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert {one["outcome"] for one in json.loads((tmp_path / "r.json").read_bytes())["candidates"]} == {
        "shipped",
        "slower",
    }


def test_throughput_leaves_out_what_depends_on_its_batch(checkpoint, tmp_path):
    """For rows a second only variants count that are bit-equal in every batch; both objectives are in the report."""

    def batches(candidate, reference, feeds):
        alone = len(next(iter(feeds[0].values()))) == 1
        ratio = 0.4 if alone else 0.8
        return Timing(p50_ms=ratio, reference_p50_ms=1.0, ratio=ratio, ratio_lower=ratio, ratio_upper=ratio)

    config = ExportConfig(checkpoint, out=tmp_path / "b", max_drop=5, effort="fast", threads=1, optimize="throughput")
    report = export_checkpoint(config, timer=batches).report
    shipped = next(one for one in report.candidates if one.name == report.shipped)

    assert report.shipped == "int8-static"
    assert shipped.rows_per_s == pytest.approx(8 / 0.8 * 1e3)
    assert [batch.batch for batch in report.batches] == [1, 8]
    assert load_model(tmp_path / "b", device="cpu").variant.rows_per_s == shipped.rows_per_s


def test_layers_that_int8_harms_stay_in_fp32(checkpoint, tmp_path, monkeypatch):
    """Of static int8 that is too inaccurate the layers at fault stay in fp32, no others, and the report says why."""
    real = quantize.int8_static

    def harmful(prepared, spec, known, *, kept=(), **options):
        """As it is, but as long as the first dense layer is int8 all ranges are a hundredth of what they should be."""
        if not set(placement.groups(prepared, spec)[0].nodes) & set(kept):
            known = {name: (low / 100, high / 100) for name, (low, high) in known.items()}
        return real(prepared, spec, known, kept=kept, **options)

    def times(graph, feeds, threads):
        """Every node takes as long as every other; in int8 half as long."""
        nodes = onnx.load_from_string(graph).graph.node
        took = {"Gemm": 0.1, "MatMulIntegerToFloat": 0.05}
        return {node.name: took[node.op_type] for node in nodes if node.op_type in took}

    monkeypatch.setattr(quantize, "int8_static", harmful)
    monkeypatch.setattr(bench, "node_times", times)
    monkeypatch.setattr(search, "ladder", lambda *_: (ladder.STATIC,))
    config = ExportConfig(checkpoint, out=tmp_path / "b", max_drop=15, threads=1, cache=False)
    report = export_checkpoint(config, timer=clock(1.0, 0.5, 0.6)).report
    static, mixed = report.candidates[1:]

    assert (static.name, static.outcome) == ("int8-static", "less accurate")
    assert (mixed.name, mixed.outcome, report.shipped) == ("int8-mixed", "shipped", "int8-mixed")
    assert [(one.because, one.gain_ms) for one in mixed.kept] == [("int8 was too harmful for what it saved", 0.05)]
    assert mixed.kept[0].harm > 0.1
    assert static.selection_drop["accuracy"] > 0.1 > mixed.selection_drop["accuracy"]


def test_hopeless_int8_is_not_mixed(checkpoint, tmp_path, monkeypatch):
    """Where int8 surely loses many times the budget, no layer is tried by itself."""
    real = quantize.int8_static

    def ruined(prepared, spec, known, **options):
        return real(prepared, spec, {name: (low / 100, high / 100) for name, (low, high) in known.items()}, **options)

    monkeypatch.setattr(quantize, "int8_static", ruined)
    monkeypatch.setattr(search.mixed, "rank", never)
    monkeypatch.setattr(search, "ladder", lambda *_: (ladder.STATIC,))
    config = ExportConfig(checkpoint, out=tmp_path / "b", max_drop=2, threads=1, cache=False)
    assert export_checkpoint(config, timer=clock(1.0, 0.5)).report.shipped == "fp32"


def test_too_few_examples_choose_no_layers(checkpoint, tmp_path, monkeypatch):
    """Where two changed answers leave open whether a variant passes, none is looked for by single layers."""
    monkeypatch.setattr(search.mixed, "rank", never)
    monkeypatch.setattr(search, "ladder", lambda *_: (ladder.STATIC,))
    config = ExportConfig(checkpoint, out=tmp_path / "b", max_drop=2, threads=1, cache=False)
    report = export_checkpoint(config, timer=clock(1.0, 0.5)).report
    assert [one.name for one in report.candidates] == ["fp32", "int8-static"]


def test_the_page_in_the_bundle_shows_no_example(checkpoint, tmp_path):
    """Flips with what they are lie only where the user asks for them; the bundle's page holds none of the data."""
    config = ExportConfig(
        checkpoint, out=tmp_path / "b", variant="int8-static", max_drop=20, threads=1, report=tmp_path / "r.html"
    )
    export_checkpoint(config, timer=clock(1.0, 0.5))
    inside, outside = (tmp_path / "b" / PAGE).read_text(), (tmp_path / "r.html").read_text()

    assert "int8-static" in inside
    assert "int8-static" in outside
    assert PAGE in open_bundle(tmp_path / "b").manifest.files
    assert len(outside) >= len(inside)


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    """One line says so, and no half of a bundle is there."""
    from bundle import store

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "seal", full)
    config = ExportConfig(checkpoint, out=tmp_path / "b", variant="int8-dynamic", max_drop=5, threads=1)
    with pytest.raises(EdgewardError, match=r"b was not written, and nothing is left of it: .*No space left"):
        export_checkpoint(config, timer=clock(1.0, 0.5))
    assert list(tmp_path.iterdir()) == []


def test_every_name_of_the_ladder_can_be_asked_for():
    """--variant takes what the report calls the candidates, and an unknown one is told which there are."""
    from bundle.errors import ModelError
    from bundle.manifest import VectorInput

    spec = VectorInput(column="x", size=3)
    for recipe in ladder.ladder(spec, "thorough", "cpu"):
        assert ladder.recipe_named(recipe.name, spec, "cpu") == recipe
    names = [recipe.name for recipe in ladder.ladder(spec, "thorough", "cpu")]
    assert len(set(names)) == len(names)
    with pytest.raises(ModelError, match="int8-dynamic"):
        ladder.recipe_named("int4", spec, "cpu")


@pytest.mark.parametrize(("option", "says"), [({"variant": "int4"}, "'int4'"), ({"metric": "f1"}, "'f1' is no metric")])
def test_names_that_are_wrong_are_refused_before_anything_is_compiled(checkpoint, tmp_path, monkeypatch, option, says):
    """It takes minutes where the model is large."""
    monkeypatch.setattr(search, "Bench", lambda *_: pytest.fail("something is compiled"))

    with pytest.raises(EdgewardError, match=says):
        export_checkpoint(ExportConfig(checkpoint, out=tmp_path / "b", threads=1, **option))
