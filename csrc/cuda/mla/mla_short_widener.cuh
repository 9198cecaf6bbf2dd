// What the short latent decode does about an fp8 cache: each warp fetches eight tokens to its registers, all at once, and leaves
// them in shared memory as bf16 (rounded once, as the reference does), in the form that the products read.
#pragma once
#include "mla_wide_shared.cuh"

namespace attnkit {

// Zeros where ``valid`` is false. One piece of assembly, so that nothing waits for the value before it is used.
ATTNKIT_DEVICE uint4 load_16_or_zeros(const char* from, bool valid) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w) : "l"(from), "r"(static_cast<u32>(valid)) : "memory");
  return x;
}

ATTNKIT_DEVICE float load_4_or_zero(const char* from, bool valid) {
  float x;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.cg.f32 %0, [%1];\n}"
               : "=&f"(x) : "l"(from), "r"(static_cast<u32>(valid)) : "memory");
  return x;
}

// A token of the cache: 512 e4m3 values, the scales of each 128 as float32, 64 columns of rope as bf16.
struct MlaShortWidener {
  static constexpr int TokenBytes = 656, ScaleAt = 512, RopeAt = 528, Tokens = 8, PlaneBytes = 64 * 128;
  const MlaWideParams& p;
  int b, length, low, key0, row0;  // the first token's key, and its row of the tile
  u32 tile;

  ATTNKIT_DEVICE static u32 widened(u32 pair, float by) {
    const float2 x = unpack(e4m3x2_to_f16x2(static_cast<u16>(pair)), false);
    return pack_bf16(x.x * by, x.y * by);
  }

  ATTNKIT_DEVICE static void store_8(u32 to, u32 x, u32 y, float by) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(widened(x, by)), "r"(widened(x >> 16, by)),
                 "r"(widened(y, by)), "r"(widened(y >> 16, by))
                 : "memory");
  }

  // A lane has 16 columns of each token. Places are counted in 16 bytes; box_shift says how far apart pages are.
  ATTNKIT_DEVICE void run() const {
    const int lane = threadIdx.x & 31, key = key0 + lane % Tokens;
    const bool mine = key >= low && key < length;
    const u32 valid = __ballot_sync(~0u, mine);
    u32 place = 0;
    if (mine) {
      const u32 page = p.pages[b * p.pages_b + (key >> p.page_shift)];
      place = page * p.box_shift + (key & ((1 << p.page_shift) - 1)) * (TokenBytes / 16);
    }
    uint4 x[Tokens];
    float by[Tokens];
#pragma unroll
    for (int i = 0; i < Tokens; ++i) {
      const char* from = p.kv + static_cast<u64>(__shfl_sync(~0u, place, i)) * 16;
      x[i] = load_16_or_zeros(from + lane * 16, valid >> i & 1);
      by[i] = load_4_or_zero(from + ScaleAt + lane / 8 * 4, valid >> i & 1);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = lane / 8 + 4 * i, row = row0 + token;
      const char* from = p.kv + static_cast<u64>(__shfl_sync(~0u, place, token)) * 16 + RopeAt + lane % 8 * 16;
      copy_async_16(tile + 8 * PlaneBytes + row * 128 + ((lane % 8 ^ row % 8) << 4), from, valid >> token & 1);
    }
    // Planes side by side take turns with the halves of their 32 bytes: the same banks otherwise.
    const int second = lane / 4 & 1;
#pragma unroll
    for (int i = 0; i < Tokens; ++i) {
      const int row = row0 + i;
      const u32 to = tile + lane / 4 * PlaneBytes + row * 128 + (((lane % 4 * 2 + second) ^ row % 8) << 4);
      store_8(to, second ? x[i].z : x[i].x, second ? x[i].w : x[i].y, by[i]);
      store_8(to ^ 16, second ? x[i].x : x[i].z, second ? x[i].y : x[i].w, by[i]);
    }
    copy_async_wait_all();
    fence_async_shared();
  }
};

}  // namespace attnkit
