// Rows with penalties, bias or a mask, and their peaks: one read of the logits and of what comes with them. Asynchronous copies bring all of
// it into shared memory, where each of many warps has pieces on their way; a lane copies what it will read itself, so nobody waits for
// another. The few tokens with a count or in the prompt are taken out of their group one by one, and the rest as it is.
#pragma once
#include "sample_group_sm90.cuh"

namespace attnkit::sampling {

// One CTA a multiprocessor; pieces that a warp has on their way.
constexpr int kCountedWarps = 16, kCountedThreads = 32 * kCountedWarps, kCountedSlots = 2;

// A piece in shared memory: four chunks of each, a lane's four tokens of a chunk together. Mirrors COUNTED_BYTES in
// attnkit/backends/cuda/builds/sampling.py.
template <int Type, bool Biased>
struct CountedSlot {
  static constexpr u32 kItem = Type == kF32 ? 4 : 2;
  static constexpr u32 kLogits = kPiece * 4, kPrompt = kLogits + kPiece * kItem, kAllowed = kPrompt + kPiece, kBias = kAllowed + 4 * kChunk,
                       kBytes = kBias + (Biased ? kPiece * 4 : 0);
};
static_assert(CountedSlot<kBf16, false>::kBytes == 4096 && CountedSlot<kF32, false>::kBytes == 5120, "COUNTED_BYTES");
static_assert(CountedSlot<kBf16, true>::kBytes == 4096 + 2048, "COUNTED_BIAS");
template <int Type, bool Biased>
constexpr int kCountedBytes = kCountedWarps * kCountedSlots * static_cast<int>(CountedSlot<Type, Biased>::kBytes);

// Bytes on their way to where only this thread reads; of a word zeros where it is not ``there``.
template <int Bytes>
ATTNKIT_DEVICE void copy_own(u32 to, const char* from) {
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(Bytes) : "memory");
  }
}
ATTNKIT_DEVICE void copy_word(u32 to, const char* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}
template <int Bytes, int Step>
ATTNKIT_DEVICE void copy_chunks(u32 to, const char* from) {
#pragma unroll
  for (int c = 0; c < 4; ++c) copy_own<Bytes>(to + c * 32 * Bytes, from + c * Step);
}

// Four chunks of the counts of 16-bit logits, of which little is read again: L2 keeps logits rather.
ATTNKIT_DEVICE void copy_counts(u32 to, const char* from) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to + c * 512), "l"(from + c * 512), "l"(policy) : "memory");
  }
}

// What was copied.
ATTNKIT_DEVICE u32 shared_word(u32 from) {
  u32 x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}
ATTNKIT_DEVICE u32 shared_byte(u32 from) {
  u32 x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}
// A logit, which is -inf there from then on.
template <int Type>
ATTNKIT_DEVICE float take_logit(u32 from) {
  if constexpr (Type == kF32) {
    const u32 x = shared_word(from);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(from), "r"(0xff800000u) : "memory");
    return __uint_as_float(x);
  } else {
    u16 x;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(from), "h"(static_cast<u16>(Type == kBf16 ? 0xff80 : 0xfc00)) : "memory");
    return unpack(x, Type == kBf16).x;
  }
}

// The same number, of which the compiler does not know how to work it out again.
ATTNKIT_DEVICE float kept(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
ATTNKIT_DEVICE u32 kept(u32 x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What a row's penalties are.
struct Rates {
  float repetition, presence, frequency;

  ATTNKIT_DEVICE Rates() {}
  ATTNKIT_DEVICE Rates(const SampleParams& p, int b)
      : repetition(option(p.repetition, p.repetition_value, b)),
        presence(option(p.presence, p.presence_value, b)),
        frequency(option(p.frequency, p.frequency_value, b)) {}
  ATTNKIT_DEVICE void use(RowOptions& o) const {
    o.repetition = repetition;
    o.rr = kept(__fdiv_rn(1.0f, repetition));
    o.presence = presence;
    o.frequency = frequency;
  }
};

// The next piece that a lane asks for, of row b; its own tokens are those from v on.
struct CountedPiece {
  const char *logits, *counts;
  int b, v;
  bool there = false, wide;  // whether there is one; four neighbours can be copied at once
};

// A block, and the row it is of.
struct CountedSpot {
  int n, b;
};

// What a group keeps in one word where lists are long. Upper half: its largest, as bf16. Lower half: by how much the largest of its other
// chunks is less, cut to ten bits; a bit for each chunk in which there is more to read than logits; and which chunk the first is in.
struct TwoPeaks {
  static constexpr float kRounded = 0.004f;
  static constexpr float kMostHeld = 3.3e38f;  // bf16 has it; a token that is not -inf is not held as that
  float first = negative_infinity(), second = negative_infinity();
  u32 chunk = 0, seen = 0;

  ATTNKIT_DEVICE void take(float x, u32 its) {
    second = fmaxf(second, fminf(first, x));
    chunk = x > first ? its : chunk;
    first = max_nan(first, x);
  }
  // What a peak is held as: at most kRounded of it larger than it is, but for the least of all.
  ATTNKIT_DEVICE static u32 held_bits(float x) { return pack_bf16(0.0f, x > negative_infinity() ? fmaxf(x, -kMostHeld) : x); }
  ATTNKIT_DEVICE static float held(float x) { return of(held_bits(x)); }
  ATTNKIT_DEVICE u32 word() const {
    const float less = __fsub_rz(first, second), held = second > negative_infinity() ? fminf(less, kF32Max) : less;
    return (held_bits(first) & 0xffff0000u) | (__float_as_uint(held) >> 15 & 0xffc0u) | seen << 2 | chunk;
  }
  ATTNKIT_DEVICE static float of(u32 word) { return __uint_as_float(word & 0xffff0000u); }
  // What is surely not below a group's second; a number that is not one is not.
  ATTNKIT_DEVICE static float second_of(u32 word) {
    const float first = of(word);
    return first - __uint_as_float((word & 0xffc0u) << 15) + (fabsf(first) * kRounded + 1e-36f);
  }
  ATTNKIT_DEVICE static bool seen_in(u32 word, u32 chunk) { return (word >> (2 + chunk) & 1) != 0; }
};

// What a warp has under way.
struct CountedBegun {
  CountedSpot at;
  Rates coming;
  CountedPiece piece;
};

// What is kept of a block: what of(slot, options) makes of its pieces.
template <class F>
struct CountedWords {
  F& of;
  float4* const to;
  const int origin;
  float words[4];

  ATTNKIT_DEVICE void block(const CountedSpot&) const {}
  template <class Pieces>
  ATTNKIT_DEVICE void piece(const Pieces&, u32 slot, const RowOptions& o, int) {
    words[0] = words[1], words[1] = words[2], words[2] = words[3];
    words[3] = of(slot, o);
  }
  ATTNKIT_DEVICE void done(const CountedSpot& at, const CountedSpot&) const {
    to[static_cast<i64>(at.n - origin) * 32 + lane_id()] = make_float4(words[0], words[1], words[2], words[3]);
  }
};

// One warp's part: blocks up to ``end``, one in as many as there are warps. Plain: counts come, nothing else does.
template <int Type, bool Biased, bool Plain>
struct Counted {
  using Slot = CountedSlot<Type, Biased>;
  static constexpr int kItem = Slot::kItem;
  const SampleParams& p;
  const u32 slots;  // this lane's part, as of counts
  const int end;
  const int lane = static_cast<int>(lane_id());

  ATTNKIT_DEVICE Counted(const SampleParams& q, const char* memory, int last)
      : Counted(q, memory, kCountedSlots * Slot::kBytes, last) {}
  // ``each``: bytes a warp.
  ATTNKIT_DEVICE Counted(const SampleParams& q, const char* memory, u32 each, int last)
      : p(q), slots(kept(smem_address(memory) + threadIdx.x / 32 * each + lane_id() * 16)), end(last) {}

  ATTNKIT_DEVICE bool counts() const { return Plain || p.counts != nullptr; }
  ATTNKIT_DEVICE bool prompt() const { return !Plain && p.prompt != nullptr; }
  ATTNKIT_DEVICE bool allowed() const { return !Plain && p.allowed != nullptr; }
  ATTNKIT_DEVICE bool bias() const { return !Plain && Biased && p.bias != nullptr; }
  // Where a lane has its part of each in a slot.
  ATTNKIT_DEVICE u32 logits_in(u32 slot) const { return slot + Slot::kLogits - lane * (16 - 4 * kItem); }
  ATTNKIT_DEVICE u32 prompt_in(u32 slot) const { return slot + Slot::kPrompt - lane * 12; }
  ATTNKIT_DEVICE u32 allowed_in(u32 slot) const { return slot + Slot::kAllowed - lane * 12; }

  // ---- blocks ----

  // Block n, which is of row b or a later one.
  ATTNKIT_DEVICE CountedSpot spot_of(int n, int b) const {
#pragma unroll 1
    while (n < end && n >= (b + 1) * p.blocks) ++b;
    return {n, b};
  }
  ATTNKIT_DEVICE CountedPiece first_of(const CountedSpot& at) const {
    return at.n < end ? piece_at(row_pointers<Type>(p, at.b), at.b, (at.n - at.b * p.blocks) * kBlock) : CountedPiece();
  }
  ATTNKIT_DEVICE CountedPiece piece_at(const RowPointers& r, int b, int v) const {
    CountedPiece piece;
    piece.b = b, piece.v = v + lane * 4, piece.there = true;
    piece.logits = r.logits + static_cast<i64>(piece.v) * kItem;
    piece.counts = r.counts + static_cast<i64>(piece.v) * 4;
    piece.wide = r.logits_wide && r.wide && (!bias() || (reinterpret_cast<u64>(r.bias) & 15) == 0);
    return piece;
  }

  // ---- reading ----

  ATTNKIT_DEVICE void ask(CountedPiece& piece, u32 slot) const {
    if (piece.there) {
      if (piece.wide && piece.v - lane * 4 + kPiece <= p.V) {
        copy_chunks<4 * kItem, kChunk * kItem>(logits_in(slot), piece.logits);
        if (counts() && Type != kF32) copy_counts(slot, piece.counts);
        if (counts() && Type == kF32) copy_chunks<16, kChunk * 4>(slot, piece.counts);
        if (prompt()) copy_chunks<4, kChunk>(prompt_in(slot), p.prompt + piece.b * p.prompt_b + piece.v);
        if (allowed()) copy_chunks<4, kChunk / 8>(allowed_in(slot), p.allowed + piece.b * p.allowed_b + piece.v / 32 * 4);
        if (bias()) copy_chunks<16, kChunk * 4>(slot + Slot::kBias, p.bias + piece.b * p.bias_b + static_cast<i64>(piece.v) * 4);
      } else {
        ask_with_care(piece, slot);
      }
      piece.logits += kPiece * kItem, piece.counts += kPiece * 4, piece.v += kPiece;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // Token by token: the end of a row, past which nothing has a count, and rows at odd addresses.
  ATTNKIT_DEVICE void ask_with_care(const CountedPiece& piece, u32 slot) const {
    const int left = p.V - piece.v;
    Raw<Type> raw[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) raw[c] = load_four_guarded<Type>(piece.logits, c * kChunk, left);
#pragma unroll
    for (int c = 0; c < 4; ++c) store_raw<Type>(logits_in(slot) + c * kChunk * kItem, raw[c]);
#pragma unroll 1
    for (int c = 0; c < 4; ++c) {
      u32 four = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int v = piece.v + c * kChunk + i;
        const bool there = v < p.V;
        const i64 at = there ? v : 0;
        if (counts()) copy_word(slot + c * 512 + i * 4, p.counts + piece.b * p.counts_b + at * 4, there);
        if (bias()) copy_word(slot + Slot::kBias + c * 512 + i * 4, p.bias + piece.b * p.bias_b + at * 4, there);
        if (prompt() && there) four |= static_cast<u32>(*reinterpret_cast<const u8*>(p.prompt + piece.b * p.prompt_b + at)) << 8 * i;
      }
      if (prompt()) asm volatile("st.shared.b32 [%0], %1;" ::"r"(prompt_in(slot) + c * kChunk), "r"(four) : "memory");
      const int v = piece.v + c * kChunk;
      if (allowed()) copy_word(allowed_in(slot) + c * kChunk, p.allowed + piece.b * p.allowed_b + (v < p.V ? v / 32 * 4 : 0), v < p.V);
    }
  }

  // ---- peaks ----

  // A bit for each of a lane's 16 that has a count or is in the prompt.
  ATTNKIT_DEVICE u32 seen_in(u32 slot) const {
    u32 seen = 0;
    if (counts()) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint4 n = load_shared<uint4>(slot + c * 512);
        seen |= (n.x != 0 ? 1u << 4 * c : 0) | (n.y != 0 ? 2u << 4 * c : 0) | (n.z != 0 ? 4u << 4 * c : 0) | (n.w != 0 ? 8u << 4 * c : 0);
      }
    }
    if (prompt()) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const u32 four = shared_word(prompt_in(slot) + c * kChunk);
#pragma unroll
        for (int i = 0; i < 4; ++i) seen |= (four >> 8 * i & 0xff) != 0 ? 1u << (4 * c + i) : 0;
      }
    }
    return seen;
  }

  // Whether the four tokens of a chunk are allowed, a bit each.
  ATTNKIT_DEVICE u32 allowed_four(u32 slot, u32 c) const { return shared_word(allowed_in(slot) + c * kChunk) >> (lane & 7) * 4; }

  // f(logit, which) of each of a lane's 16 with a count or in the prompt, which are -inf in the slot from then on.
  template <class F>
  ATTNKIT_DEVICE void for_seen(u32 slot, const RowOptions& o, F&& f) const {
#pragma unroll 1
    for (u32 seen = seen_in(slot); seen != 0; seen &= seen - 1) {
      const u32 i = __ffs(seen) - 1, at = (i & 12) * kChunk + (i & 3) * 4;
      const int count = counts() ? static_cast<int>(shared_word(slot + at)) : 0;
      const bool in_prompt = prompt() && shared_byte(prompt_in(slot) + at / 4) != 0;
      float x = penalised(take_logit<Type>(logits_in(slot) + at * kItem / 4), count, in_prompt, o);
      if (bias()) x = biased(x, __uint_as_float(shared_word(slot + Slot::kBias + at)));
      if (allowed()) x = masked(x, (allowed_four(slot, i / 4) >> (i & 3) & 1) != 0);
      f(x, i);
    }
  }
  ATTNKIT_DEVICE float peak_of_seen(u32 slot, const RowOptions& o) const {
    float most = negative_infinity();
    for_seen(slot, o, [&](float x, u32) { most = max_nan(most, x); });
    return most;
  }

  // What becomes of these lies where their counts were, for all_of. A bit for each; ``most``: with the largest of them.
  ATTNKIT_DEVICE u32 put_aside(u32 slot, const RowOptions& o, float& most) const {
    u32 seen = 0;
    for_seen(slot, o, [&](float x, u32 i) {
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(slot + (i & 12) * kChunk + (i & 3) * 4), "f"(x) : "memory");
      most = max_nan(most, x), seen |= 1u << i;
    });
    return seen;
  }

  // All of a lane's 16, once those that were seen are put aside.
  ATTNKIT_DEVICE void all_of(u32 slot, u32 seen, float (&x)[4][4]) const {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      widen_four<Type>(load_raw<Type>(logits_in(slot) + c * kChunk * kItem), x[c]);
      if (bias()) {
        const float4 more = load_shared<float4>(slot + Slot::kBias + c * 512);
        x[c][0] = biased(x[c][0], more.x), x[c][1] = biased(x[c][1], more.y), x[c][2] = biased(x[c][2], more.z), x[c][3] = biased(x[c][3], more.w);
      }
      const u32 bits = allowed() ? allowed_four(slot, c) : 15;
#pragma unroll
      for (int i = 0; i < 4 && !Plain; ++i) x[c][i] = masked(x[c][i], (bits >> i & 1) != 0);
    }
    if (seen == 0) return;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float4 aside = load_shared<float4>(slot + c * 512);
      const float changed[4] = {aside.x, aside.y, aside.z, aside.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) x[c][i] = (seen >> (4 * c + i) & 1) != 0 ? changed[i] : x[c][i];
    }
  }

  // The largest of a lane's 16 after penalties, bias and mask.
  ATTNKIT_DEVICE float peak(u32 slot, const RowOptions& o) const { return with_rest(slot, peak_of_seen(slot, o)); }
  // Of ``most`` and those that are not seen.
  ATTNKIT_DEVICE float with_rest(u32 slot, float most) const {
    Raw<Type> raw[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) raw[c] = load_raw<Type>(logits_in(slot) + c * kChunk * kItem);
    if (!bias() && !allowed()) return max_nan(most, peak_of<Type>(raw));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float x[4];
      widen_four<Type>(raw[c], x);
      if (bias()) {
        const float4 more = load_shared<float4>(slot + Slot::kBias + c * 512);
        x[0] = biased(x[0], more.x), x[1] = biased(x[1], more.y), x[2] = biased(x[2], more.z), x[3] = biased(x[3], more.w);
      }
      const u32 bits = allowed() ? allowed_four(slot, c) : 15;
#pragma unroll
      for (int i = 0; i < 4; ++i) most = max_nan(most, masked(x[i], (bits >> i & 1) != 0));
    }
    return most;
  }

  // The same, and what else a long list wants to know; their mass if that is wanted. Without bias.
  ATTNKIT_DEVICE TwoPeaks two_peaks(u32 slot, const RowOptions& o, LaneMass& mass) const {
    TwoPeaks peaks;
    for_seen(slot, o, [&](float x, u32 i) {
      peaks.take(x, i / 4);
      peaks.seen |= 1u << i / 4;
      if (!mass.wanted || x == negative_infinity()) return;
      mass.reach(x);
      mass.sum += mass.mass(x);
    });
    if (allowed()) peaks.seen = 15;
    Raw<Type> raw[4];
    float most[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      raw[c] = load_raw<Type>(logits_in(slot) + c * kChunk * kItem);
      if (allowed()) {
        float x[4];
        allowed_of(x, raw[c], slot, c);
        most[c] = max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3]));
      } else {
        most[c] = peak_of<Type>(raw[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) peaks.take(most[c], c);
    const float rest = mass.wanted ? fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])) : negative_infinity();
    if (rest > negative_infinity()) {
      mass.reach(rest);
      float sums[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x[4];
        allowed_of(x, raw[c], slot, c);
        sums[c] = (mass.mass(x[0]) + mass.mass(x[1])) + (mass.mass(x[2]) + mass.mass(x[3]));
      }
      mass.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    return peaks;
  }
  // A chunk after the mask.
  ATTNKIT_DEVICE void allowed_of(float (&x)[4], const Raw<Type>& raw, u32 slot, u32 c) const {
    widen_four<Type>(raw, x);
    const u32 bits = allowed() ? allowed_four(slot, c) : 15;
#pragma unroll
    for (int i = 0; i < 4 && allowed(); ++i) x[i] = masked(x[i], (bits >> i & 1) != 0);
  }

  // ---- all of it ----

  // Before the grid before has ended: L2 asks for what the warp's first pieces take most of. It stays coherent with who may still write.
  ATTNKIT_DEVICE void ask_early(int n) const {
    if (n >= end) return;
    constexpr int kTokens = kCountedSlots * kPiece, kLine = 128;
    const int b = n / p.blocks, v = (n - b * p.blocks) * kBlock;
    const RowPointers r = row_pointers<Type>(p, b);
#pragma unroll
    for (int i = 0; i < kTokens * kItem / kLine; i += 32) {
      if ((i + lane) * kLine < min(kTokens, p.V - v) * kItem) prefetch_l2(r.logits + static_cast<i64>(v) * kItem + (i + lane) * kLine);
    }
#pragma unroll
    for (int i = 0; i < kTokens * 4 / kLine && counts(); i += 32) {
      if ((i + lane) * kLine < min(kTokens, p.V - v) * 4) prefetch_l2(r.counts + static_cast<i64>(v) * 4 + (i + lane) * kLine);
    }
  }
  ATTNKIT_DEVICE CountedBegun begin(int first) const {
    const CountedSpot at = spot_of(first, first / p.blocks);
    CountedBegun begun{at, Rates(p, min(at.b, p.B - 1)), first_of(at)};
#pragma unroll 1
    for (u32 u = 0; u < kCountedSlots; ++u) ask(begun.piece, slots + u * Slot::kBytes);
    return begun;
  }

  // Keeps the peaks of all blocks; ``to``: from block ``origin`` on. The largest of a lane.
  ATTNKIT_DEVICE float run(CountedBegun& begun, float4* to, int origin) const {
    float most = negative_infinity();
    keep(begun, to, origin, [&](u32 slot, const RowOptions& o) {
      const float x = peak(slot, o);
      most = max_nan(most, x);
      return x;
    });
    return most;
  }

  // What of(slot, options) makes of each piece instead.
  template <class F>
  ATTNKIT_DEVICE void keep(CountedBegun& begun, float4* to, int origin, F&& of) const {
    CountedWords<F> words{of, to, origin, {}};
    stream(begun, words);
  }

  // Gives ``work`` all blocks: the block first, its pieces as they come (where they lie, and which of the four), then the block and the next.
  template <class Work>
  ATTNKIT_DEVICE void stream(CountedBegun& begun, Work& work) const {
    auto& [at, coming, piece] = begun;
    u32 slot = slots;
    RowOptions o;
    coming.use(o);
#pragma unroll 1
    while (at.n < end) {
      const CountedSpot next = spot_of(at.n + kCountedWarps, at.b);
      work.block(at);
#pragma unroll 1
      for (int u = 0; u < 4; ++u) {
        if (u == 4 - kCountedSlots) {
          piece = first_of(next);
          if (next.n < end && next.b != at.b) coming = Rates(p, next.b);
        }
        asm volatile("cp.async.wait_group %0;" ::"n"(kCountedSlots - 1) : "memory");
        work.piece(*this, slot, o, u);
        ask(piece, slot);
        slot = slot == slots ? slots + Slot::kBytes : slots;
      }
      work.done(at, next);
      if (next.b != at.b) coming.use(o);
      at = next;
    }
  }
};

ATTNKIT_DEVICE bool only_counts(const SampleParams& p) {
  return p.counts != nullptr && p.prompt == nullptr && p.allowed == nullptr && p.bias == nullptr;
}

}  // namespace attnkit::sampling
