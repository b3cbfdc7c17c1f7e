// Few rows of x by values in int8, on x86-64 with AVX-512 VNNI: vpdpwssd adds both products of a pair to a sum.
#include "halve_cpu.h"
#include "kernels.h"

#if defined(__x86_64__)
#include "avx512_intrinsics.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace halve {
namespace {

#include "avx512_rows.inc"

namespace int8 {

INLINE __m512i add_products(__m512i sums, __m512i a, __m512i b) {
  return _mm512_dpwssd_epi32(sums, a, b);
}

#include "avx512_int8.inc"

}  // namespace int8

}  // namespace

const Kernel kAvx512VnniInt8{int8::int8_scratch, int8::int8_arrange_units, int8::int8_arrange, int8::int8_units, int8::int8_run};

}  // namespace halve
#endif
