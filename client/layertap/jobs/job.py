"""One job: a source, an output, what to ask of the model; begun, resumed, finished.

What is done lies in `OUTPUT.parts` beside the output. Whenever the process dies, the same job resumes after the last
part and ends with the same bytes, wherever the server is batch-invariant. It refuses where it would not: other
settings, another model, other items than those that were done. Whatever can be refused is refused before anything is
computed; `destination` is what may be written.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

from layertap import progress
from layertap.client import Client
from layertap.jobs import JobError, atomic_files, formats
from layertap.jobs.columns import rows_of
from layertap.jobs.destination import Destination
from layertap.jobs.items import BadItem, Digest, Fields, Item
from layertap.jobs.part import PartBuilder
from layertap.jobs.parts import MANIFEST, End, Manifest, Parts
from layertap.jobs.readers import Source
from layertap.jobs.runner import answers
from layertap.jobs.table import Table
from layertap.jobs.tasks import Task
from layertap.model_info import ModelInfo

DEFAULT_PART_ITEMS: Final = 1024

LEAST_BAD_COUNT: Final = 100
"""After so many items without a good one the whole input is taken to be wrong."""

_REASONS_SHOWN: Final = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        text_count: Texts in the output.
        bad_count: Items in the side file.
        shapes: The shape of each array, all texts together.
        reasons: What is wrong with the first bad items.
        was_done: Whether nothing had to be done, because the job had ended before.
    """

    text_count: int
    bad_count: int
    shapes: dict[str, tuple[int, ...]]
    reasons: list[str]
    was_done: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be done.

    Attributes:
        source: The items.
        destination: The files that are made.
        task: What to ask of the model.
        fields: Which fields of the source mean what.
        input_format: The format of the source.
        part_items: How many items a part has at most: what a crash may cost.
        timeout_s: How long to wait for an answer, or for a server that is gone, in seconds.
        warn: Called with what the user should know, one line each.
    """

    source: Source
    destination: Destination
    task: Task
    fields: Fields
    input_format: str | None
    part_items: int = DEFAULT_PART_ITEMS
    timeout_s: float
    warn: Callable[[str], None]

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the output, besides input and model, as JSON has it."""
        reading = {"text_field": self.fields.text, "id_field": self.fields.id, "keep": list(self.fields.keep)}
        return {**self.task.settings, **reading, "input_format": self.input_format, "part_items": self.part_items}

    def run(self, client: Client, *, shown: bool | None = None) -> Outcome:
        """Does it, or what is left of it; `shown` says whether to show a progress bar, None: on a terminal.

        Raises:
            JobError: if it would lose or mix something; the message says what.
            ModuleNotFoundError: if a package that the format needs is missing.
            LayertapError: if the server refuses or is gone; what is done is kept.
            OSError: if a file cannot be read or written; what is done is kept.
        """
        output = self.destination.output
        writer = formats.writer_of(output)
        if output.suffix == formats.MATRIX and self.fields.keep:
            raise JobError(f"{formats.MATRIX} holds one matrix and nothing else; leave --keep out, or write .npz")
        self.destination.check(self.source)
        with self._parts() as parts:
            if (end := self._end(parts, client)) is not None:
                return Outcome(text_count=end.text_count, bad_count=end.bad_count, shapes={}, reasons=[], was_done=True)
            if parts.is_complete and parts.manifest and parts.manifest.settings != self.settings:
                self.destination.give_up("holds a finished job with other settings")
                parts.clear()
            stamp = ""
            if not parts.is_complete:
                stamp = self._stamp()
                self._embed(parts, client, shown)
            return self._finish(parts, writer, stamp)

    def kept_count(self) -> int:
        """Returns how many items are done and lie in the folder."""
        folder = self.destination.folder
        return Parts(folder).item_count if (folder / MANIFEST).exists() else 0

    def _end(self, parts: Parts, client: Client) -> End | None:
        """Returns how the job ended before; None: it has not, or is to be done again."""
        manifest = parts.manifest
        if manifest is None or manifest.end is None:
            return None
        if self.destination.output.exists() or not manifest.end.text_count:
            now = self._manifest(client.model_info(timeout_s=self.timeout_s))
            if self._is_continued(manifest, now) and self._has_items(manifest.end):
                parts.end(manifest.end)
                return manifest.end
        parts.clear()
        return None

    def _has_items(self, end: End) -> bool:
        """Returns whether the input is what it was when the job ended."""
        if end.stamp and self._stamp() == end.stamp:
            return True
        digest = Digest()
        for item in self.source.items():
            digest.add(item)
        if digest.text() == end.digest:
            return True
        self.destination.give_up("was made of another input", is_done=True)
        return False

    def _stamp(self) -> str:
        found = self.source.stat()
        return "" if found is None else f"{found.st_size} {found.st_mtime_ns}"

    @contextlib.contextmanager
    def _parts(self) -> Iterator[Parts]:
        """Opens the folder under its lock; removes it if nothing in it is worth keeping."""
        folder = self.destination.folder
        if not folder.is_dir():
            self.destination.check_free()
            folder.mkdir()
            atomic_files.sync_folder(folder.parent)
        with atomic_files.locked(Parts.lock(folder)):
            parts = Parts(folder)
            done = False
            try:
                if not parts.is_complete:
                    self.destination.check_free()
                yield parts
                done = True
            finally:
                has_ended = parts.manifest is not None and parts.manifest.end is not None
                if not has_ended and (done or not (parts.text_count or parts.damage)):
                    parts.remove()

    def _embed(self, parts: Parts, client: Client, shown: bool | None) -> None:
        """Makes all parts that are not there yet."""
        model = client.model_info(timeout_s=self.timeout_s)
        self.task.begin(model)
        manifest = self._manifest(model)
        if parts.damage:
            self.warn(parts.damage)
        if not parts.done or parts.manifest is None or not self._is_continued(parts.manifest, manifest):
            parts.begin(manifest)
        digest, items = Digest(), self.source.items()
        if not self._skip(parts, items, digest):
            parts.begin(manifest)
            if not self.source.repeatable:
                raise JobError(f"{parts.folder} held other items and is emptied; run the same again")
            digest, items = Digest(), self.source.items()
        watched = progress.on_terminal() if shown is None else shown
        total = self.source.count() if watched else None
        with progress.bar(total=total, shown=shown, done=parts.item_count) as advance:
            builder = self._builder()
            for answer in answers(client, items, task=self.task, timeout_s=self.timeout_s):
                digest.add(answer.item)
                if isinstance(answer.embedding, BadItem):
                    builder.add_bad(answer.embedding)
                elif isinstance(answer.item, Item):
                    builder.add(answer.item, *rows_of(self.task.columns(answer.embedding)))
                advance(1)
                if builder.is_full:
                    self._add(parts, builder, digest)
                    builder = self._builder()
            if builder.item_count:
                self._add(parts, builder, digest)

    def _add(self, parts: Parts, builder: PartBuilder, digest: Digest) -> None:
        """Adds a part, unless it shows that the input as a whole is wrong."""
        if not parts.text_count and not builder.text_count and parts.item_count + builder.item_count >= LEAST_BAD_COUNT:
            shown = "; ".join(map(_reason, builder.bad[:_REASONS_SHOWN]))
            raise JobError(f"none of the first {parts.item_count + builder.item_count} items is good: {shown}")
        is_first = not parts.done
        parts.add(builder, digest.text())
        if is_first and (empty := [one.name for one in parts.done[0].labels if one.kind == "null"]):
            self.warn(f"--keep {empty[0]}: none of the first {builder.item_count} items has that field")

    def _is_continued(self, known: Manifest, manifest: Manifest) -> bool:
        """Returns whether a manifest is of this job; what is of another one is given up, if that is allowed."""
        if difference := known.difference(manifest):
            is_done = known.end is not None
            self.destination.give_up(f"{'was made' if is_done else 'was begun'} with {difference}", is_done=is_done)
        return not difference

    def _skip(self, parts: Parts, items: Iterator[Item | BadItem], digest: Digest) -> bool:
        """Passes over what is done; returns whether it is what was done then."""
        for _ in range(parts.item_count):
            item = next(items, None)
            if item is None:
                break
            digest.add(item)
        if parts.digest in (None, digest.text()):
            return True
        self.destination.give_up("was begun with other items: the input has changed where it was done already")
        return False

    def _manifest(self, model: ModelInfo) -> Manifest:
        return Manifest(settings=self.settings, model_id=model.model_id, fingerprint=model.fingerprint)

    def _builder(self) -> PartBuilder:
        return PartBuilder(
            max_item_count=self.part_items,
            keep=self.fields.keep,
            accept=lambda columns: formats.check_columns(self.destination.output, columns, self.fields.keep),
        )

    def _finish(self, parts: Parts, writer: formats.Writer, stamp: str) -> Outcome:
        """Writes output and side file into the folder, and gives them their names."""
        work_folder, suffix = self.destination.work_folder, self.destination.output.suffix
        if not parts.item_count and work_folder is None:
            raise JobError("there is no text; the input is empty")
        assert parts.manifest is not None
        bad_count = parts.item_count - parts.text_count
        shapes: dict[str, tuple[int, ...]] = {}
        if bad_count:
            with atomic_files.writing(parts.errors) as file:
                for lines in parts.bad_lines():
                    file.write(lines)
        if parts.text_count:
            table = Table(parts, precision=self.task.precision)
            shapes = {member.name: member.shape for member in formats.held(table, suffix=suffix)}
            with atomic_files.writing(parts.output) as file:
                writer(table, file)
        bad = (one for part in parts.done for one in part.bad())
        reasons = [_reason(one) for one, _ in zip(bad, range(_REASONS_SHOWN), strict=False)]
        if not parts.is_complete:
            parts.note(dataclasses.replace(parts.manifest, is_complete=True))
        self.destination.publish(parts, has_errors=bool(bad_count))
        text_count = parts.text_count
        if work_folder is not None:
            digest = parts.digest or Digest().text()
            parts.end(End(text_count=text_count, bad_count=bad_count, digest=digest, stamp=stamp))
        return Outcome(text_count=text_count, bad_count=bad_count, shapes=shapes, reasons=reasons)


def _reason(item: BadItem) -> str:
    return f"item {item.number}: {item.reason}"
