"""Cutting a call into ranges that threads share.

The work is one line: the tiles of the windows of all sequences and units of heads, end to end. It is cut into ranges of
as many tiles each, more than there are threads, and every thread takes the next one until none is left (sharing.py); so
lengths may be ragged, and a single long sequence is shared too. A window that lies in several ranges leaves a partial
state in each, and these are merged at the end.
"""

import numpy as np

from numba_kernels import linked
from numba_kernels.call import (
    CALL_BYTES,
    LEAST_JOINED,
    call_at,
    columns_of,
    group_lanes,
    group_of,
    head_state,
    join_heads,
    lay_out,
    query_head,
    read_call,
    scratch_size,
    window,
)
from numba_kernels.frame import answers_metadata, num_threads
from numba_kernels.native import (
    allocate,
    fetch_add,
    load_float32,
    native,
    release,
    store_float32,
    store_int64,
    up,
    word,
)
from numba_kernels.sharing import OWN, RANGES, WORKERS, done, leave, new_block, share, take
from numba_kernels.stream import MINUS_INFINITY, F, stream

RANGES_PER_THREAD = 8
LEAST_BYTES = 1 << 16  # of a range: less is not worth waking a thread for
LEAST_STATES = 32  # and as many times the partial states that it may leave, so that these stay small beside the cache
CALL, LENGTH, WORDS = OWN, OWN + 1, 40  # of the shared block


@native
def state_size(call):  # type: ignore[no-untyped-def]
    """Bytes of the state of a unit of heads."""
    return call.unit_heads * head_state(call)


@native
def parts_of(call, state, i):  # type: ignore[no-untyped-def]
    """Where the state of a unit has what belongs to its query head i: output, largest score, sum of weights."""
    columns, g = columns_of(call), i % call.group
    head = state + head_state(call) * (i // call.group)
    top = head + 4 * (group_of(call) * columns + g)
    return head + 4 * columns * g, top, top + 4 * group_lanes(call)


@native
def finish(call, b, first_head, state):  # type: ignore[no-untyped-def]
    """The results of a unit of heads from its state."""
    for i in range(call.unit_heads * call.group):
        source, top, total = parts_of(call, state, i)
        row = query_head(call, b, first_head, 0) + i
        sum_ = load_float32(total)
        store_float32(call.lse + 4 * row, load_float32(top) + np.log(sum_) if sum_ != F(0) else MINUS_INFINITY)
        linked.divide(source, total, call.out + 4 * row * call.head_dim, call.head_dim)


@native
def merge(call, state, part):  # type: ignore[no-untyped-def]
    """Fold a partial state into another."""
    columns, padded = columns_of(call), group_lanes(call)
    for i in range(call.unit_heads * call.group):
        a, top, _ = parts_of(call, state, i)
        b, part_top, _ = parts_of(call, part, i)
        linked.merge(a, b, top, part_top, 4 * padded, columns)


@native
def tiles_of(call, start, stop):  # type: ignore[no-untyped-def]
    """Tiles of a window."""
    return (stop - start + call.tile - 1) // call.tile


@native
def run_range(call, s, partials, number, length):  # type: ignore[no-untyped-def]
    """The parts of windows in one range: finished, or left in this range's two partial states.

    The first state is for a window that began in an earlier range, the second for one that goes on in the next.
    """
    low, high = number * length, (number + 1) * length
    units = call.heads // call.unit_heads
    offset = 0
    for b in range(call.batch):
        start, stop = window(call, b)
        size = tiles_of(call, start, stop)
        if offset + size * units <= low:
            offset += size * units
            continue
        for unit in range(units):
            from_, to = max(low, offset), min(high, offset + size)
            if from_ < to:
                next_b, next_unit = (b, unit + 1) if unit + 1 < units else (b + 1, 0)
                first, last = start + call.tile * (from_ - offset), min(start + call.tile * (to - offset), stop)
                stream(call, s, b, unit, first, last, next_b, next_unit)
                if to - from_ == size:
                    finish(call, b, unit * call.unit_heads, s.state)
                else:
                    bytes_ = state_size(call)
                    slot = partials + bytes_ * (2 * number + (1 if from_ == offset else 0))
                    for i in range(bytes_ // 8):
                        store_int64(slot + 8 * i, word(s.state, i))
            offset += size
        if offset >= high:
            break


@native
def finish_rest(call, partials, length):  # type: ignore[no-untyped-def]
    """Merge the windows that lie in several ranges, and answer those without positions."""
    units = call.heads // call.unit_heads
    bytes_ = state_size(call)
    offset = 0
    for b in range(call.batch):
        start, stop = window(call, b)
        size = tiles_of(call, start, stop)
        for unit in range(units):
            if size == 0:
                for i in range(call.unit_heads * call.group):
                    row = query_head(call, b, unit * call.unit_heads, 0) + i
                    store_float32(call.lse + 4 * row, MINUS_INFINITY)
                    for d in range(call.head_dim):
                        store_float32(call.out + 4 * (row * call.head_dim + d), F(0))
                continue
            first, last = offset // length, (offset + size - 1) // length
            if first < last:
                state = partials + bytes_ * (2 * first + 1)
                for number in range(first + 1, last + 1):
                    merge(call, state, partials + bytes_ * 2 * number)
                finish(call, b, unit * call.unit_heads, state)
            offset += size


@native
def take_ranges(block):  # type: ignore[no-untyped-def]
    """What every thread does with the shared block."""
    worker = -1
    while True:
        number = take(block)
        if number < 0:
            break
        call = call_at(word(block, CALL))
        partials = block + 8 * WORDS
        own = partials + up(2 * word(block, RANGES) * state_size(call), 64)
        if worker < 0:
            worker = fetch_add(block + 8 * WORKERS, 1)
        size = scratch_size(call)
        s = lay_out(call, own + worker * size)
        linked.configure(call.group, s.matrices)
        run_range(call, s, partials, number, word(block, LENGTH))
        linked.reset(s.matrices)
        done(block)
    leave(block)
    return 0


@native
def handle(frame):  # type: ignore[no-untyped-def]
    """Answer the call of a frame of XLA's. Returns 0, or 1 if there is no memory."""
    if answers_metadata(frame):
        return 0
    record = allocate(CALL_BYTES)
    if record == 0:
        return 1
    call = read_call(frame, record)
    positions, total = 0, 0
    for b in range(call.batch):
        start, stop = window(call, b)
        positions += stop - start
        total += tiles_of(call, start, stop)
    bytes_ = positions * call.heads * call.head_dim * linked.itemsize() * 2
    if bytes_ >= LEAST_JOINED:
        bytes_of_all_ranges = num_threads(frame) * RANGES_PER_THREAD * LEAST_STATES * state_size(call)
        join_heads(call, record, bytes_ // bytes_of_all_ranges)
    total *= call.heads // call.unit_heads
    threads, ranges = 1, 1
    least = max(LEAST_BYTES, LEAST_STATES * state_size(call))
    if bytes_ >= 2 * least:
        threads = num_threads(frame)
    if threads > 1:
        ranges = min(threads * RANGES_PER_THREAD, bytes_ // least)
    length = max(1, (total + ranges - 1) // ranges)
    ranges = (total + length - 1) // length
    threads = max(1, min(threads, ranges))
    scratch = scratch_size(call)
    bytes_ = 8 * WORDS + up(2 * ranges * state_size(call), 64) + 64 + threads * scratch
    block = new_block(bytes_, ranges, threads)
    if block == 0:
        release(record)
        return 1
    store_int64(block + 8 * CALL, record)
    store_int64(block + 8 * LENGTH, length)
    share(frame, block, threads)
    finish_rest(call, block + 8 * WORDS, length)
    release(record)
    leave(block)
    return 0
