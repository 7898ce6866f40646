"""Which messages of a conversation are trained, what counts as their text, and whether the template rendered all of it.

A template reads the fields that its author thought of and silently ignores all others. So after rendering, each text of
the conversation is searched for: contents, reasoning, names and arguments of calls, and members of unknown names. Each
text must have its own place within the part of the rendering that its answer, or the messages between two answers,
produced: that "Cusco" occurs in the question does not prove that it was rendered in the call.

Price: for messages of role and content one `str.find` each; for others about five microseconds a text.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.errors import DataError

Message = Mapping[str, Any]

REASONING = ("reasoning_content", "thinking", "reasoning")  # what servers and data sets call it; the first one wins
# Members that say whether a message is trained, all with one meaning: axolotl's, OpenAI's, ms-swift's, NeMo's.
MARKS = ("train", "weight", "loss", "loss_mask", "training", "trainable")
# Members that look like marks but have no one meaning, or one that is not known here: never passed over in silence.
UNCLEAR_MARKS = frozenset(
    [
        *["mask", "masks", "masked", "ignore", "weights", "loss_weight", "loss_scale", "sample_weight"],
        *["train_detail", "training_detail"],
    ]
)
_ANY_MARK = UNCLEAR_MARKS.union(MARKS)
_TRUTH = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "-0.0": False, "false": False}

_UNSEEN = frozenset("\u2028\u2029\u2800\u115f\u1160\u3164\uffa0")  # separators, and letters without a shape
_RESULTS = ("tool", "ipython", "function")  # roles of what a call gave
_LINKS = frozenset(["id", "type", "index"])  # of a call: they tie it to its result and are not read as text


# Marks


def mark_of(entry: Message) -> bool | None:
    """The meaning of the marks of a message or row: True for trained, False for context only, None without marks.

    1, 1.0, true (also as text) and 0, 0.0, false are known; raises DataError for anything else, for two that disagree,
    and for a name whose meaning differs between data sets.
    """
    if _ANY_MARK.isdisjoint(entry):
        return None
    for name in sorted(UNCLEAR_MARKS & entry.keys()):
        if entry[name] is not None:
            raise DataError(
                f"{name!r} ({entry[name]!r}) says in some data sets what is trained and in others what is not, or how "
                "much; call it 'train' (1: trained, 0: context only), or take it out"
            )
    said = {name: _truth(name, entry[name]) for name in MARKS if entry.get(name) is not None}
    if len(set(said.values())) > 1:
        both = ", ".join(f"{name!r} is {entry[name]!r}" for name in said)
        raise DataError(f"{both}, which contradict each other; keep one")
    return next(iter(said.values()), None)


def is_trained(message: Message) -> bool:
    """Whether a message is an answer to learn; raises DataError as `mark_of`, and for another role's marked for it."""
    mark = mark_of(message)
    if mark and message.get("role") != "assistant":
        raise DataError("it is marked to be trained, and only the assistant's messages are; take the mark out")
    return message.get("role") == "assistant" and mark is not False


def _truth(name: str, value: Any) -> bool:
    known = _TRUTH.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
    if known is None:
        raise DataError(f"{name!r} is {value!r}; give 1 or true (trained), or 0 or false (context only)")
    return known


# Texts


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, controls and zero-width characters only."""
    return not text.strip() or all(c in _UNSEEN or unicodedata.category(c) in ("Cc", "Cf", "Zs") for c in text)


def part_texts(content: list[Any]) -> list[str]:
    """The texts of a content that is a list of {type: text, text} parts; raises DataError for any other part."""
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise DataError(f"part {i} of its content is of type {type(part).__name__}; make it {{type: text, text}}")
        kind, text = part.get("type") or "text", part.get("text")
        if kind != "text":
            raise DataError(
                f"part {i} of its content is of type {kind!r}, and only text can be trained on; write it as a text "
                "part (reasoning: as 'reasoning_content' beside the content), or drop the row"
            )
        if not isinstance(text, str):
            raise DataError(f"part {i} of its content has a text of type {type(text).__name__}; make it a text")
        for name in sorted(part.keys() - {"type", "text"}):
            if part[name]:
                raise DataError(f"part {i} of its content has the unknown member {name!r}; take it out")
        texts.append(text)
    return texts


@dataclass(frozen=True)
class _Text:
    """A text that must be found, under any of its spellings; `alone`: not as a part of a longer word."""

    where: str
    spellings: Sequence[str]
    alone: bool = False


def _texts(message: Message) -> Iterator[_Text]:
    """Every text in a message as templates are given it, contents first."""
    content = message.get("content")
    # A tool's result may be written as JSON.
    spell = _in_json if message.get("role") in _RESULTS else _as_it_is
    for text in part_texts(content) if isinstance(content, list) else [content]:
        if isinstance(text, str) and text.strip():
            yield _Text("content", spell(text.strip()))
    thoughts = [message[name] for name in REASONING if message.get(name) is not None]
    for k, thought in enumerate(thoughts):
        if thought not in thoughts[:k]:  # for_template gives a template the same reasoning by several names
            if isinstance(thought, str) and thought.strip():
                yield _Text("reasoning_content", [thought.strip()])
            else:
                yield from _leaves("reasoning_content", thought, False)
    for i, call in enumerate(message.get("tool_calls") or ()):
        inner = {k: v for k, v in call.items() if k not in _LINKS} if isinstance(call, dict) else call
        yield from _leaves(f"tool_calls[{i}]", inner, True)
    for name, value in message.items():
        if name not in ("role", "content", "tool_calls", "tool_call_id", *REASONING):
            yield from _leaves(name, value, name == "function_call")


def _leaves(where: str, value: Any, called: bool) -> Iterator[_Text]:
    """The texts in a member; of a call, its arguments' keys, numbers and truth values too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if called and ".arguments" in where:
                yield _Text(where, _in_json(key), alone=True)
            yield from _leaves(f"{where}.{key}", inner, called)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(f"{where}[{i}]", inner, called)
    elif isinstance(value, str):
        if text := value.strip():
            yield _Text(where, _in_json(text), alone=True)
    elif called and value is not None:
        yield _Text(where, list(dict.fromkeys([json.dumps(value), str(value)])), alone=True)


def first_text(rendered: str, message: Message) -> int | None:
    """The position of the first of a message's own texts in its rendering; None where none is found."""
    found = (rendered.find(spelling) for text in _texts(message) for spelling in text.spellings)
    return min((at for at in found if at >= 0), default=None)


def _as_it_is(text: str) -> list[str]:
    return [text]


def _in_json(text: str) -> list[str]:
    """A text unchanged, and as written within the quotes of JSON."""
    return list(dict.fromkeys([text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]]))


# Whether a template wrote it


def check_written(whole: str, messages: Sequence[dict[str, Any]], answers: Sequence[int], cuts: Sequence[int]) -> None:
    """Refuse a template that drops, reorders or rewrites: each text of `messages` must occur in `whole`.

    `cuts` are the offsets where the prompts and the `answers` (indices of messages) begin and end in turn. Texts must
    occur within the part of their message, and contents in their order.
    """
    begin = 0
    for k, (low, high) in enumerate(itertools.pairwise(cuts)):
        end = answers[k // 2] + k % 2 if k // 2 < len(answers) else len(messages)
        _check_stretch(whole[low:high], {i: list(_texts(messages[i])) for i in range(begin, end)}, messages)
        begin = end
    for i, message in enumerate(messages):
        if len(message.get("tool_calls") or ()) > 1:
            _check_results(whole, messages, i)


def _check_results(whole: str, messages: Sequence[dict[str, Any]], i: int) -> None:
    """Refuse results in another order than message i's calls unless the template writes the ids that match them."""
    results = list(itertools.takewhile(lambda m: m.get("role") in _RESULTS, messages[i + 1 :]))
    links = [result["tool_call_id"] for result in results if result.get("tool_call_id")]
    calls = [call.get("id") for call in messages[i]["tool_calls"] if isinstance(call, dict) and call.get("id") in links]
    free = _Places(whole)
    if links != calls and not all(free.take(str(link), alone=True) for link in [*calls, *links]):
        raise DataError(
            f"message {i + 1} ({results[0]['role']}): the results come in another order than the calls, and the chat "
            "template does not write the ids that tell them apart; put them in the order of the calls"
        )


def _check_stretch(stretch: str, texts: dict[int, list[_Text]], messages: Sequence[dict[str, Any]]) -> None:
    """Refuse a stretch of the rendering that lacks one of the texts of its messages, or a place for each."""
    every = [(i, text) for i, of_message in texts.items() for text in of_message]
    contents = [(i, text) for i, text in every if text.where == "content"]
    at = 0
    for i, text in contents:  # anywhere in the stretch, beside calls and reasoning, but in their order
        found = [(k, s) for s in text.spellings if (k := stretch.find(s, at)) >= 0]
        if not found:
            raise _not_written(i, messages[i], text)
        at = min(found)[0] + len(min(found)[1])
    if len(contents) < len(every):
        _check_places(stretch, every, messages)


def _check_places(stretch: str, texts: list[tuple[int, _Text]], messages: Sequence[dict[str, Any]]) -> None:
    """Refuse a stretch in which not each text has a place of its own."""
    free = _Places(stretch)
    longest_first = sorted(texts, key=lambda t: -len(t[1].spellings[0]))
    called = [name for message in messages for name in _called(message)]
    for i, text in longest_first:
        if any(free.take(spelling, text.alone) for spelling in text.spellings):
            continue
        if text.where == "name" and text.spellings[0] in called:
            continue  # of a tool's result: the call before it says the same
        raise _not_written(i, messages[i], text)


def _not_written(i: int, message: Message, text: _Text) -> DataError:
    role, shown = message.get("role"), repr(text.spellings[0][:40])
    if text.where == "content":
        return DataError(
            f"message {i} ({role}): the chat template drops, moves or rewrites {shown}; "
            "use a template that keeps every message as it is, or take the message out"
        )
    remedy = "take it out of the message"
    if text.where == "reasoning_content":
        remedy = "put it into the content as <think> ... </think>, or take it out"
        return DataError(
            f"message {i} ({role}): the chat template does not write the message's reasoning "
            f"({', '.join(REASONING)}): {shown}; use a template that writes it in every turn, {remedy}"
        )
    if text.where.startswith("function_call"):
        remedy = "write it as tool_calls: [{type: function, function: {name, arguments}}]"
    return DataError(
        f"message {i} ({role}): the chat template does not write {text.where!r}: {shown}; "
        f"use a template that does, or {remedy}"
    )


class _Places:
    """A text of which each place can be taken once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts: list[int] = []  # of the places taken, ascending
        self.ends: list[int] = []
        self.resume: dict[tuple[str, bool], int] = {}  # where a spelling was last found, all before being taken

    def take(self, spelling: str, alone: bool) -> bool:
        """Take the first free occurrence of `spelling`; False where there is none."""
        at = self.resume.get((spelling, alone), 0)
        while (at := self.text.find(spelling, at)) >= 0:
            end = at + len(spelling)
            k = bisect_right(self.ends, at)  # the first place that ends behind `at`
            if k < len(self.starts) and self.starts[k] < end:
                at = self.ends[k]
            elif alone and not self._stands_alone(at, end):
                at += 1
            else:
                self.starts.insert(k, at)
                self.ends.insert(k, end)
                self.resume[spelling, alone] = end
                return True
        return False

    def _stands_alone(self, at: int, end: int) -> bool:
        before, after = self.text[at - 1 : at] or " ", self.text[end : end + 1] or " "
        return not (_joins(before, self.text[at]) or _joins(self.text[end - 1], after))


def _joins(a: str, b: str) -> bool:
    """Whether two neighbouring characters belong to one word."""
    return (a == "_" or a.isalnum()) and (b == "_" or b.isalnum())


def _called(message: Message) -> Iterable[str]:
    for call in message.get("tool_calls") or ():
        name = function_name(call)
        if name:
            yield name


def function_name(entry: Any) -> str | None:
    """Return the name in a tool or a tool call: {"function": {"name": ...}}, or without the wrapping."""
    inner = entry.get("function", entry) if isinstance(entry, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


def check_tools(whole: str, without: str | None, tools: Iterable[Any]) -> None:
    """Refuse a template that drops tools: the names and descriptions of each must occur in `whole`.

    `without` is the conversation rendered without tools, None where the template refuses that.
    """
    for tool in tools:
        name = function_name(tool)
        if name is not None and (whole == without or name not in whole):
            raise DataError(
                f"the chat template drops the tool {name!r}; use a template with tools, or rows without them"
            )
        for text in _described(tool):
            if text.strip() and not any(spelling in whole for spelling in _in_json(text.strip())):
                raise DataError(
                    f"the chat template drops {text[:40]!r} of the tool {name!r}; use a template that writes tools "
                    "whole, or take it out"
                )


def _described(schema: Any) -> Iterator[str]:
    """The texts of a tool's JSON schema: descriptions, the names of parameters and the values they may have."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "description" and isinstance(value, str):
                yield value
            elif key == "enum" and isinstance(value, list):
                yield from (entry for entry in value if isinstance(entry, str))
            elif key == "properties" and isinstance(value, dict):
                yield from value
                yield from _described(list(value.values()))
            else:
                yield from _described(value)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _described(inner)
