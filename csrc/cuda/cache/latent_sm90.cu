// write_latent: a warp quantises one token of DeepSeek's latent cache, 16 bytes a lane and store.
#include "../common/e4m3.cuh"

namespace attnkit {

constexpr int kLatent = 512, kLatentBlock = 128, kRope = 64, kLatentTokens = 8;  // tokens of a CTA: its warps

struct LatentParams {
  const char* latent;  // [T, 512]
  const char* rope;    // [T, 64]
  char* cache;         // [P, S, 656]: 512 e4m3, 4 float32 scales, 64 bf16
  const i64* slots;    // [T]
  i64 latent_token, rope_token, cache_page, cache_slot;  // strides in bytes
  i64 pool;                                              // P S
  int T, page_size;
};

// Sixteen bytes of a row as floats: eight of 16 bits, or four.
template <int Type>
ATTNKIT_DEVICE void load_floats(const char* from, float* to) {
  const uint4 x = *reinterpret_cast<const uint4*>(from);
  const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (Type == kF32) {
      to[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack(words[i], Type == kBf16);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  }
}

// A block's scale, from a lane's 16 of its 128 values: the largest magnitude / 448, 1 for zeros, NaN unless all are finite.
ATTNKIT_DEVICE float block_scale(const float* x) {
  const float infinity = -negative_infinity();
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) most = fmaxf(most, fabsf(x[i]) < infinity ? fabsf(x[i]) : infinity);
#pragma unroll
  for (int lanes = 1; lanes < kLatentBlock / 16; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes));
  const float scale = __fdiv_rn(most, 448.0f);
  return scale == 0.0f ? 1.0f : scale < infinity ? scale : __int_as_float(0x7fc00000);
}

template <int Type>
ATTNKIT_DEVICE void write_latent(const LatentParams& p) {
  launch_dependents();
  wait_for_previous_grid();
  const int t = blockIdx.x * kLatentTokens + threadIdx.y, lane = threadIdx.x;
  if (t >= p.T) return;
  const i64 at = p.slots[t];
  if (at < 0 || at >= p.pool) return;
  const i64 page = at >> 32 ? at / p.page_size : static_cast<u32>(at) / static_cast<u32>(p.page_size);
  char* row = p.cache + page * p.cache_page + (at - page * p.page_size) * p.cache_slot;

  constexpr int kSize = Type == kF32 ? 4 : 2, kChunk = 16 / kSize;  // bytes of a value, values of 16 bytes
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; i += kChunk) load_floats<Type>(p.latent + t * p.latent_token + (lane * 16 + i) * kSize, x + i);
  const float scale = block_scale(x);
  u32 codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 low = pack_e4m3(__fdiv_rn(x[4 * i], scale), __fdiv_rn(x[4 * i + 1], scale));
    codes[i] = low | pack_e4m3(__fdiv_rn(x[4 * i + 2], scale), __fdiv_rn(x[4 * i + 3], scale)) << 16;
  }
  *reinterpret_cast<uint4*>(row + lane * 16) = make_uint4(codes[0], codes[1], codes[2], codes[3]);
  if (lane % (kLatentBlock / 16) == 0) *reinterpret_cast<float*>(row + kLatent + lane / (kLatentBlock / 16) * 4) = scale;

  if (lane < kRope / 8) {
    const char* from = p.rope + t * p.rope_token + lane * 8 * kSize;
    uint4 key;
    if constexpr (Type == kBf16) {
      key = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i += kChunk) load_floats<Type>(from + i * kSize, x + i);
      key = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
    }
    *reinterpret_cast<uint4*>(row + kLatent + 16 + lane * 16) = key;
  }
}

}  // namespace attnkit

#define ATTNKIT_LATENT(name, type)                                                                          \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ attnkit::LatentParams p) { \
    attnkit::write_latent<attnkit::type>(p);                                                                \
  }

ATTNKIT_LATENT(attnkit_write_latent_bf16, kBf16)
ATTNKIT_LATENT(attnkit_write_latent_f16, kF16)
ATTNKIT_LATENT(attnkit_write_latent_f32, kF32)
