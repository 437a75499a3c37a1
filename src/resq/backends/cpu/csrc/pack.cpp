#include "pack.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "pool.h"

#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace resq {
namespace {

// Values k … k + count - 1 of a row's bit stream, sign-extended; bits 0 and 1 are -1 and 1.
void decode(const uint8_t* row, int64_t bytes, int bits, int64_t k, int64_t count, int8_t* to) {
  if (bits == 8) {
    std::memcpy(to, row + k, (size_t)count);
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = (k + i) * bits, byte = at / 8;
    unsigned word = row[byte];
    if (byte + 1 < bytes) word |= (unsigned)row[byte + 1] << 8;
    const int value = (int)(word >> (at % 8)) & ((1 << bits) - 1);
    if (bits == 1)
      to[i] = (int8_t)(2 * value - 1);
    else
      to[i] = (int8_t)(value >= 1 << (bits - 1) ? value - (1 << bits) : value);
  }
}

// A prefill's activations are tens of megabytes that every layer allocates and frees. glibc would give them back to the
// system each time, and faulting their pages in again took a fifth of a prefill of 512 tokens.
void keep_freed_memory() {
#if defined(__GLIBC__)
  static std::once_flag once;
  std::call_once(once, [] {
    mallopt(M_MMAP_THRESHOLD, 256 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
  });
#endif
}

constexpr size_t kHuge = (size_t)2 << 20;

// Zeroed memory; on 2 MB pages where the system has them, so that streaming it misses few translations.
uint8_t* allocate(size_t bytes) {
#if defined(__linux__)
  const size_t page = 4096, rounded = (bytes + page - 1) / page * page;
  void* raw = mmap(nullptr, rounded + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  auto start = ((uintptr_t)raw + kHuge - 1) / kHuge * kHuge;
  const size_t head = start - (uintptr_t)raw, tail = kHuge - head;
  if (head) munmap(raw, head);
  if (tail) munmap((void*)(start + rounded), tail);
  if (rounded >= kHuge) madvise((void*)start, rounded / kHuge * kHuge, MADV_HUGEPAGE);
  return (uint8_t*)start;
#else
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return (uint8_t*)p;
#endif
}

void release(uint8_t* memory, size_t bytes) {
#if defined(__linux__)
  if (memory) munmap(memory, (bytes + 4095) / 4096 * 4096);
#else
  (void)bytes;
  std::free(memory);
#endif
}

}  // namespace

PackedLinear::PackedLinear(int64_t out, int64_t in, const std::vector<StoredBand>& bands,
                           const std::vector<int>& source, int64_t groups, const float* scale, const float* bias,
                           int threads) {
  keep_freed_memory();
  std::vector<int> band_of;
  int64_t offset = 0, begin = 0;
  for (size_t b = 0; b < bands.size(); b++) {
    const int64_t size = bands[b].size / groups;
    for (int64_t g = 0; g < groups; g++) {
      Segment segment;
      segment.begin = begin;
      segment.size = size;
      segment.bits = bands[b].bits <= 4 ? 4 : 8;
      segment.range = (int)(source[b] * groups + g);
      segment.offset = offset;
      segment.blocks = (size + 7) / 8;
      offset += segment.blocks * 2 * (segment.bits == 4 ? 64 : 128);
      begin += size;
      segments_.push_back(segment);
      band_of.push_back((int)b);
      if (segment.range >= ranges) ranges = segment.range + 1;
    }
  }
  packed.out = out;
  packed.in = in;
  packed.panels = (out + kPanel - 1) / kPanel;
  packed.segments = (int)segments_.size();
  packed.segment = segments_.data();
  packed.epilogue = offset;
  packed.panel_bytes = offset + packed.segments * kPanel * 8;
  bytes_ = (size_t)(packed.panels * packed.panel_bytes);
  memory_ = allocate(bytes_);
  packed.data = memory_;
  if (bias) {
    bias_.assign((size_t)(packed.panels * kPanel), 0.0f);
    std::memcpy(bias_.data(), bias, (size_t)out * sizeof(float));
    packed.bias = bias_.data();
  }

  std::vector<int64_t> starts;  // of each segment within its band
  for (size_t s = 0; s < segments_.size(); s++)
    starts.push_back(s && band_of[s] == band_of[s - 1] ? starts.back() + segments_[s - 1].size : 0);
  const auto work = [&](int64_t first, int64_t last, void* scratch) {
    int8_t* row = (int8_t*)scratch;
    for (int64_t panel = first; panel < last; panel++) {
      uint8_t* base = memory_ + panel * packed.panel_bytes;
      float* scales = (float*)(base + packed.epilogue);
      int32_t* sums = (int32_t*)(scales + packed.segments * kPanel);
      for (int64_t n = 0; n < kPanel && panel * kPanel + n < out; n++) {
        const int64_t o = panel * kPanel + n, tile = n / 16, lane = n % 16;
        for (int s = 0; s < packed.segments; s++) {
          const Segment& segment = segments_[(size_t)s];
          const StoredBand& band = bands[(size_t)band_of[(size_t)s]];
          std::memset(row + segment.blocks * 8 - 8, 0, 8);
          decode(band.rows + o * band.bytes, band.bytes, band.bits, starts[(size_t)s], segment.size, row);
          int32_t total = 0;
          for (int64_t k = 0; k < segment.size; k++) total += row[k];
          sums[s * kPanel + n] = total;
          scales[s * kPanel + n] = scale[o * (int64_t)bands.size() + band_of[(size_t)s]];
          const int64_t bytes = segment.bits == 4 ? 64 : 128;
          for (int64_t block = 0; block < segment.blocks; block++) {
            const int64_t step = block / 8, left = segment.blocks - step * 8, in_step = left < 8 ? left : 8;
            uint8_t* at = base + segment.offset + (step * 16 + tile * in_step + block % 8) * bytes + lane * 4;
            const int8_t* v = row + block * 8;
            for (int j = 0; j < 4; j++) {
              if (segment.bits == 4) {
                at[j] = (uint8_t)((v[j] & 15) | (v[4 + j] & 15) << 4);
              } else {
                at[j] = (uint8_t)v[j];
                at[64 + j] = (uint8_t)v[4 + j];
              }
            }
          }
        }
      }
    }
  };
  parallel(threads, packed.panels, 4, (size_t)in + 64, work);
}

PackedLinear::~PackedLinear() { release(memory_, bytes_); }

}  // namespace resq
