// Activations on their way to integers: RMSNorm or SiLU · up, the online map, then rounding in bands.
//
// The definition is backends/reference.py. All steps before a range are taken in float64 and rounded to float32 where
// the reference rounds; only the order of float64 sums differs. From the float32 value on, every step is the one IEEE
// float32 operation of numerics/affine.py, so that integers, scales and zero points are the reference's bit for bit.

// Helpers that rope.h shares.
namespace rows {

// ---- vectors --------------------------------------------------------------------------------------------------------

// The largest butterfly whose coordinates stay in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRadix = 16;
#else
constexpr int kRadix = 8;
#endif
typedef int64_t Longs __attribute__((vector_size(8 * kDoubles)));

// The smaller of |x| and `limit`.
RESQ_INLINE Doubles magnitude(Doubles x, double limit) {
#if defined(__AVX512DQ__)
  return (Doubles)_mm512_range_pd((__m512d)x, _mm512_set1_pd(limit), 2 + 8);
#elif defined(__AVX2__)
  return (Doubles)_mm256_min_pd(_mm256_andnot_pd(_mm256_set1_pd(-0.0), (__m256d)x), _mm256_set1_pd(limit));
#elif defined(__SSE2__)
  return (Doubles)_mm_min_pd(_mm_andnot_pd(_mm_set1_pd(-0.0), (__m128d)x), _mm_set1_pd(limit));
#else
  const Doubles high = spread(limit);
  x = x < 0.0 ? -x : x;
  return x < high ? x : high;
#endif
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// Smallest and largest of x[0 … n) and 0.
RESQ_INLINE void extremes(const float* x, int64_t n, float* low, float* high) {
#if defined(__AVX512F__)
  __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m512 v = _mm512_loadu_ps(x + i), w = _mm512_loadu_ps(x + i + 16);
    a = _mm512_min_ps(a, v), b = _mm512_max_ps(b, v);
    c = _mm512_min_ps(c, w), d = _mm512_max_ps(d, w);
  }
  for (; i < n; i += 16) {
    __mmask16 lanes = (__mmask16)((1u << smaller(16, n - i)) - 1);
    __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
    a = _mm512_min_ps(a, v), b = _mm512_max_ps(b, v);
  }
  *low = _mm512_reduce_min_ps(_mm512_min_ps(a, c));
  *high = _mm512_reduce_max_ps(_mm512_max_ps(b, d));
#else
  float least = 0, most = 0;
  int64_t i = 0;
  if (n >= kFloats) {
    Floats a = {}, b = {}, c = {}, d = {};
    for (; i + 2 * kFloats <= n; i += 2 * kFloats) {
      Floats v = load<Floats>(x + i), w = load<Floats>(x + i + kFloats);
      a = lesser(a, v), b = greater(b, v);
      c = lesser(c, w), d = greater(d, w);
    }
    for (; i < n; i += kFloats) {
      Floats v = load<Floats>(x + smaller(i, n - kFloats));  // the last vector may read some values twice
      a = lesser(a, v), b = greater(b, v);
    }
    a = lesser(a, c), b = greater(b, d);
    for (int lane = 0; lane < kFloats; lane++) {
      least = a[lane] < least ? a[lane] : least;
      most = b[lane] > most ? b[lane] : most;
    }
  }
  for (; i < n; i++) {
    least = x[i] < least ? x[i] : least;
    most = x[i] > most ? x[i] : most;
  }
  *low = least, *high = most;
#endif
}

// clamp(round(x / s) + z, 0, top) as bytes, with the reciprocal of s. `least` and `most` are -z and top - z: integers,
// so that they may bound the product before it is rounded and what is converted is small.
struct Rounding {
  float inverse, zero, least, most;
};

// 4 · kFloats coordinates at once.
RESQ_INLINE void round_block(const float* x, Rounding r, uint8_t* q) {
  Floats v[4];
  RESQ_UNROLL
  for (int i = 0; i < 4; i++) v[i] = lesser(load<Floats>(x + i * kFloats) * spread(r.inverse), spread(r.most));
  // Here the lower bound is saturation: a very negative product converts to the least integer and packs to 0. Packing
  // works within 128-bit lanes; the last permutation puts the groups of four back in order.
#if defined(__AVX512BW__)
  const __m512i zero = _mm512_set1_epi16((short)r.zero);
  __m512i a = _mm512_packs_epi32(_mm512_cvtps_epi32((__m512)v[0]), _mm512_cvtps_epi32((__m512)v[1]));
  __m512i b = _mm512_packs_epi32(_mm512_cvtps_epi32((__m512)v[2]), _mm512_cvtps_epi32((__m512)v[3]));
  a = _mm512_packus_epi16(_mm512_add_epi16(a, zero), _mm512_add_epi16(b, zero));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(q, _mm512_permutexvar_epi32(order, a));
#elif defined(__AVX2__)
  const __m256i zero = _mm256_set1_epi16((short)r.zero);
  __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)v[0]), _mm256_cvtps_epi32((__m256)v[1]));
  __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)v[2]), _mm256_cvtps_epi32((__m256)v[3]));
  a = _mm256_packus_epi16(_mm256_add_epi16(a, zero), _mm256_add_epi16(b, zero));
  _mm256_storeu_si256((__m256i*)q, _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#elif defined(__SSE2__)
  const __m128i zero = _mm_set1_epi16((short)r.zero);
  __m128i a = _mm_packs_epi32(_mm_cvtps_epi32((__m128)v[0]), _mm_cvtps_epi32((__m128)v[1]));
  __m128i b = _mm_packs_epi32(_mm_cvtps_epi32((__m128)v[2]), _mm_cvtps_epi32((__m128)v[3]));
  _mm_storeu_si128((__m128i*)q, _mm_packus_epi16(_mm_add_epi16(a, zero), _mm_add_epi16(b, zero)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kFloats)));
  const Floats big = spread(12582912.0f);  // 1.5 · 2^23: a sum with it has no fraction left
  for (int i = 0; i < 4; i++) {
    const Floats rounded = (greater(v[i], spread(r.least)) + big) - big;
    store(q + i * kFloats, __builtin_convertvector(__builtin_convertvector(rounded + spread(r.zero), Ints), Bytes));
  }
#endif
}

RESQ_INLINE void round_all(const float* x, int64_t n, Rounding r, uint8_t* q) {
  constexpr int64_t block = 4 * kFloats;
  if (n >= block) {
    for (int64_t i = 0; i < n; i += block) {
      int64_t at = smaller(i, n - block);  // the last block may write some values twice
      round_block(x + at, r, q + at);
    }
    return;
  }
#if defined(__AVX512BW__)
  const __m512 inverse = _mm512_set1_ps(r.inverse), low = _mm512_set1_ps(r.least), high = _mm512_set1_ps(r.most);
  const __m512i zero = _mm512_set1_epi32((int)r.zero);
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 lanes = (__mmask16)((1u << smaller(16, n - i)) - 1);
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), inverse);
    v = _mm512_min_ps(_mm512_max_ps(v, low), high);
    _mm512_mask_cvtepi32_storeu_epi8(q + i, lanes, _mm512_add_epi32(_mm512_cvtps_epi32(v), zero));
  }
#else
  float padded[block] = {};
  uint8_t bytes[block];
  for (int64_t i = 0; i < n; i++) padded[i] = x[i];
  round_block(padded, r, bytes);
  for (int64_t i = 0; i < n; i++) q[i] = bytes[i];
#endif
}

// One range: numerics/affine.py, asymmetric. -> q [n] and what a reader needs.
RESQ_INLINE void quantize_range(const float* x, int64_t n, int bits, float clip, bool half_scale, uint8_t* q,
                                float* scale_out, uint8_t* zero_out) {
  const int top = (1 << bits) - 1;
  float low, high;
  extremes(x, n, &low, &high);
  low *= clip, high *= clip;
  float range = high - low;
  range = range < 3.402823466e38f ? range : 3.402823466e38f;
  float scale = range * (float)(1.0 / top);
  if (half_scale) scale = half_to_float(float_to_half(scale < 65504.0f ? scale : 65504.0f));
  scale = scale >= 1.17549435e-38f ? scale : 1.0f;
  const float inverse = 1.0f / scale;
  float zero = -low * inverse;
  zero = zero < (float)top ? zero : (float)top;
  zero = round_even(zero);
  round_all(x, n, {inverse, zero, -zero, (float)top - zero}, q);
  *scale_out = scale;
  *zero_out = (uint8_t)zero;
}

// All bands and groups of a row x [n] -> q [n], scale and zero [bands · groups].
static void quantize_row(const Format& format, const float* x, uint8_t* q, float* scale, uint8_t* zero) {
  for (int b = 0; b < format.bands; b++) {
    const Band band = format.band[b];
    const int64_t step = band.size / format.groups;
    for (int64_t g = 0; g < format.groups; g++) {
      const int64_t at = band.begin + g * step;
      quantize_range(x + at, step, band.bits, band.clip, format.half_scale, q + at, scale++, zero++);
    }
  }
}

// ---- sources --------------------------------------------------------------------------------------------------------

// A row before its map: float32 x, SiLU(x) · up, or scale · (q - zero).
struct Input {
  const float* x = nullptr;
  const float* up = nullptr;
  const uint8_t* q = nullptr;
  double scale = 0, zero = 0;
};

constexpr int kFill = 2 * kDoubles;

// sigmoid(-|x|) as a quotient: with |x| = r - k ln 2 and e^-r = (Q - rP) / (Q + rP), Padé [6/6] (relative error below
// 2e-19 for |r| ≤ ln 2 / 2), it is 2^k (Q - rP) / ((Q + rP) + 2^k (Q - rP)).
struct Quotient {
  Doubles above, below;
};
RESQ_INLINE Quotient tail(Doubles x) {
  const Doubles size = magnitude(x, 700.0);  // e^-700 · x · up is far below the smallest float32
  // The sum's last bits are the integer k + 1023: shifted, they are the exponent of 2^k.
  const Doubles big = spread(6755399441055744.0 + 1023.0);
  const Doubles t = mul_add(size, spread(-1.4426950408889634), big);
  const Doubles k = t - big;
  const Doubles power = (Doubles)((Longs)t << 52);
  // ln 2 in two parts, the first of 33 bits so that its product with k is exact.
  Doubles r = mul_add(k, spread(6.93147180369123816490e-01), size);
  r = mul_add(k, spread(1.90821492927058770002e-10), r);
  const Doubles s = r * r;
  const Doubles q = mul_add(mul_add(s + spread(840.0), s, spread(75600.0)), s, spread(665280.0));
  const Doubles p = r * mul_add(mul_add(s, spread(42.0), spread(10080.0)), s, spread(332640.0));
  const Doubles above = power * (q - p);
  return {above, q + p + above};
}

// factor · SiLU(gate) · up for kFill values. For positive gates it is gate · up minus the tail's share, so that a gate
// far from zero gives the exact product, whose float32 may be a tie. Two vectors share one division, the slowest
// instruction here.
template <class T>
RESQ_INLINE void silu_mul(const float* gate, const float* up, double factor, T* out) {
  const Doubles x = widen(gate), y = widen(gate + kDoubles);
  const Quotient a = tail(x), b = tail(y);
  const Doubles inverse = 1.0 / (a.below * b.below);
  const Doubles whole_x = x * widen(up), whole_y = y * widen(up + kDoubles);
  const Doubles part_x = whole_x * (a.above * (inverse * b.below)), part_y = whole_y * (b.above * (inverse * a.below));
  put(out, (x < 0.0 ? part_x : whole_x - part_x) * factor);
  put(out + kDoubles, (y < 0.0 ? part_y : whole_y - part_y) * factor);
}

// factor · the input's coordinates for kFill values from `at` on.
template <class T>
RESQ_INLINE void fill_block(const Input& in, int64_t at, double factor, T* out) {
  if (in.up) return silu_mul(in.x + at, in.up + at, factor, out);
  RESQ_UNROLL
  for (int i = 0; i < kFill; i += kDoubles) {
    Doubles v;
    if (in.q)
      for (int lane = 0; lane < kDoubles; lane++) v[lane] = ((double)in.q[at + i + lane] - in.zero) * in.scale;
    else
      v = widen(in.x + at + i);
    put(out + i, v * factor);
  }
}

// factor · the input's coordinates begin … begin + count - 1, float64 or rounded to float32.
template <class T>
static void fill(const Input& in, int64_t begin, int64_t count, double factor, T* out) {
  const Input whole = in;  // a copy that `out` cannot alias
  int64_t i = 0;
  for (; i + kFill <= count; i += kFill) fill_block(whole, begin + i, factor, out + i);
  if (i == count) return;
  float x[kFill] = {}, up[kFill] = {};
  uint8_t q[kFill] = {};
  T last[kFill];
  const Input rest = {x, in.up ? up : nullptr, in.q ? q : nullptr, in.scale, in.zero};
  for (int64_t j = 0; j < count - i; j++) {
    if (in.x) x[j] = in.x[begin + i + j];
    if (in.up) up[j] = in.up[begin + i + j];
    if (in.q) q[j] = in.q[begin + i + j];
  }
  fill_block(rest, 0, factor, last);
  for (int64_t j = 0; i < count; i++, j++) out[i] = last[j];
}

// 1 / sqrt(mean(x²) + eps). A square of a float32 is exact in float64; 32 partial sums on every instruction set.
RESQ_INLINE double inverse_rms(const float* x, int64_t n, double eps) {
  Doubles part[32 / kDoubles] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    RESQ_UNROLL
    for (int j = 0; j < 32 / kDoubles; j++) {
      const Doubles v = widen(x + i + j * kDoubles);
      part[j] = mul_add(v, v, part[j]);
    }
  }
  double sums[32];
  RESQ_UNROLL
  for (int j = 0; j < 32 / kDoubles; j++) store(sums + j * kDoubles, part[j]);
  for (int lane = 0; i < n; i++, lane++) sums[lane] += (double)x[i] * (double)x[i];
  for (int step = 16; step; step /= 2)
    for (int lane = 0; lane < step; lane++) sums[lane] += sums[lane + step];
  return 1.0 / __builtin_sqrt(sums[0] / (double)n + eps);
}

// RMSNorm of a row, float64 or rounded to float32.
template <class T>
RESQ_INLINE void normalise(const Norm& norm, const float* x, int64_t n, T* out) {
  const double inverse = inverse_rms(x, n, norm.eps);
  int64_t i = 0;
  if (norm.gain)
    for (; i + kDoubles <= n; i += kDoubles) put(out + i, widen(x + i) * inverse * load<Doubles>(norm.gain + i));
  else
    for (; i + kDoubles <= n; i += kDoubles) put(out + i, widen(x + i) * inverse);
  for (; i < n; i++) {
    const double y = (double)x[i] * inverse;
    out[i] = (T)(norm.gain ? y * norm.gain[i] : y);
  }
}

// ---- maps -----------------------------------------------------------------------------------------------------------

// C [m, n] = A [m, k] B [k, n] in float64, each output one chain of sums over k. A(i, l) = a[i · ai + l · al].

RESQ_INLINE Doubles widened(const float* p) { return widen(p); }
RESQ_INLINE Doubles widened(const double* p) { return load<Doubles>(p); }

// Columns that a product's inner loop keeps in registers, and rows it takes between visits to memory: 64 rows of a
// large B are as many pages as an L1 TLB holds.
constexpr int kRowTile = 4, kColumnTile = kDoubles == 8 ? 4 : 2, kDepth = 64;

// M rows and V vectors of columns; `from` (null: zeros) has what the rows of B before b contribute.
template <int M, int V, class B, class C>
RESQ_INLINE void product_tile(const double* a, int64_t ai, int64_t al, const B* b, int64_t ldb, int64_t k,
                              const double* from, int64_t ldfrom, C* c, int64_t ldc) {
  Doubles sum[M][V];
  RESQ_UNROLL
  for (int i = 0; i < M; i++) {
    RESQ_UNROLL
    for (int j = 0; j < V; j++) sum[i][j] = from ? load<Doubles>(from + i * ldfrom + j * kDoubles) : Doubles{};
  }
  for (int64_t l = 0; l < k; l++) {
    Doubles row[V];
    RESQ_UNROLL
    for (int j = 0; j < V; j++) row[j] = widened(b + l * ldb + j * kDoubles);
    RESQ_UNROLL
    for (int i = 0; i < M; i++) {
      const Doubles x = spread(a[i * ai + l * al]);
      RESQ_UNROLL
      for (int j = 0; j < V; j++) sum[i][j] = mul_add(x, row[j], sum[i][j]);
    }
  }
  RESQ_UNROLL
  for (int i = 0; i < M; i++) {
    RESQ_UNROLL
    for (int j = 0; j < V; j++) put(c + i * ldc + j * kDoubles, sum[i][j]);
  }
}

template <int M, class B, class C>
static void product_rows(const double* a, int64_t ai, int64_t al, const B* b, int64_t ldb, int64_t k, int64_t n,
                         const double* from, int64_t ldfrom, C* c, int64_t ldc) {
  constexpr int wide = M == 1 ? 2 * kColumnTile : kColumnTile;
  int64_t at = 0;
  // Columns already done may be done again where the rest is no whole number of vectors: out of place, that is safe.
#define RESQ_TILE(V) \
  product_tile<M, V>(a, ai, al, b + at, ldb, k, from ? from + at : from, ldfrom, c + at, ldc); \
  at += V * kDoubles
  while (n - at >= wide * kDoubles) { RESQ_TILE(wide); }
  while (wide > 2 && n - at > 2 * kDoubles && n >= 4 * kDoubles) {
    at = smaller(at, n - 4 * kDoubles);
    RESQ_TILE(4);
  }
  while (n - at > kDoubles && n >= 2 * kDoubles) {
    at = smaller(at, n - 2 * kDoubles);
    RESQ_TILE(2);
  }
  while (at < n && n >= kDoubles) {
    at = smaller(at, n - kDoubles);
    RESQ_TILE(1);
  }
#undef RESQ_TILE
  for (; at < n; at++)
    for (int i = 0; i < M; i++) {
      double sum = from ? from[i * ldfrom + at] : 0;
      for (int64_t l = 0; l < k; l++) sum += a[i * ai + l * al] * (double)b[l * ldb + at];
      c[i * ldc + at] = (C)sum;
    }
}

template <class B, class C>
static void product_slab(const double* a, int64_t ai, int64_t al, const B* b, int64_t ldb, int64_t m, int64_t k,
                         int64_t n, const double* from, int64_t ldfrom, C* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + kRowTile <= m; i += kRowTile)
    product_rows<kRowTile>(a + i * ai, ai, al, b, ldb, k, n, from ? from + i * ldfrom : from, ldfrom, c + i * ldc, ldc);
  for (; i < m; i++)
    product_rows<1>(a + i * ai, ai, al, b, ldb, k, n, from ? from + i * ldfrom : from, ldfrom, c + i * ldc, ldc);
}

// `sums` [2, m, n] holds partial results where k is above kDepth: read from one half, written to the other, because
// columns may be done twice.
template <class B>
static void product(const double* a, int64_t lda, const B* b, int64_t ldb, int64_t m, int64_t k, int64_t n,
                    double* sums, float* c, int64_t ldc) {
  const double* from = nullptr;
  double* to = sums;
  int64_t l = 0;
  for (; k - l > kDepth; l += kDepth) {
    product_slab(a + l, lda, 1, b + l * ldb, ldb, m, kDepth, n, from, n, to, n);
    from = to;
    to = to == sums ? sums + m * n : sums;
  }
  product_slab(a + l, lda, 1, b + l * ldb, ldb, m, k - l, n, from, n, c, ldc);
}

// A factor of signs, four rows at a time: the 16 sums ± a ± b ± c ± d of four coordinates lie in two registers, and
// every output adds the one that its column's four signs select, with half the work of four products. Only AVX-512
// permutes two registers; below order 64 the sums are not used often enough.
RESQ_INLINE bool by_signs(const Map& map) {
#if defined(__AVX512F__)
  return map.kind == MapKind::hadamard && map.factor_signs && map.inner == 1 && map.order >= 64 && map.order % 4 == 0;
#else
  (void)map;
  return false;
#endif
}

#if defined(__AVX512F__)
// index [order / 4, order]: bit r of (i, j) is the sign of factor[4 i + r, j].
static void select_signs(const Map& map, int64_t* index) {
  const int64_t order = map.order;
  for (int64_t i = 0; i < order; i += 4, index += order)
    for (int64_t j = 0; j < order; j += 8) {
      const int64_t at = smaller(j, order - 8);
      __m512i bits = _mm512_setzero_si512();
      RESQ_UNROLL
      for (int r = 3; r >= 0; r--) {
        const __m512i entry = load<__m512i>(map.factor + (i + r) * order + at);
        bits = _mm512_or_si512(_mm512_add_epi64(bits, bits), _mm512_srli_epi64(entry, 63));
      }
      store(index + at, bits);
    }
}

template <int M, int V>
static void signed_tile(const double* x, const int64_t* index, int64_t order, double* y) {
  const Doubles one = {1, -1, 1, -1, 1, -1, 1, -1}, two = {1, 1, -1, -1, 1, 1, -1, -1};
  const Doubles four = {1, 1, 1, 1, -1, -1, -1, -1};
  Doubles sum[M][V] = {};
  for (int64_t i = 0; i < order; i += 4, index += order) {
    __m512d plus[M], minus[M];
    RESQ_UNROLL
    for (int m = 0; m < M; m++) {
      const double* from = x + m * order + i;
      const Doubles three = mul_add(spread(from[0]), one, mul_add(spread(from[1]), two, spread(from[2]) * four));
      plus[m] = (__m512d)(three + spread(from[3]));
      minus[m] = (__m512d)(three - spread(from[3]));
    }
    RESQ_UNROLL
    for (int v = 0; v < V; v++) {
      const __m512i select = load<__m512i>(index + v * 8);
      RESQ_UNROLL
      for (int m = 0; m < M; m++) sum[m][v] += (Doubles)_mm512_permutex2var_pd(plus[m], select, minus[m]);
    }
  }
  RESQ_UNROLL
  for (int m = 0; m < M; m++) {
    RESQ_UNROLL
    for (int v = 0; v < V; v++) store(y + m * order + v * 8, sum[m][v]);
  }
}

template <int V>
static void signed_columns(const double* x, const int64_t* index, int64_t m, int64_t order, double* y) {
  // The last tile may do some columns again.
  for (int64_t j = 0; j < order; j += V * 8) {
    const int64_t at = smaller(j, order - V * 8);
    int64_t i = 0;
    for (; i + 2 <= m; i += 2) signed_tile<2, V>(x + i * order, index + at, order, y + i * order + at);
    for (; i < m; i++) signed_tile<1, V>(x + i * order, index + at, order, y + i * order + at);
  }
}

// y [m, order] = x F.
static void signed_product(const double* x, const int64_t* index, int64_t m, int64_t order, double* y) {
  const int64_t vectors = (order + 7) / 8;
  int64_t tiles = (vectors + 10) / 11;
  if (tiles == 1 && order % 8) tiles = 2;
  switch ((vectors + tiles - 1) / tiles) {
    case 11: return signed_columns<11>(x, index, m, order, y);
    case 10: return signed_columns<10>(x, index, m, order, y);
    case 9: return signed_columns<9>(x, index, m, order, y);
    case 8: return signed_columns<8>(x, index, m, order, y);
    case 7: return signed_columns<7>(x, index, m, order, y);
    case 6: return signed_columns<6>(x, index, m, order, y);
    default: return signed_columns<5>(x, index, m, order, y);
  }
}
#endif

// H_R on v[0 … R), smallest distances first: the order of sums is the same whatever the width of a vector.
template <int R, class V>
RESQ_INLINE void butterflies(V* v) {
  if constexpr (R > 1) {
    butterflies<R / 2>(v);
    butterflies<R / 2>(v + R / 2);
    RESQ_UNROLL
    for (int i = 0; i < R / 2; i++) {
      const V a = v[i], b = v[i + R / 2];
      v[i] = a + b;
      v[i + R / 2] = a - b;
    }
  }
}

// H over the lanes of a vector: the sum with a neighbour, signs exact in either form of `mul_add`.
RESQ_INLINE Doubles lane_butterflies(Doubles v) {
#if defined(__AVX512F__)
  const Doubles one = {1, -1, 1, -1, 1, -1, 1, -1}, two = {1, 1, -1, -1, 1, 1, -1, -1};
  const Doubles four = {1, 1, 1, 1, -1, -1, -1, -1};
  v = mul_add(v, one, (Doubles)_mm512_permute_pd((__m512d)v, 0x55));
  v = mul_add(v, two, (Doubles)_mm512_permutex_pd((__m512d)v, 0x4E));
  return mul_add(v, four, (Doubles)_mm512_shuffle_f64x2((__m512d)v, (__m512d)v, 0x4E));
#elif defined(__AVX2__)
  const Doubles one = {1, -1, 1, -1}, two = {1, 1, -1, -1};
  v = mul_add(v, one, (Doubles)_mm256_permute_pd((__m256d)v, 0x5));
  return mul_add(v, two, (Doubles)_mm256_permute4x64_pd((__m256d)v, 0x4E));
#else
  return Doubles{v[0] + v[1], v[0] - v[1]};
#endif
}

// H on every R · kDoubles contiguous coordinates of x [n], in place.
template <int R>
static void contiguous_pass(double* x, int64_t n) {
  for (double* end = x + n; x < end; x += R * kDoubles) {
    Doubles v[R];
    RESQ_UNROLL
    for (int i = 0; i < R; i++) v[i] = lane_butterflies(load<Doubles>(x + i * kDoubles));
    butterflies<R>(v);
    RESQ_UNROLL
    for (int i = 0; i < R; i++) store(x + i * kDoubles, v[i]);
  }
}

template <int R, class V, class T>
RESQ_INLINE void strided_butterflies(const double* x, T* y, int64_t stride) {
  V v[R];
  RESQ_UNROLL
  for (int i = 0; i < R; i++) v[i] = load<V>(x + i * stride);
  butterflies<R>(v);
  RESQ_UNROLL
  for (int i = 0; i < R; i++) put(y + i * stride, v[i]);
}

// H_R over coordinates `stride` apart of x [n]; y is x itself or float32.
template <int R, class T>
static void strided_pass(const double* x, T* y, int64_t stride, int64_t n) {
  for (int64_t block = 0; block < n; block += R * stride) {
    int64_t at = block;
    const int64_t end = block + stride;
    for (; at + kDoubles <= end; at += kDoubles) strided_butterflies<R, Doubles>(x + at, y + at, stride);
#if defined(__AVX512F__)
    // Orders of Hadamard factors are multiples of 4 and often not of 8.
    for (; at + 4 <= end; at += 4) strided_butterflies<R, Quad>(x + at, y + at, stride);
#endif
    for (; at < end; at++) strided_butterflies<R, double>(x + at, y + at, stride);
  }
}

template <class T>
static void strided_pass(int64_t radix, const double* x, T* y, int64_t stride, int64_t n) {
  switch (radix) {
    case 16:
      if constexpr (kRadix == 16) strided_pass<16>(x, y, stride, n);
      return;
    case 8: return strided_pass<8>(x, y, stride, n);
    case 4: return strided_pass<4>(x, y, stride, n);
    case 2: return strided_pass<2>(x, y, stride, n);
    default: return strided_pass<1>(x, y, stride, n);
  }
}

// size^-0.5 with one rounding: the quotient's two roundings are corrected by its residual.
RESQ_INLINE double inverse_root(double size) {
  const double y = 1.0 / __builtin_sqrt(size), square = y * y;
  const double residual = __builtin_fma(-size, square, 1.0) - size * __builtin_fma(y, y, -square);
  return y + 0.5 * y * residual;
}

// Cuts T = H_power (x) F_order (x) I_inner into steps. The row is `last` chunks; a chunk is brought in, multiplied by
// F and by the small butterflies while it stays in the first-level cache; one pass of `last` over the chunks ends it.
struct HadamardSteps {
  int64_t block;  // coordinates that the first step joins, or the distance of those the butterflies join
  int64_t chunk, last;
};
RESQ_INLINE HadamardSteps hadamard_steps(const Map& map) {
  HadamardSteps s;
  s.block = map.order * map.inner;
  if (s.block == 1) s.block = smaller(map.power, kRadix * kDoubles);
  int levels = 0, most = 0;
  while (s.block << levels < map.n) levels++;
  while (1 << most < kRadix) most++;
  const int passes = (levels + most - 1) / most;
  const int end = passes ? (levels + passes - 1) / passes : 0;
  s.last = (int64_t)1 << end;
  s.chunk = map.n >> end;
  return s;
}

// y [n] = x T. work [n]; chunk [one chunk] where there is a dense factor; signs: its signs, where `by_signs`.
static void hadamard(const Map& map, const Input& in, double* work, double* chunk, const int64_t* signs, float* y) {
  (void)signs;  // unused on some instruction sets
  const HadamardSteps s = hadamard_steps(map);
  const int64_t order = map.order, inner = map.inner, unit = order * inner;
  const double factor = inverse_root((double)(map.power * order));
  for (int64_t at = 0; at < map.n; at += s.chunk) {
    double* out = work + at;
    if (order == 1) {
      fill(in, at, s.chunk, factor, out);
    } else {
      fill(in, at, s.chunk, factor, chunk);
#if defined(__AVX512F__)
      if (by_signs(map))
        signed_product(chunk, signs, s.chunk / order, order, out);
      else
#endif
      if (inner == 1)
        product_slab(chunk, order, 1, map.factor, order, s.chunk / order, order, order, nullptr, 0, out, order);
      else
        for (int64_t i = 0; i < s.chunk; i += unit)
          product_slab(map.factor, 1, order, chunk + i, inner, order, order, inner, nullptr, 0, out + i, inner);
    }
    int64_t done = s.block;
    if (unit == 1) {
      switch (s.block / kDoubles) {
        case 16:
          if constexpr (kRadix == 16) contiguous_pass<16>(out, s.chunk);
          break;
        case 8: contiguous_pass<8>(out, s.chunk); break;
        case 4: contiguous_pass<4>(out, s.chunk); break;
        case 2: contiguous_pass<2>(out, s.chunk); break;
        case 1: contiguous_pass<1>(out, s.chunk); break;
        default:  // fewer coordinates than lanes
          for (int64_t step = 1; step < s.block; step *= 2) strided_pass(2, out, out, step, s.chunk);
      }
    }
    while (done < s.chunk) {
      const int64_t radix = smaller(s.last, s.chunk / done);
      strided_pass(radix, out, out, done, s.chunk);
      done *= radix;
    }
  }
  strided_pass(s.last, work, y, s.chunk, map.n);
}

// ---- a row from float to float --------------------------------------------------------------------------------------

// Scratch memory in pieces; the same calls with a null base add up its size.
struct Arena {
  uintptr_t at;
  template <class T>
  T* take(int64_t count) {
    at = (at + 63) & ~(uintptr_t)63;
    T* p = (T*)at;
    at += (uintptr_t)count * sizeof(T);
    return p;
  }
};

struct ProjectScratch {
  double* rows;    // dense and per-head maps: the rows in float64; hadamard: a chunk
  double* work;    // partial results
  float* values;   // one row, before a rounding or a gather
  uint8_t* q;      // the rounded map input of one row
  int64_t* signs;  // of a hadamard factor, where `by_signs`
};
static ProjectScratch project_layout(const Format& format, int64_t n, int64_t count, Arena* arena) {
  const Map& map = format.map;
  const bool product = map.kind == MapKind::dense || map.kind == MapKind::per_head;
  const bool factor = map.kind == MapKind::hadamard && map.order > 1;
  const int64_t depth = product ? n / map.heads : 0;
  ProjectScratch s;
  s.rows = arena->take<double>(product ? count * n : factor ? hadamard_steps(map).chunk : 0);
  s.work = arena->take<double>(map.kind == MapKind::hadamard ? n : depth > kDepth ? 2 * count * depth : 0);
  s.values = arena->take<float>(n);
  s.q = arena->take<uint8_t>(n);
  s.signs = arena->take<int64_t>(by_signs(map) ? map.order * map.order / 4 : 0);
  return s;
}

// What all rows share; once per call of an operator.
static void prepare(const Format& format, const ProjectScratch& s) {
  (void)format, (void)s;  // unused on some instruction sets
#if defined(__AVX512F__)
  if (by_signs(format.map)) select_signs(format.map, s.signs);
#endif
}

// Whether the format leaves a float32 row as it is before its bands.
RESQ_INLINE bool keeps(const Format& format) { return format.map.kind == MapKind::none && !format.map_input_bits; }

// One row as the map reads it: rounded where the format says so.
RESQ_INLINE Input map_input(const Format& format, Input in, int64_t n, const ProjectScratch& s) {
  if (!format.map_input_bits) return in;
  if (in.up) {
    fill(in, 0, n, 1.0, s.values);
    in.x = s.values;
  }
  float scale;
  uint8_t zero;
  quantize_range(in.x, n, format.map_input_bits, 1.0f, false, s.q, &scale, &zero);
  return {nullptr, nullptr, s.q, (double)scale, (double)zero};
}

// ActivationFormat.project: `count` rows x [n], or SiLU(x) · up where up is given -> y float32. For a dense map, more
// rows at a time read its matrix less often.
static void project(const Format& format, const float* x, int64_t ldx, const float* up, int64_t ldup, int64_t count,
                    int64_t n, float* y, int64_t ldy, const ProjectScratch& s) {
  const Map& map = format.map;
  for (int64_t i = 0; i < count; i++) {
    Input in;
    in.x = x + i * ldx;
    in.up = up ? up + i * ldup : nullptr;
    in = map_input(format, in, n, s);
    switch (map.kind) {
      case MapKind::none: fill(in, 0, n, 1.0, y + i * ldy); break;
      case MapKind::permutation: {
        const float* from = in.x;
        if (in.up || in.q) {
          fill(in, 0, n, 1.0, s.values);  // rounding to float32 and gathering commute
          from = s.values;
        }
        float* out = y + i * ldy;
        for (int64_t j = 0; j < n; j++) out[j] = from[map.index[j]];
        break;
      }
      case MapKind::hadamard: hadamard(map, in, s.work, s.rows, s.signs, y + i * ldy); break;
      case MapKind::dense:
      case MapKind::per_head: fill(in, 0, n, 1.0, s.rows + i * n); break;
    }
  }
  if (map.kind != MapKind::dense && map.kind != MapKind::per_head) return;
  const int64_t heads = map.kind == MapKind::dense ? 1 : map.heads, h = n / heads;
  for (int64_t head = 0; head < heads; head++) {
    const double* in = s.rows + head * h;
    float* out = y + head * h;
    if (map.matrix) product(in, n, map.matrix + head * h * h, h, count, h, h, s.work, out, ldy);
    else product(in, n, map.matrix64 + head * h * h, h, count, h, h, s.work, out, ldy);
  }
}

}  // namespace rows

// ---- the operator ---------------------------------------------------------------------------------------------------

// Rows taken together where a matrix is read for them.
RESQ_INLINE int64_t activation_rows(const ActivationCall& call) {
  const MapKind kind = call.format->map.kind;
  return kind == MapKind::dense || kind == MapKind::per_head ? 8 : 1;
}

struct ActivationScratch {
  float* normed;     // [rows, n]
  float* projected;  // [rows, n]
  rows::ProjectScratch project;
};
static ActivationScratch activation_layout(const ActivationCall& call, rows::Arena* arena) {
  const int64_t count = activation_rows(call);
  ActivationScratch s;
  s.normed = arena->take<float>(call.source == Source::norm ? count * call.n : 0);
  s.projected = arena->take<float>(count * call.n);
  s.project = rows::project_layout(*call.format, call.n, count, arena);
  return s;
}

static size_t activation_scratch(const ActivationCall& call) {
  rows::Arena arena = {0};
  activation_layout(call, &arena);
  return arena.at + 64;
}

static void activate(const ActivationCall& call, int64_t begin, int64_t end, void* scratch) {
  rows::Arena arena = {(uintptr_t)scratch};
  const ActivationScratch s = activation_layout(call, &arena);
  const Format& format = *call.format;
  rows::prepare(format, s.project);
  const int64_t n = call.n, together = activation_rows(call), ranges = format.bands * format.groups;
  const bool silu = call.source == Source::silu_mul;
  for (int64_t row = begin; row < end; row += together) {
    const int64_t count = smaller(together, end - row);
    const float* y = call.x + row * call.ldx;
    int64_t ldy = call.ldx;
    if (call.source == Source::norm) {
      float* to = !format.bands && rows::keeps(format) ? call.plain + row * n : s.normed;
      for (int64_t i = 0; i < count; i++) rows::normalise(call.norm, y + i * ldy, n, to + i * n);
      y = to, ldy = n;
    }
    if (silu || !rows::keeps(format)) {
      float* to = format.bands ? s.projected : call.plain + row * n;
      const float* up = silu ? call.up + row * call.ldup : nullptr;
      rows::project(format, y, ldy, up, call.ldup, count, n, to, n, s.project);
      y = to, ldy = n;
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t r = row + i;
      if (format.bands)
        rows::quantize_row(format, y + i * ldy, call.out.q + r * call.out.ld, call.out.scale + r * ranges,
                           call.out.zero + r * ranges);
      else if (y + i * ldy != call.plain + r * n)
        __builtin_memcpy(call.plain + r * n, y + i * ldy, (size_t)n * sizeof(float));
    }
  }
}
