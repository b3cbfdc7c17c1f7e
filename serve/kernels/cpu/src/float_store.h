// Storing sums in float32, for any instruction set. Included inside namespace halve, after float_rows.h.

// Rounds 16 values.
TARGET inline void round_rows(DType dtype, const float* values, void* to) {
  if (dtype == kFloat32) {
    std::memcpy(to, values, kRows * 4);
    return;
  }
  uint16_t out[kRows];
  if (dtype == kFloat16) {
    floats_to_half(values, out);
  } else {
    for (int64_t r = 0; r < kRows; ++r) {  // `to_bfloat16` without a jump, so that vectors can do it
      const uint32_t bits = to_bits(values[r]), rounded = bits + 0x7fff + (bits >> 16 & 1), nan = bits | 0x400000;
      out[r] = static_cast<uint16_t>(((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded) >> 16);
    }
  }
  std::memcpy(to, out, sizeof out);
}

// Rounds the sums of 16 consecutive rows of y for one token, with their bias, and stores those that exist.
TARGET inline void store_rows(const Call& call, int64_t token, int64_t row, const float* sums) {
  const DType dtype = call.io;
  const int64_t left = call.weight.n - row, count = left < kRows ? left : kRows;
  float values[kRows], bias[kRows];
  std::memcpy(values, sums, sizeof values);
  if (call.x_scales != nullptr) {
    for (int64_t r = 0; r < kRows; ++r) values[r] *= call.x_scales[token];
  }
  if (const float* scales = call.weight.scales) {
    for (int64_t r = 0; r < kRows; ++r) values[r] *= scales[row + r];
  }
  if (call.bias != nullptr) {
    to_floats(dtype, call.bias, row, count, bias);
    for (int64_t r = 0; r < count; ++r) values[r] += bias[r];
  }
  uint8_t* y = static_cast<uint8_t*>(call.y) + (token * call.y_stride + row) * value_bytes(dtype);
  if (count == kRows) {
    round_rows(dtype, values, y);
    return;
  }
  uint8_t rounded[kRows * 4];
  round_rows(dtype, values, rounded);
  std::memcpy(y, rounded, static_cast<size_t>(count * value_bytes(dtype)));
}
