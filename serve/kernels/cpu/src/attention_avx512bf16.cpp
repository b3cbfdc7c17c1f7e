// Attention on x86-64 with AVX-512 BF16.
//
// A unit is a few queries of one head. They go over the keys in parts whose scores stay in the first cache, with the running
// maximum and sum of Milakov and Gimelshein's softmax. Arranged are
//
//   keys    [64 keys at a time][depth / 2][64] words
//   values  [keys / 2][value depth] words
#include "attention_avx512bf16.h"

#if defined(__x86_64__)

namespace halve {
namespace {

int64_t key_blocks(const AttentionCall& call) { return ceil_div(call.keys, kBlock); }
int64_t key_words(const AttentionCall& call) { return key_blocks(call) * kBlock * call.depth / 2; }  // of a head
int64_t value_words(const AttentionCall& call) { return key_blocks(call) * kBlock / 2 * call.value_depth; }
int64_t head_words(const AttentionCall& call) { return key_words(call) + value_words(call); }
uint32_t* arranged(const AttentionCall& call, int64_t b, int64_t kv_head) {
  return reinterpret_cast<uint32_t*>(call.scratch) + (b * call.kv_heads + kv_head) * head_words(call);
}

int64_t scratch_bytes(const AttentionCall& call) { return call.batch * call.kv_heads * head_words(call) * 4; }
int64_t arrange_units(const AttentionCall& call) { return call.batch * call.kv_heads * key_blocks(call); }

void arrange(const AttentionCall& call, int64_t first, int64_t last) {
  const int64_t blocks = key_blocks(call);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t head = unit / blocks, block = unit % blocks, b = head / call.kv_heads, h = head % call.kv_heads;
    const int64_t key = block * kBlock, keys = call.keys - key < kBlock ? call.keys - key : kBlock;
    uint32_t* out = arranged(call, b, h);
    arrange_lanes(call.k.at(b, h, key), call.k.position, keys, call.depth, out + key * call.depth / 2);
    arrange_pairs(call.v.at(b, h, key), call.v.position, keys, call.value_depth,
                   out + key_words(call) + key / 2 * call.value_depth);
  }
}

int64_t tiles(const AttentionCall& call) { return ceil_div(call.queries, kTileRows); }
int64_t units(const AttentionCall& call) { return call.batch * call.heads * tiles(call); }

// The keys that any of some queries sees lie between these two; so a window that slides costs what it shows.
struct Range {
  int64_t begin, end;
};
Range seen_by(const AttentionCall& call, int64_t b, int64_t first, int64_t rows) {
  const int64_t end = call.causal && first + rows < call.keys ? first + rows : call.keys;
  if (call.visible.data == nullptr) return {0, end};
  Range range{end, 0};
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* visible = call.visible.at(b, first + r);
    int64_t from = 0, to = end;
    while (from < range.begin && visible[from] == 0) ++from;
    while (to > range.end && visible[to - 1] == 0) --to;
    range.begin = from < range.begin ? from : range.begin;
    range.end = to > range.end ? to : range.end;
  }
  return {range.begin / kPart * kPart, range.end};
}

TARGET void attend(const AttentionCall& call, int64_t b, int64_t h, int64_t first) {
  alignas(64) float scores[kTileRows * kPart];
  alignas(64) uint16_t weights[kTileRows * kPart];
  alignas(64) float sums[kTileRows * kMostDepth];
  Running running[kTileRows];
  const int64_t rows = call.queries - first < kTileRows ? call.queries - first : kTileRows;
  const int64_t depth = call.depth, wide = call.value_depth;
  const Range range = seen_by(call, b, first, rows);
  const uint32_t* keys = arranged(call, b, h / (call.heads / call.kv_heads));
  const uint32_t* values = keys + key_words(call);
  const uint16_t* q = call.q.at(b, h, first);
  const float scale = call.scale * kLog2E;
  for (int64_t r = 0; r < rows; ++r) running[r] = {-INFINITY, 0.0f};
  std::memset(sums, 0, static_cast<size_t>(rows * wide) * sizeof(float));
  for (int64_t part = range.begin; part < range.end; part += kPart) {
    const int64_t count = range.end - part < kPart ? range.end - part : kPart, vectors = ceil_div(count, kLanes);
    product(q, call.q.position, rows, keys + part * depth / 2, kBlock, kBlock * depth / 2, depth / 2, vectors, scores,
            kPart, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t most = call.causal ? first + r + 1 - part : count;
      const int64_t seen = most < count ? most : count;
      if (seen <= 0) {
        std::memset(weights + r * kPart, 0, static_cast<size_t>(vectors * kLanes) * 2);
        continue;
      }
      const uint8_t* visible = call.visible.at(b, first + r);
      const float kept = weigh(scores + r * kPart, seen, visible == nullptr ? nullptr : visible + part, vectors, scale,
                               running[r], weights + r * kPart);
      if (kept == 1.0f) continue;
      const __m512 factor = _mm512_set1_ps(kept);
      for (int64_t c = 0; c < wide; c += kLanes) {
        _mm512_store_ps(sums + r * wide + c, _mm512_mul_ps(_mm512_load_ps(sums + r * wide + c), factor));
      }
    }
    product(weights, kPart, rows, values + part / 2 * wide, wide, kBlock, vectors * kLanes / 2, wide / kLanes, sums, wide,
            true);
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (call.exponents != nullptr) {
      call.exponents[(b * call.heads + h) * call.queries + first + r] = running[r].most * scale + std::log2(running[r].sum);
    }
    const __m512 whole = _mm512_set1_ps(share_of(running[r].sum));
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
    attend(call, head / call.heads, head % call.heads, tile * kTileRows);
  }
}

}  // namespace

const AttentionKernel kAvx512Bf16Attention{scratch_bytes, arrange_units, arrange, units, run};

}  // namespace halve
#endif
