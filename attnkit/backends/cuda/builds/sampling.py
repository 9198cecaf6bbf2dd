"""The sampling kernels' builds: macros and shared memory."""

from __future__ import annotations

from collections.abc import Collection

from attnkit.backends.cuda.images import Variant, variant

#: Types of logits, as in csrc/cuda/common/convert.cuh.
BF16, F16, F32 = 0, 1, 4
THREADS = 256
TILE = 4 * THREADS
#: Tokens that a warp takes at a time where the logits are read once, of which groups of 16 have a peak.
BLOCK = 2048
GROUP = 16
#: CTAs of the kernels that read the logits once that share a multiprocessor; those of the first of two launches with penalties.
STREAM_CTAS = 2
REWRITE_THREADS, REWRITE_CTAS = 64, 12
TOPK_THREADS = 512
#: What the first of two launches leaves of a block: peaks of groups (16-bit, float32), then those of chunks, and masses.
#: Mirrors struct Left in csrc/cuda/sampling/sample_peaks_sm90.cuh.
LEFT_BYTES, LEFT_MORE = (256, 512), 1024 + 32
#: Threads of the kernels that read counts, one CTA a multiprocessor; pieces that each warp has on their way, and
#: CountedSlot::kBytes in csrc/cuda/sampling/sample_counted_sm90.cuh, of 16-bit and of float32 logits, less what a bias takes.
COUNTED_THREADS, COUNTED_SLOTS, COUNTED_BYTES, COUNTED_BIAS = 512, 2, (4096, 5120), 2048
#: sizeof(LongRow::Shared) in csrc/cuda/sampling/sample_long_sm90.cuh, the longest top-k whose tokens it lists, and how many it
#: lists: 8 bytes a group follow, in whose place 4 bytes a listed token will be. With penalties it is less than what brings the
#: row, and a group has 4 bytes.
LONG_BYTES, MOST_LONG, MOST_LISTED_LONG = 101280, 4096, 8192
#: Threads of the ring and the flow kernel, sizeof(RingShared) and sizeof(FlowShared) in csrc/cuda/sampling, and sizeof(LeadRow)
#: in sample_lead_sm90.cuh there.
LEAD_THREADS, RING_BYTES, FLOW_BYTES, LEAD_ROW_BYTES = 512, 70912, 128, 128
#: More than half of a multiprocessor's shared memory: were there room for two, some would get two CTAs of the next grid and
#: others none.
LEAD_ALONE = 116 * 1024
#: Blocks of a multiprocessor at the least, CTAs that share a row and rows of a CTA at the most.
LEAD_BLOCKS, LEAD_PARTS, LEAD_ROWS = 12, 5, 1024
#: CTAs that share a row at the most, with penalties.
CHANGED_PARTS = 8
#: CTAs that share a row under top-p alone at the most. More share each of so few rows: one in each cluster of multiprocessors.
MOST_PARTS = 8
LARGE_PARTS, LARGE_CLUSTERS = 12, 7
#: Up to how many blocks, 16-bit and float32, two launches are sooner than one, of rows of so many bytes and more; up to how
#: many rows of top-p with min-p; fewer than how many rows with penalties, and at odd addresses.
FEW_BLOCKS, FEW_WEIGHED, FEW_BYTES = (512, 1024), 36, 192 * 1024
FEW_COUNTED, FEW_ODD = 40, 100
#: Threads of the kernel for top-p alone, which has a multiprocessor to itself; sizeof(ArriveShared) in
#: csrc/cuda/sampling/sample_held_sm90.cuh and its bins; 10 bytes a group follow, so many in whole blocks.
ARRIVE_THREADS, ARRIVE_BYTES = 512, 8064 + 4 * 14336
MOST_LOCAL = (227 * 1024 - ARRIVE_BYTES) // (10 * BLOCK // GROUP) * (BLOCK // GROUP)
#: Threads of the kernel for bf16 rows by value, kTallyBytes in csrc/cuda/sampling/sample_tally_row_sm90.cuh, bytes of a slot
#: there, slots of a row at the most and slots that there are at the least.
TALLY_THREADS, TALLY_BYTES, SLOT_BYTES, MOST_SLOTS, LEAST_SLOTS = 1024, 27648, 8192, 64, 8
#: How many rows make that kernel the sooner.
LEAST_TALLIED = 24
#: sizeof(FilterShared) in csrc/cuda/sampling/sample_filter_sm90.cuh; the slice of the row follows it.
FIXED_BYTES = 6992
#: What CTA 0 sorts its candidates in, in place of its slice.
SORT_BYTES = 512 * 16
MOST_CLUSTER = 16
#: Up to how many of the highest logits the kernels find by ranks: log-probabilities, and short top-k.
MOST_LISTED = 128
#: Of a slice, if three CTAs are to share a multiprocessor.
SLICE_TILES = 16
MOST_SLICE_TILES = (227 * 1024 - FIXED_BYTES) // (4 * TILE)


def draw(kind: int, penalised: bool, greedy: bool) -> Variant:
    """csrc/cuda/sampling/sample_draw_sm90.cu: greedy and plain temperature."""
    values = {"TYPE": kind, "PENALISED": int(penalised), "GREEDY": int(greedy), "CTAS": STREAM_CTAS}
    return variant("sampling/sample_draw_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def ring() -> Variant:
    """csrc/cuda/sampling/sample_ring_sm90.cu: greedy and plain temperature of many rows, one CTA a multiprocessor."""
    return variant("sampling/sample_ring_sm90.cu", {})


def flow(kind: int) -> Variant:
    """csrc/cuda/sampling/sample_flow_sm90.cu: the same of 16-bit logits."""
    return variant("sampling/sample_flow_sm90.cu", {"ATTNKIT_TYPE": kind})


def fits_lead(B: int, V: int, sms: int) -> bool:
    """Whether those two are the sooner: enough blocks, few CTAs that share a row, and few rows of a CTA. Ids have 20 bits where
    CTAs meet."""
    few = LEAD_PARTS * B >= sms and B <= LEAD_ROWS * sms
    return few and V <= 1 << 20 and B * -(-V // BLOCK) >= LEAD_BLOCKS * sms


def lead_ctas(B: int, V: int, sms: int) -> int:
    """CTAs that blocks are dealt out to: one a multiprocessor, or a few less where then none has parts of two rows and no warp
    more blocks for it. More rows than multiprocessors: greedy choices are slower so."""
    few, warps, work = sms // B * B, LEAD_THREADS // 32, B * -(-V // BLOCK)
    return few if 16 * few >= 15 * sms and -(-work // (warps * few)) == -(-work // (warps * sms)) else sms


def lead_bytes(kind: int, B: int, V: int, ctas: int) -> int:
    """Shared memory of the CTA with the most rows."""
    return max((RING_BYTES if kind == F32 else FLOW_BYTES) + LEAD_ROW_BYTES * lead_rows(B, V, ctas), LEAD_ALONE)


def lead_rows(B: int, V: int, ctas: int) -> int:
    """Rows that a CTA has blocks of at the most."""
    blocks = -(-V // BLOCK)
    return min(B, -(-B * blocks // ctas) // blocks + 2)


def changed(kind: int) -> Variant:
    """csrc/cuda/sampling/sample_changed_sm90.cu: the same with penalties, bias or a mask."""
    return variant("sampling/sample_changed_sm90.cu", {"ATTNKIT_TYPE": kind})


def fits_changed(kind: int, B: int, V: int, sms: int) -> bool:
    """Whether each CTA has a block, and room for its rows. Ids have 20 bits where CTAs meet."""
    ctas = changed_ctas(B, V, sms)
    return V <= 1 << 20 and B * -(-V // BLOCK) >= ctas and changed_bytes(kind, B, V, ctas) <= 227 * 1024


def changed_ctas(B: int, V: int, sms: int) -> int:
    """CTAs that blocks are dealt out to: of few rows not so many that they wait for one another where they meet."""
    return min(lead_ctas(B, V, sms), CHANGED_PARTS * B)


def changed_bytes(kind: int, B: int, V: int, ctas: int) -> int:
    """Shared memory of the CTA with the most rows."""
    return counted_bytes(kind, True) + FLOW_BYTES + LEAD_ROW_BYTES * lead_rows(B, V, ctas)


def peaks(kind: int, penalised: bool) -> Variant:
    """csrc/cuda/sampling/sample_peaks_sm90.cu: the first of two launches, which leaves peaks and, with penalties, logits."""
    values = {"TYPE": kind, "PENALISED": int(penalised), "CTAS": REWRITE_CTAS if penalised else STREAM_CTAS}
    return variant("sampling/sample_peaks_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def peaks_ctas(penalised: bool, B: int, V: int, ctas: int) -> int:
    """With penalties a warp has a piece of 512 tokens, else blocks are dealt out to ``ctas``."""
    return B * -(-V // BLOCK) * 4 * 32 // REWRITE_THREADS if penalised else ctas


def left_bytes(kind: int, penalised: bool, B: int, V: int) -> tuple[int, int]:
    """(What it leaves, where logits begin in that.)"""
    blocks = B * -(-V // BLOCK)
    logits = blocks * (LEFT_BYTES[kind == F32 or penalised] + LEFT_MORE)
    return logits + penalised * blocks * BLOCK * 4, logits


def counted_bytes(kind: int, biased: bool) -> int:
    """What a CTA's warps have on their way with penalties."""
    return COUNTED_THREADS // 32 * COUNTED_SLOTS * (COUNTED_BYTES[kind == F32] + biased * COUNTED_BIAS)


def once(kind: int, penalised: bool, given: bool = False) -> Variant:
    """csrc/cuda/sampling/sample_once_sm90.cu: top-k and min-p, a multiprocessor a row; ``given``: the second of two."""
    values = {"TYPE": kind, "PENALISED": int(penalised), "GIVEN": int(given)}
    return variant("sampling/sample_once_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def holds_at_once(V: int) -> bool:
    """Whether that one holds a row's groups, and numbers of chunks of four have 16 bits."""
    return groups(V) <= MOST_LOCAL and V <= 1 << 18


def few_at_once(kind: int, penalised: bool, B: int, V: int, weighed: bool = False) -> bool:
    """Whether rows are so few that two launches are the sooner, the first of which all multiprocessors share. ``weighed``:
    top-p without top-k."""
    if penalised:
        return (FEW_COUNTED if V % 4 == 0 else FEW_ODD) > B
    few = FEW_WEIGHED >= B if weighed else B * -(-V // BLOCK) <= FEW_BLOCKS[kind == F32]
    return few and (4 if kind == F32 else 2) * V >= FEW_BYTES


def at_once_bytes(kind: int, penalised: bool, V: int) -> int:
    """Shared memory: what a row by arrival takes, or one of a longer top-k, or what brings its peaks; a short one less."""
    first, each = (counted_bytes(kind, False), 4) if penalised else (LONG_BYTES, 8)
    return max(arrive_bytes(V, 1), first + max(each * groups(V), 4 * MOST_LISTED_LONG), LEAD_ALONE)


def top_p(kind: int, penalised: bool) -> Variant:
    """csrc/cuda/sampling/sample_arrive_sm90.cu: top-p without top-k and min-p."""
    return variant("sampling/sample_arrive_sm90.cu", {"ATTNKIT_TYPE": kind, "ATTNKIT_PENALISED": int(penalised)})


def fits_by_arrival(V: int) -> bool:
    """Whether a cluster holds a row's groups, whose numbers have 16 bits."""
    return groups(V) < min(1 << 16, MOST_PARTS * MOST_LOCAL)


def groups(V: int) -> int:
    """Groups of a row: whole blocks of them."""
    return -(-V // BLOCK) * (BLOCK // GROUP)


def arrive_parts(kind: int, masks: Collection[str], B: int, V: int, sms: int) -> int:
    """CTAs that share a row of the kernel for top-p alone: as many as find room at the same time for all rows (clusters of more
    than two do not fit everywhere), and with penalties so many that each has room for copies."""
    fitting = (n for n in range(MOST_PARTS, 1, -1) if n * B <= sms * (1.0 if n == 2 else 0.84))
    least = -(-groups(V) // MOST_LOCAL)
    if masks and "logit_bias" not in masks:
        least = next(n for n in range(least, MOST_PARTS + 1) if arrive_slot(kind, masks, V, n) or n == MOST_PARTS)
    most = LARGE_PARTS if LARGE_CLUSTERS >= B else next(fitting, 1)
    return min(max(most, least), -(-V // BLOCK))


def arrive_bytes(V: int, parts: int, slot: int = 0) -> int:
    """Shared memory of the CTA with the most blocks, whose warps have ``slot`` bytes each for what they copy."""
    blocks = -(-groups(V) // (BLOCK // GROUP) // parts)
    return ARRIVE_BYTES + 10 * (BLOCK // GROUP) * blocks + ARRIVE_THREADS // 32 * slot


def arrive_slot(kind: int, masks: Collection[str], V: int, parts: int) -> int:
    """Bytes of a piece with penalties in shared memory; 0: it comes through registers, as there is no room or it has a bias.
    The prompt and the mask are last in CountedSlot of csrc/cuda/sampling/sample_counted_sm90.cuh."""
    if not masks or "logit_bias" in masks:
        return 0
    absent = 0 if "allowed" in masks else 1 if "prompt_mask" in masks else 2
    slot = COUNTED_BYTES[kind == F32] - 512 * absent
    return slot if arrive_bytes(V, parts, slot) <= 227 * 1024 else 0


def tally(lists: bool) -> Variant:
    """csrc/cuda/sampling/sample_tally_sm90.cu: the same of bf16 logits, a multiprocessor a row; ``lists``: with min-p too."""
    return variant("sampling/sample_tally_sm90.cu", {"ATTNKIT_LISTS": int(lists)})


def fits_tally(B: int, V: int) -> bool:
    """Whether that one is the sooner: not too few rows, in whole 16 bytes, that arrival holds if one is left open."""
    return B >= LEAST_TALLIED and V % 8 == 0 and groups(V) <= MOST_LOCAL and 2 * V <= SLOT_BYTES * MOST_SLOTS


def tally_slots(V: int) -> int:
    """Slots in shared memory: a row's, as far as there is room."""
    wanted = max(-(-2 * V // SLOT_BYTES), LEAST_SLOTS)
    return min(wanted, (227 * 1024 - TALLY_BYTES - 2 * groups(V)) // SLOT_BYTES)


def tally_bytes(V: int) -> int:
    return max(TALLY_BYTES + 2 * groups(V) + SLOT_BYTES * tally_slots(V), arrive_bytes(V, 1), LEAD_ALONE)


def filters(kind: int, ctas: int) -> Variant:
    """csrc/cuda/sampling/sample_filter_sm90.cu: any top-k, top-p and min-p of rows that no other kernel takes."""
    values = {"TYPE": kind, "CTAS": ctas}
    return variant("sampling/sample_filter_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def logprobs(kind: int, ctas: int) -> Variant:
    """csrc/cuda/sampling/sample_logprobs_sm90.cu."""
    values = {"TYPE": kind, "CTAS": ctas}
    return variant("sampling/sample_logprobs_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def cluster(V: int) -> tuple[int, int]:
    """(CTAs that hold a row, tiles of the largest slice): slices of 64 KB as long as a cluster is large enough."""
    tiles = -(-V // TILE)
    size = min(MOST_CLUSTER, -(-tiles // SLICE_TILES))
    return size, -(-tiles // size)


def held_bytes(kind: int) -> int:
    """A token in a slice."""
    return 4 if kind == F32 else 2


def slice_bytes(tiles: int, held: int) -> int:
    return FIXED_BYTES + max(held * TILE * tiles, SORT_BYTES)


def filter_ctas(tiles: int, held: int) -> int:
    """CTAs of the filter kernel that share a multiprocessor."""
    return max(1, min(3, 228 * 1024 // (slice_bytes(tiles, held) + 1024)))


def shipped() -> list[Variant]:
    """What common calls ask for: slices that let three CTAs share a multiprocessor."""
    kinds = (F32, BF16, F16)
    draws = [draw(kind, *how) for kind in kinds for how in ((False, False), (False, True), (True, False))]
    rest = [filters(kind, 3) for kind in kinds]
    firsts = [peaks(kind, penalised) for kind in kinds for penalised in (False, True)]
    arrivals = [top_p(kind, penalised) for kind in kinds for penalised in (False, True)]
    at_once = [once(kind, *how) for kind in kinds for how in ((False, False), (True, False), (False, True))]
    draws += [*(changed(kind) for kind in kinds), *(flow(kind) for kind in (BF16, F16))]
    tallies = [tally(lists) for lists in (False, True)]
    logs = [logprobs(kind, 3) for kind in kinds]
    return [ring(), *tallies, *draws, *rest, *firsts, *at_once, *arrivals, *logs]
