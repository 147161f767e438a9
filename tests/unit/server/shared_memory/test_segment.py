"""Segments of shared memory, both ends in one process: nothing overlaps, nothing is lost, flags are not believed."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT, answers

from layertap import DataLossError, FailedPreconditionError, ResourceExhaustedError
from layertap._protocol.assembler import EmbedAssembler
from layertap._shared_memory.mapping import Mapping, SharedMemory
from layertap.v1 import embedding_pb2 as pb
from layertap_server.protocol import responses
from layertap_server.shared_memory.lease import Sharing
from layertap_server.shared_memory.segment import CALL_COUNT, LEAST_BYTES, SLOT_COUNT, UNIT, Lending, Segment

SIZE = 32 * UNIT


def description(segment: Segment) -> pb.ShareMemoryResponse:
    return pb.ShareMemoryResponse(
        segment_id=segment.id,
        process_id=os.getpid(),
        file_descriptor=segment.descriptor,
        byte_count=segment.byte_count,
        nonce=segment.nonce,
        slot_offset=segment.slot_offset,
        slot_count=segment.slot_count,
        call_offset=segment.call_offset,
        call_count=segment.call_count,
    )


def mapped(segment: Segment) -> Mapping:
    return Mapping(description(segment), SharedMemory(wanted=True))


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment(SIZE)
    yield made
    made.close()


def allocated(segment: Segment, byte_count: int) -> memoryview:
    found = segment.allocate(byte_count)
    assert found is not None and found.nbytes == byte_count
    return found


def offset(segment: Segment, data: memoryview) -> int:
    found = segment.offset_of(data)
    assert found is not None
    return found


def sent(segment: Segment, lending: Lending, data: memoryview) -> pb.SharedRows:
    offsets = [offset(segment, data)]
    slot = lending.send(offsets)
    assert slot is not None
    return pb.SharedRows(offsets=offsets, slot=slot)


def test_what_one_end_writes_the_other_reads_and_gives_back(segment: Segment) -> None:
    mapping = mapped(segment)
    call = mapping.begin()
    assert call is not None and call.use.segment_id == segment.id
    lending = segment.lend(call.use.call_number)
    data = allocated(segment, SIZE)
    data[:4] = b"rows"
    shared = sent(segment, lending, data)
    del data
    rows = call.take(shared)(shared.offsets[0], SIZE)
    assert rows[:4].tobytes() == b"rows" and rows.flags.writeable and rows.ctypes.data % 64 == 0
    part = rows[2:3]
    del rows
    call.end()
    lending.close()
    assert segment.allocate(UNIT) is None  # One byte of it is still in use.
    del part
    assert segment.allocate(SIZE) is not None
    assert mapping.memory.byte_count == SIZE


def test_views_of_views_of_any_kind_hold_the_block(segment: Segment) -> None:
    mapping = mapped(segment)
    call = mapping.begin()
    assert call is not None
    lending = segment.lend(call.use.call_number)
    shared = sent(segment, lending, allocated(segment, SIZE))
    view = call.take(shared)(shared.offsets[0], SIZE).view("<f4").reshape(-1, 8)[3:5].T[1:]
    held = memoryview(view)
    del view
    gc.collect()
    assert segment.allocate(SIZE) is None
    del held
    assert segment.allocate(SIZE) is not None


def test_what_is_still_written_is_not_lent_again_though_its_call_is_over(segment: Segment) -> None:
    lending = segment.lend(1)
    data = allocated(segment, SIZE)
    part = data[10:20]
    lending.close()
    del data
    assert segment.allocate(UNIT) is None
    del part
    assert segment.allocate(SIZE) is not None


def test_messages_that_a_broken_off_call_never_read_come_back(segment: Segment) -> None:
    mapping = mapped(segment)
    call, other = mapping.begin(), mapping.begin()
    assert call is not None and other is not None
    lending = segment.lend(call.use.call_number)
    unread = [sent(segment, lending, allocated(segment, SIZE // 2)) for _ in range(2)]
    rows = call.take(unread[0])(unread[0].offsets[0], SIZE // 2)
    other.end()
    lending.close()
    assert segment.allocate(UNIT) is None  # The messages may still be on their way.
    call.end()
    assert segment.allocate(SIZE // 2) is not None
    assert len(rows) == SIZE // 2 and segment.allocate(SIZE) is None


def test_no_two_calls_under_way_share_a_place_in_the_table(segment: Segment) -> None:
    mapping = mapped(segment)
    first = mapping.begin()
    assert first is not None
    for _ in range(3 * CALL_COUNT):
        call = mapping.begin()
        assert call is not None and call.use.call_number % CALL_COUNT != first.use.call_number % CALL_COUNT
        call.end()
    others = [mapping.begin() for _ in range(CALL_COUNT - 1)]
    assert None not in others and mapping.begin() is None
    first.end()
    again = mapping.begin()
    assert again is not None and (again.use.call_number - first.use.call_number) % CALL_COUNT == 0


def test_flags_give_back_nothing_that_was_not_sent(segment: Segment) -> None:
    mapping = mapped(segment)
    reserved = allocated(segment, SIZE // 2)
    lending = segment.lend(1)
    shared = sent(segment, lending, allocated(segment, SIZE // 2))
    mapping.slots[:] = bytes([2]) * SLOT_COUNT  # All slots at once, also those that stand for nothing.
    first = allocated(segment, SIZE // 2)  # What was sent has come back; what was only reserved has not.
    assert offset(segment, first) == shared.offsets[0] != offset(segment, reserved)
    mapping.slots[:] = bytes([2]) * SLOT_COUNT
    assert segment.allocate(UNIT) is None
    mapping.slots[:] = bytes(range(256)) * (SLOT_COUNT // 256)
    assert segment.allocate(UNIT) is None
    del first, reserved
    assert segment.allocate(SIZE) is not None


def test_a_caller_can_neither_shrink_nor_grow_the_segment(segment: Segment) -> None:
    for size in (0, segment.byte_count + UNIT):
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/self/fd/{segment.descriptor}", size)


def test_when_slots_run_out_rows_have_to_travel(segment: Segment) -> None:
    lending = segment.lend(1)
    data = allocated(segment, UNIT)
    assert len({lending.send([offset(segment, data)]) for _ in range(SLOT_COUNT)}) == SLOT_COUNT
    assert lending.send([offset(segment, data)]) is None


def test_small_payloads_and_payloads_from_elsewhere_travel(segment: Segment) -> None:
    lending = segment.lend(1)
    assert lending.allocate(LEAST_BYTES - 1) is None and lending.allocate(LEAST_BYTES) is not None
    assert lending.offset_of(memoryview(bytearray(10))) is None and lending.offset_of(memoryview(b"")) is None


def test_a_lease_that_has_ended_lends_nothing_and_takes_nothing_from_anyone() -> None:
    before = os.listdir("/proc/self/fd")
    segment = Segment(SIZE)
    mapping = mapped(segment)
    call = mapping.begin()
    assert call is not None
    lending = segment.lend(call.use.call_number)
    data = allocated(segment, UNIT)
    data[:] = b"x" * UNIT
    shared = sent(segment, lending, data)
    rows = call.take(shared)(shared.offsets[0], UNIT)
    segment.close()
    assert segment.allocate(UNIT) is None and lending.offset_of(data) is None and lending.send([UNIT]) is None
    segment.close()
    lending.close()
    data[:] = b"y" * UNIT  # A batch that is still under way.
    assert rows.tobytes() == b"y" * UNIT
    del data, rows, shared, call, mapping, lending, segment
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "change", ["nonce", "byte_count", "process_id", "file_descriptor", "slot_offset", "call_count"]
)
def test_what_is_not_the_servers_segment_is_not_mapped(segment: Segment, change: str) -> None:
    wrong = description(segment)
    setattr(
        wrong,
        change,
        {
            "nonce": b"0" * 16,
            "byte_count": segment.byte_count - UNIT,
            "process_id": 1 << 40,
            "file_descriptor": 0,
            "slot_offset": segment.byte_count,
            "call_count": 1 << 30,
        }[change],
    )
    with pytest.raises(OSError):
        Mapping(wrong, SharedMemory(wanted=True))


def test_places_outside_the_segment_are_refused(segment: Segment) -> None:
    mapping = mapped(segment)
    call = mapping.begin()
    assert call is not None
    view = call.take(pb.SharedRows(slot=0))
    for at, size in ((0, 4), (-4, 4), (segment.byte_count - 4, 8), (segment.byte_count - UNIT + 2, 4), (UNIT * 16, -1)):
        with pytest.raises(DataLossError):
            view(at, size)
    for slot in (-1, SLOT_COUNT):
        with pytest.raises(DataLossError):
            call.take(pb.SharedRows(slot=slot))


def test_a_forked_child_gives_nothing_back() -> None:
    code = """
        import os
        from layertap._shared_memory.mapping import Mapping, SharedMemory
        from layertap.v1 import embedding_pb2 as pb
        from layertap_server.shared_memory.segment import Segment
        import test_segment as t
        segment = Segment(t.SIZE)
        call = t.mapped(segment).begin()
        shared = t.sent(segment, segment.lend(1), t.allocated(segment, t.SIZE))
        rows = call.take(shared)(shared.offsets[0], t.SIZE)
        child = os.fork()
        if not child:
            del rows
            os._exit(0)
        os.waitpid(child, 0)
        assert segment.allocate(4096) is None
        del rows
        assert segment.allocate(t.SIZE) is not None
        print("well")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=os.path.dirname(__file__),
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )
    assert done.stdout == "well\n", done.stderr


def test_segments_are_counted_and_known_by_ids_that_cannot_be_guessed() -> None:
    def lends(segment_id: str, call_number: int = 1) -> bool:
        reference = pb.SharedMemoryUse(segment_id=segment_id, call_number=call_number)
        with sharing.lend(pb.EmbedOptions(shared_memory=reference)) as lending:
            return lending is not None

    with pytest.raises(FailedPreconditionError, match="--shared-memory-bytes"):
        Sharing(byte_count=0, max_count=1).open()
    sharing = Sharing(byte_count=1, max_count=1)
    one = sharing.open()
    with pytest.raises(ResourceExhaustedError, match="--max-shared-memory-call-count"):
        sharing.open()
    assert len(one.id) == 32 and lends(one.id)
    assert not lends(one.id, 0) and not lends(one.id[:-1]) and not lends("")
    sharing.close(one)
    assert not lends(one.id)
    other = sharing.open()
    assert other.id != one.id and other.nonce != one.nonce
    sharing.close(other)


@dataclasses.dataclass(eq=False)
class Held:
    """A block that must not change: as the server's buffer, as a message under way, or as the client's rows."""

    number: int
    start: int
    size: int
    buffer: memoryview | None
    shared: pb.SharedRows | None = None
    rows: np.ndarray | None = None


@given(st.data())
def test_whatever_happens_no_two_blocks_overlap_and_all_comes_back(data: st.DataObject) -> None:
    segment = Segment(SIZE)
    mapping = mapped(segment)
    call = mapping.begin()
    assert call is not None
    lending = segment.lend(call.use.call_number)
    held: list[Held] = []
    for number in range(1, data.draw(st.integers(1, 30)) + 1):
        size = data.draw(st.integers(1, 6 * UNIT))
        buffer = segment.allocate(size)
        if buffer is not None:
            buffer[:] = bytes([number]) * size
            held.append(Held(number, offset(segment, buffer), size, buffer))
            del buffer
        chosen = data.draw(st.sets(st.integers(0, len(held) - 1))) if held else set()
        for one in [held[n] for n in chosen]:
            step = data.draw(st.sampled_from(["send", "take", "drop"]))
            if step == "send" and one.buffer is not None and one.shared is None:
                one.shared = sent(segment, lending, one.buffer)
                one.buffer = None
            elif step == "take" and one.shared is not None and one.rows is None:
                one.rows = call.take(one.shared)(one.start, one.size)
            elif step == "drop" and (one.rows is not None or one.shared is None):
                one.rows = one.buffer = None
                held.remove(one)
        places = sorted((one.start, one.start + one.size) for one in held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
        for one in held:
            assert mapping._bytes[one.start : one.start + one.size].tobytes() == bytes([one.number]) * one.size
    lending.close()
    call.end()
    for one in held:
        one.buffer = one.rows = None
    assert segment.allocate(SIZE) is not None
    segment.close()


def test_many_threads_at_once_never_get_the_same_block(segment: Segment) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            buffer = segment.allocate(2 * UNIT)
            if buffer is not None:
                buffer[:] = bytes([number]) * len(buffer)
                if bytes(buffer) != bytes([number]) * len(buffer):
                    wrong.append(number)
                del buffer

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and segment.allocate(SIZE) is not None


# What the assembler makes of rows that lie in memory.


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), answer=answers.answers())
def test_frames_in_memory_at_their_places_or_elsewhere_and_bytes_give_the_right_arrays(
    data: st.DataObject, answer: answers.Answer
) -> None:
    memory = np.zeros(1 << 16, np.uint8)
    places = {}
    for n, (key, payload) in enumerate(answer.data.items()):
        places[key] = n * 2048
        assert len(payload) <= 1024
    assembler = EmbedAssembler(answer.messages, answer.options)
    assembler.feed(pb.EmbedLayersResponse(header=answer.header), b"")
    if answer.plan.has_words:
        for group in responses.word_groups(answer.tokenized, 1 << 20):
            assembler.feed(group, b"")
    frames = data.draw(answers.cut_frames(answer))
    for frame, payload in frames:
        way = data.draw(st.sampled_from(["place", "place", "elsewhere", "bytes"]))
        if way == "bytes":
            assembler.feed(pb.EmbedLayersResponse(frame=frame), payload)
            continue
        output = answer.plan.outputs[frame.output_index]
        row = int(answer.row_starts(output)[frame.first_text]) + frame.first_row
        at = places[frame.output_index, frame.layer] + row * answer.plan.row_bytes(output) + 1024 * (way == "elsewhere")
        memory[at : at + len(payload)] = np.frombuffer(payload, np.uint8)
        part = pb.EmbedLayersResponse(frame=frame, shared_rows=pb.SharedRows(offsets=[at], slot=0))
        assembler.feed(part, b"", lambda offset, size: memory[offset : offset + size])
    assembler.feed(pb.EmbedLayersResponse(summary=pb.EmbedSummary(frame_count=len(frames))), b"")
    answer.check(assembler.finish())


def test_a_tensor_that_lies_in_one_piece_is_not_copied() -> None:
    answer = answers.make([3, 2, 4], [answers.hidden_states([0, 2], 4)], "float32", seed=1)
    memory = np.zeros(1024, np.uint8)
    assembler = EmbedAssembler(answer.messages, answer.options)
    assembler.feed(pb.EmbedLayersResponse(header=answer.header), b"")
    for n, ((_, layer), payload) in enumerate(answer.data.items()):
        memory[n * 512 : n * 512 + len(payload)] = np.frombuffer(payload, np.uint8)
        for text, first, last in ((1, 3, 5), (0, 0, 3), (2, 5, 9)):
            frame = pb.Frame(layer=layer, first_text=text, row_count=last - first)
            shared = pb.SharedRows(offsets=[n * 512 + first * 16], slot=0)
            part = pb.EmbedLayersResponse(frame=frame, shared_rows=shared)
            assembler.feed(part, b"", lambda offset, size: memory[offset : offset + size])
    assembler.feed(pb.EmbedLayersResponse(summary=pb.EmbedSummary(frame_count=6)), b"")
    found = assembler.finish()
    answer.check(found)
    assert all(np.shares_memory(rows, memory) for layer in (0, 2) for rows in found.ragged(layer))


def test_frames_in_memory_that_was_not_asked_for_are_refused() -> None:
    answer = answers.make([3], [answers.hidden_states([0], 4)], "float32", seed=1)
    assembler = EmbedAssembler(answer.messages, answer.options)
    assembler.feed(pb.EmbedLayersResponse(header=answer.header), b"")
    part = pb.EmbedLayersResponse(frame=pb.Frame(row_count=3), shared_rows=pb.SharedRows(offsets=[0]))
    with pytest.raises(DataLossError, match="not requested"):
        assembler.feed(part, b"")
