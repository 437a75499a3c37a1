// The Python module: addresses and sizes in, nothing allocated that Python keeps but handles. operators.py checks shapes
// and types of tensors before it takes their addresses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>

#include "operators.h"
#include "pack.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using Address = uintptr_t;

namespace resq {
namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

Format make_format(const std::vector<std::pair<int, int64_t>>& bands, int64_t groups, bool half_scale,
                   int map_input_bits) {
  if (bands.size() > (size_t)kMaxBands) throw nb::value_error("too many bands");
  Format f;
  int64_t begin = 0;
  for (const auto& [bits, size] : bands) {
    f.band[f.bands++] = {bits, begin, size, 1};
    begin += size;
  }
  f.groups = groups;
  f.half_scale = half_scale;
  f.map_input_bits = map_input_bits;
  return f;
}

Norm norm_of(double eps, Address gain, bool present) {
  Norm norm;
  norm.present = present;
  norm.eps = eps;
  norm.gain = at<const double>(gain);
  return norm;
}

// (eps, address of float64 gains or 0), or None.
using NormArgument = std::optional<std::pair<double, Address>>;

Norm norm_of(const NormArgument& norm) { return norm ? norm_of(norm->first, norm->second, true) : Norm{}; }

// (address, capacity, record, format)
using StoreArgument = std::tuple<Address, int64_t, int64_t, const Format*>;

Store store_of(const StoreArgument& store) {
  return {at<uint8_t>(std::get<0>(store)), std::get<1>(store), std::get<2>(store), std::get<3>(store)};
}

// (linear, out, ldo, onto, ldonto) for every linear that reads the same activations.
using OutputArgument = std::tuple<const PackedLinear*, Address, int64_t, Address, int64_t>;

// A call for each output, all with this input.
template <class Call>
std::vector<Call> calls_of(Call call, const std::vector<OutputArgument>& outputs) {
  std::vector<Call> calls;
  for (const auto& [linear, out, ldo, onto, ldonto] : outputs) {
    call.weight = &linear->packed;
    call.out = at<float>(out);
    call.ldo = ldo;
    call.onto = at<const float>(onto);
    call.ldonto = ldonto;
    calls.push_back(call);
  }
  return calls;
}

LinearCall input_of(Address q, int64_t ldq, Address scale, Address zero, int64_t ranges, int64_t rows) {
  LinearCall call;
  call.q = at<const uint8_t>(q);
  call.ldq = ldq;
  call.scale = at<const float>(scale);
  call.zero = at<const uint8_t>(zero);
  call.ranges = ranges;
  call.rows = rows;
  return call;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "ResQ's CPU kernels; resq.backends.cpu.operators is the way to call them.";
  m.attr("PANEL") = kPanel;
  m.attr("TAIL") = kTail;
  m.attr("MAX_BANDS") = kMaxBands;

  m.def("instruction_sets", [] {
    int count = 0;
    const Isa* sets = instruction_sets(&count);
    std::vector<std::pair<std::string, std::optional<std::string>>> names;
    for (int i = 0; i < count; i++)
      names.emplace_back(sets[i].name,
                         sets[i].missing ? std::optional<std::string>(sets[i].missing) : std::nullopt);
    return names;
  }, "Fastest first: (name, what this machine lacks or None).");
  m.def("active", [] { return std::string(active().name); }, "The instruction set in use.");
  m.def("use", &use, "name"_a, "Use this instruction set; ValueError when it is unknown or unusable here.");
  m.def("scratch_bytes", &scratch_bytes, "Bytes of all workers' scratch memory.");

  nb::class_<Format>(m, "Format")
      .def("__init__", [](Format* self, const std::vector<std::pair<int, int64_t>>& bands, int64_t groups,
                          bool half_scale, int map_input_bits) {
        new (self) Format(make_format(bands, groups, half_scale, map_input_bits));
      }, "bands"_a, "groups"_a, "half_scale"_a, "map_input_bits"_a)
      .def("clip", [](Format& f, const std::vector<float>& clip) {
        if (clip.size() != (size_t)f.bands) throw nb::value_error("one clip a band");
        for (int b = 0; b < f.bands; b++) f.band[b].clip = clip[(size_t)b];
      })
      .def("permute", [](Format& f, int64_t n, Address index) {
        f.map.kind = MapKind::permutation;
        f.map.n = n;
        f.map.index = at<const int32_t>(index);
      })
      .def("multiply", [](Format& f, int64_t n, int64_t heads, Address matrix, bool wide) {
        f.map.kind = heads > 1 ? MapKind::per_head : MapKind::dense;
        f.map.n = n;
        f.map.heads = heads;
        if (wide) f.map.matrix64 = at<const double>(matrix);
        else f.map.matrix = at<const float>(matrix);
      })
      .def("hadamard", [](Format& f, int64_t n, int64_t power, int64_t order, int64_t inner, Address factor,
                          bool signs) {
        f.map.kind = MapKind::hadamard;
        f.map.n = n;
        f.map.power = power;
        f.map.order = order;
        f.map.inner = inner;
        f.map.factor = at<const double>(factor);
        f.map.factor_signs = signs;
      });

  m.def("activate", [](int threads, int source, Address x, int64_t ldx, Address up, int64_t ldup, int64_t rows,
                       int64_t n, const NormArgument& norm, const Format& format, Address q, int64_t ldq,
                       Address scale, Address zero, Address plain) {
    ActivationCall call;
    call.source = (Source)source;
    call.x = at<const float>(x);
    call.ldx = ldx;
    call.up = at<const float>(up);
    call.ldup = ldup;
    call.n = n;
    call.norm = norm_of(norm);
    call.format = &format;
    call.out = {at<uint8_t>(q), ldq, at<float>(scale), at<uint8_t>(zero)};
    call.plain = at<float>(plain);
    activate(call, rows, threads);
  }, "threads"_a, "source"_a, "x"_a, "ldx"_a, "up"_a, "ldup"_a, "rows"_a, "n"_a, "norm"_a.none(), "format"_a, "q"_a,
     "ldq"_a, "scale"_a, "zero"_a, "plain"_a, Unlocked());

  nb::class_<PackedLinear>(m, "PackedLinear")
      .def("__init__", [](PackedLinear* self, int threads, int64_t out, int64_t in,
                          const std::vector<std::tuple<Address, int64_t, int, int64_t>>& bands,
                          const std::vector<int>& source, int64_t groups, Address scale, Address bias) {
        std::vector<StoredBand> stored;
        for (const auto& [rows, bytes, bits, size] : bands) stored.push_back({at<const uint8_t>(rows), bytes, bits, size});
        new (self) PackedLinear(out, in, stored, source, groups, at<const float>(scale), at<const float>(bias), threads);
      }, "threads"_a, "out"_a, "in_"_a, "bands"_a, "source"_a, "groups"_a, "scale"_a, "bias"_a, Unlocked())
      .def_prop_ro("nbytes", &PackedLinear::bytes)
      .def_prop_ro("segments", [](const PackedLinear& w) { return w.packed.segments; })
      .def_prop_ro("ranges", [](const PackedLinear& w) { return w.ranges; });

  m.def("linears", [](int threads, Address q, int64_t ldq, Address scale, Address zero, int64_t ranges, int64_t rows,
                      const std::vector<OutputArgument>& outputs) {
    linears(calls_of(input_of(q, ldq, scale, zero, ranges, rows), outputs), threads);
  }, Unlocked());
  m.def("accumulate", [](int threads, Address q, int64_t ldq, Address scale, Address zero, int64_t ranges,
                         int64_t rows, const PackedLinear& linear, Address sums) {
    LinearCall call = input_of(q, ldq, scale, zero, ranges, rows);
    call.weight = &linear.packed;
    call.sums = at<int32_t>(sums);
    linears({call}, threads);
  }, Unlocked());
  m.def("float_linears", [](int threads, Address x, int64_t ldx, int64_t rows,
                            const std::vector<OutputArgument>& outputs) {
    FloatLinearCall input;
    input.x = at<const float>(x);
    input.ldx = ldx;
    input.rows = rows;
    float_linears(calls_of(input, outputs), threads);
  }, Unlocked());
  m.def("dense", [](int threads, Address weight, int element, int64_t ldw, int64_t out_features, int64_t in_features,
                    Address bias, Address x, int64_t ldx, int64_t rows, Address out, int64_t ldo, Address onto,
                    int64_t ldonto) {
    DenseCall call;
    call.weight = at<const void>(weight);
    call.element = (Element)element;
    call.ldw = ldw;
    call.out_features = out_features;
    call.in_features = in_features;
    call.bias = at<const float>(bias);
    call.x = at<const float>(x);
    call.ldx = ldx;
    call.rows = rows;
    call.out = at<float>(out);
    call.ldo = ldo;
    call.onto = at<const float>(onto);
    call.ldonto = ldonto;
    dense(call, threads);
  }, Unlocked());

  m.def("rope_append", [](int threads, Address q, Address k, Address v, int64_t ldq, int64_t ldk, int64_t ldv,
                          int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                          Address cos, Address sin, const NormArgument& query_norm, const NormArgument& key_norm,
                          const Format& query, const StoreArgument& keys, const StoreArgument& values,
                          int64_t position, Address out) {
    RopeCall call;
    call.q = at<const float>(q);
    call.k = at<const float>(k);
    call.v = at<const float>(v);
    call.ldq = ldq;
    call.ldk = ldk;
    call.ldv = ldv;
    call.batch = batch;
    call.tokens = tokens;
    call.heads = heads;
    call.kv_heads = kv_heads;
    call.head_dim = head_dim;
    call.cos = at<const float>(cos);
    call.sin = at<const float>(sin);
    call.query_norm = norm_of(query_norm);
    call.key_norm = norm_of(key_norm);
    call.query = &query;
    call.keys = store_of(keys);
    call.values = store_of(values);
    call.position = position;
    call.out = at<float>(out);
    rope_append(call, threads);
  }, "threads"_a, "q"_a, "k"_a, "v"_a, "ldq"_a, "ldk"_a, "ldv"_a, "batch"_a, "tokens"_a, "heads"_a, "kv_heads"_a,
     "head_dim"_a, "cos"_a, "sin"_a, "query_norm"_a.none(), "key_norm"_a.none(), "query"_a, "keys"_a, "values"_a,
     "position"_a, "out"_a, Unlocked());
  m.def("attend", [](int threads, Address q, int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, const StoreArgument& keys, const StoreArgument& values, int64_t length,
                     Address starts, int64_t window, float scale, Address out) {
    AttendCall call;
    call.q = at<const float>(q);
    call.batch = batch;
    call.tokens = tokens;
    call.heads = heads;
    call.kv_heads = kv_heads;
    call.head_dim = head_dim;
    call.keys = store_of(keys);
    call.values = store_of(values);
    call.length = length;
    call.starts = at<const int64_t>(starts);
    call.window = window;
    call.scale = scale;
    call.out = at<float>(out);
    attend(call, threads);
  }, Unlocked());

  m.def("integer_peak", &integer_peak, "threads"_a, "seconds"_a, Unlocked(),
        "Billions of integer operations a second on registers (a multiply-add is 2), all threads.");
  m.def("read_bandwidth", [](Address data, size_t bytes, int pattern, int threads) {
    return read_bandwidth(at<const uint8_t>(data), bytes, pattern, threads);
  }, "data"_a, "bytes"_a, "pattern"_a, "threads"_a, Unlocked(), "Bytes a second of one pass over memory.");
}

}  // namespace resq
