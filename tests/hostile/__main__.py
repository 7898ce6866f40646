"""Every reader against mutated files, from the command line; see helpers/hostile.py.

PYTHONPATH=tests python -m hostile --tries 100000 --workers 2     about twenty minutes
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from helpers.hostile import Outcome, hunt, save, write_try, write_valid
from helpers.subjects import GROUPS, SUBJECTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Try every subject, or replay one try; returns 1 where there was a finding."""
    parser = argparse.ArgumentParser(prog="python -m hostile")
    parser.add_argument("--tries", type=int, default=2000, help="of all subjects together")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="", help="a group of subjects, or a part of their names")
    parser.add_argument("--out", type=Path, default=Path("hostile-findings"), help="where files of findings are kept")
    parser.add_argument("--replay", nargs=2, metavar=("SUBJECT", "SEED"))
    options = parser.parse_args(arguments)
    wanted = options.replay[0] if options.replay else options.only
    subjects = GROUPS.get(wanted, [s for s in SUBJECTS if wanted in s.name])
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        valid = Path(folder) / "valid"
        if options.replay:
            subjects = [s for s in SUBJECTS if s.name == wanted]
            write_valid(subjects, valid)
            target = Path(folder) / "try"
            print("changed:", write_try(subjects[0], valid / wanted, int(options.replay[1]), target).name)
            print("read:", subjects[0].read(target))
            return 0
        write_valid(subjects, valid)
        outcome = hunt(
            subjects, -(-options.tries // len(subjects)), valid,
            first_seed=options.first_seed, workers=options.workers, progress=_Progress(),
        )  # fmt: skip
        print(outcome.summary())
        seen: set[str] = set()
        for finding in outcome.findings:
            if finding.place not in seen:
                seen.add(finding.place)
                save(finding, subjects, valid, options.out)
        return int(bool(outcome.findings))


class _Progress:
    """Prints the first finding of each cause as it comes."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, outcome: Outcome) -> None:
        for finding in outcome.findings[self.seen :]:
            if finding.place not in {earlier.place for earlier in outcome.findings[: self.seen]}:
                tries = sum(outcome.counts.values())
                print(
                    f"{outcome.seconds:5.0f} s {tries:6} {finding.place[:300]} (seed {finding.seed})", file=sys.stderr
                )
            self.seen += 1


if __name__ == "__main__":
    sys.exit(main())
