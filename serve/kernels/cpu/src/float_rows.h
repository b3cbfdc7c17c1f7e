// What the float32 paths share: widening inputs and storing sums. Included inside namespace halve, after TARGET.

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

// Rounds the sums of 16 consecutive rows of y for one token, with their bias, and stores those that exist.
TARGET inline void store_rows(const Call& call, int64_t token, int64_t row, const float* sums) {
  const DType dtype = call.weight.dtype;
  const int64_t left = call.weight.n - row, count = left < kRows ? left : kRows;
  for (int64_t r = 0; r < count; ++r) {
    float sum = sums[r];
    if (call.bias != nullptr) sum += load_value(dtype, call.bias, row + r);
    store_value(dtype, call.y, token * call.y_stride + row + r, sum);
  }
}
