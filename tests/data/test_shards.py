"""Token shards: right ids, the same bytes from any number of workers, whole after any crash, refused when changed."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from helpers.shards import write_documents, write_shards
from rich.console import Console

from arriero import cli
from arriero.cli.data import verify
from arriero.curate.sources import read_documents
from arriero.data import sharding
from arriero.data.shard_writer import ShardWriter
from arriero.data.sharding import document_marks, shard_sources, text_hash
from arriero.data.shards import Shards, find_sets, open_sources, open_splits, source_directory
from arriero.errors import ConfigError, DataError
from arriero.tokenizer.base import SpecialTokens, Tokenizer
from arriero.tokenizer.load import load_tokenizer
from arriero.tokenizer.train import learn_llama3

QUIET = Console(file=io.StringIO())
END = 0  # <|endoftext|> of SmolLM2


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, so that parts may end anywhere and workers overtake each other."""
    monkeypatch.setattr(sharding, "CHUNK", 3_000)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    """A byte-level vocabulary in Llama 3's manner; real, but opened in a moment."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=311, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([row["text"] for row in corpus(101)], trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    bpe.save(str(directory / "tokenizer.json"))
    roles = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(roles))
    return load_tokenizer(directory)


def corpus(n: int) -> list[dict[str, str]]:
    """n different documents of three sources, some of them empty."""
    counted = " ".join(map(str, range(300)))
    rows = []
    for i in range(n):
        text = f"Document {i}. " + counted[: (i * 7919) % 1009] if i % 23 != 5 else " \n"
        rows.append({"text": text, "source": ("web", "books", "a/b.c")[i % 3], "id": f"d{i}"})
    return rows


def write_corpus(path: Path, n: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus(n)), encoding="utf-8")
    return path


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def texts_of(shards: Shards, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(shards.tokens(i)[:-1].tolist()) for i in range(len(shards))]


def shard(source: Path | list[Path], tokenizer: Tokenizer, out: Path, **settings):
    sources = source if isinstance(source, list) else [source]
    return shard_sources(sources, tokenizer, out, **{"console": QUIET, "workers": 1, **settings})


# What is written


def test_shards_hold_the_ids_of_every_document_in_order_with_its_end(tmp_path, tokenizer):
    path = write_corpus(tmp_path / "c.jsonl", 101)
    train = shard(path, tokenizer, tmp_path / "out", validation=0, part_size=9_000)["train"]["documents"]
    expected = [row["text"] for row in corpus(101) if row["text"].strip()]
    assert len(train) == len(expected) and len(list((tmp_path / "out/train").glob("tokens-*.bin"))) > 3
    for i, text in enumerate(expected):
        assert train.tokens(i).tolist() == [*tokenizer.encode(text), END]
        assert train.text_bytes[i] == len(text.encode())
    assert train.tokens(0).dtype == np.uint16 and train.vocab_size == 49_152
    assert train.lengths.tolist() == [len(train.tokens(i)) for i in range(len(train))]
    assert train.lengths_of(np.array([7, 3])).tolist() == train.lengths[[7, 3]].tolist()
    assert train.tokens(3, 2, 5).tolist() == train.tokens(3).tolist()[2:5]
    assert (train.n_tokens, train.n_bytes) == (train.lengths.sum(), sum(len(t.encode()) for t in expected))
    assert train.n_predicted == train.n_tokens - len(train)
    train.verify()
    assert load_tokenizer(train.tokenizer_directory).fingerprint == tokenizer.fingerprint == train.manifest["tokenizer"]
    state = json.loads((tmp_path / "out/progress.json").read_text())
    assert state["complete"] and state["left_out"] == {"empty": 101 - len(expected)}


def test_texts_in_files_and_in_rows_become_the_same_shards(tmp_path, small):
    texts = [row["text"] for row in corpus(29) if row["text"].strip()]
    for i, text in enumerate(texts):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i:03d}.txt").write_text(text)
    made = [
        shard(write_documents(tmp_path / "t.jsonl", texts), small, tmp_path / "a", validation=0.2),
        shard(tmp_path / "texts", small, tmp_path / "b", validation=0.2),
    ]
    for split in ("train", "validation"):
        first, *others = (
            [s[split]["documents"].tokens(i).tolist() for i in range(len(s[split]["documents"]))] for s in made
        )
        assert first and all(other == first for other in others)


def test_the_marks_around_documents_are_those_of_the_tokenizers_family(tokenizer):
    class Named(Tokenizer):
        vocab_size = 7
        _encode_plain = _token_table = _identity = save = None

    def marks(bos: str | None, eos: str | None, *others: str) -> tuple[int | None, int | None]:
        names = dict.fromkeys(name for name in (bos, eos, *others) if name)
        return document_marks(Named(SpecialTokens({name: i for i, name in enumerate(names)}, bos=bos, eos=eos), None))

    assert document_marks(tokenizer) == (None, END)  # an instruct model's own eos is <|im_end|>
    assert marks("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>") == (0, 2)
    assert marks("<s>", "</s>") == (0, 1)
    assert marks(None, "</s>") == (None, 0)
    with pytest.raises(DataError, match=r"no token that ends a text.*name one as its eos token \(.*tokens: <s>\)"):
        marks("<s>", None)


def test_both_marks_stand_where_the_family_has_both(tmp_path, small):
    texts = ["one", "two three", "<|end_of_text|>"]
    shards = shard(write_documents(tmp_path / "t.jsonl", texts), small, tmp_path / "out", validation=0)["train"][
        "documents"
    ]
    assert [shards.tokens(i).tolist() for i in range(3)] == [[0, *small.encode(text), 1] for text in texts]
    assert (shards.tokens(2) == 1).sum() == 1  # the text of a special token is not the token


def test_files_of_every_kind_become_the_documents_that_their_reader_gives(tmp_path, small):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_corpus(folder / "rows.jsonl", 29)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(corpus(31)), folder / "rows.parquet", row_group_size=7)
    (folder / "note.md").write_text("# Llamas\n\nThey hum.\n")
    (folder / "code.py").write_text("# -*- coding: latin-1 -*-\nname = 'Andr\xe9'\n", encoding="latin-1")
    (folder / "page.html").write_text("<html><body><p>" + "A page about llamas. " * 20 + "</p></body></html>")
    warc_page = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nplain text from the web"
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: {len(warc_page)}\r\n\r\n"
    )
    (folder / "crawl.warc").write_bytes(head.encode() + warc_page + b"\r\n\r\n")
    expected = [document.text for document in read_documents([folder]) if document.text.strip()]
    assert len(expected) > 80 and "plain text from the web" in expected
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        shards = shard(folder, small, out, validation=0, workers=workers, part_size=2_000)["train"]["documents"]
        assert [small.decode(shards.tokens(i)) for i in range(len(shards))] == expected
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")


def test_sources_are_kept_apart_whatever_their_names(tmp_path, small):
    path = write_corpus(tmp_path / "c.jsonl", 67)
    sets = shard(path, small, tmp_path / "out", by_source=True, validation=0.3)
    assert list(sets["train"]) == ["a/b.c", "books", "web"]
    assert list(open_sources(tmp_path / "out/train")) == list(sets["train"])
    for name in sets["train"]:
        found = [text for split in sets.values() for text in texts_of(split[name], small)]
        assert sorted(found) == sorted(r["text"] for r in corpus(67) if r["source"] == name and r["text"].strip())
    apart = {p.name for p in (tmp_path / "out/train").iterdir()}
    assert apart == {"a%2Fb%2Ec", "books", "web"}


LONG = (
    "https://example.org/" + "x" * 300,
    "https://example.org/" + "x" * 301,
    "今日は天気がいいので公園へ行きます" * 3,
)


@pytest.mark.parametrize("again", [False, True])
def test_sources_of_long_foreign_and_reserved_names_have_directories_and_keep_their_names(tmp_path, small, again):
    names = [
        *LONG,
        "维基百科",
        "../up",
        ".",
        "..",
        ".hidden",
        "a/b",
        "a\\b",
        "con",
        "NUL",
        "tail ",
        "100%",
        "a+b",
        "%2E",
        "~",
        "\0",
    ]
    names.append(source_directory(LONG[0]))  # a source that is called as another's directory
    documents = [(f"words of {i}", name) for i, name in enumerate(names)]
    for _ in range(1 + again):
        sets = shard(
            write_documents(tmp_path / "t.jsonl", documents), small, tmp_path / "out", validation=0, by_source=True
        )
    assert set(sets["train"]) == set(open_sources(tmp_path / "out/train")) == set(names)
    for i, name in enumerate(names):
        assert texts_of(sets["train"][name], small) == [f"words of {i}"]
    directories = [path.name for path in (tmp_path / "out/train").iterdir()]
    assert len(directories) == len(names)
    for name in directories:
        assert name.isascii() and len(name) < 255 and not set(name) & set('/\\:*?"<>|\0.') and not name.endswith(" ")
        assert name.lower() not in ("con", "nul")
    assert {f"{shards.source}" for shards in find_sets(tmp_path / "out")} == set(names)


def test_a_share_is_held_out_by_content_so_that_equal_texts_lie_on_one_side(tmp_path, small):
    texts = [row["text"] for row in corpus(211) if row["text"].strip()]
    sets = shard(
        write_documents(tmp_path / "t.jsonl", [*texts, *reversed(texts)]), small, tmp_path / "out", validation=0.2
    )
    train, held_out = (texts_of(sets[split]["documents"], small) for split in ("train", "validation"))
    assert set(train) | set(held_out) == set(texts) and not set(train) & set(held_out)
    assert len(train) + len(held_out) == 2 * len(texts)
    assert all((text_hash(text) < 0.2 * 2**64) == (text in held_out) for text in texts)
    assert 0.1 < len(set(held_out)) / len(texts) < 0.3


def test_a_file_is_held_out_and_its_texts_left_out_of_training(tmp_path, small):
    path = write_corpus(tmp_path / "c.jsonl", 67)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in [*corpus(67)[30:40], {"text": "only here"}]))
    sets = shard(path, small, tmp_path / "out", validation=str(held))
    train, held_out = (texts_of(sets[split]["documents"], small) for split in ("train", "validation"))
    texts = [row["text"] for row in corpus(67)]
    assert held_out == [t for t in [*texts[30:40], "only here"] if t.strip()]
    assert train == [t for i, t in enumerate(texts) if t.strip() and not 30 <= i < 40]
    assert json.loads((tmp_path / "out/progress.json").read_text())["left_out"]["held out"] == len(held_out) - 1


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, small):
    path = write_corpus(tmp_path / "c.jsonl", 401)
    for workers in (1, 2, 3):
        shard(path, small, tmp_path / f"{workers}", workers=workers, part_size=30_000)
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "3")


# Crashes


class Killed(BaseException):
    """Stands for the power going: nothing catches it."""


def test_a_run_killed_at_any_of_its_writes_goes_on_to_the_same_bytes(tmp_path, small, monkeypatch):
    path = write_corpus(tmp_path / "c.jsonl", 71)
    settings = {"by_source": True, "validation": 0.2, "part_size": 12_000}
    shard(path, small, tmp_path / "whole", **settings)
    expected = tree(tmp_path / "whole")
    replace, calls = os.replace, 0

    def dying(source, target):
        nonlocal calls
        calls += 1
        if calls == die_at:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    out, die_at, n_deaths = tmp_path / "out", 0, 0
    while True:
        die_at, calls = die_at + 1, 0
        if die_at % 5 == 1:  # sometimes from scratch, else it goes on from the death before
            shutil.rmtree(out, ignore_errors=True)
        try:
            shard(path, small, out, **settings)
        except Killed:
            n_deaths += 1
            for stray in out.rglob(".*.tmp"):  # what a process that was killed could not remove would lie there
                stray.write_bytes(b"half")
        else:
            assert tree(out) == expected
            if die_at % 5 == 1:
                break
    assert n_deaths > 15


def killed_in(script: str, *args: str, part: int, out: Path) -> bool:
    """Run a script that shards, and SIGKILL it once `part` parts are durable; whether that came before its end."""
    process = subprocess.Popen([sys.executable, "-c", script, *args])
    workers: list[psutil.Process] = []
    try:
        while process.poll() is None:
            workers = workers or psutil.Process(process.pid).children(recursive=True)
            if (out / "progress.json").is_file() and len(
                json.loads((out / "progress.json").read_text())["parts"]
            ) >= part:
                workers = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.005)
    except psutil.NoSuchProcess:
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers outlive a parent that was killed"
    return process.returncode != 0


SCRIPT = """
import sys, io
from rich.console import Console
from arriero.data import sharding
from arriero.tokenizer import load_tokenizer
if __name__ == "__main__":
    sharding.CHUNK = 3_000
    quiet = Console(file=io.StringIO())
    tokenizer = load_tokenizer(sys.argv[2])
    sharding.shard_sources([sys.argv[1]], tokenizer, sys.argv[3], workers=2, part_size=40_000, console=quiet)
"""


def test_a_run_killed_by_sigkill_goes_on_to_the_same_bytes_and_leaves_no_worker_behind(tmp_path, small, monkeypatch):
    path = write_corpus(tmp_path / "c.jsonl", 1009)
    small.save(tmp_path)
    out = tmp_path / "out"
    kills = sum(killed_in(SCRIPT, str(path), str(tmp_path), str(out), part=part, out=out) for part in (1, 4))
    assert kills == 2
    shard(path, load_tokenizer(tmp_path), out, part_size=40_000)
    shard(path, load_tokenizer(tmp_path), tmp_path / "whole", part_size=40_000)
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_by_sigkill_twenty_times_ends_with_the_same_bytes(tmp_path, small):
    path = write_corpus(tmp_path / "c.jsonl", 5003)
    small.save(tmp_path)
    out = tmp_path / "out"
    kills = [killed_in(SCRIPT, str(path), str(tmp_path), str(out), part=part, out=out) for part in range(1, 21)]
    assert sum(kills) == 20
    shard(path, load_tokenizer(tmp_path), out, part_size=40_000)
    shard(path, load_tokenizer(tmp_path), tmp_path / "whole", part_size=40_000)
    assert tree(out) == tree(tmp_path / "whole")


def test_running_a_finished_run_again_changes_nothing_and_reads_nothing(tmp_path, small, monkeypatch):
    path = write_corpus(tmp_path / "c.jsonl", 67)
    first = shard(path, small, tmp_path / "out", validation=0.2)
    before = tree(tmp_path / "out")
    monkeypatch.setattr(sharding, "read_items", None)
    again = shard(path, small, tmp_path / "out", validation=0.2)
    assert tree(tmp_path / "out") == before
    assert again["train"]["documents"].fingerprint == first["train"]["documents"].fingerprint


def test_a_bad_row_is_named_and_nothing_is_half_written(tmp_path, small):
    path = write_corpus(tmp_path / "c.jsonl", 67)
    path.write_text(path.read_text().replace('"text": "Document 50.', '"TEXT": "Document 50.'))
    with pytest.raises(
        DataError, match=r"row 51 of .*c\.jsonl: no column 'text' \(there are: 'TEXT', 'source', 'id'\)"
    ):
        shard(path, small, tmp_path / "out", validation=0, part_size=3_000)
    assert not list((tmp_path / "out").rglob(".*.tmp"))
    assert json.loads((tmp_path / "out/progress.json").read_text())["parts"]


# Refusals


def test_other_settings_documents_or_tokenizers_are_not_mixed_into_what_was_begun(tmp_path, small):
    path = write_corpus(tmp_path / "c.jsonl", 29)
    shard(path, small, tmp_path / "out", validation="0.1")
    with pytest.raises(DataError, match=r"was begun with validation = '0.1', now it is '0.2'; go on with what"):
        shard(path, small, tmp_path / "out", validation=0.2)
    with pytest.raises(DataError, match="was begun with by_source = False, now it is True"):
        shard(path, small, tmp_path / "out", validation="0.1", by_source=True)
    write_corpus(path, 31)
    with pytest.raises(
        DataError,
        match=r"with files = '1 with [\d,]+ bytes, the last changed at .*', now it is '1 with [\d,]+ bytes, the last",
    ):
        shard(path, small, tmp_path / "out", validation="0.1")


def test_a_mistake_that_left_nothing_durable_is_mended_in_the_same_directory(tmp_path, small):
    path = write_corpus(tmp_path / "c.jsonl", 29)
    with pytest.raises(DataError, match="no column 'body'"):
        shard(path, small, tmp_path / "out", text_key="body", validation=0)
    shard(path, small, tmp_path / "out", validation=0)
    shard(path, small, tmp_path / "whole", validation=0)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    with pytest.raises(DataError, match=r"was begun with text_key = 'text', now it is 'body'; .* or remove this one"):
        shard(path, small, tmp_path / "out", text_key="body", validation=0)
    with pytest.raises(ConfigError, match="workers is -2; give a number of processes, or 0 for one a core"):
        shard(path, small, tmp_path / "other", workers=-2)
    with pytest.raises(ConfigError, match="no source is given; name a file"):
        shard([], small, tmp_path / "other")


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path, small):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"out holds something else; give another --out, or empty it"):
        shard(write_documents(tmp_path / "t.jsonl", ["a"]), small, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(
        ConfigError, match=r"thesis\.tex: nothing can be written there .it is a file.; give another --out"
    ):
        shard(write_documents(tmp_path / "t.jsonl", ["a"]), small, tmp_path / "out/thesis.tex")


def test_two_processes_do_not_write_to_one_directory(tmp_path, small):
    path = write_documents(tmp_path / "t.jsonl", ["one text", "another text"])
    with (
        ShardWriter(tmp_path / "out", small, {}, by_source=False),
        pytest.raises(DataError, match="another process is writing shards there; wait for it, or give another"),
    ):
        shard(path, small, tmp_path / "out", validation=0)
    assert len(shard(path, small, tmp_path / "out", validation=0)["train"]["documents"]) == 2


@pytest.mark.parametrize(
    ("texts", "validation", "message"),
    [
        (["", " \n"], 0, r"no document is left to train on \(left out: \{'empty': 2\}\)"),
        (["a", "b"], 0.001, "a validation share of 0.001 holds out none of these few documents; raise it"),
        (["a"], 1.5, "validation is 1.5; give a share of the documents from 0 to below 1, or a source"),
    ],
)
def test_sets_that_would_be_empty_are_refused(tmp_path, small, texts, validation, message):
    with pytest.raises(DataError, match=message):
        shard(write_documents(tmp_path / "t.jsonl", texts), small, tmp_path / "out", validation=validation)
    shard(
        write_documents(tmp_path / "t.jsonl", ["a", "b"]), small, tmp_path / "out", validation=0
    )  # nothing is in the way


def test_what_was_begun_with_a_held_out_share_may_go_on_without_one(tmp_path, small):
    path = write_documents(tmp_path / "t.jsonl", [row["text"] for row in corpus(29)])
    with path.open("a") as file:
        file.write('{"TEXT": "of a wrong name"}')
    with pytest.raises(DataError, match="no column 'text'"):
        shard(path, small, tmp_path / "out", validation=0.5)
    (tmp_path / "out/validation").mkdir(exist_ok=True)  # a kill leaves it, and files that nothing tells of
    (tmp_path / "out/validation/tokens-00000.bin").write_bytes(b"0")
    sets = shard(write_documents(tmp_path / "t.jsonl", ["a", "b"]), small, tmp_path / "out", validation=0)
    assert list(sets) == ["train"] and not (tmp_path / "out/validation").exists()


def test_an_incomplete_or_damaged_copy_does_not_verify(tmp_path, small, capsys):
    path = write_corpus(tmp_path / "c.jsonl", 29)
    shard(path, small, tmp_path / "out", validation=0.3, by_source=True)
    verify(tmp_path / "out")
    assert capsys.readouterr().out.count("as they were written") == 6
    manifest = tmp_path / "out/train/web/manifest.json"
    whole = json.loads(manifest.read_text())

    def refused(text: str):
        return pytest.raises(DataError, match=text)

    manifest.unlink()
    with refused(r"out: the set train/web, of which progress\.json tells, is missing; copy it again"):
        verify(tmp_path / "out")
    for lacking in ({"n_documents": None}, {"files": [{"name": "x"}]}):
        manifest.write_text(json.dumps(whole | lacking))
        with refused("manifest.json: damaged, some of what it has to say is missing"):
            verify(tmp_path / "out")
    manifest.write_text(json.dumps(whole | {"n_documents": 10**6}))
    with refused(r"offsets.bin: it does not hold the 1,000,001 numbers of manifest\.json"):
        verify(tmp_path / "out")
    manifest.write_text(json.dumps(whole))
    progress = tmp_path / "out/progress.json"
    written = progress.read_text()
    for damaged in (written[:-9], "[]", "{}", '{"parts": 3}'):
        progress.write_text(damaged)
        with refused("out/progress.json: (damaged|not valid JSON|holds a JSON list).*(copy it again|object)"):
            verify(tmp_path / "out")
    progress.write_text(written)
    shutil.rmtree(tmp_path / "out/tokenizer")
    other = learn_llama3([text.encode() for text in ("other text " * 9, "of another kind")], 280, n_special=11)
    (tmp_path / "out/tokenizer").mkdir()
    other.save(tmp_path / "out/tokenizer")
    with refused(r"out/tokenizer: not the tokenizer that made .*out/.*; copy it again"):
        verify(tmp_path / "out")


def test_held_out_sets_are_not_trained_on_for_want_of_the_tokenizer(tmp_path, small):
    texts = [row["text"] for row in corpus(29)]
    shard(write_documents(tmp_path / "t.jsonl", texts), small, tmp_path / "out", validation=0.3)
    shutil.rmtree(tmp_path / "out/tokenizer")
    with pytest.raises(DataError, match="out: sets of train and validation side by side, and no directory 'tokenizer'"):
        open_splits(tmp_path / "out")


def test_an_id_past_the_vocabulary_is_damage(tmp_path, small):
    train = shard(write_documents(tmp_path / "t.jsonl", ["a text"]), small, tmp_path / "out", validation=0)["train"][
        "documents"
    ]
    tokens = tmp_path / "out/train/tokens-00000.bin"
    tokens.write_bytes(np.full(train.n_tokens, 60_000, "<u2").tobytes())
    with pytest.raises(DataError, match=r"document 0 has the id 60000, of a vocabulary of 311; the files are damaged"):
        Shards(tmp_path / "out/train").tokens(0)


@pytest.mark.parametrize("finished", [False, True])
def test_sources_that_have_changed_since_are_refused(tmp_path, small, monkeypatch, finished):
    path = write_corpus(tmp_path / "c.jsonl", 29)
    os.utime(path, (2e9, 2e9))  # of a machine whose clock is fast
    with monkeypatch.context() as patch, nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        if not finished:
            patch.setattr(ShardWriter, "finish", raise_interrupt)
        shard(path, small, tmp_path / "out", validation=0)
    before = path.read_text()
    path.write_text(before.replace("Document", "DOCUMENT"))
    with pytest.raises(DataError, match=r"was begun with files = .*, the last changed at 2033-05-18 .*, now it is"):
        shard(path, small, tmp_path / "out", validation=0)
    path.write_text(before)
    os.utime(path, (2e9, 2e9))
    shard(path, small, tmp_path / "out", validation=0)


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_any_name_of_a_source_is_shown(tmp_path, small, monkeypatch, capsys):
    row = {"text": "a text", "source": "[/INST]"}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    small.save(made(tmp_path / "tokenizer"))
    monkeypatch.chdir(tmp_path)
    command = ["shard", "c.jsonl", "--tokenizer", "tokenizer", "--out", "out", "--by-source", "--validation", "0"]
    assert cli.main(command) == 0
    assert "[/INST]" in capsys.readouterr().out


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_splits_are_found_wherever_they_lie(tmp_path, small, monkeypatch):
    texts = [row["text"] for row in corpus(29)]
    documents = [(t, ("train", "web")[i % 2]) for i, t in enumerate(texts)]
    for out, share in (("both", 0.3), ("whole", 0), ("other", 0.3)):
        shard(write_documents(tmp_path / "t.jsonl", documents), small, tmp_path / out, validation=share, by_source=True)

    def found(*places: str) -> list[list[str]]:
        splits = open_splits(*(tmp_path / place for place in places))
        return [[str(s.directory.relative_to(tmp_path)) for s in sets.values()] for sets in splits]

    held_out = ["both/validation/train", "both/validation/web"]
    assert found("both") == found("both/train") == [["both/train/train", "both/train/web"], held_out]
    assert found("both/train/train") == [["both/train/train"], []]  # a source that is called so
    assert found("whole") == [["whole/train/train", "whole/train/web"], []]
    monkeypatch.chdir(tmp_path / "both/train")
    assert [len(sets) for sets in open_splits(".")] == [2, 2]
    (tmp_path / "more").mkdir()
    shutil.copytree(tmp_path / "both/tokenizer", tmp_path / "more/tokenizer")
    for split in ("train", "validation"):
        shutil.copytree(tmp_path / "both" / split, tmp_path / "more/wiki" / split)
    assert [len(sets) for sets in found("more/wiki/train")] == [2, 2]  # the tokenizer lies above
    with pytest.raises(DataError, match=r"whole/train/train, to validate on, is .*whole/train/train, which is trained"):
        found("whole", "whole/train")
    assert found("whole", "both") == found("whole", "both/validation") == [found("whole")[0], held_out]
    manifest = tmp_path / "other/validation/web/manifest.json"
    manifest.write_text(manifest.read_text().replace(small.fingerprint, "f" * 64))
    (tmp_path / "other/validation/train/manifest.json").unlink()
    with pytest.raises(DataError, match=r"web, to validate on, was made with another tokenizer than .*train/train; "):
        found("both", "other")


@pytest.mark.parametrize(("named", "place"), [(["out/x"], "out/x"), ([], "out")])  # Linux names no file
def test_a_full_disk_is_named_with_the_remedy(tmp_path, small, monkeypatch, named, place):
    def full(*_):
        raise OSError(28, "No space left on device", *(str(tmp_path / name) for name in named))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DataError,
        match=f"{place}: No space left on device; free disk space, or write elsewhere, and run again: it goes on from",
    ):
        shard(write_documents(tmp_path / "t.jsonl", ["a"]), small, tmp_path / "out", validation=0)


def test_sets_that_are_not_whole_or_not_there_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere: no token shards here \(no manifest.json\); `arriero shard` makes them"
    ):
        open_sources(tmp_path / "nowhere")
    write_shards(tmp_path / "sets/train/web", [5, 7, 11])
    with pytest.raises(
        DataError, match=r"sets: no token shards here \(no manifest.json\); did you mean .*sets/train\?"
    ):
        open_sources(tmp_path / "sets")
    write_shards(tmp_path / "sets/train", [5, 7, 11])
    Shards(tmp_path / "sets/train")
    tokens = tmp_path / "sets/train/tokens-00001.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(
        DataError, match=r"tokens-00001.bin has 34 bytes, the manifest says 36 bytes; copy the set again"
    ):
        Shards(tmp_path / "sets/train")
    tokens.write_bytes(b"\xff" + whole[1:])
    Shards(tmp_path / "sets/train")
    with pytest.raises(DataError, match=r"tokens-00001.bin: its SHA-256 is [0-9a-f]{16}\.\.\., the manifest says"):
        verify(tmp_path / "sets")
    tokens.write_bytes(whole)
    Shards(tmp_path / "sets/train").verify()
    tokens.unlink()
    with pytest.raises(DataError, match=r"tokens-00001.bin is missing"):
        Shards(tmp_path / "sets/train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "arriero-shards-9"}', "its format is 'arriero-shards-9', this version reads 'arriero-shards-1'"),
        ("[]", "holds a JSON list; an object is expected"),
        ('{"format": ', "not valid JSON"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Shards(tmp_path)


def test_a_name_in_a_manifest_that_no_file_can_have_is_refused(tmp_path):
    write_shards(tmp_path / "set", [5, 7])
    manifest = tmp_path / "set/manifest.json"
    manifest.write_text(manifest.read_text().replace("tokens-00000.bin", "tokens-0" * 60 + ".bin"))
    with pytest.raises(DataError, match=r"tokens-0\.bin: cannot be read \(File name too long\); copy the set again"):
        Shards(tmp_path / "set")


def test_sets_made_apart_are_put_together_by_the_names_of_their_directories(tmp_path):
    for i, name in enumerate(("machine 2", "machine 1", "a%2Fb")):
        write_shards(tmp_path / name, [5, 7 + i], "documents")
    sources = open_sources(tmp_path)
    assert [(name, shards.n_tokens) for name, shards in sources.items()] == [
        ("a/b", 14), ("machine 1", 13), ("machine 2", 12),
    ]  # fmt: skip
    assert list(open_sources(tmp_path / "machine 1")) == ["documents"]


def test_sources_of_different_tokenizers_are_not_mixed(tmp_path):
    write_shards(tmp_path / "sets/a", [5, 7], "a")
    write_shards(tmp_path / "sets/b", [5, 7], "b")
    manifest = tmp_path / "sets/b/manifest.json"
    manifest.write_text(manifest.read_text().replace("0" * 64, "1" * 64))
    with pytest.raises(DataError, match=r"sets/a and .*sets/b were made with different tokenizers; shard both"):
        open_sources(tmp_path / "sets")


def test_the_tokenizer_of_a_set_that_was_moved_away_from_it_is_missed(tmp_path):
    with pytest.raises(DataError, match=r"no directory 'tokenizer' above it; keep the set where"):
        _ = write_shards(tmp_path / "set", [3]).tokenizer_directory


def test_large_vocabularies_take_four_bytes_a_token(tmp_path):
    shards = write_shards(tmp_path / "big", [11, 13], first=2**16 + 1)
    assert shards.tokens(1).dtype == np.uint32 and shards.tokens(1).tolist() == list(range(65_548, 65_561))
