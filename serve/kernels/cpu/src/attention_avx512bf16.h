// What the forward and the backward pass of attention on AVX-512 BF16 share.
//
// vdpbf16ps adds two products to each of 16 sums. Where these sums are positions (the scores of a query), a step takes two
// channels; where they are channels (an output), it takes two positions. So tensors are arranged in two ways, as words of two
// channels and as words of two positions.
#pragma once

#include "attention.h"
#include "avx512bf16.h"

#if defined(__x86_64__)

#include <cmath>

namespace halve {
namespace {

constexpr int kLanes = 16;
constexpr int kRowsAtOnce = 6, kVectorsAtOnce = 4;                 // of sums in registers
constexpr int64_t kTileRows = 4 * kRowsAtOnce;                      // of a unit of work
constexpr int64_t kBlock = kVectorsAtOnce * kLanes;                // positions in the arrangement
constexpr int64_t kPart = 4 * kBlock;                              // positions whose scores are held
constexpr float kLog2E = 1.44269504088896340736f;

// Up to 64 positions (those that do not exist are zeros) to [depth / 2][64] words of two channels: lanes are positions.
TARGET inline void arrange_lanes(const uint16_t* x, int64_t stride, int64_t positions, int64_t depth, uint32_t* out) {
  const int64_t words = depth / 2;
  for (int64_t first = 0; first < kBlock; first += kLanes) {
    for (int64_t word = 0; word < words; word += kLanes) {
      const int64_t left = words - word;
      const __mmask16 real = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      __m512 tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool exists = first + i < positions;
        tile[i] = _mm512_maskz_loadu_ps(exists ? real : 0, x + (exists ? first + i : 0) * stride + 2 * word);
      }
      transpose(tile);
      for (int64_t i = 0; i < kLanes && i < left; ++i) _mm512_store_ps(out + (word + i) * kBlock + first, tile[i]);
    }
  }
}

// Up to 64 positions to [32][depth] words of two positions: lanes are channels.
TARGET inline void arrange_pairs(const uint16_t* x, int64_t stride, int64_t positions, int64_t depth, uint32_t* out) {
  for (int64_t p = 0; p < kBlock; p += 2, out += depth) {
    const uint16_t *low = x + p * stride, *high = low + stride;
    for (int64_t c = 0; c < depth; c += kLanes) {
      __m512i words = _mm512_setzero_si512();
      if (p < positions) {
        words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + c)));
      }
      if (p + 1 < positions) {
        const __m512i other = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + c)));
        words = _mm512_or_si512(words, _mm512_slli_epi32(other, 16));
      }
      _mm512_storeu_si512(out + c, words);
    }
  }
}

// sums [M][stride] (+)= pairs of a row [M] times words [steps][V vectors].

template <int M, int V>
TARGET void multiply(const uint16_t* rows, int64_t row_stride, const uint32_t* words, int64_t word_stride,
                     int64_t steps, float* sums, int64_t sum_stride, bool add) {
  __m512 sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = add ? _mm512_loadu_ps(sums + m * sum_stride + v * kLanes) : _mm512_setzero_ps();
  }
  for (int64_t step = 0; step < steps; ++step, words += word_stride) {
    __m512i word[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) word[v] = _mm512_loadu_si512(words + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int32_t two;
      std::memcpy(&two, rows + m * row_stride + 2 * step, 4);
      const __m512i pair = _mm512_set1_epi32(two);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[m][v] = dot(sum[m][v], pair, word[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + m * sum_stride + v * kLanes, sum[m][v]);
  }
}

using Multiply = void (*)(const uint16_t*, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t, bool);
template <int M>
constexpr Multiply kWidths[kVectorsAtOnce] = {multiply<M, 1>, multiply<M, 2>, multiply<M, 3>, multiply<M, 4>};
// By the rows and by the vectors, both less one.
constexpr const Multiply* kMultiply[kRowsAtOnce] = {kWidths<1>, kWidths<2>, kWidths<3>, kWidths<4>, kWidths<5>, kWidths<6>};

// 2^x for x <= 0, within 3e-6 of its value; NaN stays NaN.
INLINE __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // (in this order NaN comes through)
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 power = _mm512_set1_ps(0.00133335581f);
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.00961812911f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.0555041087f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.240226507f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.693147181f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(power, whole);
}
INLINE float exp2_of(float x) { return _mm512_cvtss_f32(exp2(_mm512_set1_ps(x))); }

// sums [rows][stride] (+)= pairs of rows times words [steps][vectors of 16], in as many pieces as it takes.
// `block`: the words of 4 vectors lie together, and those of the next 4 `block` words further.
TARGET inline void product(const uint16_t* rows, int64_t row_stride, int64_t count, const uint32_t* words,
                           int64_t word_stride, int64_t block, int64_t steps, int64_t vectors, float* sums,
                           int64_t sum_stride, bool add) {
  for (int64_t v = 0; v < vectors; v += kVectorsAtOnce, words += block) {
    const int64_t width = vectors - v < kVectorsAtOnce ? vectors - v : kVectorsAtOnce;
    for (int64_t r = 0; r < count; r += kRowsAtOnce) {
      const int64_t some = count - r < kRowsAtOnce ? count - r : kRowsAtOnce;
      kMultiply[some - 1][width - 1](rows + r * row_stride, row_stride, words, word_stride, steps,
                                     sums + r * sum_stride + v * kLanes, sum_stride, add);
    }
  }
}

// The state of a row's softmax: the largest score, and the sum of the weights in units of that one's.
struct Running {
  float most, sum;
};

// Lanes below `count`, of which there may be more or fewer than a vector's.
INLINE __mmask16 lanes_below(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Of 16 keys, those that are there and that a row of `Visible` shows.
INLINE __mmask16 shown(const uint8_t* visible, int64_t first, int64_t count) {
  const __mmask16 exist = lanes_below(count - first);
  if (visible == nullptr) return exist;
  const __m128i bytes = _mm_maskz_loadu_epi8(exist, visible + first);
  return _mm_mask_cmpneq_epi8_mask(exist, bytes, _mm_setzero_si128());
}

// Turns the scores [keys] of one row into bfloat16 weights, zeros where it does not see (to whole vectors, `vectors`): beyond
// the first `seen` keys, and what `visible` (of these keys, or null) does not show. `scale` is positive. Returns what the row's
// earlier output has to be multiplied with.
TARGET inline float weigh(const float* scores, int64_t seen, const uint8_t* visible, int64_t vectors, float scale,
                          Running& row, uint16_t* weights) {
  const int64_t used = ceil_div(seen, kLanes);
  const __m512 least = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps(scale);
  __m512 most = least;
  for (int64_t i = 0; i < used; ++i) {
    const __m512 score = _mm512_loadu_ps(scores + i * kLanes);
    most = _mm512_max_ps(_mm512_mask_mov_ps(least, shown(visible, i * kLanes, seen), score), most);
  }
  const float before = row.most, here = _mm512_reduce_max_ps(most);
  row.most = here > before ? here : before;
  const __m512 shift = _mm512_set1_ps(row.most);
  __m512 sum = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i < used; ++i) {
    const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores + i * kLanes), shift);  // (exactly 0 at the maximum)
    const __m512 weight =
        _mm512_maskz_mov_ps(shown(visible, i * kLanes, seen), exp2(_mm512_mul_ps(below, factor)));
    sum = _mm512_add_ps(sum, weight);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i * kLanes),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weight)));
  }
  for (; i < vectors; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i * kLanes), _mm256_setzero_si256());
  }
  const float kept = before == row.most ? 1.0f : exp2_of((before - row.most) * scale);
  row.sum = row.sum * kept + _mm512_reduce_add_ps(sum);
  return kept;
}

// What sums are multiplied with in the end; a row that saw nothing gives zeros, as torch does.
inline float share_of(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

}  // namespace
}  // namespace halve
#endif
