"""Who computes what in the next step: continuous batching with chunked prefill and preemption. Pure Python.

Every step first gives each decoding request its one token, oldest first; what is left of the token budget
goes to prompts, in chunks. Where the pool is full the newest request gives its pages back and is computed
again later (recomputation, as in vLLM; Kwon et al. 2023). The oldest is never preempted, and no request may be
longer than the pool, so each one ends.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .pages import PagePool
from .request import Request, State


@dataclass(slots=True, eq=False)
class Schedule:
    """
    decode   requests that compute exactly their newest token
    prefill  (request, count): tokens computed .. computed + count - 1 of a prompt, or of what a preemption lost
    """

    decode: list[Request] = field(default_factory=list)
    prefill: list[tuple[Request, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    @property
    def sampled(self) -> list[Request]:
        """Those that draw a token at the end of the step: whoever has all known tokens computed by then."""
        return self.decode + [r for r, count in self.prefill if r.computed + count == r.length]


class Scheduler:
    """
    pool        the page pool
    max_batch   requests that run at the same time
    max_tokens  tokens computed in one step
    ended       requests that ended since somebody emptied this list; each appears once

    ``add`` and ``cancel`` may be called from any thread, the rest from one.
    """

    def __init__(self, pool: PagePool, max_batch: int, max_tokens: int) -> None:
        if max_batch < 1 or max_tokens < max_batch:
            raise ValueError(f"Scheduler: max_tokens is {max_tokens}, wanted at least max_batch = {max_batch} >= 1")
        self.pool, self.max_batch, self.max_tokens = pool, max_batch, max_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # by arrival
        self.ended: list[Request] = []
        self._arrivals = 0
        self._cancelled: deque[Request] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        self._arrivals += 1
        request.arrival = self._arrivals
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End it between two steps: a step in flight still writes to its pages."""
        request.cancelled = True
        self._cancelled.append(request)

    def schedule(self) -> Schedule:
        """The next step. Empty only when nothing is left to do."""
        while self._cancelled:
            self.end(self._cancelled.popleft(), "cancel")
        step = Schedule()
        preempted = self._schedule_decode(step)
        budget = self.max_tokens - len(step.decode)
        for request in self.running:
            missing = request.length - request.computed
            if budget and missing and not _decodes(request):
                step.prefill.append((request, min(missing, budget)))
                budget -= step.prefill[-1][1]
        while budget and not preempted and self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            if not self._admit(request):
                break
            count = min(request.length - request.computed, budget)
            step.prefill.append((request, count))
            budget -= count
        return step

    def _schedule_decode(self, step: Schedule) -> bool:
        """Fills step.decode, oldest first; True where somebody was preempted for it."""
        preempted = False
        for request in self.running[:]:
            if request.state is not State.RUNNING or not _decodes(request):
                continue
            while len(request.pages) < self.pool.pages_for(request.length):
                if self.pool.available:
                    request.pages += self.pool.take(1)
                    continue
                preempted = True
                victim = self.running[-1]  # as new as this one or newer, so not scheduled yet
                self._preempt(victim)
                if victim is request:
                    break
            else:
                step.decode.append(request)
        return preempted

    def _admit(self, request: Request) -> bool:
        """Pages for all its tokens at once, if that leaves a page of growth to each running request."""
        known = request.known(0, request.length) if self.pool.prefix_cache else []
        pages, entries = self.pool.find(known)
        need = self.pool.pages_for(request.length) - len(pages)
        if need + len(self.running) > self.pool.available:
            self.pool.release(pages)
            return False
        self.waiting.popleft()
        request.pages, request.entries = pages + self.pool.take(need), entries
        request.computed = len(pages) * self.pool.page_size
        if not request.preemptions:
            request.cached_tokens = request.computed
        request.state = State.RUNNING
        insort(self.running, request, key=lambda r: r.arrival)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_back(request)
        request.state = State.WAITING
        request.preemptions += 1
        self.waiting.appendleft(request)  # victims come newest first, so the queue stays in order

    def _give_back(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.entries, request.computed = [], [], 0

    def commit(self, step: Schedule, tokens: Sequence[int | None]) -> None:
        """Book a step that has run: ``tokens`` are those of ``step.sampled`` in order, None where drawing failed."""
        sampled = step.sampled
        for request, count in [(r, 1) for r in step.decode] + step.prefill:
            request.computed += count
            if self.pool.prefix_cache and request.computed // self.pool.page_size > len(request.entries):
                known = request.known(0, request.computed)
                self.pool.remember(request.pages, request.entries, known, request.computed)
        for request, token in zip(sampled, tokens, strict=True):
            if request.cancelled:
                continue
            if token is None:
                request.error = "its logits are not numbers (NaN), or no token is allowed"
                self.end(request, "error")
                continue
            request.output.append(token)
            if token in request.stops and len(request.output) >= request.params.min_tokens:
                request.stopped_by = token
                self.end(request, "stop")
            elif request.length >= request.limit:
                self.end(request, "length")

    def end(self, request: Request, reason: str) -> bool:
        """End a request and take its pages back. False, and nothing happens, if it had ended before."""
        if request.state is State.ENDED:
            return False
        (self.running if request.state is State.RUNNING else self.waiting).remove(request)
        self._give_back(request)
        request.state, request.reason = State.ENDED, reason
        self.ended.append(request)
        return True


def _decodes(request: Request) -> bool:
    """Whether exactly its newest token, a generated one, is still to be computed."""
    return bool(request.output) and request.length - request.computed == 1
