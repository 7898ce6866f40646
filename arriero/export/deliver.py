"""Writes a model for another program, and proves that it answers there as it does here.

    transformers, vllm    a Hugging Face directory; an adapter in adapter/, as PEFT has it
    llamacpp              model.gguf; an adapter in adapter.gguf
    ollama                the same, and a Modelfile

Each file is compared with its source, tensor by tensor, by independent readers (checkpoint/verify.py); then the other
program loads what was written, and its ids, answers and log-probabilities are compared (prove.py): transformers for
the first two, llama.cpp for the others. vLLM and Ollama themselves are not run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arriero.checkpoint.adapter import linears_of, read_adapter
from arriero.checkpoint.beside import read_beside, sampling_of
from arriero.checkpoint.convert import check_destination, convert
from arriero.checkpoint.load import load_tokenizer_at, open_weights
from arriero.checkpoint.source import resolve
from arriero.errors import CheckpointError
from arriero.export.lora_gguf import write_lora
from arriero.export.modelfile import around, modelfile
from arriero.export.prove import CONVERSATIONS, Program, Proof, missing, ours, prove
from arriero.io.files import replaced_file
from arriero.io.paths import as_path
from arriero.model.build import empty_model

Target = Literal["transformers", "vllm", "llamacpp", "ollama"]
JUDGE: dict[Target, Program] = {
    "transformers": "transformers",
    "vllm": "transformers",
    "llamacpp": "llamacpp",
    "ollama": "llamacpp",
}
PACKAGE = {"transformers": "transformers peft", "llamacpp": "llama-cpp-python"}


@dataclass(frozen=True)
class Delivered:
    """Where it lies, what was proven, and how it is used."""

    out: Path
    proof: Proof | None
    use: str


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: Target,
    adapter: str | Path | None = None,
    dtype: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None,
    chat_template: str = "",
    proven: bool = True,
    force: bool = False,
    on_step: Callable[[str], None] = lambda what: None,
) -> Delivered:
    """Write `model` (and an adapter) for a program into the directory `out`, and prove it.

    dtype: as in `convert`. proven: whether the other program has to load and confirm it. force: write over what `out`
    holds, files of other names excepted.
    Raises `CheckpointError` where `out` holds anything (unless `force`), or for the first thing in which the other
    program differs; what was written is left then.
    """
    source, out = resolve(model), as_path(out)
    program = JUDGE[to]
    if proven and (lacking := missing(program)):
        raise CheckpointError(
            f"the proof needs the package {lacking!r}, which is not installed: pip install "
            f"{PACKAGE[program]}; or write without a proof: --no-prove"
        )
    check_destination(source, out, force)
    if out.is_file():
        raise CheckpointError(f"{out}: is a file, and what is written is a directory; name another")
    if dtype in ("q8_0", "q4_0") and program == "transformers":
        raise CheckpointError(f"dtype {dtype} is GGUF's; for {to} write bf16, or use arriero quantize")
    directory = None if adapter is None else resolve(adapter)
    if directory is not None and (there := adapter_file(out, to)).exists() and there.samefile(directory):
        raise CheckpointError(f"{there}: the adapter lies where it would be written; name another directory")
    template = chat_template or (_template_beside(directory) if directory else "")
    on_step("writing")
    path = _write(source, out, to, directory, dtype, template, force)
    proof = None
    if proven:
        on_step("asking Arriero")
        expected = ours(source, directory, chat_template)
        on_step(f"asking {program}")
        kind = dtype or {"torch.float32": "f32"}.get(str(open_weights(path).dtype), "other")
        proof = prove(program, path, adapter_file(out, to) if directory else None, expected, kind, directory)
    return Delivered(out, proof, _use(out, to, directory is not None))


def _template_beside(adapter: Path) -> str:
    """The file of the chat template that an adapter was trained with, or ""."""
    file = adapter / "chat_template.jinja"
    return str(file) if file.is_file() else ""


def adapter_file(out: Path, to: Target) -> Path:
    """Where an adapter is written."""
    return out / ("adapter" if JUDGE[to] == "transformers" else "adapter.gguf")


def _write(
    source: Path, out: Path, to: Target, adapter: Path | None, dtype: str | None, chat_template: str, force: bool
) -> Path:
    """Write all files; returns what the program opens."""
    if (stale := adapter_file(out, to)).exists():  # of what was exported before; it must not go with another model
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    if JUDGE[to] == "transformers":
        convert(source, out, to="hf", dtype=dtype, chat_template=chat_template, force=force)  # type: ignore[arg-type]
        if adapter is not None:
            shutil.copytree(adapter, out / "adapter")
        return out
    tokenizer = load_tokenizer_at(source, adapter=adapter, chat_template=chat_template)
    found = around(tokenizer, CONVERSATIONS) if to == "ollama" else None
    out.mkdir(parents=True, exist_ok=True)
    file = out / "model.gguf"
    path = convert(source, file, to="gguf", dtype=dtype, chat_template=chat_template, force=force)  # type: ignore[arg-type]
    if adapter is not None:
        config = open_weights(source).config
        lora, tensors = read_adapter(linears_of(empty_model(config)), adapter)
        write_lora(adapter_file(out, to), config, lora, tensors)
    if found is not None:
        sampling = sampling_of(read_beside(source, warn=False).generation)
        text = modelfile(found, tokenizer, sampling, "adapter.gguf" if adapter else None)
        with replaced_file(out / "Modelfile") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def _use(out: Path, to: Target, adapted: bool) -> str:
    """The command line that starts it there."""
    if to == "vllm":
        return f"vllm serve {out}" + (f" --enable-lora --lora-modules tuned={out}/adapter" if adapted else "")
    if to == "llamacpp":
        return f"llama-server -m {out}/model.gguf" + (f" --lora {out}/adapter.gguf" if adapted else "")
    if to == "ollama":
        return f"ollama create {out.name} -f {out}/Modelfile"
    return f"AutoModelForCausalLM.from_pretrained({str(out)!r})" + (
        f", then PeftModel with {out}/adapter" if adapted else ""
    )
