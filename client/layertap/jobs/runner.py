"""The result of each item: its rows, or why there are none. In the order of the items; a bad one ends nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import cast

from layertap._protocol.inputs import InputItem
from layertap.client import Client
from layertap.errors import LayertapError, UnavailableError
from layertap.jobs.items import BadItem, Item, bad
from layertap.jobs.tasks import Task
from layertap.results.embedding import Embedding
from layertap.results.streamed import StreamResult


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """The result of one item.

    Attributes:
        item: The item as it was read.
        embedding: What the model made of it, or why there is nothing.
    """

    item: Item | BadItem
    embedding: Embedding | BadItem


class Answers:
    """Embeds items with one client for one task, which has begun."""

    def __init__(self, client: Client, *, task: Task, timeout_s: float) -> None:
        """Remembers them.

        Args:
            client: The connection.
            task: What to ask.
            timeout_s: How long to wait for an answer, or for a server that is gone, in seconds.
        """
        self._client = client
        self._task = task
        self._timeout_s = timeout_s

    def of(self, items: Iterable[Item | BadItem]) -> Generator[Answer, None, None]:
        """Yields one answer an item.

        Raises:
            LayertapError: if the server refuses all, or is gone.
            Exception: if the items raise it.
        """
        waiting: deque[tuple[Item | BadItem, Item | BadItem]] = deque()

        def contents() -> Iterator[InputItem]:
            for item in items:
                reason = self._task.refusal(item) if isinstance(item, Item) else ""
                sent = bad(item.number, item.id, reason) if reason else item
                waiting.append((item, sent))
                # A bad item goes along as no input at all, so that it is answered in its place.
                yield sent.content if isinstance(sent, Item) else cast("InputItem", None)

        with contextlib.closing(self._stream(contents())) as results:
            for result in results:
                item, sent = waiting.popleft()
                yield Answer(item=item, embedding=sent if isinstance(sent, BadItem) else self._embedding(sent, result))

    def _embedding(self, item: Item, result: StreamResult) -> Embedding | BadItem:
        if isinstance(result.error, UnavailableError):
            # It was in flight each time that the server was lost: alone, it shows whether it is the cause.
            self._client.wait_until_ready(timeout_s=self._timeout_s)
            (result,) = self._stream([item.content])
        return result.embedding if result.error is None else _refused(item, result.index, result.error)

    def _stream(self, contents: Iterable[InputItem]) -> Generator[StreamResult, None, None]:
        yield from self._task.stream(self._client, contents, self._timeout_s)


def _refused(item: Item, index: int, error: LayertapError) -> BadItem:
    # Errors name an item by its place in the stream, which is another one each time a job is resumed.
    reason = error.details.removeprefix(f"item {index}").lstrip(": ")
    return BadItem(number=item.number, id=item.id, code=error.code.name, reason=reason)
