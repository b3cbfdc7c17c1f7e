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
#include "attention_halves.inc"

}  // namespace
}  // namespace halve
#endif
