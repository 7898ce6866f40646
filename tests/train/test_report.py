"""The page that a run ends with: complete, escaped, and made from whatever there is."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from arriero.checkpoint.sharded import Checkpoints
from arriero.train.environment import commit, describe
from arriero.train.metrics import MetricsLog
from arriero.train.report import smoothed, write_report

EVIL = "</pre></style><script>alert(1)</script><img src=x onerror='alert(2)'>&\""


def write_run(run_dir: Path, steps: int = 13, total: int = 13) -> None:
    (run_dir / "config.toml").write_text('recipe = "sft"\nmodel = "smollm2-135m"\n[data]\ntrain = "a/pairs.jsonl"\n')
    (run_dir / "environment.json").write_text(json.dumps(describe()))
    (run_dir / "data.json").write_text(json.dumps({"examples": 4211, "lengths": {"p50": 110}, "file": EVIL}))
    with MetricsLog(run_dir) as log:
        log.event("validation", step=0, loss=2.75)
        for step in range(1, steps + 1):
            log.step(
                {"step": step, "loss": math.nan if step == 3 else 3 / step, "lr": 1e-4, "tokens": 1009 * step}
                | {"trained_tokens": 101 * step, "seconds": 5.0 * step, "memory_bytes": 1_710_000_000, "skipped": 1}
            )
        log.event("validation", step=7, loss=1.251)
        log.event("validation", step=steps, loss=1.3)
    for step in (7, steps):
        Checkpoints(run_dir).save(step, {"weights": {"a": torch.zeros(100_000)}}, {"total_steps": total})
    rows = [
        {"prompt": "def f(): ...", "reference": "Do it.", "before": "The function `f`", "after": "Does it."},
        {"prompt": EVIL, "reference": EVIL, "after": ""},
    ]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Tags, their attributes, and the text outside of <style>; checks that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_the_report_says_what_was_trained_on_what_and_what_came_of_it(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = page_of(tmp_path)
    for expected in (
        "smollm2-135m, sft on pairs.jsonl",
        "13 steps over 1,313 trained tokens (13,117 read): validation loss from 2.750 to 1.251 at step 7.",
        "1m05s training time",
        "202 tokens/s",
        "1.71 GB peak memory",
        "1 steps skipped",
        "before The function `f` after Does it. reference Do it.",
        "examples 4,211",
        "lengths p50 110",
        'recipe = "sft"',
        f"torch {torch.__version__}",
        "7 1.2510 0.4 MB best",
        "13 1.3000 0.4 MB",
    ):
        assert expected in page.text, expected


def test_the_report_needs_no_other_file_and_runs_nothing(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = page_of(tmp_path)
    assert len(page.links) == 2
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in page.links)
    assert "script" not in page.tags
    assert page.handlers == []
    assert page.text.count(re.sub(r"\s+", " ", EVIL)) == 3  # prompt, reference, data: as text


def test_loss_png_has_both_curves(tmp_path: Path) -> None:
    from matplotlib.image import imread

    write_run(tmp_path)
    write_report(tmp_path)
    pixels = imread(tmp_path / "loss.png")[:, :, :3]
    for colour in ("2f6f8f", "c4622d"):
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        near = (torch.from_numpy(pixels) - wanted).abs().amax(-1) < 0.01
        assert near.any(0).sum() > 300, colour  # columns of the picture that the curve passes


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, steps=13, total=1700)
    assert "Stopped at step 13 of 1,700 over" in page_of(tmp_path).text


@pytest.mark.parametrize("present", ["none", "metrics.jsonl", "samples.jsonl", "config.toml", "checkpoints"])
def test_any_part_may_be_missing(tmp_path: Path, present: str) -> None:
    write_run(tmp_path)
    for name in ("config.toml", "environment.json", "data.json", "metrics.jsonl", "samples.jsonl"):
        if name != present:
            (tmp_path / name).unlink()
    if present != "checkpoints":
        (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    page = page_of(tmp_path)
    assert (tmp_path / "loss.png").exists() == (present == "metrics.jsonl")
    expected = {
        "none": "No step has been logged.",
        "metrics.jsonl": "13 steps",
        "samples.jsonl": "Held-out prompts",
        "config.toml": "smollm2-135m",
        "checkpoints": "Checkpoints",
    }
    for name, text in expected.items():
        assert (text in page.text) == (name == present or (name == "none" and present != "metrics.jsonl")), text


def test_files_cut_short_by_a_kill_do_not_stop_the_report(tmp_path: Path) -> None:
    write_run(tmp_path)
    for name in ("environment.json", "data.json", "metrics.jsonl", "samples.jsonl"):
        path = tmp_path / name
        path.write_text(path.read_text()[:-5])
    assert "13 steps" in page_of(tmp_path).text


def test_smoothing_weighs_both_sides_and_passes_over_what_is_not_finite() -> None:
    a, b, c = 2.0, 3.0, 7.0
    w = 0.8
    expected = [
        (a + w * b + w**3 * c) / (1 + w + w**3),
        (w * a + b + w**2 * c) / (w + 1 + w**2),
        (w**2 * a + w * b + w * c) / (w**2 + w + w),
        (w**3 * a + w**2 * b + c) / (w**3 + w**2 + 1),
    ]
    assert smoothed([a, b, math.nan, c]) == pytest.approx(expected)
    assert all(math.isnan(value) for value in smoothed([math.nan, math.inf]))


def test_the_environment_is_json_and_names_versions_hardware_and_command() -> None:
    environment = json.loads(json.dumps(describe()))
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["memory_bytes"] > 10**8
    assert environment["cpu"]
    assert environment["commit"] == commit()
    assert environment["commit"] is None or re.fullmatch(r"[0-9a-f]{40,64}(\+changes)?", environment["commit"])


def test_a_pretraining_run_shows_bits_per_byte_and_what_the_model_says_from_step_to_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(10):
            texts = [f"Once {step}", f"def {step} {EVIL}"]
            log.event("validation", step=step, loss=3.0 - step / 10, bits_per_byte=1.5 - step / 10, samples=texts)
        log.step(
            {"step": 9, "loss": 2.0, "lr": 1e-3, "tokens": 7, "trained_tokens": 7, "seconds": 1.0}
            | {"memory_bytes": 1, "skipped": 0, "mfu": 0.53}
        )
    page = Page(write_report(tmp_path).read_text())
    assert "0.600 bits per byte" in page.text and "53% model-FLOP use" in page.text
    assert all(f"step {step} Once {step}" in page.text for step in (0, 3, 6, 9)) and "Once 4" not in page.text
    assert page.tags.count("script") == 0


def test_prompts_that_changed_on_resume_are_shown_with_what_was_said_to_them(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('prompts = ["Twice", "Once", "Thrice"]\n')
    with MetricsLog(tmp_path) as log:
        for step, texts in enumerate((["Once a", "def b"], ["Once c", "def d"], ["Twice e", "Once f", "Thrice g"])):
            log.event("validation", step=step, loss=2.0, samples=texts)
    text = Page(write_report(tmp_path).read_text()).text
    assert "step 0 Once a step 1 Once c step 2 Once f" in text and "step 2 Twice e" in text and "Thrice g" in text
    assert "def" not in text


def test_a_validation_without_bytes_has_no_bits_per_byte(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.event("validation", step=0, loss=2.0, bits_per_byte=None)
    assert "bits per byte" not in Page(write_report(tmp_path).read_text()).text
