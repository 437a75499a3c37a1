// Vectors, in two widths, and the helpers that all kernels share.
//
// F16 and I16 have 16 lanes on every instruction set, so that sums over lanes have one order. Floats, Doubles, Ints and
// Words have the machine's own width, for work where every number has a lane of its own: compilers split wider vectors
// badly where they shuffle or convert.
//
// Included once per instruction-set file, inside that file's own anonymous namespace: every function here is static to
// it, and no template of the standard library may be used in kernels (its inline copies would be shared between files
// that were compiled for different machines).
//
// No operation here contracts a product and a sum (the files are built with -ffp-contract=off); `fma` is one rounding
// on every instruction set, `mul_add` is whatever is fastest.

#define RESQ_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define RESQ_UNROLL _Pragma("clang loop unroll(full)")
#else
#define RESQ_UNROLL _Pragma("GCC unroll 16")
#endif

RESQ_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
RESQ_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
RESQ_INLINE int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounded up

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

// ---- the machine's own width ----------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kDoubles = 8, kFloats = 16;
#elif defined(__AVX2__)
constexpr int kDoubles = 4, kFloats = 8;
#else
constexpr int kDoubles = 2, kFloats = 4;
#endif
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));
typedef float Floats __attribute__((vector_size(4 * kFloats)));
typedef int32_t Ints __attribute__((vector_size(4 * kFloats)));
typedef uint32_t Words __attribute__((vector_size(4 * kFloats)));
typedef float Singles __attribute__((vector_size(4 * kDoubles)));  // as many float32 as Doubles has lanes
typedef double Quad __attribute__((vector_size(32)));
typedef float QuadSingles __attribute__((vector_size(16)));

// x in every lane. x - 0 is x for every x and so no instruction; 0 + x would turn -0 into 0.
RESQ_INLINE Doubles spread(double x) { return x - Doubles{}; }
RESQ_INLINE Floats spread(float x) { return x - Floats{}; }
RESQ_INLINE Ints spread(int32_t x) { return x - Ints{}; }

RESQ_INLINE Doubles widen(const float* p) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(p));
#elif defined(__SSE2__)
  return (Doubles)_mm_cvtps_pd(_mm_castpd_ps(_mm_set_sd(load<double>(p))));
#else
  return __builtin_convertvector(load<Singles>(p), Doubles);
#endif
}

// Write 1, 4 or kDoubles values as they are or rounded to float32.
RESQ_INLINE void put(double* p, Doubles v) { store(p, v); }
RESQ_INLINE void put(double* p, double v) { *p = v; }
RESQ_INLINE void put(float* p, double v) { *p = (float)v; }
RESQ_INLINE void put(float* p, Doubles v) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(p, _mm512_cvtpd_ps((__m512d)v));
#elif defined(__AVX2__)
  _mm_storeu_ps(p, _mm256_cvtpd_ps((__m256d)v));
#elif defined(__SSE2__)
  store(p, _mm_cvtsd_f64(_mm_castps_pd(_mm_cvtpd_ps((__m128d)v))));
#else
  store(p, __builtin_convertvector(v, Singles));
#endif
}
#if defined(__AVX512F__)
RESQ_INLINE void put(double* p, Quad v) { store(p, v); }
RESQ_INLINE void put(float* p, Quad v) { store(p, __builtin_convertvector(v, QuadSingles)); }
#endif

// a · b + c, rounded once where that is as fast as twice.
RESQ_INLINE Doubles mul_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}
RESQ_INLINE Floats mul_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

RESQ_INLINE Floats lesser(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
RESQ_INLINE Floats greater(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// ---- 16 lanes -------------------------------------------------------------------------------------------------------

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));

RESQ_INLINE F16 splat(float x) { return x - F16{}; }
RESQ_INLINE I16 splat32(int32_t x) { return I16{} + x; }
RESQ_INLINE F16 to_float(I16 x) { return __builtin_convertvector(x, F16); }

#if defined(__AVX2__) && !defined(__AVX512F__)
struct Halves { Floats low, high; };
RESQ_INLINE Halves halves(F16 a) { Halves h; __builtin_memcpy(&h, &a, 64); return h; }
RESQ_INLINE F16 whole(Halves h) { F16 a; __builtin_memcpy(&a, &h, 64); return a; }
#endif

// a · b + c with one rounding.
RESQ_INLINE F16 fma(F16 a, F16 b, F16 c) {
#if defined(__AVX512F__)
  return mul_add(a, b, c);
#elif defined(__AVX2__)
  const Halves x = halves(a), y = halves(b), z = halves(c);
  return whole({mul_add(x.low, y.low, z.low), mul_add(x.high, y.high, z.high)});
#else
  F16 r;
  for (int i = 0; i < 16; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}
#if !defined(__AVX512F__)
RESQ_INLINE F16 mul_add(F16 a, F16 b, F16 c) {
#if defined(__AVX2__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}
#endif

// The sum over lanes: lane i with i + 8, then 4, 2, 1.
RESQ_INLINE float sum(F16 v) {
  float x[16];
  store(x, v);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] += x[i + step];
  return x[0];
}

// ---- single numbers -------------------------------------------------------------------------------------------------

// Nearest integer, halves to even; |x| must be below 2^22.
RESQ_INLINE float round_even(float x) { const float big = 12582912.0f; volatile float y = x + big; return y - big; }

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
