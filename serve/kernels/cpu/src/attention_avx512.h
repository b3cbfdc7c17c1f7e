// What multiplies bfloat16 in attention where no instruction does: products of float32, which a bfloat16 becomes by a shift.
#pragma once

#include "attention.h"

#if defined(__x86_64__)
#include "avx512_intrinsics.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define INLINE TARGET inline __attribute__((always_inline))
#define KERNEL(name) kAvx512##name

namespace halve {
namespace {

#include "avx512_transpose.inc"

// Rounds to bfloat16, to nearest even; NaN stays NaN.
INLINE __m256i narrow(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i whole = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(whole, 16));
}

#include "attention_floats_avx512.inc"

// The numbers in the low halves of words, or those in the high ones.
template <bool High>
INLINE __m512 widened(__m512i words) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return _mm512_castsi512_ps(High ? _mm512_and_si512(words, mask) : _mm512_slli_epi32(words, 16));
}

template <bool High, int M, int V>
INLINE void add_halves(const uint16_t* rows, int64_t row_stride, const uint32_t* words, Floats (&sum)[M][V]) {
  __m512 half[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) half[v] = widened<High>(_mm512_loadu_si512(words + v * 16));
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    int32_t two;
    std::memcpy(&two, rows + m * row_stride, 4);
    const __m512 number = widened<High>(_mm512_set1_epi32(two));
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = _mm512_fmadd_ps(number, half[v], sum[m][v]);
  }
}

// sum [M][V] += the products of two numbers of each row with words [V][16] of two; one half after the other, so that all fits into
// the registers.
template <int M, int V>
INLINE void add_pairs(const uint16_t* rows, int64_t row_stride, const uint32_t* words, Floats (&sum)[M][V]) {
  add_halves<false>(rows, row_stride, words, sum);
  add_halves<true>(rows, row_stride, words, sum);
}

}  // namespace
}  // namespace halve
#endif
