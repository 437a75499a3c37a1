// Heads after their projections: norm, RoPE, then queries through their map and keys and values into the cache.
//
// reference.py, rope_project_append: norm and rotation in float64 without a rounding between them, float32 once, the
// map in float64, float32 again, then the cache's rounding.

namespace rope {

// x · cos + turned · sin for one head, half-split: the turned row is -second half, first half. x64 [h] is scratch.
RESQ_INLINE void rotate(const float* x, const Norm& norm, const double* cos, const double* sin, int64_t h, double* x64,
                        float* out) {
  using namespace rows;
  if (norm.present) normalise(norm, x, h, x64);
  const int64_t first = (h + 1) / 2, second = h / 2;  // an odd row's first part is the longer one
  int64_t i = 0;
  if (h % 2 == 0)
    for (; i + kDoubles <= first; i += kDoubles) {
      const Doubles a = norm.present ? load<Doubles>(x64 + i) : widen(x + i);
      const Doubles b = norm.present ? load<Doubles>(x64 + first + i) : widen(x + first + i);
      put(out + i, a * load<Doubles>(cos + i) - b * load<Doubles>(sin + i));
      put(out + first + i, b * load<Doubles>(cos + first + i) + a * load<Doubles>(sin + first + i));
    }
  const auto at = [&](int64_t j) { return norm.present ? x64[j] : (double)x[j]; };
  for (int64_t j = i; j < second; j++) out[j] = (float)(at(j) * cos[j] - at(first + j) * sin[j]);
  for (int64_t j = second + i; j < h; j++) out[j] = (float)(at(j) * cos[j] + at(j - second) * sin[j]);
}

// clamp(±65504), then float16 with halves to even.
RESQ_INLINE void write_halves(const float* x, int64_t h, uint8_t* out) {
  for (int64_t i = 0; i < h; i++) {
    float v = x[i] < 65504.0f ? x[i] : 65504.0f;
    v = v > -65504.0f ? v : -65504.0f;
#if defined(__AVX512F__) || defined(__F16C__)
    const uint16_t half = (uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(v), _MM_FROUND_TO_NEAREST_INT), 0);
#else
    const uint16_t half = float_to_half(v);
#endif
    __builtin_memcpy(out + 2 * i, &half, 2);
  }
}

// Two integers below 16 in a byte: coordinate j low, coordinate j + ceil(n / 2) high.
RESQ_INLINE void write_nibbles(const uint8_t* q, int64_t n, uint8_t* out) {
  const int64_t half = (n + 1) / 2, pairs = n / 2;
  int64_t j = 0;
  for (; j + 8 <= pairs; j += 8) {
    uint64_t low, high;
    __builtin_memcpy(&low, q + j, 8);
    __builtin_memcpy(&high, q + half + j, 8);
    low |= high << 4;  // no bit leaves its byte
    __builtin_memcpy(out + j, &low, 8);
  }
  for (; j < pairs; j++) out[j] = (uint8_t)(q[j] | q[half + j] << 4);
  if (half > pairs) out[pairs] = q[pairs];
}

// One head [h] into its record (layout at Store in kernels.h); q [h] is scratch.
static void write_record(const Format& format, const float* x, int64_t h, uint8_t* q, uint8_t* out) {
  if (!format.bands) return write_halves(x, h, out);
  float scale[kMaxBands];
  uint8_t zero[kMaxBands];
  rows::quantize_row(format, x, q, scale, zero);
  for (int b = 0; b < format.bands; b++) {
    const Band band = format.band[b];
    if (band.bits <= 4) {
      write_nibbles(q + band.begin, band.size, out);
      out += (band.size + 1) / 2;
    } else {
      __builtin_memcpy(out, q + band.begin, (size_t)band.size);
      out += band.size;
    }
  }
  for (int b = 0; b < format.bands; b++) {
    if (format.half_scale) {
      const uint16_t half = float_to_half(scale[b]);
      __builtin_memcpy(out, &half, 2);
      out += 2;
    } else {
      __builtin_memcpy(out, &scale[b], 4);
      out += 4;
    }
  }
  for (int b = 0; b < format.bands; b++) out[b] = zero[b];
}

struct Scratch {
  double *cos, *sin;  // [h]
  double* normed;     // [h]
  float* turned;      // [heads, h]
  float* projected;   // [kv_heads, h]
  uint8_t* q;         // [h]
  rows::ProjectScratch query, key, value;
};
static Scratch layout(const RopeCall& call, rows::Arena* arena) {
  const int64_t h = call.head_dim, most = call.heads > call.kv_heads ? call.heads : call.kv_heads;
  Scratch s;
  s.cos = arena->take<double>(h);
  s.sin = arena->take<double>(h);
  s.normed = arena->take<double>(h);
  s.turned = arena->take<float>(most * h);
  s.projected = arena->take<float>(call.kv_heads * h);
  s.q = arena->take<uint8_t>(h);
  s.query = rows::project_layout(*call.query, h, call.heads, arena);
  s.key = rows::project_layout(*call.keys.format, h, call.kv_heads, arena);
  s.value = rows::project_layout(*call.values.format, h, call.kv_heads, arena);
  return s;
}

// The heads x [kv_heads, h] of one token into the cache.
static void append(const RopeCall& call, const Store& to, const float* x, int64_t row,
                   const rows::ProjectScratch& project, const Scratch& s) {
  const Format& format = *to.format;
  const int64_t h = call.head_dim, batch = row / call.tokens, slot = call.position + row % call.tokens;
  if (!rows::keeps(format)) {
    rows::project(format, x, h, nullptr, 0, call.kv_heads, h, s.projected, h, project);
    x = s.projected;
  }
  for (int64_t head = 0; head < call.kv_heads; head++) {
    const int64_t record = (batch * call.kv_heads + head) * to.capacity + slot;
    write_record(format, x + head * h, h, s.q, to.data + record * to.record);
  }
}

}  // namespace rope

static size_t rope_scratch(const RopeCall& call) {
  rows::Arena arena = {0};
  rope::layout(call, &arena);
  return arena.at + 64;
}

// Rows of b · t: one token each, all its heads.
static void rope_append(const RopeCall& call, int64_t begin, int64_t end, void* scratch) {
  rows::Arena arena = {(uintptr_t)scratch};
  const rope::Scratch s = rope::layout(call, &arena);
  rows::prepare(*call.query, s.query);
  rows::prepare(*call.keys.format, s.key);
  rows::prepare(*call.values.format, s.value);
  const int64_t h = call.head_dim;
  for (int64_t row = begin; row < end; row++) {
    for (int64_t i = 0; i < h; i++) s.cos[i] = (double)call.cos[row * h + i], s.sin[i] = (double)call.sin[row * h + i];
    float* out = call.out + row * call.heads * h;
    float* turned = rows::keeps(*call.query) ? out : s.turned;
    for (int64_t head = 0; head < call.heads; head++)
      rope::rotate(call.q + row * call.ldq + head * h, call.query_norm, s.cos, s.sin, h, s.normed, turned + head * h);
    if (turned != out) rows::project(*call.query, turned, h, nullptr, 0, call.heads, h, out, h, s.query);
    for (int64_t head = 0; head < call.kv_heads; head++)
      rope::rotate(call.k + row * call.ldk + head * h, call.key_norm, s.cos, s.sin, h, s.normed, s.turned + head * h);
    rope::append(call, call.keys, s.turned, row, s.key, s);
    rope::append(call, call.values, call.v + row * call.ldv, row, s.value, s);
  }
}
