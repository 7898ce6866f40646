"""The blocks of the cache: who holds them, who finds them, and which goes first."""

from __future__ import annotations

import random

import pytest

from arriero.infer.blocks import BlockPool, Table, next_key, root_key
from arriero.infer.step import BLOCK

ROOT = root_key(0, None, "")


def filled(pool, ids, root=ROOT):
    """A table of a sequence that was computed whole."""
    table = Table(root)
    start = pool.extend(table, ids, 0, len(ids))
    table.blocks += [pool.take() for _ in range(-(-(len(ids) - start) // BLOCK))]
    pool.fill(table, ids, len(ids))
    return table


def found(pool, ids, root=ROOT):
    """Tokens of a sequence that are cached, in whole blocks and in a block that begins alike."""
    table = Table(root)
    end = pool.extend(table, ids, 0, len(ids))
    same = pool.alike(table, ids[end : end + BLOCK])[1]
    pool.release(table, ids, end)
    return end, same


def test_a_beginning_is_found_by_its_tokens_and_what_else_decides_it():
    pool, ids = BlockPool(9), list(range(100))
    pool.release(filled(pool, ids), ids, 100)
    assert found(pool, ids) == (96, 4)
    assert found(pool, [*ids[:70], 0, 0]) == (64, 6)
    assert found(pool, [1, *ids]) == (0, 0)
    for facts in ((1, None, ""), (0, b"x", ""), (0, None, "tenant")):
        assert found(pool, ids, root_key(*facts)) == (0, 0)
    pool.forget()
    assert (found(pool, ids), pool.available, pool.cached) == ((0, 0), 9, 0)


def test_keys_depend_on_every_token_and_on_their_order():
    keys = {next_key(parent, tokens) for parent in (ROOT, b"x") for tokens in ((1, 2), (2, 1), (1,), (1, 2, 0), (258,))}
    assert len(keys) == 10


def test_the_least_recently_used_goes_first_and_of_a_sequence_its_end():
    pool = BlockPool(6)
    a, b = list(range(96)), list(range(200, 296))
    for ids in (a, b):
        pool.release(filled(pool, ids), ids, 96)
    assert found(pool, a) == (96, 0)  # used again
    held = [pool.take(), pool.take()]
    assert (found(pool, b), found(pool, a)) == ((32, 0), (96, 0))
    held += [pool.take(), pool.take()]
    assert (found(pool, b), found(pool, a)) == ((0, 0), (64, 0))
    assert (pool.available, pool.cached, len(set(held))) == (2, 2, 4)


def test_a_beginning_that_went_and_was_computed_again_leads_to_its_old_end():
    pool, ids = BlockPool(4), list(range(96))
    pool.release(filled(pool, ids), ids, 96)
    table = filled(pool, ids)
    first = table.blocks[0]
    pool.release(table, ids, 96)
    del pool._unused[first]
    pool._forget(first)
    pool._free.append(first)
    assert found(pool, ids) == (0, 0)
    pool.release(filled(pool, ids[:32]), ids, 32)
    assert found(pool, ids) == (96, 0)


def test_a_shared_block_is_copied_by_whoever_writes_first():
    pool, ids = BlockPool(5), list(range(40))
    one = filled(pool, ids)
    two = pool.fork(one)
    assert pool.shared(one.blocks[1])
    source, target = pool.writable(two, 1)
    assert (source, target) == (one.blocks[1], two.blocks[1]) and source != target
    assert pool.writable(one, 1) is None and one.blocks[0] == two.blocks[0]
    pool.release(one, ids, 40)
    pool.release(two, ids, 40)
    assert pool.available == 5


@pytest.mark.parametrize("seed", range(20))
def test_every_block_is_free_cached_or_held_whatever_happens(seed):
    rng, pool, live = random.Random(seed), BlockPool(17), []
    for _ in range(300):
        ids = [rng.randrange(2) for _ in range(rng.randint(1, 120))]
        if pool.available >= 4 and rng.random() < 0.6:
            live.append((filled(pool, ids), ids))
        elif live and rng.random() < 0.3 and pool.available:
            table, ids = rng.choice(live)
            live.append((pool.fork(table), ids))
        elif live:
            table, ids = live.pop(rng.randrange(len(live)))
            pool.release(table, ids, rng.randint(0, len(ids)))
        held = {block for table, _ in live for block in table.blocks}
        assert not held & set(pool._free) and not held & set(pool._unused)
        assert len(held) + pool.available == 17
        assert sum(pool._references) == sum(len(table.blocks) for table, _ in live)
