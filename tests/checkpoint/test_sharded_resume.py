"""A run saved by some number of processes, split in some way, goes on with any other as if it had never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.runs import Run, do_alone, do_together
from helpers.training import losses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from arriero.checkpoint import native


def copied(run_dir: Path, name: str) -> str:
    return str(shutil.copytree(run_dir, run_dir.with_name(name)))


def assert_as_undisturbed(run_dir: Path, whole: Path) -> None:
    assert losses(run_dir) == pytest.approx(losses(whole), rel=1e-6)
    final, expected = load_file(run_dir / "final.safetensors"), load_file(whole / "final.safetensors")
    assert final.keys() == expected.keys()
    for name, tensor in final.items():
        assert (tensor - expected[name]).abs().max() < 5e-5, name  # of weights about 0.1, after 20 steps of 1e-3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, from the first step to the last."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    do_alone(Run(str(run_dir)))
    return run_dir


def test_one_process_goes_on_from_two_and_two_from_one(whole: Path) -> None:
    one, two = whole.with_name("one"), whole.with_name("two")
    do_alone(Run(str(one), stop_at=13))
    plan = [Run(str(two), stop_at=13), Run(copied(one, "one-two"))]
    do_together(plan, 2, whole.with_name("plan.json"))
    do_alone(Run(copied(two, "two-one")))
    for name in ("one-two", "two-one"):
        assert_as_undisturbed(whole.with_name(name), whole)

    weights = native.path_of(two, 13) / "weights"  # of two processes, as transformers finds it
    assert len(list(weights.glob("model-*-of-00002.safetensors"))) == 2
    opened = AutoModelForCausalLM.from_pretrained(weights)
    saved = native.at_step(two, 13)
    assert saved is not None
    state = opened.state_dict()
    for name, tensor in saved.tensors("weights").items():
        assert state.pop(name).equal(tensor), name
    assert not state
    assert AutoTokenizer.from_pretrained(weights)("Hello")["input_ids"]


@pytest.mark.slow
def test_four_processes_go_on_as_one_two_or_three_and_two_as_four(whole: Path) -> None:
    four, pairs, two, plan = (whole.with_name(name) for name in ("four", "pairs", "dp-two", "plan.json"))
    do_together([Run(str(four), stop_at=13), Run(str(pairs), {"tp": 2}, stop_at=13)], 4, plan)
    resumed = [Run(copied(four, "four-two")), Run(copied(four, "four-tp"), {"tp": 2}), Run(copied(pairs, "pairs-two"))]
    do_together([Run(str(two), stop_at=13), *resumed], 2, plan)
    do_together([Run(copied(four, "four-three"))], 3, plan)
    do_together([Run(copied(two, "two-four"), {"tp": 2}), Run(copied(pairs, "pairs-four"))], 4, plan)
    do_alone(Run(copied(four, "four-one")))
    for name in ("four-one", "four-two", "four-tp", "four-three", "pairs-two", "pairs-four", "two-four"):
        assert_as_undisturbed(whole.with_name(name), whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pipeline_and_parts_of_rows_go_on_as_one_process_or_two_and_back(whole: Path) -> None:
    saved = {"pp": {"pp": 2}, "cp": {"cp": 2}, "dp": {}}
    of_four = {"tp-pp": {"tp": 2, "pp": 2}, "cp-pp": {"cp": 2, "pp": 2}}
    plan, at = whole.with_name("plan.json"), whole.with_name
    do_together([Run(str(at(name)), split, stop_at=13) for name, split in saved.items()], 2, plan)
    do_together([Run(str(at(name)), split, stop_at=13) for name, split in of_four.items()], 4, plan)
    of_two = [("pp", "dp"), ("cp", "dp"), ("dp", "pp"), ("dp", "cp"), ("tp-pp", "dp"), ("cp-pp", "pp"), ("pp", "cp")]
    resumed = [f"{a}-as-{b}" for a, b in of_two]
    do_together([Run(copied(at(a), f"{a}-as-{b}"), saved[b]) for a, b in of_two], 2, plan)
    do_together([Run(copied(at("pp"), "pp-as-tp-pp"), of_four["tp-pp"])], 4, plan)
    for name in (*saved, *of_four):
        do_alone(Run(copied(at(name), f"{name}-as-one")))
    for name in (*resumed, "pp-as-tp-pp", *(f"{name}-as-one" for name in (*saved, *of_four))):
        assert_as_undisturbed(at(name), whole)


@pytest.mark.slow
def test_a_tied_matrix_at_both_ends_of_a_pipeline_is_saved_once_and_read_by_any(tmp_path: Path) -> None:
    at, plan = tmp_path.joinpath, tmp_path / "plan.json"
    do_alone(Run(str(at("whole")), tied=True))
    do_alone(Run(str(at("one")), tied=True, stop_at=13))
    ends, four = {"pp": 2}, {"pp": 2, "dp_shard": 2}
    stopped = Run(str(at("pp")), ends, tied=True, stop_at=13)
    do_together([stopped, Run(copied(at("one"), "one-pp"), ends, tied=True)], 2, plan)
    do_together([Run(copied(at("pp"), "pp-four"), four, tied=True)], 4, plan)
    do_alone(Run(copied(at("pp"), "pp-one"), tied=True))
    for name in ("one-pp", "pp-four", "pp-one"):
        assert_as_undisturbed(at(name), at("whole"))
    files = (native.path_of(at("pp"), 13) / "weights").glob("*.safetensors")
    names = [name for file in files for name in load_file(file)]
    assert sorted(names) == sorted(set(names))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
