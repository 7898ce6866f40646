"""Learning from episodes of several turns: what is trained on, what is not, and runs that are killed in the middle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.answering import Killed, killed_in, result

from arriero.data.batch import IGNORED, Row
from arriero.errors import ConfigError, DataError, TrainingError
from arriero.rewards.base import Answer, Score, Scorer
from arriero.show.terminal import notes
from arriero.tokenizer.chat import encode_reply
from arriero.train import grpo, ppo
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.episodes import Past, Sampled, judged
from arriero.train.metrics import surviving_records
from arriero.train.policy import PolicyObjective, dealt, evaluated, group_row, logprobs_of
from arriero.train.recipe import execute
from arriero.train.rl import RlRun, open_rewards
from arriero.train.rl_config import GrpoConfig, PolicyConfig, PpoConfig, PromptConfig, RolloutConfig, ValueConfig
from arriero.train.why import why

TURNS = 3


class Talking(Scorer):
    """Replies to two answers with what they say of the letter e; the toy model never ends one, which it overlooks."""

    def __init__(self) -> None:
        self.seen: list[Answer] = []

    def __call__(self, answers: Sequence[Answer]) -> list[Score]:
        self.seen += answers
        return [self.score(answer) for answer in answers]

    def score(self, answer: Answer) -> Score:
        n = len(answer.earlier)
        reply = None if n == TURNS - 1 or (n == 1 and answer.number == 0) else f"{answer.text.count('e')} e, go on {n}"
        return Score(answer.text.count("e") / 10 + n, reply=reply)


def rollout(**more: Any) -> RolloutConfig:
    values: dict[str, Any] = {
        "answers": 5, "max_new_tokens": 7, "truncated": "score", "validation_answers": 2, "at_once": 32,
        "environment": "talking.py:Talking", "turns": TURNS, "max_reply": 32,
    }  # fmt: skip
    return RolloutConfig(**(values | more))


def settings(toy_model: Path, prompts: Path, out: Path, kind: Any = GrpoConfig, **more: Any) -> Any:
    values: dict[str, Any] = {
        "rollout": rollout(),
        "loop": LoopConfig(steps=4, batch_rows=4, micro_rows=2, precision="fp32", save_every=1, validate_every=4),
        "optim": OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        "data": PromptConfig(train=str(prompts), validation=str(prompts.parent / "held-out.jsonl")),
    }
    if kind is GrpoConfig:
        values["policy"] = PolicyConfig()  # one update on a batch
    return kind(model=str(toy_model), out=str(out), samples=2, **(values | more))


def train(config: GrpoConfig, scorer: Scorer, changed: Any = lambda run: None) -> None:
    def build(c: GrpoConfig, console: Any, mesh: Any) -> RlRun:
        run = grpo.build(c, console, mesh, scorer)
        changed(run)
        return run

    execute(config, "grpo", build)


@pytest.fixture
def run(toy_model: Path, prompts: Path, tmp_path: Path) -> RlRun:
    config = settings(toy_model, prompts, tmp_path / "run", method="full")
    return grpo.build(config, notes(quiet=True), None, Talking())


# -- what an episode is ------------------------------------------------------------------------------------------------


def test_the_ids_are_those_that_were_sampled_with_the_replys_between_them(run: RlRun) -> None:
    rollouts = run.prepared.rollouts
    asked: list[Any] = []
    inner = rollouts.sampler.answer
    rollouts.sampler.answer = lambda requests: asked.extend(requests) or inner(requests)  # type: ignore
    found = rollouts(0)
    tokenizer = run.prepared.tuned.base.tokenizer
    for group in found.groups:
        prompt = run.prepared.prompts[group.prompt]
        for k, a in enumerate(group.answers):
            assert len(a.earlier) == (1 if k == 0 else 2) and len(a.ids) == len(a.logprobs) == len(a.own)
            assert a.value == pytest.approx(sum(p.reward for p in a.earlier) + a.text.count("e") / 10 + len(a.earlier))
            at = 0
            for n, past in enumerate(a.earlier):
                answer, reply = a.ids[at : at + past.n_answer], a.ids[at + past.n_answer :][: past.n_reply]
                assert tokenizer.decode(answer) == past.text and past.reply == f"{past.text.count('e')} e, go on {n}"
                assert reply == encode_reply(tokenizer, prompt.messages, [{"role": "user", "content": past.reply}])
                assert all(x < 0 for x in a.logprobs[at : at + past.n_answer])
                assert a.own[at : at + past.n_answer] == [1.0] * past.n_answer
                at += past.n_answer
                assert a.logprobs[at : at + past.n_reply] == a.own[at : at + past.n_reply] == [0.0] * past.n_reply
                at += past.n_reply
                assert [*prompt.ids, *a.ids[:at]] in [request.prompt for request in asked]
            assert a.own[at:] == [1.0] * len(a.ids[at:])
    assert found.metrics["turns"] == pytest.approx((2 + 4 * 3) / 5)
    assert found.metrics["answer_tokens"] == pytest.approx(7 * 14 / 5)


def test_later_turns_draw_other_random_numbers(run: RlRun) -> None:
    rollouts = run.prepared.rollouts
    asked: list[Any] = []
    inner = rollouts.sampler.answer
    rollouts.sampler.answer = lambda requests: asked.extend(requests) or inner(requests)  # type: ignore
    rollouts(0)
    seeds = [request.sampling.seed + i for request in asked for i in range(request.n)]
    assert len(set(seeds)) == len(seeds) == 4 * (5 + 5 + 4)


def test_a_turn_reads_all_that_came_before_it_from_the_cache_but_its_last_token(run: RlRun) -> None:
    rollouts = run.prepared.rollouts
    groups = run.prepared.rollouts
    cached: list[tuple[int, int]] = []
    inner = rollouts.sampler.answer

    def answer(requests: Any) -> Any:
        found = inner(requests)
        cached.extend((c[0].cached, len(r.prompt)) for r, c in zip(requests, found, strict=True) if r.n == 1)
        return found

    rollouts.sampler.answer = answer  # type: ignore[method-assign]
    found = groups(0)
    n_reply = [p.n_reply for g in found.groups for a in g.answers for p in a.earlier]
    assert len(cached) == len(n_reply)
    for here, n in cached:
        assert here >= n - max(n_reply) - 1
    assert found.metrics["reused"] == pytest.approx(np.mean([here / n for here, n in cached]))


def test_sampler_and_trainer_agree_on_every_answer_of_an_episode(run: RlRun) -> None:
    for step in range(2):
        run.trainer.update(run.prepared.rollouts(step))
    last = run.prepared.rollouts(2)
    rows = [group_row(run.prepared.prompts[g.prompt].ids, g.answers, [0.0] * 5) for g in last.groups]
    found = evaluated(rows, 2, run.prepared.tuned.engine, False, logprobs_of(1.0))
    sampled = np.concatenate([row.token_extras["sampled"] for row in rows])
    mask = np.concatenate([row.token_extras["mask"] for row in rows])
    difference = np.abs(np.concatenate(found) - sampled)
    assert difference.max() < 1e-4 and mask.sum() == 4 * 7 * 14 and np.abs(sampled).max() > 1


# -- gradients ---------------------------------------------------------------------------------------------------------

FIRST, SAID, SECOND = [101, 103, 107], [211, 223, 227, 229, 233], [109, 113]
EPISODE = Sampled(
    [*FIRST, *SAID, *SECOND], [-1.0, -2.0, -3.0, *[0.0] * 5, -4.0, -5.0], True, "",
    2.0, "scored", "", [Past(3, 5, "", "", 0.5)],
)  # fmt: skip


def apart(context: Sequence[int], ids: Sequence[int], logprobs: Sequence[float], advantage: float) -> Row:
    """One answer behind all that came before it, as a plain document."""
    n = len(context) - 1
    ones = np.asarray([*[0.0] * n, *[1.0] * len(ids), 0.0], np.float32)
    extras = {
        "sampled": np.asarray([*[0.0] * n, *logprobs, 0.0], np.float32),
        "mask": ones, "weights": ones, "advantages": advantage * ones,
    }  # fmt: skip
    tokens, targets = [*context, *ids], [*[IGNORED] * n, *ids, IGNORED]
    return Row(
        np.asarray(tokens, np.int32), np.asarray(targets), np.asarray([len(tokens)]), (), extras,
        {"counted": np.asarray([len(ids)], np.float32)},
    )  # fmt: skip


def gradient(run: RlRun, rows: Sequence[Row]) -> dict[str, Any]:
    engine = run.prepared.tuned.engine
    for p in engine.parameters.values():
        p.grad = None
    batches = [batch for _, batch in dealt(rows, 1, engine, False)]
    totals = engine.forward_backward(batches, PolicyObjective(PolicyConfig(correction="none"), 1.0)())
    return {"loss": torch.tensor(totals.loss)} | {n: p.grad.clone() for n, p in engine.parameters.items()}  # type: ignore


def test_an_episode_has_the_gradient_of_its_answers_each_behind_all_that_came_before_it(run: RlRun) -> None:
    other = Sampled([127, 131], [-0.5, -0.25], True, "")
    together = gradient(run, [group_row([3, 5, 7], [EPISODE, other], [1.5, -1.0])])
    separate = gradient(
        run,
        [
            apart([3, 5, 7], FIRST, EPISODE.logprobs[:3], 1.5),
            apart([3, 5, 7, *FIRST, *SAID], SECOND, EPISODE.logprobs[8:], 1.5),
            apart([3, 5, 7], other.ids, other.logprobs, -1.0),
        ],
    )
    for name, expected in separate.items():
        scale = float(expected.abs().max()) or 1.0
        torch.testing.assert_close(together[name], expected, atol=1e-5 * scale, rtol=1e-5, msg=name)


@pytest.mark.parametrize("normalise", ["tokens", "answers", "longest"])
def test_replies_are_in_no_numerator_and_no_denominator(normalise: Any) -> None:
    row = group_row([3, 5, 7], [EPISODE], [1.5], normalise, 11)
    assert row.targets.tolist() == [IGNORED] * 2 + FIRST + [IGNORED] * 5 + SECOND
    weight = {"tokens": 1.0, "answers": 1 / 5, "longest": 1 / 11}[normalise]
    expected = np.asarray([0, 0, *[weight] * 3, *[0] * 5, *[weight] * 2], np.float32)
    assert np.allclose(row.token_extras["weights"], expected)
    assert row.document_extras["counted"].tolist() == [0, 5 if normalise == "tokens" else 1]
    assert np.allclose(row.token_extras["advantages"], 1.5 * (expected > 0))


def test_ppo_pays_each_answer_at_its_own_last_token_and_passes_over_replies(
    toy_model: Path, prompts: Path, tmp_path: Path
) -> None:
    policy = PolicyConfig(kl=0.0, updates=1)
    value = ValueConfig(warmup_steps=0, whiten_advantages=False, gae_lambda=0.5, gamma=0.9)
    config = settings(toy_model, prompts, tmp_path / "run", PpoConfig, policy=policy, value=value)
    run = ppo.build(config, notes(quiet=True), None, Talking())
    rollout = run.prepared.rollouts(0)
    rows, _ = run.trainer.update.rows(rollout)  # type: ignore[attr-defined]
    for row, group in zip(rows, rollout.groups, strict=True):
        at = len(row.tokens) - sum(len(a.ids) for a in group.answers)
        for a in group.answers:
            part = slice(at, at + len(a.ids))
            rewards, values, advantages = (row.token_extras[n][part] for n in ("rewards", "values", "advantages"))
            ends = [7 - 1 + sum(7 + p.n_reply for p in a.earlier[:n]) for n in range(len(a.earlier) + 1)]
            paid = [*(p.reward for p in a.earlier), a.value - sum(p.reward for p in a.earlier)]  # type: ignore[operator]
            assert rewards[ends] == pytest.approx(np.asarray(paid)) and np.count_nonzero(rewards) <= len(ends)
            own = np.flatnonzero(a.own)
            later = after = 0.0
            for t in own[::-1]:  # as if the replies were not there
                delta = rewards[t] + 0.9 * later - values[t]
                after = delta + 0.9 * 0.5 * after
                later = values[t]
                assert advantages[t] == pytest.approx(after, abs=1e-4)
            assert not advantages[np.flatnonzero(np.asarray(a.own) == 0)].any()
            at += len(a.ids)
    metrics = run.trainer.update(rollout)
    assert metrics["ratio"] == 1.0 and metrics["mismatch"] < 1.001


# -- from start to end -------------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("part", "at"),
    [("scored", 11), pytest.param("sampled", 10, marks=SLOW), pytest.param("scored", 10, marks=SLOW),
     pytest.param("step", 2, marks=SLOW)],
)  # fmt: skip
def test_a_run_killed_in_the_middle_of_an_episode_goes_on_to_the_same_bits(
    toy_model: Path, prompts: Path, tmp_path: Path, part: str, at: int
) -> None:
    train(settings(toy_model, prompts, tmp_path / "whole"), Talking())
    config = settings(toy_model, prompts, tmp_path / "killed")
    with pytest.raises(Killed):
        train(config, Talking(), killed_in(part, at))
    scorer = Talking()
    train(dataclasses.replace(config, resume=True), scorer)
    whole, resumed = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    journal = [sorted((tmp_path / run / "rollouts").iterdir()) for run in ("whole", "killed")]
    assert len(journal[0]) == 4
    assert [a.read_bytes() for a in journal[0]] == [b.read_bytes() for b in journal[1]]
    in_step = {("sampled", 10): 9, ("scored", 10): 9, ("scored", 11): 4, ("step", 2): 0}[part, at]
    per_prompt = 5 + 5 + 4
    assert len(scorer.seen) == 4 * in_step + 4 * per_prompt + 5 * (2 + 2 + 1)  # what was scored is not scored again


def test_an_episode_is_told_where_it_came_from_and_shown(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    config = settings(toy_model, prompts, tmp_path / "run")
    train(config, Talking())
    said = dict(why(tmp_path / "run" / "rollouts" / "step-00000003-0.jsonl", 1))
    assert said["scored by"] == "talking.py:Talking" and said["answer 1"].count("\n← ") == 2
    records = surviving_records(tmp_path / "run" / "metrics.jsonl")
    validation = [record for record in records if record.get("event") == "validation"]
    assert validation[0]["samples"][0].count("\n← ") == 1 and validation[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert all(1 <= r["mismatch"] < 1.001 and r["ratio"] == 1 for r in records if "mismatch" in r)


# -- where episodes end ------------------------------------------------------------------------------------------------


def test_an_episode_ends_with_the_last_turn_with_a_reply_that_is_too_long_and_with_no_reply(run: RlRun) -> None:
    tokenizer, prompt = run.prepared.tuned.base.tokenizer, run.prepared.prompts[0]
    first = Sampled([5, 7, 2], [-1.0, -1.0, -1.0], True, "x")

    def after(score: Score, **config: Any) -> Sampled:
        return judged(first, score, prompt, rollout(**config), tokenizer)

    assert after(Score(0.5)).value == 0.5 and not after(Score(0.5)).earlier
    goes_on = after(Score(0.5, reply="on"))
    assert goes_on.asked and goes_on.earlier[0].reward == 0.5 and goes_on.value is None
    last = after(Score(0.5, reply="on"), turns=1)
    assert (last.value, last.outcome, last.note) == (0.5, "scored", "ended after 1 turns")
    long = after(Score(0.5, reply="on and on " * 20))
    assert long.value == 0.5 and long.outcome == "crash" and "tokens, and max_reply is 32" in long.note
    with pytest.raises(TrainingError, match="the reward of an answer is nan"):
        after(Score(float("nan")))


def test_what_cannot_be_played_is_refused(toy_model: Path, prompts: Path, tmp_path: Path) -> None:
    def config(**more: Any) -> Any:
        return settings(toy_model, prompts, tmp_path / "run", **more)

    with pytest.raises(ConfigError, match=r"reward is exact and environment talking\.py:Talking, which gives"):
        config(reward="exact")
    with pytest.raises(ConfigError, match="raw is on, and an environment speaks through the chat template"):
        config(data=PromptConfig(train=str(prompts), raw=True))
    with pytest.raises(ConfigError, match="whiten_scores is on, and an environment's rewards stand at turns"):
        config(kind=PpoConfig, value=ValueConfig(whiten_scores=True))
    with pytest.raises(ConfigError, match="turn_seconds is 0; it must be above 0"):
        rollout(turn_seconds=0)
    with pytest.raises(ConfigError, match="turns is 0; it must be at least 1"):
        rollout(turns=0)
    playing = config(rollout=rollout(environment="guess-number"))
    told = r"row 1 of .*prompts.jsonl: the environment does not begin .*'low'"
    with open_rewards(playing) as scorer, pytest.raises(DataError, match=told):
        grpo.build(playing, notes(quiet=True), None, scorer)
