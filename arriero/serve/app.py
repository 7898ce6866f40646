"""The application: all routes, behind the guard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from arriero.errors import UserError
from arriero.serve import anthropic_api, embeddings, house_api, ollama_api, openai_api, page_api, responses_api
from arriero.serve.body import first_error
from arriero.serve.config import ServeConfig
from arriero.serve.faults import ApiError, answer
from arriero.serve.guard import Guard
from arriero.serve.metrics import Metrics
from arriero.serve.models import Models
from arriero.serve.state import State, state_of
from arriero.version import __version__


def application(config: ServeConfig) -> FastAPI:
    """The server's application; its models are loaded when it starts."""
    metrics = Metrics()
    state = State(config, Models(config, metrics), metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await state.models.start()
        yield
        await state.models.close()

    app = FastAPI(
        title="Arriero",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={
            "4XX": {"description": "The request cannot be answered; the body says why."},
            503: {"description": "The model is being loaded, or the server stops; Retry-After says when to ask again."},
        },
    )
    app.state.serve = state
    for module in (openai_api, responses_api, embeddings, anthropic_api, ollama_api, house_api, page_api):
        app.include_router(module.router)
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Guard, config=config, metrics=metrics)
    return app


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    state_of(request).metrics.refused.labels(str(error.status_code)).inc()
    return answer(request.url.path, error)


async def _refused(request: Request, error: Exception) -> Response:
    return await _told(request, ApiError(400, str(error)))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    text, param = first_error(error)
    return await _told(request, ApiError(400, text, param=param))
