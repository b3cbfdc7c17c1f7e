#include "attention_avx512bf16.h"

#if defined(__x86_64__)
#include "attention_shared.inc"
#include "attention_backward.inc"
#endif
