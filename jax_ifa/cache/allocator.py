"""Which block belongs to which sequence. Pure host Python: nothing here touches a device."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_ifa.cache.rules import check_size
from jax_ifa.errors import fail

NO_BLOCK = -1


class OutOfBlocks(RuntimeError):
    """The pool has too few free blocks. Nothing has changed: free a sequence, and the same call succeeds.

    Attributes:
      needed: blocks that the call needs.
      free: blocks that are free.
    """

    def __init__(self, needed: int, free: int, num_blocks: int):
        super().__init__(f"out of blocks: expected {needed} free, got {free} free of {num_blocks}; nothing was changed")
        self.needed = needed
        self.free = free


class Fork(NamedTuple):
    """A new sequence, and the copy that it needs before anything is written: ``pool.copy_blocks(source, target)``.

    Attributes:
      sequence: the new sequence's id.
      source, target: (1,) int32, one block to copy in every layer's pool; -1 in both if nothing has to be.
    """

    sequence: int
    source: np.ndarray
    target: np.ndarray


@dataclasses.dataclass
class _Sequence:
    blocks: list[int]
    length: int


class BlockAllocator:
    """Hands out the blocks of a `PagedCache` to many sequences, on the host, in a deterministic order.

    It counts tokens and blocks; the tokens themselves are in the pools, one per layer, which all use the same tables.
    Sequences have ids that are never used twice. A call that raises has changed nothing.

    Forks share whole blocks by reference count. A block is shared only when it is full, and a last block that is not
    full has one owner: so growing a sequence never writes into another's tokens, and needs no copy. The price is one
    block copied per fork, at the fork, if it ends within a block.

    A step costs as much as the blocks it adds, whatever the size of the pool; a table costs as much as its entries.

    Example:
      >>> from jax_ifa.cache import BlockAllocator
      >>> blocks = BlockAllocator(num_blocks=8, block_size=16)
      >>> parent = blocks.allocate(20)                       # two blocks, the second with 4 tokens
      >>> child, source, target = blocks.fork(parent)        # then, in each layer: pool.copy_blocks(source, target)
      >>> source, target
      (array([1], dtype=int32), array([2], dtype=int32))
      >>> blocks.grow(child, 13)
      33
      >>> blocks.block_table([parent, child])                # block 0 is shared
      array([[ 0,  1, -1],
             [ 0,  2,  3]], dtype=int32)
      >>> blocks.lengths([parent, child])
      array([20, 33], dtype=int32)
      >>> blocks.free(parent)
      >>> blocks.num_free_blocks
      5
    """

    def __init__(self, num_blocks: int, block_size: int):
        """A pool in which every block is free.

        Args:
          num_blocks: blocks in the pool, as in `PagedCache.create`.
          block_size: P, positions in a block, likewise.
        """
        self._num_blocks = check_size("num_blocks", num_blocks)
        self._block_size = check_size("block_size", block_size)
        self._free = list(range(self._num_blocks))[::-1]  # a stack, lowest id on top
        self._references = [0] * self._num_blocks
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self._num_blocks

    @property
    def block_size(self) -> int:
        """P, positions in a block."""
        return self._block_size

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence has."""
        return len(self._free)

    def allocate(self, num_tokens: int) -> int:
        """A new sequence with room for `num_tokens` tokens, 0 or more.

        Returns:
          The sequence's id.

        Raises:
          OutOfBlocks: the pool has too few free blocks.
        """
        num_tokens = check_size("num_tokens", num_tokens, minimum=0)
        return self._add(_Sequence(self._take(self._blocks_for(num_tokens)), num_tokens))

    def grow(self, sequence: int, num_tokens: int = 1) -> int:
        """Room for `num_tokens` more tokens at the end of a sequence.

        Returns:
          The sequence's new length in tokens.

        Raises:
          OutOfBlocks: the pool has too few free blocks.
          ValueError: no such sequence.
        """
        state = self._state(sequence)
        length = state.length + check_size("num_tokens", num_tokens, minimum=0)
        state.blocks += self._take(self._blocks_for(length) - len(state.blocks))
        state.length = length
        return length

    def fork(self, sequence: int, num_tokens: int | None = None) -> Fork:
        """A new sequence that begins with the first `num_tokens` tokens of another; None means all of them.

        Whole blocks are shared. If the tokens end within a block, the new sequence gets its own, and the caller must
        copy the old one's content there, in every layer, before anything else is written to the pool:

        .. code-block:: python

            child, source, target = blocks.fork(parent)
            pools = [pool.copy_blocks(source, target) for pool in pools]

        Raises:
          OutOfBlocks: a block is needed and none is free.
          ValueError: no such sequence, or it has fewer tokens.
        """
        state = self._state(sequence)
        length = state.length if num_tokens is None else check_size("num_tokens", num_tokens, minimum=0)
        if length > state.length:
            fail(f"a fork has at most the tokens of sequence {sequence}", expected=f"0 to {state.length}", got=length)
        whole, partial = divmod(length, self._block_size)
        source = state.blocks[whole : whole + 1] if partial else []
        target = self._take(len(source))
        shared = state.blocks[:whole]
        for block in shared:
            self._references[block] += 1
        child = self._add(_Sequence(shared + target, length))
        return Fork(child, _ids(source or [NO_BLOCK]), _ids(target or [NO_BLOCK]))

    def free(self, sequence: int) -> None:
        """Forget a sequence; blocks that no other sequence shares become free.

        Raises:
          ValueError: no such sequence, such as one that has been freed.
        """
        state = self._state(sequence)
        del self._sequences[sequence]
        for block in reversed(state.blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def block_table(self, sequences: Sequence[int], width: int | None = None) -> np.ndarray:
        """The table of a batch of sequences.

        Args:
          sequences: B ids, in the order of the batch.
          width: M, columns; None means those that the longest sequence needs, and at least 1. Pass a fixed one to
            have one shape, and so one compiled step, for all lengths.

        Returns:
          (B, M) int32. Entries that a sequence has no block for are -1.

        Raises:
          ValueError: no such sequence, or one that needs more than `width` blocks.
        """
        lists = [self._state(sequence).blocks for sequence in sequences]
        needed = max(map(len, lists), default=0)
        columns = max(needed, 1) if width is None else check_size("width", width)
        if needed > columns:
            fail("width must hold the blocks of every sequence", expected=f"at least {needed}", got=columns)
        table = np.full((len(lists), columns), NO_BLOCK, np.int32)
        for row, blocks in zip(table, lists, strict=True):
            row[: len(blocks)] = blocks
        return table

    def lengths(self, sequences: Sequence[int]) -> np.ndarray:
        """The tokens of each sequence of a batch, (B,) int32.

        Raises:
          ValueError: no such sequence.
        """
        return np.array([self._state(sequence).length for sequence in sequences], np.int32)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _take(self, count: int) -> list[int]:
        """`count` free blocks, each with one reference, or OutOfBlocks and no change."""
        if count > len(self._free):
            raise OutOfBlocks(count, len(self._free), self._num_blocks)
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _add(self, state: _Sequence) -> int:
        sequence = self._next_id
        self._sequences[sequence] = state
        self._next_id += 1
        return sequence

    def _state(self, sequence: Any) -> _Sequence:
        try:
            sequence = operator.index(sequence)
        except TypeError:
            fail(
                "a sequence is named by the id that allocate or fork gave",
                expected="int",
                got=repr(sequence),
                error=TypeError,
            )
        if sequence not in self._sequences:
            state = "one that was freed" if 0 <= sequence < self._next_id else "one that never was"
            fail(f"no sequence {sequence}", expected="the id of a sequence that is in the pool", got=state)
        return self._sequences[sequence]


def _ids(blocks: list[int]) -> np.ndarray:
    return np.array(blocks, np.int32)
