"""What lies in deploy/ is held to the server: its options, its paths and its metrics."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from edgeward.commands import app
from serve.admission import Traffic
from serve.config import ServeConfig
from serve.metrics import Metrics
from serve.repository import open_repository
from tests.serve_bundles import identity

DEPLOY = Path(__file__).parents[1] / "deploy"


def config(arguments):
    """What the command makes of a command line."""
    return app.parse_args(arguments, exit_on_error=False, print_error=False)[1].arguments["config"]


def read_yaml(name):
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.fixture(scope="module")
def unit():
    lines = (DEPLOY / "edgeward.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))


@pytest.fixture(scope="module")
def pod():
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    return deployment["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def image():
    return (DEPLOY / "Containerfile").read_text()


def test_systemd_waits_for_the_drain(unit):
    """The unit's command line is one that the server takes, and SIGKILL comes after its drain."""
    _, *arguments = shlex.split(unit["ExecStart"])
    serve = config(arguments)

    assert serve.require_gate
    assert serve.drain_s < int(unit["TimeoutStopSec"])
    assert unit["KillMode"] == "mixed"  # two signals would end the processes of --processes undrained


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_takes_the_unit(unit, tmp_path):
    """No line of the unit is unknown to systemd."""
    here = (DEPLOY / "edgeward.service").read_text().replace("/opt/edgeward/bin/edgeward", sys.executable)
    (tmp_path / "edgeward.service").write_text(here)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "edgeward.service")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (found.returncode, [line for line in found.stderr.splitlines() if "edgeward.service" in line]) == (0, [])


def test_kubernetes_probes_what_the_server_listens_on(pod):
    """The probes ask the port and paths that the command line opens, and the pod is given its time to drain."""
    (container,) = pod["containers"]
    serve = config(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}

    assert ports == {"grpc": serve.port, "http": serve.http_port}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/readyz", "liveness": "/livez", "readiness": "/readyz",
    }  # fmt: skip
    assert {probe["port"] for probe in probes.values()} == {"http"}
    sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep_s + serve.drain_s < pod["terminationGracePeriodSeconds"]


def test_the_image_runs_what_it_exposes(image):
    """The image's default command is one that the server takes, as a user without rights."""
    command = yaml.safe_load(re.search(r"^CMD (\[.*\])$", image, re.MULTILINE)[1])
    serve = config(command)

    assert re.search(r"^EXPOSE (.*)$", image, re.MULTILINE)[1].split() == [str(serve.port), str(serve.http_port)]
    assert f"127.0.0.1:{serve.http_port}/readyz" in image
    assert re.search(r"^USER [1-9]", image, re.MULTILINE)


def test_alerts_ask_for_metrics_that_there_are(tmp_path):
    """Every name in an alert is one that /metrics shows, with the labels that the alert selects and sums by."""
    (tmp_path / "same.onnx").write_bytes(identity(np.float32, [1]))
    repository = open_repository(ServeConfig((tmp_path / "same.onnx",), device="cpu"))
    text = Metrics(repository, lambda: Traffic(refused={"bytes": 0})).text().decode()
    repository.close(0)
    rules = [rule for group in read_yaml("prometheus-rules.yaml")["groups"] for rule in group["rules"]]

    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        for name, selected in re.findall(r"\b((?:edgeward|nv|process)_\w+)(?:\{(.*?)\})?", rule["expr"]):
            shown = "\n".join(re.findall(rf"^{name}[{{ ].*", text, re.MULTILINE))
            assert shown, name
            wanted = {key: values.split("|") for key, values in re.findall(r'(\w+)=~?"(.*?)"', selected)}
            wanted |= {key: [""] for keys in re.findall(r"by \((.*?)\)", rule["expr"]) for key in keys.split(", ")}
            for key in wanted.keys() - {"job", "instance"}:  # these two come from Prometheus
                assert all(f'{key}="{value}' in shown for value in wanted[key]), (name, key)
