"""The proof of an export: another program loads it, and what it says is compared with what Arriero says of the source.

Compared are the ids of twenty prompts, the beginning and end tokens, the ids that end an answer, greedy texts, and ln
p of every token of the prompts and our answers. The source is run by the model that trains (torch, fp32), not by the
engine; an adapter acts on it, not folded. Where a greedy text differs, the first divergence is explained: how far
apart the two tokens are here. A pair nearer than twice the tolerance is a tie; any other is a fault.

Bounds on |ln p - ln p'|: 1e-4 for transformers, 1e-3 for GGUF in fp32. Of other types the mean KL divergence counts:
weights of Q8_0 may cost 0.002 nats, in fp32; llama.cpp rounds activations to eight bits as well in products with such
weights, whoever wrote them, and may lie 0.02 off. Of the rest it is told.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from arriero.checkpoint.load import load
from arriero.errors import CheckpointError, UserError
from arriero.infer.generate import generate
from arriero.model.llama import Llama
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_chat, end_of_answers

Program = Literal["transformers", "llamacpp"]
N_NEW, TAIL = 12, 8
BOUND: dict[Program, float] = {"transformers": 1e-4, "llamacpp": 1e-3}
KLD = {"q8_0": 0.002}  # nats, mean, by the weights alone
KLD_THERE = {"q8_0": 0.02}  # with activations of eight bits too (docs/log.md, "Q8_0 in llama.cpp")
SECONDS = 1800

QUESTIONS = (
    "What is a llama?", "Why do llamas hum?", "¿Dónde viven los guanacos?", "Écris une phrase sur la montagne.",
    "def add(a, b):\n    return", "Name three rivers.", "12 * 12 = ?", "Translate to German: good morning",
    "  spaces   inside\tand tabs  ", "emoji 🦙🏔️ and 汉字", "List:\n- one\n- two\n\nContinue.", "Who wrote Hamlet?",
    "I'LL pay 1234567 dollars", "Reply with JSON.", "a" * 60, "What's the time?", "Sum up: the cat sat on the mat.",
)  # fmt: skip
CONVERSATIONS: list[list[dict[str, str]]] = [
    *([{"role": "user", "content": question}] for question in QUESTIONS),
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "The capital of Peru?"}],
    [
        {"role": "user", "content": "Say one."},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "And two?"},
    ],
    [
        {"role": "system", "content": "You are brief.\nYou are kind."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello. How are you?"},
        {"role": "user", "content": "Well, thank you."},
    ],
]


@dataclass(frozen=True)
class Proof:
    """What was found: over how many prompts and tokens, the largest |difference| of ln p, the mean KL divergence, and
    greedy texts that part at a tie."""

    program: Program
    prompts: int
    tokens: int
    largest: float
    kld: float
    ties: tuple[str, ...]


@dataclass(frozen=True)
class Ours:
    """What Arriero says of the source."""

    tokenizer: Tokenizer
    prompts: list[list[int]]
    answers: list[list[int]]
    logprobs: list[np.ndarray]  # of each prompt with its answer
    tail: np.ndarray
    without: list[np.ndarray] | None  # the same without the adapter
    gaps: list[np.ndarray]  # ln p of all tokens, at each token of each answer


def missing(program: Program) -> str | None:
    """The package that a program's judge lacks here, or None."""
    import importlib.util

    names = {"transformers": ("transformers", "peft"), "llamacpp": ("llama_cpp",)}[program]
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


def ours(source: Path, adapter: Path | None, chat_template: str = "") -> Ours:
    """What the source says, by the model that trains."""
    model, tokenizer = load(source, dtype=torch.float32, adapter=adapter, chat_template=chat_template)
    prompts = [encode_chat(tokenizer, messages) for messages in CONVERSATIONS]
    said = generate(model, tokenizer, prompts, max_new_tokens=N_NEW)
    answers = [[*one.ids, one.stopped_by] if isinstance(one.stopped_by, int) else one.ids for one in said]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    every = [_logprobs(model, ids) for ids in texts]
    logprobs = [row[np.arange(len(ids) - 1), ids[1:]] for row, ids in zip(every, texts, strict=True)]
    tail = np.concatenate([row[-TAIL:] for row in every])
    without = None
    if adapter is not None:
        base, _ = load(source, dtype=torch.float32)
        without = [_logprobs(base, ids)[np.arange(len(ids) - 1), ids[1:]] for ids in texts]
    gaps = [row[len(prompt) - 1 : -1] for row, prompt in zip(every, prompts, strict=True)]
    return Ours(tokenizer, prompts, answers, logprobs, tail, without, gaps)


@torch.inference_mode()
def _logprobs(model: Llama, ids: Sequence[int]) -> np.ndarray:
    """ln p of all tokens behind each, [T, V]."""
    found: np.ndarray = model(torch.tensor([list(ids)]))[0].double().log_softmax(-1).float().numpy()
    return found


def prove(
    program: Program,
    path: Path,
    adapter: Path | None,
    expected: Ours,
    kind: str = "f32",
    source_adapter: Path | None = None,
) -> Proof:
    """Let a program load `path` (and an adapter), and compare.

    kind: the number type of the weights there. source_adapter: the directory that the adapter there was made of.
    Raises `CheckpointError` naming the first thing that is not the source's, `UserError` where the program fails.
    """
    texts = [prompt + answer for prompt, answer in zip(expected.prompts, expected.answers, strict=True)]
    found, tail = _judged(program, path, adapter, texts)
    _check_prompts(path, program, found, expected)
    _check_ends(path, program, found, expected)
    theirs = [np.array(row) for row in found["logprobs"]]
    largest = max(float(np.abs(a - b).max()) for a, b in zip(theirs, expected.logprobs, strict=True))
    kld = _kld(expected, tail)
    exact = kind == "f32"
    if exact and largest > BOUND[program]:
        raise CheckpointError(f"{path}: {_why(theirs, expected, largest, program)}")
    if kind in KLD:
        written, _ = load(path, dtype=torch.float32, adapter=source_adapter)
        rounded = _kld(expected, np.concatenate([_logprobs(written, ids)[-TAIL:] for ids in texts]))
        for where, cost, most in ("of the weights alone", rounded, KLD[kind]), (f"in {program}", kld, KLD_THERE[kind]):
            if cost > most:
                raise CheckpointError(
                    f"{path}: the mean KL divergence from the source {where} is {cost:.4f} nats, over {most} that "
                    f"{kind} may cost"
                )
    ties = _divergences(path, program, found["answers"], expected, 2 * BOUND[program]) if exact else ()
    return Proof(program, len(texts), sum(map(len, theirs)), largest, kld, ties)


def _kld(expected: Ours, tail: np.ndarray) -> float:
    """Mean KL divergence of the source's distributions from these, over the last positions of each text."""
    return float((np.exp(expected.tail) * (expected.tail - tail)).sum(1).mean())


def _judged(
    program: Program, path: Path, adapter: Path | None, texts: list[list[int]]
) -> tuple[dict[str, Any], np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "path": str(path), "adapter": str(adapter) if adapter else None, "messages": CONVERSATIONS, "texts": texts,
            "tail": TAIL, "n_new": N_NEW, "out": folder,
        }  # fmt: skip
        command = [sys.executable, "-m", "arriero.export.judge", program]
        ran = subprocess.run(
            command,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=SECONDS,
            check=False,
        )
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise UserError(f"{path}: {program} cannot load and run it: {last[:500]}")
        return json.loads((Path(folder) / "result.json").read_text("utf-8")), np.load(Path(folder) / "tail.npy")


def _check_prompts(path: Path, program: Program, found: dict[str, Any], expected: Ours) -> None:
    for i, (theirs, mine) in enumerate(zip(found["prompts"], expected.prompts, strict=True)):
        if theirs != mine:
            at = next(
                (k for k, (a, b) in enumerate(zip(theirs, mine, strict=False)) if a != b), min(len(theirs), len(mine))
            )
            here, there = (expected.tokenizer.decode(ids[at : at + 8], skip_special=False) for ids in (mine, theirs))
            raise CheckpointError(
                f"{path}: {program} makes other ids of prompt {i} than the source's template and tokenizer, from token "
                f"{at} on: {there!r} instead of {here!r}; the chat template or the tokenizer is not the source's"
            )


def _check_ends(path: Path, program: Program, found: dict[str, Any], expected: Ours) -> None:
    tokenizer = expected.tokenizer
    for role, mine in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if found[role] != mine and mine is not None:
            raise CheckpointError(f"{path}: the {role} token is {found[role]} in {program}, and {mine} in the source")
    end = end_of_answers(tokenizer)
    if end is not None and end not in found["stops"]:
        text = tokenizer.decode([end], skip_special=False)
        raise CheckpointError(
            f"{path}: {program} does not stop at {text!r} ({end}), with which the chat template ends an answer; its "
            f"stop ids are {found['stops']}"
        )


def _why(theirs: list[np.ndarray], expected: Ours, largest: float, program: Program) -> str:
    """What is wrong with log-probabilities that differ."""
    if expected.without is not None:
        pairs = zip(theirs, expected.without, strict=True)
        if max(float(np.abs(a - b).max()) for a, b in pairs) < min(10 * BOUND[program], largest / 10):
            return f"the adapter does not act in {program}: its log-probabilities are those of the model without it"
    return (
        f"log-probabilities in {program} differ from the source's by up to {largest:.2g}, and may by "
        f"{BOUND[program]:g}: the weights or the shape are not the source's"
    )


def _divergences(path: Path, program: Program, answers: list[list[int]], expected: Ours, tie: float) -> tuple[str, ...]:
    """Where greedy texts part at a tie; raises for any other."""
    told = []
    for i, (theirs, mine) in enumerate(zip(answers, expected.answers, strict=True)):
        at = next((k for k, (a, b) in enumerate(zip(theirs, mine, strict=False)) if a != b), None)
        if at is None:
            if len(theirs) != len(mine):
                raise CheckpointError(
                    f"{path}: {program} ends its answer to prompt {i} after {len(theirs)} tokens, the source after "
                    f"{len(mine)}"
                )
            continue
        row = expected.gaps[i][at]
        gap = float(row[mine[at]] - row[theirs[at]])
        words = [expected.tokenizer.decode([ids[at]], skip_special=False) for ids in (mine, theirs)]
        what = f"prompt {i}, token {at}: {words[1]!r} for {words[0]!r}, {gap:.2g} apart in ln p here"
        if gap > tie:
            raise CheckpointError(f"{path}: {program} says something else: {what}, which is no tie")
        told.append(what)
    return tuple(told)
