"""Ollama's API: chat, generate, embed, tags, show, ps and version.

Answers are streamed as lines of JSON unless `"stream": false`, as Ollama does. Options that change what is computed
here and are not known are refused; those that only say how Ollama should use its machine (num_gpu and the like) have
no effect. Calls of tools are told when they are whole, since their arguments are an object in this API.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from arriero.io.files import json_line
from arriero.serve.asking import Ask, answered, given, prepared, seed_of
from arriero.serve.body import Body, JsonRoute
from arriero.serve.chat import Answer, Chat, Piece, Tally, pieces, rendered, whole
from arriero.serve.embeddings import embedded
from arriero.serve.faults import ApiError, Json, shape
from arriero.serve.models import Use
from arriero.serve.openai_api import checked
from arriero.serve.openai_schema import Name, Tool
from arriero.serve.state import State, state_of
from arriero.serve.stream import NDJSON, Streamed, streamed_as, timed, unless_left
from arriero.serve.tools import Style, Tools
from arriero.version import __version__

router = APIRouter(route_class=JsonRoute)
_MACHINE = frozenset(
    [
        "num_ctx",
        "num_keep",
        "num_batch",
        "num_gpu",
        "main_gpu",
        "low_vram",
        "use_mmap",
        "use_mlock",
        "num_thread",
        "numa",
    ]
)


class Options(Body):
    """Sampling settings by Ollama's names."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    num_predict: int | None = None  # -1, -2: as long as there is room
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None


Form = Literal["", "json"] | dict[str, Any] | None


class OllamaCall(Body):
    """A call that the assistant made earlier in the conversation."""

    class Function(Body):
        """The name of the called function, and its arguments."""

        name: str
        arguments: dict[str, Any]
        index: int | None = None

    function: Function
    id: str | None = None
    type: Literal["function"] | None = None


class OllamaMessage(Body):
    """One message of a conversation, without images."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Annotated[list[str], Field(max_length=0)] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    thinking: str | None = None


class Common(Body):
    """Members of all requests for answers."""

    model: Name
    stream: bool = True
    options: Options | None = None
    format: Form = None
    keep_alive: float | str | None = None
    think: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None


class OllamaChat(Common):
    """/api/chat."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: list[Tool] | None = None


class OllamaGenerate(Common):
    """/api/generate."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: Annotated[list[int], Field(max_length=0)] | None = None
    images: Annotated[list[str], Field(max_length=0)] | None = None


class OllamaEmbed(Body):
    """/api/embed."""

    model: Name
    input: str | list[str]
    truncate: bool | None = None
    options: Options | None = None
    keep_alive: float | str | None = None
    dimensions: None = None


class OllamaShow(Body):
    """/api/show."""

    model: Name
    verbose: bool | None = None


@router.post("/api/chat", responses=streamed_as(NDJSON))
async def chat(body: OllamaChat, request: Request) -> Response:
    """Answer a conversation."""
    if not body.messages:
        return Json(_loaded(request, body.model, {"message": {"role": "assistant", "content": ""}}))
    tools = checked(Tools(tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ())))
    conversation = Chat([_message(m) for m in body.messages], _ask(body), tools, _schema(body.format), prefill=True)
    return await _respond(request, body, conversation)


@router.post("/api/generate", responses=streamed_as(NDJSON))
async def generate(body: OllamaGenerate, request: Request) -> Response:
    """Answer a prompt, by the model's template unless it is raw."""
    if not body.prompt:
        return Json(_loaded(request, body.model, {"response": ""}))
    if body.raw:
        return await _respond(request, body, body.prompt)
    opening = [{"role": "system", "content": body.system}] if body.system else []
    conversation = [*opening, {"role": "user", "content": body.prompt}]
    return await _respond(request, body, Chat(conversation, _ask(body), schema=_schema(body.format)))


def _loaded(request: Request, model: str, said: dict[str, Any]) -> dict[str, Any]:
    """Ollama's answer to a request without a prompt, which there loads the model."""
    state_of(request).models.model_of(model)
    return {"model": model, "created_at": _now(), **said, "done": True, "done_reason": "load"}


def _message(message: OllamaMessage) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id or f"call{i}", "type": "function", "function": {
                "name": call.function.name, "arguments": json.dumps(call.function.arguments, ensure_ascii=False)}}
            for i, call in enumerate(message.tool_calls)
        ]  # fmt: skip
    return {**plain, **given(name=message.tool_name, tool_call_id=message.tool_call_id)}


def _ask(body: Common) -> Ask:
    options = body.options or Options()
    if unknown := sorted((options.model_extra or {}).keys() - _MACHINE):
        raise ApiError(400, f"options.{unknown[0][:100]}: no such option is known here")
    sampling = given(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=seed_of(options.seed),
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
    )
    stop = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ())
    longest = options.num_predict
    if longest == 0:
        raise ApiError(400, "options.num_predict is 0: nothing is asked")
    return Ask([], None if longest is None or longest < 0 else longest, sampling, stop=stop)


def _schema(form: Form) -> dict[str, Any] | None:
    return {} if form == "json" else form or None  # type: ignore[return-value]


async def _respond(request: Request, body: Common, asked: Chat | str) -> Response:
    state = state_of(request)
    lines = _lines(state, body, asked)
    if body.stream:
        return await Streamed(_written(lines), state.config.timeout, NDJSON, _failed).begin(request)
    async with aclosing(lines):  # type: ignore[type-var]
        return Json(await unless_left(request.receive, timed(state.config.timeout, anext(lines))))


async def _written(lines: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async with aclosing(lines):  # type: ignore[type-var]
        async for line in lines:
            yield json_line(line)


def _failed(error: HTTPException) -> bytes:
    return json_line(shape("/api/", error.status_code, str(error.detail)))


async def _lines(state: State, body: Common, asked: Chat | str) -> AsyncIterator[dict[str, Any]]:
    """The lines of a stream; or, not streamed, the one answer."""
    began, first = time.perf_counter_ns(), 0
    async with state.models.use(body.model) as use:
        ask, style, tools = await _prompt(use, body, asked)
        requests = await prepared(use, ask, state.config)
        tally = Tally()
        async with answered(use, requests, state.config) as ticket:
            answers = pieces(ticket, tally, tools, style)
            said = _Said(body.model, isinstance(body, OllamaChat))
            if body.stream:
                async for piece in answers:
                    first = first or time.perf_counter_ns()
                    for part in said.of(piece):
                        yield part
                    if piece.finish is not None:
                        finish = piece.finish
                last: dict[str, Any] = said.line("", [])
            else:
                [answer] = await whole(answers)
                first, finish, last = began, answer.finish, said.whole(answer)
        end = time.perf_counter_ns()
        yield {
            **last,
            "done": True,
            "done_reason": "length" if finish == "length" else "stop",
            "total_duration": end - began,
            "load_duration": 0,
            "prompt_eval_count": tally.prompt,
            "prompt_eval_duration": first - began,
            "eval_count": tally.answer,
            "eval_duration": end - first,
        }


async def _prompt(use: Use, body: Common, asked: Chat | str) -> tuple[Ask, Style, Tools]:
    if isinstance(asked, Chat):
        ask, style = await rendered(use, asked)
        return ask, style, asked.tools
    ids = await use.loaded.run(use.tokenizer.encode, asked)
    schema = _schema(body.format)
    ask = Ask(**{**vars(_ask(body)), "prompts": [[*use.tokenizer.begin_ids, *ids]]})
    if schema is not None:
        ask = Ask(**{**vars(ask), "constraint": ("json_schema", json.dumps(schema or {"type": "object"}))})
    return ask, "hermes", Tools()


class _Said:
    """Lines of an answer; calls are kept until they are whole."""

    def __init__(self, model: str, is_chat: bool) -> None:
        self._model, self._is_chat, self._answer = model, is_chat, Answer()

    def line(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """One line that is not the last."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = calls
        said = {"message": message} if self._is_chat else {"response": text}
        return {"model": self._model, "created_at": _now(), **said, "done": False}

    def of(self, piece: Piece) -> list[dict[str, Any]]:
        """The lines of a piece."""
        self._answer.add(piece)
        lines = [self.line(piece.text, [])] if piece.text else []
        if piece.finish is not None and self._answer.calls:
            lines.append(self.line("", _calls(self._answer)))
        return lines

    def whole(self, answer: Answer) -> dict[str, Any]:
        """All at once."""
        return self.line(answer.text, _calls(answer))


def _calls(answer: Answer) -> list[dict[str, Any]]:
    calls = []
    for i, call in enumerate(answer.calls):
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            continue  # cut at the token limit, which done_reason says
        calls.append({"function": {"index": i, "name": call.name, "arguments": arguments}})
    return calls


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


# What is there


@router.post("/api/embed")
async def embed(body: OllamaEmbed, request: Request) -> Response:
    """Embeddings of texts."""
    state, began = state_of(request), time.perf_counter_ns()
    texts = [body.input] if isinstance(body.input, str) else body.input
    async with state.models.use(body.model) as use:
        work = timed(state.config.timeout, embedded(use, texts))
        vectors, n_tokens = await unless_left(request.receive, work)
    return Json(
        {
            "model": body.model,
            "embeddings": [[float(x) for x in vector] for vector in vectors],
            "total_duration": time.perf_counter_ns() - began,
            "load_duration": 0,
            "prompt_eval_count": n_tokens,
        }
    )


@router.get("/api/tags")
async def tags(request: Request) -> Response:
    """The models and adapters that are served."""
    state = state_of(request)
    return Json({"models": [_tag(state, name) for name in state.models.names]})


@router.get("/api/ps")
async def running(request: Request) -> Response:
    """Those that are loaded."""
    state = state_of(request)
    names = [name for name in state.models.names if state.models.states[state.models.model_of(name)[0]] == "ready"]
    return Json(
        {"models": [{**_tag(state, name), "expires_at": "9999-12-31T00:00:00Z", "size_vram": 0} for name in names]}
    )


@router.get("/api/version")
async def version() -> Response:
    """Arriero's."""
    return Json({"version": __version__})


@router.post("/api/show")
async def show(body: OllamaShow, request: Request) -> Response:
    """What a model is."""
    state = state_of(request)
    async with state.models.use(body.model) as use:
        config, template = use.loaded.model.config, use.tokenizer.chat_template
        info = {
            "general.architecture": "llama",
            "general.parameter_count": sum(p.numel() for p in use.loaded.model.parameters()),
            "llama.context_length": use.context,
            "llama.embedding_length": config.dim,
            "llama.block_count": config.n_layers,
            "llama.attention.head_count": config.n_heads,
            "llama.attention.head_count_kv": config.n_kv_heads,
            "llama.vocab_size": config.vocab_size,
        }
        settings = "\n".join(f"{name} {value}" for name, value in use.loaded.own.items())
        return Json(
            {
                "modelfile": "",
                "parameters": settings,
                "template": template.source or "" if template else "",
                "details": _details(),
                "model_info": info,
                "capabilities": ["completion", "tools", "embedding"],
                "modified_at": _tag(state, body.model)["modified_at"],
            }
        )


def _tag(state: State, name: str) -> dict[str, Any]:
    base, adapter = state.models.model_of(name)
    source = state.models.adapters[name][1] if adapter else state.models.sources[base]
    modified = datetime.fromtimestamp(state.models.created, UTC).isoformat().replace("+00:00", "Z")
    digest = hashlib.sha256(f"{name}\0{source}".encode()).hexdigest()
    return {"name": name, "model": name, "modified_at": modified, "size": 0, "digest": digest, "details": _details()}


def _details() -> dict[str, Any]:
    return {"parent_model": "", "format": "arriero", "family": "llama", "families": ["llama"],
            "parameter_size": "", "quantization_level": ""}  # fmt: skip
