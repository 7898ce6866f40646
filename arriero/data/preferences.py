"""Preferences as token ids: prompts with answers of which some are better, tokenised once and memory-mapped.

Each answer is encoded with its prompt as fine-tuning encodes the same conversation (tokenizer/chat.py), so the ids are
SFT's; only the answer is trained. All this is kept in the cache of fine-tuning (sft_cache.py), an *example* for each
answer, with what else is known of them in further arrays:

    counts, kinds, ratings, margins, prompts      of each row: its answers, layout, rating, margin, and the tokens of
                                                  the prompt that its answers share
    values, safe                                  of each answer

Rows are held out by their prompt, so no prompt is on both sides.

Price: the prompt is kept with each of its answers, so 5 bytes a token of each.

n rows, S answers of all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from arriero.data.formats import Conversation
from arriero.data.preference_formats import KINDS, RATINGS, Preference, is_preference, parse_preference
from arriero.data.sft import SftDataset, percentiles, read_again, tokenised
from arriero.data.sft_cache import EncodedRows, encode_conversation, end_to_end
from arriero.data.splits import leave_out_long, splits
from arriero.errors import DataError, UserError
from arriero.io.records import Record, parse_row, read_records, source_files
from arriero.show.terminal import notes
from arriero.tokenizer.base import Tokenizer

CACHE = "preferences 1"  # the number goes up when the same input would give other bytes
OF_ROWS = ("counts", "kinds", "ratings", "margins", "prompts", "prompt_hashes")
OF_ANSWERS = ("values", "safe")


class PreferenceDataset:
    """Rows of answers to one prompt each; `select` makes views of the same files.

    lengths [n]: tokens of each row, its prompt counted once. answers: all S of them, as examples of fine-tuning.
    """

    def __init__(self, directory: Path, files: Sequence[Path], index: NDArray[np.int64] | None = None) -> None:
        self.answers = SftDataset(directory, files)
        arrays = {n: np.load(directory / f"{n}.npy", allow_pickle=False) for n in (*OF_ROWS, *OF_ANSWERS)}
        self._first = np.concatenate([[0], np.cumsum(arrays["counts"])])
        self._kinds, self._ratings, self._margins, self._prompts, self._prompt_hashes = (
            arrays[name] for name in OF_ROWS[1:]
        )
        self.values, self.safe = (arrays[name] for name in OF_ANSWERS)
        self.index = np.arange(len(self._kinds)) if index is None else index
        per_answer = self.answers.lengths - np.repeat(self._prompts, arrays["counts"])
        sums = np.concatenate([[0], np.cumsum(per_answer)])
        self.lengths: NDArray[np.int64] = (np.diff(sums[self._first]) + self._prompts)[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def of_row(self, i: int) -> range:
        """The answers of row i, as numbers in `answers`, `values` and `safe`."""
        j = self.index[i]
        return range(int(self._first[j]), int(self._first[j + 1]))

    def prompt(self, i: int) -> int:
        """Tokens that the answers of row i share: the prompt but for its last, which predicts the first of each."""
        return int(self._prompts[self.index[i]])

    @property
    def n_cached(self) -> int:
        """Rows of the whole cache, which `index` chooses from."""
        return len(self._kinds)

    @property
    def kinds(self) -> NDArray[np.int8]:
        """The layout of each row, an index of KINDS, [n]."""
        return self._kinds[self.index]

    @property
    def ratings(self) -> NDArray[np.int8]:
        """How much better the chosen answer of each row is, an index of RATINGS or -1, [n]."""
        return self._ratings[self.index]

    @property
    def margins(self) -> NDArray[np.float32]:
        """The same as a number, or nan, [n]."""
        return self._margins[self.index]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Answers of each row, [n]."""
        return np.diff(self._first)[self.index]

    @property
    def files(self) -> NDArray[np.int64]:
        """The number of the file that each row is from, [n]."""
        return self.answers.file_numbers[self._first[self.index]]

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of the hash of each row's prompt, [n]."""
        return self._prompt_hashes[self.index]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the rows: the cache's key and the choice from it."""
        choice = np.ascontiguousarray(self.index, dtype="<i8").tobytes()
        return hashlib.sha256(self.answers.directory.name.encode() + choice).hexdigest()

    def where(self, i: int) -> str:
        """The file and row that row i came from."""
        return self.answers.where(self.of_row(i)[0])

    def select(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> PreferenceDataset:
        """The rows at these positions (or where this mask is true), in this order."""
        return PreferenceDataset(self.answers.directory, self.answers.files, self.index[chosen])

    def best(self, i: int) -> int:
        """The best answer of row i, the first of them."""
        of = self.of_row(i)
        return of[int(np.argmax(self.values[of.start : of.stop]))]

    def last_answer(self, i: int) -> tuple[list[int], list[int]]:
        """Row i as (ids of the prompt, ids of its best answer)."""
        return self.answers.last_answer(self.best(i))

    def conversations(self, examples: Sequence[int]) -> list[Conversation]:
        """These rows as conversations with their best answer, read again from the data files."""
        best = [self.best(i) - self.of_row(i)[0] for i in examples]
        return [row.conversation(k) for row, k in zip(self.read(examples), best, strict=True)]

    def read(self, examples: Sequence[int]) -> list[Preference]:
        """These rows, read again from the data files."""
        places = [self.answers.place(self.of_row(i)[0]) for i in examples]
        return read_again(self.answers.files, places, parse_preference)

    @property
    def comparable(self) -> NDArray[np.bool_]:
        """Whether an answer of the row is better than another of it, [n]."""
        low, high = (f.reduceat(self.values, self._first[:-1]) for f in (np.minimum, np.maximum))
        return (high > low)[self.index]


# Encoding


def encode_preferences(tokenizer: Tokenizer, records: Sequence[Record]) -> EncodedRows:
    """Encode the rows of one chunk, which all come from one file."""
    rows = [parse_preference(record) for record in records]
    conversations, encoded, prompts = [], [], []
    for row in rows:
        answers = [row.conversation(i) for i in range(len(row.answers))]
        ids = [_encoded(tokenizer, row, i, answer) for i, answer in enumerate(answers)]
        prompts.append(_shared(row, ids))
        conversations += answers
        encoded += ids
    part = end_to_end(conversations, encoded)
    part.more.update(
        counts=np.array([len(row.answers) for row in rows], dtype=np.int64),
        kinds=np.array([KINDS.index(row.kind) for row in rows], dtype=np.int8),
        ratings=np.array([row.rating for row in rows], dtype=np.int8),
        margins=np.array([row.margin for row in rows], dtype=np.float32),
        prompts=np.array(prompts, dtype=np.int64),
        prompt_hashes=np.array([_prompt_hash(row) for row in rows], dtype=np.uint64),
        values=np.array([value for row in rows for value in row.values], dtype=np.float32),
        safe=np.array([safe for row in rows for safe in row.safe], dtype=np.int8),
    )
    return part


def _encoded(tokenizer: Tokenizer, row: Preference, i: int, answer: Conversation) -> tuple[list[int], list[bool]]:
    """One answer with its prompt: one beginning of the text, and a last token that is trained and ends the answer."""
    try:
        ids, trained = encode_conversation(tokenizer, answer)
    except DataError as error:
        named = str(error).removeprefix(f"{row.where}: ")
        raise DataError(f"{row.where}: {row.names[i]!r}: {named}") from error
    bos = tokenizer.bos_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise DataError(
            f"{row.where}: {row.names[i]!r}: it begins with {tokenizer.token_bytes(bos)!r} twice; take the text of "
            "that token out of the row, or of the chat template"
        )
    last = len(trained) - 1 - trained[::-1].index(True)
    if ids[last] not in tokenizer.control_stops:
        raise DataError(
            f"{row.where}: {row.names[i]!r}: its last trained token is {tokenizer.token_bytes(ids[last])!r}, which "
            "does not end an answer, so that no score could be read there; let the last message be a trained answer"
        )
    return ids, trained


def _shared(row: Preference, encoded: Sequence[tuple[list[int], list[bool]]]) -> int:
    """Tokens of the prompt that all answers share, without the last, which predicts the first of each answer."""
    starts = [trained.index(True) for _, trained in encoded]
    if any(ids[: starts[0]] != encoded[0][0][: starts[0]] for ids, _ in encoded) or len(set(starts)) > 1:
        raise DataError(
            f"{row.where}: the chat template writes the prompt in one way before {row.names[0]!r} and in another "
            "before one of the other answers, which then are no answers to one prompt; use a template that looks at "
            "earlier messages only (--chat-template)"
        )
    return starts[0] - 1


def _prompt_hash(row: Preference) -> int:
    """64 bits of the SHA-256 of the prompt and the tools."""
    content = json.dumps([row.prompt, row.tools], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little")


# Building


def holds_preferences(source: str | Path) -> bool:
    """Whether the first row of a source is in a layout of preferences."""
    try:
        first = next(iter(read_records(source_files(source)[0])), None)
        return first is not None and is_preference(parse_row(first))
    except UserError:
        return False  # who reads it says what is wrong


def build_preferences(
    source: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    max_truncated: float = 0.05,
    workers: int = 0,
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> PreferenceDataset:
    """Tokenise `source`, one or several (see preference_formats.py), or open the cache of that.

    Arguments as in `sft.build_dataset`; the tokens of a row are those of its prompt and of all its answers. Raises
    DataError, naming file and row, for rows that cannot be learned from.
    """
    console = console or notes()
    sources = [source] if isinstance(source, str | Path) else source
    files = [file for one in sources for file in source_files(one)]
    directory = tokenised(files, tokenizer, CACHE, partial(encode_preferences, tokenizer), workers, cache_dir, console)
    dataset = PreferenceDataset(directory, files)
    return dataset if max_length is None else leave_out_long(dataset, max_length, max_truncated, console)


def build_preference_splits(
    train: str | Path | Sequence[str | Path],
    validation: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_truncated: float = 0.05,
    workers: int = 0,
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """Training and validation rows; `validation` is a file, or a share of the training prompts ("0": none)."""
    console = console or notes()

    def build(source: str | Path | Sequence[str | Path]) -> PreferenceDataset:
        return build_preferences(
            source,
            tokenizer,
            max_length=max_length,
            max_truncated=max_truncated,
            workers=workers,
            cache_dir=cache_dir,
            console=console,
        )

    return splits(build, train, validation, console)


# Statistics


@dataclass(frozen=True)
class PreferenceStats:
    """What a data set of preferences holds; lengths in tokens."""

    rows: int
    answers: int
    pairs: int  # of answers of one row of which one is better
    tokens: int  # prompts counted once
    trained_tokens: int
    shared_tokens: int  # of prompts, which are computed once instead of once for each answer
    by_kind: dict[str, int]
    by_rating: dict[str, int]
    length_percentiles: dict[str, int]
    better_is_longer: float  # share of the pairs, of those whose answers differ in length

    def to_dict(self) -> dict:
        """As JSON keeps it."""
        return asdict(self)


def preference_stats(dataset: PreferenceDataset) -> PreferenceStats:
    """Counts and lengths, and whether the better answers tend to be the longer ones."""
    pairs = longer = shorter = trained = shared = 0
    for i in range(len(dataset)):
        of = dataset.of_row(i)
        lengths = np.array([int(dataset.answers.trained(s).sum()) for s in of])
        values = dataset.values[of.start : of.stop]
        better = values[:, None] > values[None, :]
        pairs += int(better.sum())
        longer += int((better & (lengths[:, None] > lengths[None, :])).sum())
        shorter += int((better & (lengths[:, None] < lengths[None, :])).sum())
        trained += int(lengths.sum())
        shared += dataset.prompt(i) * (len(of) - 1)
    kinds, ratings = dataset.kinds, dataset.ratings
    return PreferenceStats(
        rows=len(dataset),
        answers=int(dataset.counts.sum()),
        pairs=pairs,
        tokens=int(dataset.lengths.sum()),
        trained_tokens=trained,
        shared_tokens=shared,
        by_kind={kind: n for k, kind in enumerate(KINDS) if (n := int((kinds == k).sum()))},
        by_rating={name: n for k, name in enumerate(RATINGS) if (n := int((ratings == k).sum()))},
        length_percentiles=percentiles(dataset.lengths),
        better_is_longer=longer / (longer + shorter) if longer + shorter else 0.5,
    )
