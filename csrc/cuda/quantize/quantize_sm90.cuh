// Rows to 8 bits with one scale a row: as they are, after an RMSNorm, or after silu(gate) * up.
//
// A group of warps takes a row at a time and keeps it in registers, eight neighbouring values (16 or 32 bytes) a load; it is
// read once. At two bytes in and one out a multiprocessor has about 15 instructions for a value before they, and not memory,
// are the limit: so addresses advance by additions, and a value costs one product and one rounding where that is exact.
#pragma once
#include "../common/e4m3.cuh"

namespace attnkit {

// Mirrors PARAMS in attnkit/backends/cuda/quantize.py. Strides are in bytes. A CTA is (threads of a group, groups).
struct QuantizeParams {
  const char* x;
  const char* weight;
  char* residual;  // null: none
  char* out;
  float* scale;
  i64 x_row, residual_row, out_row;
  int M, chunks;          // chunks of eight values in a row of out
  int slots, slot_bytes;  // of a group's ring in shared memory
  int passing;            // more is written than L2 would keep for the next kernel
  int ahead;              // CTAs that run at once, and so may wait for the previous grid
  float eps, inverse_k;
};

enum Form : int { kPlain = 0, kRmsNorm = 1, kSiluMul = 2 };

constexpr int kLane = 8;  // values in a chunk

// ---- memory: x passes by once, so it stays out of L1; the weight is every row's ----

enum Source : int { kOnce, kByRows };

// Not ld.global.nc, whatever is only read: that may be what the previous grid writes, and ptxas moved such loads to before
// the wait for it.
template <int From>
ATTNKIT_DEVICE void load_16(const char* p, u32* word) {
  if constexpr (From == kOnce)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(p) : "memory");
  if constexpr (From == kByRows)
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(p) : "memory");
}

// Written lines that leave L2 first make room for reads: 6% of a long run. What is read next should stay.
template <class T>
ATTNKIT_DEVICE void store(T* to, T x, bool passing) {
  if (passing)
    __stcs(to, x);
  else
    *to = x;
}

template <int Type>
struct Chunk {
  static constexpr int kWords = Type == kF32 ? 8 : 4, kBytes = 4 * kWords;
  u32 word[kWords];

  template <int From>
  ATTNKIT_DEVICE void load(const char* p) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) load_16<From>(p + i * 4, word + i);
  }

  ATTNKIT_DEVICE void load_staged(u32 from) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 x = load_shared<uint4>(from + i * 4);
      word[i] = x.x, word[i + 1] = x.y, word[i + 2] = x.z, word[i + 3] = x.w;
    }
  }

  ATTNKIT_DEVICE void store(char* p, bool passing) const {
#pragma unroll
    for (int i = 0; i < kWords; i += 4)
      attnkit::store(reinterpret_cast<uint4*>(p) + i / 4, make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]), passing);
  }

  ATTNKIT_DEVICE void widen(float (&v)[kLane]) const {
#pragma unroll
    for (int i = 0; i < kLane; i += 2) {
      if constexpr (Type == kF32) {
        v[i] = __uint_as_float(word[i]);
        v[i + 1] = __uint_as_float(word[i + 1]);
      } else {
        float2 pair = unpack(word[i / 2], Type == kBf16);
        v[i] = pair.x;
        v[i + 1] = pair.y;
      }
    }
  }

  ATTNKIT_DEVICE void narrow(const float (&v)[kLane]) {
#pragma unroll
    for (int i = 0; i < kLane; i += 2) {
      if constexpr (Type == kF32) {
        word[i] = __float_as_uint(v[i]);
        word[i + 1] = __float_as_uint(v[i + 1]);
      } else {
        word[i / 2] = pack<Type == kBf16>(v[i], v[i + 1]);
      }
    }
  }
};

// ---- magnitudes: they order as their bits do, and a NaN's are above infinity's, so a NaN wins ----

ATTNKIT_DEVICE u32 max_u16x2(u32 a, u32 b) {
  u32 r;
  asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// The largest magnitude of stored values, gathered in the stored type until `finish` makes it a float32's bits.
template <int Type>
ATTNKIT_DEVICE u32 larger(u32 top, const Chunk<Type>& c) {
#pragma unroll
  for (int i = 0; i < Chunk<Type>::kWords; ++i)
    top = Type == kF32 ? max(top, c.word[i] & 0x7fffffffu) : max_u16x2(top, c.word[i] & 0x7fff7fffu);
  return top;
}

template <int Type>
ATTNKIT_DEVICE u32 finish(u32 top) {
  if constexpr (Type == kF32) return top;
  float2 pair = unpack(top, Type == kBf16);
  return max(__float_as_uint(pair.x), __float_as_uint(pair.y));
}

ATTNKIT_DEVICE float larger(float top, const float (&v)[kLane]) {
#pragma unroll
  for (int i = 0; i < kLane; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(top) : "f"(fabsf(v[i])));
  return top;
}

// What the lanes of a warp have of Chunks sums, added up: lane l has that of sum l / (32 / Chunks).
template <int Chunks>
ATTNKIT_DEVICE float over_lanes(float (&sums)[Chunks]) {
  const u32 lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 16, left = Chunks; step; step /= 2, left /= 2) {
#pragma unroll
    for (int i = 0; i < (left > 1 ? left / 2 : 1); ++i) {
      float theirs = sums[i];
      if (left > 1 && lane & step)
        sums[i] = sums[i + left / 2];
      else if (left > 1)
        theirs = sums[i + left / 2];
      sums[i] += __shfl_xor_sync(0xffffffffu, theirs, step);
    }
  }
  return sums[0];
}

// A row's maximum, and sum where there is one, over the warps of its group; every thread gets both. A barrier by number takes
// all sixteen of them, of which a multiprocessor has as many as four CTAs may want; so only CTAs of several groups have one.
// How many chunks a thread has depends on M, but not a sum's bits: each 32 neighbouring chunks are added up by themselves.
template <bool Sums, bool Several, int Chunks>
ATTNKIT_DEVICE float over_row(u32& top, float (&chunk_sums)[Chunks], int turn) {
  __shared__ u32 tops[2][32];
  __shared__ float sums[2][64];
  const u32 warps = blockDim.x / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = threadIdx.y * warps;
  top = __reduce_max_sync(0xffffffffu, top);
  float sum = 0.0f;
  if constexpr (Sums) sum = over_lanes(chunk_sums);
  if (warps == 1) {
    if constexpr (Sums) {
#pragma unroll
      for (int step = 16; step >= 32 / Chunks; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    return sum;
  }
  if (lane == 0) tops[turn][first + warp] = top;
  if (Sums && lane % (32 / Chunks) == 0) sums[turn][first * Chunks + lane / (32 / Chunks) * warps + warp] = sum;
  if constexpr (Several)
    named_barrier(1 + threadIdx.y, blockDim.x);
  else
    __syncthreads();
  top = __reduce_max_sync(0xffffffffu, lane < warps ? tops[turn][first + lane] : 0);
  if constexpr (Sums) {
    const float* mine = sums[turn] + first * Chunks;
    sum = lane < warps * Chunks ? mine[lane] : 0.0f;
    if (lane + 32 < warps * Chunks) sum += mine[lane + 32];
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
  return sum;
}

// ---- values to codes ----

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the sum's low byte is the addend, rounded half to even

ATTNKIT_DEVICE u32 low_bytes(const float* t) {
  return __byte_perm(__byte_perm(__float_as_uint(t[0]), __float_as_uint(t[1]), 0x0040),
                     __byte_perm(__float_as_uint(t[2]), __float_as_uint(t[3]), 0x0040), 0x5410);
}

ATTNKIT_DEVICE u32 to_e4m3(const float* q) {
  return pack_e4m3(q[0], q[1]) | pack_e4m3(q[2], q[3]) << 16;
}

// The codes of a row whose scale has an inverse far from the ends of float32.
//
// Plain rows get x / scale rounded as IEEE says, then to 8 bits. For 16-bit x that is x * r + x * rest with r + rest = 1 / scale
// to 2^-42 or so. Such a quotient comes near to where a code changes only if it would lie on it, but for the rounding of
// scale: 127 is prime and 448 is 7 * 64, so that takes x = amax / 2 for int8 (63.5) and x = 3 amax / 2^k or amax / 2^16 for
// e4m3. With bf16 and int8 one product is therefore enough, once r errs to the side that amax / 2 needs. (fp16 has multiples
// of 127 for amax, and so other ties.) tests/test_quantize.py tries every pair of x and amax.
// Otherwise one product does: what is quantised was itself rounded to float32 just before.
template <int FormOf, int Type, bool Int8>
struct Coder {
  static constexpr bool kOneProduct = FormOf != kPlain || (Type == kBf16 && Int8);
  float scale, inverse, rest;

  ATTNKIT_DEVICE Coder(float s, float amax) : scale(s), inverse(reciprocal(s)), rest(0.0f) {
    if constexpr (FormOf == kPlain && Type != kF32) {
      inverse = __uint_as_float(__float_as_uint(inverse) - 2);  // below 1 / s: `rest` is positive, and a zero keeps its sign
      rest = __fmaf_rn(-inverse, s, 1.0f) * inverse;
      if constexpr (kOneProduct) {
        const float half = 0.5f * amax, right = __fmaf_rn(half, inverse, half * rest) + kRounder;
        inverse += rest;
        const float got = __fmaf_rn(half, inverse, kRounder);
        if (got != right) inverse = __uint_as_float(__float_as_uint(inverse) + (got < right ? 1 : -1));
      }
    }
  }

  ATTNKIT_DEVICE uint2 codes(float (&v)[kLane]) const {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      if constexpr (kOneProduct)
        v[i] = Int8 ? __fmaf_rn(v[i], inverse, kRounder) : v[i] * inverse;
      else {
        v[i] = Type == kF32 ? __fdiv_rn(v[i], scale) : __fmaf_rn(v[i], inverse, v[i] * rest);
        if (Int8) v[i] += kRounder;
      }
    }
    return Int8 ? make_uint2(low_bytes(v), low_bytes(v + 4)) : make_uint2(to_e4m3(v), to_e4m3(v + 4));
  }

  ATTNKIT_DEVICE void put(float (&v)[kLane], char* to, bool passing) const { store(reinterpret_cast<uint2*>(to), codes(v), passing); }
};

template <bool Int8>
struct Scale {
  static constexpr float kTop = Int8 ? 127.0f : 448.0f, kInverse = 1.0f / kTop;

  static ATTNKIT_DEVICE bool usual(u32 amax) { return amax - 0x26800000u < 0x32000000u; }  // from 2^-50 to 2^50

  // amax / kTop as IEEE rounds it; usual amax only.
  static ATTNKIT_DEVICE float of(float amax) {
    const float q = amax * kInverse;
    return __fmaf_rn(__fmaf_rn(-kTop, q, amax), kInverse, q);
  }
};

// ---- one row: this thread's first chunk of what is read and written; chunk c is c * step bytes further ----

template <int FormOf, int Type>
struct Row {
  using Part = Chunk<Type>;
  const char *x, *up, *weight;  // up: kSiluMul; weight, and residual or null: kRmsNorm
  char *residual, *out;

  ATTNKIT_DEVICE Row(const QuantizeParams& p, i64 m) {
    const u32 at = threadIdx.x * Part::kBytes;
    x = p.x + m * p.x_row + at;
    up = x + static_cast<i64>(p.chunks) * Part::kBytes;
    weight = p.weight + at;
    residual = FormOf == kRmsNorm && p.residual ? p.residual + m * p.residual_row + at : nullptr;
    out = p.out + m * p.out_row + threadIdx.x * kLane;
  }

  static ATTNKIT_DEVICE i64 step(i64 c) { return c * (blockDim.x * static_cast<u32>(Part::kBytes)); }
  ATTNKIT_DEVICE char* codes(i64 c) const { return out + c * (blockDim.x * static_cast<u32>(kLane)); }

  // Brings the row nearer before it may be read: L2 stays coherent with whoever still writes it.
  ATTNKIT_DEVICE void prefetch(i64 c) const {
    if (threadIdx.x % (128 / Part::kBytes)) return;
    prefetch_l2(x + step(c));
    if constexpr (FormOf == kSiluMul) prefetch_l2(up + step(c));
    if constexpr (FormOf == kRmsNorm) {
      // By one CTA: asked for by all of them, these few lines held 1024 rows up by a microsecond.
      if (blockIdx.x == 0) prefetch_l2(weight + step(c));
      if (residual) prefetch_l2(residual + step(c));
    }
  }

  // b: the residual's chunk, or up's.
  ATTNKIT_DEVICE void read(Part& a, Part& b, i64 c) const {
    a.template load<kOnce>(x + step(c));
    if constexpr (FormOf == kSiluMul) b.template load<kOnce>(up + step(c));
    if constexpr (FormOf == kRmsNorm)
      if (residual) b.template load<kOnce>(residual + step(c));
  }

  // The sum becomes the residual, and a.
  ATTNKIT_DEVICE void add(Part& a, const Part& b, i64 c, bool passing) const {
    float h[kLane], r[kLane];
    a.widen(h);
    b.widen(r);
#pragma unroll
    for (int i = 0; i < kLane; ++i) h[i] += r[i];
    a.narrow(h);
    a.store(residual + step(c), passing);
  }

  ATTNKIT_DEVICE void read_weight(Part& w, i64 c) const {
    if constexpr (FormOf == kRmsNorm) w.template load<kByRows>(weight + step(c));
  }

  // What is quantised, without the norm's root. `squares`: the sum of the chunk's.
  ATTNKIT_DEVICE void values(const Part& a, const Part& b, const Part& w, float (&v)[kLane], float& squares) const {
    a.widen(v);
    squares = 0.0f;
    if constexpr (FormOf == kRmsNorm) {
      float factor[kLane];
      w.widen(factor);
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        squares = __fmaf_rn(v[i], v[i], squares);
        v[i] *= factor[i];
      }
    }
    if constexpr (FormOf == kSiluMul) {
      float u[kLane];
      b.widen(u);
      // exp overflows to infinity for a very negative gate; the sigmoid is then 0.
#pragma unroll
      for (int i = 0; i < kLane; ++i) v[i] = v[i] * reciprocal(1.0f + exp2_fast(-kLog2e * v[i])) * u[i];
    }
  }

  // The same from memory, once the row has been read and its residual written.
  ATTNKIT_DEVICE void values_again(i64 c, float (&v)[kLane]) const {
    Part a, b, w;
    float ignored;
    a.template load<kOnce>((FormOf == kRmsNorm && residual ? residual : x) + step(c));
    if constexpr (FormOf == kSiluMul) b.template load<kOnce>(up + step(c));
    read_weight(w, c);
    values(a, b, w, v, ignored);
  }
};

// This thread's codes of a row with any scale; int8 takes a NaN as 0. Nothing is unrolled: it is seldom wanted, and would
// take the registers of what is.
template <int FormOf, int Type, bool Int8>
ATTNKIT_DEVICE void put_by_the_book(const Row<FormOf, Type>& row, float scale, int chunks) {
#pragma unroll 1
  for (i64 c = 0; c * blockDim.x + threadIdx.x < chunks; ++c) {
    float v[kLane];
    row.values_again(c, v);
#pragma unroll 1
    for (int i = 0; i < kLane; ++i) {
      v[i] = __fdiv_rn(v[i], scale);
      if (Int8) v[i] = (v[i] == v[i] ? fminf(fmaxf(v[i], -127.0f), 127.0f) : 0.0f) + kRounder;
    }
    *reinterpret_cast<uint2*>(row.codes(c)) = Int8 ? make_uint2(low_bytes(v), low_bytes(v + 4)) : make_uint2(to_e4m3(v), to_e4m3(v + 4));
  }
}

// Contiguous bytes (a multiple of 16, both ends aligned to 16) to shared memory.
ATTNKIT_DEVICE void copy_row(u32 to, const char* from, u32 bytes, u32 barrier) {
  asm volatile(
      "{\n.reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_normal.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n}" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// A group's ring of rows in shared memory, filled by bulk copies ahead of time: so what is in flight does not depend on how
// many threads there are to wait for it.
template <int FormOf, int Type>
struct Ring {
  u32 data, barriers, slot_bytes, row_bytes;

  ATTNKIT_DEVICE explicit Ring(const QuantizeParams& p)
      : slot_bytes(p.slot_bytes), row_bytes(p.chunks * Chunk<Type>::kBytes * (FormOf == kSiluMul ? 2 : 1)) {
    extern __shared__ __align__(128) char memory[];
    const u32 base = smem_address(memory), all = blockDim.y * p.slots * 8;
    barriers = base + threadIdx.y * p.slots * 8;
    data = base + (all + 127) / 128 * 128 + threadIdx.y * p.slots * slot_bytes;
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.slots; ++i) mbarrier_init(barriers + i * 8, 1);
      mbarrier_init_fence();
    }
    __syncthreads();
  }

  // By thread 0 of the group. The residual's row lies behind x's.
  ATTNKIT_DEVICE void fill(const Row<FormOf, Type>& row, int slot) const {
    const u32 to = data + slot * slot_bytes, barrier = barriers + slot * 8;
    const bool both = FormOf == kRmsNorm && row.residual;
    mbarrier_arrive_expect(barrier, both ? 2 * row_bytes : row_bytes);
    copy_row(to, row.x, row_bytes, barrier);
    if (both) copy_row(to + row_bytes, row.residual, row_bytes, barrier);
  }

  ATTNKIT_DEVICE void read(const Row<FormOf, Type>& row, Chunk<Type>& a, Chunk<Type>& b, int slot, int c) const {
    const u32 at = data + slot * slot_bytes + (c * blockDim.x + threadIdx.x) * Chunk<Type>::kBytes;
    a.load_staged(at);
    if constexpr (FormOf == kSiluMul) b.load_staged(at + row_bytes / 2);
    if constexpr (FormOf == kRmsNorm)
      if (row.residual) b.load_staged(at + row_bytes);
  }
};

struct NoRing {
  ATTNKIT_DEVICE explicit NoRing(const QuantizeParams&) {}
};
template <bool, class A, class B>
struct Either {
  using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using Type = B;
};

// kHeld: a row goes straight to registers, and fits. kLong: what it has beyond that is read again for its codes. kStreamed:
// rows come through a ring, and fit.
enum Way : int { kHeld = 0, kLong = 1, kStreamed = 2 };

// A thread keeps Chunks of a row: as they are, or, where something is computed first, as what is quantised.
template <int FormOf, int Type, bool Int8, int Chunks, int WayOf>
ATTNKIT_DEVICE void quantize(const QuantizeParams& p) {
  constexpr bool Streamed = WayOf == kStreamed;
  const int step = blockDim.x, place = threadIdx.x;
  const i64 stride = static_cast<i64>(gridDim.x) * blockDim.y;
  const typename Either<Streamed, Ring<FormOf, Type>, NoRing>::Type ring(p);
  i64 m = blockIdx.x + static_cast<i64>(gridDim.x) * threadIdx.y;
  launch_dependents();
  // What takes long plain rows by the thousand is a few percent faster without asking.
  if constexpr (FormOf != kPlain || Chunks < 4) {
    if (blockIdx.x < p.ahead && m < p.M) {
      const Row<FormOf, Type> row(p, m);
#pragma unroll
      for (int c = 0; c < Chunks; ++c)
        if (c * step + place < p.chunks) row.prefetch(c);
    }
  }
  wait_for_previous_grid();
  if constexpr (Streamed) {
    if (place == 0)
      for (int i = 0; i < p.slots && m + i * stride < p.M; ++i) ring.fill(Row<FormOf, Type>(p, m + i * stride), i);
  }
  Chunk<Type> w[Chunks];
  if constexpr (Streamed) {
#pragma unroll
    for (int c = 0; c < Chunks; ++c)
      if (c * step + place < p.chunks) Row<FormOf, Type>(p, 0).read_weight(w[c], c);
  }
  int slot = 0, turn = 0;
  u32 parity = 0;
  for (; m < p.M; m += stride, turn ^= 1) {
    const Row<FormOf, Type> row(p, m);
    Chunk<Type> a[Chunks], b[Chunks];
    float kept[FormOf == kPlain ? 1 : Chunks][kLane];
    if constexpr (Streamed) mbarrier_wait(ring.barriers + slot * 8, parity);
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      if (c * step + place >= p.chunks) continue;
      if constexpr (Streamed)
        ring.read(row, a[c], b[c], slot, c);
      else
        row.read(a[c], b[c], c);
    }
    if constexpr (!Streamed) {
#pragma unroll
      for (int c = 0; c < Chunks; ++c)
        if (c * step + place < p.chunks) row.read_weight(w[c], c);
    }
    u32 top = 0;
    float peak = 0.0f, squares[Chunks] = {};
    if constexpr (FormOf == kPlain) {
#pragma unroll
      for (int c = 0; c < Chunks; ++c)
        if (c * step + place < p.chunks) top = larger(top, a[c]);
      top = finish<Type>(top);
    } else {
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        if (c * step + place >= p.chunks) continue;
        if (FormOf == kRmsNorm && row.residual) row.add(a[c], b[c], c, p.passing);
        row.values(a[c], b[c], w[c], kept[c], squares[c]);
        peak = larger(peak, kept[c]);
      }
    }
    if constexpr (WayOf == kLong) {
#pragma unroll 1
      for (i64 c = Chunks; c * step + place < p.chunks; ++c) {
        Chunk<Type> far_a, far_b, far_w;
        float v[kLane], more;
        row.read(far_a, far_b, c);
        row.read_weight(far_w, c);
        if (FormOf == kRmsNorm && row.residual) row.add(far_a, far_b, c, p.passing);
        row.values(far_a, far_b, far_w, v, more);
        squares[0] += more;
        peak = larger(peak, v);
      }
    }
    top = max(top, __float_as_uint(peak));

    const float sum = over_row<FormOf == kRmsNorm, Streamed>(top, squares, turn);
    if constexpr (Streamed) {
      // Every thread of the group has what it needs of this slot.
      if (place == 0 && m + p.slots * stride < p.M) ring.fill(Row<FormOf, Type>(p, m + p.slots * stride), slot);
      if (++slot == p.slots) slot = 0, parity ^= 1;
    }
    // A norm's root cancels out of the values: h * weight is what is quantised, and the root is in the scale alone.
    const float root = FormOf == kRmsNorm ? rsqrtf(__fmaf_rn(sum, p.inverse_k, p.eps)) : 1.0f;
    if (Scale<Int8>::usual(top) && root > 0.0f) {
      const float amax = __uint_as_float(top), scale = Scale<Int8>::of(amax);
      if (place == 0) p.scale[m] = FormOf == kRmsNorm ? scale * root : scale;
      const Coder<FormOf, Type, Int8> coder(scale, amax);
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        if (c * step + place >= p.chunks) continue;
        if constexpr (FormOf == kPlain) a[c].widen(kept[0]);
        coder.put(kept[FormOf == kPlain ? 0 : c], row.codes(c), p.passing);
      }
      if constexpr (WayOf == kLong) {
#pragma unroll 1
        for (i64 c = Chunks; c * step + place < p.chunks; ++c) {
          float v[kLane];
          row.values_again(c, v);
          coder.put(v, row.codes(c), p.passing);
        }
      }
    } else {
      float scale = __fdiv_rn(__uint_as_float(top), Scale<Int8>::kTop);
      const bool zeros = scale == 0.0f;
      if (zeros) scale = 1.0f;
      const float said = zeros ? scale : scale * root;
      if (said != said) scale = said;
      if (place == 0) p.scale[m] = said;
      put_by_the_book<FormOf, Type, Int8>(row, scale, p.chunks);
    }
  }
}

// Plain 16-bit rows whose K is a multiple of 16, a CTA (or a warp of one) each: a thread has pairs of neighbouring chunks, so
// that its codes are stores of 16 bytes. A line's other half is its neighbour instruction's, so loads may stay in L1; and 32
// or 40 registers leave room for twice the rows of `quantize`.
template <int Type, bool Int8, int Pairs>
ATTNKIT_DEVICE void quantize_pairs(const QuantizeParams& p) {
  constexpr int Bytes = Chunk<Type>::kBytes;
  const i64 m = blockIdx.x + static_cast<i64>(gridDim.x) * threadIdx.y;
  const int chunks = m < p.M ? p.chunks : 0;
  const char* x = p.x + m * p.x_row + threadIdx.x * (2 * Bytes);
  const u32 step = blockDim.x * (2 * Bytes), place = 2 * threadIdx.x;  // pair i: chunk 2 * i * blockDim.x + place
  launch_dependents();
  if (blockIdx.x < p.ahead && threadIdx.x % (128 / (2 * Bytes)) == 0) {
#pragma unroll
    for (int i = 0; i < Pairs; ++i)
      if (static_cast<int>(2 * i * blockDim.x + place) < chunks) prefetch_l2(x + i * step);
  }
  wait_for_previous_grid();
  Chunk<Type> a[Pairs], b[Pairs];
  u32 top = 0;
  float none[1] = {};
#pragma unroll
  for (int i = 0; i < Pairs; ++i) {
    if (static_cast<int>(2 * i * blockDim.x + place) >= chunks) continue;
    a[i].template load<kByRows>(x + i * step);
    b[i].template load<kByRows>(x + i * step + Bytes);
  }
#pragma unroll
  for (int i = 0; i < Pairs; ++i)
    if (static_cast<int>(2 * i * blockDim.x + place) < chunks) top = larger(larger(top, a[i]), b[i]);
  top = finish<Type>(top);
  over_row<false, false>(top, none, 0);
  if (!chunks) return;
  if (Scale<Int8>::usual(top)) {
    const float amax = __uint_as_float(top), scale = Scale<Int8>::of(amax);
    if (threadIdx.x == 0) p.scale[m] = scale;
    const Coder<kPlain, Type, Int8> coder(scale, amax);
    char* out = p.out + m * p.out_row + threadIdx.x * (2 * kLane);
#pragma unroll
    for (int i = 0; i < Pairs; ++i, out += blockDim.x * (2 * kLane)) {
      if (static_cast<int>(2 * i * blockDim.x + place) >= chunks) continue;
      float v[kLane];
      a[i].widen(v);
      const uint2 low = coder.codes(v);
      b[i].widen(v);
      const uint2 high = coder.codes(v);
      store(reinterpret_cast<uint4*>(out), make_uint4(low.x, low.y, high.x, high.y), p.passing);
    }
  } else {
    float scale = __fdiv_rn(__uint_as_float(top), Scale<Int8>::kTop);
    if (scale == 0.0f) scale = 1.0f;
    if (threadIdx.x == 0) p.scale[m] = scale;
    put_by_the_book<kPlain, Type, Int8>(Row<kPlain, Type>(p, m), scale, p.chunks);
  }
}

}  // namespace attnkit
