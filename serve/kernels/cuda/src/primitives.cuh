// What the kernels need of the instruction set, one instruction a function, so that the kernels themselves are plain C++.
//
// Names and layouts are those of the PTX ISA, chapter "Warp-Level Matrix Instructions". The tests compile the same
// kernels for a processor with functions of the same names (`tests/serve/cuda_emulator.cpp`) in the place of these.
// No header is included, so that NVRTC needs no CUDA toolkit.
#ifndef HALVE_PRIMITIVES
#define HALVE_PRIMITIVES

#define HALVE_DEVICE __device__ __forceinline__
#define HALVE_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define HALVE_BY_VALUE const __grid_constant__

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct BFloat16;
struct Float16;

// What kept values are stored as: as they are multiplied, or in 8 bits.
struct Same;
struct Int8;
struct Float8;  // e4m3 without infinities

// Four registers of a lane, and what one 128-bit access moves.
struct alignas(16) Quad {
  u32 word[4];
};

HALVE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
HALVE_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }

// Shared memory is addressed by 32-bit numbers, as the instructions do it.
HALVE_DEVICE u32 shared_memory() {
  extern __shared__ __align__(128) u8 memory[];
  return static_cast<u32>(__cvta_generic_to_shared(memory));
}

// --- Waiting for others -------------------------------------------------------------------------------------------

HALVE_DEVICE void sync_block() { __syncthreads(); }

// Some of the warps of a block, `threads` lanes in all; barrier 0 is the block's own. Shared memory that one of them
// wrote before can be read by the others afterwards.
template <int threads>
HALVE_DEVICE void sync_warps(int barrier) {
  if constexpr (threads == 32) {
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(threads) : "memory");
  }
}

#if __CUDA_ARCH__ >= 900
// Programmatic dependent launch: a kernel that was launched so begins when the one before it lets it, and waits here until
// that one has ended and all that it wrote can be read. Both do nothing after other launches.
HALVE_DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
HALVE_DEVICE void let_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

HALVE_DEVICE void sync_cluster() {
  __syncwarp();  // "aligned" promises that lanes arrive together, which they may not do after loops of their own
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same where nobody wrote anything that others read afterwards: all that it says is that they are through with what they
// read. Without a release, nothing that was written before is waited for, not even the result on its way to the memory.
HALVE_DEVICE void leave_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// Four floats in the shared memory of another block of the cluster, at the address that they have in its own.
HALVE_DEVICE Quad load_shared_of(u32 address, int rank) {
  Quad v;
  asm volatile(
      "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %4, %5;\n\t"
      "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [there];\n\t}"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}
#else
// Both came with sm_90; on older devices there is one block in each cluster (`plan.py` does not ask for more).
HALVE_DEVICE void wait_for_kernel_before() {}
HALVE_DEVICE void let_next_kernel_begin() {}
HALVE_DEVICE void sync_cluster() { __syncthreads(); }
HALVE_DEVICE void leave_cluster() {}
HALVE_DEVICE Quad load_shared_of(u32, int) { __trap(); }
#endif

// --- Memory -------------------------------------------------------------------------------------------------------

// Copies 16 bytes into shared memory in the background, past the first cache. Weights are read once a token and gigabytes
// of them follow, so they are the first that may leave the second cache again.
HALVE_DEVICE void copy_weights(u32 to, const void* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
               : "memory");
}
HALVE_DEVICE u64 read_once() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The same for what stays in the second cache; zeros where there is nothing to copy, and then `from` is not read.
HALVE_DEVICE void copy_or_zero(u32 to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Closes a group of copies; then waits until at most `pending` of this thread's groups are under way.
HALVE_DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
HALVE_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

HALVE_DEVICE Quad load_shared(u32 address) {
  Quad v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}
HALVE_DEVICE void store_shared(u32 address, const Quad& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}
HALVE_DEVICE void store_shared(u32 address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

// Weights that are read straight into registers.
HALVE_DEVICE Quad load_global(const void* from) {
  Quad v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(from));
  return v;
}

// What the kernel before this one wrote, perhaps while this one was running already: never by way of the read-only cache.
HALVE_DEVICE Quad load_inputs_now(const void* from) {
  Quad v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(from)
               : "memory");
  return v;
}

HALVE_DEVICE float load_number_now(const float* from) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
  return v;
}

// --- Between the lanes of a warp ----------------------------------------------------------------------------------

HALVE_DEVICE u32 from_lane(u32 value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// ldmatrix.x4: lane 8 j + r says where row r of the 8 x 8 matrix j is, 16 bytes of 16-bit values; lane 4 r + t gets
// columns 2 t and 2 t + 1 of row r, of matrix j in register j.
HALVE_DEVICE Quad load_matrices(u32 row) {
  Quad v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(row)
               : "memory");
  return v;
}

// mma.sp.m16n8k32: d [16, 8] += a [16, 32] b [32, 8] in float32, a being 2:4. `selector` says whose metadata counts:
// 0 that of lanes 4 q and 4 q + 1, 1 that of lanes 4 q + 2 and 4 q + 3. Both indices of a pair rise, which the form with
// ordered_metadata (PTX ISA 8.5) promises; the older form may be slow on newer devices.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define HALVE_SPARSE "mma.sp::ordered_metadata"
#else
#define HALVE_SPARSE "mma.sp"
#endif
#define HALVE_MMA(type)                                                                                   \
  asm volatile(HALVE_SPARSE ".sync.aligned.m16n8k32.row.col.f32." type "." type                           \
                            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]), \
                 "r"(b.word[2]), "r"(b.word[3]), "r"(metadata), "n"(selector))

template <class T, int selector>
HALVE_DEVICE void multiply_sparse(float (&d)[4], const Quad& a, const Quad& b, u32 metadata);
template <>
HALVE_DEVICE void multiply_sparse<BFloat16, 0>(float (&d)[4], const Quad& a, const Quad& b, u32 metadata) {
  constexpr int selector = 0;
  HALVE_MMA("bf16");
}
template <>
HALVE_DEVICE void multiply_sparse<BFloat16, 1>(float (&d)[4], const Quad& a, const Quad& b, u32 metadata) {
  constexpr int selector = 1;
  HALVE_MMA("bf16");
}
template <>
HALVE_DEVICE void multiply_sparse<Float16, 0>(float (&d)[4], const Quad& a, const Quad& b, u32 metadata) {
  constexpr int selector = 0;
  HALVE_MMA("f16");
}
template <>
HALVE_DEVICE void multiply_sparse<Float16, 1>(float (&d)[4], const Quad& a, const Quad& b, u32 metadata) {
  constexpr int selector = 1;
  HALVE_MMA("f16");
}

// --- Numbers ------------------------------------------------------------------------------------------------------

HALVE_DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
HALVE_DEVICE u32 as_bits(float value) { return __float_as_uint(value); }

template <class T>
HALVE_DEVICE float to_float(u16 bits);
template <>
HALVE_DEVICE float to_float<BFloat16>(u16 bits) {
  return as_float(static_cast<u32>(bits) << 16);
}
template <>
HALVE_DEVICE float to_float<Float16>(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// prmt: byte i of the result is that one of the eight bytes of low and high which the i-th hexadecimal digit of `which` says.
HALVE_DEVICE u32 pick_bytes(u32 low, u32 high, u32 which) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(which));
  return bytes;
}

// a b + c of two numbers at a time, rounded once; subnormal ones are numbers like others.
template <class T>
HALVE_DEVICE u32 multiply_add(u32 a, u32 b, u32 c);
template <>
HALVE_DEVICE u32 multiply_add<BFloat16>(u32 a, u32 b, u32 c) {
  u32 pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}
template <>
HALVE_DEVICE u32 multiply_add<Float16>(u32 a, u32 b, u32 c) {
  u32 pair;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}

// Two values, rounded to nearest even, the first in the low half.
template <class T>
HALVE_DEVICE u32 rounded(float low, float high);
template <>
HALVE_DEVICE u32 rounded<BFloat16>(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
HALVE_DEVICE u32 rounded<Float16>(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#endif
