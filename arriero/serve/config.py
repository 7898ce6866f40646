"""Settings of the server. No torch here: the command line reads this module to print its help."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from arriero.errors import ConfigError, check
from arriero.infer.config import ActivationBits
from arriero.io.paths import PathText, expand
from arriero.settings import settle

KEY = "ARRIERO_API_KEY"


@dataclass(frozen=True)
class ServeConfig:
    """A server for one or several models."""

    model: tuple[PathText, ...] = ()
    """Directories, .gguf files, Hub ids, or built-in names; NAME=MODEL serves one under another name."""
    adapter: tuple[PathText, ...] = ()
    """LoRA adapters to serve beside the models, as NAME=DIR; with several models NAME@MODEL=DIR, MODEL being the name
    that its model is served by."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all of this machine's, for other machines to reach."""
    port: int = 8080
    """Port to listen on; 0 takes a free one."""
    api_key: str = ""
    """What clients have to send as their API key; empty takes the environment's ARRIERO_API_KEY, and where that is
    empty too, asks for none."""
    allow_host: tuple[str, ...] = ()
    """Further names by which clients may address this server, besides localhost, numeric addresses and --host."""
    allow_origin: tuple[str, ...] = ()
    """Web pages of other origins that may use the server, such as https://example.org; none by default."""
    chat_template: PathText = ""
    """A template's name (chatml, llama2, llama3, llama3.1, or one of the model's own) or a .jinja file; empty takes the
    model's, and an adapter's own for the adapter."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and cache; bf16 is read twice as fast. Weights that are stored quantised are run as they are
    with bf16, and multiplied out with fp32."""
    quantize: Literal["", "int8", "int4"] = ""
    """Round the matrices on the fly, for fewer bytes read per token; `arriero quantize` does it once, and better."""
    activation_bits: ActivationBits = 15
    """Of what is multiplied by int8 and int4 matrices: 15 loses nothing; 8 answers many requests at a time, and reads
    prompts, about 1.4 times as fast, for a small loss (docs/inference.md)."""
    load: Literal["start", "asked"] = "start"
    """Whether models are loaded at the start, or when they are first asked."""
    idle_unload: float = 0.0
    """Seconds without a request after which a model leaves memory, to be loaded again when asked; 0: never."""
    context: int = 0
    """Most tokens of prompt and answer; 0 means the model's own."""
    cache_gb: float = 1.0
    """Most memory for keys and values of one model, in GiB."""
    speculate: int = 0
    """Most tokens that are proposed at once from the text so far; 0: none. Answers stay the same."""
    max_running: int = 64
    """Answers of one model that are computed at a time; others wait."""
    max_waiting: int = 256
    """Answers of one model that may wait; further requests are refused with 429."""
    max_tokens: int = 4096
    """Longest answer, in tokens: what a request may ask for, and what it gets where it does not say."""
    max_body_mb: float = 8.0
    """Largest body of a request, in MiB."""
    timeout: float = 600.0
    """Seconds after which a request is ended with 408, whatever it has."""
    drain: float = 30.0
    """Seconds that requests under way may take after SIGTERM."""

    def __post_init__(self) -> None:
        settle(self)
        check(0 <= self.port < 65536, f"port is {self.port}; it is a number from 0 (a free one) to 65535")
        for name in ("max_running", "max_tokens"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_waiting", "context", "idle_unload", "drain", "speculate"):
            check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("cache_gb", "max_body_mb", "timeout"):
            check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        for origin in self.allow_origin:
            check(
                origin.startswith(("http://", "https://")) and not origin.endswith("/"),
                f"allow_origin has {origin!r}; write a scheme and a host, as in https://example.org",
            )
        if self.model:
            _check_names([*self.models, *self.adapters])

    @property
    def key(self) -> str:
        """The API key that is asked for, or "" for none."""
        return self.api_key or os.environ.get(KEY, "")

    @property
    def models(self) -> dict[str, str]:
        """Names that are served, and the models behind them."""
        named: dict[str, str] = {}
        for given in self.model:
            name, _, source = given.partition("=") if "=" in given else ("", "", given)
            name = name or Path(source).name.removesuffix(".gguf") or source
            check(name not in named, f"two models would be served as {name!r}; name one: OTHER={source}")
            named[name] = expand(source)
        return named

    @property
    def adapters(self) -> dict[str, tuple[str, str]]:
        """Names of adapters, and for each the served name of its model, and its directory."""
        models, named = list(self.models), dict[str, tuple[str, str]]()
        for given in self.adapter:
            label, _, source = given.partition("=")
            name, _, model = label.partition("@")
            check(bool(name and source), f"adapter {given!r}: write NAME=DIR")
            if not model and len(models) > 1:
                raise ConfigError(f"adapter {given!r}: say of which model it is: {name}@{models[0]}={source}")
            model = model or models[0]
            check(
                model in models, f"adapter {given!r}: no model is served as {model!r}; there are: {', '.join(models)}"
            )
            check(name not in named, f"two adapters are named {name!r}; name one otherwise")
            named[name] = model, expand(source)
        return named


def _check_names(names: Iterable[str]) -> None:
    seen = set[str]()
    for name in names:
        check(name not in seen, f"{name!r} names both a model and an adapter; name one otherwise")
        check(
            name.isprintable() and 0 < len(name) <= 200, f"{name!r} cannot be a name; take up to 200 printable letters"
        )
        seen.add(name)


@dataclass(frozen=True)
class LoadConfig:
    """A load test of a server on this machine."""

    url: str = "http://127.0.0.1:8080"
    """Address of any server that speaks OpenAI's API, on loopback."""
    name: str = ""
    """Which of its models to ask; empty takes the first that it lists."""
    api_key: str = ""
    """The server's key; empty takes the environment's ARRIERO_API_KEY."""
    clients: tuple[int, ...] = (1, 4, 16)
    """Requests that are under way at a time, one load after the other."""
    requests: int = 3
    """Requests that each client makes, one after the other."""
    system: int = 110
    """Words of the system prompt that all requests share."""
    words: tuple[int, int] = (150, 300)
    """Fewest and most words of a request's own prompt, no two alike."""
    new_tokens: int = 128
    """Tokens of each answer."""
    seed: int = 0
    """Decides the prompts."""
    plot: PathText = ""
    """Where to write a plot of latency against load (.png, .svg, .pdf); empty writes none."""

    def __post_init__(self) -> None:
        settle(self)
        parts = urlsplit(self.url)
        check(
            parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1"),
            f"url is {self.url!r}; a load test is for a server on this machine: http://127.0.0.1:PORT",
        )
        check(bool(self.clients) and min(self.clients) >= 1, f"clients is {self.clients}; give numbers of at least 1")
        for name in ("requests", "new_tokens"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        low, high = self.words
        check(1 <= low <= high, f"words is {self.words}; give the fewest and the most words")
        check(
            not self.plot or self.plot.endswith((".png", ".svg", ".pdf")),
            f"plot is {self.plot}; its name must end in .png, .svg or .pdf",
        )
