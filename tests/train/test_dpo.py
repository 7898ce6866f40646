"""Direct preference optimisation: what is learned, from which reference, and that no split of a batch changes it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.subjects import byte_level
from helpers.toys import toy_config
from helpers.training import assert_same, losses
from rich.console import Console
from safetensors.torch import load_file

from arriero.checkpoint.hf import save_hf
from arriero.distributed.mesh import Mesh
from arriero.errors import ConfigError, DataError
from arriero.model.build import build_model
from arriero.model.lora_config import LoraConfig
from arriero.train import reference
from arriero.train.config import LoopConfig, OptimConfig
from arriero.train.dpo import build, main
from arriero.train.metrics import surviving_records
from arriero.train.preference_config import DpoConfig, PreferenceDataConfig
from arriero.train.preference_objective import preference_objective
from arriero.train.reference import References

CONSOLE = Console(quiet=True)
ALL = ["sigmoid", "sigmoid-norm", "ipo", "kto", "simpo", "orpo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A toy with some hundred tokens and ChatML."""
    directory = tmp_path_factory.mktemp("model") / "toy"
    tokenizer = byte_level()
    shape = replace(toy_config("smollm2-135m"), vocab_size=tokenizer.vocab_size, n_layers=2, max_context=512)
    save_hf(build_model(shape).init_weights(std=0.05, seed=1), directory, tokenizer)
    return directory


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    made = [
        {"prompt": f"{i} + {i}?", "chosen": f"{2 * i}", "rejected": f"it is {2 * i + 1} " + "x " * (i % 5)}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def settings(model: Path, rows: Path, out: Path, **changes) -> DpoConfig:
    config = DpoConfig(
        model=str(model),
        out=str(out),
        samples=0,
        data=PreferenceDataConfig(train=str(rows), validation="0.2", seq_len=192),
        lora=LoraConfig(rank=3),
        optim=OptimConfig(lr=1e-2),
        loop=LoopConfig(steps=3, batch_rows=4, micro_rows=2, precision="fp32", compile="off"),
    )
    return replace(config, **changes)


def steps_of(run_dir: Path) -> list[dict]:
    return [r for r in surviving_records(run_dir / "metrics.jsonl") if "event" not in r]


def nll_for(loss: str) -> dict:
    return {"nll": 1.0} if loss == "orpo" else {}


@pytest.mark.parametrize("loss", ALL)
def test_accumulation_of_1_2_and_4_gives_one_gradient(loss, model, rows, tmp_path, own_cache):
    found = []
    for micro_rows in (1, 2, 4):
        loop = LoopConfig(steps=3, batch_rows=4, micro_rows=micro_rows, precision="fp32", compile="off")
        run = build(settings(model, rows, tmp_path / "out", loss=loss, loop=loop, **nll_for(loss)), CONSOLE)
        learner = run.trainer.learner
        for p in learner.parameters.values():  # away from the reference, where every ratio is 1
            p.data.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        batches = run.trainer.batches(0)
        totals = learner.engine.forward_backward(batches, learner.objective)
        found.append((totals.loss, {name: p.grad.clone() for name, p in learner.parameters.items()}))
    for loss_of, gradient in found[1:]:
        assert loss_of == pytest.approx(found[0][0], rel=1e-6)
        for name, grad in gradient.items():
            one = found[0][1][name]
            torch.testing.assert_close(grad, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())
    assert any(grad.abs().max() > 1e-6 for grad in found[0][1].values())


@pytest.mark.parametrize("loss", ALL)
def test_better_answers_become_more_probable_than_worse_ones(loss, model, rows, tmp_path, own_cache):
    loop = LoopConfig(steps=12, batch_rows=4, micro_rows=4, precision="fp32", compile="off", validate_every=12)
    shown = 2 if loss == "sigmoid" else 0
    main(settings(model, rows, tmp_path / "out", loss=loss, loop=loop, samples=shown, **nll_for(loss)))
    records = steps_of(tmp_path / "out")
    if loss == "kto":
        assert records[-1]["good_reward"] > records[-1]["bad_reward"] + 0.05
    else:
        assert records[-1]["margin"] > records[0]["margin"] + 0.05 and records[-1]["accuracy"] > 0.9
    validated = [r for r in surviving_records(tmp_path / "out" / "metrics.jsonl") if r.get("event") == "validation"]
    assert validated[-1]["loss"] < validated[0]["loss"]
    assert all(len(record.get("samples", [])) == shown for record in validated)
    report = (tmp_path / "out" / "report.html").read_text()
    assert ("What the model says, from step to step" in report) == (shown > 0)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_before_the_first_step_the_model_is_its_reference(method, model, rows, tmp_path, own_cache):
    run = build(settings(model, rows, tmp_path / "out", method=method), CONSOLE)
    totals = run.trainer.learner.engine.forward_backward(run.trainer.batches(0), run.trainer.learner.objective)
    assert totals.loss == pytest.approx(np.log(2), abs=1e-5) and abs(totals.mean("margin")) < 1e-4


def test_an_adapter_that_goes_on_is_its_own_reference(model, rows, tmp_path, own_cache):
    main(settings(model, rows, tmp_path / "first"))
    second = settings(model, rows, tmp_path / "second", adapter=str(tmp_path / "first" / "adapter"))
    run = build(second, CONSOLE)
    first = build(settings(model, rows, tmp_path / "new"), CONSOLE)
    engine = run.trainer.learner.engine
    totals = engine.forward_backward(run.trainer.batches(0), run.trainer.learner.objective)
    assert totals.loss == pytest.approx(np.log(2), abs=1e-5)
    assert not np.allclose(run.loader.reference, first.loader.reference, equal_nan=True)
    main(second)
    assert steps_of(tmp_path / "second")[-1]["margin"] > 0


def test_switching_the_adapter_off_gives_the_cached_reference(model, rows, tmp_path, own_cache):
    for name in ("cached", "switched"):
        main(settings(model, rows, tmp_path / name, reference=name))
    cached, switched = (losses(tmp_path / name) for name in ("cached", "switched"))
    assert cached.keys() == switched.keys()
    for step, loss in cached.items():
        assert loss == pytest.approx(switched[step], abs=1e-5)


def test_the_reference_is_computed_once_and_not_trusted_when_it_is_wrong(
    model, rows, tmp_path, own_cache, monkeypatch, fresh_warnings
):
    asked = []
    inner = reference.document_logprobs

    def counted(engine, batches):
        asked.append(len(batches))
        return inner(engine, batches)

    monkeypatch.setattr(reference, "document_logprobs", counted)
    first = build(settings(model, rows, tmp_path / "a"), CONSOLE).loader.reference
    n = len(asked)
    again = build(settings(model, rows, tmp_path / "b"), CONSOLE).loader.reference
    known = ~np.isnan(first)
    assert np.array_equal(first[known], again[known]) and known.sum() >= 24
    assert len(asked) - n == 2  # the probe, of training and of validation rows
    for file in (own_cache / "reference").iterdir():
        np.save(file, np.load(file) + 50)
    mended = build(settings(model, rows, tmp_path / "c"), CONSOLE).loader.reference
    np.testing.assert_allclose(mended[known], first[known], atol=1e-5)
    assert any("they are computed again" in said for said in fresh_warnings())
    for file in (own_cache / "reference").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    whole = build(settings(model, rows, tmp_path / "d"), CONSOLE).loader.reference
    np.testing.assert_allclose(whole[known], first[known], atol=1e-5)
    assert np.isnan(References(tmp_path / "absent.npy", 3, Mesh.alone("cpu")).values).all()


def test_a_run_that_is_stopped_and_resumed_ends_in_the_same_weights(model, rows, tmp_path, own_cache):
    loop = LoopConfig(steps=6, batch_rows=4, micro_rows=2, precision="fp32", compile="off", save_every=2, keep_last=9)
    whole = settings(model, rows, tmp_path / "whole", loop=loop)
    main(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for later in ("step-00000004", "step-00000006"):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / later, ignore_errors=True)
    main(replace(whole, out=str(tmp_path / "parts"), resume=True))
    one, two = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "parts"))
    assert_same(one, two)


def test_the_nll_term_has_the_format_tokens_and_the_preference_has_not(model, rows, tmp_path, own_cache):
    config = settings(model, rows, tmp_path / "out", nll=0.2, mask_format=True)
    run = build(config, CONSOLE)
    batch, model_ = run.trainer.batches(0)[0], run.trainer.learner.engine.model
    masked = preference_objective(config).sums(model_, batch)
    plain = build(replace(config, mask_format=False), CONSOLE)
    unmasked = preference_objective(config).sums(model_, plain.trainer.batches(0)[0])
    assert masked["nll"].item() == pytest.approx(unmasked["nll"].item(), rel=1e-6)
    assert masked["chosen_logp"].item() > unmasked["chosen_logp"].item()
    counts = preference_objective(config).counts(batch)
    assert counts["nll"] == counts["preference"] == len(set(batch.document_extras["group"].tolist()) - {0})


def test_kto_learns_from_single_answers_and_keeps_its_reference_point_at_least_0(model, tmp_path, own_cache):
    path = tmp_path / "single.jsonl"
    made = [{"prompt": f"{i}?", "completion": "yes" if i % 2 else "no no", "label": bool(i % 2)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    loop = LoopConfig(steps=10, batch_rows=2, micro_rows=1, precision="fp32", compile="off")
    config = settings(model, path, tmp_path / "out", loss="kto", loop=loop)
    main(config)
    last = steps_of(tmp_path / "out")[-1]
    assert last["good_reward"] > last["bad_reward"]
    with pytest.raises(DataError, match="it has one answer, and pairs are compared; take `arriero dpo --loss kto`"):
        build(replace(config, loss="sigmoid"), CONSOLE)
    path.write_text("".join(json.dumps({**row, "prompt": "same"}) + "\n" for row in made))
    with pytest.raises(DataError, match="all rows have this prompt; kto needs answers to others"):
        build(replace(config, data=replace(config.data, validation="0")), CONSOLE).trainer.batches(0)


def test_rows_of_the_asked_ratings_alone_are_learned_from(model, tmp_path, own_cache):
    path = tmp_path / "rated.jsonl"
    ratings = ("significantly better", "better", "slightly better")
    made = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b", "rating": ratings[i % 3]} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    data = PreferenceDataConfig(
        train=str(path), validation="0", seq_len=192, ratings=("significantly better", "better")
    )
    run = build(settings(model, path, tmp_path / "out", data=data), CONSOLE)
    assert len(run.training) == 20 and set(run.training.ratings.tolist()) == {0, 1}
    with pytest.raises(DataError, match="not rated 'negligibly better'; nothing is left to learn from"):
        build(settings(model, path, tmp_path / "out", data=replace(data, ratings=("negligibly better",))), CONSOLE)


def test_further_rows_are_mixed_in_by_their_share(model, rows, tmp_path, own_cache):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"o{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(40)))
    data = PreferenceDataConfig(train=str(rows), validation="0", seq_len=192, also=str(other), also_share=0.2)
    run = build(settings(model, rows, tmp_path / "out", data=data), CONSOLE)
    assert len(run.training) == 30 and int((run.training.files == 1).sum()) == 6


REFUSED = [
    ({"loss": "orpo"}, "set nll to 1"),
    ({"loss": "kto", "nll": 0.2}, "set nll to 0"),
    ({"loss": "ipo", "smoothing": 0.1}, "it belongs to the sigmoid losses"),
    ({"beta": 0.0}, "beta is 0.0; it must be a number above 0"),
    ({"reference": "switched", "method": "full"}, "only a new adapter can be switched off"),
    ({"reference": "switched", "adapter": "a"}, "and adapter a; only a new adapter"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_settings_that_contradict_each_other_are_refused_on_construction(changes, message):
    with pytest.raises(ConfigError, match=message):
        DpoConfig(**changes)
