// One pool of sleeping threads for everything that the kernels do.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resq {

// A reference to a callable (begin, end, scratch) that outlives the call; no allocation, unlike std::function.
class Work {
 public:
  template <class F>
  Work(const F& f)  // NOLINT: implicit on purpose
      : self_(&f), call_([](const void* self, int64_t begin, int64_t end, void* scratch) {
          (*static_cast<const F*>(self))(begin, end, scratch);
        }) {}
  void operator()(int64_t begin, int64_t end, void* scratch) const { call_(self_, begin, end, scratch); }

 private:
  const void* self_;
  void (*call_)(const void*, int64_t, int64_t, void*);
};

// Runs work(begin, end, scratch) over [0, count) in pieces of at most `piece`, handed out in order to `threads` workers,
// the caller being worker 0. Returns when all is done; one call at a time, others wait. An exception of `work` is
// rethrown here. `scratch` bytes (64-byte aligned, contents undefined) belong to each worker during the call.
void parallel(int threads, int64_t count, int64_t piece, size_t scratch, const Work& work);

// Bytes that all workers' scratch memory takes now.
size_t scratch_bytes();

}  // namespace resq
