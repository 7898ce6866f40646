"""OpenAI's /v1/responses, without state: the whole conversation comes with each request.

`previous_response_id`, `conversation` and `store: true` are refused, since nothing is kept. An answer that is not
streamed is the last event of the stream.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from arriero.serve.asking import Ask, answered, given, prepared
from arriero.serve.body import Body, JsonRoute
from arriero.serve.chat import Chat, Piece, Tally, pieces, rendered
from arriero.serve.faults import ApiError, Json, shape
from arriero.serve.openai_api import checked, new_id
from arriero.serve.openai_schema import FunctionName, Name, Schema
from arriero.serve.state import State, state_of
from arriero.serve.stream import SSE, Streamed, sse, streamed_as, timed, unless_left
from arriero.serve.tools import Tools

router = APIRouter(route_class=JsonRoute)


class InputText(Body):
    """A piece of text, said by the user or earlier by the model."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Body):
    """One message of the conversation so far."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Body):
    """A call that the model made earlier in the conversation."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = None
    status: str | None = None
    namespace: str | None = None
    caller: Any = None


class CallOutput(Body):
    """What that call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


class FunctionTool(Body):
    """A function of the client's that may be called; tools that OpenAI runs are refused by their `type`."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class FunctionChoice(Body):
    """The demand that this function be called, or one of those allowed."""

    type: Literal["function"]
    name: FunctionName


class AllowedFunctions(Body):
    """Those of the functions that may be called (auto), or of which one has to be (required)."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1)]


class TextFormat(Body):
    """Whether an answer is free text, some JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Body):
    """How an answer's text has to be."""

    format: TextFormat | None = None
    verbosity: None = None


class ResponsesBody(Body):
    """/v1/responses."""

    model: Name
    input: str | Annotated[list[InputMessage | CallItem | CallOutput], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    metadata: dict[str, str] | None = None
    background: Literal[False] | None = None
    reasoning: None = None
    service_tier: str | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


@router.post("/v1/responses", responses=streamed_as(SSE))
async def responses(body: ResponsesBody, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    events = _events(state, body)
    if body.stream:
        return await Streamed(_written(events), state.config.timeout, SSE, _failed).begin(request)
    return Json(await unless_left(request.receive, timed(state.config.timeout, _last(events))))


async def _written(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async with aclosing(events):  # type: ignore[type-var]
        async for event in events:
            yield sse(event, event["type"])


async def _last(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    async with aclosing(events):  # type: ignore[type-var]
        async for event in events:
            last = event
    response: dict[str, Any] = last["response"]
    return response


def _failed(error: HTTPException) -> bytes:
    told = shape("", error.status_code, str(error.detail))["error"]
    return sse({"type": "error", "code": told["type"], "message": told["message"], "param": None}, "error")


async def _events(state: State, body: ResponsesBody) -> AsyncIterator[dict[str, Any]]:
    chat, tally = _chat(body), Tally()
    async with state.models.use(body.model) as use:
        ask, style = await rendered(use, chat)
        requests = await prepared(use, ask, state.config)
        async with answered(use, requests, state.config) as ticket:
            output = _Output(_response(body))
            yield output.event("response.created", response=output.response("in_progress"))
            yield output.event("response.in_progress", response=output.response("in_progress"))
            async with aclosing(pieces(ticket, tally, chat.tools, style)) as answers:  # type: ignore[type-var]
                async for piece in answers:
                    for event in output.of(piece):
                        yield event
                    if piece.finish is not None:
                        finish = piece.finish
            status = "incomplete" if finish == "length" else "completed"
            yield output.event(f"response.{status}", response=output.response(status, tally))


def _chat(body: ResponsesBody) -> Chat:
    if body.previous_response_id or body.conversation:
        name = "previous_response_id" if body.previous_response_id else "conversation"
        raise ApiError(400, f"{name}: this server keeps no answers; send the whole conversation", param=name)
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    items = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for item in items:
        _add(messages, item)
    sampling = given(temperature=body.temperature, top_p=body.top_p)
    return Chat(messages, Ask([], body.max_output_tokens, sampling), _tools(body), _schema(body.text))


def _add(messages: list[dict[str, Any]], item: InputMessage | CallItem | CallOutput) -> None:
    """Put an item behind the messages: calls belong to the assistant's message before them."""
    if isinstance(item, InputMessage):
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": _text(item.content)})
    elif isinstance(item, CallOutput):
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    else:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        function = {"name": item.name, "arguments": item.arguments}
        messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tools(body: ResponsesBody) -> Tools:
    tools = tuple(
        {
            "type": "function",
            "function": given(name=tool.name, description=tool.description, parameters=tool.parameters),
        }
        for tool in body.tools or ()
    )
    choice, parallel = body.tool_choice, body.parallel_tool_calls is not False
    if isinstance(choice, FunctionChoice):
        return checked(Tools(tools, "required", (choice.name,), False))
    if isinstance(choice, AllowedFunctions):
        return checked(Tools(tools, choice.mode, tuple(tool.name for tool in choice.tools), parallel))
    return checked(Tools(tools, choice or "auto", (), parallel))


def _schema(text: TextSettings | None) -> dict[str, Any] | None:
    form = text.format if text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and form.schema_ is None:
        raise ApiError(400, "text.format of type json_schema needs a schema", param="text")
    return form.schema_ or {}


def _response(body: ResponsesBody) -> dict[str, Any]:
    """What an answer repeats of its request."""
    choice = body.tool_choice
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "model": body.model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": [{"strict": False, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()],
        "tool_choice": choice.model_dump() if isinstance(choice, Body) else choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": body.text.model_dump(exclude_none=True, by_alias=True) if body.text else {"format": {"type": "text"}},
        "metadata": body.metadata or {},
        "previous_response_id": None,
        "store": False,
        "truncation": "disabled",
        "error": None,
    }


class _Output:
    """The items of an answer as its pieces come, and the events that tell of them."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._head, self._items, self._number = head, list[dict[str, Any]](), 0

    def event(self, kind: str, **members: Any) -> dict[str, Any]:
        """The next event."""
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **members}

    def response(self, status: str, tally: Tally | None = None) -> dict[str, Any]:
        """The answer so far."""
        usage = None
        if tally is not None:
            usage = {
                "input_tokens": tally.prompt,
                "input_tokens_details": {"cached_tokens": tally.cached},
                "output_tokens": tally.answer,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tally.prompt + tally.answer,
            }
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        output = list(self._items) if usage else []
        return {**self._head, "status": status, "incomplete_details": details, "output": output, "usage": usage}

    def of(self, piece: Piece) -> list[dict[str, Any]]:
        """The events of a piece."""
        events = []
        if piece.text:
            if not self._open("message"):
                events += self._end("completed") + self._begin_message()
            self._items[-1]["content"][0]["text"] += piece.text
            events.append(self._told("response.output_text.delta", content_index=0, delta=piece.text, logprobs=[]))
        if (call := piece.call) is not None:
            if call.name is not None:
                item = {
                    "type": "function_call",
                    "id": new_id("fc"),
                    "call_id": new_id("call"),
                    "name": call.name,
                    "arguments": "",
                    "status": "in_progress",
                }
                events += self._end("completed") + self._begin(item)
            if call.arguments:
                self._items[-1]["arguments"] += call.arguments
                events.append(self._told("response.function_call_arguments.delta", delta=call.arguments))
        if piece.finish is not None:
            events += self._end("incomplete" if piece.finish == "length" else "completed")
        return events

    def _open(self, kind: str) -> bool:
        return bool(self._items) and self._items[-1]["type"] == kind and self._items[-1]["status"] == "in_progress"

    def _told(self, kind: str, **members: Any) -> dict[str, Any]:
        """An event of the last item."""
        return self.event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **members)

    def _begin(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        self._items.append(item)
        item = self._items[-1]
        return [self.event("response.output_item.added", output_index=len(self._items) - 1, item={**item})]

    def _begin_message(self) -> list[dict[str, Any]]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"type": "message", "id": new_id("msg"), "role": "assistant", "status": "in_progress"}
        events = self._begin({**item, "content": []})
        self._items[-1]["content"] = [part]
        return [*events, self._told("response.content_part.added", content_index=0, part={**part})]

    def _end(self, status: str) -> list[dict[str, Any]]:
        """End the item that is open."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        item, index = self._items[-1], len(self._items) - 1
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            events = [
                self._told("response.output_text.done", content_index=0, text=part["text"], logprobs=[]),
                self._told("response.content_part.done", content_index=0, part={**part}),
            ]
        else:
            done = "response.function_call_arguments.done"
            events = [self._told(done, name=item["name"], arguments=item["arguments"])]
        return [*events, self.event("response.output_item.done", output_index=index, item={**item})]
