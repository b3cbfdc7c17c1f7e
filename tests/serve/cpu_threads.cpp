// Runs the kernels on a pool of plain threads, which ThreadSanitizer understands (it takes OpenMP's for races).
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "halve_cpu.h"

extern "C" {
const char* halve_cpu_paths();
void halve_cpu_set_thread_pool(void*, void*, void*);
int64_t halve_sparse24_stream_bytes(int, int64_t, int64_t);
int64_t halve_sparse24_prepare(int, int, const uint8_t*, const uint8_t*, const float*, int64_t, int64_t, uint8_t*, int);
int64_t halve_sparse24_scratch_bytes(int, int64_t, int, int64_t, int64_t, int64_t, int64_t);
int halve_sparse24_expand(const uint8_t*, int64_t, int, int64_t, int64_t, uint8_t*, int);
int halve_sparse24_restore(const uint8_t*, int64_t, uint8_t*, uint8_t*, float*, int);
int halve_sparse24_linear(int, const uint8_t*, int64_t, int, int64_t, int64_t, const void*, int64_t, int64_t,
                          const void*, void*, int64_t, int64_t, uint8_t*, int);
int halve_dense_linear(int, int, const void*, int64_t, int64_t, int64_t, const void*, int64_t, int64_t, const void*,
                       void*, int64_t, int);
}

thread_local int member = 0, members = 1;
int thread_num() { return member; }
int num_threads() { return members; }
void team(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> pool;
  for (unsigned i = 0; i < threads; ++i) {
    pool.emplace_back([=] {
      member = static_cast<int>(i), members = static_cast<int>(threads);
      body(data);
    });
  }
  for (auto& thread : pool) thread.join();
}

uint8_t* bytes(int64_t size) {
  return static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(size + 127) / 64 * 64));
}

int main(int argc, char**) {
  halve_cpu_set_thread_pool(reinterpret_cast<void*>(team), reinterpret_cast<void*>(thread_num),
                            reinterpret_cast<void*>(num_threads));
  int calls = 0;
  for (int path = 0; path < 4; ++path) {
    // Each dtype of x, with values of its own, of both that have scales, and of both with x that is rounded to them.
    for (int kind = 0; kind < 15; ++kind) {
      const int io = kind % 3, quantizes_x = kind >= 9, dtype = kind < 3 ? io : 2 + (kind - 6 * quantizes_x) / 3;
      for (int64_t n : {37, 200}) {
        const int64_t k = 72, size = halve_sparse24_stream_bytes(dtype, n, k);
        uint8_t *values = bytes(n * k * 2), *mask = bytes(n * k / 8), *stream = bytes(size), *dense = bytes(n * k * 4);
        std::vector<float> scales(static_cast<size_t>(n), 0.5f);
        std::memset(values, 0x3c, n * k * 2), std::memset(mask, 0x5a, n * k / 8);
        if (halve_sparse24_prepare(dtype, quantizes_x, values, mask, scales.data(), n, k, stream, 4) != -1) return 2;
        if (halve_sparse24_expand(stream, size, io, 3, n - 3, dense, 4) != 0) return 3;
        if (halve_sparse24_restore(stream, size, values, mask, scales.data(), 4) != 0) return 4;
        std::memset(dense, 0x3c, n * k * 4);
        for (int64_t m : {1, 3, 7, 40, 130}) {
          uint8_t *x = bytes(m * k * 4), *y = bytes(m * n * 4);
          std::memset(x, 0x3c, m * k * 4);
          for (int64_t few : {0, 1000}) {
            const int64_t need = halve_sparse24_scratch_bytes(path, size, io, n, k, m, few);
            if (need < 0) continue;
            uint8_t* scratch = bytes(need);
            // With any argument to the program, the rows of y are one and the same: a race that has to be found.
            for (int threads : {2, 4}) {
              calls += halve_sparse24_linear(path, stream, size, io, n, k, x, m, k, nullptr, y, argc > 1 ? 0 : n,
                                             few, scratch, threads) == 0;
            }
            std::free(scratch);
          }
          calls += dtype == io && halve_dense_linear(path, dtype, dense, n, k, k, x, m, k, nullptr, y, n, 4) == 0;
          std::free(x), std::free(y);
        }
        std::free(values), std::free(mask), std::free(stream), std::free(dense);
      }
    }
  }
  std::printf("%d calls on %s\n", calls, halve_cpu_paths());
}
