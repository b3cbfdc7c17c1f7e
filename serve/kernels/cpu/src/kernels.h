// The kernels there are; `api.cpp` chooses.
#pragma once

#include "halve_cpu.h"

namespace halve {

extern const Kernel kPortableOne, kPortablePanel;
extern const RoundRows kPortableRound;
#if defined(__x86_64__)
extern const Kernel kAvx2Stream, kAvx2Panel;
extern const RoundRows kAvx2Round, kAvx512Round;
extern const Kernel kAvx512Stream, kAvx512Panel;
extern const Kernel kAvx512Bf16Stream, kAvx512Bf16Panel;              // bfloat16 only
extern const Kernel kAvx512Bf16Float8Stream, kAvx512Bf16Float8Panel;  // x in bfloat16; AVX-512 VBMI
extern const Kernel kAvx512Bf16Int8Panel;                             // x in bfloat16
extern const Kernel kAvx2Int8, kAvx512Int8, kAvx512VnniInt8;          // few rows of x of 16 bits
extern const Kernel kAvx512VnniBoth, kAvx512VnniBothMany;                                   // x in int8, too: it is rounded on the way
#endif

// Dense rows, for the layers that are not sparse: y = x W^T + bias for a row-major W [n, k] that is read as it is.
struct DenseCall {
  DType dtype;
  const void* weight;
  int64_t n, k, weight_stride;
  const void* x;
  int64_t m, x_stride;
  const void* bias;
  void* y;
  int64_t y_stride;
};
using DenseKernel = void (*)(const DenseCall&, int64_t first_row, int64_t last_row);
#if defined(__x86_64__)
extern const DenseKernel kAvx512Bf16Dense;  // bfloat16 only
extern const DenseKernel kAvx512Dense, kAvx2Dense;
#endif

// prepare.cpp
int64_t stream_bytes(DType dtype, int64_t n, int64_t k);
int64_t prepare(DType dtype, bool quantizes_x, const uint8_t* values, const uint8_t* mask, const float* scales, int64_t n,
                int64_t k, uint8_t* stream, int threads);
// Memory that is already in use moves into huge pages, where the system can do that.
void gather_into_huge_pages(void* start, int64_t bytes);
void restore(const Weight& weight, uint8_t* values, uint8_t* mask, float* scales, int threads);
// Scaled values are multiplied and rounded to the dtype `to`; others have it.
void expand(const Weight& weight, DType to, int64_t first_row, int64_t rows, uint8_t* dense, int threads);

}  // namespace halve
