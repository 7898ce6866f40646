"""Every reader succeeds or refuses, whatever is done to its files: 2,000 mutated ones here, 20,000 in the slow test.

`PYTHONPATH=tests python -m hostile` tries more, and replays what is found; docs/log.md has the run of 100,000.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.hostile import Outcome, hunt, save, write_valid
from helpers.subjects import GROUPS, SUBJECTS


def run(group: str, tries: int, first_seed: int, folder: Path) -> Outcome:
    subjects = GROUPS[group]
    write_valid(subjects, folder / "valid")
    outcome = hunt(
        subjects, -(-tries * len(subjects) // len(SUBJECTS)) // len(subjects), folder / "valid", first_seed=first_seed
    )
    kept = [save(finding, subjects, folder / "valid", folder / "findings") for finding in outcome.findings[:20]]
    assert not outcome.findings, "\n".join([outcome.summary(), *map(str, kept)])
    return outcome


@pytest.mark.parametrize("group", GROUPS)
def test_a_mutated_file_is_read_or_refused(group: str, tmp_path: Path) -> None:
    assert run(group, 2_000, 0, tmp_path).counts.total() > 0


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_many_mutated_files_are_read_or_refused(group: str, tmp_path: Path) -> None:
    assert run(group, 20_000, 1_000_000, tmp_path).counts.total() > 0
