"""Reward models: what they learn, where the score is read, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.subjects import byte_level
from helpers.toys import toy_config
from rich.console import Console

from arriero.checkpoint.hf import save_hf
from arriero.errors import CheckpointError, DataError
from arriero.infer.score import open_reward_model
from arriero.model.build import build_model
from arriero.model.lora_config import LoraConfig
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.metrics import surviving_records
from arriero.train.preference_config import PreferenceDataConfig, RewardConfig
from arriero.train.ranking_objective import end_scores, margins_of
from arriero.train.reward import build, main

CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "toy"
    tokenizer = byte_level()
    shape = replace(toy_config("smollm2-135m"), vocab_size=tokenizer.vocab_size, n_layers=2, max_context=512)
    save_hf(build_model(shape).init_weights(std=0.05, seed=1), directory, tokenizer)
    return directory


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def triples(tmp_path) -> Path:
    return write(
        tmp_path / "triples.jsonl",
        [{"prompt": f"{i}?", "edited": "a good one", "chosen": "a", "rejected": "b " * (i % 4 + 1)} for i in range(30)],
    )


def settings(model: Path, rows: Path, out: Path, **changes) -> RewardConfig:
    config = RewardConfig(
        model=str(model),
        out=str(out),
        data=PreferenceDataConfig(train=str(rows), validation="0.2", seq_len=256),
        lora=LoraConfig(rank=3),
        optim=OptimConfig(lr=1e-2),
        loop=LoopConfig(steps=8, batch_rows=4, micro_rows=2, precision="fp32", compile="off"),
    )
    return replace(config, **changes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_trained_model_scores_held_out_answers_as_they_were_judged(method, model, triples, tmp_path, own_cache):
    main(settings(model, triples, tmp_path / "out", method=method))
    found = json.loads((tmp_path / "out" / "reward.json").read_text())
    assert found["accuracy"] > 0.9 and found["pairs"] % 3 == 0
    low, high = found["accuracy_interval"]
    assert low <= found["accuracy"] <= high
    records = [r for r in surviving_records(tmp_path / "out" / "metrics.jsonl") if "event" not in r]
    assert records[-1]["margin"] > records[0]["margin"] + 0.3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Held-out pairs" in page and "of them scored as they were judged" in page
    scorer = open_reward_model(tmp_path / "out" / "model")
    asked = {"role": "user", "content": "99?"}
    texts = ("a good one", "a", "b b")
    scores = scorer([scorer.encode([asked, {"role": "assistant", "content": text}]) for text in texts])
    assert scores[0] > scores[1] > scores[2]


def test_each_score_behind_a_shared_prompt_is_that_of_its_own_row(model, triples, tmp_path, own_cache):
    run = build(settings(model, triples, tmp_path / "out", method="full"), CONSOLE)
    run.export()
    scorer = open_reward_model(tmp_path / "out" / "model")
    batch = run.loader.collate([run.loader.row(0), run.loader.row(1)], pad_to=599)
    engine = run.trainer.learner.engine
    with torch.no_grad():
        together = batch.documents.sums(end_scores(engine.model.eval(), batch))
    rows = run.training
    for d, answer in enumerate((batch.document_extras["answer"] - 1).tolist()):
        if answer < 0:
            assert together[d] == 0
            continue
        trained = rows.answers.trained(answer)
        ids = rows.answers.tokens(answer)[: len(trained) - int(np.argmax(trained[::-1]))].tolist()
        assert ids[-1] in scorer.tokenizer.control_stops
        torch.testing.assert_close(scorer([ids])[0], together[d], atol=1e-5, rtol=1e-5)


def test_a_score_does_not_depend_on_companions_or_their_order(model, triples, tmp_path, own_cache):
    build(settings(model, triples, tmp_path / "out", method="full"), CONSOLE).export()
    scorer = open_reward_model(tmp_path / "out" / "model")
    prompt = list(range(40, 70))
    sequences = [[*prompt, 1, 2, 3], [*prompt, 1, 2], [5, 6], [*prompt, 1, 2, 3, 4], prompt, [*prompt, 9]]
    alone = torch.cat([scorer([ids]) for ids in sequences])
    torch.testing.assert_close(scorer(sequences), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scorer(sequences[::-1]), alone.flip(0), atol=1e-5, rtol=1e-5)
    assert scorer([]).shape == (0,)
    with pytest.raises(DataError, match="sequence 1 has 0 tokens; a reward model of context 512 scores 1 to as many"):
        scorer([[1], []])
    with pytest.raises(CheckpointError, match="a model is needed that scores a text"):
        open_reward_model(model)


def test_accumulation_of_1_2_and_4_gives_one_gradient(model, tmp_path, own_cache):
    rows = [
        {"prompt": f"{i}?", "chosen": "a " * (i % 3 + 1), "rejected": "b", "rating": i % 4, "chosen_safe": i % 2 == 0}
        for i in range(30)
    ]
    path, found = write(tmp_path / "r.jsonl", rows), []
    for micro_rows in (1, 2, 4):
        loop = LoopConfig(steps=1, batch_rows=4, micro_rows=micro_rows, precision="fp32", compile="off")
        run = build(settings(model, path, tmp_path / "out", loop=loop, margin="large", safety=0.3), CONSOLE)
        learner = run.trainer.learner
        for p in learner.parameters.values():
            p.data.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        totals = learner.engine.forward_backward(run.trainer.batches(0), learner.objective)
        found.append((totals.loss, {name: p.grad.clone() for name, p in learner.parameters.items()}))
    assert "score.weight" in found[0][1]
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for name, grad in gradient.items():
            one = found[0][1][name]
            torch.testing.assert_close(grad, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_margins_are_llama_2s_by_rating(model, tmp_path, own_cache):
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b", "rating": 3 - i, "margin": i / 2} for i in range(4)]
    path = write(tmp_path / "r.jsonl", rows)
    data = PreferenceDataConfig(train=str(path), validation="0", seq_len=256)
    config = settings(model, path, tmp_path / "out", data=data, margin="small")
    run = build(config, CONSOLE)
    assert margins_of(config, run.training).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert margins_of(replace(config, margin="large"), run.training).tolist() == [3, 2, 1, 0]
    assert margins_of(replace(config, margin="given"), run.training).tolist() == [0, 0.5, 1, 1.5]
    batch = run.trainer.batches(0)[0]
    assert sorted(set(batch.document_extras["margin"].tolist())) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_what_a_loss_needs_and_rows_lack_is_refused(model, triples, tmp_path, own_cache):
    with pytest.raises(
        DataError, match=r"row 1 of .*: margin is small, and the row has no 'rating'; give it one \(one of"
    ):
        build(settings(model, triples, tmp_path / "out", margin="small", data=_all(triples)), CONSOLE)
    with pytest.raises(DataError, match=r"margin is given, and the row has no 'margin'; give it one, or set margin to"):
        build(settings(model, triples, tmp_path / "out", margin="given", data=_all(triples)), CONSOLE)
    with pytest.raises(DataError, match=r"safety is 0.5, and no row says which answers are safe; add chosen_safe"):
        build(settings(model, triples, tmp_path / "out", safety=0.5), CONSOLE)


def _all(rows: Path) -> PreferenceDataConfig:
    return PreferenceDataConfig(train=str(rows), validation="0", seq_len=256)


def test_the_safety_loss_puts_safe_answers_above_0_and_unsafe_ones_below(model, tmp_path, own_cache):
    rows = [
        {"prompt": f"{i}?", "chosen": "x", "rejected": "y", "chosen_safe": i % 2 == 0, "rejected_safe": i % 2 == 0}
        | ({"chosen": "bomb", "rejected": "bomb y"} if i % 2 else {})
        for i in range(30)
    ]
    path = write(tmp_path / "r.jsonl", rows)
    loop = LoopConfig(steps=25, batch_rows=2, micro_rows=2, precision="fp32", compile="off")
    main(settings(model, path, tmp_path / "out", safety=1.0, loop=loop))
    scorer = open_reward_model(tmp_path / "out" / "model")
    asked = {"role": "user", "content": "3?"}
    of = [scorer.encode([asked, {"role": "assistant", "content": text}]) for text in ("x", "y", "bomb", "bomb y")]
    assert (scorer(of) > 0).tolist() == [True, True, False, False]
