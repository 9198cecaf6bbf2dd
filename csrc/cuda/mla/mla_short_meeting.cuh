// Where the pieces of one sequence meet in the short latent decode.
//
// A piece's CTA publishes its 64 rows, divided by their weights' sum, as f16; waits until all pieces have come; fetches its share of
// the rows, of all pieces, to shared memory in one go, and adds them up in the order of the pieces. Who has waited in vain
// leaves its share to the last to arrive, so that launches which keep each other from the multiprocessors come to an end.
#pragma once
#include "mla_wide_combine.cuh"

namespace attnkit {

struct MlaShortMeeting {
  static constexpr int RowBytes = 1024, SlotBytes = 64 * RowBytes, MostPieces = 160;  // no device has as many CTAs
  const MlaWideParams& p;
  int b, row0, index, count;
  int cell0, step, cells;  // piece i has slot and counters cell0 + i * step of ``cells``
  char* shared;            // all of it but for what lies at and beyond ``flag``: nothing else is needed any more
  int* flag;
  int warp;

  ATTNKIT_DEVICE int cell(int i) const { return cell0 + i * step; }
  ATTNKIT_DEVICE char* slot(int i) const { return reinterpret_cast<char*>(p.partial) + cell(i) * static_cast<u32>(SlotBytes); }
  // A row's: log2 of its sum of weights; what its values are to be multiplied by.
  ATTNKIT_DEVICE float2* weights(int i) const {
    return reinterpret_cast<float2*>(reinterpret_cast<char*>(p.partial) + cells * static_cast<u32>(SlotBytes) + cell(i) * 512u);
  }
  ATTNKIT_DEVICE int* arrived() const { return p.counters + cell(0); }
  ATTNKIT_DEVICE int* left() const { return p.counters + cells + cell(0); }
  ATTNKIT_DEVICE int* given_up(int i) const { return p.counters + 2 * cells + cell(i); }

  ATTNKIT_DEVICE static int lane() { return threadIdx.x & 31; }
  ATTNKIT_DEVICE int row() const { return warp % 4 * 16 + lane() / 4; }

  // Word w of a row has columns column(w) and the next: a thread's four words of 16 bytes are those it holds.
  ATTNKIT_DEVICE static int column(int w) { return w / 16 * 32 + w % 4 * 8 + w / 4 % 4 * 2; }

  // True where f16 does not hold them.
  ATTNKIT_DEVICE bool store(const float (&out)[64], const float (&by)[2]) const {
    char* to = slot(index) + row() * RowBytes + warp / 4 * 256 + lane() % 4 * 16;
    u32 most = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        u32 x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 4 * (4 * k + e) + 2 * r;
          x[e] = pack_f16(out[i] * by[r], out[i + 1] * by[r]);
          asm("max.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(most) : "r"(x[e]));
        }
        *reinterpret_cast<uint4*>(to + r * 8 * RowBytes + k * 64) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
    return (most & 0x7fff) >= 0x7c00 || (most >> 16 & 0x7fff) >= 0x7c00;
  }

  // A power of two for each row, by which f16 holds it; its weight tells.
  ATTNKIT_DEVICE void scale_down(const float (&out)[64], float (&by)[2], float (&up)[2]) const {
    int* most = reinterpret_cast<int*>(shared);
    if (threadIdx.x < 64) most[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = 0.f;
#pragma unroll
      for (int i = 2 * r; i < 64; i += 4) high = fmaxf(high, fmaxf(fabsf(out[i]), fabsf(out[i + 1])));
      atomicMax(most + row() + 8 * r, __float_as_int(high * by[r]));
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int down = max(0, (most[row() + 8 * r] >> 23) - 127 - 14);
      by[r] *= __int_as_float((127 - down) << 23), up[r] = __int_as_float((127 + down) << 23);
    }
  }

  // A warpgroup has 128 columns of all rows.
  ATTNKIT_DEVICE void publish(const float (&out)[64], float2 total0, float2 total1) const {
    const float2 total[2] = {total0, total1};
    float by[2], up[2] = {1.f, 1.f}, log_sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool none = total[r].y == 0.f;
      by[r] = none ? 0.f : reciprocal(total[r].y);
      log_sum[r] = none ? negative_infinity() : total[r].x + log2_fast(total[r].y);
    }
#pragma unroll 1
    for (bool again = false;; again = true) {
      const bool large = store(out, by);
      if (warp < 4 && lane() % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) weights(index)[row() + 8 * r] = make_float2(log_sum[r], up[r]);
      }
      if (!__syncthreads_or(large) || again) break;
      scale_down(out, by, up);
    }
  }

  // All pieces' rows [first, first + rows): a row's pieces one after another.
  ATTNKIT_DEVICE void fetch(int first, int rows) const {
#pragma unroll 1
    for (int i = warp; i < count; i += 16) {
      const char* from = slot(i) + first * RowBytes + lane() * 16;
      u32 to = smem_address(shared) + i * RowBytes + lane() * 16;
#pragma unroll 1
      for (int r = 0; r < rows; ++r, from += RowBytes, to += count * RowBytes) {
        copy_async_16(to, from, true);
        copy_async_16(to + 512, from + 512, true);
      }
    }
  }

  // A row's weights; a lane has each 32nd piece's.
  ATTNKIT_DEVICE void ask(int row, float2 (&w)[MostPieces / 32]) const {
#pragma unroll
    for (int k = 0; k < MostPieces / 32; ++k) {
      w[k] = make_float2(negative_infinity(), 0.f);
      if (32 * k + lane() < count) w[k] = load_l2(weights(32 * k + lane()) + row);
    }
  }

  // What a row's pieces are multiplied by, to ``factors``.
  ATTNKIT_DEVICE void weigh(int row, float2 (&w)[MostPieces / 32], float* factors) const {
    const MlaRows rows{p, b, row0, 0};
    float high = negative_infinity(), sum = 0.f;
#pragma unroll
    for (int k = 0; k < MostPieces / 32; ++k) high = fmaxf(high, w[k].x);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, d));
    const float base = high == negative_infinity() ? 0.f : high;
#pragma unroll
    for (int k = 0; k < MostPieces / 32; ++k) w[k].x = exp2_fast(w[k].x - base), sum += w[k].x;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    const float by = rows.finish(row, high, sum, lane() == 0);
#pragma unroll
    for (int k = 0; k < MostPieces / 32; ++k) {
      if (32 * k + lane() < count) factors[32 * k + lane()] = w[k].x * w[k].y * by;
    }
  }

  // Two columns of ``count`` pieces of a row, one after another; their factors begin at a multiple of 16 bytes.
  ATTNKIT_DEVICE static float2 sum_of(const char* from, const float* factors, int count) {
    float2 sum = make_float2(0.f, 0.f);
    int i = 0;
#pragma unroll 1
    for (; i + 8 <= count; i += 8, from += 8 * RowBytes, factors += 8) {
      const float4 low = *reinterpret_cast<const float4*>(factors), high = *reinterpret_cast<const float4*>(factors + 4);
      const float by[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        const float2 x = unpack(*reinterpret_cast<const u32*>(from + u * RowBytes), false);
        sum.x += x.x * by[u], sum.y += x.y * by[u];
      }
    }
#pragma unroll 1
    for (; i < count; ++i, from += RowBytes, ++factors) {
      const float2 x = unpack(*reinterpret_cast<const u32*>(from), false);
      sum.x += x.x * *factors, sum.y += x.y * *factors;
    }
    return sum;
  }

  ATTNKIT_DEVICE void write(int row, int w, float2 sum) const {
    const MlaRows rows{p, b, row0, 0};
    if (rows.has(row)) *reinterpret_cast<u32*>(rows.place(row) + column(w) * 2) = pack_bf16(sum.x, sum.y);
  }

  // A share of one row: half of the threads have the first half of its pieces, the others the rest.
  ATTNKIT_DEVICE void add_row(int row, const float* factors) const {
    const int w = threadIdx.x & 255, half = threadIdx.x >> 8, some = (count / 2 + 7) & ~7, from = half * some;
    float2* rest = reinterpret_cast<float2*>(shared + 145 * 1024) + w;
    float2 sum = sum_of(shared + from * RowBytes + w * 4, factors + from, half ? count - some : some);
    if (half) *rest = sum;
    __syncthreads();
    if (half) return;
    sum.x += rest->x, sum.y += rest->y;
    write(row, w, sum);
  }

  // Adds up the share of piece j. Weights are asked for before values, which take longer to come.
  ATTNKIT_DEVICE void add(int j) const {
    const int each = mla_divide(63 + count, count), first = j * each, rows = min(each, 64 - first), stride = (count + 7) & ~7;
    if (rows <= 0) return;
    float* factors = reinterpret_cast<float*>(shared + 144 * 1024);
#pragma unroll 1
    for (int r = warp;; r += 16) {
      float2 w[MostPieces / 32];
      if (r < rows) ask(first + r, w);
      if (r == warp) fetch(first, rows);
      if (r >= rows) break;
      weigh(first + r, w, factors + r * stride);
    }
    copy_async_wait_all();
    __syncthreads();
    if (rows == 1) return add_row(first, factors);
    const int w = threadIdx.x & 255;
#pragma unroll 1
    for (int r = threadIdx.x >> 8; r < rows; r += 2) {
      write(first + r, w, sum_of(shared + r * count * RowBytes + w * 4, factors + r * stride, count));
    }
  }

  enum { kAdds, kLastOfSome, kGivesUp };

  // Thread 0: says that this piece is published, and waits. The counter's low half counts the pieces that have come, its high
  // half those who gave up waiting.
  ATTNKIT_DEVICE int meet() const {
    const int old = add_release(arrived(), 1);
    if ((old & 0xffff) == count - 1) return old >> 16 ? kLastOfSome : kAdds;
    for (int i = 0; i < p.patience; ++i) {
      if ((read_acquire(arrived()) & 0xffff) == count) return kAdds;
    }
    *given_up(index) = 1;
    if ((add_release(arrived(), 1 << 16) & 0xffff) != count) return kGivesUp;
    *given_up(index) = 0;  // the last came just now, and did not see us give up
    return kAdds;
  }

  ATTNKIT_DEVICE int tell(int value) const {  // thread 0's value to all
    __syncthreads();
    if (threadIdx.x == 0) *flag = value;
    __syncthreads();
    return *reinterpret_cast<volatile int*>(flag);
  }

  // The counters are zero again when all have been here.
  ATTNKIT_DEVICE void meet_and_add() const {
    const int todo = tell(threadIdx.x == 0 ? meet() : 0);
#pragma unroll 1
    for (int n = todo == kGivesUp ? 0 : -1; n < (todo == kLastOfSome ? count : 0); ++n) {
      const int j = n < 0 ? index : n;
      if (n >= 0 && (n == index || tell(threadIdx.x == 0 ? *reinterpret_cast<volatile int*>(given_up(n)) : 0) == 0)) continue;
      add(j);
      if (n >= 0 && threadIdx.x == 0) *given_up(n) = 0;
    }
    if (threadIdx.x == 0 && add_relaxed(left(), 1) == count - 1) *arrived() = 0, *left() = 0;
  }
};

}  // namespace attnkit
