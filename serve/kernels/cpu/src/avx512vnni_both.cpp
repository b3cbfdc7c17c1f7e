// Values and x in int8, on x86-64 with AVX-512 VNNI. Lanes are rows of the weight: vpshufb looks up the inputs of the four values that each
// row keeps of eight columns, and vpdpbusd adds their four products to a sum. So half of the products of a dense weight are multiplied, whatever
// the number of rows of x, and sums are exact.
//
// vpdpbusd takes one side without a sign, so x is stored 128 higher, and 128 times the sum of the values goes off at the end.
#include "halve_cpu.h"
#include "kernels.h"

#if defined(__x86_64__)
#include "avx512_intrinsics.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace halve {
namespace {

#include "avx512_rows.inc"

constexpr int kMostTokens = 8;  // 4 blocks x 4 rows of x, or 2 x 8, are what the registers hold

// The bytes of 16 inputs that the pairs of four of their groups are: words 0 to 7 of the first (0) or second (1) eight those of the first group
// by its mask, words 8 to 15 those of the second one.
struct alignas(64) PairPlaces {
  uint8_t at[2][64];
  constexpr PairPlaces() : at() {
    for (int eight = 0; eight < 2; ++eight) {
      for (int word = 0; word < 32; ++word) {
        const int column = 8 * eight + 4 * (word / 8 % 2);
        at[eight][2 * word] = static_cast<uint8_t>(column + kFirst[word & 7]);
        at[eight][2 * word + 1] = static_cast<uint8_t>(column + kSecond[word & 7]);
      }
    }
  }
};
constexpr PairPlaces kPairPlaces;

// Values lie by groups, [2 groups][16 rows][2 bytes]: words that bring those of a row together.
struct alignas(64) RowWords {
  uint16_t at[32];
  constexpr RowWords() : at() {
    for (int word = 0; word < 32; ++word) at[word] = static_cast<uint16_t>(word % 2 * 16 + word / 2);
  }
};
constexpr RowWords kRowWords;

// Where the four values that each row keeps of eight columns find their inputs among 16, by the two masks in its lowest byte. `pairs`: of
// `kPairPlaces`, the columns' own. Word 2r is looked up by the low three bits of the first mask, word 2r + 1 by those of the second one, and 8. (The
// fifth bit of a word, and higher ones, do not matter.)
INLINE __m512i places_of(__m512i masks, __m512i pairs) {
  const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaau, masks, _mm512_slli_epi32(masks, 12));
  const __m512i words =
      _mm512_ternarylogic_epi32(both, _mm512_set1_epi32(0x00080008), _mm512_set1_epi32(0x00080000), 0xba);
  return _mm512_permutexvar_epi16(words, pairs);
}

INLINE __m512i load_inputs(const uint8_t* at) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// ---- x in int8.

// Those of 16 columns that exist.
INLINE __mmask16 exists(const Call& call, int64_t column) {
  const int64_t left = call.weight.k - column;
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}
INLINE const uint8_t* place(const Call& call, int64_t token, int64_t column) {
  return static_cast<const uint8_t*>(call.x) + (token * call.x_stride + column) * value_bytes(call.io);
}

// What to multiply a row of x by before it is rounded; writes its scale.
TARGET float scale_of(const Call& call, int64_t token, float* scale) {
  __m512i size = _mm512_setzero_si512();  // as integers: sizes are ordered as their bits are, infinity and NaN behind all others
  for (int64_t c = 0; c < call.weight.k; c += 16) {
    const __m512i bits = _mm512_castps_si512(load_numbers(call.io, exists(call, c), place(call, token, c)));
    size = _mm512_max_epu32(size, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  const RowScale found = row_scale(kInt8, from_bits(_mm512_reduce_max_epu32(size)));
  *scale = found.scale;
  return found.inverse;
}

// 16 columns of it, rounded, 128 higher; zeros where there are none.
INLINE __m128i rounded(const Call& call, int64_t token, int64_t column, __m512 inverse) {
  const __m512 numbers = load_numbers(call.io, exists(call, column), place(call, token, column));
  const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, inverse));
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128)));
}

// ---- Few rows of x.

// Scratch: x [rows][K, padded to tiles] of bytes, and the scales of its rows.
int64_t padded_k(const Call& call) { return call.weight.k_tiles * kColumns; }
int64_t scales_at(const Call& call) { return ceil_div(call.m * padded_k(call), 64) * 64; }
int64_t scratch_bytes(const Call& call) { return scales_at(call) + ceil_div(call.m * 4, 64) * 64; }
int64_t arrange_units(const Call& call) { return call.m; }

TARGET void arrange(const Call& call, int64_t first, int64_t last) {
  float* scales = reinterpret_cast<float*>(call.scratch + scales_at(call));
  for (int64_t m = first; m < last; ++m) {
    uint8_t* out = call.scratch + m * padded_k(call);
    const __m512 inverse = _mm512_set1_ps(scale_of(call, m, scales + m));
    for (int64_t c = 0; c < padded_k(call); c += 16) {
      const __m128i bytes = rounded(call, m, c, inverse);
      std::memcpy(out + c, &bytes, 16);
    }
  }
}

// R blocks of a panel times M rows of x.
template <int R, int M>
TARGET void blocks(const Call& call, int64_t token, int64_t block) {
  const Weight& w = call.weight;
  const Block place = block_of(w, block);
  const int64_t ahead = bytes_ahead(), step = place.width * tile_bytes(kInt8), line = place.width * 64, stride = padded_k(call);
  const uint8_t* inputs = call.scratch + token * stride;
  const uint8_t* tile = w.tiles + tile_offset(w, block, 0) + place.mask();
  const uint8_t* values = w.tiles + tile_offset(w, block, 0) + place.values(kInt8, 0);
  const __m512i rows = _mm512_load_si512(kRowWords.at);
  const __m512i pairs[2] = {_mm512_load_si512(kPairPlaces.at[0]), _mm512_load_si512(kPairPlaces.at[1])};
  const __m512i lift = _mm512_set1_epi8(-128);
  __m512i whole[R][M], lifted[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    lifted[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) whole[r][m] = _mm512_setzero_si512();
  }
  for (int64_t t = 0; t < w.k_tiles; ++t, tile += step, values += step, inputs += kColumns) {
    if (ahead != 0) {
      for (int64_t l = 0; l < R * tile_bytes(kInt8); l += 64) __builtin_prefetch(tile + ahead + l);
    }
    __m512i masks[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) masks[r] = _mm512_load_si512(tile + r * kMaskBytes);
#pragma GCC unroll 4
    for (int h = 0; h < kGroups / 2; h += 2) {
      __m512i x[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) x[m] = load_inputs(inputs + m * stride + 8 * h);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const __m512i kept = _mm512_permutexvar_epi16(rows, _mm512_load_si512(values + (h + i) * line + r * 64));
          const __m512i places = places_of(masks[r], pairs[i]);
          lifted[r] = _mm512_dpbusd_epi32(lifted[r], lift, kept);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            whole[r][m] = _mm512_dpbusd_epi32(whole[r][m], _mm512_shuffle_epi8(x[m], places), kept);
          }
          masks[r] = _mm512_srli_epi32(masks[r], 8);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      alignas(64) float sums[kRows];
      _mm512_store_ps(sums, _mm512_cvtepi32_ps(_mm512_sub_epi32(whole[r][m], lifted[r])));
      store_rows(call, token + m, (block + r) * kRows, sums);
    }
  }
}

template <int R, int M>
TARGET void of_rows(const Call& call, int64_t rows, int64_t token, int64_t block) {
  if constexpr (M > 1) {
    if (rows < M) return of_rows<R, M - 1>(call, rows, token, block);
  }
  blocks<R, M>(call, token, block);
}

int64_t units(const Call& call) { return call.weight.panels(); }

Call with_scales(const Call& unscaled) {
  Call call = unscaled;
  call.x_scales = reinterpret_cast<const float*>(call.scratch + scales_at(call));
  return call;
}

TARGET void run(const Call& unscaled, int64_t first, int64_t last) {
  const Call call = with_scales(unscaled);
  const Weight& w = call.weight;
  const int64_t passes = ceil_div(call.m, kMostTokens);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t width = w.width(panel);
    // All passes over a panel follow each other, so that the later ones find it in the second cache.
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t token = call.m * pass / passes, rows = call.m * (pass + 1) / passes - token;
      for (int64_t b = 0; b < width;) {
        const int64_t block = panel * w.interleave + b;
        if (width - b >= 4 && rows <= 4) {
          of_rows<4, 4>(call, rows, token, block);
          b += 4;
        } else if (width - b >= 2) {
          of_rows<2, kMostTokens>(call, rows, token, block);
          b += 2;
        } else {
          of_rows<1, kMostTokens>(call, rows, token, block);
          ++b;
        }
      }
    }
  }
}

// ---- Many rows of x: the same, but what a part of the weight becomes before it is multiplied, 128 bytes for each 128 of its weights, is kept in
// the second cache for a group of rows of x, and their sums in the first.

constexpr int kTogether = 5;  // rows of x at a time: 4 blocks x 5 sums, the inputs and what multiplies them are what the registers hold
constexpr int64_t kGroup = 16 * kTogether;  // rows of x
constexpr int64_t kPartTiles = 32;          // 1024 columns
constexpr int kSets = kGroups / 2;          // of eight columns in a tile

// Of a block, eight columns of 16 rows.
struct alignas(64) Wide {
  uint8_t places[64];  // see `places_of`
  uint8_t kept[64];    // [16 rows][4 values]
};

// Columns of R blocks as [eights of columns][R blocks]; what sums are too high by goes to `lifted`, [R blocks].
template <int R>
TARGET void widen(const Weight& w, int64_t block, int64_t k_tile, int64_t tiles, Wide* wide, __m512i* lifted) {
  const Block place = block_of(w, block);
  const int64_t step = place.width * tile_bytes(kInt8), line = place.width * 64;
  const uint8_t* tile = w.tiles + tile_offset(w, block, k_tile);
  const __m512i rows = _mm512_load_si512(kRowWords.at), lift = _mm512_set1_epi8(-128);
  const __m512i pairs[2] = {_mm512_load_si512(kPairPlaces.at[0]), _mm512_load_si512(kPairPlaces.at[1])};
  for (int64_t t = 0; t < tiles; ++t, tile += step) {
    for (int r = 0; r < R; ++r) {
      __m512i masks = _mm512_load_si512(tile + place.mask() + r * kMaskBytes), high = lifted[r];
      const uint8_t* values = tile + place.values(kInt8, 0) + r * 64;
      for (int h = 0; h < kSets; ++h) {
        Wide& to = wide[(t * kSets + h) * R + r];
        const __m512i kept = _mm512_permutexvar_epi16(rows, _mm512_load_si512(values + h * line));
        high = _mm512_dpbusd_epi32(high, lift, kept);
        _mm512_store_si512(to.kept, kept);
        _mm512_store_si512(to.places, places_of(masks, pairs[h % 2]));
        masks = _mm512_srli_epi32(masks, 8);
      }
      lifted[r] = high;
    }
  }
}

// What is asked for while something else is multiplied: so many lines of the weight each time.
struct Ahead {
  const uint8_t* at;
  int64_t lines;
};

// Adds R blocks times M rows of x to `sums` [M][R].
template <int R, int M>
TARGET void add(const Wide* wide, int64_t eights, const uint8_t* inputs, int64_t stride, __m512i* sums, Ahead ahead) {
  __m512i whole[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) whole[r][m] = sums[m * R + r];
  }
  for (int64_t e = 0; e < eights; e += 2, inputs += 16) {
    for (int64_t l = 0; l < ahead.lines; ++l, ahead.at += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
    __m512i x[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) x[m] = load_inputs(inputs + m * stride);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i, wide += R) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i places = _mm512_load_si512(wide[r].places), kept = _mm512_load_si512(wide[r].kept);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          whole[r][m] = _mm512_dpbusd_epi32(whole[r][m], _mm512_shuffle_epi8(x[m], places), kept);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m * R + r] = whole[r][m];
  }
}

template <int R, int M = kTogether>
TARGET void add_rows(int64_t rows, const Wide* wide, int64_t eights, const uint8_t* inputs, int64_t stride, __m512i* sums,
                     Ahead ahead) {
  if constexpr (M > 1) {
    if (rows < M) return add_rows<R, M - 1>(rows, wide, eights, inputs, stride, sums, ahead);
  }
  add<R, M>(wide, eights, inputs, stride, sums, ahead);
}

// R blocks times `count` rows of x.
template <int R>
TARGET void group_of(const Call& call, int64_t token, int64_t count, int64_t block) {
  const Weight& w = call.weight;
  const int64_t stride = padded_k(call), passes = ceil_div(count, kTogether);
  alignas(64) Wide wide[kPartTiles * kSets * R];
  __m512i sums[kGroup * R], lifted[R];
  for (int64_t i = 0; i < count * R; ++i) sums[i] = _mm512_setzero_si512();
  for (int r = 0; r < R; ++r) lifted[r] = _mm512_setzero_si512();
  for (int64_t part = 0; part < w.k_tiles; part += kPartTiles) {
    const int64_t tiles = w.k_tiles - part < kPartTiles ? w.k_tiles - part : kPartTiles;
    widen<R>(w, block, part, tiles, wide, lifted);
    const uint8_t* inputs = call.scratch + token * stride + part * kColumns;
    // The next part of the panel, or the next panel, follows in memory; all passes together ask for as much of it.
    const int64_t turns = tiles * kSets / 2 * passes, lines = tiles * block_of(w, block).width * tile_bytes(kInt8) / 64;
    Ahead ahead{w.tiles + tile_offset(w, block, part) + lines * 64, ceil_div(lines, turns)};
    if (R == 1 && block_of(w, block).width > 1) ahead.lines = 0;  // (narrow panels: of the last one, or of a small weight)
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t first = count * pass / passes, last = count * (pass + 1) / passes;
      add_rows<R>(last - first, wide, tiles * kSets, inputs + first * stride, stride, sums + first * R, ahead);
      ahead.at += tiles * kSets / 2 * ahead.lines * 64;
    }
  }
  for (int64_t m = 0; m < count; ++m) {
    for (int r = 0; r < R; ++r) {
      alignas(64) float row[kRows];
      _mm512_store_ps(row, _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[m * R + r], lifted[r])));
      store_rows(call, token + m, (block + r) * kRows, row);
    }
  }
}

int64_t group_units(const Call& call) { return ceil_div(call.m, kGroup) * call.weight.panels(); }

TARGET void group_run(const Call& unscaled, int64_t first, int64_t last) {
  const Call call = with_scales(unscaled);
  const Weight& w = call.weight;
  const int64_t groups = ceil_div(call.m, kGroup), panels = w.panels();
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t panel = unit % panels, group = unit / panels, block = panel * w.interleave, width = w.width(panel);
    const int64_t token = call.m * group / groups, count = call.m * (group + 1) / groups - token;
    if (width == 4) {
      group_of<4>(call, token, count, block);
    } else {
      for (int64_t b = 0; b < width; ++b) group_of<1>(call, token, count, block + b);
    }
  }
}

}  // namespace

const Kernel kAvx512VnniBoth{scratch_bytes, arrange_units, arrange, units, run};
const Kernel kAvx512VnniBothMany{scratch_bytes, arrange_units, arrange, group_units, group_run};

}  // namespace halve
#endif
