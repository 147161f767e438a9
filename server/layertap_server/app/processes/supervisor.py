"""The process that an operator sees: it starts the others, passes signals on, and replaces those that die.

Rules:
- It serves no calls, and imports no torch.
- The server is ready once all processes are; from then on each is replaced as it ends.
- A process that ends by itself with a fault is dead. Three deaths within a minute end the server with code 1.
- What cannot start while other processes serve is no death: it is tried again from time to time.
- A process that serves and does not answer for --instance-timeout-s hangs, and is killed.
- At the first signal all processes drain; the second ends them at once, as does one before the server is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from layertap.errors import counted
from layertap_server import signals
from layertap_server.app.processes.control import Control
from layertap_server.app.processes.fork_server import Child, ForkServer, ForkServerLostError
from layertap_server.config import Config, ConfigError
from layertap_server.observability.metrics_sum import MetricsSum

log = logging.getLogger(__name__)

_MAX_DEATHS: Final = 3
_DEATHS_S: Final = 60.0
"""So many deaths within so many seconds end the server."""
_RETRY_S: Final = 5.0
"""How long what could not start waits, while other processes serve, before it is tried again."""
_PROBE_COUNT: Final = 4
"""A process that answers none of so many probes hangs."""
_MIN_PROBE_S: Final = 1.0
"""The least time between them."""
_LAST_S: Final = 15.0
"""How long draining may take beside the grace for calls."""
_SCRAPE_S: Final = 2.0
"""How long a process may take to give its metrics."""

Announce = Callable[[str, str], None]
"""Called once the server is ready, with its address and the URL of its HTTP server, empty without one."""


class _Process:
    """One running process."""

    def __init__(self, number: int, child: Child, control: Control) -> None:
        self.number, self.child, self.control = number, child, control
        self.loaded = self.serving = self.has_served = False
        self.unanswered_count = 0
        self.scrape: asyncio.Future[Any] | None = None


class Supervisor:
    """The processes of one server."""

    def __init__(self, config: Config, *, start_fork_server: Callable[[], ForkServer], announce: Announce) -> None:
        """Starts the fork server. The config has ports in place of 0; `announce` may raise ConfigError."""
        self.metrics = MetricsSum(self._refresh_metrics, lambda: (config.processes, self._serving_count))
        self._config = config
        self._start_fork_server = start_fork_server
        self._announce = announce
        self._fork_server = start_fork_server()
        self._fingerprint = ""
        self._can_fork = asyncio.Event()
        self._processes: dict[int, _Process] = {}
        self._deaths: deque[float] = deque(maxlen=_MAX_DEATHS)
        self._ready = self._stopping = False
        self._code = 0
        self._scraping = asyncio.Lock()

    async def run(self) -> int:
        """Serves until a signal stops the server, or it fails; returns the exit code.

        Raises:
            ConfigError: if it cannot start.
        """
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[int] = self._loop.create_future()
        for number in signals.stopping():
            self._loop.add_signal_handler(number, self._signalled, number)
        log.info("layertap-server starts %d processes", self._config.processes)
        keeping = [self._keep(n + 1) for n in range(self._config.processes)]
        tasks = [asyncio.create_task(one) for one in (self._keep_fork_server(), self._watch(), *keeping)]
        for task in tasks:
            task.add_done_callback(self._note_failure)
        try:
            return await self._outcome
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._kill()

    @property
    def _serving_count(self) -> int:
        return sum(one.serving for one in self._processes.values())

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (exc := task.exception()) is not None and not self._outcome.done():
            self._outcome.set_exception(exc)

    def _signalled(self, number: signal.Signals) -> None:
        if self._ready and not self._stopping:
            self._stop(0)
        elif not self._outcome.done():
            self._outcome.set_result(signals.INTERRUPTED if number == signal.SIGINT else 0)

    def _stop(self, code: int) -> None:
        """Lets all processes drain; the outcome is then this code."""
        log.info(
            "stopping %s: running calls have %.0f s to finish",
            counted(len(self._processes), "process", "processes"),
            self._config.grace_s,
        )
        self._stopping, self._code = True, code
        self._fork_server.kill()
        for process in self._processes.values():
            process.serving = False
            process.child.signal(signal.SIGTERM)
        self._loop.call_later(self._config.grace_s + _LAST_S, self._end)
        if not self._processes:
            self._end()

    def _end(self) -> None:
        if not self._outcome.done():
            log.info("stopped")
            self._outcome.set_result(self._code)

    def _kill(self) -> None:
        """Ends at once what still runs."""
        for child in (self._fork_server.child, *(one.child for one in self._processes.values())):
            child.signal(signal.SIGKILL)
            child.wait()

    async def _keep_fork_server(self) -> None:
        """Keeps a fork server running.

        Raises:
            ConfigError: if the first one cannot load the model.
        """
        while True:
            server = self._fork_server
            try:
                found = await server.loaded()
                if found != (self._fingerprint or found):
                    server.kill()
                    raise ConfigError("its files have changed; start the server again to serve what they have now")
                self._fingerprint = found
                self._can_fork.set()
            except ConfigError as exc:
                if not self._ready:
                    raise
                log.error("the process that others are forked from cannot load the model: %s", exc)
            except ForkServerLostError:
                pass  # It has ended.
            code = await server.child.ended()
            self._can_fork.clear()
            if self._stopping or not await self._died("the process that others are forked from", code):
                return
            self._fork_server = self._start_fork_server()

    async def _keep(self, number: int) -> None:
        """Keeps one process running."""
        while not self._stopping:
            process = self._processes[number] = await self._fork(number)
            following = asyncio.create_task(self._follow(process))
            following.add_done_callback(self._note_failure)
            code = await process.child.ended()
            await following  # What it has said last.
            del self._processes[number]
            process.control.close()
            died = code != 0 and not self._stopping
            self.metrics.ended(number, died=died)
            if self._stopping:
                if not self._processes:
                    self._end()
            elif died or not self._ready:
                if not await self._died(f"process {number}", code, has_served=process.has_served):
                    return
            else:
                log.info("process %d was stopped", number)

    async def _fork(self, number: int) -> _Process:
        while True:
            await self._can_fork.wait()
            try:
                child, end = self._fork_server.fork(number)
            except ForkServerLostError:
                self._can_fork.clear()
                continue
            return _Process(number, child, await Control.open(end))

    async def _died(self, what: str, code: int, *, has_served: bool = False) -> bool:
        """Logs an end by a fault; returns whether to start a successor, once it is time to."""
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        now = time.monotonic()
        if not self._ready:
            if not self._outcome.done():
                log.error("%s ended %s while the server started", what, how)
                self._outcome.set_result(1)
            return False
        if not has_served and self._serving_count:
            log.error("%s ended %s; it is tried again in %.0f s, the others serve on", what, how, _RETRY_S)
            await asyncio.sleep(_RETRY_S)
            return not self._stopping
        self._deaths.append(now)
        if len(self._deaths) == _MAX_DEATHS and now - self._deaths[0] < _DEATHS_S:
            log.error("%s ended %s, the third death within %.0f s: the server ends", what, how, _DEATHS_S)
            self._stop(1)
            return False
        log.error("%s ended %s and is replaced", what, how)
        return True

    async def _watch(self) -> None:
        """Kills processes that serve and hang."""
        timeout_s = self._config.instance_timeout_s
        while True:
            # Probes are counted, not seconds: all processes may have been stopped for a while, this one too.
            await asyncio.sleep(max(timeout_s / _PROBE_COUNT, _MIN_PROBE_S))
            for process in self._processes.values():
                if not process.serving:
                    continue  # One that has loaded would take the probe for the order to serve.
                if process.unanswered_count >= _PROBE_COUNT:
                    log.error("process %d does not answer for %.0f s and is killed", process.number, timeout_s)
                    process.child.signal(signal.SIGKILL)
                process.unanswered_count += 1
                process.control.send("probe")

    async def _follow(self, process: _Process) -> None:
        """Reads what a process says until it has ended.

        Raises:
            ConfigError: if it cannot serve, and the server is not ready yet.
        """
        async for name, value in process.control.messages():
            process.unanswered_count = 0
            if name == "loaded":
                process.loaded = True
                self._let_serve(process)
            elif name == "serving":
                process.serving = process.has_served = not self._stopping
                if not self._ready and self._serving_count == self._config.processes:
                    self._announce(value["address"], value["http_url"])
                    self._ready = True
            elif name == "metrics":
                self.metrics.update(process.number, value)
                if process.scrape is not None and not process.scrape.done():
                    process.scrape.set_result(None)
            elif name == "error":
                if not self._ready:
                    raise ConfigError(value)
                log.error("process %d cannot serve: %s", process.number, value)
        process.serving = False

    def _let_serve(self, process: _Process) -> None:
        """Lets a process listen; at the start all at once, when the last has loaded."""
        if self._ready:
            process.control.send("serve")
        elif sum(one.loaded for one in self._processes.values()) == self._config.processes:
            for one in self._processes.values():
                one.control.send("serve")

    def _refresh_metrics(self) -> None:
        """Asks all processes for their metrics; called in threads of the HTTP server."""
        asked = asyncio.run_coroutine_threadsafe(self._scrape(), self._loop)
        with contextlib.suppress(TimeoutError):
            asked.result(2 * _SCRAPE_S)

    async def _scrape(self) -> None:
        async with self._scraping:
            asked = [one for one in self._processes.values() if one.serving or self._stopping]
            for process in asked:
                process.scrape = self._loop.create_future()
                process.control.send("metrics")
            if futures := [one.scrape for one in asked if one.scrape is not None]:
                await asyncio.wait(futures, timeout=_SCRAPE_S)
