// CPU detection, in one place. Operating-system support counts: a register file that the kernel does not save is absent.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resq {

#if defined(__x86_64__)
extern const Kernels kAmxInt8, kAvx512Vnni, kAvxVnni, kAvx2;
// A test library that emulates AMX instructions announces itself by this symbol.
extern "C" __attribute__((weak)) int resq_emulated_amx(void);
#endif
extern const Kernels kScalar;

namespace {

#if defined(__x86_64__)
struct Registers { unsigned a, b, c, d; };

Registers cpuid(unsigned leaf, unsigned sub) {
  Registers r{};
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bit(unsigned word, int index) { return word >> index & 1; }

// Register state that the operating system saves (XCR0): 1-2 AVX, 5-7 AVX-512, 17-18 AMX.
uint64_t saved_state() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

// AMX tile data must be asked for once per process (Linux 5.16, arch_prctl ARCH_REQ_XCOMP_PERM, feature 18).
bool tiles_permitted() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

struct Machine {
  const char* avx2 = nullptr;
  const char* avx_vnni = nullptr;
  const char* avx512 = nullptr;
  const char* amx = nullptr;

  Machine() {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven1 = cpuid(7, 1);
    const uint64_t state = saved_state();
    if ((state & 0x6) != 0x6) avx2 = "the operating system does not save AVX registers";
    else if (!bit(seven.b, 5)) avx2 = "the processor has no AVX2";
    else if (!bit(one.c, 12) || !bit(one.c, 29)) avx2 = "the processor has no FMA or F16C";
    avx_vnni = avx2 ? avx2 : bit(seven1.a, 4) ? nullptr : "the processor has no AVX-VNNI";
    if (avx2) avx512 = avx2;
    else if ((state & 0xE0) != 0xE0) avx512 = "the operating system does not save AVX-512 registers";
    else if (!(bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.b, 28)))
      avx512 = "the processor has no AVX-512 F, DQ, BW, VL and CD";
    else if (!bit(seven.c, 11) || !bit(seven.c, 1)) avx512 = "the processor has no AVX-512 VNNI and VBMI";
    if (avx512) amx = avx512;
    else if (resq_emulated_amx && resq_emulated_amx()) amx = nullptr;
    else if (!bit(seven.d, 24) || !bit(seven.d, 25)) amx = "the processor, or the virtual machine, has no AMX-INT8";
    else if (!tiles_permitted()) amx = "the operating system does not permit AMX tiles";
  }
};
#endif

}  // namespace

const Isa* instruction_sets(int* count) {
#if defined(__x86_64__)
  static const Machine machine;
  static const Isa sets[] = {
      {"amx-int8", &kAmxInt8, machine.amx},     {"avx512-vnni", &kAvx512Vnni, machine.avx512},
      {"avx-vnni", &kAvxVnni, machine.avx_vnni}, {"avx2", &kAvx2, machine.avx2},
      {"scalar", &kScalar, nullptr},
  };
#else
  static const Isa sets[] = {{"scalar", &kScalar, nullptr}};
#endif
  *count = (int)(sizeof sets / sizeof sets[0]);
  return sets;
}

}  // namespace resq
