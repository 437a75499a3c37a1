#include "operators.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "pool.h"

namespace resq {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

// Pieces small enough that a worker which the system paused does not keep the others waiting, and large enough that
// fetching one costs nothing.
int64_t piece(int64_t count, int threads, int64_t per_thread) {
  return threads < 2 ? count : std::max<int64_t>(1, count / (threads * per_thread));
}

// Threads for work of about so many nanoseconds: another one pays where it has some 10 µs to do.
int worth(int threads, double nanoseconds) {
  const double most = 1 + nanoseconds / 10e3;
  return most < threads ? (int)most : threads;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One job over the panels of several linears: fn(call, panel_begin, panel_end, scratch).
template <class Call, class Scratch, class Run>
void over_panels(const std::vector<Call>& calls, int threads, int64_t per_thread, Scratch needs, Run run) {
  int64_t panels = 0;
  size_t scratch = 0;
  for (const Call& call : calls) {
    panels += call.weight->panels;
    scratch = std::max(scratch, needs(call));
  }
  parallel(threads, panels, piece(panels, threads, per_thread), scratch, [&](int64_t begin, int64_t end, void* memory) {
    int64_t first = 0;
    for (const Call& call : calls) {
      const int64_t count = call.weight->panels;
      const int64_t from = std::max(begin - first, (int64_t)0), to = std::min(end - first, count);
      if (from < to) run(call, from, to, memory);
      first += count;
    }
  });
}

}  // namespace

const Kernels& active() {
  const Kernels* kernels = chosen.load(std::memory_order_acquire);
  if (!kernels) {
    int count = 0;
    const Isa* sets = instruction_sets(&count);
    const Isa* first = std::find_if(sets, sets + count, [](const Isa& isa) { return !isa.missing; });
    kernels = first->kernels;  // scalar is always usable
    chosen.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void use(const std::string& name) {
  int count = 0;
  const Isa* sets = instruction_sets(&count);
  for (int i = 0; i < count; i++) {
    if (name != sets[i].name) continue;
    if (sets[i].missing) throw std::invalid_argument(sets[i].missing);
    chosen.store(sets[i].kernels, std::memory_order_release);
    return;
  }
  throw std::invalid_argument("no such instruction set");
}

void activate(const ActivationCall& call, int64_t rows, int threads) {
  const Kernels& k = active();
  // Measured with AVX-512: 0.4 ns a value to norm and round, 1.5 with SiLU and a Hadamard transform; dense maps more.
  const bool cheap = call.source != Source::silu_mul && call.format->map.kind < MapKind::hadamard;
  threads = worth(threads, (double)rows * (double)call.n * (cheap ? 0.4 : 1.5));
  // Dense maps take rows eight at a time.
  const int64_t most = piece(rows, threads, 4), block = most < 8 ? most : most / 8 * 8;
  parallel(threads, rows, block, k.activation_scratch(call),
           [&](int64_t begin, int64_t end, void* scratch) { k.activate(call, begin, end, scratch); });
}

void linears(const std::vector<LinearCall>& calls, int threads) {
  const Kernels& k = active();
  if (calls.empty() || calls[0].rows == 0) return;
  // The last piece of the slower thread is waited for: short ones. With many rows a piece begins by unpacking a panel
  // that nothing overlaps: not too short.
  const int64_t per_thread = calls[0].rows > 4 ? 8 : 32;
  over_panels(calls, threads, per_thread, k.linear_scratch,
              [&](const LinearCall& call, int64_t begin, int64_t end, void* scratch) {
                k.linear(call, begin, end, scratch);
              });
}

void float_linears(const std::vector<FloatLinearCall>& calls, int threads) {
  const Kernels& k = active();
  if (calls.empty() || calls[0].rows == 0) return;
  over_panels(calls, threads, 8, k.float_linear_scratch,
              [&](const FloatLinearCall& call, int64_t begin, int64_t end, void* scratch) {
                k.float_linear(call, begin, end, scratch);
              });
}

void dense(const DenseCall& call, int threads) {
  const Kernels& k = active();
  if (call.rows == 0) return;
  // Four outputs are computed together.
  const int64_t blocks = (call.out_features + 3) / 4;
  parallel(threads, blocks, piece(blocks, threads, 32), 0, [&](int64_t begin, int64_t end, void*) {
    k.dense(call, begin * 4, std::min(end * 4, call.out_features));
  });
}

void rope_append(const RopeCall& call, int threads) {
  const Kernels& k = active();
  const int64_t rows = call.batch * call.tokens;
  parallel(threads, rows, piece(rows, threads, 8), k.rope_scratch(call),
           [&](int64_t begin, int64_t end, void* scratch) { k.rope_append(call, begin, end, scratch); });
}

void attend(const AttendCall& call, int threads) {
  const Kernels& k = active();
  const int64_t tasks = k.attend_tasks(call, threads);
  const size_t bytes = k.attend_shared(call, threads);
  // Only long contexts of few queries are split; the buffer is then small beside the cache that is read.
  std::unique_ptr<void, decltype(&std::free)> shared(bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr,
                                                     &std::free);
  if (bytes && !shared) throw std::bad_alloc();
  parallel(threads, tasks, 1, k.attend_scratch(call), [&](int64_t begin, int64_t end, void* scratch) {
    for (int64_t task = begin; task < end; task++) k.attend(call, threads, task, scratch, shared.get());
  });
  if (!bytes) return;
  parallel(threads, k.merge_tasks(call, threads), 1, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t task = begin; task < end; task++) k.merge(call, threads, task, shared.get());
  });
}

double integer_peak(int threads, double seconds) {
  const Kernels& k = active();
  std::atomic<int64_t> operations{0};
  const double start = now();
  parallel(threads, threads, 1, 0, [&](int64_t, int64_t, void*) {
    while (now() - start < seconds) operations += k.integer_peak(20000);
  });
  return (double)operations / (now() - start) / 1e9;
}

double read_bandwidth(const uint8_t* data, size_t bytes, int pattern, int threads) {
  const Kernels& k = active();
  std::atomic<uint64_t> seen{0};
  const int64_t blocks = (int64_t)(bytes >> 20);
  const double start = now();
  parallel(threads, blocks, piece(blocks, threads, 32), 0, [&](int64_t begin, int64_t end, void*) {
    seen ^= k.read(data + (begin << 20), (size_t)(end - begin) << 20, pattern);
  });
  const double taken = now() - start;
  // The value is used, so that no read can be left out.
  return (double)(blocks << 20) / (taken + (seen.load() == 1 ? 1e-12 : 0));
}

}  // namespace resq
