"""One self-contained HTML page from perf's JSON: a roofline plot a family, a sortable table, what changed.

    attnkit report perf/results/nvidia-h200.json [older.json] -o report.html

Reads a receipt, `perf/out/run.json`, or what `pytest --benchmark-json` wrote. The page fetches nothing.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

FAMILIES = {
    "prefill": "Prefill",
    "decode": "Decode",
    "mla": "MLA",
    "gemm": "W8A8 GEMM",
    "sampling": "Sampling",
    "hidden": "Sampling from hidden states",
    "cache": "Cache",
}
HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1080, 430, 62, 24, 18, 46
#: A change smaller than this is noise unless both spreads say otherwise.
NOISE = 0.03

Row = dict[str, Any]


class BadFile(ValueError):
    """The file is not what perf/ writes."""


def load(path: Path) -> dict[str, Any]:
    """The file as {"gpu", "versions", "roofs", "rows", "notes"}; raises BadFile naming it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadFile(f"{path}: not JSON ({error})") from None
    if isinstance(data, dict) and "benchmarks" in data:
        data = _from_benchmarks(data)
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list) or not data["rows"]:
        raise BadFile(f"{path}: holds no rows, wanted what `pytest perf/ --benchmark` or `make gpu-check` wrote")
    for row in data["rows"]:
        missing = {"family", "case", "impl", "us", "tflops", "gbs"} - set(row)
        if missing:
            raise BadFile(f"{path}: a row lacks {', '.join(sorted(missing))}")
        row.setdefault("bytes", row["gbs"] * row["us"] * 1e3)
        row.setdefault("flops", row["tflops"] * row["us"] * 1e6)
        row["peers"] = {k: v for k, v in (row.get("peers") or {}).items() if v}
        for name, value in (("spread", 0.0), ("kind", "bf16"), ("bound", ""), ("config", ""), ("origin", ""), ("err", 0.0)):
            row.setdefault(name, value)
        row.setdefault("roof_pct", 0.0)
    return data


def _from_benchmarks(data: dict[str, Any]) -> dict[str, Any]:
    """pytest-benchmark's JSON: its extra_info is a row, its name says whose."""
    rows = []
    for entry in data["benchmarks"]:
        info = dict(entry.get("extra_info") or {})
        family = Path(entry["fullname"].split("::")[0]).stem.removeprefix("bench_")
        impl, _, case = entry.get("param", "-").partition("-")
        if "us" in info:
            rows.append({"family": family, "case": case, "impl": impl, **info})
    return {"gpu": data.get("machine_info", {}).get("node", ""), "rows": rows}


# ---------------------------------------------------------------- plot


class Scale:
    """A logarithmic axis from data to pixels, with a tenth of a decade to spare."""

    def __init__(self, values: list[float], start: float, stop: float) -> None:
        self.low = math.log10(min(values)) - 0.15
        self.high = math.log10(max(values)) + 0.15
        if self.high - self.low < 1:
            middle = (self.high + self.low) / 2
            self.low, self.high = middle - 0.5, middle + 0.5
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        steps = (1,) if self.high - self.low > 2.2 else (1, 2, 5)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        return [s * 10.0**p for p in powers for s in steps if self.low <= math.log10(s * 10.0**p) <= self.high]


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:.6f}".rstrip("0").rstrip(".")


def _marker(shape: int, x: float, y: float, r: float) -> str:
    """Peers are told apart by shape: diamond, square, triangle, upside-down triangle, hexagon, hourglass."""
    shapes = (
        ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
        ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
        ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
        ((-0.6, -1.1), (0.6, -1.1), (1.2, 0), (0.6, 1.1), (-0.6, 1.1), (-1.2, 0)),
        ((-1, -1.1), (1, -1.1), (-1, 1.1), (1, 1.1)),
    )
    return " ".join(f"{x + a * r:.1f},{y + b * r:.1f}" for a, b in shapes[shape % len(shapes)])


def _roofs(roofs: dict[str, float], rows: list[Row], sx: Scale, sy: Scale) -> list[str]:
    """The read slope and a level a kind of product, labelled in place. TB/s times FLOP/byte is TFLOP/s."""
    read = roofs.get("read_gbs", 0) / 1e3
    kinds = {k: roofs[f"{k}_tflops"] for k in sorted({r["kind"] for r in rows}) if f"{k}_tflops" in roofs}
    if not read or not kinds:
        return []
    right = 10**sx.high
    top = max(kinds.values())
    left = max(10**sx.low, 10**sy.low / read)
    out = [f'<polyline class="roof" points="{sx(left):.1f},{sy(read * left):.1f} {sx(top / read):.1f},{sy(top):.1f}"/>']
    by_level: dict[float, list[str]] = {}
    for kind, level in kinds.items():  # kinds of one rate share a line and its label
        by_level.setdefault(next((known for known in by_level if abs(known / level - 1) < 0.05), level), []).append(kind)
    levels = sorted((" and ".join(names), level) for level, names in by_level.items())
    levels.sort(key=lambda item: item[1])
    for kind, level in levels:
        out.append(f'<polyline class="roof" points="{sx(level / read):.1f},{sy(level):.1f} {sx(right):.1f},{sy(level):.1f}"/>')
        out.append(
            f'<text x="{sx(right) - 4:.1f}" y="{sy(level) - 6:.1f}" text-anchor="end">{kind} {level:,.0f} TFLOP/s</text>'
        )
    middle = 10 ** ((math.log10(left) + math.log10(levels[0][1] / read)) / 2)
    angle = -math.degrees(math.atan2(sy(read * left) - sy(top), sx(top / read) - sx(left)))
    x, y = sx(middle), sy(read * middle)
    out.append(
        f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle" transform="rotate({angle:.1f} {x:.1f} {y:.1f})">'
        f"reads {read:,.3g} TB/s</text>"
    )
    return out


def _frame(sx: Scale, sy: Scale, x_title: str, y_title: str) -> list[str]:
    out = []
    for t in sx.ticks():
        out.append(f'<line class="grid" x1="{sx(t):.1f}" x2="{sx(t):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text class="tick" x="{sx(t):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_label(t)}</text>')
    for t in sy.ticks():
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{sy(t):.1f}" y2="{sy(t):.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 7}" y="{sy(t) + 4:.1f}" text-anchor="end">{_label(t)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_title}</text>')
    out.append(f'<text x="{LEFT}" y="{TOP - 5}">{y_title}</text>')
    return out


def _plot(rows: list[tuple[int, Row]], roofs: dict[str, float], colours: dict[str, int], shapes: dict[str, int]) -> str:
    """Arithmetic intensity against TFLOP/s; where nothing is multiplied, megabytes against TB/s."""
    plain = [r for _, r in rows]
    busy = all(r["flops"] > 0 for r in plain)

    def place(r: Row, us: float) -> tuple[float, float]:
        return (r["flops"] / r["bytes"], r["flops"] / us * 1e-6) if busy else (r["bytes"] / 1e6, r["bytes"] / us * 1e-6)

    points = [place(r, us) for r in plain for us in (r["us"], *r["peers"].values())]
    read = roofs.get("read_gbs", 0) / 1e3
    tops = [roofs[k] for k in (f"{r['kind']}_tflops" for r in plain) if k in roofs] if busy else [read] * bool(read)
    ridge = [t / read * 2 for t in tops] if busy and read else []
    sx = Scale([p[0] for p in points] + ridge, LEFT, WIDTH - RIGHT)
    sy = Scale([p[1] for p in points] + [t * 1.15 for t in tops], HEIGHT - BOTTOM, TOP)
    titles = ("FLOP per byte", "TFLOP/s") if busy else ("megabytes a call", "TB/s")
    out = _frame(sx, sy, *titles)
    if busy:
        out += _roofs(roofs, plain, sx, sy)
    elif read:
        out.append(f'<line class="roof" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{sy(read):.1f}" y2="{sy(read):.1f}"/>')
        out.append(f'<text x="{LEFT + 8}" y="{sy(read) - 6:.1f}">reads {read:,.3g} TB/s</text>')
    dots: list[str] = []
    for i, r in rows:
        name = escape(r["case"], quote=True)
        for peer, us in r["peers"].items():
            x, y = place(r, us)
            label = escape(f"{r['case']}: {peer}", quote=True)
            out.append(
                f'<polygon class="mark peer" data-i="{i}" data-case="{name}" data-peer="{escape(peer, quote=True)}"'
                f' aria-label="{label}" points="{_marker(shapes[peer], sx(x), sy(y), 4.6)}"/>'
            )
        x, y = place(r, r["us"])
        dots.append(
            f'<circle class="mark ours c{colours[r["impl"]]}" tabindex="0" data-i="{i}" data-case="{name}"'
            f' aria-label="{name}: {escape(r["impl"])}" cx="{sx(x):.1f}" cy="{sy(y):.1f}" r="6"/>'
        )
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(out + dots)}</svg>'


def _legend(rows: list[Row], colours: dict[str, int], shapes: dict[str, int]) -> str:
    items = []
    for impl in dict.fromkeys(r["impl"] for r in rows):
        items.append(
            f'<span><svg viewBox="0 0 14 14"><circle class="c{colours[impl]}" cx="7" cy="7" r="5.5"/></svg>{escape(impl)}</span>'
        )
    for peer in dict.fromkeys(p for r in rows for p in r["peers"]):
        shape = _marker(shapes[peer], 7, 7, 4.6)
        items.append(f'<span><svg viewBox="0 0 14 14"><polygon class="mark peer" points="{shape}"/></svg>{escape(peer)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


# ---------------------------------------------------------------- tables


def _over(r: Row) -> float | None:
    return min(r["peers"].values()) / r["us"] if r["peers"] else None


def _cell(value: float | None, spec: str, html: str | None = None) -> str:
    """A number that sorts as one; ``html`` is shown in its place where given."""
    if value is None:
        return '<td class="n" data-v=""></td>'
    return f'<td class="n" data-v="{float(value)!r}">{format(value, spec) if html is None else html}</td>'


_NUMERIC = ("µs", "±", "TFLOP/s", "TB/s", "% of roof", "× best peer", "error", "µs before", "µs now", "speed")


def _head(names: tuple[str, ...]) -> str:
    cells = "".join(f"<th{' class=n' if name in _NUMERIC else ''}>{name}</th>" for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _table(rows: list[Row]) -> str:
    body = []
    for r in rows:
        over, pct = _over(r), r["roof_pct"]
        meter = f'<span class="meter"><i style="width:{min(100.0, pct):.0f}%"></i></span>{pct:.0f}'
        ratio = "" if over is None else f'<span class="{"up" if over >= 1 else "down"}">{over:.2f}</span>'
        gain = f" ({r['default_us'] / r['us']:.2f}× over default)" if r.get("default_us") else ""
        numbers = _cell(r["us"], ",.1f") + _cell(r["spread"], ",.1f") + _cell(r["tflops"], ",.3g")
        numbers += _cell(r["gbs"] / 1e3, ",.3g")
        family, case, impl, bound = (escape(r[k]) for k in ("family", "case", "impl", "bound"))
        body.append(
            f'<tr data-family="{family}"><td>{family}</td><td class="case">{case}</td><td>{impl}</td>{numbers}'
            f"<td>{bound}</td>{_cell(pct, '', meter)}{_cell(over, '', ratio)}{_cell(r['err'], '.1e')}"
            f"<td>{escape(r['origin'] + gain)}</td></tr>"
        )
    names = ("family", "case", "kernel", "µs", "±", "TFLOP/s", "TB/s", "bound", "% of roof", "× best peer", "error", "config")
    return f'<div class="scroll"><table class="rows" id="all">{_head(names)}<tbody>{"".join(body)}</tbody></table></div>'


def changes(new: list[Row], old: list[Row]) -> tuple[list[tuple[Row, Row, float]], list[Row], list[Row]]:
    """Rows in both with old time over new (above 1 is faster now), furthest from 1 first; then new and gone rows."""
    key = lambda r: (r["family"], r["case"], r["impl"])  # noqa: E731
    before = {key(r): r for r in old}
    now = {key(r) for r in new}
    both = [(r, before[key(r)], before[key(r)]["us"] / r["us"]) for r in new if key(r) in before]
    both.sort(key=lambda item: -abs(math.log(item[2])))
    return both, [r for r in new if key(r) not in before], [r for r in old if key(r) not in now]


def significant(row: Row, old: Row, ratio: float) -> bool:
    noise = max(NOISE, (row["spread"] + old["spread"]) / max(row["us"], old["us"]))
    return abs(ratio - 1) > noise


def _compared(new: list[Row], old: list[Row], name: str) -> str:
    both, added, gone = changes(new, old)
    faster = sum(significant(*c) and c[2] > 1 for c in both)
    slower = sum(significant(*c) and c[2] < 1 for c in both)
    body = []
    for row, past, ratio in both:
        counts = significant(row, past, ratio)
        wide = min(50.0, abs(math.log2(ratio)) * 50)
        bar = f'<span class="delta"><i class="{"f" if ratio > 1 else "s"}" style="width:{wide:.1f}%"></i></span>'
        tone = (' class="up"' if ratio > 1 else ' class="down"') if counts else ""
        speed = _cell(ratio, "", f"<span{tone}>{ratio:.2f}×</span>")
        family, case, impl = (escape(row[k]) for k in ("family", "case", "impl"))
        body.append(
            f'<tr><td>{family}</td><td class="case">{case}</td><td>{impl}</td>{_cell(past["us"], ",.1f")}'
            f"{_cell(row['us'], ',.1f')}{speed}<td>{bar}</td></tr>"
        )
    head = _head(("family", "case", "kernel", "µs before", "µs now", "speed", ""))
    rest = f" {len(added)} rows are new, {len(gone)} are gone." if added or gone else ""
    return (
        f'<section id="changes"><h2>What changed since {escape(name)}</h2><p class="sub"><span class="up">{faster} faster</span>,'
        f' <span class="down">{slower} slower</span>, {len(both) - faster - slower} within noise.{rest}</p><div class="scroll tall">'
        f'<table class="rows">{head}<tbody>{"".join(body)}</tbody></table></div></section>'
    )


# ---------------------------------------------------------------- page


def _mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _tiles(rows: list[Row], families: list[str]) -> str:
    """A family's best kernel a case: geometric mean of the roof's share, and against the best peer."""
    out = []
    for family in families:
        best: dict[str, Row] = {}
        for r in rows:
            if r["family"] == family and (r["case"] not in best or r["us"] < best[r["case"]]["us"]):
                best[r["case"]] = r
        pct = _mean([r["roof_pct"] for r in best.values() if r["roof_pct"] > 0])
        overs = [o for r in best.values() if (o := _over(r)) is not None]
        peer = (
            f"{_mean(overs):.2f}× the best peer, ahead in {sum(o >= 1 for o in overs)} of {len(overs)}"
            if overs
            else "no peer here"
        )
        roof = "–" if pct is None else f"{pct:.0f}%"
        out.append(
            f'<a class="tile" href="#{family}"><span class="name">{FAMILIES.get(family, family)}</span><b>{roof}</b><span>of the roof; {peer}</span></a>'
        )
    return f'<div class="tiles">{"".join(out)}</div>'


def page(new: dict[str, Any], old: dict[str, Any] | None = None, old_name: str = "") -> str:
    """The whole HTML document."""
    rows: list[Row] = new["rows"]
    families = [f for f in FAMILIES if any(r["family"] == f for r in rows)]
    families += sorted({r["family"] for r in rows} - set(families))
    ranks = {"cuda": 0, "triton": 1, "cpu": 2}
    sections = []
    for family in families:
        mine = [(i, r) for i, r in enumerate(rows) if r["family"] == family]
        plain = [r for _, r in mine]
        impls = sorted({r["impl"] for r in plain}, key=lambda k: (ranks.get(k.split("_")[0], 3), k))
        colours = {
            impl: min(i, 4) + 1 for i, impl in enumerate(impls)
        }  # a plot's own: it has fewer kernels than there are colours
        shapes = {peer: i for i, peer in enumerate(dict.fromkeys(p for r in plain for p in r["peers"]))}
        plot = _plot(mine, new.get("roofs") or {}, colours, shapes)
        sections.append(
            f'<section id="{family}"><h2>{FAMILIES.get(family, family)}</h2>{_legend(plain, colours, shapes)}{plot}</section>'
        )
    compared = "" if old is None else _compared(rows, old["rows"], old_name)
    versions = ", ".join(f"{k} {v}" for k, v in (new.get("versions") or {}).items())
    choices = "".join(f"<option>{f}</option>" for f in families)
    data = json.dumps(rows).replace("<", "\\u003c")
    gpu = escape(str(new.get("gpu", "")))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>attnkit roofline: {gpu}</title><link rel="icon" href="data:,"><style>{(HERE / "report.css").read_text()}</style></head><body><main>
<header><div><h1>attnkit on {gpu}</h1><p class="sub">Every case beside the roof measured in the same run. {escape(versions)}</p></div>
<button id="theme" aria-label="light or dark">◐</button></header>
{_tiles(rows, families)}{compared}{"".join(sections)}
<section><h2>All rows</h2><div class="tools"><input id="find" placeholder="filter: B1 Hq32 cuda" aria-label="filter">
<select id="family" aria-label="family"><option value="">all families</option>{choices}</select></div>{_table(rows)}</section>
</main><div id="tip" role="tooltip"></div><script type="application/json" id="data">{data}</script>
<script>{(HERE / "report.js").read_text()}</script></body></html>
"""


def write(new: Path, old: Path | None, out: Path) -> None:
    """Raises BadFile for a file that perf/ did not write, OSError where ``out`` cannot be written."""
    before = None if old is None else load(old)
    out.write_text(page(load(new), before, "" if old is None else old.name), encoding="utf-8")
