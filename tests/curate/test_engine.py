"""The engine gives the same bytes however it is run, and through any crash; what the steps drop is counted and said."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arriero.curate import engine, sources
from arriero.curate.config import CurateConfig
from arriero.curate.engine import curate
from arriero.curate.parts import document_line
from arriero.errors import ConfigError, DataError, UserError
from arriero.io.files import locked
from arriero.io.records import read_records

from .conftest import corpus_rows, dropped, hashes, kept, prose, run

ALL = (
    "normalise", "url-dedup", "language", "gopher-repetition", "gopher-quality", "licence", "code", "exact-dedup",
    "line-dedup", "near-dedup", "scrub",
)  # fmt: skip


def test_each_step_drops_and_changes_what_it_is_for(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "out", steps=ALL)
    assert dropped(manifest) == {
        "normalise": {"empty": 1},
        "url-dedup": {"same URL, older": 1},
        "language": {"language": 1},
        "gopher-repetition": {"top_3gram_char_frac … > 0.18": 1},
        "gopher-quality": {"words … < 50": 1},
        "licence": {"licence": 1},
        "code": {"line … > 1000": 1},
        "exact-dedup": {"same text": 1},
        "near-dedup": {"near duplicate": 1},
    }
    documents = {document.id: document for document in kept(tmp_path / "out")}
    gone = {"german", "empty", "short", "same-as-3", "near-7", "repeats", "old", "code-gpl", "code-data"}
    assert list(documents) == [row["id"] for row in corpus_rows() if row["id"] not in gone]
    assert documents["prose-5"].text == prose(5)
    assert documents["mail"].text.endswith("Write to email@example.com from 192.0.2.1 or 10.0.0.1.")
    assert documents["prose-65"].text == prose(65), "a line of ten documents is gone"
    assert documents["code-mit"].text == "# SPDX-License-Identifier: MIT\n\n\n\n\nprint('hello')"
    assert documents["code-mit"].meta == {"licence": "mit"}
    assert documents["prose-5"].meta["language"] == "en" and documents["prose-5"].url == "https://x.org/5"


def test_the_counts_of_the_manifest_add_up(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "out", steps=ALL)
    documents = kept(tmp_path / "out")
    read = sum(source["documents"] for source in manifest["read"].values())
    assert read == len(corpus_rows())
    assert manifest["documents"] == len(documents) == sum(shard["documents"] for shard in manifest["shards"])
    assert manifest["characters"] == sum(len(document.text) for document in documents)
    assert read - sum(sum(reasons.values()) for reasons in dropped(manifest).values()) == len(documents)
    removed = sum(step["characters_removed"] for step in manifest["steps"])
    assert sum(s["characters"] for s in manifest["read"].values()) - removed == manifest["characters"]
    assert len(manifest["shards"]) > 1
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]} == {
        name: digest for name, digest in hashes(tmp_path / "out").items() if name.startswith("shard-")
    }


def test_nothing_but_the_result_is_left_behind(corpus, tmp_path):
    run(corpus, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("shard-")}
    assert names == {"manifest.json", "report.html", "config.toml"}


def test_parquet_and_jsonl_hold_the_same_documents(corpus, tmp_path):
    run(corpus, tmp_path / "parquet")
    manifest = run(corpus, tmp_path / "jsonl", format="jsonl.zst")
    assert manifest["shards"][0]["file"] == "shard-00000.jsonl.zst"
    assert kept(tmp_path / "jsonl") == kept(tmp_path / "parquet")


def test_the_size_of_the_pieces_changes_no_document(corpus, tmp_path):
    run(corpus, tmp_path / "small", steps=ALL, part_mb=0.007)
    run(corpus, tmp_path / "whole", steps=ALL, part_mb=5)
    assert kept(tmp_path / "small") == kept(tmp_path / "whole")


def test_any_number_of_workers_writes_the_same_bytes(corpus, tmp_path):
    for workers in (1, 2):
        run(corpus, tmp_path / str(workers), steps=ALL, workers=workers)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")


@pytest.mark.slow
def test_ray_writes_the_same_bytes(corpus, tmp_path):
    pytest.importorskip("ray")
    run(corpus, tmp_path / "here", steps=ALL)
    run(corpus, tmp_path / "ray", steps=ALL, ray="local", workers=2)
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "here")


def test_a_ray_cluster_that_does_not_answer_is_named_at_once(corpus, tmp_path):
    pytest.importorskip("ray")
    with socket.socket() as taken:  # a port that is bound but not listened to refuses
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            UserError, match=rf"no Ray cluster at '{address}' \(.*\); start one with `ray start --head`"
        ):
            run(corpus, tmp_path / "out", ray=address)


def start(corpus, out, workers=1):
    """A process that says when its imports are done and then curates."""
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from curate.conftest import run; from curate.test_engine import ALL\n"
        "if __name__ == '__main__':\n"
        "    print('ready', flush=True)\n"
        "    run(Path(sys.argv[2]), Path(sys.argv[3]), steps=ALL, workers=int(sys.argv[4]))\n"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parents[1]), str(corpus), str(out), str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def killed_until_done(corpus, out, workers, seed, longest):
    """Kill runs after random times, longer by and by, until one ends by itself; returns the number of kills."""
    rng = random.Random(seed)
    for kills in range(100):
        with start(corpus, out, workers) as process:
            try:
                process.wait(rng.uniform(0, longest) * 1.1**kills)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                continue
            assert process.returncode == 0, process.stderr.read()
            return kills
    raise AssertionError("never done")


def test_killed_at_random_moments_a_run_loses_repeats_and_halves_nothing(corpus, tmp_path):
    began = time.monotonic()
    run(corpus, tmp_path / "whole", steps=ALL)
    longest = time.monotonic() - began
    assert killed_until_done(corpus, tmp_path / "killed", 1, 0, longest) >= 1
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(11))
def test_killed_at_many_random_moments_with_a_pool(corpus, tmp_path, seed):
    run(corpus, tmp_path / "whole", steps=ALL)
    killed_until_done(corpus, tmp_path / "killed", 2 - seed % 2, seed, 1.5)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


class Crash(BaseException):
    """Stands for a kill at one exact place."""


def test_a_crash_at_each_single_write_resumes_to_the_same_bytes(corpus, tmp_path, monkeypatch):
    """Before each rename in turn: every state that a kill can leave on the disk."""
    settings = dict(steps=ALL, part_mb=0.03, shard_mb=0.06)
    run(corpus, tmp_path / "whole", **settings)
    whole, replace, written = hashes(tmp_path / "whole"), os.replace, 0

    def crash_at(limit):
        def counted(*names):
            nonlocal written
            written += 1
            if written == limit:
                raise Crash
            replace(*names)

        return counted

    out, crashes = tmp_path / "out", 0
    for limit in range(1, 1000, 5):  # each run gets at most five writes further
        written = 0
        monkeypatch.setattr(os, "replace", crash_at(limit % 6 + 1))
        try:
            run(corpus, out, **settings)
            break
        except Crash:
            crashes += 1
    assert crashes > 20
    assert hashes(out) == whole


def test_half_a_shard_of_a_killed_run_is_removed(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "finish_shard", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        run(corpus, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "out" / ".shard-00000.parquet.4711.tmp").write_bytes(b"PAR1")
    run(corpus, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


def test_a_rule_judges_the_text_as_the_step_before_left_it(tmp_path):
    notice = "Enable javascript " + "# " * 300 + "."
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose(1) + "\n" + notice}) + "\n")
    manifest = run(tmp_path / "a.jsonl", tmp_path / "before", steps=("fineweb", "gopher-quality", "c4"))
    assert dropped(manifest) == {"gopher-quality": {"hash_ratio … > 0.1": 1}}
    manifest = run(tmp_path / "a.jsonl", tmp_path / "after", steps=("fineweb", "c4", "gopher-quality"))
    assert dropped(manifest) == {} and kept(tmp_path / "after")[0].text == prose(1)


def test_a_worker_that_dies_is_replaced_and_its_work_done_again(corpus, tmp_path):
    run(corpus, tmp_path / "whole", steps=ALL)
    with start(corpus, tmp_path / "out", workers=2) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("children of a process are listed by Linux only")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            pids = children.read_text().split()
            workers = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            if workers:
                os.kill(int(workers[-1]), signal.SIGKILL)
                break
            time.sleep(0.01)
        assert process.wait(60) == 0, process.stderr.read()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_finished_directory_is_left_as_it_is(corpus, tmp_path):
    first = run(corpus, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(corpus, tmp_path / "out", workers=2) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_other_settings_are_refused_by_name(corpus, tmp_path):
    run(corpus, tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"out was begun with other .*; changed: part_mb \(0\.031 -> 0\.02\)\. Give the old"
    ):
        run(corpus, tmp_path / "out", part_mb=0.02)
    with pytest.raises(ConfigError, match=r'changed: steps \(\["normalise", .* -> \["normalise"\]\)\. Give the old'):
        run(corpus, tmp_path / "out", steps=("normalise",))


def test_settings_with_which_nothing_was_done_may_be_mended(corpus, tmp_path):
    with pytest.raises(DataError, match="no column 'body'"):
        run(corpus, tmp_path / "out", text_key="body")
    assert run(corpus, tmp_path / "out")["documents"] > 0


def test_a_run_that_stopped_at_a_broken_row_goes_on_with_skip(corpus, tmp_path):
    with open(corpus / "b.jsonl", "a") as file:
        file.write("{broken\n" + json.dumps({"text": prose(400)}) + "\n")
    with pytest.raises(DataError, match="--on-error skip"):
        run(corpus, tmp_path / "out")
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".work" / "read").glob("*.arrow")}
    assert len(parts) > 3
    run(corpus, tmp_path / "whole", on_error="skip")
    assert run(corpus, tmp_path / "out", on_error="skip")["unreadable"]["count"] == 1
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_how_a_source_is_spelled_makes_no_other_plan(corpus, tmp_path):
    first = run(corpus, tmp_path / "out")
    assert run(f"{corpus}/../{corpus.name}/", tmp_path / "out") == first


def test_an_output_directory_below_a_source_is_no_source(corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path / "whole")
    out = corpus / "out"
    monkeypatch.setattr(engine.CurationRun, "_manifest", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        run(corpus, out)
    monkeypatch.undo()
    assert list(out.glob("shard-*"))
    run(corpus, out)
    assert kept(out) == kept(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"all sources lie in .*out, where the result goes; give another --out"):
        run(out, out)


def test_a_file_is_opened_once_however_many_parts_it_makes(corpus, tmp_path, monkeypatch):
    """Each part from the beginning of its file would make a large one take quadratic time."""
    opened = []
    monkeypatch.setattr(sources, "read_records", lambda path, *rest: opened.append(path) or read_records(path, *rest))
    run(corpus, tmp_path / "out")
    assert opened == [corpus / "a.jsonl", corpus / "b.jsonl"]


def test_changed_sources_are_refused_by_name(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.CurationRun, "_write_shards", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        run(corpus, tmp_path / "out")
    monkeypatch.undo()
    (corpus / "b.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ConfigError, match=r"changed: the source files \(raw/b\.jsonl\)"):
        run(corpus, tmp_path / "out")


def test_a_directory_of_something_else_or_in_use_is_refused(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="out is not empty and holds no curation; give a new directory with --out"):
        run(corpus, tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").unlink()
    with (
        locked(tmp_path / "out", ConfigError("")),
        pytest.raises(ConfigError, match="in use by another `arriero curate`"),
    ):
        run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "out")


def test_a_broken_row_stops_the_run_or_is_counted(corpus, tmp_path):
    with open(corpus / "a.jsonl", "a") as file:
        file.write("{broken\n")
    message = r"row 72 of .*a\.jsonl: broken JSON: .* \(--on-error skip counts such rows and goes on\)"
    for workers in (1, 2):
        with pytest.raises(DataError, match=message):
            run(corpus, tmp_path / "out", workers=workers)
    manifest = run(corpus, tmp_path / "skipped", on_error="skip")
    assert manifest["unreadable"]["count"] == 1 and "row 72" in manifest["unreadable"]["first"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sources=()), "no sources; give files, directories, 'stdlib' or Hub data set ids"),
        (dict(out=""), "no output directory; give one with --out DIR"),
        (dict(steps=("normalize",)), r"steps has 'normalize', which is no step; did you mean 'normalise'\?"),
        (dict(steps=("scrub", "scrub")), "steps has 'scrub' more than once; keep one of them"),
        (dict(part_mb=0.0), r"part_mb is 0\.0; it must be a number of at least 0\.001"),
        (dict(steps=("dirty-words",)), r'steps has "dirty-words", but dirty_words\.words is empty; give it, or'),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        curate(CurateConfig(**{"sources": ("stdlib",), "out": "unused", **settings}))


def test_the_lines_of_a_jsonl_shard_leave_out_what_is_empty(corpus, tmp_path):
    run(corpus, tmp_path / "out", steps=("normalise",))
    document = kept(tmp_path / "out")[17]
    assert json.loads(document_line(document)) == {"id": "german", "text": document.text, "source": "raw"}
