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

#include "attention_halves.inc"

}  // namespace
}  // namespace halve
#endif
