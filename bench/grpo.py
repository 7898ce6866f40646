"""A GRPO step (sample, score, update): 16 prompts x 8 answers x 24 tokens, LoRA rank 16, SmolLM2-135M, against TRL's.

    python bench/grpo.py [--steps 4] [--peer PYTHON] [--precisions fp32 bf16] [--peer-precisions fp32 bf16]

PYTHON and precisions are those of sides.py. One batch shape, reward and learning rate; all answers are cut at 24
tokens, since what is asked for is long. CPUs without AVX-512 multiply bf16 many times slower than fp32 in torch, so
TRL's bf16 has to be asked for. TRL updates on 16 answers at a time (all 128 at once take it over 14 GB). Prints one
JSON line: seconds of a step (median without the first), where ours go, tokens sampled a step, and each side's peak
memory. `processor` is what all threads worked: on a machine that others use
too, compare that, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import sides

ANSWERS, TOKENS, PEER_ROWS = 8, 24, 16  # of a prompt, of an answer; answers that TRL updates on at once
TOPICS = ("rivers", "wool", "mountains", "llamas", "bread", "clouds", "trains", "glass", "maps", "salt", "moss")


def asked(n: int) -> list[str]:
    """Questions whose answers are long."""
    return [f"Tell me a long story, number {i}, about {TOPICS[i % len(TOPICS)]}." for i in range(n)]


def reward(text: str) -> float:
    """The share of one letter: no two answers have the same."""
    return text.count("e") / max(len(text), 1)


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from arriero.rewards.base import Score, Scorer
    from arriero.show.terminal import notes
    from arriero.train import grpo
    from arriero.train.config import LoopConfig
    from arriero.train.rl_config import GrpoConfig, PromptConfig, RolloutConfig

    steps = args.steps

    class ByLetter(Scorer):
        def __call__(self, answers: Any) -> list[Score]:
            return [Score(reward(answer.text)) for answer in answers]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked(args.prompts * steps)))
        config = GrpoConfig(
            model="smollm2-135m", out=str(Path(folder) / "run"), data=PromptConfig(train=str(path), validation="0"),
            rollout=RolloutConfig(answers=ANSWERS, max_new_tokens=TOKENS, truncated="score"),
            loop=LoopConfig(steps=steps, batch_rows=args.prompts, micro_rows=args.micro_rows, precision=args.precision),
        )  # fmt: skip
        run = grpo.build(config, notes(quiet=True), None, ByLetter())
        found = []
        for step in range(steps):
            began, worked = time.perf_counter(), time.process_time()
            rollout = run.prepared.rollouts(step)
            sampled = time.perf_counter()
            run.trainer.update(rollout)
            ended = time.perf_counter()
            tokens = sum(len(a.ids) for g in rollout.groups for a in g.answers)
            found.append(
                {
                    "seconds": ended - began,
                    "processor": time.process_time() - worked,
                    "sample": rollout.metrics["sampling_seconds"],
                    "score": rollout.metrics["scoring_seconds"],
                    "update": ended - sampled,
                    "tokens": tokens,
                }
            )
        memory = run.prepared.rollouts.sampler.memory
    return {
        **_medians(found),
        "peak_gb": round(sides.peak_bytes() / 1e9, 2),
        "cache_gb": round(memory["cache"] / 1e9, 2),
    }


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl import __version__ as version

    steps = args.steps
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        on_train_end = on_step_begin

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PEER_ROWS,
            gradient_accumulation_steps=args.prompts * ANSWERS // PEER_ROWS,
            num_generations=ANSWERS, max_completion_length=TOKENS, max_steps=steps, learning_rate=1e-4, beta=0.0,
            temperature=1.0, loss_type="dapo", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", lr_scheduler_type="constant", disable_tqdm=True,
        )  # fmt: skip
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
            reward_funcs=lambda completions, **_: [reward(c[0]["content"]) for c in completions],
            args=settings,
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": text}]} for text in asked(args.prompts * steps)]
            ),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    found = [{"seconds": b[0] - a[0], "processor": b[1] - a[1]} for a, b in itertools.pairwise(marks)]
    return {**_medians(found), "peak_gb": round(sides.peak_bytes() / 1e9, 2), "trl": version}


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Without the first step, which warms up."""
    return {name: round(statistics.median(x[name] for x in found[1:]), 3) for name in found[0]}


def main() -> None:
    parser = sides.parser(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--micro-rows", type=int, default=4, help="groups that ours updates at once")
    parser.add_argument("--prompts", type=int, default=16, help="of a step, a multiple of 4")
    args = parser.parse_args()
    own = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("steps", "micro-rows", "prompts")]
    sides.run("grpo", __file__, args, own, ours, theirs)


if __name__ == "__main__":
    main()
