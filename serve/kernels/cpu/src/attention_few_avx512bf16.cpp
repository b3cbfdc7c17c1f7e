// Attention of a few queries on x86-64 with AVX-512 BF16: a token that is decoded.
//
// All queries of the heads that share keys are rows of one product, so that keys and values are read once, and arranged on the
// way in a buffer that stays in the first cache. A unit is a part of the keys of one such group of heads; what the units
// of a group found is put together in a second pass.
#include "attention_avx512bf16.h"

#if defined(__x86_64__)

namespace halve {
namespace {

int64_t rows_of(const AttentionCall& call) { return call.heads / call.kv_heads * call.queries; }
int64_t parts(const AttentionCall& call) { return ceil_div(call.keys, kPart); }
int64_t groups(const AttentionCall& call) { return call.batch * call.kv_heads; }

// What a unit leaves in the scratch: the state and the sums of each row.
int64_t part_floats(const AttentionCall& call) {
  return ceil_div(rows_of(call) * (2 + call.value_depth), kLanes) * kLanes;
}
Running* states(const AttentionCall& call, int64_t unit) {
  return reinterpret_cast<Running*>(reinterpret_cast<float*>(call.scratch) + unit * part_floats(call));
}
float* sums_of(const AttentionCall& call, int64_t unit) {
  return reinterpret_cast<float*>(states(call, unit) + rows_of(call));
}

int64_t scratch_bytes(const AttentionCall& call) { return groups(call) * parts(call) * part_floats(call) * 4; }
int64_t part_units(const AttentionCall& call) { return groups(call) * parts(call); }

TARGET void part(const AttentionCall& call, int64_t unit) {
  alignas(64) uint32_t words[kBlock / 2 * kMostDepth];
  alignas(64) uint16_t queries[kTileRows * kMostDepth];
  alignas(64) float scores[kTileRows * kPart];
  alignas(64) uint16_t weights[kTileRows * kPart];
  const int64_t group = unit / parts(call), b = group / call.kv_heads, g = group % call.kv_heads;
  const int64_t first = unit % parts(call) * kPart, left = call.keys - first, count = left < kPart ? left : kPart;
  const int64_t rows = rows_of(call), share = call.heads / call.kv_heads, depth = call.depth, wide = call.value_depth;
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(queries + r * depth, call.q.at(b, g * share + r / call.queries, r % call.queries),
                static_cast<size_t>(depth) * 2);
  }
  for (int64_t key = 0; key < count; key += kBlock) {
    const int64_t some = count - key < kBlock ? count - key : kBlock;
    arrange_lanes(call.k.at(b, g, first + key), call.k.position, some, depth, words);
    product(queries, depth, rows, words, kBlock, 0, depth / 2, ceil_div(some, kLanes), scores + key, kPart, false);
  }
  const int64_t vectors = ceil_div(count, kLanes);
  Running* state = states(call, unit);
  float* sums = sums_of(call, unit);
  std::memset(sums, 0, static_cast<size_t>(rows * wide) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    state[r] = {-INFINITY, 0.0f};
    const int64_t most = call.causal ? r % call.queries + 1 - first : count, seen = most < count ? most : count;
    if (seen > 0) {
      const uint8_t* visible = call.visible.at(b, r % call.queries);
      weigh(scores + r * kPart, seen, visible == nullptr ? nullptr : visible + first, vectors, call.scale * kLog2E,
            state[r], weights + r * kPart);
    } else {
      std::memset(weights + r * kPart, 0, static_cast<size_t>(vectors * kLanes) * 2);
    }
  }
  for (int64_t key = 0; key < count; key += kBlock) {
    const int64_t some = count - key < kBlock ? count - key : kBlock;
    arrange_pairs(call.v.at(b, g, first + key), call.v.position, some, wide, words);
    product(weights + key, kPart, rows, words, wide, kBlock, ceil_div(some, kLanes) * kLanes / 2, wide / kLanes, sums,
            wide, true);
  }
}

void part_run(const AttentionCall& call, int64_t first, int64_t last) {
  for (int64_t unit = first; unit < last; ++unit) part(call, unit);
}

int64_t merge_units(const AttentionCall& call) { return groups(call); }

TARGET void merge(const AttentionCall& call, int64_t group) {
  const int64_t b = group / call.kv_heads, g = group % call.kv_heads, count = parts(call), wide = call.value_depth;
  const int64_t share = call.heads / call.kv_heads, unit = group * count;
  const float scale = call.scale * kLog2E;
  for (int64_t r = 0; r < rows_of(call); ++r) {
    float most = -INFINITY, whole = 0.0f;
    for (int64_t p = 0; p < count; ++p) {
      const float here = states(call, unit + p)[r].most;
      most = here > most ? here : most;
    }
    alignas(64) float out[kMostDepth] = {};
    for (int64_t p = 0; p < count; ++p) {
      const Running& state = states(call, unit + p)[r];
      if (state.most == -INFINITY && state.sum == 0.0f) continue;  // sees none of these keys
      const float kept = exp2_of((state.most - most) * scale);
      const float* sums = sums_of(call, unit + p) + r * wide;
      whole += state.sum * kept;
      for (int64_t c = 0; c < wide; c += kLanes) {
        const __m512 sum = _mm512_fmadd_ps(_mm512_loadu_ps(sums + c), _mm512_set1_ps(kept), _mm512_load_ps(out + c));
        _mm512_store_ps(out + c, sum);
      }
    }
    const int64_t h = g * share + r / call.queries, query = r % call.queries;
    if (call.exponents != nullptr) {
      call.exponents[(b * call.heads + h) * call.queries + query] = most * scale + std::log2(whole);
    }
    const __m512 part_of = _mm512_set1_ps(share_of(whole));
    for (int64_t c = 0; c < wide; c += kLanes) {
      const __m512 mean = _mm512_mul_ps(_mm512_load_ps(out + c), part_of);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(call.out.at(b, h, query) + c),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(mean)));
    }
  }
}

void merge_run(const AttentionCall& call, int64_t first, int64_t last) {
  for (int64_t group = first; group < last; ++group) merge(call, group);
}

}  // namespace

const AttentionKernel kAvx512Bf16FewAttention{scratch_bytes, part_units, part_run, merge_units, merge_run};

}  // namespace halve
#endif
