"""LLM: the engine's front. Requests in, tokens and text out."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import model as models
from .batch import DecodeRows
from .pages import PagePool
from .request import Request, RequestError, RequestOutput, State, StepOutput
from .runner import Runner
from .sampler import Sampler
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .text import TextStream, load_tokenizer

Prompt = str | Sequence[int]
#: Without a GPU's free memory to go by, the KV cache takes no more than this, in bytes.
_CPU_CACHE = 1 << 30
#: Share of a GPU's free memory that the KV cache takes; the rest is for activations and graphs.
_GPU_SHARE = 0.85


class LLM:
    """
    model_dir        a directory in Hugging Face format: config.json, safetensors, tokenizer.json
    dtype            "auto" (the checkpoint's own), "float32", "bfloat16" or "float16" (fp32, bf16, fp16)
    device           None: CUDA where there is one
    max_batch        requests that run at the same time
    num_pages        pages of the KV cache (None: what max_batch texts of max_len need, within the memory there is)
    page_size        tokens in a page, a power of two up to 256
    max_len          tokens of the longest text, prompt included (None: the model's max_position_embeddings)
    max_step_tokens  tokens computed in one step; longer prompts are cut into chunks
    prefix_cache     keep the KV of prompts for later requests that begin alike
    cuda_graphs      capture decode steps
    tokenizer        False: token ids only, no tokenizer.json needed
    notify           told what takes a while (graph captures)

    Raises CheckpointError for a checkpoint that cannot be loaded, before it takes memory.
    ``add`` and ``cancel`` may be called from any thread; all else from one thread at a time.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        max_batch: int = 64,
        num_pages: int | None = None,
        page_size: int = 16,
        max_len: int | None = None,
        max_step_tokens: int = 2048,
        prefix_cache: bool = False,
        cuda_graphs: bool = True,
        tokenizer: bool = True,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        directory = Path(model_dir)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self._check(max_batch, num_pages, page_size, max_len)
        self.tokenizer = load_tokenizer(directory) if tokenizer else None
        self.model, self.dtype = models.load(directory, dtype, self.device)
        self.config = c = self.model.config
        self.max_len = max_len or c.max_positions
        if c.rope.longest is not None and self.max_len > c.rope.longest:
            raise ValueError(f"LLM: max_len is {self.max_len}, wanted at most {c.rope.longest} with {c.rope.kind} rope")
        num_pages = num_pages or self._fitting_pages(max_batch, page_size)
        pool = PagePool(num_pages, page_size, prefix_cache)
        self.scheduler = Scheduler(pool, max_batch, max(max_step_tokens, max_batch))
        self.cache = torch.empty(self.model.cache_shape(c, num_pages, page_size), dtype=self.dtype, device=self.device)
        self.longest = min(self.max_len, num_pages * page_size)
        rows = DecodeRows(max_batch, pool.pages_for(self.longest), page_size, self.device)
        self.runner = Runner(self.model, rows, self.cache, cuda_graphs, notify or (lambda text: None))
        self.sampler = Sampler(c.vocab, self.device)
        self._eos = frozenset(i for i in c.eos if 0 <= i < c.vocab)
        self._requests: dict[str, Request] = {}
        self._texts: dict[str, TextStream] = {}
        self._boxes: dict[str, deque[StepOutput]] = {}  # outputs for generate and stream
        self._outbox: list[StepOutput] = []  # outputs for the caller of step
        self._quiet: set[str] = set()  # requests whose text nobody reads before they end: it is decoded once
        self._dropped: set[str] = set()  # requests nobody waits for any more
        self._names = itertools.count()

    @staticmethod
    def _check(max_batch: int, num_pages: int | None, page_size: int, max_len: int | None) -> None:
        for name, value in (("max_batch", max_batch), ("num_pages", num_pages), ("page_size", page_size), ("max_len", max_len)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"LLM: {name} is {value!r}, wanted a whole number, 1 or more")
        if page_size > 256 or page_size & (page_size - 1):
            raise ValueError(f"LLM: page_size is {page_size}, wanted a power of two from 1 to 256")

    def _fitting_pages(self, max_batch: int, page_size: int) -> int:
        page = math.prod(self.model.cache_shape(self.config, 1, page_size)) * self.dtype.itemsize
        room = _CPU_CACHE
        if self.device.type == "cuda":
            room = int(torch.cuda.mem_get_info(self.device)[0] * _GPU_SHARE)
        pages = min(max_batch * -(-self.max_len // page_size), room // page)
        if pages < 1:
            raise ValueError(f"LLM: one page of the KV cache takes {page} bytes, {room} are free")
        return pages

    # -- requests -------------------------------------------------------------------------------------------

    def add(self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None) -> str:
        """Queue a request; ``step`` runs it. Returns its id. Raises RequestError, and nothing else happens."""
        return self._add(prompt, params, request_id).id

    def _add(self, prompt: Prompt, params: SamplingParams | None, request_id: str | None = None) -> Request:
        name = str(next(self._names)) if request_id is None else request_id
        if name in self._requests:
            raise RequestError(f"request {name!r}: there is one with this id already")
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"request {name!r}: params is a {type(params).__name__}, wanted SamplingParams")
        tokens = self._tokens(name, prompt)
        for field, ids in params.token_ids().items():
            for token in ids:
                self._check_token(f"request {name!r}: {field} holds", token)
        if params.logprobs is not None and params.logprobs > self.config.vocab:
            raise RequestError(f"request {name!r}: logprobs is {params.logprobs}, wanted at most V = {self.config.vocab}")
        if params.stop and self.tokenizer is None:
            raise RequestError(f"request {name!r}: stop strings need a tokenizer, and this engine has none")
        limit = self.longest if params.max_tokens is None else min(len(tokens) + params.max_tokens, self.longest)
        request = Request(
            id=name,
            prompt=tokens,
            params=params,
            limit=limit,
            seed=random.getrandbits(63) if params.seed is None else params.seed,
            stops=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos),
            logprobs=None if params.logprobs is None else [],
        )
        if self.tokenizer is not None:
            self._texts[name] = TextStream(self.tokenizer, tokens, params.stop)
        self._requests[name] = request
        self.scheduler.add(request)
        return request

    def _tokens(self, name: str, prompt: Any) -> list[int]:
        """The prompt's token ids, checked."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(f"request {name!r}: the prompt is text, and this engine has no tokenizer")
            try:
                tokens = self.tokenizer.encode(prompt).ids
            except (UnicodeError, TypeError, ValueError) as error:
                raise RequestError(f"request {name!r}: the prompt is not valid text: {error}") from None
        else:
            if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
                raise RequestError(f"request {name!r}: the prompt is a {type(prompt).__name__}, wanted text or token ids")
            tokens = list(prompt)
        if not tokens:
            raise RequestError(f"request {name!r}: the prompt has no tokens")
        if not ({int} >= set(map(type, tokens)) and min(tokens) >= 0 and max(tokens) < self.config.vocab):
            for token in tokens:
                self._check_token(f"request {name!r}: the prompt holds", token)
        if len(tokens) >= self.longest:
            room = self.longest - 1
            raise RequestError(f"request {name!r}: the prompt has {len(tokens)} tokens, at most {room} leave room to generate")
        return tokens

    def _check_token(self, what: str, token: Any) -> None:
        if isinstance(token, bool) or not isinstance(token, int):
            raise RequestError(f"{what} {token!r}, wanted token ids")
        if not 0 <= token < self.config.vocab:
            raise RequestError(f"{what} token {token}, which is outside [0, {self.config.vocab})")

    def cancel(self, request_id: str) -> bool:
        """End a request at the next step, with finish_reason "cancel". False if there is none with this id."""
        request = self._requests.get(request_id)
        if request is None or request.state is State.ENDED:
            return False
        self.scheduler.cancel(request)
        return True

    @property
    def busy(self) -> bool:
        """Whether ``step`` has something to do or to tell."""
        return self.scheduler.busy or bool(self._outbox)

    # -- steps ----------------------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """One forward pass for everybody. What it brought the requests of ``add``; each ends in one of these once."""
        self._pump()
        out, self._outbox = self._outbox, []
        return out

    @torch.inference_mode()
    def _pump(self) -> None:
        step = self.scheduler.schedule()
        sampled = step.sampled
        if step:
            logits = self.runner.logits(step)
            if sampled:
                drawn = self.sampler(logits, sampled)
                self.scheduler.commit(step, drawn.tokens)
                self._record(sampled, drawn.logprobs)
            else:
                self.scheduler.commit(step, [])
        fresh = {r.id: self._read(r) for r in sampled if r.output and not r.cancelled and r.error is None}
        ended, self.scheduler.ended = self.scheduler.ended, []
        outputs = {r.id: self._finish(r, *fresh.pop(r.id, ([], ""))) for r in ended}
        for request in sampled:
            if request.id in fresh:
                self._send(StepOutput(request.id, *fresh[request.id]))
        for output in outputs.values():
            self._send(output)

    def _record(self, sampled: list[Request], logprobs: list[dict[int, float] | None]) -> None:
        now = time.perf_counter()
        for request, values in zip(sampled, logprobs):
            if not request.cancelled and request.error is None:
                request.t_tokens.append(now)
                if values is not None and request.logprobs is not None:
                    request.logprobs.append(values)

    def _read(self, request: Request) -> tuple[list[int], str]:
        """The newest token and the text it made certain; ends the request where that holds a stop string."""
        token, text = request.output[-1], self._texts.get(request.id)
        if text is None or request.id in self._quiet or request.stopped_by is not None:
            return [token], ""
        text.stop = request.params.stop if len(request.output) >= request.params.min_tokens else ()
        delta = text.push(token)
        if text.stopped_by is not None:
            self.scheduler.end(request, "stop")
            request.reason, request.stopped_by = "stop", text.stopped_by
        return [token], delta

    def _finish(self, request: Request, tokens: list[int], delta: str) -> StepOutput:
        text = self._texts.pop(request.id, None)
        if text is not None and text.stopped_by is None:
            # A stop token is not part of the text; neither is what was pushed already.
            rest = request.output if request.id in self._quiet else []
            delta += text.finish(rest[:-1] if rest and isinstance(request.stopped_by, int) else rest)
            if text.stopped_by is not None and request.reason != "cancel":
                request.reason, request.stopped_by = "stop", text.stopped_by
        self._requests.pop(request.id)
        self._quiet.discard(request.id)
        output = RequestOutput(
            request_id=request.id,
            prompt_token_ids=request.prompt,
            token_ids=request.output,
            text="" if text is None else text.text,
            finish_reason=request.reason or "error",
            stopped_by=request.stopped_by,
            error=None if request.error is None else f"request {request.id!r}: {request.error}",
            logprobs=request.logprobs,
            times=[t - request.t_added for t in request.t_tokens],
            cached_tokens=request.cached_tokens,
        )
        return StepOutput(request.id, tokens, delta, output)

    def _send(self, output: StepOutput) -> None:
        if output.request_id not in self._dropped:
            self._boxes.get(output.request_id, self._outbox).append(output)
        elif output.output is not None:
            self._dropped.remove(output.request_id)

    # -- whole texts ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Run prompts (a text, token ids, or a list of either) to their ends, in one batch; outputs in their order.

        A prompt that cannot run gives an output with finish_reason "error" and ``error``; the others are not touched.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, int) for p in prompts))
        many: list[Any] = [prompts] if single else list(prompts)
        each = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise ValueError(f"LLM.generate: {len(each)} params for {len(many)} prompts")
        outputs: list[RequestOutput | None] = [None] * len(many)
        open_requests: dict[str, int] = {}
        try:
            for i, (prompt, wanted) in enumerate(zip(many, each)):
                try:
                    request = self._add(prompt, wanted)
                except RequestError as error:
                    outputs[i] = RequestOutput("", [], [], "", "error", error=str(error))
                    continue
                open_requests[request.id] = i
                self._boxes[request.id] = deque(maxlen=1)
                if not request.params.stop:
                    self._quiet.add(request.id)
            while open_requests:
                self._pump()
                for name in [n for n in open_requests if self._boxes[n]]:
                    output = self._boxes[name].pop().output
                    if output is not None:
                        outputs[open_requests.pop(name)] = output
                        del self._boxes[name]
        finally:
            self._abandon(open_requests)
        return [o for o in outputs if o is not None]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one prompt as it becomes certain. Raises RequestError where it cannot run.

        Several streams may be read in turn; each step serves all of them. Closing one cancels its request.
        """
        for output in self.stream_outputs(prompt, params):
            if output.text:
                yield output.text

    def stream_outputs(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StepOutput]:
        """As ``stream``, with token ids and, last, the whole output. The request is queued at once."""
        request = self._add(prompt, params)
        box = self._boxes[request.id] = deque()
        return self._drain(request, box)

    def _drain(self, request: Request, box: deque[StepOutput]) -> Iterator[StepOutput]:
        done = False
        try:
            while not done:
                while not box:
                    self._pump()
                output = box.popleft()
                done = output.output is not None
                if done and output.output is not None and output.output.error is not None:
                    raise RequestError(output.output.error)
                yield output
        finally:
            self._abandon([request.id])

    def _abandon(self, names: Iterable[str]) -> None:
        """Nobody waits for these any more (an exception, a closed stream): the next step ends them unheard."""
        for name in names:
            self._boxes.pop(name, None)
            if name in self._requests:
                self._dropped.add(name)
                self.cancel(name)
