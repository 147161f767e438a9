"""The only wiring: load the model, warm the engine, serve, drain.

`App` loads, `prepare` makes all that has threads, `serve` listens. Between the first two a process may be forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import layertap
from layertap import wire
from layertap.errors import LayertapError
from layertap_server.app import extensions, lifecycle
from layertap_server.app.limits import check_output_bytes, limits_of, share_of
from layertap_server.app.listening import listen_settings, open_endpoint, open_listener
from layertap_server.app.model_loading import find_model, timed
from layertap_server.config import Config, ConfigError
from layertap_server.engine import cpu_threads, runtime
from layertap_server.engine.encoder import Encoder
from layertap_server.engine.oom_retry import with_oom_retry
from layertap_server.model.facts import ModelFacts
from layertap_server.observability.bounded_streams import dropped_line_count
from layertap_server.observability.call_log import CallLog
from layertap_server.observability.metrics import Endpoint, Metrics, State
from layertap_server.protocol.model_info import info_of
from layertap_server.protocol.preprocess import Preprocessor
from layertap_server.rpc.address import ListenError
from layertap_server.rpc.admission import Admission
from layertap_server.rpc.health import HealthService
from layertap_server.rpc.listener import Listener, add_standard_services
from layertap_server.rpc.service import EmbeddingService
from layertap_server.scheduler.batcher import Batcher
from layertap_server.scheduler.call import Hooks
from layertap_server.scheduler.warm_up import warm_up
from layertap_server.shared_memory.lease import Sharing

if TYPE_CHECKING:
    from layertap_server.compat.http import HttpServer

log = logging.getLogger(__name__)

_LAST_SPANS_S: Final = 1.0
"""How long sending the last spans may take: the collector may be gone."""


class EngineLostError(Exception):
    """The engine has failed for good; threads of its may never end."""


class App:
    """One process of a server: a model on its devices, a queue, and a port.

    Attributes:
        http_url: Where it answers HTTP, once it serves; empty: nowhere.
        metrics_url: Where the metrics are, once it serves; empty: nowhere.
        tokenizer: The tokenizer of the model.
        model: The shape of the model, once prepared.
        batcher: The queue and its instances, once prepared.
        metrics: What is counted, once prepared; None: nothing.
    """

    model: ModelFacts
    batcher: Batcher
    metrics: Metrics | None

    def __init__(
        self,
        config: Config,
        *,
        listener: Listener | None = None,
        make_encoder: Callable[..., Encoder] = Encoder,
    ) -> None:
        """Loads the model. With several processes it leaves no thread behind, so that they can be forked of it.

        Args:
            config: Every knob, for the whole server.
            listener: Where to listen; None: as the config says.
            make_encoder: What makes an encoder of a checkpoint, a device and a dtype.

        Raises:
            CheckpointError: if the model cannot be served.
            ConfigError: if a knob does not suit the model or the machine.
        """
        self._config, self._share = config, share_of(config)
        self.http_url = self.metrics_url = ""
        # Certificates start gRPC, which does not survive a fork.
        self._listener = listener or (open_listener(config) if config.processes == 1 else None)
        self._make_encoder = make_encoder
        self._found = find_model(config)
        self.tokenizer = self._found.tokenizer
        self._process = 1
        self._serving = self._prepared = False
        self._endpoint: Endpoint | None = None
        self._http: HttpServer | None = None
        log.info(
            "layertap-server starts",
            extra={
                "fields": {
                    "version": layertap.__version__,
                    "model_id": self._found.checkpoint.name,
                    "devices": ",".join(self._found.devices),
                    "dtype": self._found.dtype,
                    "address": listen_settings(config).address(config.port),
                }
            },
        )
        self._encoders: list[Encoder] = []
        # A GPU is of the process that uses it.
        if self._found.on_cpu or config.processes == 1:
            self._encoders = self._found.encoders(make_encoder, before_fork=config.processes > 1)

    def prepare(self, *, process: int = 1) -> None:
        """Makes the queue, its instances and the services, and warms the engine. Does nothing a second time.

        Args:
            process: Which of the processes of the server this is, from 1.

        Raises:
            CheckpointError: if the weights do not fit the configuration.
            ConfigError: if a knob does not suit the model or the machine.
        """
        if self._prepared:
            return
        self._prepared, self._process = True, process
        config, found = self._share, self._found
        self._listener = self._listener or open_listener(self._config)
        encoders = self._encoders = self._encoders or found.encoders(self._make_encoder, before_fork=False)
        model = self.model = found.facts(has_pooler=encoders[0].has_pooler)
        check_output_bytes(config, (model.layer_count + 1) * model.max_length * model.hidden_size * 4)
        batch_tokens = config.max_batch_tokens or found.batch_tokens
        self.metrics = extensions.metrics(config, model, batch_tokens) if config.metrics_port >= 0 else None
        hooks = self.metrics or Hooks()
        self._tracing = extensions.tracing() if config.traces == "otlp" else None
        self.batcher = Batcher(
            [with_oom_retry(encode) for encode in cpu_threads.make(encoders, found.threads)],
            max_batch_tokens=batch_tokens,
            max_batch_bytes=config.max_batch_bytes,
            min_share_tokens=config.min_share_tokens,
            max_queue_texts=config.max_queue_text_count,
            max_queue_tokens=config.max_queue_token_count,
            max_output_bytes=config.max_output_bytes,
            max_call_output_bytes=config.max_call_output_bytes,
            apply_modules=encoders[0].apply_modules,
            hooks=hooks,
        )
        if config.shared_memory_bytes and not hasattr(os, "memfd_create"):
            raise ConfigError("--shared-memory-bytes needs Linux; leave it out")
        self._sharing = Sharing(
            byte_count=config.shared_memory_bytes,
            max_count=config.max_shared_memory_call_count,
            pin=None if found.on_cpu else functools.partial(runtime.pin, encoders[0].device),
        )
        self._admission = Admission(
            max_call_count=config.max_concurrent_call_count,
            max_request_bytes=config.max_queue_bytes,
            stall_timeout_s=config.stall_timeout_s,
            idle_timeout_s=config.idle_timeout_s,
            call_log=CallLog([reader for reader in (self.metrics, self._tracing) if reader is not None]),
            hooks=hooks,
        )
        preprocessor = Preprocessor(
            model=model, limits=limits_of(config), sentences=found.sentences, tokenizer=self.tokenizer
        )
        service = EmbeddingService(
            preprocessor=preprocessor,
            tokenizer=self.tokenizer,
            batcher=self.batcher,
            model=model,
            sharing=self._sharing,
            info=info_of(
                model,
                limits=limits_of(dataclasses.replace(self._config, max_call_output_bytes=config.max_call_output_bytes)),
                devices=found.devices,
                dtype=found.dtype,
                sentence_config=found.sentences,
                batch_invariant=all(one.batch_invariant for one in encoders),
                process_count=config.processes,
                process=process,
            ),
            lookahead_tokens=batch_tokens * (self.batcher.instance_count + 1),
            admission=self._admission,
        )
        self._handlers = {wire.SERVICE_NAME: service.handler()}
        if config.kserve:
            self._handlers |= extensions.kserve(preprocessor, self.batcher, self._admission)
        if config.http_port >= 0:
            self._http = extensions.http(
                config,
                preprocessor=preprocessor,
                batcher=self.batcher,
                admission=self._admission,
                listener=self._listener,
                hooks=hooks,
            )
        timed("warmed the engine", self._warm)

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
            CheckpointError: if the weights do not fit the configuration, and `prepare` was not called.
            ConfigError: if the address cannot be listened on; without `prepare` also as that raises it.
            EngineLostError: if no instance is left.
        """
        self.prepare()
        config = self._config
        self._show_metrics()
        assert self._listener is not None
        server = self._listener.make_server(self.metrics or Hooks())
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
        following = asyncio.create_task(self._listener.follow_files())
        await asyncio.wait({stopped, lost}, return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        following.cancel()
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
        if self._endpoint:
            self._endpoint.close()
        if self._tracing:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self._tracing.close), _LAST_SPANS_S)
        if not self.batcher.live_instance_count:
            raise EngineLostError("the engine has failed, the log says how; start the server again")
        log.info("stopped")

    async def _start_http(self) -> None:
        if self._http is None:
            return
        try:
            self.http_url = await self._http.start()
        except OSError as exc:
            raise ConfigError(
                f"cannot listen on {self._config.host} for HTTP: {exc.strerror or exc}; try --http-port 0"
            ) from exc
        log.info("layertap-server listens for HTTP", extra={"fields": {"address": self.http_url}})

    def _show_metrics(self) -> None:
        if self.metrics is None:
            return
        self.metrics.follow(self._state)
        config = self._config
        if config.processes == 1:  # Else the sums of all processes are shown by the process that started them.
            self._endpoint = open_endpoint(self.metrics.registry, config)
            self.metrics_url = self._endpoint.url

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
            certificate_expires_at=self._listener.certificate_expires_at if self._listener else None,
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
