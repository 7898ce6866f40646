"""Rows to pretrain on: nothing lost, nothing repeated, the same for whoever asks, from any row on."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from helpers.shards import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.data.batch import IGNORED, Row, collate, row_groups
from arriero.data.mix import LLAMA1
from arriero.data.order import Pieces, Windows, permuted
from arriero.data.pack import count_rows, pack
from arriero.data.prefetch import Prefetched
from arriero.data.pretrain_loader import DataStage, PretrainLoader
from arriero.data.shards import Shards
from arriero.distributed.mesh import local_shard
from arriero.errors import ConfigError, DataError

S, WINDOW = 31, 13  # tokens of a row, documents of a window
LENGTHS = st.lists(st.one_of(st.integers(2, 19), st.integers(2, 4 * S)), min_size=1, max_size=67)


def web_like(n: int, seed: int = 0, median: float = 9.0) -> list[int]:
    """Log-normal lengths with a long tail, as web pages have."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), 1.2, n)
    return np.clip(drawn, 2, 7 * S).astype(int).tolist()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Shards]:
    """Three sources of 101, 37 and 17 documents, no two tokens of which are equal."""
    root = tmp_path_factory.mktemp("shards")
    return {
        "web": write_shards(root / "web", web_like(101), "web"),
        "books": write_shards(root / "books", web_like(17, 1, 40.0), "books", first=10_000),
        "code": write_shards(root / "code", web_like(37, 2), "code", first=20_000),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[..., Shards]:
    """Shards of documents of these lengths."""
    return lambda lengths, name="documents": write_shards(tmp_path_factory.mktemp("shards") / name, lengths, name)


def one(shards: Shards, seq_len: int = S, seed: int = 3, **settings_) -> PretrainLoader:
    return PretrainLoader({"documents": shards}, [DataStage(0, seq_len, {"documents": 1.0})], seed, **settings_)


def pairs(rows: list[Row]) -> Counter:
    """Every (token, next token) that is trained; tokens are all different, so this tells the place in its document."""
    return Counter(p for row in rows for p in zip(row.tokens.tolist(), row.targets.tolist(), strict=True))


def all_pairs(shards: Shards) -> Counter:
    documents = (shards.tokens(i).tolist() for i in range(len(shards)))
    return Counter(pair for document in documents for pair in itertools.pairwise(document))


def rows_of(first: int, n: int, rank: int, world: int) -> list[int]:
    """The rows that process `rank` of `world` takes of a global batch, in micro-batches of one row."""
    return [i for rows in row_groups(first, 1, local_shard(n, rank, world)) for i in rows]


def same(a: Row, b: Row) -> bool:
    return all(np.array_equal(getattr(a, x), getattr(b, x)) for x in ("tokens", "targets", "lengths"))


# The stateless permutation


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_the_stateless_permutation_sends_every_document_to_a_place_of_its_own(n, key):
    assert sorted(permuted(np.arange(n), n, key).tolist()) == list(range(n))


def test_the_stateless_permutation_needs_only_the_indices_asked_for():
    n = 10**12 + 39
    some = np.array([0, 1, 2, n - 1, 123_456_789_012])
    places = permuted(some, n, key=5)
    assert len(set(places.tolist())) == 5 and places.min() >= 0 and places.max() < n
    assert [int(permuted(some[i : i + 1], n, key=5)[0]) for i in range(5)] == places.tolist()


def test_the_permutation_looks_random():
    n = 10_007
    orders = np.stack([permuted(np.arange(n), n, key) for key in range(23)])
    for order in orders:  # neighbours do not stay neighbours, and thirds of the input spread over thirds of the output
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        counts = np.histogram2d(np.arange(n) * 3 // n, order * 3 // n, bins=3)[0]
        assert np.abs(counts / (n / 9) - 1).max() < 0.1
    assert (orders[:-1] == orders[1:]).mean() < 0.001


def test_the_permutation_is_the_same_on_every_machine():
    # Written down once: a change would break the resume of runs that are under way.
    assert permuted(np.arange(11), 11, key=17).tolist() == [5, 4, 10, 2, 9, 6, 3, 0, 1, 8, 7]


def test_windows_are_of_one_size_to_within_a_document(written):
    windows = Windows(written([2] * 101), "documents", seed=1, size=WINDOW)
    sizes = [len(windows.documents(w)) for w in range(windows.n)]
    assert windows.n == 8 and set(sizes) == {12, 13}
    assert sorted(d for w in range(8) for d in windows.documents(w).tolist()) == list(range(101))


# Packing


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 5 * S), max_size=211))
def test_rows_are_counted_as_they_are_packed(lengths):
    pieces = [min(S, n - at) for n in lengths for at in range(0, n, S)]
    assert count_rows(np.array(lengths, dtype=np.int64), S) == len(pack(np.array(pieces, dtype=np.int64), S, 0, 0))


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(0, 2**31), st.integers(0, 2))
def test_an_epoch_trains_every_token_but_the_first_of_each_document_exactly_once(written, lengths, seed, epoch):
    shards = written(lengths)
    loader = one(shards, seed=seed, window=WINDOW)
    n = loader.rows_in_epoch("documents")
    rows = [loader.row(i) for i in range(epoch * n, (epoch + 1) * n)]
    assert pairs(rows) == all_pairs(shards)
    for row in rows:
        assert 0 < len(row.tokens) == row.lengths.sum() <= S and row.lengths.min() > 0


def test_a_document_attends_to_itself_only_and_documents_that_fit_are_whole(written):
    lengths = web_like(101)
    shards = written(lengths)
    loader = one(shards, window=WINDOW)
    starts = {int(shards.tokens(i)[0]): n for i, n in enumerate(lengths)}
    ends = {int(shards.tokens(i)[-1]) for i in range(len(shards))}
    for k in range(loader.rows_in_epoch("documents")):
        row = loader.row(k)
        for piece in np.split(row.tokens, np.cumsum(row.lengths)[:-1]):
            assert np.array_equal(np.diff(piece), np.ones(len(piece) - 1))  # one document's own ids, in order
            if (n := starts.get(int(piece[0]))) is not None:
                assert len(piece) == min(S, n - 1)
            assert not ends & set(piece.tolist())  # an end of text predicts nothing, so it is no input
    assert IGNORED not in pairs([loader.row(0)]).values()


def test_padding_stays_under_three_percent_at_4096_on_lengths_as_the_web_has_them():
    lengths = np.clip(np.random.default_rng(7).lognormal(np.log(500), 1.2, 3000), 2, None).astype(int)
    rows = count_rows(lengths - 1, 4096)
    assert 1 - (lengths - 1).sum() / (rows * 4096) < 0.03


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(0, 2**31), st.sampled_from([3, 2**16]))
def test_concatenation_is_the_documents_end_to_end_cut_where_a_row_is_full(written, lengths, seed, block):
    shards = written(lengths)
    n_epochs = 2 + 2 * S // shards.n_tokens
    text = [t for epoch in range(n_epochs + 1) for t in concatenated(shards, seed, epoch)]  # the slow twin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arriero.data.order.BLOCK", block)
        loader = one(shards, seed=seed, packing="concat", window=WINDOW)
        rows = [loader.row(k) for k in range(n_epochs * shards.n_tokens // S)]
    found = [(row.tokens.tolist(), row.targets.tolist()) for row in rows]
    expected = [(text[k * S : (k + 1) * S], text[k * S + 1 : (k + 1) * S + 1]) for k in range(len(rows))]
    ends = [epoch * shards.n_tokens / S for epoch in range(n_epochs + 1)]
    for begin, end in itertools.pairwise(ends):  # whole rows of an epoch change places with each other only
        whole = slice(math.ceil(begin), math.floor(end))
        assert sorted(found[whole]) == sorted(expected[whole])
    over = [k for k in map(math.floor, ends[1:]) if k < len(rows) and (k * S) % shards.n_tokens]
    assert [found[k] for k in over] == [expected[k] for k in over]
    assert all(row.lengths.tolist() == [S] for row in rows)


def test_neighbours_in_a_text_are_not_neighbours_in_a_batch(written):
    shards = written([S * 40 + 1] * 11)
    loader = one(shards, packing="concat")
    documents = [int(loader.row(k).tokens[0]) // (S * 40 + 1) for k in range(loader.rows_in_epoch("documents"))]
    assert sum(a == b for a, b in itertools.pairwise(documents)) / len(documents) < 0.2


def concatenated(shards: Shards, seed: int, epoch: int) -> list[int]:
    """An epoch's text, window by window; its documents are checked to be each there once."""
    windows = Windows(shards, "documents", seed, WINDOW)
    loader = one(shards, seed=seed, packing="concat", window=WINDOW)
    run = loader._phases[0].rows["documents"]
    order = [int(d) for at in range(windows.n) for d in run._laid_out(epoch, at)[0]]
    assert sorted(order) == list(range(len(shards)))
    return [t for d in order for t in shards.tokens(d).tolist()]


def test_epochs_differ_in_order_and_company(written):
    shards = written(web_like(2003))
    loader = one(shards)
    n = loader.rows_in_epoch("documents")
    epochs = [[loader.row(e * n + k) for k in range(n)] for e in (0, 1)]
    companies = [{frozenset(row.tokens.tolist()) for row in rows if len(row.lengths) > 1} for rows in epochs]
    assert [r.tokens.tolist() for r in epochs[0]] != [r.tokens.tolist() for r in epochs[1]]
    assert len(companies[0] & companies[1]) < len(companies[0]) / 20
    assert not same(one(shards, seed=4).row(0), loader.row(0))


def test_epochs_order_the_windows_and_the_documents_in_each_anew(written):
    shards = written([7] * 101)
    windows = Windows(shards, "documents", seed=3, size=WINDOW)
    texts = [np.array(concatenated(shards, 3, epoch)[::7]) // 7 for epoch in (0, 1)]  # documents, in their order
    window_of = {d: w for w in range(windows.n) for d in windows.documents(w).tolist()}
    order = [list(dict.fromkeys(window_of[d] for d in text.tolist())) for text in texts]
    assert sorted(order[0]) == sorted(order[1]) == list(range(8)) and order[0] != order[1]
    for w in range(windows.n):
        assert [d for d in texts[0].tolist() if window_of[d] == w] != [
            d for d in texts[1].tolist() if window_of[d] == w
        ]


def test_windows_of_equal_lengths_are_packed_in_different_arrangements(written):
    shards = written(
        [S + 1] * 10 * WINDOW
    )  # a document fills a row, so rows are documents in the order of their window
    loader, windows = one(shards, window=WINDOW), Windows(shards, "documents", seed=3, size=WINDOW)
    place = {d: i for w in range(10) for i, d in enumerate(windows.documents(w).tolist())}
    rows = [int(loader.row(k).tokens[0]) // (S + 1) for k in range(10 * WINDOW)]
    arrangements = {tuple(place[d] for d in rows[w * WINDOW : (w + 1) * WINDOW]) for w in range(10)}
    assert len(arrangements) == 10


# A pure function of the index


STAGES = (
    DataStage(0, S, {"web": 3, "books": 1}),
    DataStage(29, S, {"web": 1, "code": 2}),
    DataStage(53, 2 * S, {"web": 1, "books": 4}),
)


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
def test_a_row_is_the_same_whoever_asks_and_whatever_was_asked_before(sources, packing):
    one_, other = (PretrainLoader(sources, STAGES, 5, packing, window=WINDOW) for _ in range(2))
    indices = [0, 97, 28, 29, 52, 53, 54, 5, 301, 12]
    first = {i: one_.row(i) for i in indices}
    for i in reversed(indices):
        assert same(first[i], other.row(i))


@settings(max_examples=25, deadline=None)
@given(
    first=st.integers(0, 90),
    n_rows=st.integers(1, 5),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    workers=st.integers(0, 2),
    packing=st.sampled_from(["best-fit", "concat"]),
)
def test_the_global_batch_is_the_same_on_any_number_of_processes_and_threads(
    sources, first, n_rows, world, workers, packing
):
    def loader() -> PretrainLoader:
        return PretrainLoader(sources, STAGES, 5, packing, window=WINDOW)

    n_rows *= world
    whole = loader()
    expected = [collate([whole.row(i) for i in range(f, f + n_rows)]) for f in (first, first + n_rows)]
    parts = []
    for rank in range(world):
        own = loader()

        def make(step: int, own=own, rank=rank) -> list[Row]:
            return [own.row(i) for i in rows_of(first + step * n_rows, n_rows, rank, world)]

        prefetched = Prefetched(make, last=2, workers=workers)
        parts.append([prefetched(step) for step in range(2)])
        prefetched.close()
    for step, batch in enumerate(expected):
        found = collate([row for part in parts for row in part[step]])
        assert found.tokens.tolist() == batch.tokens.tolist() and found.targets.tolist() == batch.targets.tolist()
        assert found.documents.lengths == batch.documents.lengths


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 120), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 8]))
def test_resume_from_any_row_with_another_batch_size_and_world_size_is_exact(sources, at, n_rows, world):
    n_rows *= world
    before = PretrainLoader(sources, STAGES, 5, window=WINDOW)
    undisturbed = [before.row(i) for i in range(at + 2 * n_rows)][at:]
    after = PretrainLoader(sources, STAGES, 5, window=WINDOW)
    steps = [[rows_of(at + s * n_rows, n_rows, rank, world) for rank in range(world)] for s in range(2)]
    resumed = [after.row(i) for step in steps for rows in step for i in rows]
    assert len(resumed) == len(undisturbed) and all(map(same, resumed, undisturbed))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 100), st.sampled_from([1, 2, 3, 4, 8]))
def test_ranks_share_a_global_batch_evenly_and_in_order(first, n, world):
    parts = [rows_of(first, n * world, rank, world) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(first, first + n * world))
    assert max(map(len, parts)) == min(map(len, parts))


# Stages and bounds


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    seq_lens=st.lists(st.sampled_from([7, 17, S, 2 * S, 5 * S]), min_size=2, max_size=4),
    rows=st.integers(1, 40),
)
def test_a_change_of_row_length_in_the_middle_of_an_epoch_loses_and_repeats_nothing(written, lengths, seq_lens, rows):
    shards = written(lengths)
    stages = [DataStage(k * rows, seq_len, {"documents": 1.0}) for k, seq_len in enumerate(seq_lens)]
    loader = PretrainLoader({"documents": shards}, stages, 3, max_epochs={"documents": 2}, window=WINDOW)
    assert loader.n_rows is not None
    found = [loader.row(i) for i in range(loader.n_rows)]
    assert all(len(row.tokens) <= loader.seq_len(i) for i, row in enumerate(found))
    # Where a piece was cut, it was cut in both epochs, but every pair is there, and exactly twice.
    assert pairs(found) == Counter(dict.fromkeys(all_pairs(shards), 2))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from([7, 17, S]), st.integers(0, 2**31))
def test_pieces_that_were_cut_are_joined_again_in_whatever_order_they_lie(lengths, seq_len, seed):
    whole = Pieces(np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64), np.array(lengths))
    cut = whole.cut(seq_len)
    assert (cut.stop - cut.start).max() <= seq_len
    again = cut.take(np.random.default_rng(seed).permutation(len(cut.document))).joined()
    assert all(np.array_equal(getattr(again, x), getattr(whole, x)) for x in ("document", "start", "stop"))
    some = cut.take(np.flatnonzero(np.arange(len(cut.document)) % 3 != 1))  # a gap stays a gap
    assert pieces_hold(some.joined()) == pieces_hold(some)


def pieces_hold(pieces: Pieces) -> list[tuple[int, int]]:
    spans = zip(pieces.document.tolist(), pieces.start.tolist(), pieces.stop.tolist(), strict=True)
    return sorted((document, t) for document, start, stop in spans for t in range(start, stop))


def test_a_change_of_row_length_between_two_epochs_cuts_documents_at_the_new_length_only(written):
    shards = written(web_like(101, median=40.0))
    n = one(shards, window=WINDOW).rows_in_epoch("documents")
    stages = [DataStage(0, S, {"documents": 1.0}), DataStage(n, 5 * S, {"documents": 1.0})]
    changing = PretrainLoader({"documents": shards}, stages, 3, window=WINDOW)
    longer = one(shards, 5 * S, window=WINDOW)
    m = longer.rows_in_epoch("documents")
    assert all(same(changing.row(n + k), longer.row(m + k)) for k in range(m))


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    seq_lens=st.lists(st.sampled_from([7, 17, S, 2 * S, 5 * S]), min_size=2, max_size=4),
    rows=st.integers(1, 40),
    block=st.sampled_from([3, 2**16]),
)
def test_a_change_of_row_length_in_concatenated_text_loses_and_repeats_nothing(written, lengths, seq_lens, rows, block):
    shards = written(lengths)
    stages = [DataStage(k * rows, seq_len, {"documents": 1.0}) for k, seq_len in enumerate(seq_lens)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arriero.data.order.BLOCK", block)
        bounds = {"documents": 2 + 5 * S / shards.n_tokens}  # two epochs, and what fills the last row
        loader = PretrainLoader({"documents": shards}, stages, 3, "concat", bounds, window=WINDOW)
        assert loader.n_rows is not None
        found = [loader.row(i) for i in range(loader.n_rows)]
    assert all(len(row.tokens) == loader.seq_len(i) for i, row in enumerate(found))
    text = [t for epoch in range(3) for t in concatenated(shards, 3, epoch)][: 2 * shards.n_tokens + 1]
    assert not Counter(itertools.pairwise(text)) - pairs(found)
    assert 0 <= sum(len(row.tokens) for row in found) - 2 * shards.n_tokens <= 5 * S  # so nothing is there too often


def test_the_mixture_changes_at_its_rows_and_keeps_its_weights_in_each_stage(sources):
    loader = PretrainLoader(sources, STAGES, 5, window=WINDOW)
    had = [Counter(loader.source(i) for i in range(a, b)) for a, b in ((0, 28), (29, 53), (53, 153))]
    assert had == [{"web": 21, "books": 7}, {"web": 8, "code": 16}, {"web": 20, "books": 80}]
    assert {loader.seq_len(i) for i in range(53)} == {S} and loader.seq_len(53) == 2 * S
    for i in range(0, 153, 7):
        first = int(loader.row(i).tokens[0])
        assert loader.source(i) == ("web" if first < 10_000 else "books" if first < 20_000 else "code")


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
def test_a_source_that_is_used_up_gives_way_to_the_others(sources, packing):
    bounds = {"books": 1, "code": 2.5, "web": 2}
    stages = [DataStage(0, S, {"web": 1, "books": 8, "code": 2})]
    loader = PretrainLoader(sources, stages, 5, packing, bounds, window=WINDOW)
    assert loader.n_rows is not None
    order = [loader.source(i) for i in range(loader.n_rows)]
    counts = Counter(order)
    for name, bound in bounds.items():
        assert counts[name] == pytest.approx(bound * loader.rows_in_epoch(name), abs=1 if packing == "concat" else 0.5)
    epochs = loader.epochs(loader.n_rows)
    assert all(0 <= bounds[name] - epochs[name] < 0.06 for name in bounds), epochs
    first_gone = loader.n_rows - order[::-1].index("books")
    then = Counter(order[first_gone : first_gone + 6])  # web and code go on as 1 to 2
    assert then == {"web": 2, "code": 4}
    if packing == "best-fit":
        used_whole = [loader.row(i) for i, name in enumerate(order) if name == "books"]
        assert pairs(used_whole) == all_pairs(sources["books"])
    with pytest.raises(
        DataError, match=rf"row {loader.n_rows} does not exist: .*used up after {loader.n_rows} rows; raise"
    ):
        loader.row(loader.n_rows)


@settings(max_examples=60, deadline=None)
@given(st.integers(11, 190), st.sampled_from([7, 17, 2 * S, 5 * S]), st.sampled_from(["best-fit", "concat"]))
def test_a_source_used_up_in_one_stage_stays_so_in_the_next(sources, percent, seq_len, packing):
    # Half of an epoch in rows of 31 tokens is not quite half of one in rows of 7.
    stages = [DataStage(0, S, {"books": 1, "web": 1}), DataStage(200, seq_len, {"books": 1, "web": 1})]
    loader = PretrainLoader(sources, stages, 5, packing, {"books": percent / 100}, window=WINDOW)
    assert {loader.source(i) for i in range(200, 300)} == {"web"} and loader.n_rows is None


def test_sources_of_equal_documents_come_in_different_orders(written):
    same_lengths = web_like(101)
    loaders = [
        PretrainLoader({name: written(same_lengths)}, [DataStage(0, S, {name: 1})], seed=3) for name in ("web", "books")
    ]
    assert not same(loaders[0].row(0), loaders[1].row(0))


def test_llama_1s_table_comes_out_epochs_and_all(tmp_path):
    # Sources of such sizes that 10,000 rows of the published shares come to the published epochs.
    n_rows, seq_len = 10_000, 11
    sources = {}
    for name, (share, epochs) in LLAMA1.items():
        documents = round(share / 100 * n_rows / epochs)
        sources[name] = write_shards(tmp_path / name, [seq_len + 1] * documents, name)
    weights = {name: share for name, (share, _) in LLAMA1.items()}
    loader = PretrainLoader(sources, [DataStage(0, seq_len, weights)], seed=0)
    epochs = loader.epochs(n_rows)
    assert all(epochs[name] == pytest.approx(published, rel=0.01) for name, (_, published) in LLAMA1.items())
    counts = Counter(loader.source(i) for i in range(n_rows))
    assert all(counts[name] == 100 * share for name, share in weights.items())


@pytest.mark.parametrize(
    ("stages", "bounds", "error", "message"),
    [
        ([DataStage(3, S, {"web": 1})], {}, ConfigError, "the first stage must begin at row 0"),
        ([], {}, ConfigError, "the first stage must begin at row 0"),
        (
            [DataStage(0, S, {"web": 1}), DataStage(7, S, {"web": 1}), DataStage(7, S, {"books": 1})],
            {},
            ConfigError,
            "a stage begins at row 7, the one before it at 7; give stages in their order, each of one row at least",
        ),
        (
            [DataStage(0, S, {"wbe": 1})],
            {},
            ConfigError,
            r"no source 'wbe'; did you mean 'web'\? \(there are: web, books, code\)",
        ),
        ([DataStage(0, S, {"web": 1})], {"wiki": 2}, ConfigError, "no source 'wiki'"),
        ([DataStage(0, S, {"web": 1})], {"web": 0}, ConfigError, "max_epochs of 'web' is 0.0; give a number above 0"),
        (
            [DataStage(0, S, {"web": 1})],
            {"web": 1e-4},
            ConfigError,
            r"max_epochs \(web: 0.0001\) leaves not one row of 31",
        ),
        ([DataStage(0, 0, {"web": 1})], {}, ConfigError, "seq_len is 0; a row holds 1 token at least"),
        ([DataStage(0, S, {"web": 0})], {}, ConfigError, "max_epochs|no source has a weight above 0"),
    ],
)
def test_stages_that_make_no_sense_are_refused(sources, stages, bounds, error, message):
    with pytest.raises(error, match=message):
        PretrainLoader(sources, stages, 0, max_epochs=bounds)


def test_a_source_without_anything_to_learn_is_refused(tmp_path):
    with pytest.raises(DataError, match="source 'documents' has no documents to learn from; leave it out"):
        one(write_shards(tmp_path / "ones", [1, 1, 1]))


# Prefetching


def test_prefetched_batches_come_in_any_order_asked_and_nothing_is_made_behind_the_last():
    made = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    for workers in (0, 1, 2):
        prefetched = Prefetched(make, last=11, workers=workers)
        assert [prefetched(step) for step in (0, 1, 2, 7, 8, 3, 10)] == [0, 1, 4, 49, 64, 9, 100]
        prefetched.close()
    assert max(made) == 10


def test_what_making_a_batch_raises_is_raised_where_it_is_asked_for():
    def make(step: int) -> int:
        if step == 3:
            raise DataError("row 3 does not exist")
        return step

    prefetched = Prefetched(make, last=5)
    assert [prefetched(step) for step in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="row 3 does not exist"):
        prefetched(3)
    prefetched.close()


def test_longer_rows_in_the_middle_of_an_epoch_hold_longer_pieces_of_documents(written):
    shards = written([1999] * 7)
    loader = PretrainLoader(
        {"documents": shards}, [DataStage(0, 97, {"documents": 1}), DataStage(11, 997, {"documents": 1})], 3
    )
    assert max(int(loader.row(i).lengths.max()) for i in range(11)) == 97
    assert max(int(loader.row(i).lengths.max()) for i in range(11, 15)) > 500
