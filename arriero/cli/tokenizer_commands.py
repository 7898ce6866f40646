"""The implementation of `arriero tokenizer encode`, `compare` and `extend`: reading, printing and tables."""

from __future__ import annotations

import io
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

from arriero.cli import tokenizer_tables as show
from arriero.errors import DataError, check
from arriero.io.files import json_text, split_lines
from arriero.show.progress import counting, progress
from arriero.show.terminal import output, say
from arriero.tokenizer.base import Tokenizer, utf8
from arriero.tokenizer.compare import By, compare, group_of
from arriero.tokenizer.extend import Extension, backend_of, extend
from arriero.tokenizer.sample import draw_sample

View = Literal["ids", "count", "show", "decode"]
MOST = (
    100_000_000  # characters that are encoded as one text, which takes some gigabytes; a device or pipe may never end
)


def run_encode(
    tokenizer: Tokenizer,
    words: Sequence[str],
    file: Path | None,
    view: View,
    *,
    lines: bool = False,
    special: bool = False,
    bos: bool = False,
    eos: bool = False,
) -> None:
    """Print what `view` asks for, of the words given, of a file, or of standard input."""
    with closing(_texts(words, file, lines or view == "decode")) as texts:  # a refusal leaves no file open
        if view == "decode":
            for text in texts:
                say(tokenizer.decode(_ids(text, tokenizer.vocab_size), skip_special=not special))
        else:
            _print_encoded(tokenizer, texts, view, lines=lines, special=special, bos=bos, eos=eos)


def _print_encoded(
    tokenizer: Tokenizer, texts: Iterable[str], view: View, *, lines: bool, special: bool, bos: bool, eos: bool
) -> None:
    before = [tokenizer.bos_id] if bos else []
    after = [tokenizer.eos_id] if eos else []
    tokenizer.encode("", bos=bos, eos=eos)  # refuses what the tokenizer lacks
    total = 0
    for text in texts:
        ids = tokenizer.encode_rendered(text) if special else tokenizer.encode(text)
        ids = [i for i in (*before, *ids, *after) if i is not None]
        total += len(ids)
        if view == "ids":
            print(" ".join(map(str, ids)))
        elif view == "show":
            _show(tokenizer, text, ids)
        elif lines:
            print(len(ids))
    if view == "count" and not lines:
        print(total)


def _show(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> None:
    console = output()
    console.print(show.token_view(tokenizer, ids, colour=console.is_terminal), soft_wrap=True, highlight=False)
    console.print(" ".join(map(str, ids)), soft_wrap=True, highlight=False)
    n_bytes = len(text.encode("utf-8", "replace"))
    console.print(
        f"{len(ids)} tokens, {len(text)} characters, {n_bytes} bytes ({n_bytes / max(len(ids), 1):.2f} a token)",
        soft_wrap=True,
        highlight=False,
    )


def _texts(words: Sequence[str], file: Path | None, lines: bool) -> Generator[str, None, None]:
    """Yield the texts to encode. Bytes that are not UTF-8 come out as U+FFFD; a byte order mark is no text.

    Raises `DataError` for a file that cannot be read, and for a text or line of more than `MOST` characters.
    """
    if words:
        whole = " ".join(words)
        yield from split_lines(whole) if lines else [whole]
        return
    try:
        source = sys.stdin.buffer if file is None else file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from error
    with io.TextIOWrapper(source, "utf-8-sig", "replace", newline=None if lines else "") as text:
        if not lines:
            yield _bounded(text.read(MOST + 1), file, "in lines (--lines), or make token shards of it (arriero shard)")
        while lines and (line := text.readline(MOST + 1)):
            yield _bounded(line, file, "in shorter lines").removesuffix("\n")


def _bounded(text: str, file: Path | None, remedy: str) -> str:
    if len(text) > MOST:
        raise DataError(f"{file or 'standard input'}: more than {MOST:,} characters in one text; give it {remedy}")
    return text


def _ids(text: str, vocab_size: int) -> list[int]:
    ids = []
    for word in text.replace(",", " ").replace("[", " ").replace("]", " ").split():
        if not word.isdecimal() or int(word) >= vocab_size:
            raise DataError(f"{word!r} is not an id of this tokenizer; ids are whole numbers below {vocab_size}")
        ids.append(int(word))
    return ids


def run_compare(
    tokenizers: Mapping[str, Tokenizer],
    documents: Iterable[tuple[str, str]],
    by: By,
    limit: int,
    *,
    as_json: bool,
) -> None:
    """Print a comparison on the first `limit` bytes of (source, text) documents, as a table or as JSON."""
    check(bool(tokenizers), "no tokenizer is given; name one or more, as in: arriero tokenizer compare A B --data FILE")
    check(limit > 0, f"limit is {limit}; give a positive number of bytes")
    with counting("encoding") as count:

        def grouped() -> Iterator[tuple[str, str]]:
            left = limit
            for source, text in documents:
                if left <= 0:
                    return
                data = utf8(text)
                if len(data) > left:
                    text = data[:left].decode("utf-8", "ignore")
                left -= len(data)
                count(len(data))
                yield group_of(by, text, source), text

        results = compare(tokenizers, grouped())
    if as_json:
        print(json_text([result.as_dict() for result in results]))
    else:
        output().print(show.comparison_view(results))


def run_extend(base: Tokenizer, texts: Iterable[str], n_new: int, limit: int) -> Extension:
    """Sample the texts and learn from them, with progress shown."""
    backend_of(base)  # refuses the wrong kind before anything is read
    with counting("reading") as count:
        sample = draw_sample(texts, limit, count)
    with progress(f"learning {n_new:,} tokens from {sample.training_bytes / 1e6:,.1f} MB"):
        return extend(base, (data.decode() for data in sample.training), n_new)
