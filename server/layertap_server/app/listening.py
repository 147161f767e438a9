"""The addresses that the settings name, checked without torch, so that a wrong one is refused at once."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING

from layertap_server.app.limits import share_of
from layertap_server.config import Config, ConfigError
from layertap_server.rpc.address import check_port
from layertap_server.rpc.listener import Listener, ListenSettings

if TYPE_CHECKING:
    from layertap_server.observability.metrics import Endpoint, Registry


def open_listener(config: Config) -> Listener:
    """Returns where a process listens, and checks the ports beside that of gRPC too.

    Raises:
        ConfigError: if an address cannot be listened on, a file of TLS or tokens cannot be used, or a limit is too
            small to be shared out.
    """
    listener = Listener(listen_settings(config))
    if config.metrics_port >= 0:
        check_port(config.metrics_host, config.metrics_port, flag="--metrics-port")
    if config.http_port >= 0:
        check_port(config.host, config.http_port, flag="--http-port")
        if importlib.util.find_spec("uvicorn") is None:
            raise ConfigError("--http-port needs packages (uvicorn): pip install 'layertap[server,http]'")
    return listener


def open_endpoint(registry: Registry, config: Config) -> Endpoint:
    """Shows metrics where the settings say.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    from layertap_server.observability.metrics import Endpoint

    try:
        return Endpoint(registry, config.metrics_host, config.metrics_port)
    except OSError as exc:
        raise ConfigError(
            f"cannot show metrics on {config.metrics_host}:{config.metrics_port}: {exc.strerror or exc}; "
            "is the port taken? try --metrics-port 0"
        ) from exc


def listen_settings(config: Config) -> ListenSettings:
    """Returns how a server with these settings listens."""
    names = {field.name for field in dataclasses.fields(ListenSettings)}
    share = share_of(config)
    return ListenSettings(**{name: getattr(share, name) for name in names})
