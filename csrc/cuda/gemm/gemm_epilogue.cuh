// What comes after a W8A8 product: sums times both scales, plus bias, rounded once, in whole lines to memory.
#pragma once
#include "../common/convert.cuh"

namespace attnkit {

ATTNKIT_DEVICE float load_as_float(const void* p, i64 i, int type) {
  if (type == kF32) return static_cast<const float*>(p)[i];
  const u16 bits = static_cast<const u16*>(p)[i];
  return type == kBf16 ? __uint_as_float(static_cast<u32>(bits) << 16) : f16_to_float(bits);
}

ATTNKIT_DEVICE float as_float(int x) { return __int2float_rn(x); }
ATTNKIT_DEVICE float as_float(float x) { return x; }

ATTNKIT_DEVICE void store_matrix_x2(u32 to, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

// A value the compiler knows nothing about: what is computed from it stays behind this point, and takes no register before.
ATTNKIT_DEVICE u32 opaque(u32 x) {
  asm volatile("" : "+r"(x)::"memory");
  return x;
}

// Scales and biases of a tile's columns in shared memory, two columns in 16 bytes: scale, scale, bias, bias.
ATTNKIT_DEVICE u32 scale_offset(int column) { return column / 2 * 16 + column % 2 * 4; }

ATTNKIT_DEVICE void store_scale(u32 scales, int column, float scale, float bias) {
  const u32 to = scales + scale_offset(column);
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(scale) : "memory");
  asm volatile("st.shared.f32 [%0 + 8], %1;" ::"r"(to), "f"(bias) : "memory");
}

// Not volatile, so that many are in flight: ``from`` must come from opaque() behind the barrier that guards it.
ATTNKIT_DEVICE float4 load_scales(u32 from) {
  float4 v;
  asm("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(from));
  return v;
}

// Where a product's result goes. Strides in bytes.
struct GemmOut {
  char* data;    // [M, N]
  i64 stride;
  int M, N;
  int type;      // kBf16, kF16 or kF32
  int whole;     // data and stride are multiples of 16 bytes
};

// One warp's rows of a tile: 16 of them, as wgmma leaves them (thread: rows lane / 4 and 8 more, columns 2 (lane % 4) and
// one more of every group of 8). ``scales``: those of the first column, opaque. ``staging``: 2 KB of the warp's own.
struct GemmRows {
  const GemmOut& out;
  int row;             // the first of the 16
  float scale[2];      // of the thread's two rows
  u32 scales;
  u32 staging;

  // The thread's four results of one group of columns.
  template <class Sum>
  ATTNKIT_DEVICE void values(const Sum* sums, u32 scales_at, float (&y)[4]) const {
    const float4 w = load_scales(scales_at);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      y[2 * r] = fmaf(as_float(sums[2 * r]) * scale[r], w.x, w.z);
      y[2 * r + 1] = fmaf(as_float(sums[2 * r + 1]) * scale[r], w.y, w.w);
    }
  }

  // The first ``used`` of ``Groups`` groups of 8 columns, from ``column`` on.
  template <int Groups, class Sum>
  ATTNKIT_DEVICE void store(const Sum (&sums)[4 * Groups], int column, int used) const {
    if (row >= out.M) return;
    const bool inside = out.whole && used == Groups && column + 8 * Groups <= out.N;
    if (out.type == kF32) {
      store_f32<Groups>(sums, column, used);
    } else if (!inside) {
      store_edge<Groups>(sums, column, used);
    } else if (out.type == kBf16) {
      store_inside<Groups, true>(sums, column);
    } else {
      store_inside<Groups, false>(sums, column);
    }
  }

  // Through shared memory, 64 columns at a time, so that a warp stores whole lines. 16-byte units are swizzled by row.
  template <int Groups, bool Bf16, class Sum>
  ATTNKIT_DEVICE void store_inside(const Sum (&sums)[4 * Groups], int column) const {
    const int lane = opaque(threadIdx.x % 32), r = lane / 8, unit = lane % 8;
    const u32 to = staging + lane % 16 * 128, turn = lane & 7, half = lane / 16;
    u32 at_scales = 0;
    char* line = out.data + (row + r) * out.stride + (column + 8 * unit) * 2;
#pragma unroll
    for (int first = 0; first < Groups; first += 8) {
      u32 words[16];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (first + j >= Groups) continue;
        if (j % 4 == 0) at_scales = opaque(scales + (first + j) * 64 + lane % 4 * 16);  // so many in flight, not all
        float y[4];
        values(sums + 4 * (first + j), at_scales + j % 4 * 64, y);
        words[2 * j] = pack<Bf16>(y[0], y[1]);
        words[2 * j + 1] = pack<Bf16>(y[2], y[3]);
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const u32 at = to + (((j + half) ^ turn) << 4);
        if (first + j + 1 < Groups) {
          store_matrix_x4(at, words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3]);
        } else if (first + j < Groups) {
          store_matrix_x2(at, words[2 * j], words[2 * j + 1]);
        }
      }
      __syncwarp();
      if (first + unit >= Groups) continue;
      uint4 units[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) units[i] = load_shared<uint4>(staging + (r + 4 * i) * 128 + ((unit ^ ((r + 4 * i) & 7)) << 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + r + 4 * i < out.M) *reinterpret_cast<uint4*>(line + 4 * i * out.stride + 16 * first) = units[i];
      }
    }
  }

  // Tiles that end outside, and rows that do not start aligned: two columns at a time.
  template <int Groups, class Sum>
  ATTNKIT_DEVICE void store_edge(const Sum (&sums)[4 * Groups], int column, int used) const {
    const int lane = opaque(threadIdx.x % 32);
#pragma unroll
    for (int j = 0; j < Groups; ++j) {
      if (j >= used) break;
      float y[4];
      values(sums + 4 * j, opaque(scales + j * 64 + lane % 4 * 16), y);
      const int n = column + 8 * j + lane % 4 * 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int m = row + lane / 4 + 8 * r;
        const u32 pair = out.type == kBf16 ? pack_bf16(y[2 * r], y[2 * r + 1]) : pack_f16(y[2 * r], y[2 * r + 1]);
        u16* to = reinterpret_cast<u16*>(out.data + m * out.stride) + n;
        if (m >= out.M || n >= out.N) continue;
        if (out.whole && n + 1 < out.N) {
          *reinterpret_cast<u32*>(to) = pair;
        } else {
          to[0] = static_cast<u16>(pair);
          if (n + 1 < out.N) to[1] = static_cast<u16>(pair >> 16);
        }
      }
    }
  }

  template <int Groups, class Sum>
  ATTNKIT_DEVICE void store_f32(const Sum (&sums)[4 * Groups], int column, int used) const {
    const int lane = opaque(threadIdx.x % 32);
#pragma unroll
    for (int j = 0; j < Groups; ++j) {
      if (j >= used) break;
      float y[4];
      values(sums + 4 * j, opaque(scales + j * 64 + lane % 4 * 16), y);
      const int n = column + 8 * j + lane % 4 * 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int m = row + lane / 4 + 8 * r;
        float* to = reinterpret_cast<float*>(out.data + m * out.stride) + n;
        if (m >= out.M || n >= out.N) continue;
        if (out.whole && n + 1 < out.N) {
          *reinterpret_cast<float2*>(to) = make_float2(y[2 * r], y[2 * r + 1]);
        } else {
          to[0] = y[2 * r];
          if (n + 1 < out.N) to[1] = y[2 * r + 1];
        }
      }
    }
  }
};

}  // namespace attnkit
