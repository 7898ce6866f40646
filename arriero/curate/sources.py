"""Where documents come from: one stream over files of any kind, always in the same order.

    .txt .md .rst ...          a document each
    .html .htm                 the main text, found by resiliparse or trafilatura
    .warc .warc.gz             a document for each response or resource that is HTML or plain text, and each text of WET
    .jsonl .json .csv (.gz .zst .bz2 .xz) .parquet .arrow .feather    a document for each row, its text in the column
                               `text_key`
    .py .c .rs ...             source code, a document each
    a directory                these below it, sorted by path (.json and .csv only compressed, or where named
                               themselves, since they are seldom documents; links to directories are not followed);
                               of one that
                               `arriero curate` wrote, there or below, its shards
    stdlib                     the running Python's standard library (a document each file) and its manual's topics
    owner/name[:config]        a Hub data set

A source is listed once as `SourceFile`s; reading starts at any `Position` in that list, and yields each document with
the position after it. Nothing is held but one row (for text, HTML and code one file, for Parquet 64 rows). A row that
cannot be used raises `DataError`, which names it, or is handed to `on_error` and passed over.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from arriero.curate.document import Document
from arriero.curate.warc import BLANK_LINE, PassedOver, content_of
from arriero.curate.web import Extractor, decoded, main_text
from arriero.errors import DataError, require
from arriero.io.fields import shown
from arriero.io.paths import as_path, hint, lies_here
from arriero.io.reading import read_json
from arriero.io.records import (
    HUB_ID,
    Record,
    as_row,
    endings,
    hub_files,
    is_readable,
    parse_row,
    read_records,
    rows_within,
)
from arriero.show.terminal import warn_once
from arriero.tokenizer.base import well_formed

STDLIB = "stdlib"
MANIFEST = "manifest.json"  # of a curated directory; lists its shards
WORK, PLAN = ".work", "plan.json"  # what a curated directory holds until it is finished
KIND = "arriero curated corpus"  # how its manifest's format begins
PROSE = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc"})
HTML = frozenset({".html", ".htm", ".xhtml"})
WARC = (".warc", ".warc.gz", ".warc.wet.gz", ".warc.wet")
GZIP = b"\x1f\x8b"  # how packed files begin
CODE = frozenset({
    ".py", ".pyi", ".pyx", ".ipynb", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala",
    ".js", ".jsx", ".mjs", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".pl", ".pm", ".lua", ".r", ".jl", ".m",
    ".swift", ".cs", ".fs", ".hs", ".ml", ".mli", ".clj", ".ex", ".exs", ".erl", ".el", ".lisp", ".scm", ".sh", ".bash",
    ".zsh",    ".sql", ".proto", ".cmake", ".zig", ".d", ".dart", ".f90", ".asm", ".s", ".v", ".vhdl", ".css", ".scss",
})  # fmt: skip
PACKED = frozenset({".zip", ".tar", ".tgz", ".tbz", ".txz", ".7z", ".rar", ".lz4", ".br", ".z", ".lz", ".lzma", ".lzo"})
SELDOM_DOCUMENTS = (".json", ".csv", ".tsv")
SKIPPED_DIRECTORIES = frozenset({
    "site-packages", "dist-packages", "node_modules", "__pycache__", "build", "dist", "venv",
    "test", "tests", "testing", "idle_test", "_test",
})  # fmt: skip
NOT_LIBRARY = frozenset(
    {"idlelib", "turtledemo", "lib2to3", "pydoc_data"}
)  # of the standard library: programs and data


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. `name` identifies it in documents' ids: its path below what the user named."""

    path: Path
    name: str
    source: str
    kind: Literal["prose", "html", "warc", "rows", "code", "topics"]


class Position(NamedTuple):
    """How far reading has come: the file in the list, and its last row that was read (0: none)."""

    file: int = 0
    row: int = 0


START = Position()


@dataclass(frozen=True)
class Reading:
    """How documents are read."""

    text_key: str = "text"
    html: Extractor = "resiliparse"


def read_documents(
    sources: Sequence[str | Path],
    text_key: str = "text",
    *,
    html: Extractor = "resiliparse",
    on_error: Callable[[DataError], object] | None = None,
) -> Iterator[Document]:
    """Stream the documents of the sources, in order.

    A row or file that cannot be used raises DataError; with `on_error`, that is called with the error and reading
    continues.
    """
    files = list_files(sources)
    for document, _ in read_from(files, START, Reading(text_key, html), on_error=on_error):
        yield document


def read_from(
    files: Sequence[SourceFile],
    start: Position = START,
    reading: Reading = Reading(),
    *,
    on_error: Callable[[DataError], object] | None = None,
    on_passed: Callable[[PassedOver], object] = lambda passed: None,
) -> Iterator[tuple[Document, Position]]:
    """Stream the documents after `start`, each with the position to resume from after it.

    on_passed: gets each record of a web archive that is no document.
    """
    for index in range(start.file, len(files)):
        for row, found in read_file(files[index], start.row if index == start.file else 0, reading):
            if isinstance(found, Document):
                yield found, Position(index, row)
            elif isinstance(found, PassedOver):
                on_passed(found)
            elif on_error is None:
                raise found
            else:
                on_error(found)


def read_file(
    file: SourceFile, after: int = 0, reading: Reading = Reading()
) -> Iterator[tuple[int, Document | PassedOver | DataError]]:
    """Each row of a file after the one numbered `after`: its number, and its document or why there is none."""
    reader = {"rows": _read_rows, "warc": _read_warc, "topics": _read_topics}.get(file.kind, _read_whole)
    row = after
    try:
        for row, found in reader(file, after, reading):
            yield row, found
    except DataError as error:  # the file is damaged from here on
        yield row + 1, error
    except OSError as error:
        behind = f" after row {row}" if row else ""
        yield row + 1, DataError(f"{file.path}: cannot be read{behind} ({error}); fetch it again or remove it")


# Which files


def list_files(sources: Sequence[str | Path], passed_over: Counter[str] | None = None) -> list[SourceFile]:
    """The files of the sources in order: sources as given, files of a directory sorted by path.

    passed_over: counts, by the ending of their names, the files of directories that are no documents.
    """
    files: list[SourceFile] = []
    names: set[str] = set()
    for source in sources:
        name = base = _name_of(source)
        count = 1
        while name in names:  # two sources may have the same last name, and ids are to differ
            count += 1
            name = f"{base}~{count}"
        names.add(name)
        files += _files_of(source, name, Counter() if passed_over is None else passed_over)
    return files


def _name_of(source: str | Path) -> str:
    path = as_path(source)
    return _utf8(path.resolve().name) if path.exists() else str(source)


def _utf8(name: str) -> str:
    """A file's name with the bytes that are not UTF-8 written out, as in "caf\\xe9.txt"."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _files_of(source: str | Path, name: str, passed_over: Counter[str]) -> list[SourceFile]:
    path = as_path(source)
    if str(source) == STDLIB and not lies_here(STDLIB, "Python's standard library"):
        return _stdlib()
    if path.is_dir():
        return _directory(path, name, passed_over)
    if path.exists():
        kind = _kind(path)
        if not path.is_file():
            raise DataError(f"{source}: a pipe or device, which cannot be read twice; write it to a file and give that")
        if kind is None:
            remedy = "rename plain text to .txt, or convert it to .jsonl or .parquet"
            if endings(path)[1] or path.suffix.lower() in PACKED:
                remedy = "unpack it (only .jsonl, .json, .csv and .warc are read compressed)"
            raise DataError(f"{source}: files ending {''.join(path.suffixes[-2:])!r} are not read; {remedy}")
        return [SourceFile(path, name, _stem(name), kind)]
    if HUB_ID.fullmatch(str(source)) and _kind(path) is None and not path.is_symlink():
        return [SourceFile(file, f"{name}/{file.name}", name, "rows") for file in hub_files(str(source))]
    raise DataError(
        f"{source}: no such file or directory; give a file, a directory, '{STDLIB}', or a Hub data set id (owner/name)"
        + hint(path)
    )


def _directory(root: Path, name: str, passed_over: Counter[str]) -> list[SourceFile]:
    if is_curation(root):
        if not (root / MANIFEST).exists():
            raise DataError(f"{root}: a curation that is not finished; run it again to its end")
        return curated_shards(root, name, name)
    files, n_curations = [], 0
    directories = frozenset({"__pycache__", "node_modules"})
    for path in sorted(walk(root, directories, is_curation), key=lambda p: p.relative_to(root).parts):
        inner = f"{name}/{_utf8(path.relative_to(root).as_posix())}"
        kind = _kind(path)
        if not path.is_file():
            if path.is_symlink():
                passed_over["links to directories" if path.is_dir() else "broken links"] += 1
            elif not path.is_dir():
                passed_over["pipes or devices"] += 1
            elif (path / MANIFEST).exists():
                files += curated_shards(path, inner, name)
                n_curations += 1
            else:
                passed_over["unfinished curations"] += 1
        elif kind is not None and (endings(path)[0] not in SELDOM_DOCUMENTS or endings(path)[1]):
            files.append(SourceFile(path, inner, name, kind))
        else:
            passed_over["".join(endings(path)) or "without an ending"] += 1
    if not files and not n_curations:
        raise DataError(
            f"{root}: no document in this directory{_found_instead(passed_over)}; put .txt, .md, .html, .warc.gz, "
            ".jsonl, .parquet or source files there"
        )
    return files


def _found_instead(passed_over: Counter[str]) -> str:
    if not passed_over:
        return ""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in passed_over.most_common(5))
    by_name = any(kind in SELDOM_DOCUMENTS for kind in passed_over)
    return f" (passed over: {kinds}{'; name files of .json, .csv and .tsv themselves' if by_name else ''})"


def is_curation(directory: Path) -> bool:
    """Whether `arriero curate` wrote a directory, to its end or not."""
    if (directory / WORK / PLAN).exists():
        return True
    try:  # other tools write files of this name too
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except OSError:
        return False
    except (ValueError, RecursionError):
        return any(directory.glob("shard-*"))  # damaged, which reading it will report
    return isinstance(manifest, dict) and str(manifest.get("format")).startswith(KIND)


def curated_shards(root: Path, name: str, source: str) -> list[SourceFile]:
    """The shards of a directory that `arriero curate` wrote, as its manifest lists them.

    name: what the directory is called in the names of its files. source: that of documents which name none.
    """
    file, remedy = root / MANIFEST, "remove it, or curate again"
    listed = read_json(file, remedy=remedy, refusal=DataError).get("shards")
    if not isinstance(listed, list):
        raise DataError(f"{file}: not the manifest of a curated directory (it lists no shards); {remedy}")
    shards = []
    for entry in listed:
        shard = entry.get("file") if isinstance(entry, dict) else entry
        if not isinstance(shard, str) or re.fullmatch(r"(?=.{1,200}$)[\w-]+(\.[\w-]+)*", shard) is None:
            raise DataError(f"{file}: it lists the shard {shown(shard)}; each is a file beside it: {remedy}")
        if not (root / shard).is_file():
            raise DataError(f"{root}: the manifest lists {shard}, which is missing; copy it again, or curate again")
        shards.append(SourceFile(root / shard, f"{name}/{shard}", source, "rows"))
    return shards


def _stdlib() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = SKIPPED_DIRECTORIES | NOT_LIBRARY
    files = sorted(python_files(root, skipped), key=lambda path: path.relative_to(root).parts)
    topics = SourceFile(root / "pydoc_data" / "topics.py", f"{STDLIB}/topics", "prose", "topics")
    return [
        *(SourceFile(path, f"{STDLIB}/{path.relative_to(root).as_posix()}", "code", "code") for path in files),
        *([topics] if topics.path.exists() else []),
    ]


def python_files(root: Path, skipped: frozenset[str] = SKIPPED_DIRECTORIES) -> Iterator[Path]:
    """Python files below `root` that are neither tests nor somebody else's packages."""
    for path in [root] if root.is_file() else walk(root, skipped):
        is_test = re.fullmatch(r"(test_.*|.*_test|conftest)", path.stem)
        if path == root or (path.suffix == ".py" and not is_test and path.is_file()):
            yield path


def walk(
    root: Path, skipped: frozenset[str], is_whole: Callable[[Path], bool] = lambda directory: False
) -> Iterator[Path]:
    """Everything below `root` that is no directory; hidden paths and directories of the names `skipped` are left out.

    Links to directories, and directories that count as one item, are yielded themselves, not their contents.
    """
    for path in root.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_symlink() or not path.is_dir():
            yield path
        elif path.name not in skipped:
            if is_whole(path):
                yield path
            else:
                yield from walk(path, skipped, is_whole)


def _kind(path: Path) -> Any:
    """How a file is read, by the ending of its name; None for no known one."""
    name, suffix = path.name.lower(), path.suffix.lower()
    if name.endswith(WARC):
        return "warc"
    if suffix in PROSE:
        return "prose"
    if suffix in HTML:
        return "html"
    if suffix in CODE or name in ("makefile", "dockerfile"):
        return "code"
    return "rows" if is_readable(path) else None


def _stem(name: str) -> str:
    """A file's name without its endings: prose for prose.jsonl.gz."""
    return name.partition(".")[0] or name


# Readers: (row, document or error) for each row after `after`

Found = Document | PassedOver | DataError
Rows = Iterator[tuple[int, Found]]


def _read_rows(file: SourceFile, after: int, reading: Reading) -> Rows:
    named = (reading.text_key, *OWN)
    is_first = True
    for record in read_records(file.path, after, lambda name, holds_bytes: not holds_bytes or name in named):
        if is_first and record.unread:
            columns = ", ".join(repr(name) for name in record.unread)
            warn_once(f"{file.path}: bytes are no metadata, so these columns are left out: {columns}")
        is_first = False
        try:
            yield record.row, from_record(record, file, reading)
        except DataError as error:
            yield record.row, error


def from_record(record: Record, file: SourceFile, reading: Reading = Reading()) -> Document:
    """The document in a row that `read_records` gave; apart from reading, so that other processes can do it."""
    return _from_row(parse_row(record), file, record, reading.text_key)


OWN = ("id", "source", "url", "date")  # columns that are not metadata


def _from_row(row: dict[str, Any], file: SourceFile, record: Record, text_key: str) -> Document:
    number = record.row
    where = f"row {number} of {file.path}"
    rest = {key: _decoded(value, key, where) if key in (text_key, *OWN) else value for key, value in row.items()}
    text = rest.pop(text_key, None)
    if text is None or text != text:  # NaN, as tables hold in an empty cell
        if text_key in row:
            raise DataError(f"{where}: {text_key!r} is null or NaN; fill it or drop the row")
        columns = ", ".join(repr(name) for name in (*row, *record.unread)) or "none"
        raise DataError(
            f"{where}: no column {text_key!r} (there are: {columns}); name the text's with --text-key{rows_within(row)}"
        )
    if not isinstance(text, str):
        raise DataError(f"{where}: {text_key!r} is of type {type(text).__name__}; it must be a text")
    meta = _meta(rest.pop("meta", None) or {}, file.path, number)
    named = {key: _word(rest.pop(key, None)) for key in OWN}
    return Document(
        well_formed(text),
        named["id"] or f"{file.name}:{number}",
        named["source"] or ("code" if file.kind == "code" else file.source),
        named["url"],
        named["date"],
        _plain({**{key: value for key, value in rest.items() if value is not None}, **meta}, where),
    )


def _meta(value: Any, path: Path, number: int) -> dict[str, Any]:
    """The column `meta` as an object; curated shards hold it as JSON in a string."""
    if isinstance(value, str):
        try:
            return as_row(json.loads(value), path, number)
        except ValueError:  # DataError is one
            return {"meta": value}
        except RecursionError as error:
            raise DataError(f"row {number} of {path}: {TOO_DEEP}") from error
    return value if isinstance(value, dict) else {"meta": value}


def _decoded(value: Any, key: str, where: str) -> Any:
    """Text that a table holds as bytes, as some writers of Parquet leave it."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: {key!r} holds bytes that are not UTF-8 ({error}); convert it or drop the row"
        ) from error


def _word(value: Any) -> str:
    return well_formed(value) if isinstance(value, str) else "" if value is None or value != value else str(value)


DEEPEST = 100  # levels of a row's columns; a fixed number, so that every process and reader keeps the same rows
TOO_DEEP = f"it is nested more than {DEEPEST} levels deep; flatten it or drop the row"


def _plain(value: Any, where: str, level: int = 0) -> Any:
    """A value as JSON and UTF-8 can hold it: dates and other objects of Parquet as text."""
    if level > DEEPEST:
        raise DataError(f"{where}: {TOO_DEEP}")
    if isinstance(value, dict):
        return {_word(key): _plain(item, where, level + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, level + 1) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else _word(value)


def _read_whole(file: SourceFile, after: int, reading: Reading) -> Rows:
    """A file that is one document: prose, code, HTML."""
    if after:
        return
    data = file.path.read_bytes()
    if file.kind == "html":
        yield 1, Document(main_text(data, reading.html, str(file.path)), file.name, file.source)
        return
    try:
        encoding = json.detect_encoding(data[:4])  # by a byte order mark, or the zeros of UTF-16 and UTF-32
        is_code = file.path.suffix.lower() == ".py" and encoding.startswith("utf-8")
        text = _decoded_code(data) if is_code else data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except (UnicodeError, SyntaxError, LookupError) as error:
        yield 1, DataError(f"{file.path}: not UTF-8 text ({error}); convert it, for example by iconv, or remove it")
        return
    yield 1, Document(text, file.name, "code" if file.kind == "code" else file.source)


def _decoded_code(data: bytes) -> str:
    """Python source by the encoding that its first lines declare."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return well_formed(data.decode(encoding))


def _read_topics(file: SourceFile, after: int, reading: Reading) -> Rows:
    topics = importlib.import_module("pydoc_data.topics").topics
    for number, (name, text) in enumerate(sorted(topics.items()), start=1):
        if number > after:
            yield number, Document(text.strip() + "\n", f"{file.name}/{name}", file.source)


def _read_warc(file: SourceFile, after: int, reading: Reading) -> Rows:
    """Each record: a document, or why it is none."""
    warc = require("fastwarc.warc", "data")
    number, begins, found = 0, 0, None
    with open(file.path, "rb") as stream:
        every = warc.WarcRecordType.any_type
        for number, record in enumerate(
            warc.ArchiveIterator(stream, record_types=every, parse_http=False, quirks_mode=True), start=1
        ):
            begins = record.stream_pos
            if number > after:
                found = _from_warc(record, file, number, reading)
                yield number, found
    if not isinstance(found, DataError) and _is_cut(file.path, begins):
        raise DataError(f"{file.path}: the file ends within a record, after record {number}; fetch it again")
    if number == 0:
        raise DataError(f"{file.path}: the file holds no record; fetch it again or remove it")


def _is_cut(path: Path, begins: int) -> bool:
    """Whether a WARC file ends within a record, which fastwarc passes over in silence.

    begins: where its last response does. A file that is one gzip member for all records is unpacked as a whole.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(2) != GZIP:  # whatever it is called: fastwarc looks at the bytes too
            return size > 0 and not _ends_after_record(file, begins)
        for start in (begins % max(1, size), 0):
            file.seek(start)
            try:
                with gzip.GzipFile(fileobj=file) as rest:
                    while rest.read(1 << 20):
                        pass
                return False
            except EOFError:
                return True
            except (gzip.BadGzipFile, zlib.error):  # no member begins here
                continue
    return False


def _ends_after_record(file: IO[bytes], begins: int) -> bool:
    """Whether nothing but blank lines follows the record that begins there, which fastwarc has read whole."""
    file.seek(begins)
    head = file.read(1 << 20)
    blank = BLANK_LINE.search(head, len(head) - len(head.lstrip()))
    length = re.search(rb"^content-length[ \t]*:[ \t]*(\d{1,15})\b", head, re.IGNORECASE | re.MULTILINE)
    if blank is None or length is None:
        return False
    file.seek(begins + blank.end() + int(length[1]))
    return not file.read(1 << 20).strip()


def _from_warc(record: Any, file: SourceFile, number: int, reading: Reading) -> Found:
    headers = record.headers
    url = headers.get("WARC-Target-URI") or ""
    url = url.strip("<>")  # as some tools write it, by an error of the standard
    try:
        content = content_of(record)
        if isinstance(content, PassedOver):
            return content
        if content.is_html:
            text = main_text(content.data, reading.html, url, content.charset)
        elif str(record.record_type) == "conversion":  # UTF-8 by definition
            text = content.data.decode("utf-8-sig", "replace")
        else:
            text = decoded(content.data, content.charset)
    except DataError as error:
        return DataError(f"row {number} of {file.path}: {error}")
    id_ = (record.record_id or "").strip("<>") or f"{file.name}:{number}"
    return Document(text, id_, file.source, url, headers.get("WARC-Date") or "")
