"""Results of an evaluation: numbers by row, tables for the terminal, files, and the comparison of two models.

A difference is called better or worse only when its paired 95% interval excludes zero.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from arriero.errors import CheckpointError
from arriero.eval.bootstrap import Interval, Ratio, difference, interval
from arriero.io.files import split_lines, write_json, write_jsonl
from arriero.show.terminal import clean
from arriero.version import __version__


@dataclass(frozen=True)
class Measure:
    """A number that is reported: what it is, which way is good, how it is printed; of a choice, what chance gives."""

    name: str
    better: Literal["higher", "lower"]
    format: str = ".3f"
    chance: float | None = None

    @property
    def title(self) -> str:
        """As it heads a row."""
        return self.name if self.chance is None else f"{self.name} (chance {self.chance:.0%})"

    def shown(self, value: float, sign: str = "") -> str:
        """A value as it is printed."""
        return format(value, sign + self.format) if math.isfinite(value) else NOT_FINITE


NOT_FINITE = "not finite"
MEASURES = {
    "bits_per_token": Measure("bits per token", "lower"),
    "bits_per_byte": Measure("bits per byte", "lower"),
    "perplexity": Measure("perplexity", "lower", ".2f"),
    "rouge_l": Measure("ROUGE-L", "higher"),
    "chrf": Measure("chrF", "higher"),
    "exact": Measure("exact match", "higher", ".1%"),
    "one_sentence": Measure("one sentence", "higher", ".1%"),
    "stopped": Measure("stops by itself", "higher", ".1%"),
    "greedy_reward": Measure("reward, greedy", "higher"),
    "reward": Measure("mean reward", "higher"),
    "found": Measure("finds the key", "higher", ".1%"),
    "chosen": Measure("prefers it to 9 others", "higher", ".1%", chance=0.1),
    "obeyed": Measure("obeys after turn 1", "higher", ".1%"),
    "key_bits": Measure("bits of the key", "lower", ".2f"),
}


PASS_AT = "pass@"  # followed by k
OBEYED_AT = "obeyed in turn "  # followed by the turn
BY_SOURCE = "bits_per_byte_"  # followed by a source's name, as in validations of pretraining
MOST_SOURCES = 20  # that a table shows


def measure_of(key: str) -> Measure:
    """The measure that a key of `Results.ratios` names: one of `MEASURES`, pass@k, of a turn, or of a source."""
    if key.startswith((PASS_AT, OBEYED_AT)):
        return Measure(key, "higher", ".1%")
    if not key.startswith(BY_SOURCE):
        return MEASURES[key]
    return Measure(f"{MEASURES['bits_per_byte'].name}: {key.removeprefix(BY_SOURCE)}", "lower")


@dataclass(frozen=True)
class Sample:
    """One row: what was asked, what was wanted, what came, and its scores."""

    prompt: str
    reference: str
    answer: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Results:
    """One model on one file. `ratios` hold each measure by row (by window, for texts), sources last, largest first."""

    model: str
    ratios: dict[str, Ratio]
    samples: list[Sample]
    rows: int
    seconds: float

    def intervals(self, resamples: int, seed: int) -> dict[str, Interval]:
        """Each measure with its 95% bootstrap interval."""
        return {key: interval(ratio, resamples, seed) for key, ratio in self.ratios.items()}

    @property
    def not_finite(self) -> list[str]:
        """The measures of all rows whose value is NaN or infinite: what the model computes is no number somewhere."""
        return [key for key, ratio in self.ratios.items() if key in MEASURES and not math.isfinite(ratio.value)]


@dataclass(frozen=True)
class Comparison:
    """One measure before and after, and the paired interval of after - before.

    sound: neither model computed NaN or infinite values; a model that does may still have ordinary results.
    """

    measure: Measure
    before: float
    after: float
    difference: Interval
    sound: bool = True

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """Better or worse only where the interval of the difference leaves out zero; a tie is neither.

        Nor is a difference that the digits shown do not show: rounding has a sign of its own.
        """
        sign = self.difference.sign if self.measure.better == "higher" else -self.difference.sign
        shown = self.measure.shown(abs(self.difference.value)) != self.measure.shown(0.0)
        if not (sign and shown and self.sound):
            return "unclear"
        return "better" if sign > 0 else "worse"


def compare(before: Results, after: Results, resamples: int, seed: int) -> dict[str, Comparison]:
    """Set two models' results on the same rows side by side, by measure.

    A source that only one model's tokenizer leaves tokens to score of is left out.
    """
    differing = before.ratios.keys() ^ after.ratios.keys()
    assert all(key.startswith(BY_SOURCE) for key in differing), "the two were measured by different tasks"
    sound = not before.not_finite and not after.not_finite
    compared = {}
    for key, old in before.ratios.items():
        if key in differing:
            continue
        new = after.ratios[key]
        compared[key] = Comparison(measure_of(key), old.value, new.value, difference(old, new, resamples, seed), sound)
    return compared


def measures_table(before: Results | None, after: Results, resamples: int, seed: int) -> Table:
    """One model's numbers, or two models' side by side."""
    if before is None:
        return results_table(after, resamples, seed)
    return comparison_table(before, after, compare(before, after, resamples, seed))


def results_table(results: Results, resamples: int, seed: int) -> Table:
    """One model's numbers, each with its interval."""
    table = Table(
        title=Text(f"{results.model}: {results.rows:,} rows in {results.seconds:.0f} s", "table.title"),
        title_justify="left",
    )
    for column in ("", "value", "95% interval"):
        table.add_column(column, justify="left" if not column else "right")
    found = results.intervals(resamples, seed)
    for key in _shown(found, table):
        measure = measure_of(key)
        table.add_row(Text(clean(measure.title)), measure.shown(found[key].value), _span(measure, found[key]))
    return table


def comparison_table(before: Results, after: Results, compared: dict[str, Comparison]) -> Table:
    """Before and after, the difference with its paired interval, and a verdict in words."""
    title = Text(f"{after.rows:,} rows\nbefore: {before.model}\nafter:  {after.model}", "table.title")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "before", "after", "difference (95% interval)", "verdict"):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    colours = {"better": "green", "worse": "red", "unclear": "dim"}
    for key in _shown(compared, table):
        line = compared[key]
        measure, change = line.measure, line.difference
        colour = colours[line.verdict]
        table.add_row(
            Text(clean(measure.title)),
            measure.shown(line.before),
            measure.shown(line.after),
            f"{measure.shown(change.value, '+')} ({_span(measure, change, '+')})",
            Text(line.verdict, colour),
        )
    return table


def _shown(found: Iterable[str], table: Table) -> list[str]:
    """The keys that a table has rows for: the largest sources only, the number of others in its caption."""
    keys = list(found)
    n_sources = sum(key.startswith(BY_SOURCE) for key in keys)
    if (more := n_sources - MOST_SOURCES) > 0:
        table.caption = f"the {MOST_SOURCES} largest sources; {more:,} more are in results.json (--out)"
        return keys[:-more]
    return keys


def examples_table(before: Results, after: Results | None, count: int) -> Table:
    """`count` rows at even distances through the file: never picked by how well they went."""
    n = len(before.samples)
    table = Table(title=f"{min(count, n)} rows, evenly spaced", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=1)
    table.add_column("answers", ratio=1)
    for i in (n * k // min(count, n) for k in range(min(count, n))):
        old = before.samples[i]
        answers = [("wanted", old.reference), ("before" if after else "answer", old.answer)]
        if after:
            answers.append(("after", after.samples[i].answer))
        text = Text("\n").join(
            Text.assemble((f"{name:>6}  ", "bold"), clean(_clip(answer, 4)) or "(nothing)") for name, answer in answers
        )
        table.add_row(Text(clean(_clip(old.prompt, 11))), text)
    return table


def save(directory: Path, settings: dict[str, Any], before: Results | None, after: Results) -> None:
    """Write results.json (settings, versions, measures) and samples.jsonl (a line a row) into `directory`.

    Numbers that are not finite are null there.

    A line of samples.jsonl: prompt, reference and answer with its scores; or, when two models were compared,
    prompt, reference, before, after and the scores of both.
    """
    resamples, seed = settings["resamples"], settings["seed"]
    measures: dict[str, Any] = {key: asdict(found) for key, found in after.intervals(resamples, seed).items()}
    if before is not None:
        now, measures = measures, {}
        for key, line in compare(before, after, resamples, seed).items():
            old = asdict(interval(before.ratios[key], resamples, seed))
            change = {"difference": asdict(line.difference), "verdict": line.verdict}
            measures[key] = {"before": old, "after": now[key], **change}
    for key, entry in measures.items():
        if (chance := measure_of(key).chance) is not None:
            entry["chance"] = chance
    found = {
        "versions": {"arriero": __version__, "python": platform.python_version()},
        "settings": settings,
        "rows": after.rows,
        "seconds": {name: round(r.seconds, 1) for name, r in (("before", before), ("after", after)) if r},
        "measures": measures,
    }
    write_json(directory / "results.json", found)
    if after.samples:
        lines = _compared_samples(before, after) if before else [asdict(sample) for sample in after.samples]
        write_jsonl(directory / "samples.jsonl", lines)


def _compared_samples(before: Results, after: Results) -> list[dict[str, Any]]:
    return [
        {
            "prompt": new.prompt,
            "reference": new.reference,
            "before": old.answer,
            "after": new.answer,
            "scores": {"before": old.scores, "after": new.scores},
        }
        for old, new in zip(before.samples, after.samples, strict=True)
    ]


def refuse_not_finite(before: Results | None, after: Results) -> None:
    """Raise `CheckpointError` where a model gave what is no number; the tables and files are there by then."""
    for results in (before, after):
        if results is not None and (bad := results.not_finite):
            n_bad = max(results.ratios[key].n_bad for key in bad)
            rows = f" (in {n_bad:,} of {len(results.ratios[bad[0]].over):,} rows or windows)" if n_bad else ""
            raise CheckpointError(
                f"{results.model}: {', '.join(MEASURES[key].name for key in bad)} not finite{rows}: what the model "
                "computes is no number, so nothing can be said of it; try --precision fp32, and if that gives none "
                "either, the weights are damaged or diverged: take an earlier checkpoint"
            )


def _span(measure: Measure, found: Interval, sign: str = "") -> str:
    if found.low is None or found.high is None:
        return "one row only" if math.isfinite(found.value) else "none"
    return f"{measure.shown(found.low, sign)} to {measure.shown(found.high, sign)}"


def _clip(text: str, lines: int) -> str:
    """The first lines of a text, with a mark where some were left out."""
    kept = split_lines(text.strip())
    if len(kept) <= lines + 1:  # a mark would take the line that it saves
        return "\n".join(kept)
    return "\n".join([*kept[:lines], f"... {len(kept) - lines} more lines"])
