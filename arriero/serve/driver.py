"""An engine on a thread of its own, asked from an event loop.

Requests, cancellations and changes of adapters go to the thread through a queue, and are taken between two steps;
events come back through one callback on the loop a step. So HTTP never waits for a step, and no step waits for HTTP:
what the thread does for a request that is asked or left is a queue's get.

A step that raises is tried once more, since the engine loses nothing by it. One that raises again is the fault of some
request: the youngest is ended, again and again, until steps succeed, so that the older ones go on.

Price: one callback on the loop a step, and a put into a queue for each event.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from arriero.errors import UserError
from arriero.infer.engine import Engine
from arriero.infer.request import Event, Request
from arriero.serve.metrics import Watch
from arriero.show.terminal import complain

T = TypeVar("T")
Told = tuple[int, Event]


class Ticket:
    """Requests that are asked together, and what happens to them; leaving it, by whatever way, ends them.

    async with driver.ask(requests) as ticket:  # raises UserError where the engine refuses one
        async for which, event in ticket.events(): ...
    """

    def __init__(self, driver: Driver, requests: Sequence[Request]) -> None:
        self._driver, self.requests = driver, requests
        self.left = False
        self.numbers: dict[int, int] = {}  # the engine's number of each, and which of `requests` it is
        self.unfinished = sum(request.n for request in requests)
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Told | Exception] = asyncio.Queue()
        self._taken: asyncio.Future[None] = self._loop.create_future()
        self.asked, self.times = time.perf_counter(), dict[tuple[int, int], float]()  # the last event of each answer

    async def __aenter__(self) -> Self:
        self._driver.put(lambda: self._driver.take(self))
        try:
            await self._taken
        except BaseException:
            self._driver.leave(self)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driver.leave(self)

    async def events(self) -> AsyncIterator[Told]:
        """Which request, and what happened to it, until all answers have ended."""
        while self.unfinished:
            told = await self._told.get()
            if isinstance(told, Exception):
                raise told
            self.unfinished -= told[1].finish is not None
            yield told

    # On the loop, for the driver.

    def accept(self, error: Exception | None) -> None:
        """The engine has taken all requests, or refuses."""
        if self._taken.done():
            return
        if error is None:
            self._taken.set_result(None)
        else:
            self._taken.set_exception(error)

    def tell(self, told: Told | Exception) -> None:
        """Something happened."""
        self._told.put_nowait(told)


class Driver:
    """The thread of one engine."""

    def __init__(self, engine: Engine, name: str, loop: asyncio.AbstractEventLoop, watch: Watch) -> None:
        self.engine, self.name, self.watch = engine, name, watch
        self.load = 0  # answers under way or waiting; counted on the loop
        self._loop = loop
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the engine's number of a request; the thread's own
        self._stopped = False
        self._failed = 0  # steps in a row
        self._thread = threading.Thread(target=self._run, name=f"arriero-engine-{name}", daemon=True)
        self._thread.start()

    # -- on the loop -------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def ask(self, requests: Sequence[Request]) -> AsyncIterator[Ticket]:
        """Answer requests together, see `Ticket`. Raises `UserError` where the engine refuses one of them."""
        n = sum(request.n for request in requests)
        self.load += n
        try:
            async with Ticket(self, requests) as ticket:
                yield ticket
        finally:
            self.load -= n

    def put(self, command: Callable[[], None]) -> None:
        """Let the thread do something between two steps."""
        self._inbox.put(command)

    def leave(self, ticket: Ticket) -> None:
        """Nobody wants to hear any more of a ticket."""
        ticket.left = True
        self.put(lambda: self._cancel(ticket))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """What a function of the engine gives, between two steps; raises what it raises."""
        given: Future[T] = Future()

        def run() -> None:
            try:
                given.set_result(function(self.engine))
            except BaseException as error:
                given.set_exception(error)

        self.put(run)
        return await asyncio.wrap_future(given)

    def stop(self) -> None:
        """End the thread after the step under way, and wait for it; requests that are left end with an error."""
        self.put(self._stop)
        self._thread.join()

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        self._stopped = True

    def _run(self) -> None:
        while not self._stopped:
            if self._tickets or self.engine.busy:
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._inbox.get_nowait()()
                if not self._stopped:
                    self._step()
            else:
                self._inbox.get()()
        for ticket in {id(t): t for t in self._tickets.values()}.values():
            self._say(ticket.tell, RuntimeError("the server is stopping"))

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            events = self.engine.step()
            self._failed = 0
        except BaseException as error:  # a library's panic too: the thread has to go on
            self._failed += 1
            complain("".join(traceback.format_exception(error)))
            if self._failed > 1:
                self._end_youngest()
            return
        told = []
        for event in events:
            ticket = self._tickets.get(event.request)
            if ticket is not None and not ticket.left:
                told.append((ticket, (ticket.numbers[event.request], event)))
        if told:
            self._say(self._deliver, told, time.perf_counter() - began)

    def _end_youngest(self) -> None:
        """End the request that came last, which is the likeliest cause of what did not happen before."""
        if not self._tickets:
            return
        ticket = self._tickets[max(self._tickets)]
        self._cancel(ticket)
        self._say(ticket.tell, RuntimeError("a step of the engine failed"))

    def take(self, ticket: Ticket) -> None:
        """Give the engine the requests of a ticket."""
        if ticket.left:
            return
        error: Exception | None = None
        try:
            for which, request in enumerate(ticket.requests):
                number = self.engine.submit(request)
                ticket.numbers[number] = which
                self._tickets[number] = ticket
        except BaseException as failure:
            error = failure if isinstance(failure, Exception) else RuntimeError(str(failure))
            self._cancel(ticket)
            if not isinstance(error, UserError):
                complain("".join(traceback.format_exception(error)))
        self._say(ticket.accept, error)

    def _cancel(self, ticket: Ticket) -> None:
        for number in ticket.numbers:
            if self._tickets.pop(number, None) is not None:
                self.engine.cancel(number)

    def _say(self, tell: Callable[..., Any], *what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(tell, *what)

    # -- on the loop again -------------------------------------------------------------------------------------------

    def _deliver(self, told: list[tuple[Ticket, Told]], seconds: float) -> None:
        now = time.perf_counter()
        self.watch.step(seconds)
        for ticket, what in told:
            if not ticket.left:
                self.watch.event(ticket, what, now)
                ticket.tell(what)
