"""Encodes conversations, and says which of the ids a model is trained on.

Text of a message never becomes a special token or another token that ends generation: before rendering (template.py),
each occurrence of such a token's text in the messages is interrupted by a character that occurs nowhere else, and that
character is removed again once the rendered text has been split at the template's own tokens.

`encode_training` builds the loss mask by rendering, not by searching for role names. For each answer the template is
rendered up to the generation prompt, and up to the answer's end; the whole conversation must begin with both texts,
else the template changes earlier turns and is refused. The text between the two, up to and including the first token
that ends a turn, is trained. An answer is encoded apart from its prompt, just as it is generated.

Price: two renders per answer, and one tokenisation (docs/log.md has the speeds).
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arriero.errors import DataError, UserError
from arriero.tokenizer.contents import check_tools, check_written, first_text, is_trained, part_texts
from arriero.tokenizer.template import REMEDY, ChatTemplate, Message, Tool, for_template, plain

if TYPE_CHECKING:
    from arriero.tokenizer.base import Tokenizer

# Unicode's noncharacters: no text needs them, yet one may hold them, so the first that is absent is taken.
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]


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

    Raises DataError where the tokenizer has no chat template, the template refuses the conversation, or it has no
    generation prompt and one is asked for.
    """
    template = _template_of(tokenizer)
    guard = _Guard.over(tokenizer, messages, tools, variables)

    def render(shown: list[dict[str, Any]], prompt: bool) -> str:
        return template.render_plain(shown, guard.tools, prompt, variables)

    text = render(guard.messages, add_generation_prompt)
    if add_generation_prompt and text == render(guard.messages, False):
        _check_prompt(render, guard.messages, text)
    [ids] = tokenizer.encode_pieces([text], sentinel=guard.sentinel)
    return ids


def encode_reply(
    tokenizer: Tokenizer,
    before: Sequence[Message],
    reply: Sequence[Message],
    tools: Sequence[Tool] | None = None,
) -> list[int]:
    """The ids between the end of an answer and the next: what is said to it, and the generation prompt.

    before: the messages that the answer was to. The answer's own ids, terminator included, stay as they were sampled:
    prompt, answer, and these are `encode_chat` of the whole, wherever the answer's ids are those of its text and the
    template leaves earlier turns alone. Raises DataError where the template refuses the messages, or drops a text.
    """
    template = _template_of(tokenizer)
    answer, said = _PROBE, list(_strings([plain(m) for m in (*before, *reply)]))
    while any(answer in text for text in said):
        answer += _PROBE
    guard = _Guard.over(tokenizer, [*before, {"role": "assistant", "content": answer}, *reply], tools, {})
    text = template.render_plain(guard.messages, guard.tools, True, {})
    end = _end_of_answer(tokenizer, text, max(text.rfind(answer), 0), len(before))
    for k, message in enumerate(guard.messages[len(before) + 1 :], len(before) + 1):
        marked = [*guard.messages[:k], {**message, "content": answer}, *guard.messages[k + 1 :]]
        if template.render_plain(marked, guard.tools, True, {}).count(answer) < 2:
            raise DataError(
                f"message {k} ({message.get('role')}): the chat template does not write what an environment says in "
                f"this role; let it speak as 'user', or give another template: {REMEDY}"
            )
    [ids] = tokenizer.encode_pieces([text[end.start() :]], sentinel=guard.sentinel)  # what ends it may take up a space
    return ids[1:]


def encode_training(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    **variables: Any,
) -> TrainingTokens:
    """Return the ids of a conversation, trained on the assistant's messages and the token that ends each.

    An assistant message with "train": 0, or an equivalent mark (contents.py), is context only. The ids begin
    with `encode_chat(messages before the first trained answer)`, and equal `encode_chat(messages,
    add_generation_prompt=False)` unless a token of the latter would cross from a generation prompt into an answer.
    Raises DataError where nothing is trained, where the template drops, reorders or rewrites a text of the messages,
    or where an answer does not end in a token that stops generation.
    """
    template = _template_of(tokenizer)
    answers = [i for i, message in enumerate(messages) if _is_answer(message, i)]
    if not answers:
        raise DataError("nothing to learn: no message with role 'assistant' is trained; add an answer or drop the row")
    guard = _Guard.over(tokenizer, messages, tools, variables)

    def render(shown: list[dict[str, Any]], prompt: bool, tools: Any = guard.tools) -> str:
        return template.render_plain(shown, tools, prompt, variables)

    whole = render(guard.messages, False)
    cuts = [0]
    for i in answers:
        before = render(guard.messages[:i], True)
        _check_history(whole, before, cuts[-1], i)
        after = whole if i + 1 == len(messages) else render(guard.messages[: i + 1], False)
        end = _end_of_answer(tokenizer, after, len(before), i).end()
        _check_history(whole, after[:end], len(before), i)
        cuts += [len(before), end]
    cuts.append(len(whole))
    check_written(whole, guard.messages, answers, cuts)
    for k, i in enumerate(answers):
        _check_header(render, guard.messages[: i + 1], whole[cuts[2 * k + 1] : cuts[2 * k + 2]])
    if guard.tools:
        try:
            without = render(guard.messages, False, None)
        except DataError:
            without = None
        check_tools(whole, without, guard.tools)
    _check_spelled(tokenizer, whole, messages)

    # Cut where answers begin only: the token that ends one may take up white space behind it, as in the whole text.
    pieces = [whole[a:b] for a, b in itertools.pairwise([0, *cuts[1:-1:2], len(whole)])]
    encoded = tokenizer.encode_pieces(pieces, sentinel=guard.sentinel)
    ids, trained = list(encoded[0]), [False] * len(encoded[0])
    for i, piece in zip(answers, encoded[1:], strict=True):
        n_answer = next((k + 1 for k, token in enumerate(piece) if token in tokenizer.control_stops), None)
        if n_answer is None:
            raise _never_stops(tokenizer, whole, i)
        ids += piece
        trained += [True] * n_answer + [False] * (len(piece) - n_answer)
    return TrainingTokens(ids, trained)


def end_of_answers(tokenizer: Tokenizer) -> int | None:
    """Return the id that the chat template ends an answer with; None where there is no template to train with."""
    try:
        probe = encode_training(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    except UserError:
        return None
    return [i for i, trained in zip(probe.ids, probe.trained, strict=True) if trained][-1]


def _is_answer(message: Message, i: int) -> bool:
    try:
        return is_trained(message)
    except DataError as error:
        raise DataError(f"message {i} ({message.get('role')}): {error}") from error


def _check_spelled(tokenizer: Tokenizer, whole: str, messages: Sequence[Message]) -> None:
    """Refuse a character of a message that the vocabulary lacks."""
    lost = tokenizer.lost(whole)
    for i, message in enumerate(messages if lost else ()):
        for text in _strings([plain(value) for name, value in message.items() if name != "role"]):
            if found := next((c for c in text if c in lost), None):
                raise DataError(
                    f"message {i} ({message.get('role')}) holds U+{ord(found):04X}, for which this tokenizer's "
                    "vocabulary has no token, so that it would be lost; take it out, or spell it otherwise"
                )


def _end_of_answer(tokenizer: Tokenizer, text: str, start: int, i: int) -> re.Match[str]:
    """Return the token that ends answer i, the first that does after `start`, where the answer begins."""
    for match in tokenizer.control_pattern.finditer(text, start):
        if tokenizer.control_ids[match[0]] in tokenizer.control_stops:
            return match
    raise _never_stops(tokenizer, text[start:], i)


def _never_stops(tokenizer: Tokenizer, answer: str, i: int) -> DataError:
    names = sorted(text for text, k in tokenizer.control_ids.items() if k in tokenizer.control_stops)
    return DataError(
        f"message {i} (assistant): the chat template ends this answer with {answer[-24:]!r}, which holds none "
        f"of the tokens that stop generation ({', '.join(names) or 'the tokenizer has none'}), so the model would "
        f"never learn to stop; use a template that writes one after each answer: {REMEDY}"
    )


Render = Callable[[list[dict[str, Any]], bool], str]
_PROBE = "arriero"


def _check_header(render: Render, messages: list[dict[str, Any]], answer: str) -> None:
    """Refuse a template that leaves it to the model to write who speaks, before the own text of the last message.

    Some templates need no generation prompt, since nothing marks an answer (Llama 2); others have the model write more
    than its text (an empty thought, a channel), which is to be learned.
    """
    head = answer[: first_text(answer, messages[-1]) or 0]
    if not head.strip():
        return
    if "assistant" in head.casefold():
        raise _trains_header(head, len(messages) - 1)
    prompt = render(messages[:-1], True)
    if prompt == render(messages[:-1], False):
        _check_prompt(render, messages[:-1], prompt)


def _check_prompt(render: Render, messages: list[dict[str, Any]], prompt: str) -> None:
    """Refuse a template that adds nothing for the generation prompt, and yet writes something before an answer."""
    try:
        text = render([*messages, {"role": "assistant", "content": _PROBE}], False)
    except DataError:
        return  # no answer can follow here, as where the last message is one
    head = text[len(prompt) :].partition(_PROBE)[0] if text.startswith(prompt) else ""
    if head.strip():
        raise _trains_header(head, len(messages))


def _trains_header(head: str, i: int) -> DataError:
    return DataError(
        f"message {i} (assistant): the chat template has no generation prompt, or less of one than stands before an "
        f"answer: the header {head!r} would be trained, and the model asked without it; give a template that heeds "
        f"add_generation_prompt: {REMEDY}"
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


def _template_of(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise DataError(f"this tokenizer has no chat template, so it cannot encode conversations; give one: {REMEDY}")
    return tokenizer.chat_template


@dataclass(frozen=True)
class _Guard:
    """Messages and tools in which no control token's text is whole; `sentinel` is what breaks them ("": nothing)."""

    messages: list[dict[str, Any]]
    tools: Any
    sentinel: str

    @classmethod
    def over(
        cls,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: Mapping[str, Any],
    ) -> _Guard:
        """Break the control-token text in all strings of messages and tools, however deep.

        An empty list of tools is as none. Raises DataError for contents that are not text.
        """
        plain_tools = plain(tools) or None
        plain_messages = [for_template(m) for m in messages]
        for i, message in enumerate(plain_messages):
            _check_parts(tokenizer, message, i)
        plain_messages = _template_of(tokenizer).readable(plain_messages, plain_tools, variables)
        strings = list(_strings([plain_messages, plain_tools]))
        if not any(tokenizer.control_pattern.search(s) for s in strings):
            return cls(plain_messages, plain_tools, "")
        sentinel = next((c for c in _NONCHARACTERS if not any(c in s for s in strings)), None)
        if sentinel is None:
            raise DataError("a message holds all 32 noncharacters U+FDD0 to U+FDEF and special-token text; clean it")

        def broken(match: re.Match[str]) -> str:
            return match[0][0] + sentinel + match[0][1:]

        def guard(value: Any) -> Any:
            if isinstance(value, str):
                return tokenizer.control_pattern.sub(broken, value)
            if isinstance(value, dict):
                return {guard(k): guard(v) for k, v in value.items()}
            return [guard(v) for v in value] if isinstance(value, list) else value

        return cls(guard(plain_messages), guard(plain_tools), sentinel)


def _check_parts(tokenizer: Tokenizer, message: dict[str, Any], i: int) -> None:
    """Refuse a content that is a list of anything but text, and join texts that make a special token's together."""
    content = message.get("content")
    if not isinstance(content, list):
        return
    try:
        texts = part_texts(content)
    except DataError as error:
        raise DataError(f"message {i} ({message.get('role')}): {error}") from error
    joints = list(itertools.accumulate(map(len, texts)))
    joined = "".join(texts)
    if any(joints[bisect_right(joints, m.start())] < m.end() for m in tokenizer.control_pattern.finditer(joined)):
        message["content"] = [{"type": "text", "text": joined}]


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
