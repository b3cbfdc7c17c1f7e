"""One HTTP request as it runs: its sequences in the engine, their deltas in one stream, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request

from serve.api_errors import ApiError
from serve.api_metrics import Metrics, SequenceClock
from serve.engines.base import Delta, Engine, SamplingParams, Ticket

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Job:
    """What a request asks of the engine: ``n`` choices for each prompt, prompt by prompt."""

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    n: int = 1

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def choices(self) -> list[tuple[Sequence[int], SamplingParams]]:
        """The sequences in the order of their ``index``. The choices of a seeded prompt have the seeds
        seed, seed + 1, ...; the first is the one that a request with n = 1 gets."""
        seed = self.params.seed
        return [
            (prompt, self.params if seed is None else replace(self.params, seed=(seed + i) % 2**63))
            for prompt in self.prompts
            for i in range(self.n)
        ]


class Generation:
    """Submits a job at once and yields what comes of it. `cancel` has to be called in the end, always."""

    def __init__(self, engine: Engine, metrics: Metrics, job: Job) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._clocks: list[SequenceClock] = []
        self.prompt_tokens = job.prompt_tokens
        self.generated_tokens = 0
        try:
            for index, (prompt, params) in enumerate(job.choices()):
                self._clocks.append(SequenceClock(metrics, len(prompt)))
                self._tickets.append(engine.submit(prompt, params, self._sink(index)))
        except Exception:
            self.cancel()
            raise

    def _sink(self, index: int):
        def sink(delta: Delta) -> None:
            # A closed loop means that the server is gone, and with it everyone who could be told.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deltas.put_nowait, (index, delta))

        return sink

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """(index of the choice, what it gained), until all have ended. Raises `ApiError` if one fails."""
        open_choices = len(self._tickets)
        while open_choices:
            index, delta = await self._deltas.get()
            self._clocks[index].observe(delta)
            self.generated_tokens += delta.new_tokens
            if delta.error is not None:
                dead = self._engine.failure is not None
                raise ApiError(503 if dead else 500, delta.error, code="engine_dead" if dead else None)
            open_choices -= delta.last
            yield index, delta

    def cancel(self) -> None:
        """Stops what still runs."""
        for ticket in self._tickets:
            self._engine.cancel(ticket)
        for clock in self._clocks:
            clock.abandon()

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
        }


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Awaits ``work``, but gives up with `ClientGoneError` when the client hangs up first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for left in (task, watch):
            left.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
