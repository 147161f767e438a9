"""What a flag adds to a server: the protocols of other projects on the same queue, metrics, traces.

Each is imported only with its flag.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import layertap
from layertap import wire
from layertap_server.config import Config, ConfigError
from layertap_server.model.facts import ModelFacts
from layertap_server.observability.metrics import Metrics, Server
from layertap_server.protocol.preprocess import Preprocessor
from layertap_server.rpc.admission import Admission
from layertap_server.rpc.handlers import Handler, handler
from layertap_server.rpc.listener import Listener
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Hooks

if TYPE_CHECKING:
    from layertap_server.compat.http import HttpServer
    from layertap_server.observability.tracing import Tracing


def metrics(config: Config, model: ModelFacts, batch_tokens: int) -> Metrics:
    """Returns the metrics of a server, none counted yet.

    Args:
        config: Every knob, as this process has them.
        model: The served model.
        batch_tokens: The most tokens of a batch.
    """
    methods = wire.RPC_NAMES
    if config.kserve:
        from layertap_server.compat import kserve

        methods += (*kserve.UNARY, *kserve.STREAMS)
    if config.http_port >= 0:
        from layertap_server.compat import openai

        methods += openai.METHODS
    return Metrics(
        Server(
            version=layertap.__version__,
            model_id=model.model_id,
            fingerprint=model.fingerprint,
            methods=methods,
            max_batch_tokens=batch_tokens,
            max_output_bytes=config.max_output_bytes,
        )
    )


def kserve(preprocessor: Preprocessor, batcher: Batcher, admission: Admission) -> dict[str, Handler]:
    """Returns the service of the Open Inference Protocol, by its name."""
    from layertap_server.compat import kserve

    service = kserve.Service(preprocessor=preprocessor, batcher=batcher, stopping=admission.closed)
    return {kserve.SERVICE_NAME: handler(kserve.SERVICE_NAME, service, admission)}


def http(
    config: Config,
    *,
    preprocessor: Preprocessor,
    batcher: Batcher,
    admission: Admission,
    listener: Listener,
    hooks: Hooks,
) -> HttpServer:
    """Returns the server of OpenAI's API, which listens nowhere yet.

    Raises:
        ConfigError: if a file of TLS cannot be used.
    """
    from layertap_server.compat.http import HttpServer
    from layertap_server.compat.openai import OpenAI

    api = OpenAI(
        preprocessor=preprocessor,
        batcher=batcher,
        admit=admission.call,
        identify=listener.identify,
        stall_timeout_s=config.stall_timeout_s,
        hooks=hooks,
    )
    try:
        context = listener.http_context()
    except ListenError as exc:
        raise ConfigError(str(exc)) from exc
    return HttpServer(
        api.answer,
        host=config.host,
        port=config.http_port,
        shares_port=config.processes > 1,
        context=context,
        max_connection_count=config.max_connection_count,
        stall_timeout_s=config.stall_timeout_s,
    )


def tracing() -> Tracing:
    """Returns what sends spans by OTLP.

    Raises:
        ConfigError: if its packages are missing.
    """
    try:
        from layertap_server.observability.tracing import Tracing, otlp_provider
    except ModuleNotFoundError as exc:
        raise ConfigError(f"--traces otlp needs packages ({exc.name}): pip install 'layertap[server,otel]'") from exc
    return Tracing(otlp_provider(layertap.__version__))
