// A row of min-p of which more tokens are kept than a list holds: a hot one. Every token that is kept has noise of its own, so words are
// worked out for all of the row, as it streams by once more. A token takes logarithms only where its word may beat a score that has been
// reached. If top-p does not keep the best, what precedes it is weighed, and counted by cells of logits, which say where top-p ends.
#pragma once
#include "sample_counted_sm90.cuh"
#include "sample_topk_sm90.cuh"

namespace attnkit::sampling {

constexpr int kMostHotWarps = 32, kHotCells = 1024;

struct alignas(16) HotShared {
  u32 reached;                            // key of a score
  u64 bests[kMostHotWarps];               // scores
  u64 sums[2][kMostHotWarps];             // whole masses
  float masses[2][kMostHotWarps];         // of a warp's tokens: all, and those that min-p may keep or that precede one
  float own;                              // the logit of who is drawn, after temperature
  int kept, refused;                      // how many cells are surely kept, from which one on none is
  u32 cells[kHotCells];                   // tokens by logit, of those that precede one that top-p refused
};

// A piece in shared memory; four of a lane's.
template <int Type>
struct HotSlot {
  static constexpr u32 kStep = kChunk * (Type == kF32 ? 4 : 2);
  u32 at;
  ATTNKIT_DEVICE void operator()(int c, float (&x)[4]) const { widen_four<Type>(load_raw<Type>(at + c * kStep), x); }
  ATTNKIT_DEVICE float peak(int c) const { return peak_of<Type>(load_raw<Type>(at + c * kStep)); }
};
// The same in registers.
struct HotHeld {
  const float (&held)[4][4];
  ATTNKIT_DEVICE void operator()(int c, float (&x)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = c & 2 ? (c & 1 ? held[3][i] : held[2][i]) : (c & 1 ? held[1][i] : held[0][i]);
  }
  ATTNKIT_DEVICE float peak(int c) const { return max_nan(max_nan(held[c][0], held[c][1]), max_nan(held[c][2], held[c][3])); }
};

template <int Type, bool Penalised, int Warps = 16>
struct HotRow {
  // Pieces that a warp has on their way.
  static constexpr int kItem = Type == kF32 ? 4 : 2, kSlots = Warps > 16 ? 2 : Type == kF32 ? 3 : 6, kSlot = kPiece * kItem;
  static constexpr int kRing = Penalised ? kCountedBytes<Type, false> : Warps * kSlots * kSlot;

  const SampleParams& p;
  HotShared& s;
  const char* const ring;
  const RowPointers& r;
  const RowOptions& o;
  const Philox noise;
  const int b, V;
  const float share, ratio, log_ratio;
  const int lane = static_cast<int>(lane_id()), warp = static_cast<int>(threadIdx.x / 32);

  // Masses are in units of what ``ref``, the largest logit before temperature, weighs.
  float ref = 0.0f, top = 0.0f, scale = 0.0f;
  float from = 0.0f, least = 0.0f;  // min-p's bound before and after temperature
  enum { kDraw, kWeigh, kExact } mode = kDraw;

  // Of a read:
  float mass = 0.0f, inside = 0.0f;  // what the lane's tokens weigh, and those that count
  u64 whole = 0, whole_inside = 0;
  bool some = false;             // precede ``place``
  float best = 0.0f, own = 0.0f;  // the lane's best score, and whose logit
  int id = 0;
  u32 floor_key = 0;
  float per_mass = 0.0f;  // may beat the floor: u <= mass times this
  Place place{negative_infinity(), 0};  // only tokens before it are drawn, or weighed
  float cell_top = 0.0f, per_logit = 0.0f;  // cells are of equal width from there on; none without

  ATTNKIT_DEVICE float mass_of(float x) const { return exp2_fast((x - ref) * scale); }
  ATTNKIT_DEVICE bool hope(float mass, u32 word) const { return !(Draw::one_and(word) > __fmaf_rn(mass, per_mass, 1.0f)); }

  // See Draw.
  ATTNKIT_DEVICE void set_floor(u32 key) {
    const float score = order_value(key);
    floor_key = key;
    per_mass = exp2_fast((fabsf(score) * 1e-6f + 1e-3f + (top - score)) * kLog2e);
  }
  ATTNKIT_DEVICE void refresh() {
    const u32 floor = *const_cast<volatile u32*>(&s.reached);
    if (floor > floor_key) set_floor(floor);
  }

  // ---- a piece ----

  // chunk(c, x) gives a lane's c-th four. Converged warps only.
  template <class Chunk>
  ATTNKIT_DEVICE void draw_of(const Chunk& chunk, int v) {
    refresh();
    if (floor_key == 0) start(chunk, v);
    u32 hopes = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      u32 w[4];
      noise.words((static_cast<u32>(v) >> 2) + c * (kChunk / 4), w);
      // Of a chunk the largest logit and the least word tell whether there is hope at all.
      hopes |= hope(mass_of(chunk.peak(c)), min(min(w[0], w[1]), min(w[2], w[3]))) ? 1u << c : 0;
      if (share < 1.0f) weigh_four(chunk, c);
    }
    if (__any_sync(0xffffffffu, hopes != 0)) consider(chunk, v, hopes);
  }
  template <class Chunk>
  ATTNKIT_DEVICE void weigh_four(const Chunk& chunk, int c) {
    float x[4], m[4];
    chunk(c, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) m[i] = mass_of(x[i]);
    mass += (m[0] + m[1]) + (m[2] + m[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm("{\n.reg .pred is;\nsetp.ge.f32 is, %1, %2;\n@is add.f32 %0, %0, %3;\n}" : "+f"(inside) : "f"(x[i]), "f"(from), "f"(m[i]));
    }
  }
  // Nothing has been reached: by a warp's first chunk.
  template <class Chunk>
  ATTNKIT_DEVICE void start(const Chunk& chunk, int v) {
    float x[4];
    u32 w[4];
    chunk(0, x);
    noise.words(static_cast<u32>(v) >> 2, w);
    first_floor(x, w, v);
  }

  // Of few pieces. ``hopes``: of the lane's chunks.
  template <class Chunk>
  ATTNKIT_DEVICE void consider(const Chunk& chunk, int v, u32 hopes) {
#pragma unroll 1
    while (__any_sync(0xffffffffu, hopes != 0)) {
      // Each lane takes one of its chunks, if it has any left.
      const int c = __ffs(hopes) - 1 & 3, first = v + c * kChunk;
      float x[4], reached = negative_infinity();
      u32 w[4], tokens = 0;
      chunk(c, x);
      noise.words(static_cast<u32>(first) >> 2, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) tokens |= x[i] >= from && hope(mass_of(x[i]), w[i]) ? 1u << i : 0;
      if (hopes == 0) tokens = 0;
#pragma unroll 1
      while (__any_sync(0xffffffffu, tokens != 0)) {
        if (tokens != 0) {
          const int i = __ffs(tokens) - 1;
          reached = fmaxf(reached, try_token(one_of(x, i), one_of(w, i), first + i));
        }
        tokens &= tokens - 1;
      }
      const u32 reach = __reduce_max_sync(0xffffffffu, order_key(reached));
      if (reach > floor_key && reach > order_key(negative_infinity())) {
        if (lane == 0) atomicMax(&s.reached, reach);
        set_floor(reach);
      }
      hopes &= hopes - 1;
    }
  }
  // Its score if it is kept.
  ATTNKIT_DEVICE float try_token(float raw, u32 word, int v) {
    const float l = warm(raw, o), score = noisy(l, word);
    const bool is = l >= least && place.after(l, v) && score > negative_infinity();
    if (is && (score > best || (score == best && v < id))) best = score, own = l, id = v;
    return is ? score : negative_infinity();
  }
  // See Draw.
  ATTNKIT_DEVICE void first_floor(const float (&x)[4], const u32 (&w)[4], int v) {
    float top = negative_infinity();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float u = Draw::one_and(w[i]) - (1.0f - 2.384185791015625e-07f), l = warm(x[i], o);
      if (u < 0.5f && l >= least && place.after(l, v + i)) top = fmaxf(top, l * kLog2e - log2_fast(u));
    }
    top = order_value(__reduce_max_sync(0xffffffffu, order_key(top)));
    if (fabsf(top) < kF32Max) set_floor(order_key((top - fabsf(top) * 1e-6f - 0.475f) * kLn2 - 1e-3f));
  }

  // What precedes ``place``.
  template <class Chunk>
  ATTNKIT_DEVICE void weigh_of(const Chunk& chunk, int v) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      chunk(c, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float l = warm(x[i], o);
        if (!place.after(l, v + c * kChunk + i)) continue;
        inside += mass_of(x[i]), some = true;
        if (per_logit > 0.0f) atomicAdd(&s.cells[cell_of(l)], 1u);
      }
    }
  }
  // The same and all of it, as whole numbers.
  template <class Chunk>
  ATTNKIT_DEVICE void weigh_exactly(const Chunk& chunk, int v) {
#pragma unroll 1
    for (int c = 0; c < 4; ++c) {
      float x[4];
      chunk(c, x);
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const float l = warm(one_of(x, i), o);
        const u64 its = whole_mass(l, top);
        whole += its;
        if (place.after(l, v + c * kChunk + i)) whole_inside += its, some = true;
      }
    }
  }
  template <class Chunk>
  ATTNKIT_DEVICE void take(const Chunk& chunk, int v) {
    if (mode == kDraw) {
      draw_of(chunk, v);
    } else if (mode == kWeigh) {
      weigh_of(chunk, v);
    } else {
      weigh_exactly(chunk, v);
    }
  }

  // ---- the row ----

  // One read. Pieces come by copies: each lane copies what it reads.
  ATTNKIT_DEVICE void stream() {
    if constexpr (Penalised) {
      const int first = b * p.blocks;
      const Counted<Type, false, false> counted(p, ring, first + p.blocks);
      CountedBegun at = counted.begin(first + warp);
      Work work{*this, first, 0};
      counted.stream(at, work);
    } else {
      const int pieces = (V + kPiece - 1) / kPiece;
      const u32 slots = kept(smem_address(ring) + warp * (kSlots * kSlot) + lane * 4 * kItem);
#pragma unroll 1
      for (int u = 0; u < kSlots; ++u) ask(warp + u * Warps, slots + u * kSlot);
      u32 slot = slots;
#pragma unroll 1
      for (int piece = warp; piece < pieces; piece += Warps) {
        asm volatile("cp.async.wait_group %0;" ::"n"(kSlots - 1) : "memory");
        take(HotSlot<Type>{slot}, piece * kPiece + lane * 4);
        ask(piece + kSlots * Warps, slot);
        slot = slot == slots + (kSlots - 1) * kSlot ? slots : slot + kSlot;
      }
    }
  }
  struct Work {
    HotRow& row;
    const int first;
    int v;
    ATTNKIT_DEVICE void block(const CountedSpot& at) { v = (at.n - first) * kBlock + row.lane * 4; }
    template <class Pieces>
    ATTNKIT_DEVICE void piece(const Pieces& pieces, u32 slot, const RowOptions& options, int u) {
      float x[4][4], unused = negative_infinity();
      pieces.all_of(slot, pieces.put_aside(slot, options, unused), x);
      row.take(HotHeld{x}, v + u * kPiece);
    }
    ATTNKIT_DEVICE void done(const CountedSpot&, const CountedSpot&) const {}
  };
  ATTNKIT_DEVICE void ask(int piece, u32 slot) const {
    const int v = piece * kPiece + lane * 4;
    if (piece * kPiece < V) {
      if (r.logits_wide && (piece + 1) * kPiece <= V) {
        copy_chunks<4 * kItem, kChunk * kItem>(slot, r.logits + static_cast<i64>(v) * kItem);
      } else {
#pragma unroll 1
        for (int c = 0; c < 4; ++c) store_raw<Type>(slot + c * kChunk * kItem, load_four_guarded<Type>(r.logits, v + c * kChunk, V));
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  ATTNKIT_DEVICE void begin() {
    best = negative_infinity(), mass = inside = 0.0f, whole = whole_inside = 0, some = false, id = 0, floor_key = 0;
    per_mass = -negative_infinity();
    __syncthreads();  // all have read what is in shared memory
  }
  ATTNKIT_DEVICE float sum_of(const float (&sums)[kMostHotWarps]) const { return warp_sum(lane < Warps ? sums[lane] : 0.0f); }

  // The best draw of the tokens before ``place``, and its logit; 0 if there is none. By all.
  ATTNKIT_DEVICE u64 draw_before(float& logit) {
    mode = kDraw;
    begin();
    if (threadIdx.x == 0) s.reached = 0;
    __syncthreads();
    stream();
    mass = warp_sum(mass), inside = warp_sum(inside);
    const u64 mine = best > negative_infinity() ? pack_best(best, id) : 0, its = warp_max(mine);
    if (lane == 0) s.masses[0][warp] = mass, s.masses[1][warp] = inside, s.bests[warp] = its;
    __syncthreads();
    const u64 all = warp_max(s.bests[lane % Warps]);
    if (all != 0 && mine == all) s.own = own;
    __syncthreads();
    logit = s.own;
    return all;
  }

  ATTNKIT_DEVICE int cell_of(float l) const { return static_cast<int>(fminf((cell_top - l) * per_logit, kHotCells - 1.0f)); }
  // From counts by cell, where top-p ends: tokens are drawn from there on. By all.
  ATTNKIT_DEVICE void bound_by_cells(const Between& enough) {
    if (warp == 0) {
      constexpr int kEach = kHotCells / 32;
      const float wide = __fdividef(kLog2e, per_logit), first = static_cast<float>(lane * kEach);
      float low = 0.0f, high = 0.0f;  // what the lane's weigh
#pragma unroll 1
      for (int j = 0; j < kEach; ++j) {
        const float n = static_cast<float>(s.cells[lane * kEach + j]), at = first + static_cast<float>(j);
        low += n * exp2_fast(-(at + 1.01f) * wide), high += n * exp2_fast(-fmaxf(at - 0.01f, 0.0f) * wide);
      }
      float low_upto = low, high_upto = high;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float a = __shfl_up_sync(0xffffffffu, low_upto, step), b = __shfl_up_sync(0xffffffffu, high_upto, step);
        low_upto += lane >= step ? a : 0.0f, high_upto += lane >= step ? b : 0.0f;
      }
      low_upto -= low, high_upto -= high;
      const float least_end = static_cast<float>(enough.low) * (0.9998f / kMassOne),
                  most_end = static_cast<float>(enough.high) * (1.0002f / kMassOne);
      int kept = 0, refused = kHotCells;
#pragma unroll 1
      for (int j = 0; j < kEach; ++j) {
        const int cell = lane * kEach + j;
        const float n = static_cast<float>(s.cells[cell]), at = first + static_cast<float>(j);
        if (low_upto >= most_end) refused = min(refused, cell);
        low_upto += n * exp2_fast(-(at + 1.01f) * wide), high_upto += n * exp2_fast(-fmaxf(at - 0.01f, 0.0f) * wide);
        if (high_upto < least_end) kept = cell + 1;
      }
      kept = __reduce_max_sync(0xffffffffu, kept), refused = __reduce_min_sync(0xffffffffu, refused);
      if (lane == 0) s.kept = kept, s.refused = refused;
    }
    __syncthreads();
    const float end = cell_top - __fdividef(static_cast<float>(s.refused) + 0.02f, per_logit);
    if (s.refused < kHotCells && end > place.logit) place = Place{end, 0};
  }

  // What precedes ``place``, and between which numbers that is; all of it exactly.
  ATTNKIT_DEVICE bool weigh() {
    mode = kWeigh;
    for (int i = static_cast<int>(threadIdx.x); i < kHotCells; i += 32 * Warps) s.cells[i] = 0;
    begin();
    stream();
    inside = warp_sum(inside);
    if (lane == 0) s.masses[1][warp] = inside;
    return __syncthreads_or(some) != 0;
  }
  ATTNKIT_DEVICE bool weigh_exactly(u64& all, u64& before) {
    mode = kExact;
    begin();
    stream();
    whole = warp_sum(whole), whole_inside = warp_sum(whole_inside);
    if (lane == 0) s.sums[0][warp] = whole, s.sums[1][warp] = whole_inside;
    const bool any = __syncthreads_or(some) != 0;
    all = warp_sum(lane < Warps ? s.sums[0][lane] : 0), before = warp_sum(lane < Warps ? s.sums[1][lane] : 0);
    return any;
  }
  // As whole masses, to a margin for rounding; a sum of floats. None if it is no number.
  ATTNKIT_DEVICE Between between(float sum) const {
    const float margin = 3e-5f + 1e-6f * fabsf(top), over = sum;
    if (!(over < 1e6f) || !(margin < 0.01f)) return Between{0, 0};
    const double all = static_cast<double>(over) * static_cast<double>(kMassOne);
    return Between{static_cast<u64>(all * (1.0 - margin)), static_cast<u64>(all * (1.0 + margin)) + 2};
  }

  // The id that is drawn, -1 if there is none. ``largest``: the row's logit before temperature; ``enough``: see AnyRow. By all.
  ATTNKIT_DEVICE int draw(float largest, Between enough) {
    ref = fminf(largest, kF32Max), top = warm(ref, o), scale = o.rt * kLog2e;
    least = ratio > 0.0f ? __fadd_rn(top, log_ratio) : -kF32Max, from = TopkRow<Type, Penalised>::below(least * o.t);
#pragma unroll 1
    while (true) {
      float logit;
      const u64 drawn = draw_before(logit);
      if (drawn == 0) return -1;
      if (share >= 1.0f || (per_logit > 0.0f && cell_of(logit) < s.kept)) return best_id(drawn);
      if (enough.high == 0) {
        const Between all = between(sum_of(s.masses[0]));
        const auto part = [&](u64 x) { return static_cast<u64>(static_cast<double>(share) * static_cast<double>(x)); };
        if (all.high != 0) enough = Between{part(all.low), part(all.high) + 2};
      }
      // Where all that min-p keeps is less than top-p wants none is left out.
      const Between kept = between(sum_of(s.masses[1]));
      if (kept.high != 0 && kept.high < enough.low) return best_id(drawn);
      place = Place{logit, best_id(drawn)};
      cell_top = top, per_logit = __fdividef(kHotCells - 1.0f, top - logit);
      if (!(per_logit < 1e6f) || !(fabsf(top) < 1e4f) || enough.high == 0) per_logit = 0.0f;
      if (!weigh() || is_kept(enough)) return place.id;
      if (per_logit > 0.0f) bound_by_cells(enough);
    }
  }
  // Whether top-p keeps ``place``, once what precedes it is weighed.
  ATTNKIT_DEVICE bool is_kept(const Between& enough) {
    const Between before = between(sum_of(s.masses[1]));
    if (before.high != 0 && enough.high != 0 && before.high < enough.low) return true;
    if (before.high != 0 && enough.high != 0 && before.low >= enough.high) return false;
    u64 all, its;
    weigh_exactly(all, its);
    return its < static_cast<u64>(ceil(static_cast<double>(share) * static_cast<double>(all)));
  }
};

// By all of a CTA, for registers of its own; ``memory``: HotRow::kRing bytes and HotShared. ``largest``, ``enough``: see HotRow::draw.
template <int Type, bool Penalised>
__device__ __noinline__ int draw_hot(const SampleParams& p, char* memory, int b, float largest, Between enough) {
  using Row = HotRow<Type, Penalised>;
  const RawOptions raw(p, b);
  const TopkOptions options(p, b);
  const RowOptions o = raw.use();
  const RowPointers r = row_pointers<Type>(p, b);
  HotShared& s = *reinterpret_cast<HotShared*>(memory + Row::kRing);
  __syncthreads();  // what is there has been read
  const Philox noise = Philox(static_cast<u64>(raw.seed), static_cast<u64>(raw.offset), kOfTokens).of_warp();
  return Row{p, s, memory, r, o, noise, b, p.V, options.share, options.ratio, logf(options.ratio)}.draw(largest, enough);
}

}  // namespace attnkit::sampling
