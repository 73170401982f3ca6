"""Sharing the ranges of a call among XLA's own threads, which take one after another until none is left.

No thread waits for another to begin: the calling thread takes ranges as well, and waits only for ranges that somebody
has taken. So calls from any number of programs and threads cannot block each other, nor can a pool whose threads are
all busy, or are gone (as in the child of a fork).
"""

from numba_kernels.bitcode import TASK
from numba_kernels.frame import schedule
from numba_kernels.native import (
    allocate,
    call_pointer,
    fetch_add,
    give_way,
    native,
    pointer_to,
    release,
    store_int64,
    word,
)

# The block that the threads of a call share, in int64 words; those from OWN on are the kernel's. Tasks that come late
# still look at it, so it is freed by whoever leaves last.
NEXT, DONE, USERS, WORKERS, RANGES, OWN = 0, 8, 16, 24, 32, 33

_task = pointer_to(TASK)  # the C function of a kernel that every thread calls with the block's address


@native
def new_block(bytes_, ranges, threads):  # type: ignore[no-untyped-def]
    """The block of a call that so many threads share; 0 if there is no memory."""
    block = allocate(bytes_)
    if block != 0:
        for i in range(OWN):
            store_int64(block + 8 * i, 0)
        # The caller counts as two users, so that the block is there until it has what it wants of it.
        store_int64(block + 8 * USERS, 1 + threads)
        store_int64(block + 8 * RANGES, ranges)
    return block


@native
def share(frame, block, threads):  # type: ignore[no-untyped-def]
    """Have all ranges taken, and wait until they are done. The caller then leaves the block."""
    for _ in range(threads - 1):
        if not schedule(frame, _task(), block):
            fetch_add(block + 8 * USERS, -1)
    call_pointer(_task(), block)
    spins = 0
    while fetch_add(block + 8 * DONE, 0) < word(block, RANGES):
        spins += 1
        if spins > 1000:
            give_way()


@native
def take(block):  # type: ignore[no-untyped-def]
    """The number of the next range, -1 if none is left. What the caller lent is there until the range is `done`."""
    number = fetch_add(block + 8 * NEXT, 1)
    return number if number < word(block, RANGES) else -1


@native
def done(block):  # type: ignore[no-untyped-def]
    """Say that a range is done."""
    fetch_add(block + 8 * DONE, 1)


@native
def leave(block):  # type: ignore[no-untyped-def]
    """The last to leave frees the block."""
    if fetch_add(block + 8 * USERS, -1) == 1:
        release(block)
