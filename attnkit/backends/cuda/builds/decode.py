"""The decode kernels' builds: their macros, their shared memory, and those that are shipped."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.backends.cuda.images import Variant, variant

#: Type of a cache, as in csrc/cuda/common/convert.cuh.
BF16, F16, E4M3, INT8 = range(4)
SMEM = 227 * 1024  # bytes of shared memory a multiprocessor gives to blocks, each of which costs 1 KB more
MAX_STAGES = 16


@dataclass(frozen=True, slots=True)
class Build:
    """One build of csrc/cuda/decode/decode_sm90.cu (narrow) or decode_wide_sm90.cu: its macros and its shared memory.

    Mirrors DecodeShape and DecodeWideShape.
    """

    D: int
    Dv: int
    kv: int  # Type of the cache, as in convert.cuh
    NR: int  # narrow: 8-row groups a warp has; 0 in a wide build
    WR: int  # row groups of warps
    WT: int  # key groups of warps
    MT: int  # 16-key groups a warp has of a tile
    ctas_per_sm: int
    heads: int = 1  # KV heads that a tile holds
    cluster: int = 1  # CTAs that share a head and meet in shared memory
    charge: int = 0  # 1: work is divided with the cost of beginning and ending a short head counted in
    share: int = 0  # 1: several CTAs add up the pieces of a head

    @property
    def wide(self) -> bool:
        return self.NR == 0

    @property
    def item(self) -> int:
        return 1 if self.kv >= 2 else 2

    @property
    def rows(self) -> int:
        return 64 if self.wide else 8 * self.NR * self.WR

    @property
    def tile(self) -> int:
        return 64 if self.wide else 16 * self.WT * self.MT

    @property
    def consumer_warps(self) -> int:
        return 4 if self.wide else self.WR * self.WT

    @property
    def producer_warps(self) -> int:
        return 4 if self.ctas_per_sm == 1 and self.rows == 8 else 2

    @property
    def counter_words(self) -> int:
        """Counters of one slot: narrow builds' warps arrive each in a byte of their own."""
        return 1 if self.wide else -(-self.consumer_warps // 4)

    @property
    def threads(self) -> int:
        return 32 * (self.consumer_warps + self.producer_warps)

    @property
    def stage_bytes(self) -> int:
        return self.tile * self.heads * (self.D + self.Dv) * self.item

    @property
    def fixed_bytes(self) -> int:
        if self.wide:
            return self.rows * self.D * 2 + 512
        pitch = self.D * 2 + (16 if self.D // 8 % 2 == 0 else 0)
        return 512 + 2 * self.rows * pitch + self.WT * self.rows * 8 + self.inbox_bytes + 128 * self.share

    @property
    def inbox_bytes(self) -> int:
        """Where a CTA of a cluster gets the others' sums of its columns, and a (max, sum) a row."""
        if self.cluster == 1:
            return 0
        owners = max(n for n in (2, 4, 8, 16) if n <= self.cluster)
        return self.cluster * self.rows * (self.Dv // owners * 4 + 16)

    @property
    def stages(self) -> int:
        budget = SMEM // self.ctas_per_sm - 1024 * (self.ctas_per_sm - 1)
        return min(MAX_STAGES, (budget - self.fixed_bytes) // self.stage_bytes)

    @property
    def macros(self) -> dict[str, int]:
        names = (
            ("D", "DV", "KV") if self.wide else ("D", "DV", "KV", "NR", "WR", "WT", "MT", "HEADS", "CLUSTER", "CHARGE", "SHARE")
        )
        more = (self.heads, self.cluster, self.charge, self.share)
        values = (self.D, self.Dv, self.kv, self.NR, self.WR, self.WT, self.MT, *more)
        return {f"ATTNKIT_{n}": v for n, v in zip(names, values)} | {"ATTNKIT_CTAS": self.ctas_per_sm}

    @property
    def source(self) -> str:
        return "decode/decode_wide_sm90.cu" if self.wide else "decode/decode_sm90.cu"

    @property
    def variant(self) -> Variant:
        return variant(self.source, self.macros)

    @property
    def kernel(self) -> str:
        return "attnkit_paged_decode_wide" if self.wide else "attnkit_paged_decode"


def swizzle(row_bytes: int) -> int:
    """Bytes of a plane of a row in shared memory, as the kernels lay it out."""
    return 128 if row_bytes % 128 == 0 else 64 if row_bytes % 64 == 0 else 32


def build_for(
    D: int,
    Dv: int,
    kv: int,
    rows: int,
    G: int,
    ctas_per_sm: int,
    heads: int = 1,
    cluster: int = 1,
    charge: bool = False,
    share: bool = False,
) -> Build:
    """The build that serves ``rows`` = G x Q rows a KV head; with ``heads`` = 2 (for up to 8 rows) two heads at a time,
    or with a ``cluster`` of CTAs a head, or with a ``charge`` for short ones, or (also for 17 to 32 rows by one CTA a
    multiprocessor) so that several CTAs ``share`` the adding up of a head's pieces.

    A tile is some 32 KB of keys and values, whatever the row size: that is what keeps the loads long. The
    number of keys in it follows from the shape alone, so it does not change with the config (batch invariance).
    """
    if heads > 1:
        return Build(D, Dv, kv, 1, heads, 2, 2, ctas_per_sm, heads)
    item, both = 1 if kv >= 2 else 2, D + Dv
    takes_wide = item == 2 and D % 64 == 0 and Dv in (64, 128, 256) and G <= 64
    if takes_wide and (rows > 32 or (rows > 16 and both > 256)):
        return Build(D, Dv, kv, 0, 0, 0, 0, 2 if both <= 256 else 1)
    mt = 2 if both * item <= 256 else 1
    if rows <= 8:
        return Build(D, Dv, kv, 1, 1, 4, mt, ctas_per_sm if both <= 256 else 1, 1, cluster, int(charge), int(share))
    if both * item > 512 or (item == 1 and both > 256):
        return Build(D, Dv, kv, 1, 2, 2, 2, 1)
    if rows <= 16 or both > 256:
        return Build(D, Dv, kv, 2, 1, 4, mt, ctas_per_sm if both <= 256 else 1)
    if ctas_per_sm == 2:
        return Build(D, Dv, kv, 2, 2, 2, 2, 2)
    return Build(D, Dv, kv, 2, 2, 4, 1, 1, share=int(share))


def shipped() -> list[Build]:
    """What usual shapes are served by; everything else is compiled on first use."""
    shapes = [(128, BF16, rows) for rows in (8, 16, 32, 64)]
    shapes += [(64, BF16, 8), (256, BF16, 8), (128, F16, 8), (128, E4M3, 8), (128, INT8, 8)]
    builds = [build_for(D, D, kv, rows, 4, ctas) for D, kv, rows in shapes for ctas in (2, 1)]
    builds += [build_for(D, D, kv, 8, 4, 2, heads=2) for D, kv in ((64, BF16), (128, E4M3), (128, INT8))]
    clusters = ((4, 1), (8, 1), (16, 1), (2, 2), (3, 2), (4, 2), (6, 2), (8, 2), (12, 2))
    builds += [build_for(128, 128, kv, 8, 4, ctas, cluster=n) for kv in (BF16, F16) for n, ctas in clusters]
    builds += [build_for(128, 128, kv, 8, 4, 2, charge=True) for kv in (BF16, F16)]
    shares = ((BF16, 8, 2), (F16, 8, 2), (BF16, 32, 1))
    builds += [build_for(128, 128, kv, rows, 4, ctas, share=True) for kv, rows, ctas in shares]
    return list(dict.fromkeys(builds))
