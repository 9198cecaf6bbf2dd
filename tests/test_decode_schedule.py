"""How the CUDA decode kernel divides its work: the kernel's own Walker, compiled for the host."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attnkit.backends.cuda import images
from attnkit.configs import decode_cuda

CXX = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")

SHIM = r"""
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>
using std::max; using std::min;
using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned int; using u64 = unsigned long long; using i64 = long long;
#define ATTNKIT_DEVICE inline
struct Dim { unsigned x = 0; } threadIdx, blockIdx, gridDim;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float negative_infinity() { return -INFINITY; }
inline float exp2_fast(float x) { return exp2f(x); }
inline int __shfl_up_sync(unsigned, int v, int) { return v; }
inline int __shfl_sync(unsigned, int v, int) { return v; }
inline unsigned __ballot_sync(unsigned, bool) { return 0; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline void __syncthreads() {}
inline int load_l2(const int* p) { return *p; }
"""

MAIN = r"""
// argv: ctas least invariant chunk_least chunk_most heads blocks window Q capacity lens...
int main(int argc, char** argv) {
  std::vector<int> a;
  for (int i = 1; i < argc; ++i) a.push_back(atoi(argv[i]));
  std::vector<int> lens(a.begin() + 10, a.end());
  DecodeParams p{};
  p.lens = lens.data();
  p.B = lens.size(); p.Hkv = a[5]; p.row_blocks = a[6]; p.window = a[7]; p.Q = a[8]; p.capacity = a[9];
  p.least_tiles = a[1]; p.invariant = a[2]; p.chunk_least = a[3]; p.chunk_most = a[4];
  gridDim.x = a[0];
  for (unsigned c = 0; c < gridDim.x; ++c) {
    blockIdx.x = c;
    Walker<64, CLUSTER, CHARGE> w(p);
    Piece x;
#if CLUSTER == 1
    int total = 0;
    for (int b = 0; b < p.B; ++b) { w.measure(p, b, w.length, w.low, w.tiles); total += w.units(w.tiles) * w.heads(); }
    w.take_share(total);
    w.start = 0;
    for (w.b = 0; w.b < p.B; ++w.b) {
      w.measure(p, w.b, w.length, w.low, w.tiles);
      if (w.position < w.start + w.units(w.tiles) * w.heads()) break;
      w.start += w.units(w.tiles) * w.heads();
    }
#else
    w.place_few();
#endif
    while (w.next(x)) {
      printf("%u %d %d %d %d %d %d %d", c, x.b, x.h, x.block, x.tile, x.tiles, x.index, x.count);
      for (int i = 0; i < x.count; ++i) printf(" %d", x.slot(i));
      printf("\n");
    }
  }
}
"""


def source(name: str) -> str:
    text = (images.source_dir() / name).read_text()
    return re.sub(r"^#(include|pragma).*$", "", text, flags=re.MULTILINE)


def build(folder, *parts: str, macros=()):
    (folder / "main.cpp").write_text("\n".join(parts))
    done = subprocess.run(
        [CXX, "-std=c++17", "-O1", *macros, "-o", str(folder / "main"), str(folder / "main.cpp")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "main"


def walker_of(factory, cluster, charge):
    parts = SHIM, source("decode/decode_schedule.cuh"), "using namespace attnkit;", MAIN
    return build(factory.mktemp("walker"), *parts, macros=(f"-DCLUSTER={cluster}", f"-DCHARGE={charge}"))


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    return walker_of(tmp_path_factory, 1, 0)


@pytest.fixture(scope="module")
def charging(tmp_path_factory):
    return walker_of(tmp_path_factory, 1, 1)


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    return walker_of(tmp_path_factory, 8, 0)


def pieces(walker, lens, *, ctas=264, least=1, invariant=0, chunk=(8, 64), heads=8, blocks=1, window=0, Q=1, capacity=1 << 20):
    arguments = [ctas, least, invariant, *chunk, heads, blocks, window, Q, capacity, *lens]
    done = subprocess.run([walker, *map(str, arguments)], capture_output=True, text=True, check=True)
    return [[int(x) for x in line.split()] for line in done.stdout.splitlines()]


def tiles_of(length, window=0, Q=1, capacity=1 << 20):
    length = min(length, capacity)
    low = max(0, length - Q - window + 1) if window else 0
    return low // 64, max(1, -(-length // 64) - low // 64)


LENS = {
    "one": [1024], "empty": [0], "edges": [1, 63, 64, 65, 0, 4096], "skew": [65536, *[700] * 63], "many": [17] * 2000,
    "ragged": [int(x) for x in np.random.default_rng(0).integers(0, 9000, 40)], "past the table": [500, 5000],
}  # fmt: skip


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
@pytest.mark.parametrize(
    "options", [{}, {"ctas": 7}, {"least": 4}, {"heads": 3, "blocks": 2}, {"window": 100, "Q": 4}, {"invariant": 1}], ids=str
)
def test_every_tile_has_one_owner(walker, lens, options):
    check_owners(walker, lens, options)


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
@pytest.mark.parametrize(
    "options", [{}, {"ctas": 7}, {"least": 4}, {"heads": 3, "blocks": 2}, {"window": 100, "Q": 4}], ids=str
)
def test_every_tile_has_one_owner_where_pieces_are_charged_for(charging, lens, options):
    check_owners(charging, lens, options)


@pytest.mark.parametrize("lens", [[1], [0, 5000], [64, 512, 513, 100000]], ids=str)
@pytest.mark.parametrize("options", [{}, {"heads": 3, "blocks": 2}, {"window": 100, "Q": 4}], ids=str)
def test_every_tile_has_one_owner_in_a_cluster(clusters, lens, options):
    heads, blocks = options.get("heads", 8), options.get("blocks", 1)
    found = check_owners(clusters, lens, {**options, "ctas": 8 * len(lens) * heads * blocks})
    assert all(cta // 8 == (b * heads + h) * blocks + block and cta % 8 == index for cta, b, h, block, _, _, index, *_ in found)


def check_owners(walker, lens, options):
    capacity = 1024 if lens == LENS["past the table"] else 1 << 20
    found = pieces(walker, lens, capacity=capacity, **options)
    heads, blocks = options.get("heads", 8), options.get("blocks", 1)
    whole = {}
    for cta, b, h, block, tile, tiles, index, count, *slots in found:
        whole.setdefault((b, h, block), []).append((index, count, tile, tiles, cta, tuple(slots)))
    assert set(whole) == set(itertools.product(range(len(lens)), range(heads), range(blocks)))
    for (b, _, _), parts in whole.items():
        parts.sort()
        first, total = tiles_of(lens[b], options.get("window", 0), options.get("Q", 1), capacity)
        assert [p[0] for p in parts] == list(range(len(parts))) and {p[1] for p in parts} == {len(parts)}
        assert len({p[5] for p in parts}) == 1  # all agree where the partials lie
        at = first
        for _, _, tile, tiles, _, _ in parts:
            assert tile == at and tiles > 0
            at += tiles
        assert at == first + total
    return found


@pytest.mark.parametrize("invariant", [0, 1])
def test_no_two_pieces_share_a_slot_and_all_fit(walker, invariant):
    ctas, lens = 37, [9000, 3, 700, 64, 20000]
    found = [p for p in pieces(walker, lens, ctas=ctas, invariant=invariant, chunk=(8, 16)) if p[7] > 1]
    own = [p[8 + p[6]] for p in found]
    assert len(set(own)) == len(own)
    assert max(own) < (len(lens) * 8 * 16 if invariant else 2 * ctas + 2)


def test_slots_of_charged_pieces(charging):
    ctas, lens = 37, [9000, 3, 700, 64, 20000]
    found = [p for p in pieces(charging, lens, ctas=ctas) if p[7] > 1]
    own = [p[8 + p[6]] for p in found]
    assert len(set(own)) == len(own) and max(own) < 2 * ctas + 2


def test_who_has_several_short_heads_has_fewer_tiles(charging, walker):
    most = {}
    for name, way in (("charged", charging), ("plain", walker)):
        load, short = [0] * 264, [0] * 264
        for cta, b, _, _, _, tiles, *_ in pieces(way, LENS["skew"]):
            load[cta] += tiles
            short[cta] += b > 0
        most[name] = max(n for n, s in zip(load, short) if s >= 5)
    assert most["charged"] < most["plain"]


@pytest.mark.parametrize("lens", [LENS["skew"], LENS["ragged"], [2048] * 16])
def test_shares_differ_by_one_tile_at_most(walker, lens):
    load = [0] * 264
    for cta, *_, tiles, _, _ in (p[:8] for p in pieces(walker, lens)):
        load[cta] += tiles
    assert max(load) - min(load) <= 1


@pytest.mark.parametrize("rows", [1, 4, 8, 12, 16, 24, 32, 48])
def test_invariant_builds_do_not_depend_on_the_batch(rows):
    """Whatever config a batch gets, the same warps take the same keys."""
    for D, kv in itertools.product((64, 128, 256), (torch.bfloat16, torch.int8)):
        builds = set()
        for B, W in itertools.product((1, 4, 33, 100, 500), (4, 64, 4096)):
            sig = SimpleNamespace(B=B, Hkv=2, G=rows, Q=1, D=D, Dv=D, W=W, S=16, kv_dtype=kv, batch_invariant=True,
                                  k_stride=(0, 0, D, 1), v_stride=(0, 0, D, 1))  # fmt: skip
            build = decode_cuda.build_of(sig, decode_cuda.default(sig, SimpleNamespace(sms=132)))
            builds.add((build.NR, build.WR, build.WT, build.MT, build.heads))
        assert len(builds) == 1


def test_invariant_cuts_do_not_depend_on_the_batch(walker):
    """And the default's do: the control that shows this test can fail."""

    def cuts(lens, b, invariant):
        return sorted((p[2], p[4], p[5]) for p in pieces(walker, lens, invariant=invariant) if p[1] == b)

    crowd = [1, 5000, 777, 3000, 0, 12345]
    assert cuts(crowd, 3, 1) == cuts([3000], 0, 1)
    assert cuts(crowd, 3, 0) != cuts([3000], 0, 0)
