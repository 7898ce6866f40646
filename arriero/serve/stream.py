"""Answers that are sent while they are made, and requests whose client leaves.

Whoever is asked for an answer watches the connection meanwhile: a client that leaves cancels the work, streamed or not.
An error before the first byte is an ordinary one; later it is told as an event of the API, since the status is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from arriero.io.files import json_bytes
from arriero.serve.faults import ApiError

T = TypeVar("T")

SSE, NDJSON = "text/event-stream", "application/x-ndjson"


def streamed_as(media_type: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that streams its answer when asked to, beside the JSON of one that does not."""
    return {
        200: {"description": "The answer, whole or streamed.", "content": {media_type: {"schema": {"type": "string"}}}}
    }


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled, and `ClientLeft` raised, when the client leaves first."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def timed(seconds: float, work: Awaitable[T]) -> T:
    """`work` within a time. Raises `ApiError` beyond it."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise ApiError(408, f"the answer took longer than {seconds:g} s; ask for less, or set --timeout") from None


class Streamed(Response):
    """Parts of an answer as they come. `first` has been made already, so that errors before it have a status."""

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        seconds: float,
        media_type: str,
        on_error: Callable[[HTTPException], bytes],
    ) -> None:
        self.parts, self.seconds, self.on_error = parts, seconds, on_error
        self.status_code, self.media_type, self.background = 200, media_type, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.first: bytes | None = None

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        self.body = b""
        super().init_headers(headers)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def begin(self, request: Request) -> Streamed:
        """Make the first part. Raises what its making raises."""
        self.first = await unless_left(request.receive, timed(self.seconds, anext(self.parts, b"")))
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_left(receive, self._send(send))
        except ClientLeft:
            pass
        finally:
            await self.parts.aclose()  # type: ignore[attr-defined]

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            if self.first:
                await send({"type": "http.response.body", "body": self.first, "more_body": True})
            async with asyncio.timeout(self.seconds):
                async for part in self.parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except HTTPException as error:
            await self._fail(send, error)
        except TimeoutError:
            await self._fail(send, ApiError(408, f"the answer took longer than {self.seconds:g} s"))
        except Exception as error:
            await self._fail(send, ApiError(500, "the server failed to go on with this answer"))
            raise error
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, send: Send, error: HTTPException) -> None:
        await send({"type": "http.response.body", "body": self.on_error(error), "more_body": True})


def sse(data: Any, event: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + (data if isinstance(data, bytes) else json_bytes(data)) + b"\n\n"
