"""A load test of any server that speaks OpenAI's API: tokens/s, time to the first token and between tokens, by load.

Each client is a thread that makes its requests one after the other, with streaming, so as many are under way as there
are clients. All share a system prompt, as the requests of one application do; what follows it is different in each,
so that no more of it can be cached. Tokens are those of the server's own `usage`; between tokens is the time between
chunks with text. A request that fails counts as lost, and is told.

Price: the clients run on the machine that they measure, and take CPU time from the server.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from rich.table import Table

from arriero.errors import UserError
from arriero.serve.config import KEY, LoadConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXT = (
    "river stone market wool winter village letter window garden table music harbour question answer morning "
    "evening mountain road bridge bread salt copper silver story teacher number colour shadow summer family "
    "travel weather"
)
WORDS = _TEXT.split()
SECONDS = 600.0  # of a silence after which a request is lost


@dataclass
class Told:
    """What one client has seen."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # the clock at the end of each of `between`
    prompt_tokens: int = 0
    tokens: int = 0
    done: int = 0
    lost: list[str] = field(default_factory=list)


@dataclass
class Level:
    """A load: so many clients, and what they have seen so far. seconds: from the first request to the last answer."""

    clients: int
    told: list[Told]
    began: float
    seconds: float = 0.0

    @property
    def row(self) -> list[str]:
        """For the table: what is known by now."""
        took = self.seconds or time.perf_counter() - self.began
        first, between = self.times("first"), self.times("between")
        return [
            str(self.clients),
            f"{self.total('done')}",
            f"{len(self.lost)}",
            f"{self.total('tokens') / took:,.1f}",
            *(_milliseconds(first, q) for q in (50, 95)),
            *(_milliseconds(between, q) for q in (50, 95)),
        ]

    def total(self, name: str) -> int:
        """Of all clients."""
        return sum(getattr(told, name) for told in self.told)

    def times(self, name: str) -> list[float]:
        """Of all clients, in seconds."""
        return [seconds for told in self.told for seconds in list(getattr(told, name))]

    @property
    def lost(self) -> list[str]:
        """Why requests failed."""
        return [why for told in self.told for why in told.lost]


def _milliseconds(times: Sequence[float], percentile: int) -> str:
    return f"{1000 * float(np.percentile(times, percentile)):,.0f}" if times else "-"


def run_load(
    config: LoadConfig,
    on_change: Callable[[list[Level]], None],
    settings: Mapping[str, Any] = MappingProxyType({"temperature": 1.0}),
) -> list[Level]:
    """Measure each load in turn; `on_change` is called with all levels, the one under way last, four times a second.
    settings: further entries of each request's body.

    Raises `UserError` where nothing answers at the address.
    """
    model, levels = config.name or _first_model(config), list[Level]()
    rng = random.Random(config.seed)
    system = " ".join(rng.choices(WORDS, k=config.system))
    for clients in config.clients:
        level = Level(clients, [Told() for _ in range(clients)], time.perf_counter())
        levels.append(level)
        prompts = [
            [" ".join(rng.choices(WORDS, k=rng.randint(*config.words))) for _ in range(config.requests)]
            for _ in level.told
        ]
        threads = [
            threading.Thread(target=_client, args=(config, model, system, given, settings, told), daemon=True)
            for given, told in zip(prompts, level.told, strict=True)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.25) if threads[0].is_alive() else time.sleep(0.05)
            on_change(levels)
        level.seconds = time.perf_counter() - level.began
        on_change(levels)
    return levels


def _first_model(config: LoadConfig) -> str:
    connection = _connection(config)
    try:
        connection.request("GET", "/v1/models", headers=_headers(config))
        response = connection.getresponse()
        told = response.read()
        if response.status != 200:
            raise UserError(
                f"{config.url}/v1/models answers with {response.status}: {told[:200].decode(errors='replace')}"
            )
        return str(json.loads(told)["data"][0]["id"])
    except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"nothing that speaks OpenAI's API answers at {config.url}: {error}; start a server there"
        ) from None
    finally:
        connection.close()


def _connection(config: LoadConfig) -> http.client.HTTPConnection:
    parts = urlsplit(config.url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=SECONDS)


def _headers(config: LoadConfig) -> dict[str, str]:
    key = config.api_key or os.environ.get(KEY, "")
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def _client(
    config: LoadConfig, model: str, system: str, prompts: Sequence[str], settings: Mapping[str, Any], told: Told
) -> None:
    connection = _connection(config)
    for prompt in prompts:
        body = {
            "model": model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}],
            "max_tokens": config.new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **settings,
        }
        try:
            ask(connection, _headers(config), body, told)
        except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
            told.lost.append(str(error) or type(error).__name__)
            connection.close()
    connection.close()


def ask(connection: http.client.HTTPConnection, headers: dict[str, str], body: dict[str, Any], told: Told) -> None:
    """One streamed chat, counted in `told`. Raises `ValueError` for a status or an event that is an error."""
    began = last = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"{response.status}: {response.read()[:200].decode(errors='replace')}")
    started = False
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        chunk = json.loads(line[len(b"data: ") :])
        if "error" in chunk:
            raise ValueError(str(chunk["error"]))
        if usage := chunk.get("usage"):
            told.tokens += usage["completion_tokens"]
            told.prompt_tokens += usage["prompt_tokens"]
        if any(choice["delta"].get("content") for choice in chunk["choices"]):
            now = time.perf_counter()
            if started:
                told.between.append(now - last)
                told.at.append(now)
            else:
                told.first.append(now - began)
            started, last = True, now
    told.done += 1


def table(levels: Sequence[Level]) -> Table:
    """For the terminal, also while it grows."""
    made = Table(title="load, by clients at a time")
    for name in ("clients", "answers", "lost", "tokens/s", "first, ms: median", "p95", "between, ms: median", "p95"):
        made.add_column(name, justify="right")
    for level in levels:
        made.add_row(*level.row)
    return made


def figure(levels: Sequence[Level]) -> Figure:
    """Latency and speed against load."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9, 3.2), layout="constrained")
    axes = made.subplots(1, 3)
    loads = [level.clients for level in levels]
    axes[0].plot(loads, [level.total("tokens") / level.seconds for level in levels], "o-", color="#8a5a2b")
    axes[0].set_title("tokens/s")
    for one, name, title in ((axes[1], "first", "first token, ms"), (axes[2], "between", "between tokens, ms")):
        for percentile, style in ((50, "o-"), (95, "o--")):
            values = [1000 * float(np.percentile(level.times(name) or [np.nan], percentile)) for level in levels]
            one.plot(loads, values, style, color="#8a5a2b", label="median" if percentile == 50 else "p95")
        one.set_title(title)
        one.legend(frameon=False)
    for one in axes:
        one.set_xlabel("clients at a time")
        one.set_ylim(bottom=0)
        one.spines[["top", "right"]].set_visible(False)
    return made
