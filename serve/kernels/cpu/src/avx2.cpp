// All dtypes on x86-64 with AVX2, FMA and F16C, in float32 arithmetic.
#include "halve_cpu.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace halve {
namespace {

TARGET inline void half_to_floats(const uint16_t* bits, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i))));
  }
  if (i < count) {
    uint16_t rest[8] = {};
    float wide[8];
    std::memcpy(rest, bits + i, static_cast<size_t>(count - i) * 2);
    _mm256_storeu_ps(wide, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rest))));
    std::memcpy(to + i, wide, static_cast<size_t>(count - i) * 4);
  }
}

TARGET inline void floats_to_half(const float* from, uint16_t* bits) {  // 16 of them
  for (int64_t i = 0; i < kRows; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bits + i), half);
  }
}

#include "float_rows.h"
#include "float_store.h"
#include "round_rows.inc"

namespace stream {

using F = __m256;
using I = __m256i;
constexpr int kLanes = 8, kSide = 2;

INLINE F zero() { return _mm256_setzero_ps(); }
INLINE F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F pick(F entries, I masks) { return _mm256_permutevar8x32_ps(entries, masks); }
INLINE I load_masks(const uint8_t* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }
INLINE I next_group(I masks) { return _mm256_srli_epi32(masks, 4); }
INLINE void store_sums(float* out, F sums) { _mm256_store_ps(out, sums); }

INLINE void entries(const float* four, F& first, F& second) {
  const F x = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
  first = _mm256_permutevar_ps(x, _mm256_setr_epi32(0, 0, 1, 0, 2, 0, 1, 0));
  second = _mm256_permutevar_ps(x, _mm256_setr_epi32(0, 3, 3, 1, 3, 2, 2, 0));
}

INLINE F from_top(I bytes) {
  const I bits = _mm256_and_si256(_mm256_srai_epi32(bytes, 4), _mm256_set1_epi32(static_cast<int>(0x87f00000)));
  return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p120f));  // see `from_float8`
}

template <DType D>
INLINE void load_kept(const uint8_t* values, int part, int group, F& first, F& second) {
  if constexpr (D == kInt8) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(values + group % 2 * 32 + 16 * part));
    const I pairs = _mm256_cvtepi16_epi32(bytes);
    first = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, 24), 24));
    second = _mm256_cvtepi32_ps(_mm256_srai_epi32(pairs, 8));
  } else if constexpr (D == kFloat8) {
    const I bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + 32 * part));
    const int8_t(*top)[64] = kTopBytes.at[group % 2];
    first = from_top(_mm256_shuffle_epi8(bytes, _mm256_load_si256(reinterpret_cast<const I*>(top[0]))));
    second = from_top(_mm256_shuffle_epi8(bytes, _mm256_load_si256(reinterpret_cast<const I*>(top[1]))));
  } else if (D == kBFloat16) {
    const I pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + 32 * part));
    first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    second = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  } else if (D == kFloat16) {
    first = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(values + 16 * part)));
    second = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(values + 32 + 16 * part)));
  } else {
    first = _mm256_load_ps(reinterpret_cast<const float*>(values) + 8 * part);
    second = _mm256_load_ps(reinterpret_cast<const float*>(values + 64) + 8 * part);
  }
}

#include "stream_float.inc"

}  // namespace stream

template <DType D>
TARGET inline void widen_scaled(const uint8_t* values, int group, float* first, float* second) {
  for (int part = 0; part < 2; ++part) {
    __m256 a, b;
    stream::load_kept<D>(values, part, group, a, b);
    _mm256_storeu_ps(first + 8 * part, a);
    _mm256_storeu_ps(second + 8 * part, b);
  }
}

namespace int8 {

using I = __m256i;
constexpr int kLanes = 8, kSide = 2, kMostTokens = 2;

INLINE I none() { return _mm256_setzero_si256(); }
INLINE I add_products(I sums, I a, I b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }
INLINE I pick(I entries, I masks) { return _mm256_permutevar8x32_epi32(entries, masks); }
INLINE I pairs_of(const int16_t* at) {
  int64_t four;
  std::memcpy(&four, at, 8);
  return _mm256_shuffle_epi8(_mm256_set1_epi64x(four), _mm256_load_si256(reinterpret_cast<const I*>(kPairBytes.at)));
}
INLINE I load_masks(const uint8_t* at) { return _mm256_load_si256(reinterpret_cast<const I*>(at)); }
INLINE I next_group(I masks) { return _mm256_srli_epi32(masks, 4); }
INLINE I load_pairs(const uint8_t* at) {
  return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
}
INLINE void add_scaled(float* sums, I whole, float power) {
  const __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(power), _mm256_load_ps(sums));
  _mm256_store_ps(sums, sum);
}

#include "stream_int8.inc"

}  // namespace int8

namespace panel {
constexpr int kLanes = 8, kMost = 4, kPair = 2;
#include "panel_float.inc"
}  // namespace panel

namespace dense {

using V = __m256;
using S = __m256;
constexpr int kLanes = 8, kDenseFew = 2;

INLINE S zero() { return _mm256_setzero_ps(); }
INLINE S multiply_add(V a, V b, S sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE float total(S sum) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <DType D>
INLINE V load(const uint8_t* at, int64_t count) {
  alignas(32) uint8_t whole[32];
  if (__builtin_expect(count < kLanes, 0)) {
    std::memset(whole, 0, sizeof whole);
    std::memcpy(whole, at, static_cast<size_t>(count * value_bytes(D)));
    at = whole;
  }
  if (D == kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  if (D == kFloat16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
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

const RoundRows kAvx2Round = round_rows;
const DenseKernel kAvx2Dense = dense::run;
const Kernel kAvx2Stream{stream::float_scratch, stream::float_arrange_units, stream::float_arrange,
                         stream::float_stream_units, stream::float_stream_run};
const Kernel kAvx2Int8{int8::int8_scratch, int8::int8_arrange_units, int8::int8_arrange, int8::int8_units, int8::int8_run};
const Kernel kAvx2Panel{panel::panel_scratch, panel::panel_arrange_units, panel::panel_arrange, panel::panel_units,
                        panel::panel_run};

}  // namespace halve
#endif
