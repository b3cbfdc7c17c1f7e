// The backward pass of attention on x86-64 with AVX-512 BF16.
//
// With P = softmax(scale Q K^T), O = P V and D_i = dO_i . O_i, the gradients are (Dao et al. 2022, FlashAttention, B.4)
//
//   dV = P^T dO,   dS = P o (dO V^T - D),   dQ = scale dS K,   dK = scale dS^T Q
//
// P is computed again from what the forward pass kept of each query. The gradients of a few queries go over the keys, those of a few
// keys over the queries of all heads that share them: P and dS are computed twice, so that no two units add to the same
// place, whatever the number of threads.
#include "attention_avx512bf16.h"

#if defined(__x86_64__)

namespace halve {
namespace {

int64_t padded(int64_t positions) { return ceil_div(positions, kBlock) * kBlock; }

// What is arranged of one head of keys and values, of one head of queries; in words.
struct KeyHead {
  int64_t lanes, pairs, value_lanes, words;

  explicit KeyHead(const AttentionCall& call) {
    const int64_t keys = padded(call.keys);
    lanes = 0;
    pairs = lanes + keys * call.depth / 2;
    value_lanes = pairs + keys * call.depth / 2;
    words = value_lanes + keys * call.value_depth / 2;
  }
};
struct QueryHead {
  int64_t lanes, pairs, out_lanes, out_pairs, exponents, sums, words;

  explicit QueryHead(const AttentionCall& call) {
    const int64_t queries = padded(call.queries);
    lanes = 0;
    pairs = lanes + queries * call.depth / 2;
    out_lanes = pairs + queries * call.depth / 2;  // of dO
    out_pairs = out_lanes + queries * call.value_depth / 2;
    exponents = out_pairs + queries * call.value_depth / 2;
    sums = exponents + queries;  // D
    words = sums + queries;
  }
};

int64_t scratch_bytes(const AttentionCall& call) {
  return call.batch * (call.kv_heads * KeyHead(call).words + call.heads * QueryHead(call).words) * 4;
}
uint32_t* key_head(const AttentionGradients& call, int64_t b, int64_t g) {
  const AttentionCall& f = call.forward;
  return reinterpret_cast<uint32_t*>(call.scratch) + (b * f.kv_heads + g) * KeyHead(f).words;
}
uint32_t* query_head(const AttentionGradients& call, int64_t b, int64_t h) {
  const AttentionCall& f = call.forward;
  return key_head(call, f.batch, 0) + (b * f.heads + h) * QueryHead(f).words;
}

int64_t key_blocks(const AttentionCall& f) { return f.batch * f.kv_heads * ceil_div(f.keys, kBlock); }
int64_t query_blocks(const AttentionCall& f) { return f.batch * f.heads * ceil_div(f.queries, kBlock); }
int64_t arrange_units(const AttentionGradients& call) { return key_blocks(call.forward) + query_blocks(call.forward); }

void arrange_key_block(const AttentionGradients& call, int64_t unit) {
  const AttentionCall& f = call.forward;
  const KeyHead parts(f);
  const int64_t blocks = ceil_div(f.keys, kBlock), head = unit / blocks, key = unit % blocks * kBlock;
  const int64_t b = head / f.kv_heads, g = head % f.kv_heads, count = f.keys - key < kBlock ? f.keys - key : kBlock;
  uint32_t* out = key_head(call, b, g);
  const uint16_t* k = f.k.at(b, g, key);
  arrange_lanes(k, f.k.position, count, f.depth, out + parts.lanes + key * f.depth / 2);
  arrange_pairs(k, f.k.position, count, f.depth, out + parts.pairs + key * f.depth / 2);
  arrange_lanes(f.v.at(b, g, key), f.v.position, count, f.value_depth,
                out + parts.value_lanes + key * f.value_depth / 2);
}

INLINE __m512 wide(const uint16_t* at) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

TARGET void arrange_query_block(const AttentionGradients& call, int64_t unit) {
  const AttentionCall& f = call.forward;
  const QueryHead parts(f);
  const int64_t blocks = ceil_div(f.queries, kBlock), head = unit / blocks, query = unit % blocks * kBlock;
  const int64_t b = head / f.heads, h = head % f.heads, left = f.queries - query, count = left < kBlock ? left : kBlock;
  uint32_t* out = query_head(call, b, h);
  const uint16_t* q = f.q.at(b, h, query);
  const uint16_t* d_out = call.d_out.at(b, h, query);
  arrange_lanes(q, f.q.position, count, f.depth, out + parts.lanes + query * f.depth / 2);
  arrange_pairs(q, f.q.position, count, f.depth, out + parts.pairs + query * f.depth / 2);
  arrange_lanes(d_out, call.d_out.position, count, f.value_depth, out + parts.out_lanes + query * f.value_depth / 2);
  arrange_pairs(d_out, call.d_out.position, count, f.value_depth, out + parts.out_pairs + query * f.value_depth / 2);
  float* exponents = reinterpret_cast<float*>(out + parts.exponents) + query;
  float* sums = reinterpret_cast<float*>(out + parts.sums) + query;
  for (int64_t i = 0; i < kBlock; ++i) {
    exponents[i] = i < count ? f.exponents[(b * f.heads + h) * f.queries + query + i] : 0.0f;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; i < count && c < f.value_depth; c += kLanes) {
      sum = _mm512_fmadd_ps(wide(d_out + i * call.d_out.position + c), wide(f.out.at(b, h, query + i) + c), sum);
    }
    sums[i] = _mm512_reduce_add_ps(sum);
  }
}

void arrange(const AttentionGradients& call, int64_t first, int64_t last) {
  const int64_t keys = key_blocks(call.forward);
  for (int64_t unit = first; unit < last; ++unit) {
    if (unit < keys) {
      arrange_key_block(call, unit);
    } else {
      arrange_query_block(call, unit - keys);
    }
  }
}

INLINE void store_half(uint16_t* at, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

TARGET void write(const float* sums, int64_t rows, int64_t depth, float scale, uint16_t* out, int64_t stride) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < depth; c += kLanes) {
      store_half(out + r * stride + c, _mm512_mul_ps(_mm512_load_ps(sums + r * depth + c), factor));
    }
  }
}

// ---- The gradients of a few queries.

int64_t query_tiles(const AttentionCall& f) { return ceil_div(f.queries, kTileRows); }
int64_t query_units(const AttentionGradients& call) {
  return call.forward.batch * call.forward.heads * query_tiles(call.forward);
}

TARGET void queries(const AttentionGradients& call, int64_t b, int64_t h, int64_t first) {
  alignas(64) float scores[kTileRows * kPart];
  alignas(64) float slopes[kTileRows * kPart];  // dO V^T
  alignas(64) uint16_t ds[kTileRows * kPart];
  alignas(64) float sums[kTileRows * kMostDepth];
  const AttentionCall& f = call.forward;
  const KeyHead parts(f);
  const QueryHead own(f);
  const int64_t rows = f.queries - first < kTileRows ? f.queries - first : kTileRows;
  const int64_t seen = f.causal && first + rows < f.keys ? first + rows : f.keys;
  const uint32_t* keys = key_head(call, b, h / (f.heads / f.kv_heads));
  const uint32_t* mine = query_head(call, b, h);
  const float* exponents = reinterpret_cast<const float*>(mine + own.exponents) + first;
  const float* d = reinterpret_cast<const float*>(mine + own.sums) + first;
  const __m512 scale = _mm512_set1_ps(f.scale * kLog2E);
  std::memset(sums, 0, static_cast<size_t>(rows * f.depth) * sizeof(float));
  for (int64_t part = 0; part < seen; part += kPart) {
    const int64_t count = seen - part < kPart ? seen - part : kPart, vectors = ceil_div(count, kLanes);
    product(f.q.at(b, h, first), f.q.position, rows, keys + parts.lanes + part * f.depth / 2, kBlock,
            kBlock * f.depth / 2, f.depth / 2, vectors, scores, kPart, false);
    product(call.d_out.at(b, h, first), call.d_out.position, rows,
            keys + parts.value_lanes + part * f.value_depth / 2, kBlock, kBlock * f.value_depth / 2, f.value_depth / 2,
            vectors, slopes, kPart, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t most = f.causal ? first + r + 1 - part : count, visible = most < count ? most : count;
      const __m512 exponent = _mm512_set1_ps(exponents[r]), mean = _mm512_set1_ps(d[r]);
      for (int64_t i = 0; i < vectors; ++i) {
        const int64_t at = r * kPart + i * kLanes;
        const __m512 p = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + at), scale, exponent));
        const __m512 slope = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_load_ps(slopes + at), mean));
        store_half(ds + at, _mm512_maskz_mov_ps(lanes_below(visible - i * kLanes), slope));
      }
    }
    product(ds, kPart, rows, keys + parts.pairs + part / 2 * f.depth, f.depth, kBlock, vectors * kLanes / 2,
            f.depth / kLanes, sums, f.depth, true);
  }
  write(sums, rows, f.depth, f.scale, call.d_q.at(b, h, first), call.d_q.position);
}

// Later queries see more keys, earlier keys are seen by more queries; from both ends in turn, a part of the units has as much
// work as any other.
int64_t in_turn(int64_t turn, int64_t tiles) { return turn % 2 ? tiles - 1 - turn / 2 : turn / 2; }

void query_run(const AttentionGradients& call, int64_t first, int64_t last) {
  const int64_t tiles = query_tiles(call.forward), heads = call.forward.heads;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t head = unit / tiles;
    queries(call, head / heads, head % heads, in_turn(unit % tiles, tiles) * kTileRows);
  }
}

// ---- The gradients of a few keys and their values. Rows are keys, lanes are queries.

int64_t key_tiles(const AttentionCall& f) { return ceil_div(f.keys, kTileRows); }
int64_t key_units(const AttentionGradients& call) {
  return call.forward.batch * call.forward.kv_heads * key_tiles(call.forward);
}

TARGET void keys(const AttentionGradients& call, int64_t b, int64_t g, int64_t first) {
  alignas(64) float scores[kTileRows * kPart];
  alignas(64) float slopes[kTileRows * kPart];  // V dO^T
  alignas(64) uint16_t weights[kTileRows * kPart];
  alignas(64) uint16_t ds[kTileRows * kPart];
  alignas(64) float key_sums[kTileRows * kMostDepth];
  alignas(64) float value_sums[kTileRows * kMostDepth];
  const AttentionCall& f = call.forward;
  const QueryHead parts(f);
  const int64_t rows = f.keys - first < kTileRows ? f.keys - first : kTileRows, share = f.heads / f.kv_heads;
  const int64_t begin = f.causal ? first / kBlock * kBlock : 0;  // earlier queries see none of these keys
  const __m512 scale = _mm512_set1_ps(f.scale * kLog2E);
  std::memset(key_sums, 0, static_cast<size_t>(rows * f.depth) * sizeof(float));
  std::memset(value_sums, 0, static_cast<size_t>(rows * f.value_depth) * sizeof(float));
  for (int64_t h = g * share; h < (g + 1) * share; ++h) {
    const uint32_t* of_head = query_head(call, b, h);
    const float* exponents = reinterpret_cast<const float*>(of_head + parts.exponents);
    const float* d = reinterpret_cast<const float*>(of_head + parts.sums);
    for (int64_t part = begin; part < f.queries; part += kPart) {
      const int64_t left = f.queries - part, count = left < kPart ? left : kPart, vectors = ceil_div(count, kLanes);
      product(f.k.at(b, g, first), f.k.position, rows, of_head + parts.lanes + part * f.depth / 2, kBlock,
              kBlock * f.depth / 2, f.depth / 2, vectors, scores, kPart, false);
      product(f.v.at(b, g, first), f.v.position, rows, of_head + parts.out_lanes + part * f.value_depth / 2, kBlock,
              kBlock * f.value_depth / 2, f.value_depth / 2, vectors, slopes, kPart, false);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t hidden = f.causal ? first + r - part : 0;  // queries of the part that do not see the key
        for (int64_t i = 0; i < vectors; ++i) {
          const int64_t at = r * kPart + i * kLanes, query = part + i * kLanes;
          const __mmask16 sees = lanes_below(count - i * kLanes) & ~lanes_below(hidden - i * kLanes);
          const __m512 exponent = _mm512_load_ps(exponents + query), mean = _mm512_load_ps(d + query);
          const __m512 p = _mm512_maskz_mov_ps(
              sees, exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + at), scale, exponent)));
          const __m512 slope = _mm512_maskz_mul_ps(sees, p, _mm512_sub_ps(_mm512_load_ps(slopes + at), mean));
          store_half(weights + at, p);
          store_half(ds + at, slope);
        }
      }
      product(weights, kPart, rows, of_head + parts.out_pairs + part / 2 * f.value_depth, f.value_depth, kBlock,
              vectors * kLanes / 2, f.value_depth / kLanes, value_sums, f.value_depth, true);
      product(ds, kPart, rows, of_head + parts.pairs + part / 2 * f.depth, f.depth, kBlock, vectors * kLanes / 2,
              f.depth / kLanes, key_sums, f.depth, true);
    }
  }
  write(key_sums, rows, f.depth, f.scale, call.d_k.at(b, g, first), call.d_k.position);
  write(value_sums, rows, f.value_depth, 1.0f, call.d_v.at(b, g, first), call.d_v.position);
}

void key_run(const AttentionGradients& call, int64_t first, int64_t last) {
  const int64_t tiles = key_tiles(call.forward), heads = call.forward.kv_heads;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t head = unit / tiles;
    keys(call, head / heads, head % heads, in_turn(unit % tiles, tiles) * kTileRows);
  }
}

}  // namespace

const AttentionBackward kAvx512Bf16AttentionBackward{scratch_bytes, arrange_units, arrange, query_units,
                                                     query_run,     key_units,     key_run};

}  // namespace halve
#endif
