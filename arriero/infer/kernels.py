"""The decode step in C++: compiled on first use, cached, and only ever a faster twin of the torch one.

Decoding one sequence reads every weight once a token, so memory bandwidth is the limit: 269 MB for SmolLM2-135M in
bf16, at 25 GB/s 93 tokens/s. On that machine (two Zen 4 cores, bench/decode.py) torch's own kernels reach 20
tokens/s step by step and 24 in transformers' compiled static-cache decode; this step reaches 89, at 24 GB/s.

The step works on the model's own tensors: no copy, so nothing to go stale. Its pointers are taken by the
constructor, which is cheap (under a millisecond): make one for each generation, after any training step or
`model.to(...)`. The tensors are held for as long as the step lives, so that no pointer can dangle.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from arriero.cpp import load_cpp
from arriero.model.cache import KVCache
from arriero.model.llama import Block, Linear, Llama
from arriero.model.rope import rope_frequencies

WEIGHT_TYPES = (torch.bfloat16, torch.float32)


def native_step(model: Llama, cache: KVCache) -> NativeStep | None:
    """The C++ step for this model and cache, or None where only torch can: see `_fits`, and no compiler."""
    if not _fits(model, cache):
        return None
    library = load_library()
    return None if library is None else NativeStep(library, model, cache)


def _fits(model: Llama, cache: KVCache) -> bool:
    """Whether this is a Llama in plain memory of ours: CPU tensors, linears of one type, bf16 or fp32, no adapters."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    dtype = model.lm_head.weight.dtype
    return (
        type(model) is Llama
        and all(type(m) in (Linear, nn.Embedding) and type(m.weight.data) is Tensor for m in linears)
        and all(m.weight.dtype == dtype and m.weight.is_contiguous() and m.weight.is_cpu for m in linears)
        and dtype in WEIGHT_TYPES
        and cache.k.dtype in WEIGHT_TYPES
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled."""
    return load_cpp(Path(__file__).with_suffix(".cpp"), "decoding through torch, several times slower")


class _Layer(ctypes.Structure):
    names = ("attention_norm", "q", "k", "v", "o", "ffn_norm", "gate", "up", "down")
    _fields_ = tuple((name, ctypes.c_void_p) for name in names)


class _Step(ctypes.Structure):
    """The C++ `Step`, field by field."""

    _fields_ = (
        *(
            (n, ctypes.c_int64)
            for n in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
        ),
        ("norm_eps", ctypes.c_double),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "norm", "frequencies", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("cache_rows", "capacity", "n")),
        *((name, ctypes.c_void_p) for name in ("tokens", "rows", "positions", "logits")),
        *((name, ctypes.c_int64) for name in ("threads", "bf16_weights", "bf16_cache")),
    )


class NativeStep:
    """One token for some rows of a cache: logits fp32 [n, V] from tokens [n] that follow rows `rows` [n].

    Sums are fp32 whatever the weights are stored in, so it is nearer to an fp32 forward than torch's bf16 is.
    """

    def __init__(self, library: ctypes.CDLL, model: Llama, cache: KVCache) -> None:
        config = model.config
        self._run, self.cache, self.vocab_size = library.arriero_decode_step, cache, config.vocab_size
        self._held: list[Tensor] = []
        self._layers = (_Layer * config.n_layers)(*(self._layer(block) for block in model.model.layers))
        self._step = _Step(
            config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim, config.ffn_dim,
            config.vocab_size, config.norm_eps, self._layers,
            self._pointer(model.model.embed_tokens.weight), self._pointer(model.lm_head.weight),
            self._pointer(model.model.norm.weight.float()), self._pointer(rope_frequencies(config)),
            self._pointer(cache.k), self._pointer(cache.v), cache.k.shape[1], cache.capacity,
            threads=torch.get_num_threads(),
            bf16_weights=model.lm_head.weight.dtype == torch.bfloat16,
            bf16_cache=cache.k.dtype == torch.bfloat16,
        )  # fmt: skip

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        positions = self.cache.lengths[rows]
        if int(positions.max()) >= self.cache.capacity:
            raise ValueError(f"KV cache: full at its capacity of {self.cache.capacity} tokens; make a larger cache")
        logits = torch.empty(len(tokens), self.vocab_size)
        step = self._step
        step.n, step.tokens, step.rows = len(tokens), tokens.data_ptr(), rows.data_ptr()
        step.positions, step.logits = positions.data_ptr(), logits.data_ptr()
        self._run(ctypes.byref(step))
        self.cache.lengths[rows] += 1
        return logits

    def _layer(self, block: nn.Module) -> _Layer:
        assert isinstance(block, Block)
        a, f = block.self_attn, block.mlp
        linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, f.gate_proj, f.up_proj, f.down_proj)
        q, k, v, o, gate, up, down = (self._pointer(linear.weight) for linear in linears)
        norms = (self._pointer(n.weight.float()) for n in (block.input_layernorm, block.post_attention_layernorm))
        return _Layer(next(norms), q, k, v, o, next(norms), gate, up, down)

    def _pointer(self, tensor: Tensor) -> int:
        self._held.append(tensor)
        return tensor.data_ptr()
