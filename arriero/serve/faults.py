"""Errors as clients of each API expect them: a status, and JSON in the shape that the API's clients parse.

An `ApiError` may be raised anywhere in the handling of a request. A `UserError` of the house is the client's mistake
here (400), since whatever it names came with the request; what else is raised is ours, and becomes a 500 without its
text.
"""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from arriero.io.files import json_line

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class ApiError(HTTPException):
    """What a client is told instead of an answer. param: the member of the request that is to blame."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(status, message, {"Retry-After": str(retry_after)} if retry_after else None)
        self.param, self.code = param, code


class Json(Response):
    """A JSON answer, written as the house writes JSON (no NaN)."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_line(content).rstrip(b"\n")


def shape(path: str, status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error for a client of the API that `path` belongs to."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    if path.startswith("/api/"):
        return {"error": message}
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(path: str, error: HTTPException) -> Json:
    """The response that tells of an error."""
    body = shape(
        path, error.status_code, str(error.detail), getattr(error, "param", None), getattr(error, "code", None)
    )
    return Json(body, error.status_code, error.headers)
