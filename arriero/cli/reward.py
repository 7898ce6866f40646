"""Commands about rewards."""

from __future__ import annotations

from arriero.errors import ConfigError
from arriero.io.paths import PathText
from arriero.show.terminal import output


def audit(
    reward: str, *, data: PathText | None = None, rows: int = 20, full: float = 1.0, seconds: float = 0.0
) -> None:
    """Try a reward with planted answers, right ones and ones that only look right, and count what it gets wrong.

    Example:
        arriero reward audit numeric
        arriero reward audit unit-tests --data problems.jsonl
        arriero reward audit python:mine.py:reward --data prompts.jsonl --full 0.8
        arriero reward audit judge:http://localhost:8000/v1 --data prompts.jsonl --full 0.7

    Args:
        reward: What is tried: exact, numeric, math, regex, json-schema, unit-tests, or another (arriero ls rewards).
        data: Prompts with what the reward needs, and the right answer in `solution` or `answer`; built-in rows when not
            given.
        rows: Rows that answers are planted for, at most.
        full: The reward from which an answer counts as right.
        seconds: Time that scoring one answer may take; 0 takes the reward's own limit.
    """
    from itertools import islice

    from arriero.data.formats import parse_prompt
    from arriero.io.records import read_records, source_files
    from arriero.rewards.audit import BUILT_IN, table
    from arriero.rewards.audit import audit as start
    from arriero.rewards.open import open_scorer

    if data is not None:
        records = islice((record for path in source_files(data) for record in read_records(path)), rows)
        asked = []
        for record in records:
            messages, _, fields = parse_prompt(record)
            asked.append({"prompt": "\n\n".join(str(m.get("content", "")) for m in messages), **fields})
    elif reward in BUILT_IN:
        asked = BUILT_IN[reward]
    else:
        raise ConfigError(f"{reward}: there are no built-in rows for it; give some of yours by --data")
    with open_scorer(reward, seconds) as scorer:
        output().print(table(start(scorer, asked, full), reward))
