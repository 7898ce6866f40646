"""`arriero eval needle`: load, ask, show results by length and depth, save; two models get the same texts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from arriero.curate.sources import read_documents
from arriero.errors import ConfigError
from arriero.eval.bootstrap import mean
from arriero.eval.config import NeedleConfig
from arriero.eval.needle import Finding, Haystack, bits_by_position, find_needles, prose
from arriero.eval.results import MEASURES, Measure, Results, Sample, measures_table, refuse_not_finite, save
from arriero.eval.run import before_and_after
from arriero.io.files import make_output, replaced_file, write_json
from arriero.model.llama import Llama
from arriero.show.page import LIGHT, Theme, png
from arriero.show.progress import progress
from arriero.show.terminal import output
from arriero.tokenizer.base import Tokenizer

BITS, PROSE = Measure("bits", "lower", ".1f"), Measure("prose, bits/byte", "lower")
CHARS_PER_TOKEN = 64  # of prose kept for each token of the longest text: enough for trials to differ


@dataclass(frozen=True)
class NeedleResults(Results):
    """One model's answers; `by_position` is bits per byte of prose up to each length, from the one before."""

    findings: Sequence[Finding]
    by_position: dict[int, float]
    context: int  # tokens that the model was made for

    def share(self, length: int, depth: float) -> float:
        """Of the keys at this length and depth, how many were found."""
        return _mean(f.found for f in self.findings if (f.length, f.depth) == (length, depth))


def run_needle(config: NeedleConfig, console: Console | None = None) -> NeedleResults:
    """Measure `config.model` (after `compare_with`, where given), print the tables, write the files.

    Raises `ConfigError` for settings that name nothing, `DataError` for prose that is too short or cannot be read.
    """
    if not config.model:
        raise ConfigError("eval needle: no model given; run: arriero eval needle MODEL")
    console = console or output()
    if config.out:
        make_output(Path(config.out))
    text = prose(_documents(config.haystack), CHARS_PER_TOKEN * max(config.lengths))

    def measure(model: Llama, tokenizer: Tokenizer, name: str) -> NeedleResults:
        return _measure(config, text, model, tokenizer, name)

    before, after = before_and_after(measure, config)
    models = [after] if before is None else [before, after]
    for results in models:
        console.print(needle_table(results))
    console.print(measures_table(before, after, config.resamples, config.seed))
    if config.out:
        out = Path(config.out)
        save(out, asdict(config), before, after)
        write_json(out / "needle.json", {results.model: _record(results) for results in models})
        with replaced_file(out / "needle.png") as path:
            path.write_bytes(needle_png(models))
        console.print(f"written: {config.out}/needle.png, needle.json, results.json, samples.jsonl", markup=False)
    refuse_not_finite(before, after)
    return after


def needle_table(results: NeedleResults) -> Table:
    """Keys found by length and depth, the scores of each length, and what prose costs up to it."""
    lengths, depths = _axes(results)
    title = f"{results.model}: keys found, by length and depth (context {results.context:,})"
    table = Table(title=Text(title, "table.title"), title_justify="left")
    for column in ("tokens", *(f"{depth:.0%}" for depth in depths), "all", "1 of 10", BITS.name, PROSE.name):
        table.add_column(column, justify="right")
    for length in lengths:
        here = [f for f in results.findings if f.length == length]
        shares = [results.share(length, depth) for depth in depths]
        table.add_row(
            f"{length:,}" + ("*" if length > results.context else ""),
            *(Text(f"{share:.0%}", "green" if share > 0.5 else "red") for share in shares),
            f"{_mean(f.found for f in here):.0%}",
            f"{_mean(f.chosen for f in here):.0%}",
            BITS.shown(_mean(f.bits for f in here)),
            PROSE.shown(results.by_position[length]),
        )
    table.caption = f"1 of 10: chance is {MEASURES['chosen'].chance:.0%}, and a tie is no choice" + (
        "\n* past the model's context" if lengths[-1] > results.context else ""
    )
    return table


def needle_png(models: Sequence[NeedleResults], theme: Theme = LIGHT) -> bytes:
    """The heat maps side by side, length to the right and depth downwards; returns a PNG."""
    lengths, depths = _axes(models[0])
    width = 1.2 + 0.75 * len(lengths)
    size = (max(4.5, width) * len(models), 1.6 + 0.45 * len(depths))
    figure = Figure(figsize=size, dpi=160, facecolor=theme.background, layout="constrained")
    for axes, results in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        shares = [[results.share(length, depth) for length in lengths] for depth in depths]
        axes.imshow(shares, cmap=colormaps["RdYlGn"], vmin=0, vmax=1, alpha=0.75, aspect="auto")
        for (row, shown), column in itertools.product(enumerate(shares), range(len(lengths))):
            axes.text(column, row, f"{shown[column]:.0%}", ha="center", va="center", color="#222222", fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], color=theme.text)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], color=theme.text)
        axes.set_xlabel("tokens", color=theme.text)
        axes.set_ylabel("depth of the needle", color=theme.text)
        axes.set_title(f"{results.model}: keys found", color=theme.text, fontsize=9, parse_math=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return png(figure)


def _measure(config: NeedleConfig, text: str, model: Llama, tokenizer: Tokenizer, name: str) -> NeedleResults:
    began = time.monotonic()
    model.eval()
    haystack = Haystack(tokenizer, text, max(config.lengths))
    lengths = sorted(set(config.lengths))
    depths = [i / (config.depths - 1) for i in range(config.depths)] if config.depths > 1 else [0.5]
    texts = 1 if config.together else len(depths)
    with progress(f"measuring {name}", config.trials * (sum(lengths) * texts + lengths[-1])) as bar:
        findings = find_needles(
            model, tokenizer, haystack, lengths=lengths, depths=depths, trials=config.trials,
            together=config.together, seed=config.seed, on_text=bar.advance,
        )  # fmt: skip
        costs = bits_by_position(
            model, tokenizer, haystack, lengths=lengths, trials=config.trials, seed=config.seed, on_text=bar.advance
        )
    columns = {
        "found": mean([float(f.found) for f in findings]),
        "chosen": mean([float(f.chosen) for f in findings]),
        "key_bits": mean([f.bits for f in findings]),
    }
    samples = [
        Sample(
            f"{f.length} tokens, depth {f.depth:.0%}:{f.needle.question.strip()}", f.needle.key, f.answer,
            {"found": float(f.found), "chosen": float(f.chosen), "key_bits": f.bits},
        )
        for f in findings
    ]  # fmt: skip
    return NeedleResults(
        name, columns, samples, len(findings), time.monotonic() - began, findings,
        dict(zip(lengths, costs, strict=True)), model.config.max_context,
    )  # fmt: skip


def _record(results: NeedleResults) -> dict[str, object]:
    """What needle.json holds of a model."""
    cells = []
    for length, depth in itertools.product(*_axes(results)):
        here = [f for f in results.findings if (f.length, f.depth) == (length, depth)]
        cells.append(
            {
                "length": length,
                "depth": depth,
                "found": _mean(f.found for f in here),
                "chosen": _mean(f.chosen for f in here),
                "key_bits": _mean(f.bits for f in here),
                "questions": len(here),
            }
        )
    return {"context": results.context, "cells": cells, "bits_per_byte_up_to": results.by_position}


def _axes(results: NeedleResults) -> tuple[list[int], list[float]]:
    """Lengths and depths in ascending order."""
    return sorted({f.length for f in results.findings}), sorted({f.depth for f in results.findings})


def _documents(haystack: str) -> Iterable[str]:
    if haystack:
        return (document.text for document in read_documents([haystack]))
    from pydoc_data.topics import topics

    return (text for _, text in sorted(topics.items()))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
