// The kernels there are; `api.cpp` chooses.
#pragma once

#include "halve_cpu.h"

namespace halve {

extern const Kernel kPortableOne, kPortablePanel;
#if defined(__x86_64__)
extern const Kernel kAvx2Stream, kAvx2Panel;
extern const Kernel kAvx512Stream, kAvx512Panel;
extern const Kernel kAvx512Bf16Stream, kAvx512Bf16Panel;  // bfloat16 only
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
int64_t prepare(DType dtype, const uint8_t* values, const uint8_t* mask, int64_t n, int64_t k, uint8_t* stream,
                int threads);
// Memory that is already in use moves into huge pages, where the system can do that.
void gather_into_huge_pages(void* start, int64_t bytes);
void restore(const Weight& weight, uint8_t* values, uint8_t* mask, int threads);
void expand(const Weight& weight, int64_t first_row, int64_t rows, uint8_t* dense, int threads);

}  // namespace halve
