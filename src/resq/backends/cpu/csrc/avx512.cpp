// The kernels for avx512-vnni; compiled with that instruction set's flags and reached only through its table.
#define RESQ_TABLE kAvx512Vnni
#define RESQ_NAME "avx512-vnni"
#include "table.h"
