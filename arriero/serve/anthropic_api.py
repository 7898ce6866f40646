"""Anthropic's API: /v1/messages and /v1/messages/count_tokens.

A last message of the assistant is the beginning of the answer, which goes on behind it. `input_tokens` counts the whole
prompt, whether cached or not. The input of a tool that was cut at `max_tokens` is {} where it is no JSON yet.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from arriero.serve.asking import Ask, answered, given, prepared
from arriero.serve.body import Body, JsonRoute
from arriero.serve.chat import Answer, Chat, Piece, Tally, pieces, rendered, whole
from arriero.serve.faults import ApiError, Json, shape
from arriero.serve.openai_api import checked, new_id
from arriero.serve.openai_schema import FunctionName, Name, Schema
from arriero.serve.state import State, state_of
from arriero.serve.stream import SSE, Streamed, sse, streamed_as, timed, unless_left
from arriero.serve.tools import Tools

router = APIRouter(route_class=JsonRoute)
PATH = "/v1/messages"


class CacheControl(Body):
    """Beginnings are cached here whether marked or not."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class TextBlock(Body):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ToolUse(Body):
    """A call that the assistant made earlier in the conversation."""

    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: Any = None


class ToolResult(Body):
    """What a call gave, in the user's next message."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[TextBlock | ToolUse | ToolResult, Field(discriminator="type")]


class AnthropicMessage(Body):
    """One turn: a text, or blocks."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(Body):
    """A tool that the client runs; those that Anthropic runs are refused by their `type`."""

    name: FunctionName
    description: str | None = None
    input_schema: Schema
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class AnthropicChoice(Body):
    """Whether tools may be called, have to be, or which one; `name` goes with `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Extended thinking, which no model here has: off is all that is taken."""

    type: Literal["disabled"]


class Metadata(Body):
    """Who asks on the client's side; it has no effect on an answer."""

    user_id: str | None = None


class CountBody(Body):
    """What of a request decides its prompt."""

    model: Name
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None


class MessagesBody(CountBody):
    """/v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None


@router.post(PATH, responses=streamed_as(SSE))
async def messages(body: MessagesBody, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    if body.stream:
        parts = Streamed(_events(state, body), state.config.timeout, SSE, _failed)
        return await parts.begin(request)
    return Json(await unless_left(request.receive, timed(state.config.timeout, _whole(state, body))))


@router.post(PATH + "/count_tokens")
async def count_tokens(body: CountBody, request: Request) -> Response:
    """The tokens of the prompt that a request would have."""
    chat = _chat(body, Ask([]))
    async with state_of(request).models.use(body.model) as use:
        ask, _ = await unless_left(request.receive, rendered(use, chat))
        return Json({"input_tokens": len(ask.prompts[0])})


def _chat_of(body: MessagesBody) -> Chat:
    sampling = given(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k)
    return _chat(body, Ask([], body.max_tokens, sampling, stop=tuple(body.stop_sequences or ())))


def _chat(body: CountBody, ask: Ask) -> Chat:
    """In OpenAI's form."""
    plain: list[dict[str, Any]] = []
    if body.system:
        plain.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        plain += _messages(message)
    return Chat(plain, ask, _tools(body), prefill=True)


def _messages(message: AnthropicMessage) -> list[dict[str, Any]]:
    """One of Anthropic's messages may be several of OpenAI's: results of tools are messages of their own there."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts, calls, results = [], [], []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolUse):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            content = ("error: " if block.is_error else "") + _text(block.content or "")
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    if (calls and message.role == "user") or (results and message.role == "assistant"):
        raise ApiError(400, "tool_use stands in messages of the assistant, tool_result in those of the user")
    if calls:
        return [{"role": "assistant", "content": "\n".join(texts), "tool_calls": calls}]
    return results + ([{"role": message.role, "content": "\n".join(texts)}] if texts or not results else [])


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tools(body: CountBody) -> Tools:
    tools = tuple(
        {
            "type": "function",
            "function": given(name=tool.name, description=tool.description, parameters=tool.input_schema),
        }
        for tool in body.tools or ()
    )
    choice = body.tool_choice
    if choice is None:
        return checked(Tools(tools))
    if (choice.type == "tool") != (choice.name is not None):
        raise ApiError(400, "tool_choice: name goes with type tool")
    parallel = not choice.disable_parallel_tool_use
    if choice.type == "tool":
        return checked(Tools(tools, "required", (str(choice.name),), False))
    return checked(Tools(tools, {"any": "required", "auto": "auto", "none": "none"}[choice.type], (), parallel))  # type: ignore[arg-type]


# Answers


async def _whole(state: State, body: MessagesBody) -> dict[str, Any]:
    chat, tally = _chat_of(body), Tally()
    async with state.models.use(body.model) as use:
        ask, style = await rendered(use, chat)
        requests = await prepared(use, ask, state.config)
        async with answered(use, requests, state.config) as ticket:
            [answer] = await whole(pieces(ticket, tally, chat.tools, style))
    content: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text else []
    content += [
        {"type": "tool_use", "id": new_id("toolu"), "name": call.name, "input": _input(call.arguments)}
        for call in answer.calls
    ]
    reason = _reason(answer)
    return {**_head(body, content, tally.prompt, tally.answer), **reason}


def _input(arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _head(body: MessagesBody, content: list[dict[str, Any]], prompt: int, answer: int) -> dict[str, Any]:
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": body.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": prompt, "output_tokens": answer},
    }


def _reason(last: Answer | Piece) -> dict[str, Any]:
    assert last.finish is not None
    if last.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stopped_by}
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": reasons[last.finish], "stop_sequence": None}


async def _events(state: State, body: MessagesBody) -> AsyncIterator[bytes]:
    chat, tally = _chat_of(body), Tally()
    async with state.models.use(body.model) as use:
        ask, style = await rendered(use, chat)
        requests = await prepared(use, ask, state.config)
        async with answered(use, requests, state.config) as ticket:
            yield _event("message_start", message=_head(body, [], len(ask.prompts[0]), 0))
            blocks = _Blocks()
            async with aclosing(pieces(ticket, tally, chat.tools, style)) as answers:  # type: ignore[type-var]
                async for piece in answers:
                    for event in blocks.of(piece):
                        yield event
                    if piece.finish is not None:
                        last = piece
            yield _event("message_delta", delta=_reason(last), usage={"output_tokens": tally.answer})
            yield _event("message_stop")


class _Blocks:
    """The blocks of an answer as its pieces come."""

    def __init__(self) -> None:
        self._index, self._open = -1, ""

    def of(self, piece: Piece) -> list[bytes]:
        """The events of a piece."""
        events = []
        if piece.text:
            if self._open != "text":
                events += self._begin("text", {"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": piece.text}))
        if (call := piece.call) is not None:
            if call.name is not None:
                block = {"type": "tool_use", "id": new_id("toolu"), "name": call.name, "input": {}}
                events += self._begin("tool", block)
            if call.arguments:
                events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        if piece.finish is not None:
            events += self._end()
        return events

    def _begin(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        events = self._end()
        self._index, self._open = self._index + 1, kind
        return [*events, _event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _end(self) -> list[bytes]:
        if not self._open:
            return []
        self._open = ""
        return [_event("content_block_stop", index=self._index)]


def _event(kind: str, **members: Any) -> bytes:
    return sse({"type": kind, **members}, kind)


def _failed(error: HTTPException) -> bytes:
    return sse(shape(PATH, error.status_code, str(error.detail)), "error")
