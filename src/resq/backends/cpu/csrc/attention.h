// Attention over the packed cache: softmax(scale · q k^T) v in float32.
//
// The slots of the cache are cut at fixed positions, into chunks of kChunk and those into blocks of kBlock. A row (a
// token and a head) goes through the blocks of a chunk in order, keeping the largest score, the sum of the
// exponentials and the weighted sum of the values (Milakov and Gimelshein 2018); the three numbers of each chunk are
// joined in order. A masked slot adds an exact zero and a chunk without visible slots changes nothing, so a row's bits
// depend on that row's own query and visible slots alone, never on the tile, the split or the batch it is computed in.
//
// A tile is some tokens times the heads that share a kv head: a block is unpacked once for all of its rows,
//   keys    [h][kBlock]   transposed: the lanes of a product with a query are slots,
//   values  [kBlock][hp + one vector], hp = h rounded up to whole vectors: the lanes of the output are coordinates.
//
// Vectors have the native width; every number has a lane of its own except in sums over slots, which have 16 partial
// sums on every instruction set.

// The products' loops use every register: inlined, some would spill.
#define RESQ_APART __attribute__((noinline))

namespace attention {

constexpr int64_t kBlock = 64;
constexpr int64_t kChunk = 512;
// Rows of a tile: unpacking a block takes as long as 6 rows (measured: h = 64, AVX-512), so 192 make it 3 %.
constexpr int64_t kTileRows = 192;
// Tiles are made smaller to occupy all workers, down to this.
constexpr int64_t kLeastRows = 48;
// So many tasks per worker even out their different lengths.
constexpr int64_t kTasksPerWorker = 4;
// The largest score of no slot at all; finite, so that a difference of two is no NaN.
constexpr float kNothing = -3.0e38f;

// kRows x kVectors native vectors are the accumulators of a product: they, kVectors operands and a broadcast fill the
// registers.
constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// ---- vectors --------------------------------------------------------------------------------------------------------

RESQ_INLINE Floats number(Words x) { return __builtin_convertvector((Ints)x, Floats); }
RESQ_INLINE Ints lane_index() {
  Ints lane;
  for (int i = 0; i < kFloats; i++) lane[i] = i;
  return lane;
}

RESQ_INLINE float largest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float x[kFloats];
  store(x, v);
  for (int step = kFloats / 2; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] = x[i] > x[i + step] ? x[i] : x[i + step];
  return x[0];
#endif
}

// 2^x for x <= 0 within 1.2 ulp, exactly 1 at 0, exactly 0 below -126 (so that the exponent field never underflows).
// The polynomial is the minimax one of relative error on [-1/2, 1/2] among those with constant term 1.
RESQ_INLINE Floats power_of_two(Floats x) {
  const Floats big = spread(12582912.0f);  // 1.5 · 2^23: the sum's low bits are the nearest integer
  const Floats shifted = x + big;
  const Floats f = x - (shifted - big);
  Floats y = mul_add(f, spread(0.00015353361959569156f), spread(0.0013398873852565885f));
  y = mul_add(y, f, spread(0.00961843691766262f));
  y = mul_add(y, f, spread(0.055503323674201965f));
  y = mul_add(y, f, spread(0.24022647738456726f));
  y = mul_add(y, f, spread(0.6931471824645996f));
  y = mul_add(y, f, spread(1.0f));
  const Words exponent = (Words)shifted << 23;
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_add_epi32(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ), (__m512i)y,
                                   (__m512i)exponent);
#else
  return (Floats)(((Words)y + exponent) & (Words)(x >= spread(-126.0f)));
#endif
}

// Four bytes at each of base + offset.
RESQ_INLINE Words gather(const uint8_t* base, Ints offset) {
#if defined(__AVX512F__)
  return (Words)_mm512_i32gather_epi32((__m512i)offset, base, 1);
#elif defined(__AVX2__)
  return (Words)_mm256_i32gather_epi32((const int*)base, (__m256i)offset, 1);
#else
  Words x;
  for (int i = 0; i < kFloats; i++) {
    uint32_t word;
    __builtin_memcpy(&word, base + offset[i], 4);
    x[i] = word;
  }
  return x;
#endif
}
// kFloats bytes as integers.
RESQ_INLINE Words bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef uint8_t B __attribute__((vector_size(kFloats)));
  return __builtin_convertvector(load<B>(p), Words);
#endif
}
// The finite float16 in the low 16 bits of each lane; the upper bits must be zero.
RESQ_INLINE Floats half(Words x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x));
#else
  // Its bits moved to those of float32 are the magnitude · 2^-112, subnormals included.
  const Floats magnitude = (Floats)((x & 0x7FFFu) << 13) * 5.192296858534828e33f;
  return (Floats)((Words)magnitude | (x & 0x8000u) << 16);
#endif
}
// kFloats float16.
RESQ_INLINE Floats half_row(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  typedef uint16_t H __attribute__((vector_size(2 * kFloats)));
  return half(__builtin_convertvector(load<H>(p), Words));
#endif
}
// Bits 0 … 3 of each lane as a number.
RESQ_INLINE Floats nibble(Words x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)x, (__m512)__builtin_convertvector(lane_index(), Floats));
#else
  return number(x & 15u);
#endif
}
// scale · nibble + shift for one scale and shift: AVX-512 looks all 16 results up.
struct Nibbles {
#if defined(__AVX512F__)
  Floats table;
#else
  Floats scale, shift;
#endif
};
RESQ_INLINE Nibbles nibbles(Floats scale, Floats shift) {
#if defined(__AVX512F__)
  return {mul_add(__builtin_convertvector(lane_index(), Floats), scale, shift)};
#else
  return {scale, shift};
#endif
}
RESQ_INLINE Floats look_up(const Nibbles& of, Words x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)x, (__m512)of.table);
#else
  return mul_add(nibble(x), of.scale, of.shift);
#endif
}

// ---- unpacking ------------------------------------------------------------------------------------------------------

// The slots [begin, end) of a block that are needed; slots at [0, written) from the block's start may be read.
struct Slots {
  const uint8_t* data;  // the record of the block's first slot
  int64_t begin, end, written;
};

// Byte positions in a record.
struct Record {
  int64_t band[kMaxBands];
  int64_t scale, zero;
};
RESQ_INLINE int64_t stored_bytes(const Band& band) { return band.bits <= 4 ? (band.size + 1) / 2 : band.size; }
RESQ_INLINE Record record_of(const Format& format) {
  Record at;
  at.scale = 0;
  for (int i = 0; i < format.bands; i++) {
    at.band[i] = at.scale;
    at.scale += stored_bytes(format.band[i]);
  }
  at.zero = at.scale + format.bands * (format.half_scale ? 2 : 4);
  return at;
}

// Byte offset of the slot of each lane; lanes outside [begin, end) repeat a slot inside, so that they are finite.
RESQ_INLINE Ints lane_offsets(const Slots& slots, int64_t first, int64_t record) {
  const Ints begin = spread((int32_t)slots.begin), last = spread((int32_t)slots.end - 1);
  Ints slot = lane_index() + (int32_t)first;
  slot = slot < begin ? begin : slot;
  slot = slot > last ? last : slot;
  return slot * (int32_t)record;
}

// scale · (q - zero) = scale · q + shift; with float16 scales every product and sum here is exact.
struct Range {
  Floats scale, shift;
};
// The range of a band in the slots of each lane. A word of four bytes is read where it lies inside the record: at least
// a byte of integers comes before the scales and a zero point after them.
RESQ_INLINE Range ranges(const uint8_t* data, Ints offset, const Format& format, const Record& at, int band) {
  Range range;
  if (format.half_scale)
    range.scale = half(gather(data + at.scale + 2 * band - 1, offset) >> 8 & 0xFFFFu);
  else
    range.scale = (Floats)gather(data + at.scale + 4 * band, offset);
  range.shift = -(range.scale * number(gather(data + at.zero + band - 3, offset) >> 24));
  return range;
}

// Keys to out [h][kBlock]. A word of four bytes that begins in a band ends in its record.
static void unpack_keys(const Store& keys, const Slots& slots, int64_t h, float* out) {
  const Format& format = *keys.format;
  const Record at = record_of(format);
  for (int64_t first = slots.begin / kFloats * kFloats; first < slots.end; first += kFloats) {
    const Ints offset = lane_offsets(slots, first, keys.record);
    float* column = out + first;
    if (!format.bands)
      for (int64_t d = 0; d < h; d += 2) {
        const Words word = gather(slots.data + 2 * d, offset);
        store(column + d * kBlock, half(word & 0xFFFFu));
        store(column + (d + 1) * kBlock, half(word >> 16));
      }
    for (int b = 0; b < format.bands; b++) {
      const Band& band = format.band[b];
      const uint8_t* data = slots.data + at.band[b];
      const Range range = ranges(slots.data, offset, format, at, b);
      float* low = column + band.begin * kBlock;
      const int64_t count = stored_bytes(band);
      const auto put = [&](float* to, Floats x) { store(to, mul_add(x, range.scale, range.shift)); };
      if (band.bits > 4) {
        for (int64_t j = 0; j < count; j += 4) {
          const Words word = gather(data + j, offset);
          for (int k = 0; k < 4 && j + k < count; k++) put(low + (j + k) * kBlock, number(word >> 8 * k & 255u));
        }
        continue;
      }
      float* high = low + count * kBlock;
      const int64_t high_count = band.size - count;
      for (int64_t j = 0; j < count; j += 4) {
        const Words word = gather(data + j, offset);
        if (j + 4 <= high_count) {
#pragma GCC unroll 4
          for (int k = 0; k < 4; k++) {
            put(low + (j + k) * kBlock, nibble(word >> 8 * k));
            put(high + (j + k) * kBlock, nibble(word >> (8 * k + 4)));
          }
          continue;
        }
        for (int k = 0; k < 4 && j + k < count; k++) {
          put(low + (j + k) * kBlock, nibble(word >> 8 * k));
          if (j + k < high_count) put(high + (j + k) * kBlock, nibble(word >> (8 * k + 4)));
        }
      }
    }
  }
}

// `size` bytes of a record for reading in whole vectors, up to kOver bytes beyond the end: where they lie, or in `copy`
// where that would run over the last written record.
constexpr int64_t kOver = 2 * kFloats;
RESQ_INLINE const uint8_t* readable(const uint8_t* data, int64_t size, bool last, uint8_t* copy) {
  if (!last) return data;
  __builtin_memcpy(copy, data, (size_t)size);
  return copy;
}

// Values to out [kBlock][stride], stride >= h + kFloats. Each vector may run over the end of its band, into the next
// ones, which are written after it, or into the end of the row, which is never read.
static void unpack_values(const Store& values, const Slots& slots, int64_t h, int64_t stride, uint8_t* copy,
                          float* out) {
  const Format& format = *values.format;
  const Record at = record_of(format);
  const int64_t record = values.record, begin = slots.begin, end = slots.end;
  // From this slot on there are fewer than kOver written bytes behind a record.
  const int64_t last = slots.written - over(kOver, record);
  if (!format.bands)
    for (int64_t s = begin; s < end; s++) {
      const uint8_t* p = readable(slots.data + s * record, 2 * h, s >= last, copy);
      for (int64_t d = 0; d < h; d += kFloats) store(out + s * stride + d, half_row(p + 2 * d));
    }
  for (int b = 0; b < format.bands; b++) {
    const Band band = format.band[b];
    const int64_t count = stored_bytes(band);
    float scale[kBlock], shift[kBlock];
    for (int64_t first = begin / kFloats * kFloats; first < end; first += kFloats) {
      const Range range = ranges(slots.data, lane_offsets(slots, first, record), format, at, b);
      store(scale + first, range.scale);
      store(shift + first, range.shift);
    }
    const uint8_t* data = slots.data + at.band[b];
    for (int64_t s = begin; s < end; s++) {
      const uint8_t* p = readable(data + s * record, count, s >= last, copy);
      float* row = out + s * stride + band.begin;
      if (band.bits > 4) {
        for (int64_t j = 0; j < count; j += kFloats)
          store(row + j, mul_add(number(bytes(p + j)), spread(scale[s]), spread(shift[s])));
        continue;
      }
      const Nibbles of = nibbles(spread(scale[s]), spread(shift[s]));
      // Downwards: the low nibbles' last vector ends among the high ones, before those are written.
      for (int64_t j = (count - 1) / kFloats * kFloats; j >= 0; j -= kFloats) {
        const Words word = bytes(p + j);
        store(row + j, look_up(of, word));
        store(row + count + j, look_up(of, word >> 4));
      }
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// scores [R][kBlock] of R rows and N vectors of slots: factor · Σ_d q[r][d] k [h][kBlock], d in order.
struct Dot {
  template <int R, int N>
  static RESQ_APART void run(const float* const* q, const float* k, int64_t h, float factor, float* scores) {
    const float* row[R];
    Floats sum[R][N] = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) row[r] = q[r];
    for (int64_t d = 0; d < h; d++, k += kBlock) {
      Floats key[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) key[n] = load<Floats>(k + n * kFloats);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const Floats x = spread(row[r][d]);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sum[r][n] = mul_add(x, key[n], sum[r][n]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) store(scores + r * kBlock + n * kFloats, sum[r][n] * spread(factor));
  }
};

// acc [R][hp], N vectors of it: acc · alpha + Σ_s p [R][kBlock] v [kBlock][stride], s in order.
struct Weigh {
  template <int R, int N>
  static RESQ_APART void run(const float* p, const float* v, int64_t stride, int64_t slots, const float* alpha,
                             float* acc, int64_t hp) {
    Floats sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[r][n] = load<Floats>(acc + r * hp + n * kFloats) * spread(alpha[r]);
    for (int64_t s = 0; s < slots; s++, p++, v += stride) {
      Floats value[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) value[n] = load<Floats>(v + n * kFloats);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const Floats x = spread(p[r * kBlock]);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sum[r][n] = mul_add(x, value[n], sum[r][n]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) store(acc + r * hp + n * kFloats, sum[r][n]);
  }
};

template <class Product, int R, class... Arguments>
RESQ_INLINE void with_vectors(int64_t vectors, Arguments... arguments) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return Product::template run<R, 4>(arguments...);
    if (vectors == 3) return Product::template run<R, 3>(arguments...);
  }
  if (vectors == 2) return Product::template run<R, 2>(arguments...);
  return Product::template run<R, 1>(arguments...);
}
template <class Product, class... Arguments>
RESQ_INLINE void with_shape(int64_t rows, int64_t vectors, Arguments... arguments) {
  switch (rows) {
    case 1: return with_vectors<Product, 1>(vectors, arguments...);
    case 2: return with_vectors<Product, 2>(vectors, arguments...);
    case 3: return with_vectors<Product, 3>(vectors, arguments...);
    case 4: return with_vectors<Product, 4>(vectors, arguments...);
    case 5: return with_vectors<Product, 5>(vectors, arguments...);
    default: return with_vectors<Product, kRows>(vectors, arguments...);
  }
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// Softmax numbers of some rows over some slots; scores are in units of log2.
struct State {
  float* peak;  // [rows] the largest score
  float* sum;   // [rows] Σ 2^(score - peak)
  float* acc;   // [rows][hp] Σ 2^(score - peak) v
};

// One block of a few rows: scores [rows][kBlock], vectors [first, end), become 2^(score - peak), zero where the row
// does not see the slot; peak and sums [rows][16] take the block in, alpha [rows] is 2^(old - new peak).
RESQ_INLINE void exponentials(int64_t rows, int first, int end, const int64_t* low, const int64_t* high, int64_t begin,
                              float* scores, float* peak, float* sums, float* alpha) {
  constexpr int kParts = 16 / kFloats;
  float drop[16] = {};
  for (int64_t r = 0; r < rows; r++) {
    float* row = scores + r * kBlock;
    const int64_t from = low[r] - begin, to = high[r] - begin;
    const bool whole = from <= first * kFloats && to >= end * kFloats;
    Floats top = spread(kNothing);
    for (int n = first; n < end; n++) {
      Floats x = load<Floats>(row + n * kFloats);
      if (!whole) {
        const Ints slot = lane_index() + n * kFloats;
        const Ints seen = (slot >= (int32_t)larger(from, 0)) & (slot < (int32_t)smaller(larger(to, 0), kBlock));
        x = seen ? x : spread(-__builtin_inff());
        store(row + n * kFloats, x);
      }
      top = greater(top, x);
    }
    const float old = peak[r], block = largest(top);
    peak[r] = block > old ? block : old;
    drop[r] = old - peak[r];
  }
  float scale[16];
  for (int n = 0; n < kParts; n++) store(scale + n * kFloats, power_of_two(load<Floats>(drop + n * kFloats)));
  for (int64_t r = 0; r < rows; r++) {
    float* row = scores + r * kBlock;
    Floats sum[kParts];
    alpha[r] = scale[r];
    for (int n = 0; n < kParts; n++) sum[n] = load<Floats>(sums + r * 16 + n * kFloats) * spread(scale[r]);
    for (int n = first; n < end; n++) {
      const Floats p = power_of_two(load<Floats>(row + n * kFloats) - spread(peak[r]));
      store(row + n * kFloats, p);
      sum[n % kParts] += p;
    }
    for (int n = 0; n < kParts; n++) store(sums + r * 16 + n * kFloats, sum[n]);
  }
}

// The state of some rows over more slots: `more` is joined to `state`. Exact when either has seen nothing.
static void join(State state, State more, int64_t rows, int64_t hp) {
  for (int64_t r = 0; r < rows; r++) {
    const float top = state.peak[r] > more.peak[r] ? state.peak[r] : more.peak[r];
    Floats drop = {};
    drop[0] = state.peak[r] - top;
    drop[1] = more.peak[r] - top;
    const Floats scale = power_of_two(drop);
    const float a = scale[0], b = scale[1];
    state.peak[r] = top;
    state.sum[r] = state.sum[r] * a + more.sum[r] * b;
    for (int64_t d = 0; d < hp; d += kFloats)
      store(state.acc + r * hp + d, mul_add(load<Floats>(state.acc + r * hp + d), spread(a),
                                                 load<Floats>(more.acc + r * hp + d) * spread(b)));
  }
}

// ---- tasks ----------------------------------------------------------------------------------------------------------

// Cut of a call into tasks. A task is a tile, or a tile and one chunk where tiles alone are too few for the workers.
struct Plan {
  int64_t group, pairs;   // heads per kv head; batch · kv heads
  int64_t tokens, tiles;  // tokens of a tile; tiles of a pair
  int64_t first, chunks;  // the chunks that some query may see
  bool split;
  int64_t rows, hp;  // of a tile
};
RESQ_INLINE int64_t most_tokens(const AttendCall& call) {
  return larger(1, smaller(call.tokens, kTileRows / (call.heads / call.kv_heads)));
}
static Plan plan_of(const AttendCall& call, int workers) {
  Plan plan;
  plan.group = call.heads / call.kv_heads;
  plan.pairs = call.batch * call.kv_heads;
  const int64_t wanted = kTasksPerWorker * workers;
  int64_t tokens = most_tokens(call);
  while (tokens > 1 && tokens * plan.group > kLeastRows && plan.pairs * over(call.tokens, tokens) < wanted)
    tokens = over(tokens, 2);
  plan.tiles = over(call.tokens, tokens);
  plan.tokens = plan.tiles ? over(call.tokens, plan.tiles) : 1;
  const int64_t oldest = call.window ? larger(0, call.length - call.tokens - call.window + 1) : 0;
  plan.first = oldest / kChunk;
  plan.chunks = over(call.length, kChunk) - plan.first;
  plan.split = plan.chunks > 1 && plan.pairs * plan.tiles < wanted;
  plan.rows = plan.tokens * plan.group;
  plan.hp = over(call.head_dim, kFloats) * kFloats;
  return plan;
}

// Memory of a task, in pieces of whole cache lines.
struct Scratch {
  float* block;                  // unpacked: keys [h][kBlock], then in their place (in L1) values [kBlock][stride]
  float *scores, *sums, *alpha;  // [rows][kBlock], [rows][16], [rows]
  int64_t *low, *high;           // [rows] the slots that a row sees
  const float** q;               // [rows]
  uint8_t* copy;                 // of a record
  State state, chunk;
  size_t bytes;
};
static Scratch scratch_of(const AttendCall& call, int64_t rows, int64_t hp, void* memory) {
  size_t used = 0;
  auto take = [&](int64_t bytes) {
    void* piece = memory ? (char*)memory + used : nullptr;
    used += (size_t)over(bytes, 64) * 64;
    return piece;
  };
  auto take_state = [&] {
    return State{(float*)take(rows * 4), (float*)take(rows * 4), (float*)take(rows * hp * 4)};
  };
  Scratch scratch;
  scratch.block = (float*)take((hp + kFloats) * kBlock * 4);
  scratch.scores = (float*)take(rows * kBlock * 4);
  scratch.sums = (float*)take(rows * 16 * 4);
  scratch.alpha = (float*)take(rows * 4);
  scratch.low = (int64_t*)take(rows * 8);
  scratch.high = (int64_t*)take(rows * 8);
  scratch.q = (const float**)take(rows * (int64_t)sizeof(float*));
  scratch.copy = (uint8_t*)take(call.values.record + kOver);
  scratch.state = take_state();
  scratch.chunk = take_state();
  scratch.bytes = used;
  return scratch;
}

// The rows of a tile: tokens [begin, end) of a batch row times the heads of a kv head.
struct Tile {
  int64_t batch, head, begin, end, rows;
};
RESQ_INLINE Tile tile_of(const AttendCall& call, const Plan& plan, int64_t index) {
  Tile tile;
  const int64_t pair = index % plan.pairs;
  // The last tokens see most.
  tile.begin = (plan.tiles - 1 - index / plan.pairs) * plan.tokens;
  tile.end = smaller(tile.begin + plan.tokens, call.tokens);
  tile.batch = pair / call.kv_heads;
  tile.head = pair % call.kv_heads;
  tile.rows = (tile.end - tile.begin) * plan.group;
  return tile;
}

// The slots [low, high) that a token sees; both grow with the token.
struct Span {
  int64_t low, high;
};
RESQ_INLINE Span seen_by(const AttendCall& call, int64_t batch, int64_t token) {
  const int64_t own = call.length - call.tokens + token;
  int64_t low = call.starts ? larger(call.starts[batch], 0) : 0;
  if (call.window) low = larger(low, own - call.window + 1);
  return {smaller(low, own), own + 1};
}

// Softmax numbers of the tile's rows over one chunk.
static void attend_chunk(const AttendCall& call, const Plan& plan, const Tile& tile, const Scratch& scratch,
                         int64_t chunk, State state) {
  const int64_t rows = tile.rows, hp = plan.hp, stride = hp + kFloats, h = call.head_dim;
  for (int64_t r = 0; r < rows; r++) state.peak[r] = kNothing;
  __builtin_memset(scratch.sums, 0, (size_t)rows * 16 * sizeof(float));
  __builtin_memset(state.acc, 0, (size_t)(rows * hp) * sizeof(float));
  const float factor = call.scale * 1.44269504f;  // log2 e
  // Rows in equal parts of at most kRows.
  const int64_t step = over(rows, over(rows, kRows));
  const int64_t columns = over(hp / kFloats, over(hp / kFloats, kVectors));
  const int64_t pair = tile.batch * call.kv_heads + tile.head;
  const int64_t from = larger(chunk * kChunk, scratch.low[0]);
  const int64_t to = smaller((chunk + 1) * kChunk, scratch.high[rows - 1]);
  for (int64_t block = from / kBlock * kBlock; block < to; block += kBlock) {
    const int64_t slot = pair * call.keys.capacity + block, slot_v = pair * call.values.capacity + block;
    Slots slots = {call.keys.data + slot * call.keys.record, larger(from - block, 0), smaller(to - block, kBlock),
                   call.length - block};
    auto part = [&](int64_t r, int64_t end) {
      return Span{larger(slots.begin, scratch.low[r] - block), smaller(slots.end, scratch.high[end - 1] - block)};
    };
    unpack_keys(call.keys, slots, h, scratch.block);
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t end = smaller(r + step, rows);
      const Span seen = part(r, end);
      if (seen.low >= seen.high) continue;
      const int first = (int)(seen.low / kFloats), last = (int)over(seen.high, kFloats);
      float* scores = scratch.scores + r * kBlock;
      for (int n = first; n < last; n += kVectors)
        with_shape<Dot>(end - r, smaller(last - n, kVectors), scratch.q + r,
                        (const float*)scratch.block + n * kFloats, h, factor, scores + n * kFloats);
      auto finish = [&](int begin_vector, int end_vector) __attribute__((always_inline)) {
        exponentials(end - r, begin_vector, end_vector, scratch.low + r, scratch.high + r, block, scores,
                     state.peak + r, scratch.sums + r * 16, scratch.alpha + r);
      };
      if (first == 0 && last == kBlock / kFloats)
        finish(0, kBlock / kFloats);
      else
        finish(first, last);
    }
    slots.data = call.values.data + slot_v * call.values.record;
    unpack_values(call.values, slots, h, stride, scratch.copy, scratch.block);
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t end = smaller(r + step, rows);
      const Span seen = part(r, end);
      if (seen.low >= seen.high) continue;
      for (int64_t n = 0; n < hp / kFloats; n += columns)
        with_shape<Weigh>(end - r, smaller(hp / kFloats - n, columns),
                          (const float*)scratch.scores + r * kBlock + seen.low,
                          (const float*)scratch.block + seen.low * stride + n * kFloats, stride,
                          seen.high - seen.low, (const float*)scratch.alpha + r, state.acc + r * hp + n * kFloats, hp);
    }
  }
  for (int64_t r = 0; r < rows; r++) state.sum[r] = sum(load<F16>(scratch.sums + r * 16));
}

// The chunks [first, end) of which the tile's rows see a part.
RESQ_INLINE Span chunks_of(const AttendCall& call, const Tile& tile) {
  const Span first = seen_by(call, tile.batch, tile.begin), last = seen_by(call, tile.batch, tile.end - 1);
  return {first.low / kChunk, over(last.high, kChunk)};
}

static void write_out(const AttendCall& call, const Plan& plan, const Tile& tile, State state) {
  const int64_t h = call.head_dim;
  for (int64_t r = 0; r < tile.rows; r++) {
    const int64_t token = tile.batch * call.tokens + tile.begin + r / plan.group;
    float* out = call.out + (token * call.heads + tile.head * plan.group + r % plan.group) * h;
    const float* acc = state.acc + r * plan.hp;
    const float inverse = 1.0f / state.sum[r];
    // Which masked slots were skipped decides between -0 and 0, which + 0 makes one.
    for (int64_t d = 0; d < h; d++) out[d] = acc[d] * inverse + 0.0f;
  }
}

// Partial results in shared memory: a State for each tile and chunk.
RESQ_INLINE int64_t partial_floats(const Plan& plan) { return plan.rows * (plan.hp + 2); }
RESQ_INLINE State partial(const Plan& plan, void* shared, int64_t tile, int64_t chunk) {
  float* memory = (float*)shared + (tile * plan.chunks + chunk - plan.first) * partial_floats(plan);
  return {memory, memory + plan.rows, memory + 2 * plan.rows};
}

}  // namespace attention

static int64_t attend_tasks(const AttendCall& call, int workers) {
  const attention::Plan plan = attention::plan_of(call, workers);
  return plan.pairs * plan.tiles * (plan.split ? plan.chunks : 1);
}

static size_t attend_scratch(const AttendCall& call) {
  const attention::Plan plan = attention::plan_of(call, 1);
  return attention::scratch_of(call, attention::most_tokens(call) * plan.group, plan.hp, nullptr).bytes;
}

static size_t attend_shared(const AttendCall& call, int workers) {
  const attention::Plan plan = attention::plan_of(call, workers);
  if (!plan.split) return 0;
  return (size_t)(plan.pairs * plan.tiles * plan.chunks * attention::partial_floats(plan)) * sizeof(float);
}

static void attend(const AttendCall& call, int workers, int64_t task, void* memory, void* shared) {
  using namespace attention;
  const Plan plan = plan_of(call, workers);
  const int64_t index = plan.split ? task / plan.chunks : task;
  const Tile tile = tile_of(call, plan, index);
  const Span chunks = chunks_of(call, tile);
  const int64_t only = plan.first + task % plan.chunks;
  if (plan.split && (only < chunks.low || only >= chunks.high)) return;
  const Scratch scratch = scratch_of(call, plan.rows, plan.hp, memory);
  for (int64_t r = 0; r < tile.rows; r++) {
    const int64_t token = tile.begin + r / plan.group;
    const Span seen = seen_by(call, tile.batch, token);
    scratch.low[r] = seen.low;
    scratch.high[r] = seen.high;
    scratch.q[r] = call.q + (((tile.batch * call.tokens + token) * call.heads) + tile.head * plan.group +
                             r % plan.group) * call.head_dim;
  }
  // Coordinates h … hp - 1 add up to nothing that is read, but slowly if they are subnormal numbers.
  if (plan.hp != call.head_dim)
    __builtin_memset(scratch.block, 0, (size_t)((plan.hp + kFloats) * kBlock) * sizeof(float));
  if (plan.split) return attend_chunk(call, plan, tile, scratch, only, partial(plan, shared, index, only));
  attend_chunk(call, plan, tile, scratch, chunks.low, scratch.state);
  for (int64_t chunk = chunks.low + 1; chunk < chunks.high; chunk++) {
    attend_chunk(call, plan, tile, scratch, chunk, scratch.chunk);
    join(scratch.state, scratch.chunk, tile.rows, plan.hp);
  }
  write_out(call, plan, tile, scratch.state);
}

static int64_t merge_tasks(const AttendCall& call, int workers) {
  const attention::Plan plan = attention::plan_of(call, workers);
  return plan.split ? plan.pairs * plan.tiles : 0;
}

static void merge(const AttendCall& call, int workers, int64_t task, void* shared) {
  using namespace attention;
  const Plan plan = plan_of(call, workers);
  const Tile tile = tile_of(call, plan, task);
  const Span chunks = chunks_of(call, tile);
  const State state = partial(plan, shared, task, chunks.low);
  for (int64_t chunk = chunks.low + 1; chunk < chunks.high; chunk++)
    join(state, partial(plan, shared, task, chunk), tile.rows, plan.hp);
  write_out(call, plan, tile, state);
}
