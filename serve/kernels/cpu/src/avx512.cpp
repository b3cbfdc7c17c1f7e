// All dtypes on x86-64 with AVX-512, in float32 arithmetic.
#include "halve_cpu.h"
#include "kernels.h"

#if defined(__x86_64__)
#include "avx512_intrinsics.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace halve {
namespace {

#include "avx512_rows.inc"
#include "round_rows.inc"

namespace stream {

using F = __m512;
using I = __m512i;
constexpr int kLanes = 16, kSide = 2;

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F pick(F entries, I masks) { return _mm512_permutexvar_ps(masks, entries); }
INLINE I load_masks(const uint8_t* at) { return _mm512_load_si512(at); }
INLINE I next_group(I masks) { return _mm512_srli_epi32(masks, 4); }
INLINE void store_sums(float* out, F sums) { _mm512_store_ps(out, sums); }

INLINE void entries(const float* four, F& first, F& second) {
  const F x = _mm512_broadcast_f32x4(_mm_loadu_ps(four));
  // The low two bits of each lane choose one of the four.
  first = _mm512_permutevar_ps(x, _mm512_setr_epi32(0, 0, 1, 0, 2, 0, 1, 0, 0, 0, 1, 0, 2, 0, 1, 0));
  second = _mm512_permutevar_ps(x, _mm512_setr_epi32(0, 3, 3, 1, 3, 2, 2, 0, 0, 3, 3, 1, 3, 2, 2, 0));
}

INLINE F from_top(I bytes) {
  const I bits = _mm512_and_si512(_mm512_srai_epi32(bytes, 4), _mm512_set1_epi32(static_cast<int>(0x87f00000)));
  return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));  // see `from_float8`
}

template <DType D>
INLINE void load_kept(const uint8_t* values, int, int group, F& first, F& second) {
  if constexpr (D == kInt8) {
    const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + group % 2 * 32));
    const I pairs = _mm512_cvtepi16_epi32(bytes);
    first = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 24), 24));
    second = _mm512_cvtepi32_ps(_mm512_srai_epi32(pairs, 8));
  } else if constexpr (D == kFloat8) {
    const I bytes = _mm512_load_si512(values);
    first = from_top(_mm512_shuffle_epi8(bytes, _mm512_load_si512(kTopBytes.at[group % 2][0])));
    second = from_top(_mm512_shuffle_epi8(bytes, _mm512_load_si512(kTopBytes.at[group % 2][1])));
  } else if (D == kBFloat16) {
    const I pairs = _mm512_load_si512(values);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  } else if (D == kFloat16) {
    first = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(values)));
    second = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(values + 32)));
  } else {
    first = _mm512_load_ps(reinterpret_cast<const float*>(values));
    second = _mm512_load_ps(reinterpret_cast<const float*>(values + 64));
  }
}

#include "stream_float.inc"

}  // namespace stream

template <DType D>
TARGET inline void widen_scaled(const uint8_t* values, int group, float* first, float* second) {
  __m512 a, b;
  stream::load_kept<D>(values, 0, group, a, b);
  _mm512_storeu_ps(first, a);
  _mm512_storeu_ps(second, b);
}

namespace int8 {

INLINE __m512i add_products(__m512i sums, __m512i a, __m512i b) {
  return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
}

#include "avx512_int8.inc"

}  // namespace int8

namespace panel {
constexpr int kLanes = 16, kMost = 8, kPair = 2;
#include "panel_float.inc"
}  // namespace panel

namespace dense {

using V = __m512;
using S = __m512;
constexpr int kLanes = 16, kDenseFew = 6;

INLINE S zero() { return _mm512_setzero_ps(); }
INLINE S multiply_add(V a, V b, S sum) { return _mm512_fmadd_ps(a, b, sum); }
INLINE float total(S sum) { return _mm512_reduce_add_ps(sum); }

template <DType D>
INLINE V load(const uint8_t* at, int64_t count) {
  const __mmask16 exists = count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  if (D == kFloat32) return _mm512_maskz_loadu_ps(exists, at);
  const __m256i bits = _mm256_maskz_loadu_epi16(exists, at);
  if (D == kFloat16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

#include "dense.inc"

TARGET void run(const DenseCall& call, int64_t first, int64_t last) {
  switch (call.dtype) {
    case kBFloat16: return dense_part<kBFloat16>(call, first, last);
    case kFloat16: return dense_part<kFloat16>(call, first, last);
    case kFloat32: return dense_part<kFloat32>(call, first, last);
    default: return;  // no dtype of dense weights
  }
}

}  // namespace dense
}  // namespace

const RoundRows kAvx512Round = round_rows;
const DenseKernel kAvx512Dense = dense::run;
const Kernel kAvx512Stream{stream::float_scratch, stream::float_arrange_units, stream::float_arrange,
                           stream::float_stream_units, stream::float_stream_run};
const Kernel kAvx512Int8{int8::int8_scratch, int8::int8_arrange_units, int8::int8_arrange, int8::int8_units, int8::int8_run};
const Kernel kAvx512Panel{panel::panel_scratch, panel::panel_arrange_units, panel::panel_arrange, panel::panel_units,
                          panel::panel_run};

}  // namespace halve
#endif
