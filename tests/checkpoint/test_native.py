"""Checkpoints of a run: a reader finds a whole one whatever happens to the writer or to the disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from arriero.checkpoint import native
from arriero.checkpoint.sharded import Checkpoints
from arriero.checkpoint.tensor_file import DTYPES
from arriero.errors import CheckpointError


def groups(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(7, 11, generator=generator), "b": torch.randn(13, generator=generator)}
    return {"weights": weights, "optimizer": {"a/step": torch.tensor(float(step))}}


def save(run_dir: Path, step: int, keep_last: int = 2, keep: tuple[int, ...] = ()) -> Path:
    Checkpoints(run_dir, keep_last=keep_last).save(step, groups(step), {"step": step}, keep)
    return native.path_of(run_dir, step)


def found(run_dir: Path) -> native.Saved:
    saved = Checkpoints(run_dir).latest()
    assert saved is not None
    return saved


def assert_whole(saved: native.Saved) -> None:
    assert saved.state["step"] == saved.step
    for group, tensors in groups(saved.step).items():
        read = saved.tensors(group)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


# -- what is written ---------------------------------------------------------------------------------------------


def test_every_type_shape_and_layout_is_read_back_by_the_safetensors_library(tmp_path: Path) -> None:
    base = torch.randn(11, 13)
    tensors = {str(dtype): (base * 7).to(dtype) for dtype in DTYPES.values()}
    tensors |= {"transposed": base.T, "slice": base[3:5, 2:9], "scalar": torch.tensor(17.0), "empty": torch.empty(0, 5)}
    tensors |= {"shared": base, "nan": torch.tensor([float("nan"), float("-inf")]), "ä 'name'\n": torch.ones(3)}
    Checkpoints(tmp_path).save(5, {"weights": tensors, "none": {}}, {})
    path = native.path_of(tmp_path, 5)
    file = path / "weights/model.safetensors"
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 64 == 0  # tensors begin on a cache line
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), raw), name
    assert load_file(path / "none/none.safetensors") == {}


def test_parameters_that_require_gradients_are_saved(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    Checkpoints(tmp_path).save(1, {"weights": {"p": parameter}}, {})
    assert torch.equal(found(tmp_path).tensors("weights")["p"], parameter.detach())


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {"loss": 0.1 + 0.2, "best": None, "name": "ñandú", "list": [1, 2.5, True], "nested": {"10": 1e-300}}
    Checkpoints(tmp_path).save(3, {}, state)
    assert found(tmp_path).state == state


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).latest() is None
    assert native.at_step(tmp_path, 7) is None


def test_a_group_that_was_not_saved_is_refused_with_those_that_were(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"holds no 'moments', only \['optimizer', 'weights'\]"):
        found(tmp_path).tensors("moments")


# -- which are kept ----------------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_those_named(tmp_path: Path) -> None:
    for step in (2, 3, 5, 7, 11):
        save(tmp_path, step, keep_last=2, keep=(3,))
    assert native.steps(tmp_path) == [3, 7, 11]
    best = native.at_step(tmp_path, 3)
    assert best is not None
    assert_whole(best)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000007",
        "step-00000011",
    ]


def test_saving_an_earlier_step_drops_the_later_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    save(tmp_path, 20, keep_last=3)
    assert native.steps(tmp_path) == [10, 20]
    assert_whole(found(tmp_path))


def test_damaged_later_checkpoints_never_push_out_the_good_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    for step in (20, 30):
        (tmp_path / f"checkpoints/step-{step:08d}/state.json").unlink()
    save(tmp_path, 15, keep_last=1)
    assert native.steps(tmp_path) == [15]


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["weights/model.safetensors", "optimizer/optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "missing"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20) / file
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "longer":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()
    saved = found(tmp_path)
    assert saved.step == 10
    assert_whole(saved)
    n = len(content)
    expected = {
        "flipped": "damaged, its SHA-256 is not the one in manifest.json",
        "truncated": f"damaged, {n - 1} bytes long where manifest.json says {n}",
        "longer": f"damaged, {n + 1} bytes long where manifest.json says {n}",
        "missing": "missing",
    }[damage]
    assert f"step-00000020/{file}: {expected}; trying the checkpoint before it" in caplog.text


@settings(max_examples=300, deadline=None)
@given(where=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_gives_the_same_content_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, where: int, bit: int
) -> None:
    run_dir = tmp_path_factory.getbasetemp() / "flipped"
    if not run_dir.exists():
        save(run_dir, 20)
    files = sorted(p for p in (run_dir / "checkpoints/step-00000020").rglob("*") if p.is_file())
    where %= sum(file.stat().st_size for file in files)
    file = next(f for f in files if (where := where - f.stat().st_size) < 0)
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[where] ^= 1 << bit  # `where` is now negative: counted from the file's end
    file.write_bytes(flipped)
    try:
        saved = native.at_step(run_dir, 20)
    except CheckpointError as error:
        assert "step-00000020/" in str(error)
    else:
        assert file.name == "manifest.json"  # white space, for instance
        assert saved is not None
        assert_whole(saved)
    finally:
        file.write_bytes(content)


def test_a_manifest_of_names_that_no_file_can_have_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    manifest = save(tmp_path, 20) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("model.safetensors", "model" * 60))
    assert found(tmp_path).step == 10
    assert "cannot be read (File name too long); trying the checkpoint before it" in caplog.text


@pytest.mark.parametrize("name", ["/optimizer.safetensors", "optimizer/../../optimizer.safetensors"])
def test_a_manifest_that_names_files_elsewhere_is_damaged(tmp_path: Path, name: str) -> None:
    manifest = save(tmp_path, 20) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("optimizer/optimizer.safetensors", name))
    with pytest.raises(CheckpointError, match=rf"step-00000020/manifest\.json: damaged, it names '{name}', out of its"):
        native.at_step(tmp_path, 20)


def test_when_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (10, 20):
        (save(tmp_path, step) / "weights/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged; start the run again.*20/.*10/weights"):
        Checkpoints(tmp_path).latest()


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    path.rename(path.with_name("step-00000099"))
    with pytest.raises(CheckpointError, match="not the manifest of step 99"):
        Checkpoints(tmp_path).latest()


# -- a full disk -------------------------------------------------------------------------------------------------

FULL = """
import resource, sys
from pathlib import Path
import torch
from arriero.checkpoint.sharded import Checkpoints
from arriero.errors import CheckpointError

run_dir = Path(sys.argv[1])
Checkpoints(run_dir).save(1, {"weights": {"a": torch.ones(1000)}}, {"step": 1})
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    Checkpoints(run_dir).save(2, {"small": {"b": torch.ones(1000)}, "weights": {"a": torch.ones(500_000)}}, {})
except CheckpointError as error:
    print(error)
print([path.name for path in (run_dir / "checkpoints").iterdir()])
print(torch.equal(Checkpoints(run_dir).latest().tensors("weights")["a"], torch.ones(1000)))
"""
ONLY_THE_FIRST_AND_WHOLE = "['step-00000001']\nTrue\n"


def test_a_write_that_finds_no_room_keeps_the_old_checkpoint_and_says_how_much_was_needed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), "limit file size"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "no room for the checkpoint of step 2 (File too large): it needs 2.0 MB and " in printed
    assert "The checkpoint of step 1 is whole" in printed
    assert printed.endswith(ONLY_THE_FIRST_AND_WHOLE)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    # in a mount namespace of its own: the disk of 1 MB is gone with the process, however that ends
    mounted = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small file system; the test of RLIMIT_FSIZE stands for it")
    command = [*inside, sys.executable, "-c", FULL, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "(No space left on device): it needs 2.0 MB and 1.0 MB are free; make room, then resume" in printed
    assert printed.endswith(ONLY_THE_FIRST_AND_WHOLE)


# -- kill -9 -----------------------------------------------------------------------------------------------------


def kill_while_saving(run_dir: Path) -> None:
    """Save in a child, kill it at a random moment, look at what is there; many times over."""
    chance = random.Random(17)
    step, leftovers = 0, 0
    for _ in range(40):
        child = os.fork()
        if child == 0:
            while True:
                step += 1
                save(run_dir, step, keep_last=1)
        time.sleep(chance.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child died by itself"
        saved = Checkpoints(run_dir).latest()
        if saved is None:
            assert step == 0, "there was one before"
            continue
        assert saved.step == native.steps(run_dir)[-1], "the newest was not whole"
        assert saved.step >= step
        assert_whole(saved)
        step = saved.step
        leftovers += len(list((run_dir / "checkpoints").glob(".*")))
    assert step > 0
    assert leftovers > 0, "no kill hit a save: the test has shown nothing"
    save(run_dir, step + 1)
    assert not list((run_dir / "checkpoints").glob(".*")), "what kills left behind is still there"


def test_after_any_number_of_kills_there_is_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    # forked from a process that does nothing else, so that no thread of pytest's is copied half-way
    code = "import sys, pathlib, tests.checkpoint.test_native as t; t.kill_while_saving(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
