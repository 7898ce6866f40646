"""The step in C++ (native/): every product, norm and softmax of a token by one set of kernels, whatever else runs.

The logits of a token are the same bits alone and in a batch, with the prompt in one piece or in many, for any number of
threads; native/linear.h says why. Weights are laid out anew for these kernels, once: that copy, and the cache, are all
the memory that a step has (`memory`). Activations, sums and softmax are fp32; what goes into a product is rounded to
bf16 for bf16 weights, and to fifteen bits with a scale for each 32 inputs for integer weights; or to eight, which takes
half the products and loses what docs/inference.md says.

The kernels are compiled on first use (system/cpp.py). Slow twin: `TorchStep`, which takes every model and device.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.errors import ConfigError
from arriero.infer.config import ActivationBits
from arriero.infer.huge_pages import HugePages
from arriero.infer.step import BLOCK, Share, StepInput
from arriero.infer.torch_step import computed_in
from arriero.model.config import LlamaConfig
from arriero.model.filed import FiledLinear
from arriero.model.linear import Linear
from arriero.model.llama import EMBEDDINGS, HEAD, Llama
from arriero.model.lora import LoraLinear
from arriero.model.lora_config import LoraConfig
from arriero.model.packed import PackedLinear
from arriero.model.quantized import QuantizedLinear
from arriero.model.rope import rope_attention, rope_frequencies
from arriero.model.scaling import DynamicScaling
from arriero.quant import nf4
from arriero.quant.packed import Quantized, from_indices
from arriero.system.cpp import load_cpp

PANEL, GROUP, LANES = 32, 32, 16
"""kPanel, kGroup and kLanes of native/."""
_INT32 = ("positions", "sequences", "tables", "outputs")
WIDEST_HEAD = 512
FLOAT, BF16, INT8, INT4, TWELVE, INT8_GROUPS = range(6)
"""The C++ enum `Type`."""
_DENSE = (FLOAT, BF16, TWELVE)
DIGITS = {8: 1, 15: 2}  # bytes that hold an activation, by its bits
RARE = 8  # bytes of the C++ struct `Rare`
RARELY = 128
"""bf16 is held in twelve bits where at most one weight in so many is rare: it then reads a quarter less, at no loss."""
AT_ONCE = 8  # matrices that are packed at a time, each of which is in memory twice
PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_IN_BLOCK = (*(f"self_attn.{name}" for name in PLACES[:4]), *(f"mlp.{name}" for name in PLACES[4:]))
_NORMS = ("input_layernorm", "post_attention_layernorm")


@functools.cache
def load_library(*flags: str) -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled. flags: for the compiler, such as another -march."""
    instead = "running the model through torch, much slower"
    library = load_cpp(Path(__file__).parent / "native" / "step.cpp", instead, *flags)
    if library is not None:
        library.arriero_open.restype = ctypes.c_void_p
        library.arriero_open.argtypes = (ctypes.c_int64,)
        library.arriero_close.argtypes = (ctypes.c_void_p,)
        library.arriero_step.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        library.arriero_pack_twelve.restype = ctypes.c_int64
        library.arriero_pack_twelve.argtypes = (
            ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_void_p,
        )  # fmt: skip
        library.arriero_share.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        library.arriero_product.argtypes = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, ctypes.c_void_p)
        for kind in ("float", "bf16", "int8", "int4"):
            function = getattr(library, f"arriero_pack_{kind}")
            function.argtypes = (ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_void_p)
    return library


def fits(model: Llama, capacity: int) -> bool:
    """Whether the C++ step runs this model, for sequences of up to `capacity` tokens.

    A plain Llama on the CPU; positions that the scaling of RoPE does not reach are refused by the torch step.
    """
    config = model.config
    return (
        type(model) is Llama
        and model.head_kind == "logits"
        and config.head_dim <= WIDEST_HEAD
        and not (isinstance(config.rope_scaling, DynamicScaling) and capacity > config.max_context)
        and model.device.type == "cpu"
        and model.model.embed_tokens.weight.dtype in (torch.float32, torch.bfloat16)
        and all(_runs(module) for module in (*_products(model), model.head))
    )


def block_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Memory of one block: keys and values of `BLOCK` tokens in all layers, the values of a head on whole vectors."""
    each = config.head_dim + _up(config.head_dim, LANES)
    return config.n_layers * config.n_kv_heads * each * BLOCK * dtype.itemsize


def _products(model: Llama) -> list[Any]:
    return [block.get_submodule(name) for block in model.model.layers for name in _IN_BLOCK]


def _runs(module: Any) -> bool:
    """Whether the kernels have this linear: dense in fp32 or bf16, or quantised in groups that they know."""
    if isinstance(module, LoraLinear):
        return _runs(module.base)
    if type(module) is FiledLinear:  # what is quantised in other groups is multiplied out when it is packed
        return module.dtype in (torch.float32, torch.bfloat16)
    if type(module) is PackedLinear:
        return _whole_groups(module.matrix)
    if type(module) is QuantizedLinear:
        return module.kind == "int8" or (module.kind == "nf4" and module.in_features % nf4.BLOCK == 0)
    plain = type(module) is Linear and type(module.weight.data) is Tensor and module.weight.is_cpu
    return plain and module.weight.dtype in (torch.float32, torch.bfloat16)


def _whole_groups(matrix: Quantized) -> bool:
    """Whether the kernels have scales like these."""
    of_rows = matrix.levels is None and matrix.scales.shape[1] == 1
    return of_rows or (matrix.shape[1] % GROUP == 0 and matrix.group % GROUP == 0)


# -- weights -----------------------------------------------------------------------------------------------------------


_PARTS = ("scales", "minimums", "values", "rare", "rare_ends")


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("type", "out", "in_")),
        *((name, ctypes.c_void_p) for name in ("data", *_PARTS)),
        ("digits", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (("matrices", _Matrix * len(PLACES)), ("attention_norm", ctypes.c_void_p), ("ffn_norm", ctypes.c_void_p))


class _Adapter(ctypes.Structure):
    _fields_ = (("rank", ctypes.c_int64), ("a", ctypes.c_void_p), ("b", ctypes.c_void_p))


class _Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
        ),
        ("norm_eps", ctypes.c_double),
        ("rope_attention", ctypes.c_double),
        ("layers", ctypes.POINTER(_Layer)),
        ("head", _Matrix),
        ("embedding", ctypes.c_void_p),
        ("embedding_bf16", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("norm", "frequencies", "keys", "values")),
        ("n_blocks", ctypes.c_int64),
        ("cache_bf16", ctypes.c_int64),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "table_width", "n_outputs")),
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "sequences", "tables", "outputs", "adapters")),
        ("any_adapter", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
    )


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass
class PackedMatrix:
    """A matrix [out, in] in the kernels' layout."""

    kind: int
    out: int
    in_: int
    data: Tensor
    scales: Tensor | None = None
    minimums: Tensor | None = None
    values: Tensor | None = None
    rare: Tensor | None = None
    rare_ends: Tensor | None = None
    digits: int = 2  # of the activations that it is multiplied by

    def struct(self) -> _Matrix:
        """What the kernels are given; this object must outlive it."""
        return _Matrix(
            self.kind, self.out, self.in_, *(None if t is None else t.data_ptr() for t in self._tensors), self.digits
        )

    @property
    def _tensors(self) -> list[Tensor | None]:
        return [self.data, *(getattr(self, name) for name in _PARTS)]

    @property
    def bytes(self) -> int:
        """Memory of all parts."""
        return sum(t.nbytes for t in self._tensors if t is not None)


def pack_matrix(library: ctypes.CDLL, weight: Tensor) -> PackedMatrix:
    """A dense matrix, fp32 or bf16."""
    kind = FLOAT if weight.dtype == torch.float32 else BF16
    return PackedMatrix(kind, weight.shape[0], weight.shape[1], _panels(library, weight.detach().contiguous(), kind))


def in_twelve_bits(library: ctypes.CDLL, matrix: PackedMatrix) -> PackedMatrix:
    """A bf16 matrix in twelve bits, the same values; the matrix itself where too many weights would be rare."""
    panels = _up(matrix.out, PANEL) // PANEL
    weights = matrix.data.numel() // 2
    blocks = torch.empty(weights * 3 // 2, dtype=torch.uint8)
    values, ends = torch.empty(16, dtype=torch.uint8), torch.empty(panels + 1, dtype=torch.int64)
    room = weights // RARELY
    rare = torch.empty(max(room, 1) * RARE, dtype=torch.uint8)
    found = library.arriero_pack_twelve(
        matrix.data.data_ptr(), panels, weights // panels, blocks.data_ptr(), values.data_ptr(), rare.data_ptr(), room,
        ends.data_ptr(),
    )  # fmt: skip
    if found > room:
        return matrix
    rare = rare[: max(found, 1) * RARE].clone()
    return PackedMatrix(TWELVE, matrix.out, matrix.in_, blocks, values=values, rare=rare, rare_ends=ends)


def pack_quantized(library: ctypes.CDLL, matrix: Quantized) -> PackedMatrix:
    """A matrix of eight or four bits, the same integers; scales of four bits are held in half precision."""
    out, in_ = matrix.shape
    codes = matrix.indices().contiguous()
    repeat = max(1, matrix.group // GROUP)
    assert _whole_groups(matrix), "scales of one output, or of whole groups of 32 inputs"
    if matrix.levels is None and matrix.scales.shape[1] > 1:
        scales = _by_panel(matrix.scales.repeat_interleave(repeat, 1))
        return PackedMatrix(INT8_GROUPS, out, in_, _panels(library, codes, INT8), scales)
    if matrix.levels is None:
        padded = torch.zeros(_up(out, PANEL))
        padded[:out] = matrix.scales[:, 0]
        return PackedMatrix(INT8, out, in_, _panels(library, codes, INT8), padded)
    levels, unit = torch.tensor(matrix.levels), 1.0
    if bool((levels != levels.round()).any()):  # NF4: to the nearest 127th, at most 0.4% of a group's largest value
        levels, unit = (levels * 127).round(), 1 / 127
    table = (levels + 128).to(torch.uint8).contiguous()
    scales = _by_panel(matrix.scales.repeat_interleave(repeat, 1) * unit)
    least = None if matrix.minimums is None else _by_panel(matrix.minimums.repeat_interleave(repeat, 1))
    return PackedMatrix(INT4, out, in_, _panels(library, codes, INT4), scales, least, table)


def _by_panel(scales: Tensor) -> Tensor:
    """[out, groups] -> half [panels, groups, 32]."""
    out, groups = scales.shape
    padded = torch.zeros(_up(out, PANEL), groups, dtype=torch.float16)
    padded[:out] = scales
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def _panels(library: ctypes.CDLL, matrix: Tensor, kind: int) -> Tensor:
    out, in_ = matrix.shape
    panels, name = _up(out, PANEL) // PANEL, ("float", "bf16", "int8", "int4")[kind]
    bits = (32, 16, 8, 4)[kind]
    to = torch.empty(panels * PANEL * _up(in_, GROUP) * bits // 8, dtype=torch.uint8)
    pack = getattr(library, f"arriero_pack_{name}")
    runs = np.linspace(0, panels, 1 + min(panels, torch.get_num_threads())).astype(int).tolist()
    with ThreadPoolExecutor() as pool:  # other threads run during a call
        list(pool.map(lambda a, b: pack(matrix.data_ptr(), out, in_, a, b, to.data_ptr()), runs, runs[1:]))
    return to


def _packed(library: ctypes.CDLL, module: Any) -> PackedMatrix:
    """What the module multiplies by, an adapter that acts folded."""
    if isinstance(module, LoraLinear):
        acts = isinstance(module.active, str) and module.active in module.scales
        return _packed_dense(library, module.dense()) if acts else _packed(library, module.base)
    if type(module) is FiledLinear:
        found = module.read()
        if isinstance(found, Quantized) and _whole_groups(found):
            return pack_quantized(library, found)
        return _packed_dense(library, found.dense(module.dtype) if isinstance(found, Quantized) else found)
    if type(module) is PackedLinear:
        return pack_quantized(library, module.matrix)
    if type(module) is QuantizedLinear:
        return pack_quantized(library, _quantized(module))
    return _packed_dense(library, module.weight)


def _packed_into(pages: HugePages, library: ctypes.CDLL, module: Any) -> PackedMatrix:
    """Copied there once packed, since only then it is known how large the matrix is."""
    matrix = _packed(library, module)
    matrix.data = pages.keep(matrix.data)
    return matrix


def _packed_side_by_side(pages: HugePages, library: ctypes.CDLL, modules: Sequence[Any]) -> list[PackedMatrix]:
    """Each matrix by one thread, a few at once.

    torch's own threads would share each of a thousand small operations, and wait for each other at its end: where other
    threads run too, for 4 ms a time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, AT_ONCE)) as pool:
            return list(pool.map(functools.partial(_packed_into, pages, library), modules))
    finally:
        torch.set_num_threads(threads)


def _packed_dense(library: ctypes.CDLL, weight: Tensor) -> PackedMatrix:
    matrix = pack_matrix(library, weight)
    return in_twelve_bits(library, matrix) if matrix.kind == BF16 else matrix


def _quantized(module: QuantizedLinear) -> Quantized:
    if module.kind == "int8":
        return Quantized("int8", module.codes, module.scales[:, None])
    shape = module.out_features, module.in_features  # NF4 lays both codes of a byte the other way round
    codes = torch.stack((module.codes >> 4, module.codes & 15), 1).view(shape)
    return from_indices("nf4", codes, module.scales.view(shape[0], -1))


class _PackedAdapter:
    """The matrices of one adapter, by layer and place."""

    def __init__(self, config: LoraConfig, tensors: Mapping[str, Tensor], linears: Sequence[str]) -> None:
        """tensors: as `lora_state` names them. linears: full names of the decoder's, layer after layer."""
        self.structs = (_Adapter * len(linears))()
        self._held: list[Tensor] = []
        for i, linear in enumerate(linears):
            if f"{linear}.lora_A.weight" not in tensors:
                continue
            a, b = (tensors[f"{linear}.lora_{side}.weight"].detach().float() for side in "AB")
            rank, out = a.shape[0], b.shape[0]
            scale = config.scale(rank, config.alpha_pattern.get(linear, config.alpha))
            wide = torch.zeros(rank, _up(a.shape[1], GROUP))
            wide[:, : a.shape[1]] = a
            panels = torch.zeros(_up(out, PANEL), rank)
            panels[:out] = b * scale
            panels = panels.view(-1, PANEL, rank).transpose(1, 2).contiguous()
            self._held += [wide, panels]
            self.structs[i] = _Adapter(rank, wide.data_ptr(), panels.data_ptr())


# -- the step ----------------------------------------------------------------------------------------------------------


class NativeStep:
    """`Step` on the CPU; see the module's docstring.

    The weights are read at construction: after training, make a new one, or `refit`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        model: Llama,
        n_blocks: int,
        *,
        cache_dtype: torch.dtype | None = None,
        activation_bits: ActivationBits = 15,
        threads: int | None = None,
    ) -> None:
        """n_blocks: of the cache, in `cache_dtype` (fp32 or bf16; None: what the model computes in).

        activation_bits: of what goes into a product with integer weights.
        """
        config = model.config
        self.config, self.n_blocks, self.vocab_size = config, n_blocks, config.vocab_size
        self._library, self._held = library, list[Any]()
        self._engine = library.arriero_open(threads or torch.get_num_threads())
        self._lend = ctypes.cast(library.arriero_share, ctypes.c_void_p).value or 0
        weakref.finalize(self, library.arriero_close, self._engine)
        dtype = cache_dtype or computed_in(model)
        keys, values = self.cache_shapes(config, n_blocks)
        self.keys, self.values = torch.empty(keys, dtype=dtype), torch.empty(values, dtype=dtype)
        self._linears = [f"model.layers.{i}.{name}" for i in range(config.n_layers) for name in _IN_BLOCK]
        self._pages = HugePages()
        self.matrices = _packed_side_by_side(self._pages, library, _products(model))
        self.head = _packed_into(self._pages, library, model.head)
        for matrix in (*self.matrices, self.head):
            matrix.digits = DIGITS[activation_bits]
        self._places: dict[str, PackedMatrix | Tensor] = {}  # by name, what a refit writes to
        self._layers = (_Layer * config.n_layers)()
        for i, block in enumerate(model.model.layers):
            structs = [m.struct() for m in self.matrices[i * len(PLACES) : (i + 1) * len(PLACES)]]
            norms = []
            for name in _NORMS:
                weight = self._places[f"model.layers.{i}.{name}.weight"] = getattr(block, name).weight.float().clone()
                norms.append(self._pointer(weight))
            self._layers[i] = _Layer((_Matrix * len(PLACES))(*structs), *norms)
        embedding = model.model.embed_tokens.weight.detach()
        self._embedding = None if model.tied and self.head.kind in _DENSE else embedding.clone()
        self._places |= dict(zip((f"{name}.weight" for name in self._linears), self.matrices, strict=True))
        norm = self._places["model.norm.weight"] = model.model.norm.weight.float().clone()
        self._places[EMBEDDINGS] = self.head if self._embedding is None else self._embedding
        if not model.tied:
            self._places[HEAD] = self.head
        self._model = _Model(
            config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim, config.ffn_dim,
            config.vocab_size, config.norm_eps, rope_attention(config), self._layers, self.head.struct(),
            embedding=None if self._embedding is None else self._embedding.data_ptr(),
            embedding_bf16=embedding.dtype == torch.bfloat16,
            norm=self._pointer(norm), frequencies=self._pointer(rope_frequencies(config)),
            keys=self.keys.data_ptr(), values=self.values.data_ptr(), n_blocks=n_blocks,
            cache_bf16=dtype == torch.bfloat16,
        )  # fmt: skip
        self._adapters: dict[str, _PackedAdapter] = {}

    @staticmethod
    def cache_shapes(config: LlamaConfig, n_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of keys and values: native/attention.h says how a block is laid out."""
        first = (config.n_layers, n_blocks, config.n_kv_heads)
        return (*first, config.head_dim, BLOCK), (*first, BLOCK, _up(config.head_dim, LANES))

    @property
    def share(self) -> Share:
        """The engine's threads."""
        return Share(self._lend, self._engine, self)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the weights in the kernels' layout, and of the cache."""
        own = 0 if self._embedding is None else self._embedding.nbytes
        return {
            "weights": sum(m.bytes for m in (*self.matrices, self.head)) + own,
            "cache": self.keys.nbytes + self.values.nbytes,
        }

    @property
    def integer(self) -> bool:
        """Whether any matrix is of integers, so that activations are rounded to them."""
        return any(matrix.kind not in _DENSE for matrix in (*self.matrices, self.head))

    def __call__(self, batch: StepInput) -> Tensor:
        """Logits fp32 [m, V]."""
        n, m = len(batch.tokens), len(batch.outputs)
        logits = torch.empty(m, self.vocab_size)
        arrays: list[Any] = [
            np.ascontiguousarray(batch.tokens, np.int64),
            *(
                np.ascontiguousarray(x, np.int32)
                for x in (batch.positions, batch.sequences, batch.tables, batch.outputs)
            ),
        ]
        each = [None if name is None else self._adapters[name] for name in batch.adapters]
        any_adapter = any(each)
        adapters = (ctypes.c_void_p * n)()
        if any_adapter:
            addresses = [None if a is None else ctypes.addressof(a.structs) for a in each]
            for i, sequence in enumerate(batch.sequences.tolist()):
                adapters[i] = addresses[sequence]
        struct = _Batch(
            n, batch.tables.shape[1], m, *(a.ctypes.data for a in arrays), ctypes.addressof(adapters), any_adapter,
            logits.data_ptr(),
        )  # fmt: skip
        self._library.arriero_step(self._engine, ctypes.addressof(self._model), ctypes.addressof(struct))
        return logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the keys and values of block `source` to block `target` for each (source, target), in order."""
        for source, target in pairs:
            for tensor in (self.keys, self.values):
                tensor[:, target].copy_(tensor[:, source])

    def add_adapter(self, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
        """Carry one more adapter, which sequences name from now on."""
        self._adapters[name] = _PackedAdapter(config, tensors, self._linears)

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter that no sequence names any more."""
        del self._adapters[name]

    def refit(self, name: str, tensor: Tensor) -> None:
        """New values for the weight of that name, written over the old ones.

        Raises `ConfigError` for a name that the model lacks, another shape, or a quantised weight.
        """
        if (place := self._places.get(name)) is None:
            raise ConfigError(f"refit: the model has no weight {name!r}; names are those of its state_dict()")
        if isinstance(place, Tensor):
            self._check_shape(name, tuple(place.shape), tensor)
            place.copy_(tensor)
        else:
            self._check_shape(name, (place.out, place.in_), tensor)
            if place.kind not in _DENSE:
                raise ConfigError(
                    f"refit: {name} is held in few bits; open the model unquantised to give it new weights"
                )
            fresh = tensor.to(torch.float32 if place.kind == FLOAT else torch.bfloat16).contiguous()
            if place.kind == TWELVE:  # from now on as they come: what is refitted once will be again
                place.kind, place.values, place.rare, place.rare_ends = BF16, None, None, None
                place.data = self._pages.keep(_panels(self._library, fresh, BF16))
                fresh_struct = place.struct()
                own = ctypes.addressof(self._struct_of(place))
                ctypes.memmove(own, ctypes.addressof(fresh_struct), ctypes.sizeof(_Matrix))
            else:
                place.data.copy_(_panels(self._library, fresh, place.kind))

    def _struct_of(self, matrix: PackedMatrix) -> _Matrix:
        """What the kernels read of a matrix."""
        if matrix is self.head:
            return self._model.head  # type: ignore[no-any-return]
        i = next(i for i, other in enumerate(self.matrices) if other is matrix)
        return self._layers[i // len(PLACES)].matrices[i % len(PLACES)]  # type: ignore[no-any-return]

    @staticmethod
    def _check_shape(name: str, own: tuple[int, ...], tensor: Tensor) -> None:
        if tuple(tensor.shape) != own:
            raise ConfigError(f"refit: {name} has shape {list(tensor.shape)}, and the model needs {list(own)}")

    def _pointer(self, tensor: Tensor) -> int:
        self._held.append(tensor.detach().contiguous())
        return int(self._held[-1].data_ptr())


def product(library: ctypes.CDLL, matrix: PackedMatrix, x: Tensor, threads: int = 1) -> Tensor:
    """x W^T by the step's own kernel, fp32 [n, out] from fp32 [n, in]: for tests and measurements."""
    y = torch.empty(len(x), matrix.out)
    wide = torch.zeros(len(x), _up(matrix.in_, GROUP))
    wide[:, : matrix.in_] = x
    engine, struct = library.arriero_open(threads), matrix.struct()
    library.arriero_product(engine, ctypes.addressof(struct), wide.data_ptr(), len(x), 1, y.data_ptr())
    library.arriero_close(engine)
    return y
