// Attention on x86-64 with AVX-512 BF16.
//
// vdpbf16ps adds two products to each of 16 sums. For the scores these sums are keys, and a step takes two channels of
// a query against two channels of 16 keys; for the output they are channels, and a step takes the weights of two keys against
// two keys of 16 channels. So of the keys two channels make a word, and of the values two keys:
//
//   keys    [64 keys at a time][depth / 2][64] words
//   values  [keys / 2][value depth] words
//
// A unit is a few queries of one head. They go over the keys in parts whose scores stay in the first cache, with the running
// maximum and sum of Milakov and Gimelshein's softmax.
#include "attention.h"

#include "avx512bf16.h"

#if defined(__x86_64__)

#include <cmath>

namespace halve {
namespace {

constexpr int kLanes = 16;
constexpr int kRowsAtOnce = 6, kVectorsAtOnce = 4;                 // of sums in registers
constexpr int64_t kQueries = 4 * kRowsAtOnce;                      // of a unit
constexpr int64_t kKeyBlock = kVectorsAtOnce * kLanes;             // in the arrangement
constexpr int64_t kPart = 4 * kKeyBlock;                           // keys whose scores are held
constexpr float kLog2E = 1.44269504088896340736f;

int64_t key_blocks(const AttentionCall& call) { return ceil_div(call.keys, kKeyBlock); }
int64_t key_words(const AttentionCall& call) { return key_blocks(call) * kKeyBlock * call.depth / 2; }  // of a head
int64_t value_words(const AttentionCall& call) { return key_blocks(call) * kKeyBlock / 2 * call.value_depth; }
int64_t head_words(const AttentionCall& call) { return key_words(call) + value_words(call); }
uint32_t* arranged(const AttentionCall& call, int64_t b, int64_t kv_head) {
  return reinterpret_cast<uint32_t*>(call.scratch) + (b * call.kv_heads + kv_head) * head_words(call);
}

int64_t scratch_bytes(const AttentionCall& call) { return call.batch * call.kv_heads * head_words(call) * 4; }
int64_t arrange_units(const AttentionCall& call) { return call.batch * call.kv_heads * key_blocks(call); }

// 64 keys (those that do not exist are zeros) to [depth / 2][64] words.
TARGET void arrange_keys(const uint16_t* k, int64_t stride, int64_t keys, int64_t depth, uint32_t* out) {
  const int64_t words = depth / 2;
  for (int64_t first = 0; first < kKeyBlock; first += kLanes) {
    for (int64_t word = 0; word < words; word += kLanes) {
      const int64_t left = words - word;
      const __mmask16 real = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      __m512 tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool exists = first + i < keys;
        tile[i] = _mm512_maskz_loadu_ps(exists ? real : 0, k + (exists ? first + i : 0) * stride + 2 * word);
      }
      transpose(tile);
      for (int64_t i = 0; i < kLanes && i < left; ++i) _mm512_store_ps(out + (word + i) * kKeyBlock + first, tile[i]);
    }
  }
}

// 64 keys' values to [32][value depth] words.
TARGET void arrange_values(const uint16_t* v, int64_t stride, int64_t keys, int64_t depth, uint32_t* out) {
  for (int64_t key = 0; key < kKeyBlock; key += 2, out += depth) {
    const uint16_t *low = v + key * stride, *high = low + stride;
    for (int64_t c = 0; c < depth; c += kLanes) {
      __m512i words = _mm512_setzero_si512();
      if (key < keys) {
        words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + c)));
      }
      if (key + 1 < keys) {
        const __m512i other = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + c)));
        words = _mm512_or_si512(words, _mm512_slli_epi32(other, 16));
      }
      _mm512_storeu_si512(out + c, words);
    }
  }
}

void arrange(const AttentionCall& call, int64_t first, int64_t last) {
  const int64_t blocks = key_blocks(call);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t head = unit / blocks, block = unit % blocks, b = head / call.kv_heads, h = head % call.kv_heads;
    const int64_t key = block * kKeyBlock, keys = call.keys - key < kKeyBlock ? call.keys - key : kKeyBlock;
    uint32_t* out = arranged(call, b, h);
    arrange_keys(call.k.at(b, h, key), call.k.position, keys, call.depth, out + key * call.depth / 2);
    arrange_values(call.v.at(b, h, key), call.v.position, keys, call.value_depth,
                   out + key_words(call) + key / 2 * call.value_depth);
  }
}

// ---- The two products. sums [M][stride] (+)= pairs of a row [M] times words [steps][V vectors].

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

// The state of a row's softmax.
struct Running {
  float most, sum;
};

// Turns the scores [keys] of one row into bfloat16 weights, zeros where it does not see (to whole vectors, `vectors`).
// `scale` is positive. Returns what the row's earlier output has to be multiplied with.
TARGET float weigh(const float* scores, int64_t seen, int64_t vectors, float scale, Running& row, uint16_t* weights) {
  const int64_t used = ceil_div(seen, kLanes);
  const __mmask16 last = static_cast<__mmask16>(0xffffu >> (used * kLanes - seen));
  const __m512 least = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps(scale);
  __m512 most = least;
  for (int64_t i = 0; i < used; ++i) {
    const __m512 score = _mm512_loadu_ps(scores + i * kLanes);
    most = _mm512_max_ps(_mm512_mask_mov_ps(least, i + 1 < used ? 0xffff : last, score), most);
  }
  const float before = row.most, here = _mm512_reduce_max_ps(most);
  row.most = here > before ? here : before;
  const __m512 shift = _mm512_set1_ps(row.most);
  __m512 sum = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i < used; ++i) {
    const __mmask16 exists = i + 1 < used ? 0xffff : last;
    const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores + i * kLanes), shift);  // (exactly 0 at the maximum)
    const __m512 weight = _mm512_maskz_mov_ps(exists, exp2(_mm512_mul_ps(below, factor)));
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

int64_t tiles(const AttentionCall& call) { return ceil_div(call.queries, kQueries); }
int64_t units(const AttentionCall& call) { return call.batch * call.heads * tiles(call); }

TARGET void attend(const AttentionCall& call, int64_t b, int64_t h, int64_t first) {
  alignas(64) float scores[kQueries * kPart];
  alignas(64) uint16_t weights[kQueries * kPart];
  alignas(64) float sums[kQueries * kMostDepth];
  Running running[kQueries];
  const int64_t rows = call.queries - first < kQueries ? call.queries - first : kQueries;
  const int64_t depth = call.depth, wide = call.value_depth;
  const int64_t seen = call.causal && first + rows < call.keys ? first + rows : call.keys;
  const uint32_t* keys = arranged(call, b, h / (call.heads / call.kv_heads));
  const uint32_t* values = keys + key_words(call);
  const uint16_t* q = call.q.at(b, h, first);
  const float scale = call.scale * kLog2E;
  for (int64_t r = 0; r < rows; ++r) running[r] = {-INFINITY, 0.0f};
  std::memset(sums, 0, static_cast<size_t>(rows * wide) * sizeof(float));
  for (int64_t part = 0; part < seen; part += kPart) {
    const int64_t count = seen - part < kPart ? seen - part : kPart, vectors = ceil_div(count, kLanes);
    for (int64_t v = 0; v < vectors; v += kVectorsAtOnce) {
      const int64_t width = vectors - v < kVectorsAtOnce ? vectors - v : kVectorsAtOnce;
      const uint32_t* words = keys + (part + v * kLanes) * depth / 2;
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        const int64_t some = rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce;
        kMultiply[some - 1][width - 1](q + r * call.q.position, call.q.position, words, kKeyBlock, depth / 2,
                                       scores + r * kPart + v * kLanes, kPart, false);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t most = call.causal ? first + r + 1 - part : count;
      const int64_t visible = most < count ? most : count;
      if (visible <= 0) {
        std::memset(weights + r * kPart, 0, static_cast<size_t>(vectors * kLanes) * 2);
        continue;
      }
      const float kept = weigh(scores + r * kPart, visible, vectors, scale, running[r], weights + r * kPart);
      if (kept == 1.0f) continue;
      const __m512 factor = _mm512_set1_ps(kept);
      for (int64_t c = 0; c < wide; c += kLanes) {
        _mm512_store_ps(sums + r * wide + c, _mm512_mul_ps(_mm512_load_ps(sums + r * wide + c), factor));
      }
    }
    const uint32_t* of_part = values + part / 2 * wide;
    for (int64_t c = 0; c < wide; c += kVectorsAtOnce * kLanes) {
      const int64_t left = (wide - c) / kLanes, width = left < kVectorsAtOnce ? left : kVectorsAtOnce;
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        const int64_t some = rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce;
        kMultiply[some - 1][width - 1](weights + r * kPart, kPart, of_part + c, wide, vectors * kLanes / 2,
                                       sums + r * wide + c, wide, true);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 whole = _mm512_set1_ps(1.0f / running[r].sum);
    uint16_t* out = call.out.at(b, h, first + r);
    for (int64_t c = 0; c < wide; c += kLanes) {
      const __m512 mean = _mm512_mul_ps(_mm512_load_ps(sums + r * wide + c), whole);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(mean)));
    }
  }
}

void run(const AttentionCall& call, int64_t first, int64_t last) {
  const int64_t count = tiles(call);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t head = unit / count, turn = unit % count;
    // Later queries see more keys; from both ends in turn, a part of the units has as much work as any other.
    const int64_t tile = turn % 2 ? count - 1 - turn / 2 : turn / 2;
    attend(call, head / call.heads, head % call.heads, tile * kQueries);
  }
}

}  // namespace

const AttentionKernel kAvx512Bf16Attention{scratch_bytes, arrange_units, arrange, units, run};

}  // namespace halve
#endif
