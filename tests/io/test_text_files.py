"""Text with every kind of line end and separator, through every reader: the same text comes out, no line too many."""

import csv
import io
import json

import numpy as np
import pytest

from arriero.cli.tokenizer_commands import _texts
from arriero.curate.sources import read_documents
from arriero.curate.steps.decontaminate import evaluation_texts
from arriero.errors import DataError
from arriero.io.files import read_text
from arriero.io.records import read_records

MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"  # at each of which str.splitlines ends a line
TEXTS = [ODD, "one\r\ntwo\r\n", "one\rtwo", "one\ntwo\n", f"{ODD}\r\n{ODD}"]


def as_csv(texts, delimiter=","):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in texts)])
    return file.getvalue().encode()


FILES = {
    "a.jsonl": lambda texts: b"".join(json.dumps({"text": t}, ensure_ascii=False).encode() + b"\n" for t in texts),
    "crlf.jsonl": lambda texts: b"".join(json.dumps({"text": t}, ensure_ascii=False).encode() + b"\r\n" for t in texts),
    "cr.jsonl": lambda texts: b"".join(json.dumps({"text": t}, ensure_ascii=False).encode() + b"\r" for t in texts),
    "a.json": lambda texts: json.dumps([{"text": t} for t in texts], ensure_ascii=False).encode(),
    "a.csv": as_csv,
    "a.tsv": lambda texts: as_csv(texts, "\t"),
}


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("name", FILES)
def test_rows_of_every_container_keep_the_line_ends_in_their_texts(tmp_path, name, mark):
    file = tmp_path / name
    file.write_bytes(mark + FILES[name](TEXTS))
    assert [document.text for document in read_documents([file])] == TEXTS


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_file_is_its_own_bytes_in_every_reader(tmp_path, text, mark):
    file = tmp_path / "a.txt"
    file.write_bytes(mark + text.encode())
    assert read_text(file) == text
    assert [document.text for document in read_documents([file])] == [text]
    assert list(_texts([], file, lines=False)) == [text]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_counted_alike_wherever_they_matter(tmp_path, end):
    file = tmp_path / "a.txt"
    file.write_bytes(MARK + end.join([ODD, "two", "", "four"]).encode())
    assert list(_texts([], file, lines=True)) == list(_texts([read_text(file)], None, lines=True))
    assert list(_texts([], file, lines=True)) == [ODD, "two", "", "four"]
    found = [(item.row, text) for item, text in evaluation_texts((str(file),))]
    assert found == [(1, ODD), (2, "two"), (3, ""), (4, "four")]


def test_what_is_not_utf8_is_refused_with_its_place(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(MARK + "é".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 3; convert it, for example with iconv"):
        read_text(file)
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\); give a text file"):
        read_text(tmp_path / "none.txt")


def test_the_share_that_is_read_is_never_far_behind(tmp_path):
    lines = [b'{"a": "%s"}\n' % (b"x" * (i * 7 % 1999)) for i in range(997)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    size = sum(map(len, lines))
    behind = np.cumsum([len(line) for line in lines]) - [r.done * size for r in read_records(tmp_path / "a.jsonl")]
    assert behind.min() >= -1e-3 and 1 << 14 < behind.max() < 1 << 16
