"""A server in a thread of this process, on a free port of loopback."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from arriero.serve.config import ServeConfig
from arriero.serve.server import Server


class Running:
    """with Running(ServeConfig(...)) as server: server.url"""

    def __init__(self, config: ServeConfig, wait: bool = True) -> None:
        self.server, self._wait = Server(config), wait
        self.url = self.server.address
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Running:
        self._thread.start()
        while not (self.server.started and (self.server.models.ready or not self._wait)):
            assert self._thread.is_alive(), "the server did not start"
            failed = [state for state in self.server.models.states.values() if state.startswith("failed")]
            assert not failed, failed
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not stop"

    def call(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text), and headers of the answer; a body, which may be bytes, is posted."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(asked, timeout=120) as response:
                status, text, told = response.status, response.read(), dict(response.headers)
        except urllib.error.HTTPError as error:
            with error:
                status, text, told = error.code, error.read(), dict(error.headers)
        is_json = "json" in told.get("content-type", "") and "ndjson" not in told.get("content-type", "")
        return status, json.loads(text) if is_json else text.decode(), told
