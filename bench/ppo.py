"""Memory of a PPO step against that of supervised fine-tuning on the same rows; LoRA rank 16, SmolLM2-135M.

    python bench/ppo.py [--prompts 4] [--answers 4] [--tokens 64] [--micro-rows 4] [--precision fp32]

Each side is a process of its own: two steps, peak resident memory. Taken off are the program (what is resident when
all is imported) and, of PPO's, the engine's weights and cache, as the sampler states them. Fine-tuning learns from rows
of the same tokens: each prompt and the answers behind it. Prints one JSON line with both, their parts and the ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sides

TOPICS = ("rivers", "wool", "mountains", "llamas", "bread", "clouds", "trains", "glass", "maps", "salt", "moss")


def resident() -> int:
    """Bytes of this process now."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Two steps of one side, in this process."""
    from arriero.rewards.base import Score, Scorer
    from arriero.show.terminal import notes
    from arriero.train import ppo
    from arriero.train.config import LoopConfig
    from arriero.train.objectives import next_token
    from arriero.train.policy import dealt, group_row
    from arriero.train.recipe import alone
    from arriero.train.rl_config import PolicyConfig, PpoConfig, PromptConfig, RolloutConfig
    from arriero.train.rollouts import Sampled
    from arriero.train.tuned import open_base

    class ByLetter(Scorer):
        def __call__(self, answers: Any) -> list[Score]:
            return [Score(answer.text.count("e") / max(len(answer.text), 1)) for answer in answers]

    program = resident()
    with tempfile.TemporaryDirectory() as folder:
        path, n = Path(folder) / "prompts.jsonl", 2 * args.prompts
        asked = [f"Tell me a long story, number {i}, about {TOPICS[i % len(TOPICS)]}." for i in range(n)]
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
        config = PpoConfig(
            model="smollm2-135m", out=f"{folder}/run", data=PromptConfig(train=str(path), validation="0"),
            rollout=RolloutConfig(answers=args.answers, max_new_tokens=args.tokens, truncated="score",
                at_once=args.prompts * args.answers),  # so that the cache is written as far as it goes
            policy=PolicyConfig(clip_high=0.2, kl=0.01, kl_in="reward", kl_kind="k1", updates=1),
            loop=LoopConfig(steps=2, batch_rows=args.prompts, micro_rows=args.micro_rows, precision=args.precision),
        )  # fmt: skip
        if args.side == "ppo":
            run = ppo.build(config, notes(quiet=True), None, ByLetter())
            engine = sum(run.prepared.rollouts.sampler.memory.values())
            for _ in range(2):
                run.trainer.step()
        else:
            base, engine = open_base(config, longest=1024), 0
            tuned = base.on(alone(), tokens=0)
            learner, rng = tuned.learner(next_token(), 2), np.random.default_rng(0)
            prompt = base.tokenizer.encode(asked[0] * 3)[: args.prompt_tokens]
            for _ in range(2):
                answers = [
                    Sampled(rng.integers(9, 40_000, args.tokens).tolist(), [0.0] * args.tokens, True, "")
                    for _ in range(args.answers)
                ]
                rows = [group_row(prompt, answers, [0.0] * args.answers)] * args.prompts
                learner.step([batch for _, batch in dealt(rows, args.micro_rows, tuned.engine, True)])
    return {"peak": sides.peak_bytes(), "program": program, "engine": engine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("prompts", 4), ("answers", 4), ("tokens", 64), ("micro-rows", 4), ("prompt-tokens", 48)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--side", choices=("ppo", "sft"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measured(args)))
        return
    report: dict[str, Any] = {"bench": "ppo"}
    for side in ("sft", "ppo"):
        done = subprocess.run([sys.executable, *sys.argv, "--side", side], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.strip().splitlines()[-1])
        report[side] = {part: round(size / 1e9, 3) for part, size in found.items()}
        report[side]["step"] = round((found["peak"] - found["program"] - found["engine"]) / 1e9, 3)
    report["times"] = round(report["ppo"]["step"] / report["sft"]["step"], 3)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
