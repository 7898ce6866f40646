"""What every request passes before any route: whom it is for, who sends it, and how much.

- Host: a name of this server, or a number; so a page of another name that resolves to this address (DNS rebinding) is
  refused. Origin: that of the server's own page, or one that was allowed; requests of other pages are refused, and with
  them whatever a browser would send along (a password, for one).
- The API key, compared in constant time, on every route but /health: as `Authorization: Bearer`, `x-api-key`, or, so
  that a browser can open the page, as the password of `Authorization: Basic`.
- The body's size, before it is read and while it is; the time that a body may take.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import re
import traceback
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arriero.serve.config import ServeConfig
from arriero.serve.faults import ApiError, answer
from arriero.serve.metrics import Metrics
from arriero.serve.stream import ClientLeft
from arriero.show.terminal import complain

OPEN = ("/health",)  # without a key
BODY_SECONDS = 30.0
Headers = dict[bytes, list[bytes]]


class Guard:
    """Around the whole application."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self._key = _digest(config.key.encode()) if config.key else None
        names = {"localhost", config.host.lower(), *(name.lower() for name in config.allow_host)}
        self._hosts = names - {"0.0.0.0", "::", ""}
        self._origins = set(config.allow_origin)
        self._most = int(config.max_body_mb * 2**20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        sent = _Sent(send)
        try:
            headers: Headers = {}
            for name, value in scope["headers"]:
                headers.setdefault(name, []).append(value)
            self._check_host(scope, headers)
            origin = self._checked_origin(headers)
            if origin:
                sent.add(_cors(origin))
                if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                    await sent({"type": "http.response.start", "status": 204, "headers": []})
                    return await sent({"type": "http.response.body", "body": b""})
            if self._key is not None and scope["path"] not in OPEN:
                self._check_key(scope, headers)
            await self.app(scope, _Bounded(receive, self._checked_length(headers), self._most), sent)
        except ClientLeft:
            pass
        except Exception as error:
            if not isinstance(error, HTTPException):
                complain("".join(traceback.format_exception(error)))
                error = ApiError(500, "the server failed on this request")
            if sent.begun:
                return None
            self.metrics.refused.labels(str(error.status_code)).inc()
            await answer(scope["path"], error)(scope, receive, sent)
        return None

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        given = headers.get(b"host", [])
        host = _host_of(given[0].decode("latin-1")) if len(given) == 1 else None
        if host is None:
            raise ApiError(400, "the request needs one valid Host header")
        if host not in self._hosts and not _is_number(host):
            raise ApiError(403, f"this server is not {host[:100]!r}; start it with --allow-host {host[:100]} if it is")

    def _checked_origin(self, headers: Headers) -> str | None:
        """An origin other than our own that is allowed."""
        if b"origin" not in headers:
            return None
        origin, host = headers[b"origin"][0].decode("latin-1"), headers[b"host"][0].decode("latin-1")
        if origin in self._origins:
            return origin
        parts = urlsplit(origin) if origin != "null" else None
        if parts is None or parts.netloc.lower() != host.lower() or parts.scheme not in ("http", "https"):
            raise ApiError(403, f"pages of {origin[:100]!r} may not use this server; --allow-origin lets them")
        return None

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        given = list(_keys(headers))
        right = [hmac.compare_digest(_digest(key), self._key or b"") for key in given]
        if not any(right):
            browser = scope["method"] == "GET" and b"text/html" in b",".join(headers.get(b"accept", []))
            error = ApiError(
                401, "the API key is wrong" if given else "the request has no API key", code="invalid_api_key"
            )
            error.headers = {"WWW-Authenticate": 'Basic realm="arriero"' if browser else "Bearer"}
            raise error

    def _checked_length(self, headers: Headers) -> int | None:
        if b"content-length" not in headers:
            return None
        text = headers[b"content-length"][0]
        length = int(text) if re.fullmatch(rb"\d{1,18}", text) else self._most + 1
        if length > self._most:
            raise ApiError(413, f"the body has {length:,} bytes, and may have {self._most:,} (--max-body-mb)")
        return length


class _Bounded:
    """The receiving end of a body, of bounded size and time."""

    def __init__(self, receive: Receive, length: int | None, most: int) -> None:
        self._receive, self._most, self._size, self._whole = receive, most, 0, False
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
        self._size += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._size > self._most:
            raise ApiError(413, f"the body has over {self._most:,} bytes (--max-body-mb)")
        return message


class _Sent:
    """The sending end: adds headers, and knows whether it is too late for an error."""

    def __init__(self, send: Send) -> None:
        self._send, self.begun = send, False
        self._headers: list[tuple[bytes, bytes]] = [(b"x-content-type-options", b"nosniff")]

    def add(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Headers of the response."""
        self._headers += headers

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        await self._send(message)


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", b"authorization, content-type, x-api-key, anthropic-version, anthropic-beta"),
        (b"vary", b"Origin"),
    ]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, whatever was sent


def _keys(headers: Headers) -> Iterable[bytes]:
    yield from headers.get(b"x-api-key", ())
    for value in headers.get(b"authorization", ()):
        scheme, _, rest = value.strip().partition(b" ")
        if scheme.lower() == b"bearer":
            yield rest.strip()
        elif scheme.lower() == b"basic":
            try:
                yield base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
            except ValueError:
                continue


def _host_of(header: str) -> str | None:
    """The host without its port, in small letters; None for what is none."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?", header)
    return match[1].strip("[]").lower().rstrip(".") if match else None


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
