// float16 by arithmetic on its bits; the vector paths use the processor's conversion.
#include <cmath>

#include "halve_cpu.h"

namespace halve {

float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t rest = bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000u | (rest & 0x3ff) << 13);  // infinity and NaN
  if (rest < 0x400) return from_bits(sign | to_bits(static_cast<float>(rest) * 0x1p-24f));
  return from_bits(sign | ((rest << 13) + 0x38000000u));
}

// Rounds to nearest even, to infinity from 65520 on; keeps NaN.
uint16_t to_float16(float value) {
  const uint32_t bits = to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00 | (rest >> 13 & 0x3ff));
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (rest < 0x38800000u) {
    // Below the smallest normal number: adding 1/2 leaves a multiple of 2^-24, rounded, in the lowest bits.
    return static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));
  }
  const uint32_t odd = rest >> 13 & 1;
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfff + odd) >> 13));
}

// To the nearest value of e4m3fn, ties to even; of numbers up to 448.
static float rounded_to_float8(float value) {
  constexpr float kMagic = 0x1.8p14f;  // its lowest bit is 2^-9, the distance of the smallest values
  if (value < 0x1p-6f && value > -0x1p-6f) return (value + kMagic) - kMagic;
  const uint32_t bits = to_bits(value), odd = bits >> 20 & 1;
  return from_bits((bits + 0x7ffff + odd) & ~0xfffffu);
}

void quantize_rows(DType dtype, const Call& call, int64_t first, int64_t last, uint8_t* rounded, float* scales) {
  const int64_t k = call.weight.k;
  for (int64_t m = first; m < last; ++m) {
    const int64_t start = m * call.x_stride;
    uint32_t largest = 0;  // sizes are ordered as their bits are, infinity and NaN behind all others
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t size = to_bits(load_value(call.io, call.x, start + i)) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
    const RowScale scale = row_scale(dtype, from_bits(largest));
    scales[m] = scale.scale;
    const bool finite = scale.scale == scale.scale;
    for (int64_t i = 0; i < k; ++i) {
      const float scaled = finite ? load_value(call.io, call.x, start + i) * scale.inverse : 0;
      const float least = scaled > 448 ? 448 : scaled < -448 ? -448 : scaled;  // (the inverse is rounded, too)
      const float value = dtype == kInt8 ? static_cast<float>(std::lrint(scaled)) : rounded_to_float8(least);
      store_value(call.io, rounded, m * k + i, value);
    }
  }
}

}  // namespace halve
