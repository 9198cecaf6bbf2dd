"""A request: its tokens, its pages, and how it ended. Pure Python."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

from .sampling_params import SamplingParams


class RequestError(ValueError):
    """What is wrong with one request. The others go on."""


class State(Enum):
    WAITING = "waiting"  # holds no pages
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """
    prompt, output   token ids given and generated
    computed         how many of them have their KV in the cache
    pages            where: token i is in pages[i // S]
    entries          the prefix cache's entries of its full pages
    limit            tokens, prompt included, after which it ends with "length"
    reason           "stop", "length", "cancel" or "error" once it has ended
    stops            token ids that end it
    stopped_by       the stop token id or stop string that ended it
    cancelled        set at any time, from any thread; the scheduler acts on it between two steps
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    limit: int
    seed: int = 0
    stops: frozenset[int] = frozenset()
    arrival: int = 0
    output: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    state: State = State.WAITING
    reason: str | None = None
    stopped_by: int | str | None = None
    error: str | None = None
    cancelled: bool = False
    preemptions: int = 0
    cached_tokens: int = 0
    logprobs: list[dict[int, float]] | None = None
    t_added: float = field(default_factory=time.perf_counter)
    t_tokens: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens known so far; the last one's KV is not in the cache before the next step."""
        return len(self.prompt) + len(self.output)

    def known(self, start: int, stop: int) -> list[int]:
        """Token ids start .. stop - 1, prompt and output as one list."""
        n = len(self.prompt)
        if stop <= n:
            return self.prompt[start:stop]
        return self.prompt[start:] + self.output[max(start - n, 0) : stop - n]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One ended request.

    text            without stop strings and special tokens ("" where there is no tokenizer)
    finish_reason   "stop", "length", "cancel" or "error"
    stopped_by      the token id or the string that stopped it
    error           what went wrong, with finish_reason "error"
    logprobs        per generated token: id -> log-probability, the drawn token first
    times           seconds after it was added at which each token came
    cached_tokens   prompt tokens that the prefix cache had
    """

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    stopped_by: int | str | None = None
    error: str | None = None
    logprobs: list[dict[int, float]] | None = None
    times: list[float] = field(default_factory=list)
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step brought one request: new token ids, the text that became certain, the output at its end."""

    request_id: str
    token_ids: list[int]
    text: str
    output: RequestOutput | None = None
