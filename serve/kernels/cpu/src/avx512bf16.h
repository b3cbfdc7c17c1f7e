// What the bfloat16 kernels of AVX-512 share.
#pragma once

#if defined(__x86_64__)
#include "avx512_intrinsics.h"

#if !defined(TARGET)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif
#define INLINE TARGET inline __attribute__((always_inline))

namespace halve {
namespace {

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

#include "avx512_transpose.inc"

}  // namespace
}  // namespace halve
#endif
