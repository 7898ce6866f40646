"""Answers behind their shared prompt: the tokens, targets and extras of each are those of the answer alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.toys import toy_config

from arriero.data.batch import IGNORED
from arriero.data.preference_loader import PreferenceLoader, compared, n_answers, n_best, n_pairs
from arriero.data.preferences import PreferenceDataset, build_preferences
from arriero.losses.lm import token_logprobs
from arriero.model.build import build_model
from arriero.model.layout import Documents

from .conftest import write_rows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer) -> PreferenceDataset:
    path = tmp_path_factory.mktemp("preferences")
    rows = [
        {"prompt": f"Count to {i}.", "chosen": " ".join(map(str, range(i % 7 + 1))), "rejected": "no " * (i % 3 + 1)}
        | ({"edited": f"{i} {i}"} if i % 4 == 0 else {})
        for i in range(23)
    ]
    rows.append({"prompt": "x", "completions": ["a b", "c", "d e f", "g"], "scores": [0.1, 0.9, -2, 0.9]})
    return build_preferences(write_rows(path / "r.jsonl", rows), tokenizer, cache_dir=path / "cache")


def test_every_answer_is_in_an_epoch_once_with_its_own_tokens_and_targets(dataset):
    loader = PreferenceLoader(dataset, seq_len=211, seed=3)
    seen = []
    for index in range(loader.rows_in_epoch(0)):
        row = loader.row(index)
        assert len(row.tokens) <= 211 and row.lengths.sum() == len(row.tokens)
        bounds = np.concatenate([[0], np.cumsum(row.lengths)])
        for d, answer in enumerate(row.document_extras["answer"] - 1):
            part = slice(bounds[d], bounds[d + 1])
            if answer < 0:
                assert (row.targets[part] == IGNORED).all() and row.leads[d] == -1
                continue
            seen.append(int(answer))
            lead = slice(bounds[row.leads[d]], bounds[row.leads[d] + 1])
            whole = np.concatenate([row.tokens[lead], row.tokens[part]])
            tokens, trained = dataset.answers.tokens(answer), dataset.answers.trained(answer)
            assert whole.tolist() == tokens[: len(whole)].tolist() and not trained[len(whole) :].any()
            targets = row.targets[part][row.targets[part] != IGNORED]
            assert targets.tolist() == tokens[trained].tolist()
            assert row.token_extras["end"][part].tolist() == [0.0] * (row.lengths[d] - 1) + [1.0]
    assert sorted(seen) == list(range(len(dataset.answers)))


def test_pairs_are_all_of_a_group_and_never_of_two(dataset):
    loader = PreferenceLoader(dataset, seq_len=211, seed=3)
    batch = loader.collate([loader.row(i) for i in range(loader.rows_in_epoch(0))], pad_to=1999)
    extras = batch.document_extras
    pairs = compared(extras)
    expected = 17 + 6 * 3 + 5  # pairs, triples, and a list of four with a tie
    assert len(pairs.better) == n_pairs(batch) == expected
    assert n_answers(batch) == len(dataset.answers) and n_best(batch) == len(dataset) == int(extras["group"].max())
    assert torch.equal(extras["group"][pairs.better], extras["group"][pairs.worse])
    assert (extras["value"][pairs.better] > extras["value"][pairs.worse]).all()
    assert (extras["answer"][pairs.better] > 0).all()


def test_the_best_and_the_worst_of_a_list_can_be_taken_alone(dataset):
    loader = PreferenceLoader(dataset, seq_len=211, seed=3, taken="extremes")
    row = loader.group(len(dataset) - 1)
    assert row.document_extras["value"].tolist() == pytest.approx([0, 0.9, -2])
    assert loader.epochs.lengths[-1] < dataset.lengths[-1]


def test_format_tokens_are_learned_but_do_not_count(dataset, tokenizer):
    ends = set(tokenizer.special_ids.values())
    row = PreferenceLoader(dataset, 211, 0, format_ids=ends).group(1)
    of_answers = row.targets != IGNORED
    assert np.isin(row.targets[of_answers], list(ends)).sum() == 2  # one of each answer
    assert (row.token_extras["scored"] == (of_answers & ~np.isin(row.targets, list(ends)))).all()
    plain = PreferenceLoader(dataset, 211, 0).group(1)
    assert (plain.token_extras["scored"] == of_answers).all()


@torch.no_grad()
def test_log_probabilities_behind_a_shared_prompt_are_those_of_each_answer_alone(dataset):
    model = build_model(replace(toy_config("llama3-8b"), vocab_size=49152)).init_weights(std=0.1, seed=1).eval()
    loader = PreferenceLoader(dataset, seq_len=211, seed=3)
    batch = loader.collate([loader.row(0), loader.row(1)], pad_to=431)

    def logprobs(tokens, layout, targets):
        hidden = model.model(tokens, layout)
        return token_logprobs(hidden.flatten(0, 1), model.head.weight, targets.flatten()).chosen[None]

    together, _ = batch.document_sums(logprobs(batch.tokens, batch.layout, batch.targets))
    for d, answer in enumerate((batch.document_extras["answer"] - 1).tolist()):
        if answer >= 0:
            tokens = torch.tensor(dataset.answers.tokens(answer).tolist())[None]
            trained = torch.tensor(dataset.answers.trained(answer).tolist())
            targets = torch.where(trained, tokens, IGNORED).roll(-1, 1)
            alone = logprobs(tokens, Documents.of([tokens.shape[1]]), targets).sum()
            torch.testing.assert_close(together[d], alone, atol=1e-4, rtol=1e-5)
