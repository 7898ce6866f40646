"""Calls of tools: shown to the model, demanded by a grammar, and found in its answer.

Two forms are known, of which a template's own text tells which its model was trained on:

    hermes   <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>, any number of them    (Qwen, Hermes, SmolLM2)
    llama    {"name": "f", "parameters": {...}}, the whole answer                                  (Llama 3.1 and later)

A template that writes no tools, or calls in a form that is not known here, gets them in the first form, in a system
message of ours: what a model makes of that is its affair, but nothing that the client sent is dropped in silence.

Where a call is demanded (`tool_choice` required, or a function), the answer follows a grammar made of the tools'
schemas, so it is a call, to one of them, with arguments that its schema allows. Otherwise the answer is free, and a
call in it is told as soon as its name is complete; its arguments follow as they come, as the model wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from arriero.errors import UserError
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_chat
from arriero.tokenizer.template import ChatTemplate

Mode = Literal["none", "auto", "required"]
Style = Literal["hermes", "llama"]
Messages = Sequence[Mapping[str, Any]]
Pairs = tuple[tuple[str, str], ...]

BEGIN, END = "<tool_call>", "</tool_call>"
MAX_CALLS = 16  # in one answer that has to call
WHITESPACE = r"[ \n]{0,4}"
_NAMED = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')
_OURS = (
    "You may call functions to answer. These are the functions, as JSON schemas:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write a JSON object with its name and arguments within <tool_call> tags:\n"
    '<tool_call>\n{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}\n</tool_call>'
)


@dataclass(frozen=True)
class Tools:
    """What may be called, in OpenAI's form ({"type": "function", "function": {...}}), and whether it has to be."""

    tools: tuple[Mapping[str, Any], ...] = ()
    mode: Mode = "auto"
    only: tuple[str, ...] = ()
    """Names of those that may be called; empty: all."""
    parallel: bool = True

    @property
    def active(self) -> bool:
        """Whether a call may be answered."""
        return bool(self.tools) and self.mode != "none"

    @property
    def callable(self) -> dict[str, Mapping[str, Any]]:
        """Those that may be called, by name."""
        named = {tool["function"]["name"]: tool["function"] for tool in self.tools}
        return {name: named[name] for name in self.only} if self.only else named


def render(tokenizer: Tokenizer, messages: Messages, tools: Tools) -> tuple[list[int], Style]:
    """The ids of a conversation with its tools up to the answer, and the form that calls are answered in."""
    style = style_of(tokenizer)
    shown = list(tools.tools) if tools.mode != "none" else []
    called = any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)
    if style is None and (shown or called):
        return encode_chat(tokenizer, _in_our_form(messages, shown)), "hermes"
    return encode_chat(tokenizer, messages, shown or None), style or "hermes"


def style_of(tokenizer: Tokenizer) -> Style | None:
    """The form that the model's own template writes calls in; None where that is none of those known here."""
    template = tokenizer.chat_template
    if template is None:
        return None
    return _style_of(template.source, tuple(template.others.items()), tuple(template.special_tokens.items()))


@lru_cache(maxsize=64)
def _style_of(source: str | None, others: Pairs, special: Pairs) -> Style | None:
    """By what a template writes of a conversation with a call."""
    tool = {"name": "probe_tool", "description": "", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "call00001", "type": "function", "function": {"name": "probe_tool", "arguments": {"a": "b"}}}
    try:
        text = ChatTemplate(source, dict(special), dict(others)).render(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
            [{"type": "function", "function": tool}],
        )
    except UserError:
        return None
    if text.count("probe_tool") < 2:
        return None
    if re.search(r'<tool_call>\s*\{"name": "probe_tool", "arguments": \{"a": "b"\}\}\s*</tool_call>', text):
        return "hermes"
    if re.search(r'\{"name": "probe_tool", "parameters": \{"a": "b"\}\}', text):
        return "llama"
    return None


def _in_our_form(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose tools, calls and results are text."""
    rewritten = [_as_text(message) for message in messages]
    if tools:
        note = _OURS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if rewritten and rewritten[0]["role"] == "system":
            rewritten[0] = {**rewritten[0], "content": f"{_text(rewritten[0])}\n\n{note}"}
        else:
            rewritten.insert(0, {"role": "system", "content": note})
    return rewritten


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(message)}\n</tool_response>"}
    calls = message.get("tool_calls") or ()
    if not calls:
        return dict(message)
    parts = [text] if (text := _text(message)) else []
    for call in calls:
        arguments = call["function"]["arguments"]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(call["function"]["name"], ensure_ascii=False)
        parts.append(f'{BEGIN}\n{{"name": {name}, "arguments": {arguments or "{}"}}}\n{END}')
    return {"role": "assistant", "content": "\n".join(parts)}


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)


def grammar(tools: Tools, style: Style) -> str:
    """Lark for an answer that calls: one tool, or several where that is allowed and the form has it."""
    member = "arguments" if style == "hermes" else "parameters"
    rules, names = [], []
    for i, (name, function) in enumerate(tools.callable.items()):
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        schema = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        head = f'{{"name": {json.dumps(name)}, "{member}": '
        rules.append(f'c{i}: {json.dumps(head)} a{i} "}}"\na{i}: %json {json.dumps(schema)}')
        names.append(f"c{i}")
    if style == "hermes":
        one = f"{json.dumps(BEGIN + chr(10))} call {json.dumps(chr(10) + END)}"
        more = f' ("\\n" {one}){{0,{MAX_CALLS - 1}}}' if tools.parallel else ""
        start = f"start: {one}{more}"
    else:
        start = "start: call"
    return "\n".join([start, "call: " + " | ".join(names), *rules])


@dataclass(frozen=True, slots=True)
class CallPiece:
    """Part of the call number `number` of an answer: its name with the first part, and more of its arguments' text."""

    number: int
    name: str | None
    arguments: str


@dataclass
class CallParser:
    """Parts an answer's text, as it comes, into text and calls.

    What may be the beginning of a call is held back until it is known. What turns out to be none (a function that
    nobody offered, no JSON) is text.
    """

    names: frozenset[str]
    style: Style
    most: int = MAX_CALLS
    calls: int = 0
    _held: str = ""
    _inside: _Arguments | None = None
    _behind: bool = False  # a call's arguments, and before what ends the call
    _plain: bool = field(default=False)  # it has been seen that no call comes

    def push(self, text: str, last: bool = False) -> list[str | CallPiece]:
        """What is certain now; `last`: nothing will follow."""
        self._held += text
        found: list[str | CallPiece] = []
        while self._advance(found, last):
            pass
        return found

    def _advance(self, found: list[str | CallPiece], last: bool) -> bool:
        """Take one thing off what is held; False where more text is needed."""
        if self._inside is not None:
            taken = self._inside.take(self._held)
            if taken:
                found.append(CallPiece(self.calls - 1, None, self._held[:taken]))
                self._held = self._held[taken:]
            if self._inside.done:
                self._inside, self._behind = None, True
                return True
            return False
        if self._behind:
            return self._leave(last)
        if self._plain or self.calls >= self.most:
            return self._as_text(found, len(self._held))
        return self._enter(found, last)

    def _leave(self, last: bool) -> bool:
        """Skip what closes a call; at the end of the answer, as much of it as is there."""
        if last and END.startswith(self._held.strip().removeprefix("}").lstrip()):
            self._held = ""
        closing = re.match(rf"\s*\}}\s*(?:{END})?\s*" if self.style == "hermes" else r"\s*\}\s*", self._held)
        whole = closing is not None and (self.style == "llama" or END in closing[0])
        if not whole and not last and len(self._held) < 200:
            return False
        self._held = self._held[closing.end() if closing else 0 :]
        self._behind = False
        return bool(self._held)

    def _enter(self, found: list[str | CallPiece], last: bool) -> bool:
        """Find where a call begins, and give the text before it."""
        if self.style == "hermes":
            at = self._held.find(BEGIN)
            if at < 0:
                keep = 0 if last else _overlap(self._held, BEGIN)
                blank = (
                    0
                    if last
                    else len(self._held[: len(self._held) - keep]) - len(self._held[: len(self._held) - keep].rstrip())
                )  # white space before a call is no text
                return self._as_text(found, len(self._held) - keep - blank)
            if self._held[:at].strip():
                self._as_text(found, at)
                return True
            body = self._held[at + len(BEGIN) :]
        else:
            body = self._held
            if not body.strip() and not last:
                return False
        named = _NAMED.match(body)
        if named and json.loads(named[1]) in self.names:
            self.calls += 1
            self._held = body[named.end() :]
            self._inside = _Arguments()
            found.append(CallPiece(self.calls - 1, json.loads(named[1]), ""))
            return True
        if not named and not last and _may_name(body):
            return False
        if self.style == "llama":
            self._plain = True
            return True
        return self._as_text(found, self._held.find(BEGIN) + len(BEGIN))

    def _as_text(self, found: list[str | CallPiece], n: int) -> bool:
        if n > 0:
            found.append(self._held[:n])
            self._held = self._held[n:]
        return n > 0 and bool(self._held)


def _may_name(body: str) -> bool:
    """Whether what stands behind a call's beginning may still become a call."""
    body = body.lstrip()
    return len(body) < 300 and (
        not body or (body[0] == "{" and re.match(r'\{\s*("(n(a(m(e(".*)?)?)?)?)?)?$', body, re.S) is not None)
    )


def _overlap(text: str, sign: str) -> int:
    """Characters at the end of `text` that may begin `sign`."""
    return next((n for n in range(min(len(sign) - 1, len(text)), 0, -1) if sign.startswith(text[-n:])), 0)


@dataclass
class _Arguments:
    """Finds the end of a JSON object in text that comes in pieces."""

    depth: int = 0
    quoted: bool = False
    escaped: bool = False
    done: bool = False

    def take(self, text: str) -> int:
        """How many characters of `text` belong to it."""
        for i, c in enumerate(text):
            if self.quoted:
                self.quoted = self.escaped or c != '"'
                self.escaped = c == "\\" and not self.escaped
            elif c == '"':
                self.quoted = True
            elif c in "{[":
                self.depth += 1
            elif c in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    self.done = True
                    return i + (self.depth == 0)
            elif self.depth == 0 and not c.isspace():  # no object: a number or a word, up to the call's end
                continue
        return len(text)
