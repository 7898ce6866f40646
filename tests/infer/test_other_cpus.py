"""The kernels for ARM's NEON, under an emulator: they compile, and compute what this CPU's do, in any schedule.

Needs Debian's qemu-user and g++-aarch64-linux-gnu (or what CXX_ARM and QEMU_ARM name); without them it is skipped.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.infer import native_step as native
from arriero.infer.native_step import NativeStep, PackedMatrix
from arriero.infer.step import StepInput
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.model.quantized import quantize_linears
from arriero.model.rope import rope_attention, rope_frequencies

CXX = os.environ.get("CXX_ARM", "aarch64-linux-gnu-g++")
QEMU = os.environ.get("QEMU_ARM", "qemu-aarch64")
CONFIG = LlamaConfig(64, 2, 6, 2, 128, 131, 1024, head_dim=32)
N_BLOCKS = 12

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        shutil.which(CXX) is None or shutil.which(QEMU) is None,
        reason=f"{CXX} or {QEMU} is not there; install g++-aarch64-linux-gnu and qemu-user",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("arm") / "step"
    folder = Path(native.__file__).parent / "native"
    source = Path(__file__).with_name("step_from_file.cpp")
    flags = ["-std=c++17", "-O2", "-Wno-psabi", "-static", "-pthread", f"-I{folder}"]
    subprocess.run([CXX, *flags, str(source), "-o", str(out)], check=True, capture_output=True, timeout=900)
    return out


def toy(kind: str) -> Llama:
    model = Llama(CONFIG).init_weights(std=0.15, seed=4).requires_grad_(False)
    if kind in ("int8", "nf4"):
        return quantize_linears(model, kind)
    return model if kind == "fp32" else model.to(torch.bfloat16)


def ints(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def array(values: Tensor | np.ndarray | None) -> bytes:
    if values is None:
        return ints(0)
    data = values.contiguous().view(torch.uint8).numpy().tobytes() if isinstance(values, Tensor) else values.tobytes()
    return ints(len(data)) + data


def matrix(m: PackedMatrix) -> bytes:
    parts = (m.data, m.scales, m.minimums, m.values, m.rare, m.rare_ends)
    return ints(m.kind, m.out, m.in_, m.digits) + b"".join(map(array, parts))


def written(step: NativeStep, model: Llama, batches: list[StepInput]) -> bytes:
    """What step_from_file.cpp reads."""
    c = step.config
    out = [ints(c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.ffn_dim, c.vocab_size)]
    out.append(struct.pack("<2d", c.norm_eps, rope_attention(c)))
    for i, block in enumerate(model.model.layers):
        out += map(matrix, step.matrices[7 * i : 7 * i + 7])
        out += (array(n.weight.float()) for n in (block.input_layernorm, block.post_attention_layernorm))
    embedding = model.model.embed_tokens.weight
    out += [matrix(step.head), array(embedding), ints(embedding.dtype == torch.bfloat16)]
    out += [array(model.model.norm.weight.float()), array(rope_frequencies(c).float())]
    out.append(ints(N_BLOCKS, step.keys.dtype == torch.bfloat16, step.keys.nbytes, step.values.nbytes, 2))
    out.append(ints(len(batches)))
    for b in batches:
        out.append(ints(len(b.tokens), b.tables.shape[1], len(b.outputs)))
        out.append(array(b.tokens.astype(np.int64)))
        out += (array(x.astype(np.int32)) for x in (b.positions, b.sequences, b.tables, b.outputs))
    return b"".join(out)


def batches_of(ids: list[list[int]]) -> list[StepInput]:
    """Each document whole, in blocks of its own; then all of them token by token, side by side, in other blocks."""
    tables = np.arange(N_BLOCKS).reshape(len(ids), -1)
    whole = [
        StepInput(np.array(d), np.arange(len(d)), np.zeros(len(d), int), tables[i : i + 1], np.arange(len(d)), [None])
        for i, d in enumerate(ids)
    ]
    cut = []
    for p in range(max(map(len, ids))):
        here = [i for i, d in enumerate(ids) if p < len(d)]
        tokens = np.array([ids[i][p] for i in here])
        n = len(here)
        cut.append(StepInput(tokens, np.full(n, p), np.array(here), tables[::-1], np.arange(n), [None] * len(ids)))
    return whole + cut


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "nf4", "int8 by 8"])
def test_neon_computes_what_this_cpu_does_and_the_same_bits_in_any_schedule(program, kind, tmp_path):
    library = native.load_library()
    assert library is not None
    model = toy(kind.split()[0])
    step = NativeStep(library, model, N_BLOCKS, activation_bits=8 if kind.endswith("by 8") else 15)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, CONFIG.vocab_size, (n,), generator=generator).tolist() for n in (1, 41, 9)]
    batches = batches_of(ids)
    (tmp_path / "in").write_bytes(written(step, model, batches))
    command = [QEMU, str(program), str(tmp_path / "in"), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    logits = torch.from_numpy(np.fromfile(tmp_path / "out", np.float32)).view(-1, CONFIG.vocab_size)
    n = sum(map(len, ids))
    whole = logits[:n].split(list(map(len, ids)))
    ours = torch.cat([step(batch) for batch in batches[: len(ids)]])
    assert (logits[:n] - ours).abs().mean() / ours.abs().mean() < {"bf16": 0.01}.get(kind, 1e-4)
    at = n
    for p in range(max(map(len, ids))):
        for document in whole:
            if p < len(document):
                assert torch.equal(document[p], logits[at]), f"position {p}"
                at += 1
    assert at == len(logits)
