"""The script with which bash and zsh complete the commands, flags and values of `layertap`.

It is made from the parser and needs nothing when it runs: no Python starts while a user types.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Final

from layertap.cli.parsing import say

SHELLS: Final = ("bash", "zsh")

_SCRIPT: Final = """\
_layertap() {{
    local words current=${{COMP_WORDS[COMP_CWORD]}}
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        words='{commands} --help --version'
    else
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _layertap layertap"""

_ZSH: Final = """\
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""


def show(commands: Mapping[str, argparse.ArgumentParser], args: argparse.Namespace) -> int:
    """Prints the script for `args.shell`; returns the exit code."""
    for line in script(commands, args.shell).splitlines():
        say(line)
    return 0


def script(commands: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """Returns the script for one of SHELLS; where it completes nothing, the shell completes names of files."""
    cases = "\n".join(f"            {case} ;;" for name, parser in commands.items() for case in _cases(name, parser))
    return (_ZSH if shell == "zsh" else "") + _SCRIPT.format(commands=" ".join(commands), cases=cases)


def _cases(command: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields what completes a word of a command: the values of the flag before it, a file, or a flag."""
    flags: list[str] = []
    first: list[str] = []
    for action in parser._actions:
        values = [str(choice) for choice in action.choices or ()]
        if not action.option_strings:
            first += values
        elif action.nargs != 0:
            before = "|".join(f"'{command} {flag}'" for flag in action.option_strings)
            yield f"{before}) words='{' '.join(values)}'" if values else f"{before}) return"
        flags += action.option_strings
    yield f"'{command} '*) words='{' '.join(first)}'; if [[ $current == -* ]]; then words='{' '.join(flags)}'; fi"
