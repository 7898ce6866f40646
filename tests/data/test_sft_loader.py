"""Rows and batches: next-token targets inside documents only, in an order that is a pure function of (seed, index)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from arriero.data.batch import IGNORED, collate, next_token_targets
from arriero.data.sft import SftDataset, build_dataset
from arriero.data.sft_loader import SftLoader, shared_prefix
from arriero.errors import DataError
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama

from .conftest import sums, turns, write_rows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer) -> SftDataset:
    path = tmp_path_factory.mktemp("data")
    return build_dataset(write_rows(path / "sums.jsonl", sums(101)), tokenizer, cache_dir=path / "cache")


def test_targets_are_the_next_token_where_that_one_is_trained():
    tokens = np.array([7, 11, 13, 17, 19], dtype=np.int32)
    trained = np.array([True, False, True, True, False])
    # The first token has no predecessor to predict it; the last has no successor to predict.
    assert next_token_targets(tokens, trained).tolist() == [IGNORED, 13, 17, IGNORED, IGNORED]


def test_an_epoch_holds_every_example_once_with_its_own_tokens_and_targets(dataset):
    loader = SftLoader(dataset, seq_len=256, seed=3)
    found = []
    for index in range(loader.rows_in_epoch(0)):
        row = loader.row(index)
        assert row.lengths.sum() == len(row.tokens) == len(row.targets) <= 256
        cuts = np.cumsum(row.lengths)[:-1]
        documents = zip(np.split(row.tokens, cuts), np.split(row.targets, cuts), strict=True)
        found += [(tokens.tobytes(), targets.tobytes()) for tokens, targets in documents]
    p = len(loader.prefix)
    expected = [
        (dataset.tokens(i)[p:].tobytes(), next_token_targets(dataset.tokens(i), dataset.trained(i))[p:].tobytes())
        for i in range(len(dataset))
    ]
    assert sorted(found) == sorted(expected)


def test_a_row_is_the_same_whoever_asks_and_whatever_was_asked_before(dataset):
    one, other = SftLoader(dataset, 256, seed=3), SftLoader(dataset, 256, seed=3)
    last = 3 * one.rows_in_epoch(0) - 1
    for _ in range(2):
        for index in (0, last, 5, last // 2):
            one.row(index)
    for index in (last, 5, 0):
        assert np.array_equal(one.row(index).tokens, other.row(index).tokens)
        assert np.array_equal(one.row(index).targets, other.row(index).targets)


def test_seeds_and_epochs_order_the_rows_differently(dataset):
    loader = SftLoader(dataset, 256, seed=3)
    rows = loader.rows_in_epoch(0)
    assert loader.rows_in_epoch(1) == rows
    epochs = [[loader.row(e * rows + k).tokens.tobytes() for k in range(rows)] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    assert SftLoader(dataset, 256, seed=4).row(0).tokens.tobytes() != epochs[0][0]


def test_without_packing_each_row_is_one_example(dataset):
    loader = SftLoader(dataset, 256, seed=3, packing=False)
    assert loader.rows_in_epoch(0) == len(dataset)
    rows = [loader.row(i) for i in range(len(dataset))]
    assert all(len(row.lengths) == 1 for row in rows)
    assert sorted(len(row.tokens) for row in rows) == sorted(dataset.lengths - len(loader.prefix))


def test_a_batch_lays_rows_end_to_end_with_the_bounds_of_their_documents(dataset):
    loader = SftLoader(dataset, 256, seed=3)
    rows = [loader.row(i) for i in range(3)]
    batch = loader.collate(rows)
    p = len(loader.prefix)
    n = p + sum(len(row.tokens) for row in rows)
    assert p > 8 and batch.documents.leads == (-1, *[0] * (len(batch.documents.lengths) - 1))
    assert batch.tokens.shape == batch.targets.shape == (1, n)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert list(batch.documents.lengths) == np.concatenate([[p], *(row.lengths for row in rows)]).tolist()
    assert batch.tokens[0].tolist() == np.concatenate([loader.prefix, *(row.tokens for row in rows)]).tolist()
    assert batch.n_trained == int((batch.targets != IGNORED).sum()) > 0
    # No document predicts the first token of the next.
    assert (batch.targets[0, torch.tensor(batch.documents.bounds[1:]) - 1] == IGNORED).all()
    trained = batch.targets[0, :-1] != IGNORED
    assert torch.equal(batch.targets[0, :-1][trained], batch.tokens[0, 1:][trained])


def test_the_shared_prefix_is_what_all_examples_begin_with_and_none_of_it_is_trained(dataset):
    prefix = shared_prefix(dataset)
    for i in range(len(dataset)):
        assert np.array_equal(dataset.tokens(i)[: len(prefix)], prefix)
        assert not dataset.trained(i)[: len(prefix) + 1].any()
    following = {dataset.tokens(i)[: len(prefix) + 1].tobytes() for i in range(len(dataset))}
    assert len(following) > 1, "one more token could have been shared"


def test_padding_is_an_untrained_document_of_its_own(dataset):
    loader = SftLoader(dataset, 256, seed=3)
    rows = [loader.row(0), loader.row(1)]
    plain, padded = collate(rows), collate(rows, pad_to=557)
    n = plain.tokens.shape[1]
    assert padded.tokens.shape == (1, 557)
    assert torch.equal(padded.tokens[:, :n], plain.tokens) and torch.equal(padded.targets[:, :n], plain.targets)
    assert padded.documents.bounds == (*plain.documents.bounds, 557) and padded.documents.leads[-1] == -1
    assert padded.documents.positions[0, n:].tolist() == list(range(557 - n))
    assert (padded.targets[0, n:] == IGNORED).all() and padded.n_trained == plain.n_trained
    assert collate(rows, pad_to=n).documents.bounds == plain.documents.bounds


def test_examples_longer_than_a_row_are_refused_with_the_remedy(dataset):
    with pytest.raises(DataError, match=r"longest example has \d+ tokens but rows hold 50; .*max_length=50"):
        SftLoader(dataset, 50, seed=0)


def test_an_empty_data_set_is_refused(dataset):
    with pytest.raises(DataError, match="no examples"):
        SftLoader(dataset.select(np.zeros(len(dataset), dtype=bool)), 256, seed=0)


def test_trained_targets_spell_the_answers(tmp_path, tokenizer):
    talk = turns("2 + 3?", "It is 5.", "And 7 + 4?", "11 <|im_end|> 11")
    path = write_rows(tmp_path / "one.jsonl", [{"messages": talk}])
    loader = SftLoader(build_dataset(path, tokenizer), 128, seed=0)
    batch = loader.collate([loader.row(0)])
    spelled = tokenizer.decode(batch.targets[batch.targets != IGNORED].tolist(), skip_special=False)
    assert spelled == "It is 5.<|im_end|>11 <|im_end|> 11<|im_end|>"
    end = tokenizer.special_ids["<|im_end|>"]
    assert (batch.targets == end).sum() == 2  # the text "<|im_end|>" in the answer is not the token


def test_packed_padded_and_unpacked_rows_have_the_same_loss_for_every_token(dataset, tokenizer):
    torch.manual_seed(0)
    shape = {"dim": 22, "n_layers": 2, "n_heads": 11, "n_kv_heads": 1, "ffn_dim": 29, "max_context": 512}
    model = Llama(LlamaConfig(**shape, vocab_size=tokenizer.vocab_size)).eval()
    few = dataset.select(np.arange(23))

    def losses(packing: bool, pad_to: int | None) -> list[float]:
        loader = SftLoader(few, 256, seed=0, packing=packing)
        found = []
        for k in range(loader.rows_in_epoch(0)):
            batch = loader.collate([loader.row(k)], pad_to)
            with torch.no_grad():
                logits = model(batch.tokens, batch.layout)
            trained = batch.targets[0] != IGNORED
            found += F.cross_entropy(logits[0][trained], batch.targets[0][trained], reduction="none").tolist()
        return sorted(found)

    alone = losses(packing=False, pad_to=None)
    assert losses(packing=True, pad_to=None) == pytest.approx(alone, abs=1e-5)
    assert losses(packing=True, pad_to=257) == pytest.approx(alone, abs=1e-5)


def test_a_batch_moved_to_a_device_keeps_its_shared_prefix(dataset):
    loader = SftLoader(dataset, 512, seed=3)
    batch = loader.collate([loader.row(0)])
    assert 0 in batch.documents.leads
    assert batch.to("cpu").documents.leads == batch.documents.leads
