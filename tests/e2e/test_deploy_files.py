"""The files in `deploy/` say what the server knows: its flags, its metrics, its ports and its times."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT, memory, running

from layertap import Client
from layertap_server import cli
from layertap_server.config import Config
from layertap_server.observability.metrics_sum import MetricsSum

DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml"))
GRACE_S = 30


def _documents(path: Path) -> Iterator[Any]:
    yield from yaml.safe_load_all(path.read_text())


def _flags() -> Iterator[tuple[str, list[str]]]:
    """Yields the flags of each server that a file starts."""
    (pod,) = _documents(DEPLOY / "kubernetes/base/deployment.yaml")
    yield "kubernetes", pod["spec"]["template"]["spec"]["containers"][0]["args"]
    (compose,) = _documents(DEPLOY / "compose.yaml")
    yield "compose", compose["services"]["layertap-0"]["command"]


@pytest.mark.parametrize(("name", "flags"), list(_flags()), ids=lambda one: one if isinstance(one, str) else "")
def test_the_server_takes_the_flags(name: str, flags: list[str]) -> None:
    config = cli.parse(flags, {})
    assert isinstance(config, Config) and config.metrics_port == 9464 and config.grace_s == GRACE_S


def test_variables_of_the_overlays_are_flags() -> None:
    found = re.findall(r"LAYERTAP_[A-Z_]+", "".join(path.read_text() for path in [*FILES, DEPLOY / "Dockerfile"]))
    names = {field.upper() for field in Config.__dataclass_fields__}
    assert found and {name.removeprefix("LAYERTAP_") for name in found} <= names


def test_a_stopping_server_has_its_grace_everywhere() -> None:
    (pod,) = _documents(DEPLOY / "kubernetes/base/deployment.yaml")
    spec = pod["spec"]["template"]["spec"]
    waits = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > GRACE_S + waits
    (compose,) = _documents(DEPLOY / "compose.yaml")
    assert int(compose["services"]["layertap-0"]["stop_grace_period"].removesuffix("s")) > GRACE_S
    unit = (DEPLOY / "systemd/layertap.service").read_text()
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > Config().grace_s
    assert "RestartPreventExitStatus" not in unit  # What cannot be used at one start may be usable at the next.


def test_the_memory_of_a_pod_holds_what_its_flags_let_the_server_take() -> None:
    (pod,) = _documents(DEPLOY / "kubernetes/base/deployment.yaml")
    container = pod["spec"]["template"]["spec"]["containers"][0]
    config = dataclasses.asdict(cli.parse(container["args"], {}))
    most = sum(found for found, _ in memory.sums({name.replace("_", "-"): value for name, value in config.items()}))
    at_rest = 1 << 30
    assert int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30 > most + at_rest


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_yaml_can_be_read(path: Path) -> None:
    assert list(_documents(path))


def test_files_that_files_name_are_there() -> None:
    for path in (DEPLOY / "kubernetes").rglob("kustomization.yaml"):
        (found,) = _documents(path)
        named = found["resources"] + [patch["path"] for patch in found.get("patches", [])]
        assert all((path.parent / name).exists() for name in named), path
    (compose,) = _documents(DEPLOY / "compose.yaml")
    mounts = [mount for service in compose["services"].values() for mount in service.get("volumes", [])]
    assert mounts and all((DEPLOY / mount.partition(":")[0]).is_file() for mount in mounts)


def _expressions() -> Iterator[str]:
    dashboard = json.loads((DEPLOY / "grafana/layertap.json").read_text())
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    (rules,) = _documents(DEPLOY / "prometheus.rules.yml")
    yield from (rule["expr"] for group in rules["groups"] for rule in group["rules"])
    (scaled,) = _documents(DEPLOY / "kubernetes/autoscale/scaled-object.yaml")
    yield scaled["spec"]["triggers"][0]["metadata"]["query"]


@pytest.fixture(scope="module")
def url(tiny_folder: Path) -> Iterator[str]:
    with running("--device", "cpu", "--model-id", str(tiny_folder), "--metrics-port", "0") as server:
        with Client(server.address) as client:
            client.embed("x", pooling="mean")
        yield str(server.process.stdout.readline().decode().split()[-1])


def test_every_metric_that_is_asked_for_is_there_with_its_labels(url: str) -> None:
    with urllib.request.urlopen(url, timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    labels: dict[str, set[str]] = {}
    for family in families:
        for name in (family.name, *(f"{family.name}_{end}" for end in ("total", "bucket", "count", "sum"))):
            labels.setdefault(name, {"job", "instance"})
        for sample in family.samples:
            labels.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
    labels["layertap_device_memory_bytes"] |= {"device", "kind"}  # A CPU has none of these samples.
    for family in MetricsSum(lambda: None, lambda: (2, 2)).collect():  # Of a server with --processes.
        labels |= {sample.name: {"job", "instance"} for sample in family.samples}
    for expression in _expressions():
        asked = re.findall(r"\b((?:layertap|process)_\w+)(?:\{([^}]*)\})?", expression)
        assert asked or "up{" in expression, expression
        for name, selector in asked:
            assert name in labels, f"{name} is not exposed, but asked for by {expression}"
            assert {label for label in re.findall(r"(\w+)\s*[=!]~?\"", selector)} <= labels[name], expression
        for group in re.findall(r"by \(([^)]*)\)", expression):
            wanted = {label.strip() for label in group.split(",")}
            assert wanted <= set().union(*(labels[name] for name, _ in asked)), expression


def test_the_image_is_made_without_root_a_compiler_or_a_named_index() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE)
    assert stages == ["wheel", "base", "cuda", "cpu"]
    for stage in ("cuda", "cpu"):
        assert "USER 10001\n" in text.split(f" AS {stage}\n")[1].split("\nFROM ")[0]
    assert "HEALTHCHECK" in text and "://" not in text and "build-essential" not in text


def test_the_image_has_what_is_locked_and_the_wheel_alone() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    installs = re.findall(r"pip install (.+?)(?:;|$)", text, re.MULTILINE)
    assert len(installs) == 8
    for one in installs:
        assert "--no-deps" in one and ("--require-hashes" in one or one.endswith(" ./*.whl")), one
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert copied and all((ROOT / name).exists() for name in copied)
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert {name.split("/")[0] for name in copied} == {*kept}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "layertap.service"
    text = (DEPLOY / "systemd/layertap.service").read_text()
    unit.write_text(text.replace("/opt/layertap/bin/layertap-server", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
