// Checks the AMX emulator (or a processor's AMX) against plain loops:
//
//   g++ -std=c++17 -O2 -mamx-tile -mamx-int8 -mamx-bf16 test_amx.cpp -o test_amx
//   LD_PRELOAD=./libamx_emulator.so ./test_amx
//
// Every instruction, the ways to address memory that compilers use, exact bytes at guard pages, and that what faults on
// a processor stops the program. Prints what fails; exit status 0 when nothing does.

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <initializer_list>
#include <random>
#include <thread>

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

int failures = 0;
std::mt19937 random_bits(1);

void expect(bool holds, const char* what) {
  if (holds) return;
  failures++;
  printf("failed: %s\n", what);
}

// tmm0 [m, n] sums, tmm1 [m, k] first, tmm2 [k, n] second; sizes in elements of 4 bytes.
Config shapes(int m, int n, int k) {
  Config config;
  const int rows[3] = {m, m, k}, columns[3] = {n, k, n};
  for (int t = 0; t < 3; t++) config.rows[t] = (uint8_t)rows[t], config.row_bytes[t] = (uint16_t)(4 * columns[t]);
  return config;
}

void configure(const Config& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }
void release() { __asm__ volatile("tilerelease"); }
void load(int t, const void* p, int64_t stride) {
  if (t == 0) __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(p), "r"(stride) : "memory");
  if (t == 1) __asm__ volatile("tileloadd (%0,%1,1), %%tmm1" : : "r"(p), "r"(stride) : "memory");
  if (t == 2) __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm2" : : "r"(p), "r"(stride) : "memory");
}
void store0(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(p), "r"(stride) : "memory");
}

void products_are_those_of_a_loop() {
  for (int round = 0; round < 60; round++) {
    const int m = 1 + (int)(random_bits() % 16), n = 1 + (int)(random_bits() % 16), k = 1 + (int)(random_bits() % 16);
    uint8_t a[16][80], b[16][72];
    int32_t c[16][16], got[16][16], want[16][16];
    for (auto& row : a) for (auto& x : row) x = (uint8_t)random_bits();
    for (auto& row : b) for (auto& x : row) x = (uint8_t)random_bits();
    for (auto& row : c) for (auto& x : row) x = (int32_t)random_bits();
    memset(got, 0x55, sizeof got);
    memset(want, 0x55, sizeof want);
    const bool a_signed = round & 1, b_signed = round & 2;
    for (int i = 0; i < m; i++)
      for (int j = 0; j < n; j++) {
        uint32_t sum = (uint32_t)c[i][j];
        for (int l = 0; l < 4 * k; l++) {
          const uint8_t x = a[i][l], y = b[l / 4][4 * j + l % 4];
          sum += (uint32_t)((a_signed ? (int8_t)x : (int)x) * (b_signed ? (int8_t)y : (int)y));
        }
        want[i][j] = (int32_t)sum;
      }
    configure(shapes(m, n, k));
    load(0, c, 64);
    load(1, a, 80);
    load(2, b, 72);
    switch (round & 3) {
      case 0: __asm__ volatile("tdpbuud %tmm2, %tmm1, %tmm0"); break;
      case 1: __asm__ volatile("tdpbsud %tmm2, %tmm1, %tmm0"); break;
      case 2: __asm__ volatile("tdpbusd %tmm2, %tmm1, %tmm0"); break;
      case 3: __asm__ volatile("tdpbssd %tmm2, %tmm1, %tmm0"); break;
    }
    store0(got, 64);
    release();
    expect(!memcmp(got, want, sizeof got), "int8 products");
  }
}

// Small integers, so that every order of sums gives the same.
void bf16_products_are_those_of_a_loop() {
  uint16_t a[16][32], b[16][32];
  float c[16][16], want[16][16];
  const auto small = [](uint16_t* half) {
    const float value = (float)(random_bits() % 17) - 8;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    *half = (uint16_t)(bits >> 16);
    return value;
  };
  float x[16][32], y[16][32];
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 32; j++) x[i][j] = small(&a[i][j]), y[i][j] = small(&b[i][j]);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      want[i][j] = c[i][j] = (float)(i - j);
      for (int l = 0; l < 32; l++) want[i][j] += x[i][l] * y[l / 2][2 * j + l % 2];
    }
  configure(shapes(16, 16, 16));
  load(0, c, 64);
  load(1, a, 64);
  load(2, b, 64);
  __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
  store0(c, 64);
  release();
  expect(!memcmp(c, want, sizeof c), "bf16 products");
}

Config global_config;

void addresses_are_decoded() {
  alignas(64) static uint8_t data[65536], back[65536];
  for (auto& x : data) x = (uint8_t)random_bits();
  Config pair[2];
  pair[1] = global_config = shapes(3, 2, 1);
  Config seen;
  __asm__ volatile("ldtilecfg %0" : : "m"(global_config));  // relative to the instruction
  __asm__ volatile("sttilecfg %0" : "=m"(seen));
  expect(!memcmp(&seen, &global_config, 64), "ldtilecfg, rip-relative");
  release();
  __asm__ volatile("ldtilecfg 64(%0)" : : "r"(pair));
  {
    register uint8_t* base __asm__("r9") = back;
    register int64_t index __asm__("r12") = 16;
    __asm__ volatile("sttilecfg 0x1000(%0,%1,8)" : : "r"(base), "r"(index) : "memory");
  }
  expect(!memcmp(back + 0x1000 + 128, &global_config, 64), "sttilecfg, base, index and displacement");

  const auto same = [&](const uint8_t* from, int64_t stride, const char* what) {
    memset(back, 0, 64 * 3);
    store0(back, 64);
    bool equal = true;
    for (int r = 0; r < 3; r++) equal &= !memcmp(back + 64 * r, from + r * stride, 8);
    expect(equal, what);
    __asm__ volatile("tilezero %tmm0");
    store0(back, 64);
    expect(!memcmp(back, "\0\0\0\0\0\0\0", 8), "tilezero");
  };
  {
    register uint8_t* base __asm__("r13") = data;
    register int64_t index __asm__("r15") = 24;
    __asm__ volatile("tileloadd 8(%0,%1,4), %%tmm0" : : "r"(base), "r"(index) : "memory");
  }
  same(data + 8, 96, "tileloadd, r13 + 8, r15 · 4");
  __asm__ volatile("tileloadd -8(%0,%1,2), %%tmm0" : : "r"(data + 4096), "r"((int64_t)-100) : "memory");
  same(data + 4088, -200, "tileloadd, negative displacement and stride");
  __asm__ volatile("tileloadd 0x2345(%0), %%tmm0" : : "r"(data) : "memory");
  same(data + 0x2345, 0, "tileloadd, no index");
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm0" : : "r"(data + 1), "r"((int64_t)16) : "memory");
  same(data + 1, 16, "tileloaddt1");
  release();
}

void bytes_are_exact() {
  uint8_t* const pages = (uint8_t*)mmap(nullptr, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(pages, 4096, PROT_NONE);
  mprotect(pages + 2 * 4096, 4096, PROT_NONE);
  const int m = 5, bytes = 12, stride = 40;
  uint8_t* const end = pages + 2 * 4096;
  memset(pages + 4096, 7, 4096);
  configure(shapes(m, bytes / 4, 1));
  load(0, end - (m - 1) * stride - bytes, stride);
  __asm__ volatile("tilezero %tmm0");
  store0(end - (m - 1) * stride - bytes, stride);
  release();
  for (int i = 1; i <= 4096; i++) {
    const int from_last = (i - 1) % stride, row = (i - 1) / stride;
    expect(end[-i] == (row < m && from_last < bytes ? 0 : 7), "tilestored writes rows x bytes only");
  }
  munmap(pages, 3 * 4096);
}

// How the program ends; it runs in a child without messages.
template <class F>
int ends_by(F what) {
  fflush(stdout);
  const pid_t child = fork();
  if (!child) {
    if (!freopen("/dev/null", "w", stderr)) _exit(1);
    what();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

void faults_stop_the_program() {
  static uint8_t data[4096];
  const auto bad = [](void (*change)(Config&)) {
    return ends_by([=] {
      Config config = shapes(16, 16, 16);
      change(config);
      configure(config);
    });
  };
  expect(!bad([](Config&) {}), "a good configuration works");
  expect(bad([](Config& c) { c.palette = 2; }), "palette 2");
  expect(bad([](Config& c) { c.reserved[13] = 1; }), "reserved bytes");
  expect(bad([](Config& c) { c.rows[1] = 17; }), "17 rows");
  expect(bad([](Config& c) { c.row_bytes[1] = 68; }), "68 bytes a row");
  expect(bad([](Config& c) { c.rows[1] = 0; }), "rows of no tile");
  expect(bad([](Config& c) { c.rows[8] = 1, c.row_bytes[8] = 4; }), "tile 8");
  expect(ends_by([] { load(0, data, 64); }), "loading without configuration");
  expect(ends_by([] { configure(shapes(16, 16, 16)), release(), load(0, data, 64); }), "loading after release");
  expect(ends_by([] {
    configure(shapes(16, 16, 16));
    __asm__ volatile("tilezero %tmm3");
  }), "a tile that is not configured");
  expect(ends_by([] {
    configure(shapes(16, 16, 16));
    std::thread([] { load(0, data, 64); }).join();
  }), "tiles of another thread");
  expect(ends_by([] {
    configure(shapes(16, 16, 16));
    __asm__ volatile(".byte 0xc4, 0xe2, 0x69, 0x5e, 0xc9");  // tdpbusd %tmm2, %tmm1, %tmm1, which assemblers refuse
  }), "one tile twice");
  expect(ends_by([] {
    Config config = shapes(16, 16, 16);
    config.rows[2] = 15;
    configure(config);
    __asm__ volatile("tdpbusd %tmm2, %tmm1, %tmm0");
  }), "shapes that do not match");
  expect(ends_by([] { __asm__ volatile("ud2"); }) == SIGILL, "other illegal instructions end as ever");
}

}  // namespace

int main() {
  syscall(SYS_arch_prctl, 0x1023, 18);  // ask a real processor's kernel for tiles
  products_are_those_of_a_loop();
  bf16_products_are_those_of_a_loop();
  addresses_are_decoded();
  bytes_are_exact();
  faults_stop_the_program();
  printf("%s\n", failures ? "AMX: failures" : "AMX: as specified");
  return failures != 0;
}
