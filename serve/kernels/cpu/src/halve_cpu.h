// The prepared form of a packed 2:4 weight on a CPU, and what its kernels share.
//
// A weight [N, K] is cut into tiles of 16 rows and 32 columns (8 groups of four). A tile holds
//
//   mask    16 x u32     row r's four mask bytes as they are in the packed format: bit c says that column c is kept,
//                        so bits 4g to 4g+3 are the mask of group g
//   values  [8 groups]   bfloat16: [16 rows][2], so that a group of a row is one 32-bit word, what a bfloat16 dot
//                        product takes; float16 and float32: [2][16 rows], so that a vector holds one value a row;
//                        int8: a cache line for two groups, [2 groups][16 rows][2]; float8: the same, in the order [4 times 4
//                        rows][2 groups][4 rows][2], so that the bytes of a vector, each widened to two in its place, are
//                        the pairs of either group
//
// Up to four blocks of 16 rows make a panel, which is multiplied in one go, and a panel is stored in the very order in which
// that reads it: for each 32 columns the masks of its blocks, and then, for each group, the values of its blocks.
//
//   panel  [K/32] x { [blocks] mask, [8 groups][blocks] values }
//
// Behind the panels of int8 and float8 are the scales of the rows, float32, of which each sum is a multiple.
//
// So a core reads one stream of cache lines from front to back, which is what memory is fastest at. A weight takes the bytes
// of the packed format (9/16 of 16-bit dense, 5/16 with values of 8 bits), up to padding at the edges: rows and columns that do not exist have the
// mask 0011 and zeros.
//
// The mask of a group needs no decoding. Its two set bits make one of the six numbers 3, 5, 6, 9, 10, 12, and these
// differ in their low three bits: 3, 5, 6, 1, 2, 4. So a register with eight entries, one for each possible pair of the
// four inputs, is indexed by the mask itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace halve {

constexpr int64_t kRows = 16;     // of a tile; a vector lane each
constexpr int64_t kGroups = 8;    // of four columns in a tile
constexpr int64_t kColumns = 32;  // of a tile
constexpr int64_t kMaskBytes = kRows * 4;
constexpr int64_t kHeaderBytes = 64;
constexpr uint32_t kMagic = 0x34326868;  // "hh24"

enum DType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2, kInt8 = 3, kFloat8 = 4 };  // float8: e4m3fn
// Of kept values only, which have a scale for each row; x and y are of the others.
constexpr bool is_scaled(DType dtype) { return dtype >= kInt8; }

// Column of the first and of the second kept value of a group, by the low three bits of its mask.
constexpr uint8_t kFirst[8] = {0, 0, 1, 0, 2, 0, 1, 0};
constexpr uint8_t kSecond[8] = {0, 3, 3, 1, 3, 2, 2, 0};

// Orders of bytes for vectors of up to 64, in each 16 of them; shorter vectors take the first ones.
//
// The eight pairs of four 16-bit inputs, each at the place that its mask names.
struct alignas(64) PairBytes {
  uint8_t at[64];
  constexpr PairBytes() : at() {
    for (int entry = 0; entry < 16; ++entry) {
      const int pair[2] = {kFirst[entry & 7], kSecond[entry & 7]};
      for (int b = 0; b < 4; ++b) at[4 * entry + b] = static_cast<uint8_t>(2 * pair[b / 2] + b % 2);
    }
  }
};
constexpr PairBytes kPairBytes;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t value_bytes(DType dtype) { return is_scaled(dtype) ? 1 : dtype == kFloat32 ? 4 : 2; }
// Of the values of a block in a group.
constexpr int64_t chunk_bytes(DType dtype) { return kRows * 2 * value_bytes(dtype); }
constexpr int64_t tile_bytes(DType dtype) { return kMaskBytes + kGroups * chunk_bytes(dtype); }
// Groups whose values lie together, and the bytes of these of one block: what its neighbour's begin after.
constexpr int64_t groups_together(DType dtype) { return is_scaled(dtype) ? 2 : 1; }
constexpr int64_t side_bytes(DType dtype) { return groups_together(dtype) * chunk_bytes(dtype); }
// Where the first (0) or second (1) kept value of a row is among these, counted in values.
constexpr int64_t place_of(DType dtype, int64_t group, int64_t row, int64_t value) {
  if (dtype == kFloat8) return row / 4 * 16 + group % 2 * 8 + row % 4 * 2 + value;
  if (dtype == kInt8) return group % 2 * 2 * kRows + row * 2 + value;
  return dtype == kBFloat16 ? 2 * row + value : value * kRows + row;
}

// Of float8: the first and the second bytes of either group's rows, each at the top of its row's 32 bits, and zeros below.
struct alignas(64) TopBytes {
  int8_t at[2][2][64];
  constexpr TopBytes() : at() {
    for (int group = 0; group < 2; ++group) {
      for (int value = 0; value < 2; ++value) {
        for (int b = 0; b < 64; ++b) {
          at[group][value][b] = static_cast<int8_t>(b % 4 == 3 ? place_of(kFloat8, group, b % 16 / 4, value) : -128);
        }
      }
    }
  }
};
constexpr TopBytes kTopBytes;

// First bytes of a stream. Kernels read sizes from here and nowhere else, so a stream cannot be read out of bounds.
struct Header {
  uint32_t magic;
  int32_t dtype;
  int64_t n, k;
  int64_t bytes;       // of the whole stream
  int64_t interleave;  // blocks in a panel
  int64_t quantizes_x;  // 1: each row of x is rounded to the dtype of the values, too, see `row_scale`
};
static_assert(sizeof(Header) <= kHeaderBytes, "the header has its own cache line");

// A stream with its geometry.
struct Weight {
  DType dtype;
  int64_t n, k;
  int64_t interleave;
  int64_t blocks;   // of 16 rows
  int64_t k_tiles;  // of 32 columns
  int64_t tile;     // bytes of one
  const uint8_t* tiles;
  const float* scales;  // of the rows, and of those that fill the last block; null without scales
  bool quantizes_x;

  int64_t panels() const { return ceil_div(blocks, interleave); }
  // Blocks in a panel: all have `interleave`, but for the last.
  int64_t width(int64_t panel) const {
    const int64_t left = blocks - panel * interleave;
    return left < interleave ? left : interleave;
  }
  int64_t panel_bytes() const { return interleave * k_tiles * tile; }
  const uint8_t* panel(int64_t index) const { return tiles + index * panel_bytes(); }
};

// Where a block's part of a panel's tiles lies.
struct Block {
  int64_t first;  // its place in the panel
  int64_t width;  // blocks in the panel

  int64_t mask() const { return first * kMaskBytes; }
  int64_t values(DType dtype, int64_t group) const {
    return width * kMaskBytes + (group / groups_together(dtype) * width + first) * side_bytes(dtype);
  }
};
inline Block block_of(const Weight& w, int64_t block) { return {block % w.interleave, w.width(block / w.interleave)}; }
// The tile of a panel that holds a block and begins with a column.
inline int64_t tile_offset(const Weight& w, int64_t block, int64_t k_tile) {
  const int64_t panel = block / w.interleave;
  return panel * w.panel_bytes() + k_tile * w.width(panel) * w.tile;
}

// Of the panels, in whole cache lines.
inline int64_t panels_bytes(DType dtype, int64_t n, int64_t k) {
  return ceil_div(ceil_div(n, kRows) * ceil_div(k, kColumns) * tile_bytes(dtype), 64) * 64;
}
inline Weight describe(DType dtype, int64_t n, int64_t k, int64_t interleave, const uint8_t* tiles,
                       bool quantizes_x) {
  const float* scales = is_scaled(dtype) && tiles != nullptr
                            ? reinterpret_cast<const float*>(tiles + panels_bytes(dtype, n, k))
                            : nullptr;
  return Weight{dtype, n, k, interleave, ceil_div(n, kRows), ceil_div(k, kColumns), tile_bytes(dtype), tiles, scales, quantizes_x};
}

struct Call;

// The scale of a row of x whose largest size is given, and what to multiply the row by before it is rounded. Where a number is not finite,
// the scale is NaN, and so are all outputs of the row.
struct RowScale {
  float scale, inverse;
};
inline RowScale row_scale(DType dtype, float largest);
// Rows `first` to `last` of x, rounded to values of the weight's dtype in units of their scales: [m, k] in x's dtype, and [m].
using RoundRows = void (*)(const Call& call, int64_t first, int64_t last, uint8_t* rounded, float* scales);

// One multiplication y [m, n] = x [m, k] W^T + bias. x, y and bias have the dtype `io`, which is that of the values where these
// have no scales; rows of x and y are `x_stride` and `y_stride` elements apart.
struct Call {
  Weight weight;
  DType io;
  const void* x;
  int64_t m, x_stride;
  const void* bias;  // may be null
  void* y;
  int64_t y_stride;
  int threads;
  uint8_t* scratch;  // `Kernel::scratch_bytes`, aligned to a cache line
  const float* x_scales = nullptr;  // of the rows of x, of which sums are multiples, too; may be null
};

// What an instruction set brings. Work is split into units that are independent of each other and of the number of
// threads, so results are, too.
struct Kernel {
  int64_t (*scratch_bytes)(const Call&);           // shared by all threads
  int64_t (*arrange_units)(const Call&);           // first pass: x into the scratch; 0 where x is read as it is
  void (*arrange)(const Call&, int64_t first, int64_t last);
  int64_t (*units)(const Call&);                   // second pass: the multiplication
  void (*run)(const Call&, int64_t first, int64_t last);
};

// The two kernels of an instruction set, and up to how many rows of x the first one is the faster one.
struct Path {
  const Kernel* few;
  const Kernel* many;
  int64_t few_rows;
};

// How the rows and tokens of a large multiplication are cut: tokens in groups of `tokens` (a multiple of 16), rows in
// chunks of whole tiles. Every output is summed by one thread in the order of K, so the cut changes no result.
struct Cut {
  int64_t tokens, token_groups;
  int64_t blocks, chunks;  // 16-row blocks in a chunk

  int64_t units() const { return token_groups * chunks; }
};
constexpr int64_t kChunkBlocks = 32;  // 512 rows x 64 or 128 tokens x 4 bytes of sums stay in the second cache
inline Cut cut(const Call& call, int64_t tokens) {
  const int64_t groups = ceil_div(call.m, tokens), blocks = call.weight.blocks;
  int64_t chunks = ceil_div(blocks, kChunkBlocks);
  while (groups * chunks < 4 * call.threads && ceil_div(blocks, chunks) > 8) ++chunks;
  const int64_t size = ceil_div(blocks, chunks);
  return Cut{tokens, groups, size, ceil_div(blocks, size)};
}

// How far ahead of the place that is read a weight is asked for. Intel's processors wait for memory between two products
// where nobody asks (measured on one of Cascade Lake's time); AMD's read ahead by themselves, and to ask costs time.
#if defined(__x86_64__)
inline int64_t bytes_ahead() {
  static const int64_t bytes = (__builtin_cpu_init(), __builtin_cpu_is("intel") ? 8192 : 0);
  return bytes;
}
#else
inline int64_t bytes_ahead() { return 0; }
#endif

// Conversions of one value. bfloat16 rounds to nearest even and keeps NaN.
inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float from_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// e4m3fn: the bits of a float32 that is 2^120 times smaller, subnormal numbers included. (NaN is no value of a weight.)
inline float from_float8(uint8_t bits) {
  return from_bits(static_cast<uint32_t>(bits & 0x80) << 24 | static_cast<uint32_t>(bits & 0x7f) << 20) * 0x1p120f;
}
inline float from_scaled(DType dtype, uint8_t bits) {
  return dtype == kInt8 ? static_cast<float>(static_cast<int8_t>(bits)) : from_float8(bits);
}
float from_float16(uint16_t bits);
uint16_t to_float16(float value);

inline RowScale row_scale(DType dtype, float largest) {
  const float end = dtype == kInt8 ? 127.0f : 448.0f;
  if ((to_bits(largest) & 0x7fffffffu) >= 0x7f800000u) return {from_bits(0x7fc00000u), 0};
  if (largest < 0x1p-100f) largest = 0x1p-100f;  // so that there is an inverse
  return {largest / end, end / largest};
}

inline float load_value(DType dtype, const void* at, int64_t index) {
  if (dtype == kFloat32) return static_cast<const float*>(at)[index];
  const uint16_t bits = static_cast<const uint16_t*>(at)[index];
  return dtype == kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
}
inline void store_value(DType dtype, void* at, int64_t index, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(at)[index] = value;
  } else {
    static_cast<uint16_t*>(at)[index] = dtype == kBFloat16 ? to_bfloat16(value) : to_float16(value);
  }
}

}  // namespace halve
