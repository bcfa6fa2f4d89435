"""The indexed job in deploy/ and the page on Spark do what they say."""

import re
import tomllib
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from msgspec.json import decode
from pyarrow import parquet

from edgeward.commands import app
from examples import spark_scoring
from score.config import ScoreConfig
from score.run import score
from score.units import UnitReport
from tests.serve_bundles import write_text_bundle

ROOT = Path(__file__).parents[1]


def parts(folder):
    """The sha256 of every part, and of _SUCCESS."""
    paths = [path for path in Path(folder).iterdir() if path.name.startswith("part-") or path.name == "_SUCCESS"]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two files of 100 rows each, in units of 10."""
    folder = tmp_path_factory.mktemp("score")
    write_text_bundle(folder / "models" / "tweets")
    (folder / "data").mkdir()
    for name in ("a", "b"):
        texts = [None if row % 7 == 0 else f"the film is {'good' if row % 3 else 'bad'} {name}" for row in range(100)]
        parquet.write_table(pa.table({"text": texts}), folder / "data" / f"{name}.parquet")
    return ScoreConfig(
        folder / "models" / "tweets",
        (str(folder / "data" / "*.parquet"),),
        out=str(folder / "alone"),
        unit_rows=10,
        processes=1,
        threads=1,
        batch=8,
        decoders=1,
    )


@pytest.fixture(scope="module")
def alone(config):
    """What there is when one process has scored everything."""
    score(config)
    return parts(config.out)


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load((ROOT / "deploy" / "score-job.yaml").read_text())["spec"]


def arguments(job, index):
    """The command line of a pod, as Kubernetes fills it in."""
    (container,) = job["template"]["spec"]["containers"]
    (variable,) = container["env"]
    assert variable["valueFrom"]["fieldRef"]["fieldPath"].endswith("['batch.kubernetes.io/job-completion-index']")
    return [word.replace(f"$({variable['name']})", str(index)) for word in container["args"]]


def test_the_pods_of_the_job_share_out_one_run(job, config, alone, tmp_path):
    """Their command lines, with other paths, give what one process gives, and only the last one gives _SUCCESS."""
    out = tmp_path / "tweets"
    indices = range(job["completions"])
    for index in reversed(indices):
        pod = app.parse_args(arguments(job, index), exit_on_error=False, print_error=False)[1].arguments["config"]
        missing = score(replace(config, out=str(out), shard=pod.shard)).missing
        assert (out / "_SUCCESS").exists() == (index == 0) == (missing == 0)

    assert parts(out) == alone


def test_the_job_gives_its_pods_what_they_name(job):
    """Every path of the command line lies in a volume, the output alone can be written, and no error is tried again."""
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    score_config = app.parse_args(arguments(job, 0), exit_on_error=False, print_error=False)[1].arguments["config"]

    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    read = [str(score_config.bundle), *score_config.inputs]
    assert all(mounts["/" + path.split("/")[1]] for path in read)
    assert not mounts["/" + score_config.out.split("/")[1]]
    exit_codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert exit_codes == [{"containerName": container["name"], "operator": "In", "values": [1, 2]}]


def test_the_image_has_every_package():
    """What pyproject.toml puts into the wheel is copied to where the wheel is built."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = re.findall(r"^COPY (\w+) \1$", (ROOT / "deploy" / "Containerfile").read_text(), re.MULTILINE)

    assert sorted(copied) == sorted(packages["packages"])


def test_an_executor_of_spark_writes_the_same_parts(config, alone, tmp_path):
    """Given the names of units in batches of Arrow, as mapInArrow gives them, it writes what one process writes."""

    def on_one_executor(config, plan, left):
        names = pa.record_batch({"unit": [unit.name for unit in left]})
        for batch in spark_scoring.score_units(config, plan)([names.slice(0, 3), names.slice(3)]):
            yield from (decode(report, type=UnitReport) for report in batch.column("report").to_pylist())

    assert score(replace(config, out=str(tmp_path)), on_one_executor).missing == 0
    assert parts(tmp_path) == alone


def test_an_executor_of_spark_gives_each_row_its_answers(config):
    """The columns that were there come first, then those of the answers, the same as in the parts."""
    table = parquet.read_table(config.inputs[0].replace("*", "a"))
    given = pa.Table.from_batches(spark_scoring.score_rows(config.bundle)(table.to_batches(max_chunksize=30)))
    score(config)
    expected = pa.concat_tables(map(parquet.read_table, sorted(Path(config.out).glob("part-000000-*.parquet"))))

    assert given.drop_columns(["text"]).equals(expected.drop_columns(["_file", "_row"]).replace_schema_metadata())


def test_the_page_names_every_option():
    """docs/scoring.md has the options that there are, and no others."""
    page = (ROOT / "docs" / "scoring.md").read_text().split("### Spark")[0]
    options = {f"--{field.name.replace('_', '-')}" for field in fields(ScoreConfig)} - {"--bundle", "--inputs"}

    assert set(re.findall(r"(?<!-)--[a-z][a-z-]*", page)) == options
