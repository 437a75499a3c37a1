// Linears over plain weights [out, in], float32, bfloat16 or float16, read row by row where they lie (a mapped file).
//
// Each (row, output) sum has 16 lanes over the columns, added in one order at the end, whatever the block it is in.

RESQ_INLINE F16 weights(const float* w) { return load<F16>(w); }

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };
typedef uint16_t U16x16 __attribute__((vector_size(32)));

RESQ_INLINE F16 weights(const Bf16* w) {
  const U16x16 raw = load<U16x16>(w);
  return (F16)(__builtin_convertvector(raw, I16) << 16);
}
RESQ_INLINE F16 weights(const Half* w) {
#if defined(__AVX512F__)
  return (F16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)w));
#elif defined(__F16C__)
  return whole({(Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w)),
                (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w + 1))});
#else
  F16 v;
  for (int i = 0; i < 16; i++) v[i] = half_to_float(w[i].bits);
  return v;
#endif
}

template <class T>
RESQ_INLINE F16 tail(const T* p, int64_t count) {
  T padded[16] = {};
  __builtin_memcpy(padded, p, (size_t)count * sizeof(T));
  return weights(padded);
}

template <class T, int R, int N>
static void dense_block(const DenseCall& call, int64_t row, int64_t out) {
  const float* x = call.x + row * call.ldx;
  const T* w = (const T*)call.weight + out * call.ldw;
  F16 acc[R][N] = {};
  int64_t k = 0;
  for (; k + 16 <= call.in_features; k += 16) {
    F16 v[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) v[r] = load<F16>(x + r * call.ldx + k);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const F16 u = weights(w + n * call.ldw + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[r][n] = mul_add(v[r], u, acc[r][n]);
    }
  }
  if (k < call.in_features) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const F16 u = tail(w + n * call.ldw + k, call.in_features - k);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        acc[r][n] = mul_add(tail(x + r * call.ldx + k, call.in_features - k), u, acc[r][n]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      float y = sum(acc[r][n]);
      if (call.bias) y += call.bias[out + n];
      const int64_t at = (row + r) * call.ldo + out + n;
      call.out[at] = call.onto ? call.onto[(row + r) * call.ldonto + out + n] + y : y;
    }
}

template <class T>
static void dense_of(const DenseCall& call, int64_t begin, int64_t end) {
  for (int64_t out = begin; out < end; out += 4) {
    int64_t row = 0;
    if (end - out >= 4) {
      for (; row + 4 <= call.rows; row += 4) dense_block<T, 4, 4>(call, row, out);
      for (; row < call.rows; row++) dense_block<T, 1, 4>(call, row, out);
    } else {
      for (; row < call.rows; row++)
        for (int64_t n = out; n < end; n++) dense_block<T, 1, 1>(call, row, n);
    }
  }
}

static void dense(const DenseCall& call, int64_t begin, int64_t end) {
  switch (call.element) {
    case Element::f32: return dense_of<float>(call, begin, end);
    case Element::bf16: return dense_of<Bf16>(call, begin, end);
    case Element::f16: return dense_of<Half>(call, begin, end);
  }
}
