"""Needle in a haystack: can a model retrieve a fact from any place of a long text, and does its loss grow with length?

A needle is a sentence that gives a place's pass key, hidden between the sentences of prose at a chosen depth (Kamradt
2023; pass keys: arXiv 2305.16300, section 4.2). The question is the beginning of the same sentence, after the text, so
that a base model answers by completing it. Three scores: whether the greedy answer is the key, whether the key is more
probable than nine others of its form, and its cross-entropy in bits. With several needles in one text all are asked
for, each a distractor of the others (multi-needle: Llama 3, 2407.21783, section 3.4.2). In addition, the loss of plain
prose by position: beyond the trained length it rises.

Texts are read by the engine, CHUNK tokens at a time, and the common prefix of successive texts is read once (depths go
from the end to the beginning). Price: about half of `depths` readings of the length, and for the cache 2 L K h
values a token: 23 KB for SmolLM2-135M in bf16. Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from arriero.errors import DataError
from arriero.infer.blocks import blocks_for
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.infer.step import BLOCK
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer

PLACES = (
    "Lima", "Oslo", "Cairo", "Quito", "Delhi", "Paris", "Seoul", "Tunis", "Rome", "Kyoto", "Berlin", "Havana", "Dublin",
    "Lisbon", "Nairobi", "Warsaw", "Athens", "Bogota", "Vienna", "Prague",
)  # fmt: skip
CHOICES = 10  # keys that are compared: the right one, and others of its form
DIGITS = 5  # of a key
CHUNK = 512  # tokens that are read at once
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?<=\n)(?=\n)")


@dataclass(frozen=True)
class Needle:
    """A fact, and how it is asked for."""

    place: str
    key: str

    @property
    def fact(self) -> str:
        return f" The pass key of {self.place} is {self.key}. Remember it."

    @property
    def question(self) -> str:
        return f"\n\nThe pass key of {self.place} is"


@dataclass(frozen=True)
class Finding:
    """One question: where the needle stood, what was answered, and its scores."""

    length: int  # tokens of the whole text, question and answer included
    depth: float  # share of the haystack before the needle
    needle: Needle
    answer: str
    found: bool  # the greedy answer is the key
    chosen: bool  # the key is more probable than each other of CHOICES
    bits: float  # -log2 p of the key; one drawn at random costs log2(90,000) = 16.5


class Haystack:
    """Prose as sentences of token ids, to be cut to any length from any place on."""

    def __init__(self, tokenizer: Tokenizer, text: str, longest: int) -> None:
        """Raises `DataError` where the text has fewer than `longest` tokens."""
        sentences = [s for s in _SENTENCE_END.split(text) if s]
        self.sentences = tokenizer.encode_segments(sentences, at_start=[False] * len(sentences))
        self.n_tokens = sum(map(len, self.sentences))
        if self.n_tokens < longest:
            raise DataError(
                f"the haystack has {self.n_tokens:,} tokens, the longest text wants {longest:,}; give more prose "
                "(--haystack FILE) or shorter lengths"
            )

    def cut(self, start: float, n_tokens: int) -> list[list[int]]:
        """`n_tokens` tokens in sentences, the last one cut; `start` in [0, 1) of what may begin them."""
        skipped, room = start * (self.n_tokens - n_tokens), n_tokens
        cut: list[list[int]] = []
        for ends, sentence in zip(itertools.accumulate(map(len, self.sentences)), self.sentences, strict=True):
            if room and ends >= skipped:
                cut.append(sentence[:room])
                room -= len(cut[-1])
        return cut


class Reader:
    """A model that reads texts: what one shares with those before is not computed again."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, longest: int) -> None:
        """longest: tokens of a text with its answer; they may be more than the model's context."""
        blocks = blocks_for(longest) + 2 * (CHOICES + 1)  # each answer ends in blocks of its own
        self._engine = Engine(
            model, tokenizer, cache_tokens=blocks * BLOCK, max_running=CHOICES, step_tokens=CHUNK, context=longest
        )

    def answer(self, ids: Sequence[int], n_tokens: int) -> list[int]:
        """The `n_tokens` most probable tokens, one after the other, that follow `ids`."""
        [[answer]] = self._engine.generate([Request(ids, n_tokens, stop_ids=(), text=False)])
        return answer.ids

    def bits(self, ids: Sequence[int], answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """-log2 p of each token of each answer, if it follows `ids`."""
        asked = [
            Request([*ids, *answer], 0, stop_ids=(), text=False, prompt_logprobs=0, prompt_logprobs_from=len(ids))
            for answer in answers
        ]
        return [
            [-p.raw / math.log(2) for p in answer.prompt_logprobs or ()] for [answer] in self._engine.generate(asked)
        ]


def find_needles(
    model: Llama,
    tokenizer: Tokenizer,
    haystack: Haystack,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    together: bool = False,
    seed: int = 0,
    on_text: Callable[[int], None] = lambda n: None,
) -> list[Finding]:
    """Hide and ask: `trials` times at each length and depth, each trial with prose, places and keys of its own.

    together: one text holds a needle at every depth, and all are asked for; else each needle has a text for itself.
    Positions may go past the model's context. on_text: called with the length of each text read.
    """
    reader = Reader(model, tokenizer, max(lengths))
    findings = []
    for length, trial in itertools.product(lengths, range(trials)):
        rng = random.Random(f"{seed}/{trial}")
        start = rng.random()
        needles = [Needle(place, _key(rng)) for place in rng.sample(PLACES, len(depths))]
        others = [_key(rng) for _ in range(CHOICES)]
        placed = sorted(zip(depths, needles, strict=True), key=lambda pair: -pair[0])
        for hidden in [placed] if together else [[(depth, needles[0])] for depth, _ in placed]:
            text = hide(tokenizer, haystack, start, hidden, length)
            candidates = list(dict.fromkeys([needle.key for _, needle in hidden] + others))[:CHOICES]
            for depth, needle in hidden:
                findings.append(_ask(reader, tokenizer, text, length, depth, needle, candidates))
            on_text(length)
    return findings


def hide(
    tokenizer: Tokenizer, haystack: Haystack, start: float, hidden: Sequence[tuple[float, Needle]], length: int
) -> list[int]:
    """Token ids of prose with needles before the sentence at each depth; with question and answer `length` tokens."""
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    begin = [] if bos is None else [bos]
    facts = [_ids(tokenizer, needle.fact) for _, needle in hidden]
    asked = max(len(_ids(tokenizer, needle.question + " " + needle.key + ".")) for _, needle in hidden)
    room = length - len(begin) - sum(map(len, facts)) - asked
    if room < 1:
        raise DataError(f"{length} tokens have no room for {len(hidden)} needles; give longer --lengths")
    sentences = haystack.cut(start, room)
    text, done = begin, 0
    waiting = sorted(zip((depth for depth, _ in hidden), facts, strict=True), key=lambda pair: pair[0])
    for sentence in sentences:
        while waiting and done >= waiting[0][0] * room:
            text = text + waiting.pop(0)[1]
        text, done = text + sentence, done + len(sentence)
    return text + [i for _, fact in waiting for i in fact]


def bits_by_position(
    model: Llama,
    tokenizer: Tokenizer,
    haystack: Haystack,
    *,
    lengths: Sequence[int],
    trials: int,
    seed: int = 0,
    on_text: Callable[[int], None] = lambda n: None,
) -> list[float]:
    """Bits per byte of plain prose at positions below the first length, between it and the second, and so on."""
    edges = [0, *sorted(lengths)]
    reader = Reader(model, tokenizer, edges[-1])
    bits, sizes = torch.zeros(2, edges[-1], dtype=torch.float64)
    for trial in range(trials):
        start = random.Random(f"{seed}/{trial}").random()
        ids = list(itertools.chain.from_iterable(haystack.cut(start, edges[-1])))
        bits[1:] += torch.tensor(reader.bits(ids[:1], [ids[1:]])[0], dtype=torch.float64)
        sizes[1:] += torch.from_numpy(tokenizer.text_bytes(ids[1:]))
        on_text(edges[-1])
    return [(bits[a:b].sum() / sizes[a:b].sum()).item() for a, b in itertools.pairwise(edges)]


def prose(documents: Iterable[str], n_chars: int) -> str:
    """Documents joined until there are `n_chars` characters, or no more of them."""
    parts, size = [], 0
    for document in documents:
        parts.append(document)
        size += len(document)
        if size >= n_chars:
            break
    return "\n\n".join(parts)


def _ask(
    reader: Reader,
    tokenizer: Tokenizer,
    text: list[int],
    length: int,
    depth: float,
    needle: Needle,
    candidates: Sequence[str],
) -> Finding:
    asked = text + _ids(tokenizer, needle.question)
    answer = tokenizer.decode(reader.answer(asked, len(_ids(tokenizer, f" {needle.key}.")))).strip()
    bits = reader.bits(asked, [_ids(tokenizer, " " + key) for key in candidates])
    costs = {key: sum(cost) for key, cost in zip(candidates, bits, strict=True)}
    digits = re.match(r"\d*", answer)
    found = digits is not None and digits[0] == needle.key
    others = (cost for key, cost in costs.items() if key != needle.key)
    chosen = all(costs[needle.key] < cost for cost in others)  # so that neither a tie nor NaN is a choice
    return Finding(length, depth, needle, answer, found, chosen, costs[needle.key])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text that continues another."""
    return tokenizer.encode_segments([text], at_start=[False])[0]


def _key(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
