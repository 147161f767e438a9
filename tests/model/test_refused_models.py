"""One clear line for each model that cannot be served, and no pickle is ever opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import write_settings
from support.checkpoints import SMALL, Weights, check, oracle_of

from layertap_server import cli

NOWHERE = ("--log-level", "warning", "--host", "unix:/tmp/" + "x" * 200)
"""A path too long for a socket, which is found after the model is loaded: no server of these tests ever serves."""


def _line(error: str, *named: str) -> None:
    assert "\n" not in error.strip() and "Traceback" not in error, error
    for words in named:
        assert words in error, error


def _fails(capfd: pytest.CaptureFixture[str], argv: list[str], *named: str) -> None:
    """Checks that the server's command line ends with code 2 and one line."""
    assert cli.main([*NOWHERE, *argv]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("layertap-server: ")
    _line(err, *named)


def _settings(**change: Any) -> Callable[[Path], object]:
    return lambda folder: write_settings(folder, {k: v for k, v in (SMALL | change).items() if v is not None})


def _without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def _text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _tensors(change: Callable[[Weights], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    return spoil


def _pickle(folder: Path) -> None:
    """Puts a pickle in the weights' place that would leave a trace if it were opened."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trace(folder / "opened")))


class _Trace:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _index(content: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return spoil


QUERY = "encoder.layer.1.attention.self.query.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (_without("config.json"), ("config.json", "--model-id")),
    "a broken config": (_text("config.json", '{"model_type": "bert",'), ("config.json", "JSON")),
    "a config that is no text": (_text("config.json", b"\xff\xfe\x00"), ("config.json", "JSON")),
    "a config that is a list": (_text("config.json", "[]"), ("config.json", "model_type")),
    "a model_type that is a list": (_settings(model_type=["bert"]), ("config.json", "model_type", "serves bert")),
    **{
        kind: (_settings(model_type=kind), (kind, "serves bert, camembert, distilbert, electra, roberta, xlm-roberta"))
        for kind in ("deberta-v2", "mpnet", "modernbert", "albert", "xlm-roberta-xl")
    },
    "no model_type": (_settings(model_type=None), ("model_type", "bert")),
    "relative positions": (_settings(position_embedding_type="relative_key"), ("relative_key", "absolute")),
    "relative query positions": (_settings(position_embedding_type="relative_key_query"), ("relative_key_query",)),
    "no hidden_size": (_settings(hidden_size=None), ("hidden_size",)),
    "no max_position_embeddings": (_settings(max_position_embeddings=None), ("max_position_embeddings",)),
    "a hidden_size that is text": (_settings(hidden_size="24"), ("hidden_size",)),
    "heads that do not divide": (_settings(num_attention_heads=5), ("hidden_size", "24", "5")),
    "no heads": (_settings(num_attention_heads=0), ("num_attention_heads",)),
    "negative blocks": (_settings(num_hidden_layers=-1), ("num_hidden_layers",)),
    "an unknown activation": (_settings(hidden_act="swishy"), ("hidden_act", "swishy")),
    "an adapter beside the weights": (_text("adapter_config.json", "{}"), ("adapter_config.json", "merge_and_unload")),
    "only pickles": (_pickle, ("pickle", "safetensors")),
    "no weights": (_without("model.safetensors"), ("safetensors",)),
    "a missing tensor": (_tensors(lambda w: w.pop(QUERY)), (QUERY,)),
    "a missing block": (_settings(num_hidden_layers=3), ("encoder.layer.2",)),
    "half a pooler": (_tensors(lambda w: w.pop("pooler.dense.bias")), ("pooler.dense.bias",)),
    "a tensor of another shape": (_tensors(lambda w: w.update({QUERY: torch.ones(24, 25)})), (QUERY, "24, 25")),
    "another vocab_size": (_settings(vocab_size=61), ("word_embeddings", "61", "60")),
    "weights that are none": (_text("model.safetensors", "garbage" * 99), ("model.safetensors", "again")),
    "empty weights": (_text("model.safetensors", ""), ("model.safetensors", "again")),
    "weights that end early": (
        lambda folder: os.truncate(folder / "model.safetensors", 20_000),
        ("model.safetensors", "again"),
    ),
    "a missing shard": (_index('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'), ("00001-of-00002",)),
    "a shard without end": (
        _index(json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}})),
        ("cannot be read", "File name too long"),
    ),
    "a broken index": (_index('{"weight_map":'), ("index.json",)),
    "an index without a map": (_index("{}"), ("index.json",)),
    "an index that is a list": (_index("[]"), ("index.json",)),
    "no tokenizer": (_without("vocab.txt"), ("tokenizer.json", "vocab.txt")),
    "a broken tokenizer": (_text("tokenizer.json", '{"model":'), ("tokenizer",)),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("spoil", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_a_model_that_cannot_be_served(
    copy: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[Path], object], named: tuple[str, ...]
) -> None:
    spoil(copy)
    _fails(capfd, ["--model-id", str(copy), "--device", "cpu"], *named)
    assert not (copy / "opened").exists()


def test_a_pickle_beside_safetensors_is_not_opened(copy: Path, weights: Weights) -> None:
    _pickle(copy)
    safetensors.torch.save_file(weights, copy / "model.safetensors")
    check(copy, SMALL, oracle_of(SMALL, weights))
    assert not (copy / "opened").exists()


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_folder_that_is_not_there(capfd: pytest.CaptureFixture[str], folder: str) -> None:
    _fails(capfd, ["--model-id", folder], "--model-id", "folder", "does not exist")


def test_a_folder_that_cannot_be_looked_into(capfd: pytest.CaptureFixture[str]) -> None:
    _fails(capfd, ["--model-id", "~/" + "long" * 100], "--model-id", "cannot be read", "File name too long")


def test_a_vocabulary_beyond_the_model_is_refused(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Its texts would ask for rows that the model does not have.
    with (copy / "vocab.txt").open("a") as file:
        file.write("berlin\n")
    _fails(capfd, ["--model-id", str(copy), "--device", "cpu"], "vocab", "up to 60", "is 60")


def test_float16_needs_cuda(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--model-id", str(small), "--device", "cpu", "--dtype", "float16"]
    _fails(capfd, argv, "--dtype", "float16", "cuda", "bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is cuda")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:0,cuda:1"])
def test_no_cuda(small: Path, capfd: pytest.CaptureFixture[str], device: str) -> None:
    _fails(capfd, ["--model-id", str(small), "--device", device], "--device", device, "no cuda", "--device cpu")


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "", "cuda:99", "cpu,cpu"])
def test_a_device_that_is_none(small: Path, capfd: pytest.CaptureFixture[str], device: str) -> None:
    _fails(capfd, ["--model-id", str(small), "--device", device], "--device", "--device cpu")


@pytest.mark.parametrize("name", ["max-output-bytes", "max-call-output-bytes"])
def test_less_memory_than_one_longest_text_takes(small: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    longest = 3 * 64 * 24 * 4
    flags = [f"--{name}", str(longest - 1), "--max-call-output-bytes", str(longest - 1)]
    argv = ["--model-id", str(small), "--device", "cpu", *flags]
    _fails(capfd, argv, f"--{name}", str(longest), "raise")


def _run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "layertap_server", *argv],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_a_hub_name_without_network(tmp_path: Path) -> None:
    done = _run("--model-id", "bert-base-uncased", "--log-level", "error", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    _line(done.stderr, "bert-base-uncased", "--model-id", "network")


def test_no_embedded_model(tmp_path: Path) -> None:
    """As after a plain pip install: the packages without the checkout around them."""
    root = Path(cli.__file__).parents[2]
    for package in ("client/layertap", "server/layertap_server"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = os.pathsep.join(str(tmp_path / name) for name in ("client", "server"))
    done = _run("--port", "0", PYTHONPATH=path)
    assert done.returncode == 2 and not done.stdout
    _line(done.stderr, "make model", "--model-id bert-base-uncased")
