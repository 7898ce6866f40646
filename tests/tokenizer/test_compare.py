"""Measures of tokenizers, counted by hand and by the slow way; and what the commands print."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from helpers.tokenizers import hard_strings, python_source, small_sentencepiece, train_sentencepiece

from arriero import cli
from arriero.cli import tokenizer_commands
from arriero.cli.tokenizer_tables import token_view
from arriero.errors import DataError
from arriero.tokenizer import Tokenizer, load_tokenizer
from arriero.tokenizer.compare import ALL, Measure, compare, fallback_ids, measure
from arriero.tokenizer.train import learn_llama3


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return learn_llama3([python_source("argparse").encode()], 503, n_special=11)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("pieces"), 701))


def test_what_is_counted_can_be_checked_on_paper():
    tokenizer = small_sentencepiece()  # pieces: bytes, "▁Hi</s>elo", and "▁Hi", "Hello", ...
    m = measure(tokenizer, ["Hi Hi", "Hé", ""])
    # "▁Hi ▁Hi", "▁ H <C3> <A9>", nothing
    assert m == Measure(documents=3, bytes=5 + 3, characters=5 + 2, words=2 + 1, tokens=2 + 4, unknown=0, fallback=2)
    assert m.bytes_per_token == 8 / 6 and m.characters_per_token == 7 / 6 and m.fertility == 2
    assert m.fallback_share == 2 / 6 and m.unknown_share == 0
    assert m.as_dict()["bytes_per_token"] == 1.3333


def test_measures_are_those_of_counting_one_by_one(byte_level, pieces):
    strings = [s for s in hard_strings(503) if not any("\ud800" <= c <= "\udfff" for c in s)]
    for tokenizer in (byte_level, pieces):
        m, rows = measure(tokenizer, strings), [tokenizer.encode(s) for s in strings]
        table = fallback_ids(tokenizer)
        assert m.tokens == sum(map(len, rows)) and m.documents == len(strings)
        assert m.bytes == sum(len(s.encode()) for s in strings) and m.characters == sum(map(len, strings))
        assert m.words == sum(len(s.split()) for s in strings)
        assert m.fallback == sum(bool(table[i]) for row in rows for i in row) > 0


def test_fallback_tokens_are_byte_pieces_or_parts_of_characters(byte_level, pieces, tmp_path):
    assert {i for i, odd in enumerate(fallback_ids(pieces)) if odd} == set(range(3, 259))
    pieces.save(tmp_path)
    assert (fallback_ids(load_tokenizer(tmp_path)) == fallback_ids(pieces)).all()
    table = fallback_ids(byte_level)
    assert not table[ord("a")] and table[0xC3] and not table[byte_level.encode(" self")[0]]


def test_groups_add_up_to_the_whole(byte_level, pieces):
    documents = [("code", python_source("typing")), ("prose", "The quick brown fox. " * 101), ("code", "x = 1\n" * 17)]
    results = compare({"a": byte_level, "b": pieces}, iter(documents))
    assert [r.name for r in results] == ["a", "b"]
    for result in results:
        assert list(result.groups) == [ALL, "code", "prose"] and result.mb_per_s > 0
        assert result.groups["code"] + result.groups["prose"] == result.groups[ALL]
        assert result.groups["code"].documents == 2
    one = compare({"a": byte_level}, [("code", "x = 1")])
    assert list(one[0].groups) == [ALL, "code"] and one[0].groups["code"] == one[0].groups[ALL]
    with pytest.raises(DataError, match="there is no text to measure on; check the file and its text column"):
        compare({"a": byte_level}, [])


def test_tokens_are_shown_with_their_spaces_ends_and_bytes(byte_level, smollm2_gguf):
    tokenizer = load_tokenizer(smollm2_gguf)
    ids = tokenizer.encode("Hi there\n", bos=True)
    assert token_view(tokenizer, ids, colour=False) == "<|im_start|>|Hi|·there|⏎\n"
    assert token_view(tokenizer, ids).plain == "<|im_start|>Hi·there⏎\n"
    assert token_view(byte_level, byte_level.encode("é\t"), colour=False) == "<C3>|<A9>|→\t"


# The commands, run as a user runs them.


@pytest.fixture(scope="module")
def directory(byte_level, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    byte_level.save(out)
    return out


def run(capsys, monkeypatch, *args: str, stdin: bytes = b"") -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    code = cli.main(["tokenizer", *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_encode_and_decode_are_a_pipe_and_back(directory, byte_level, capsys, monkeypatch):
    name = str(directory)
    code, ids, _ = run(capsys, monkeypatch, "encode", name, "return self", "x")
    assert code == 0 and ids.split() == [str(i) for i in byte_level.encode("return self x")]
    assert run(capsys, monkeypatch, "encode", name, "--decode", stdin=ids.encode())[1] == "return self x\n"
    assert run(capsys, monkeypatch, "encode", name, "--decode", "[1, 2]", "3")[1] == byte_level.decode([1, 2, 3]) + "\n"
    text = "one\ntwo words\n"
    whole = run(capsys, monkeypatch, "encode", name, "--ids", stdin=text.encode())[1]
    assert whole.split() == [str(i) for i in byte_level.encode(text)]
    lines = run(capsys, monkeypatch, "encode", name, "--lines", stdin=text.encode())[1]
    assert run(capsys, monkeypatch, "encode", name, "--decode", stdin=lines.encode())[1] == text


def test_encode_counts_shows_and_reads_files(directory, byte_level, capsys, monkeypatch, tmp_path):
    name, file = str(directory), tmp_path / "text.txt"
    file.write_bytes(b"return self\n\xff\n")
    n = len(byte_level.encode("return self\n\ufffd\n"))
    assert run(capsys, monkeypatch, "encode", name, "--count", "--file", str(file))[1] == f"{n}\n"
    counts = run(capsys, monkeypatch, "encode", name, "--count", "--lines", "--file", str(file))[1]
    assert counts.split() == [str(len(byte_level.encode(line))) for line in ("return self", "\ufffd")]
    shown = run(capsys, monkeypatch, "encode", name, "--show", "self.é")[1].splitlines()
    assert shown[0] == "self|.|<C3>|<A9>" and shown[2] == "4 tokens, 6 characters, 7 bytes (1.75 a token)"
    special = run(capsys, monkeypatch, "encode", name, "<|eot_id|>", "--special", "--bos")[1]
    assert special.split() == [str(byte_level.bos_id), str(byte_level.special_ids["<|eot_id|>"])]
    assert run(capsys, monkeypatch, "encode", name, "--decode", "--special", special.strip())[1].endswith(
        "<|eot_id|>\n"
    )


def test_encode_refuses_what_it_cannot_read(directory, capsys, monkeypatch):
    name = str(directory)
    code, _, err = run(capsys, monkeypatch, "encode", name, "--decode", "12 x1")
    assert code == 2 and "'x1' is not an id of this tokenizer; ids are whole numbers below 503" in err
    assert "--ids and --count: give one of them" in run(capsys, monkeypatch, "encode", name, "a", "--ids", "--count")[2]
    assert (
        "nowhere.txt: cannot be read (No such file"
        in run(capsys, monkeypatch, "encode", name, "--file", "nowhere.txt")[2]
    )
    assert "give one of them" in run(capsys, monkeypatch, "encode", name, "a", "--file", "b")[2]


@pytest.mark.parametrize("flags", [[], ["--lines"], ["--decode"]], ids=" ".join)
def test_a_file_without_end_is_refused(flags, directory, capsys, monkeypatch):
    monkeypatch.setattr(tokenizer_commands, "MOST", 10_000)
    code, _, err = run(capsys, monkeypatch, "encode", str(directory), "--file", "/dev/zero", *flags)
    remedy = r"in shorter lines" if flags else r"in lines \(--lines\), or make token shards of it \(arriero shard\)"
    assert code == 2 and re.search(rf"/dev/zero: more than 10,000 characters in one text; give it {remedy}", err)


def test_a_refusal_in_the_middle_of_a_file_leaves_it_closed(directory, monkeypatch, tmp_path):
    (tmp_path / "ids.txt").write_text("1 2\nx\n3\n")
    opened = []
    path_open = Path.open
    monkeypatch.setattr(Path, "open", lambda *a, **k: opened.append(path_open(*a, **k)) or opened[-1])
    with pytest.raises(DataError, match="'x' is not an id") as refusal:
        tokenizer_commands.run_encode(load_tokenizer(directory), [], tmp_path / "ids.txt", "decode")
    assert refusal.value.__traceback__ is not None and opened[-1].closed


def test_compare_prints_a_table_or_json(directory, capsys, monkeypatch, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"text": "Llamas hum when they are glad. " * 7, "source": "a"}, {"text": "Sie summen. " * 5, "source": "b"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["compare", str(directory), "smollm2-135m", "--data", str(data)]
    code, out, _ = run(capsys, monkeypatch, *args, "--json")
    results = json.loads(out)
    assert code == 0 and [r["name"] for r in results] == [str(directory), "smollm2-135m"]
    assert set(results[0]["groups"]) == {"all", "a", "b"} and results[1]["vocab_size"] == 49_152
    assert results[1]["groups"]["a"]["bytes_per_token"] > results[0]["groups"]["a"]["bytes_per_token"]
    table = run(capsys, monkeypatch, *args)[1]
    assert "all text" in table and "49,152" in table
    by_group = table[table.index("by group") :]
    for name in ("a", "b"):
        m = results[1]["groups"][name]
        row = [f"{m[key]:.3f}" for key in ("bytes_per_token", "characters_per_token", "fertility")]
        assert re.search(r"\s+".join(["smollm2-135m", *row, "0.00%"]), by_group)
    only = json.loads(run(capsys, monkeypatch, *args, "--json", "--by", "none")[1])
    assert set(only[0]["groups"]) == {"all"}
    languages = json.loads(run(capsys, monkeypatch, *args, "--json", "--by", "language")[1])
    assert set(languages[0]["groups"]) == {"all", "en", "de"}


def test_the_only_group_is_named_over_the_table(directory, capsys, monkeypatch, tmp_path):
    (tmp_path / "hymn.txt").write_text("Llamas hum when they are glad. " * 7)
    args = ["compare", str(directory), "--data", str(tmp_path / "hymn.txt")]
    assert "all text: hymn" in run(capsys, monkeypatch, *args)[1]
    assert "all text: en" in run(capsys, monkeypatch, *args, "--by", "language")[1]


def test_compare_reads_no_more_than_its_limit_and_refuses_what_it_cannot_do(directory, capsys, monkeypatch, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text("naïve llamas hum")
    args = ["compare", str(directory), "--data", str(data)]
    for limit, n_bytes in ((1, 1), (3, 2), (4, 4), (17, 17), (99, 17)):  # "ï" is the bytes 2 and 3
        out = run(capsys, monkeypatch, *args, "--json", "--limit", str(limit))[1]
        assert json.loads(out)[0]["groups"]["all"]["bytes"] == n_bytes
    assert "limit is 0; give a positive number of bytes" in run(capsys, monkeypatch, *args, "--limit", "0")[2]
    code, _, err = run(capsys, monkeypatch, "compare", "--data", str(data), str(directory))  # two files, so it seems
    assert code == 2 and "no tokenizer is given; name one or more" in err
    code, _, err = run(capsys, monkeypatch, "train", "--out", str(tmp_path / "out"))
    assert code == 2 and "no text is given; name a file" in err


def test_train_writes_a_directory_that_compare_opens(capsys, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text(python_source("argparse"))
    args = [
        "train",
        str(tmp_path / "a.txt"),
        "--vocab-size",
        "601",
        "--n-special",
        "11",
        "--out",
        str(tmp_path / "out"),
    ]
    code, out, err = run(capsys, monkeypatch, *args)
    assert code == 0, err
    assert "601 ids, 11 of them special" in out and "bytes per token" in out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "report.json", "chat_template.jinja"} <= names
    code, _, err = run(capsys, monkeypatch, *args)
    assert code == 2 and "exists already; choose another name, or give --force" in err
    assert run(capsys, monkeypatch, *args, "--force")[0] == 0
