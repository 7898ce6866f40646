"""A step of direct preference optimisation, LoRA rank 16 on SmolLM2-135M, against TRL's DPOTrainer on the same pairs.

    python bench/dpo.py [--prompt 128] [--answer 64] [--pairs 32] [--peer PYTHON] [--precisions fp32 bf16]

Pairs are passages of Python's own reference: a prompt to go on from, the words that follow, and words from elsewhere;
prompt and answers have `prompt` and `answer` words in the mean, each from a half of that to one and a half. Both sides
have their reference's log-probabilities from before step 1. TRL is at its best here: no checkpointing, 4 pairs of like
length at a time, so that little is padded. Ours is what `arriero dpo` does: answers behind their prompt, packed rows.
Prints one JSON line: seconds a step (without the first), tokens computed a pair, each side's peak.
See sides.py for PYTHON and precisions; TRL 1.16's own packing (`padding_free`) is switched off by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import sides

MICRO = 4  # pairs that go through TRL's model at once


def pairs(n: int, prompt: int, answer: int, batch: int) -> list[dict[str, Any]]:
    """n rows of messages, of like length one after the other in each batch of a step."""
    words = " ".join(topics[name] for name in sorted(topics)).split()
    random_ = random.Random(0)
    found = []
    for _ in range(n):
        p, a, b = (random_.randint(mean // 2, mean * 3 // 2) for mean in (prompt, answer, answer))
        at, other = random_.randrange(len(words) - p - a), random_.randrange(len(words) - b)
        asked, chosen = words[at : at + p], words[at + p : at + p + a]
        found.append((asked, chosen, words[other : other + b]))
    batches = [sorted(found[i : i + batch], key=lambda x: len(x[0]) + max(map(len, x[1:]))) for i in range(0, n, batch)]
    message = lambda role, text: [{"role": role, "content": " ".join(text)}]  # noqa: E731 - a formula
    return [
        {"prompt": message("user", x), "chosen": message("assistant", y), "rejected": message("assistant", z)}
        for x, y, z in itertools.chain(*batches)
    ]


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from arriero.show.terminal import notes
    from arriero.train import dpo
    from arriero.train.config import LoopConfig
    from arriero.train.preference_config import DpoConfig, PreferenceDataConfig

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in pairs(args.pairs, args.prompt, args.answer, args.batch))
        )
        data = PreferenceDataConfig(train=str(path), validation="0", seq_len=args.seq_len)
        loop = LoopConfig(batch_rows=1, precision=args.precision, compile=args.compile)
        run = dpo.build(DpoConfig(model="smollm2-135m", out=f"{folder}/run", data=data, loop=loop), notes(quiet=True))
        batches = [run.trainer.batches(i) for i in range(run.loader.rows_in_epoch(0))]
        learner = run.trainer.learner
        learner.step(batches[0])
        began = time.perf_counter(), time.process_time()
        for i in range(0, len(batches), args.rows):
            learner.step([batch for each in batches[i : i + args.rows] for batch in each])
        steps = args.pairs / args.batch
        tokens = sum(batch.n_tokens for each in batches for batch in each)
        return {
            "seconds": round((time.perf_counter() - began[0]) / steps, 2),
            "processor": round((time.process_time() - began[1]) / steps, 2),
            "tokens a pair": round(tokens / args.pairs),
            "peak_gb": round(sides.peak_bytes() / 1e9, 2),
        }


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl import __version__ as version

    marks: list[tuple[float, float]] = []
    computed = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        on_train_end = on_step_begin

    class InOrder(DPOTrainer):  # type: ignore[misc]
        """Rows as they come: those of a batch are of like length."""

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset or self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            computed.append(inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *rest, **named)

    rows = pairs(args.pairs, args.prompt, args.answer, args.batch)
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, per_device_train_batch_size=MICRO, gradient_accumulation_steps=args.batch // MICRO,
            num_train_epochs=1, learning_rate=5e-5, beta=0.1, precompute_ref_log_probs=True, max_length=args.seq_len,
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        trainer = InOrder(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
            args=settings,
            train_dataset=Dataset.from_list(rows[: args.batch] + rows),  # the first step warms up
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    steps = args.pairs / args.batch
    return {
        "seconds": round((marks[-1][0] - marks[1][0]) / steps, 2),
        "processor": round((marks[-1][1] - marks[1][1]) / steps, 2),
        "tokens a pair": round(sum(computed[args.batch // MICRO :]) / args.pairs),
        "peak_gb": round(sides.peak_bytes() / 1e9, 2),
        "trl": version,
    }


def main() -> None:
    parser = sides.parser(__doc__)
    parser.add_argument("--prompt", type=int, default=128, help="words of a prompt, in the mean")
    parser.add_argument("--answer", type=int, default=64, help="words of an answer, in the mean")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="pairs of a step, a multiple of 4")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of our rows")
    parser.add_argument("--rows", type=int, default=5, help="our rows in a step")
    parser.add_argument("--compile", default="off")
    args = parser.parse_args()
    names = ("prompt", "answer", "pairs", "batch", "seq_len", "rows", "compile")
    own = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    sides.run("dpo", __file__, args, own, ours, theirs)


if __name__ == "__main__":
    main()
