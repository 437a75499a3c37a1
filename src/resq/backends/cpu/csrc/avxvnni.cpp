// The kernels for avx-vnni; compiled with that instruction set's flags and reached only through its table.
#define RESQ_TABLE kAvxVnni
#define RESQ_NAME "avx-vnni"
#include "table.h"
