"""One job: a source, an output, what to ask of the model; begun, taken up again, ended.

What is done lies in `OUTPUT.parts` beside the output. Whenever the process dies, the same job takes up at the end of
the last part and ends with the same bytes, as far as the server computes the same numbers. It refuses where it would
not: other settings, another model, other items than those that were done. Bad items end nothing; they are told in a
side file.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from layertap import progress
from layertap.client import Client
from layertap.errors import FailedPreconditionError
from layertap.jobs import atomic_files, formats
from layertap.jobs.parts import Manifest, Outcome, PartBuilder, Parts
from layertap.jobs.readers import BadItem, Digest, Item, Source
from layertap.jobs.refusal import JobError
from layertap.jobs.rows import rows_of
from layertap.jobs.runner import Answers
from layertap.jobs.table import Table
from layertap.results.embedding import Embedding

DEFAULT_PART_ITEMS: Final = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be done.

    Attributes:
        source: The items.
        output: The file that is made; its ending says the format.
        options: What to ask of `Client.embed_stream`.
        reading: How the source was read, as far as that decides what comes out.
        overwrite: Whether a file of that name, and an unfinished job of another kind, may be replaced.
        part_items: How many items a part has at most: what a crash may cost.
        timeout_s: How long to wait for an answer, or for a server that is gone, in seconds.
    """

    source: Source
    output: Path
    options: Mapping[str, Any]
    reading: Mapping[str, Any]
    overwrite: bool = False
    part_items: int = DEFAULT_PART_ITEMS
    timeout_s: float

    @property
    def folder(self) -> Path:
        """Where its parts are until it is done."""
        return self.output.with_name(self.output.name + ".parts")

    @property
    def errors(self) -> Path:
        """Where bad items are told: one JSON object a line."""
        return self.output.with_suffix(".errors.jsonl")

    @property
    def kept_count(self) -> int:
        """Items that are done and lie in the folder."""
        return Parts(self.folder).item_count

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what comes out, besides input and model, as JSON has it."""
        asked = {name: _plain(value) for name, value in self.options.items()}
        return {**asked, **self.reading, "part_items": self.part_items}

    def run(self, client: Client, *, shown: bool | None = None) -> Outcome:
        """Does it, or what is left of it.

        Args:
            client: Who embeds.
            shown: Whether to show a progress bar; None: on a terminal.

        Raises:
            JobError: It would spoil or mix something; the message says what.
            ModuleNotFoundError: A package that the format needs is missing.
            LayertapError: The server refuses or is gone; what is done is kept.
            OSError: A file cannot be read or written; what is done is kept.
        """
        sink = formats.sink_of(self.output)
        with self._parts() as parts:
            if parts.outcome is not None and parts.manifest is not None and parts.manifest.settings != self.settings:
                self._give_up("holds a finished job with other settings")
                parts.clear()
            if (outcome := parts.outcome) is None:
                self._embed(parts, client, shown)
                outcome = self._assemble(parts, sink)
            self._publish(parts, outcome)
            return outcome

    @contextlib.contextmanager
    def _parts(self) -> Iterator[Parts]:
        """Opens the folder, alone; removes it if nothing in it is worth keeping."""
        if not self.folder.is_dir():
            self._refuse_existing()
            self.folder.mkdir()
            atomic_files.sync(self.folder.parent)
        with atomic_files.alone(Parts.lock(self.folder)):
            parts = Parts(self.folder)
            done = False
            try:
                if parts.outcome is None:
                    self._refuse_existing()
                yield parts
                done = True
            finally:
                if done or not parts.facts:
                    parts.remove()

    def _refuse_existing(self) -> None:
        for path in (self.output, self.errors):
            if path.exists() and not self.overwrite:
                raise JobError(f"{path} is there already; name another file, remove it, or say --overwrite")

    def _embed(self, parts: Parts, client: Client, shown: bool | None) -> None:
        """Makes all parts that are not there yet."""
        model = client.model_info(timeout_s=self.timeout_s)
        manifest = Manifest(settings=self.settings, model_id=model.model_id, fingerprint=model.fingerprint)
        if parts.facts:
            self._compare(parts, manifest)
        if not parts.facts:
            parts.begin(manifest)
        digest, items = Digest(), self.source.items()
        if not self._skip(parts, items, digest):
            parts.begin(manifest)
            if not self.source.repeatable:
                raise JobError(f"{self.folder} was of other items and is emptied; run the same again")
            digest, items = Digest(), self.source.items()
        watched = progress.on_terminal() if shown is None else shown
        total = self.source.count() if watched else None
        with progress.bar(total=total, unit="text", shown=shown, done=parts.item_count) as advance:
            builder = self._builder()
            for answer in Answers(client, options=self.options, timeout_s=self.timeout_s).of(items):
                digest.add(answer.item)
                if isinstance(answer.embedding, BadItem):
                    builder.add_bad(answer.embedding)
                elif isinstance(answer.item, Item):
                    _check(answer.embedding, manifest.fingerprint)
                    builder.add(answer.item, *rows_of(answer.embedding))
                advance(1)
                if builder.is_full:
                    parts.add(builder, digest.text())
                    builder = self._builder()
            if builder.item_count:
                parts.add(builder, digest.text())

    def _compare(self, parts: Parts, manifest: Manifest) -> None:
        """Sees whether parts are of this job; forgets them if they are not and that is allowed."""
        known = parts.manifest
        assert known is not None
        reason = ""
        if known.settings != manifest.settings:
            names = sorted(known.settings.keys() | manifest.settings.keys())
            name = next(name for name in names if known.settings.get(name) != manifest.settings.get(name))
            was, now = known.settings.get(name), manifest.settings.get(name)
            reason = f"was begun with {name} {was!r}, now it is {now!r}"
        elif known.fingerprint != manifest.fingerprint:
            reason = (
                f"was begun with the model {known.model_id}, fingerprint {known.fingerprint[:12]}; "
                f"the server has {manifest.model_id}, {manifest.fingerprint[:12]}"
            )
        if reason:
            self._give_up(reason)
            parts.clear()

    def _skip(self, parts: Parts, items: Iterator[Item | BadItem], digest: Digest) -> bool:
        """Passes over what is done; returns whether it is what was done then."""
        for _ in range(parts.item_count):
            item = next(items, None)
            if item is None:
                break
            digest.add(item)
        if parts.digest in (None, digest.text()):
            return True
        self._give_up("was begun with other items: the input has changed where it was done already")
        return False

    def _give_up(self, reason: str) -> None:
        if not self.overwrite:
            raise JobError(
                f"{self.folder} {reason}; end it as it was begun, or say --overwrite to lose it and begin anew"
            )

    def _builder(self) -> PartBuilder:
        return PartBuilder(
            max_item_count=self.part_items, accept=lambda columns: formats.check_columns(self.output, columns)
        )

    def _assemble(self, parts: Parts, sink: formats.Sink) -> Outcome:
        """Writes output and side file into the folder, and notes that they are whole."""
        if not parts.item_count:
            raise JobError("there is no text; the input is empty")
        bad_count = sum(facts.bad_count for facts in parts.facts)
        text_count = parts.item_count - bad_count
        shapes: dict[str, tuple[int, ...]] = {}
        if bad_count:
            with atomic_files.writing(parts.errors) as file:
                for lines in parts.bad_lines():
                    file.write(lines)
        if text_count:
            table = Table(parts)
            shapes = {member.name: member.shape for member in formats.held(table, suffix=self.output.suffix)}
            with atomic_files.writing(parts.output) as file:
                sink(table, file)
        outcome = Outcome(text_count=text_count, bad_count=bad_count, shapes=shapes)
        assert parts.manifest is not None
        parts.note(dataclasses.replace(parts.manifest, outcome=outcome))
        return outcome

    def _publish(self, parts: Parts, outcome: Outcome) -> None:
        """Gives output and side file their names; what has its name already is passed over."""
        named = ((parts.errors, self.errors), (parts.output, self.output))
        if not self.overwrite and (taken := [name for path, name in named if path.exists() and name.exists()]):
            raise JobError(f"{taken[0]} has come meanwhile; move it away and run the same again, or say --overwrite")
        if self.overwrite and not outcome.bad_count:
            self.errors.unlink(missing_ok=True)
        for path, name in named:
            if path.exists():
                atomic_files.rename(path, name)


def _check(embedding: Embedding, fingerprint: str) -> None:
    if embedding.model.fingerprint != fingerprint:
        raise FailedPreconditionError(
            f"the server now serves another model ({embedding.model.model_id}, fingerprint "
            f"{embedding.model.fingerprint[:12]}, before {fingerprint[:12]}); bring the first one back"
        )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
