"""The models that a server has, by name: loaded when it starts or when they are asked, unloaded when idle.

One model is loaded at a time, on a thread. A request for a model that is not there yet starts its loading and is
refused with 503, so that no connection waits for minutes; official clients ask again by themselves.

An adapter is served under a name of its own, as a model is. It acts beside its model in the same engine and cache, and
conversations are rendered with the chat template that it was trained with.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arriero.errors import UserError, did_you_mean
from arriero.infer.config import SamplingConfig
from arriero.serve.config import ServeConfig
from arriero.serve.faults import ApiError
from arriero.serve.metrics import Metrics
from arriero.show.terminal import complain, notes
from arriero.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from arriero.infer.engine import Engine
    from arriero.infer.structured import Compiler, Grammar, Kind
    from arriero.model.llama import Llama
    from arriero.serve.driver import Driver

T = TypeVar("T")
Stamp = tuple[tuple[str, int, int], ...]
MIXED_TOKENS = 32
"""Of a step in which answers go on: with 16 answers a prompt that comes doubles the time between their tokens at most,
and prompts of some hundred tokens still keep up with as many answers (docs/log.md, "The server")."""
LOADING = 3  # seconds after which a client should ask again


@dataclass(eq=False)
class Loaded:
    """A model in memory.

    model: its matrices still in their files where the engine has its own copy (`whole` reads them). stamp: of those
    files when they were opened. driver: its engine. own: the sampling settings that its files name. work: threads for
    rendering and encoding prompts, which takes as long as a prompt is. adapters: the tokenizer of each, by name.
    """

    name: str
    source: Path
    model: Llama
    stamp: Stamp
    tokenizer: Tokenizer
    driver: Driver
    own: dict[str, Any]
    work: ThreadPoolExecutor
    forward: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "arriero-forward"))
    adapters: dict[str, Tokenizer] = field(default_factory=dict)
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    _compiler: Compiler | None = None
    _whole: bool = False

    @property
    def engine(self) -> Engine:
        """The engine that the driver runs."""
        return self.driver.engine

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """A function on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.work, function, *arguments)

    async def embed(self, function: Callable[..., T], *arguments: Any) -> T:
        """A function that runs the torch model, on the one thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self.forward, function, *arguments)

    def whole(self) -> Llama:
        """The torch model with all its weights in memory; for the thread of `embed`.

        Raises `ApiError` where its files have changed since: they are another model's now than the engine's.
        """
        from arriero.model.filed import hold

        if not self._whole:
            if stamp_of(self.source) != self.stamp:
                raise ApiError(
                    503, f"the files of {self.name!r} have changed since it was loaded; start the server again"
                )
            hold(self.model)
            self._whole = True
        return self.model

    async def grammar(self, kind: Kind, text: str | list[str]) -> Grammar:
        """A compiled grammar for this model's tokenizer."""
        if self._compiler is None:
            self._compiler = await self.run(self._new_compiler)
        return await asyncio.wrap_future(self._compiler.submit(kind, text))

    def _new_compiler(self) -> Compiler:
        from arriero.infer.structured import Compiler

        return self._compiler or Compiler(self.tokenizer)

    def close(self) -> None:
        """End its threads."""
        self.driver.stop()
        self.work.shutdown(cancel_futures=True)
        self.forward.shutdown(cancel_futures=True)
        if self._compiler is not None:
            self._compiler.close()


@dataclass(frozen=True)
class Use:
    """What one request uses: a model, one of its adapters or none, and the tokenizer that prompts are rendered by."""

    loaded: Loaded
    name: str
    adapter: str | None
    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer."""
        return self.loaded.engine.context


class Models:
    """All models of a server; its methods are for the event loop."""

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self.config, self._metrics = config, metrics
        self.sources = config.models
        self.adapters = config.adapters  # served name: model, directory
        self.created = int(time.time())
        self._loaded: dict[str, Loaded] = {}
        self._failed: dict[str, str] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._loader = ThreadPoolExecutor(1, "arriero-load")
        self._reaper: asyncio.Task[None] | None = None
        self.draining = False
        metrics.of(lambda: {name: loaded.engine for name, loaded in self._loaded.items()})

    @property
    def names(self) -> list[str]:
        """Of models and adapters."""
        return [*self.sources, *self.adapters]

    @property
    def ready(self) -> bool:
        """Whether everything is there that should be."""
        wanted = self.sources if self.config.load == "start" and not self.config.idle_unload else ()
        return not self.draining and not self._loading and all(name in self._loaded for name in wanted)

    @property
    def states(self) -> dict[str, str]:
        """What became of each model."""
        return {name: self._state(name) for name in self.sources}

    def _state(self, name: str) -> str:
        if name in self._loaded:
            return "ready"
        return (
            "loading" if name in self._loading else f"failed: {self._failed[name]}" if name in self._failed else "idle"
        )

    async def start(self) -> None:
        """Load what is to be loaded at the start, in the background."""
        if self.config.load == "start":
            for name in self.sources:
                self._begin(name)
        if self.config.idle_unload:
            self._reaper = asyncio.create_task(self._unload_idle())

    async def close(self) -> None:
        """Let go of everything."""
        if self._reaper is not None:
            self._reaper.cancel()
        for task in self._loading.values():
            task.cancel()
        self._loader.shutdown(wait=False, cancel_futures=True)
        for loaded in self._loaded.values():
            await asyncio.to_thread(loaded.close)

    @contextlib.asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Use]:
        """The model or adapter of that name, which stays loaded meanwhile. Raises `ApiError` where it is not there."""
        loaded, adapter = self._find(name)
        loaded.users += 1
        try:
            yield Use(loaded, name, adapter, loaded.adapters[adapter] if adapter else loaded.tokenizer)
        finally:
            loaded.users -= 1
            loaded.used = time.monotonic()

    def model_of(self, name: str) -> tuple[str, str | None]:
        """The served names of the model and the adapter that a name stands for. Raises `ApiError` for an unknown
        one."""
        name = name.removesuffix(":latest") if name not in self.names else name  # Ollama's clients add it
        if name in self.sources:
            return name, None
        if name in self.adapters:
            return self.adapters[name][0], name
        near = did_you_mean(name, self.names)
        raise ApiError(
            404,
            f"no model {name[:200]!r} is served here; there are: {', '.join(self.names)}{near}",
            param="model",
            code="model_not_found",
        )

    def _find(self, name: str) -> tuple[Loaded, str | None]:
        model, adapter = self.model_of(name)
        if model not in self._loaded:
            if self.draining:
                raise ApiError(503, "the server is stopping", retry_after=LOADING)
            if model in self._failed:
                raise ApiError(500, f"the model {model!r} cannot be loaded: {self._failed[model]}", param="model")
            self._begin(model)
            raise ApiError(503, f"the model {model!r} is being loaded; ask again", retry_after=LOADING, param="model")
        loaded = self._loaded[model]
        if adapter is not None and adapter not in loaded.adapters:
            raise ApiError(
                503, f"the adapter {adapter!r} is being loaded; ask again", retry_after=LOADING, param="model"
            )
        return loaded, adapter

    # -- loading -----------------------------------------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        if name not in self._loading:
            self._loading[name] = asyncio.create_task(self._load(name))

    async def _load(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        try:
            adapters = {own: source for own, (model, source) in self.adapters.items() if model == name}
            watch = self._metrics.watch(name)
            arguments = self.config, name, self.sources[name], adapters, loop, watch
            self._loaded[name] = await loop.run_in_executor(self._loader, _open, *arguments)
            notes().print(f"{name} is ready ({time.perf_counter() - began:.1f} s)", highlight=False, markup=False)
        except UserError as error:
            self._failed[name] = str(error)
            complain(f"arriero: {name}: {error}")
        except Exception as error:  # a fault of ours, or no memory left: this model fails, the others go on
            self._failed[name] = f"{type(error).__name__}: {error}"
            complain(f"arriero: {name}: {''.join(traceback.format_exception(error))}")
        finally:
            del self._loading[name]

    async def load_adapter(self, name: str, model: str, source: str) -> None:
        """Serve one more adapter, or another under the same name. Raises `UserError` where it cannot be used."""
        if name in self.sources:
            raise ApiError(400, f"{name!r} is the name of a model; give the adapter another", param="lora_name")
        async with self.use(model) as use:
            loaded = use.loaded
            tokenizer = await loaded.run(_tokenizer_of, loaded, source, self.config.chat_template)
            await loaded.driver.call(lambda engine: engine.load_adapter(name, source))
            loaded.adapters[name] = tokenizer
            self.adapters[name] = loaded.name, source

    async def unload_adapter(self, name: str) -> None:
        """Serve it no more; requests under way end with it."""
        if name not in self.adapters:
            raise ApiError(404, f"no adapter {name[:200]!r} is loaded", param="lora_name")
        model, _ = self.adapters.pop(name)
        if (loaded := self._loaded.get(model)) is not None and loaded.adapters.pop(name, None) is not None:
            await loaded.driver.call(lambda engine: engine.unload_adapter(name))

    async def _unload_idle(self) -> None:
        limit = self.config.idle_unload
        while True:
            await asyncio.sleep(min(limit / 4, 5))
            for name, loaded in list(self._loaded.items()):
                if not loaded.users and time.monotonic() - loaded.used > limit:
                    gc.unfreeze()
                    del self._loaded[name]
                    await asyncio.to_thread(loaded.close)
                    del loaded
                    gc.collect()
                    notes().print(f"{name} is unloaded: idle", highlight=False, markup=False)


def stamp_of(path: Path) -> Stamp:
    """What changes when the file, or one in the directory, is written again: names, sizes, times."""
    files = [path] if path.is_file() else sorted(each for each in path.glob("*") if each.is_file())
    status = [(file.name, file.stat()) for file in files]
    return tuple((name, found.st_size, found.st_mtime_ns) for name, found in status)


def _open(config: ServeConfig, name: str, source: str, adapters: dict[str, str], loop: Any, watch: Any) -> Loaded:
    """Load a model and its adapters, and start its engine."""
    import torch

    from arriero.checkpoint.beside import read_beside, sampling_of
    from arriero.checkpoint.load import best_device, load
    from arriero.checkpoint.source import resolve
    from arriero.infer.engine import Engine
    from arriero.serve.driver import Driver

    path = resolve(source)
    own = sampling_of(read_beside(path, warn=False).generation)
    SamplingConfig(**own)  # refuse settings out of range now
    dtype, stamp = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision], stamp_of(path)
    model, tokenizer = load(
        path,
        dtype=dtype,
        device=best_device(),
        chat_template=config.chat_template,
        quantize=config.quantize,
        filed=best_device() == "cpu",
    )
    engine = Engine(
        model,
        tokenizer,
        cache_bytes=int(config.cache_gb * 2**30),
        max_running=config.max_running,
        step_tokens=max(256, config.max_running),
        mixed_tokens=MIXED_TOKENS,
        context=min(config.context or model.config.max_context, model.config.max_context),
        speculate=config.speculate,
        activation_bits=config.activation_bits,
    )
    work = ThreadPoolExecutor(2, f"arriero-prompts-{name}")
    loaded = Loaded(name, path, model, stamp, tokenizer, Driver(engine, name, loop, watch), own, work)
    for adapter, directory in adapters.items():
        loaded.adapters[adapter] = _tokenizer_of(loaded, directory, config.chat_template)
        engine.load_adapter(adapter, directory)
    gc.freeze()  # what is there now stays: collections that walk through it would hold up a step by 0.3 s
    return loaded


def _tokenizer_of(loaded: Loaded, adapter: str, chat_template: str) -> Tokenizer:
    """The tokenizer that prompts for an adapter are rendered by: with the template that it was trained with."""
    from arriero.checkpoint.load import load_tokenizer_at

    tokenizer = load_tokenizer_at(loaded.source, adapter=adapter, chat_template=chat_template)
    if not (tokenizer.holds(loaded.tokenizer) and loaded.tokenizer.holds(tokenizer)):
        raise UserError(
            f"{adapter}: the tokenizer beside the adapter gives other ids than that of {loaded.source}; serve "
            "the model with the adapter merged: arriero merge"
        )
    return tokenizer
