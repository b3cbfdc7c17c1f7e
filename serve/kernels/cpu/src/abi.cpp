// What Python asks first: a library of another version takes other arguments, and calling it would crash.

#include "export.h"

// Raise it together with ABI_VERSION in library.py whenever the arguments or the meaning of an exported function change.
HALVE_EXPORT int halve_cpu_abi_version(void) { return 5; }
