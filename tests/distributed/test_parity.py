"""Any number of processes, split in any way, gives the losses and gradients of one."""

import pytest
from helpers.parallel import Case, Result, run_alone, run_cases


def assert_equal(ours: Result, alone: Result) -> None:
    assert ours.losses == pytest.approx(alone.losses, rel=1e-5)
    assert ours.norms == pytest.approx(alone.norms, rel=1e-4)
    assert ours.validation == pytest.approx(alone.validation, rel=1e-5)
    assert ours.weights.keys() == alone.weights.keys()
    for part, tolerance in (("first", 1e-5), ("last", 1e-4)):
        grads, expected = getattr(ours, part), getattr(alone, part)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            off = (grad - expected[name]).norm() / expected[name].norm()
            assert off < tolerance, f"{part} gradient of {name}: {off}"


TWO = [
    Case({"dp_shard": 2}),
    Case({"dp_replicate": 2}),
    Case({"dp_shard": 2, "reduce_every": True}, tied=True, prefix=11),
    Case({"dp_shard": 2}, lora=True, recompute="full"),
    Case({"dp_shard": 2}, recompute="selective"),
]


def test_two_processes_equal_one(tmp_path):
    for case in TWO:
        assert case.name()
    results = run_cases(TWO, 2, tmp_path)
    for case in TWO:
        assert_equal(results[case.name()], run_alone(case))
