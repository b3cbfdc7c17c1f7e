// A GPU as far as `sparse24.cu` needs one, on a processor: the functions of `primitives.cuh`, after the PTX ISA alone.
//
// Every lane is a fiber with a stack of its own, and all blocks of a cluster run at the same time. What hardware leaves
// open is chosen by a seed, in the ways that uncover mistakes: the order in which lanes run, and the moment at which a
// background copy happens, which is anything from its issue to the wait for it. Shared memory is NaN before it is written.
// Whatever is undefined (an address outside of memory, metadata that are no rising pair, warps that wait for each other
// for ever) ends the run with a message.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#define HALVE_PRIMITIVES
#define HALVE_DEVICE inline
#define HALVE_KERNEL(threads, blocks) inline void
#define HALVE_BY_VALUE const

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

struct BFloat16;
struct Float16;
struct Same;
struct Int8;
struct Float8;

struct alignas(16) Quad {
  u32 word[4];
};

namespace emulated {

struct Copy {
  u8* to;
  const u8* from;
  bool there;
};

struct Barrier {
  int arrived = 0;
  u64 generation = 0;
};

// What the lanes of a warp hand to each other; two, because a lane may be at the next exchange already.
struct Exchange {
  Quad a[32], b[32];
  u32 word[32];
  float d[32][4];
};

struct Warp {
  Barrier barrier;
  Exchange exchange[2];
};

struct Block {
  int index;
  std::vector<u8> shared;
  std::map<int, Barrier> barriers;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  std::vector<u8> stack;
  Block* block;
  int thread;
  bool done = false;
  const Barrier* waits_for = nullptr;  // until it has another generation than this
  u64 generation = 0;
  int exchanges = 0;
  bool may_read_x = false;  // the kernel before this one has ended
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> closed;
};

enum class Copies { kAtOnce, kAtTheWait, kAnyTime };

struct Device {
  std::vector<std::unique_ptr<Block>> blocks;  // of the cluster that runs
  std::vector<std::unique_ptr<Fiber>> fibers;
  Barrier cluster_barrier;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  std::mt19937 random;
  Copies copies;
  std::string failure;
  std::vector<std::pair<const u8*, size_t>> readable;  // global memory
};
inline Device* device = nullptr;

[[noreturn]] inline void leave() {
  device->running->done = true;
  swapcontext(&device->running->context, &device->scheduler);
  __builtin_unreachable();
}
[[noreturn]] inline void fail(const std::string& what) {
  if (device->failure.empty()) {
    device->failure = what + " (block " + std::to_string(device->running->block->index) + ", thread " +
                      std::to_string(device->running->thread) + ")";
  }
  leave();
}
inline void wait(Barrier& barrier, int threads) {
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& me = *device->running;
  me.waits_for = &barrier;
  me.generation = barrier.generation;
  swapcontext(&me.context, &device->scheduler);
}

inline Fiber& self() { return *device->running; }
inline int lane() { return self().thread % 32; }
inline Warp& warp() { return self().block->warps[self().thread / 32]; }

inline u8* shared_at(Block& block, u32 address, size_t bytes) {
  if (address % bytes) fail("an access to shared memory is not aligned");
  if (address + bytes > block.shared.size()) fail("an access beyond shared memory");
  return block.shared.data() + address;
}
inline const u8* global_at(const void* address, size_t bytes) {
  const u8* from = static_cast<const u8*>(address);
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("a load is not aligned");
  for (const auto& [start, size] : device->readable) {
    if (from >= start && from + bytes <= start + size) return from;
  }
  fail("a load from outside of the weight and x");
}

// Hands something to the warp, waits for all lanes, and gives what they handed over.
template <class Put>
Exchange& exchange(Put put) {
  Exchange& now = warp().exchange[self().exchanges++ % 2];
  put(now);
  wait(warp().barrier, 32);
  return now;
}

inline void perform(const Copy& copy) {
  if (copy.there) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}
inline void issue(u32 to, const void* from, bool there) {
  const Copy copy{shared_at(*self().block, to, 16), there ? global_at(from, 16) : nullptr, there};
  const bool now = device->copies == Copies::kAtOnce || (device->copies == Copies::kAnyTime && device->random() % 2);
  if (now) {
    perform(copy);
  } else {
    self().open.push_back(copy);
  }
}

inline float half_to_float(u16 bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline u16 float_to_half(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  u16 bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline float from_bits(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline u32 to_bits(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline u16 float_to_bfloat16(float value) {
  const u32 bits = to_bits(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulated

inline int thread_index() { return emulated::self().thread; }
inline int block_index() { return emulated::self().block->index; }
inline u32 shared_memory() { return 0; }

inline void sync_block() {
  emulated::Block& block = *emulated::self().block;
  emulated::wait(block.barriers[0], static_cast<int>(block.warps.size()) * 32);
}
template <int threads>
void sync_warps(int barrier) {
  if (threads == 32) {
    emulated::wait(emulated::warp().barrier, 32);
  } else {
    if (barrier < 1 || barrier > 15) emulated::fail("there is no such barrier");
    emulated::wait(emulated::self().block->barriers[barrier], threads);
  }
}
inline void sync_cluster() {
  emulated::wait(emulated::device->cluster_barrier, static_cast<int>(emulated::device->fibers.size()));
}

inline void leave_cluster() { sync_cluster(); }

inline void wait_for_kernel_before() { emulated::self().may_read_x = true; }
inline void let_next_kernel_begin() {}

inline u64 read_once() { return 1; }
inline void copy_weights(u32 to, const void* from, u64) { emulated::issue(to, from, true); }
inline void copy_or_zero(u32 to, const void* from, bool there) {
  if (!emulated::self().may_read_x) emulated::fail("x is read before it is there");
  emulated::issue(to, from, there);
}
inline void close_copies() {
  emulated::self().closed.push_back(std::move(emulated::self().open));
  emulated::self().open.clear();
}
template <int pending>
void wait_for_copies() {
  auto& closed = emulated::self().closed;
  for (; static_cast<int>(closed.size()) > pending; closed.pop_front()) {
    for (const auto& copy : closed.front()) emulated::perform(copy);
  }
}

inline Quad load_shared(u32 address) {
  Quad v;
  std::memcpy(&v, emulated::shared_at(*emulated::self().block, address, 16), 16);
  return v;
}
inline Quad load_shared_of(u32 address, int rank) {
  auto& blocks = emulated::device->blocks;
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) emulated::fail("there is no such block in the cluster");
  for (const auto& fiber : emulated::device->fibers) {
    if (fiber->block == blocks[rank].get() && fiber->done) emulated::fail("the shared memory of a block that has left");
  }
  Quad v;
  std::memcpy(&v, emulated::shared_at(*blocks[rank], address, 16), 16);
  return v;
}
inline void store_shared(u32 address, const Quad& v) {
  std::memcpy(emulated::shared_at(*emulated::self().block, address, 16), &v, 16);
}
inline void store_shared(u32 address, float v) {
  std::memcpy(emulated::shared_at(*emulated::self().block, address, 4), &v, 4);
}
inline Quad load_global(const void* from) {
  Quad v;
  std::memcpy(&v, emulated::global_at(from, 16), 16);
  return v;
}
inline Quad load_inputs_now(const void* from) {
  if (!emulated::self().may_read_x) emulated::fail("x is read before it is there");
  return load_global(from);
}
inline float load_number_now(const float* from) {
  if (!emulated::self().may_read_x) emulated::fail("a scale of x is read before it is there");
  float v;
  std::memcpy(&v, emulated::global_at(from, 4), 4);
  return v;
}

inline u32 from_lane(u32 value, int lane) {
  return emulated::exchange([&](emulated::Exchange& e) { e.word[emulated::lane()] = value; }).word[lane];
}

// PTX ISA, "Warp-level matrix load instruction: ldmatrix".
inline Quad load_matrices(u32 row) {
  const auto& all = emulated::exchange([&](emulated::Exchange& e) { e.word[emulated::lane()] = row; });
  Quad v;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const u32 address = all.word[matrix * 8 + emulated::lane() / 4];
    std::memcpy(&v.word[matrix], emulated::shared_at(*emulated::self().block, address, 16) + emulated::lane() % 4 * 4, 4);
  }
  return v;
}

// PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types". A lane computes its own four of d, from what
// all lanes brought. Elements of A are numbered 0 to 7 as there, two in each register.
template <class T>
float to_float(u16 bits);
template <class T, int selector>
void multiply_sparse(float (&d)[4], const Quad& a, const Quad& b, u32 metadata) {
  const int me = emulated::lane();
  const auto& all = emulated::exchange([&](emulated::Exchange& e) {
    e.a[me] = a;
    e.b[me] = b;
    e.word[me] = metadata;
  });
  auto element = [](const Quad& of, int number) {
    return to_float<T>(static_cast<u16>(of.word[number / 2] >> number % 2 * 16));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = me / 4 + (i < 2 ? 0 : 8), column = me % 4 * 2 + (i & 1);
    double sum = 0;
    for (int chunk = 0; chunk < 2; ++chunk) {        // 16 columns, for which one lane has the metadata
      for (int group = 0; group < 4; ++group) {      // of four columns, which one lane of the row has the values of
        const u32 bits = all.word[row % 8 * 4 + selector * 2 + chunk] >> (row / 8 * 16 + group * 4) & 15;
        if ((bits & 3) >= bits >> 2) emulated::fail("metadata are no rising pair of columns");
        for (int which = 0; which < 2; ++which) {
          const int number = chunk * 4 + row / 8 * 2 + which;  // a0 a1 | a2 a3 8 rows below | a4 a5 16 columns on | a6 a7
          const float value = element(all.a[row % 8 * 4 + group], number);
          const int k = chunk * 16 + group * 4 + static_cast<int>(which ? bits >> 2 : bits & 3);
          // b_i has row 2 t + i % 2 + 8 (i / 2) of column q, in lane 4 q + t
          const float input = element(all.b[column * 4 + k % 8 / 2], k / 8 * 2 + k % 2);
          sum += static_cast<double>(value) * input;
        }
      }
    }
    d[i] = static_cast<float>(d[i] + sum);
  }
}

inline float as_float(u32 bits) { return emulated::from_bits(bits); }
inline u32 as_bits(float value) { return emulated::to_bits(value); }
template <>
inline float to_float<BFloat16>(u16 bits) {
  return emulated::from_bits(static_cast<u32>(bits) << 16);
}
template <>
inline float to_float<Float16>(u16 bits) {
  return emulated::half_to_float(bits);
}
// PTX ISA, prmt in its default mode, of which the highest bit of a digit repeats a sign.
inline u32 pick_bytes(u32 low, u32 high, u32 which) {
  const u64 bytes = low | static_cast<u64>(high) << 32;
  u32 picked = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 digit = which >> 4 * i & 15;
    if (digit > 7) emulated::fail("a byte is picked for its sign");
    picked |= static_cast<u32>(bytes >> 8 * digit & 0xff) << 8 * i;
  }
  return picked;
}

// Every result that the kernels ask for is a number that the dtype has, so this does not round but look.
template <class T>
u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 pair = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    auto number = [&](u32 of) { return static_cast<double>(to_float<T>(static_cast<u16>(of >> shift))); };
    const double exact = number(a) * number(b) + number(c);
    const float value = static_cast<float>(exact);
    const u16 bits = std::is_same_v<T, BFloat16> ? emulated::float_to_bfloat16(value) : emulated::float_to_half(value);
    if (static_cast<double>(to_float<T>(bits)) != exact) emulated::fail("a value was rounded when it was converted");
    pair |= static_cast<u32>(bits) << shift;
  }
  return pair;
}
template <class T>
u32 rounded(float low, float high) {
  auto one = [](float value) {
    return static_cast<u32>(std::is_same_v<T, BFloat16> ? emulated::float_to_bfloat16(value)
                                                        : emulated::float_to_half(value));
  };
  return one(low) | one(high) << 16;
}

namespace emulated {

template <class Arguments>
struct Start {
  void (*kernel)(const Arguments);
  const Arguments* arguments;
};
template <class Arguments>
void run_fiber(u32 low, u32 high) {
  const auto* start = reinterpret_cast<const Start<Arguments>*>(static_cast<uintptr_t>(low) |
                                                                static_cast<uintptr_t>(high) << 32);
  start->kernel(*start->arguments);
  leave();
}

// Runs a grid, one cluster after the other. Returns what went wrong, or nothing.
template <class Arguments>
std::string launch(void (*kernel)(const Arguments), const Arguments& arguments, int grid, int cluster, int threads,
                   int shared_bytes, int seed, int copies, const std::vector<std::pair<const u8*, size_t>>& readable) {
  const Start<Arguments> start{kernel, &arguments};
  const auto at = reinterpret_cast<uintptr_t>(&start);
  for (int first = 0; first < grid; first += cluster) {
    Device here;
    device = &here;
    here.random.seed(seed + first);
    here.copies = static_cast<Copies>(copies);
    here.readable = readable;
    for (int rank = 0; rank < cluster; ++rank) {
      here.blocks.push_back(std::make_unique<Block>());
      Block& block = *here.blocks.back();
      block.index = first + rank;
      block.shared.assign(shared_bytes, 0xff);
      block.warps.resize(threads / 32);
      for (int thread = 0; thread < threads; ++thread) {
        here.fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *here.fibers.back();
        fiber.block = &block;
        fiber.thread = thread;
        fiber.stack.resize(64 << 10);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &here.scheduler;
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(run_fiber<Arguments>), 2, static_cast<u32>(at),
                    static_cast<u32>(at >> 32));
      }
    }
    std::vector<Fiber*> order;
    for (const auto& fiber : here.fibers) order.push_back(fiber.get());
    if (seed % 4 == 2) std::reverse(order.begin(), order.end());
    for (;;) {
      // As they are numbered, backwards, beginning anywhere, or all mixed.
      if (seed % 4 == 0) std::shuffle(order.begin(), order.end(), here.random);
      if (seed % 4 == 1) std::rotate(order.begin(), order.begin() + here.random() % order.size(), order.end());
      bool left = false, ran = false;
      for (Fiber* fiber : order) {
        if (fiber->done) continue;
        left = true;
        if (fiber->waits_for && fiber->waits_for->generation == fiber->generation) continue;
        ran = true;
        fiber->waits_for = nullptr;
        here.running = fiber;
        swapcontext(&here.scheduler, &fiber->context);
        if (!here.failure.empty()) return here.failure;
      }
      if (!left) break;
      if (!ran) return "all threads wait for each other";
    }
  }
  return "";
}

}  // namespace emulated
