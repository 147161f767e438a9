"""The only wiring: check the address, find the model, load, warm, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

import layertap
from layertap import wire
from layertap.errors import LayertapError
from layertap.types import Limits
from layertap_server import lifecycle
from layertap_server.config import Config, ConfigError
from layertap_server.engine import cpu_threads, device, encoder, runtime
from layertap_server.listening import open_listener
from layertap_server.model import checkpoint
from layertap_server.model.tokenizer import Tokenizer
from layertap_server.observability.bounded_streams import dropped_line_count
from layertap_server.observability.call_log import CallLog
from layertap_server.observability.metrics import Endpoint, Metrics, Server, State
from layertap_server.protocol.model_info import info_of
from layertap_server.protocol.preprocess import Preprocessor
from layertap_server.rpc.admission import Admission
from layertap_server.rpc.handlers import handler
from layertap_server.rpc.health import HealthService
from layertap_server.rpc.server import Listener, ListenError, add_standard_services
from layertap_server.rpc.service import EmbeddingService
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.hooks import Hooks, NoHooks
from layertap_server.scheduler.warm_up import warm_up
from layertap_server.shared_memory.lease import Sharing

if TYPE_CHECKING:
    from layertap_server.compat.http import HttpServer
    from layertap_server.model.sentence_config import SentenceConfig
    from layertap_server.observability.tracing import Tracing

log = logging.getLogger(__name__)

T = TypeVar("T")

_CPU_BATCH_TOKENS: Final = 1024
_CUDA_BATCH_TOKENS: Final = 32_768
_LAST_SPANS_S: Final = 1.0
"""How long sending the last spans may take: the collector may be gone."""


class EngineLostError(Exception):
    """The engine has failed for good; threads of its may never end."""


class App:
    """One server: a model on its devices, a queue, and a port.

    Attributes:
        model: The shape of the model.
        tokenizer: Its tokenizer.
        batcher: The queue and its instances.
        http_url: Where it answers HTTP, once it serves; empty: nowhere.
        metrics_url: Where the metrics are, once it serves; empty: nowhere.
    """

    def __init__(
        self,
        config: Config,
        *,
        listener: Listener | None = None,
        make_encoder: Callable[..., encoder.Encoder] = encoder.Encoder,
    ) -> None:
        """Loads and warms the model.

        Args:
            config: Every knob.
            listener: Where to listen; None: as the config says.
            make_encoder: What makes an encoder of a checkpoint, a device and a dtype.

        Raises:
            CheckpointError: if the model cannot be served.
            ConfigError: if a knob does not suit the model or the machine.
        """
        self._config = config
        self.http_url = self.metrics_url = ""
        self._listener = listener or open_listener(config)
        found = _timed(
            "found the model",
            lambda: checkpoint.find(
                model_id=config.model_id,
                revision=config.revision,
                name=config.model_name,
                load_format=config.load_format,
                seed=config.seed,
            ),
        )
        self.tokenizer = _timed("loaded the tokenizer", lambda: Tokenizer(found.tokenizer_folder))
        self.tokenizer.check_fits(found)
        devices = device.devices(config.device)
        dtype = device.compute_dtype(config.dtype, devices)
        log.info(
            "layertap-server starts",
            extra={
                "fields": {
                    "version": layertap.__version__,
                    "model_id": found.name,
                    "devices": ",".join(devices),
                    "dtype": dtype,
                    "address": self._listener.address,
                }
            },
        )
        sentence_config = self.tokenizer.sentence_config(found)
        if sentence_config.unsupported:
            log.warning("no sentence vectors with this model: %s", sentence_config.unsupported)
        threads = cpu_threads.share(instance_count=config.instances, thread_count=config.instance_threads)
        encoders = _timed(
            f"loaded the weights on {', '.join(devices)}",
            lambda: [
                make_encoder(
                    found,
                    device=device,
                    dtype=dtype,
                    sentences=sentence_config,
                    thread_count=threads.thread_count,
                    max_thread_count=threads.lone_thread_count,
                )
                for device in devices
            ],
        )
        fingerprint = _timed(
            "took the fingerprint",
            lambda: found.fingerprint(
                tokenizer=self.tokenizer.description, sentences=sentence_config.description, dtype=dtype
            ),
        )
        self.model = self.tokenizer.model_facts(found, fingerprint=fingerprint, has_pooler=encoders[0].has_pooler)
        config.check_output_bytes((self.model.layer_count + 1) * self.model.max_length * self.model.hidden_size * 4)
        batch_tokens = config.max_batch_tokens or (_CPU_BATCH_TOKENS if devices == ["cpu"] else _CUDA_BATCH_TOKENS)
        self._serving = False
        methods = wire.RPC_NAMES
        if config.kserve:
            from layertap_server.compat import kserve

            methods += (*kserve.UNARY, *kserve.STREAMS)
        if config.http_port >= 0:
            from layertap_server.compat import openai

            methods += openai.METHODS
        self._metrics: Metrics | None = None
        if config.metrics_port >= 0:
            self._metrics = Metrics(
                Server(
                    version=layertap.__version__,
                    model_id=found.name,
                    fingerprint=fingerprint,
                    methods=methods,
                    max_batch_tokens=batch_tokens,
                    max_output_bytes=config.max_output_bytes,
                )
            )
        hooks = self._metrics or NoHooks()
        self._tracing = _tracing() if config.traces == "otlp" else None
        self._encoders = encoders
        self.batcher = Batcher(
            cpu_threads.make(encoders, threads),
            max_batch_tokens=batch_tokens,
            max_batch_bytes=config.max_batch_bytes,
            min_share_tokens=config.min_share_tokens,
            max_queue_texts=config.max_queue_text_count,
            max_queue_tokens=config.max_queue_token_count,
            max_output_bytes=config.max_output_bytes,
            max_call_output_bytes=config.max_call_output_bytes,
            hooks=hooks,
        )
        if config.shared_memory_bytes and not hasattr(os, "memfd_create"):
            raise ConfigError("--shared-memory-bytes needs Linux; leave it out")
        self._sharing = Sharing(
            byte_count=config.shared_memory_bytes,
            max_count=config.max_shared_memory_call_count,
            pin=runtime.pin if encoders[0].device.type == "cuda" else None,
        )
        self._admission = Admission(
            max_call_count=config.max_concurrent_call_count,
            max_request_bytes=config.max_queue_bytes,
            stall_timeout_s=config.stall_timeout_s,
            idle_timeout_s=config.idle_timeout_s,
            call_log=CallLog([reader for reader in (self._metrics, self._tracing) if reader is not None]),
            hooks=hooks,
        )
        limits = _limits(config)
        preprocessor = Preprocessor(
            model=self.model, limits=limits, sentences=sentence_config, tokenizer=self.tokenizer
        )
        self._service = EmbeddingService(
            preprocessor=preprocessor,
            tokenizer=self.tokenizer,
            batcher=self.batcher,
            model=self.model,
            sharing=self._sharing,
            info=info_of(
                self.model,
                limits=limits,
                devices=devices,
                dtype=dtype,
                sentence_config=sentence_config,
                batch_invariant=all(one.batch_invariant for one in encoders),
            ),
            lookahead_tokens=batch_tokens * (self.batcher.instance_count + 1),
            admission=self._admission,
        )
        self._handlers = {wire.SERVICE_NAME: self._service.handler()}
        if config.kserve:
            service = kserve.Service(
                model=self.model,
                sentences=sentence_config,
                preprocessor=preprocessor,
                batcher=self.batcher,
                stopping=self._admission.closed,
            )
            self._handlers[kserve.SERVICE_NAME] = handler(kserve.SERVICE_NAME, service, self._admission)
        self._http = self._make_http(preprocessor, sentence_config, hooks) if config.http_port >= 0 else None
        _timed("warmed the engine", self._warm)

    async def serve(
        self,
        *,
        standard_services: bool = True,
        ready: Callable[[str], None] = print,
        stop_signal: Callable[[], asyncio.Future[None]] = lifecycle.stop_signal,
    ) -> None:
        """Serves until a signal stops the server or no instance is left, then finishes the running calls.

        Threads may still run when it returns: the process must not wait for them.

        Args:
            standard_services: Whether health and reflection are served too.
            ready: Called with the address once the server answers.
            stop_signal: Returns what is done when the server is to stop.

        Raises:
            ConfigError: if the address cannot be listened on.
            EngineLostError: if no instance is left.
        """
        config = self._config
        endpoint = self._show_metrics()
        server = self._listener.make_server(self._metrics or NoHooks())
        server.add_generic_rpc_handlers(tuple(self._handlers.values()))
        health = add_standard_services(server, *self._handlers) if standard_services else HealthService(())
        try:
            address = self._listener.bind(server)
        except ListenError as exc:
            raise ConfigError(str(exc)) from exc
        await self._start_http()
        stopped = stop_signal()
        await server.start()
        self._serving = True
        await health.set_serving(True)
        log.info(
            "layertap-server listens", extra={"fields": {"address": address, "instances": self.batcher.instance_count}}
        )
        ready(address)
        lost = asyncio.create_task(lifecycle.until_lost(self.batcher, timeout_s=config.instance_timeout_s))
        await asyncio.wait({stopped, lost}, return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        log.info("stopping: running calls have %.0f s to finish", config.grace_s)
        self._serving = False
        await health.set_serving(False)
        self._sharing.stop()
        await lifecycle.drain(
            self._admission,
            self.batcher,
            stop=functools.partial(lifecycle.stop_all, [server.stop, *([self._http.stop] if self._http else [])]),
            end_watches=health.end_watches,
            grace_s=config.grace_s,
        )
        if endpoint:
            endpoint.close()
        if self._tracing:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self._tracing.close), _LAST_SPANS_S)
        if not self.batcher.live_instance_count:
            raise EngineLostError("the engine has failed, the log says how; start the server again")
        log.info("stopped")

    def _make_http(self, preprocessor: Preprocessor, sentences: SentenceConfig, hooks: Hooks) -> HttpServer:
        from layertap_server.compat.http import HttpServer
        from layertap_server.compat.openai import OpenAI

        config = self._config
        api = OpenAI(
            model=self.model,
            sentences=sentences,
            preprocessor=preprocessor,
            batcher=self.batcher,
            admit=self._admission.call,
            identify=self._listener.identify,
            stall_timeout_s=config.stall_timeout_s,
            hooks=hooks,
        )
        try:
            return HttpServer(
                api.answer,
                host=config.host,
                port=config.http_port,
                context=self._listener.http_context(),
                max_connection_count=config.max_connection_count,
                stall_timeout_s=config.stall_timeout_s,
            )
        except ListenError as exc:
            raise ConfigError(str(exc)) from exc

    async def _start_http(self) -> None:
        if self._http is None:
            return
        config = self._config
        try:
            self.http_url = await self._http.start()
        except OSError as exc:
            raise ConfigError(
                f"cannot listen on {config.host} for HTTP: {exc.strerror or exc}; try --http-port 0"
            ) from exc
        log.info("layertap-server listens for HTTP", extra={"fields": {"address": self.http_url}})

    def _show_metrics(self) -> Endpoint | None:
        if self._metrics is None:
            return None
        config = self._config
        self._metrics.follow(self._state)
        try:
            endpoint = self._metrics.serve(config.metrics_host, config.metrics_port)
        except OSError as exc:
            raise ConfigError(
                f"cannot show metrics on {config.metrics_host}:{config.metrics_port}: {exc.strerror or exc}; "
                "is the port taken? try --metrics-port 0"
            ) from exc
        self.metrics_url = endpoint.url
        return endpoint

    def _state(self) -> State:
        batcher = self.batcher
        return State(
            serving=self._serving,
            queue_texts=batcher.waiting_text_count,
            queue_tokens=batcher.waiting_token_count,
            output_bytes=batcher.held_bytes,
            instances=batcher.instance_count,
            live_instances=batcher.live_instance_count,
            busy_instances=batcher.live_instance_count - batcher.idle_instance_count,
            dropped_log_lines=dropped_line_count(),
            device_memory={
                (str(one.device), kind): value for one in self._encoders for kind, value in one.memory().items()
            },
        )

    def _warm(self) -> None:
        model = self.model
        try:
            warm_up(
                self.batcher,
                token_count=model.max_length,
                layer_count=model.layer_count,
                hidden_size=model.hidden_size,
            )
        except LayertapError as exc:
            raise ConfigError(f"the engine does not run on --device {self._config.device}; the log says why") from exc


def _limits(config: Config) -> Limits:
    alike = {field.name for field in dataclasses.fields(Limits)} & {field.name for field in dataclasses.fields(Config)}
    return Limits(
        **{name: getattr(config, name) for name in alike},
        stall_time_ns=int(config.stall_timeout_s * 1e9),
        grace_time_ns=int(config.grace_s * 1e9),
        max_connection_age_ns=int(config.max_connection_age_s * 1e9),
    )


def _tracing() -> Tracing:
    try:
        from layertap_server.observability.tracing import Tracing, otlp_provider
    except ModuleNotFoundError as exc:
        raise ConfigError(f"--traces otlp needs packages ({exc.name}): pip install 'layertap[server,otel]'") from exc
    return Tracing(otlp_provider(layertap.__version__))


def _timed(what: str, work: Callable[[], T]) -> T:
    started = time.monotonic()
    result = work()
    log.info("%s in %.2f s", what, time.monotonic() - started)
    return result
