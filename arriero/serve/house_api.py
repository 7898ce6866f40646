"""Routes of our own: health, metrics, tokens, and adapters."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from arriero.serve.body import Body, JsonRoute
from arriero.serve.chat import with_mask
from arriero.serve.faults import ApiError, Json
from arriero.serve.openai_api import message_of, token_text
from arriero.serve.openai_schema import FunctionName, Id, Message, Name, Tool
from arriero.serve.state import state_of
from arriero.serve.stream import unless_left
from arriero.serve.tools import Tools, render

router = APIRouter(route_class=JsonRoute)


@router.get("/health")
async def health() -> Response:
    """Whether the server answers at all."""
    return Json({"status": "ok"})


@router.get("/ready", responses={503: {"description": "Models are being loaded, or the server stops."}})
async def ready(request: Request) -> Response:
    """Whether all models are there, and what became of each."""
    models = state_of(request).models
    return Json({"ready": models.ready, "models": models.states}, 200 if models.ready else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters and latencies, for Prometheus."""
    return Response(state_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class TokenizeBody(Body):
    """A text, or a conversation up to its answer."""

    model: Name
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """The ids of a text, or of a conversation as the model is asked."""
    if (body.prompt is None) == (body.messages is None) or body.messages == []:
        raise ApiError(400, "give either a prompt or messages", param="prompt")
    async with state_of(request).models.use(body.model) as use:

        def encode() -> Response:  # JSON and all on a thread: a long text takes a while
            if body.prompt is not None:
                begin = use.tokenizer.begin_ids if body.add_special_tokens else []
                ids = [*begin, *use.tokenizer.encode(body.prompt)]
            else:
                tools = Tools(tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ()))
                ids, _ = render(use.tokenizer, [message_of(each) for each in body.messages or ()], tools)
            texts = [token_text(use.tokenizer, i) for i in ids]
            return Json({"count": len(ids), "max_model_len": use.context, "tokens": ids, "token_strs": texts})

        return await unless_left(request.receive, use.loaded.run(encode))


class DetokenizeBody(Body):
    """/detokenize."""

    model: Name
    tokens: list[Id]
    skip_special_tokens: bool = False


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """The text of ids."""
    async with state_of(request).models.use(body.model) as use:
        _check_ids(body.tokens, use.tokenizer.vocab_size)
        return Json({"prompt": use.tokenizer.decode(body.tokens, skip_special=body.skip_special_tokens)})


def _check_ids(ids: list[int], size: int) -> None:
    if ids and max(ids) >= size:
        raise ApiError(400, f"there is no token {max(ids):,}; the vocabulary has {size:,}", param="tokens")


class RenderBody(Body):
    """/render."""

    model: Name
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None


@router.post("/render")
async def rendered(body: RenderBody, request: Request) -> Response:
    """A conversation's ids exactly as training sees them, and which of them are trained."""
    async with state_of(request).models.use(body.model) as use:
        messages = [message_of(each) for each in body.messages]
        tools: Any = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None

        def encode() -> Response:
            ids, trained = with_mask(use.tokenizer, messages, tools)
            texts = [token_text(use.tokenizer, i) for i in ids]
            return Json({"count": len(ids), "tokens": ids, "trained": trained, "token_strs": texts})

        return await unless_left(request.receive, use.loaded.run(encode))


class AdapterBody(Body):
    """As vLLM takes it."""

    lora_name: FunctionName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    model: Name | None = None


class AdapterName(Body):
    """/v1/unload_lora_adapter."""

    lora_name: FunctionName


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: AdapterBody, request: Request) -> Response:
    """Serve one more adapter of this machine's files; for those with an API key alone."""
    state = state_of(request)
    _check_may_load(bool(state.config.key))
    names = list(state.models.sources)
    if body.model is None and len(names) > 1:
        raise ApiError(400, f"say of which model it is: model is one of {', '.join(names)}", param="model")
    await state.models.load_adapter(body.lora_name, body.model or names[0], body.lora_path)
    return Json({"loaded": body.lora_name})


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: AdapterName, request: Request) -> Response:
    """Serve an adapter no more."""
    state = state_of(request)
    _check_may_load(bool(state.config.key))
    await state.models.unload_adapter(body.lora_name)
    return Json({"unloaded": body.lora_name})


def _check_may_load(has_key: bool) -> None:
    if not has_key:
        raise ApiError(
            403, "adapters are loaded from this machine's files for clients with a key alone; start with --api-key"
        )
