// bfloat16 on x86-64 with AVX-512 BF16: vdpbf16ps multiplies a pair of kept values of each of 16 rows with the pair of
// inputs that belongs to it and adds both to a float32 sum. (It takes denormal inputs as zero.)
#include "halve_cpu.h"
#include "kernels.h"

#include "avx512bf16.h"

#if defined(__x86_64__)

namespace halve {
namespace {

constexpr int64_t kTile = kMaskBytes + kGroups * 64;

// Twice the eight entries of `kFirst` and `kSecond`, as bytes of four 16-bit inputs.
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

// Rounds 16 sums of consecutive rows of y, with their bias, and stores those that exist.
INLINE void store(const Call& call, int64_t token, int64_t row, __m512 sum) {
  const int64_t left = call.weight.n - row;
  if (left <= 0) return;
  const __mmask16 exists = left >= kRows ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
  if (call.bias != nullptr) {
    const __m256i bias = _mm256_maskz_loadu_epi16(exists, static_cast<const uint16_t*>(call.bias) + row);
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16)));
  }
  uint16_t* y = static_cast<uint16_t*>(call.y) + token * call.y_stride + row;
  _mm256_mask_storeu_epi16(y, exists, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
}

// ---- Few rows of x: the weight streams through, sums stay in registers. Lanes are rows of the weight.

struct Input {
  const uint16_t* at;
  int64_t stride;
};

// R blocks of a panel times M rows of x.
template <int R, int M>
TARGET void stream(const Call& call, Input x, int64_t token, int64_t block) {
  __m512 sums[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = _mm512_setzero_ps();
  }
  const __m512i pairs = _mm512_load_si512(kPairBytes.at);
  const Weight& w = call.weight;
  const Block place = block_of(w, block);
  const int64_t step = place.width * kTile, row_of_values = place.width * 64;
  const uint8_t* tile = w.tiles + tile_offset(w, block, 0) + place.mask();
  const uint8_t* values_at = w.tiles + tile_offset(w, block, 0) + place.values(kBFloat16, 0);
  const uint16_t* inputs = x.at;
  for (int64_t t = 0; t < w.k_tiles; ++t, tile += step, values_at += step, inputs += kColumns) {
    __m512i masks[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) masks[r] = _mm512_load_si512(tile + r * kMaskBytes);
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      __m512i entries[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        int64_t four;
        std::memcpy(&four, inputs + m * x.stride + 4 * g, 8);
        entries[m] = _mm512_shuffle_epi8(_mm512_set1_epi64(four), pairs);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i values = _mm512_load_si512(values_at + g * row_of_values + r * 64);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          sums[r][m] = dot(sums[r][m], _mm512_permutexvar_epi32(masks[r], entries[m]), values);
        }
        masks[r] = _mm512_srli_epi32(masks[r], 4);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(call, token + m, (block + r) * kRows, sums[r][m]);
  }
}

template <int R>
TARGET void stream_rows(int64_t rows, const Call& call, Input x, int64_t token, int64_t block) {
  switch (rows) {
    case 1: return stream<R, 1>(call, x, token, block);
    case 2: return stream<R, 2>(call, x, token, block);
    case 3: return stream<R, 3>(call, x, token, block);
    case 4: return stream<R, 4>(call, x, token, block);
    case 5: return stream<R, 5>(call, x, token, block);
    default: return stream<R, 6>(call, x, token, block);
  }
}

// x is read as it is, unless its last tile is not whole: then rows are copied, padded with zeros.
bool padded(const Call& call) { return call.weight.k % kColumns != 0; }
int64_t padded_k(const Call& call) { return call.weight.k_tiles * kColumns; }

int64_t stream_scratch(const Call& call) { return padded(call) ? call.m * padded_k(call) * 2 : 0; }
int64_t stream_arrange_units(const Call& call) { return padded(call) ? call.m : 0; }

void stream_arrange(const Call& call, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    uint16_t* row = reinterpret_cast<uint16_t*>(call.scratch) + m * padded_k(call);
    std::memcpy(row, static_cast<const uint16_t*>(call.x) + m * call.x_stride,
                static_cast<size_t>(call.weight.k) * 2);
    std::memset(row + call.weight.k, 0, static_cast<size_t>(padded_k(call) - call.weight.k) * 2);
  }
}

int64_t stream_units(const Call& call) { return call.weight.panels(); }

TARGET void stream_run(const Call& call, int64_t first, int64_t last) {
  const Weight& w = call.weight;
  const int64_t passes = ceil_div(call.m, 6);  // 4 blocks x 6 rows of sums are what the registers hold
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t width = w.width(panel);
    // All passes over a panel follow each other, so that the later ones find it in the second cache.
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t token = call.m * pass / passes, rows = call.m * (pass + 1) / passes - token;
      Input x{static_cast<const uint16_t*>(call.x) + token * call.x_stride, call.x_stride};
      if (padded(call)) {
        x = {reinterpret_cast<const uint16_t*>(call.scratch) + token * padded_k(call), padded_k(call)};
      }
      for (int64_t b = 0; b < width;) {
        const int64_t block = panel * w.interleave + b;
        if (width - b >= 4) {
          stream_rows<4>(rows, call, x, token, block);
          b += 4;
        } else if (width - b >= 2) {
          stream_rows<2>(rows, call, x, token, block);
          b += 2;
        } else {
          stream_rows<1>(rows, call, x, token, block);
          b += 1;
        }
      }
    }
  }
}

// ---- Many rows of x: lanes are tokens. For every group, all six pairs of its inputs lie in the first cache for 64
// tokens, and each kept pair of a row is multiplied with the one that its mask names: half of the dense products.

constexpr int kTileGroups = 2 * kGroups;  // 64 columns: 24 KB of pairs
constexpr int64_t kVectorBytes = 64;

// x as 64-bit words of four inputs: [16 tokens at a time][K/4, padded][16 tokens].
int64_t group_count(const Call& call) { return ceil_div(call.weight.k_tiles, 2) * kTileGroups; }
int64_t panel_scratch(const Call& call) { return ceil_div(call.m, kRows) * group_count(call) * kRows * 8; }

constexpr int64_t kArrangeGroups = 256;
int64_t arrange_chunks(const Call& call) { return ceil_div(group_count(call), kArrangeGroups); }
int64_t panel_arrange_units(const Call& call) { return ceil_div(call.m, kRows) * arrange_chunks(call); }

void panel_arrange(const Call& call, int64_t first, int64_t last) {
  const int64_t groups = group_count(call), real = call.weight.k / 4, chunks = arrange_chunks(call);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t token = unit / chunks * kRows, begin = unit % chunks * kArrangeGroups;
    const int64_t end = begin + kArrangeGroups < groups ? begin + kArrangeGroups : groups;
    const int64_t stop = end < real ? end : real;
    uint64_t* words = reinterpret_cast<uint64_t*>(call.scratch) + token * groups;
    for (int64_t t = 0; t < kRows; ++t) {
      int64_t g = begin;
      if (token + t < call.m) {
        const uint16_t* x = static_cast<const uint16_t*>(call.x) + (token + t) * call.x_stride;
        for (; g < stop; ++g) std::memcpy(words + g * kRows + t, x + 4 * g, 8);
      }
      for (; g < end; ++g) words[g * kRows + t] = 0;
    }
  }
}

// The six pairs of each group of 64 columns: [group][entry 1 to 6][T vectors of 16 tokens].
template <int T>
TARGET void fill_pairs(const uint64_t* words, int64_t groups, uint8_t* pairs) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512i low = _mm512_set1_epi32(0xffff);
  for (int g = 0; g < kTileGroups; ++g) {
    for (int t = 0; t < T; ++t) {
      const uint64_t* at = words + (t * groups + g) * kRows;
      const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 8);
      const __m512i x01 = _mm512_permutex2var_epi32(a, even, b), x23 = _mm512_permutex2var_epi32(a, odd, b);
      const __m512i x0 = _mm512_and_si512(x01, low), x1 = _mm512_srli_epi32(x01, 16);
      const __m512i x2_high = _mm512_slli_epi32(x23, 16), x3_high = _mm512_andnot_si512(low, x23);
      uint8_t* out = pairs + (g * 6 * T + t) * kVectorBytes;
      constexpr int64_t kEntry = T * kVectorBytes;
      _mm512_store_si512(out + 0 * kEntry, _mm512_or_si512(x0, x3_high));  // 1: columns 0 and 3
      _mm512_store_si512(out + 1 * kEntry, _mm512_or_si512(x1, x3_high));  // 2: 1 and 3
      _mm512_store_si512(out + 2 * kEntry, x01);                           // 3: 0 and 1
      _mm512_store_si512(out + 3 * kEntry, x23);                           // 4: 2 and 3
      _mm512_store_si512(out + 4 * kEntry, _mm512_or_si512(x0, x2_high));  // 5: 0 and 2
      _mm512_store_si512(out + 5 * kEntry, _mm512_or_si512(x1, x2_high));  // 6: 1 and 2
    }
  }
}

// Adds 64 columns (or the 32 that are left) of a block of 16 rows to their sums [16 rows][T vectors of tokens].
template <int T, int Tiles>
TARGET void add_block(const uint8_t* tile, Block block, const uint8_t* next, const uint8_t* pairs, float* sums) {
  const int64_t step = block.width * kTile, row_of_values = block.width * 64;
  constexpr int kPair = 2;  // rows at a time: enough sums to hide the latency of a product
  constexpr int64_t kEntry = T * kVectorBytes;
  for (int r = 0; r < kRows; r += kPair) {
    __m512 sum[kPair][T];
    uint32_t mask[kPair];
#pragma GCC unroll 4
    for (int i = 0; i < kPair; ++i) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[i][t] = _mm512_load_ps(sums + ((r + i) * T + t) * kRows);
    }
#pragma GCC unroll 2
    for (int b = 0; b < Tiles; ++b) {
      const uint8_t* masks = tile + b * step + block.mask();
      const uint8_t* at = tile + b * step + block.values(kBFloat16, 0);
      // The next panel is far away, and every line of it would be waited for.
      _mm_prefetch(reinterpret_cast<const char*>(next + b * kTile + r * 36), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(next + b * kTile + r * 36 + 36), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int i = 0; i < kPair; ++i) std::memcpy(&mask[i], masks + 4 * (r + i), 4);
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
        for (int i = 0; i < kPair; ++i) {
          const int64_t entry = static_cast<int64_t>(mask[i] >> (4 * g) & 7) - 1;
          const uint8_t* pair = pairs + ((b * kGroups + g) * 6 + entry) * kEntry;
          int32_t kept;
          std::memcpy(&kept, at + g * row_of_values + 4 * (r + i), 4);
          const __m512i values = _mm512_set1_epi32(kept);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) sum[i][t] = dot(sum[i][t], values, _mm512_load_si512(pair + t * kVectorBytes));
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPair; ++i) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) _mm512_store_ps(sums + ((r + i) * T + t) * kRows, sum[i][t]);
    }
  }
}

template <int T>
TARGET void panel(const Call& call, int64_t token, int64_t first_block, int64_t blocks) {
  const Weight& w = call.weight;
  alignas(64) float sums[kChunkBlocks * kRows * T * kRows];
  // An entry more before and after the pairs is what the masks 0 and 7 of a damaged stream would name.
  constexpr int64_t kEntry = T * kVectorBytes;
  alignas(64) uint8_t table[(1 + kTileGroups * 6 + 1) * kEntry];
  uint8_t* pairs = table + kEntry;
  std::memset(table, 0, kEntry);
  std::memset(pairs + kTileGroups * 6 * kEntry, 0, kEntry);
  std::memset(sums, 0, static_cast<size_t>(blocks * kRows * T * kRows) * sizeof(float));
  const int64_t groups = group_count(call);
  const uint64_t* words = reinterpret_cast<const uint64_t*>(call.scratch) + token * groups;
  for (int64_t k_tile = 0; k_tile < w.k_tiles; k_tile += 2) {
    fill_pairs<T>(words + k_tile * kGroups * kRows, groups, pairs);
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* tile = w.tiles + tile_offset(w, first_block + b, k_tile);
      const Block block = block_of(w, first_block + b);
      const uint8_t* next = tile + w.panel_bytes() + 2 * block.first * kTile;  // each block fetches its share
      float* at = sums + b * kRows * T * kRows;
      if (k_tile + 1 < w.k_tiles) {
        add_block<T, 2>(tile, block, next, pairs, at);
      } else {
        add_block<T, 1>(tile, block, next, pairs, at);
      }
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    for (int t = 0; t < T; ++t) {
      __m512 v[16];
      for (int r = 0; r < kRows; ++r) v[r] = _mm512_load_ps(sums + ((b * kRows + r) * T + t) * kRows);
      transpose(v);
      for (int i = 0; i < kRows && token + t * kRows + i < call.m; ++i) {
        store(call, token + t * kRows + i, (first_block + b) * kRows, v[i]);
      }
    }
  }
}

constexpr int64_t kTokens = 64;

int64_t panel_units(const Call& call) { return cut(call, kTokens).units(); }

TARGET void panel_run(const Call& call, int64_t first, int64_t last) {
  const Cut c = cut(call, kTokens);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t token = unit / c.chunks * c.tokens, block = unit % c.chunks * c.blocks;
    const int64_t blocks = block + c.blocks < call.weight.blocks ? c.blocks : call.weight.blocks - block;
    const int64_t left = call.m - token;
    if (left > 48) {
      panel<4>(call, token, block, blocks);
    } else if (left > 32) {
      panel<3>(call, token, block, blocks);
    } else if (left > 16) {
      panel<2>(call, token, block, blocks);
    } else {
      panel<1>(call, token, block, blocks);
    }
  }
}

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
const Kernel kAvx512Bf16Stream{stream_scratch, stream_arrange_units, stream_arrange, stream_units, stream_run};
const Kernel kAvx512Bf16Panel{panel_scratch, panel_arrange_units, panel_arrange, panel_units, panel_run};

}  // namespace halve
#endif
