import numpy as np
import pytest
import torch

from arriero.data.batch import IGNORED, Row, collate, joined, next_token_targets, shifted

PAIR = Row(  # a prompt of 3 tokens, and two answers to it
    tokens=np.array([2, 3, 5, 7, 11, 13, 17], dtype=np.int32),
    targets=np.array([IGNORED, IGNORED, IGNORED, 11, IGNORED, 17, IGNORED]),
    lengths=np.array([3, 2, 2]),
    leads=(-1, 0, 0),
    token_extras={"advantages": np.arange(14, dtype=np.float32).reshape(7, 2)},
    document_extras={"pair": np.array([4, 4, 4])},
)


def test_what_is_known_of_a_token_stands_where_it_is_predicted():
    assert shifted(np.array([2.0, 3.0, 5.0]), 0).tolist() == [3, 5, 0]
    assert next_token_targets(np.array([2, 3, 5]), np.array([True, False, True])).tolist() == [IGNORED, 5, IGNORED]


def test_joined_rows_keep_their_leads_and_extras():
    row = joined([PAIR, PAIR])
    assert row.lengths.tolist() == [3, 2, 2, 3, 2, 2] and row.leads == (-1, 0, 0, -1, 3, 3)
    assert row.token_extras["advantages"].shape == (14, 2) and row.document_extras["pair"].tolist() == [4] * 6


def test_rows_behind_a_document_continue_it_and_it_has_extras_of_zero():
    behind = Row(np.array([1, 1], dtype=np.int32), np.array([IGNORED] * 2), np.array([2]))
    row = joined([PAIR, PAIR], behind)
    assert row.leads == (-1, 0, 1, 1, 0, 4, 4) and row.tokens[:5].tolist() == [1, 1, 2, 3, 5]
    assert row.document_extras["pair"].tolist() == [0] + [4] * 6
    assert row.token_extras["advantages"][:2].tolist() == [[0, 0]] * 2


def test_padding_and_parts_treat_extras_as_tokens():
    batch = collate([PAIR], pad_to=10)
    assert batch.tokens.shape == batch.targets.shape == (1, 10) and batch.n_trained == 2
    assert batch.token_extras["advantages"].shape == (1, 10, 2) and not batch.token_extras["advantages"][0, 7:].any()
    assert batch.document_extras["pair"].tolist() == [4, 4, 4, 0]
    held = torch.tensor([1, 4, 9])
    part = batch.part(held, batch.layout)
    assert part.tokens.tolist() == [[3, 11, 0]] and part.token_extras["advantages"][0, :, 0].tolist() == [2, 8, 0]
    assert part.document_extras["pair"].tolist() == [4, 4, 4, 0] and part.n_trained == 2


def test_padding_never_shortens():
    with pytest.raises(AssertionError, match="2 tokens more than 5"):
        collate([PAIR], pad_to=5)
