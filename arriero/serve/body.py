"""Bodies of requests: JSON, strictly, and the models that they are checked against.

A member that no model names is refused, since a setting that is passed over in silence gives a wrong answer; those of
OpenAI's that have no effect on an answer here are named in the models. Numbers are no texts, and texts no numbers.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from arriero.serve.faults import ApiError

DEEPEST = 64
LARGE = 1 << 16  # bytes from which a body is parsed on a thread


class Body(BaseModel):
    """The base of all bodies, and of what is in them."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class JsonRequest(Request):
    """A request whose JSON is read by `parsed`."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            data = await self.body()
            self._json = await asyncio.to_thread(parsed, data) if len(data) > LARGE else parsed(data)
        return self._json


class JsonRoute(APIRoute):
    """A route that takes a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Any:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


def parsed(data: bytes) -> Any:
    """The value of a body. Raises `ApiError` for what is no JSON, too deep, or text that is no UTF-8."""
    try:
        value = json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ApiError(400, f"the body's JSON is nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:200]}") from None
    _check(value)
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _check(value: Any) -> None:
    """Refuse what is nested too deeply, whole numbers beyond 64 bits, and halves of surrogate pairs."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                if not item.isascii():
                    try:
                        item.encode()
                    except UnicodeEncodeError:
                        raise ApiError(
                            400, "a text in the body has half of a surrogate pair, which is no character"
                        ) from None
            elif isinstance(item, int) and not -(2**63) <= item < 2**64:
                raise ApiError(400, "a whole number in the body has more than 64 bits")
        if not below:
            return
        level = below
    raise ApiError(400, f"the body's JSON is nested deeper than {DEEPEST} levels")


def first_error(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, and the member that is to blame."""
    first = max(error.errors(), key=lambda each: len(each["loc"]))  # of a union, the alternative that was meant
    where = [str(part) for part in first["loc"] if part != "body"]
    text = str(first["msg"])
    if isinstance(given := first.get("input"), str | int | float):
        text += f", and is {given!r:.60}"
    if first["type"] == "extra_forbidden":
        text = "no such member is known here"
    elif first["type"] == "missing" and not where:
        text = "the request needs a JSON body, and Content-Type: application/json"
    name = ".".join(where)[:200]
    return (f"{name}: {text}" if name else text)[:500], where[0][:200] if where else None
