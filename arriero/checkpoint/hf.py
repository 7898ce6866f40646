"""The Hugging Face layout: config.json, generation_config.json and safetensors, in one file or in shards.

This is what Arriero writes everywhere; transformers, vLLM, PEFT and llama.cpp's converter open it as it is.
Tensors are read and written one at a time (tensor_file.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arriero.checkpoint.beside import NOTHING, Beside
from arriero.checkpoint.compressed import (
    CONFIG,
    INTEGERS,
    Packed,
    open_compressed,
    quantization_config,
    quantization_of,
    stored_entries,
    stored_tensor,
)
from arriero.checkpoint.files import replaced_directory
from arriero.checkpoint.tensor_file import FLOATS, Entry, Reader, safetensors_entries, tensor_reader, write_safetensors
from arriero.checkpoint.weights import Weights, check_sizes, from_model, opened
from arriero.errors import CheckpointError
from arriero.io.files import write_json
from arriero.io.paths import as_path
from arriero.io.reading import read_json, reading
from arriero.model.build import tensor_shapes
from arriero.model.config import LlamaConfig
from arriero.model.llama import HeadKind, Llama
from arriero.quant.packed import Quantized
from arriero.show.terminal import warn_once

if TYPE_CHECKING:
    from arriero.tokenizer.base import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LINEAR_ENDS = ("_proj.weight", "lm_head.weight")
ALL_WEIGHTS = "model*.safetensors*"
CLASSIFIER = "ForSequenceClassification"


def read_config(directory: Path) -> LlamaConfig:
    """The shape of the model in a Hugging Face directory; raises `CheckpointError` for what is not read."""
    return _config_and_method(directory)[0]


def _config_and_method(directory: Path) -> tuple[LlamaConfig, str]:
    """The shape, and the method by which weights are quantised ("" for none)."""
    file = directory / "config.json"
    config = read_json(file)
    method = quantization_of(config, str(file))
    return LlamaConfig.from_hf(config, str(file)), method


def read_head(directory: Path) -> HeadKind:
    """The kind of the model's head, by config.json: logits, or one score (a model for sequence classification)."""
    file = directory / "config.json"
    config = read_json(file)
    named = config.get("architectures")
    if not isinstance(named, list) or not any(str(name).endswith(CLASSIFIER) for name in named):
        return "logits"
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))
    if labels != 1:
        raise CheckpointError(f"{file}: a classifier of {labels} labels; read are those of one, which score a text")
    return "score"


def open_hf(directory: Path) -> Weights:
    """Open a Hugging Face directory; tensors are read when asked for.

    Raises `CheckpointError` for a missing or damaged file and for tensors that do not fit config.json.
    """
    config, method = _config_and_method(directory)
    readers: dict[str, Reader] = {}
    entries: dict[str, Entry] = {}
    holders: dict[str, Path] = {}
    for file, named in _weight_files(directory).items():
        found = safetensors_entries(file, (*FLOATS, *INTEGERS) if method else FLOATS)
        if lacking := sorted(named - found.keys()):
            raise CheckpointError(
                f"{file}: {lacking[0]} is not in it, though {INDEX} says so; copy or download both again"
            )
        if twice := sorted(found.keys() & entries.keys()):
            raise CheckpointError(
                f"{file}: {twice[0]} is in it and in {holders[twice[0]].name} too; copy or download the model again"
            )
        entries |= found
        holders |= dict.fromkeys(found, file)
        readers |= dict.fromkeys(found, tensor_reader(file))
    if any(name.startswith("layers.") for name in entries):
        raise CheckpointError(
            f'{directory}: its tensors are named without "model.", as AutoModel saves a model without its head; save '
            "it from AutoModelForCausalLM"
        )
    packed: Packed = _nothing_packed
    if method:
        entries, packed = open_compressed(directory, method, entries, readers)
    check_sizes(directory, config, {name: entry.shape for name, entry in entries.items()}, "model.layers.")

    def read(name: str, start: int = 0, stop: int | None = None) -> Tensor:
        matrix = packed(name, start, stop)
        return readers[name](name, start, stop) if matrix is None else matrix.dense()

    return opened(directory, config, entries, read, read, read_head(directory), lambda name: packed(name, 0, None))


def _nothing_packed(name: str, start: int, stop: int | None) -> Quantized | None:
    """Every tensor is dense."""
    return None


def _weight_files(directory: Path) -> dict[Path, set[str]]:
    """The files of the weights, each with the tensors that the index lists for it; chosen as transformers does.

    model.safetensors takes precedence over an index, which is warned of if it lists other files or none.
    """
    index = directory / INDEX
    if (directory / WEIGHTS).is_file():
        if index.is_file() and not _tells_of(index, WEIGHTS):
            warn_once(
                f"{index}: tells of other files than {WEIGHTS}, which lies beside it and is used, as in transformers"
            )
        return {directory / WEIGHTS: set()}
    if index.is_file():
        places: dict[Path, set[str]] = {}
        for tensor, name in sorted(_weight_map(index).items(), key=lambda item: item[1]):
            places.setdefault(_within(index, name), set()).add(tensor)
        return places
    if any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{directory}: the weights are pickled (pytorch_model.bin); that may run code when opened, so it is not "
            "read: ask for the model's safetensors version"
        )
    raise CheckpointError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there")


def _tells_of(index: Path, name: str) -> bool:
    """Whether an index lists tensors of one file, of this name."""
    try:
        return set(_weight_map(index).values()) == {name}
    except CheckpointError:
        return False


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: no 'weight_map' of file names; copy or download it again")
    return places


def _within(index: Path, name: str) -> Path:
    """The file beside the index that it names; raises CheckpointError for one that lies elsewhere.

    Links into the Hub's cache are allowed, which has a snapshot's files in `models--*/blobs`.
    """
    directory, parts = index.parent.resolve(), name.replace("\\", "/").split("/")
    allowed = [directory]
    if directory.parent.name == "snapshots":
        allowed.append(directory.parents[1] / "blobs")
    if "" in parts or ".." in parts or ":" in parts[0] or "\0" in name or name != name.strip():
        raise CheckpointError(f"{index}: names the file {name!r}; only files beside it are read: copy them there")
    with reading(index, f"names the file {name!r:.60}, which the system cannot have"):
        file = (index.parent / name).resolve()
        file.is_file()  # raises what opening it would
    if not any(file.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{index.parent / name}: a link to {file}, out of the model's directory; copy the file itself there"
        )
    return index.parent / name


def write_hf(
    weights: Weights,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: Tokenizer | None = None,
    beside: Beside = NOTHING,
    kinds: Mapping[str, str] = {},
    progress: Callable[[str], None] = lambda name: None,
    check: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write weights as a Hugging Face directory, all or nothing.

    dtype: None keeps the stored type. beside: what else the model's source holds (`read_beside`). kinds: matrices that
    are written in codes of a kind, which `weights.packed` gives (see compressed.py). progress(name) is called before
    each tensor is written, check(directory) on the complete files before they are put in place.
    """
    dtype = dtype or weights.dtype
    linears = {name: name.removesuffix(".weight") for name in kinds}
    entries: dict[str, Entry] = {}
    for name, entry in weights.entries.items():
        quantized = name in kinds and stored_entries(linears[name], entry.shape, kinds[name], dtype)
        entries |= quantized or {name: Entry(entry.shape, dtype)}
    shards = _shards(entries, max_shard_bytes)
    read = _stored_reader(weights, linears, progress)

    with replaced_directory(directory, replaces=ALL_WEIGHTS) as temporary:
        for file, names in shards.items():
            write_safetensors(temporary / file, {name: entries[name] for name in names}, read)
        if len(shards) > 1:
            total = sum(prod(entry.shape) * entry.dtype.itemsize for entry in entries.values())
            where = {name: file for file, names in shards.items() for name in names}
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        stated = {linears[name]: kind for name, kind in kinds.items()}
        _write_sidecars(temporary, weights.config, dtype, tokenizer, beside, weights.head, stated)
        check(temporary)


def _stored_reader(
    weights: Weights, linears: Mapping[str, str], progress: Callable[[str], None]
) -> Callable[[str], Tensor]:
    """Reads the tensors of a file in order; those of one quantised matrix follow each other, so one is kept."""
    kept: dict[str, Quantized] = {}
    matrices = {linear: name for name, linear in linears.items()}

    def read(name: str) -> Tensor:
        linear, _, suffix = name.rpartition(".")
        if linear not in matrices:
            progress(name)
            return weights.read(name)
        if linear not in kept:
            progress(matrices[linear])
            matrix = weights.packed(matrices[linear])
            assert matrix is not None, linear
            kept.clear()
            kept[linear] = matrix
        return stored_tensor(kept[linear], suffix)

    return read


def save_hf(
    model: Llama,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    beside: Beside = NOTHING,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a model, and its tokenizer when given, as a Hugging Face directory.

    dtype None keeps the type the model is in. Files appear only when all of them are complete. The model must carry
    no adapter: merge it first, or save the adapter alone (checkpoint/adapter.py).
    """
    write_hf(
        from_model(model),
        as_path(directory),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
        beside=beside,
        progress=progress,
    )


def sidecar_writer(
    config: LlamaConfig, tokenizer: Tokenizer, beside: Beside = NOTHING, head: HeadKind = "logits"
) -> Callable[[Path], None]:
    """A function that writes the files beside fp32 weights in Hugging Face's layout: config and tokenizer."""
    return lambda directory: _write_sidecars(directory, config, torch.float32, tokenizer, beside, head)


def _write_sidecars(
    directory: Path,
    config: LlamaConfig,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    beside: Beside,
    head: HeadKind = "logits",
    kinds: Mapping[str, str] = {},
) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and what goes along.

    kinds: the linears whose weights are quantised, and how.
    """
    if tokenizer is not None:
        tokenizer.save(directory)
    shape = config.to_hf(str(dtype).removeprefix("torch."))
    if head != "logits":
        assert head == "score", "no Hugging Face class has a head of values"
        shape["architectures"] = [name.replace("ForCausalLM", CLASSIFIER) for name in shape["architectures"]]
        shape |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    if kinds:
        linears = {name.removesuffix(".weight") for name in tensor_shapes(config, head) if name.endswith(LINEAR_ENDS)}
        shape[CONFIG] = quantization_config(kinds, linears | {"lm_head"})  # named even where it is the embeddings
    beside.write(directory, tokenizer, shape)


def _shards(entries: Mapping[str, Entry], max_bytes: int) -> dict[str, list[str]]:
    """Names by shard file, in order, each shard at most `max_bytes` (a larger tensor has a shard of its own)."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, entry in entries.items():
        size = prod(entry.shape) * entry.dtype.itemsize
        if groups[-1] and used + size > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}
