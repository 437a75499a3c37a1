// Weights from the checkpoint's plain rows into panels (layout in linear.h), made once at load.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"

namespace resq {

// A band of a stored linear: rows of `bytes` bytes, a little-endian stream of two's-complement values of `bits` bits,
// of one bit for -1 and 1 (numerics/packing.py).
struct StoredBand {
  const uint8_t* rows = nullptr;
  int64_t bytes = 0;
  int bits = 0;
  int64_t size = 0;
};

// Which activation range a band's columns meet: bands of the input are at least as coarse, groups equal parts of each.
struct PackedLinear {
  PackedLinear(int64_t out, int64_t in, const std::vector<StoredBand>& bands, const std::vector<int>& source,
               int64_t groups, const float* scale, const float* bias, int threads);
  ~PackedLinear();
  PackedLinear(const PackedLinear&) = delete;
  PackedLinear& operator=(const PackedLinear&) = delete;

  size_t bytes() const { return bytes_; }  // panels, scales and sums; padding included

  Packed packed;
  int64_t ranges = 0;  // of an activation row

 private:
  std::vector<Segment> segments_;
  std::vector<float> bias_;
  uint8_t* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace resq
