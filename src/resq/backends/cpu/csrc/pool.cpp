#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace resq {
namespace {

using Clock = std::chrono::steady_clock;
// A decode step calls an operator every few 10 µs: a worker that waits this long before it sleeps is woken by none of
// them, and one that sleeps costs nothing between requests.
constexpr auto kAwake = std::chrono::microseconds(60);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// State: scratch memory of one worker; grows, never shrinks.
class Arena {
 public:
  ~Arena() { std::free(data_); }
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, rounded);
      if (!data_) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct Job {
  const Work* work;
  int64_t count, piece;
  size_t scratch;
};

// State: the threads, asleep on `wake_` when idle, and a gate that lets up to `helpers` of them into the current job:
//   generation (32 bits) | helpers (15) | closed (1) | entered (16)
// The caller closes the gate when no piece is left and waits for those who entered: a thread that the system has not
// woken yet is not waited for, it finds the gate closed and goes on waiting.
class Pool {
 public:
  void run(int threads, const Job& job) {
    std::lock_guard<std::mutex> one_at_a_time(calls_);
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    failed_ = nullptr;
    const int helpers = threads - 1 < kMost ? threads - 1 : kMost;
    if (helpers) {
      while ((int)threads_.size() < helpers) {
        arenas_.push_back(new Arena);
        const int index = (int)threads_.size() + 1;
        threads_.emplace_back([this, index, seen = gate_.load() >> 32] { live(index, (uint32_t)seen); });
      }
      left_.store(0, std::memory_order_relaxed);
      const uint64_t generation = (gate_.load(std::memory_order_relaxed) >> 32) + 1;
      {
        std::lock_guard<std::mutex> lock(sleep_);
        gate_.store(generation << 32 | (uint64_t)helpers << 17, std::memory_order_release);
      }
      if (sleepers_.load(std::memory_order_acquire)) wake_.notify_all();
    }
    take(0);
    if (helpers) {
      const int entered = (int)(gate_.fetch_or(kClosed, std::memory_order_acq_rel) & kEntered);
      for (int spins = 0; left_.load(std::memory_order_acquire) != entered; spins++) {
        relax();
        if (spins > 2000) std::this_thread::yield();
      }
    }
    if (failed_) std::rethrow_exception(failed_);
  }

  size_t scratch_bytes() {
    std::lock_guard<std::mutex> one_at_a_time(calls_);
    size_t total = 0;
    for (Arena* arena : arenas_) total += arena->size();
    return total;
  }

 private:
  static constexpr uint64_t kEntered = 0xFFFF, kClosed = 1 << 16;
  static constexpr int kMost = (1 << 15) - 1;

  // Whether this thread is let into the job of the gate's generation, which becomes `seen`.
  bool enter(uint32_t& seen) {
    uint64_t gate = gate_.load(std::memory_order_acquire);
    for (;;) {
      seen = (uint32_t)(gate >> 32);
      if (gate & kClosed || (gate & kEntered) >= (gate >> 17 & kMost)) return false;
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return true;
    }
  }

  bool idle(uint32_t seen) const { return (uint32_t)(gate_.load(std::memory_order_acquire) >> 32) == seen; }

  void live(int index, uint32_t seen) {
    for (;;) {
      const auto until = Clock::now() + kAwake;
      while (idle(seen)) {
        for (int i = 0; i < 32; i++) relax();
        if (Clock::now() < until) continue;
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return !idle(seen); });
        sleepers_.fetch_sub(1);
      }
      if (!enter(seen)) continue;
      take(index);
      left_.fetch_add(1, std::memory_order_release);
    }
  }

  void take(int worker) {
    try {
      void* scratch = job_.scratch ? arenas_[(size_t)worker]->at_least(job_.scratch) : nullptr;
      for (;;) {
        const int64_t begin = next_.fetch_add(job_.piece, std::memory_order_relaxed);
        if (begin >= job_.count) return;
        (*job_.work)(begin, begin + job_.piece < job_.count ? begin + job_.piece : job_.count, scratch);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(sleep_);
      if (!failed_) failed_ = std::current_exception();
      next_.store(job_.count, std::memory_order_relaxed);
    }
  }

  std::mutex calls_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> gate_{kClosed};
  std::atomic<int> sleepers_{0}, left_{0};
  std::atomic<int64_t> next_{0};
  std::exception_ptr failed_;
  Job job_{};
  std::vector<std::thread> threads_;
  std::vector<Arena*> arenas_{new Arena};
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them and makes a new one.
Pool* pool = nullptr;
std::once_flag made;

Pool& the_pool() {
  std::call_once(made, [] {
    pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
  });
  return *pool;
}

}  // namespace

void parallel(int threads, int64_t count, int64_t piece, size_t scratch, const Work& work) {
  if (count <= 0) return;
  if (piece < 1) piece = 1;
  const int64_t pieces = (count + piece - 1) / piece;
  if (threads > pieces) threads = (int)pieces;
  the_pool().run(threads < 1 ? 1 : threads, Job{&work, count, piece, scratch});
}

size_t scratch_bytes() { return the_pool().scratch_bytes(); }

}  // namespace resq
