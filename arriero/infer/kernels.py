"""The decode step in C++: compiled on first use, cached, and always a faster twin of the step in torch.

Decoding one sequence reads every weight once per token, so memory bandwidth is the limit: 269 MB for SmolLM2-135M in
bf16, of which two Zen 5 cores can read 47 to 52 GB/s. There a step takes 5.7 ms, and 5.1 ms with compressed weights,
where torch's own kernels take about 20 (docs/log.md).

A step uses the model's own tensors, in place. Where few sequences are decoded for long, it compresses bf16 weights to
twelve bits each without loss (`Packed` in kernels.cpp). That takes three quarters of the weights' memory in addition
(202 MB here), and once the time of 16 tokens (91 ms); so it is done after `PACK_AFTER` steps only, and the compressed
weights serve all later steps of the model.

Make a new step for each generation, and after any training step or `model.to(...)`: the constructor, which is cheap,
takes pointers to the tensors. A step holds references to the tensors, so no pointer can dangle. Weights that were
changed in place after they were compressed are noticed by their version counters, which writes through `.data` do not
change, and are read from the tensors again.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arriero.model.cache import KVCache
from arriero.model.linear import Linear, named_products
from arriero.model.llama import Block, Llama
from arriero.model.rope import rope_attention, rope_frequencies
from arriero.model.scaling import DynamicScaling
from arriero.system.cpp import load_cpp

WEIGHT_TYPES = (torch.float32, torch.bfloat16)
FLOAT, BF16, PACKED = range(3)
"""How the C++ step finds weights: its enum `Weights`."""

PACK_AFTER = 32
"""Steps of few sequences after which weights are packed: who has gone on for so long is likely to go on."""

FEW = 3
"""Sequences in a step that still read packed weights; from four on, rows of weights are shared (`multiply`)."""

SHARE_OF_MEMORY = 1 / 8
"""Of the machine's memory, what packed weights may take; larger models stay as they are."""


def native_step(model: Llama, cache: KVCache) -> NativeStep | None:
    """The C++ step for this model and cache, or None where only torch can: see `_fits`, and no compiler."""
    if not _fits(model, cache):
        return None
    library = load_library()
    return None if library is None else NativeStep(library, model, cache)


def _fits(model: Llama, cache: KVCache) -> bool:
    """Whether this is a Llama in plain memory of ours: CPU tensors, linears of one type, bf16 or fp32, no adapters.

    Positions that the scaling of RoPE does not reach are refused by the torch step.
    """
    linears: list[Any] = [model.model.embed_tokens, model.head, *(module for _, module in named_products(model))]
    dtype = model.head.weight.dtype
    return (
        type(model) is Llama
        and not (isinstance(model.config.rope_scaling, DynamicScaling) and cache.capacity > model.config.max_context)
        and all(type(m) in (Linear, nn.Embedding) and type(m.weight.data) is Tensor for m in linears)
        and all(m.weight.dtype == dtype and m.weight.is_contiguous() and m.weight.is_cpu for m in linears)
        and dtype in WEIGHT_TYPES
        and cache.k.dtype in WEIGHT_TYPES
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled."""
    library = load_cpp(Path(__file__).with_suffix(".cpp"), "decoding through torch, several times slower")
    if library is not None:
        library.arriero_pack.restype = ctypes.c_void_p
        library.arriero_pack.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        library.arriero_unpack.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        library.arriero_free_packed.argtypes = (ctypes.c_void_p,)
    return library


class _Layer(ctypes.Structure):
    names = ("q", "k", "v", "o", "gate", "up", "down", "attention_norm", "ffn_norm")
    _fields_ = tuple((name, ctypes.c_void_p) for name in names)


class _Step(ctypes.Structure):
    """The C++ `Step`, field by field."""

    _fields_ = (
        *(
            (n, ctypes.c_int64)
            for n in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
        ),
        ("norm_eps", ctypes.c_double),
        ("rope_attention", ctypes.c_double),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "norm", "frequencies", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("cache_rows", "capacity", "n")),
        *((name, ctypes.c_void_p) for name in ("tokens", "rows", "positions", "logits")),
        *((name, ctypes.c_int64) for name in ("threads", "bf16_cache", "weights")),
    )


class CompressedWeights:
    """bf16 matrices [rows, width], at twelve bits a weight where width is a multiple of 64; others are not compressed.

    `fresh` is whether the matrices are unchanged since, and `holds` whether it was made of the given ones.
    """

    def __init__(self, library: ctypes.CDLL, matrices: Sequence[Tensor]) -> None:
        self._library, self._matrices = library, matrices
        self._counted = [m for m in matrices if not m.is_inference()]  # nothing trains an inference tensor
        self._versions = self._count()
        sizes = [0 if m.shape[1] % 64 else m.numel() * 3 // 2 for m in matrices]
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8)
        start = self._memory.data_ptr()

        def pack(matrix: Tensor, size: int, end: int) -> int:
            return int(library.arriero_pack(matrix.data_ptr(), *matrix.shape, start + end - size if size else None))

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # other threads run during a call
            self.pointers = list(pool.map(pack, matrices, sizes, itertools.accumulate(sizes)))
        weakref.finalize(self, _free, library, self.pointers)

    def fresh(self) -> bool:
        """Whether no matrix was changed in place, as an optimizer does it."""
        return self._count() == self._versions

    def holds(self, matrices: Sequence[Tensor]) -> bool:
        """Whether it was packed from just these as they are; never for inference tensors, which count no changes."""
        if len(self._counted) < len(matrices) or not self.fresh():
            return False
        return all(a.data_ptr() == b.data_ptr() for a, b in zip(self._matrices, matrices, strict=True))

    def _count(self) -> int:
        return sum([m._version for m in self._counted])

    def unpack(self, i: int) -> Tensor:
        """Matrix i again, to the bit."""
        matrix = torch.empty_like(self._matrices[i])
        self._library.arriero_unpack(self.pointers[i], *matrix.shape, matrix.data_ptr())
        return matrix


_PACKED: weakref.WeakKeyDictionary[Llama, CompressedWeights] = weakref.WeakKeyDictionary()
"""What a generation of each model left for the next ones."""


def _room_to_pack(matrices: Sequence[Tensor]) -> bool:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sum(m.numel() for m in matrices) * 12 / 8 <= SHARE_OF_MEMORY * memory


def _free(library: ctypes.CDLL, pointers: Sequence[int]) -> None:
    for pointer in pointers:
        library.arriero_free_packed(pointer)


_Found = tuple["ctypes.Array[_Layer]", int, int]
"""Where a step finds its weights: the fields layers, head and weights of `_Step`."""


class NativeStep:
    """One token for some rows of a cache: logits fp32 [n, V] from tokens [n] that follow rows `rows` [n].

    Sums are fp32 whatever the weights are stored in, so it is nearer to an fp32 forward than torch's bf16 is.
    """

    def __init__(self, library: ctypes.CDLL, model: Llama, cache: KVCache) -> None:
        config = model.config
        self._library, self.cache, self.vocab_size = library, cache, config.vocab_size
        self._held: list[Tensor] = []
        self._matrices: list[Tensor] = []  # layer after layer, then the head
        self._norms: list[tuple[int, int]] = []
        for block in model.model.layers:
            assert isinstance(block, Block)
            a, f, norms = block.self_attn, block.mlp, (block.input_layernorm, block.post_attention_layernorm)
            linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, f.gate_proj, f.up_proj, f.down_proj)
            self._matrices += [linear.weight.detach() for linear in linears]
            self._norms.append((self._pointer(norms[0].weight.float()), self._pointer(norms[1].weight.float())))
        self._matrices.append(model.head.weight.detach())
        kind = WEIGHT_TYPES.index(model.head.weight.dtype)
        self._plain = self._found([matrix.data_ptr() for matrix in self._matrices], kind)
        self._packed: tuple[CompressedWeights, _Found] | None = None
        self._model = model
        if (earlier := _PACKED.get(model)) is not None:
            self._read_packed(earlier if earlier.holds(self._matrices) else None)
        self._until_packing = PACK_AFTER if kind == BF16 and _room_to_pack(self._matrices) else -1
        self._step = _Step(
            config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim, config.ffn_dim,
            config.vocab_size, config.norm_eps, rope_attention(config),
            embedding=self._pointer(model.model.embed_tokens.weight),
            norm=self._pointer(model.model.norm.weight.float()), frequencies=self._pointer(rope_frequencies(config)),
            keys=self._pointer(cache.k), values=self._pointer(cache.v),
            cache_rows=cache.k.shape[1], capacity=cache.capacity,
            threads=torch.get_num_threads(), bf16_cache=cache.k.dtype == torch.bfloat16,
        )  # fmt: skip

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        positions = self.cache.lengths[rows]
        if int(positions.max()) >= self.cache.capacity:
            raise ValueError(f"KV cache: full at its capacity of {self.cache.capacity} tokens; make a larger cache")
        logits = torch.empty(len(tokens), self.vocab_size)
        step = self._step
        step.layers, step.head, step.weights = self._weights(len(tokens))
        step.n, step.tokens, step.rows = len(tokens), tokens.data_ptr(), rows.data_ptr()
        step.positions, step.logits = positions.data_ptr(), logits.data_ptr()
        self._library.arriero_decode_step(ctypes.byref(step))
        self.cache.lengths[rows] += 1
        return logits

    def _weights(self, n: int) -> _Found:
        """What a step of n sequences reads: the tensors, or what was packed from them as they still are."""
        if n > FEW:
            return self._plain
        self._until_packing -= 1
        if self._packed is not None and not self._packed[0].fresh():
            self._read_packed(None)
        elif self._packed is None and self._until_packing == 0:
            self._read_packed(CompressedWeights(self._library, self._matrices))
        return self._plain if self._packed is None else self._packed[1]

    def _read_packed(self, packed: CompressedWeights | None) -> None:
        """Read `packed` from now on, as all later steps of the model will; None: the tensors."""
        if packed is None:
            self._packed = None
            _PACKED.pop(self._model, None)
        else:
            self._packed = packed, self._found(packed.pointers, PACKED)
            _PACKED[self._model] = packed

    def _found(self, pointers: Iterable[int], kind: int) -> _Found:
        each = iter(pointers)
        layers = [_Layer(*itertools.islice(each, 7), *norms) for norms in self._norms]
        return (_Layer * len(layers))(*layers), next(each), kind

    def _pointer(self, tensor: Tensor) -> int:
        self._held.append(tensor.detach())
        return tensor.data_ptr()
