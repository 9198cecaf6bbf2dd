// write_kv and merge_states: 16 bytes a thread. Both are small beside a launch, so one launch is all they are.
#include "../common/e4m3.cuh"

namespace attnkit {

struct WriteParams {
  const char* k;  // [T, heads, 8 k_chunks], 16-bit
  const char* v;
  char* k_cache;  // [P, S, heads, 8 k_chunks]
  char* v_cache;
  const i64* slots;  // [T]
  const float* k_scale;  // [heads], or null
  const float* v_scale;
  i64 k_token, k_head, v_token, v_head;  // strides in bytes
  i64 kc_page, kc_slot, kc_head, vc_page, vc_slot, vc_head;
  i64 pool;  // P S
  int T, heads, k_chunks, v_chunks, page_size, k_scale_head, v_scale_head;
};

// Eight values over their scale, as bytes: halves to even, clamped to +-127 or +-448; as int8, NaN is 0.
template <int KvType>
ATTNKIT_DEVICE uint2 quantise(const uint4& from, bool bf16, float scale) {
  const u32 words[4] = {from.x, from.y, from.z, from.w};
  u32 half[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 x = unpack(words[i], bf16);
    x.x = __fdiv_rn(x.x, scale);
    x.y = __fdiv_rn(x.y, scale);
    if constexpr (KvType == kInt8) {
      int lo = x.x == x.x ? __float2int_rn(fminf(fmaxf(x.x, -127.0f), 127.0f)) : 0;
      int hi = x.y == x.y ? __float2int_rn(fminf(fmaxf(x.y, -127.0f), 127.0f)) : 0;
      half[i] = (lo & 0xff) | (hi & 0xff) << 8;
    } else {
      half[i] = pack_e4m3(x.x, x.y);
    }
  }
  return make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
}

// threadIdx.y and the grid count tokens, threadIdx.x a token's chunks: its keys, then its values.
template <int KvType, bool Bf16>
ATTNKIT_DEVICE void write_kv(const WriteParams& p) {
  launch_dependents();
  wait_for_previous_grid();
  const int t = blockIdx.x * blockDim.y + threadIdx.y;
  if (t >= p.T) return;
  const i64 at = p.slots[t];
  if (at < 0 || at >= p.pool) return;
  const i64 page = at >> 32 ? at / p.page_size : static_cast<u32>(at) / static_cast<u32>(p.page_size);
  const i64 slot = at - page * p.page_size;
  const int keys = p.heads * p.k_chunks, all = keys + p.heads * p.v_chunks;
  for (int c = threadIdx.x; c < all; c += blockDim.x) {
    const bool is_key = c < keys;
    const u32 index = is_key ? c : c - keys, chunks = is_key ? p.k_chunks : p.v_chunks;
    const u32 head = index / chunks, chunk = index - head * chunks;
    const char* from = is_key ? p.k + t * p.k_token + head * p.k_head : p.v + t * p.v_token + head * p.v_head;
    char* to = is_key ? p.k_cache + page * p.kc_page + slot * p.kc_slot + head * p.kc_head
                      : p.v_cache + page * p.vc_page + slot * p.vc_slot + head * p.vc_head;
    const uint4 x = *reinterpret_cast<const uint4*>(from + chunk * 16);
    if constexpr (KvType == kBf16) {
      *reinterpret_cast<uint4*>(to + chunk * 16) = x;
    } else {
      const float* scales = is_key ? p.k_scale : p.v_scale;
      const float scale = scales ? scales[head * static_cast<i64>(is_key ? p.k_scale_head : p.v_scale_head)] : 1.0f;
      *reinterpret_cast<uint2*>(to + chunk * 8) = quantise<KvType>(x, Bf16, scale);
    }
  }
}

struct MergeParams {
  const char* out_a;  // [rows, Dv], as out
  const float* lse_a;  // [rows]
  const char* out_b;
  const float* lse_b;
  char* out;
  float* lse;
  i64 rows;
  int chunks;  // of 16 bytes in a row
};

template <int Type>
ATTNKIT_DEVICE u32 mix(u32 a, u32 b, float wa, float wb) {
  // What lse -inf goes with may be anything, NaN included: it is left out by selection, not by its weight of 0.
  if constexpr (Type == kF32) {
    return __float_as_uint((wa != 0.0f ? __uint_as_float(a) * wa : 0.0f) + (wb != 0.0f ? __uint_as_float(b) * wb : 0.0f));
  } else {
    const float2 x = unpack(a, Type == kBf16), y = unpack(b, Type == kBf16);
    return pack<Type == kBf16>((wa != 0.0f ? x.x * wa : 0.0f) + (wb != 0.0f ? y.x * wb : 0.0f),
                               (wa != 0.0f ? x.y * wa : 0.0f) + (wb != 0.0f ? y.y * wb : 0.0f));
  }
}

template <int Type>
ATTNKIT_DEVICE void merge(const MergeParams& p) {
  launch_dependents();
  wait_for_previous_grid();
  const i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 row = at / p.chunks;
  if (row >= p.rows) return;
  const float a = p.lse_a[row], b = p.lse_b[row];
  const float top = fmaxf(a, b), base = top == negative_infinity() ? 0.0f : top;
  float wa = expf(a - base), wb = expf(b - base);
  const float total = wa + wb;
  if (at == row * p.chunks) p.lse[row] = total == 0.0f ? negative_infinity() : base + logf(total);
  if (total != 0.0f) {
    wa /= total;
    wb /= total;
  }
  const uint4 x = reinterpret_cast<const uint4*>(p.out_a)[at], y = reinterpret_cast<const uint4*>(p.out_b)[at];
  reinterpret_cast<uint4*>(p.out)[at] = make_uint4(mix<Type>(x.x, y.x, wa, wb), mix<Type>(x.y, y.y, wa, wb),
                                                   mix<Type>(x.z, y.z, wa, wb), mix<Type>(x.w, y.w, wa, wb));
}

}  // namespace attnkit

#define ATTNKIT_WRITE(name, kv, bf16)                                                                          \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ attnkit::WriteParams p) { \
    attnkit::write_kv<attnkit::kv, bf16>(p);                                                                  \
  }
#define ATTNKIT_MERGE(name, type)                                                                              \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ attnkit::MergeParams p) { \
    attnkit::merge<attnkit::type>(p);                                                                         \
  }

ATTNKIT_WRITE(attnkit_write_kv_copy, kBf16, true)
ATTNKIT_WRITE(attnkit_write_kv_e4m3_bf16, kE4m3, true)
ATTNKIT_WRITE(attnkit_write_kv_e4m3_f16, kE4m3, false)
ATTNKIT_WRITE(attnkit_write_kv_int8_bf16, kInt8, true)
ATTNKIT_WRITE(attnkit_write_kv_int8_f16, kInt8, false)
ATTNKIT_MERGE(attnkit_merge_bf16, kBf16)
ATTNKIT_MERGE(attnkit_merge_f16, kF16)
ATTNKIT_MERGE(attnkit_merge_f32, kF32)
