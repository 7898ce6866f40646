import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.training import assert_same, changed, losses, toy_loader, toy_trainer

from arriero.checkpoint import native
from arriero.checkpoint.sharded import Checkpoints
from arriero.cli.train import finish
from arriero.errors import CheckpointError, TrainingError
from arriero.train.loop import Outcome, Progress
from arriero.train.metrics import MetricsLog


def run(trainer, run_dir):
    with MetricsLog(run_dir, after=trainer.progress.step) as log:
        return trainer.run(log)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.learner.parameters.items()}


def test_training_lowers_the_loss(tmp_path):
    trainer = toy_trainer(tmp_path, steps=40, dropout=0.0)
    run(trainer, tmp_path)
    curve = losses(tmp_path)
    assert curve[40] < 0.75 * curve[1]


@pytest.mark.parametrize("full", [False, True])
def test_one_by_eight_equals_eight_by_one(tmp_path, full):
    results = []
    for micro_rows in (1, 2, 8):
        trainer = toy_trainer(tmp_path / str(micro_rows), steps=3, dropout=0.0, micro_rows=micro_rows, full=full)
        run(trainer, tmp_path / str(micro_rows))
        results.append((losses(tmp_path / str(micro_rows)), weights(trainer)))
    for other_losses, other_weights in results[1:]:
        assert other_losses == pytest.approx(results[0][0], rel=1e-6)
        for name, value in other_weights.items():
            # Adam divides by the gradient's root mean square, so rounding of tiny gradients shows up in full
            torch.testing.assert_close(value, results[0][1][name], atol=2e-4, rtol=1e-3, msg=name)


def test_packed_gradients_equal_unpacked_ones(tmp_path):
    grads = []
    for packing in (True, False):
        trainer = toy_trainer(tmp_path, dropout=0.0, packing=packing, batch_rows=1, micro_rows=1, full=True)
        loader = toy_loader(packing)
        epoch = [loader.collate([loader.row(i)]) for i in range(loader.rows_in_epoch(0))]
        total = sum(batch.n_trained for batch in epoch)
        for batch in epoch:
            (trainer.learner.objective.sums(trainer.learner.engine.model, batch)["loss"] / total).backward()
        grads.append({name: p.grad for name, p in trainer.learner.parameters.items()})
    for name, packed in grads[0].items():
        torch.testing.assert_close(packed, grads[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_resume_gives_the_same_losses_and_weights(tmp_path):
    whole = toy_trainer(tmp_path / "whole")
    run(whole, tmp_path / "whole")

    stopped = toy_trainer(tmp_path / "parts")
    with MetricsLog(tmp_path / "parts") as log:
        for _ in range(10):
            log.step(stopped.step())
        stopped.save()
        log.step(stopped.step())  # lost: after the checkpoint
    resumed = toy_trainer(tmp_path / "parts")
    resumed.restore(Checkpoints(tmp_path / "parts").latest())
    run(resumed, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same(weights(resumed), weights(whole))


CHILD = """
import sys
from pathlib import Path
from arriero.checkpoint.sharded import Checkpoints
from arriero.train.metrics import MetricsLog
from helpers.training import toy_loader, toy_trainer
run_dir = Path(sys.argv[1])
trainer = toy_trainer(run_dir, steps=int(sys.argv[2]))
saved = Checkpoints(run_dir).latest()
if saved is not None:
    trainer.restore(saved)
print("ready", flush=True)
with MetricsLog(run_dir, after=trainer.progress.step) as log:
    outcome = trainer.run(log)
print("ended", outcome.progress.step, outcome.interrupted and outcome.interrupted.name, flush=True)
"""


def child(run_dir, steps):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run_dir), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
            "OMP_NUM_THREADS": "1",
        },
    )


def wait_for_step(run_dir, step, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if max(native.steps(run_dir), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step} after {seconds} s")


def test_resume_after_kill_gives_the_same_losses_and_weights(tmp_path):
    steps = 80  # enough that the kill comes in the middle
    with child(tmp_path / "killed", steps) as first:
        wait_for_step(tmp_path / "killed", 10)
        first.kill()
    assert max(native.steps(tmp_path / "killed")) < steps
    with child(tmp_path / "killed", steps) as second, child(tmp_path / "whole", steps) as undisturbed:
        assert f"ended {steps} None" in second.communicate(timeout=200)[0]
        undisturbed.communicate(timeout=200)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ours, theirs = (Checkpoints(tmp_path / name).latest().tensors("weights") for name in ("killed", "whole"))
    assert_same(ours, theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tmp_path, number):
    with child(tmp_path, 100_000) as process:
        wait_for_step(tmp_path, 10)
        process.send_signal(number)
        out = process.communicate(timeout=60)[0]
    step = int(out.split("ended ")[1].split()[0])
    assert number.name in out
    assert Checkpoints(tmp_path).latest().step == step


def test_a_non_finite_step_is_skipped_and_counted(tmp_path):
    trainer = toy_trainer(tmp_path, dropout=0.0)
    trainer.step()
    before, honest = weights(trainer), trainer.learner.objective
    trainer.learner.objective = changed(honest, lambda loss: loss * float("nan"))
    metrics = trainer.step()
    assert metrics["skipped"] == 1
    assert_same(weights(trainer), before)
    trainer.learner.objective = honest
    assert trainer.step()["skipped"] == 1
    assert trainer.learner.skipped_in_a_row == 0


def test_many_non_finite_steps_in_a_row_stop_with_a_clear_error_and_keep_good_checkpoints(tmp_path):
    trainer = toy_trainer(tmp_path, max_skipped=4, save_every=1, keep_last=2)
    honest = trainer.learner.objective
    trainer.learner.objective = changed(
        honest, lambda loss: loss * (float("inf") if trainer.progress.step >= 5 else 1.0)
    )
    message = r"not finite for 4 steps in a row \(max_skipped\); begin a new run with an lr below .*00000005/weights$"
    with pytest.raises(TrainingError, match=message):
        run(trainer, tmp_path)
    assert native.steps(tmp_path) == [4, 5]


def test_a_save_that_is_due_at_a_step_that_is_not_finite_waits_for_the_next_good_one(tmp_path):
    trainer = toy_trainer(tmp_path, steps=10, save_every=4, keep_last=9)
    honest = trainer.learner.objective
    trainer.learner.objective = changed(
        honest, lambda loss: loss * (float("inf") if trainer.progress.step in (3, 4) else 1.0)
    )
    run(trainer, tmp_path)
    assert native.steps(tmp_path) == [6, 8, 10]


def test_weights_that_steps_are_not_finite_with_are_never_the_best(tmp_path):
    values = iter([3.0, 2.0, 1.0])
    trainer = toy_trainer(tmp_path, steps=8, validate=lambda: {"loss": next(values)}, validate_every=4)
    honest = trainer.learner.objective
    trainer.learner.objective = changed(
        honest, lambda loss: loss * (float("inf") if trainer.progress.step >= 5 else 1.0)
    )
    run(trainer, tmp_path)
    assert trainer.progress.best_step == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_validation_loss_that_is_not_finite_is_never_the_best_and_survives_a_resume(tmp_path, bad):
    values = iter([3.0, bad, bad, 2.0])
    trainer = toy_trainer(tmp_path, steps=12, validate=lambda: {"loss": next(values)}, validate_every=4, save_every=4)
    run(trainer, tmp_path)
    assert trainer.progress.best_step == 12
    (tmp_path / "checkpoints" / "step-00000012" / "state.json").rename(tmp_path / "gone")
    again = toy_trainer(tmp_path, steps=12, validate=lambda: {"loss": bad}, validate_every=4)
    again.restore(again.checkpoints.latest())
    assert math.isnan(again.progress.validation[4]) and again.progress.best_loss == 3.0
    assert run(again, tmp_path).progress.best_step == 0
    with MetricsLog(tmp_path, after=12) as log:
        assert not math.isfinite(again.load_result(log))


def test_the_loss_of_what_is_written_is_that_of_the_best_checkpoint(tmp_path):
    values = iter([3.0, 1.0, float("nan")])
    trainer = toy_trainer(tmp_path, steps=8, validate=lambda: {"loss": next(values)}, validate_every=4)
    run(trainer, tmp_path)
    with MetricsLog(tmp_path, after=8) as log:
        assert trainer.load_result(log) == 1.0


def test_the_command_fails_where_what_was_trained_is_of_no_use():
    progress = Progress(step=7)
    finish(Outcome(progress, None, 2.0))
    finish(Outcome(progress, None, None))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(TrainingError, match=f"loss of what it wrote is {bad}: its weights are of no use"):
            finish(Outcome(progress, None, bad))


def test_a_signal_during_the_first_validation_stops_before_step_1(tmp_path):
    trainer = toy_trainer(tmp_path, steps=2, validate=lambda: signal.raise_signal(signal.SIGTERM) or {"loss": 1.0})
    assert run(trainer, tmp_path).interrupted is signal.SIGTERM
    assert trainer.progress.step == 0


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, toy_trainer(tmp_path, steps=2), tmp_path).result().progress.step == 2


def test_the_best_checkpoint_is_kept_and_taken_up(tmp_path):
    values = iter([3.0, 1.0, 2.0, 2.5, float("nan"), 2.7])  # what is not finite is never the best
    trainer = toy_trainer(
        tmp_path, steps=10, validate=lambda: {"loss": next(values)}, validate_every=2, save_every=1, keep_last=1
    )
    run(trainer, tmp_path)
    assert trainer.progress.best_step == 2
    assert native.steps(tmp_path) == [2, 10]
    with MetricsLog(tmp_path, after=10) as log:
        trainer.load_result(log)
    assert_same(weights(trainer), native.at_step(tmp_path, 2).tensors("weights"))


def test_a_signal_during_the_last_step_finds_a_finished_run(tmp_path):
    trainer = toy_trainer(tmp_path, steps=2)
    trainer.validate = lambda: (trainer.progress.step == 2 and signal.raise_signal(signal.SIGTERM)) or {"loss": 1.0}
    assert run(trainer, tmp_path).interrupted is None


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer = toy_trainer(tmp_path, steps=10)
    trainer.step()
    trainer.save()
    with pytest.raises(CheckpointError, match="it belongs to a run of 10 steps, this one has 20"):
        toy_trainer(tmp_path, steps=20).restore(Checkpoints(tmp_path).latest())
    with pytest.raises(CheckpointError, match="its trained tensors are not this run's"):
        toy_trainer(tmp_path, steps=10, full=True).restore(Checkpoints(tmp_path).latest())


def test_a_checkpoint_without_the_moments_of_every_weight_is_refused(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.step()
    name, parameter = next(iter(trainer.learner.parameters.items()))
    del trainer.learner.optimizer.state[parameter]
    trainer.save()
    with pytest.raises(CheckpointError, match=f"no optimizer state of 1 tensors .for example {re.escape(name)}"):
        toy_trainer(tmp_path).restore(Checkpoints(tmp_path).latest())


def test_clipping_bounds_the_gradient_of_a_step(tmp_path):
    trainer = toy_trainer(tmp_path, dropout=0.0)
    seen = {}
    original = trainer.learner.optimizer.step
    trainer.learner.optimizer.step = lambda: (
        seen.update(norm=torch.cat([p.grad.flatten() for p in trainer.learner.parameters.values()]).norm()),
        original(),
    )
    object.__setattr__(trainer.learner.optim, "clip", 1e-3)
    assert trainer.step()["grad_norm"] > 1e-3
    assert seen["norm"] == pytest.approx(1e-3, rel=1e-3)


def test_a_spike_is_skipped_counted_and_leaves_the_weights_alone(tmp_path):
    trainer = toy_trainer(tmp_path, steps=80, dropout=0.0, spike=6.0, batch_rows=2)
    for _ in range(60):
        trainer.step()
    before, objective = weights(trainer), trainer.learner.objective
    trainer.learner.objective = changed(objective, lambda loss: loss * 40)
    assert trainer.step()["skipped"] == 1 and trainer.learner.counters.spikes == 1
    assert_same(weights(trainer), before)
    trainer.learner.objective = objective
    assert trainer.step()["skipped"] == 1


def test_the_average_is_the_mean_of_the_last_steps_weights_and_survives_a_resume(tmp_path):
    trainer = toy_trainer(tmp_path / "whole", steps=10, average=0.3, full=True)
    seen = []
    for _ in range(10):
        trainer.step()
        seen.append(weights(trainer))
    with MetricsLog(tmp_path / "whole", after=10) as log:
        trainer.load_result(log)
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in seen[-3:]]).mean(0), msg=name)

    stopped = toy_trainer(tmp_path / "parts", steps=10, average=0.3, full=True)
    for _ in range(9):
        stopped.step()
    stopped.save()
    resumed = toy_trainer(tmp_path / "parts", steps=10, average=0.3, full=True)
    resumed.restore(Checkpoints(tmp_path / "parts").latest())
    resumed.step()
    with MetricsLog(tmp_path / "parts", after=10) as log:
        resumed.load_result(log)
    assert_same(weights(resumed), weights(trainer))
