// The kernels for amx-int8: those of avx512-vnni with AMX tiles for the linears; compiled with those flags and reached
// only through its table.
#define RESQ_AMX 1
#define RESQ_TABLE kAmxInt8
#define RESQ_NAME "amx-int8"
#include "table.h"
