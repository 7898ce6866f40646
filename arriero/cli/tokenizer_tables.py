"""Tables of the `arriero tokenizer` commands: tokens side by side, comparisons, and training reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.compare import ALL, Comparison, Measure

# Neighbouring tokens differ in background; special tokens stand out by being reversed.
_STYLES = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
_MARKS = {"\n": "⏎\n", "\t": "→\t", "\r": "␍"}


def token_view(tokenizer: Tokenizer, ids: Sequence[int], colour: bool = True) -> Text | str:
    """Return tokens in alternating colours, or without colour between bars; a space shows as "·", a part of a character
    as its bytes."""
    specials = {i: text for text, i in tokenizer.special_ids.items()}
    view = Text()
    shown = []
    for n, i in enumerate(ids):
        label = specials.get(i) or _label(tokenizer.token_bytes(i))
        shown.append(label)
        view.append(label, "reverse bold" if i in specials else _STYLES[n % len(_STYLES)])
    return view if colour else "|".join(shown)


def _label(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in data)
    return "".join(_MARKS.get(c, "·" if c == " " else c if c.isprintable() else f"<{ord(c):02X}>") for c in text)


def comparison_view(results: Sequence[Comparison]) -> Group:
    """Return a table over all text and, where there are several groups, one of what each tokenizer makes of each."""
    groups = [group for group in results[0].groups if group != ALL]
    title = f"all text: {groups[0]}" if len(groups) == 1 else "all text"
    whole = _table(title, ["tokenizer"], ["ids", "tokens", *_MEASURES, "MB/s"])
    for result in results:
        m = result.groups[ALL]
        whole.add_row(result.name, f"{result.vocab_size:,}", f"{m.tokens:,}", *_measured(m), f"{result.mb_per_s:.1f}")
    if len(groups) < 2:
        return Group(whole)
    parts = _table("by group", ["group", "tokenizer"], ["MB", *_MEASURES])
    for group in groups:
        for n, result in enumerate(results):
            m = result.groups[group]
            first = [group, f"{m.bytes / 1e6:.2f}"] if n == 0 else ["", ""]
            parts.add_row(first[0], result.name, first[1], *_measured(m))
    return Group(whole, parts)


_MEASURES = ("bytes\n/token", "chars\n/token", "tokens\n/word", "un-\nknown", "fall-\nback")


def _measured(m: Measure) -> list[str]:
    ratios = [f"{ratio:.3f}" for ratio in (m.bytes_per_token, m.characters_per_token, m.fertility)]
    return ratios + [f"{share:.2%}" for share in (m.unknown_share, m.fallback_share)]


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in names:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def training_view(report: Mapping[str, Any]) -> Table:
    """Return a training report as a table of two columns."""
    text, held_out, vocabulary = report["text"], report["held_out"], report["vocabulary"]
    table = Table(show_header=False)
    table.add_column()
    table.add_column()
    table.add_row("vocabulary", f"{report['vocab_size']:,} ids, {report['special_tokens']} of them special")
    table.add_row("text read", f"{text['bytes'] / 1e6:,.1f} MB in {text['documents']:,} documents")
    table.add_row("learned from", f"{text['learned_from_bytes'] / 1e6:,.1f} MB")
    note = ", which it learned from: give more text" if text["held_out_was_learned_from"] else ""
    table.add_row("measured on", f"{text['held_out_bytes'] / 1e6:,.2f} MB held out{note}")
    table.add_row("bytes per token", f"{held_out['bytes_per_token']:.3f}")
    table.add_row("tokens per word", f"{held_out['fertility']:.3f}")
    table.add_row("unknown, fallback", f"{held_out['unknown_share']:.3%}, {held_out['fallback_share']:.3%} of tokens")
    table.add_row("used by that text", f"{vocabulary['used_share']:.1%} of ids")
    table.add_row(
        "letters only", f"{vocabulary['letters_only']:,} tokens; {vocabulary['begin_with_a_space']:,} begin a word"
    )
    table.add_row("whitespace only", f"{vocabulary['whitespace_only']:,} tokens")
    table.add_row("beyond ASCII", f"{vocabulary['beyond_ascii']:,} tokens")
    table.add_row(
        "longest", Text(" ".join(_label(token.encode())[:30].replace("\n", "") for token in vocabulary["longest"][:5]))
    )
    table.add_row("seconds", f"{report['seconds']['read']} reading, {report['seconds']['learn']} learning")
    return table
