// Which instruction sets were built, which of them this machine has, and which one is used.
#pragma once

#include "kernels.h"

namespace resq {

struct Isa {
  const char* name;
  const Kernels* kernels;  // null: not built for this processor family
  const char* missing;     // what this machine lacks, or null when usable
};

// Fastest first; `count` receives how many.
const Isa* instruction_sets(int* count);

}  // namespace resq
