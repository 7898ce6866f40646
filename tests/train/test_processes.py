"""Recipes as a user starts them on several processes, from the command line to the files."""

import json
import subprocess
import sys
import time

import psutil
import pytest
import torch
from helpers.parallel import run_processes, started_by_torchrun
from helpers.training import losses
from safetensors.torch import load_file

from arriero.checkpoint import native
from arriero.train import attempts
from arriero.train.metrics import surviving_records


def sft(toy_model, rows, out, world, *more, seq_len=128):
    settings = (
        f"--seq-len {seq_len} --steps 4 --batch-rows 4 --precision fp32 --rank 3 --samples 2 --lr 1e-3 --workers 1"
    )
    command = [sys.executable, "-m", "arriero", "sft", str(toy_model), "--data", str(rows), "--out", str(out)]
    return run_processes([*command, *settings.split(), *more], world, 280)


@pytest.mark.slow
def test_fine_tuning_on_two_processes_gives_the_run_directory_of_one(toy_model, rows, tmp_path):
    sft(toy_model, rows, tmp_path / "one", 1)
    sft(toy_model, rows, tmp_path / "two", 2, "--dp-shard", "2")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    names = [sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]
    assert {"adapter", "samples.jsonl", "report.html", "metrics.jsonl"} <= set(names[0])
    one, two = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_a_tied_model_fine_tuned_whole_in_a_pipeline_is_exported_as_by_one_process(toy_model, rows, tmp_path):
    sft(toy_model, rows, tmp_path / "one", 1, "--method", "full")
    sft(toy_model, rows, tmp_path / "two", 2, "--method", "full", "--pp", "2")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys() and "lm_head.weight" not in one
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_what_cannot_be_split_so_is_said_before_step_1(toy_model, rows, tmp_path):
    with pytest.raises(AssertionError, match="tp 2 does not divide the model's n_kv_heads 11"):
        sft(toy_model, rows, tmp_path / "run", 2, "--tp", "2")
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(AssertionError, match=r"row 1 of .*: \d+ tokens do not fit 16") as refused:
        sft(toy_model, rows, tmp_path / "run", 2, seq_len=16)
    assert "RuntimeError" not in str(refused.value) and str(refused.value).count("do not fit") == 1


@pytest.mark.slow
def test_pretraining_on_two_processes_gives_the_losses_of_one(shards, tmp_path):
    settings = "--seq-len 64 --steps 3 --batch-rows 4 --precision fp32 --validation-tokens 500 --compile off"
    for name, world in (("one", 1), ("two", 2)):
        command = [sys.executable, "-m", "arriero", "pretrain", "1m", "--data", str(shards), "--out"]
        run_processes([*command, str(tmp_path / name), *settings.split()], world, 280)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on_by_itself_while_no_other_may_train_there(shards, tmp_path):
    settings = "--seq-len 64 --steps 150 --batch-rows 4 --precision fp32 --validation-tokens 500 --compile off"
    saving = "--save-every 1 --validate-every 2 --prompts"  # half of the checkpoints come straight after a validation
    command = ["-m", "arriero", "pretrain", "1m", "--data", str(shards), *settings.split(), *saving.split(), "--out"]
    out, log = tmp_path / "run", tmp_path / "log"
    with started_by_torchrun([*command, str(out)], 2, 2, log) as job:
        while not native.steps(out):
            assert job.poll() is None, log.read_text()
            time.sleep(0.05)
        other = subprocess.run([sys.executable, *command, str(out), "--resume"], capture_output=True, text=True)
        assert other.returncode == 2 and "run: another process trains there; wait for it" in other.stderr
        workers = psutil.Process(job.pid).children()
        next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
        assert job.wait(timeout=200) == 0, log.read_text()
    assert sum("began" in record for record in surviving_records(out / attempts.FILE)) == 2, log.read_text()
    run_processes([sys.executable, *command, str(tmp_path / "undisturbed")], 2, 280)
    killed, undisturbed = (load_file(d / "model" / "model.safetensors") for d in (out, tmp_path / "undisturbed"))
    assert killed.keys() == undisturbed.keys()
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in killed.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["dpo --loss sigmoid --nll 0.2", "dpo --loss kto", "dpo --reference switched", "reward"]
)
def test_learning_from_preferences_on_two_processes_gives_the_losses_of_one(recipe, toy_model, tmp_path):
    made = [{"prompt": f"{i}?", "edited": "ab", "chosen": "a", "rejected": "b " * (i % 3 + 1)} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    settings = "--seq-len 192 --steps 4 --batch-rows 4 --precision fp32 --rank 3 --lr 1e-2 --workers 1"
    for name, world, more in (("one", 1, []), ("two", 2, ["--dp-shard", "2"])):
        command = [sys.executable, "-m", "arriero", recipe.split()[0], str(toy_model), "--data"]
        command += [str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / name), *recipe.split()[1:]]
        run_processes([*command, *settings.split(), *more], world, 280)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4) and one[4] < one[1]
