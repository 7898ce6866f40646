"""JSON over HTTP, asked and answered, with the standard library."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any


class Refused(Exception):
    """A status of 400 or above. code: which; text: the beginning of what the server says."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


def send(url: str, body: Any = None, *, key: str, seconds: float) -> Any:
    """The JSON at `url`; a body is posted.

    key: environment variable with the API key; where it is not set none is sent. seconds: until the server is silent
    for too long. Raises `Refused` for a status that tells of an error, TimeoutError where it takes too long, OSError
    where nothing answers, and ValueError for what is no JSON.
    """
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(key):
        headers["Authorization"] = f"Bearer {secret}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            raise Refused(error.code, error.read(500).decode("utf-8", "replace")) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from error
        raise
