"""The `attnkit` command. Every error is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from attnkit import arch, settings

app = typer.Typer(
    help="Attention, W8A8 GEMM and sampling kernels held against a measured roofline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default: cuda where there is one)")]
Op = Annotated[str | None, typer.Option(help="one op, such as paged_decode")]
Shape = Annotated[str | None, typer.Option(help="letters, such as B64-L4096-Hq32-Hkv8-D128-S16-bf16")]


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}, wanted cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device is {name!r}, but torch sees no CUDA device here")
    return device


# ---------------------------------------------------------------- info


@app.command()
def info(op: Op = None, shape: Shape = None, device: Device = None) -> None:
    """What runs on this machine, and with which config.

    Device, versions, which kernels serve each op and why not; with --op and --shape, the config a shape
    would get and where it came from.
    """
    from rich.console import Console

    where, console = _device(device), Console(highlight=False)
    if shape is not None and op is None:
        raise ValueError("--shape needs --op to say whose letters these are")
    if op is None:
        _about(console, where)
    _kernels(console, where, op, shape)


def _about(console: Any, device: Any) -> None:
    import torch

    from attnkit.configs import store

    here = arch.of(device)
    lines = {"device": here.name}
    if device.type == "cuda":
        lines["device"] += f" (sm_{here.sm}, {here.sms} SMs, {here.smem >> 10} KB shared memory a block)"
    else:
        lines["threads"] = str(settings.get().threads or torch.get_num_threads())
    lines["versions"] = ", ".join(f"{k} {v}" for k, v in store.versions().items())
    lines["user cache"] = _file(store.user_path(here))
    lines["shipped"] = _file(store.shipped_path(here))
    for name, text in lines.items():
        console.print(f"[bold]{name:<11}[/bold]{text}", soft_wrap=True)
    console.print()


def _file(path: Path) -> str:
    """A tuned file's path and how many configs it holds."""
    from attnkit.configs import store

    data = store.read(path)
    count = 0 if data is None else sum(len(b) for b in data["entries"].values())
    return f"{path} ({f'{count} configs' if data is not None else 'none'})"


def _kernels(console: Any, device: Any, op: str | None, shape: str | None) -> None:
    """A line a kernel: does it serve, and with which config from where, or why not."""
    from rich.markup import escape
    from rich.table import Table

    from attnkit import shapes, workload

    if op is not None and op not in shapes.CASES:
        raise ValueError(f"--op is {op!r}, wanted one of {', '.join(shapes.CASES)}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("op", "kernel", "serves", "config" if shape else "why not"):
        table.add_column(name, overflow="fold", no_wrap=name in ("kernel", "serves"))
    for name in [op] if op else list(shapes.CASES):
        case = shapes.parse(name, shape or shapes.TYPICAL[name])
        x = case.build(device, empty=True)
        first = True
        for kernel in case.kernels():
            try:
                plan = workload.plan(case, x, kernel.name)
            except RuntimeError as reason:
                why = str(reason).splitlines()[-1].strip().removeprefix(f"{kernel.name}: ")
                table.add_row(name, kernel.name, "no", escape(why), style="dim")
                continue
            text = _config(plan) if shape else ""
            table.add_row(name, kernel.name, "[bold]first[/bold]" if first else "yes", escape(text))
            first = False
    console.print(table)


def _config(plan: Any) -> str:
    if plan.config is None:
        return "nothing to tune"
    values = " ".join(f"{f.name}={getattr(plan.config, f.name)}" for f in fields(plan.config))
    return f"{plan.origin}: {values}"


# ---------------------------------------------------------------- engine


@contextmanager
def _engine_errors() -> Iterator[None]:
    """The engine's commands print their own line and exit with 1; every command here exits with 2."""
    try:
        yield
    except SystemExit as stop:
        raise typer.Exit(2 if stop.code else 0) from None


@app.command()
def generate(
    model_dir: Annotated[Path, typer.Argument(help="a folder in Hugging Face format")],
    prompt: Annotated[list[str], typer.Option("-p", "--prompt", help="may be given several times")],
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens")] = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32")] = "auto",
    device: Device = None,
) -> None:
    """Continue prompts with a checkpoint, as a stream of text."""
    from attnkit.integrations.engine import cli

    _device(device)
    with _engine_errors():
        cli.generate(model_dir, prompt, max_tokens, temperature, top_k, top_p, seed, dtype, device)


@app.command()
def bench(
    model_dir: Annotated[Path, typer.Argument(help="a folder in Hugging Face format")],
    batch: Annotated[list[int] | None, typer.Option(help="sequences at once; may be given several times")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="prompt tokens")] = None,
    output: Annotated[list[int] | None, typer.Option(help="tokens to generate")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32")] = "auto",
    device: Device = None,
    json: Annotated[Path | None, typer.Option(help="also write the rows here")] = None,
) -> None:
    """Time a checkpoint in the bundled engine.

    Tokens a second, time to the first token and between tokens.
    """
    from attnkit.integrations.engine import cli

    _device(device)
    with _engine_errors():
        cli.bench(model_dir, batch or [1, 8], prompt or [128], output or [128], dtype, device, json)


# ---------------------------------------------------------------- measuring


@app.command()
def tune(
    op: Op = None,
    shape: Annotated[list[str] | None, typer.Option(help="only this shape (needs --op); may be given several times")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer shapes")] = False,
    force: Annotated[bool, typer.Option("--force", help="measure again what the file already holds")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the JSON to write (default: the user cache)")] = None,
    device: Device = None,
) -> None:
    """Measure each kernel's configs here and keep the best.

    An interrupted run goes on where it stopped.
    """
    from rich.console import Console

    from attnkit import shapes as letters
    from attnkit.configs import store
    from attnkit.tune import tune as sweep

    where = _device(device)
    if shape and op is None:
        raise ValueError("--shape needs --op to say whose letters these are")
    chosen = [letters.parse(op, s) for s in shape] if shape and op else None
    path = output or store.user_path(arch.of(where))
    try:
        found = sweep(op, quick, shapes=chosen, device=where, path=path, force=force, progress=True)
    except KeyboardInterrupt:
        print(f"attnkit: stopped; what was measured is in {path}, the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    _tuned(Console(highlight=False), found, path)


def _tuned(console: Any, found: list[Any], path: Path) -> None:
    from rich.table import Table

    if not found:
        console.print(f"nothing to measure: no tunable kernel serves here, or {path} holds it all (--force)", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("kernel", "bucket", "us", "default us", "gain", "tried"):
        table.add_column(name, justify="left" if name in ("kernel", "bucket") else "right", overflow="fold")
    for t in found:
        gain = f"{t.default_us / t.us:.2f}x"
        table.add_row(f"{t.op} {t.kernel}", t.bucket, f"{t.us:.1f}", f"{t.default_us:.1f}", gain, str(t.tried))
    console.print(table)
    console.print(f"{len(found)} buckets in {path}", soft_wrap=True)


@app.command()
def report(
    new: Annotated[Path, typer.Argument(help="what perf/ wrote: perf/out/run.json or perf/results/<gpu>.json")],
    old: Annotated[Path | None, typer.Argument(help="an older one: shows what got faster or slower")] = None,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("report.html"),
) -> None:
    """Turn measured rows into one HTML page of rooflines."""
    _perf().write(new, old, output)
    print(f"{output}: open it in a browser")


def _perf() -> Any:
    """perf/report.py of the checkout this package runs from; perf/ itself is not installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "perf" / "report.py").is_file():
        raise RuntimeError("report needs a checkout of the repository (perf/ is not part of the installed package)")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from perf import report as page

    return page


@app.command()
def demo(
    prompt: Annotated[str, typer.Option("-p", "--prompt")] = "def ",
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens")] = 240,
    device: Device = None,
) -> None:
    """Generate text, then measure the five families.

    Text from the bundled checkpoint through attnkit's kernels, and the roofline table of this machine.
    """
    from attnkit import demo as show

    with _engine_errors():
        show.run(prompt, max_tokens, _device(device))


def main() -> None:
    """The console script: runs a command and turns its errors into one line."""
    warnings.showwarning = _warning
    code: Any
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except ModuleNotFoundError as error:
        code = _fail(f"{error.name} is not installed")
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        code = _fail(str(error))
    except Exception as error:
        code = _usage(error)
    raise SystemExit(code if isinstance(code, int) else 0)


def _usage(error: Exception) -> int:
    """Click's errors, whichever click typer brings; anything else is a bug and keeps its traceback."""
    if not hasattr(error, "format_message"):
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return 2
    return _fail(error.format_message())


def _fail(message: str) -> int:
    print("attnkit: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"attnkit: warning: {' '.join(str(message).removeprefix('attnkit: ').split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
