// Emulates Intel AMX (tiles, INT8 and BF16 products) where the processor has none, to test kernels that use it.
//
//   g++ -O2 -shared -fPIC amx_emulator.cpp -o libamx_emulator.so -ldl      (Linux, x86-64)
//   LD_PRELOAD=./libamx_emulator.so program
//
// An AMX instruction raises SIGILL there; a handler decodes it, does its work on the thread's own tiles and goes on after
// it (a few µs each). It reads and writes exactly the bytes that the instruction would, so that guard pages show
// overreads. What would fault on a processor aborts with a message: there it would be #UD or #GP, and the kernel is wrong.
// Any other illegal instruction gets the action that the program has set, or the default one.
//
// Not emulated: start_row (restarting after a page fault), prefixes before VEX, fault order.
// Encodings and fault rules: Intel SDM volume 2, the instructions' own pages, and volume 1, chapter "Programming with
// Intel AMX".

#if !defined(__x86_64__) || !defined(__linux__)
#error "amx_emulator.cpp emulates x86-64 instructions under Linux"
#endif

#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <atomic>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // palette 1

// The 64 bytes of LDTILECFG and STTILECFG.
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "the memory layout of LDTILECFG");

struct State {
  Config config;  // palette 0: initial state
  uint8_t tile[kTiles][kRows][kRowBytes];  // zeros beyond the configured rows and bytes
};

// All zeros, the state of a new thread and after TILERELEASE.
thread_local State state;
std::atomic<long> emulated{0};

struct Instruction {
  const uint8_t* at;
  const char* name;
};

[[noreturn]] __attribute__((format(printf, 2, 3))) void fault(const Instruction& in, const char* format, ...) {
  char why[256], line[400];
  va_list args;
  va_start(args, format);
  vsnprintf(why, sizeof why, format, args);
  va_end(args);
  snprintf(line, sizeof line, "amx_emulator: %s at %p: %s\n", in.name, (const void*)in.at, why);
  fputs(line, stderr);
  fflush(stderr);
  abort();
}

// ---- the instructions --------------------------------------------------------------------------------------------------

void load_config(const Instruction& in, const void* memory) {
  Config config;
  memcpy(&config, memory, sizeof config);
  if (config.palette > 1) fault(in, "palette %d, there are 0 and 1", config.palette);
  if (config.palette == 0) {
    memset(&state, 0, sizeof state);
    return;
  }
  if (config.start_row) fault(in, "start_row is %d, only 0 is emulated", config.start_row);
  for (int i = 0; i < 14; i++)
    if (config.reserved[i]) fault(in, "reserved byte %d is not 0", 2 + i);
  for (int t = 0; t < 16; t++) {
    const int rows = config.rows[t], bytes = config.row_bytes[t];
    if (t >= kTiles && (rows || bytes)) fault(in, "tile %d of palette 1, which has 8", t);
    if (rows > kRows) fault(in, "tile %d with %d rows, at most 16", t, rows);
    if (bytes > kRowBytes) fault(in, "tile %d with %d bytes a row, at most 64", t, bytes);
    if (!rows != !bytes) fault(in, "tile %d with %d rows of %d bytes", t, rows, bytes);
  }
  memset(&state, 0, sizeof state);
  state.config = config;
}

void check_tile(const Instruction& in, int t) {
  if (state.config.palette == 0) fault(in, "tiles are not configured in this thread");
  if (!state.config.rows[t]) fault(in, "tile %d is not configured", t);
  if (state.config.row_bytes[t] % 4)
    fault(in, "tile %d has %d bytes a row, no multiple of 4", t, state.config.row_bytes[t]);
}

void tile_zero(const Instruction& in, int t) {
  check_tile(in, t);
  memset(state.tile[t], 0, sizeof state.tile[t]);
}

void tile_load(const Instruction& in, int t, const uint8_t* from, int64_t stride) {
  check_tile(in, t);
  uint8_t tile[kRows][kRowBytes] = {};
  for (int r = 0; r < state.config.rows[t]; r++) memcpy(tile[r], from + r * stride, state.config.row_bytes[t]);
  memcpy(state.tile[t], tile, sizeof tile);
}

void tile_store(const Instruction& in, int t, uint8_t* to, int64_t stride) {
  check_tile(in, t);
  for (int r = 0; r < state.config.rows[t]; r++) memcpy(to + r * stride, state.tile[t][r], state.config.row_bytes[t]);
}

// Shapes of sums [m, n] += a [m, k] b [k, n], in elements of 4 bytes.
struct Shape { int m, n, k; };

Shape check_product(const Instruction& in, int sums, int a, int b) {
  check_tile(in, sums);
  check_tile(in, a);
  check_tile(in, b);
  if (sums == a || sums == b || a == b) fault(in, "tiles %d, %d and %d are not three", sums, a, b);
  const Config& c = state.config;
  if (c.rows[sums] != c.rows[a] || c.row_bytes[sums] != c.row_bytes[b] || c.row_bytes[a] != 4 * c.rows[b])
    fault(in, "shapes do not match: sums %d x %d bytes, first %d x %d, second %d x %d", c.rows[sums], c.row_bytes[sums],
          c.rows[a], c.row_bytes[a], c.rows[b], c.row_bytes[b]);
  return {c.rows[sums], c.row_bytes[sums] / 4, c.rows[b]};
}

// AVX2 for speed alone; a machine that is told to run AMX kernels has it.
__attribute__((target("avx2"), optimize("O3"))) void product_int8(const Instruction& in, int sums, int a, int b,
                                                                  bool a_signed, bool b_signed) {
  const Shape shape = check_product(in, sums, a, b);
  uint32_t wide[kRows][4][16] = {};
  for (int k = 0; k < shape.k; k++)
    for (int n = 0; n < shape.n; n++)
      for (int j = 0; j < 4; j++) {
        const uint8_t byte = state.tile[b][k][4 * n + j];
        wide[k][j][n] = b_signed ? (uint32_t)(int8_t)byte : byte;
      }
  for (int m = 0; m < shape.m; m++) {
    uint32_t row[16];
    memcpy(row, state.tile[sums][m], sizeof row);
    for (int k = 0; k < shape.k; k++)
      for (int j = 0; j < 4; j++) {
        const uint8_t byte = state.tile[a][m][4 * k + j];
        const uint32_t x = a_signed ? (uint32_t)(int8_t)byte : byte;
        for (int n = 0; n < 16; n++) row[n] += x * wide[k][j][n];
      }
    memcpy(state.tile[sums][m], row, sizeof row);
  }
}

float without_denormals(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x; }

float bf16(const uint8_t* bytes) {
  uint16_t half;
  memcpy(&half, bytes, 2);
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return without_denormals(value);
}

// Even and odd elements are summed apart, each step fused; denormals are zeros.
void product_bf16(const Instruction& in, int sums, int a, int b) {
  const Shape shape = check_product(in, sums, a, b);
  for (int m = 0; m < shape.m; m++)
    for (int n = 0; n < shape.n; n++) {
      float both[2] = {0, 0}, old;
      for (int k = 0; k < shape.k; k++)
        for (int j = 0; j < 2; j++)
          both[j] = without_denormals(
              __builtin_fmaf(bf16(&state.tile[a][m][4 * k + 2 * j]), bf16(&state.tile[b][k][4 * n + 2 * j]), both[j]));
      memcpy(&old, &state.tile[sums][m][4 * n], 4);
      const float total = without_denormals(without_denormals(old) + without_denormals(both[0] + both[1]));
      memcpy(&state.tile[sums][m][4 * n], &total, 4);
    }
}

// ---- decoding ----------------------------------------------------------------------------------------------------------

int64_t general(const ucontext_t* context, int number) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[order[number]];
}

struct Memory {
  bool sib;
  int64_t address, stride;  // base + displacement, index · scale
  int length;               // of ModRM, SIB and displacement
};

// `modrm` points to a ModRM byte whose mod is not 3, the last part of its instruction but for SIB and displacement.
Memory decode_memory(const ucontext_t* context, const uint8_t* modrm, bool base_high, bool index_high) {
  const int mod = *modrm >> 6, rm = *modrm & 7;
  Memory memory = {rm == 4, 0, 0, 1};
  bool wide = mod == 2, relative = false;
  if (memory.sib) {
    const uint8_t sib = modrm[memory.length++];
    const int index = (sib >> 3 & 7) + 8 * index_high, base = sib & 7;
    if (index != 4) memory.stride = (int64_t)((uint64_t)general(context, index) << (sib >> 6));
    if (base == 5 && mod == 0) wide = true;
    else memory.address = general(context, base + 8 * base_high);
  } else if (rm == 5 && mod == 0) {
    wide = relative = true;
  } else {
    memory.address = general(context, rm + 8 * base_high);
  }
  if (wide) {
    int32_t displacement;
    memcpy(&displacement, modrm + memory.length, 4);
    memory.address += displacement;
    memory.length += 4;
  } else if (mod == 1) {
    memory.address += (int8_t)modrm[memory.length++];
  }
  if (relative) memory.address += (int64_t)(uintptr_t)(modrm + memory.length);
  return memory;
}

// Does the instruction at `p` and returns its length, or 0 when it is none of AMX.
int emulate(const ucontext_t* context, const uint8_t* p) {
  // VEX, three bytes: C4, ~R ~X ~B map, W ~vvvv L pp; then opcode and ModRM.
  if (p[0] != 0xC4 || (p[1] & 0x1F) != 2 || (p[2] & 0x84)) return 0;
  const bool register_high = !(p[1] & 0x80), index_high = !(p[1] & 0x40), base_high = !(p[1] & 0x20);
  const int third = ~(p[2] >> 3) & 15, prefix = p[2] & 3;  // prefix: 0 none, 1 66, 2 F3, 3 F2
  const int opcode = p[3], mod = p[4] >> 6, middle = p[4] >> 3 & 7, rm = p[4] & 7;
  Instruction in = {p, ""};

  if (opcode == 0x5E || (opcode == 0x5C && prefix == 2)) {
    static const char* const names[4] = {"tdpbuud", "tdpbusd", "tdpbsud", "tdpbssd"};
    if (mod != 3) return 0;
    in.name = opcode == 0x5C ? "tdpbf16ps" : names[prefix];
    if (register_high || base_high || third > 7) fault(in, "a tile above 7");
    if (opcode == 0x5C) product_bf16(in, middle, rm, third);
    else product_int8(in, middle, rm, third, prefix >= 2, prefix == 1 || prefix == 3);
    return 5;
  }
  if (opcode == 0x49 && mod == 3) {
    if (prefix == 0 && p[4] == 0xC0) {
      in.name = "tilerelease";
      if (third) fault(in, "vvvv is not 1111");
      memset(&state, 0, sizeof state);
      return 5;
    }
    if (prefix == 3 && rm == 0) {
      in.name = "tilezero";
      if (register_high || third) fault(in, "a tile above 7, or vvvv is not 1111");
      tile_zero(in, middle);
      return 5;
    }
    return 0;
  }
  if (opcode == 0x49 && prefix <= 1 && middle == 0) {
    const Memory memory = decode_memory(context, p + 4, base_high, index_high);
    in.name = prefix == 0 ? "ldtilecfg" : "sttilecfg";
    if (third) fault(in, "vvvv is not 1111");
    void* const at = (void*)(uintptr_t)(memory.address + memory.stride);
    if (prefix == 0) load_config(in, at);
    else memcpy(at, &state.config, sizeof state.config);
    return 4 + memory.length;
  }
  if (opcode == 0x4B && prefix && mod != 3) {
    static const char* const names[4] = {"", "tileloaddt1", "tilestored", "tileloadd"};
    const Memory memory = decode_memory(context, p + 4, base_high, index_high);
    in.name = names[prefix];
    if (!memory.sib) fault(in, "no SIB byte");
    if (register_high || third) fault(in, "a tile above 7, or vvvv is not 1111");
    uint8_t* const at = (uint8_t*)(uintptr_t)memory.address;
    if (prefix == 2) tile_store(in, middle, at, memory.stride);
    else tile_load(in, middle, at, memory.stride);
    return 4 + memory.length;
  }
  return 0;
}

// ---- the signal --------------------------------------------------------------------------------------------------------

using Sigaction = int (*)(int, const struct sigaction*, struct sigaction*);

Sigaction real_sigaction() {
  static const Sigaction real = (Sigaction)dlsym(RTLD_NEXT, "sigaction");
  return real;
}

// What the program wants to happen at illegal instructions; the default action until it says.
struct sigaction wanted;

void handle(int, siginfo_t*, void* context) {
  ucontext_t* const at = (ucontext_t*)context;
  const int length = emulate(at, (const uint8_t*)(uintptr_t)at->uc_mcontext.gregs[REG_RIP]);
  if (length) {
    at->uc_mcontext.gregs[REG_RIP] += length;
    emulated.fetch_add(1, std::memory_order_relaxed);
  } else {
    // The instruction is run again and gets that action.
    real_sigaction()(SIGILL, &wanted, nullptr);
  }
}

__attribute__((constructor)) void install() {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  if (real_sigaction()(SIGILL, &action, &wanted)) {
    perror("amx_emulator: sigaction");
    abort();
  }
}

}  // namespace

// Preloaded, this keeps the handler in place: Python's faulthandler (which pytest switches on) asks for SIGILL too.
extern "C" int sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  if (number != SIGILL) return real_sigaction()(number, action, old);
  const struct sigaction before = wanted;
  if (action) wanted = *action;
  if (old) *old = before;
  return 0;
}

// Tells the dispatcher (isa.cpp) that AMX instructions work here.
extern "C" int resq_emulated_amx(void) { return 1; }

// For tests: instructions emulated so far, and whether this thread has tiles configured (1) or released them (0).
extern "C" long resq_emulated_amx_instructions(void) { return emulated.load(std::memory_order_relaxed); }
extern "C" int resq_emulated_amx_configured(void) { return state.config.palette != 0; }
