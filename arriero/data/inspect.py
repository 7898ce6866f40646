"""`arriero data inspect`: rows with their trained tokens marked, a histogram of lengths, and counts of trained tokens.

Of preferences the prompt is shown once, as it is computed, and then each answer.

All data are tokenised as for training, with the same errors. The result is cached, so the training run that follows
starts at once.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from arriero.data.preference_formats import RATINGS
from arriero.data.preferences import (
    PreferenceDataset,
    PreferenceStats,
    build_preferences,
    holds_preferences,
    preference_stats,
)
from arriero.data.sft import DataStats, SftDataset, build_dataset, data_stats
from arriero.errors import DataError, check
from arriero.show.terminal import output
from arriero.tokenizer.base import Tokenizer

BINS = 12
BAR = 40  # characters of the longest bar
TRAINED, CONTEXT = "bold green", "dim"


def inspect(
    source: str | Path,
    tokenizer: Tokenizer,
    n_rows: int = 3,
    *,
    seq_len: int = 2048,
    first: int = 0,
    workers: int = 0,
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> DataStats | PreferenceStats:
    """Print `n_rows` rows of `source` from example `first` on, then the lengths and the statistics of all.

    Returns the statistics. Raises ConfigError for numbers that make no sense, DataError for data that cannot be
    learned from.
    """
    check(n_rows >= 0, f"rows is {n_rows}; give a number of rows to print, or 0")
    check(seq_len >= 1, f"seq_len is {seq_len}; a packed row holds 1 token at least")
    console = console or output()
    if holds_preferences(source):
        preferences = build_preferences(source, tokenizer, workers=workers, cache_dir=cache_dir)
        return _inspect_preferences(source, preferences, tokenizer, range(first, first + n_rows), seq_len, console)
    dataset = build_dataset(source, tokenizer, workers=workers, cache_dir=cache_dir)
    _check_first(source, len(dataset), first)
    for i in range(first, min(first + n_rows, len(dataset))):
        n_trained, n = int(dataset.trained(i).sum()), int(dataset.lengths[i])
        console.rule(Text(f"{dataset.where(i)}: {n:,} tokens, {n_trained:,} trained"), align="left")
        console.print(marked_text(dataset, i, tokenizer, brackets=not console.color_system), soft_wrap=True)
    stats = data_stats(dataset, seq_len)
    console.rule("lengths in tokens", align="left")
    console.print(length_histogram(dataset.lengths))
    console.print(stats_table(stats, int((dataset.lengths > seq_len).sum())))
    return stats


def _check_first(source: str | Path, n: int, first: int) -> None:
    if not 0 <= first < n:
        raise DataError(f"{source} has {n:,} examples, numbered from 0; there is none with number {first}")


def _inspect_preferences(
    source: str | Path,
    dataset: PreferenceDataset,
    tokenizer: Tokenizer,
    wanted: range,
    seq_len: int,
    console: Console,
) -> PreferenceStats:
    """The same of preferences."""
    _check_first(source, len(dataset), wanted.start)
    shown = [i for i in wanted if i < len(dataset)]
    for i, row in zip(shown, dataset.read(shown), strict=True):
        answers, p, brackets = dataset.of_row(i), dataset.prompt(i), not console.color_system
        trained = sum(int(dataset.answers.trained(answer).sum()) for answer in answers)
        level = f"; {RATINGS[row.rating]}" if row.rating >= 0 else ""
        title = f"{row.where}: {dataset.lengths[i]:,} tokens, {p:,} of them shared, {trained:,} trained{level}"
        console.rule(Text(title), align="left")
        console.print(marked_text(dataset.answers, answers[0], tokenizer, brackets, slice(p)), soft_wrap=True)
        for answer, name, value, safe in zip(answers, row.names, row.values, row.safe, strict=True):
            score = f", {value:g}" if row.kind in ("scored", "unpaired") else ""
            said = ("", ", unsafe", ", safe")[safe + 1]
            console.print(Text(f"-- {name}{score}{said}: {int(dataset.answers.trained(answer).sum()):,} trained"))
            console.print(marked_text(dataset.answers, answer, tokenizer, brackets, slice(p, None)), soft_wrap=True)
    stats = preference_stats(dataset)
    console.rule("lengths in tokens, prompts counted once", align="left")
    console.print(length_histogram(dataset.lengths))
    console.print(preference_table(stats, seq_len, int((dataset.lengths > seq_len).sum())))
    return stats


def marked_text(dataset: SftDataset, i: int, tokenizer: Tokenizer, brackets: bool, part: slice = slice(None)) -> Text:
    """Example i, special tokens reversed and trained ones green; `brackets` puts ⟦ ⟧ around what is trained.

    part: of its tokens.
    """
    special = frozenset(tokenizer.special_ids.values())
    tokens = zip(dataset.tokens(i)[part].tolist(), dataset.trained(i)[part].tolist(), strict=True)
    text = Text()
    for trained, run in groupby(tokens, key=lambda token: token[1]):
        text.append("⟦" if brackets and trained else "")
        for is_special, tokens_of in groupby(run, key=lambda token: token[0] in special):
            written = b"".join(tokenizer.token_bytes(token) for token, _ in tokens_of).decode("utf-8", "replace")
            text.append(written, style=(TRAINED if trained else CONTEXT) + (" reverse" if is_special else ""))
        text.append("⟧" if brackets and trained else "")
    return text


def length_histogram(lengths: NDArray[np.int64]) -> Table:
    """How many examples have which length, in bins of equal width."""
    counts, edges = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    table = Table.grid(padding=(0, 1))
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify)  # type: ignore[arg-type]
    for k, count in enumerate(counts.tolist()):
        low, high = int(np.ceil(edges[k])), int(np.ceil(edges[k + 1])) - 1
        if k == len(counts) - 1:
            high = int(edges[-1])
        bar = "█" * round(BAR * count / int(counts.max())) or ("▏" if count else "")
        table.add_row(f"{low:,} to {high:,}", f"{count:,}", bar)
    return table


def stats_table(stats: DataStats, n_long: int) -> Table:
    """The numbers behind the mask and the packing; `n_long` examples do not fit `stats.seq_len`."""
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("examples", f"{stats.examples:,}")
    table.add_row("tokens", f"{stats.tokens:,}")
    table.add_row("trained tokens", f"{stats.trained_tokens:,} ({stats.trained_share:.1%})")
    for name, percentiles in (("length", stats.length_percentiles), ("trained tokens", stats.answer_percentiles)):
        values = ", ".join(f"{point} {value:,}" for point, value in percentiles.items())
        table.add_row(f"{name} of an example", values)
    table.add_row(f"longer than {stats.seq_len:,} (left out of training)", f"{n_long:,}")
    table.add_row(f"packed rows of {stats.seq_len:,}", f"{stats.packed_rows:,}, {stats.packing_efficiency:.1%} full")
    return table


def preference_table(stats: PreferenceStats, seq_len: int, n_long: int) -> Table:
    """The numbers of preferences; `n_long` rows do not fit `seq_len`."""
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("rows", f"{stats.rows:,} ({', '.join(f'{kind} {n:,}' for kind, n in stats.by_kind.items())})")
    table.add_row("answers", f"{stats.answers:,}")
    table.add_row("pairs of a better and a worse answer", f"{stats.pairs:,}")
    for name, n in stats.by_rating.items():
        table.add_row(f"rows rated {name!r}", f"{n:,}")
    table.add_row("tokens, prompts counted once", f"{stats.tokens:,}")
    table.add_row("prompt tokens that need no second computing", f"{stats.shared_tokens:,}")
    table.add_row("trained tokens", f"{stats.trained_tokens:,} ({stats.trained_tokens / stats.tokens:.1%})")
    values = ", ".join(f"{point} {value:,}" for point, value in stats.length_percentiles.items())
    table.add_row("length of a row", values)
    table.add_row("pairs whose better answer is the longer", f"{stats.better_is_longer:.1%}")
    table.add_row(f"longer than {seq_len:,} (left out of training)", f"{n_long:,}")
    return table
