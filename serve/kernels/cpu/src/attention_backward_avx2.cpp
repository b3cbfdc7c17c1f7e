#include "attention_avx2.h"

#if defined(__x86_64__)
#include "attention_shared.inc"
#include "attention_backward.inc"
#endif
