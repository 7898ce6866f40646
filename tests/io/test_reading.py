"""What libraries raise over a file is the file's fault, and JSON of any kind is read or refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from arriero.errors import CheckpointError, DataError
from arriero.io.reading import read_json, reading


class PanicException(BaseException):
    """What a Rust library raises where it panics."""


FAULTS = [
    ValueError("a\n b"),
    KeyError("x"),
    Exception("bare"),
    PanicException("index out of bounds"),
    EOFError(),
    RecursionError("deep"),
    pickle.UnpicklingError("no"),
    OverflowError("big"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_whatever_a_library_raises_names_the_file_and_the_remedy(fault):
    said = " ".join(str(fault).split()) or type(fault).__name__
    with pytest.raises(DataError) as error, reading("a.bin", "damaged", "fetch it again", DataError):
        raise fault
    assert str(error.value) == f"a.bin: damaged ({said}); fetch it again"
    assert error.value.__cause__ is fault


def test_memory_and_the_system_have_their_own_words(tmp_path):
    with pytest.raises(CheckpointError, match=r"^f: damaged .*more memory than there is\); copy"), reading("f"):
        bytearray(2**62)
    with pytest.raises(CheckpointError, match=r"^f: cannot be read \(Is a directory\); copy or"), reading("f"):
        tmp_path.read_bytes()


def test_a_long_error_is_cut():
    with pytest.raises(CheckpointError) as error, reading("f"):
        raise ValueError("x" * 10_000)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("passing", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_the_process_passes(passing):
    with pytest.raises(passing), reading("f"):
        raise passing


def test_a_refusal_passes_as_it_is():
    with pytest.raises(DataError, match=r"^mine$"), reading("f"):
        raise DataError("mine")


def test_real_libraries(tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff" * 100)
    for call in (lambda f: Tokenizer.from_file(str(f)), lambda f: safe_open(f, "pt").__enter__()):
        with pytest.raises(CheckpointError, match=r"bad: damaged or cut short \("), reading(tmp_path / "bad"):
            call(tmp_path / "bad")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"[" * 100_000, r"its JSON is nested too deeply; copy"),
        (b'{"a":' * 100_000, r"its JSON is nested too deeply; copy"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"not valid JSON \(Exceeds the limit"),
        (b'{"a": 1', r"not valid JSON \(Expecting"),
        (b"", r"not valid JSON \(Expecting value"),
        (b"\xff\xfe{", r"not UTF-8 \('utf-8' codec"),
        (b"[1]", r"holds a JSON list; an object is expected"),
        (b"null", r"holds a JSON NoneType; an object is expected"),
    ],
)
def test_json_that_is_none_is_refused(content: bytes, what: str, tmp_path: Path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.json: {what}"):
        read_json(tmp_path / "a.json")


def test_json_that_is_there_and_that_is_not(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert read_json(tmp_path / "b.json", missing={"x": 2}) == {"x": 2}
    with pytest.raises(DataError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json", refusal=DataError)
