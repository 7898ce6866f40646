"""Conversations as ids, and which of those ids a model learns from.

Text inside a message can never become a special token: before rendering (template.py), each special token's text in
the messages is broken by a character that occurs nowhere else, and after the text has been split at the real special
tokens that character is taken out again.

`encode_training` builds the loss mask by rendering, never by searching for role names. For each answer the template
is rendered up to the generation prompt, and up to the answer's end; the whole conversation must begin with both texts,
or the template rewrites history and is refused. What lies between, up to and including the first token that ends a
turn, is trained. An answer is encoded apart from its prompt, just as it is generated: prompt ids first, then answer.

Price: two renders per answer, and a single tokenization (docs/log.md has the speeds).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arriero.errors import DataError, UserError
from arriero.tokenizer.template import ChatTemplate, Message, Tool, for_template, plain

if TYPE_CHECKING:
    from arriero.tokenizer.base import Tokenizer

# Unicode's noncharacters: no text needs them, yet one may hold them, so the first that is absent is taken.
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]

# Characters that JSON writes otherwise.
_JSON_CHANGES = re.compile(r'["\\\x00-\x1f]')


@dataclass(frozen=True)
class TrainingTokens:
    """One conversation: its ids, and for each whether the model learns to predict it."""

    ids: list[int]
    trained: list[bool]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Return the ids of a conversation: transformers' `apply_chat_template`, with messages that stay plain text.

    Raises DataError where the tokenizer has no chat template or the template refuses the conversation.
    """
    template = _template_of(tokenizer)
    guard = _Guard.over(tokenizer, messages, tools)
    text = template.render_plain(guard.messages, guard.tools, add_generation_prompt, variables)
    [ids] = tokenizer.encode_pieces([text], sentinel=guard.sentinel)
    return ids


def encode_training(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    **variables: Any,
) -> TrainingTokens:
    """Return the ids of a conversation, trained on the assistant's messages and the token that ends each.

    An assistant message with "weight": 0 or "train": false is context only. The ids begin with
    `encode_chat(messages before the first answer)`, and equal `encode_chat(messages, add_generation_prompt=False)`
    unless a token of the latter would cross from a generation prompt into an answer.
    Raises DataError where nothing is trained, where the template drops, reorders or rewrites messages, or where an
    answer does not end in a token that stops generation.
    """
    template = _template_of(tokenizer)
    guard = _Guard.over(tokenizer, messages, tools)
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not any(_is_trained(messages[i]) for i in answers):
        raise DataError("nothing to learn: no message with role 'assistant' is trained; add an answer or drop the row")

    def render(n_messages: int, prompt: bool) -> str:
        return template.render_plain(guard.messages[:n_messages], guard.tools, prompt, variables)

    whole = render(len(messages), False)
    cuts = [0]
    for i in answers:
        before = render(i, True)
        _check_history(whole, before, cuts[-1], i)
        after = whole if i + 1 == len(messages) else render(i + 1, False)
        end = _end_of_answer(tokenizer, after, len(before), i)
        _check_history(whole, after[:end], len(before), i)
        cuts += [len(before), end]
    cuts.append(len(whole))
    _check_contents(whole, guard.messages, guard.tools, answers, cuts)

    pieces = [whole[a:b] for a, b in itertools.pairwise(cuts)]  # prompt, answer, prompt, ..., rest
    encoded = tokenizer.encode_pieces(pieces, sentinel=guard.sentinel)
    ids: list[int] = []
    trained: list[bool] = []
    for k, piece in enumerate(encoded):
        ids += piece
        trained += [k % 2 == 1 and _is_trained(messages[answers[k // 2]])] * len(piece)
    return TrainingTokens(ids, trained)


def end_of_answers(tokenizer: Tokenizer) -> int | None:
    """Return the id that the chat template ends an answer with; None where there is no template to train with."""
    try:
        told = encode_training(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    except UserError:
        return None
    return [i for i, trained in zip(told.ids, told.trained, strict=True) if trained][-1]


def _end_of_answer(tokenizer: Tokenizer, text: str, start: int, i: int) -> int:
    """Return the offset just after the token that ends answer i, the last in `text`, where it begins at `start`."""
    for match in tokenizer.special_pattern.finditer(text, start):
        if tokenizer.special_ids[match[0]] in tokenizer.stop_ids:
            return match.end()
    names = sorted(text for text, k in tokenizer.special_ids.items() if k in tokenizer.stop_ids)
    raise DataError(
        f"message {i} (assistant): the chat template ends this answer with {text[start:][-24:]!r}, which holds none "
        f"of the tokens that stop generation ({', '.join(names) or 'the tokenizer has none'}), so the model would "
        "never learn to stop; use a template that writes one after each answer"
    )


def _check_history(whole: str, part: str, at_least: int, i: int) -> None:
    """Refuse a template whose text of the whole conversation does not begin with its text of a part of it."""
    if whole.startswith(part) and len(part) >= at_least:
        return
    at = next((k for k, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), min(len(whole), len(part)))
    raise DataError(
        f"message {i} (assistant): the chat template writes the conversation up to here differently once more follows "
        f"(at character {at}: {part[at : at + 24]!r} becomes {whole[at : at + 24]!r}), so what is trained would not "
        "be what is seen at inference; use a template that keeps earlier messages as they are, or one answer per row"
    )


def _check_contents(
    whole: str, messages: Sequence[dict[str, Any]], tools: Any, answers: Sequence[int], cuts: Sequence[int]
) -> None:
    """Refuse a template that drops or reorders: each content and called tool must stand in `whole`, in order."""
    at = 0
    span = {i: (cuts[2 * k + 1], cuts[2 * k + 2]) for k, i in enumerate(answers)}
    for i, message in enumerate(messages):
        low, high = span.get(i, (at, len(whole)))
        for text in _texts(message):
            found = whole.find(text, low, high)
            if found < 0:
                raise DataError(
                    f"message {i} ({message.get('role')}): the chat template drops, moves or rewrites {text[:40]!r}; "
                    "use a template that keeps every message as it is, or take the message out"
                )
            low = found + len(text)
        at = high if i in span else low
    for tool in tools or ():
        name = _function_name(tool)
        if name is not None and name not in whole:
            raise DataError(
                f"the chat template drops the tool {name!r}; use a template with tools, or rows without them"
            )


def _texts(message: Message) -> Iterable[str]:
    """Yield what must be found in a rendered message: contents, stripped as templates often do, and called tools."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if isinstance(text, str) and text.strip():
            # A tool's result may be written as JSON, where only a part of it looks the same.
            by_json = message.get("role") in ("tool", "ipython")
            yield _JSON_CHANGES.split(text.strip())[0] if by_json else text.strip()
    for call in message.get("tool_calls") or ():
        name = _function_name(call)
        if name:
            yield name


def _function_name(entry: Any) -> str | None:
    """Return the name in a tool or a tool call: {"function": {"name": ...}}, or without the wrapping."""
    inner = entry.get("function", entry) if isinstance(entry, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


def _is_trained(message: Message) -> bool:
    return message.get("train", True) is not False and message.get("weight", 1) != 0


def _template_of(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise DataError(
            "this tokenizer has no chat template, so it cannot encode conversations; give one, e.g. 'chatml'"
        )
    return tokenizer.chat_template


@dataclass(frozen=True)
class _Guard:
    """Messages and tools in which no special token's text is whole; `sentinel` is what breaks them ("": nothing)."""

    messages: list[dict[str, Any]]
    tools: Any
    sentinel: str

    @classmethod
    def over(cls, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None) -> _Guard:
        """Break the special-token text in all strings of messages and tools, however deep."""
        plain_messages = [for_template(m) for m in messages]
        plain_tools = None if tools is None else plain(tools)
        strings = list(_strings([plain_messages, plain_tools]))
        if not any(tokenizer.special_pattern.search(s) for s in strings):
            return cls(plain_messages, plain_tools, "")
        sentinel = next((c for c in _NONCHARACTERS if not any(c in s for s in strings)), None)
        if sentinel is None:
            raise DataError("a message holds all 32 noncharacters U+FDD0 to U+FDEF and special-token text; clean it")

        def broken(match: re.Match[str]) -> str:
            return match[0][0] + sentinel + match[0][1:]

        def guard(value: Any) -> Any:
            if isinstance(value, str):
                return tokenizer.special_pattern.sub(broken, value)
            if isinstance(value, dict):
                return {guard(k): guard(v) for k, v in value.items()}
            return [guard(v) for v in value] if isinstance(value, list) else value

        return cls(guard(plain_messages), guard(plain_tools), sentinel)


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _strings(k)
            yield from _strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from _strings(v)
