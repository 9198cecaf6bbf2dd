"""perf.turns: two checkouts in turn, each in a process of its own."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from perf import turns


def asked(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What a checkout's process answers."""
    out = io.StringIO()
    turns.serve(io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_case_is_opened_timed_and_closed():
    case = {"do": "open", "family": "cache", "case": "write-T64-Hkv8-D128-S16-bf16", "impl": "torch"}
    if turns.Server().device.type == "cuda":
        pytest.skip("the same by graphs: of the perf suite")
    opened, first, second, closed, again = asked(case, {"do": "time"}, {"do": "time"}, {"do": "close"}, case)
    assert opened["kernel"] == "torch" and first["us"] > 0 and second["us"] > 0 and closed == {}
    assert opened["digest"] == again["digest"]


def test_what_cannot_be_served_is_said():
    none = {"do": "open", "family": "cache", "case": "none", "impl": None}
    assert asked(none, {"do": "sing"}) == [
        {"failed": "has no such case"},
        {"failed": "'Server' object has no attribute 'sing'"},
    ]


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({"digest": "x", "elements": None}, {"digest": "x", "elements": None}, "same bits"),
        ({"digest": "x", "elements": None}, {"digest": "y", "elements": None}, "other bits"),
        ({"digest": "x", "elements": [1, 2, 3]}, {"digest": "y", "elements": [1, 5, 3]}, "1 of 3 differ"),
        ({"digest": "x", "elements": [1, 2, 3]}, {"digest": "y", "elements": [1, 2]}, "other bits"),
    ],
)
def test_how_results_differ(a, b, said):
    assert turns._difference(a, b) == said


@pytest.mark.slow
def test_a_checkout_beside_itself(capsys):
    """Two processes; what is asked of one does not reach the other."""
    turns.main([str(turns.ROOT), "--family", "cache", "--match", "^write-T64-", "--rounds", "3", "--impl", "torch"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert "ratio" in head and len(rows) == len(list(turns.chosen(["cache"], "^write-T64-")))
    assert all("same bits" in row for row in rows)


@pytest.mark.slow
def test_several_checkouts(capsys, tmp_path):
    here = str(turns.ROOT)
    with pytest.raises(SystemExit, match="is no checkout"):
        turns.main([here, str(tmp_path), "--family", "cache", "--match", "^write-T64-"])
    turns.main([here, here + "/.", "--family", "cache", "--match", "^write-T64-", "--rounds", "3", "--impl", "torch"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.count("ratio") == 2 and rows and all(row.count("same bits") == 2 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["/nowhere", "--family", "cache"], "is no checkout"), ([".", "--match", "no such case"], "no case of")],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(SystemExit, match=said):
        turns.main(arguments)
