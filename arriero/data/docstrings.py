"""Fine-tuning pairs from Python code: a function without its docstring -> the docstring's first sentence.

Source is the running Python's standard library or any directory of code, so that anybody can teach a model their own
code base. The code keeps its comments and layout: the docstring's lines are cut out of the file's text.

What keeps the held-out sets honest:
- a whole module goes to train, validation or test (top-level packages where there are enough, else files);
- before that, pairs with the same sentence are reduced to the first, and so are near-duplicates: functions
  whose sets of 3-token shingles have a Jaccard similarity of at least 0.7. The join is exact (every pair is found),
  by prefix filtering (Bayardo et al., WWW 2007): two such sets share one of their few rarest shingles.
Output bytes are a function of the source files and the arguments. The standard library takes about 5 seconds.
"""

from __future__ import annotations

import ast
import hashlib
import math
import platform
import re
import sysconfig
import tokenize
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from arriero.curate.sources import STDLIB, python_files
from arriero.errors import DataError
from arriero.io.files import json_bytes, write_json, write_jsonl, write_text
from arriero.io.paths import as_path, hint, lies_here
from arriero.show.progress import each
from arriero.show.terminal import notes

PROMPT = "Write the one-sentence docstring of this Python function.\n\n```python\n{code}\n```"
SIMILARITY = 0.7  # Jaccard similarity of shingle sets from which two functions are the same to us
SHINGLE = 3  # tokens in a shingle
ENOUGH_PACKAGES = 20  # top-level names from which a whole package, not a file, is what is split
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """One function and the first sentence of its docstring."""

    module: str
    qualname: str
    code: str
    sentence: str

    @property
    def row(self) -> dict[str, Any]:
        """A row in the OpenAI messages layout."""
        messages = [
            {"role": "user", "content": PROMPT.format(code=self.code)},
            {"role": "assistant", "content": self.sentence},
        ]
        meta = {"module": self.module, "qualname": self.qualname}
        return {"messages": messages, "meta": meta}


@dataclass
class DocstringStats:
    """What was found and what became of it; written to stats.json."""

    python: str = platform.python_version()
    seed: int = 0
    files: int = 0
    unreadable_files: int = 0
    documented_functions: int = 0
    unsuitable: int = 0
    same_sentence: int = 0
    near_duplicates: int = 0
    pairs: dict[str, int] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    mean_characters: dict[str, float] = field(default_factory=dict)


def build_docstrings(
    source: str | Path,
    out_dir: str | Path,
    *,
    seed: int = 0,
    held_out: float = 0.05,
    max_pairs: int | None = None,
    max_lines: int = 40,
    console: Console | None = None,
) -> DocstringStats:
    """Write train.jsonl, validation.jsonl, test.jsonl, stats.json and README.md to `out_dir`.

    source: "stdlib", a directory, or one Python file. held_out: share of the pairs, at most, for each of validation
    and test. max_pairs: training pairs at most, drawn by the seed. max_lines: longest function, without its docstring.
    Raises DataError when the source does not exist or yields no pairs in one of the splits.
    """
    console = console or notes()
    is_own = str(source) == STDLIB and not lies_here(STDLIB, "Python's standard library")
    root = Path(sysconfig.get_paths()["stdlib"]) if is_own else as_path(source)
    if not 0 < held_out < 0.5:
        raise DataError(f"held_out is {held_out}; it is the share for validation and for test, between 0 and 0.5")
    stats = DocstringStats(seed=seed)
    pairs = _deduplicate(_collect(root, stats, max_lines, console), stats)
    splits = _split(pairs, seed, held_out)
    if max_pairs is not None:
        splits["train"] = sorted(splits["train"], key=lambda p: _digest(seed, p.module, p.qualname, p.code))[:max_pairs]
    for name, members in splits.items():
        if not members:
            raise DataError(
                f"{root}: {len(pairs)} usable functions with docstrings in {stats.files} files leave none for {name}; "
                f"pairs are split by module, so give a larger code base (functions of 2 to {max_lines} lines count)"
            )
    _write(as_path(out_dir), splits, stats)
    console.print(summary_table(stats))
    return stats


def summary_table(stats: DocstringStats) -> Table:
    """The statistics as a table for the terminal."""
    table = Table(title=f"{sum(stats.pairs.values())} docstring pairs from {stats.files} files")
    for column in ("split", "pairs", "modules", "characters a pair"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name in stats.pairs:
        mean = f"{stats.mean_characters[name]:.0f}"
        table.add_row(name, f"{stats.pairs[name]:,}", f"{stats.modules[name]:,}", mean)
    table.caption = (
        f"{stats.documented_functions:,} documented functions; left out: {stats.unsuitable:,} of unsuitable length or "
        f"text, {stats.same_sentence:,} with a sentence seen before, {stats.near_duplicates:,} near-duplicates; "
        f"{stats.unreadable_files} files could not be parsed"
    )
    return table


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


# Finding pairs


def _collect(root: Path, stats: DocstringStats, max_lines: int, console: Console) -> list[Pair]:
    if not root.exists():
        raise DataError(f"{root}: no such file or directory; give 'stdlib' or a path to Python code{hint(root)}")
    base = root if root.is_dir() else root.parent
    files = sorted(python_files(root), key=lambda path: path.relative_to(base).parts)
    pairs = []
    for path in each(files, "reading Python", console=console):
        stats.files += 1
        module = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
        try:
            with tokenize.open(path) as file:
                text = file.read()
            with warnings.catch_warnings():  # invalid escapes in other people's code are not our news
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, OSError, RecursionError):  # ValueError: undecodable, or null bytes
            stats.unreadable_files += 1
            continue
        lines = text.split("\n")  # splitlines would also split at form feeds, which ast does not count
        for qualname, function in _functions(tree, ""):
            docstring = ast.get_docstring(function)
            if docstring is None:
                continue
            stats.documented_functions += 1
            code, sentence = _without_docstring(function, lines), first_sentence(docstring)
            if code is None or sentence is None or "```" in code or not 2 <= code.count("\n") + 1 <= max_lines:
                stats.unsuitable += 1
            else:
                pairs.append(Pair(module, qualname, code, sentence))
    return pairs


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Every function in `node`, nested ones included, with its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.<locals>.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif not isinstance(child, ast.expr):  # no function is defined inside an expression
            yield from _functions(child, prefix)


def _without_docstring(function: Function, lines: list[str]) -> str | None:
    """The function's text, decorators included, dedented, without its docstring.

    None when the docstring shares a line with code, or nothing but `pass`, `...` or a `raise` is left.
    """
    doc, rest = function.body[0], function.body[1:]
    says_nothing = len(rest) == 0 or (
        len(rest) == 1 and (isinstance(rest[0], ast.Pass | ast.Raise) or ast.unparse(rest[0]) in ("...", "return"))
    )
    start = min([function.lineno, *(d.lineno for d in function.decorator_list)]) - 1
    assert doc.end_lineno is not None and function.end_lineno is not None
    first, last = doc.lineno - 1, doc.end_lineno - 1
    before = lines[first].encode()[: doc.col_offset]
    after = lines[last].encode()[doc.end_col_offset :]
    if says_nothing or before.strip() or after.strip():
        return None
    kept = lines[start:first] + lines[last + 1 : function.end_lineno]
    if first - start < len(kept) and not kept[first - start].strip():
        del kept[first - start]  # the blank line that set the docstring apart
    indent = len(lines[start]) - len(lines[start].lstrip())
    kept = [line[indent:] if not line[:indent].strip() else line for line in kept]
    return "\n".join(line.rstrip() for line in kept).rstrip()


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring's first paragraph, on one line, ended by a full stop.

    None where there is no sentence: under 15 or over 200 characters or 3 words, a signature, markup, a heading or
    a doctest instead of prose.
    """
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
    abbreviation = r"(?<!e\.g)(?<!i\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\bapprox)(?<!\b[A-Z])"
    match = re.match(rf"(.+?{abbreviation}[.!?])(?=\s+[^a-z]|$)", paragraph)
    sentence = match[1] if match else paragraph
    if not 15 <= len(sentence) <= 200 or len(sentence.split()) < 3:
        return None
    if not re.match(r"[A-Za-z`'\"]", sentence) or re.match(r"[\w.]+\s?\(.*?\)\s*(->|--|=|:|$)", sentence):
        return None
    if sentence.endswith((":", ",", ";", "-")) or ">>>" in sentence or re.search(r"\s:\w+[^:]*:|@param|\|", sentence):
        return None
    return sentence if sentence.endswith((".", "!", "?")) else sentence + "."


# Duplicates


def _deduplicate(pairs: list[Pair], stats: DocstringStats) -> list[Pair]:
    """Keep the first, in order of files, of the pairs that share a sentence or nearly all of their code."""
    firsts: dict[str, Pair] = {}
    for pair in pairs:
        firsts.setdefault(pair.sentence.casefold().rstrip(".!?"), pair)
    stats.same_sentence = len(pairs) - len(firsts)
    pairs = list(firsts.values())
    keep = near_duplicate_filter([pair.code for pair in pairs])
    stats.near_duplicates = len(pairs) - len(keep)
    return [pairs[i] for i in keep]


def near_duplicate_filter(texts: list[str]) -> list[int]:
    """Indices of texts that are not near-duplicates of an earlier kept one: an exact Jaccard join of shingle sets."""
    shingles = [_shingles(text) for text in texts]
    frequency = Counter(s for members in shingles for s in members)
    rarest_with: dict[tuple[str, ...], list[int]] = defaultdict(list)
    kept = []
    for i, members in enumerate(shingles):
        # Two sets of Jaccard >= t share ceil(t * size) shingles, hence one of the size - ceil(t * size) + 1 rarest.
        by_rarity = sorted(members, key=lambda s: (frequency[s], s))
        prefix = by_rarity[: len(members) - math.ceil(SIMILARITY * len(members)) + 1]
        candidates = {j for s in prefix for j in rarest_with[s]}
        if any(_jaccard(members, shingles[j]) >= SIMILARITY for j in candidates):
            continue
        kept.append(i)
        for s in prefix:
            rarest_with[s].append(i)
    return kept


def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    tokens = re.findall(r"\w+|[^\w\s]", text)
    return frozenset(tuple(tokens[i : i + SHINGLE]) for i in range(max(1, len(tokens) - SHINGLE + 1)))


def _jaccard(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


# Splitting and writing


def _split(pairs: list[Pair], seed: int, held_out: float) -> dict[str, list[Pair]]:
    """Whole modules, in an order drawn by the seed, go to test, then validation, while they fit; the rest trains."""
    packages = {pair.module.partition(".")[0] for pair in pairs}
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.module.partition(".")[0] if len(packages) >= ENOUGH_PACKAGES else pair.module].append(pair)
    splits: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    room = {name: math.ceil(held_out * len(pairs)) for name in ("test", "validation")}
    for group in sorted(groups, key=lambda name: _digest(seed, name)):
        members = groups[group]
        # A module that alone would fill half of a held-out set says too much about one topic.
        target = next(
            (n for n in room if len(members) <= room[n] and 2 * len(members) <= held_out * len(pairs) + 2), "train"
        )
        splits[target] += members
        if target in room:
            room[target] -= len(members)
    return {
        name: sorted(members, key=lambda p: _digest(seed, json_bytes(p.row).decode()))
        for name, members in splits.items()
    }


def _write(out: Path, splits: dict[str, list[Pair]], stats: DocstringStats) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, members in splits.items():
        write_jsonl(out / f"{name}.jsonl", (pair.row for pair in members))
        stats.pairs[name] = len(members)
        stats.modules[name] = len({pair.module for pair in members})
        stats.mean_characters[name] = round(sum(len(p.code) + len(p.sentence) for p in members) / len(members), 1)
    write_json(out / "stats.json", asdict(stats))
    rows = "".join(f"| {n}.jsonl | {stats.pairs[n]} | {stats.modules[n]} |\n" for n in stats.pairs)
    write_text(
        out / "README.md",
        "# Docstring pairs\n\nOne JSON object a line, in the OpenAI `messages` layout: a Python function without its "
        "docstring -> the docstring's first sentence. Split by module; near-duplicates removed. "
        "The texts are under the licence of the code they were taken from.\n\n"
        f"| file | pairs | modules |\n|-|-|-|\n{rows}",
    )
