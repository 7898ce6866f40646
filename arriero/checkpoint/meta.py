"""Meta's layout: params.json and consolidated.NN.pth, one file for each model-parallel rank.

The .pth files are pickles, so they are opened only with weights_only=True, which runs no code, and mapped, so that a
tensor is read when asked for. Shards are joined as Meta splits them: wq wk wv w1 w3 and the head by output rows,
wo and w2 by input columns, embeddings by columns (Llama 1 and 2) or rows (Llama 3); norms are in every shard.
Meta rotates adjacent pairs, so q and k are reordered.

params.json says less than config.json. FFN width and vocabulary are read from the tensors. The context length is not
in it at all: it is that of the Llama generation (see `_context`), unless Arriero wrote it there. The factor of scaled
RoPE is the published one of that size (8 for 3.1, 32 for 3.2's 1B and 3B), else 8.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arriero.checkpoint.beside import NOTHING, Beside
from arriero.checkpoint.files import replaced_directory
from arriero.checkpoint.tensor_file import DTYPES, FLOATS, Entry, cast
from arriero.checkpoint.weights import Weights, check_sizes, opened, rotary_heads, to_halves, to_pairs
from arriero.errors import CheckpointError
from arriero.io.fields import Fields, shown
from arriero.io.files import write_json
from arriero.io.reading import read_json, reading
from arriero.model.catalogue import PUBLISHED
from arriero.model.config import LlamaConfig
from arriero.model.llama import EMBEDDINGS, HEAD
from arriero.model.scaling import Llama3Scaling
from arriero.show.terminal import warn_once

if TYPE_CHECKING:
    from arriero.tokenizer.base import Tokenizer

_BLOCK_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
_TOP_NAMES = {EMBEDDINGS: "tok_embeddings.weight", "model.norm.weight": "norm.weight", HEAD: "output.weight"}
# (ffn_dim_multiplier, multiple_of) of the published sizes
_FFN_RULES = ((None, 256), (1.3, 1024), (1.3, 4096), (1.2, 4096), (1.5, 256), (1.0, 256))

# Entries of params.json: what is read, or follows from the tensors; and what changes the arithmetic.
_READ = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
         "rope_theta", "use_scaled_rope", "rope_scale_factor", "max_context", "max_seq_len", "max_batch_size",
         "model_parallel_size")  # fmt: skip
_REFUSED = ("quantization_args", "lora_args", "moe_args", "moe", "use_qk_norm", "nope_layer_interval",
            "attention_chunk_size", "rope_scaling_factor", "rope_high_freq_factor", "vision_args")  # fmt: skip

Shards = list[dict[str, Tensor]]


def open_meta(directory: Path) -> Weights:
    """Open a Meta directory; shards are mapped, and joined tensor by tensor when asked for.

    Raises `CheckpointError` for missing, damaged or code-carrying files and for tensors that do not fit params.json.
    """
    files = sorted(directory.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"{directory}: params.json is there, but no consolidated.*.pth")
    shards = [_open_pickle(file) for file in files]
    config = _config(directory, read_json(directory / "params.json"), shards)
    names = tensor_names(config)
    hf_names = {meta: hf for hf, meta in names.items()}
    entries = {}
    for name, tensor in shards[0].items():
        if name != "rope.freqs" and not (name == names[HEAD] and config.tied_embeddings):
            joined = _join(name, shards, config, meta_only=True)
            entries[hf_names.get(name, name)] = Entry(tuple(joined.shape), tensor.dtype)

    def read(name: str) -> Tensor:
        joined = _join(names[name], shards, config)
        heads = rotary_heads(name, config)
        return to_halves(joined, heads) if heads else joined.clone() if len(shards) == 1 else joined

    return opened(directory, config, entries, read)


def write_meta(
    weights: Weights,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    beside: Beside = NOTHING,
    progress: Callable[[str], None] = lambda name: None,
    check: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write weights as params.json and consolidated.00.pth, all or nothing. The whole model is held in memory.

    beside, progress, check: as in `write_hf`; generation_config.json, Hugging Face's, is written too.
    """
    config, dtype = weights.config, dtype or weights.dtype
    if type(config) is not LlamaConfig:
        raise CheckpointError(
            f"{weights.source}: this is a {config.model_type}; Meta's layout knows Llama only: convert to hf or gguf"
        )
    if config.head_dim * config.n_heads != config.dim:
        raise CheckpointError(
            f"{weights.source}: head_dim {config.head_dim} x {config.n_heads} heads is not dim {config.dim}; "
            "Meta's params.json cannot say that: convert to hf or gguf"
        )
    names = tensor_names(config)
    state = {}
    for name in weights.entries:
        progress(name)
        tensor = cast(name, weights.read(name), dtype)
        heads = rotary_heads(name, config)
        state[names[name]] = to_pairs(tensor, heads) if heads else tensor
    if config.tied_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]  # one storage in the file, as in memory
    with replaced_directory(directory, replaces="consolidated.*.pth") as temporary:
        torch.save(state, temporary / "consolidated.00.pth")
        write_json(temporary / "params.json", _params(config))
        if tokenizer is not None:
            tokenizer.save(temporary)
        if tokenizer is not None or beside != NOTHING:
            beside.write(temporary, tokenizer)
        check(temporary)


def tensor_names(config: LlamaConfig) -> dict[str, str]:
    """Hugging Face name -> Meta's name, of every tensor of a Llama."""
    names = dict(_TOP_NAMES)
    for layer in range(config.n_layers):
        for hf, name in _BLOCK_NAMES.items():
            names[f"model.layers.{layer}.{hf}.weight"] = f"layers.{layer}.{name}.weight"
    return names


def _open_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, memory-mapped."""
    with reading(file), zipfile.ZipFile(file) as archive:
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    if packed:  # a small file could unpack to any size
        raise CheckpointError(f"{file}: its archive is compressed, as torch.save never writes it; save it anew")
    with reading(file):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file}: refused: this pickle holds more than tensors, and opening it could run its code; "
                "ask whoever made it for safetensors"
            ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) and type(k) is str for k, v in state.items()):
        raise CheckpointError(f"{file}: it holds no plain dictionary of tensors, as Meta's checkpoints do")
    floats = {DTYPES[code] for code in FLOATS}
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.dtype not in floats or tensor.device.type != "cpu":
            raise CheckpointError(f"{file}: tensor {name} is of type {tensor.dtype}; readable are {', '.join(FLOATS)}")
    size = file.stat().st_size
    if (total := sum(tensor.nbytes for tensor in state.values())) > 2 * size:  # a tied head is the embeddings again
        raise CheckpointError(
            f"{file}: damaged: {total:,} bytes of tensors in a file of {size:,}; copy or download it again"
        )
    return state


def _config(directory: Path, params: Mapping[str, Any], shards: Shards) -> LlamaConfig:
    fields = Fields(params, str(directory / "params.json"))
    dim, n_layers, n_heads = (fields.whole(key) for key in ("dim", "n_layers", "n_heads"))
    try:
        embeddings = [shard["tok_embeddings.weight"] for shard in shards]
        gates = [shard["layers.0.feed_forward.w1.weight"] for shard in shards]
    except KeyError as error:
        raise CheckpointError(f"{directory}: {error} is missing from a consolidated.*.pth") from error
    if bent := [list(tensor.shape) for tensor in (*embeddings, *gates) if tensor.ndim != 2]:
        raise CheckpointError(f"{directory}: embeddings or a w1 of shape {bent[0]}; both are matrices")
    split_by_rows = embeddings[0].shape[1] == dim
    vocab_size = sum(e.shape[0] for e in embeddings) if split_by_rows else embeddings[0].shape[0]
    _check_rest(fields, vocab_size)
    theta, scaled = fields.number("rope_theta", 10_000.0), fields.flag("use_scaled_rope", False)
    with fields.blamed():
        config = LlamaConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=fields.whole("n_kv_heads", n_heads),
            ffn_dim=sum(gate.shape[0] for gate in gates),
            vocab_size=vocab_size,
            max_context=fields.whole("max_context", _context(theta, scaled)),
            norm_eps=fields.number("norm_eps", 1e-5),
            rope_theta=theta,
            rope_scaling=Llama3Scaling(_factor(fields, dim, n_layers)) if scaled else None,
            tied_embeddings=_tied(shards),
        )
    # a shard holds a part of each tensor
    sizes = {name: tuple(n * len(shards) for n in tensor.shape) for name, tensor in shards[0].items()}
    check_sizes(directory, config, sizes, "layers.")
    return config


def _check_rest(params: Fields, vocab_size: int) -> None:
    """Refuse what changes the arithmetic, and name what differs from the tensors or is not read."""
    for name in _REFUSED:
        if params.get(name, False):
            raise CheckpointError(
                f"{params.file}: {name} is {shown(params[name])}, which is not computed here: take another "
                "model, or this one's own software"
            )
    given = params.get("vocab_size", -1)
    if given not in (-1, vocab_size):
        warn_once(
            f"{params.file}: vocab_size is {shown(given)}, and the embeddings have {vocab_size} rows; these count"
        )
    if unused := sorted(set(params) - {*_READ, *_REFUSED}):
        warn_once(f"{params.file}: not used: {', '.join(unused)}")


def _context(theta: float, scaled: bool) -> int:
    """The context of the generation: 131,072 for Llama 3.1 and 3.2, 8192 for 3, 4096 for 2 (Llama 1 had 2048)."""
    return 131_072 if scaled else 8192 if theta == 500_000.0 else 4096


def _factor(params: Fields, dim: int, n_layers: int) -> float:
    if "rope_scale_factor" in params:
        return params.number("rope_scale_factor")
    published = (c.rope_scaling for c in PUBLISHED.values() if (c.dim, c.n_layers) == (dim, n_layers))
    return next((scaling.factor for scaling in published if scaling is not None), 8.0)


def _tied(shards: Shards) -> bool:
    """Whether the head is missing or equals the embeddings (Meta stores tied ones twice)."""
    pairs = [(shard["tok_embeddings.weight"], shard.get("output.weight")) for shard in shards]
    return all(
        head is None or (head.shape == table.shape and torch.equal(head[:1], table[:1]) and torch.equal(head, table))
        for table, head in pairs
    )


def _join(name: str, shards: Shards, config: LlamaConfig, meta_only: bool = False) -> Tensor:
    """Join a tensor's shards; with `meta_only`, its shape alone is computed and nothing is read."""
    try:
        parts = [shard[name].to("meta") if meta_only else shard[name] for shard in shards]
    except KeyError as error:
        raise CheckpointError(
            f"tensor {name} is not in every consolidated.*.pth; a shard is of another model"
        ) from error
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if len(parts) == 1 or kind.endswith("norm"):
        return parts[0]
    if kind in ("wo", "w2") or (kind == "tok_embeddings" and parts[0].shape[1] != config.dim):
        return torch.cat(parts, dim=1)
    if kind in ("wk", "wv"):  # with more ranks than KV heads, neighbouring ranks hold the same ones
        copies = max(1, len(parts) * parts[0].shape[0] // (config.n_kv_heads * config.head_dim))
        parts = parts[::copies]
    return torch.cat(parts, dim=0)


def _params(config: LlamaConfig) -> dict[str, Any]:
    """params.json; entries that Meta's does not have appear only where its reader could not infer them."""
    width = int(8 * config.dim / 3)
    for multiplier, multiple_of in (*_FFN_RULES, ((config.ffn_dim + 0.5) / width, 1)):
        ffn_dim = int((multiplier or 1) * width)
        if -(-ffn_dim // multiple_of) * multiple_of == config.ffn_dim:
            break
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    scaling = config.rope_scaling
    if scaling is not None:
        if scaling != Llama3Scaling(scaling.factor):
            raise CheckpointError(f"Meta's params.json has no place for the RoPE scaling {scaling}; convert to hf")
        params["use_scaled_rope"] = True
        if scaling.factor != _factor(Fields({}, ""), config.dim, config.n_layers):
            params["rope_scale_factor"] = scaling.factor
    if config.max_context != _context(config.rope_theta, scaling is not None):
        params["max_context"] = config.max_context
    return params
