"""A GGUF file that says of itself what cannot be: refused by name, before anything of such a size is made."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest
from helpers.mutate import encode_gguf

from arriero.checkpoint.gguf import open_gguf
from arriero.errors import CheckpointError
from arriero.io.gguf_header import read_header

UINT32, INT32, FLOAT32, STRING, ARRAY, UINT64 = 4, 5, 6, 8, 9, 10
PAIRS = [
    (b"general.architecture", STRING, b"llama"),
    (b"tokenizer.ggml.tokens", ARRAY, (STRING, [b"a", b"b"])),
    (b"tokenizer.ggml.token_type", ARRAY, (INT32, [1, 3])),
]
TENSORS = [("a.weight", [32, 2], 0, 0), ("b.weight", [32], 0, 256)]
BODY = bytes(256 + 128)


def written(folder: Path, pairs=PAIRS, tensors=TENSORS, body=BODY) -> Path:
    file = folder / "m.gguf"
    file.write_bytes(encode_gguf(pairs, tensors, body)[0])
    return file


def test_the_file_of_these_tests_is_one_that_the_gguf_package_reads(tmp_path):
    reader = gguf.GGUFReader(written(tmp_path))
    header = read_header(tmp_path / "m.gguf")
    assert header.metadata == {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    assert {n: (t.shape, t.start) for n, t in header.tensors.items()} == {
        t.name: (tuple(map(int, reversed(t.shape))), t.data_offset) for t in reader.tensors
    }


HUGE = [2**31, 2**40, 2**63 - 1, 2**64 - 1]


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("tensors", "tensors go beyond its end"),
        ("pairs", "entries go beyond its end"),
        ("key", "bytes of a text go beyond its end"),
        ("text", "bytes of a text go beyond its end"),
        ("texts", "texts of 'tokenizer.ggml.tokens' go beyond its end"),
        ("numbers", "values of 'tokenizer.ggml.token_type' go beyond its end"),
    ],
)
def test_a_count_or_length_beyond_the_file_is_refused_before_anything_is_made(place, what, huge, tmp_path):
    file = written(tmp_path)
    data = bytearray(file.read_bytes())
    at = {
        "tensors": 8,
        "pairs": 16,
        "key": 24,
        "text": data.index(b"llama") - 8,
        "texts": data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8,
        "numbers": data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8,
    }[place]
    data[at : at + 8] = struct.pack("<Q", huge)
    file.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"m\.gguf: damaged or cut short: {huge:,} {what} \(near byte "):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("pairs", "what"),
    [
        ([*PAIRS, (b"general.architecture", STRING, b"qwen3")], "the key 'general.architecture' stands in it twice"),
        ([(b"general.alignment", UINT32, 24)], "general.alignment is 24; it must be a power of two"),
        ([(b"general.alignment", UINT32, 0)], "general.alignment is 0; it must be a whole number from 1"),
        ([(b"general.alignment", STRING, b"32")], 'general.alignment is "32"; it must be a whole number'),
        ([(b"split.count", FLOAT32, 2.0)], "split.count is 2.0; it must be a whole number"),
        ([(b"split.count", UINT32, 3)], "one of 3 parts; join them"),
        ([(b"a", ARRAY, (ARRAY, [(UINT32, [1])]))], "damaged: 'a' is of the type 9"),
        ([(b"a", STRING, b"\xff\xfe")], r"damaged: the text b'\xff\xfe' is not UTF-8"),
        ([(b"\xff", UINT32, 1)], r"damaged: the text b'\xff' is not UTF-8"),
    ],
)
def test_entries_that_cannot_be_are_refused(pairs, what, tmp_path):
    with pytest.raises(CheckpointError) as error:
        read_header(written(tmp_path, pairs))
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ([TENSORS[0], ("a.weight", [32], 0, 256)], "the tensor 'a.weight' stands in it twice"),
        ([("a", [2] * 5, 0, 0)], "damaged: the tensor 'a' has 5 dimensions; GGUF knows 4 at most"),
        ([("a", [2] * 2**10, 0, 0)], "damaged: the tensor 'a' has 1,024 dimensions"),
        ([("a", [32], 0, 4)], "begins at byte 4 of the data, which is beyond its end, or no multiple of 32"),
        ([("a", [32], 0, 2**40)], "begins at byte 1,099,511,627,776 of the data, which is beyond"),
        ([("a", [2**63, 2**63], 0, 0)], "cut short: tensor a reaches past its end"),
        ([("a", [31], 8, 0)], "tensor a is [31], and its type Q8_0 has blocks of 32 in a row"),
        ([("a", [32], 99, 0)], "tensor a has type 99, which the gguf package cannot dequantise"),
        ([TENSORS[0], ("b.weight", [32], 0, 224)], "the tensors a.weight and b.weight overlap"),
        ([("b.weight", [32], 0, 0), TENSORS[0]], "the tensors b.weight and a.weight overlap"),
    ],
)
def test_tensors_that_cannot_be_are_refused(tensors, what, tmp_path):
    with pytest.raises(CheckpointError) as error:
        open_gguf(written(tmp_path, tensors=tensors))
    assert what in str(error.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = written(tmp_path).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: "):
            open_gguf(tmp_path / "cut.gguf")
