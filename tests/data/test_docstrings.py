"""Docstring pairs: the right text on both sides, no test module among what is trained on, the same bytes each time."""

import ast
import io
import json
import random
import re
import textwrap
from itertools import combinations
from pathlib import Path

import pytest
from helpers.rows import read_conversations
from rich.console import Console

from arriero.data.docstrings import (
    SIMILARITY,
    _jaccard,
    _shingles,
    build_docstrings,
    first_sentence,
    near_duplicate_filter,
)
from arriero.errors import DataError

SILENT = Console(file=io.StringIO())


def build(source, out, **settings):
    return build_docstrings(source, out, console=SILENT, **settings)


def rows(out: Path, *names: str) -> list[dict]:
    names = names or ("train", "validation", "test")
    return [json.loads(line) for name in names for line in (out / f"{name}.jsonl").read_text().splitlines()]


def code_of(row: dict) -> str:
    return re.fullmatch(r".*?```python\n(.*)\n```", row["messages"][0]["content"], re.DOTALL)[1]


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stdlib")
    build("stdlib", out)
    return out


def test_the_standard_library_gives_about_five_thousand_short_pairs(stdlib):
    stats = json.loads((stdlib / "stats.json").read_text())
    assert sum(stats["pairs"].values()) > 4000
    assert stats["pairs"]["test"] >= 100 and stats["pairs"]["validation"] >= 100
    assert stats["pairs"] == {name: len(rows(stdlib, name)) for name in stats["pairs"]}
    conversations = [list(read_conversations(stdlib / f"{name}.jsonl")) for name in stats["pairs"]]
    assert sum(map(len, conversations)) == sum(stats["pairs"].values())


def test_every_pair_of_the_standard_library_is_code_that_parses_and_one_sentence(stdlib):
    for row in rows(stdlib):
        answer = row["messages"][1]["content"]
        assert 15 <= len(answer) <= 201 and answer[-1] in ".!?" and "\n" not in answer
        code = code_of(row)
        [function] = ast.parse(code).body
        assert ast.get_docstring(function) is None and function.name == row["meta"]["qualname"].split(".")[-1]
        assert 2 <= code.count("\n") + 1 <= 40
        assert answer.rstrip(".") not in code, (row["meta"], answer)


def test_no_package_is_on_both_sides_of_a_split(stdlib):
    packages = [
        {row["meta"]["module"].split(".")[0] for row in rows(stdlib, n)} for n in ("train", "validation", "test")
    ]
    assert all(packages) and not any(a & b for a, b in combinations(packages, 2))
    modules = {row["meta"]["module"] for row in rows(stdlib)}
    assert not any(re.search(r"(^|\.)(tests?|idle_test|test_\w+)(\.|$)", module) for module in modules)


def test_no_sentence_and_no_near_duplicate_is_met_twice(stdlib):
    pairs = rows(stdlib)
    sentences = [row["messages"][1]["content"].casefold().rstrip(".!?") for row in pairs]
    assert len(set(sentences)) == len(sentences)
    held_out = [_shingles(code_of(row)) for row in rows(stdlib, "validation", "test")[::5]]
    trained = [_shingles(code_of(row)) for row in rows(stdlib, "train")]
    # All pairs compared one by one: the filter's short cut has missed none.
    assert max(_jaccard(a, b) for a in held_out for b in trained) < SIMILARITY


def test_the_same_source_and_seed_give_the_same_bytes(tmp_path, code_base):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        build(code_base, tmp_path / name, seed=seed, held_out=0.2)
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    assert files["a"]["train.jsonl"] != files["c"]["train.jsonl"]


@pytest.fixture
def code_base(tmp_path) -> Path:
    """Thirty files of one package, with a function and a class each."""
    package = tmp_path / "code" / "package"
    package.mkdir(parents=True)
    draw = random.Random(11)
    for k in range(30):
        words = [f"{draw.choice('abcdefgh')}{draw.randrange(10**6)}" for _ in range(12)]
        body = "\n".join(f"    {a} = {b}({a}, {k})" for a, b in zip(words[::2], words[1::2], strict=True))
        docstring = f'    """Combine {words[2]} and {words[3]}."""'
        (package / f"m{k}.py").write_text(f"def {words[0]}(x):\n{docstring}\n{body}\n    return {words[4]}\n")
    return tmp_path / "code"


def test_files_of_one_package_are_split_by_file(tmp_path, code_base):
    stats = build(code_base, tmp_path / "out", held_out=0.1)
    assert stats.pairs == {"train": 24, "validation": 3, "test": 3} == stats.modules
    fewer = build(code_base, tmp_path / "few", held_out=0.1, max_pairs=5)
    assert fewer.pairs == {"train": 5, "validation": 3, "test": 3}
    assert (tmp_path / "few" / "test.jsonl").read_bytes() == (tmp_path / "out" / "test.jsonl").read_bytes()


def test_tests_broken_files_and_other_peoples_packages_are_passed_over(tmp_path, code_base):
    good = (code_base / "package" / "m0.py").read_text().replace("Combine", "Rework")
    for place in ("tests/a.py", "package/test_b.py", ".venv/c.py", "x/site-packages/d.py", "package/conftest.py"):
        (code_base / place).parent.mkdir(parents=True, exist_ok=True)
        (code_base / place).write_text(good)
    (code_base / "package" / "broken.py").write_text("def f(:\n")
    (code_base / "package" / "binary.py").write_bytes(b"\x00\xff\xfe")
    stats = build(code_base, tmp_path / "out", held_out=0.1)
    assert stats.files == 32 and stats.unreadable_files == 2 and sum(stats.pairs.values()) == 30


SOURCE = '''\
class Llama:
    @property
    def wool(self):  # in kilograms
        """
        Return the wool,   as of
        today (e.g. after shearing). More is said here.

        And here.
        """

        # Weighed, not guessed.
        text = """
kept as it is
        """

        return self._wool + len(text)\x0c
'''


def test_code_keeps_comments_and_layout_and_loses_its_docstring(tmp_path, code_base):
    (code_base / "package" / "m0.py").write_text(SOURCE)
    build(code_base, tmp_path / "out", held_out=0.1)
    [row] = [row for row in rows(tmp_path / "out") if row["meta"]["qualname"] == "Llama.wool"]
    assert code_of(row) == textwrap.dedent('''\
        @property
        def wool(self):  # in kilograms
            # Weighed, not guessed.
            text = """
        kept as it is
            """

            return self._wool + len(text)''')
    assert row["messages"][1]["content"] == "Return the wool, as of today (e.g. after shearing)."
    assert row["meta"]["module"] == "package.m0"


@pytest.mark.parametrize(
    "function",
    [
        'def f(): """A docstring on the line of its function."""; return 5 + 7',
        'def f():\n    """Nothing but a docstring is here."""',
        'def f():\n    """Nothing but a raise is left over here."""\n    raise NotImplementedError',
        'def f():\n    """Nothing but dots is left over here."""\n    ...',
        'def f():\n    """Code follows on the same line as this."""; x = 3\n    return x',
    ],
)
def test_functions_whose_code_says_nothing_are_left_out(tmp_path, code_base, function):
    (code_base / "package" / "m0.py").write_text(function + "\n")
    stats = build(code_base, tmp_path / "out", held_out=0.1)
    assert stats.unsuitable == 1 and sum(stats.pairs.values()) == 29


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum of two numbers.", "Return the sum of two numbers."),
        ("Return the sum\n   of two numbers\n\nmore", "Return the sum of two numbers."),
        ("Is this a llama? Or an alpaca?", "Is this a llama?"),
        ("Read a file (i.e. all of it). Then close it.", "Read a file (i.e. all of it)."),
        ("Use numpy.array in all of this. It is fast.", "Use numpy.array in all of this."),
        ("Wait at most 0.5 seconds for it. Then go.", "Wait at most 0.5 seconds for it."),
        ("`x` is left as it was found", "`x` is left as it was found."),
        ("Too short.", None),
        ("One longwordhere.", None),
        ("A word " * 40, None),
        ("open(file, mode) -> a file object", None),
        (">>> f(2)\n3 is what it gives", None),
        ("Arguments are as follows:", None),
        ("Set the colour :param red: how much", None),
        ("=== A heading of stars ===", None),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_the_near_duplicate_filter_finds_what_comparing_all_pairs_finds():
    draw = random.Random(13)
    texts = [" ".join(draw.choice("abcd") for _ in range(draw.randrange(1, 30))) for _ in range(150)]
    texts += [re.sub(r"^\w", "z", draw.choice(texts)) for _ in range(150)]  # one token changed
    kept: list[int] = []
    for i, text in enumerate(texts):
        if all(_jaccard(_shingles(text), _shingles(texts[j])) < SIMILARITY for j in kept):
            kept.append(i)
    assert near_duplicate_filter(texts) == kept
    assert len(kept) < 230


def test_sources_without_pairs_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such file or directory; give 'stdlib' or a path"):
        build(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "a.py").write_text("x = 3\n")
    with pytest.raises(DataError, match=r"0 usable functions with docstrings in 1 files leave none for train"):
        build(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"held_out is 0\.7; it is the share"):
        build(tmp_path, tmp_path / "out", held_out=0.7)
    assert not (tmp_path / "out").exists()
