"""Reads what a run has journaled of its own answers; rows that are none are refused, since they would be trained on."""

from __future__ import annotations

import math
from pathlib import Path

from arriero.errors import DataError
from arriero.train.episodes import Group, Sampled
from arriero.train.metrics import surviving_records


def read_round(path: Path) -> tuple[set[str], list[Group]]:
    """A file of the journal: the checksums of the weights that sampled it, and its groups.

    Raises `DataError` for rows that are no groups.
    """
    checksums, groups = set[str](), list[Group]()
    for i, row in enumerate(surviving_records(path), 1):
        try:
            checksums.add(row["weights"]["checksum"])
            group = Group.of(row)
            wrong = _wrong_group(group)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            wrong = str(error) or type(error).__name__
        if wrong:
            raise DataError(
                f"{path}, row {i}: no answers of this run ({wrong}); delete the file, and they are sampled and scored "
                "again"
            )
        groups.append(group)
    return checksums, groups


def _wrong_group(group: Group) -> str | None:
    """What a group has that none can have."""
    if type(group.prompt) is not int or type(group.seed) is not int:
        return "its prompt and seed are no whole numbers"
    return next((what for answer in group.answers if (what := _wrong(answer))), None)


def _wrong(answer: Sampled) -> str | None:
    """What an answer has that none can have."""
    ids, logprobs, past = answer.ids, answer.logprobs, answer.earlier
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        return "ids are no token ids"
    if not isinstance(logprobs, list) or not all(map(_is_number, logprobs)):
        return "logprobs are no numbers"
    if len(ids) != len(logprobs):
        return f"an answer has {len(ids)} ids and {len(logprobs)} log-probabilities"
    if type(answer.finished) is not bool or not isinstance(answer.text, str):
        return "finished is neither true nor false, or text is no text"
    if answer.value is not None and not _is_number(answer.value):
        return "value is no number"
    lengths = [(one.n_answer, one.n_reply) for one in past]
    if not all(type(n) is int and type(m) is int and n > 0 and m >= 0 for n, m in lengths):
        return "an earlier answer or reply has no length"
    if sum(one.n_answer + one.n_reply for one in past) > len(ids):
        return "earlier answers have more tokens than all"
    return None if all(_is_number(one.reward) for one in past) else "an earlier reward is no number"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
