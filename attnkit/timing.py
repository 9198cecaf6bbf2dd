"""How long a launch takes when its data comes from memory: median and spread over rotated buffers.

A call repeated on one set of buffers measures the cache. So every measurement is given several calls that
do the same on buffers of their own, together at least three times the last shared cache, and goes round. Two
sets at the least: of one, however large, a launch would find in the cache what the launch before read last.

CUDA: one graph holds many launches, so no host cost is in the number; device events time each replay.
CPU: a round runs each contender once, in turn, so that drift of a shared machine hits all alike; the
ratio of two contenders is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnkit.arch import Arch

Call = Callable[[], Any]

#: Launches in one graph: enough that its own start (about 10 us) is a small part of the replay.
GRAPH_US = 400.0
MAX_LAUNCHES = 256


@dataclass(frozen=True, slots=True)
class Timing:
    """
    us        median time of one launch, microseconds
    spread    half the distance from the 10th to the 90th percentile, microseconds
    best      the shortest of all
    samples   how many times were taken
    launches  launches in each sample
    how       "graph", "events" (a call that cannot be captured: host cost included) or "clock" (CPU)
    """

    us: float
    spread: float
    best: float
    samples: int
    launches: int
    how: str


def copies(nbytes: int, arch: Arch, free: int | None = None, least: int = 2) -> int:
    """Sets of buffers of ``nbytes`` that together are three times the last shared cache (``least`` to 256).

    ``free`` bounds them to a quarter of the memory that is left, or to one.
    """
    wanted = max(least, -(-3 * max(arch.l2, 1) // max(nbytes, 1)))
    if free is not None:
        wanted = min(wanted, free // 4 // max(nbytes, 1))
    return max(1, min(256, wanted))


def _timing(samples_us: list[float], launches: int, how: str) -> Timing:
    us = statistics.median(samples_us)
    if not us > 0:
        raise RuntimeError(f"timing: the clock says {us} us for a launch: nothing ran")
    if len(samples_us) < 3:
        spread = (max(samples_us) - min(samples_us)) / 2
    else:
        tenths = statistics.quantiles(samples_us, n=10, method="inclusive")
        spread = (tenths[-1] - tenths[0]) / 2
    return Timing(us, spread, min(samples_us), len(samples_us), launches, how)


class NotCapturable(RuntimeError):
    """A call synchronises, or does what else a CUDA graph cannot hold."""


class Replay:
    """A CUDA graph of many launches over rotated buffers.

    The first call of each runs outside the graph, so that whatever compiles or allocates does so there.
    Raises what the calls raise, and NotCapturable where the capture fails.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device, launches: int | None = None) -> None:
        self.device = device
        self.calls = tuple(calls)  # what they hold must live as long as the graph, which knows addresses only
        self.stream = torch.cuda.Stream(device)
        torch.cuda.synchronize(device)  # the inputs may still be on their way on another stream
        with torch.cuda.device(device), torch.cuda.stream(self.stream):
            for call in calls:
                call()
            self.stream.synchronize()
            if launches is None:
                launches = self._launches(calls)
            self.launches = launches
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    for i in range(launches):
                        calls[i % len(calls)]()
            except RuntimeError as error:
                _after_failed_capture(device)
                raise NotCapturable(f"timing: {str(error).splitlines()[0]}") from error
        self.replay()
        torch.cuda.synchronize(device)

    def _launches(self, calls: Sequence[Call]) -> int:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(self.stream)
        for call in calls[:8]:
            call()
        stop.record(self.stream)
        stop.synchronize()
        each = max(start.elapsed_time(stop) * 1e3 / len(calls[:8]), 1.0)
        rounds = max(1, min(MAX_LAUNCHES, round(GRAPH_US / each)) // len(calls))
        return min(MAX_LAUNCHES, max(len(calls), rounds * len(calls)))

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def run(self) -> None:
        """One replay, waited for: what pytest-benchmark goes round."""
        self.replay()
        self.stream.synchronize()

    def time(self, budget: float = 0.06, least: int = 5) -> Timing:
        """Time replays for about ``budget`` seconds, at least ``least`` of them."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record(self.stream)
            self.graph.replay()
            marks[1].record(self.stream)
            marks[1].synchronize()
            each = max(marks[0].elapsed_time(marks[1]) * 1e-3, 1e-5)
            rounds = max(least, min(200, round(budget / each)))
            pairs = []
            for _ in range(rounds):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(self.stream)
                self.graph.replay()
                stop.record(self.stream)
                pairs.append((start, stop))
            self.stream.synchronize()
        return _timing([a.elapsed_time(b) * 1e3 / self.launches for a, b in pairs], self.launches, "graph")

    def close(self) -> None:
        """Give the graph's memory back, and the calls'."""
        self.graph.reset()
        self.calls = ()


def _after_failed_capture(device: torch.device) -> None:
    """torch leaves its random generator in capture mode: give it a state of its own again."""
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(device).graphsafe_get_state())


def events(calls: Sequence[Call], device: torch.device, budget: float = 0.06) -> Timing:
    """Time calls that a graph cannot hold: events around each round of calls, host gaps included."""
    with torch.cuda.device(device):
        for call in calls:
            call()
        torch.cuda.synchronize(device)
        samples: list[float] = []
        deadline = time.perf_counter() + budget
        while len(samples) < 5 or (time.perf_counter() < deadline and len(samples) < 200):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for call in calls:
                call()
            stop.record()
            stop.synchronize()
            samples.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return _timing(samples, len(calls), "events")


@dataclass(frozen=True, slots=True)
class Paired:
    """Contenders timed in turn: each one's Timing, and each one's time over the first's, round by round."""

    timings: dict[str, Timing]
    ratios: dict[str, float]

    @staticmethod
    def of(samples_us: Mapping[str, list[float]], launches: Mapping[str, int], how: str) -> Paired:
        timings = {name: _timing(taken, launches[name], how) for name, taken in samples_us.items()}
        first = next(iter(samples_us.values()))
        paired_us = {name: zip(first, taken, strict=True) for name, taken in samples_us.items()}
        return Paired(timings, {name: statistics.median(b / a for a, b in pairs) for name, pairs in paired_us.items()})


def order(names: Sequence[str], turn: int) -> list[str]:
    """Who runs after whom in round ``turn``: within n rounds (2n where n is odd) everybody has each place and each neighbour
    before him equally often, so that nobody runs in another's wake more than the rest do.

    Williams' design for carry-over effects: n - 1 steps 1, -2, 3, ... round the circle are all different where n is even.
    """
    n = len(names)
    steps = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]  # 0, 1, -1, 2, -2, ...
    found = [names[(turn + step) % n] for step in steps]
    return found if turn // n % 2 == 0 else found[::-1]


def in_turn(replays: Mapping[str, Replay], budget: float = 0.06, least: int = 6) -> Paired:
    """CUDA: replay the graphs one after another, round after round: a clock that sinks under load sinks for all of them.

    ``budget`` is the seconds of each; ``order`` says how they take turns. All run on the first one's stream.
    """
    names = list(replays)
    first = replays[names[0]]
    with torch.cuda.device(first.device), torch.cuda.stream(first.stream):

        def marks(names: Sequence[str]) -> dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]:
            taken = {}
            for name in names:
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(first.stream)
                replays[name].graph.replay()
                stop.record(first.stream)
                taken[name] = (start, stop)
            return taken

        warm = marks(names)
        first.stream.synchronize()
        each = max(sum(a.elapsed_time(b) for a, b in warm.values()) * 1e-3, 1e-5) / len(names)
        rounds = [marks(order(names, turn)) for turn in range(max(least, min(200, round(budget / each))))]
        first.stream.synchronize()
    launches = {name: replays[name].launches for name in names}
    samples = {n: [r[n][0].elapsed_time(r[n][1]) * 1e3 / launches[n] for r in rounds] for n in names}
    return Paired.of(samples, launches, "graph")


def paired(contenders: Mapping[str, Sequence[Call]], budget: float = 1.0, least: int = 5) -> Paired:
    """CPU: time ``contenders`` (name -> calls over buffers of their own) in turn.

    ``budget`` is the seconds for all of them; at least ``least`` rounds run, each in its ``order``, after one that warms up.
    """
    names = list(contenders)
    for calls in contenders.values():
        for call in calls[:2]:
            call()
    samples: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + budget
    enabled = gc.isenabled()
    gc.disable()
    try:
        turn = 0
        while turn < least or (time.perf_counter() < deadline and turn < 1000):
            for name in order(names, turn):
                calls = contenders[name]
                call = calls[turn % len(calls)]
                start = time.perf_counter_ns()
                call()
                samples[name].append((time.perf_counter_ns() - start) * 1e-3)
            turn += 1
    finally:
        if enabled:
            gc.enable()
    return Paired.of(samples, dict.fromkeys(names, 1), "clock")


def measure(calls: Sequence[Call], device: torch.device, budget: float = 0.06) -> Timing:
    """Time one contender on ``device``: by graph where it can be captured, by events or the clock otherwise."""
    if device.type != "cuda":
        return paired({"call": calls}, budget).timings["call"]
    try:
        replay = Replay(calls, device)
    except NotCapturable:
        return events(calls, device, budget)
    try:
        return replay.time(budget)
    finally:
        replay.close()
