// What Python calls, by ctypes. Sizes are checked by the caller against the header of the stream; functions return 0,
// or a negative number for a call that makes no sense.
#include <initializer_list>

#include "attention.h"
#include "halve_cpu.h"
#include "kernels.h"
#include "threads.h"

#include "export.h"

namespace halve {
namespace {

enum PathNumber : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kPaths = 4 };
constexpr const char* kNames[kPaths] = {"portable", "avx2", "avx512", "avx512bf16"};

bool can_run(int path) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (path) {
    case kPortable: return true;
    case kAvx2: return avx2;
    case kAvx512: return avx512;
    case kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    default: return false;
  }
#else
  return path == kPortable;
#endif
}

#if defined(__x86_64__)
// Not every processor with the rest of its path has these.
bool has_vbmi() {
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("avx512vbmi") != 0);
  return has;
}
bool has_vnni() {
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("avx512vnni") != 0);
  return has;
}
#endif

constexpr int64_t kMost = int64_t{1} << 30;  // rows, and columns: their bytes then fit 64 bits, whatever a header says
constexpr int64_t kAll = kMost;  // rows: products of integers are faster than those of float32, whatever is widened for these
constexpr int64_t kMostSummed = int64_t{1} << 17;  // columns whose products of a byte and a signed one fit 32 bits

// What a path takes for values of a dtype and x of another. Where the one for bfloat16 has no kernel, that of the one below is taken.
Path kernels_of(int path, [[maybe_unused]] DType dtype, [[maybe_unused]] DType io) {
#if defined(__x86_64__)
  const bool by_integers = dtype == kInt8 && io != kFloat32;
  const bool by_pairs = path == kAvx512Bf16 && io == kBFloat16;
  if (by_pairs && dtype == kBFloat16) return {&kAvx512Bf16Stream, &kAvx512Bf16Panel, 30};
  if (by_pairs && dtype == kFloat8 && has_vbmi()) return {&kAvx512Bf16Float8Stream, &kAvx512Bf16Float8Panel, 26};
  if (path == kAvx512Bf16 || path == kAvx512) {
    const Kernel* many = by_pairs && dtype == kInt8 ? &kAvx512Bf16Int8Panel : &kAvx512Panel;
    if (by_integers) return {has_vnni() ? &kAvx512VnniInt8 : &kAvx512Int8, many, by_pairs ? 26 : kAll};
    return {&kAvx512Stream, many, dtype == kFloat8 ? 10 : 20};
  }
  if (path == kAvx2 && by_integers) return {&kAvx2Int8, &kAvx2Panel, kAll};
  if (path == kAvx2) return {&kAvx2Stream, &kAvx2Panel, dtype == kFloat8 ? 5 : 20};
#endif
  return {&kPortableOne, &kPortablePanel, 1};
}

// The same of a weight.
Path kernels_of(int path, const Weight& w, DType io) {
  const Path kernels = kernels_of(path, w.dtype, io);
#if defined(__x86_64__)
  if (w.quantizes_x && w.dtype == kInt8 && path >= kAvx512 && has_vnni() && w.k <= kMostSummed) {
    return {&kAvx512VnniBoth, &kAvx512VnniBothMany, 8};
  }
#endif
  return kernels;
}

// Whether x has to be rounded for a kernel.
bool rounds_before(const Weight& w, [[maybe_unused]] const Kernel& kernel) {
#if defined(__x86_64__)
  if (&kernel == &kAvx512VnniBoth || &kernel == &kAvx512VnniBothMany) return false;
#endif
  return w.quantizes_x;
}

// What comes before the scratch of a kernel that x is rounded for: x, and its scales.
int64_t rounded_bytes(const Call& call) { return ceil_div(call.m * call.weight.k * value_bytes(call.io), 64) * 64; }
int64_t rounding_bytes(const Call& call) { return rounded_bytes(call) + ceil_div(call.m * 4, 64) * 64; }

RoundRows round_rows_of([[maybe_unused]] int path) {
#if defined(__x86_64__)
  if (path >= kAvx512) return kAvx512Round;
  if (path == kAvx2) return kAvx2Round;
#endif
  return kPortableRound;
}

struct Rounding {
  const Call* call;
  RoundRows run;
  uint8_t* rounded;
  float* scales;
};

void round_part(void* context, int64_t first, int64_t last) {
  const Rounding& work = *static_cast<const Rounding*>(context);
  work.run(*work.call, first, last, work.rounded, work.scales);
}

// Rounds x into the scratch, and lets the call go on from there.
void round_before(int path, Call& call) {
  uint8_t* const rounded = call.scratch;
  float* const scales = reinterpret_cast<float*>(call.scratch + rounded_bytes(call));
  Rounding work{&call, round_rows_of(path), rounded, scales};
  parallel(call.threads, call.m, round_part, &work);
  call.scratch += rounding_bytes(call);
  call.x = rounded, call.x_stride = call.weight.k, call.x_scales = scales;
}

// `few_rows`: negative for the path's own limit; tests set it to see either kernel at any size.
const Kernel& kernel(int path, const Weight& w, DType io, int64_t rows, int64_t few_rows) {
  const Path kernels = kernels_of(path, w, io);
  if (few_rows < 0 || (kernels.few == &kPortableOne && few_rows > 1)) few_rows = kernels.few_rows;
  return rows <= few_rows ? *kernels.few : *kernels.many;
}

struct Pass {
  const Call* call;
  void (*run)(const Call&, int64_t, int64_t);
};

void run_pass(void* context, int64_t first, int64_t last) {
  const Pass& pass = *static_cast<const Pass*>(context);
  pass.run(*pass.call, first, last);
}

// Sizes come from the stream itself, and are compared with what the caller takes them for: nothing is read or written
// out of bounds, whatever bytes are handed over.
enum Refusal : int { kNoPath = -1, kNoStream = -2, kOtherShape = -3, kMisaligned = -4, kNoDense = -5, kNoAttention = -6 };

int read_header(const uint8_t* stream, int64_t bytes, Weight& weight) {
  if (reinterpret_cast<uintptr_t>(stream) % 64 != 0) return kMisaligned;
  if (bytes < kHeaderBytes) return kNoStream;
  Header header;
  std::memcpy(&header, stream, sizeof header);
  if (header.magic != kMagic || header.dtype < kBFloat16 || header.dtype > kFloat8) return kNoStream;
  if (header.n < 0 || header.n > kMost || header.k < 0 || header.k > kMost || header.k % 8 != 0) return kNoStream;
  if (header.interleave != 1 && header.interleave != 2 && header.interleave != 4) return kNoStream;
  const DType dtype = static_cast<DType>(header.dtype);
  if (header.bytes != bytes || stream_bytes(dtype, header.n, header.k) != bytes) return kNoStream;
  if (header.quantizes_x != 0 && !(header.quantizes_x == 1 && is_scaled(dtype))) return kNoStream;
  weight = describe(dtype, header.n, header.k, header.interleave, stream + kHeaderBytes, header.quantizes_x == 1);
  return 0;
}

// Values with scales go with x of any dtype, others with x of theirs.
bool goes_with(DType values, int io) {
  return is_scaled(values) ? io >= kBFloat16 && io <= kFloat32 : io == values;
}

struct DensePass {
  const DenseCall* call;
  DenseKernel run;
};

constexpr int64_t kDenseUnit = 16;  // rows

void run_dense(void* context, int64_t first, int64_t last) {
  const DensePass& pass = *static_cast<const DensePass*>(context);
  const int64_t end = last * kDenseUnit < pass.call->n ? last * kDenseUnit : pass.call->n;
  pass.run(*pass.call, first * kDenseUnit, end);
}

#if defined(__x86_64__)
// For many queries, for few, and the backward pass.
struct Attentions {
  const AttentionKernel *many, *few;
  const AttentionBackward* backward;
};

Attentions attentions(int path) {
  if (!can_run(path)) return {};
  switch (path) {
    case kAvx2: return {&kAvx2Attention, &kAvx2FewAttention, &kAvx2AttentionBackward};
    case kAvx512: return {&kAvx512Attention, &kAvx512FewAttention, &kAvx512AttentionBackward};
    case kAvx512Bf16: return {&kAvx512Bf16Attention, &kAvx512Bf16FewAttention, &kAvx512Bf16AttentionBackward};
    default: return {};
  }
}
#endif

const AttentionKernel* attention_of([[maybe_unused]] int path, [[maybe_unused]] const AttentionCall& call) {
#if defined(__x86_64__)
  const bool few = call.queries <= kFewQueries && call.heads / call.kv_heads * call.queries <= kFewRows;
  return few ? attentions(path).few : attentions(path).many;
#else
  return nullptr;
#endif
}

const AttentionBackward* attention_backward_of([[maybe_unused]] int path) {
#if defined(__x86_64__)
  return attentions(path).backward;
#else
  return nullptr;
#endif
}

Strided strided(const void* data, const int64_t* strides) {
  return {static_cast<uint16_t*>(const_cast<void*>(data)), strides[0], strides[1], strides[2]};
}

void place(AttentionCall& call, const void* q, const void* k, const void* v, const void* out, const int64_t* strides) {
  call.q = strided(q, strides), call.k = strided(k, strides + 3), call.v = strided(v, strides + 6);
  call.out = strided(out, strides + 9);
}

struct GradientPass {
  const AttentionGradients* call;
  void (*run)(const AttentionGradients&, int64_t, int64_t);
};

void run_gradients(void* context, int64_t first, int64_t last) {
  const GradientPass& pass = *static_cast<const GradientPass*>(context);
  pass.run(*pass.call, first, last);
}

struct AttentionPass {
  const AttentionCall* call;
  void (*run)(const AttentionCall&, int64_t, int64_t);
};

void run_attention(void* context, int64_t first, int64_t last) {
  const AttentionPass& pass = *static_cast<const AttentionPass*>(context);
  pass.run(*pass.call, first, last);
}

// shape: batch, heads, heads of keys and values, queries, keys, depth, depth of the values.
bool read_attention(const int64_t* shape, AttentionCall& call) {
  for (int i = 0; i < 7; ++i) {
    if (shape[i] < 1 || shape[i] > kMost) return false;
  }
  call.batch = shape[0], call.heads = shape[1], call.kv_heads = shape[2];
  call.queries = shape[3], call.keys = shape[4], call.depth = shape[5], call.value_depth = shape[6];
  return call.heads % call.kv_heads == 0 && call.depth % 16 == 0 && call.depth <= kMostDepth &&
         call.value_depth % 16 == 0 && call.value_depth <= kMostDepth;
}

}  // namespace
}  // namespace halve

using namespace halve;

// Names of the paths that this processor can run, best first, separated by commas.
HALVE_EXPORT const char* halve_cpu_paths() {
  static const struct Names {
    char text[64] = {};
    Names() {
      for (int path = kPaths - 1; path >= 0; --path) {
        if (!can_run(path)) continue;
        if (text[0] != 0) std::strcat(text, ",");
        std::strcat(text, kNames[path]);
      }
    }
  } names;
  return names.text;
}

// Bytes of the stream of a weight [n, k], for a buffer that starts at a cache line.
HALVE_EXPORT int64_t halve_sparse24_stream_bytes(int dtype, int64_t n, int64_t k) {
  return stream_bytes(static_cast<DType>(dtype), n, k);
}

// values [n, k/2], mask [n, k/8], scales [n] (of values of 8 bits, else null) -> stream. quantizes_x: 1 where x is rounded to the dtype of such
// values, too. Returns -1, or the index of the first byte of the mask that is not two of
// four twice (the stream is of no use then).
HALVE_EXPORT int64_t halve_sparse24_prepare(int dtype, int quantizes_x, const uint8_t* values, const uint8_t* mask, const float* scales,
                                            int64_t n, int64_t k, uint8_t* stream, int threads) {
  return prepare(static_cast<DType>(dtype), quantizes_x != 0, values, mask, scales, n, k, stream, threads);
}

// Up to how many rows of x, in `io`, the weight is streamed past registers.
HALVE_EXPORT int64_t halve_sparse24_few_rows(int path, int dtype, int io) {
  return kernels_of(path, static_cast<DType>(dtype), static_cast<DType>(io)).few_rows;
}

// shape: dtype, n, k of a stream, and whether x is rounded, too.
HALVE_EXPORT int halve_sparse24_describe(const uint8_t* stream, int64_t bytes, int64_t* shape) {
  Weight weight;
  if (const int refusal = read_header(stream, bytes, weight)) return refusal;
  shape[0] = weight.dtype;
  shape[1] = weight.n;
  shape[2] = weight.k;
  shape[3] = weight.quantizes_x;
  return 0;
}

// Moves memory that is in use into huge pages, where the system can.
HALVE_EXPORT void halve_cpu_gather_into_huge_pages(void* start, int64_t bytes) {
  gather_into_huge_pages(start, bytes);
}

// The inverse of prepare.
HALVE_EXPORT int halve_sparse24_restore(const uint8_t* stream, int64_t bytes, uint8_t* values, uint8_t* mask, float* scales,
                                        int threads) {
  Weight weight;
  if (const int refusal = read_header(stream, bytes, weight)) return refusal;
  restore(weight, values, mask, scales, threads);
  return 0;
}

// Rows first_row to first_row + rows of the dense weight, [rows, k], in the dtype `to`.
HALVE_EXPORT int halve_sparse24_expand(const uint8_t* stream, int64_t bytes, int to, int64_t first_row, int64_t rows,
                                       uint8_t* dense, int threads) {
  Weight weight;
  if (const int refusal = read_header(stream, bytes, weight)) return refusal;
  if (!goes_with(weight.dtype, to)) return kOtherShape;
  if (first_row < 0 || rows < 0 || rows > weight.n - first_row) return kOtherShape;
  if (rows > 0) expand(weight, static_cast<DType>(to), first_row, rows, dense, threads);
  return 0;
}

// Bytes of scratch (aligned to a cache line) that a multiplication of m rows in `io` by a stream of so many bytes needs.
HALVE_EXPORT int64_t halve_sparse24_scratch_bytes(int path, int64_t bytes, int io, int64_t n, int64_t k, int64_t m,
                                                  int64_t few_rows) {
  if (!can_run(path)) return kNoPath;
  const DType kind = static_cast<DType>(io);
  const auto of_values = [&](DType values, bool quantizes_x) {
    const Call call{describe(values, n, k, 1, nullptr, quantizes_x), kind, nullptr, m, 0, nullptr, nullptr, 0, 1, nullptr};
    const Kernel& chosen = kernel(path, call.weight, kind, m, few_rows);
    return chosen.scratch_bytes(call) + (rounds_before(call.weight, chosen) ? rounding_bytes(call) : 0);
  };
  if (bytes != stream_bytes(kInt8, n, k)) return of_values(kind, false);
  int64_t most = 0;  // of all that have the same length
  for (const DType values : {kInt8, kFloat8}) {
    for (const bool quantizes_x : {false, true}) {
      const int64_t need = of_values(values, quantizes_x);
      most = need > most ? need : most;
    }
  }
  return most;
}

// y [m, n] = x [m, k] W^T + bias (or null), all but the weight in `io`. `few_rows`: see `kernel`.
HALVE_EXPORT int halve_sparse24_linear(int path, const uint8_t* stream, int64_t bytes, int io, int64_t n, int64_t k,
                                 const void* x, int64_t m, int64_t x_stride, const void* bias, void* y,
                                 int64_t y_stride, int64_t few_rows, uint8_t* scratch, int threads) {
  Weight weight;
  if (!can_run(path)) return kNoPath;
  if (const int refusal = read_header(stream, bytes, weight)) return refusal;
  if (!goes_with(weight.dtype, io) || weight.n != n || weight.k != k) return kOtherShape;
  if (m == 0 || n == 0) return 0;
  const DType kind = static_cast<DType>(io);
  Call call{weight, kind, x, m, x_stride, bias, y, y_stride, threads, scratch};
  const Kernel& chosen = kernel(path, weight, kind, m, few_rows);
  if (rounds_before(weight, chosen)) round_before(path, call);
  Pass arrange{&call, chosen.arrange}, run{&call, chosen.run};
  const int64_t arrange_units = chosen.arrange_units(call);
  if (arrange_units > 0) parallel(threads, arrange_units, run_pass, &arrange);
  parallel(threads, chosen.units(call), run_pass, &run);
  return 0;
}

// y [m, n] = x [m, k] W^T + bias (or null) for a dense row-major W; for few rows.
HALVE_EXPORT int halve_dense_linear(int path, int dtype, const void* weight, int64_t n, int64_t k, int64_t weight_stride,
                              const void* x, int64_t m, int64_t x_stride, const void* bias, void* y, int64_t y_stride,
                              int threads) {
#if defined(__x86_64__)
  DenseKernel chosen = nullptr;
  if (path == kAvx2) chosen = kAvx2Dense;
  if (path >= kAvx512) chosen = kAvx512Dense;
  if (path == kAvx512Bf16 && dtype == kBFloat16) chosen = kAvx512Bf16Dense;
  if (!can_run(path)) return kNoPath;
  if (chosen == nullptr) return kNoDense;
  const DenseCall call{static_cast<DType>(dtype), weight, n, k, weight_stride, x, m, x_stride, bias, y, y_stride};
  DensePass pass{&call, chosen};
  parallel(threads, ceil_div(n, kDenseUnit), run_dense, &pass);
  return 0;
#else
  (void)path, (void)dtype, (void)weight, (void)n, (void)k, (void)weight_stride, (void)x, (void)m, (void)x_stride;
  (void)bias, (void)y, (void)y_stride, (void)threads;
  return kNoDense;
#endif
}

// Whether a path has a kernel for attention (of bfloat16).
HALVE_EXPORT int halve_cpu_has_attention(int path) { return attention_backward_of(path) != nullptr; }

// Bytes of scratch (aligned to a cache line) of an attention; `shape` as in `read_attention`.
HALVE_EXPORT int64_t halve_attention_scratch_bytes(int path, const int64_t* shape) {
  AttentionCall call{};
  if (!read_attention(shape, call)) return kOtherShape;
  const AttentionKernel* kernel = attention_of(path, call);
  if (kernel == nullptr) return kNoAttention;
  return kernel->scratch_bytes(call);
}

// out [batch, heads, queries, value depth] = softmax(scale q k^T) v; heads h share the keys and values of kv head
// h / (heads / kv_heads). strides: of q, k, v and out, for batch, head and position each, in elements. exponents: float
// [batch, heads, queries] for the backward pass, or null. visible: see `Visible`, or null; the last two strides are its own.
HALVE_EXPORT int halve_attention(int path, const int64_t* shape, const void* q, const void* k, const void* v, void* out,
                                 const int64_t* strides, const uint8_t* visible, float scale, int causal,
                                 float* exponents, uint8_t* scratch, int threads) {
  AttentionCall call{};
  if (!read_attention(shape, call)) return kOtherShape;
  const AttentionKernel* kernel = attention_of(path, call);
  if (kernel == nullptr) return kNoAttention;
  if (reinterpret_cast<uintptr_t>(scratch) % 64 != 0) return kMisaligned;
  place(call, q, k, v, out, strides);
  call.visible = {visible, strides[12], strides[13]};
  call.scale = scale, call.causal = causal != 0, call.exponents = exponents, call.scratch = scratch;
  AttentionPass arrange{&call, kernel->arrange}, run{&call, kernel->run};
  parallel(threads, kernel->arrange_units(call), run_attention, &arrange);
  parallel(threads, kernel->units(call), run_attention, &run);
  return 0;
}

HALVE_EXPORT int64_t halve_attention_backward_scratch_bytes(int path, const int64_t* shape) {
  const AttentionBackward* kernel = attention_backward_of(path);
  AttentionCall call{};
  if (kernel == nullptr) return kNoAttention;
  if (!read_attention(shape, call)) return kOtherShape;
  return kernel->scratch_bytes(call);
}

// The gradients of q, k and v from that of out. `tensors`: q, k, v, out, those of out, q, k and v; `strides`: of all of
// these, three each; `exponents`: what the forward pass gave.
HALVE_EXPORT int halve_attention_backward(int path, const int64_t* shape, const void* const* tensors,
                                          const int64_t* strides, float scale, int causal, const float* exponents,
                                          uint8_t* scratch, int threads) {
  const AttentionBackward* kernel = attention_backward_of(path);
  AttentionGradients call{};
  if (kernel == nullptr) return kNoAttention;
  if (!read_attention(shape, call.forward)) return kOtherShape;
  if (reinterpret_cast<uintptr_t>(scratch) % 64 != 0) return kMisaligned;
  place(call.forward, tensors[0], tensors[1], tensors[2], tensors[3], strides);
  call.forward.scale = scale, call.forward.causal = causal != 0;
  call.forward.exponents = const_cast<float*>(exponents);
  call.d_out = strided(tensors[4], strides + 12), call.d_q = strided(tensors[5], strides + 15);
  call.d_k = strided(tensors[6], strides + 18), call.d_v = strided(tensors[7], strides + 21);
  call.scratch = scratch;
  GradientPass arrange{&call, kernel->arrange}, query{&call, kernel->query_run}, key{&call, kernel->key_run};
  parallel(threads, kernel->arrange_units(call), run_gradients, &arrange);
  parallel(threads, kernel->query_units(call), run_gradients, &query);
  parallel(threads, kernel->key_units(call), run_gradients, &key);
  return 0;
}
