"""What the server counts, for Prometheus.

Latencies are measured where an event reaches the event loop, so they contain the engine's queue and its steps, and
not the network. Price: 2.2 us of CPU time an event (docs/log.md, "The server").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from arriero.infer.engine import Engine
    from arriero.infer.request import Event, Request

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
BETWEEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Timed(Protocol):
    """Requests that were asked together, when, and when each answer was last heard of."""

    requests: Sequence[Request]
    asked: float
    times: dict[tuple[int, int], float]


class Metrics:
    """The registry of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"arriero_{name}_seconds", text, ["model"], buckets=tuple(buckets), registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"arriero_{name}", text, ["model", *labels], registry=self.registry)

        self.first = histogram("time_to_first_token", "From the engine's taking a request to its first token", FIRST)
        self.between = histogram("inter_token_latency", "From one token of an answer to the next", BETWEEN)
        self.step_time = histogram("step", "Steps of the engine", BETWEEN)
        self.prompt = counter("prompt_tokens", "Tokens of prompts")
        self.cached = counter("prefix_cache_hit_tokens", "Tokens of prompts that were cached")
        self.answered = counter("generation_tokens", "Tokens of answers")
        self.ended = counter("answers", "Answers by how they ended", "finish")
        self.refused = Counter(
            "arriero_http_errors", "Requests answered with an error", ["status"], registry=self.registry
        )
        self._engines: Callable[[], dict[str, Engine]] = dict
        self.registry.register(self)  # type: ignore[arg-type]

    def of(self, engines: Callable[[], dict[str, Engine]]) -> None:
        """Which engines there are now, by the model's name."""
        self._engines = engines

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The state of the engines."""
        gauges = {
            "requests_running": ("Answers that are computed", lambda engine: engine.running),
            "requests_waiting": ("Answers that wait", lambda engine: engine.waiting),
            "kv_cache_usage_ratio": ("Share of the cache that requests hold", lambda engine: engine.cache_usage),
            "preemptions": ("Answers that gave up their place", lambda engine: engine.preemptions),
        }
        for name, (text, value) in gauges.items():
            family = GaugeMetricFamily(f"arriero_{name}", text, labels=["model"])
            for model, engine in self._engines().items():
                family.add_metric([model], value(engine))
            yield family

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(self, model: str) -> Watch:
        """What counts the events of one model."""
        return Watch(self, model)


class Watch:
    """Counts the events of one model's engine."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._first, self._between = metrics.first.labels(model), metrics.between.labels(model)
        self._step, self._prompt = metrics.step_time.labels(model), metrics.prompt.labels(model)
        self._cached, self._answered = metrics.cached.labels(model), metrics.answered.labels(model)
        self._ended = {
            finish: metrics.ended.labels(model, finish) for finish in ("stop", "length", "cancelled", "error")
        }

    def step(self, seconds: float) -> None:
        """A step of the engine."""
        self._step.observe(seconds)

    def event(self, ticket: Timed, told: tuple[int, Event], now: float) -> None:
        """One event of a ticket."""
        which, event = told
        key = which, event.index
        before = ticket.times.get(key)
        if before is None:
            self._first.observe(now - ticket.asked)
            if event.index == 0:
                self._prompt.inc(len(ticket.requests[which].prompt))
                self._cached.inc(event.cached)
        else:
            self._between.observe(now - before)
        ticket.times[key] = now
        if event.token is not None:
            self._answered.inc()
        if event.finish is not None:
            self._ended[event.finish].inc()
