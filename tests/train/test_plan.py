"""Plans: arithmetic that paper can check, and a probe beside the run it foretells."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from arriero import settings
from arriero.distributed.config import ParallelConfig
from arriero.errors import ConfigError, UserError
from arriero.model.catalogue import LADDER, PUBLISHED
from arriero.model.lora_config import LoraConfig
from arriero.plan.run import dry_run, plan
from arriero.train.config import DataConfig, LoopConfig, OptimConfig, PretrainConfig, PretrainDataConfig, SftConfig
from arriero.train.preference_config import DpoConfig, PreferenceDataConfig, RewardConfig
from arriero.train.recipes import RECIPES
from arriero.train.rl import HeldOutAnswers
from arriero.train.rl_config import GrpoConfig, PpoConfig, PromptConfig, RolloutConfig


def test_full_fine_tuning_of_8b_needs_sixteen_bytes_a_parameter():
    found = plan(SftConfig(model="llama3-8b", method="full"))
    n = PUBLISHED["llama3-8b"].n_params
    assert found.parameters == found.trained == n
    parts = found.memory
    assert parts["weights"] == 4 * n and parts["gradients, fp32"] == 4 * n and parts["AdamW's moments, fp32"] == 8 * n


def test_lora_counts_what_the_adapter_adds():
    found = plan(SftConfig(model="llama3-8b", lora=LoraConfig(rank=8, targets=("q_proj", "v_proj"))))
    # per layer: q 4096 -> 4096 and v 4096 -> 1024, rank 8 on both sides
    assert found.trained == 32 * 8 * (4096 + 4096 + 4096 + 1024)
    assert found.memory["weights"] == 2 * PUBLISHED["llama3-8b"].n_params


def test_the_plan_knows_what_saves_memory():
    n = PUBLISHED["llama3-8b"].n_params
    full = dict(model="llama3-8b", method="full")
    eight = plan(SftConfig(**full, optim=OptimConfig("adamw8bit"))).memory
    assert eight["AdamW's moments, 8 bits"] == 2 * n + 8 * n // 256
    muon = plan(SftConfig(**full, optim=OptimConfig("muon"))).memory
    outside = 4096 * (2 * 128_256 + 1)
    assert muon["Muon's and AdamW's moments, fp32"] == 4 * (n - outside) + 8 * outside
    at_once = OptimConfig(clip=0.0, in_backward=True)
    stepped = plan(SftConfig(**full, optim=at_once, loop=LoopConfig(batch_rows=1))).memory
    assert stepped["gradients, fp32"] == 4 * 4096 * 128_256  # of the head, the largest
    with pytest.raises(ConfigError, match="batch_rows 8 is not micro_rows 1 x 1 data-parallel"):
        plan(SftConfig(**full, optim=at_once))
    with pytest.raises(ConfigError, match="plan cpu_offload by arithmetic: leave --data out"):
        plan(SftConfig(data=DataConfig(train="x"), parallel=ParallelConfig(cpu_offload=True)))


def test_recomputation_keeps_less():
    kept = [
        plan(SftConfig(model="llama3-8b", loop=LoopConfig(recompute=on))).memory["activations (estimate)"]
        for on in ("none", "selective", "full")
    ]
    assert kept[2] < kept[1] / 5 < kept[0] / 6


def test_a_model_without_data_is_told_what_is_missing(toy_model):
    with pytest.raises(ConfigError, match="needs data to probe with: add --data PATH"):
        plan(SftConfig(model=str(toy_model)))


def test_the_probe_raises_what_the_run_would(toy_model, tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        plan(SftConfig(model=str(toy_model), data=DataConfig(train=str(tmp_path / "none.jsonl"))))


def test_the_probe_foretells_the_runs_peak_memory_and_says_its_warnings(toy_model, rows, tmp_path, caplog):
    rows.write_text(rows.read_text().replace('{"messages"', '{"id": 1, "messages"', 1))
    config = SftConfig(
        model=str(toy_model),
        samples=0,
        out=str(tmp_path / "run"),
        data=DataConfig(train=str(rows), seq_len=128),
        loop=LoopConfig(steps=4, batch_rows=2, precision="fp32"),
    )
    found = plan(config)
    assert found.steps == 4 and found.tokens == 4 * 2 * 128
    assert f"columns 'id' of {rows} are not used" in caplog.messages
    file = tmp_path / "config.toml"
    file.write_text(settings.to_toml(config, "sft"))
    run = (
        "import sys; from arriero import settings as c; from arriero.train.config import SftConfig;"
        "from arriero.train.sft import main; main(c.load_recipe({'sft': SftConfig}, sys.argv[1])[1]);"
        "from arriero.train.metrics import memory_bytes; print(memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", run, str(file)], capture_output=True, text=True, check=True)
    assert found.peak == pytest.approx(int(done.stdout), rel=0.15)


def test_a_pretraining_run_is_dry_run_likewise(shards, tmp_path):
    config = PretrainConfig(
        model="1m",
        out=str(tmp_path / "run"),
        data=PretrainDataConfig(train=str(shards), seq_len=64, validation_tokens=200),
        loop=LoopConfig(steps=10, batch_rows=2, precision="fp32"),
    )
    found = plan(config)
    assert found.parameters == replace(LADDER["1m"], vocab_size=512).n_params
    assert found.steps == 10 and found.tokens == 10 * 2 * 64
    assert found.peak > sum(found.memory.values()) and found.seconds["steps"] > 0
    assert not (tmp_path / "run").exists()


# -- preferences, and own answers --------------------------------------------------------------------------------------


def test_a_plan_of_own_answers_counts_engine_cache_reference_and_value_model():
    shape, rollout = PUBLISHED["llama3.2-1b"], RolloutConfig(answers=4, max_new_tokens=100, at_once=13)
    of_prompts = dict(model="llama3.2-1b", rollout=rollout, data=PromptConfig(max_prompt=61))
    rank = 16 * 16 * (2048 + 2048 + 2 * (2048 + 512) + 2048 + 2048 + 3 * (2048 + 8192))  # layers, rank, in + out
    grpo = plan(GrpoConfig(**of_prompts))
    assert grpo.trained == rank and grpo.memory["reference, the policy without its adapter"] == 0
    # an answer has 161 tokens at most, in six blocks of 32; keys and values of 8 heads of 64 in 16 layers, fp32
    assert grpo.memory["KV cache"] == 13 * 6 * 32 * 2 * 16 * 8 * 64 * 4
    assert grpo.memory["engine's weights, as its kernels have them"] == 4 * shape.n_params
    ppo = plan(PpoConfig(**of_prompts)).memory
    head = 2048  # its values' weights; with fp32 weights, gradients and two moments of everything that is trained
    assert ppo["value model, an adapter and a head on the same base"] == 16 * rank + 8 * head
    assert plan(GrpoConfig(**of_prompts, method="full")).memory["reference"] == 4 * shape.n_params


@pytest.mark.parametrize(
    "recipe", ["dpo", "grpo", *(pytest.param(x, marks=pytest.mark.slow) for x in ("reward", "ppo"))]
)
def test_the_probe_of_each_recipe_foretells_its_runs_peak_memory(recipe, toy_model, prompts, tmp_path):
    file = tmp_path / ("rows.jsonl" if recipe in ("dpo", "reward") else "prompts.jsonl")
    file.write_text("".join(json.dumps(_row(i)) + "\n" for i in range(23)))
    (tmp_path / "mine.py").write_text("def reward(answer):\n    return answer.text.count('e')\n")
    loop = LoopConfig(steps=5, batch_rows=4, micro_rows=2, precision="fp32")
    if recipe in ("dpo", "reward"):
        data = PreferenceDataConfig(train=str(file), seq_len=128)
        cls, own = {"dpo": DpoConfig, "reward": RewardConfig}[recipe], {"data": data}
    else:
        rollout = RolloutConfig(answers=3, max_new_tokens=7, truncated="score", validation_answers=2, at_once=8)
        cls, own = {"grpo": GrpoConfig, "ppo": PpoConfig}[recipe], {"rollout": rollout, "data": PromptConfig(str(file))}
        own["reward"] = f"python:{tmp_path / 'mine.py'}:reward"
    if recipe == "ppo":
        loop = replace(loop, batch_rows=8)  # of four updates
    config = cls(model=str(toy_model), out=str(tmp_path / "run"), loop=loop, **own)
    found = plan(config)
    assert found.steps == 5
    sampled = {"sampling", "scoring", "updates"} & found.seconds.keys()
    assert sampled == (set() if recipe in ("dpo", "reward") else {"sampling", "scoring", "updates"})
    toml = tmp_path / "config.toml"
    toml.write_text(settings.to_toml(config, recipe))
    run = (
        "import sys, importlib; from arriero import settings as c; from arriero.train.recipes import RECIPES;"
        f"importlib.import_module('arriero.train.{recipe}').main(c.load_recipe(RECIPES, sys.argv[1])[1]);"
        "from arriero.train.metrics import memory_bytes; print(memory_bytes())"
    )
    assert RECIPES[recipe] is cls
    done = subprocess.run([sys.executable, "-c", run, str(toml)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert found.peak == pytest.approx(int(done.stdout.splitlines()[-1]), rel=0.15)


def test_a_probe_validates_on_as_many_held_out_prompts_as_are_answered_at_a_time(toy_model, tmp_path, monkeypatch):
    """A run with 256 of them and long answers would take the plan an hour."""
    file, asked = tmp_path / "prompts.jsonl", []
    file.write_text("".join(json.dumps(_row(i)) + "\n" for i in range(60)))
    called = HeldOutAnswers.__call__

    def counting(self):
        asked.append(len(self.of.held_out))
        return called(self)

    monkeypatch.setattr(HeldOutAnswers, "__call__", counting)
    rollout = RolloutConfig(answers=3, max_new_tokens=4, truncated="score", validation_answers=2, at_once=8)
    config = GrpoConfig(
        model=str(toy_model), out=str(tmp_path / "run"), reward="exact", rollout=rollout,
        data=PromptConfig(str(file), validation="0.5"), loop=LoopConfig(steps=4, batch_rows=4, precision="fp32"),
    )  # fmt: skip
    seconds = dry_run("grpo", config)["seconds"]
    assert asked and set(asked) == {4} and seconds["validation"] > 0


def _row(i: int) -> dict[str, str]:
    return {"prompt": f"{i} + 2?", "chosen": f"{i + 2}", "rejected": f"it is {i + 3}", "answer": f"{i + 2}"}
