// The operator ai.halve.Sparse24Linear for ONNX Runtime on processors: y = x W^T with a packed 2:4 weight W [n, k].
//
//   inputs      x [.., k] float32; values [n, k/2 times their bytes] and mask [n, k/8], both uint8, as `compress/packed.py` has them; scales [n]
//               float32, or [0] where values have none
//   output      y [.., n] float32
//   attributes  n, k; dtype: of the values; io: what x is rounded to, and y comes in (of `DType`); quantizes_x
//
// Nothing of ONNX Runtime is linked or included. It hands over a table of functions to which new ones are only ever appended, so a place in it
// stays what it is; those that are used are named below. Parallel loops run on its threads, because a second pool would wait for processors
// that the first one spins on.
#include "halve_cpu.h"
#include "threads.h"

#include "export.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>

HALVE_EXPORT const char* halve_cpu_paths();
HALVE_EXPORT int64_t halve_sparse24_stream_bytes(int dtype, int64_t n, int64_t k);
HALVE_EXPORT int64_t halve_sparse24_prepare(int dtype, int quantizes_x, const uint8_t* values, const uint8_t* mask, const float* scales,
                                            int64_t n, int64_t k, uint8_t* stream, int threads);
HALVE_EXPORT int64_t halve_sparse24_scratch_bytes(int path, int64_t bytes, int io, int64_t n, int64_t k, int64_t m,
                                                  int64_t few_rows);
HALVE_EXPORT int halve_sparse24_linear(int path, const uint8_t* stream, int64_t bytes, int io, int64_t n, int64_t k, const void* x,
                                       int64_t m, int64_t x_stride, const void* bias, void* y, int64_t y_stride, int64_t few_rows,
                                       uint8_t* scratch, int threads);
HALVE_EXPORT void halve_cpu_gather_into_huge_pages(void* start, int64_t bytes);

namespace halve {
namespace {

constexpr uint32_t kApiVersion = 17;  // the first with KernelContext_ParallelFor

// Of ONNX Runtime; all but the tables are opaque.
using Api = void* const*;
using Status = void*;
struct ApiBase {
  Api (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

// Places in the table.
enum Entry : int {
  kCreateStatus = 0, kCreateCustomOpDomain = 26, kCustomOpDomainAdd = 27, kAddCustomOpDomain = 28, kGetTensorMutableData = 51,
  kGetDimensionsCount = 61, kGetDimensions = 62, kGetTensorShapeElementCount = 64, kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeInt64 = 86, kKernelContextGetInput = 90, kKernelContextGetOutput = 91, kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99, kKernelContextParallelFor = 274,
};

template <typename... Arguments>
Status call(Api api, Entry entry, Arguments... arguments) {
  return reinterpret_cast<Status (*)(Arguments...)>(api[entry])(arguments...);
}

Status failure(Api api, const std::string& why) {
  return reinterpret_cast<Status (*)(int, const char*)>(api[kCreateStatus])(1, ("ai.halve.Sparse24Linear: " + why).c_str());
}

std::atomic<int> wanted_threads{0}, wanted_path{-1};

int threads_of() {
  const int wanted = wanted_threads.load(std::memory_order_relaxed);
  const int all = static_cast<int>(std::thread::hardware_concurrency());
  return wanted > 0 ? wanted : all > 0 ? all : 1;
}

// The number of the best path, as the names have it.
int best_path() {
  static const int best = [] {
    const std::string names = halve_cpu_paths();
    const char* const known[] = {"portable", "avx2", "avx512", "avx512bf16"};
    const std::string first = names.substr(0, names.find(','));
    for (int path = 0; path < 4; ++path) {
      if (first == known[path]) return path;
    }
    return 0;
  }();
  return best;
}

// Memory that begins at a cache line, and only grows.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  uint8_t* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = ceil_div(bytes, 64) * 64;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(size_)));
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

struct Operator {
  Api api;
  int64_t n, k, dtype, io, quantizes_x;
  std::once_flag once;
  Buffer stream;
  int64_t bytes = 0;
  std::string problem;

  void prepare(const uint8_t* values, const uint8_t* mask, const float* scales) {
    const int kind = static_cast<int>(dtype);
    bytes = halve_sparse24_stream_bytes(kind, n, k);
    uint8_t* const target = stream.get(bytes);
    if (target == nullptr) {
      problem = "there is no memory for the weight";
      return;
    }
    if (halve_sparse24_prepare(kind, static_cast<int>(quantizes_x), values, mask, scales, n, k, target, threads_of()) >= 0) {
      problem = "the mask has not two bits in every group of four; the file is damaged";
    }
    halve_cpu_gather_into_huge_pages(target, bytes);
  }
};

struct Cast {
  DType to;
  const float* floats;
  void* others;
  float* back;  // null on the way to the others
};

void cast_part(void* context, int64_t first, int64_t last) {
  const Cast& cast = *static_cast<const Cast*>(context);
  if (cast.back == nullptr) {
    for (int64_t i = first; i < last; ++i) store_value(cast.to, cast.others, i, cast.floats[i]);
  } else {
    for (int64_t i = first; i < last; ++i) cast.back[i] = load_value(cast.to, cast.others, i);
  }
}

struct Loan {
  Api api;
  const void* context;
  std::atomic<bool> failed{false};
};

void run_on_their_threads(void* self, int parts, void (*part)(void* argument, size_t index), void* argument) {
  Loan& loan = *static_cast<Loan*>(self);
  const Status status = call(loan.api, kKernelContextParallelFor, loan.context, part, static_cast<size_t>(parts), size_t{0}, argument);
  if (status != nullptr) {
    call(loan.api, kReleaseStatus, status);
    loan.failed.store(true);
  }
}

// Rows of x, its shape, and how many elements it has; released before anything else happens.
struct Shape {
  int64_t dims[16];
  size_t rank = 0, elements = 0;
};

Status shape_of(Api api, const void* value, Shape& shape) {
  void* info = nullptr;
  if (Status bad = call(api, kGetTensorTypeAndShape, value, &info)) return bad;
  Status bad = call(api, kGetDimensionsCount, static_cast<const void*>(info), &shape.rank);
  if (bad == nullptr && shape.rank <= 16) bad = call(api, kGetDimensions, static_cast<const void*>(info), &shape.dims[0], shape.rank);
  if (bad == nullptr) bad = call(api, kGetTensorShapeElementCount, static_cast<const void*>(info), &shape.elements);
  reinterpret_cast<void (*)(void*)>(api[kReleaseTensorTypeAndShapeInfo])(info);
  return bad;
}

Status compute(void* self, void* context) {
  Operator& op = *static_cast<Operator*>(self);
  const Api api = op.api;
  const void* inputs[4] = {};
  void* data[4] = {};
  Shape shapes[4];
  for (size_t i = 0; i < 4; ++i) {
    if (Status bad = call(api, kKernelContextGetInput, static_cast<const void*>(context), i, &inputs[i])) return bad;
    if (Status bad = shape_of(api, inputs[i], shapes[i])) return bad;
    if (Status bad = call(api, kGetTensorMutableData, const_cast<void*>(inputs[i]), &data[i])) return bad;
  }
  Shape& shape = shapes[0];
  const DType values = static_cast<DType>(op.dtype), io = static_cast<DType>(op.io);
  const size_t weights = static_cast<size_t>(op.n * op.k);
  if (shapes[1].elements != weights / 2 * static_cast<size_t>(value_bytes(values)) || shapes[2].elements != weights / 8 ||
      shapes[3].elements != (is_scaled(values) ? static_cast<size_t>(op.n) : 0)) {
    return failure(api, "values, mask and scales are not those of a weight [n, k]");
  }
  if (shape.rank < 1 || shape.rank > 16 || shape.dims[shape.rank - 1] != op.k) return failure(api, "x is not [.., k]");
  const int64_t m = static_cast<int64_t>(shape.elements) / op.k, n = op.n, k = op.k;
  shape.dims[shape.rank - 1] = n;
  void *result = nullptr, *y = nullptr;
  if (Status bad = call(api, kKernelContextGetOutput, context, size_t{0}, static_cast<const int64_t*>(shape.dims), shape.rank, &result)) {
    return bad;
  }
  if (m == 0) return nullptr;
  if (Status bad = call(api, kGetTensorMutableData, result, &y)) return bad;

  Loan loan{api, context};
  const Borrowed borrowed({run_on_their_threads, &loan});
  std::call_once(op.once, [&] {
    op.prepare(static_cast<const uint8_t*>(data[1]), static_cast<const uint8_t*>(data[2]),
               is_scaled(values) ? static_cast<const float*>(data[3]) : nullptr);
  });
  if (!op.problem.empty()) return failure(api, op.problem);

  // x and y in `io`, and what the kernel needs, one behind the other.
  const int wanted = wanted_path.load(std::memory_order_relaxed);
  const int path = wanted < 0 ? best_path() : wanted, threads = threads_of();
  const bool casts = io != kFloat32;
  const int64_t x_bytes = casts ? ceil_div(m * k * value_bytes(io), 64) * 64 : 0;
  const int64_t y_bytes = casts ? ceil_div(m * n * value_bytes(io), 64) * 64 : 0;
  const int64_t scratch_bytes = halve_sparse24_scratch_bytes(path, op.bytes, op.io, n, k, m, -1);
  thread_local Buffer buffer;
  uint8_t* const memory = scratch_bytes < 0 ? nullptr : buffer.get(x_bytes + y_bytes + scratch_bytes + 64);
  if (memory == nullptr) return failure(api, "there is no memory for a product");
  const void* x_in = data[0];
  void* y_out = y;
  if (casts) {
    x_in = memory, y_out = memory + x_bytes;
    Cast there{io, static_cast<const float*>(data[0]), memory, nullptr};
    parallel(threads, m * k, cast_part, &there);
  }
  uint8_t* const scratch = memory + x_bytes + y_bytes;
  if (halve_sparse24_linear(path, op.stream.get(0), op.bytes, static_cast<int>(io), n, k, x_in, m, k, nullptr, y_out, n, -1, scratch,
                            threads) != 0) {
    return failure(api, "the kernel refuses the weight");
  }
  if (casts) {
    Cast back{io, nullptr, y_out, static_cast<float*>(y)};
    parallel(threads, m * n, cast_part, &back);
  }
  return loan.failed.load() ? failure(api, "ONNX Runtime did not run all parts") : nullptr;
}

Status create(const void*, Api api, const void* info, void** kernel) {
  auto* op = new Operator{api, 0, 0, 0, 0, 0, {}, {}, 0, {}};
  const struct {
    const char* name;
    int64_t* value;
  } attributes[] = {{"n", &op->n}, {"k", &op->k}, {"dtype", &op->dtype}, {"io", &op->io}, {"quantizes_x", &op->quantizes_x}};
  for (const auto& attribute : attributes) {
    if (Status bad = call(api, kKernelInfoGetAttributeInt64, info, attribute.name, attribute.value)) {
      delete op;
      return bad;
    }
  }
  constexpr int64_t most = int64_t{1} << 30;
  const bool goes = op->dtype >= kInt8 ? op->dtype <= kFloat8 : op->dtype >= 0 && op->dtype == op->io;
  if (op->n < 1 || op->n > most || op->k < 8 || op->k > most || op->k % 8 != 0 || op->io < 0 || op->io > kFloat32 || !goes ||
      op->quantizes_x < 0 || op->quantizes_x > (op->dtype >= kInt8 ? 1 : 0)) {
    delete op;
    return failure(api, "its attributes are of no packed weight");
  }
  *kernel = op;
  return nullptr;
}

// Of ONNX Runtime: what an operator is, up to version 17 of its interface.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*create_kernel)(const void*, Api, const void*) = nullptr;
  const char* (*name)(const void*) = [](const void*) { return "Sparse24Linear"; };
  const char* (*provider)(const void*) = [](const void*) { return "CPUExecutionProvider"; };
  int (*input_type)(const void*, size_t) = [](const void*, size_t index) { return index == 1 || index == 2 ? 2 : 1; };  // uint8, float
  size_t (*inputs)(const void*) = [](const void*) { return size_t{4}; };
  int (*output_type)(const void*, size_t) = [](const void*, size_t) { return 1; };
  size_t (*outputs)(const void*) = [](const void*) { return size_t{1}; };
  void (*compute)(void*, void*) = nullptr;
  void (*destroy)(void*) = [](void* op) { delete static_cast<Operator*>(op); };
  int (*input_kind)(const void*, size_t) = [](const void*, size_t) { return 0; };  // required
  int (*output_kind)(const void*, size_t) = [](const void*, size_t) { return 0; };
  int (*input_memory)(const void*, size_t) = [](const void*, size_t) { return 0; };  // the provider's
  int (*variadic_inputs)(const void*) = [](const void*) { return 0; };
  int (*inputs_alike)(const void*) = [](const void*) { return 0; };
  int (*variadic_outputs)(const void*) = [](const void*) { return 0; };
  int (*outputs_alike)(const void*) = [](const void*) { return 0; };
  Status (*create_kernel_v2)(const void*, Api, const void*, void**) = create;
  Status (*compute_v2)(void*, void*) = halve::compute;
  Status (*infer_shape)(const void*, void*) = nullptr;
  int (*first_version)(const void*) = [](const void*) { return 1; };
  int (*last_version)(const void*) = [](const void*) { return 0x7fffffff; };
  void* later[8] = {};
};

}  // namespace
}  // namespace halve

using namespace halve;

// How many of ONNX Runtime's threads a product is cut for (0: as many as there are processors), and by which path (-1: the best).
HALVE_EXPORT void halve_onnx_configure(int threads, int path) {
  wanted_threads.store(threads);
  wanted_path.store(path);
}

// What ONNX Runtime calls where a session is told of this library.
HALVE_EXPORT void* RegisterCustomOps(void* options, const ApiBase* base) {
  const Api api = base->get_api(kApiVersion);
  if (api == nullptr) {  // older; its first table will do for the message
    const Api first = base->get_api(1);
    return first == nullptr ? nullptr : failure(first, "ONNX Runtime 1.17 or newer is needed");
  }
  static const CustomOp op;
  static std::mutex guard;
  static void* domain = nullptr;
  const std::lock_guard<std::mutex> held(guard);
  if (domain == nullptr) {
    void* made = nullptr;
    if (Status bad = call(api, kCreateCustomOpDomain, "ai.halve", &made)) return bad;
    if (Status bad = call(api, kCustomOpDomainAdd, made, static_cast<const void*>(&op))) return bad;
    domain = made;
  }
  return call(api, kAddCustomOpDomain, options, domain);
}
