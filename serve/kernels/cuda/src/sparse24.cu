// y [rows, n] = x [rows, k] times the transposed 2:4 weight [n, k] plus bias, for up to 64 rows, and the weight expanded.
//
// The weight comes as `layout.py` arranges it: after a header, units of 64 rows and 64 columns, all units of a panel of
// 64 rows in a row. A unit is what a warp multiplies in one step, 9 blocks of 512 bytes, 16 bytes a lane:
//
//   blocks 0 to 7   [column half][16 rows]   the A fragment of one mma.sp.m16n8k32, 4 registers a lane
//   block 8         [column half][32 rows]   metadata of two of them, one register a lane
//
// so every byte goes from memory to the registers that multiply it in 128-bit accesses of neighbouring lanes, without
// arithmetic on indices.
//
// Values of 8 bits take half of that, 5 blocks: those of [column half][32 rows], the fragments of the upper and of the lower 16
// rows, then the metadata. They are made x's dtype in registers, exactly, by some instructions for two of them, and what is left to do for
// the sums of products is one multiplication by the scale of their row. All scales, float32, follow the last unit. Where x was rounded to
// values of 8 bits, too, the sums are multiplied by the scale of its row before that.
//
// How the work is cut. A block of threads has some neighbouring panels and a part of k; `splits` blocks, a cluster, share
// panels and add up what they have through each other's shared memory. In a block, `Groups` groups of warps take units in
// turn along k, and the `Panels` warps of a group take the same columns of their own panel each, so that they share x.
// Groups wait for nobody until the end. All sums have a fixed order, so results are the same on every run.
//
// What is under way. A memory that delivers 4.8 TB/s (H200) after 0.7 us has 3.4 MB under way, 25 KB on each of 132
// processors, and loaded latencies are up to twice as long: 40 to 64 KB a processor are wanted. Copies go to shared memory in
// the background, so they need no registers. However a processor's shared memory is divided among blocks and groups, its
// eight warps have (Stages - 1) x 36 KB of weights under way, 110 KB at 4 stages; what differs is how many blocks there are
// to fill the processors evenly, and what it costs to add up their sums (`plan.py` chooses).
//
// Before and after. With programmatic dependent launch a block begins while the kernel before it still makes x: it fetches
// the weights of the whole pipeline, waits for x, and lets the next kernel begin at once, which does the same as soon as a
// processor has room.
#ifndef HALVE_PRIMITIVES
#include "primitives.cuh"
#endif

constexpr int kUnitRows = 64;
constexpr int kUnitColumns = 64;
constexpr int kBlockBytes = 512;
constexpr int kHeaderBytes = 512;
constexpr u32 kMagic = 0x47326868;  // "hh2G"

// First bytes of a weight.
struct Header {
  u32 magic, dtype, n, k;
};

struct Arguments {
  const u8* weight;
  const u16* x;     // [rows, k], aligned to 16 bytes; k is a multiple of 8
  const u16* bias;  // [n] or null
  u16* y;           // [rows, n]; where a weight is expanded, that
  // [rows] or null: x holds values of 8 bits as its own dtype has them, and what is multiplied is these times the scale of their row.
  // Looked at only where the weight's values have scales, too.
  const float* x_scales;
  int rows, n, k;
  int splits;  // blocks in a cluster
  u32 dtype;   // of the weight's values; if it has others, every output is NaN
};

template <class V>
struct Stored {
  static constexpr bool kScaled = true;
  static constexpr int kValueBlocks = 4;
  static constexpr int kUnitBytes = 5 * kBlockBytes;
};
template <>
struct Stored<Same> {
  static constexpr bool kScaled = false;
  static constexpr int kValueBlocks = 8;
  static constexpr int kUnitBytes = 9 * kBlockBytes;
};

// The numbers of two registers: bytes 0 and 2 of a word are the values of one, bytes 1 and 3 those of the other, 8 rows below.
template <class T, class V>
struct Numbers;

template <>
struct Numbers<Float16, Int8> {
  // 1024 and more: the last bits of a float16 are the integer, plus 128.
  static HALVE_DEVICE void of(u32 bytes, u32& upper, u32& lower) {
    const u32 positive = bytes ^ 0x80808080;
    upper = multiply_add<Float16>(pick_bytes(positive, 0x64646464, 0x4240), 0x3c003c00, 0xe480e480);  // less 1152
    lower = multiply_add<Float16>(pick_bytes(positive, 0x64646464, 0x4341), 0x3c003c00, 0xe480e480);
  }
};
template <>
struct Numbers<BFloat16, Int8> {
  // 128 and more: the last 7 bits of a bfloat16 are those of the integer, of which the sign is 128 to be taken away, and with it
  // the 128 that are too many: 256 or 128, which have one bit in two places.
  static HALVE_DEVICE u32 one(u32 pair) {
    return multiply_add<BFloat16>(pair & 0xff80ff80, 0xbf80bf80, pair & 0xff7fff7f);
  }
  static HALVE_DEVICE void of(u32 bytes, u32& upper, u32& lower) {
    upper = one(pick_bytes(bytes, 0x43434343, 0x4240));
    lower = one(pick_bytes(bytes, 0x43434343, 0x4341));
  }
};
// Sign, exponent and fraction of a float8 go to their places, where the exponent counts from 8 more, or from 120 more; what was
// subnormal is so there, too. (The product plus −0 is the product, whatever its sign.)
template <>
struct Numbers<Float16, Float8> {
  static HALVE_DEVICE u32 one(u32 high) {
    return multiply_add<Float16>((high >> 1 & 0x3f803f80) | (high & 0x80008000), 0x5c005c00, 0x80008000);
  }
  static HALVE_DEVICE void of(u32 bytes, u32& upper, u32& lower) { upper = one(bytes << 8), lower = one(bytes); }
};
template <>
struct Numbers<BFloat16, Float8> {
  static HALVE_DEVICE u32 one(u32 high) {
    return multiply_add<BFloat16>((high >> 4 & 0x07f007f0) | (high & 0x80008000), 0x7b807b80, 0x80008000);
  }
  static HALVE_DEVICE void of(u32 bytes, u32& upper, u32& lower) { upper = one(bytes << 8), lower = one(bytes); }
};

// The A fragments of 32 rows and 32 columns: of the upper and of the lower 16 rows.
struct Fragments {
  Quad upper, lower;
};
template <class T, class V>
HALVE_DEVICE Fragments fragments(const Quad& bytes) {
  Fragments both;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // registers 0 and 1, then 2 and 3, 16 columns on
    Numbers<T, V>::of(bytes.word[half], both.upper.word[half * 2], both.upper.word[half * 2 + 1]);
    Numbers<T, V>::of(bytes.word[2 + half], both.lower.word[half * 2], both.lower.word[half * 2 + 1]);
  }
  return both;
}

HALVE_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A weight that is something else than the caller thinks must not give numbers that look right.
HALVE_DEVICE bool belongs(const Quad& header, const Arguments& call) {
  return header.word[0] == kMagic && header.word[1] == call.dtype && header.word[2] == static_cast<u32>(call.n) &&
         header.word[3] == static_cast<u32>(call.k);
}

// Where the scale of the first row is.
template <class V>
HALVE_DEVICE const u8* scales_of(const Arguments& call) {
  const u64 units = static_cast<u64>(ceil_div(call.n, kUnitRows)) * ceil_div(call.k, kUnitColumns);
  return call.weight + kHeaderBytes + units * Stored<V>::kUnitBytes;
}

// T: of x and y. V: of the weight's values. Tiles: of 8 rows of x.
template <class T, class V, int Tiles, int Panels, int Groups, int Stages>
HALVE_DEVICE void multiply(const Arguments& call) {
  constexpr int kThreads = 32 * Panels * Groups;
  constexpr int kUnitBytes = Stored<V>::kUnitBytes, kValueBlocks = Stored<V>::kValueBlocks;
  constexpr int kInputBytes = Tiles * 8 * kUnitColumns * 2;
  constexpr int kStageBytes = Panels * kUnitBytes + kInputBytes;  // of one group
  constexpr int kChunks = Tiles * 64 / (32 * Panels);             // of 8 columns of a row of x, for each lane
  static_assert(kChunks * 32 * Panels == Tiles * 64, "every lane of a group copies as much of x");

  const int thread = thread_index(), lane = thread & 31, warp = thread >> 5;
  const int group = warp / Panels, member = warp % Panels;
  const int split = block_index() % call.splits, first_panel = block_index() / call.splits * Panels;
  const int units = ceil_div(call.k, kUnitColumns);
  const int first = units * split / call.splits, last = units * (split + 1) / call.splits;
  const int steps = last - first > group ? ceil_div(last - first - group, Groups) : 0;
  const bool has_panel = (first_panel + member) * kUnitRows < call.n;

  const u32 memory = shared_memory();
  const u32 stages = memory + group * Stages * kStageBytes;
  const u8* const weights = call.weight + kHeaderBytes + lane * 16 +
                            (static_cast<u64>(first_panel + member) * units + first + group) * kUnitBytes;
  const u64 policy = read_once();

  auto load_weights = [&](int step) {
    if (step >= steps || !has_panel) return;
    const u32 to = stages + step % Stages * kStageBytes + member * kUnitBytes + lane * 16;
    const u8* const from = weights + static_cast<u64>(step) * Groups * kUnitBytes;
#pragma unroll
    for (int block = 0; block <= kValueBlocks; ++block) copy_weights(to + block * kBlockBytes, from + block * kBlockBytes, policy);
  };

  // Where a lane's part of x of a step comes from and goes to, chunk by chunk. A row of a stage of x has 128 bytes, and its
  // 16-byte chunks change places by its number, so that the rows of a matrix lie in different banks.
  auto for_inputs = [&](int step, auto&& use) {
    const u32 inputs = stages + step % Stages * kStageBytes + Panels * kUnitBytes;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * 32 * Panels + member * 32 + lane, row = index >> 3, chunk = index & 7;
      const int column = (first + group + step * Groups) * kUnitColumns + chunk * 8;
      const bool there = row < call.rows && column < call.k;
      use(i, inputs + row * 128 + ((chunk ^ (row & 7)) << 4), call.x + (there ? static_cast<u64>(row) * call.k + column : 0),
          there);
    }
  };
  auto load_inputs = [&](int step) {
    if (step >= steps) return;
    for_inputs(step, [](int, u32 to, const u16* from, bool there) { copy_or_zero(to, from, there); });
  };

  float sums[4][Tiles][4] = {};
  auto compute = [&](int step) {
    const u32 stage = stages + step % Stages * kStageBytes;
    const u32 values = stage + member * kUnitBytes + lane * 16, inputs = stage + Panels * kUnitBytes;
    const Quad metadata = load_shared(values + kValueBlocks * kBlockBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Quad b[Tiles];
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        const int row = tile * 8 + (lane & 7), chunk = half * 4 + (lane >> 3);
        b[tile] = load_matrices(inputs + row * 128 + ((chunk ^ (row & 7)) << 4));
      }
#pragma unroll
      for (int rows = 0; rows < 4; rows += 2) {
        const u32 of_both = metadata.word[half * 2 + rows / 2];
        Fragments a;
        if constexpr (Stored<V>::kScaled) {
          a = fragments<T, V>(load_shared(values + (half * 2 + rows / 2) * kBlockBytes));
        } else {
          a = {load_shared(values + (half * 4 + rows) * kBlockBytes), load_shared(values + (half * 4 + rows + 1) * kBlockBytes)};
        }
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) multiply_sparse<T, 0>(sums[rows][tile], a.upper, b[tile], of_both);
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) multiply_sparse<T, 1>(sums[rows + 1][tile], a.lower, b[tile], of_both);
      }
    }
  };

  // No kernel writes a weight, so the whole pipeline of them is fetched while the kernel before this one still makes x. Groups
  // of copies end in order: as copies, x of the first step would wait for all of these weights, so the first steps of x go
  // through registers. The header is only looked at in the end: who compares it here waits for the memory before any copy.
  // So are the scales, of the four rows whose sums this thread will finish.
  constexpr int kFours = Panels * kUnitRows / 4;
  static_assert(kThreads % kFours == 0, "a thread finishes sums of the same rows in each turn");
  const Quad header = load_global(call.weight);
  const int own_row = first_panel * kUnitRows + thread % kFours * 4;
  Quad scales = {};
  if constexpr (Stored<V>::kScaled) {
    if (own_row < call.n) scales = load_global(scales_of<V>(call) + own_row * 4);
  }
#pragma unroll
  for (int step = 0; step < Stages - 1; ++step) {
    load_weights(step);
    close_copies();
  }
  wait_for_kernel_before();
  let_next_kernel_begin();
  Quad held[Stages - 1][kChunks];
#pragma unroll
  for (int step = 0; step < Stages - 1; ++step) {
    for_inputs(step, [&](int i, u32, const u16* from, bool there) {
      held[step][i] = there && step < steps ? load_inputs_now(from) : Quad{};
    });
  }
#pragma unroll
  for (int step = 0; step < Stages - 1; ++step) {
    for_inputs(step, [&](int i, u32 to, const u16*, bool) { store_shared(to, held[step][i]); });
  }
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<Stages - 2>();
    sync_warps<32 * Panels>(1 + group);  // this step's x is there for all, and all are through with the step before
    load_weights(step + Stages - 1);
    load_inputs(step + Stages - 1);
    close_copies();
    if (has_panel) compute(step);
  }

  // The sums of a group in shared memory, [row of x][row of the weight]. The distance of two rows of x, 4 more than a
  // multiple of 16, puts the 32 sums that a warp stores at a time into 32 banks.
  constexpr int kDistance = Panels * kUnitRows + 4;
  constexpr int kGroupSums = Tiles * 8 * kDistance;
  static_assert(Groups * kGroupSums * 4 <= Groups * Stages * kStageBytes, "sums take the place of the stages");
  wait_for_copies<0>();
  sync_block();
#pragma unroll
  for (int rows = 0; rows < 4; ++rows) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // the C fragment: rows lane / 4 and 8 more, columns 2 (lane % 4) and 1 more
        const int row = member * kUnitRows + rows * 16 + (lane >> 2) + (i >> 1) * 8, of_x = tile * 8 + (lane & 3) * 2 + (i & 1);
        store_shared(memory + (group * kGroupSums + of_x * kDistance + row) * 4, sums[rows][tile][i]);
      }
    }
  }
  sync_block();

  const bool right = belongs(header, call);

  // Four neighbouring outputs at a time, first over the groups, then over the blocks of the cluster.
  const int fours = call.rows * kFours;
  auto place = [&](int four) { return memory + (four / kFours * kDistance + four % kFours * 4) * 4; };
  auto add = [](float (&total)[4], const Quad& more) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += as_float(more.word[i]);
  };
  auto of_groups = [&](int four, float (&total)[4]) {
#pragma unroll
    for (int other = 0; other < Groups; ++other) add(total, load_shared(place(four) + other * kGroupSums * 4));
  };
  if (call.splits > 1) {
    for (int four = thread; four < fours; four += kThreads) {
      float total[4] = {};
      of_groups(four, total);
      store_shared(place(four), Quad{{as_bits(total[0]), as_bits(total[1]), as_bits(total[2]), as_bits(total[3])}});
    }
    sync_cluster();
  }
  for (int four = split * kThreads + thread; four < fours; four += call.splits * kThreads) {
    float total[4] = {}, of_x = 1;
    if constexpr (Stored<V>::kScaled) {
      if (call.x_scales) of_x = load_number_now(call.x_scales + four / kFours);
    }
    if (call.splits > 1) {
      for (int other = 0; other < call.splits; ++other) add(total, load_shared_of(place(four), other));
    } else {
      of_groups(four, total);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // (in this order: by one it stays what it is, and the second product and the bias may be one operation as without it)
      if constexpr (Stored<V>::kScaled) total[i] = total[i] * of_x * as_float(scales.word[i]);
      if (call.bias && own_row + i < call.n) total[i] += to_float<T>(call.bias[own_row + i]);
      if (!right) total[i] = as_float(0x7fffffff);
    }
    const u32 pairs[2] = {rounded<T>(total[0], total[1]), rounded<T>(total[2], total[3])};
    u16* const to = call.y + static_cast<u64>(four / kFours) * call.n + own_row;
    if (call.n % 4 == 0) {  // then four outputs are there or none, and in eight bytes that are aligned
      if (own_row < call.n) *reinterpret_cast<u64*>(to) = pairs[0] | static_cast<u64>(pairs[1]) << 32;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (own_row + i < call.n) to[i] = static_cast<u16>(pairs[i / 2] >> i % 2 * 16);
      }
    }
  }
  if (call.splits > 1) leave_cluster();  // nobody leaves while others read its sums
}

// The dense weight [n, k] in y, of values of 8 bits their float32 product with the scale, rounded once; a warp a unit.
template <class T, class V>
HALVE_DEVICE void expand(const Arguments& call, int warps) {
  constexpr int kUnitBytes = Stored<V>::kUnitBytes, kValueBlocks = Stored<V>::kValueBlocks;
  const int thread = thread_index(), lane = thread & 31;
  const int units = ceil_div(call.k, kUnitColumns);
  const int unit = block_index() * warps + (thread >> 5), panel = unit / units;
  if (panel * kUnitRows >= call.n) return;
  const bool right = belongs(load_global(call.weight), call);
  const u8* const from = call.weight + kHeaderBytes + static_cast<u64>(unit) * kUnitBytes + lane * 16;
  const Quad metadata = load_global(from + kValueBlocks * kBlockBytes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Fragments both;
#pragma unroll
    for (int rows = 0; rows < 4; ++rows) {
      Quad values;
      if constexpr (Stored<V>::kScaled) {
        if (rows % 2 == 0) both = fragments<T, V>(load_global(from + (half * 2 + rows / 2) * kBlockBytes));
        values = rows % 2 ? both.lower : both.upper;
      } else {
        values = load_global(from + (half * 4 + rows) * kBlockBytes);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // the A fragment: registers 1 and 3 are 8 rows below, 2 and 3 are 16 columns on
        const u32 word = from_lane(metadata.word[half * 2 + rows / 2], (lane & ~3) | (rows % 2 * 2 + i / 2));
        const u32 indices = word >> (i % 2 * 16 + (lane & 3) * 4);
        const int row = panel * kUnitRows + rows * 16 + (lane >> 2) + i % 2 * 8;
        u32 pair = values.word[i];
        if constexpr (Stored<V>::kScaled) {
          const float scale = reinterpret_cast<const float*>(scales_of<V>(call))[row];  // (there are some for all rows of a unit)
          pair = rounded<T>(to_float<T>(static_cast<u16>(pair)) * scale, to_float<T>(static_cast<u16>(pair >> 16)) * scale);
        }
        const u64 first = pair & 0xffff, second = pair >> 16;
        const u64 four = first << ((indices & 3) * 16) | second << ((indices >> 2 & 3) * 16);
        const int column = unit % units * kUnitColumns + half * 32 + i / 2 * 16 + (lane & 3) * 4;
        if (row < call.n && column < call.k) {
          *reinterpret_cast<u64*>(call.y + static_cast<u64>(row) * call.k + column) = right ? four : ~0ull;
        }
      }
    }
  }
}

// The values of 8 bits themselves, zeros among them, [n, k] bytes in y, and behind them the scales of the rows, [n] float32: NaN if it is
// another weight, as a byte cannot say it. A warp a unit.
template <class V>
HALVE_DEVICE void expand_bytes(const Arguments& call, int warps) {
  constexpr int kUnitBytes = Stored<V>::kUnitBytes, kValueBlocks = Stored<V>::kValueBlocks;
  const int thread = thread_index(), lane = thread & 31;
  const int units = ceil_div(call.k, kUnitColumns);
  const int unit = block_index() * warps + (thread >> 5), panel = unit / units;
  if (panel * kUnitRows >= call.n) return;
  const bool right = belongs(load_global(call.weight), call);
  const u8* const from = call.weight + kHeaderBytes + static_cast<u64>(unit) * kUnitBytes + lane * 16;
  u8* const to = reinterpret_cast<u8*>(call.y);
  if (unit % units == 0) {
    const float* const scales = reinterpret_cast<const float*>(scales_of<V>(call));
    float* const copied = reinterpret_cast<float*>(to + static_cast<u64>(call.n) * call.k);  // (k is a multiple of 8)
    for (int row = panel * kUnitRows + lane; row < call.n && row < (panel + 1) * kUnitRows; row += 32) {
      copied[row] = right ? scales[row] : as_float(0x7fffffff);
    }
  }
  const Quad metadata = load_global(from + kValueBlocks * kBlockBytes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int rows = 0; rows < 4; rows += 2) {
      const Quad bytes = load_global(from + (half * 2 + rows / 2) * kBlockBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // the upper 16 rows and the lower ones, and in them 8 rows below
        const int row = panel * kUnitRows + (rows + i / 2) * 16 + (lane >> 2) + i % 2 * 8;
        u32 four[2];  // of the left and of the right 16 columns
#pragma unroll
        for (int right_half = 0; right_half < 2; ++right_half) {
          const u32 word = from_lane(metadata.word[half * 2 + rows / 2], (lane & ~3) | (i / 2 * 2 + right_half));
          const u32 indices = word >> (i % 2 * 16 + (lane & 3) * 4), pair = bytes.word[i / 2 * 2 + right_half] >> i % 2 * 8;
          four[right_half] = (pair & 0xff) << ((indices & 3) * 8) | (pair >> 16 & 0xff) << ((indices >> 2 & 3) * 8);
        }
        // Two lanes give each other what makes eight columns in a row of both: of the left 16 for the even one.
        const bool odd = lane & 1;
        const u32 other = from_lane(odd ? four[0] : four[1], lane ^ 1);
        const u64 eight = odd ? other | static_cast<u64>(four[1]) << 32 : four[0] | static_cast<u64>(other) << 32;
        const int column = unit % units * kUnitColumns + half * 32 + (odd ? 16 : 0) + (lane & 2) * 4;
        if (row < call.n && column < call.k) *reinterpret_cast<u64*>(to + static_cast<u64>(row) * call.k + column) = eight;
      }
    }
  }
}

// What is compiled is chosen by `plan.py`, which writes such lines under this file.
#define HALVE_MULTIPLY(Name, T, V, Tiles, Panels, Groups, Stages, Resident)                   \
  HALVE_KERNEL(32 * Panels * Groups, Resident) Name(HALVE_BY_VALUE Arguments call) {          \
    multiply<T, V, Tiles, Panels, Groups, Stages>(call);                                      \
  }
#define HALVE_EXPAND(T, V, Warps) \
  HALVE_KERNEL(32 * Warps, 1) expand_weight(HALVE_BY_VALUE Arguments call) { expand<T, V>(call, Warps); }
#define HALVE_EXPAND_VALUES(V, Warps) \
  HALVE_KERNEL(32 * Warps, 1) expand_values(HALVE_BY_VALUE Arguments call) { expand_bytes<V>(call, Warps); }
