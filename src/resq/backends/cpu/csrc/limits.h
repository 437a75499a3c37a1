// What this machine can do at most, measured beside the kernels: integer dot products on registers, reads of memory.

static int64_t integer_peak(int64_t loops) {
#if defined(RESQ_AMX)
  return amx_peak(loops);
#else
  // As many chains as the instruction's latency times its rate needs.
  #if defined(__AVX512F__)
  constexpr int kChains = 16;
#else
  constexpr int kChains = 5;
#endif
  I16 acc[kChains] = {}, x = splat32(0x01010101), w = splat32(0x01010101);
  for (int64_t i = 0; i < loops; i++) {
    // The compiler must not see that every round is the same.
    __asm__ volatile("" : "+m"(x), "+m"(w));
    for (int j = 0; j < 16; j++)
#pragma GCC unroll 24
      for (int k = 0; k < kChains; k++) acc[k] = dot(acc[k], x, w, true);
  }
  I16 total = acc[0];
  for (int k = 1; k < kChains; k++) total += acc[k];
  volatile int32_t sink = total[0];
  (void)sink;
  return loops * 16 * kChains * 64 * 2;
#endif
}

// Pattern 0: one stream, the hardware's own prefetching. Pattern 1: the same with prefetches 4 KB ahead.
static uint64_t read_memory(const uint8_t* data, size_t bytes, int pattern) {
  I16 a{}, b{}, c{}, d{};
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    if (pattern == 1)
      for (int j = 0; j < 256; j += 64) __builtin_prefetch(data + i + j + 4096);
    a ^= load<I16>(data + i);
    b ^= load<I16>(data + i + 64);
    c ^= load<I16>(data + i + 128);
    d ^= load<I16>(data + i + 192);
  }
  typedef uint64_t L8 __attribute__((vector_size(64)));
  const L8 all = (L8)((a ^ b) ^ (c ^ d));
  uint64_t total = 0;
  for (int i = 0; i < 8; i++) total ^= all[i];
  return total;
}
