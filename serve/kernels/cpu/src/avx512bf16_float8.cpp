// x in bfloat16 and values in float8, on x86-64 with AVX-512 BF16 and VBMI.
#include "halve_cpu.h"
#include "kernels.h"

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi")))
#include "avx512bf16.h"

namespace halve {
namespace {

constexpr int kMostTokens = 4;  // the registers also hold the tables

// The two bytes of the bfloat16 that each value without its sign is. All are exact, none is denormal.
struct alignas(64) Magnitudes {
  uint8_t low[128], high[128];
  constexpr Magnitudes() : low(), high() {
    for (int code = 0; code < 128; ++code) {
      const int bits = of_float8(code);
      low[code] = static_cast<uint8_t>(bits & 0xff), high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
  // mantissa (below 256) times 2^power
  static constexpr int normalized(int mantissa, int power) {
    if (mantissa == 0) return 0;
    for (; mantissa < 128; mantissa *= 2) --power;
    return (power + 7 + 127) << 7 | (mantissa & 127);
  }
  static constexpr int of_float8(int code) {
    const int exponent = code >> 3, mantissa = code & 7;
    return exponent == 0 ? normalized(mantissa, -9) : normalized(8 + mantissa, exponent - 10);
  }
};
constexpr Magnitudes kMagnitudes;

template <DType D>
struct Widener {
  __m512i low[2], high[2];

  INLINE Widener() {
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(kMagnitudes.low + 64 * i);
      high[i] = _mm512_load_si512(kMagnitudes.high + 64 * i);
    }
  }
  // The bytes of two groups as two vectors of bfloat16 pairs.
  INLINE void pairs(const uint8_t* at, __m512i& even, __m512i& odd) const {
    const __m512i bytes = _mm512_load_si512(at);
    const __m512i lows = _mm512_permutex2var_epi8(low[0], bytes, low[1]);  // (a look-up ignores the highest bit)
    const __m512i magnitudes = _mm512_permutex2var_epi8(high[0], bytes, high[1]);
    constexpr int kOrWithBoth = 0xf8;  // a | (b & c)
    const __m512i highs = _mm512_ternarylogic_epi32(magnitudes, bytes, _mm512_set1_epi8(-128), kOrWithBoth);
    even = _mm512_unpacklo_epi8(lows, highs);
    odd = _mm512_unpackhi_epi8(lows, highs);
  }
};

#include "avx512bf16_rows.inc"

}  // namespace

const Kernel kAvx512Bf16Float8Stream{stream_scratch, stream_arrange_units, stream_arrange, stream_units,
                                      stream_part<kFloat8>};
const Kernel kAvx512Bf16Float8Panel{panel_scratch, panel_arrange_units, panel_arrange, panel_units,
                                     panel_part<kFloat8>};

}  // namespace halve
#endif
