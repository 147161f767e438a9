"""The completion script, run by bash itself: commands, flags, values of flags, files."""

from __future__ import annotations

import argparse
import shutil
import subprocess

import pytest

from layertap.cli import arguments, completion, main

if shutil.which("bash") is None:
    pytest.skip("there is no bash", allow_module_level=True)

(COMMANDS,) = (one.choices for one in arguments.build()._actions if isinstance(one, argparse._SubParsersAction))


def complete(*words: str) -> list[str]:
    """Returns what bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _layertap; printf "%s\\n" "${{COMPREPLY[@]}}"'
    command = ["bash", "--norc", "-euc", f"{completion.script(COMMANDS, 'bash')}\n{ask}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_are_completed() -> None:
    assert complete("layertap", "") == [*COMMANDS, "--help", "--version"]
    assert complete("layertap", "en") == ["encode"]


@pytest.mark.parametrize("command", COMMANDS)
def test_all_flags_of_a_command_are_completed(command: str) -> None:
    flags = [flag for action in COMMANDS[command]._actions for flag in action.option_strings]
    assert complete("layertap", command, "-") == flags
    assert complete("layertap", command, "--hel") == ["--help"]


def test_the_values_of_a_flag_are_completed() -> None:
    assert complete("layertap", "embed", "--normalize", "--pooling", "mea") == ["mean", "mean_sqrt_len", "mean_max"]
    assert complete("layertap", "completion", "") == ["bash", "zsh"]


@pytest.mark.parametrize("words", [("-o", "out"), ("--output", "-"), ("--max-length", ""), ("corp",)])
def test_bash_completes_names_of_files_where_the_script_has_nothing(words: tuple[str, ...]) -> None:
    assert complete("layertap", "embed", *words) == []


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == completion.script(COMMANDS, shell) + "\n"
