// Parallel loops on the thread pool of somebody else: the OpenMP runtime that torch has loaded. Its entry points are
// handed over at run time, so this library links to no OpenMP and can never start a second pool beside torch's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halve {

// Calls body(context, first, last) on consecutive parts of [0, units), at most `threads` of them at once. A unit is
// always in the part with the same number for the same number of threads, which keeps memory near the core that
// touched it first.
void parallel(int threads, int64_t units, void (*body)(void* context, int64_t first, int64_t last), void* context);

// Another pool, which runs part(argument, index) for so many parts.
struct Team {
  void (*run)(void* self, int parts, void (*part)(void* argument, size_t index), void* argument);
  void* self;
};

// While it lives, loops of the thread that made it run on that pool.
class Borrowed {
 public:
  explicit Borrowed(const Team& team);
  ~Borrowed();
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;

 private:
  Team team_;
};

}  // namespace halve
