"""C++ that is compiled on first use."""

from __future__ import annotations

import ctypes

import pytest

from arriero.system.cpp import load_cpp


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "number.h").write_text("constexpr int number = 3;\n")
    path = tmp_path / "give.cpp"
    path.write_text('#include "number.h"\nextern "C" int give() { return number; }\n')
    return path


def given(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return int(library.give())


def test_a_header_that_changed_is_compiled_anew(source):
    assert given(load_cpp(source, "waiting")) == 3
    source.with_name("number.h").write_text("constexpr int number = 4;\n")
    assert given(load_cpp(source, "waiting")) == 4


def test_who_watches_is_told_once_that_something_is_compiled(source, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for _ in range(2):
        load_cpp(source, "waiting")
    assert capsys.readouterr().err == "compiling give.cpp for this machine, once: some seconds\n"


def test_what_does_not_compile_is_said_with_what_happens_instead(source, caplog):
    source.write_text("not C++")
    assert load_cpp(source, "doing it in torch") is None
    assert "give.cpp could not be compiled, doing it in torch" in caplog.text
