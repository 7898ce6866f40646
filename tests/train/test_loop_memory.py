"""What saves memory changes nothing else: steps in the backward pass, state in eight bits, parts on the host."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from helpers.runs import SHAPE, Run, do_alone, do_together
from helpers.training import assert_same, changed, losses, toy_trainer
from safetensors.torch import load_file

from arriero.checkpoint import native
from arriero.checkpoint.sharded import Checkpoints
from arriero.distributed.config import ParallelConfig
from arriero.distributed.engine import Engine
from arriero.distributed.mesh import Mesh
from arriero.distributed.parallelize import prepare
from arriero.errors import ConfigError
from arriero.losses.lm import chunked_cross_entropy
from arriero.model.llama import Llama
from arriero.train.config import (
    LoopConfig,
    OptimConfig,
    PretrainConfig,
    PretrainDataConfig,
    SftConfig,
    TrainingStage,
)
from arriero.train.in_backward import InBackward
from arriero.train.pretrain import main as pretrain

OPTIMIZERS = ["adamw", "adamw8bit", "muon"]


def trainer_of(run_dir, in_backward=True, optimizer="adamw", **more):
    optim = OptimConfig(optimizer, lr=1e-2, clip=0.0, weight_decay=0.1, in_backward=in_backward)
    return toy_trainer(run_dir, optim=optim, **{"batch_rows": 2, "micro_rows": 2, "full": True} | more)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stepping_in_the_backward_pass_is_the_ordinary_step_bit_by_bit(tmp_path, optimizer, full):
    ordinary, ours = (trainer_of(tmp_path, on, optimizer, full=full) for on in (False, True))
    for _ in range(7):
        expected, found = ordinary.step(), ours.step()
        assert found["loss"] == expected["loss"]
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert_same(ours.learner.parameters, ordinary.learner.parameters)
    assert_same(ours.learner.optimizer_tensors(), ordinary.learner.optimizer_tensors())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_never_lie_in_memory_together(recompute):
    """Tied embeddings are a parameter that is used twice; recomputed blocks read their weights once more."""
    models = [Llama(dataclasses.replace(SHAPE, tied_embeddings=True)).init_weights(std=0.1, seed=1) for _ in range(2)]
    tokens = torch.randint(0, SHAPE.vocab_size, (1, 53), generator=torch.Generator().manual_seed(5))

    def backward(model):
        hidden = model.model(tokens[:, :-1])
        (chunked_cross_entropy(hidden[0], model.lm_head.weight, tokens[0, 1:]) / 52).backward()

    optim = OptimConfig(lr=1e-2, clip=0.0, in_backward=True)
    engine = Engine.alone(prepare(models[0], recompute=recompute))
    optimizer, together = InBackward(engine, optim), []
    for p in models[0].parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: together.append(sum(p.grad is not None for p in models[0].parameters()))
        )
    plain = torch.optim.AdamW(models[1].parameters(), lr=1e-2, betas=optim.betas, weight_decay=0.0, fused=True)
    for _ in range(3):
        backward(models[0])
        backward(models[1])
        plain.step()
        plain.zero_grad()
    assert together == [0] * 3 * len(list(models[0].parameters()))  # each is gone before the next one comes
    assert optimizer.grad_norm() > 0 and optimizer.grad_norm() == 0
    assert_same(dict(models[0].named_parameters()), dict(models[1].named_parameters()))


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.step()
    before = {name: p.detach().clone() for name, p in trainer.learner.parameters.items()}
    state = {name: t.clone() for name, t in trainer.learner.optimizer_tensors().items()}
    honest = trainer.learner.objective
    for wrong in (lambda loss: loss * float("nan"), lambda loss: loss + float("inf")):  # with and without a gradient
        trainer.learner.objective = changed(honest, wrong)
        trainer.step()
    assert trainer.learner.counters.skipped == 2
    assert_same(trainer.learner.parameters, before)
    assert_same(trainer.learner.optimizer_tensors(), state)
    trainer.learner.objective = honest
    assert trainer.step()["skipped"] == 2 and trainer.learner.skipped_in_a_row == 0


def test_a_gradient_that_is_not_finite_is_not_applied_and_the_step_is_counted(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.step()
    wrong = "model.layers.0.mlp.up_proj.weight"
    before = {name: p.detach().clone() for name, p in trainer.learner.parameters.items()}
    handle = trainer.learner.parameters[wrong].register_hook(lambda grad: grad * float("nan"))
    assert trainer.step()["skipped"] == 1
    handle.remove()
    unchanged = [name for name, p in trainer.learner.parameters.items() if torch.equal(p, before[name])]
    assert unchanged == [wrong]
    assert all(p.isfinite().all() for p in trainer.learner.parameters.values())
    assert trainer.step()["skipped"] == 1


@pytest.mark.parametrize("in_backward", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_gives_the_same_losses_weights_and_state(tmp_path, optimizer, in_backward):
    whole = trainer_of(tmp_path / "whole", in_backward, optimizer, steps=11)
    losses = [whole.step()["loss"] for _ in range(11)]
    stopped = trainer_of(tmp_path / "parts", in_backward, optimizer, steps=11)
    for _ in range(5):
        stopped.step()
    stopped.save()
    resumed = trainer_of(tmp_path / "parts", in_backward, optimizer, steps=11)
    resumed.restore(Checkpoints(tmp_path / "parts").latest())
    assert [resumed.step()["loss"] for _ in range(6)] == losses[5:]
    assert_same(resumed.learner.parameters, whole.learner.parameters)
    assert_same(resumed.learner.optimizer_tensors(), whole.learner.optimizer_tensors())


def test_a_run_in_eight_bits_learns_as_one_in_full(tmp_path):
    curves = []
    for optimizer in ("adamw", "adamw8bit"):
        trainer = trainer_of(tmp_path / optimizer, False, optimizer, steps=30)
        curves.append([trainer.step()["loss"] for _ in range(30)])
    assert curves[0][-1] < 0.5 * curves[0][0]
    for full, eight in zip(*curves, strict=True):
        assert eight == pytest.approx(full, rel=0.05)


# -- what excludes what ------------------------------------------------------------------------------------------


def test_what_needs_the_whole_gradient_is_refused_with_a_step_in_the_backward_pass(tmp_path):
    with pytest.raises(ConfigError, match=r"in_backward is on and clip is 1.0; .*: set clip to 0, or leave"):
        OptimConfig(in_backward=True)
    optim = OptimConfig(in_backward=True, clip=0.0)
    for recipe in (SftConfig, PretrainConfig):
        with pytest.raises(ConfigError, match=r"in_backward is on and spike is 6.0; .* set spike to 0"):
            recipe(optim=optim, loop=LoopConfig(spike=6.0))
        with pytest.raises(ConfigError, match=r"in_backward is on and pp is 2; a pipeline sums gradients"):
            recipe(optim=optim, parallel=ParallelConfig(pp=2))
    with pytest.raises(ConfigError, match=r"stage at 0.5: batch_rows 16, but in_backward is on"):
        PretrainConfig(optim=optim, stages=(TrainingStage(0.5, batch_rows=16),))
    PretrainConfig(optim=optim, stages=(TrainingStage(0.5, batch_rows=8, seq_len=512),))
    with pytest.raises(ConfigError, match=r"batch_rows 8 is not micro_rows 2 x 1 data-parallel .* has to be kept"):
        trainer_of(tmp_path, batch_rows=8)


def test_muon_is_not_stepped_in_the_backward_pass_of_many_processes():
    engine = Engine.alone(Llama(SHAPE))
    engine.mesh = Mesh(ParallelConfig(dp_shard=2), engine.mesh.device)
    with pytest.raises(ConfigError, match=r"in_backward is on with muon on 2 processes, .* take adamw or adamw8bit"):
        InBackward(engine, OptimConfig("muon", clip=0.0, in_backward=True))


def test_eight_bits_are_refused_where_rows_are_cut():
    with pytest.raises(ConfigError, match=r"optimizer is adamw8bit and tp is 2; .* take adamw, or dp_shard instead"):
        PretrainConfig(optim=OptimConfig("adamw8bit"), parallel=ParallelConfig(tp=2))


# -- many processes ----------------------------------------------------------------------------------------------


def test_two_processes_step_in_the_backward_pass_as_they_would_after_it(tmp_path):
    """Split by rows, and each matrix in two (where replicated norms have to stay the same on both)."""
    runs = [
        Run(str(tmp_path / f"{kind}-{on}"), parallel, steps=8, at_once=True, optim={"clip": 0.0, "in_backward": on})
        for kind, parallel in {"dp": {}, "tp": {"tp": 2}}.items()
        for on in (False, True)
    ]
    do_together(runs, 2, tmp_path / "plan.json")
    for kind in ("dp", "tp"):
        ordinary, ours = tmp_path / f"{kind}-False", tmp_path / f"{kind}-True"
        assert losses(ours) == losses(ordinary)
        assert_same(load_file(ours / "final.safetensors"), load_file(ordinary / "final.safetensors"))


def test_eight_bits_go_on_with_another_number_of_processes(tmp_path):
    """State is stored by rows, so what is read back is what was written, however it lies."""
    whole, one, two, three = (str(tmp_path / name) for name in ("whole", "one", "two", "three"))
    optim = {"optimizer": "adamw8bit"}
    do_alone(Run(whole, optim=optim))
    do_together([Run(two, stop_at=11, optim=optim)], 2, tmp_path / "plan.json")
    shutil.copytree(two, one)
    shutil.copytree(two, three)
    do_together([Run(three, stop_at=12, optim=optim)], 3, tmp_path / "plan.json")
    trainer = do_alone(Run(one, stop_at=11, optim=optim))
    assert_same(trainer.learner.optimizer_tensors(), native.at_step(Path(two), 11).tensors("optimizer"))
    do_alone(Run(one, optim=optim))
    do_alone(Run(three, optim=optim))
    for run_dir in (one, three):
        # a sum in another order may store a moment as the next of 256 shares
        assert losses(Path(run_dir)) == pytest.approx(losses(Path(whole)), rel=1e-4)


def test_what_lies_on_the_host_is_trained_as_it_would_be_on_the_device(tmp_path):
    """Both are one memory here: the policy is accepted, and parts are gathered, reduced, clipped, stepped, saved."""
    eight = {"optimizer": "adamw8bit", "clip": 0.0, "in_backward": True}
    offload = {"cpu_offload": True}
    one = [Run(str(tmp_path / "one"), offload, steps=8)]
    two = [
        Run(str(tmp_path / f"{kind}-{name}"), parallel, steps=8, optim=optim, at_once=kind == "eight")
        for kind, optim in {"adamw": {}, "eight": eight}.items()
        for name, parallel in {"device": {}, "host": offload}.items()
    ]
    do_alone(Run(str(tmp_path / "alone"), steps=8))
    do_together(one, 1, tmp_path / "plan.json")
    do_together(two, 2, tmp_path / "plan.json")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
    for kind in ("adamw", "eight"):
        device, host = tmp_path / f"{kind}-device", tmp_path / f"{kind}-host"
        assert losses(host) == losses(device)
        assert_same(load_file(host / "final.safetensors"), load_file(device / "final.safetensors"))


def test_offloading_is_refused_where_there_is_no_gpu():
    config = PretrainConfig("1m", data=PretrainDataConfig("nowhere"), parallel=ParallelConfig(cpu_offload=True))
    with pytest.raises(ConfigError, match=r"cpu_offload is on, but there is no GPU here: .*; leave it out"):
        pretrain(config)
