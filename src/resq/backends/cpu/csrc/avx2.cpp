// The kernels for avx2; compiled with that instruction set's flags and reached only through its table.
#define RESQ_TABLE kAvx2
#define RESQ_NAME "avx2"
#include "table.h"
