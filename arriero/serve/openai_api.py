"""OpenAI's API: /v1/models, /v1/completions and /v1/chat/completions.

Where OpenAI's answers leave something open: a token's log-probability is the model's own, before temperature and
penalties. Usage counts every token that was chosen, the stop token too. `finish_reason` is `length` at the end of the
context.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from arriero.infer.request import Event, TokenLogprob
from arriero.infer.request import Request as EngineRequest
from arriero.serve.asking import Ask, answered, biases, given, prepared, seed_of
from arriero.serve.body import JsonRoute
from arriero.serve.chat import Answer, Chat, Piece, Tally, pieces, rendered, whole
from arriero.serve.faults import ApiError, Json, shape
from arriero.serve.models import Use
from arriero.serve.openai_schema import (
    AllowedChoice,
    ChatBody,
    Common,
    CompletionBody,
    Message,
    NamedChoice,
    ResponseFormat,
)
from arriero.serve.state import State, state_of
from arriero.serve.stream import SSE, Streamed, sse, streamed_as, timed, unless_left
from arriero.serve.tools import Tools
from arriero.tokenizer.base import Tokenizer

router = APIRouter(route_class=JsonRoute)
DONE = b"data: [DONE]\n\n"


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The models and adapters that are served."""
    state = state_of(request)
    return Json({"object": "list", "data": [_model(state, name) for name in state.models.names]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """One of them."""
    state = state_of(request)
    state.models.model_of(name)
    return Json(_model(state, name))


def _model(state: State, name: str) -> dict[str, Any]:
    base, adapter = state.models.model_of(name)
    entry = {"id": name, "object": "model", "created": state.models.created, "owned_by": "arriero"}
    return {**entry, "parent": base if adapter else None, "state": state.models.states[base]}


@router.post("/v1/completions", responses=streamed_as(SSE))
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue prompts."""
    answers = _completions(state_of(request), body)
    return await _respond(request, body, answers)


@router.post("/v1/chat/completions", responses=streamed_as(SSE))
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    answers = _chat(state_of(request), body)
    return await _respond(request, body, answers)


async def _respond(request: Request, body: Common, chunks: AsyncIterator[dict[str, Any]]) -> Response:
    """All that is said at once, or as server-sent events."""
    seconds = state_of(request).config.timeout
    if body.stream:
        return await Streamed(_events(chunks), seconds, SSE, _failed).begin(request)
    async with aclosing(chunks):  # type: ignore[type-var]
        return Json(await unless_left(request.receive, timed(seconds, anext(chunks))))


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async with aclosing(chunks):  # type: ignore[type-var]
        async for chunk in chunks:
            yield sse(chunk)
    yield DONE


def _failed(error: HTTPException) -> bytes:
    return sse(shape("", error.status_code, str(error.detail))) + DONE


# Completions


async def _completions(state: State, body: CompletionBody) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream; or, not streamed, the one answer."""
    _refuse_unknown(body)
    async with state.models.use(body.model) as use:
        prompts = await use.loaded.run(_ids, use.tokenizer, body)
        ask = Ask(
            prompts,
            16 if body.max_tokens is None else body.max_tokens,
            _sampling(body),
            body.n or 1,
            body.stops,
            body.logprobs,
            bool(body.echo),
            body.logprobs if body.echo else None,
            salt=body.cache_salt or "",
            stop_ids=body.stop_token_ids or (),
        )
        if ask.max_tokens == 0 and ask.prompt_logprobs is None:
            raise ApiError(
                400,
                "max_tokens is 0 without echo and logprobs: nothing is asked",
                param="max_tokens",
            )
        requests = await prepared(use, ask, state.config)
        head = _head("cmpl", "text_completion", body)
        async with answered(use, requests, state.config) as ticket:
            tally, texts = Tally(), _Choices(use.tokenizer, requests, bool(body.return_token_ids))
            async for which, event in ticket.events():
                tally.count(which, event, len(prompts[which]))
                if event.finish == "error":
                    raise ApiError(400, event.error or "the answer failed")
                choice = texts.add(which, event)
                if body.stream and any(choice[part] for part in choice if part != "index"):
                    yield {**head, "choices": [choice]}
        if not body.stream:
            yield {**head, "choices": texts.whole(), "usage": _usage(tally)}
        elif body.stream_options and body.stream_options.include_usage:
            yield {**head, "choices": [], "usage": _usage(tally)}


def _ids(tokenizer: Tokenizer, body: CompletionBody) -> list[list[int]]:
    prompt = body.prompt
    begin = [] if body.add_special_tokens is False else tokenizer.begin_ids
    if isinstance(prompt, str):
        return [[*begin, *tokenizer.encode(prompt)]]
    if not prompt:
        raise ApiError(400, "the prompt is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [list(prompt)]  # type: ignore[arg-type]
    return [[*begin, *tokenizer.encode(one)] if isinstance(one, str) else one for one in prompt]  # type: ignore[list-item]


def _refuse_unknown(body: CompletionBody) -> None:
    if body.suffix:
        raise ApiError(400, "suffix: this server only continues texts", param="suffix")
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, "best_of: every answer is given; leave it out, or make it n", param="best_of")


class _Choices:
    """The choices of a completion as its events come, and put together."""

    def __init__(self, tokenizer: Tokenizer, requests: Sequence[EngineRequest], with_ids: bool) -> None:
        self._tokenizer, self._requests, self._with_ids = tokenizer, requests, with_ids
        self._parts: dict[tuple[int, int], list[dict[str, Any]]] = {
            (which, index): [] for which, request in enumerate(requests) for index in range(request.n)
        }
        self._offsets: dict[tuple[int, int], int] = {}

    def add(self, which: int, event: Event) -> dict[str, Any]:
        """The choice that a chunk tells of an event."""
        request, key = self._requests[which], (which, event.index)
        entry: list[tuple[int, TokenLogprob | None]] = []
        if event.prompt_logprobs is not None and request.echo:
            entry += zip(request.prompt, [None, *event.prompt_logprobs], strict=True)
        if event.token is not None and event.logprob is not None:  # the terminator too: it was drawn, and clients that
            entry.append((event.token, event.logprob))  # take off the last of max_tokens 1 (lm-eval) count on it
        choice = {
            "index": which * request.n + event.index,
            "text": event.text,
            "logprobs": self._logprobs(key, entry) if entry else None,
            "finish_reason": None if event.finish is None else "length" if event.finish == "length" else "stop",
        }
        if self._with_ids:
            choice["token_ids"] = [] if event.token is None else [event.token]
        self._parts[key].append(choice)
        return choice

    def _logprobs(self, key: tuple[int, int], tokens: list[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        texts = [token_text(self._tokenizer, token) for token, _ in tokens]
        at, offsets = self._offsets.get(key, 0), []
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[key] = at
        return {
            "tokens": texts,
            "token_logprobs": [None if found is None else found.raw for _, found in tokens],
            "top_logprobs": [None if found is None else self._top(token, found) for token, found in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: int, found: TokenLogprob) -> dict[str, float]:
        """The most probable tokens; the one that stands there too, as OpenAI gives it."""
        top = {token_text(self._tokenizer, other): logprob for other, logprob in reversed(found.top)}
        return {token_text(self._tokenizer, token): found.raw} | top

    def whole(self) -> list[dict[str, Any]]:
        """All choices, each put together of its parts."""
        return [_joined(parts) for parts in self._parts.values()]


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    whole = {
        "index": parts[0]["index"],
        "text": "".join(part["text"] for part in parts),
        "logprobs": {name: [x for each in logprobs for x in each[name]] for name in logprobs[0]} if logprobs else None,
        "finish_reason": parts[-1]["finish_reason"],
    }
    return whole | {name: [i for part in parts for i in part[name]] for name in ("token_ids",) if name in parts[0]}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token by itself, or "bytes:\\xe2\\x80" where it has a part of a character, as OpenAI writes it."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


# Chat


async def _chat(state: State, body: ChatBody) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream; or, not streamed, the one answer."""
    chat, n = chat_of(body), body.n or 1
    async with state.models.use(body.model) as use:
        ask, style = await rendered(use, chat)
        requests = await prepared(use, ask, state.config)
        head = _head("chatcmpl", "chat.completion", body)
        tally = Tally()
        async with answered(use, requests, state.config) as ticket:
            answers = pieces(ticket, tally, chat.tools, style)
            if body.stream:
                async for chunk in _chunks(use, body, answers, n):
                    yield {**head, "choices": [chunk]}
            else:
                every = await whole(answers, n)
        if not body.stream:
            choices = [_choice(use, body, i, answer) for i, answer in enumerate(every)]
            yield {**head, "choices": choices, "usage": _usage(tally)}
        elif body.stream_options and body.stream_options.include_usage:
            yield {**head, "choices": [], "usage": _usage(tally)}


def chat_of(body: ChatBody) -> Chat:
    """The conversation that a body asks to go on."""
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs: true", param="top_logprobs")
    ask = Ask(
        [],
        body.max_completion_tokens or body.max_tokens,
        _sampling(body),
        body.n or 1,
        body.stops,
        (body.top_logprobs or 0) if body.logprobs else None,
        salt=body.cache_salt or "",
    )
    return Chat([message_of(each) for each in body.messages], ask, _tools(body), _schema(body.response_format))


def message_of(message: Message) -> dict[str, Any]:
    """A message as templates are given it."""
    plain = message.model_dump(exclude_none=True, exclude={"annotations"})
    plain["role"] = "system" if message.role == "developer" else message.role
    if message.content is None and not message.tool_calls:
        raise ApiError(400, f"a message of role {message.role!r} has no content", param="messages")
    plain.setdefault("content", "")
    return plain


def _tools(body: ChatBody) -> Tools:
    tools = tuple(tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools or ())
    parallel = body.parallel_tool_calls is not False
    choice = body.tool_choice
    if isinstance(choice, NamedChoice):
        return checked(Tools(tools, "required", (choice.function.name,), False))
    if isinstance(choice, AllowedChoice):
        only = tuple(tool.function.name for tool in choice.allowed_tools.tools)
        return checked(Tools(tools, choice.allowed_tools.mode, only, parallel))
    return checked(Tools(tools, choice or "auto", (), parallel))


def checked(tools: Tools) -> Tools:
    """Tools of which each name is there once, and those chosen among them. Raises `ApiError`."""
    names = [tool["function"]["name"] for tool in tools.tools]
    if len(names) > 128:
        raise ApiError(400, f"there are {len(names)} tools; at most 128 here", param="tools")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ApiError(400, f"two tools are named {twice!r}", param="tools")
    for name in tools.only:
        if name not in names:
            raise ApiError(400, f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
    if tools.mode == "required" and not names:
        raise ApiError(400, "tool_choice demands a call, and there are no tools", param="tool_choice")
    return tools


def _schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise ApiError(400, "response_format of type json_schema needs json_schema.schema", param="response_format")
    return form.json_schema.schema_


async def _chunks(use: Use, body: ChatBody, answers: AsyncIterator[Piece], n: int) -> AsyncIterator[dict[str, Any]]:
    for index in range(n):
        yield {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    async for piece in answers:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.call is not None:
            call: dict[str, Any] = {"index": piece.call.number, "function": {"arguments": piece.call.arguments}}
            if piece.call.name is not None:
                call |= {"id": new_id("call"), "type": "function"}
                call["function"]["name"] = piece.call.name
            delta["tool_calls"] = [call]
        logprobs = _content_logprobs(use, piece.tokens) if body.logprobs and piece.tokens else None
        yield {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}


def _choice(use: Use, body: ChatBody, index: int, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if answer.calls else "")}
    message["refusal"] = None
    if answer.calls:
        message["tool_calls"] = [
            {"id": new_id("call"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    logprobs = _content_logprobs(use, answer.tokens) if body.logprobs else None
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}


def _content_logprobs(use: Use, tokens: Sequence[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
    content = []
    for token, found in tokens:
        assert found is not None
        top = [_token(use.tokenizer, other, logprob) for other, logprob in found.top]
        content.append({**_token(use.tokenizer, token, found.raw), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text, data = token_text(tokenizer, token), tokenizer.token_bytes(token)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


# Both


def _sampling(body: Common) -> dict[str, Any]:
    top_k = 0 if body.top_k == -1 else body.top_k
    return given(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=top_k,
        min_p=body.min_p,
        seed=seed_of(body.seed),
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=biases(body.logit_bias),
    )


def _head(prefix: str, kind: str, body: Common) -> dict[str, Any]:
    if body.stream and kind == "chat.completion":
        kind += ".chunk"
    return {"id": new_id(prefix), "object": kind, "created": int(time.time()), "model": body.model}


def new_id(prefix: str) -> str:
    """A name that nothing else has."""
    return f"{prefix}-{secrets.token_hex(12)}"


def _usage(tally: Tally) -> dict[str, Any]:
    return {
        "prompt_tokens": tally.prompt,
        "completion_tokens": tally.answer,
        "total_tokens": tally.prompt + tally.answer,
        "prompt_tokens_details": {"cached_tokens": tally.cached},
    }
