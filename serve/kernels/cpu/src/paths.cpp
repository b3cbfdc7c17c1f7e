// Which code paths this processor, under this operating system, can run.

#include "export.h"

#include <string>

namespace {

std::string runnable() {
    std::string paths;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16")) {
        paths += "avx512bf16,";
    }
    if (avx512) {
        paths += "avx512,";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        paths += "avx2,";
    }
#endif
    return paths + "portable";
}

}  // namespace

// Separated by commas, the best one first; the string lives as long as the library.
HALVE_EXPORT const char *halve_cpu_paths(void) {
    static const std::string paths = runnable();
    return paths.c_str();
}
