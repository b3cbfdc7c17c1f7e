// From the packed format to a stream of tiles and back: pure movement of bytes, on any processor.
#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "halve_cpu.h"
#include "threads.h"

namespace halve {
namespace {

constexpr uint32_t kPaddingMask = 0x33333333;

bool two_of_four(uint8_t byte) {
  // Bits of each half are counted in parallel, in two steps.
  const uint8_t pairs = static_cast<uint8_t>((byte & 0x55) + (byte >> 1 & 0x55));
  return (pairs & 0x33) + (pairs >> 2 & 0x33) == 0x22;
}

struct Packed {
  const uint8_t* values;  // [N, K/2]
  const uint8_t* mask;    // [N, K/8]
};

// Puts the groups of a row into its lane of a tile. Value: as wide as a kept value.
template <typename Value>
void write_row(uint8_t* tile, Block block, DType dtype, int64_t row, const Value* values, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    Value* group = reinterpret_cast<Value*>(tile + block.values(dtype, g));
    group[place_of(dtype, g, row, 0)] = values[2 * g];
    group[place_of(dtype, g, row, 1)] = values[2 * g + 1];
  }
}

template <typename Value>
void read_row(const uint8_t* tile, Block block, DType dtype, int64_t row, Value* values, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    const Value* group = reinterpret_cast<const Value*>(tile + block.values(dtype, g));
    values[2 * g] = group[place_of(dtype, g, row, 0)];
    values[2 * g + 1] = group[place_of(dtype, g, row, 1)];
  }
}

struct Work {
  Weight weight;
  Packed packed;
  uint8_t* tiles;
  std::atomic<int64_t> first_bad;  // index of a mask byte
};

void note_bad(std::atomic<int64_t>& first_bad, int64_t index) {
  int64_t seen = first_bad.load();
  while ((seen < 0 || index < seen) && !first_bad.compare_exchange_weak(seen, index)) {
  }
}

template <typename Value>
void fill_tile(Work& work, uint8_t* tile, int64_t number, int64_t first_column) {
  const Weight& w = work.weight;
  const Block block = block_of(w, number);
  const int64_t first_row = number * kRows;
  const int64_t groups = (w.k - first_column < kColumns ? w.k - first_column : kColumns) / 4;
  const bool whole = groups == kGroups && first_row + kRows <= w.n;
  for (int64_t g = 0; g < kGroups && !whole; ++g) {
    std::memset(tile + block.values(w.dtype, g), 0, static_cast<size_t>(side_bytes(w.dtype)));
  }
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r;
    uint32_t mask = kPaddingMask;
    if (row < w.n) {
      const int64_t at = row * (w.k / 8) + first_column / 8;
      uint8_t bytes[4] = {0x33, 0x33, 0x33, 0x33};
      for (int64_t b = 0; b < groups / 2; ++b) {
        bytes[b] = work.packed.mask[at + b];
        if (!two_of_four(bytes[b])) note_bad(work.first_bad, at + b);
      }
      std::memcpy(&mask, bytes, 4);
      const Value* values = reinterpret_cast<const Value*>(work.packed.values) + (row * w.k + first_column) / 2;
      write_row(tile, block, w.dtype, r, values, groups);
    }
    std::memcpy(tile + block.mask() + 4 * r, &mask, 4);
  }
}

void fill_panels(void* context, int64_t first, int64_t last) {
  Work& work = *static_cast<Work*>(context);
  const Weight& w = work.weight;
  for (int64_t panel = first; panel < last; ++panel) {
    uint8_t* tile = work.tiles + panel * w.panel_bytes();
    for (int64_t column = 0; column < w.k; column += kColumns, tile += w.width(panel) * w.tile) {
      for (int64_t b = 0; b < w.width(panel); ++b) {
        const int64_t block = panel * w.interleave + b;
        switch (value_bytes(w.dtype)) {
          case 1: fill_tile<uint8_t>(work, tile, block, column); break;
          case 2: fill_tile<uint16_t>(work, tile, block, column); break;
          default: fill_tile<uint32_t>(work, tile, block, column);
        }
      }
    }
  }
}

struct Unwork {
  Weight weight;
  uint8_t* values;
  uint8_t* mask;
};

template <typename Value>
void empty_block(const Unwork& work, int64_t number) {
  const Weight& w = work.weight;
  const Block block = block_of(w, number);
  for (int64_t column = 0; column < w.k; column += kColumns) {
    const uint8_t* tile = w.tiles + tile_offset(w, number, column / kColumns);
    const int64_t groups = (w.k - column < kColumns ? w.k - column : kColumns) / 4;
    for (int64_t r = 0; r < kRows && number * kRows + r < w.n; ++r) {
      const int64_t row = number * kRows + r;
      std::memcpy(work.mask + row * (w.k / 8) + column / 8, tile + block.mask() + 4 * r,
                  static_cast<size_t>(groups / 2));
      read_row(tile, block, w.dtype, r, reinterpret_cast<Value*>(work.values) + (row * w.k + column) / 2, groups);
    }
  }
}

void empty_blocks(void* context, int64_t first, int64_t last) {
  const Unwork& work = *static_cast<const Unwork*>(context);
  for (int64_t block = first; block < last; ++block) {
    switch (value_bytes(work.weight.dtype)) {
      case 1: empty_block<uint8_t>(work, block); break;
      case 2: empty_block<uint16_t>(work, block); break;
      default: empty_block<uint32_t>(work, block);
    }
  }
}

struct Expansion {
  Weight weight;
  DType to;
  int64_t first_row, rows;
  uint8_t* dense;
};

// Value: as wide as what is written; Stored: as a kept value.
template <typename Value, typename Stored>
void expand_block(const Expansion& work, int64_t number) {
  const Weight& w = work.weight;
  const Block block = block_of(w, number);
  const int64_t begin = number * kRows < work.first_row ? work.first_row : number * kRows;
  int64_t end = (number + 1) * kRows < work.first_row + work.rows ? (number + 1) * kRows : work.first_row + work.rows;
  if (end > w.n) end = w.n;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t r = row % kRows;
    Value* out = reinterpret_cast<Value*>(work.dense) + (row - work.first_row) * w.k;
    const auto written = [&](Stored kept) {
      if constexpr (sizeof(Stored) > 1) {
        return kept;
      } else {
        const float value = from_scaled(w.dtype, kept) * w.scales[row];
        if constexpr (sizeof(Value) == 4) {
          return to_bits(value);
        } else {
          return work.to == kBFloat16 ? to_bfloat16(value) : to_float16(value);
        }
      }
    };
    for (int64_t column = 0; column < w.k; column += kColumns) {
      const uint8_t* tile = w.tiles + tile_offset(w, number, column / kColumns);
      uint32_t mask;
      std::memcpy(&mask, tile + block.mask() + 4 * r, 4);
      const int64_t groups = (w.k - column < kColumns ? w.k - column : kColumns) / 4;
      for (int64_t g = 0; g < groups; ++g, mask >>= 4) {
        const Stored* values = reinterpret_cast<const Stored*>(tile + block.values(w.dtype, g));
        Value four[4] = {0, 0, 0, 0};
        four[kFirst[mask & 7]] = written(values[place_of(w.dtype, g, r, 0)]);
        four[kSecond[mask & 7]] = written(values[place_of(w.dtype, g, r, 1)]);
        std::memcpy(out + column + 4 * g, four, sizeof four);
      }
    }
  }
}

void expand_blocks(void* context, int64_t first, int64_t last) {
  const Expansion& work = *static_cast<const Expansion*>(context);
  const int64_t start = work.first_row / kRows;
  for (int64_t block = start + first; block < start + last; ++block) {
    const bool wide = work.to == kFloat32;
    if (is_scaled(work.weight.dtype)) {
      wide ? expand_block<uint32_t, uint8_t>(work, block) : expand_block<uint16_t, uint8_t>(work, block);
    } else {
      wide ? expand_block<uint32_t, uint32_t>(work, block) : expand_block<uint16_t, uint16_t>(work, block);
    }
  }
}

int64_t scales_bytes(DType dtype, int64_t n) { return is_scaled(dtype) ? ceil_div(n, kRows) * kRows * 4 : 0; }

}  // namespace

int64_t stream_bytes(DType dtype, int64_t n, int64_t k) {
  return kHeaderBytes + panels_bytes(dtype, n, k) + scales_bytes(dtype, n);
}

void ask_for_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Weights are read from front to back at the speed of memory, and a page walk every 4 KB is felt. Only a wish: what
  // the system answers does not matter.
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void gather_into_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; other kernels refuse it
  ask_for_huge_pages(start, bytes);
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

// Returns -1, or the index of the first mask byte in [N, K/8] that has not two bits in each half.
int64_t prepare(DType dtype, bool quantizes_x, const uint8_t* values, const uint8_t* mask, const float* scales, int64_t n,
                int64_t k, uint8_t* stream, int threads) {
  const int64_t bytes = stream_bytes(dtype, n, k);
  ask_for_huge_pages(stream, bytes);
  // Panels are the units of work: where there are too few for the threads, they are narrower.
  int64_t interleave = 4;
  while (interleave > 1 && ceil_div(n, kRows) < 2 * interleave * threads) interleave /= 2;
  const Header header{kMagic, dtype, n, k, bytes, interleave, quantizes_x};
  std::memset(stream, 0, kHeaderBytes);
  std::memcpy(stream, &header, sizeof header);
  Work work{describe(dtype, n, k, interleave, stream + kHeaderBytes, quantizes_x), {values, mask}, stream + kHeaderBytes, {-1}};
  parallel(threads, work.weight.panels(), fill_panels, &work);
  if (is_scaled(dtype)) {
    uint8_t* behind = stream + kHeaderBytes + panels_bytes(dtype, n, k);
    std::memset(behind, 0, static_cast<size_t>(scales_bytes(dtype, n)));
    std::memcpy(behind, scales, static_cast<size_t>(n) * 4);
  }
  return work.first_bad.load();
}

void restore(const Weight& weight, uint8_t* values, uint8_t* mask, float* scales, int threads) {
  if (is_scaled(weight.dtype)) std::memcpy(scales, weight.scales, static_cast<size_t>(weight.n) * 4);
  Unwork work{weight, values, mask};
  parallel(threads, weight.blocks, empty_blocks, &work);
}

void expand(const Weight& weight, DType to, int64_t first_row, int64_t rows, uint8_t* dense, int threads) {
  Expansion work{weight, to, first_row, rows, dense};
  const int64_t last = ceil_div(first_row + rows, kRows), first = first_row / kRows;
  parallel(threads, last - first, expand_blocks, &work);
}

}  // namespace halve
