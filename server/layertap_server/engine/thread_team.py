"""Whether a lone caller's small batch gets a team of threads, which pays only while the cores are free.

The threads of a team wait for each other after every step. Where other work has the cores, each such wait lasts until
the scheduler has been round: a batch of 5 ms then takes 500 ms, and one thread by itself takes 10 ms. So a team is left
out once a batch has waited for cores, until enough batches in a row have not. Every vain trial doubles that number.

Pure; the instance measures.
"""

from __future__ import annotations

from typing import Final

_TEAM_SHARE: Final = 0.6
"""A team that has computed for less of its time has waited for cores."""
_THREAD_SHARE: Final = 0.8
"""Likewise one thread, which waits for no other."""
_LEAST_PAUSE: Final = 32
_MOST_PAUSE: Final = 1024


class ThreadTeam:
    """What is known of how a team of threads fares.

    Attributes:
        pays: Whether the next batch should have it.
    """

    def __init__(self) -> None:
        self.pays = True
        self._pause = _LEAST_PAUSE
        self._free_count = 0

    def note(self, *, wall_s: float, cpu_s: float) -> None:
        """Learns from a batch of a lone caller, which had a team if it paid."""
        waited = cpu_s < wall_s * (_TEAM_SHARE if self.pays else _THREAD_SHARE)
        self._free_count = 0 if waited else self._free_count + 1
        if self.pays:
            if waited:
                self.pays = False
            elif self._free_count == _LEAST_PAUSE:
                self._pause = _LEAST_PAUSE
        elif self._free_count == self._pause:
            self.pays, self._free_count = True, 0
            self._pause = min(2 * self._pause, _MOST_PAUSE)
