"""Learning from own answers: the toy model, sampled by the engine, scored by rules, killed anywhere."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.answering import ByRule, Killed, killed_in, result
from helpers.parallel import run_processes

from arriero.data.batch import IGNORED, Row
from arriero.errors import ConfigError, DataError, TrainingError
from arriero.losses.advantages import group_normalised
from arriero.losses.policy import clipped
from arriero.rewards.base import Scorer
from arriero.show.terminal import notes
from arriero.train import grpo
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.metrics import surviving_records
from arriero.train.policy import PolicyObjective, dealt, evaluated, group_row, logprobs_of
from arriero.train.recipe import execute
from arriero.train.rl import Rewards, RlRun
from arriero.train.rl_config import GrpoConfig, OnPolicyDistillConfig, PolicyConfig, PromptConfig, RolloutConfig
from arriero.train.rollouts import Sampled
from arriero.train.why import why


def settings(toy_model: Path, prompts: Path, out: Path, steps: int = 4, **more: Any) -> GrpoConfig:
    values: dict[str, Any] = {
        "rollout": RolloutConfig(answers=5, max_new_tokens=7, truncated="score", validation_answers=2, at_once=16),
        "loop": LoopConfig(
            steps=steps, batch_rows=4, micro_rows=2, precision="fp32", save_every=1, validate_every=steps
        ),
        "optim": OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        "data": PromptConfig(train=str(prompts), validation=str(prompts.parent / "held-out.jsonl")),
        "policy": PolicyConfig(),  # one update on a batch
    }
    return GrpoConfig(model=str(toy_model), out=str(out), samples=2, **(values | more))


def train(config: GrpoConfig, scorer: Scorer, changed: Callable[[RlRun], None] = lambda run: None) -> None:
    def build(c: GrpoConfig, console: Any, mesh: Any) -> RlRun:
        run = grpo.build(c, console, mesh, scorer)
        changed(run)
        return run

    execute(config, "grpo", build)


def built(config: GrpoConfig) -> RlRun:
    return grpo.build(config, notes(quiet=True), None, ByRule())


# -- from start to end -------------------------------------------------------------------------------------------------


def test_a_run_raises_its_reward_and_leaves_a_whole_record(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    rollout = RolloutConfig(
        answers=16, max_new_tokens=5, truncated="score", validation_answers=4, at_once=64, temperature=0.1
    )  # random weights say anything: cooler, they say some things more often
    config = settings(toy_model, prompts, tmp_path / "run", 10, method="full", rollout=rollout)
    train(config, ByRule())
    records = surviving_records(tmp_path / "run" / "metrics.jsonl")
    steps = [record for record in records if "event" not in record]
    assert np.mean([r["reward"] for r in steps[-3:]]) > 2 * np.mean([r["reward"] for r in steps[:3]])
    assert all(1 <= r["mismatch"] < 1.001 and r["entropy"] > 0 and r["ratio"] == 1 for r in steps)
    validation = [record for record in records if record.get("event") == "validation"]
    assert validation[0]["kl"] == pytest.approx(0, abs=1e-5) and validation[-1]["kl"] > 0.01
    assert validation[-1]["reward"] == -validation[-1]["loss"] > validation[0]["reward"]
    assert len(validation[0]["samples"]) == 2
    assert "validation reward from" in (tmp_path / "run" / "report.html").read_text()
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"model", "report.html", "rollouts", "samples.jsonl"}
    [first, *_] = surviving_records(tmp_path / "run" / "rollouts" / "step-00000001-0.jsonl")
    assert first["asked"]["text"].startswith("What is") and first["weights"]["step"] == 0
    said = dict(why(tmp_path / "run" / "rollouts" / "step-00000010-0.jsonl", 2))
    assert (
        said["weights"] == "after step 9" and "step-00000009" in said["checkpoint"] and said["model"] == str(toy_model)
    )
    assert said["prompt"].startswith("row ") and "(scored)" in said["answer 0"] and said["scored by"] == "exact"
    assert all(len(a["ids"]) == len(a["logprobs"]) and a["outcome"] == "scored" for a in first["answers"])


@pytest.mark.parametrize(("part", "at"), [("sampled", 3), ("scored", 3), ("step", 2)])
def test_a_run_killed_while_it_samples_scores_or_updates_goes_on_to_the_same_bits(
    toy_model: Path, prompts: Path, tmp_path: Path, part: str, at: int
) -> None:
    train(settings(toy_model, prompts, tmp_path / "whole"), ByRule())
    config = settings(toy_model, prompts, tmp_path / "killed")
    with pytest.raises(Killed):
        train(config, ByRule(), killed_in(part, at))
    assert not (tmp_path / "killed" / "adapter").exists()
    scorer = ByRule()
    train(dataclasses.replace(config, resume=True), scorer)
    whole, resumed = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    journal = [sorted((tmp_path / run / "rollouts").iterdir()) for run in ("whole", "killed")]
    assert [a.read_bytes() for a in journal[0]] == [b.read_bytes() for b in journal[1]]
    steps = 1 if part == "step" else 2  # of 4, killed in the third: what was scored before is not scored again
    assert scorer.seen == 5 * 2 + 20 * steps


def test_what_a_journal_has_of_other_weights_is_not_used(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    config = settings(toy_model, prompts, tmp_path / "run")
    with pytest.raises(Killed):
        train(config, ByRule(), killed_in("step", 1))
    path = tmp_path / "run" / "rollouts" / "step-00000002-0.jsonl"
    rows = surviving_records(path)
    for row in rows:
        row["answers"] = [answer | {"value": 9.0} for answer in row["answers"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = built(config)
    run.prepared.rollouts.taken = 4
    assert run.prepared.rollouts(1).rewards.max() < 9  # sampled by the weights of step 1, and these are those of step 0


# -- rows and gradients ------------------------------------------------------------------------------------------------


def answers_of(n: int, seed: int = 0) -> list[Sampled]:
    g = np.random.default_rng(seed)
    return [
        Sampled(g.integers(0, 40000, size).tolist(), (-g.random(size)).tolist(), True, "")
        for size in g.integers(1, 7, n)
    ]


def apart(prompt: Sequence[int], answer: Sampled, advantage: float) -> Row:
    """The prompt and one answer as a plain document."""
    tokens, n = [*prompt, *answer.ids], len(prompt)
    before = [0.0] * (n - 1)
    ones = np.asarray([*before, *[1.0] * len(answer.ids), 0.0], np.float32)
    extras = {
        "sampled": np.asarray([*before, *answer.logprobs, 0.0], np.float32),
        "mask": ones, "weights": ones, "advantages": advantage * ones,
    }  # fmt: skip
    targets = [*[IGNORED] * (n - 1), *answer.ids, IGNORED]
    counted = np.asarray([len(answer.ids)], np.float32)
    return Row(
        np.asarray(tokens, np.int32), np.asarray(targets), np.asarray([len(tokens)]), (), extras, {"counted": counted}
    )


def gradient(run: RlRun, rows: Sequence[Row], micro_rows: int, policy: PolicyConfig | None = None) -> dict[str, Any]:
    engine = run.prepared.tuned.engine
    for p in engine.parameters.values():
        p.grad = None
    batches = [batch for _, batch in dealt(rows, micro_rows, engine, False)]
    totals = engine.forward_backward(batches, PolicyObjective(policy or PolicyConfig(correction="none"), 1.0)())
    return {"loss": totals.loss} | {name: p.grad for name, p in engine.parameters.items()}


@pytest.fixture
def run(toy_model: Path, prompts: Path, tmp_path: Path) -> RlRun:
    return built(settings(toy_model, prompts, tmp_path / "run", method="full"))


def assert_near(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in a:
        scale = float(torch.as_tensor(b[name]).abs().max()) or 1.0
        torch.testing.assert_close(torch.as_tensor(a[name]), torch.as_tensor(b[name]), atol=1e-5 * scale, rtol=1e-5)


def test_a_group_that_shares_its_prompt_has_the_gradient_of_separate_rows(run: RlRun) -> None:
    answers, advantages = answers_of(5), [1.0, -0.5, 0.25, 0.0, -2.0]
    for prompt in ([7], [3, 11, 13, 17, 19]):
        together = gradient(run, [group_row(prompt, answers, advantages)], 1)
        separate = [apart(prompt, a, x) for a, x in zip(answers, advantages, strict=True)]
        assert_near(together, gradient(run, separate, 2))


@pytest.mark.parametrize("loss", ["clipped", "gspo", "cispo", "dppo", "reinforce"])
@pytest.mark.parametrize("normalise", ["tokens", "answers", "longest"])
def test_accumulation_gives_one_gradient(run: RlRun, loss: Any, normalise: Any) -> None:
    rows = [
        group_row(
            [3, 5, 7 + i], answers_of(3, i), [1.0, -1.0, 0.5], normalise, 9, old=[a.logprobs for a in answers_of(3, i)]
        )
        for i in range(4)
    ]
    policy = PolicyConfig(loss=loss)
    whole = gradient(run, rows, 4, policy)
    for micro_rows in (1, 2):
        assert_near(gradient(run, rows, micro_rows, policy), whole)


def test_a_cut_answer_is_in_neither_numerator_nor_denominator(run: RlRun) -> None:
    config = dataclasses.replace(run.prepared.config.rollout, truncated="mask")
    rollouts = run.prepared.rollouts
    rollouts.config = config
    update = run.trainer.update
    rollout = rollouts(0)
    groups = [
        dataclasses.replace(
            g, answers=[dataclasses.replace(a, finished=k > 0, value=float(k % 2)) for k, a in enumerate(g.answers)]
        )
        for g in rollout.groups
    ]
    without = [dataclasses.replace(g, answers=g.answers[1:]) for g in groups]
    both = [
        update.rows(dataclasses.replace(rollout, groups=each, rewards=r, mask=m))  # type: ignore[attr-defined]
        for each in (groups, without)
        for r, m in [rollouts.rewards(each)]
    ]
    for a, b in zip(*both, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and a.lengths.tolist() == b.lengths.tolist()
        for name in a.token_extras:
            assert np.array_equal(a.token_extras[name], b.token_extras[name])


def test_groups_of_one_reward_are_in_no_row(run: RlRun) -> None:
    rollout = run.prepared.rollouts(0)
    rewards = torch.zeros(rollout.rewards.shape)
    rewards[2, 1] = 1.0
    rows = run.trainer.update.rows(dataclasses.replace(rollout, rewards=rewards))  # type: ignore[attr-defined]
    assert len(rows) == 1
    before = {name: p.detach().clone() for name, p in run.trainer.learner.parameters.items()}
    metrics = run.trainer.update(dataclasses.replace(rollout, rewards=torch.zeros(rollout.rewards.shape)))
    assert metrics["loss"] == 0 and metrics["same_reward"] < 1  # that of the sampling; here none differed
    assert all(torch.equal(p, before[name]) for name, p in run.trainer.learner.parameters.items())


# -- sampler and trainer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_in_fp32_after_updates(
    toy_model: Path, prompts: Path, tmp_path: Path, method: Any, temperature: float
) -> None:
    rollout = RolloutConfig(answers=5, max_new_tokens=9, truncated="score", temperature=temperature, at_once=16)
    run = built(settings(toy_model, prompts, tmp_path / "run", method=method, rollout=rollout))
    for step in range(3):
        run.trainer.update(run.prepared.rollouts(step))
    last = run.prepared.rollouts(3)
    engine = run.prepared.tuned.engine
    rows = [group_row(run.prepared.prompts[g.prompt].ids, g.answers, [0.0] * 5) for g in last.groups]
    found = evaluated(rows, 2, engine, False, logprobs_of(temperature))
    sampled = np.concatenate([row.token_extras["sampled"] for row in rows])
    difference = np.abs(np.concatenate(found) - sampled)
    assert difference.max() < 1e-4 and difference.mean() < 1e-5 and np.abs(sampled).max() > 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_bf16_trainer_leaves_the_residual_stream_in_fp32_as_the_sampler_does(
    toy_model: Path, prompts: Path, tmp_path: Path, method: Any
) -> None:
    loop = LoopConfig(steps=4, batch_rows=4, micro_rows=2, precision="bf16")
    run = built(settings(toy_model, prompts, tmp_path / "run", loop=loop, method=method))
    groups, engine = run.prepared.rollouts(0).groups, run.prepared.tuned.engine
    rows = [group_row(run.prepared.prompts[g.prompt].ids, g.answers, [0.0] * 5) for g in groups]
    sampled = np.concatenate([row.token_extras["sampled"] for row in rows])

    def apart() -> float:
        found = np.concatenate(evaluated(rows, 2, engine, False, logprobs_of(1.0)))
        return float(np.abs(found - sampled).mean())

    ours = apart()
    engine.model.set_compute_dtype(torch.bfloat16)
    assert 0 < ours < 0.8 * apart()


def test_the_first_ratio_is_exactly_1_and_later_ones_are_not(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    policy = PolicyConfig(updates=2, passes=2)
    run = built(settings(toy_model, prompts, tmp_path / "run", policy=policy))
    ratios: list[float] = []
    inner = run.trainer.learner.step

    def step(batches: Any) -> dict[str, Any]:
        metrics = inner(batches)
        ratios.append(metrics["ratio"])
        return metrics

    run.trainer.learner.step = step  # type: ignore[method-assign]
    run.trainer.update(run.prepared.rollouts(0))
    assert len(ratios) == 4 and ratios[0] == 1.0 and all(ratio != 1.0 for ratio in ratios[1:])


def test_a_sampler_that_lags_behind_stops_the_run_and_the_worst_token_is_named(
    toy_model: Path, prompts: Path, tmp_path: Path
) -> None:
    run = built(settings(toy_model, prompts, tmp_path / "run", method="full"))
    rollout = run.prepared.rollouts(0)
    with torch.no_grad():
        for p in run.trainer.learner.parameters.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(
        TrainingError, match=r"mean of exp\|difference\| .* above mismatch_stop 1.05; worst was the token"
    ):
        run.trainer.update(rollout)


def test_kl_in_the_reward_pulls_back_and_the_reference_is_the_policy_of_step_0(
    toy_model: Path, prompts: Path, tmp_path: Path
) -> None:
    for method in ("lora", "full"):
        policy = PolicyConfig(kl=0.5, kl_in="reward", kl_kind="k1")
        run = built(settings(toy_model, prompts, tmp_path / method, method=method, policy=policy))
        update, rollout = run.trainer.update, run.prepared.rollouts(0)
        assert update._divergence(rollout).abs().max() < 1e-4  # type: ignore[attr-defined]
        for step in range(4):
            run.trainer.update(run.prepared.rollouts(step))
        moved = update._divergence(run.prepared.rollouts(4))  # type: ignore[attr-defined]
        assert moved.abs().mean() > 1e-2


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_in_the_loss_is_a_term_of_it(toy_model: Path, prompts: Path, tmp_path: Path, kind: Any) -> None:
    run = built(settings(toy_model, prompts, tmp_path / "run", policy=PolicyConfig(kl=0.1, kl_kind=kind)))
    first = run.trainer.update(run.prepared.rollouts(0))
    second = run.trainer.update(run.prepared.rollouts(1))
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6
    assert second["loss"] == pytest.approx(second["policy"] + 0.1 * second["kl"])


def test_a_reward_that_is_no_number_is_refused_with_its_row(run: RlRun) -> None:
    run.prepared.rollouts.scorer = ByRule(lambda text: float("nan"))
    with pytest.raises(TrainingError, match=r"row \d+ of .*the reward of an answer is nan; it must be a finite number"):
        run.prepared.rollouts(0)


# -- which prompts -----------------------------------------------------------------------------------------------------


def test_further_rounds_make_up_for_groups_that_teach_nothing(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    rollout = RolloutConfig(answers=3, max_new_tokens=3, truncated="score", dynamic=3, at_once=16)
    rare = ByRule(lambda text: float("a" in text.lower()))
    run = grpo.build(settings(toy_model, prompts, tmp_path / "run", rollout=rollout), notes(quiet=True), None, rare)
    found = run.prepared.rollouts(0)
    assert len(found.groups) == 4 and run.prepared.rollouts.taken > 4
    assert found.metrics["same_reward"] > 0


def test_prompts_of_middle_difficulty_come_first(run: RlRun) -> None:
    rollouts = run.prepared.rollouts
    rollouts.config = dataclasses.replace(rollouts.config, prefer_middle=True)
    candidates = run.prepared.prompts.taken(0, 0, 8)
    rollouts.solved = dict.fromkeys(candidates[:4], 1.0) | {candidates[5]: 0.5}
    assert rollouts._next() == candidates[4:] and rollouts.taken == 8
    rollouts.restore({}, {"taken": 0, "solved": [[i, 0.0] for i in candidates[2:]]})
    assert rollouts._next() == candidates[:4]


# -- a bandit ----------------------------------------------------------------------------------------------------------


def test_a_bandit_converges_to_its_best_arm() -> None:
    """Five arms, the middle one best by a tenth; groups of eight, PPO's surrogate, plain gradient ascent."""
    g, worth = torch.Generator().manual_seed(0), torch.tensor([0.1, 0.5, 0.8, 0.7, 0.3])
    logits = torch.zeros(5, requires_grad=True)
    for _ in range(300):
        with torch.no_grad():
            arms = torch.multinomial(logits.softmax(0), 32 * 8, replacement=True, generator=g)
            rewards = (torch.rand(32 * 8, generator=g) < worth[arms]).float().view(32, 8)
            old = logits.log_softmax(0)[arms]
        a = group_normalised(rewards, torch.ones(32, 8), deviation=False).flatten()
        for _ in range(2):
            [grad] = torch.autograd.grad(clipped(logits.log_softmax(0)[arms], old, a, 0.2, 0.28).mean(), logits)
            with torch.no_grad():
                logits -= 4.0 * grad
    assert logits.softmax(0)[2] > 0.9


def test_held_out_answers_may_be_scored_by_what_the_reward_is_a_proxy_of(
    toy_model: Path, prompts: Path, tmp_path: Path
) -> None:
    plain = settings(toy_model, prompts, tmp_path / "plain")
    train(plain, ByRule())
    config = settings(toy_model, prompts, tmp_path / "run", validation_reward="python:true.py:reward")
    train(config, Rewards(ByRule(), ByRule(lambda text: float(-len(text)))))
    assert result(tmp_path / "run").keys() == result(tmp_path / "plain").keys()
    for name, tensor in result(tmp_path / "run").items():  # what is learned from is the reward
        assert torch.equal(tensor, result(tmp_path / "plain")[name])
    by_proxy = validations(tmp_path / "run")
    assert [v["proxy"] for v in by_proxy] == [v["reward"] for v in validations(tmp_path / "plain")]
    for v in by_proxy:
        assert v["reward"] < 0
        assert v["loss"] == -v["reward"]
    assert (tmp_path / "run/report.html").stat().st_size > 0


def validations(run: Path) -> list[dict[str, Any]]:
    return [r for r in surviving_records(run / "metrics.jsonl") if r.get("event") == "validation"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_so_is_refused(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    def config(**more: Any) -> GrpoConfig:
        return settings(toy_model, prompts, tmp_path / "run", **more)

    with pytest.raises(ConfigError, match="a group has at least 2"):
        config(rollout=RolloutConfig(answers=1))
    with pytest.raises(ConfigError, match="greedy answers to one prompt are all the same"):
        RolloutConfig(temperature=0)
    with pytest.raises(ConfigError, match="gradient has mean 0; take k2"):
        PolicyConfig(kl=0.1, kl_kind="k1")
    with pytest.raises(ConfigError, match="set truncated to score"):
        RolloutConfig(overlong_margin=5)
    with pytest.raises(ConfigError, match="nothing is held out that it could score"):
        config(validation_reward="exact", data=PromptConfig(train=str(prompts), validation="0"))
    with pytest.raises(ConfigError, match="guess-number, which gives the rewards itself"):
        config(validation_reward="exact", rollout=RolloutConfig(environment="guess-number"))
    with pytest.raises(ConfigError, match="give it as reward"):
        OnPolicyDistillConfig(validation_reward="exact")
    with pytest.raises(ConfigError, match="not a multiple of updates 3"):
        config(policy=PolicyConfig(updates=3))
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    with pytest.raises(DataError, match=r"row 1 of .*the field 'answer', by which answers are scored, is missing"):
        grpo.build(config(data=PromptConfig(train=str(other), validation="0")), notes(quiet=True))


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["grpo", "dpo online"])
def test_two_processes_give_the_run_of_one(toy_model: Path, prompts: Path, tmp_path: Path, recipe: str) -> None:
    rule = 'def reward(answer):\n    return answer.text.count("e") / (len(answer.text) or 1)\n'
    (tmp_path / "letters.py").write_text(rule)
    told = f"--answers 4 --max-new-tokens 5 --truncated score --validation {prompts.parent / 'held-out.jsonl'}"
    told += " --batch-rows 4 --micro-rows 2 --steps 3 --lr 1e-2 --warmup 0"
    command = [sys.executable, "-m", "arriero", *recipe.split(), str(toy_model), "--data", str(prompts), *told.split()]
    command += ["--reward", f"python:{tmp_path / 'letters.py'}:reward"]
    run_processes([*command, "--out", str(tmp_path / "one")], 1, 280)
    run_processes([*command, "--out", str(tmp_path / "two"), "--dp-shard", "2"], 2, 280)
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    asked = [surviving_records(tmp_path / run / "rollouts" / "step-00000001-0.jsonl") for run in ("one", "two")]
    assert [row["answers"] for row in asked[0]] == [row["answers"] for row in asked[1]]
