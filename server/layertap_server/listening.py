"""The addresses that the settings name, checked without torch, so that a wrong one is refused at once."""

from __future__ import annotations

import dataclasses
import importlib.util

from layertap_server.config import Config, ConfigError
from layertap_server.rpc.server import Listener, ListenError, ListenSettings, check_port


def open_listener(config: Config) -> Listener:
    """Returns where a server with these settings listens, with the ports of its metrics and of HTTP checked too.

    Raises:
        ConfigError: if an address cannot be listened on, or a file of TLS or tokens cannot be used.
    """
    try:
        listener = Listener(listen_settings(config))
        if config.metrics_port >= 0:
            check_port(config.metrics_host, config.metrics_port, flag="--metrics-port")
        if config.http_port >= 0:
            check_port(config.host, config.http_port, flag="--http-port")
            if importlib.util.find_spec("uvicorn") is None:
                raise ConfigError("--http-port needs packages (uvicorn): pip install 'layertap[server,http]'")
    except ListenError as exc:
        raise ConfigError(str(exc)) from exc
    return listener


def listen_settings(config: Config) -> ListenSettings:
    """Returns how a server with these settings listens."""
    names = {field.name for field in dataclasses.fields(ListenSettings)}
    return ListenSettings(**{name: getattr(config, name) for name in names})
