"""The scripts in runs/, from their first to their last line, as small as they go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "llama2.sh": {"PROMPTS": 16, "SECRETS": 16, "HELD_OUT": 8, "DIALOGUES": 120, "ROUNDS": 1, "PPO_STEPS": 2},
    "ladder.sh": {"SEEDS": 0, "PROMPTS": 8, "HELD_OUT": 8, "STEPS": 2, "ARMS": "sft dpo ppo grpo"},
    "proxy.sh": {"ASKED": 20, "HELD_OUT": 8, "N": 4, "STEPS": 2, "EVERY": 1},
    "guess-number.sh": {"RANGES": 24, "HELD_OUT": 8, "STEPS": 2},
}
SAID = {
    "llama2.sh": ("gatt ", "reward model of safety"),
    "ladder.sh": ("dpo ", "grpo ", "gain in pass@1"),
    "proxy.sh": ("best of", "GRPO: gain = d (alpha - beta ln d)", "rejection sampling by the reward model: "),
    "guess-number.sh": ("after step   0: ", "after step   2: "),
}


@pytest.mark.slow  # minutes
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", SMALL)
def test_a_script_runs_to_its_table_and_a_second_start_does_nothing_again(script, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {name: str(value) for name, value in SMALL[script].items()}
    env = os.environ | given | {"OUT": str(tmp_path / "out"), "PATH": path, "PYTHONPATH": str(ROOT)}
    run = ["bash", str(ROOT / "runs" / script)]
    first = subprocess.run(run, env=env, capture_output=True, text=True, timeout=1500)
    assert first.returncode == 0, first.stderr[-2000:]
    assert all(text in first.stdout for text in SAID[script]), first.stdout[-2000:]
    weights = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    second = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr[-2000:]
    assert weights == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
