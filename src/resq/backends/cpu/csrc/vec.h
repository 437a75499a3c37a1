// Vectors of 16 float32 and of 8 float64, the same lanes whatever the instruction set, so that sums have one order.
//
// Included once per instruction-set file, inside that file's own anonymous namespace: every function here is static to
// it, and no template of the standard library may be used in kernels (its inline copies would be shared between files
// that were compiled for different machines).
//
// No operation here contracts a product and a sum (the files are built with -ffp-contract=off); `fma` is one rounding
// on every instruction set, `mul_add` is whatever is fastest.

#define RESQ_INLINE static inline __attribute__((always_inline))

typedef float F16 __attribute__((vector_size(64)));       // 16 float32
typedef int32_t I16 __attribute__((vector_size(64)));     // 16 int32
typedef double D8 __attribute__((vector_size(64)));       // 8 float64
typedef int64_t L8 __attribute__((vector_size(64)));      // 8 int64
typedef float F8 __attribute__((vector_size(32)));        // 8 float32
typedef uint8_t B16 __attribute__((vector_size(16)));     // 16 bytes

template <class V, class T>
RESQ_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
RESQ_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// Minus zero is exact for either sign of x, and no operation at all.
RESQ_INLINE F16 splat(float x) { return x - F16{}; }
RESQ_INLINE D8 splat64(double x) { return x - D8{}; }
RESQ_INLINE I16 splat32(int32_t x) { return I16{} + x; }

RESQ_INLINE F16 vmin(F16 a, F16 b) {
#if defined(__AVX512F__)
  return (F16)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}
RESQ_INLINE F16 vmax(F16 a, F16 b) {
#if defined(__AVX512F__)
  return (F16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
struct Halves { F8 low, high; };
RESQ_INLINE Halves halves(F16 a) { Halves h; __builtin_memcpy(&h, &a, 64); return h; }
RESQ_INLINE F16 whole(Halves h) { F16 a; __builtin_memcpy(&a, &h, 64); return a; }
#endif

// a · b + c with one rounding.
RESQ_INLINE F16 fma(F16 a, F16 b, F16 c) {
#if defined(__AVX512F__)
  return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  Halves x = halves(a), y = halves(b), z = halves(c);
  return whole({(F8)_mm256_fmadd_ps((__m256)x.low, (__m256)y.low, (__m256)z.low),
                (F8)_mm256_fmadd_ps((__m256)x.high, (__m256)y.high, (__m256)z.high)});
#else
  F16 r;
  for (int i = 0; i < 16; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}
// a · b + c, with one rounding where that is as fast as two.
RESQ_INLINE F16 mul_add(F16 a, F16 b, F16 c) {
#if defined(__AVX2__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}
RESQ_INLINE D8 mul_add(D8 a, D8 b, D8 c) {
#if defined(__AVX512F__)
  return (D8)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  typedef double D4 __attribute__((vector_size(32)));
  D4 x[2], y[2], z[2];
  __builtin_memcpy(x, &a, 64); __builtin_memcpy(y, &b, 64); __builtin_memcpy(z, &c, 64);
  for (int i = 0; i < 2; i++) z[i] = (D4)_mm256_fmadd_pd((__m256d)x[i], (__m256d)y[i], (__m256d)z[i]);
  D8 r;
  __builtin_memcpy(&r, z, 64);
  return r;
#else
  return a * b + c;
#endif
}

// Nearest integer, halves to even; |x| must be below 2^22 (float32) or 2^51 (float64).
RESQ_INLINE F16 round_even(F16 x) { const F16 big = splat(12582912.0f); return (x + big) - big; }
RESQ_INLINE D8 round_even(D8 x) { const D8 big = splat64(6755399441055744.0); return (x + big) - big; }
RESQ_INLINE float round_even(float x) { const float big = 12582912.0f; volatile float y = x + big; return y - big; }

RESQ_INLINE F16 to_float(I16 x) { return __builtin_convertvector(x, F16); }
RESQ_INLINE I16 to_int(F16 x) { return __builtin_convertvector(x, I16); }  // towards zero
RESQ_INLINE D8 to_double(F8 x) { return __builtin_convertvector(x, D8); }
RESQ_INLINE F8 to_float(D8 x) { return __builtin_convertvector(x, F8); }
RESQ_INLINE I16 widen(B16 x) { return __builtin_convertvector(x, I16); }  // uint8 -> int32
RESQ_INLINE B16 narrow(I16 x) {                                           // int32 0 … 255 -> uint8
#if defined(__AVX512F__)
  return (B16)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return __builtin_convertvector(x, B16);
#endif
}

// Sums and extremes over lanes, in one order: lane i with i + 8, then 4, 2, 1.
RESQ_INLINE float sum(F16 v) {
  float x[16];
  store(x, v);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] += x[i + step];
  return x[0];
}
RESQ_INLINE double sum(D8 v) {
  double x[8];
  store(x, v);
  for (int step = 4; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] += x[i + step];
  return x[0];
}
RESQ_INLINE float least(F16 v) {
  float x[16];
  store(x, v);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] = x[i] < x[i + step] ? x[i] : x[i + step];
  return x[0];
}
RESQ_INLINE float most(F16 v) {
  float x[16];
  store(x, v);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] = x[i] > x[i + step] ? x[i] : x[i + step];
  return x[0];
}

// float16 <-> float32, halves to even, any finite value (written out: the baseline has no instruction for it).
RESQ_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7FFFu;
  float value;
  if (rest >= 0x7C00u) {
    uint32_t bits = sign | 0x7F800000u | ((rest & 0x3FFu) << 13);
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  // rest · 2^13 read as float32 is the magnitude · 2^-112, subnormals included.
  uint32_t bits = rest << 13;
  __builtin_memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112
  uint32_t out;
  __builtin_memcpy(&out, &value, 4);
  out |= sign;
  __builtin_memcpy(&value, &out, 4);
  return value;
}
RESQ_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
  if (rest >= 0x477FF000u) return (uint16_t)(sign | (rest > 0x7F800000u ? 0x7E00u : 0x7C00u));  // rounds past 65504
  if (rest < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, rounded by the float32 adder
    float magnitude;
    __builtin_memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    uint32_t sum_bits;
    __builtin_memcpy(&sum_bits, &magnitude, 4);
    return (uint16_t)(sign | (sum_bits - 0x3F000000u));
  }
  rest += 0xFFFu + (rest >> 13 & 1u);
  return (uint16_t)(sign | ((rest - 0x38000000u) >> 13));
}
