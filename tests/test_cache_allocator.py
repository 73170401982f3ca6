"""The block allocator, against a plain dictionary of what each sequence holds."""

import copy
import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_model import stored
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from jax_ifa.cache import BlockAllocator, Fork, OutOfBlocks, PagedCache


class Pool:
    """An allocator, blocks that hold real tokens, and the model: for each sequence the list of its tokens.

    Tokens are written through the tables that the allocator gives, and nowhere else; each is a number of its own, so
    that any block that two sequences should not share shows as a token of the wrong sequence.
    """

    def __init__(self, num_blocks, block_size):
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.blocks = np.full((num_blocks, block_size), -1)
        self.model = {}
        self.freed = []
        self.next_token = 0

    def attempt(self, operation, *arguments):
        """The operation's result, or None if it is out of blocks; then nothing may have changed."""
        before = copy.deepcopy(vars(self.allocator))
        try:
            return operation(*arguments)
        except OutOfBlocks as error:
            needed, free = error.needed, error.free
        assert vars(self.allocator) == before
        assert free == self.allocator.num_free_blocks < needed
        return None

    def write(self, sequence, count):
        """New tokens at the end of the model's sequence, through its table."""
        tokens = self.model[sequence]
        table = self.allocator.block_table([sequence])[0]
        for _ in range(count):
            block, slot = divmod(len(tokens), self.allocator.block_size)
            self.blocks[table[block], slot] = self.next_token
            tokens.append(self.next_token)
            self.next_token += 1

    def allocate(self, count):
        sequence = self.attempt(self.allocator.allocate, count)
        if sequence is not None:
            assert sequence not in self.model
            assert sequence not in self.freed
            self.model[sequence] = []
            self.write(sequence, count)
        return sequence

    def grow(self, sequence, count):
        length = self.attempt(self.allocator.grow, sequence, count)
        if length is not None:
            assert length == len(self.model[sequence]) + count
            self.write(sequence, count)

    def fork(self, sequence, count):
        fork = self.attempt(self.allocator.fork, sequence, count)
        if fork is None:
            return None
        if fork.target[0] >= 0:
            self.blocks[fork.target] = self.blocks[fork.source]
        self.model[fork.sequence] = self.model[sequence][:count]
        return fork.sequence

    def free(self, sequence):
        self.allocator.free(sequence)
        del self.model[sequence]
        self.freed.append(sequence)

    def check(self):
        """Every sequence reads back its own tokens, and every block is either free or counted exactly."""
        allocator, ids = self.allocator, list(self.model)
        lengths = allocator.lengths(ids)
        assert lengths.tolist() == [len(tokens) for tokens in self.model.values()]
        table = allocator.block_table(ids)
        needed = -(-lengths // allocator.block_size)
        assert (np.arange(table.shape[1]) < needed[:, None]).tolist() == (table != -1).tolist()
        for row, tokens in zip(table, self.model.values(), strict=True):
            assert self.blocks[row].reshape(-1)[: len(tokens)].tolist() == tokens
        uses = np.bincount(table[table >= 0], minlength=allocator.num_blocks)
        assert uses.tolist() == allocator._references
        assert sorted(allocator._free) == np.flatnonzero(uses == 0).tolist()
        assert allocator.num_free_blocks == (uses == 0).sum()
        for row, length in zip(table, lengths, strict=True):  # only full blocks are shared
            if length % allocator.block_size:
                assert uses[row[length // allocator.block_size]] == 1
        for sequence in self.freed[-3:]:
            for operation in (allocator.free, allocator.grow, allocator.fork):
                with pytest.raises(ValueError, match="one that was freed"):
                    operation(sequence)


@pytest.mark.parametrize("seed, num_blocks, block_size", ((0, 24, 4), (1, 60, 16), (2, 5, 1), (3, 9, 3)))
def test_thousands_of_random_operations(seed, num_blocks, block_size):
    rng, pool = random.Random(seed), Pool(num_blocks, block_size)
    happened = dict.fromkeys(("allocate", "grow", "fork", "free", "full"), 0)
    for _ in range(1500):
        free = pool.allocator.num_free_blocks
        some = rng.choice(list(pool.model)) if pool.model else None
        operation = rng.choice(("allocate", "grow", "grow", "fork", "free")) if pool.model else "allocate"
        if operation == "allocate":
            happened["full"] += pool.allocate(rng.randint(0, 4 * block_size)) is None
        elif operation == "grow":
            pool.grow(some, rng.choice((1, 1, 2, block_size + 1)))
        elif operation == "fork":
            length = len(pool.model[some])
            pool.fork(some, rng.choice((length, rng.randint(0, length))))
        else:
            pool.free(some)
            assert pool.allocator.num_free_blocks >= free
        happened[operation] += 1
        pool.check()
    assert min(happened.values()) > 50
    for sequence in list(pool.model):
        pool.free(sequence)
    assert pool.allocator.num_free_blocks == num_blocks


class Machine(RuleBasedStateMachine):
    """The same operations, chosen and shrunk by hypothesis."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.pool = Pool(num_blocks=10, block_size=4)

    @rule(target=sequences, count=st.integers(0, 14))
    def allocate(self, count):
        return self.pool.allocate(count)

    @precondition(lambda self: self.pool.model)
    @rule(sequence=sequences, count=st.integers(0, 6))
    def grow(self, sequence, count):
        if sequence is not None:
            self.pool.grow(sequence, count)

    @precondition(lambda self: self.pool.model)
    @rule(target=sequences, sequence=sequences, fraction=st.floats(0, 1))
    def fork(self, sequence, fraction):
        if sequence is None:
            return None
        return self.pool.fork(sequence, round(fraction * len(self.pool.model[sequence])))

    @precondition(lambda self: self.pool.model)
    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        if sequence is not None:
            self.pool.free(sequence)

    @invariant()
    def everything_is_as_it_was_written(self):
        self.pool.check()


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestMachine = Machine.TestCase


@jax.jit
def append(pool, tokens, lengths, table, counts):
    new = jnp.broadcast_to(tokens[:, None, :, None], (*tokens.shape[:1], 1, tokens.shape[1], 2))
    return pool.append(new, -new, lengths, table, counts)


copy_blocks = jax.jit(PagedCache.copy_blocks, donate_argnums=0)


def test_a_real_pool_holds_what_the_dictionary_holds():
    """Prompts, batched decode steps, forks and frees over one small PagedCache, read back through the tables."""
    rng, block_size, width, batch = random.Random(0), 16, 5, 4
    allocator = BlockAllocator(14, block_size)
    pool = PagedCache.create(14, block_size, 1, 2, jnp.float32)
    model, token, full = {}, 0.0, 0

    for _ in range(300):
        operation = rng.choice(("prompt", "step", "step", "fork", "free"))
        try:
            if operation == "prompt":
                count = rng.randint(1, 40)
                sequence = allocator.allocate(count)
                model[sequence] = [token + i for i in range(count)]
                prompt = np.full((1, 40), np.nan, np.float32)
                prompt[0, :count] = model[sequence]
                token += count
                table = allocator.block_table([sequence], width)
                pool = append(pool, prompt, np.zeros(1, np.int32), table, np.array([count]))
            elif operation == "step":
                growing = [s for s in rng.sample(sorted(model), min(batch, len(model))) if len(model[s]) < 80]
                before = np.zeros(batch, np.int32)
                before[: len(growing)] = allocator.lengths(growing)
                grown = []
                try:
                    for sequence in growing:
                        allocator.grow(sequence)
                        grown.append(sequence)
                finally:  # those that did not fit wait; the others take their step
                    table = np.full((batch, width), 10**6, np.int32)
                    table[: len(grown)] = allocator.block_table(grown, width)
                    tokens = np.full((batch, 1), np.nan, np.float32)
                    for row, sequence in enumerate(grown):
                        tokens[row] = token
                        model[sequence].append(token)
                        token += 1
                    counts = np.array([1] * len(grown) + [0] * (batch - len(grown)))
                    pool = append(pool, tokens, before, table, counts)
            elif operation == "fork" and model:
                parent = rng.choice(sorted(model))
                count = rng.choice((None, rng.randint(0, len(model[parent]))))
                child, source, target = allocator.fork(parent, count)
                pool = copy_blocks(pool, source, target)
                model[child] = model[parent][:count]
            elif model:
                sequence = rng.choice(sorted(model))
                allocator.free(sequence)
                del model[sequence]
        except OutOfBlocks:
            full += 1
        keys, values = stored(pool)
        for sequence, tokens in model.items():
            row = allocator.block_table([sequence])[0]
            got = keys[row].reshape(-1, 2)[: len(tokens)]
            assert (got == np.array(tokens)[:, None]).all()
            assert (values[row].reshape(-1, 2)[: len(tokens)] == -got).all()
    assert full > 10
    assert not np.isnan(keys).any()


def test_tables_and_lengths():
    blocks = BlockAllocator(8, 4)
    empty, a, b = blocks.allocate(0), blocks.allocate(5), blocks.allocate(4)
    table = blocks.block_table([b, empty, a])
    assert table.dtype == np.int32
    assert table.tolist() == [[2, -1], [-1, -1], [0, 1]]
    assert blocks.block_table([a, a], width=3).tolist() == [[0, 1, -1]] * 2
    assert blocks.block_table([empty]).shape == (1, 1)
    assert blocks.block_table([], width=2).shape == (0, 2)
    lengths = blocks.lengths([b, empty, a])
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [4, 0, 5]
    assert blocks.grow(b, 0) == 4
    assert blocks.grow(np.int64(b)) == 5
    assert blocks.block_table([b]).tolist() == [[2, 3]]
    table[:] = 7  # the caller's own copy
    assert blocks.block_table([a]).tolist() == [[0, 1]]
    assert (blocks.num_blocks, blocks.block_size, blocks.num_free_blocks) == (8, 4, 4)


def test_the_order_is_deterministic():
    def play():
        blocks = BlockAllocator(16, 2)
        ids = [blocks.allocate(n) for n in (3, 5, 2)]
        blocks.free(ids[1])
        ids[1] = blocks.fork(ids[0]).sequence
        blocks.grow(ids[2], 4)
        return blocks.block_table(ids)

    chex.assert_trees_all_equal(play(), play())


def test_forks():
    blocks = BlockAllocator(8, 4)
    parent = blocks.allocate(10)
    whole = blocks.fork(parent, 8)
    assert isinstance(whole, Fork)
    assert (whole.source.tolist(), whole.target.tolist()) == ([-1], [-1])
    part = blocks.fork(parent)
    assert (part.source.tolist(), part.target.tolist()) == ([2], [3])
    inner = blocks.fork(parent, 5)
    assert (inner.source.tolist(), inner.target.tolist()) == ([1], [4])
    nothing = blocks.fork(parent, 0)
    assert (nothing.source.tolist(), nothing.target.tolist()) == ([-1], [-1])
    ids = [parent, whole.sequence, part.sequence, inner.sequence, nothing.sequence]
    assert blocks.block_table(ids).tolist() == [[0, 1, 2], [0, 1, -1], [0, 1, 3], [0, 4, -1], [-1, -1, -1]]
    assert blocks.lengths(ids).tolist() == [10, 8, 10, 5, 0]
    blocks.free(parent)
    assert blocks.num_free_blocks == 4  # block 2 alone: the children hold the others
    for sequence in ids[1:]:
        blocks.free(sequence)
    assert blocks.num_free_blocks == 8


def test_out_of_blocks_loses_nothing():
    blocks = BlockAllocator(3, 4)
    a = blocks.allocate(6)
    before = copy.deepcopy(vars(blocks))
    for call in (lambda: blocks.allocate(5), lambda: blocks.grow(a, 7), lambda: blocks.allocate(10**9)):
        with pytest.raises(OutOfBlocks, match=r"out of blocks: expected \d+ free, got 1 free of 3") as caught:
            call()
        assert caught.value.needed > caught.value.free == 1
        assert vars(blocks) == before
    b = blocks.allocate(4)
    before = copy.deepcopy(vars(blocks))
    with pytest.raises(OutOfBlocks):
        blocks.fork(a)
    assert vars(blocks) == before
    assert blocks.lengths([blocks.fork(a, 4).sequence]).tolist() == [4]  # a whole block needs no copy
    blocks.free(b)
    assert blocks.fork(a).target.tolist() == [2]


def test_mistakes_raise():
    blocks = BlockAllocator(4, 4)
    a = blocks.allocate(6)
    b = blocks.allocate(1)
    blocks.free(b)
    before = copy.deepcopy(vars(blocks))
    for match, call in (
        (
            "no sequence 1: expected the id of a sequence that is in the pool, got one that was freed",
            lambda: blocks.free(b),
        ),
        ("one that was freed", lambda: blocks.block_table([a, b])),
        ("one that was freed", lambda: blocks.lengths([b])),
        ("no sequence 7: .* got one that never was", lambda: blocks.grow(7)),
        ("no sequence -1: .* got one that never was", lambda: blocks.free(-1)),
        ("num_tokens is a size: expected at least 0, got -1", lambda: blocks.allocate(-1)),
        ("num_tokens is a size", lambda: blocks.grow(a, -1)),
        ("num_tokens is a size", lambda: blocks.fork(a, -1)),
        ("at most the tokens of sequence 0: expected 0 to 6, got 7", lambda: blocks.fork(a, 7)),
        (
            "width must hold the blocks of every sequence: expected at least 2, got 1",
            lambda: blocks.block_table([a], 1),
        ),
        ("num_blocks is a size", lambda: BlockAllocator(0, 4)),
        ("block_size is a size", lambda: BlockAllocator(4, 0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    for call in (
        lambda: blocks.grow(blocks.fork),
        lambda: blocks.allocate(1.0),
        lambda: blocks.block_table([blocks.lengths([a])]),
        lambda: BlockAllocator(4.0, 4),
    ):
        with pytest.raises(TypeError):
            call()
    assert vars(blocks) == before
    with pytest.raises(TypeError, match=r"named by the id that allocate or fork gave: expected int, got Fork"):
        blocks.grow(blocks.fork(a))
