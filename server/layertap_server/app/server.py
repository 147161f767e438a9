"""One process of a server: load the model, warm the engine, serve, drain.

`App` loads, `prepare` makes all that has threads, `serve` listens. Between the first two a process may be forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import layertap
from layertap.errors import LayertapError
from layertap_server.app import lifecycle
from layertap_server.app.limits import share_of
from layertap_server.app.listening import listen_settings, open_endpoint, open_listener
from layertap_server.app.model_loading import find_model, timed
from layertap_server.app.wiring import Parts, make_parts
from layertap_server.config import Config, ConfigError
from layertap_server.engine.encoder import Encoder
from layertap_server.observability.metrics import Endpoint, State
from layertap_server.rpc.health import HealthService
from layertap_server.rpc.listener import Listener, add_standard_services
from layertap_server.scheduler.call import Hooks
from layertap_server.scheduler.warm_up import warm_up
from layertap_server.types import EngineLostError

log = logging.getLogger(__name__)

_LAST_SPANS_S: Final = 1.0
"""How long sending the last spans may take: the collector may be gone."""


class App:
    """One process of a server: a model on its devices, a queue, and a port.

    Attributes:
        http_url: Where it answers HTTP, once it serves; empty: nowhere.
        metrics_url: Where the metrics are, once it serves; empty: nowhere.
    """

    def __init__(
        self,
        config: Config,
        *,
        listener: Listener | None = None,
        make_encoder: Callable[..., Encoder] = Encoder,
    ) -> None:
        """Loads the model. With several processes it leaves no thread behind, so that they can be forked of it.

        By default it listens as the settings say.

        Raises:
            ConfigError: if the model cannot be served, or a setting does not suit it or the machine.
        """
        self._config = config
        self.http_url = self.metrics_url = ""
        # Certificates start gRPC, which does not survive a fork.
        self._listener = listener or (open_listener(config) if config.processes == 1 else None)
        self._make_encoder = make_encoder
        self._found = find_model(config)
        self.tokenizer = self._found.tokenizer
        self._parts: Parts | None = None
        self._serving = False
        self._endpoint: Endpoint | None = None
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
        """Makes the parts of this process, which counts from 1, and warms the engine. Does nothing a second time.

        Raises:
            ConfigError: if a setting does not suit the model or the machine, or the model its configuration.
        """
        if self._parts is not None:
            return
        self._listener = self._listener or Listener(listen_settings(self._config))
        self._encoders = self._encoders or self._found.encoders(self._make_encoder, before_fork=False)
        self._parts = make_parts(self._config, self._found, self._encoders, self._listener, process=process)
        with timed("warmed the engine"):
            self._warm()

    @property
    def fingerprint(self) -> str:
        """What tells the model from all others."""
        return self._found.fingerprint

    @property
    def parts(self) -> Parts:
        """What serves calls, once prepared."""
        assert self._parts is not None
        return self._parts

    async def serve(
        self,
        *,
        ready: Callable[[str], None] = print,
        stop_signal: Callable[[], asyncio.Future[None]] = lifecycle.stop_signal,
    ) -> None:
        """Serves until a signal stops the server or no instance is left, then finishes the running calls.

        `ready` is called with the address once the server answers. What `stop_signal` returns is done when it is to
        stop. Threads may still run when this returns: the process must not wait for them.

        Raises:
            ConfigError: if the address cannot be listened on; without `prepare` also as that raises it.
            EngineLostError: if no instance is left.
        """
        self.prepare()
        parts, listener = self.parts, self._listener
        assert listener is not None
        self._show_metrics()
        server = listener.make_server(parts.metrics or Hooks())
        server.add_generic_rpc_handlers(tuple(parts.handlers.values()))
        health = add_standard_services(server, *parts.handlers)
        address = listener.bind(server)
        await self._start_http()
        stopped = stop_signal()
        await server.start()
        self._serving = True
        await health.set_serving(True)
        fields = {"address": address, "instances": parts.batcher.instance_count}
        log.info("layertap-server listens", extra={"fields": fields})
        ready(address)
        timeout_s = self._config.instance_timeout_s
        lost = asyncio.create_task(lifecycle.until_lost(parts.batcher, timeout_s=timeout_s))
        following = asyncio.create_task(listener.follow_files())
        await asyncio.wait({stopped, lost}, return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        following.cancel()
        await self._stop(server.stop, health)
        if not parts.batcher.live_instance_count:
            raise EngineLostError("the engine has failed, the log says how; start the server again")
        log.info("stopped")

    async def _stop(self, stop_listening: Callable[[float | None], Awaitable[None]], health: HealthService) -> None:
        """Finishes the running calls, and ends all parts; for `stop_listening` see `lifecycle.drain`."""
        parts, grace_s = self.parts, self._config.grace_s
        log.info("stopping: running calls have %.0f s to finish", grace_s)
        self._serving = False
        await health.set_serving(False)
        parts.sharing.stop()
        await lifecycle.drain(
            parts.admission,
            parts.batcher,
            stops=[stop_listening, *([parts.http.stop] if parts.http else [])],
            end_watches=health.end_watches,
            grace_s=grace_s,
        )
        if self._endpoint:
            self._endpoint.close()
        if parts.tracing:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(parts.tracing.close), _LAST_SPANS_S)

    async def _start_http(self) -> None:
        if self.parts.http is None:
            return
        try:
            self.http_url = await self.parts.http.start()
        except OSError as exc:
            raise ConfigError(
                f"cannot listen on {self._config.host} for HTTP: {exc.strerror or exc}; try --http-port 0"
            ) from exc
        log.info("layertap-server listens for HTTP", extra={"fields": {"address": self.http_url}})

    def _show_metrics(self) -> None:
        if (metrics := self.parts.metrics) is None:
            return
        metrics.follow(self._state)
        if self._config.processes == 1:  # Else the process that started the others shows the sums of all.
            self._endpoint = open_endpoint(metrics.registry, self._config)
            self.metrics_url = self._endpoint.url

    def _state(self) -> State:
        batcher = self.parts.batcher
        return State(
            serving=self._serving,
            queue_size=batcher.waiting_text_count,
            queue_tokens=batcher.waiting_token_count,
            output_held_bytes=batcher.held_bytes,
            output_limit_bytes=share_of(self._config).max_output_bytes,
            instances=batcher.instance_count,
            instances_live=batcher.live_instance_count,
            instances_busy=batcher.live_instance_count - batcher.idle_instance_count,
            certificate_expiry_timestamp_seconds=self._listener.certificate_expires_at if self._listener else None,
            device_memory={
                (str(one.device), kind): value for one in self._encoders for kind, value in one.memory().items()
            },
        )

    def _warm(self) -> None:
        model = self.parts.model
        try:
            warm_up(
                self.parts.batcher,
                token_count=model.max_length,
                layer_count=model.layer_count,
                hidden_size=model.hidden_size,
            )
        except LayertapError as exc:
            raise ConfigError(f"the engine does not run on --device {self._config.device}; the log says why") from exc
