"""A conversation and its answers, for all APIs: each translates its own form to a `Chat`, and `Piece`s to its own
events.

An answer that is not streamed is its pieces put together, so that both say the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from arriero.infer.request import Event, TokenLogprob
from arriero.io.files import json_text
from arriero.serve.asking import Ask, Constraint
from arriero.serve.faults import ApiError
from arriero.serve.models import Use
from arriero.serve.tools import CallParser, CallPiece, Style, Tools, grammar, render
from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.chat import encode_chat

if TYPE_CHECKING:
    from arriero.serve.driver import Ticket

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Chat:
    """Messages in OpenAI's form and how they are to be answered; `ask` has no prompts yet.

    schema: what the answer has to satisfy, {} for any JSON object. prefill: whether a last message of the assistant
    is the beginning of the answer.
    """

    messages: Sequence[Mapping[str, Any]]
    ask: Ask
    tools: Tools = field(default_factory=Tools)
    schema: Mapping[str, Any] | None = None
    prefill: bool = False


async def rendered(use: Use, chat: Chat) -> tuple[Ask, Style]:
    """The `Ask` of a conversation, and the form that its calls come in."""
    ids, style = await use.loaded.run(_encode, use.tokenizer, chat)
    constraint: Constraint | None = None
    if chat.tools.active and chat.tools.mode == "required":
        constraint = "grammar", grammar(chat.tools, style)
    if chat.schema is not None:
        if constraint is not None:
            raise ApiError(400, "a call is demanded, and a form of the answer too; give one", param="tool_choice")
        constraint = "json_schema", json_text(chat.schema or {"type": "object"})
    return replace(chat.ask, prompts=[ids], constraint=constraint), style


def _encode(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], Style]:
    last = chat.messages[-1]
    if chat.prefill and last["role"] == "assistant" and not last.get("tool_calls") and len(chat.messages) > 1:
        ids, style = render(tokenizer, chat.messages[:-1], chat.tools)
        content = last["content"]
        begun = content if isinstance(content, str) else "".join(part["text"] for part in content)
        [more] = tokenizer.encode_segments([begun.rstrip()], at_start=[False])
        return ids + more, style
    return render(tokenizer, chat.messages, chat.tools)


def with_mask(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[list[int], list[bool]]:
    """A conversation's ids as training sees them, and which are trained; up to the answer where none is there."""
    from arriero.tokenizer.chat import encode_training

    if messages[-1]["role"] == "assistant":
        tokens = encode_training(tokenizer, messages, tools)
        return tokens.ids, tokens.trained
    ids = encode_chat(tokenizer, messages, tools)
    return ids, [False] * len(ids)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of one answer. tokens: those that were chosen, with their log-probabilities where asked for; a stop id is
    none.

    finish: with the last piece, and `stopped_by` the stop string that ended the answer.
    """

    index: int
    text: str = ""
    call: CallPiece | None = None
    tokens: tuple[tuple[int, TokenLogprob | None], ...] = ()
    finish: Finish | None = None
    stopped_by: str | None = None


@dataclass
class Tally:
    """Tokens of a request, for its usage."""

    prompt: int = 0
    cached: int = 0
    answer: int = 0
    _seen: set[int] = field(default_factory=set)

    def count(self, which: int, event: Event, prompt: int) -> None:
        """An event of request `which` with a prompt of so many tokens."""
        if event.token is not None:
            self.answer += 1
        if which not in self._seen:
            self._seen.add(which)
            self.prompt += prompt
            self.cached += event.cached


async def pieces(ticket: Ticket, tally: Tally, tools: Tools, style: Style) -> AsyncIterator[Piece]:
    """The answers of one conversation as they come. Raises `ApiError` where one cannot go on."""
    names, most = frozenset(tools.callable) if tools.active else frozenset(), 16 if tools.parallel else 1
    parsers: dict[int, CallParser] = defaultdict(lambda: CallParser(names, style, most))
    async for which, event in ticket.events():
        tally.count(which, event, len(ticket.requests[which].prompt))
        if event.finish == "error":
            raise ApiError(400, event.error or "the answer failed")  # its grammar, which came with the request
        parser = parsers[event.index] if names else None
        tokens = ((event.token, event.logprob),) if event.token is not None and event.token != event.stopped_by else ()
        found = parser.push(event.text, event.finish is not None) if parser else [event.text] if event.text else []
        finish: Finish | None = None
        if event.finish is not None:
            called = parser is not None and parser.calls > 0
            finish = "length" if event.finish == "length" else "tool_calls" if called else "stop"
        by = event.stopped_by if isinstance(event.stopped_by, str) else None
        for i, part in enumerate(found or [""]):
            ends = i >= len(found) - 1
            call = part if isinstance(part, CallPiece) else None
            piece = Piece(event.index, part if isinstance(part, str) else "", call)
            if i == 0:
                piece = replace(piece, tokens=tokens)
            if ends:
                piece = replace(piece, finish=finish, stopped_by=by)
            if piece.text or piece.call or piece.finish or (piece.tokens and piece.tokens[0][1] is not None):
                yield piece


@dataclass
class Answer:
    """One answer, put together."""

    text: str = ""
    calls: list[CallPiece] = field(default_factory=list)
    tokens: list[tuple[int, TokenLogprob | None]] = field(default_factory=list)
    finish: Finish = "stop"
    stopped_by: str | None = None

    def add(self, piece: Piece) -> None:
        """One more piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        if piece.call is not None:
            if piece.call.name is not None:
                self.calls.append(piece.call)
            else:
                last = self.calls[-1]
                self.calls[-1] = replace(last, arguments=last.arguments + piece.call.arguments)
        if piece.finish is not None:
            self.finish, self.stopped_by = piece.finish, piece.stopped_by


async def whole(given: AsyncIterator[Piece], n: int = 1) -> list[Answer]:
    """All answers to one conversation, put together."""
    answers = [Answer() for _ in range(n)]
    async for piece in given:
        answers[piece.index].add(piece)
    return answers
