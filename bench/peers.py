"""Other engines on the same weights, prompts and settings, as ways that bench/inference.py measures by turns.

Each is imported only when it is measured. llama-cpp-python should be compiled on the machine
(CMAKE_ARGS=-DGGML_NATIVE=ON); onnxruntime-genai (with onnx and onnx_ir, for its builder) and openvino-genai choose
their kernels when they run. ik_llama.cpp is not among them: its sources do not build here, and its published wheel
aborts in batches (docs/log.md). All prompts of a batch are read first; what is timed then is the tokens after the
first one. Sampling is each library's own, at temperature 0.6 and top-p 0.9.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arriero.checkpoint.convert import convert
from arriero.checkpoint.load import load_model
from arriero.checkpoint.quantize import quantize

MODEL = "smollm2-135m"
PROMPT, NEW, PREFILL, MOST = 32, 48, 512, 64
TEMPERATURE, TOP_P = 0.6, 0.9

Way = Callable[[int, int], float]
"""(answers at a time, or 0 for prefill; the round) -> tokens/s."""


def tokens_of(turn: int, sequence: int, length: int) -> list[int]:
    """The prompt of a sequence in a round: tokens below 100, so that every library takes them."""
    drawn = torch.Generator().manual_seed(turn * MOST + sequence)
    return [int(token) for token in torch.randint(0, 100, (length,), generator=drawn)]


def gguf(folder: Path, type: str) -> Path:
    """The built-in model as a GGUF file: bf16 and f16 as they are, int8 and int4 calibrated, as Q8_0 and Q4_0."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{type}.gguf"
    if path.exists():
        return path
    if type in ("bf16", "f16"):
        return convert(MODEL, path, to="gguf", dtype=type)  # type: ignore[arg-type]
    quantize(MODEL, path, type=type, format="gguf")  # type: ignore[arg-type]
    return path


class LlamaCpp:
    """llama.cpp's library with a model and room for `cells` tokens of `sequences` sequences."""

    def __init__(self, path: Path, sequences: int, cells: int, step: int, threads: int) -> None:
        import llama_cpp as c

        self.c, self._quiet = c, c.llama_log_callback(lambda *_: None)  # called for as long as the library lives
        c.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        settings = c.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = cells, step, 512, sequences
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self.context = c.llama_init_from_model(self.model, settings)
        self._batch = c.llama_batch_init(2 * step, 0, 1)

    @property
    def memory(self) -> Any:
        """Of keys and values, as the library names it."""
        return self.c.llama_get_memory(self.context)

    def sampler(self, *parts: Any) -> Any:
        """These parts in a chain."""
        chain = self.c.llama_sampler_chain_init(self.c.llama_sampler_chain_default_params())
        for part in parts:
            self.c.llama_sampler_chain_add(chain, part)
        return chain

    def forward(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, sequence, whether its logits are wanted) each."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if self.c.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp: llama_decode failed")


def llama_cpp(folder: Path, type: str) -> Way:
    library = LlamaCpp(gguf(folder, type), MOST, MOST * 128, 512, torch.get_num_threads())
    c, context, forward = library.c, library.context, library.forward
    samplers = [
        library.sampler(
            c.llama_sampler_init_top_p(TOP_P, 1),
            c.llama_sampler_init_temp(TEMPERATURE),
            c.llama_sampler_init_dist(seed),
        )
        for seed in range(MOST)
    ]

    def run(n: int, turn: int) -> float:
        c.llama_memory_clear(library.memory, True)
        length = PROMPT if n else PREFILL
        began = time.perf_counter()
        last = []
        for s in range(max(n, 1)):
            forward([(token, p, s, p == length - 1) for p, token in enumerate(tokens_of(turn, s, length))])
            last.append(c.llama_sampler_sample(samplers[s], context, length - 1))
        if not n:
            return length / (time.perf_counter() - began)
        began = time.perf_counter()
        for step in range(NEW):
            forward([(token, PROMPT + step, s, True) for s, token in enumerate(last)])
            last = [c.llama_sampler_sample(samplers[s], context, s) for s in range(n)]
        return n * NEW / (time.perf_counter() - began)

    return run


def openvino(folder: Path, type: str) -> Way:
    import openvino as ov
    import openvino_genai as genai

    settings = genai.SchedulerConfig()
    settings.cache_size, settings.max_num_seqs, settings.max_num_batched_tokens = 1, MOST, 2048
    settings.enable_prefix_caching = False
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    pipe = genai.ContinuousBatchingPipeline(str(gguf(folder, type)), settings, "CPU", threads)

    def run(n: int, turn: int) -> float:
        sampling = genai.GenerationConfig()
        sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k = True, TEMPERATURE, TOP_P, 0
        sampling.ignore_eos, sampling.max_new_tokens = True, NEW + 1 if n else 1
        length = PROMPT if n else PREFILL
        handles = [  # a request whose handle is gone is dropped
            pipe.add_request(s, ov.Tensor(np.array([tokens_of(turn, s, length)], dtype=np.int64)), sampling)
            for s in range(max(n, 1))
        ]
        began = time.perf_counter()
        pipe.step()
        if not n:
            return length / (time.perf_counter() - began)
        began, steps = time.perf_counter(), 0
        while pipe.has_non_finished_requests():
            pipe.step()
            steps += 1
        seconds = time.perf_counter() - began
        assert steps == NEW and len(handles) == n, f"openvino: {steps} steps, not {NEW}"
        return n * NEW / seconds

    return run


def onnxruntime(folder: Path, type: str) -> Way:
    import onnxruntime_genai as genai

    path = folder / f"onnx-{type}"
    if not path.is_dir():
        source = convert(MODEL, folder / "hf", to="hf", dtype="bf16", force=True)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", path, "-p", type]
        options = ["int4_accuracy_level=4"] if type == "int4" else []  # sums of products of int8, its fastest
        extra = ["--extra_options", *options] if options else []
        subprocess.run([*builder, "-e", "cpu", "-c", folder / "cache", *extra], check=True, capture_output=True)
    config = genai.Config(str(path))
    threads = {"intra_op_num_threads": torch.get_num_threads()}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = genai.Model(config)

    def run(n: int, turn: int) -> float:
        length = PROMPT if n else PREFILL
        params = genai.GeneratorParams(model)
        params.set_search_options(
            do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, batch_size=max(n, 1),
            max_length=length + NEW + 1, min_length=length + NEW + 1,
        )  # fmt: skip
        generator = genai.Generator(model, params)
        began = time.perf_counter()
        generator.append_tokens(np.array([tokens_of(turn, s, length) for s in range(max(n, 1))], dtype=np.int32))
        generator.generate_next_token()
        if not n:
            return length / (time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(NEW):
            generator.generate_next_token()
        return n * NEW / (time.perf_counter() - began)

    return run


def transformers(folder: Path, type: str) -> Way:
    import transformers

    transformers.logging.set_verbosity_error()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[type]
    model = load_model(MODEL, dtype=dtype)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf())).to(dtype).eval()
    other.load_state_dict(model.state_dict())

    @torch.inference_mode()
    def run(n: int, turn: int) -> float:
        torch.manual_seed(turn)
        ids = torch.tensor([tokens_of(turn, s, PROMPT if n else PREFILL) for s in range(max(n, 1))])
        began, new = time.perf_counter(), NEW if n else 1
        other.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True,
            temperature=TEMPERATURE, top_p=TOP_P, top_k=0, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return (n * NEW if n else PREFILL) / (time.perf_counter() - began)

    return run


PEERS: dict[str, tuple[Callable[[Path, str], Way], str, str]] = {
    "llama.cpp-BF16": (llama_cpp, "bf16", "llama_cpp"),
    "llama.cpp-Q8_0": (llama_cpp, "int8", "llama_cpp"),
    "llama.cpp-Q4_0": (llama_cpp, "int4", "llama_cpp"),
    "openvino-F16": (openvino, "f16", "openvino_genai"),
    "openvino-Q8_0": (openvino, "int8", "openvino_genai"),
    "openvino-Q4_0": (openvino, "int4", "openvino_genai"),
    "onnxruntime-fp32": (onnxruntime, "fp32", "onnxruntime_genai"),
    "onnxruntime-int4": (onnxruntime, "int4", "onnxruntime_genai"),
    "transformers-bf16": (transformers, "bf16", "transformers"),
}
"""Name -> how its way is made, its number type, and the module that it needs."""
