// Softmax attention of bfloat16, in one pass over the keys: softmax(scale q k^T) v, with float32 sums.
#pragma once

#include "halve_cpu.h"

namespace halve {

// Where one of the tensors lies, [batch, heads, positions, depth]; strides in elements, along the depth it is 1.
struct Strided {
  uint16_t* data;
  int64_t batch, head, position;

  uint16_t* at(int64_t b, int64_t h, int64_t p) const { return data + b * batch + h * head + p * position; }
};

// A byte for each query and key, not 0 where the query sees the key, the same for all heads; null where all are seen.
struct Visible {
  const uint8_t* data;
  int64_t batch, query;  // strides; along the keys it is 1

  const uint8_t* at(int64_t b, int64_t q) const { return data == nullptr ? nullptr : data + b * batch + q * query; }
};

struct AttentionCall {
  Strided q, k, v, out;
  int64_t batch, heads, kv_heads, queries, keys;
  int64_t depth;        // of q and k; a multiple of 16
  int64_t value_depth;  // of v and out; a multiple of 16, at most kMostDepth
  float scale;
  bool causal;  // query i sees keys 0 to i
  Visible visible;
  float* exponents;  // [batch, heads, queries], or null: log2 of what each query's weights were divided by, for the backward pass
  uint8_t* scratch;
};

constexpr int64_t kMostDepth = 256;
constexpr int64_t kFewRows = 24;     // queries of all heads that share keys, up to which they are rows of one product,
constexpr int64_t kFewQueries = 15;  // where there are so few of each

// Work in two passes, in units that are independent of each other and of the number of threads. Where there
// are many queries, the first pass arranges keys and values in the scratch as the products read them.
struct AttentionKernel {
  int64_t (*scratch_bytes)(const AttentionCall&);
  int64_t (*arrange_units)(const AttentionCall&);
  void (*arrange)(const AttentionCall&, int64_t first, int64_t last);
  int64_t (*units)(const AttentionCall&);
  void (*run)(const AttentionCall&, int64_t first, int64_t last);
};

// The backward pass: of `forward` everything but its scratch, with the output and the exponents that it gave.
struct AttentionGradients {
  AttentionCall forward;
  Strided d_out, d_q, d_k, d_v;
  uint8_t* scratch;
};

// The gradients of the queries on the one hand, of the keys and values on the other: each in units of its own.
struct AttentionBackward {
  int64_t (*scratch_bytes)(const AttentionCall&);
  int64_t (*arrange_units)(const AttentionGradients&);
  void (*arrange)(const AttentionGradients&, int64_t first, int64_t last);
  int64_t (*query_units)(const AttentionGradients&);
  void (*query_run)(const AttentionGradients&, int64_t first, int64_t last);
  int64_t (*key_units)(const AttentionGradients&);
  void (*key_run)(const AttentionGradients&, int64_t first, int64_t last);
};
#if defined(__x86_64__)
extern const AttentionKernel kAvx2Attention, kAvx2FewAttention;
extern const AttentionKernel kAvx512Attention, kAvx512FewAttention;
extern const AttentionKernel kAvx512Bf16Attention, kAvx512Bf16FewAttention;
extern const AttentionBackward kAvx2AttentionBackward, kAvx512AttentionBackward, kAvx512Bf16AttentionBackward;
#endif

}  // namespace halve
