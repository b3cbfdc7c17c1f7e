// What the float32 paths share: widening inputs. Included inside namespace halve, after TARGET.

// `count` values from element `start` on, as floats.
TARGET inline void to_floats(DType dtype, const void* from, int64_t start, int64_t count, float* to) {
  if (dtype == kFloat32) {
    std::memcpy(to, static_cast<const float*>(from) + start, static_cast<size_t>(count) * 4);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(from) + start;
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(bits[i]);
  } else {
    half_to_floats(bits, count, to);
  }
}
