// Linears on AMX tiles: the sums of linear.h, bit for bit, 16 rows x 16 outputs x 64 columns an instruction.
//
// A step is 64 columns of a segment. Its weights are two tiles of 16 x 64 bytes, row k, byte 4n + j = w[n, 4k + j],
// which is what the blocks of a panel become when unpacked; blocks beyond the segment are zeros there, so that the
// activations beside them (the next segment's, the next row's or the kTail bytes) do not count. The activations are
// read where they lie, a tile row being 64 bytes of a row. Registers, for a block of up to 32 rows:
//
//                              tmm6: outputs 0 … 15    tmm7: outputs 16 … 31    weights of the step
//   tmm4: rows 0 … 15                  tmm0                    tmm1
//   tmm5: rows 16 … 31                 tmm2                    tmm3             sums over the whole segment
//
// Tiles are configured for the rows that exist: none is read that does not. Two supplies of unpacked weights:
//   few rows (up to 32)   bound by memory: every step is unpacked into a ring that stays in L1 and is used once;
//   many rows             bound by L2: a panel is unpacked into scratch while the one before it is multiplied by all
//                         blocks of rows that fit L2 beside it.
// The epilogue of a segment runs during the steps after it, a few rows a step: tile multiplies have their own unit, and
// these steps leave the vector units nearly idle.
//
// No machine with AMX was at hand, so no speed was measured: the arrangement follows a prototype that was measured on 2
// server cores and stored its activations as tiles. What it costs to read them in rows was timed with 64-byte vector
// loads in place of tile loads (Emerald Rapids, 1 MB of activations in L2): 3 to 9 % a step where rows begin at
// multiples of 64 bytes, nothing above the noise where the row length is an odd multiple of 64, and 30 to 90 % where
// rows are not aligned. The sums are tested under an emulator (tests/native/amx_emulator.cpp).

namespace amx {

constexpr int64_t kTileRows = 16;
constexpr int64_t kBlockRows = 2 * kTileRows;
constexpr int64_t kStepBytes = 2048;  // two tiles of unpacked weights
constexpr int64_t kBlockBytes = 128;  // one block of 8 columns and 16 outputs, unpacked
constexpr int64_t kPrefetch = 4096;   // ahead in the packed weights; the prototype's

// Below this many rows the VNNI code reads packed weights as fast as memory gives them and goes through no store.
constexpr int64_t kLeastRows = 5;

// ---- instructions ----------------------------------------------------------------------------------------------------
// Inline assembly: gcc 12's intrinsics do not say that they read and write memory, and stores get lost.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The registers drawn above, for blocks of `rows` rows, until the end of its scope.
struct Tiles {
  explicit Tiles(int64_t rows) {
    TileConfig config;
    const uint8_t first = (uint8_t)(rows < kTileRows ? rows : kTileRows), second = (uint8_t)(rows - first);
    const uint8_t all[8] = {first, first, second, second, first, second, (uint8_t)kTileRows, (uint8_t)kTileRows};
    for (int i = 0; i < 8; i++) {
      config.rows[i] = all[i];
      config.row_bytes[i] = all[i] ? 64 : 0;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  // Tiles in use make every switch of threads save 8 KB.
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

template <int tile>
RESQ_INLINE void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile)); }
template <int tile>
RESQ_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
RESQ_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
// sums[m, n] += Σ_k x[m, k] w[n, k], x unsigned and w signed bytes; int32, no saturation.
template <int sums, int x, int w>
RESQ_INLINE void tile_dot() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(x), "i"(w));
}

// ---- weights -----------------------------------------------------------------------------------------------------------

RESQ_INLINE int64_t steps(const Segment& seg) { return (seg.blocks + 7) / 8; }

static int64_t panel_steps(const Packed& w) {
  int64_t all = 0;
  for (int s = 0; s < w.segments; s++) all += steps(w.segment[s]);
  return all;
}

// Unpacks a panel block by block: packed blocks lie in the order in which the tiles hold them.
template <int locality>
struct Unpacker {
  const Packed* weight;
  int64_t prefetch = kPrefetch;  // bytes ahead of the block being unpacked
  const uint8_t* panel = nullptr;
  const uint8_t* from = nullptr;
  uint8_t* to = nullptr;
  int segment;        // the number of segments at the panel's end
  bool nibble = false, second = false;
  int64_t left = 0;   // blocks of the segment, this step's included
  int64_t count = 0;  // blocks of the step
  int64_t done = 0;   // blocks of the tile

  explicit Unpacker(const Packed* w) : weight(w), segment(w->segments) {}

  bool at_end() const { return segment == weight->segments; }

  void start(int64_t index, uint8_t* tiles) {
    panel = weight->data + index * weight->panel_bytes;
    to = tiles;
    segment = -1;
    next_segment();
  }

  __attribute__((always_inline)) inline void block() {
    if (nibble) {
      __builtin_prefetch(from + prefetch, 0, locality);
      const Pair pair = unpack_nibbles(load<I16>(from));
      store(to, pair.low);
      store(to + 64, pair.high);
      from += 64;
    } else {
      __builtin_prefetch(from + prefetch, 0, locality);
      __builtin_prefetch(from + prefetch + 64, 0, locality);
      store(to, load<I16>(from));
      store(to + 64, load<I16>(from + 64));
      from += 128;
    }
    to += kBlockBytes;
    if (++done == count) end_tile();
  }

  // Both tiles of a step; `block` must not have begun it.
  __attribute__((always_inline)) inline void step(uint8_t* tiles) {
    to = tiles;
    for (int64_t blocks = 2 * count; blocks; blocks--) block();
  }

 private:
  __attribute__((always_inline)) inline void end_tile() {
    for (; done < 8; done++, to += kBlockBytes) {
      store(to, I16{});
      store(to + 64, I16{});
    }
    done = 0;
    second = !second;
    if (second) return;
    left -= count;
    if (left) count = left < 8 ? left : 8;
    else next_segment();
  }

  __attribute__((always_inline)) inline void next_segment() {
    do {
      if (++segment == weight->segments) return;
      left = weight->segment[segment].blocks;
    } while (!left);
    count = left < 8 ? left : 8;
    from = panel + weight->segment[segment].offset;
    nibble = weight->segment[segment].bits == 4;
  }
};

// For few rows: a ring of steps in L1, 8 KB. A tile load waits until the stores of its tile have left the store buffer:
// the prototype unpacked one step ahead and stalled there with 17 rows and more.
struct Ring {
  static constexpr int64_t kAhead = 4;

  Unpacker<3> unpack;
  uint8_t* slots;
  int64_t panel, end;  // the next panel to unpack
  uint64_t written = 0, used = 0;  // steps; a step's slot is written again as soon as it has been used

  Ring(const Packed& w, int64_t panel_begin, int64_t panel_end, uint8_t* scratch)
      : unpack(&w), slots(scratch), panel(panel_begin), end(panel_end) {
    for (int64_t i = 0; i < kAhead; i++) work();
  }
  __attribute__((always_inline)) inline const uint8_t* next() { return slots + used++ % kAhead * kStepBytes; }
  __attribute__((always_inline)) inline void work() {
    while (unpack.at_end()) {
      if (panel == end) return;
      unpack.start(panel++, nullptr);
    }
    unpack.step(slots + written++ % kAhead * kStepBytes);
  }
};

// For many rows: one whole panel in use, the next one being unpacked evenly over the steps, the one after prefetched
// to L2 (a line at a time: the prototype nearly doubled its speed at 2048 rows by this and non-temporal stores).
struct Ahead {
  Unpacker<2> unpack;
  const uint8_t* at = nullptr;
  int64_t blocks = 0;            // of a panel, to unpack ...
  int64_t during = 1, debt = 0;  // ... during so many steps, after which the debt is 0 again

  explicit Ahead(const Packed& w) : unpack(&w) {
    for (int s = 0; s < w.segments; s++) blocks += 2 * w.segment[s].blocks;
  }
  __attribute__((always_inline)) inline const uint8_t* next() {
    const uint8_t* tiles = at;
    at += kStepBytes;
    return tiles;
  }
  __attribute__((always_inline)) inline void work() {
    debt += blocks;
    for (; debt >= during; debt -= during)
      if (!unpack.at_end()) unpack.block();
  }
};

// ---- epilogue ----------------------------------------------------------------------------------------------------------

// Sums of the segments of a block of rows, queued until their epilogue is done.
struct Drain {
  static constexpr int64_t kSlots = 4, kSums = kBlockRows * kPanel;
  static constexpr int64_t kBytes = (kSlots + 1) * kSums * 4;

  struct Part {
    int64_t panel, first;  // of the block's rows
    int segment;
    int64_t begin, end;  // which of them count
  };

  const LinearCall& call;
  const bool stream;
  int32_t* sums;   // [kSlots][kBlockRows][kPanel]
  float* totals;   // [kBlockRows][kPanel] of the block whose epilogue has begun
  int64_t rate;    // rows a step that keep the queue short
  uint64_t head = 0, tail = 0;  // queue[head % kSlots] … queue[(tail - 1) % kSlots] wait
  int64_t row = 0;              // the next one of the first part
  Part queue[kSlots];

  Drain(const LinearCall& c, int64_t rows, void* scratch)
      : call(c),
        stream(streams(c)),
        sums((int32_t*)scratch),
        totals((float*)(sums + kSlots * kSums)) {
    const int64_t all = panel_steps(*c.weight);
    rate = all ? (rows * c.weight->segments + all - 1) / all : rows;
  }
  Drain(const Drain&) = delete;

  // The epilogue of up to `count` rows.
  __attribute__((always_inline)) inline void rows(int64_t count) {
    if (head != tail) some(count);
  }
  void all() {
    while (head != tail) some(kBlockRows);
    if (stream) stream_end();
  }
  // Where the next part's sums go.
  int32_t* slot() {
    while (tail - head == kSlots) some(kBlockRows);
    return sums + tail % kSlots * kSums;
  }
  void push(const Part& part) {
    if (head == tail) row = part.begin;
    queue[tail++ % kSlots] = part;
  }

 private:
  // A few rows of the first part.
  void some(int64_t count) {
    const Part& part = queue[head % kSlots];
    const int64_t end = part.end - row < count ? part.end : row + count;
    if (call.sums) add<integers>(part, end);
    else if (part.segment + 1 < call.weight->segments) add<totals_only>(part, end);
    else add<outputs>(part, end);
    row = end;
    if (row == part.end && ++head != tail) row = queue[head % kSlots].begin;
  }

  // Apart for each end of a row, and with copies that stay in registers whatever is stored: there are only some 60
  // cycles a step in which to do this unnoticed.
  enum End { integers, totals_only, outputs };
  template <End kind>
  __attribute__((noinline)) void add(const Part& queued, int64_t end) {
    const Part part = queued;
    const Packed w = *call.weight;
    LinearCall local = call;
    local.weight = &w;
    if (kind != integers) local.sums = nullptr;
    const int32_t* from = sums + head % kSlots * kSums;
    for (int64_t r = row; r < end; r++) {
      const int64_t at = part.first + r;
      const Sums all = {{load<I16>(from + r * kPanel), load<I16>(from + r * kPanel + 16)}};
      float* total = totals + r * kPanel;
      Totals both = {};
      if (part.segment) both = {{load<F16>(total), load<F16>(total + 16)}};
      add_segment(local, part.panel, part.segment, at, all, both);
      if (kind == totals_only) {
        store(total, both.tile[0]);
        store(total + 16, both.tile[1]);
      } else if (kind == outputs) {
        const float* onto = local.onto ? local.onto + at * local.ldonto : nullptr;
        float* out = local.out + at * local.ldo;
        finish_row(w, part.panel, both, onto, out, stream);
      }
    }
  }
};

// ---- multiplication ----------------------------------------------------------------------------------------------------

// Rows first … first + rows - 1, of which those from first + begin on count, times one panel. T: tiles of 16 rows.
template <int T, class Weights>
RESQ_INLINE void multiply(const LinearCall& call, int64_t panel, int64_t first, int64_t begin, int64_t rows,
                          Weights& weights, Drain& drain) {
  const Packed& w = *call.weight;
  const int64_t ldq = call.ldq, rate = drain.rate;
  for (int s = 0; s < w.segments; s++) {
    const uint8_t* x = call.q + first * ldq + w.segment[s].begin;
    tile_zero<0>();
    tile_zero<1>();
    if (T == 2) tile_zero<2>(), tile_zero<3>();
    for (int64_t left = steps(w.segment[s]); left; left--, x += 64) {
      const uint8_t* tiles = weights.next();
      tile_load<4>(x, ldq);
      tile_load<6>(tiles, 64);
      tile_load<7>(tiles + 1024, 64);
      if (T == 2) tile_load<5>(x + kTileRows * ldq, ldq);
      tile_dot<0, 4, 6>();
      tile_dot<1, 4, 7>();
      if (T == 2) tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
      weights.work();
      drain.rows(rate);
    }
    int32_t* sums = drain.slot();
    tile_store<0>(sums, kPanel * 4);
    tile_store<1>(sums + 16, kPanel * 4);
    if (T == 2) {
      tile_store<2>(sums + kTileRows * kPanel, kPanel * 4);
      tile_store<3>(sums + kTileRows * kPanel + 16, kPanel * 4);
    }
    drain.push({panel, first, s, begin, rows});
  }
}

// Memory-bound, so one panel at a time: 1 x 2 tiles wait for their own sums (some 50 cycles a step), which is a quarter
// of the time in which one core reads a step's 1 KB. The prototype took two panels, 1 x 4 tiles.
template <int T>
static void few_rows(const LinearCall& call, int64_t panel_begin, int64_t panel_end, uint8_t* scratch) {
  const Tiles tiles(call.rows);
  Drain drain(call, call.rows, scratch);
  Ring weights(*call.weight, panel_begin, panel_end, scratch + Drain::kBytes);
  for (int64_t panel = panel_begin; panel < panel_end; panel++)
    multiply<T>(call, panel, 0, 0, call.rows, weights, drain);
  drain.all();
}

// Blocks are equally high, so that one configuration of the tiles serves all: the last one begins where it ends with
// the rows, and skips in the epilogue those that the block before it has done.
static void many_rows(const LinearCall& call, int64_t panel_begin, int64_t panel_end, uint8_t* scratch) {
  const Packed& w = *call.weight;
  const int64_t blocks = (call.rows + kBlockRows - 1) / kBlockRows, rows = (call.rows + blocks - 1) / blocks;
  // Blocks that stay in L2 together, in equal shares.
  const int64_t most = kRowBlockBytes / ((w.in < 1 ? 1 : w.in) * rows);
  const int64_t shares = most < 1 ? blocks : (blocks + most - 1) / most, share = (blocks + shares - 1) / shares;
  const int64_t all = panel_steps(w);

  const Tiles tiles(rows);
  Drain drain(call, rows, scratch);
  uint8_t* current = scratch + Drain::kBytes;
  uint8_t* other = current + all * kStepBytes;
  Ahead weights(w);
  for (weights.unpack.start(panel_begin, current); !weights.unpack.at_end();) weights.unpack.block();
  for (int64_t begin = 0; begin < blocks; begin += share) {
    const int64_t end = begin + share < blocks ? begin + share : blocks;
    for (int64_t panel = panel_begin; panel < panel_end; panel++) {
      const bool again = panel + 1 == panel_end;
      if (!again || end < blocks) weights.unpack.start(again ? panel_begin : panel + 1, other);
      weights.unpack.prefetch = panel + 2 < panel_end ? w.panel_bytes : kPrefetch;
      weights.during = (end - begin) * all;
      for (int64_t b = begin; b < end; b++) {
        weights.at = current;
        const int64_t first = (b + 1) * rows < call.rows ? b * rows : call.rows - rows;
        multiply<2>(call, panel, first, b * rows - first, rows, weights, drain);
      }
      uint8_t* const used = current;
      current = other;
      other = used;
    }
  }
  drain.all();
}

}  // namespace amx

static bool amx_serves(const LinearCall& call) { return call.rows >= amx::kLeastRows && call.weight->segments > 0; }

static size_t amx_scratch(const LinearCall& call) {
  const int64_t weights = call.rows <= amx::kBlockRows ? amx::Ring::kAhead : 2 * amx::panel_steps(*call.weight);
  return (size_t)(amx::Drain::kBytes + weights * amx::kStepBytes);
}

static void amx_linear(const LinearCall& call, int64_t panel_begin, int64_t panel_end, void* scratch) {
  if (panel_begin >= panel_end) return;
  if (call.rows <= amx::kTileRows) amx::few_rows<1>(call, panel_begin, panel_end, (uint8_t*)scratch);
  else if (call.rows <= amx::kBlockRows) amx::few_rows<2>(call, panel_begin, panel_end, (uint8_t*)scratch);
  else amx::many_rows(call, panel_begin, panel_end, (uint8_t*)scratch);
}

// Four sums, each waiting 4 instructions for itself: as many as hide an instruction's latency.
static int64_t amx_peak(int64_t loops) {
  const amx::Tiles tiles(amx::kBlockRows);
  alignas(64) uint8_t ones[1024];
  __builtin_memset(ones, 1, sizeof ones);
  amx::tile_load<4>(ones, 64);
  amx::tile_load<5>(ones, 64);
  amx::tile_load<6>(ones, 64);
  amx::tile_load<7>(ones, 64);
  amx::tile_zero<0>();
  amx::tile_zero<1>();
  amx::tile_zero<2>();
  amx::tile_zero<3>();
  for (int64_t i = 0; i < loops; i++) {
    amx::tile_dot<0, 4, 6>();
    amx::tile_dot<1, 4, 7>();
    amx::tile_dot<2, 5, 6>();
    amx::tile_dot<3, 5, 7>();
  }
  return loops * 4 * 16 * 16 * 64 * 2;
}
