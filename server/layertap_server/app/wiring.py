"""The parts of one process of a server, made of its settings: the queue, the services, and what watches them.

The protocols of other projects, metrics and traces are imported only with their flags.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from layertap import wire
from layertap_server.app.limits import check_output_bytes, limits_of, share_of
from layertap_server.app.model_loading import FoundModel
from layertap_server.config import Config, ConfigError
from layertap_server.engine import cpu_threads, runtime
from layertap_server.engine.encoder import Encoder
from layertap_server.model.facts import ModelFacts
from layertap_server.model.files import reason_of
from layertap_server.observability.call_log import CallLog
from layertap_server.observability.metrics import Metrics
from layertap_server.protocol.model_info import info_of
from layertap_server.protocol.preprocess import Preprocessor
from layertap_server.rpc.admission import Admission
from layertap_server.rpc.handlers import Handler, Service, handler
from layertap_server.rpc.listener import Listener
from layertap_server.rpc.service import EmbeddingService
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Hooks
from layertap_server.shared_memory.lease import Sharing

if TYPE_CHECKING:
    from layertap_server.compat.http import HttpServer
    from layertap_server.observability.tracing import Tracing


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """What serves calls.

    Attributes:
        metrics: What is counted. None: nothing.
        tracing: What sends spans. None: nothing.
        handlers: The gRPC services, by name.
        http: The HTTP server, which listens nowhere yet. None: there is none.
    """

    model: ModelFacts
    batcher: Batcher
    metrics: Metrics | None
    tracing: Tracing | None
    sharing: Sharing
    admission: Admission
    handlers: Mapping[str, Handler]
    http: HttpServer | None


def make_parts(
    config: Config, found: FoundModel, encoders: Sequence[Encoder], listener: Listener, *, process: int
) -> Parts:
    """Returns the parts of a process, which counts from 1; their instances run.

    Raises:
        ConfigError: if a setting does not suit the model or the machine.
    """
    share = share_of(config)
    model = found.facts(has_pooler=encoders[0].has_pooler)
    check_output_bytes(share, (model.layer_count + 1) * model.max_length * model.hidden_size * 4)
    limits, services = found.queue_limits(share), _services(share)
    metrics = _metrics(model, services, limits.max_batch_tokens) if share.metrics_port >= 0 else None
    tracing = _tracing(services) if share.traces == "otlp" else None
    sharing = _sharing(share, None if found.on_cpu else encoders[0])
    hooks = metrics or Hooks()
    encodes = cpu_threads.make(encoders, found.threads)
    batcher = Batcher(encodes, limits, apply_modules=encoders[0].apply_modules, hooks=hooks)
    admission = _admission(share, CallLog([one for one in (metrics, tracing) if one is not None]), hooks)
    preprocessor = Preprocessor(
        model=model, limits=limits_of(share), sentences=found.sentences, tokenizer=found.tokenizer
    )
    served: dict[str, Service] = {
        wire.SERVICE_NAME: EmbeddingService(
            preprocessor=preprocessor,
            batcher=batcher,
            on_cpu=found.on_cpu,
            sharing=sharing,
            info=_info(config, found, encoders, model, process),
            lookahead_tokens=limits.max_batch_tokens * (batcher.instance_count + 1),
            stopping=admission.closed,
        )
    }
    if share.kserve:
        from layertap_server.compat import kserve

        served[kserve.SERVICE_NAME] = kserve.Service(
            preprocessor=preprocessor, batcher=batcher, stopping=admission.closed
        )
    return Parts(
        model=model,
        batcher=batcher,
        metrics=metrics,
        tracing=tracing,
        sharing=sharing,
        admission=admission,
        handlers={name: handler(name, one, admission) for name, one in served.items()},
        http=_http(share, preprocessor, batcher, admission, listener, hooks) if share.http_port >= 0 else None,
    )


def _sharing(share: Config, encoder: Encoder | None) -> Sharing:
    """Returns the leases of shared memory; segments are registered with the device of an encoder, if there is one."""
    if share.shared_memory_bytes and not hasattr(os, "memfd_create"):
        raise ConfigError("--shared-memory-bytes needs Linux; leave it out")
    return Sharing(
        byte_count=share.shared_memory_bytes,
        max_count=share.max_shared_memory_call_count,
        pin=None if encoder is None else functools.partial(runtime.pin, encoder.device),
    )


def _admission(share: Config, call_log: CallLog, hooks: Hooks) -> Admission:
    return Admission(
        max_call_count=share.max_concurrent_call_count,
        max_request_bytes=share.max_queue_bytes,
        stall_timeout_s=share.stall_timeout_s,
        idle_timeout_s=share.idle_timeout_s,
        by_certificate=bool(share.tls_client_ca),
        call_log=call_log,
        hooks=hooks,
    )


def _info(config: Config, found: FoundModel, encoders: Sequence[Encoder], model: ModelFacts, process: int) -> bytes:
    """Returns the answer to GetModelInfo, with the limits of the whole server, but for those of one call."""
    limits = dataclasses.replace(config, max_call_output_bytes=share_of(config).max_call_output_bytes)
    return info_of(
        model,
        limits=limits_of(limits),
        devices=found.devices,
        dtype=found.dtype,
        sentence_config=found.sentences,
        batch_invariant=all(one.batch_invariant for one in encoders),
        process_count=config.processes,
        process=process,
    )


def _services(share: Config) -> Mapping[str, str]:
    """Returns the gRPC service of each method that calls may have; empty for those over HTTP."""
    services = dict.fromkeys(wire.RPC_NAMES, wire.SERVICE_NAME)
    if share.kserve:
        from layertap_server.compat import kserve

        services |= dict.fromkeys((*kserve.UNARY, *kserve.STREAMS), kserve.SERVICE_NAME)
    if share.http_port >= 0:
        from layertap_server.compat import openai

        services |= dict.fromkeys(openai.METHODS, "")
    return services


def _metrics(model: ModelFacts, services: Mapping[str, str], batch_tokens: int) -> Metrics:
    return Metrics(
        model_id=model.model_id, fingerprint=model.fingerprint, methods=tuple(services), max_batch_tokens=batch_tokens
    )


def _http(
    share: Config, preprocessor: Preprocessor, batcher: Batcher, admission: Admission, listener: Listener, hooks: Hooks
) -> HttpServer:
    from layertap_server.compat.http import HttpServer
    from layertap_server.compat.openai import OpenAI

    api = OpenAI(
        preprocessor=preprocessor,
        batcher=batcher,
        admit=admission.call,
        identify=listener.identify,
        hooks=hooks,
    )
    return HttpServer(
        api.answer,
        host=share.host,
        port=share.http_port,
        shares_port=share.processes > 1,
        context=listener.http_context,
        max_connection_count=share.max_connection_count,
        stall_timeout_s=share.stall_timeout_s,
    )


def _tracing(services: Mapping[str, str]) -> Tracing:
    try:
        from layertap_server.observability.tracing import Tracing, otlp_provider
    except ModuleNotFoundError as exc:
        raise ConfigError(f"--traces otlp needs packages ({exc.name}): pip install 'layertap[server,otel]'") from exc
    try:
        return Tracing(otlp_provider(), services)
    except Exception as exc:  # Whatever a variable has that it cannot have, the next step is the same.
        raise ConfigError(
            f"--traces otlp: OpenTelemetry refuses one of the OTEL_… variables ({reason_of(exc)}); correct or unset it"
        ) from exc
