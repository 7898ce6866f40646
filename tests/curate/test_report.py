"""report.html is a file that a person opens without a network: all reasons, and examples as text."""

import json
import re

from arriero.curate.stats import changes

from .conftest import prose, run

STEPS = ("normalise", "gopher-quality", "near-dedup", "scrub")


def test_the_report_shows_each_steps_reasons_and_examples_and_loads_nothing(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "out", steps=STEPS)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h3>([\w-]+)</h3>", page) == list(STEPS)
    for step in manifest["steps"]:
        for reason, count in step["dropped"].items():
            assert re.search(rf"<td>{re.escape(reason).replace('<', '&lt;')}</td><td class=\"num\">{count}<", page)
    assert "jane.doe+x@mail.example.org" in page and "kept instead: prose-7" in page
    assert not re.search(r"""(?:src|href|srcset)\s*=\s*["'](?!data:|#)|<script|url\(|@import""", page)


def test_examples_are_shown_as_text_whatever_they_hold(tmp_path):
    row = {"text": f"<script>alert(1)</script> {prose(1)}", "id": "<img src=x>", "source": "</pre><b>"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    run(tmp_path / "a.jsonl", tmp_path / "out", steps=("gopher-quality",))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x" not in page and "</pre><b>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_an_example_of_a_change_begins_shortly_before_it():
    line = "word " * 1000
    shown = changes(f"same\n{line}a@b.org{line}", f"same\n{line}email@example.com{line}")
    assert shown["removed"].startswith("[...] " + line[-60:] + "a@b.org") and shown["removed"].endswith(" [...]")
    assert shown["added"].startswith("[...] " + line[-60:] + "email@")
    assert changes("a\nb\nc", "a\nc") == {"removed": "b", "added": ""}
