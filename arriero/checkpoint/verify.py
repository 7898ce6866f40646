"""Checks a written checkpoint against its source, tensor by tensor, with code that shares nothing with the writer.

None of this package's readers, name maps, permutations and configurations is used, but safetensors' own reader, the
gguf package's reader and name map, `torch.load`, and plain JSON. So an error of ours in any of those is found, even
where our reader and writer agree on it. Every tensor must be its source's, rounded to the written type; a merged one
W + s B A, computed in fp64 from the files of model and adapter. Sizes, RoPE and the head (tied or not) must agree.

Price: source and result are read once more, a tensor at a time; see docs/log.md.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from arriero.checkpoint.verify_quantized import NF4, is_part, quantized_matrices
from arriero.errors import CheckpointError

_EMBEDDINGS, _HEAD, _TIED = "model.embed_tokens.weight", "lm_head.weight", "tie_word_embeddings"
# config.json's name -> that in a GGUF file's metadata (after the architecture) and in params.json
_GGUF_FACTS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_GGUF_ROPE = {
    "rope_type": "type",
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "attn_factor": "attn_factor",
}
_GGUF_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
_META_FACTS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}
_META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """A checkpoint as its format's own library reads it, under Hugging Face's names and in its order of rows.

    facts: what the files state of the shape, as far as they do. shapes: of the tensors there. read(name): its values.
    """

    facts: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def head(self) -> str | None:
        """Which tensor the logits are made with: the head in the file, else the embeddings where those are tied."""
        return _HEAD if _HEAD in self.shapes else _EMBEDDINGS if self.facts.get(_TIED, True) else None


@dataclass(frozen=True)
class Verdict:
    """What was compared.

    n_tensors: how many. largest_difference: by rounding, of merged and quantised tensors, relative to the largest value
    of the tensor; the others are the source's as torch rounds them. base: the format that the source's matrices were
    rounded to before an adapter was added, or None.
    """

    n_tensors: int
    largest_difference: float
    base: str | None = None


def check_written(
    source: Path,
    written: Path,
    dtype: torch.dtype | str,
    adapter: Path | None = None,
    held: str | None = None,
    called: Path | None = None,
) -> Verdict:
    """Compare a checkpoint that was just written with its source, with an adapter folded in where one is given.

    dtype: the type written, or "q8_0", "q4_1" and the like. held: "int8" or "nf4", to which the source's matrices of
    the blocks were rounded before the adapter was added. called: what to call `written` in a message. Raises
    `CheckpointError` naming the first tensor or entry that is not the source's.
    """
    called = called or written
    ours, theirs = read_independently(written), read_independently(source)
    delta = _adapter(adapter) if adapter is not None else {}
    for name in sorted(ours.facts.keys() & theirs.facts.keys() - {_TIED}):  # the heads themselves are compared below
        if not _same(ours.facts[name], theirs.facts[name]):
            raise _fault(called, f"{name} is {ours.facts[name]!r}, {source} has {theirs.facts[name]!r}")
    names = {*ours.shapes, *theirs.shapes} - {_HEAD}
    if lost := delta.keys() - names:
        raise _fault(called, f"the adapter acts on {min(lost)}, which the model lacks")
    pairs = [(name, name) for name in sorted(names)] + _head_pairs(ours, theirs, source, called)
    largest = 0.0
    for name, origin in pairs:
        if name not in ours.shapes or origin not in theirs.shapes:
            raise _fault(called, f"{name} is in only one of {source} and the result")
        exact = dtype if len(theirs.shapes[origin]) > 1 or isinstance(dtype, torch.dtype) else torch.float32
        try:
            base = theirs.read(origin)
            if held is not None and origin.endswith(_MATRICES):
                base = _ROUNDED[held](base)
            largest = max(largest, _difference(ours.read(name), base, delta.get(origin), exact))
        except _Differs as error:
            raise _fault(called, f"{name} differs from {origin} of {source}: {error}") from None
        except _NotFinite as error:
            raise CheckpointError(
                f"{called}: not written: {name} has values that {error} cannot hold, or not finite in {source}: "
                "write bf16 or f32"
            ) from None
    return Verdict(len(pairs), largest, held)


def _head_pairs(ours: Reading, theirs: Reading, source: Path, called: Path) -> list[tuple[str, str]]:
    """The tensors to compare for the head: (name in the result, name in the source)."""
    pairs = []
    match ours.head(), theirs.head():
        case (None, _) | (_, None):
            raise _fault(called, f"it or {source} has neither a head nor tied embeddings")
        case (str(head), str(origin)) if _HEAD in (head, origin):
            pairs.append((head, origin))
    if ours.facts.get(_TIED) and _HEAD in ours.shapes:
        pairs.append((_HEAD, _EMBEDDINGS))  # a reader that ties by the flag and one that reads the head get one model
    return pairs


class _Differs(Exception):
    """A tensor differs from its source; the message says by how much."""


class _NotFinite(Exception):
    """A tensor holds NaN or infinite values; the message names its type."""


def read_independently(path: Path) -> Reading:
    """Read a checkpoint of any of the three layouts without this package's readers."""
    if path.is_file():
        return _read_gguf(path)
    return _read_hf(path) if (path / "config.json").is_file() else _read_meta(path)


def _read_hf(directory: Path) -> Reading:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    owners, shapes = _hf_owners(directory), dict[str, tuple[int, ...]]()
    for file in sorted({file for file, _ in owners.values()}):
        with safe_open(file, "pt") as tensors:
            there = [name for name, owner in owners.items() if owner[0] == file]
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in there}

    def tensor(name: str) -> Tensor:
        file, key = owners[name]
        with safe_open(file, "pt") as tensors:  # anew each time: what is mapped counts as memory
            return tensors.get_tensor(key).clone()

    quantized = quantized_matrices(shapes, tensor, config.get("quantization_config") or {})
    shapes = {name: shape for name, shape in shapes.items() if not is_part(name)}
    shapes |= {name: matrix.shape for name, matrix in quantized.items()}
    if _EMBEDDINGS not in owners:  # the head alone is there, and is both
        owners[_EMBEDDINGS], shapes[_EMBEDDINGS] = owners[_HEAD], shapes[_HEAD]

    def read(name: str) -> Tensor:
        return quantized[name].read() if name in quantized else tensor(name)

    facts = {**_hf_facts(config), "vocab_size": shapes[_EMBEDDINGS][0]}
    return Reading(facts, shapes, read)


def _hf_owners(directory: Path) -> dict[str, tuple[Path, str]]:
    """The file of each tensor, and its name there."""
    one = directory / "model.safetensors"
    if one.is_file():
        with safe_open(one, "pt") as tensors:
            owners = {name: (one, name) for name in tensors.keys()}  # noqa: SIM118
    else:
        index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
        owners = {name: (directory / file, name) for name, file in index["weight_map"].items()}
    return {name: owner for name, owner in owners.items() if "rotary_emb" not in name}


def _hf_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in config.json, all but the size of the vocabulary."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    facts = {name: config[name] for name in _GGUF_FACTS if config.get(name) is not None}
    facts.setdefault("num_key_value_heads", config["num_attention_heads"])
    own_width = 128 if config["model_type"] == "qwen3" else config["hidden_size"] // config["num_attention_heads"]
    facts.setdefault("head_dim", own_width)
    facts["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    facts[_TIED] = bool(config.get(_TIED, False))
    context = facts.get("max_position_embeddings", 2048)
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or context
    facts["rope"] = _rope(facts, {**rope, "original_max_position_embeddings": original})
    return facts


class _GgufReader(gguf.GGUFReader):
    """The package's reader, which reads tokens and merges for half a minute: arrays in the metadata are passed over."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data = memoryview(self.data)  # type: ignore[arg-type]
        kind = gguf.GGUFValueType(int.from_bytes(data[orig_offs : orig_offs + 4], "little"))
        count = int.from_bytes(data[orig_offs + 4 : orig_offs + 12], "little")
        at = orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(count):
                at += 8 + int.from_bytes(data[at : at + 8], "little")
        else:
            at += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        return at - orig_offs, [], [], [gguf.GGUFValueType.ARRAY, kind]


def _read_gguf(file: Path) -> Reading:
    reader = _GgufReader(file)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    arch = value("general.architecture")
    facts = {name: v for name, key in _GGUF_FACTS.items() if (v := value(f"{arch}.{key}")) is not None}
    heads, layers = facts["num_attention_heads"], facts["num_hidden_layers"]
    facts.setdefault("num_key_value_heads", heads)
    facts.setdefault("head_dim", value(f"{arch}.rope.dimension_count") or facts["hidden_size"] // heads)
    facts.setdefault("rope_theta", 10_000.0)
    names = gguf.get_tensor_name_map(_GGUF_ARCHITECTURES[arch], layers)
    ours = {f"{name}.weight": f"{names.get_name(name)}.weight" for name in _hf_names(layers)}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensors = {name: stored[key] for name, key in ours.items() if key in stored}
    rope = {entry: value(f"{arch}.rope.scaling.{key}") for entry, key in _GGUF_ROPE.items()}
    rope["factor"] = rope["factor"] or value(f"{arch}.rope.scale_linear") or 1.0
    rope["rope_type"] = rope["rope_type"] or "linear"
    facts["rope"] = _rope(
        facts, {**rope, "original_max_position_embeddings": rope["original_max_position_embeddings"] or 0}
    )
    if "rope_freqs.weight" in stored:
        facts["rope"] = [f / float(x) for f, x in zip(facts["rope"], stored["rope_freqs.weight"].data, strict=True)]
    facts[_TIED] = _HEAD not in tensors
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
    facts["vocab_size"] = shapes[_EMBEDDINGS][0]

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        pairs = _pairs_of(name, facts) if arch == "llama" else 0
        array = _to_halves(array, pairs) if pairs else array
        values = torch.from_numpy(array if array.flags.writeable else array.copy())
        reader.data._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # what is mapped counts as memory
        return values

    return Reading(facts, shapes, read)


def _read_meta(directory: Path) -> Reading:
    params = json.loads((directory / "params.json").read_text(encoding="utf-8"))
    shards = [torch.load(f, map_location="cpu", weights_only=True, mmap=True) for f in sorted(directory.glob("*.pth"))]
    facts = {name: params[key] for name, key in _META_FACTS.items() if params.get(key) is not None}
    facts.setdefault("num_key_value_heads", facts["num_attention_heads"])
    keys = {}
    for key in shards[0]:
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", key)
        name = _META_NAMES.get(layer[2] if layer else key.removesuffix(".weight"))
        if name is not None:
            keys[f"model.layers.{layer[1]}.{name}.weight" if layer else f"{name}.weight"] = key

    def read(name: str) -> Tensor:
        tensor = _joined([shard[keys[name]] for shard in shards], name, facts)
        heads = _pairs_of(name, facts)
        return torch.from_numpy(_to_halves(tensor.float().numpy(), heads)) if heads else tensor

    shapes = {n: tuple(_joined([s[k].to("meta") for s in shards], n, facts).shape) for n, k in keys.items()}
    facts["vocab_size"] = shapes[_EMBEDDINGS][0]
    return Reading(facts, shapes, read)


def _joined(parts: list[Tensor], name: str, facts: Mapping[str, Any]) -> Tensor:
    """A tensor of the shards of Meta's model parallelism: split by columns where it maps back into the hidden width."""
    if len(parts) == 1 or parts[0].dim() == 1:
        return parts[0]
    by_columns = name.endswith(("o_proj.weight", "down_proj.weight")) or (
        name == _EMBEDDINGS and parts[0].shape[1] < facts["hidden_size"]
    )
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        rows = facts["hidden_size"] // facts["num_attention_heads"] * facts["num_key_value_heads"]
        parts = parts[:: max(1, len(parts) * parts[0].shape[0] // rows)]
    return torch.cat(parts, dim=1 if by_columns else 0)


def _hf_names(n_layers: int) -> list[str]:
    """The modules that have a weight."""
    top = ["model.embed_tokens", "model.norm", "lm_head"]
    within = [*(name for name in _META_NAMES.values() if name not in top), "self_attn.q_norm", "self_attn.k_norm"]
    return top + [f"model.layers.{layer}.{name}" for layer in range(n_layers) for name in within]


def _pairs_of(name: str, facts: Mapping[str, Any]) -> int:
    """Heads of a tensor whose rows are in adjacent pairs in Meta's and llama.cpp's files; 0 for every other tensor."""
    kind = name.split(".")[-2]
    heads = {"q_proj": facts["num_attention_heads"], "k_proj": facts["num_key_value_heads"]}
    return int(heads.get(kind, 0))


def _to_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head with even ones before odd ones: llama.cpp's `permute` undone."""
    rows = array.shape[0] // heads
    order = [head * rows + i for head in range(heads) for i in (*range(0, rows, 2), *range(1, rows, 2))]
    return array[order]


def _rope(facts: Mapping[str, Any], rope: Mapping[str, Any]) -> list[float]:
    """What decides the rotations: the angle that a position turns each pair by; for YaRN theta and its settings."""
    theta, width = float(facts["rope_theta"]), facts["head_dim"]
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    kind, factor = rope.get("rope_type") or rope.get("type", "default"), rope.get("factor") or 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "linear":
        return [f / factor for f in plain]
    if kind == "yarn":
        attention = rope.get("attention_factor") or (rope.get("attn_factor") or 1.0) * (0.1 * math.log(factor) + 1)
        if rope.get("mscale") and rope.get("mscale_all_dim") and not rope.get("attention_factor"):
            over, under = ((0.1 * rope[name] * math.log(factor) + 1) for name in ("mscale", "mscale_all_dim"))
            attention = over / under
        return [theta, factor, original or facts["max_position_embeddings"], attention]
    if kind != "llama3":
        return plain  # "dynamic" is plain as far as a model is used here
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = [original * f / (2 * math.pi) for f in plain]
    kept = [min(1.0, max(0.0, (t - low) / (high - low))) for t in turns]
    return [share * f + (1 - share) * f / factor for f, share in zip(plain, kept, strict=True)]


def _adapter(directory: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Name of each weight that the adapter in `directory` acts on -> A, B and the scale s, from its files alone."""
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    deltas = {}
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        state = {key.replace(".default.", "."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key in (key for key in state if key.endswith(".lora_A.weight")):
        linear = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")

        def stated(entry: str, pattern: str, default: float, linear: str = linear) -> float:
            patterns = config.get(pattern) or {}
            found = (v for k, v in patterns.items() if re.search(rf"(^|\.)({k})$", linear))
            return float(next(found, config.get(entry, default)))

        rank, alpha = stated("r", "rank_pattern", 8), stated("lora_alpha", "alpha_pattern", 8)
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        deltas[f"{linear}.weight"] = (state[key], state[key.replace(".lora_A.", ".lora_B.")], scale)
    return deltas


def _difference(
    written: Tensor, source: Tensor, delta: tuple[Tensor, Tensor, float] | None, dtype: torch.dtype | str
) -> float:
    """The largest difference between a tensor and its source, or W + s B A, relative to the latter's largest value.

    Some rows at a time. Raises `_Differs` where rounding to `dtype` does not explain it, `_NotFinite` for what is none.
    """
    if written.shape != source.shape:
        raise _Differs(f"it is {list(written.shape)} and should be {list(source.shape)}")
    wide = torch.float64 if delta is not None or source.dtype == torch.float64 else torch.float32
    worst, largest = 0.0, torch.finfo(torch.float32).tiny
    step = max(1, 2**19 // math.prod(source.shape[1:]))
    for rows in (slice(start, start + step) for start in range(0, len(source), step)):
        if isinstance(dtype, torch.dtype) and delta is None and _equal(written[rows], source[rows].to(dtype)):
            continue
        actual, expected, slack = written[rows].to(wide), source[rows].to(wide), torch.zeros(())
        if delta is not None:  # slack: how far a sum in fp32 may be from that in fp64
            a, b, scale = delta[0].double(), delta[1][rows].double(), delta[2]
            slack = (expected.abs() + abs(scale) * (b.abs() @ a.abs())) * (2 + len(a)) * 2.0**-24
            expected = expected + scale * (b @ a)
        if not bool(actual.isfinite().all()):
            raise _NotFinite(str(dtype).removeprefix("torch."))
        difference = (actual - expected).abs()
        if not bool((difference <= _allowed(expected, slack, dtype)).all()):
            raise _Differs(f"by up to {float(difference.max()):.3g} of {float(expected.abs().max()):.3g}")
        worst, largest = max(worst, float(difference.max())), max(largest, float(expected.abs().max()))
    return worst / largest


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same finite values, whatever their types."""
    return torch.equal(a, b.to(a.dtype)) and bool(a.isfinite().all())


def _allowed(expected: Tensor, slack: Tensor, dtype: torch.dtype | str) -> Tensor:
    """How far rounding can put a value: half a unit in the last place, for GGUF's blocks of 32 half a step, or one."""
    if isinstance(dtype, torch.dtype):
        info = torch.finfo(dtype)
        return (expected.abs() + slack) * (info.eps / 2) + info.smallest_normal * info.eps + slack
    blocks = expected.reshape(-1, 32)
    if dtype in ("q4_1", "q5_1"):  # from the least to the greatest in 15 or 31 steps; step and least are stored in f16
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        steps = 15 if dtype == "q4_1" else 31
        allowed = (high - low) * (0.5 / steps + 2.0**-11) + low.abs() * 2.0**-11 + 2.0**-24 * steps
    else:  # the largest is 127, 16 or 8 steps; where it is negative that end has one code less, a step
        steps, off = {"q8_0": (127, 0.5), "q5_0": (16, 1.0), "q4_0": (8, 1.0)}[str(dtype)]
        allowed = blocks.abs().amax(1, keepdim=True) * (off / steps + 2.0**-11) + 2.0**-24 * steps
    return allowed.expand(-1, 32).reshape(expected.shape)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) or isinstance(b, float):  # a GGUF file holds numbers in fp32
        return math.isclose(a, b, rel_tol=1e-5)
    return bool(a == b)


def _fault(called: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{called}: not written: read back by other means, {what}; this is a fault of Arriero's or of the disk: try "
        "again, and if it stays please report it"
    )


def _rounded_to_int8(weight: Tensor) -> Tensor:
    """Each row as whole multiples of its largest magnitude / 127; by NumPy, in fp32 as the format says."""
    values = weight.float().numpy()
    steps = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(np.divide(values, steps, out=np.zeros_like(values), where=steps > 0))
    return torch.from_numpy(codes * steps).to(weight.dtype)


def _rounded_to_nf4(weight: Tensor) -> Tensor:
    """Each 64 values as levels of the largest magnitude among them; between two levels the border is halfway."""
    levels = np.array(NF4, np.float32)
    values = weight.float().numpy().reshape(-1)
    blocks = np.pad(values, (0, -len(values) % 64)).reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    normed = np.divide(blocks, largest, out=np.zeros_like(blocks), where=largest > 0)
    chosen = np.searchsorted((levels[1:] + levels[:-1]) / np.float32(2), normed)
    out = (levels[chosen] * largest).reshape(-1)[: len(values)].reshape(weight.shape)
    return torch.from_numpy(out).to(weight.dtype)


_MATRICES = tuple(f".{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
_ROUNDED = {"int8": _rounded_to_int8, "nf4": _rounded_to_nf4}
