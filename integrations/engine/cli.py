"""What `attnkit generate` and `attnkit bench` run. attnkit/cli.py mounts these functions."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .llm import LLM
from .request import RequestError, RequestOutput, StepOutput
from .sampling_params import SamplingParams


def generate(
    model_dir: Path,
    prompts: Sequence[str],
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    console: Console | None = None,
) -> None:
    """Continue each prompt, printing text as it comes. All run in one batch; they are printed in their order.

    Exits with status 1 and one line where the checkpoint, an option or a prompt is bad; other prompts still run.
    """
    console = console or Console(highlight=False)
    notes = _Notes(console)
    try:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        llm = _load(model_dir, dtype, device, notes, max_batch=max(1, len(prompts)))
    except (ValueError, TypeError, RuntimeError) as error:  # CheckpointError is a ValueError
        _say_error(console, error)
        raise SystemExit(1) from None
    failed = False
    start = time.perf_counter()
    streams: list[Iterator[StepOutput] | RequestError] = []
    for prompt in prompts:
        try:
            streams.append(llm.stream_outputs(prompt, params))
        except RequestError as error:
            streams.append(error)
    count = 0
    for number, (prompt, stream) in enumerate(zip(prompts, streams)):
        if number:
            console.print()
        if len(prompts) > 1:
            console.rule(f"[dim]{number + 1} of {len(prompts)}", align="left", style="dim")
        try:
            if isinstance(stream, RequestError):
                raise stream
            with notes.after_the_text():
                count += _print_stream(console, prompt, stream)
        except RequestError as error:
            failed = True
            _say_error(console, error)
    seconds = time.perf_counter() - start
    console.print(f"[dim]{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s ({_where(llm)})[/dim]")
    if failed:
        raise SystemExit(1)


class _Notes:
    """Prints the engine's notices, those that come amid a text after it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.held: list[str] | None = None

    def __call__(self, text: str) -> None:
        if self.held is None:
            self.console.print(f"[dim]{text}[/dim]")
        else:
            self.held.append(text)

    @contextmanager
    def after_the_text(self) -> Iterator[None]:
        self.held = []
        try:
            yield
        finally:
            held, self.held = self.held, None
            for text in held:
                self(text)


def _print_stream(console: Console, prompt: str, stream: Iterator[StepOutput]) -> int:
    """The prompt dimmed, then its continuation. Returns the number of tokens."""
    console.print(prompt, end="", style="dim", markup=False, soft_wrap=True)
    last: RequestOutput | None = None
    for output in stream:
        console.print(output.text, end="", markup=False, soft_wrap=True)
        console.file.flush()
        last = output.output
    console.print()
    return len(last.token_ids) if last else 0


def _load(model_dir: Path, dtype: str, device: str | None, notes: _Notes, **options: Any) -> LLM:
    with notes.console.status(f"loading {model_dir}"):
        return LLM(model_dir, dtype=dtype, device=device, notify=notes, **options)


def _where(llm: LLM) -> str:
    return f"{str(llm.dtype).removeprefix('torch.')} on {llm.device}"


def _say_error(console: Console, error: Exception) -> None:
    console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)


def bench(
    model_dir: Path,
    batch: Sequence[int] = (1, 8),
    prompt: Sequence[int] = (128,),
    output: Sequence[int] = (128,),
    dtype: str = "auto",
    device: str | None = None,
    json_path: Path | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Time every batch x prompt x output, in tokens. Prints a table, writes JSON where asked, returns its rows.

    tokens/s   generated tokens of the whole batch over the time from the first request to the last token
    TTFT       time to a request's first token, median over the batch, in ms
    ITL        time between tokens of a request, median and 99th percentile, in ms
    """
    console = console or Console(highlight=False)
    rows: list[dict[str, Any]] = []
    try:
        llm = _load(model_dir, dtype, device, _Notes(console), max_batch=max(batch))
        cases = [(b, p, o) for b in batch for p in prompt for o in output]
        with console.status("warming up") as status:
            for number, (b, p, o) in enumerate(cases):
                status.update(f"{number + 1} of {len(cases)}: batch {b}, prompt {p}, output {o}")
                rows.append(measure(llm, b, p, o))
    except (ValueError, TypeError, RuntimeError) as error:
        _say_error(console, error)
        raise SystemExit(1) from None
    table = Table(title=f"{Path(model_dir).resolve().name}: {_where(llm)}", width=min(console.width, 80))
    for name in ("batch", "prompt", "output", "tokens/s", "TTFT ms", "ITL ms", "p99 ms"):
        table.add_column(name, justify="right")
    for row in rows:
        times = [f"{row[key]:.2f}" for key in ("ttft_ms", "itl_ms", "itl_p99_ms")]
        table.add_row(str(row["batch"]), str(row["prompt"]), str(row["output"]), f"{row['tokens_per_s']:.0f}", *times)
    console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps({"model": str(model_dir), "where": _where(llm), "rows": rows}, indent=1) + "\n")
    return rows


def measure(llm: LLM, batch: int, prompt: int, output: int) -> dict[str, Any]:
    """One row of ``bench``: random prompts, greedy, no early end. A first run warms up (compiles, captures)."""
    noise = random.Random(0)
    prompts = [[noise.randrange(llm.config.vocab) for _ in range(prompt)] for _ in range(batch)]

    def run() -> list[RequestOutput]:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=output, ignore_eos=True))
        for o in outputs:
            if o.error is not None:
                raise RequestError(o.error)
        return outputs

    run()
    start = time.perf_counter()
    outputs = run()
    seconds = time.perf_counter() - start
    gaps = sorted(b - a for o in outputs for a, b in zip(o.times, o.times[1:])) or [0.0]
    return {
        "batch": batch,
        "prompt": prompt,
        "output": output,
        "tokens_per_s": sum(len(o.token_ids) for o in outputs) / seconds,
        "ttft_ms": 1e3 * statistics.median(o.times[0] for o in outputs),
        "itl_ms": 1e3 * statistics.median(gaps),
        "itl_p99_ms": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
    }
