"""Every knob: its bounds, its flag, its variable, its help, and which of them wins."""

from __future__ import annotations

import dataclasses
import re
import socket
import subprocess
import sys
from typing import Any

import pytest

import layertap
from layertap_server.app.limits import check_output_bytes
from layertap_server.app.listening import open_listener
from layertap_server.cli import main, parse
from layertap_server.config import Config, ConfigError
from layertap_server.flags import flag, variable

FIELDS = dataclasses.fields(Config)
NUMBERS = [field for field in FIELDS if isinstance(field.default, (int, float)) and not isinstance(field.default, bool)]
BOUNDED = [field for field in NUMBERS if field.metadata["least"] is not None]
TOGETHER = ("tls_cert", "tls_key", "tls_client_ca")
CHOSEN = [field for field in FIELDS if field.metadata["choices"]]


def named(fields: list[Any]) -> Any:
    return pytest.mark.parametrize("field", fields, ids=[field.name for field in fields])


def value_for(field: Any) -> Any:
    """Returns a value that is allowed and is not the default."""
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    if isinstance(field.default, bool):
        return not field.default
    if field.name == "host":
        return "::1"
    if isinstance(field.default, str):
        return "something"
    if field.name in ("max_text_count", "max_call_output_bytes"):
        return field.default - 1  # One more would exceed another knob.
    return field.default + 1


def test_the_defaults_are_allowed() -> None:
    assert Config() == parse([], {})


@named(list(FIELDS))
def test_every_knob_has_a_reason_that_is_a_sentence(field: Any) -> None:
    assert field.metadata["reason"][-1] == "." and field.metadata["reason"][0].strip()
    assert type(field.default) in (bool, int, float, str)


@named(NUMBERS)
def test_every_number_has_bounds(field: Any) -> None:
    least, most = field.metadata["least"], field.metadata["most"]
    assert least is not None and least <= field.default <= most
    for value in (most + 1 if isinstance(field.default, int) else most * 2, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"^{flag(field.name)} is .*the (most|least) is"):
            Config(**{field.name: value})


@pytest.mark.parametrize("flags", [["--instances", "10000"], ["--grace-s", "1e30"], ["--seed", str(2**200)]])
def test_absurd_values_are_refused_before_anything_starts(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and flags[0] in err and "the most is" in err


@pytest.mark.parametrize(
    ("text", "value"), [("65536", 65536), ("64KiB", 65536), ("64 MiB", 64 << 20), ("1GiB", 1 << 30), ("1TiB", 1 << 40)]
)
def test_byte_sizes_have_units(text: str, value: int) -> None:
    assert parse(["--max-batch-bytes", text], {}).max_batch_bytes == value
    assert parse([], {"LAYERTAP_MAX_BATCH_BYTES": text}).max_batch_bytes == value


@pytest.mark.parametrize("text", ["64MB", "64 megabytes", "1.5GiB", ""])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^LAYERTAP_MAX_BATCH_BYTES "):
        parse([], {"LAYERTAP_MAX_BATCH_BYTES": text})


def test_the_version_is_told_and_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--version"], {})
    assert caught.value.code == 0 and capsys.readouterr().out == f"layertap-server {layertap.__version__}\n"
    with pytest.raises(SystemExit) as caught:
        parse(["--port", "seven"], {})
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and "--port" in err and "--help" in err


@named([field for field in NUMBERS if field.name.startswith("max_")])
def test_every_limit_says_its_unit(field: Any) -> None:
    units = ("texts", "windows", "characters", "bytes", "tokens", "calls", "connections", "seconds")
    assert field.metadata["unit"] in units


@named(BOUNDED)
def test_below_its_least_value_a_knob_is_refused_by_its_flag(field: Any) -> None:
    least = field.metadata["least"]
    with pytest.raises(ConfigError, match=f"^{flag(field.name)} is .*{least}"):
        Config(**{field.name: type(field.default)(least - 1)})


@named(
    [field for field in BOUNDED if field.name not in ("max_queue_text_count", "max_queue_bytes", "max_output_bytes")]
)
def test_at_its_least_value_a_knob_is_taken(field: Any) -> None:
    least = type(field.default)(field.metadata["least"])
    assert getattr(Config(**{field.name: least}), field.name) == least


@named([field for field in NUMBERS if isinstance(field.default, float)])
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_a_time_that_is_no_number_of_seconds_is_refused(field: Any, value: str) -> None:
    with pytest.raises(ConfigError, match=flag(field.name)):
        parse([flag(field.name) + "=" + value], {})


@named(CHOSEN)
def test_an_unknown_choice_is_refused_and_the_choices_are_named(field: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{flag(field.name)} is 'nonsense'") as caught:
        Config(**{field.name: "nonsense"})
    assert all(choice in str(caught.value) for choice in field.metadata["choices"])


@named(CHOSEN)
def test_every_choice_is_taken(field: Any) -> None:
    for choice in field.metadata["choices"]:
        assert getattr(Config(**{field.name: choice}), field.name) == choice


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"port": 65536}, ["--port", "65535"]),
        ({"tls_cert": "cert.pem"}, ["--tls-cert", "--tls-key"]),
        ({"tls_key": "key.pem"}, ["--tls-key", "--tls-cert"]),
        ({"tls_client_ca": "ca.pem"}, ["--tls-client-ca", "--tls-cert"]),
        ({"max_queue_bytes": 1 << 16}, ["--max-queue-bytes", "--max-request-bytes"]),
        ({"max_queue_text_count": 10, "max_text_count": 11}, ["--max-queue-text-count", "--max-text-count"]),
        ({"max_output_bytes": 10, "max_call_output_bytes": 11}, ["--max-call-output-bytes", "--max-output-bytes"]),
    ],
)
def test_knobs_that_contradict_each_other_are_refused_by_name(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**settings)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_knobs_that_just_agree_are_taken() -> None:
    config = Config(
        port=65535, max_queue_text_count=10, max_text_count=10, max_output_bytes=11, max_call_output_bytes=11
    )
    assert config.port == 65535


def test_memory_for_outputs_must_hold_the_longest_text() -> None:
    config = Config(max_output_bytes=1000, max_call_output_bytes=900)
    check_output_bytes(config, 900)
    with pytest.raises(ConfigError, match=r"^--max-call-output-bytes is 900.*901; raise it"):
        check_output_bytes(config, 901)
    with pytest.raises(ConfigError, match=r"^--max-output-bytes is 1000.*1001"):
        check_output_bytes(config, 1001)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]


@named([field for field in FIELDS if field.name not in TOGETHER])
def test_flags_beat_variables_and_variables_beat_defaults(field: Any) -> None:
    value, name = value_for(field), field.name
    assert value != field.default
    assert getattr(parse([], {variable(name): str(value)}), name) == value
    assert getattr(parse([flag(name), str(value)], {}), name) == value
    assert getattr(parse([flag(name), str(value)], {variable(name): str(field.default)}), name) == value
    assert getattr(parse([flag(name), str(field.default)], {variable(name): str(value)}), name) == field.default
    assert type(getattr(parse([], {variable(name): str(value)}), name)) is type(field.default)


@pytest.mark.parametrize("name", TOGETHER)
def test_flags_that_stand_together_beat_their_variables(name: str) -> None:
    variables = {variable(one): "from a variable" for one in TOGETHER}
    assert [getattr(parse([], variables), one) for one in TOGETHER] == 3 * ["from a variable"]
    assert getattr(parse([flag(name), "from a flag"], variables), name) == "from a flag"


def test_a_flag_that_is_true_or_false_may_stand_alone() -> None:
    assert parse([], {}).insecure_listen is False
    assert parse(["--insecure-listen", "--port", "7"], {"LAYERTAP_INSECURE_LISTEN": "0"}).insecure_listen is True
    assert parse([], {"LAYERTAP_INSECURE_LISTEN": "1"}).insecure_listen is True
    with pytest.raises(ConfigError, match=r"^LAYERTAP_INSECURE_LISTEN "):
        parse([], {"LAYERTAP_INSECURE_LISTEN": "perhaps"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost", "unix:/s", "unix-abstract:s"])
def test_plaintext_is_for_this_host(host: str) -> None:
    assert Config(host=host).is_local


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.7", "example.org", ""])
def test_plaintext_for_others_must_be_said_aloud(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^--host is .*--tls-cert and --tls-key.*--insecure-listen"):
        Config(host=host)
    assert not Config(host=host, insecure_listen=True).is_local
    assert not Config(host=host, tls_cert="cert.pem", tls_key="key.pem").is_local


def test_names_of_flags_and_variables() -> None:
    assert flag("max_batch_tokens") == "--max-batch-tokens"
    assert variable("max_batch_tokens") == "LAYERTAP_MAX_BATCH_TOKENS"


def test_other_variables_are_ignored() -> None:
    assert parse([], {"LAYERTAP_NO_SUCH_KNOB": "1", "PORT": "7", "PATH": "/"}) == Config()


@named(NUMBERS)
def test_a_variable_that_is_no_number_is_refused_by_its_name(field: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{variable(field.name)} "):
        parse([], {variable(field.name): "many"})


@named(BOUNDED)
def test_the_command_line_checks_the_bounds_too(field: Any) -> None:
    with pytest.raises(ConfigError, match=flag(field.name)):
        parse([f"{flag(field.name)}={type(field.default)(field.metadata['least'] - 1)}"], {})


def test_help_tells_of_every_flag_its_type_default_unit_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], {})
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for field in FIELDS:
        kind = type(field.default).__name__.upper()
        value = f"{{{','.join(field.metadata['choices'])}}}" if field.metadata["choices"] else kind
        start = told.index(f" {flag(field.name)} {f'[{value}]' if kind == 'BOOL' else value} ")
        about = told[start : start + 400]
        assert field.metadata["reason"] in about
        assert f"[{type(field.default).__name__}" in about
        assert field.metadata["unit"] in about
        assert f"default: {field.default or ('empty' if field.default == '' else field.default)}]" in about
    assert "LAYERTAP_MAX_BATCH_TOKENS" in told


def test_the_examples_of_the_help_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], {})
    examples = re.findall(r"^  layertap-server(.*)$", capsys.readouterr().out, re.MULTILINE)
    served = [parse(example.split(), {}) for example in examples if "parity" not in example]
    assert [config.model_id for config in served] == ["", "./my-bert", "bert-base-uncased"]


def test_an_unknown_flag_ends_with_code_2_and_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--no-such-knob", "1"], {})
    assert caught.value.code == 2
    assert "--no-such-knob" in capsys.readouterr().err


def test_a_bad_setting_ends_the_command_with_code_2_and_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--max-queue-text-count", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--max-queue-text-count" in err
    monkeypatch.setenv("LAYERTAP_PORT", "seven")
    assert main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "LAYERTAP_PORT" in err and "seven" not in err


def test_without_the_servers_packages_one_line_says_what_to_install() -> None:
    missing = "sys.modules |= dict.fromkeys(['torch', 'transformers', 'tokenizers', 'safetensors'])"
    code = f"import sys; {missing}; from layertap_server.cli import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install 'layertap[server]'" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("given", "value", "expected"),
    [
        ("--max-frame-bytes", "64MB", "must be a number of bytes, such as 65536 or 64MiB"),
        ("--port", "seven", "must be a whole number"),
        ("--grace-s", "long", "must be a number"),
        ("--insecure-listen", "maybe", "must be true or false"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_what_it_must_be(
    given: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse([given, value], {})
    assert f"argument {given}: {expected}; see" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"{variable(given[2:].replace('-', '_'))} {expected}"):
        parse([], {variable(given[2:].replace("-", "_")): value})


def test_http_needs_an_address_and_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--http-port.* --host is a unix socket"):
        Config(http_port=0, host="unix:/s")
    config = Config(port=0, http_port=0)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"--http-port needs packages .*layertap\[server,http\]"):
        open_listener(config)
    monkeypatch.undo()
    assert open_listener(config).http_context is None
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--http-port"):
        open_listener(Config(port=0, http_port=taken.getsockname()[1]))
