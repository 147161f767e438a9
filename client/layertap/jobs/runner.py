"""What became of each item: its embedding, or why there is none. In the order of the items, a bad one ends nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, cast

from layertap._protocol.inputs import InputItem
from layertap.client import Client
from layertap.errors import LayertapError, UnavailableError
from layertap.jobs.readers import BadItem, Item
from layertap.results.embedding import Embedding, StreamResult


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What became of one item.

    Attributes:
        item: The item as it was read.
        embedding: What the model made of it, or why there is nothing.
    """

    item: Item | BadItem
    embedding: Embedding | BadItem


class Answers:
    """Embeds items with one client and one set of options."""

    def __init__(self, client: Client, *, options: Mapping[str, Any], timeout_s: float) -> None:
        """Takes what `Client.embed_stream` is to be called with, and how long to wait for answers and for servers."""
        self._client = client
        self._timeout_s = timeout_s
        self._options = {**options, "item_timeout_s": timeout_s, "reconnect_timeout_s": timeout_s}

    def of(self, items: Iterable[Item | BadItem]) -> Generator[Answer, None, None]:
        """Yields one answer an item.

        Raises:
            LayertapError: The server refuses all, or is gone.
            Exception: Whatever the items raised.
        """
        waiting: deque[Item | BadItem] = deque()

        def contents() -> Iterator[InputItem]:
            for item in items:
                waiting.append(item)
                # What cannot be read goes along as what it is, no input: it is answered in its place.
                yield item.content if isinstance(item, Item) else cast("InputItem", None)

        with contextlib.closing(self._stream(contents())) as results:
            for result in results:
                item = waiting.popleft()
                yield Answer(item=item, embedding=item if isinstance(item, BadItem) else self._embedding(item, result))

    def _embedding(self, item: Item, result: StreamResult) -> Embedding | BadItem:
        if isinstance(result.error, UnavailableError):
            # It was in flight each time that the server was lost: alone, it shows whether it is at fault.
            self._client.wait_until_ready(timeout_s=self._timeout_s)
            (result,) = self._stream([item.content])
        return result.embedding if result.error is None else _refused(item, result.index, result.error)

    def _stream(self, contents: Iterable[InputItem]) -> Generator[StreamResult, None, None]:
        yield from self._client.embed_stream(contents, **self._options)


def _refused(item: Item, index: int, error: LayertapError) -> BadItem:
    # Errors name an item by its place in the stream, which is another one each time a job is taken up.
    reason = error.details.removeprefix(f"item {index}").lstrip(": ")
    return BadItem(number=item.number, id=item.id, code=error.code.name, reason=reason)
