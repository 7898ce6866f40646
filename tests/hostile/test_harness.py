"""The mutation test finds what it is there to find: planted faults, each with its input, which can be had again."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import planted
from helpers.hostile import Subject, hunt, save, write_try, write_valid


@pytest.mark.parametrize(
    ("kind", "read"), [(kind, read) for kind, readers in planted.FAULTS.items() for read in readers]
)
def test_a_planted_fault_is_caught_and_can_be_replayed(kind, read, tmp_path: Path) -> None:
    subjects = [Subject("faultless", planted.write, planted.faultless), Subject("planted", planted.write, read)]
    write_valid(subjects, tmp_path / "valid")
    outcome = hunt(subjects, 2, tmp_path / "valid", limit_s=1.0 if kind == "hang" else 5.0)
    assert [(f.subject, f.seed, f.kind) for f in outcome.findings] == [("planted", 0, kind), ("planted", 1, kind)]
    assert outcome.counts.total() == 4
    kept = save(outcome.findings[1], subjects, tmp_path / "valid", tmp_path / "findings")
    assert kind in (kept / "finding.txt").read_text()
    again = write_try(subjects[1], tmp_path / "valid/planted", 1, tmp_path / "again")
    assert (
        (kept / "files/a.json").read_bytes() == again.read_bytes() != (tmp_path / "valid/planted/a.json").read_bytes()
    )


def test_a_hang_and_a_traceback_are_named_by_their_place(tmp_path: Path) -> None:
    subjects = [
        Subject("loops", planted.write, planted.loops),
        Subject("raises", planted.write, planted.raises_key_error),
    ]
    write_valid(subjects, tmp_path / "valid")
    outcome = hunt(subjects, 1, tmp_path / "valid", limit_s=1.0)
    assert "planted.py" in outcome.findings[0].text
    assert outcome.findings[1].place.startswith("raises: traceback: KeyError at planted.py:")
    assert outcome.summary().splitlines()[0].endswith("1 hang, 1 traceback")


def test_what_is_read_otherwise_under_a_manifest_is_a_finding(tmp_path: Path) -> None:
    subjects = [Subject("sealed", planted.write, planted.faultless, sealed=True)]
    write_valid(subjects, tmp_path / "valid")
    outcome = hunt(subjects, 30, tmp_path / "valid")
    assert {finding.kind for finding in outcome.findings} == {"silence"}
    assert outcome.counts["refusal"] > 0


def test_one_seed_gives_one_file_and_many_give_many(tmp_path: Path) -> None:
    subject = Subject("s", planted.write, planted.faultless)
    write_valid([subject], tmp_path / "valid")
    files = [
        write_try(subject, tmp_path / "valid/s", seed, tmp_path / f"try-{k}-{seed}").read_bytes()
        for k in range(2)
        for seed in range(40)
    ]
    assert files[:40] == files[40:]
    assert len(set(files[:40])) > 35
