"""Which tokens run in the next step: continuous batching over a paged cache, first come, first served.

Each step takes one token of every sequence that is decoding, then pieces of prompts, the oldest first, up to
`step_tokens` tokens in all. So

- a sequence that decodes gets a token in every step, and waits no longer than one step of `step_tokens` tokens, or of
  `mixed_tokens` where that is less: prompts that come are computed in smaller pieces then;
- sequences are admitted in the order of their arrival, none before an earlier one; a sequence is admitted as soon as
  those before it are, fewer than `max_running` run, and the blocks of its whole prompt can be had;
- where a sequence that decodes needs a block and there is none, the youngest that runs gives its blocks back and waits
  again in its place (preemption). It is computed again later, up to where it was, and goes on with the same tokens:
  nothing that was said is taken back. So the oldest always goes on, and everything ends.

Nothing here knows the model, texts or sampling. Price for 16 sequences that decode: about 0.15 ms a step, half of what
the engine costs beside model and sampler (bench/scheduler.py).

Shapes: as in step.py.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arriero.infer.blocks import BlockPool, Table, blocks_for
from arriero.infer.step import BLOCK, StepInput

_SCORED = 128  # tokens of a prompt in one step whose logits are all wanted: bounds their memory
_RESERVE = 1 / 50  # of all blocks: kept for running sequences when another is admitted


@dataclass(eq=False)
class Sequence:
    """Tokens that are computed in order; `owner` is whatever the caller keeps of it.

    order: of arrival, by which sequences compare. ids: prompt and answer so far. adapter: as in `StepInput`.
    scored_from: position of the first token whose log-probability the logits before it are wanted for; those logits
    are given once. generates: whether the logits after the last token are wanted. followers: sequences of the same
    prompt, which begin when it is computed.
    """

    order: tuple[int, int]
    ids: list[int]
    root: bytes
    adapter: str | None = None
    scored_from: int | None = None
    generates: bool = True
    followers: list[Sequence] = field(default_factory=list)
    owner: Any = None

    def __post_init__(self) -> None:
        self.n_prompt = len(self.ids)
        self.reused = 0  # tokens of the prompt that others had computed
        self.row: int | None = None  # of the scheduler's array of tables; None: not running
        self.proposed: list[int] = []  # what may follow: computed with the last token, where there is room
        self.begin_at(self.root)

    def begin_at(self, root: bytes) -> None:
        """Hold nothing, and continue what the key stands for from now on."""
        self.computed = 0  # tokens whose keys and values are in the cache
        self.wanted = 0  # blocks that it asked for in vain
        self.table = Table(root)

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order

    @property
    def left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.ids) - self.computed


@dataclass(frozen=True)
class Part:
    """The tokens of one sequence in a step, `n` from `start` on, and which of the step's logits are its.

    scores: those before tokens of its prompt, of which the first stands at position `scored_from`. chooses: that of
    its next token, and those behind each token that is proposed.
    """

    sequence: Sequence
    start: int
    n: int
    scored_from: int
    scores: range
    chooses: range


@dataclass(frozen=True)
class Plan:
    """One step: its input, whose tokens they are, and the blocks that have to be copied before it."""

    batch: StepInput
    parts: list[Part]
    copies: list[tuple[int, int]]


class Scheduler:
    """Sequences that run and that wait, and the blocks of the cache."""

    def __init__(self, n_blocks: int, longest: int, max_running: int, step_tokens: int, mixed_tokens: int = 0) -> None:
        """longest: tokens that a sequence may have. max_running: sequences that hold blocks at a time.

        step_tokens: most tokens of a step, at least `max_running`. mixed_tokens: of one in which sequences decode, but
        prompts have at least a token for each of these; 0: as many as of any.
        """
        assert step_tokens >= max_running, "every sequence that decodes has a token in each step"
        self.pool = BlockPool(n_blocks)
        self.max_running, self.step_tokens = max_running, step_tokens
        self.mixed_tokens = mixed_tokens or step_tokens
        self.running: list[Sequence] = []  # the oldest first
        self.waiting: list[Sequence] = []  # the oldest first
        self.preemptions = 0
        self._tables = np.zeros((max_running, blocks_for(longest)), dtype=np.int32)
        self._rows = list(range(max_running - 1, -1, -1))
        self._copies: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        insort(self.waiting, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is done or cancelled, wherever it stands; what it computed stays cached."""
        if sequence.row is not None:
            self._stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def preempt_all(self) -> None:
        """Let all running sequences give back their blocks and wait."""
        while self.running:
            self._preempt(self.running[-1])

    def reset(self, sequences: list[Sequence]) -> None:
        """Begin again with these sequences and an empty cache, whatever the state is now."""
        self.pool = BlockPool(self.pool.n_blocks)
        self.running, self._rows = [], list(range(self.max_running - 1, -1, -1))
        for sequence in sequences:
            sequence.begin_at(sequence.table.root)
            sequence.row, sequence.followers, sequence.proposed = None, [], []
        self.waiting = sorted(sequences)

    def plan(self) -> Plan | None:
        """The next step, or None where nothing runs. It has to run, and to be told to `commit`, before the next one."""
        self._copies = []
        for sequence in self.running:
            if not sequence.left:  # its logits were lost: whoever wanted them was interrupted
                sequence.computed -= 1
        preempted = self.preemptions
        chosen = list(self._decoding())
        used = sum(n for _, n in chosen)
        budget = self.step_tokens - used
        if chosen:
            budget = min(budget, max(self.mixed_tokens - used, len(chosen)))
        for sequence in self.running:
            if budget and sequence.left > 1:
                budget -= self._take_piece(sequence, budget, chosen)
        while budget and self.preemptions == preempted and (admitted := self._admit()):
            budget -= self._take_piece(admitted, budget, chosen)
        return self._input(chosen) if chosen else None

    def commit(self, plan: Plan) -> list[tuple[Sequence, range]]:
        """Count the tokens of a plan as computed; returns whose next token is to be chosen now, by which of the logits.

        The followers of a sequence whose prompt is computed are among them. Proposed tokens count when they are
        accepted.
        """
        ready = []
        for part in plan.parts:
            sequence = part.sequence
            self._computed(sequence, min(part.start + part.n, len(sequence.ids)))
            if sequence.scored_from is not None:
                scored = sequence.computed + 1
                sequence.scored_from = max(sequence.scored_from, scored) if scored < sequence.n_prompt else None
            if part.chooses:
                ready += [(each, part.chooses) for each in (sequence, *self._fork(sequence))]
        return ready

    def accept(self, sequence: Sequence) -> None:
        """Count one more token as computed: the next of those proposed, which is the last of the sequence now."""
        self._computed(sequence, sequence.computed + 1)

    def _computed(self, sequence: Sequence, n_tokens: int) -> None:
        sequence.computed = n_tokens
        if n_tokens // BLOCK > len(sequence.table.keys):
            self.pool.fill(sequence.table, sequence.ids, n_tokens)

    def _decoding(self) -> Iterator[tuple[Sequence, int]]:
        """Sequences with one token left, each with room for it, which the youngest may have had to give."""
        spare = self.step_tokens - len(self.running)
        for sequence in list(self.running):
            if sequence.row is not None and sequence.left == 1 and self._room(sequence):
                if sequence.proposed:
                    self._room_ahead(sequence, spare)
                    spare -= len(sequence.proposed)
                yield sequence, 1 + len(sequence.proposed)

    def _room(self, sequence: Sequence) -> bool:
        """Give a sequence a block of its own for its next token; False where it had to give up all that it has."""
        at, table = sequence.computed // BLOCK, sequence.table
        new = at >= len(table.blocks)
        if not new and not self.pool.shared(table.blocks[at]):
            return True
        while self.pool.available == 0:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        if at < len(table.blocks):
            if (copy := self.pool.writable(table, at)) is not None:  # none, if the youngest was who shared it
                self._copies.append(copy)
        else:
            table.blocks.append(self.pool.take())
        self._tables[sequence.row, at] = table.blocks[at]
        return True

    def _room_ahead(self, sequence: Sequence, most: int) -> None:
        """Cut what is proposed to the tokens that have room in blocks that nobody holds."""
        blocks, end = sequence.table.blocks, len(sequence.ids) + min(len(sequence.proposed), most)
        assert sequence.row is not None
        while len(blocks) < blocks_for(end) and self.pool.available > len(self.running):
            self._tables[sequence.row, len(blocks)] = block = self.pool.take()
            blocks.append(block)
        del sequence.proposed[max(min(end, len(blocks) * BLOCK) - len(sequence.ids), 0) :]

    def _take_piece(self, sequence: Sequence, budget: int, chosen: list[tuple[Sequence, int]]) -> int:
        """Add a piece of a prompt to the step; returns its tokens."""
        if sequence.computed % BLOCK == 0 and sequence.computed:
            self._extend(sequence)  # by what others have computed since
        n = min(sequence.left, budget)
        if sequence.scored_from is not None:
            n = min(n, max(0, sequence.scored_from - 1 - sequence.computed) + _SCORED)
        if n < sequence.left and n > (over := (sequence.computed + n) % BLOCK):
            n -= over  # so that the next piece begins with a block, which others may have computed by then
        chosen.append((sequence, n))
        return n

    def _admit(self) -> Sequence | None:
        """Let the first that waits run, if it can; its blocks are its own at once, as far as none are shared."""
        if not self.waiting or len(self.running) >= self.max_running:
            return None
        sequence, pool = self.waiting[0], self.pool
        if pool.available < sequence.wanted:
            return None
        self._extend(sequence)
        wanted = blocks_for(len(sequence.ids)) - len(sequence.table.blocks)
        reserve = min(len(self.running), int(pool.n_blocks * _RESERVE))
        if pool.available < wanted + reserve:
            pool.release(sequence.table, sequence.ids, sequence.computed)
            sequence.computed, sequence.wanted = 0, wanted + reserve
            return None
        del self.waiting[0]
        self._begin_like_another(sequence, wanted)
        sequence.reused = min(sequence.computed, sequence.n_prompt)
        self._start(sequence)
        return sequence

    def _extend(self, sequence: Sequence) -> None:
        """Share cached blocks behind those computed, up to where logits are wanted."""
        before = sequence.computed
        end = sequence.computed = self.pool.extend(sequence.table, sequence.ids, before, self._shareable(sequence))
        if sequence.row is not None and end > before:
            blocks = sequence.table.blocks[before // BLOCK : end // BLOCK]
            self._tables[sequence.row, before // BLOCK : end // BLOCK] = blocks

    def _begin_like_another(self, sequence: Sequence, wanted: int) -> None:
        """Take the blocks of the rest, the first of them as a copy of a cached one that begins alike."""
        at = sequence.computed
        source, same = self.pool.alike(sequence.table, sequence.ids[at : min(at + BLOCK, self._shareable(sequence))])
        sequence.table.blocks += [self.pool.take() for _ in range(wanted)]
        if same:
            self._copies.append((source, sequence.table.blocks[at // BLOCK]))
            sequence.computed += same

    @staticmethod
    def _shareable(sequence: Sequence) -> int:
        """Tokens of a sequence that need not run, as far as logits are wanted: never the last."""
        last = len(sequence.ids) - 1
        return last if sequence.scored_from is None else min(last, sequence.scored_from - 1)

    def _start(self, sequence: Sequence) -> None:
        row = sequence.row = self._rows.pop()
        self._tables[row, : len(sequence.table.blocks)] = sequence.table.blocks
        insort(self.running, sequence)

    def _stop(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.pool.release(sequence.table, sequence.ids, sequence.computed)
        self._rows.append(sequence.row)
        self.running.remove(sequence)
        sequence.row, sequence.proposed = None, []

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.preemptions += 1
        sequence.computed = sequence.wanted = 0
        insort(self.waiting, sequence)

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """Begin the followers of a sequence whose prompt is computed; those that find no place wait."""
        begun = []
        for other in sequence.followers:
            if len(self.running) < self.max_running:
                other.table = self.pool.fork(sequence.table)
                other.computed = other.reused = sequence.computed
                self._start(other)
                begun.append(other)
            else:
                self.add(other)
        sequence.followers = []
        return begun

    def _input(self, chosen: list[tuple[Sequence, int]]) -> Plan:
        tokens: list[int] = []
        outputs: list[int] = []
        parts = []
        for sequence, n in chosen:
            start, before = sequence.computed, len(tokens)
            end, scored = start + n, range(0)
            if n == 1:
                tokens.append(sequence.ids[start])
            else:
                tokens += sequence.ids[start:end]
                tokens += sequence.proposed
            from_ = sequence.scored_from or 0
            if from_:  # the logits at position p are of token p + 1
                at = range(max(from_ - 1, start), min(end, sequence.n_prompt - 1))
                scored = range(len(outputs), len(outputs) + len(at))
                outputs += [p - start + before for p in at]
                from_ = at.start + 1
            chooses = range(0)
            if sequence.generates and end >= len(sequence.ids):
                chooses = range(len(outputs), len(outputs) + 1 + len(sequence.proposed))
                outputs += range(len(tokens) - len(chooses), len(tokens))
            parts.append(Part(sequence, start, n, from_, scored, chooses))
        return Plan(self._arrays(tokens, outputs, parts), parts, self._copies)

    def _arrays(self, tokens: list[int], outputs: list[int], parts: list[Part]) -> StepInput:
        lengths = np.array([part.n for part in parts], dtype=np.int32)
        starts = np.array([part.start for part in parts], dtype=np.int32)
        sequences = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
        within = np.arange(len(tokens), dtype=np.int32) - np.repeat(
            np.cumsum(lengths, dtype=np.int32) - lengths, lengths
        )
        width = max(blocks_for(part.start + part.n) for part in parts)
        return StepInput(
            np.array(tokens, dtype=np.int64),
            np.repeat(starts, lengths) + within,
            sequences,
            self._tables[np.array([part.sequence.row for part in parts]), :width],
            np.array(outputs, dtype=np.int32),
            [part.sequence.adapter for part in parts],
        )
