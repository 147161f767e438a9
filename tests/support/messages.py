"""A made-up answer as the messages that carry it, and what the client makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from layertap import Embedding, LayerRows
from layertap._protocol.assembler import EmbedAssembler, LayerAssembler
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol import responses
from layertap_server.protocol.stream_responses import Result, split_run
from layertap_server.types import Text
from support import answers
from support.answers import Answer, Message
from support.streams import OneConnection

TIMINGS = pb.Timings(queue_time_ns=1, tokenize_time_ns=2, compute_time_ns=3)


class Vocabulary:
    """What an answer asks of a VOCABULARY: the spelling of ids, here their numbers, and which are special."""

    special_token_ids = (101, 102)

    def pieces(self, text: Text) -> list[str]:
        return [str(token_id) for token_id in text.input_ids]


VOCABULARY = Vocabulary()


def opened(answer: Answer, frames: Iterable[Message]) -> list[Message]:
    """Returns the whole answer as messages: header, frames, summary."""
    parts = [(pb.EmbedLayersResponse(frame=frame), data) for frame, data in frames]
    summary = pb.EmbedSummary(frame_count=len(parts), timings=TIMINGS)
    words = responses.word_groups(answer.tokenized, 1 << 20) if answer.plan.has_words else ()
    return [
        (pb.EmbedLayersResponse(header=answer.header), b""),
        *((group, b"") for group in words),
        *parts,
        (pb.EmbedLayersResponse(summary=summary), b""),
    ]


def assemble(answer: Answer, messages: Iterable[Message]) -> Embedding:
    assembler = EmbedAssembler(answer.messages, answer.options)
    for part, data in messages:
        assembler.feed(part, memoryview(data))
    return assembler.finish()


def gather(answer: Answer, messages: Iterable[Message]) -> Iterator[LayerRows]:
    assembler = LayerAssembler(answer.messages, answer.options)
    for part, data in messages:
        yield from assembler.feed(part, memoryview(data))
    assembler.finish()


def whole_frames(answer: Answer) -> list[Message]:
    """Returns one frame for each tensor."""
    return [
        (
            pb.Frame(
                output_index=output_index,
                layer=layer,
                row_count=int(answer.row_starts(answer.plan.outputs[output_index])[-1]),
            ),
            data,
        )
        for (output_index, layer), data in answer.data.items()
    ]


def stream_results(answer: Answer) -> list[Result]:
    (parts,) = [split_run(list(answer.ready(0, len(answer.texts))), answer.plan)]
    return [Result(id=n, tokenized=one, parts=parts[n], timings=TIMINGS) for n, one in enumerate(answer.tokenized)]


def sent_ledger(answer: Answer, *, ordered: bool = True) -> OneConnection:
    """Returns a ledger that waits for the answers to all texts."""
    ledger = OneConnection(answer.options, ordered=ordered)
    for text in answer.texts:
        ledger.offer(text.input_ids.tolist())
    while ledger.has_unsent:
        ledger.take()
    return ledger


def stream_header(answer: Answer) -> pb.EmbedStreamResponse:
    return pb.EmbedStreamResponse(header=responses.header(answers.IDENTITY, answer.plan))


def check_layers(answer: Answer, came: list[LayerRows]) -> None:
    """Fails unless each text of each layer came at most once, with the right rows."""
    seen: set[tuple[int, int]] = set()
    starts = answer.row_starts(answer.plan.outputs[0])
    for part in came:
        assert len(part.texts) == len(part.rows) > 0
        for text, rows in zip(part.texts, part.rows, strict=True):
            assert (part.layer, text) not in seen
            seen.add((part.layer, text))
            answers.same(rows, answer.wanted[0, part.layer][starts[text] : starts[text + 1]])
            assert rows.flags.c_contiguous and rows.flags.aligned and rows.flags.writeable
