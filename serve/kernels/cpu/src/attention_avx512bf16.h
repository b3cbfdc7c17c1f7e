// What multiplies bfloat16 in attention: vdpbf16ps.
#pragma once

#include "attention.h"
#include "avx512bf16.h"

#if defined(__x86_64__)

#define KERNEL(name) kAvx512Bf16##name

namespace halve {
namespace {

INLINE __m256i narrow(__m512 values) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)); }

#include "attention_floats_avx512.inc"

// sum [M][V] += the products of two numbers of each row with words [V][16] of two.
template <int M, int V>
INLINE void add_pairs(const uint16_t* rows, int64_t row_stride, const uint32_t* words, Floats (&sum)[M][V]) {
  __m512i word[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) word[v] = _mm512_loadu_si512(words + v * 16);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    int32_t two;
    std::memcpy(&two, rows + m * row_stride, 4);
    const __m512i pair = _mm512_set1_epi32(two);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = dot(sum[m][v], pair, word[v]);
  }
}

}  // namespace
}  // namespace halve
#endif
