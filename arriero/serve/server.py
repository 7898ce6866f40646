"""Runs the application under uvicorn: one process, one event loop, one thread an engine.

SIGTERM and Ctrl-C stop taking connections, let requests under way end for `drain` seconds, and exit with 0. A
connection that does not finish its headers in time is closed, and so is one whose headers are too long.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from arriero.checkpoint.load import open_weights
from arriero.checkpoint.source import resolve
from arriero.errors import ConfigError
from arriero.serve.app import application
from arriero.serve.config import ServeConfig
from arriero.show.terminal import say

HEADER_SECONDS = 10.0
HEADER_BYTES = 1 << 15
IDLE_SECONDS = 30
CONNECTIONS = 2048


class Protocol(H11Protocol):
    """uvicorn's, with a time limit on headers."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_SECONDS, self._close_late)

    def data_received(self, data: bytes) -> None:
        if self._late is None and self._idle:
            self._late = self.loop.call_later(HEADER_SECONDS, self._close_late)
        super().data_received(data)
        if self._late is not None and not self._idle:
            self._late.cancel()
            self._late = None

    def connection_lost(self, error: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(error)

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _close_late(self) -> None:
        if self._idle and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """The application on a socket that listens."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises `ConfigError` where the address cannot be had."""
        app = application(config)
        self.models = app.state.serve.models
        self._listener = _listener(config)
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.address = f"http://{host}:{self._listener.getsockname()[1]}"
        settings = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=max(1, round(config.drain)),
            limit_concurrency=CONNECTIONS,
            backlog=1024,
        )
        super().__init__(settings)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, or `stop`."""
        super().run([self._listener])

    def stop(self) -> None:
        """Take no more requests, let those under way end, and return from `run`."""
        self.models.draining = self.should_exit = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.models.draining = True
        super().handle_exit(sig, frame)


def serve(config: ServeConfig) -> None:
    """Serve until a signal ends it. Raises `CheckpointError` for a model that is not there, before it listens."""
    for source in config.models.values():
        open_weights(resolve(source))
    server = Server(config)
    say(f"serving {', '.join(server.models.names)} at {server.address}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises what it caught again, when all is done
    server.run()


def _listener(config: ServeConfig) -> socket.socket:
    """A socket that listens. Raises `ConfigError` where the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror}; choose another with "
            "--port (0: a free one) or --host"
        ) from None
    return listener
