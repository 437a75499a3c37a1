// What a kernel is told: plain structures of pointers, sizes and strides. Nothing here knows torch or Python.
//
// One table of functions per instruction set (`Kernels`). Every function works on a range of rows, panels or tasks that
// the driver (operators.cpp) hands to a worker together with scratch memory of the size the driver asked for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resq {

constexpr int kMaxBands = 8;
// Outputs of one weight panel; see linear.h for the layout.
constexpr int64_t kPanel = 32;
// Readable bytes after the last row of quantized activations: kernels read whole blocks of 64 coordinates.
constexpr int64_t kTail = 64;

// ---- activations -----------------------------------------------------------------------------------------------------

enum class MapKind : int { none, permutation, hadamard, dense, per_head };

// A linear map on a row of n coordinates, x' = x M, taken in float64 (numerics/maps.py).
struct Map {
  MapKind kind = MapKind::none;
  int64_t n = 0;
  const int32_t* index = nullptr;     // permutation [n]: x'[i] = x[index[i]]
  const float* matrix = nullptr;      // dense [n, n], per_head [heads, h, h], row-major: float32 ...
  const double* matrix64 = nullptr;   // ... or float64; exactly one of the two is set
  int64_t heads = 1;                  // per_head
  int64_t power = 1, order = 1;       // hadamard: T = H_power (x) F_order, acting on i of coordinate i·inner + j
  int64_t inner = 1;
  const double* factor = nullptr;     // hadamard [order, order]: sqrt(order) F, null when order is 1
  bool factor_signs = false;          // whether every entry of factor is +1 or -1
};

struct Band {
  int bits = 0;  // 1 to 6 or 8
  int64_t begin = 0, size = 0;
  float clip = 1;  // what the ends of its ranges are multiplied by
};

// x -> (round to map_input_bits) -> map -> round in bands (numerics/formats.py: ActivationFormat).
struct Format {
  Map map;
  int bands = 0;  // 0: stays float32
  Band band[kMaxBands];
  int64_t groups = 1;       // equal parts of each band with a range of their own
  bool half_scale = false;  // scales rounded to float16 before use
  int map_input_bits = 0;   // 0: the map's input is not rounded
};

// Rows of integers: q [rows, ld] uint8, scale and zero [rows, bands · groups] (band-major).
struct QuantizedRows {
  uint8_t* q = nullptr;
  int64_t ld = 0;
  float* scale = nullptr;
  uint8_t* zero = nullptr;
};

struct Norm {
  bool present = false;
  double eps = 0;
  const double* gain = nullptr;  // [n] or null
};

enum class Source : int { plain, norm, silu_mul };

// rows of: plain x | RMSNorm(x) | SiLU(x) · up; then the format. Exactly one of out.q and plain is written.
struct ActivationCall {
  Source source = Source::plain;
  const float* x = nullptr;  // [rows, ldx]; the gate for silu_mul
  int64_t ldx = 0;
  const float* up = nullptr;  // [rows, ldup]
  int64_t ldup = 0;
  int64_t n = 0;
  Norm norm;
  const Format* format = nullptr;
  QuantizedRows out;
  float* plain = nullptr;  // [rows, n], when the format has no bands
};

// ---- linears ---------------------------------------------------------------------------------------------------------

// Columns begin … begin + size - 1 of the weight, which share an activation range and a weight scale.
struct Segment {
  int64_t begin = 0, size = 0;
  int bits = 0;          // 4 or 8: how the panel stores them
  int range = 0;         // which (band, group) range of the activation row
  int64_t offset = 0;    // bytes from the panel's start to its weights
  int64_t blocks = 0;    // ceil(size / 8)
};

// A prepacked linear. Panel p holds outputs 32p … 32p + 31 (zeros beyond `out`); layout in linear.h.
struct Packed {
  int64_t out = 0, in = 0, panels = 0;
  int segments = 0;
  const Segment* segment = nullptr;
  int64_t epilogue = 0;     // bytes from the panel's start to float scale[segments][32], int32 sums[segments][32]
  int64_t panel_bytes = 0;  // a multiple of 64
  const uint8_t* data = nullptr;
  const float* bias = nullptr;  // [panels · 32] or null
};

struct LinearCall {
  const Packed* weight = nullptr;
  const uint8_t* q = nullptr;  // [rows, ldq], kTail readable bytes after the last row's last coordinate
  int64_t ldq = 0;
  const float* scale = nullptr;   // [rows, ranges]
  const uint8_t* zero = nullptr;  // [rows, ranges]
  int64_t ranges = 0, rows = 0;
  float* out = nullptr;  // [rows, ldo]
  int64_t ldo = 0;
  const float* onto = nullptr;  // added to the result; [rows, ldonto] or null
  int64_t ldonto = 0;
  int32_t* sums = nullptr;  // tests: Σ (q_x - z_x) q_w per segment, [rows, segments, out]; out is then not written
};

// Float activations times packed weights: y = Σ_segments s_w Σ x w.
struct FloatLinearCall {
  const Packed* weight = nullptr;
  const float* x = nullptr;  // [rows, ldx]
  int64_t ldx = 0, rows = 0;
  float* out = nullptr;
  int64_t ldo = 0;
  const float* onto = nullptr;
  int64_t ldonto = 0;
};

enum class Element : int { f32, bf16, f16 };

// Plain weights [out, ldw], read where they lie.
struct DenseCall {
  const void* weight = nullptr;
  Element element = Element::f32;
  int64_t ldw = 0, out_features = 0, in_features = 0;
  const float* bias = nullptr;
  const float* x = nullptr;
  int64_t ldx = 0, rows = 0;
  float* out = nullptr;
  int64_t ldo = 0;
  const float* onto = nullptr;
  int64_t ldonto = 0;
};

// ---- keys and values ---------------------------------------------------------------------------------------------------

// The keys or the values of one layer: records [batch, kv_heads, capacity, record] of bytes, unaligned.
// Packed: for each band its integers (4-bit storage up to 4 bits: byte j of a band of n holds coordinate j in the low
// nibble and coordinate j + ceil(n / 2) in the high one; 8-bit storage, a byte each, for 5, 6 and 8 bits), then the
// scales [bands] (float16 or float32, little-endian), then the zero points [bands] (uint8). Plain: h float16.
struct Store {
  uint8_t* data = nullptr;
  int64_t capacity = 0, record = 0;
  const Format* format = nullptr;  // bands == 0: plain float16
};

struct RopeCall {
  const float* q = nullptr;  // [b, t, heads, h] rows with strides below (in floats, per token)
  const float* k = nullptr;  // [b, t, kv_heads, h]
  const float* v = nullptr;
  int64_t ldq = 0, ldk = 0, ldv = 0;  // between tokens; heads are contiguous
  int64_t batch = 0, tokens = 0, heads = 0, kv_heads = 0, head_dim = 0;
  const float* cos = nullptr;  // [b, t, h]
  const float* sin = nullptr;
  Norm query_norm, key_norm;
  const Format* query = nullptr;  // its map only; queries are not rounded
  Store keys, values;             // token i of the call goes to slot position + i
  int64_t position = 0;
  float* out = nullptr;  // projected q, [b, t, heads, h] contiguous
};

struct AttendCall {
  const float* q = nullptr;  // [b, t, heads, h] contiguous
  int64_t batch = 0, tokens = 0, heads = 0, kv_heads = 0, head_dim = 0;
  Store keys, values;
  int64_t length = 0;               // slots filled; the last `tokens` of them are the queries'
  const int64_t* starts = nullptr;  // [b] first valid slot, or null
  int64_t window = 0;               // 0: none
  float scale = 1;
  float* out = nullptr;  // [b, t, heads · h]
};

// ---- the table -----------------------------------------------------------------------------------------------------------

struct Kernels {
  const char* name;
  size_t (*activation_scratch)(const ActivationCall&);
  void (*activate)(const ActivationCall&, int64_t begin, int64_t end, void* scratch);
  size_t (*linear_scratch)(const LinearCall&);
  void (*linear)(const LinearCall&, int64_t panel_begin, int64_t panel_end, void* scratch);
  size_t (*float_linear_scratch)(const FloatLinearCall&);
  void (*float_linear)(const FloatLinearCall&, int64_t panel_begin, int64_t panel_end, void* scratch);
  void (*dense)(const DenseCall&, int64_t out_begin, int64_t out_end);
  size_t (*rope_scratch)(const RopeCall&);
  void (*rope_append)(const RopeCall&, int64_t begin, int64_t end, void* scratch);  // rows of b · t
  // Work of one attention call: `attend_tasks` independent tasks, then `merge_tasks` that join their partial results.
  int64_t (*attend_tasks)(const AttendCall&, int workers);
  size_t (*attend_scratch)(const AttendCall&);              // per worker
  size_t (*attend_shared)(const AttendCall&, int workers);  // per call, shared by its tasks; 0 when nothing is merged
  void (*attend)(const AttendCall&, int workers, int64_t task, void* scratch, void* shared);
  int64_t (*merge_tasks)(const AttendCall&, int workers);
  void (*merge)(const AttendCall&, int workers, int64_t task, void* shared);
  // Limits of this machine: integer multiply-adds (counted as 2 each) done by `loops` rounds on registers only.
  int64_t (*integer_peak)(int64_t loops);
  // Reads bytes [begin, end) of memory and returns a value that depends on all of it; two access patterns.
  uint64_t (*read)(const uint8_t* data, size_t bytes, int pattern);
};

}  // namespace resq
