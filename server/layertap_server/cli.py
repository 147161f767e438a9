"""`layertap-server`: flags made from the fields of `Config`, logging, and one line for an error at start.

`layertap-server parity` is a command of its own; see `parity`. Without it the server serves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

import layertap
from layertap import wire
from layertap.errors import printable
from layertap_server import signals
from layertap_server.config import Config, ConfigError
from layertap_server.flags import flag, read, variable
from layertap_server.observability import log_format
from layertap_server.observability.bounded_streams import bounded_streams
from layertap_server.types import EngineLostError

if TYPE_CHECKING:
    from layertap_server.app.server import App

_SWITCH_INTERVAL_S: Final = 0.0005
"""How long one thread may keep the interpreter that another waits for. Instances need it often and for a moment; with
the 5 ms that are Python's own, a loop with many callers would starve them."""

_EXAMPLES: Final = """\
examples:
  layertap-server
  layertap-server --model-id ./my-bert --host unix:/run/layertap.sock
  layertap-server --model-id bert-base-uncased --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --token-file tokens
  layertap-server parity --help

Each flag is also an environment variable: --max-batch-tokens is LAYERTAP_MAX_BATCH_TOKENS. A flag wins over its
variable. `layertap-server parity` compares a running server with transformers.

SIGTERM, SIGINT and SIGHUP stop the server: it refuses new calls and finishes those that it has.

exit codes:
  0    stopped by a signal
  1    the engine has failed
  2    a flag, a file or the model cannot be used
  130  Ctrl-C before it served"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server, or `parity`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["parity"]:
            return _parity(argv[1:])
        return _serve(parse(argv, os.environ))
    except ConfigError as exc:
        return _fail(str(exc))


def _serve(config: Config) -> int:
    log_format.set_up(level=config.log_level, form=config.log_format, process=None if config.processes == 1 else 0)
    # gRPC's C core would add lines of its own to ours; what it has to say comes back as errors.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # The tokenizers' own threads take what came first: short texts on the event loop would wait for long ones.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _server_extra():
        from layertap_server.app.child_process import in_child
        from layertap_server.app.listening import open_listener

        # In a child, if this process is to be forked: certificates start gRPC, which does not survive that.
        if config.processes > 1:
            in_child(lambda: bool(open_listener(config)))
        listener = open_listener(config) if config.processes == 1 else None

    def make_app(config: Config) -> App:
        # Only now, since it imports torch, which takes seconds: a wrong address is refused at once.
        with _server_extra():
            from layertap_server.app.server import App

            return App(config, listener=listener)

    return run(config, make_app)


def run(config: Config, make_app: Callable[[Config], App]) -> int:
    """Serves until a signal stops the server, then ends the process: with 0, or with 1 if the server has failed.

    Returns:
        The exit code 2, if the server cannot start.
    """
    wire.keep_pages()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        if config.processes > 1:
            from layertap_server.app.processes import launch

            code = launch.run(config, make_app, _announce)
        else:
            with bounded_streams():
                code = _run_here(config, make_app)
    except ConfigError as exc:
        return _fail(str(exc))
    signals.leave(code)


def _run_here(config: Config, make_app: Callable[[Config], App]) -> int:
    server = make_app(config)
    try:
        server.prepare()
        gc.collect()
        gc.freeze()  # What is there now stays; looking through it for garbage would hold up every thread.
        # Not asyncio.run, which would wait for threads after the server has stopped.
        asyncio.Runner().run(
            server.serve(ready=lambda address: _announce(address, server.http_url, server.metrics_url))
        )
    except ConfigError:
        raise
    except EngineLostError as exc:
        _fail(str(exc))
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _parity(argv: Sequence[str]) -> int:
    signals.restore()
    with _server_extra():
        from layertap_server.parity import compare

        return compare.main(argv)


@contextlib.contextmanager
def _server_extra() -> Iterator[None]:
    """Turns a missing package of the server into the error that names the extra."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise ConfigError(f"the server's packages are missing ({exc.name}): pip install 'layertap[server]'") from exc


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Returns the settings: flags first, then LAYERTAP_… variables, then defaults.

    Raises:
        ConfigError: if a value is not of its type or out of its bounds.
    """
    settings: dict[str, object] = {}
    for field in dataclasses.fields(Config):
        if variable(field.name) in environment:
            try:
                settings[field.name] = read(field, environment[variable(field.name)])
            except argparse.ArgumentTypeError as exc:
                raise ConfigError(f"{variable(field.name)} {exc}; correct or unset it") from exc
    settings |= vars(_parser().parse_args(argv))
    return Config(**settings)  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="layertap-server",
        description="Serves tokens and every layer of a BERT over gRPC. What it prints first ends with its address.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        usage="%(prog)s [--flag value ...]",
    )
    parser.add_argument("--version", action="version", version=f"layertap-server {layertap.__version__}")
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        kind = type(field.default)
        unit = field.metadata["unit"]
        default = "empty" if field.default == "" else field.default
        about = f"{field.metadata['reason']} [{kind.__name__}{', ' + unit if unit else ''}; default: {default}]"
        # A flag that is true or false may also stand alone.
        alone: dict[str, Any] = {"nargs": "?", "const": True} if kind is bool else {}
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        groups[name].add_argument(
            flag(field.name),
            type=functools.partial(read, field),
            **alone,
            choices=field.metadata["choices"] or None,
            metavar=None if field.metadata["choices"] else kind.__name__.upper(),
            help=about.replace("%", "%%"),
        )
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and the way to the help."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and ends with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _announce(address: str, http_url: str, metrics_url: str) -> None:
    print(f"layertap-server listens on {address}")
    if http_url:
        print(f"clients of OpenAI's API find it at {http_url}/v1")
    if metrics_url:
        print(f"its metrics are at {metrics_url}")
    sys.stdout.flush()


def _fail(message: str) -> int:
    print(f"layertap-server: {printable(message)}", file=sys.stderr)
    return 2
