"""Who owns the blocks of the paged cache: references, sharing of beginnings by content, copy on write, eviction.

A block of `BLOCK` tokens belongs to every sequence that has it in its table. What a full block holds is decided by its
tokens and all that precedes them, so blocks form a tree: a block's key is a hash of its parent's key and its own
tokens, and the root's key is a hash of what else decides keys and values (weights, adapter, the tenant's salt). Tokens
are compared too, so no collision within a parent can return a wrong block. A sequence shares the full blocks of its
beginning that are cached; where it differs from a cached block within that block, it begins with a copy. It never
writes to a block that another holds, but to a copy (`writable`).

Blocks that no sequence holds stay cached until they are needed: the least recently used goes first, and of one sequence
the last block first, so that beginnings live longest. Price: about 5 us for each
block that a sequence fills, and 1 us for one that it finds.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from arriero.infer.step import BLOCK

Tokens = tuple[int, ...]

_LOOKED_AT = 16  # cached blocks behind one beginning, the newest first, of which one is looked for to copy


def blocks_for(n_tokens: int) -> int:
    """Blocks that hold `n_tokens` tokens."""
    return -(-n_tokens // BLOCK)


def root_key(*facts: object) -> bytes:
    """The key that a sequence's first block continues: equal facts, equal keys and values."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block with these tokens behind what `parent` stands for."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass
class Table:
    """The blocks of one sequence in order, and the keys of those that are full."""

    root: bytes
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    @property
    def last_key(self) -> bytes:
        """Of what lies before the first block that is not full."""
        return self.keys[-1] if self.keys else self.root


class _Content(NamedTuple):
    """What a cached block holds, and the key of what continues it (of a full one)."""

    parent: bytes
    tokens: Tokens
    key: bytes


class BlockPool:
    """All blocks of a cache: each is free, held by sequences, or held by none and cached."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self._free = list(range(n_blocks - 1, -1, -1))
        self._references = [0] * n_blocks
        self._content: list[_Content | None] = [None] * n_blocks
        self._children: dict[bytes, dict[Tokens, int]] = {}  # by parent's key, then by tokens
        self._unused: dict[int, None] = {}  # cached and held by no sequence, the least recently used first

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._unused)

    @property
    def cached(self) -> int:
        """Blocks that are kept for a sequence to come, and held by none."""
        return len(self._unused)

    def take(self) -> int:
        """A block for one sequence alone; there must be one `available`."""
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._unused))
            del self._unused[block]
            self._forget(block)
        assert self._references[block] == 0, "a block that is held was taken"
        self._references[block] = 1
        return block

    def extend(self, table: Table, ids: Sequence[int], start: int, end: int) -> int:
        """Share cached blocks that hold ids[start:end], `start` at a block's border; returns the end of those found.

        Where the table has a block of its own there already, which is not filled, it is given back.
        """
        key = table.last_key
        while start + BLOCK <= end:
            block = self._children.get(key, {}).get(tuple(ids[start : start + BLOCK]))
            if block is None or (content := self._content[block]) is None:
                break
            self._share(block)
            if (at := start // BLOCK) < len(table.blocks):
                self._give_back(table.blocks[at])
                table.blocks[at] = block
            else:
                table.blocks.append(block)
            key = content.key
            table.keys.append(key)
            start += BLOCK
        return start

    def alike(self, table: Table, ids: Sequence[int]) -> tuple[int, int]:
        """The cached block behind the table's full ones that begins most like `ids`, and how many tokens are equal."""
        best, most = -1, 0
        children = self._children.get(table.last_key, {})
        for tokens, block in itertools.islice(reversed(children.items()), _LOOKED_AT):
            same = next((i for i, (a, b) in enumerate(zip(tokens, ids, strict=False)) if a != b), None)
            same = min(len(tokens), len(ids)) if same is None else same
            if same > most:
                best, most = block, same
        return best, most

    def writable(self, table: Table, at: int) -> tuple[int, int] | None:
        """Make block `at` of a table the sequence's own; (source, target) to copy where others hold it too.

        There must be one block `available` where they do.
        """
        block = table.blocks[at]
        if self._references[block] == 1:
            assert self._content[block] is None, "a block that others may find was to be written to"
            return None
        table.blocks[at] = self.take()
        self._give_back(block)
        return block, table.blocks[at]

    def shared(self, block: int) -> bool:
        """Whether more than one sequence holds it."""
        return self._references[block] > 1

    def fork(self, table: Table) -> Table:
        """The same blocks for another sequence."""
        for block in table.blocks:
            self._share(block)
        return Table(table.root, list(table.blocks), list(table.keys))

    def fill(self, table: Table, ids: Sequence[int], computed: int) -> None:
        """Let others find the blocks that the first `computed` of `ids` have filled."""
        for at in range(len(table.keys), computed // BLOCK):
            tokens = tuple(ids[at * BLOCK : (at + 1) * BLOCK])
            table.keys.append(self._cache(table.blocks[at], table.last_key, tokens))

    def release(self, table: Table, ids: Sequence[int], computed: int) -> None:
        """Give all blocks back; what the first `computed` of `ids` put into them stays cached."""
        self.fill(table, ids, computed)
        at = computed // BLOCK
        if (rest := tuple(ids[at * BLOCK : computed])) and self._references[table.blocks[at]] == 1:
            self._cache(table.blocks[at], table.last_key, rest)
        for block in reversed(table.blocks):
            self._give_back(block)
        table.blocks, table.keys = [], []

    def forget(self) -> None:
        """Let no sequence find what is cached now."""
        self._children.clear()
        self._content = [None] * self.n_blocks
        self._free += self._unused
        self._unused.clear()

    def _cache(self, block: int, parent: bytes, tokens: Tokens) -> bytes:
        """Let the block be found by its tokens, unless another with the same is; returns its key."""
        children = self._children.setdefault(parent, {})
        if (other := children.get(tokens)) is not None and (content := self._content[other]) is not None:
            return content.key
        children[tokens] = block
        self._content[block] = content = _Content(parent, tokens, next_key(parent, tokens))
        return content.key

    def _forget(self, block: int) -> None:
        content, self._content[block] = self._content[block], None
        assert content is not None
        children = self._children[content.parent]
        del children[content.tokens]
        if not children:
            del self._children[content.parent]

    def _share(self, block: int) -> None:
        self._references[block] += 1
        self._unused.pop(block, None)

    def _give_back(self, block: int) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, "a block was given back twice"
        if self._references[block] == 0:
            if self._content[block] is None:
                self._free.append(block)
            else:
                self._unused[block] = None
