"""Many processes save in pieces and read in others; a save goes on behind the training, whole or not at all."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.parallel import run_processes
from helpers.sharded import known

from arriero.checkpoint import native
from arriero.checkpoint.sharded import Checkpoints
from arriero.errors import CheckpointError

FIVE = ["fsdp", "columns", "hsdp", "2d", "copies"]


def group(run_dir: Path, world: int, *steps: list[object]) -> None:
    command = [sys.executable, "-m", "helpers.sharded", str(run_dir), json.dumps(steps)]
    run_processes(command, world, timeout=180)


def assert_whole(saved: native.Saved | None) -> None:
    assert saved is not None
    assert saved.state == {"step": saved.step}
    for name, tensors in known(saved.step).items():
        read = saved.tensors(name)
        assert read.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert read[key].dtype == tensor.dtype
            assert torch.equal(read[key], tensor), (name, key)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes wrote: steps 1 to 5, each laid out in another way."""
    run_dir = tmp_path_factory.mktemp("sharded")
    steps: list[list[object]] = [["save", step, layout] for step, layout in enumerate(FIVE, 1)]
    steps += [["read", 5, "2d"], ["torch_writes", "fsdp"]]
    steps += [["refused", "save", "no room for the checkpoint of step 99 (No space left on device): it needs 0.0 MB"]]
    group(run_dir, 4, *steps)
    return run_dir


def test_what_four_processes_save_in_any_layout_one_reads_whole(written: Path) -> None:
    assert native.steps(written) == [1, 2, 3, 4, 5]
    for step in native.steps(written):
        assert_whole(native.at_step(written, step))


def test_what_each_of_four_processes_alone_has_one_reads_whole(written: Path) -> None:
    for step in native.steps(written):
        saved = native.at_step(written, step)
        assert saved is not None and saved.tensors("nothing") == {}
        found = {name: tensor.tolist() for name, tensor in saved.tensors("journal").items()}
        assert found == {f"{rank}/answer": [*range(5 * step + rank)] for rank in range(4)}


def test_no_file_is_a_pickle(written: Path) -> None:
    assert {p.suffix for p in written.rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_weights_lie_whole_and_spread_by_size_as_their_index_says(written: Path) -> None:
    from safetensors.torch import load_file

    folder = native.path_of(written, 1) / "weights"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == known(1)["weights"].keys()
    assert len(set(index.values())) == 4
    for name, file in index.items():
        assert torch.equal(load_file(folder / file)[name], known(1)["weights"][name])


def test_optimizer_state_lies_in_pieces_and_copies_once(written: Path) -> None:
    size = sum(t.numel() * t.element_size() for t in known(1)["optimizer"].values())
    for step in native.steps(written):
        files = list((native.path_of(written, step) / "optimizer").glob("*.safetensors"))
        headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
        assert len(files) == 4
        assert sum(file.stat().st_size for file in files) == headers + size


def test_three_processes_read_what_four_and_one_have_written_and_agree_on_damage(written: Path) -> None:
    Checkpoints(written, keep_last=10).save(6, known(6), {"step": 6})
    file = "step-00000006/optimizer/optimizer.safetensors"
    why = f"{file}: damaged, its SHA-256 is not the one in manifest.json"
    steps: list[list[object]] = [["read", 6, "fsdp"], ["read", 6, "copies"], ["damage", f"checkpoints/{file}"]]
    steps += [["refused", "6", why], ["read", 5, "fsdp"], ["read", 5, "columns"], ["save", 7, "fsdp"]]
    group(written, 3, *steps)
    assert_whole(native.at_step(written, 7))


def test_a_missing_part_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Checkpoints(tmp_path).save(1, known(1), {"step": 1})
    Checkpoints(tmp_path).save(2, known(2), {"step": 2})
    (native.path_of(tmp_path, 2) / "average/average.safetensors").unlink()
    assert_whole(Checkpoints(tmp_path).latest())
    assert "step-00000002/average/average.safetensors: missing; trying the checkpoint before it" in caplog.text


def test_a_part_that_no_manifest_knows_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, known(1), {"step": 1})
    path = native.path_of(tmp_path, 1) / "weights"
    (path / "model-00002-of-00002.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: not in manifest.json; it does not"):
        native.at_step(tmp_path, 1)


# -- behind the training -----------------------------------------------------------------------------------------


class Gate:
    """What stands beside the weights takes as long to write as the test wants."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()

    def __call__(self, directory: Path) -> None:
        self.reached.set()
        assert self.open.wait(30)
        (directory / "config.json").write_text("{}")


def test_a_tensor_changed_after_a_save_returns_is_saved_as_it_was(tmp_path: Path) -> None:
    gate = Gate()
    checkpoints = Checkpoints(tmp_path, behind=True, sidecars=gate)
    groups = known(3)
    checkpoints.save(3, groups, {"step": 3})
    for tensors in groups.values():
        for tensor in tensors.values():
            tensor.zero_()
    assert native.steps(tmp_path) == []  # the save has not ended, and the training went on
    gate.open.set()
    checkpoints.wait()
    assert_whole(native.at_step(tmp_path, 3))
    assert (native.path_of(tmp_path, 3) / "weights/config.json").exists()


def test_one_save_is_in_flight_at_most(tmp_path: Path) -> None:
    gate = Gate()
    checkpoints = Checkpoints(tmp_path, behind=True, sidecars=gate)
    checkpoints.save(1, known(1), {"step": 1})
    assert gate.reached.wait(30)
    threading.Timer(0.2, gate.open.set).start()
    began = time.monotonic()
    checkpoints.save(2, known(2), {"step": 2})
    assert time.monotonic() - began > 0.1
    assert native.steps(tmp_path)[0] == 1
    checkpoints.wait()
    assert native.steps(tmp_path) == [1, 2]


def test_a_save_that_fails_behind_is_reported_and_leaves_the_old_one_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, behind=True)
    checkpoints.save(1, known(1), {"step": 1})
    checkpoints.wait()

    def no_room(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    checkpoints.sidecars = no_room
    checkpoints.save(2, known(2), {"step": 2})
    deadline = time.monotonic() + 30
    while not checkpoints.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert checkpoints.failed
    with pytest.raises(CheckpointError, match=r"no room for the checkpoint of step 2 \(No space left on device\)"):
        checkpoints.save(3, known(3), {"step": 3})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert_whole(Checkpoints(tmp_path).latest())
    checkpoints.sidecars = None
    checkpoints.save(3, known(3), {"step": 3})  # there is room again
    checkpoints.wait()
    assert native.steps(tmp_path) == [1, 3]


def test_a_save_that_cannot_be_begun_says_where_and_what_then(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"checkpoint of step 1 cannot be begun \(.*File exists.*\); mend"):
        Checkpoints(tmp_path).save(1, known(1), {})


def test_a_part_that_process_0_cannot_see_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    temporary = native.begin(tmp_path, 1)
    files = native.write(temporary, "optimizer", {"a": torch.ones(3)}, {"a": [0]}, part=1, parts=2)
    (temporary / next(iter(files))).unlink()
    with pytest.raises(CheckpointError, match="written by another process, but not to be seen by the first; the run"):
        native.finish(tmp_path, 1, files, {})
