// <immintrin.h> for AVX-512.
#pragma once

#if defined(__x86_64__)
#if !defined(__clang__)
// gcc 12 takes the deliberately undefined operands in its own <immintrin.h> for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif
