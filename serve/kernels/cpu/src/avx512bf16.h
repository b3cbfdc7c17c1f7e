// What the bfloat16 kernels of AVX-512 share.
#pragma once

#if defined(__x86_64__)
#if !defined(__clang__)
// gcc 12 takes the deliberately undefined operands in its own <immintrin.h> for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace halve {
namespace {

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// Turns 16 vectors, rows of a matrix of 32-bit words, into its columns.
INLINE void transpose(__m512 v[16]) {
  __m512 a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // v[4i + c] now holds in its 128-bit lane l column 4l + c of rows 4i to 4i + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 p = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88), q = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd);
    const __m512 r = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88), s = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
    a[c] = _mm512_shuffle_f32x4(p, r, 0x88);
    a[8 + c] = _mm512_shuffle_f32x4(p, r, 0xdd);
    a[4 + c] = _mm512_shuffle_f32x4(q, s, 0x88);
    a[12 + c] = _mm512_shuffle_f32x4(q, s, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = a[i];
}

}  // namespace
}  // namespace halve
#endif
