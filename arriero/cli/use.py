"""Commands for an existing model: chat, generate, evaluate, convert, quantise, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arriero.errors import ConfigError, require
from arriero.eval.config import EvalConfig, NeedleConfig, ObedienceConfig, PassConfig
from arriero.infer.config import BenchConfig, ChatConfig, GenerateConfig
from arriero.io.paths import PathText
from arriero.serve.config import LoadConfig, ServeConfig
from arriero.show.terminal import say

if TYPE_CHECKING:
    from arriero.checkpoint.quantize import Quantization

NumberType = Literal["f32", "f16", "bf16"]
StoredType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


def chat(config: ChatConfig) -> None:
    """Talk with MODEL in the terminal; /help there lists what else can be said.

    Example:
        arriero chat smollm2-135m
        arriero chat smollm2-135m --adapter out/mine/adapter --system "Answer in one sentence." --temperature 0.2
    """
    from arriero.cli.chat import run_chat

    run_chat(config)


def generate(config: GenerateConfig) -> None:
    """Answer one prompt with MODEL, printing as it comes; without PROMPT it is read from standard input.

    Example:
        arriero generate smollm2-135m "Why do llamas hum?"
        arriero generate smollm2-135m --adapter out/mine/adapter --temperature 0.7 < question.txt
        arriero generate smollm2-135m "Ana is 43. Her data as JSON:" --json-schema person.json
        arriero generate smollm2-135m "Is a llama a camelid?" --choices yes no
    """
    from arriero.cli.chat import run_generate

    run_generate(config)


def serve(config: ServeConfig) -> None:
    """Serve MODEL, or several, behind the APIs of OpenAI, Anthropic and Ollama; needs pip install 'arriero[serve]'.

    Example:
        arriero serve smollm2-135m
        arriero serve smollm2-135m --adapter mine=out/mine/adapter --port 8000 --api-key SECRET
    """
    if not config.model:
        raise ConfigError("no model is given; name at least one, such as smollm2-135m")
    require("fastapi", "serve")
    require("uvicorn", "serve")
    require("prometheus_client", "serve")
    from arriero.serve.server import serve as run

    run(config)


def evaluate(config: EvalConfig) -> None:
    """Measure MODEL on a file: perplexity of texts, or answers against references, with intervals.

    Example:
        arriero eval smollm2-135m --data prose.txt
        arriero eval smollm2-135m --data test.jsonl --adapter out/mine/adapter --compare-with smollm2-135m
    """
    from arriero.eval.run import run_eval

    run_eval(config)


def needle(config: NeedleConfig) -> None:
    """Hide facts in long texts and ask MODEL for them, by length and depth: tables, a heat map, loss by position.

    Example:
        arriero eval needle smollm2-135m --lengths 1024 4096 16384 --out out/needle
        arriero eval needle out/long/model --compare-with out/base/model --haystack books.jsonl.gz --together
    """
    from arriero.eval.needle_run import run_needle

    run_needle(config)


def pass_at_k(config: PassConfig) -> None:
    """Ask MODEL prompts whose answers can be checked: rewards, pass@1 and pass@k, with intervals.

    Example:
        arriero data build tasks chain-sum out/sums
        arriero eval pass-at-k smollm2-135m --data out/sums/test.jsonl --reward numeric
        arriero eval pass-at-k smollm2-135m --data test.jsonl --adapter out/grpo/adapter --compare-with smollm2-135m
    """
    from arriero.eval.verified import run_verified

    run_verified(config)


def obedience(config: ObedienceConfig) -> None:
    """Hold MODEL to an instruction given in the first turn of dialogues: the share of answers that obey, by turn.

    Example:
        arriero eval obedience smollm2-135m --data dialogues.jsonl
        arriero eval obedience my-llama --data dialogues.jsonl --adapter out/gatt/adapter --compare-with my-llama
    """
    from arriero.eval.obedience import run_obedience

    run_obedience(config)


def bench_infer(config: BenchConfig) -> None:
    """Measure how fast this machine runs MODEL: prefill and sampled decoding at 1, 8 and 32 answers, by number type.

    Example:
        arriero bench infer smollm2-135m
        arriero bench infer out/mine/model --types bf16 int8 --batches 1 16 64 --plot speed.png
    """
    import torch

    from arriero.checkpoint.load import load_model
    from arriero.infer.measure import choice, figure, measure, table, turns
    from arriero.io.files import replaced_file
    from arriero.io.paths import as_path
    from arriero.show.progress import progress
    from arriero.show.terminal import output

    model = load_model(config.model, dtype=torch.bfloat16).requires_grad_(False)
    with progress(f"measuring {config.model}", turns(config)) as bar:
        speeds = measure(model, config, bar.advance)
    output().print(table(speeds, config))
    say(choice(speeds))
    if config.plot:
        path = as_path(config.plot)
        with replaced_file(path) as part:
            figure(speeds, config).savefig(part, format=path.suffix[1:])
        say(f"{config.plot} written")


def bench_serve(config: LoadConfig) -> None:
    """Load-test a server on this machine that speaks OpenAI's API: tokens/s and latencies, by clients at a time.

    Example:
        arriero bench serve --url http://127.0.0.1:8080 --clients 1 4 16 64 --plot load.png
    """
    from rich.live import Live

    from arriero.io.files import replaced_file
    from arriero.io.paths import as_path
    from arriero.serve.load import figure, run_load, table
    from arriero.show.terminal import notes, output, warn_once

    with Live(console=notes(), refresh_per_second=4, transient=True) as live:
        levels = run_load(config, lambda so_far: live.update(table(so_far)))
    output().print(table(levels))
    for level in levels:
        for why in sorted(set(level.lost)):
            warn_once(f"{level.clients} clients: {level.lost.count(why)} requests were lost: {why}")
    if config.plot:
        path = as_path(config.plot)
        with replaced_file(path) as part:
            figure(levels).savefig(part, format=path.suffix[1:])
        say(f"{config.plot} written")


def merge(
    model: PathText,
    adapter: Path,
    out: Path,
    *,
    dtype: NumberType | None = None,
    chat_template: PathText | None = None,
    original_base: bool = False,
    quantize: Literal["int8", "int4"] | None = None,
    force: bool = False,
) -> None:
    """Fold a LoRA adapter into its model, and check what was written against the files of both.

    Example:
        arriero merge smollm2-135m out/mine/adapter out/merged

    Args:
        model: The model that the adapter was trained on.
        adapter: Directory of the adapter.
        out: Directory for the merged model, in the Hugging Face layout.
        dtype: Type of the written weights; the model's own when not given.
        chat_template: A template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file;
            when not given, the one that the adapter was trained with.
        original_base: Fold an adapter of `sft --quantize` into the model's own weights, not into those that it was
            trained on, which the quantised base held.
        quantize: Write the matrices of the result in the nearest codes of this type; `arriero quantize --calibrate`
            rounds better.
        force: Overwrite what is there.
    """
    import torch

    from arriero.checkpoint.merge import merge as fold

    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    number, template = types[dtype] if dtype else None, chat_template or ""
    found = fold(
        model, adapter, out, dtype=number, chat_template=template, original_base=original_base,
        quantize=quantize or "", force=force,
    )  # fmt: skip
    held = "" if found.base is None else f" as {found.base} holds it, which the adapter was trained on"
    say(f"merged onto {model}{held}")
    if quantize:
        say(
            f"{out} written and read back: {found.n_tensors} tensors, the matrices of model plus adapter in "
            f"{quantize}, moved by the rounding by at most {found.largest_difference:.2g} of their norm"
        )
        return
    say(
        f"{out} written and read back: all {found.n_tensors} tensors are those of model plus adapter, the largest "
        f"difference by rounding {found.largest_difference:.2g} of a tensor's largest value"
    )


def average(
    models: tuple[PathText, ...],
    *,
    out: Path,
    weights: tuple[float, ...] = (),
    base: PathText | None = None,
    dtype: NumberType | None = None,
    force: bool = False,
) -> None:
    """Average the weights of models, or exactly what adapters of one model add, over several runs of a stage.

    Example:
        arriero average out/run-1/model out/run-2/model out/run-3/model --out out/averaged
        arriero average out/a/adapter out/b/adapter --weights 2 1 --out out/mixed

    Args:
        models: Directories (or GGUF files) of models of one shape, or of adapters of one model.
        out: Directory for the average.
        weights: A number above 0 for each, of which only the proportions count; all alike when not given.
        base: The model that adapters were trained on; when not given, the one that the first adapter names.
        dtype: Type of a written model; the first one's own when not given.
        force: Overwrite what is there.
    """
    import torch

    from arriero.checkpoint.average import average as mean

    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    mean(models, out, weights=weights, base=base or "", dtype=types[dtype] if dtype else None, force=force)
    say(f"{out} written: the average of {len(models)}")


def convert(
    src: PathText,
    dst: Path,
    *,
    to: Literal["hf", "meta", "gguf"],
    dtype: StoredType | None = None,
    chat_template: PathText | None = None,
    force: bool = False,
) -> None:
    """Write a model in another format, with its tokenizer and chat template.

    Example:
        arriero convert smollm2-135m out/smollm2 --to hf --dtype bf16
        arriero convert out/merged mine.gguf --to gguf --dtype q8_0

    Args:
        src: A directory, a .gguf file, a Hub id, or a built-in name.
        dst: The directory, or for gguf the file, to write.
        to: Hugging Face directory, Meta directory, or GGUF file.
        dtype: Number type of the weights; the stored one when not given (q8_0 and the other q are for gguf only).
        chat_template: A template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file;
            when not given, the model's own.
        force: Overwrite what is there.
    """
    from arriero.checkpoint.convert import convert as write

    say(f"{write(src, dst, to=to, dtype=dtype, chat_template=chat_template or '', force=force)} written")


def export(
    model: PathText,
    out: Path,
    *,
    to: Literal["transformers", "vllm", "llamacpp", "ollama"],
    adapter: PathText | None = None,
    dtype: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None,
    chat_template: PathText | None = None,
    prove: bool = True,
    force: bool = False,
) -> None:
    """Write a model for another program, and let that program prove that it answers there as it does here.

    Example:
        arriero export smollm2-135m out/for-ollama --to ollama --dtype q8_0
        arriero export smollm2-135m out/for-vllm --to vllm --adapter out/mine/adapter --dtype bf16

    Args:
        model: A directory, a .gguf file, a Hub id, or a built-in name.
        out: A directory.
        to: The program.
        adapter: Directory of a LoRA adapter to go with the model.
        dtype: Number type of the weights; the stored one when not given (q8_0 and q4_0 are for llamacpp and ollama).
        chat_template: A template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file;
            when not given, the adapter's, else the model's.
        prove: Load what was written in transformers (also for vllm) or llama.cpp (also for ollama), and compare prompt
            ids, answers and log-probabilities with the source's.
        force: Overwrite what is there.
    """
    from arriero.export.deliver import export as deliver
    from arriero.show.terminal import notes

    made = deliver(
        model, out, to=to, adapter=adapter, dtype=dtype, chat_template=chat_template or "", proven=prove, force=force,
        on_step=lambda what: notes().print(what, highlight=False),
    )  # fmt: skip
    if (proof := made.proof) is not None:
        say(
            f"{proof.program} confirms it: the ids of {proof.prompts} prompts and what ends an answer are the "
            f"source's, ln p of {proof.tokens:,} tokens within {proof.largest:.1e}, mean KL divergence {proof.kld:.1e}"
        )
        for tie in proof.ties:
            say(f"greedy texts part at a tie: {tie}")
    say(f"{made.out} written; use: {made.use}")


def quantize(
    model: PathText,
    out: Path,
    *,
    type: Literal["int8", "int4", "nf4"] = "int8",
    format: Literal["compressed-tensors", "gguf"] = "compressed-tensors",
    calibrate: PathText | None = None,
    recover: PathText | None = None,
    budget_mb: float | None = None,
    keep_head: bool = False,
    validation: PathText | None = None,
    chat_template: PathText | None = None,
    force: bool = False,
) -> None:
    """Write MODEL with its matrices in 8 or 4 bits, so that a token is decoded with fewer bytes read.

    The result is opened by Arriero's other commands and, but for nf4, by transformers and vLLM (compressed-tensors) or
    llama.cpp (gguf).

    Example:
        arriero quantize smollm2-135m out/int8 --type int8
        arriero quantize smollm2-135m out/int4 --type int4 --calibrate prose.txt --validation other.txt
        arriero quantize my-llama out/int4 --type int4 --calibrate rows.jsonl --recover rows.jsonl
        arriero chat out/int4

    Args:
        model: A directory, a .gguf file, a Hub id, or a built-in name.
        out: Directory for the quantised model.
        type: int8 has a scale for each output; int4 for each 32 inputs; nf4 for each 64, and is read by Arriero only.
        format: A directory as compressed-tensors lays it out, or one GGUF file (Q8_0 or Q4_0).
        calibrate: Texts for which the error of the outputs is made small: a .txt file, or rows with texts or
            conversations; "default" is Python's reference manual. When not given, each weight is rounded to its nearest
            code.
        recover: Texts, as for --calibrate, on which scales and norms are then trained to give MODEL's probabilities
            again.
        budget_mb: With int4, megabytes of weights that a token may read: what suffers most is held in int8 as far as
            that goes.
        keep_head: Leave the head, which makes the logits, at 16 bits.
        validation: Texts (.txt, or rows with texts) on which the result is compared with MODEL: perplexity, bits per
            byte, divergence of the next token's probabilities.
        chat_template: A template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file;
            when not given, the model's own.
        force: Overwrite what is there.
    """
    from arriero.checkpoint.quantize import quantize as write
    from arriero.eval.divergence import compare, divergence_table, read_texts
    from arriero.show.terminal import output

    if recover is not None and type == "nf4":
        raise ConfigError("--recover trains the scales of int8 and int4; take --type int4, or leave --recover out")
    if validation is not None:
        read_texts(validation)  # a bad file is refused before anything is written
    found = write(
        model, out, type=type, format=format, calibrate=calibrate, budget_mb=budget_mb, keep_head=keep_head,
        chat_template=chat_template or "", force=force,
    )  # fmt: skip
    _say_quantized(found)
    if recover is not None:
        _recover(model, out, recover)
    if validation is not None:
        output().print(divergence_table(compare(model, out, read_texts(validation)), str(validation)))


def _say_quantized(found: Quantization) -> None:
    """Errors, sizes, and where it lies."""
    from arriero.checkpoint.quantize_report import errors_table
    from arriero.show.terminal import output

    if found.untied:
        say("the head was the embeddings, which stay at 16 bits; it is a matrix of its own now")
    output().print(errors_table(found.matrices))
    (before, after), (read_before, read_after) = found.size, found.per_token
    say(
        f"weights {before / 1e6:,.1f} MB at 16 bits -> {after / 1e6:,.1f} MB; a token reads "
        f"{read_before / 1e6:,.1f} MB -> {read_after / 1e6:,.1f} MB"
    )
    say(f"{found.out} written and read back")


def _recover(model: PathText, out: Path, data: PathText) -> None:
    """Train scales and norms of what was written at `out`, and say what that gained."""
    from arriero.train.recover import recover

    gained = recover(model, out, data)
    say(
        f"scales and norms trained on {gained.rows:,} rows of {data}; KL divergence on {gained.held_out:,} held out: "
        f"{gained.before:.4f} -> {gained.after:.4f} nats a token"
    )
