// Everything in the library is hidden but what is marked with this, and that has C names for ctypes.
#pragma once

#define HALVE_EXPORT extern "C" __attribute__((visibility("default")))
