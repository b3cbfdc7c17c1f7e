// float16 by arithmetic on its bits; the vector paths use the processor's conversion.
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

}  // namespace halve
