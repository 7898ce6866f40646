"""How fast this machine runs a model, by number type: prefill, and decoding of 1, 8 and 32 answers at a time.

Every number is of whole tokens as the engine gives them to its callers: scheduling, the model, and sampling at
temperature 0.6 and top-p 0.9. The types take turns, so that what else the machine does meanwhile meets all alike.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from arriero.errors import check
from arriero.infer.config import BenchConfig, SamplingConfig
from arriero.infer.engine import Engine
from arriero.infer.request import Request
from arriero.model.llama import Llama
from arriero.model.packed import pack_linears
from arriero.quant import int8
from arriero.quant.packed import Quantized, from_indices
from arriero.quant.rounding import GROUP

SAMPLED = SamplingConfig(temperature=0.6, top_p=0.9, seed=0)
PROMPT = 32  # tokens before those that decoding is timed by
WORTH_IT = {"bf16": 1.0, "int8": 1.1, "int4": 1.3}
"""How many times as fast as bf16 a type must decode to be worth what it loses: int8 next to nothing, int4 something."""


@dataclass
class Speeds:
    """Of one type, in tokens/s: medians over the rounds."""

    kind: str
    weights: int  # bytes, as the model holds them
    prefill: float = 0.0
    decode: dict[int, float] = field(default_factory=dict)  # answers at a time -> tokens/s in total


def measure(model: Llama, config: BenchConfig, on_turn: Callable[[], object] = lambda: None) -> list[Speeds]:
    """The speeds of each type of `config`. model: in bf16. on_turn: called after each of `turns(config)`."""
    room = model.config.max_context
    check(config.prefill < room, f"prefill is {config.prefill}; the model's context is {room} tokens: ask for fewer")
    check(
        PROMPT + config.new_tokens < room,
        f"new_tokens is {config.new_tokens}; {PROMPT} more of a prompt do not fit the context of {room} tokens",
    )
    models = {kind: of_type(model, kind) for kind in config.types}
    speeds = {kind: Speeds(kind, _bytes(held)) for kind, held in models.items()}
    most = max(config.batches)
    longest = max(config.prefill, PROMPT + config.new_tokens) + 2
    engines = {
        kind: Engine(
            held,
            max_running=most,
            step_tokens=max(512, most),
            context=min(room, longest),
            activation_bits=15 if kind == "bf16" else config.activation_bits,  # which bf16 does not have
        )
        for kind, held in models.items()
    }
    for engine in engines.values():  # what a first step costs once
        engine.generate([Request([0], 2, SAMPLED, stop_ids=(), text=False)])
    found: dict[tuple[str, int], list[float]] = {}
    for turn in range(config.rounds):
        for kind, engine in engines.items():
            found.setdefault((kind, 0), []).append(prefill_speed(engine, config.prefill, turn))
            on_turn()
            for batch in config.batches:
                speed = decode_speed(engine, batch, config.new_tokens, turn)
                found.setdefault((kind, batch), []).append(speed)
                on_turn()
    for kind, its in speeds.items():
        its.prefill = statistics.median(found[kind, 0])
        its.decode = {batch: statistics.median(found[kind, batch]) for batch in config.batches}
    return list(speeds.values())


def turns(config: BenchConfig) -> int:
    """How many measurements there are."""
    return config.rounds * len(config.types) * (1 + len(config.batches))


def prefill_speed(engine: Engine, length: int, turn: int) -> float:
    """Tokens/s of reading one prompt, up to its answer's first token."""
    # the salt: the prompts that decoding was timed by may begin alike, and are in the cache
    request = Request(_ids(length, turn), 1, SAMPLED, stop_ids=(), text=False, salt=f"prefill {turn}")
    began = time.perf_counter()
    engine.generate([request])
    return length / (time.perf_counter() - began)


def decode_speed(engine: Engine, batch: int, new_tokens: int, turn: int) -> float:
    """Tokens/s in total of `batch` answers at a time, once all of them have begun."""
    for i in range(batch):
        ids = _ids(PROMPT, 1 + turn * batch + i)
        engine.submit(Request(ids, new_tokens + 1, SAMPLED, stop_ids=(), text=False))
    begun: set[int] = set()
    while len(begun) < batch:
        begun |= {event.request for event in engine.step()}
    began, tokens = time.perf_counter(), 0
    while engine.busy:
        tokens += len(engine.step())
    return tokens / (time.perf_counter() - began)


def _ids(n: int, seed: int) -> list[int]:
    """Ids that every vocabulary has."""
    return torch.randint(0, 100, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def of_type(model: Llama, kind: str) -> Llama:
    """The model with its linears of that type, sharing everything else."""
    if kind == "bf16":
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return pack_linears(copy.deepcopy(model, memo=shared), lambda _, weight: _rounded(weight, kind))


def _rounded(weight: Tensor, kind: str) -> Quantized:
    """The matrix in codes of `kind`, as fast as can be: speed does not depend on the values."""
    if kind == "int8":
        codes, scales = int8.quantize(weight)
        return Quantized(kind, codes, scales[:, None])
    groups = weight.float().view(len(weight), -1, GROUP[kind])
    scales = groups.abs().amax(2) / 7
    codes = (groups / scales.clamp(min=1e-30)[:, :, None]).round_().clamp_(-8, 7) + 8
    return from_indices(kind, codes.view(weight.shape), scales)


def _bytes(model: Llama) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def choice(speeds: list[Speeds]) -> str:
    """The type to take here, and why, in a sentence."""
    by_kind = {s.kind: next(iter(s.decode.values())) for s in speeds}
    if "bf16" not in by_kind:
        best = max(by_kind, key=by_kind.__getitem__)
        return f"{best} decodes fastest here."
    gain = {kind: speed / by_kind["bf16"] for kind, speed in by_kind.items()}
    worth = [kind for kind in by_kind if gain[kind] >= WORTH_IT[kind]]
    best = max(worth, key=lambda kind: gain[kind] / WORTH_IT[kind])
    if best == "bf16":
        return "bf16: no other type decodes so much faster here that it is worth its rounding."
    loses = "next to no quality" if best == "int8" else "some quality"
    return (
        f"{best}: it decodes {gain[best]:.2f} times as fast as bf16 here and loses {loses}; "
        f"`arriero quantize MODEL OUT --type {best} --validation FILE` says how much on your text."
    )


def table(speeds: list[Speeds], config: BenchConfig) -> Table:
    """For the terminal."""
    rounded = f", activations in {config.activation_bits} bits" if config.activation_bits != 15 else ""
    made = Table(title=f"tokens/s, sampled (threads: {torch.get_num_threads()}{rounded})")
    made.add_column("type")
    made.add_column("weights", justify="right")
    made.add_column(f"prefill of {config.prefill}", justify="right")
    for batch in config.batches:
        made.add_column(f"decode, {batch} at a time", justify="right")
    for s in speeds:
        decode = (f"{s.decode[batch]:,.1f}" for batch in config.batches)
        made.add_row(s.kind, f"{s.weights / 1e6:,.0f} MB", f"{s.prefill:,.0f}", *decode)
    return made


def figure(speeds: list[Speeds], config: BenchConfig) -> Figure:
    """Bars for each type: prefill, and decoding by the number of answers at a time."""
    made = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = made.subplots(1, 2, width_ratios=[1, len(config.batches)])
    axes[0].bar([s.kind for s in speeds], [s.prefill for s in speeds], color="#8a5a2b")
    axes[0].set_title(f"prefill of {config.prefill}")
    axes[0].set_ylabel("tokens/s")
    width = 0.8 / len(speeds)
    for i, s in enumerate(speeds):
        places = [b + (i - (len(speeds) - 1) / 2) * width for b in range(len(config.batches))]
        axes[1].bar(places, [s.decode[batch] for batch in config.batches], width, label=s.kind)
    axes[1].set_xticks(range(len(config.batches)), [str(batch) for batch in config.batches])
    axes[1].set_title("decode, by answers at a time")
    axes[1].legend()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return made
