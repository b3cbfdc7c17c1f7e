// C++ for every processor. Few rows of x take a scalar loop; many take the compiler's own vectors over tokens.
#include "halve_cpu.h"
#include "kernels.h"

#define TARGET

namespace halve {
namespace {

inline void half_to_floats(const uint16_t* bits, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_float16(bits[i]);
}

inline void floats_to_half(const float* from, uint16_t* bits) {  // 16 of them
  for (int64_t i = 0; i < kRows; ++i) bits[i] = to_float16(from[i]);
}

#include "float_rows.h"
#include "float_store.h"
#include "round_rows.inc"

template <DType D>
inline void widen_scaled(const uint8_t* values, int64_t group, float* first, float* second) {
  for (int64_t r = 0; r < kRows; ++r) {
    first[r] = from_scaled(D, values[place_of(D, group, r, 0)]);
    second[r] = from_scaled(D, values[place_of(D, group, r, 1)]);
  }
}

constexpr int kLanes = 4, kMost = 4, kPair = 1;
#include "panel_float.inc"

// One row of x: each row of the weight looks its inputs up. More rows go to the panels.
int64_t one_scratch(const Call& call) { return panel_columns(call) * 4; }
int64_t one_arrange_units(const Call&) { return 1; }
void one_arrange(const Call& call, int64_t, int64_t) {
  float* x = reinterpret_cast<float*>(call.scratch);
  to_floats(call.io, call.x, 0, call.weight.k, x);
  for (int64_t i = call.weight.k; i < panel_columns(call); ++i) x[i] = 0;
}
int64_t one_units(const Call& call) { return call.weight.blocks; }

template <DType D>
void one_block(const Call& call, int64_t block) {
  const Weight& w = call.weight;
  const Block place = block_of(w, block);
  const float* x = reinterpret_cast<const float*>(call.scratch);
  float sums[kRows] = {};
  for (int64_t t = 0; t < w.k_tiles; ++t, x += kColumns) {
    const uint8_t* tile = w.tiles + tile_offset(w, block, t);
    float wide[kGroups * 2 * kRows];
    widen<D>(tile, place, wide);
    for (int r = 0; r < kRows; ++r) {
      uint32_t mask;
      std::memcpy(&mask, tile + place.mask() + 4 * r, 4);
      float first = 0, second = 0;
      for (int g = 0; g < kGroups; ++g, mask >>= 4) {
        first += wide[g * 2 * kRows + r] * x[4 * g + kFirst[mask & 7]];
        second += wide[g * 2 * kRows + kRows + r] * x[4 * g + kSecond[mask & 7]];
      }
      sums[r] += first + second;
    }
  }
  store_rows(call, 0, block * kRows, sums);
}

void one_run(const Call& call, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    switch (call.weight.dtype) {
      case kBFloat16: one_block<kBFloat16>(call, block); break;
      case kFloat16: one_block<kFloat16>(call, block); break;
      case kFloat32: one_block<kFloat32>(call, block); break;
      case kInt8: one_block<kInt8>(call, block); break;
      case kFloat8: one_block<kFloat8>(call, block); break;
    }
  }
}

}  // namespace

const RoundRows kPortableRound = round_rows;
const Kernel kPortableOne{one_scratch, one_arrange_units, one_arrange, one_units, one_run};
const Kernel kPortablePanel{panel_scratch, panel_arrange_units, panel_arrange, panel_units, panel_run};

}  // namespace halve
