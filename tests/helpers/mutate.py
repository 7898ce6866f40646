"""Files as an adversary, a broken disk or a careless script leaves them: seeded mutations of a valid one.

`mutated(name, data, rng)` knows the layout of a file by its name: entries of JSON get other types and absurd sizes,
those of a GGUF or safetensors header too, protobuf's fields and a zip's members are changed and written anew with
lengths that fit. Every fifth mutation knows nothing and changes bytes. The same seed gives the same file.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from arriero.tokenizer.protobuf import BYTES, VARINT, field

EXTREMES = [
    0,
    1,
    2,
    3,
    7,
    127,
    255,
    256,
    65_535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
NUMBERS = [
    "-1",
    "0",
    "1",
    "0.5",
    "65537",
    "2147483648",
    "-9223372036854775809",
    "18446744073709551616",
    "1e308",
    "1e999",
]
NUMBERS += ["-1e999", "NaN", "Infinity", "1e-320", "9" * 400, "9" * 5000, "007", "0x10", "1_000", "true"]
VALUES = [
    "null",
    "true",
    "false",
    '""',
    '"x"',
    '"\\ud800"',
    '"\\u0000"',
    '"../../etc/passwd"',
    '"/dev/zero"',
    "[]",
    "{}",
]
VALUES += ["[[]]", "[null]", '["a", 1]', '[{"a": null}]', '{"a": 1}', '{"": {}}', '"' + "x" * 5000 + '"']
VALUES += [
    "[" * 60 + "]" * 60,
    "[" * 30_000 + "]" * 30_000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" + "0," * 3000 + "0]",
]
TEMPLATES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ ''.__class__ }}", "{{ self.__init__.__globals__ }}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**10 }}", "{{ 9**9**9 }}", "{{ '%1000000000s' % 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{% set x = namespace(a=1) %}{{ x.b.c }}",
    "{{ messages[0]['content'].format(messages) }}", "{{ [1] * 10**9 }}", "{{ range(10**8)|list|length }}",
    "{{ messages|tojson(indent=10**9) }}", "{{ 'x'.center(10**9) }}", "{{ messages.append(1) }}", "{{ undefined.x }}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "{{ raise_exception(1) }}",
    "{{ strftime_now(1) }}", "{{ strftime_now('%') }}", "{{ 1/0 }}", "{{ {}|sort }}", "{% generation %}", "{{ (" * 200,
]  # fmt: skip
SNIPPETS = [
    "\0",
    "\ufeff",
    "\r",
    "\r\n",
    "\n",
    "\u2028",
    "\u0085",
    '"',
    "'",
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    "<div>" * 2000,
]
SNIPPETS += [
    "<!--",
    "<script>",
    "]]>",
    "&#xffffffff;",
    "&#0;",
    "Content-Length: -1\r\n",
    "\x1b[31m",
    "[/INST]",
    "=",
    "#",
]
RAW = [
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\0" * 64,
    b"\x80" * 9,
]


def mutated(name: str, data: bytes, rng: Random) -> bytes:
    """The content of a file of this name after one to three mutations."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        by_layout = _layout(name, data)
        change = of_bytes if by_layout is None or rng.random() < 0.2 else by_layout
        try:
            data = change(data, rng)
        except Exception:  # any of the libraries': what a mutation before it broke has no layout any more
            data = of_bytes(data, rng)
    return data


def _layout(name: str, data: bytes) -> Callable[[bytes, Random], bytes] | None:
    lower = name.lower()
    if lower.endswith(".gz"):
        return lambda data, rng: gzip.compress(mutated(name[:-3], gzip.decompress(data), rng), mtime=0)
    if lower.endswith(".zst"):
        return lambda data, rng: _zstd(name[:-4], data, rng)
    if lower.endswith(".model"):
        return of_protobuf if data[:1] == b"\n" else of_text  # SentencePiece, tiktoken
    known = {
        ".json": of_json, ".jsonl": of_json_lines, ".ipynb": of_json, ".gguf": of_gguf, ".safetensors": of_safetensors,
        ".pth": of_zip, ".jinja": of_template,
        **dict.fromkeys((".toml", ".csv", ".tsv", ".txt", ".md", ".py", ".html", ".warc", ".wet"), of_text),
    }  # fmt: skip
    return next((change for ending, change in known.items() if lower.endswith(ending)), None)


# -- bytes and text ----------------------------------------------------------------------------------------------


def of_bytes(data: bytes, rng: Random) -> bytes:
    """Bits turned, bytes put in, taken out, moved or doubled, a number overwritten, the end cut off."""
    if not data:
        return rng.choice(RAW)
    at, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 4, 8, 16, 64, 1024])
    kind = rng.randrange(9)
    if kind == 0:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:at] + rng.choice([rng.randbytes(length), rng.choice(RAW), bytes(length)]) + data[at:]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[: rng.choice([at, rng.randrange(min(len(data), 64)), len(data) - 1])]
    if kind == 4:
        return data[:at] + data[rng.randrange(len(data)) :]  # two parts of it, spliced
    if kind == 5:
        return data[:at] + data[at : at + length] * rng.choice([2, 3, 50]) + data[at + length :]
    if kind == 6:
        size = rng.choice([1, 2, 4, 8])
        number = (rng.choice(EXTREMES) & (256**size - 1)).to_bytes(size, "little")
        return data[:at] + number + data[at + size :]
    if kind == 7:
        return data + rng.choice([rng.randbytes(length), data[:length], b"\n", b"\0" * length])
    return data[:at] + rng.choice(RAW) + data[at + length :]


def of_text(data: bytes, rng: Random) -> bytes:
    """A number made absurd, a line doubled, dropped or moved, hostile characters put in, another encoding."""
    kind = rng.randrange(5)
    if kind == 0 and (numbers := list(re.finditer(rb"-?\d+(\.\d+)?", data))):
        number = rng.choice(numbers)
        return data[: number.start()] + rng.choice(NUMBERS).encode() + data[number.end() :]
    if kind == 1:
        lines = data.splitlines(keepends=True) or [b""]
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[i : i + 1] = rng.choice([[], [lines[i]] * 2, [lines[j]], [lines[j] + lines[i]], [lines[i].rstrip()]])
        return b"".join(lines)
    if kind == 2 and rng.random() < 0.2:
        return data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"]))
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([*(s.encode() for s in SNIPPETS), *RAW]) + data[at + rng.choice([0, 0, 1, 5]) :]


def of_template(data: bytes, rng: Random) -> bytes:
    """A Jinja template with a hostile expression in it."""
    if rng.random() < 0.3:
        return of_text(data, rng)
    at = rng.choice([0, len(data), *(match.start() for match in re.finditer(rb"\{[{%]", data))])
    return data[:at] + rng.choice(TEMPLATES).encode() + data[at:]


# -- JSON --------------------------------------------------------------------------------------------------------

_MARK = "\ufdd0mark"  # stands for a value until the JSON is written: what is put in its place need be no valid JSON


def of_json(data: bytes, rng: Random) -> bytes:
    """One entry replaced by another type or a huge value, dropped, doubled or renamed."""
    root = json.loads(data)
    holder: Any = [root]
    parent, key = holder, 0  # the entry that is changed: a walk from the root, so that long lists do not win
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    before = json.dumps(parent[key])
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
        return json.dumps(holder[0]).encode() if holder else b""
    if kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "a", key.upper(), key + "\0", "__class__", *parent])] = parent.pop(key)
        return json.dumps(holder[0]).encode()
    new = _text(parent[key], rng)
    if kind == 2 and isinstance(parent, dict):  # the same key twice
        new = f"{before}, {json.dumps(key)}: {new}"
    elif kind == 3 and isinstance(parent, list):
        new = ", ".join([before] * rng.choice([2, 3, 40]))
    parent[key] = _MARK
    return json.dumps(holder[0]).replace(json.dumps(_MARK), new).encode()


def _text(value: Any, rng: Random) -> str:
    """JSON for a value like this one and yet not, or for one of another type."""
    if isinstance(value, (int, float)) and rng.random() < 0.6:
        return rng.choice([*NUMBERS, str(value + 1), str(-value), str(float(value) / 2), json.dumps(str(value))])
    if isinstance(value, str) and rng.random() < 0.4:
        at = rng.randrange(len(value) + 1)
        return json.dumps(value[:at] + rng.choice([*SNIPPETS, "\ud800", "x" * 300]) + value[at + rng.choice([0, 1]) :])
    return rng.choice([*VALUES, rng.choice(NUMBERS)])


def of_json_lines(data: bytes, rng: Random) -> bytes:
    """One line of JSON changed."""
    lines = data.split(b"\n")
    i = rng.randrange(max(1, len(lines) - 1))
    lines[i] = of_json(lines[i], rng)
    return b"\n".join(lines)


# -- binary headers ----------------------------------------------------------------------------------------------


def of_safetensors(data: bytes, rng: Random) -> bytes:
    """The header's JSON changed, and its length with it; or only the length."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice([*EXTREMES, length - 1, length + 8]).to_bytes(9, "little")[:8] + header + tensors
    if kind == 1:  # weights that are no numbers
        at = rng.randrange(max(1, len(tensors)))
        return data[: 8 + length] + tensors[:at] + b"\xff" * 8 + tensors[at + 8 :]
    header = of_json(header, rng)
    return len(header).to_bytes(8, "little") + header + tensors


def of_protobuf(data: bytes, rng: Random) -> bytes:
    """One field of a message, or of a message within it, changed, doubled, dropped or moved to another number."""
    parts = list(_protobuf(data))
    number, value, start, end = parts[rng.choice([0, len(parts) - 1, len(parts) - 2, rng.randrange(len(parts))])]
    kind = rng.randrange(6)
    if kind == 0:
        new = b""
    elif kind == 1:
        new = data[start:end] * rng.choice([2, 9])
    elif kind == 2:
        new = field(rng.choice([0, 1, 2, 3, 15, 99, 2**28]), value)
    elif isinstance(value, bytes) and value:
        new = field(number, of_protobuf(value, rng) if rng.random() < 0.8 else of_bytes(value, rng))
    else:
        new = field(number, rng.choice([b"", b"\xff", 0.5, float("nan"), float("inf"), *EXTREMES]))
    return data[:start] + new + data[end:]


def _protobuf(data: bytes) -> Sequence[tuple[int, Any, int, int]]:
    """(number, value, first byte, byte after) of every field."""
    at, found = 0, []

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        start, key = at, varint()
        if key & 7 == VARINT:
            value: Any = varint()
        else:
            size = varint() if key & 7 == BYTES else {1: 8, 5: 4}[key & 7]
            value, at = data[at : at + size], at + size
            value = struct.unpack("<f", value)[0] if key & 7 == 5 else value
        found.append((key >> 3, value, start, at))
    return found


def of_zip(data: bytes, rng: Random) -> bytes:
    """One member of an archive changed, dropped, doubled, renamed or compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    i = rng.choice([0, 0, rng.randrange(len(members))])  # the first is the pickle that says what the others are
    name, content = members[i]
    kind = rng.randrange(6)
    if kind == 0:
        del members[i]
    elif kind == 1:
        members.append((name.replace("data", "../data") if rng.random() < 0.5 else name + "x", content))
    elif kind == 2:
        members[i] = (rng.choice(["x", "/etc/x", name[::-1]]), content)
    else:
        members[i] = (name, of_bytes(content, rng))
    out = io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", packing) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def _zstd(name: str, data: bytes, rng: Random) -> bytes:
    import zstandard

    content = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    return zstandard.ZstdCompressor().compress(mutated(name, content, rng))


# -- GGUF --------------------------------------------------------------------------------------------------------

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def of_gguf(data: bytes, rng: Random) -> bytes:
    """A key-value pair or a row of the table of tensors changed, dropped or doubled; or one count, length or offset."""
    pairs, tensors, body = parse_gguf(data)
    kind = rng.randrange(8)
    if kind == 0:
        del pairs[rng.randrange(len(pairs))]
    elif kind == 1:
        pairs.append((rng.choice(pairs)[0], *rng.choice(pairs)[1:]))
    elif kind in (2, 3, 4):
        i = rng.randrange(len(pairs))
        pairs[i] = (pairs[i][0], *_other_value(*pairs[i][1:], rng))
    elif kind == 5:
        i = rng.randrange(len(tensors))
        tensors[i : i + 1] = rng.choice([[], [tensors[i]] * 2, [rng.choice(tensors)]])
    elif kind == 6:
        i = rng.randrange(len(tensors))
        name, dims, number, offset = tensors[i]
        huge = [*EXTREMES, *dims, offset]
        tensors[i] = rng.choice([
            (name, [rng.choice(huge) for _ in dims], number, offset),
            (name, [*dims, *[rng.choice(huge)] * rng.choice([1, 2, 9])], number, offset),
            (name, dims[:-1], number, offset),
            (name, dims, rng.choice([*range(45), 2**32 - 1]), offset),
            (name, dims, number, rng.choice([*huge, offset + 32, tensors[i - 1][3]])),
            (rng.choice(["", "x" * 70, "token_embd.weight", "rope_freqs.weight"]), dims, number, offset),
        ])  # fmt: skip
    written, places = encode_gguf(pairs, tensors, body)
    if kind == 7:  # a lie about a size
        at, code = rng.choice(places)
        size = struct.calcsize(code)
        value = (rng.choice(EXTREMES) & (256**size - 1)).to_bytes(size, "little")
        written = written[:at] + value + written[at + size :]
    return written


def _other_value(kind: int, value: Any, rng: Random) -> tuple[int, Any]:
    if kind == _ARRAY and rng.random() < 0.6:
        inner, items = value
        items = list(items)
        i = rng.randrange(len(items)) if items else 0
        items[i : i + 1] = rng.choice([[], items[i : i + 1] * 2, items[: i + 1], [items[-1]] if items else []])
        if items and inner != _STRING and _CODES[inner] != "?":
            items[0] = rng.choice([items[0], 0, 1, 127])
        if items and inner == _STRING:
            items[i % len(items)] = rng.choice([b"", b"\xff", b" ", b"a b c", b"zz zz", items[0], b"x" * 2000])
        return kind, (inner, items)
    new = rng.choice([*_CODES, _STRING, _STRING, _ARRAY])
    if new == _STRING:
        return new, rng.choice(
            [b"", b"\xff\xfe", b"none", b"yarn", b"llama", b"gpt2", b"x" * 3000, b"{{ 'a' * 10**10 }}"]
        )
    if new == _ARRAY:
        return new, rng.choice([(4, [0]), (4, []), (_STRING, [b"a"]), (6, [float("nan")]), (5, [-1] * 2000)])
    code = _CODES[new]
    if code in "fd":
        return new, rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30])
    top = 256 ** struct.calcsize(code) - 1
    same = value if isinstance(value, int) else 1
    number = rng.choice([*EXTREMES, same, same + 1, same * 2]) & top
    return new, bool(number) if code == "?" else number - (top + 1 if code.islower() and number > top // 2 else 0)


def parse_gguf(data: bytes) -> tuple[list[Any], list[Any], bytes]:
    """Pairs (key, type, value), rows of the table of tensors (name, dimensions, type, offset), and the data."""
    at = 8

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def string() -> bytes:
        nonlocal at
        length = take("Q")
        at += length
        if at > len(data):
            raise ValueError(at)
        return data[at - length : at]

    def value(kind: int) -> Any:
        if kind == _STRING:
            return string()
        if kind != _ARRAY:
            return take(_CODES[kind])
        inner, count = take("I"), take("Q")
        if count > len(data):
            raise ValueError(count)
        return inner, [value(inner) for _ in range(count)]

    n_tensors, n_pairs = take("Q"), take("Q")
    if max(n_tensors, n_pairs) > len(data):
        raise ValueError(n_tensors)
    pairs = []
    for _ in range(n_pairs):
        key, kind = string(), take("I")
        pairs.append((key, kind, value(kind)))
    tensors = []
    for _ in range(n_tensors):
        name, n_dims = string(), take("I")
        if n_dims > 64:
            raise ValueError(n_dims)
        dims = [take("Q") for _ in range(n_dims)]
        tensors.append((name.decode("utf-8", "replace"), dims, take("I"), take("Q")))
    return pairs, tensors, data[-(-at // 32) * 32 :]


def encode_gguf(pairs: Sequence[Any], tensors: Sequence[Any], body: bytes) -> tuple[bytes, list[tuple[int, str]]]:
    """The file, and where each count, length, type, dimension and offset stands in it."""
    out, places = bytearray(b"GGUF" + struct.pack("<I", 3)), [(4, "I")]

    def put(code: str, value: Any) -> None:
        places.append((len(out), code))
        out.extend(struct.pack("<" + code, value))

    def string(value: bytes) -> None:
        put("Q", len(value))
        out.extend(value)

    def value_of(kind: int, value: Any) -> None:
        if kind == _STRING:
            string(value)
        elif kind == _ARRAY:
            inner, items = value
            put("I", inner)
            put("Q", len(items))
            if inner in (_STRING, _ARRAY):
                for item in items:
                    value_of(inner, item)
            else:
                out.extend(struct.pack(f"<{len(items)}{_CODES[inner]}", *items))
        else:
            out.extend(struct.pack("<" + _CODES[kind], value))

    put("Q", len(tensors))
    put("Q", len(pairs))
    for key, kind, value in pairs:
        string(key)
        put("I", kind)
        value_of(kind, value)
    for name, dims, number, offset in tensors:
        string(name.encode())
        put("I", len(dims))
        for dim in dims:
            put("Q", dim & (2**64 - 1))
        put("I", number)
        put("Q", offset & (2**64 - 1))
    out.extend(bytes(-len(out) % 32))
    return bytes(out) + body, places
