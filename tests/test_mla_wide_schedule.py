"""How the wide latent decode divides its work: the kernel's own walker, compiled for the host, a warp's lanes as threads."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from tests.test_decode_schedule import source

CXX = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")

SHIM = r"""
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
using std::max; using std::min;
using u32 = unsigned int; using u64 = unsigned long long; using i64 = long long;
#define ATTNKIT_DEVICE inline
struct Dim { unsigned x = 0; };
thread_local Dim threadIdx;
int lanes[32];
std::barrier<> meet(32);
template <class Pick> int trade(int mine, const Pick& pick) {
  lanes[threadIdx.x] = mine;
  meet.arrive_and_wait();
  const int got = pick();
  meet.arrive_and_wait();
  return got;
}
inline int __shfl_up_sync(unsigned, int v, int d) { return trade(v, [&] { return lanes[max(int(threadIdx.x) - d, 0)]; }); }
inline int __shfl_sync(unsigned, int v, int from) { return trade(v, [&] { return lanes[from & 31]; }); }
inline int __reduce_add_sync(unsigned, int v) { return trade(v, [] { int n = 0; for (int x : lanes) n += x; return n; }); }
inline int __reduce_max_sync(unsigned, int v) { return trade(v, [] { return *std::max_element(lanes, lanes + 32); }); }
inline unsigned __ballot_sync(unsigned, bool v) { return trade(v, [] { int n = 0; for (int i = 0; i < 32; ++i) n |= (lanes[i] != 0) << i; return n; }); }
inline bool __any_sync(unsigned, bool v) { return __ballot_sync(~0u, v) != 0; }
inline int __ffs(unsigned v) { return __builtin_ffs(v); }
inline float reciprocal(float x) { return 1.0f / x * (1.0f + ERROR * 0x1p-23f); }
inline int load_l2(const int* p) { return *p; }
"""

MAIN = r"""
// argv: groups least window Q capacity lens...
int main(int argc, char** argv) {
  std::vector<int> a;
  for (int i = 1; i < argc; ++i) a.push_back(atoi(argv[i]));
  std::vector<int> lens(a.begin() + 5, a.end());
  MlaWideParams p{};
  p.lens = lens.data();
  p.B = lens.size(); p.groups = a[0]; p.least_tiles = a[1]; p.window = a[2]; p.Q = a[3]; p.capacity = a[4];
  std::vector<std::thread> warp;
  for (int lane = 0; lane < 32; ++lane) warp.emplace_back([&p, lane] {
    threadIdx.x = lane;
    for (int group = 0; group < p.groups; ++group) {
      MlaWalker walker(p, group);
      walker.place();
      MlaPiece x;
      while (walker.next(x)) if (lane == 31) printf("%d %d %d %d %d %d %d %d %d %d\n", group, x.b, x.length, x.low, x.tile, x.tiles, x.index, x.count, x.first, x.early);
    }
  });
  for (std::thread& lane : warp) lane.join();
}
"""

SHORT = r"""
// argv: groups window Q capacity lens...
int main(int argc, char** argv) {
  std::vector<int> a;
  for (int i = 1; i < argc; ++i) a.push_back(atoi(argv[i]));
  std::vector<int> lens(a.begin() + 4, a.end());
  MlaWideParams p{};
  p.lens = lens.data();
  p.B = lens.size(); p.groups = a[0]; p.window = a[1]; p.Q = a[2]; p.capacity = a[3];
  std::vector<std::thread> warp;
  for (int lane = 0; lane < 32; ++lane) warp.emplace_back([&p, lane] {
    threadIdx.x = lane;
    for (int group = 0; group < p.groups; ++group) {
      MlaShortPiece x;
      const bool found = x.find(p, group);
      if (p.B > 1 && p.B <= 32 && x.stale(p)) abort();
      if (!found) continue;
      if (lane == 31) printf("%d %d %d %d %d %d %d %d %d\n", group, x.b, x.length, x.low, x.tile, x.tiles, x.index, x.count, x.first);
    }
  });
  for (std::thread& lane : warp) lane.join();
}
"""

DIVISIONS = r"""
int main() {
  int n, d;
  while (scanf("%d %d", &n, &d) == 2) printf("%d\n", mla_divide(n, d));
}
"""


def build(folder, main: str, error: int = 0):
    headers = [source(f"mla/mla_{name}_schedule.cuh") for name in ("wide", "short")]
    (folder / "main.cpp").write_text("\n".join([SHIM, *headers, "using namespace attnkit;", main]))
    command = [CXX, "-std=c++20", "-O1", "-pthread", f"-DERROR={error}", "-o", str(folder / "main"), str(folder / "main.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "main"


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    return build(tmp_path_factory.mktemp("walker"), MAIN)


def pieces(walker, lens, groups=66, least=1, window=0, Q=1, capacity=1 << 20):
    arguments = [groups, least, window, Q, capacity, *lens]
    done = subprocess.run([walker, *map(str, arguments)], capture_output=True, text=True, check=True)
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


def tiles_of(length, window, Q, capacity):
    length = min(max(length, 0), capacity)
    low = max(0, length - Q - window + 1) if window else 0
    return low // 64, max(1, -(-length // 64) - low // 64)


LENS = {
    "one": [8192], "empty": [0], "edges": [1, 63, 64, 65, 0, 4096], "skew": [65536, *[700] * 30], "equal": [4096] * 16,
    "pairs": [4096] * 32, "odd pairs": [4030] * 32, "many": [17] * 150, "ragged": [int(x) for x in np.random.default_rng(0).integers(0, 9000, 40)],
}  # fmt: skip


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
@pytest.mark.parametrize("options", [{}, {"groups": 7}, {"least": 4}, {"window": 100, "Q": 4}, {"capacity": 1024}], ids=str)
def test_every_tile_has_one_owner(walker, lens, options):
    whole: dict[int, list] = {}
    for order, (group, b, length, low, tile, tiles, index, count, first, early) in enumerate(pieces(walker, lens, **options)):
        whole.setdefault(b, []).append((index, group, tile, tiles, count, first, early, length, low, order))
    assert set(whole) == set(range(len(lens)))
    for b, parts in whole.items():
        parts.sort()
        at, total = tiles_of(lens[b], options.get("window", 0), options.get("Q", 1), options.get("capacity", 1 << 20))
        assert [p[0] for p in parts] == list(range(parts[0][4]))
        assert len({p[4:9] for p in parts}) == 1  # all agree on how many meet, and where
        end = at + total
        for index, group, tile, tiles, _, first, *_ in parts:
            assert tile == at and tiles > 0 and (len(parts) == 1 or group == first + index)
            at += tiles
        assert at == end


def test_who_waits_has_nothing_else_to_do(walker):
    """A group goes through its share backwards: what it cuts off a sequence's end comes first, and is told by ``early``."""
    found = pieces(walker, LENS["ragged"])
    for i, (group, *_, index, count, first, early) in enumerate(found):
        more = i + 1 < len(found) and found[i + 1][0] == group
        if count > 1:
            assert more == (index == 0 and early == 1)
            assert group == first + index


@pytest.mark.parametrize("error", [-1, 0, 1])
def test_divisions_are_exact(tmp_path, error):
    """With a reciprocal that is one unit off."""
    rng = np.random.default_rng(2)
    d = np.concatenate([rng.integers(1, 1 << k, 500) for k in range(1, 31)])
    n = np.concatenate([rng.integers(0, 1 << k, 500) for k in rng.permutation(np.arange(1, 31))])
    near = np.minimum(d * rng.integers(1, 1000, d.size), (1 << 31) - 2)  # a multiple, or one less
    n = np.where(np.arange(n.size) % 3 == 0, near - rng.integers(0, 2, n.size), n)
    sent = "\n".join(f"{a} {b}" for a, b in zip(n, d, strict=True))
    program = build(tmp_path, DIVISIONS, error)
    done = subprocess.run([program], input=sent, capture_output=True, text=True, check=True)
    assert np.array_equal(np.array(done.stdout.split(), dtype=np.int64), n // d)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return build(tmp_path_factory.mktemp("short"), SHORT)


FEW = {
    "one": [8192], "half": [4224], "more": [4225], "empty": [0], "edges": [1, 63, 64, 65, 0, 2000], "equal": [1024] * 8,
    "many": [64, 0, 128, 1, 65] * 11, "all": [64] * 66, "pairs": [128] * 66,
}  # fmt: skip


@pytest.mark.parametrize("lens", FEW.values(), ids=FEW.keys())
@pytest.mark.parametrize("options", [{}, {"window": 100, "Q": 4}, {"capacity": 1024}], ids=str)
def test_short_pieces_have_two_tiles_at_most(short, lens, options):
    window, Q, capacity = (options.get(name, other) for name, other in (("window", 0), ("Q", 1), ("capacity", 1 << 20)))
    done = subprocess.run([short, *map(str, (66, window, Q, capacity, *lens))], capture_output=True, text=True, check=True)
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    for b, length in enumerate(lens):
        at, total = tiles_of(length, window, Q, capacity)
        end, mine = at + total, [x for x in found if x[1] == b]
        for i, (group, _, of, _, tile, tiles, index, count, first) in enumerate(mine):
            assert (tile, index, count, first) == (at, i, len(mine), group - i) and 0 < tiles <= 2
            assert of == min(length, capacity)
            at += tiles
        assert at == end
