"""What `data inspect` shows: the model's view of a row, and numbers that can be counted by hand."""

import io

import numpy as np
import pytest
from rich.console import Console

from arriero.data.inspect import inspect, length_histogram
from arriero.errors import ConfigError, DataError

from .conftest import turns, write_rows


def shown(path, tokenizer, *, color=None, **settings):
    said = io.StringIO()
    console = Console(file=said, width=150, force_terminal=color is not None, color_system=color)
    stats = inspect(path, tokenizer, console=console, **settings)
    return said.getvalue(), stats


@pytest.fixture
def path(tmp_path):
    talk = turns("How many? [bold]", "Four [/] legs 🦙.", "And <|im_end|>?", "Wool.")
    return write_rows(tmp_path / "r.jsonl", [{"messages": talk}, {"messages": turns("a", "b")}])


def test_rows_show_special_tokens_and_mark_exactly_what_is_trained(path, tokenizer):
    text, _ = shown(path, tokenizer, n_rows=1)
    assert f"row 1 of {path}: " in text and "row 2" not in text
    assert (
        "<|im_start|>user\nHow many? [bold]<|im_end|>\n<|im_start|>assistant\n⟦Four [/] legs 🦙.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd <|im_end|>?<|im_end|>\n<|im_start|>assistant\n⟦Wool.<|im_end|>⟧"
    ) in text


def test_trained_tokens_are_green_and_special_ones_reversed(path, tokenizer):
    text, _ = shown(path, tokenizer, n_rows=1, color="standard")
    assert "\x1b[1;32mWool.\x1b[0m\x1b[1;7;32m<|im_end|>\x1b[0m" in text and "⟦" not in text
    assert "\x1b[2mAnd <|im_end|>?\x1b[0m\x1b[2;7m<|im_end|>\x1b[0m" in text  # the user's text is not the token


def test_the_numbers_are_those_of_the_rows(path, tokenizer):
    text, stats = shown(path, tokenizer, n_rows=0, seq_len=60)
    assert stats.examples == 2 and f"{stats.trained_tokens:,} ({stats.trained_share:.1%})" in text
    assert "longer than 60 (left out of training)" in text


def test_rows_can_be_shown_from_any_on(path, tokenizer):
    text, _ = shown(path, tokenizer, n_rows=5, first=1)
    assert "row 1 of" not in text and "row 2 of" in text
    with pytest.raises(DataError, match=r"has 2 examples, numbered from 0; there is none with number 2"):
        shown(path, tokenizer, first=2)
    with pytest.raises(ConfigError, match="rows is -1; give a number of rows to print, or 0"):
        shown(path, tokenizer, n_rows=-1)
    with pytest.raises(ConfigError, match="seq_len is 0; a packed row holds 1 token at least"):
        shown(path, tokenizer, seq_len=0)


def test_the_histogram_counts_every_example_once():
    lengths = np.array([7] * 5 + [19] * 3 + [97])
    table = length_histogram(lengths)
    counts = [int(cell) for cell in table.columns[1].cells]
    assert sum(counts) == 9 and max(counts) == 5
    bounds = [tuple(map(int, cell.split(" to "))) for cell in table.columns[0].cells]
    assert bounds[0][0] == 7 and bounds[-1][1] == 97
    assert [sum(low <= n <= high for n in lengths) for low, high in bounds] == counts
    assert length_histogram(np.array([13, 13])).row_count == 1


def test_both_sides_of_a_preference_are_shown_behind_their_prompt(tmp_path, tokenizer):
    rows = [{"prompt": "Legs?", "chosen": "Four.", "rejected": "Five.", "rating": "better", "chosen_safe": True}]
    text, stats = shown(write_rows(tmp_path / "p.jsonl", rows), tokenizer)
    assert text.count("Legs?<|im_end|>") == 1 and "; better" in text
    assert "-- chosen, safe: 3 trained\n\n⟦Four.<|im_end|>⟧" in text and "-- rejected: 3 trained\n\n⟦Five.<|im" in text
    assert (stats.pairs, stats.by_kind, stats.trained_tokens) == (1, {"pair": 1}, 6)
    assert "pairs of a better and a worse answer" in text
