"""A GRPO step (sample, score, update): 16 prompts x 8 answers x 24 tokens, LoRA rank 16, SmolLM2-135M, against TRL's.

    python bench/grpo.py [--steps 4] [--peer PYTHON] [--peer-precisions fp32 bf16]

PYTHON is an interpreter that has trl and peft beside torch and transformers; without it only our side is measured. Each
side is a process of its own, one after the other, with one batch shape, reward and learning rate; all answers are cut
at 24 tokens, since what is asked for is long. The faster of TRL's precisions counts: CPUs without AVX-512 multiply bf16
many times slower than fp32, so bf16 has to be asked for. Prints one JSON line: seconds of a step (median without the
first), where ours go, tokens sampled a step, and each side's peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS, ANSWERS, TOKENS = 16, 8, 24
TOPICS = ("rivers", "wool", "mountains", "llamas", "bread", "clouds", "trains", "glass", "maps", "salt", "moss")


def asked(n: int) -> list[str]:
    """Questions whose answers are long."""
    return [f"Tell me a long story, number {i}, about {TOPICS[i % len(TOPICS)]}." for i in range(n)]


def reward(text: str) -> float:
    """The share of one letter: no two answers have the same."""
    return text.count("e") / max(len(text), 1)


def peak_bytes() -> int:
    """Of this process, resident."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def ours(steps: int, precision: str) -> dict[str, Any]:
    from arriero.rewards.base import Score, Scorer
    from arriero.show.terminal import notes
    from arriero.train import grpo
    from arriero.train.config import LoopConfig
    from arriero.train.rl_config import GrpoConfig, PromptConfig, RolloutConfig

    class ByLetter(Scorer):
        def __call__(self, answers: Any) -> list[Score]:
            return [Score(reward(answer.text)) for answer in answers]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked(PROMPTS * steps)))
        config = GrpoConfig(
            model="smollm2-135m", out=str(Path(folder) / "run"), data=PromptConfig(train=str(path), validation="0"),
            rollout=RolloutConfig(answers=ANSWERS, max_new_tokens=TOKENS, truncated="score"),
            loop=LoopConfig(steps=steps, batch_rows=PROMPTS, micro_rows=4, precision=precision),  # type: ignore[arg-type]
        )  # fmt: skip
        run = grpo.build(config, notes(quiet=True), None, ByLetter())
        found = []
        for step in range(steps):
            began = time.perf_counter()
            rollout = run.prepared.rollouts(step)
            sampled = time.perf_counter()
            run.trainer.update(rollout)
            ended = time.perf_counter()
            tokens = sum(len(a.ids) for g in rollout.groups for a in g.answers)
            found.append(
                {
                    "step": ended - began,
                    "sample": rollout.metrics["sampling_seconds"],
                    "score": rollout.metrics["scoring_seconds"],
                    "update": ended - sampled,
                    "tokens": tokens,
                }
            )
        memory = run.prepared.rollouts.sampler.memory
    return {**_medians(found), "peak_gb": round(peak_bytes() / 1e9, 2), "cache_gb": round(memory["cache"] / 1e9, 2)}


def theirs(steps: int, precision: str, model: str) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl import __version__ as version

    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        on_train_end = on_step_begin

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PROMPTS * ANSWERS, gradient_accumulation_steps=1,
            num_generations=ANSWERS, max_completion_length=TOKENS, max_steps=steps, learning_rate=1e-4, beta=0.0,
            temperature=1.0, loss_type="dapo", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", lr_scheduler_type="constant", disable_tqdm=True,
        )  # fmt: skip
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
            reward_funcs=lambda completions, **_: [reward(c[0]["content"]) for c in completions],
            args=settings,
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": text}]} for text in asked(PROMPTS * steps)]
            ),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    found = [{"step": b - a} for a, b in itertools.pairwise(marks)]
    return {**_medians(found), "peak_gb": round(peak_bytes() / 1e9, 2), "trl": version}


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Without the first step, which warms up."""
    return {name: round(statistics.median(x[name] for x in found[1:]), 3) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--peer", default="")
    parser.add_argument("--peer-precisions", nargs="+", default=["fp32"])
    parser.add_argument("--side", choices=("arriero", "trl"))
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--model", default="")
    args = parser.parse_args()
    if args.side:
        told = (args.steps, args.precision)
        print(json.dumps(ours(*told) if args.side == "arriero" else theirs(*told, args.model)))
        return

    def side(python: str, name: str, precision: str, model: str = "") -> dict[str, Any]:
        told = [__file__, "--steps", str(args.steps), "--side", name, "--precision", precision, "--model", model]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run([python, *told], capture_output=True, text=True, env=offline)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]

    report: dict[str, Any] = {"bench": "grpo", "arriero": side(sys.executable, "arriero", "bf16")}
    if args.peer:
        from arriero.checkpoint.convert import convert

        with tempfile.TemporaryDirectory() as folder:
            model = str(Path(folder) / "model")
            convert("smollm2-135m", model, to="hf")
            for precision in args.peer_precisions:
                report[f"trl {precision}"] = side(args.peer, "trl", precision, model)
        best = min(report[f"trl {precision}"]["step"] for precision in args.peer_precisions)
        report["times faster"] = round(best / report["arriero"]["step"], 2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
