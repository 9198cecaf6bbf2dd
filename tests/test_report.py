"""The HTML report, looked at in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from attnkit.roofline import Cost, Roof
from perf import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
ROOF = Roof(4.45e12, {"bf16": 790e12, "int8": 1480e12, "fp32": 50e12})


def row(family, case, impl, cost, us, **peers):
    pct = 100 * ROOF.seconds(cost) / (us * 1e-6)
    return {
        "family": family, "case": case, "impl": impl, "us": us, "spread": us / 100, "flops": cost.flops, "bytes": cost.bytes,
        "kind": cost.kind, "bound": ROOF.bound(cost), "roof_pct": pct, "err": 2e-3, "config": "", "origin": "default",
        "peers": peers, "tflops": cost.flops / us * 1e-6, "gbs": cost.bytes / us * 1e-3,
    }  # fmt: skip


def run(scale=1.0):
    rows = []
    for i, impl in enumerate(("cuda_sm90", "triton")):
        slow = (1 + 0.5 * i) * scale
        rows += [
            row("prefill", "B1-L8192-Hq32", impl, Cost(2.7e11, 1.6e8), 400 * slow, FA3=430.0, FlashInfer=500.0),
            row("prefill", "B16-L1024-Hq32", impl, Cost(6e10, 1.6e8), 120 * slow, FA3=150.0),
            row("decode", "B64-L4096-Hq32", impl, Cost(4e9, 1e9), 245 * slow, FA3=260.0),
            row("gemm", "M16-N28672-K4096", impl, Cost(3.7e9, 1.2e8, "int8"), 33 * slow, CUTLASS=45.0),
            row("sampling", "B128-V131072", impl, Cost(0, 6.7e7, "fp32"), 25 * slow, FlashInfer=250.0),
        ]
    return {"gpu": "nvidia-h200", "versions": {"torch": "2.11.0"}, "roofs": ROOF.as_json(), "rows": rows}


@pytest.fixture
def files(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    new.write_text(json.dumps(run()))
    old.write_text(json.dumps(run(1.2)))
    return new, old, tmp_path / "report.html"


def html(files):
    new, old, out = files
    report.write(new, old, out)
    return out.read_text()


# ---------------------------------------------------------------- the page's text


def test_every_case_is_a_dot_with_its_name_and_every_peer_a_mark(files):
    text = html(files)
    for r in run()["rows"]:
        assert f'aria-label="{r["case"]}: {r["impl"]}"' in text
        for peer in r["peers"]:
            assert f'aria-label="{r["case"]}: {peer}"' in text
    assert text.count('<svg class="plot"') == 4, "a plot a family"
    assert "bf16 790 TFLOP/s" in text and "reads 4.45 TB/s" in text


def test_the_page_fetches_nothing(files):
    text = html(files)
    assert not re.search(r"https?://|//cdn|@import|url\(|<link[^>]+stylesheet|<script[^>]+src|<img", text)


def test_names_are_escaped(tmp_path):
    data = run()
    data["rows"][0]["case"] = 'x</script><script>alert("1")</script>'
    text = report.page(data)
    assert "<script>alert" not in text


def test_a_family_without_products_is_plotted_by_its_traffic():
    text = report.page({**run(), "rows": [r for r in run()["rows"] if r["family"] == "sampling"]})
    assert "megabytes a call" in text and "NaN" not in text and "inf" not in text.split("<style>")[0]


def test_what_changed():
    new, old = run()["rows"], run(1.2)["rows"]
    extra = row("decode", "only-now", "triton", Cost(1e9, 1e9), 300.0)
    gone = row("decode", "only-before", "triton", Cost(1e9, 1e9), 300.0)
    both, added, missing = report.changes([*new, extra], [*old, gone])
    assert [r["case"] for r in added] == ["only-now"] and [r["case"] for r in missing] == ["only-before"]
    assert len(both) == len(new) and all(ratio == pytest.approx(1.2) for _, _, ratio in both)
    assert all(report.significant(*change) for change in both)
    assert not report.significant({"us": 100, "spread": 1}, {"us": 101, "spread": 1}, 1.01)
    assert not report.significant({"us": 100, "spread": 20}, {"us": 110, "spread": 20}, 1.1), "within its spread"
    text = report.page({**run(), "rows": new}, run(1.2), "old.json")
    assert "10 faster" in text and "0 slower" in text


def test_reads_a_receipt_with_the_required_keys_only(tmp_path):
    path = tmp_path / "receipt.json"
    keys = ("family", "case", "impl", "us", "tflops", "gbs", "roof_pct", "err", "peers")
    path.write_text(json.dumps({"gpu": "x", "roofs": ROOF.as_json(), "rows": [{k: r[k] for k in keys} for r in run()["rows"]]}))
    assert "B64-L4096-Hq32" in report.page(report.load(path))


def test_reads_pytest_benchmarks_json(tmp_path):
    path = tmp_path / "benchmark.json"
    first = run()["rows"][0]
    info = {k: v for k, v in first.items() if k not in ("family", "case", "impl")}
    entry = {"fullname": "perf/bench_prefill.py::test_prefill[cuda_sm90-B1-L8192-Hq32]", "param": "cuda_sm90-B1-L8192-Hq32"}
    path.write_text(json.dumps({"machine_info": {"node": "box"}, "benchmarks": [{**entry, "extra_info": info}]}))
    (read,) = report.load(path)["rows"]
    assert (read["family"], read["impl"], read["case"]) == ("prefill", "cuda_sm90", "B1-L8192-Hq32")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "holds no rows"),
        ('{"rows": []}', "holds no rows"),
        ('{"rows": [{"us": 1}]}', "a row lacks"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, says):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(report.BadFile, match=f"bad.json.*{says}"):
        report.load(path)


# ---------------------------------------------------------------- in the browser


def browse(tmp_path, page, *flags):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,2400", "--virtual-time-budget=3000", *flags, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def with_script(page, script):
    """A copy of the page that runs ``script`` once loaded and leaves its result (or error) in the title."""
    probe = page.with_name("probe.html")
    text = page.read_text()
    catch = "<script>window.onerror = (m) => { document.title = 'error: ' + m; };</script>"
    run = f"<script>window.onload = () => {{ document.title = JSON.stringify((() => {{ {script} }})()); }};</script>"
    probe.write_text(text.replace("</head>", catch + "</head>", 1).replace("</body>", run + "</body>", 1))
    return probe


def result(tmp_path, page, script):
    import html as entities

    dom = browse(tmp_path, with_script(page, script), "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    return json.loads(entities.unescape(title[1]))


@needs_browser
def test_screenshot(files, tmp_path):
    html(files)
    shot = tmp_path / "shot.png"
    browse(tmp_path, files[2], f"--screenshot={shot}")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed").open(shot).convert("RGB")
    assert image.size == (1200, 2400)
    colours = {colour: count for count, colour in image.getcolors(1 << 24)}
    assert colours.get((0x2A, 0x78, 0xD6), 0) > 100, "the first kernel's dots"
    assert colours.get((0xEB, 0x68, 0x34), 0) > 100, "the second kernel's dots"
    assert len(colours) > 200, "an empty page"


@needs_browser
def test_hover_names_the_case_and_lights_its_peers(files, tmp_path):
    html(files)
    found = result(
        tmp_path,
        files[2],
        """
        const mark = document.querySelector('#prefill .ours[data-case="B1-L8192-Hq32"]'), b = mark.getBoundingClientRect();
        const under = document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2);
        under.dispatchEvent(new MouseEvent("mousemove", {clientX: b.x, clientY: b.y, bubbles: true}));
        const tip = document.getElementById("tip"), box = tip.getBoundingClientRect();
        const on = [...document.querySelectorAll("#prefill .mark.on")].map((m) => m.dataset.peer || "ours");
        const shown = {text: tip.textContent, visible: getComputedStyle(tip).visibility, on, inside: box.x >= 0 && box.right <= innerWidth};
        under.dispatchEvent(new MouseEvent("mouseleave", {bubbles: true}));
        return {...shown, after: getComputedStyle(tip).visibility};
        """,
    )
    assert "B1-L8192-Hq32" in found["text"] and "TFLOP/s" in found["text"] and "FA3" in found["text"]
    assert found["visible"] == "visible" and found["inside"] and found["after"] == "hidden"
    assert sorted(found["on"]) == ["FA3", "FA3", "FlashInfer", "FlashInfer", "ours", "ours"]


@needs_browser
def test_table_sorts_and_filters(files, tmp_path):
    html(files)
    found = result(
        tmp_path,
        files[2],
        """
        const table = document.getElementById("all"), th = [...table.tHead.rows[0].cells].find((c) => c.textContent === "µs");
        const column = () => [...table.tBodies[0].rows].map((r) => +r.cells[th.cellIndex].dataset.v);
        th.click(); const up = column(); th.click(); const down = column();
        const find = document.getElementById("find");
        find.value = "m16 cuda"; find.dispatchEvent(new Event("input"));
        const left = [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[1].textContent);
        document.getElementById("theme").click();
        return {up, down, left, theme: document.documentElement.dataset.theme};
        """,
    )
    assert found["up"] == sorted(found["up"]) and found["down"] == sorted(found["up"], reverse=True)
    assert found["left"] == ["M16-N28672-K4096"] and found["theme"] == "dark"
