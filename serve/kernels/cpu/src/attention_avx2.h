// What multiplies bfloat16 in attention on AVX2: products of float32, which a bfloat16 becomes by a shift.
#pragma once

#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))
#define KERNEL(name) kAvx2##name

namespace halve {
namespace {

#include "attention_floats_avx2.inc"

// The numbers in the low halves of words, or those in the high ones.
template <bool High>
INLINE __m256 widened(__m256i words) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return _mm256_castsi256_ps(High ? _mm256_and_si256(words, mask) : _mm256_slli_epi32(words, 16));
}

template <bool High, int M, int V>
INLINE void add_halves(const uint16_t* rows, int64_t row_stride, const uint32_t* words, Floats (&sum)[M][V]) {
  Floats half[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const __m256i* at = reinterpret_cast<const __m256i*>(words + v * 16);
    half[v] = {widened<High>(_mm256_loadu_si256(at)), widened<High>(_mm256_loadu_si256(at + 1))};
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    int32_t two;
    std::memcpy(&two, rows + m * row_stride, 4);
    const __m256 number = widened<High>(_mm256_set1_epi32(two));
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sum[m][v].a = _mm256_fmadd_ps(number, half[v].a, sum[m][v].a);
      sum[m][v].b = _mm256_fmadd_ps(number, half[v].b, sum[m][v].b);
    }
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
