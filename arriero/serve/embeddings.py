"""Embeddings of texts: the mean of the model's last hidden states over the tokens, of length 1.

h: final hidden states [T, D] after the last norm; the embedding is m / |m| with m = mean over T of h, in fp32. A
decoder that was not tuned for embeddings gives what it gives; for similar texts the cosine is larger. They are
computed by the torch model on a thread of their own, a text at a time, beside the engine. /v1/embeddings is OpenAI's
form of it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from arriero.serve.asking import MAX_PROMPTS
from arriero.serve.body import Body, JsonRoute
from arriero.serve.faults import ApiError, Json
from arriero.serve.models import Use
from arriero.serve.openai_schema import Id, Name
from arriero.serve.state import state_of
from arriero.serve.stream import timed, unless_left

router = APIRouter(route_class=JsonRoute)
Texts = Sequence[str | Sequence[int]]


class EmbeddingBody(Body):
    """/v1/embeddings."""

    model: Name
    input: str | list[str] | list[Id] | list[list[Id]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, request: Request) -> Response:
    """Embeddings of texts."""
    state = state_of(request)
    given = body.input
    texts: Any = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    async with state.models.use(body.model) as use:
        if body.dimensions not in (None, size := use.loaded.model.config.dim):
            raise ApiError(
                400, f"dimensions is {body.dimensions}; this model's embeddings have {size}", param="dimensions"
            )
        work = timed(state.config.timeout, embedded(use, texts))
        vectors, n_tokens = await unless_left(request.receive, work)
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return Json({"object": "list", "data": data, "model": body.model, "usage": usage})


def _written(vector: np.ndarray, form: str | None) -> str | list[float]:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector]


async def embedded(use: Use, texts: Texts) -> tuple[list[np.ndarray], int]:
    """An embedding fp32 [D] of each text, and the tokens of all. Raises `ApiError` for what cannot have one."""
    if use.adapter is not None:
        raise ApiError(400, f"{use.name!r} is an adapter, and embeddings are the model's own; ask {use.loaded.name!r}")
    if not 0 < len(texts) <= MAX_PROMPTS:
        raise ApiError(400, f"there are {len(texts):,} texts; from 1 to {MAX_PROMPTS} here", param="input")
    every = await use.loaded.run(_ids, use, texts)
    vectors = []
    for ids in every:  # one at a time: who leaves stops the rest
        vectors.append(await use.loaded.embed(_embedding, use, ids))
    return vectors, sum(map(len, every))


def _ids(use: Use, texts: Texts) -> list[list[int]]:
    every = []
    for i, text in enumerate(texts):
        if isinstance(text, str):
            ids = [*use.tokenizer.begin_ids, *use.tokenizer.encode(text)]
        else:
            ids = list(text)
            if ids and max(ids) >= use.tokenizer.vocab_size:
                raise ApiError(400, f"input {i} has the id {max(ids)}, which the model lacks", param="input")
        if not ids:
            raise ApiError(400, f"input {i} is empty", param="input")
        if len(ids) > use.context:
            raise ApiError(400, f"input {i} has {len(ids):,} tokens, and the context {use.context:,}", param="input")
        every.append(ids)
    return every


def _embedding(use: Use, ids: list[int]) -> np.ndarray:
    import torch

    model = use.loaded.whole()
    with torch.inference_mode():
        mean = model.model(torch.tensor([ids], device=model.device))[0].float().mean(0)
        vector: np.ndarray = torch.nn.functional.normalize(mean, dim=0).cpu().numpy()
        return vector
