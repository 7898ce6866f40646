"""Text as it grows: wherever tokens end, it is cut where the whole text would be."""

from __future__ import annotations

import random

import pytest

from arriero.infer.answer_text import AnswerText


class Bytes:
    """A tokenizer whose ids are whatever bytes a test gives them."""

    strips_space = False

    def __init__(self, parts):
        self.parts, self._special_texts = parts, {}

    def token_bytes(self, i):
        return self.parts[i]

    def stream(self):
        from arriero.tokenizer.base import TokenStream

        return TokenStream(self, skip_special=True)


def cut(text: str, stops) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete, of several the longest."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def parts_of(data: bytes, rng) -> list[bytes]:
    cuts = sorted(rng.sample(range(len(data) + 1), min(len(data), rng.randint(0, 8))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("seed", range(400))
def test_a_stop_string_cuts_alike_wherever_tokens_end(seed):
    rng = random.Random(seed)
    letters = rng.choice(("ab", "aé🦙", "a\n"))
    text = "".join(rng.choice(letters) for _ in range(rng.randint(0, 30)))
    stops = tuple({"".join(rng.choice(letters) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))})
    parts = parts_of(text.encode(), rng)
    answer, said = AnswerText(Bytes(parts), stops), ""
    for i in range(len(parts)):
        said += answer.push(i)
        assert text.startswith(said)
        if answer.stopped_by is not None:
            break
    assert (said + answer.flush(), answer.stopped_by) == cut(text, stops)


def test_what_may_begin_a_stop_string_is_held_back_and_nothing_else_is():
    parts = [b"one ", b"<e", b"x", b"<en", b"d", b">", b" more"]
    answer = AnswerText(Bytes(parts), ("<end>",))
    assert [answer.push(i) for i in range(6)] == ["one ", "", "<ex", "", "", ""]
    assert (answer.stopped_by, answer.flush()) == ("<end>", "")


def test_a_text_that_ends_within_a_character_or_a_stop_string_ends_with_what_was_held():
    answer = AnswerText(Bytes([b"a<e", "é".encode()[:1]]), ("<end>",))
    assert [answer.push(0), answer.push(1), answer.flush()] == ["a", "", "<e\ufffd"]
