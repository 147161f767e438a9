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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """One item as it was read, and what the model made of it, or why there is nothing."""

    item: Item | BadItem
    embedding: Embedding | BadItem


def answers(
    client: Client, items: Iterable[Item | BadItem], *, task: Task, timeout_s: float
) -> Generator[Answer, None, None]:
    """Embeds items for a task, which has begun, and yields one answer an item.

    `timeout_s` is how long to wait for an answer, or for a server that is gone, in seconds.

    Raises:
        LayertapError: if the server refuses all, or is gone.
        Exception: if the items raise it.
    """
    waiting: deque[tuple[Item | BadItem, Item | BadItem]] = deque()

    def contents() -> Iterator[InputItem]:
        for item in items:
            reason = task.refusal(item) if isinstance(item, Item) else ""
            sent = bad(item.number, item.id, reason) if reason else item
            waiting.append((item, sent))
            # A bad item goes along as no input at all, so that it is answered in its place.
            yield sent.content if isinstance(sent, Item) else cast("InputItem", None)

    with contextlib.closing(task.stream(client, contents(), timeout_s)) as results:
        for result in results:
            item, sent = waiting.popleft()
            if isinstance(sent, BadItem):
                yield Answer(item=item, embedding=sent)
                continue
            if isinstance(result.error, UnavailableError):
                # It was in flight each time that the server was lost: alone, it shows whether it is the cause.
                client.wait_until_ready(timeout_s=timeout_s)
                (result,) = task.stream(client, [sent.content], timeout_s)
            error = result.error
            found = result.embedding if error is None else _refused(sent, result.index, error)
            yield Answer(item=item, embedding=found)


def _refused(item: Item, index: int, error: LayertapError) -> BadItem:
    # Errors name an item by its place in the stream, which is another one each time a job is resumed.
    reason = error.details.removeprefix(f"item {index}").lstrip(": ")
    return BadItem(number=item.number, id=item.id, code=error.code.name, reason=reason)
