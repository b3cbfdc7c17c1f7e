#include "threads.h"

#include "export.h"

#include <atomic>

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);  // GOMP_parallel
using Query = int (*)();                                                             // omp_get_...

std::atomic<Parallel> run_team{nullptr};
std::atomic<Query> team_member{nullptr};
std::atomic<Query> team_size{nullptr};

thread_local const halve::Team* borrowed = nullptr;

struct Loop {
  int64_t units;
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t parts;

  void run(int64_t index, int64_t size) const {
    const int64_t first = units * index / size, last = units * (index + 1) / size;
    if (first < last) body(context, first, last);
  }
};

void member(void* argument) {
  const Loop& loop = *static_cast<const Loop*>(argument);
  const int64_t index = team_member.load(std::memory_order_relaxed)();
  const int64_t size = team_size.load(std::memory_order_relaxed)();
  loop.run(index, size);
}

void part(void* argument, size_t index) {
  const Loop& loop = *static_cast<const Loop*>(argument);
  loop.run(static_cast<int64_t>(index), loop.parts);
}

}  // namespace

HALVE_EXPORT void halve_cpu_set_thread_pool(void* parallel, void* thread_num,
                                                                                 void* num_threads) {
  run_team.store(reinterpret_cast<Parallel>(parallel));
  team_member.store(reinterpret_cast<Query>(thread_num));
  team_size.store(reinterpret_cast<Query>(num_threads));
}

namespace halve {

Borrowed::Borrowed(const Team& team) : team_(team) { borrowed = &team_; }
Borrowed::~Borrowed() { borrowed = nullptr; }

void parallel(int threads, int64_t units, void (*body)(void*, int64_t, int64_t), void* context) {
  const Parallel run = run_team.load(std::memory_order_relaxed);
  if (units < threads) threads = static_cast<int>(units);
  if ((run == nullptr && borrowed == nullptr) || threads <= 1) {
    if (units > 0) body(context, 0, units);
    return;
  }
  Loop loop{units, body, context, threads};
  if (borrowed != nullptr) {
    borrowed->run(borrowed->self, threads, part, &loop);
    return;
  }
  run(member, &loop, static_cast<unsigned>(threads), 0);
}

}  // namespace halve
