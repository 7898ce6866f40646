r"""Finds the final answer in a text: \boxed{...}, "#### ...", "the answer is ...", else the whole text.

A hedged answer names several: two boxes or two marked lines that differ. Which of them counts would be ours to choose,
and a model in training soon finds out; so several different ones are none.
"""

from __future__ import annotations

import re

_HASHES = re.compile(r"^[ \t]*#{4}[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_SAID = re.compile(
    r"\b(?:final |correct )?answer\b(?:[ \t]+is\b[ \t]*:?|[ \t]*[:=])[ \t\n]*(\S[^\n]*?)[ \t]*$", re.I | re.M
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_THOUGHT = re.compile(r"\A.*</think>", re.DOTALL)


def final_answers(text: str) -> list[str]:
    """The final answers that a text marks as such, each once, in order; without any mark, the text itself.

    Boxes count before hashes, and these before "the answer is", as a text that has several of them repeats itself. What
    a model thinks before `</think>` is no part of the answer.
    """
    text = _THOUGHT.sub("", text)
    found = boxed(text) or _HASHES.findall(text) or [_bare(said) for said in _SAID.findall(text)]
    return list(dict.fromkeys(" ".join(part.split()) for part in found)) or [text.strip()]


def boxed(text: str) -> list[str]:
    r"""The contents of each \boxed{...}, braces within it balanced; one that does not close has none."""
    found = []
    for start in _BOX.finditer(text):
        depth = 1
        for end in range(start.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                found.append(text[start.end() : end])
                break
    return found


def _bare(said: str) -> str:
    """What was said, without the signs around it."""
    return said.strip().strip("*`\"'").rstrip(".").strip("*`\"' ")
