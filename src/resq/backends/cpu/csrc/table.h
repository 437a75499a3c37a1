// Everything of one instruction set: included by each of its files after naming the table. All kernels are in an
// anonymous namespace, so that no copy compiled for one machine can be called on another.
#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace resq {
namespace {
#include "vec.h"
#include "activation.h"
#include "attention.h"
#include "dense.h"
#include "linear.h"
#include "limits.h"
#include "rope.h"
}  // namespace

extern const Kernels RESQ_TABLE;
const Kernels RESQ_TABLE = {
    RESQ_NAME,         activation_scratch, activate,      linear_scratch, linear,    float_linear_scratch, float_linear,
    dense,             rope_scratch,       rope_append,   attend_tasks,   attend_scratch, attend_shared,   attend,
    merge_tasks,       merge,              integer_peak,  read_memory,
};

}  // namespace resq
