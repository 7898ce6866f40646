"""Products of one matrix by shape and number of rows: our kernels, torch's (oneDNN) and llama.cpp's, by turns.

    python bench/native_kernels.py [--rows 1 8 32 512] [--shapes 576x1536 ...] [--kinds fp32 bf16 int8 int4]

One thread, by its processor time; GFLOP/s (2 n in out / time), medians. Weights repeat within a call, so small matrices
lie in the cache as in a prefill, and large ones come from memory as in decoding. Peers by kind:

    fp32   F.linear; ggml F32
    bf16   F.linear (left out where the CPU has no instructions for it: hundreds of times slower); ggml BF16
    int8   torch's dynamically quantised linear by oneDNN (activations of eight bits by tensor); ggml Q8_0
    int4   ggml Q4_0

Ours rounds activations to fifteen bits for integers; peers round to eight. What activations are rounded to is counted
for the peers, and apart for us (`rounding`, of all kinds at once). ggml is that of llama-cpp-python built natively
(`--ggml DIRECTORY` of its libraries), its weights in the layout that it repacks them to for this CPU, as llama.cpp does
on opening. Prints one JSON line: by kind, shape and rows the speeds, and our share of the fastest peer's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.infer import native_step
from arriero.infer.measure import _rounded
from arriero.quant.products import computed_in

SHAPES = ("576x1536", "1536x576", "576x49152", "2048x8192", "4096x14336")
GGML = {"fp32": 0, "bf16": 30, "int8": 8, "int4": 2}  # ggml_type
LEAST = 0.02  # seconds of one measurement

Product = Callable[[int], None]
"""The product, so many times."""


def ours(weight: Tensor, kind: str, x: Tensor) -> Product:
    """The step's kernel."""
    library = native_step.load_library()
    assert library is not None, "no C++ compiler here"
    if kind in ("fp32", "bf16"):
        dense = weight if kind == "fp32" else weight.bfloat16()
        packed = native_step.pack_matrix(library, dense)
    else:
        packed = native_step.pack_quantized(library, _rounded(weight, kind))
    engine, struct = library.arriero_open(1), packed.struct()
    y = torch.empty(len(x), len(weight))

    def run(times: int) -> None:
        assert packed.data is not None
        library.arriero_product(engine, ctypes.addressof(struct), x.data_ptr(), len(x), times, y.data_ptr())

    run(1)
    return run


def by_torch(weight: Tensor, kind: str, x: Tensor) -> Product | None:
    """oneDNN's, as torch calls it."""
    if kind == "int8":
        torch.backends.quantized.engine = "onednn"
        scale = float(weight.abs().max()) / 127
        warnings.simplefilter("ignore", UserWarning)  # torch is to drop it, and has nothing else for a CPU
        packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(weight, scale, 0, torch.qint8), None)
        return lambda times: [torch.ops.quantized.linear_dynamic(x, packed) for _ in range(times)] and None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(kind)
    if dtype is None or computed_in(dtype, "cpu") != dtype:
        return None
    w, a = weight.to(dtype), x.to(dtype)
    return lambda times: [F.linear(a, w) for _ in range(times)] and None


class _Room(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """What of ggml's C interface a product needs."""

    def __init__(self, directory: Path) -> None:
        self.base, self.cpu = (ctypes.CDLL(str(directory / f"libggml-{part}.so")) for part in ("base", "cpu"))
        for library, names in (
            (self.base, "init new_tensor_2d mul_mat new_graph backend_alloc_ctx_tensors_from_buft "
                        "backend_get_default_buffer_type backend_reg_get_proc_address backend_reg_dev_get"),
            (self.cpu, "backend_cpu_init backend_cpu_reg"),
        ):  # fmt: skip
            for name in names.split():
                getattr(library, f"ggml_{name}").restype = ctypes.c_void_p
        self.base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.backend = ctypes.c_void_p(self.cpu.ggml_backend_cpu_init())
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, 1)
        registry = ctypes.c_void_p(self.cpu.ggml_backend_cpu_reg())
        extra = self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        device = ctypes.c_void_p(self.base.ggml_backend_reg_dev_get(registry, ctypes.c_size_t(0)))
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(extra)(device)
        self.extra = []
        while kinds and kinds[len(self.extra)]:
            self.extra.append(ctypes.c_void_p(kinds[len(self.extra)]))
        self.plain = ctypes.c_void_p(self.base.ggml_backend_get_default_buffer_type(self.backend))

    def room(self) -> ctypes.c_void_p:
        """A context of descriptions of tensors."""
        return ctypes.c_void_p(self.base.ggml_init(_Room(1 << 20, None, True)))

    def tensor(self, room: ctypes.c_void_p, kind: int, n_in: int, n_out: int) -> ctypes.c_void_p:
        """A tensor that is described only."""
        return ctypes.c_void_p(self.base.ggml_new_tensor_2d(room, kind, ctypes.c_int64(n_in), ctypes.c_int64(n_out)))

    def product(self, weight: Tensor, kind: str, x: Tensor, buffer: ctypes.c_void_p) -> Product:
        """weight in the layout of `buffer`, times x."""
        n_out, n_in = weight.shape
        held, other = self.room(), self.room()
        w, a = self.tensor(held, GGML[kind], n_in, n_out), self.tensor(other, 0, n_in, len(x))
        out = ctypes.c_void_p(self.base.ggml_mul_mat(other, w, a))
        assert self.base.ggml_backend_alloc_ctx_tensors_from_buft(held, buffer)
        assert self.base.ggml_backend_alloc_ctx_tensors_from_buft(other, self.plain)
        data = np.empty(weight.numel() * 4, np.uint8)
        size = self.base.ggml_quantize_chunk(
            GGML[kind], ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(data.ctypes.data), ctypes.c_int64(0),
            ctypes.c_int64(n_out), ctypes.c_int64(n_in), None,
        )  # fmt: skip
        assert size
        self.base.ggml_backend_tensor_set(
            w, ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(size)
        )
        self.base.ggml_backend_tensor_set(
            a, ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(0), ctypes.c_size_t(x.nbytes)
        )
        graph = ctypes.c_void_p(self.base.ggml_new_graph(other))
        self.base.ggml_build_forward_expand(graph, out)

        def run(times: int) -> None:
            for _ in range(times):
                if self.base.ggml_backend_graph_compute(self.backend, graph):
                    raise SystemExit("ggml: the product failed")

        return run

    def products(self, weight: Tensor, kind: str, x: Tensor) -> dict[str, Product]:
        """As it lies in a file, and as it is repacked where this CPU has a layout for the kind."""
        found = {"ggml": self.product(weight, kind, x, self.plain)}
        if kind == "int4" or (kind == "int8" and platform.machine() == "aarch64"):
            for i, buffer in enumerate(self.extra):
                found[f"ggml, repacked {i}"] = self.product(weight, kind, x, buffer)
        return found


def speed(product: Product, operations: float) -> float:
    """GFLOP/s of processor time."""
    times = 1
    while True:
        began = time.process_time()
        product(times)
        took = time.process_time() - began
        if took >= LEAST:
            return times * operations / took / 1e9
        times = max(2 * times, int(1.2 * times * LEAST / max(took, 1e-4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="inputs x outputs")
    parser.add_argument("--kinds", nargs="+", default=list(GGML))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ggml", type=Path, help="where libggml-base.so and libggml-cpu.so are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ggml = None if args.ggml is None else Ggml(args.ggml)
    result: dict[str, Any] = {"bench": "kernels", "cpu": platform.processor() or platform.machine()}
    generator = torch.Generator().manual_seed(0)
    for kind in args.kinds:
        for shape in args.shapes:
            n_in, n_out = map(int, shape.split("x"))
            weight = torch.randn(n_out, n_in, generator=generator) * 0.02
            for rows in args.rows:
                x = torch.randn(rows, n_in, generator=generator)
                products = {"ours": ours(weight, kind, x), "oneDNN": by_torch(weight, kind, x)}
                products |= ggml.products(weight, kind, x) if ggml else {}
                ways = {name: product for name, product in products.items() if product is not None}
                found: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(args.rounds):
                    for name, product in ways.items():
                        found[name].append(speed(product, 2.0 * rows * n_in * n_out))
                medians = {name: round(statistics.median(speeds), 1) for name, speeds in found.items()}
                peers = [value for name, value in medians.items() if name != "ours"]
                if peers:
                    medians["share"] = round(medians["ours"] / max(peers), 2)
                result.setdefault(kind, {}).setdefault(shape, {})[rows] = medians
                print(kind, shape, rows, json.dumps(medians), file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
