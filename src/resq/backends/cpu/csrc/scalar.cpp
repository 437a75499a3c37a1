// The kernels for scalar; compiled with that instruction set's flags and reached only through its table.
#define RESQ_TABLE kScalar
#define RESQ_NAME "scalar"
#include "table.h"
