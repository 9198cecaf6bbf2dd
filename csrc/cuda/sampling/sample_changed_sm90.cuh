// Greedy choice and draws from all tokens of many rows with penalties, bias or a mask. Logits and what comes with them are copied
// ahead into shared memory; groups that may lead are worked out there by the lanes that hold them.
#pragma once
#include "sample_counted_sm90.cuh"
#include "sample_lead_sm90.cuh"

namespace attnkit::sampling {

// Nothing but the rows, as many as the CTA has; they lie behind the pieces.
struct alignas(sizeof(LeadRow)) ChangedShared {};
static_assert(sizeof(ChangedShared) == 128, "FLOW_BYTES");

// What a warp does with its pieces.
template <int Type>
struct Changed : Lead<Type, kCountedWarps, ChangedShared> {
  using Base = Lead<Type, kCountedWarps, ChangedShared>;
  using Base::p, Base::lane, Base::first, Base::end, Base::reached, Base::raise, Base::options;
  int b = 0, inside = 0;  // the block's row, and its number there
  u32 words[4] = {};      // of its groups

  ATTNKIT_DEVICE Changed(const SampleParams& p, ChangedShared& s, const LeadShare& share) : Base(p, s, share) {}

  ATTNKIT_DEVICE void block(const CountedSpot& at) {
    b = at.b, inside = at.n - at.b * p.blocks;
    const LeadRow& row = this->row_of(b);
    if (row.cold == 0) row.groups.words(static_cast<u32>(inside) * 32 + lane, words);
  }

  // Most groups' largest logit says that they do not lead. Lanes may read different bests: all of a warp go on by votes.
  template <class Pieces>
  ATTNKIT_DEVICE void piece(const Pieces& pieces, u32 slot, const RowOptions& penalties, int u) {
    float peak = negative_infinity();
    const u32 seen = pieces.put_aside(slot, penalties, peak), word = one_of(words, u);
    peak = pieces.with_rest(slot, peak);
    LeadRow& row = this->row_of(b);
    const bool cold = row.cold != 0;
    const int group = inside * (kBlock / 16) + u * 32 + lane;
    const u64 now = reached(row);
    const float some = cold ? peak : hope_of(peak, row.scale * kOctave, log_of(word));
    const float hope = peak == negative_infinity() ? peak : max_nan(some, -kF32Max), least = now == 0 ? -kF32Max : least_hope(now, cold);
    bool may = now != kNaNSeen && hope != negative_infinity() && !(hope < least);
    if (cold && now != 0) may = may && (hope != least || first_of_group(group) < best_id(now));
    if (!__any_sync(0xffffffffu, may)) return;
    float x[4][4];
    pieces.all_of(slot, seen, x);
    const float most = fminf(peak, kF32Max);
    u64 mine;
    if (cold) {
      int at = 0;
#pragma unroll
      for (int i = 15; i >= 0; --i) at = fminf(x[i / 4][i % 4], kF32Max) == most ? i / 4 * kChunk + i % 4 : at;
      mine = pack_best(most, first_of_group(group) + at);
    } else {
      mine = try_group(x, most, group, word, hope, least, now, row, may);
    }
    if (hope != hope) mine = kNaNSeen;
    raise(row, warp_max(may ? mine : 0));
    __syncwarp();
  }

  // Sums first, noise only where those still may lead; which token the group stands for at once.
  ATTNKIT_DEVICE u64 try_group(float (&x)[4][4], float most, int group, u32 word, float hope, float least, u64 now, const LeadRow& row,
                               bool& may) const {
    float sums[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[c][i] = exp2_fast((fminf(x[c][i], kF32Max) - most) * row.scale);
      sums[c] = ((x[c][0] + x[c][1]) + x[c][2]) + x[c][3];
    }
    const float times = log2_fast((sums[0] + sums[1]) + (sums[2] + sums[3]));
    may = may && (now == 0 || !(__fmaf_rn(times, kOctave, hope) < least + 4.0f * kOctave));
    if (!__any_sync(0xffffffffu, may)) return 0;
    u32 its[4];
    philox_words(row.seed, row.offset, kInside, static_cast<u32>(group), its);
    const float score = noisy(__fadd_rn(warm(most, options(row)), __fmul_rn(times, kLn2)), word);
    return score > negative_infinity() ? with_token(pack_best(score, group * 16), first_of_group(group) + chosen_of(x, sums, its[0])) : 0;
  }

  // The token that a group stands for, as choose_inside finds it; of its masses.
  ATTNKIT_DEVICE static int chosen_of(const float (&mass)[4][4], const float (&sums)[4], u32 word) {
    float before[4], all = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; ++c) before[c] = all, all = __fadd_rn(all, sums[c]);
    const float reach = share_of(word, all);
    int found = 3 * kChunk + 3;
#pragma unroll
    for (int c = 3; c >= 0; --c) {
      float upto[4], sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) upto[i] = sum = __fadd_rn(sum, mass[c][i]);
#pragma unroll
      for (int i = 3; i >= 0; --i) found = __fadd_rn(before[c], upto[i]) > reach ? c * kChunk + i : found;
    }
    return found;
  }

  // At a row's end its warps meet, and its CTAs.
  ATTNKIT_DEVICE void done(const CountedSpot& at, const CountedSpot& next) const {
    if (next.n < end && next.b == at.b) return;
    const int taken = (at.n - max(first, at.b * p.blocks)) / kCountedWarps + 1;
    this->leave(at.b, taken, [&] { return this->met(at.b); }, [](u64 best) { return best; });
  }
};

template <int Type, bool Plain>
ATTNKIT_DEVICE void draw_changed(const SampleParams& p, char* memory) {
  const LeadShare share(p);
  Changed<Type> changed(p, *reinterpret_cast<ChangedShared*>(memory + kCountedBytes<Type, true>), share);
  const Counted<Type, true, Plain> counted(p, memory, share.end);
  counted.ask_early(share.first + changed.warp);
  changed.ask_options();
  wait_for_previous_grid();
  launch_dependents();
  changed.open_rows();  // before the queue is full of logits
  auto begun = counted.begin(share.first + changed.warp);
  __syncthreads();
  counted.stream(begun, changed);
}

template <int Type>
ATTNKIT_DEVICE void sample_changed(const SampleParams& p) {
  extern __shared__ __align__(128) char memory[];
  if (only_counts(p)) {
    draw_changed<Type, true>(p, memory);
  } else {
    draw_changed<Type, false>(p, memory);
  }
}

}  // namespace attnkit::sampling
