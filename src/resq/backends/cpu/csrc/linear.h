// Linears over packed weights: uint8 activations times int8 or int4 weights, int32 sums, a float32 epilogue.
//
// Layout. Panel p holds outputs 32p … 32p + 31 as two tiles of 16. Its columns are cut into segments (one activation
// range, one weight scale), a segment into blocks of 8 columns, and 8 blocks make a step:
//   step s of a segment:  blocks of tile 0, then blocks of tile 1     (the last step may have fewer than 8)
//   a block, 4 bit:       64 bytes;  byte 4n + j = w[n, 8b + j] & 15 | w[n, 8b + 4 + j] << 4
//   a block, 8 bit:      128 bytes;  byte 4n + j = w[n, 8b + j], byte 64 + 4n + j = w[n, 8b + 4 + j]
// (n output in the tile, b block in the segment, j 0 … 3), zeros beyond the segment and beyond the outputs. 64 bytes
// are then what one dot-product instruction takes, and 16 of them, unpacked, are an AMX tile. After the segments:
// float scale[segments][32], int32 sums[segments][32], where sums are Σ_k w: Σ (q - z) w = Σ q w - z Σ w.
//
// A panel is read once, in order. Few rows unpack it in registers; many rows unpack it into scratch that stays in L2
// and multiply blocks of rows that stay there too. Sums are exact integers, and each row's epilogue is the same
// sequence of operations everywhere, so a row's bits depend on nothing but that row.

// Rows multiplied together: 2 accumulators a row, of 32 registers with AVX-512 and of 16 half as long with AVX2.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX2__)
constexpr int kRows = 2;
#else
constexpr int kRows = 1;
#endif

// Bytes of activations that stay in L2 beside an unpacked panel.
constexpr int64_t kRowBlockBytes = 5 << 18;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// The nibbles are multiplied as 16 w, which needs no shift of bytes; the sum is divided at the end, exactly.
constexpr int kNibbleShift = 4;
#else
constexpr int kNibbleShift = 0;
#endif

struct Pair { I16 low, high; };

// 64 packed bytes -> the columns 8b … 8b + 3 and 8b + 4 … 8b + 7 as signed bytes times 2^kNibbleShift.
RESQ_INLINE Pair unpack_nibbles(I16 p) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  const I16 mask = splat32((int32_t)0xF0F0F0F0u);
  return {(p << 4) & mask, p & mask};
#else
  typedef int8_t S64 __attribute__((vector_size(64)));
  const S64 eight = (S64)splat32(0x08080808);
  const I16 mask = splat32(0x0F0F0F0F);
  S64 low = (S64)(p & mask), high = (S64)((p >> 4) & mask);
  return {(I16)((low ^ eight) - eight), (I16)((high ^ eight) - eight)};
#endif
}

// acc[n] + Σ_j x[j] w[n, j]; x: 4 unsigned bytes in every lane, w: 4 signed bytes of every output. `nibble` promises
// |w| ≤ 8, so that pairs of products fit 16 bits.
RESQ_INLINE I16 dot(I16 acc, I16 x, I16 w, bool nibble) {
#if defined(__AVX512VNNI__)
  (void)nibble;
  return (I16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
  __m256i a[2], u[2], s[2];
  __builtin_memcpy(a, &acc, 64);
  __builtin_memcpy(u, &x, 64);
  __builtin_memcpy(s, &w, 64);
  for (int i = 0; i < 2; i++) {
#if defined(__AVXVNNI__)
    a[i] = _mm256_dpbusd_avx_epi32(a[i], u[i], s[i]);
#else
    if (nibble) {
      a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(_mm256_maddubs_epi16(u[i], s[i]), _mm256_set1_epi16(1)));
    } else {  // maddubs would saturate: even and odd bytes as 16-bit values
      const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u[i], _mm256_set1_epi16(255)),
                                             _mm256_srai_epi16(_mm256_slli_epi16(s[i], 8), 8));
      const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u[i], 8), _mm256_srai_epi16(s[i], 8));
      a[i] = _mm256_add_epi32(a[i], _mm256_add_epi32(even, odd));
    }
#endif
  }
#if defined(__AVXVNNI__)
  (void)nibble;
#endif
  __builtin_memcpy(&acc, a, 64);
  return acc;
#else
  (void)nibble;
  uint8_t u[4];
  int8_t s[64];
  __builtin_memcpy(u, &x, 4);
  store(s, w);
  for (int n = 0; n < 16; n++)
    acc[n] += u[0] * s[4 * n] + u[1] * s[4 * n + 1] + u[2] * s[4 * n + 2] + u[3] * s[4 * n + 3];
  return acc;
#endif
}

RESQ_INLINE I16 four(const uint8_t* x) {
  int32_t v;
  __builtin_memcpy(&v, x, 4);
  return splat32(v);
}

struct Sums { I16 tile[2]; };

// Sums of R rows over one segment, straight from the packed panel.
template <int R>
static __attribute__((always_inline)) inline void segment_packed(const Segment& seg, const uint8_t* w, const uint8_t* x,
                                                                 int64_t ldx, Sums* out) {
  I16 acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = I16{};
  const int64_t bytes = seg.bits == 4 ? 64 : 128;
  for (int64_t block = 0; block < seg.blocks; block += 8) {
    const int64_t count = seg.blocks - block < 8 ? seg.blocks - block : 8;
    const uint8_t* other = w + count * bytes;
    if (seg.bits == 4) {
      for (int64_t b = 0; b < count; b++) {
        __builtin_prefetch(w + b * 64 + 4096);
        __builtin_prefetch(other + b * 64 + 4096);
        const Pair w0 = unpack_nibbles(load<I16>(w + b * 64)), w1 = unpack_nibbles(load<I16>(other + b * 64));
        const uint8_t* at = x + (block + b) * 8;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const I16 low = four(at + r * ldx), high = four(at + r * ldx + 4);
          acc[r][0] = dot(dot(acc[r][0], low, w0.low, true), high, w0.high, true);
          acc[r][1] = dot(dot(acc[r][1], low, w1.low, true), high, w1.high, true);
        }
      }
    } else {
      for (int64_t b = 0; b < 2 * count; b++) {
        __builtin_prefetch(w + b * 64 + 4096);
        __builtin_prefetch(other + b * 64 + 4096);
        const I16 w0 = load<I16>(w + b * 64), w1 = load<I16>(other + b * 64);
        const uint8_t* at = x + block * 8 + b * 4;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const I16 v = four(at + r * ldx);
          acc[r][0] = dot(acc[r][0], v, w0, false);
          acc[r][1] = dot(acc[r][1], v, w1, false);
        }
      }
    }
    w = other + count * bytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) out[r] = {{acc[r][0], acc[r][1]}};
}

// Bytes of an unpacked segment: for every 4 columns 64 bytes of tile 0, then 64 of tile 1.
RESQ_INLINE int64_t unpacked_bytes(const Segment& seg) { return seg.blocks * 256; }

static void unpack_segment(const Segment& seg, const uint8_t* w, uint8_t* to) {
  for (int64_t block = 0; block < seg.blocks; block += 8) {
    const int64_t count = seg.blocks - block < 8 ? seg.blocks - block : 8;
    for (int tile = 0; tile < 2; tile++) {
      uint8_t* at = to + block * 256 + tile * 64;
      if (seg.bits == 4) {
        for (int64_t b = 0; b < count; b++, w += 64) {
          const Pair pair = unpack_nibbles(load<I16>(w));
          store(at + b * 256, pair.low);
          store(at + b * 256 + 128, pair.high);
        }
      } else {
        for (int64_t b = 0; b < 2 * count; b++, w += 64) store(at + b * 128, load<I16>(w));
      }
    }
  }
}

// Sums of R rows over one unpacked segment.
template <int R>
static __attribute__((always_inline)) inline void segment_unpacked(const Segment& seg, const uint8_t* w,
                                                                   const uint8_t* x, int64_t ldx, Sums* out) {
  I16 acc[R][2];
  const bool nibble = seg.bits == 4;
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = I16{};
  for (int64_t k = 0; k < 2 * seg.blocks; k++, w += 128, x += 4) {
    const I16 w0 = load<I16>(w), w1 = load<I16>(w + 64);
    // No prefetches: they would take the load ports that the broadcasts need.
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const I16 v = four(x + r * ldx);
      acc[r][0] = dot(acc[r][0], v, w0, nibble);
      acc[r][1] = dot(acc[r][1], v, w1, nibble);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) out[r] = {{acc[r][0], acc[r][1]}};
}

struct Totals { F16 tile[2]; };

// What the rows of a panel's segment share: column sums, weight scales.
struct Epilogue {
  I16 columns[2];
  F16 scales[2];
  int shift, range;
};
RESQ_INLINE Epilogue epilogue(const Packed& w, int64_t panel, int s) {
  const float* scales = (const float*)(w.data + panel * w.panel_bytes + w.epilogue) + s * kPanel;
  const int32_t* columns = (const int32_t*)(w.data + panel * w.panel_bytes + w.epilogue) + (w.segments + s) * kPanel;
  return {{load<I16>(columns), load<I16>(columns + 16)},
          {load<F16>(scales), load<F16>(scales + 16)},
          w.segment[s].bits == 4 ? kNibbleShift : 0,
          w.segment[s].range};
}

// Σ (q - z) w of a row, exactly.
RESQ_INLINE Sums exact(const LinearCall& call, const Epilogue& e, int64_t row, const Sums& sums) {
  const I16 zero = splat32(call.zero[row * call.ranges + e.range]);
  return {{(sums.tile[0] >> e.shift) - zero * e.columns[0], (sums.tile[1] >> e.shift) - zero * e.columns[1]}};
}

// Adds s_x s_w Σ (q - z) w to a row's totals.
RESQ_INLINE void add_exact(const LinearCall& call, const Epilogue& e, int64_t row, const Sums& sums, Totals& totals) {
  const Sums whole = exact(call, e, row, sums);
  const F16 scale = splat(call.scale[row * call.ranges + e.range]);
  totals.tile[0] = fma(to_float(whole.tile[0]), scale * e.scales[0], totals.tile[0]);
  totals.tile[1] = fma(to_float(whole.tile[1]), scale * e.scales[1], totals.tile[1]);
}

// Tests: the integers themselves.
static __attribute__((noinline)) void write_sums(const LinearCall& call, int64_t panel, int s, int64_t row,
                                                 const Sums& sums) {
  const Packed& w = *call.weight;
  const Sums whole = exact(call, epilogue(w, panel, s), row, sums);
  for (int n = 0; n < kPanel; n++) {
    const int64_t out = panel * kPanel + n;
    if (out < w.out) call.sums[(row * w.segments + s) * w.out + out] = whole.tile[n / 16][n % 16];
  }
}

// Segment `s` of one row: into its totals, or written out for tests.
RESQ_INLINE void add_segment(const LinearCall& call, int64_t panel, int s, int64_t row, const Sums& sums,
                             Totals& totals) {
  if (call.sums) return write_sums(call, panel, s, row, sums);
  add_exact(call, epilogue(*call.weight, panel, s), row, sums, totals);
}

// The same of R rows, with what they share loaded once.
template <int R>
RESQ_INLINE void add_rows(const LinearCall& call, int64_t panel, int s, int64_t row, const Sums* sums, Totals* totals) {
  if (call.sums) {
    for (int r = 0; r < R; r++) write_sums(call, panel, s, row + r, sums[r]);
    return;
  }
  const Epilogue e = epilogue(*call.weight, panel, s);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) add_exact(call, e, row + r, sums[r], totals[r]);
}

// Outputs larger than what L2 keeps are not brought into it: a store that misses would read the line first. The
// threshold is two L2 caches of a server core; where the gain begins depends on the machine.
constexpr int64_t kStreamBytes = 4 << 20;

// Whether a call's outputs go past the caches. In place, the line was just read.
RESQ_INLINE bool streams(const LinearCall& call) {
#if defined(__AVX2__)
  return call.rows * call.weight->out * 4 >= kStreamBytes && call.onto != call.out &&
         ((uintptr_t)call.out | (uintptr_t)(call.ldo * 4)) % 64 == 0;
#else
  (void)call;
  return false;
#endif
}
RESQ_INLINE void stream_store(float* p, F16 v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  const Halves both = halves(v);
  _mm256_stream_ps(p, (__m256)both.low);
  _mm256_stream_ps(p + 8, (__m256)both.high);
#else
  store(p, v);
#endif
}
// After the last of them, before another thread reads.
RESQ_INLINE void stream_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Bias, what the result is added to, and the store.
RESQ_INLINE void finish_row(const Packed& w, int64_t panel, Totals totals, const float* onto, float* out,
                            bool stream = false) {
  const int64_t first = panel * kPanel;
  const int64_t count = w.out - first < kPanel ? w.out - first : kPanel;
  if (w.bias)
    for (int tile = 0; tile < 2; tile++) totals.tile[tile] += load<F16>(w.bias + first + tile * 16);
  if (count == kPanel) {
    for (int tile = 0; tile < 2; tile++) {
      F16 y = totals.tile[tile];
      if (onto) y = load<F16>(onto + first + tile * 16) + y;
      if (stream) stream_store(out + first + tile * 16, y);
      else store(out + first + tile * 16, y);
    }
    return;
  }
  float y[kPanel];
  store(y, totals.tile[0]);
  store(y + 16, totals.tile[1]);
  for (int64_t n = 0; n < count; n++) out[first + n] = onto ? onto[first + n] + y[n] : y[n];
}

template <int R>
static void rows_packed(const LinearCall& call, int64_t panel, int64_t row) {
  const Packed& w = *call.weight;
  Totals totals[R] = {};
  for (int s = 0; s < w.segments; s++) {
    Sums sums[R];
    const Segment& seg = w.segment[s];
    segment_packed<R>(seg, w.data + panel * w.panel_bytes + seg.offset, call.q + row * call.ldq + seg.begin, call.ldq,
                      sums);
    add_rows<R>(call, panel, s, row, sums, totals);
  }
  if (call.sums) return;
  for (int r = 0; r < R; r++)
    finish_row(w, panel, totals[r], call.onto ? call.onto + (row + r) * call.ldonto : nullptr,
               call.out + (row + r) * call.ldo);
}

template <int R>
static void rows_unpacked(const LinearCall& call, const uint8_t* unpacked, int64_t panel, int64_t row, bool stream) {
  const Packed& w = *call.weight;
  Totals totals[R] = {};
  for (int s = 0; s < w.segments; s++) {
    Sums sums[R];
    const Segment& seg = w.segment[s];
    segment_unpacked<R>(seg, unpacked, call.q + row * call.ldq + seg.begin, call.ldq, sums);
    unpacked += unpacked_bytes(seg);
    add_rows<R>(call, panel, s, row, sums, totals);
  }
  if (call.sums) return;
  for (int r = 0; r < R; r++)
    finish_row(w, panel, totals[r], call.onto ? call.onto + (row + r) * call.ldonto : nullptr,
               call.out + (row + r) * call.ldo, stream);
}

// Calls RESQ_ROWS(R) with `row` for the rows begin … end - 1, in groups of nearly equal size up to kRows: a last group
// of few rows would leave most of the multipliers idle.
#define RESQ_CASE(R, RESQ_ROWS) \
  case R: RESQ_ROWS((R < kRows ? R : kRows)); break;
#define RESQ_BY_ROWS(begin, end, RESQ_ROWS)                                                          \
  for (int64_t row = begin, left = (end) - (begin), groups = (left + kRows - 1) / kRows; groups > 0; \
       groups--) {                                                                                   \
    const int64_t count = (left + groups - 1) / groups;                                              \
    switch (count) {                                                                                 \
      RESQ_CASE(1, RESQ_ROWS)                                                                        \
      RESQ_CASE(2, RESQ_ROWS)                                                                        \
      RESQ_CASE(3, RESQ_ROWS)                                                                        \
      RESQ_CASE(4, RESQ_ROWS)                                                                        \
      RESQ_CASE(5, RESQ_ROWS)                                                                        \
      RESQ_CASE(6, RESQ_ROWS)                                                                        \
      RESQ_CASE(7, RESQ_ROWS)                                                                        \
      RESQ_CASE(8, RESQ_ROWS)                                                                        \
      RESQ_CASE(9, RESQ_ROWS)                                                                        \
      RESQ_CASE(10, RESQ_ROWS)                                                                       \
      RESQ_CASE(11, RESQ_ROWS)                                                                       \
      default: RESQ_ROWS(kRows); break;                                                              \
    }                                                                                                \
    row += count;                                                                                    \
    left -= count;                                                                                   \
  }

RESQ_INLINE int64_t panel_unpacked_bytes(const Packed& w) {
  int64_t bytes = 0;
  for (int s = 0; s < w.segments; s++) bytes += unpacked_bytes(w.segment[s]);
  return bytes;
}

#if defined(RESQ_AMX)
#include "amx.h"
#endif

static size_t linear_scratch(const LinearCall& call) {
#if defined(RESQ_AMX)
  if (amx_serves(call)) return amx_scratch(call);
#endif
  return call.rows > kRows ? (size_t)panel_unpacked_bytes(*call.weight) : 0;
}

static void linear(const LinearCall& call, int64_t panel_begin, int64_t panel_end, void* scratch) {
  const Packed& w = *call.weight;
#if defined(RESQ_AMX)
  if (amx_serves(call)) return amx_linear(call, panel_begin, panel_end, scratch);
#endif
  if (call.rows <= kRows) {
    for (int64_t panel = panel_begin; panel < panel_end; panel++) {
#define RESQ_ROWS(R) rows_packed<R>(call, panel, row)
      RESQ_BY_ROWS(0, call.rows, RESQ_ROWS)
#undef RESQ_ROWS
    }
    return;
  }
  // Blocks of equal height: a low last one would unpack every panel for a few rows.
  int64_t block = kRowBlockBytes / (w.in < 1 ? 1 : w.in);
  if (block < 4 * kRows) block = 4 * kRows;
  const int64_t blocks = (call.rows + block - 1) / block;
  block = ((call.rows + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
  uint8_t* unpacked = (uint8_t*)scratch;
  const bool stream = streams(call);
  for (int64_t first = 0; first < call.rows; first += block) {
    const int64_t last = call.rows - first < block ? call.rows : first + block;
    for (int64_t panel = panel_begin; panel < panel_end; panel++) {
      uint8_t* to = unpacked;
      for (int s = 0; s < w.segments; s++) {
        unpack_segment(w.segment[s], w.data + panel * w.panel_bytes + w.segment[s].offset, to);
        to += unpacked_bytes(w.segment[s]);
      }
#define RESQ_ROWS(R) rows_unpacked<R>(call, unpacked, panel, row, stream)
      RESQ_BY_ROWS(first, last, RESQ_ROWS)
#undef RESQ_ROWS
    }
  }
  if (stream) stream_end();
}

// ---- float activations ---------------------------------------------------------------------------------------------------

// Columns whose weights are float32 in scratch at a time: 32 KB for a panel.
constexpr int64_t kFloatColumns = 256;
#if defined(__AVX512F__)
constexpr int kFloatRows = 8;
#elif defined(__AVX2__)
constexpr int kFloatRows = 2;
#else
constexpr int kFloatRows = 1;
#endif

// Blocks `first` … `first + count - 1` of a segment as float32 [8 · count][32].
static void unpack_float(const Segment& seg, const uint8_t* w, int64_t first, int64_t count, float* to) {
  const int shift = seg.bits == 4 ? kNibbleShift : 0;
  const int64_t bytes = seg.bits == 4 ? 64 : 128;
  for (int64_t i = 0; i < count; i++) {
    const int64_t block = first + i, step = block / 8;
    const int64_t in_step = seg.blocks - step * 8 < 8 ? seg.blocks - step * 8 : 8;
    for (int tile = 0; tile < 2; tile++) {
      const uint8_t* at = w + (step * 16 + tile * in_step + block % 8) * bytes;
      const Pair pair = seg.bits == 4 ? unpack_nibbles(load<I16>(at)) : Pair{load<I16>(at), load<I16>(at + 64)};
      for (int j = 0; j < 4; j++) {
        store(to + (i * 8 + j) * kPanel + tile * 16, to_float((pair.low << (24 - 8 * j)) >> (24 + shift)));
        store(to + (i * 8 + 4 + j) * kPanel + tile * 16, to_float((pair.high << (24 - 8 * j)) >> (24 + shift)));
      }
    }
  }
}

template <int R>
static void add_columns(const float* w, int64_t columns, const float* x, int64_t ldx, float* sums) {
  F16 acc[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int tile = 0; tile < 2; tile++) acc[r][tile] = load<F16>(sums + r * kPanel + tile * 16);
  for (int64_t k = 0; k < columns; k++, w += kPanel) {
    const F16 w0 = load<F16>(w), w1 = load<F16>(w + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const F16 v = splat(x[r * ldx + k]);
      acc[r][0] = mul_add(v, w0, acc[r][0]);
      acc[r][1] = mul_add(v, w1, acc[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int tile = 0; tile < 2; tile++) store(sums + r * kPanel + tile * 16, acc[r][tile]);
}

// Unpacked weights, the sums of one segment and the totals, [rows][32] each.
static size_t float_linear_scratch(const FloatLinearCall& call) {
  return (size_t)(kFloatColumns + 2 * call.rows) * kPanel * sizeof(float);
}

static void float_linear(const FloatLinearCall& call, int64_t panel_begin, int64_t panel_end, void* scratch) {
  const Packed& w = *call.weight;
  float* weights = (float*)scratch;
  float* sums = weights + kFloatColumns * kPanel;
  float* totals = sums + call.rows * kPanel;
  for (int64_t panel = panel_begin; panel < panel_end; panel++) {
    __builtin_memset(totals, 0, (size_t)(call.rows * kPanel) * sizeof(float));
    for (int s = 0; s < w.segments; s++) {
      const Segment& seg = w.segment[s];
      const uint8_t* at = w.data + panel * w.panel_bytes;
      const float* scales = (const float*)(at + w.epilogue) + s * kPanel;
      __builtin_memset(sums, 0, (size_t)(call.rows * kPanel) * sizeof(float));
      for (int64_t block = 0; block < seg.blocks; block += kFloatColumns / 8) {
        const int64_t count = seg.blocks - block < kFloatColumns / 8 ? seg.blocks - block : kFloatColumns / 8;
        unpack_float(seg, at + seg.offset, block, count, weights);
        // The last block may reach beyond the segment, where the activations are another segment's or none.
        const int64_t left = seg.size - block * 8, columns = left < count * 8 ? left : count * 8;
        const float* x = call.x + seg.begin + block * 8;
        int64_t row = 0;
        for (; row + kFloatRows <= call.rows; row += kFloatRows)
          add_columns<kFloatRows>(weights, columns, x + row * call.ldx, call.ldx, sums + row * kPanel);
        for (; row < call.rows; row++) add_columns<1>(weights, columns, x + row * call.ldx, call.ldx, sums + row * kPanel);
      }
      for (int64_t row = 0; row < call.rows; row++)
        for (int n = 0; n < kPanel; n += 16) {
          float* total = totals + row * kPanel + n;
          store(total, fma(load<F16>(sums + row * kPanel + n), load<F16>(scales + n), load<F16>(total)));
        }
    }
    for (int64_t row = 0; row < call.rows; row++) {
      const float* total = totals + row * kPanel;
      finish_row(w, panel, {{load<F16>(total), load<F16>(total + 16)}},
                 call.onto ? call.onto + row * call.ldonto : nullptr, call.out + row * call.ldo);
    }
  }
}
