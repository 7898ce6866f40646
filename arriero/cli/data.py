"""Commands that prepare data: curation, shards, and fine-tuning data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from arriero import presets, settings
from arriero.cli.tokenizer import open_tokenizer
from arriero.errors import ConfigError
from arriero.io.paths import PathText
from arriero.io.reading import parse_json
from arriero.show.terminal import notes, output, say


def curate(
    sources: tuple[PathText, ...],
    *,
    out: PathText | None = None,
    preset: PathText = "curate-prose",
    steps: tuple[str, ...] | None = None,
    set: tuple[str, ...] = (),
    text_key: str | None = None,
    on_error: Literal["stop", "skip"] | None = None,
    format: Literal["parquet", "jsonl.zst"] | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> None:
    """Clean raw documents by published rules, deduplicate and decontaminate them, with a report to judge the rules by.

    A run that was stopped goes on where it was; the result is the same for any number of workers.

    Example:
        arriero curate stdlib prose.jsonl.gz --out out/corpus
        arriero curate crawl/ --preset curate-web --out out/web --set language.keep=en,de gopher_quality.min_words=30
        arriero cp curate-web mine.toml && arriero curate pages.warc.gz --preset mine.toml --out out/mine

    Args:
        sources: Files (text, .html, .warc.gz, .jsonl.zst, .parquet, code), directories, "stdlib", Hub data set ids.
        out: Directory for the shards, manifest.json and report.html.
        preset: A preset's name (arriero ls presets), or a file written by `arriero cp`.
        steps: Names of the steps (arriero ls steps), in order, in place of the preset's.
        set: Other settings, as NAME=VALUE; `arriero cp curate-web FILE` writes all of them, explained.
        text_key: Column of the text in JSONL and Parquet.
        on_error: Stop at a row that cannot be read, or skip and count it.
        format: Format of the shards.
        workers: Processes; 0 means one per core.
        ray: Address of a Ray cluster that shares the file system, or "local".
    """
    from arriero.curate.config import KINDS, CurateConfig
    from arriero.curate.engine import curate as start
    from arriero.curate.report import funnel_table

    _, config = presets.load(preset)
    if not isinstance(config, CurateConfig):
        raise ConfigError(f"{preset} is no preset of curation; `arriero ls presets` lists them")
    given = dict(
        sources=sources or None, out=out, steps=steps, text_key=text_key, on_error=on_error, format=format,
        workers=workers, ray=ray,
    )  # fmt: skip
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for assignment in set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write NAME=VALUE, such as language.keep=en,de")
        changes[name] = value
    changed = settings.apply_overrides(config, changes)
    for step in KINDS:
        table = step.replace("-", "_")
        if step not in changed.steps and getattr(changed, table, None) != getattr(config, table, None):
            raise ConfigError(f"{table} was set, but steps has no {step!r}; name it in --steps, or leave that out")
    console = notes()
    manifest = start(changed, console)
    console.print(funnel_table(manifest))
    written = changes.get("out", config.out)
    say(f"{written} written: {manifest['documents']:,} documents; look at {Path(written) / 'report.html'}")


def curate_classifier(
    good: tuple[PathText, ...],
    *,
    against: tuple[PathText, ...],
    out: PathText,
    epochs: int = 5,
    held_out: float = 0.1,
    seed: int = 0,
    text_key: str = "text",
) -> None:
    """Train a quality classifier, good examples against random ones, for the step "quality" of curation.

    Example:
        arriero curate classifier wikipedia.jsonl.zst --against crawl/ --out out/good.safetensors
        arriero curate crawl/ --out out/web --steps normalise language quality --set quality.model=out/good.safetensors

    Args:
        good: Files, directories or data sets of documents as they ought to be.
        against: The same, of random documents from what is to be filtered.
        out: File for the classifier.
        epochs: Passes over the documents.
        held_out: Share of the documents to measure it on.
        seed: Decides which documents are held out, and the order of training.
        text_key: Column of the text in JSONL and Parquet.
    """
    from arriero.curate.classifier import train

    report = train(good, against, out, epochs=epochs, held_out=held_out, seed=seed, text_key=text_key).report
    n_good, n_random = report["held_out"]["good"], report["held_out"]["random"]
    low, high = report["accuracy_interval_95"]
    say(
        f"{out} written; on {n_good:,} good and {n_random:,} random documents held out: balanced accuracy "
        f"{report['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%}, chance 50%), area under the curve "
        f"{report['auc']:.3f} (chance 0.5)"
    )


def shard(
    sources: list[PathText],
    *,
    tokenizer: PathText,
    out: Path,
    text_key: str = "text",
    validation: PathText = "0.01",
    by_source: bool = False,
    workers: int = 0,
) -> None:
    """Tokenise documents into shards that pretraining reads; a run that was stopped goes on where it was.

    Example:
        arriero shard documents/ --tokenizer out/tokenizer --out out/shards
        arriero shard web.jsonl.zst books/ stdlib --tokenizer my-llama --out out/shards --by-source

    Args:
        sources: Files, directories, Hub data sets, or "stdlib"; what `arriero curate` wrote, or any documents.
        tokenizer: A model's directory or name, or a tokenizer.json, tokenizer.model or .gguf file.
        out: Directory for the shards: train, validation, and the tokenizer.
        text_key: Column that holds the text, in files of rows.
        validation: Share of the documents to hold out, or a source of held-out documents.
        by_source: Keep sources apart, so that they can be weighted.
        workers: Encoding processes; 0 means one per core.
    """
    from arriero.data.sharding import shard_sources, summary_table

    sets = shard_sources(
        sources,
        open_tokenizer(tokenizer),
        out,
        text_key=text_key,
        validation=validation,
        by_source=by_source,
        workers=workers,
    )
    output().print(summary_table(sets))


def inspect(
    file: PathText,
    *,
    model: PathText,
    chat_template: PathText | None = None,
    rows: int = 3,
    first: int = 0,
    seq_len: int = 2048,
    workers: int = 0,
) -> None:
    """Print rows as the model sees them, the trained tokens coloured, and the lengths and masks of all in numbers.

    Example:
        arriero data inspect train.jsonl --model smollm2-135m
        arriero data inspect rows.parquet --model my-llama --first 1000 --rows 1

    Args:
        file: A file (JSONL, JSON, CSV, Parquet), a directory of them, or a Hub data set id.
        model: The model whose tokenizer and chat template are applied.
        chat_template: A template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file;
            when not given, the model's own.
        rows: Rows to print.
        first: Number of the first row to print, counted from 0.
        seq_len: Tokens in a packed row; longer examples are counted.
        workers: Tokenising processes; 0 means one per core.
    """
    from arriero.checkpoint.source import resolve
    from arriero.data.inspect import inspect as show
    from arriero.tokenizer import load_tokenizer
    from arriero.tokenizer.named_templates import named_template

    tokenizer = load_tokenizer(resolve(model))
    if chat_template:
        tokenizer.chat_template = named_template(chat_template, tokenizer)
    show(file, tokenizer, rows, seq_len=seq_len, first=first, workers=workers)


def verify(directory: Path) -> None:
    """Read token shards whole, as after a copy: every file against the SHA-256 in its manifest, and the tokenizer.

    Example:
        arriero data verify out/shards

    Args:
        directory: What `arriero shard` wrote, or one of the sets in it.
    """
    from arriero.data.shards import find_sets, verify_tokenizer
    from arriero.show.progress import progress

    sets = find_sets(directory)
    with progress("reading", sum(shards.size for shards in sets)) as bar:
        for shards in sets:
            shards.verify(progress=bar.advance)
    verify_tokenizer(sets)
    for shards in sets:
        say(f"{shards.directory}: {shards.n_documents:,} documents, {shards.n_tokens:,} tokens, as they were written")


def build_docstrings(
    out: Path,
    source: PathText = "stdlib",
    seed: int = 0,
    held_out: float = 0.05,
    max_pairs: int | None = None,
    max_lines: int = 40,
) -> None:
    """Make fine-tuning data from Python code: a function -> its docstring's first sentence, split by module.

    Example:
        arriero data build docstrings out/data
        arriero data build docstrings out/data --source ~/src/mine

    Args:
        out: Directory for train.jsonl, validation.jsonl, test.jsonl and stats.json.
        source: "stdlib", a directory of Python code, or one Python file.
        seed: Decides which modules are held out.
        held_out: Share of the pairs, at most, for each of validation and test.
        max_pairs: Training pairs at most; all when not given.
        max_lines: Longest function, in lines without its docstring.
    """
    from arriero.data.docstrings import build_docstrings as build

    build(source, out, seed=seed, held_out=held_out, max_pairs=max_pairs, max_lines=max_lines)


def build_preferences(run: Path, out: Path, per_prompt: int = 1, seed: int = 0) -> None:
    """Make preference rows of the scored answers that a run of rejection, grpo or ppo left: a best and a worst one.

    Example:
        arriero rejection smollm2-135m --data out/sums/train.jsonl --reward numeric --out out/best
        arriero data build preferences out/best out/pairs.jsonl
        arriero dpo smollm2-135m --data out/pairs.jsonl

    Args:
        run: The run's directory.
        out: File for the rows.
        per_prompt: Rows for each prompt, at most: best and worst, next best and next worst, and so on.
        seed: Decides among answers of equal reward.
    """
    from arriero.train.run_preferences import preferences_of_run as build

    counts = build(run, out, per_prompt=per_prompt, seed=seed)
    say(
        f"{out}: {counts.rows:,} rows; {counts.alike:,} prompts had no two finished answers of different reward, "
        f"{counts.unanswered:,} were not answered"
    )


def build_tasks(
    task: str,
    out: Path,
    size: int = 2,
    digits: int = 1,
    train: int = 2000,
    held_out: int = 500,
    seed: int = 0,
    set: tuple[str, ...] = (),
) -> None:
    """Make prompts with answers that can be checked exactly, and held-out ones that differ by text.

    Tasks: chain-sum, number-sorting, letter-counting, leg-counting, the game guess-number (for --environment), and
    reasoning-gym's as reasoning-gym:NAME.

    Example:
        arriero data build tasks chain-sum out/sums --size 2 --digits 2
        arriero data build tasks reasoning-gym:leg_counting out/legs --set max_animals=3

    Args:
        task: Name of the task.
        out: Directory for train.jsonl, test.jsonl and stats.json.
        size: Terms of a sum, numbers to sort, words to count in, kinds of animals, or guesses.
        digits: Digits of each number.
        train: Questions to train on.
        held_out: Questions to test on.
        seed: Decides which questions are drawn.
        set: Settings of reasoning-gym's task, as NAME=VALUE.
    """
    from arriero.data.tasks import Hardness, build_tasks

    settings: dict[str, Any] = {}
    for assignment in set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write NAME=VALUE, such as max_animals=3")
        settings[name] = parse_json(
            value, f"--set {name}", "write a number, true, false or a text in quotes", ConfigError
        )
    stats = build_tasks(
        task, out, train=train, held_out=held_out, seed=seed, hard=Hardness(size, digits), settings=settings
    )
    say(
        f"{out} written: {stats['train']:,} questions to train on and {stats['held_out']:,} held out, "
        f"{stats['overlap']} of them in both; {stats['repeated']:,} drawn again were dropped"
    )


def why(file: Path, row: int) -> None:
    """Say where a row that a run made comes from: prompt, round or step, weights, checkpoint, and what scored it.

    Example:
        arriero data why out/grpo/rollouts/step-00000012-0.jsonl 3
        arriero data why out/rejection/round-2/chosen.jsonl 17

    Args:
        file: A file of RUN/rollouts/, or RUN/round-N/chosen.jsonl.
        row: Its row, from 1.
    """
    from arriero.train.why import why as found

    for name, value in found(file, row):
        say(f"{name:<11} {value}")
