"""The scheduler and the pool without a model: a dictionary plays the KV cache."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import attnkit
from attnkit.integrations.engine.pages import PagePool
from attnkit.integrations.engine.request import Request, State
from attnkit.integrations.engine.sampling_params import SamplingParams
from attnkit.integrations.engine.scheduler import Scheduler

STOP = 9


def make_request(name: str, prompt: list[int], max_tokens: int, longest: int = 10**6) -> Request:
    limit = min(len(prompt) + max_tokens, longest)
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens), limit, stops=frozenset([STOP]))


class Machine(RuleBasedStateMachine):
    """Random requests, steps, failures and cancels, checked against a cache that remembers what was written.

    A slot holds the whole text up to its token, as a real slot's KV depends on all of it: a page shared,
    reused or recomputed wrongly shows as another text.
    """

    prefix_cache = False

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(num_pages=6, page_size=4, prefix_cache=self.prefix_cache)
        self.scheduler = Scheduler(self.pool, max_batch=3, max_tokens=7)
        self.requests: list[Request] = []
        self.endings: dict[str, int] = {}
        self.cache: dict[int, tuple[int, ...]] = {}
        self.step = None

    @rule(
        prefix=st.sampled_from([[], [1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 2]]),
        tail=st.sampled_from([[2] * 4, [3]]) | st.lists(st.integers(0, 3), min_size=1, max_size=9),
        max_tokens=st.integers(1, 12),
    )
    def add(self, prefix, tail, max_tokens):
        longest = self.pool.num_pages * self.pool.page_size
        request = make_request(str(len(self.requests)), prefix + tail, max_tokens, longest)
        self.requests.append(request)
        self.scheduler.add(request)

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 10**6))
    def cancel(self, pick):
        """Any request, ended ones too; also while a step is in flight, which must keep its pages."""
        free = self.pool.available
        self.scheduler.cancel(self.requests[pick % len(self.requests)])
        assert self.pool.available == free

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule(self):
        step = self.scheduler.schedule()
        work = [(r, 1) for r in step.decode] + step.prefill
        assert bool(work) == bool(self.scheduler.running)
        assert len({id(r) for r, _ in work}) == len(work)
        assert sum(count for _, count in work) <= self.scheduler.max_tokens
        for request, count in work:
            assert request.state is State.RUNNING and count >= 1
            self.check_text(request, request.computed)
            for at in range(request.computed, request.computed + count):
                page = request.pages[at // 4]
                assert self.pool._refs[page] == 1, "a page that others read is written to"
                self.cache[page * 4 + at % 4] = tuple(request.known(0, at + 1))
            self.check_text(request, request.computed + count)
        if work:
            self.step = step

    def check_text(self, request, computed):
        for at in range(computed):
            slot = request.pages[at // 4] * 4 + at % 4
            assert self.cache.get(slot) == tuple(request.known(0, at + 1))

    @precondition(lambda self: self.step is not None)
    @rule(drawn=st.lists(st.sampled_from([0, 1, 2, 3, STOP, None]), min_size=3, max_size=3))
    def commit(self, drawn):
        before = {r.id: len(r.output) for r in self.step.sampled}
        cancelled = {r.id for r in self.step.sampled if r.cancelled}
        sampled = self.step.sampled
        self.scheduler.commit(self.step, drawn[: len(sampled)])
        for request, token in zip(sampled, drawn):
            grown = len(request.output) - before[request.id]
            assert grown == (0 if token is None or request.id in cancelled else 1)
        self.step = None

    @invariant()
    def books_balance(self):
        held: dict[int, int] = {}
        for request in self.requests:
            if request.state is not State.RUNNING:
                assert request.pages == []
            for page in request.pages:
                held[page] = held.get(page, 0) + 1
        assert self.pool._refs == [held.get(page, 0) for page in range(self.pool.num_pages)]
        assert self.pool.available == self.pool.num_pages - len(held)
        assert len(self.scheduler.running) <= self.scheduler.max_batch
        arrivals = [r.arrival for r in self.scheduler.running]
        assert arrivals == sorted(arrivals)

    @invariant()
    def endings_are_told_once(self):
        for request in self.scheduler.ended:
            self.endings[request.id] = self.endings.get(request.id, 0) + 1
            assert request.reason in ("stop", "length", "cancel", "error")
            assert request.length <= request.limit
        self.scheduler.ended.clear()
        assert all(count == 1 for count in self.endings.values())
        assert set(self.endings) == {r.id for r in self.requests if r.state is State.ENDED}

    def teardown(self):
        """Whatever happened, what is left runs to its end, and every page comes back."""
        if self.step is not None:
            self.commit([0, 0, 0])
        for _ in range(2000):
            if not self.scheduler.busy and not self.scheduler._cancelled:
                break
            self.schedule()
            if self.step is not None:
                self.commit([0, 0, 0])
            self.endings_are_told_once()
        assert not self.scheduler.busy, "the scheduler is stuck"
        self.endings_are_told_once()
        assert len(self.endings) == len(self.requests)
        assert self.pool.available == self.pool.num_pages


class MachineWithPrefixCache(Machine):
    prefix_cache = True


TestScheduler = Machine.TestCase
TestSchedulerWithPrefixCache = MachineWithPrefixCache.TestCase
TestScheduler.settings = TestSchedulerWithPrefixCache.settings = hypothesis_settings(
    max_examples=150, stateful_step_count=40, deadline=None
)


def drain(scheduler: Scheduler, token: int = 1, steps: int = 1000) -> None:
    while scheduler.busy and steps:
        step = scheduler.schedule()
        scheduler.commit(step, [token] * len(step.sampled))
        steps -= 1
    assert not scheduler.busy


def until_preempted(scheduler: Scheduler, request: Request) -> None:
    for _ in range(100):
        step = scheduler.schedule()
        scheduler.commit(step, [1] * len(step.sampled))
        if request.preemptions:
            return
    raise AssertionError("it was never preempted")


def test_prompts_are_cut_into_chunks_and_decoding_goes_first():
    scheduler = Scheduler(PagePool(64, 4), max_batch=4, max_tokens=8)
    first, second = make_request("a", [1] * 5, 20), make_request("b", [1] * 20, 20)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert step.prefill == [(first, 5), (second, 3)] and step.sampled == [first]
    scheduler.commit(step, [1])
    step = scheduler.schedule()
    assert step.decode == [first] and step.prefill == [(second, 7)]
    scheduler.commit(step, [1])
    scheduler.commit(scheduler.schedule(), [1])
    step = scheduler.schedule()
    assert step.prefill == [(second, 3)] and step.sampled == [first, second]


def test_the_newest_is_preempted_and_comes_back_first():
    scheduler = Scheduler(PagePool(6, 4), max_batch=4, max_tokens=64)
    old, new = make_request("old", [1] * 7, 12), make_request("new", [1] * 7, 12)
    late = make_request("late", [1] * 2, 2)
    for request in (old, new, late):
        scheduler.add(request)
    until_preempted(scheduler, new)
    assert old.preemptions == 0 and old.state is State.RUNNING and new.pages == []
    assert scheduler.waiting[0] is new
    drain(scheduler)
    assert [r.reason for r in (old, new, late)] == ["length"] * 3
    assert [len(r.output) for r in (old, new, late)] == [12, 12, 2]
    assert scheduler.pool.available == 6


def test_fault_23_preempted_and_cancelled_with_a_step_in_flight():
    """CASES.md 23: counters must not underflow when a request leaves twice."""
    scheduler = Scheduler(PagePool(4, 4), max_batch=2, max_tokens=64)
    a, b = make_request("a", [1] * 3, 12), make_request("b", [1] * 3, 12)
    scheduler.add(a)
    scheduler.add(b)
    until_preempted(scheduler, b)
    scheduler.cancel(b)
    scheduler.cancel(b)
    step = scheduler.schedule()
    scheduler.cancel(a)
    scheduler.commit(step, [1] * len(step.sampled))
    scheduler.schedule()
    assert [r.reason for r in (a, b)] == ["cancel", "cancel"]
    assert scheduler.ended == [b, a]
    assert scheduler.pool.available == 4 and not scheduler.busy


def test_fault_21_pages_of_a_step_in_flight_are_not_given_out():
    """CASES.md 21: a cancelled request's pages stay its own until the step that reads them is over."""
    scheduler = Scheduler(PagePool(4, 4), max_batch=2, max_tokens=64)
    a = make_request("a", [1] * 15, 1)
    scheduler.add(a)
    step = scheduler.schedule()
    pages = list(a.pages)
    scheduler.cancel(a)
    assert a.pages == pages and scheduler.pool.available == 0
    scheduler.commit(step, [1])
    assert a.output == []
    scheduler.schedule()
    assert scheduler.pool.available == 4


def test_a_shared_prefix_is_computed_once():
    scheduler = Scheduler(PagePool(32, 4, prefix_cache=True), max_batch=2, max_tokens=64)
    a, b = make_request("a", [1] * 10, 2), make_request("b", [1] * 11, 2)
    scheduler.add(a)
    drain(scheduler)
    scheduler.add(b)
    step = scheduler.schedule()
    assert step.prefill == [(b, 3)] and b.cached_tokens == 8
    drain(scheduler)
    assert scheduler.pool.available == 32


def test_budget_below_the_batch_is_refused():
    with pytest.raises(ValueError, match="max_tokens is 3, wanted at least max_batch = 4"):
        Scheduler(PagePool(4, 4), max_batch=4, max_tokens=3)


def test_scheduler_pool_and_request_never_import_torch():
    folder = Path(attnkit.integrations.engine.__file__).parent
    for name in ("scheduler", "pages", "request", "sampling_params"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not any(m.split(".")[0] in ("torch", "numpy") for m in imported), name
