// bfloat16 on x86-64 with AVX-512 BF16.
#include "halve_cpu.h"
#include "kernels.h"

#include "avx512bf16.h"

#if defined(__x86_64__)

namespace halve {
namespace {

constexpr int kMostTokens = 6;  // 4 blocks x 6 rows of sums are what the registers hold

template <DType D>
struct Widener {};  // bfloat16 is read as it is

template <>
struct Widener<kInt8> {
  // The bytes of two groups as two vectors of bfloat16 pairs.
  INLINE void pairs(const uint8_t* at, __m512i& even, __m512i& odd) const { even = widened(at), odd = widened(at + 32); }
  INLINE static __m512i widened(const uint8_t* at) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(at))));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(at + 16))));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }
};

#include "avx512bf16_rows.inc"

// ---- Dense rows.

namespace dense {

using V = __m512i;
using S = __m512;
constexpr int kLanes = 32, kDenseFew = 6;

INLINE S zero() { return _mm512_setzero_ps(); }
INLINE S multiply_add(V a, V b, S sum) { return dot(sum, a, b); }
INLINE float total(S sum) { return _mm512_reduce_add_ps(sum); }

template <DType>
INLINE V load(const uint8_t* at, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) return _mm512_loadu_si512(at);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), at);
}

#include "dense.inc"

TARGET void run(const DenseCall& call, int64_t first, int64_t last) { dense_part<kBFloat16>(call, first, last); }

}  // namespace dense
}  // namespace

const DenseKernel kAvx512Bf16Dense = dense::run;
const Kernel kAvx512Bf16Stream{stream_scratch, stream_arrange_units, stream_arrange, stream_units,
                                stream_part<kBFloat16>};
const Kernel kAvx512Bf16Int8Panel{panel_scratch, panel_arrange_units, panel_arrange, panel_units, panel_part<kInt8>};
const Kernel kAvx512Bf16Panel{panel_scratch, panel_arrange_units, panel_arrange, panel_units,
                               panel_part<kBFloat16>};

}  // namespace halve
#endif
