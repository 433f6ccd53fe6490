// Threads that help one for a while. They wait, awake, for what it shares, so that sharing takes a fraction of a
// microsecond; and it waits only for tasks that somebody has begun, never for a thread that is late.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hg::cpu {

class Crew {
 public:
  using Clock = std::chrono::steady_clock;

  // The crew that this thread leads, or null.
  static Crew*& led() {
    static thread_local Crew* crew = nullptr;
    return crew;
  }

  explicit Crew(int64_t threads) : parts_(threads) {}

  // Calls f(task, thread) for every task below `tasks`, which are fewer than 2^32, on the leader, thread 0, and the
  // helpers with numbers below `threads`. Each begins with a part of its own, always the same: what it needs may still
  // be in its caches. It goes through it from the end if `back`. How long the leader waited for others in the end.
  template <class F>
  Clock::duration run(int64_t tasks, int64_t threads, bool back, const F& f) {
    f_ = &f;
    call_ = [](const void* f, int64_t task, int64_t thread) { (*static_cast<const F*>(f))(task, thread); };
    left_.store(tasks, std::memory_order_relaxed);
    back_ = back;
    const int64_t parts = std::min<int64_t>(threads, parts_.size());
    for (int64_t i = 0; i < parts; ++i) {
      parts_[i].begin = i * tasks / parts, parts_[i].end = (i + 1) * tasks / parts;
      parts_[i].open.store(threads * kThread + parts_[i].end - parts_[i].begin, std::memory_order_release);
    }
    // A task that shares work itself keeps it.
    led() = nullptr;
    while (take(0)) continue;
    led() = this;
    Clock::duration waited{};
    if (left_.load(std::memory_order_acquire)) {
      const auto start = Clock::now();
      while (left_.load(std::memory_order_acquire)) pause();
      waited = Clock::now() - start;
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    return waited;
  }

  // Does tasks as they come until the crew is dismissed.
  void help(int64_t thread) {
    while (!dismissed_.load(std::memory_order_relaxed))
      if (!take(thread)) pause();
  }

  void dismiss() { dismissed_.store(true, std::memory_order_relaxed); }

 private:
  static constexpr int64_t kThread = int64_t{1} << 32;

  struct alignas(64) Part {
    std::atomic<int64_t> open{0};  // threads that may take tasks, times kThread, plus tasks that nobody has taken yet
    int64_t begin = 0, end = 0;    // of its tasks
  };

  // Between two looks. Not by a yield: beside other programs that would take the core for a slice of time.
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  // Does a task if there is one for this thread.
  bool take(int64_t thread) {
    const int64_t parts = parts_.size();
    for (int64_t i = 0; i < parts; ++i)
      if (take(parts_[(thread + i) % parts], thread)) return true;
    return false;
  }

  bool take(Part& part, int64_t thread) {
    int64_t open = part.open.load(std::memory_order_relaxed);
    do {
      if (open % kThread == 0 || thread >= open / kThread) return false;
    } while (!part.open.compare_exchange_weak(open, open - 1, std::memory_order_acquire, std::memory_order_relaxed));
    // Until this task is done nothing else is shared.
    try {
      const int64_t taken = open % kThread;
      call_(f_, back_ ? part.begin + taken - 1 : part.end - taken, thread);
    } catch (...) {
      if (!failing_.exchange(true)) failure_ = std::current_exception();
    }
    left_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  std::vector<Part> parts_;
  alignas(64) std::atomic<int64_t> left_{0};  // tasks that are not done
  alignas(64) void (*call_)(const void* f, int64_t task, int64_t thread) = nullptr;
  const void* f_ = nullptr;
  bool back_ = false;
  std::atomic<bool> failing_{false}, dismissed_{false};
  std::exception_ptr failure_;
};

}  // namespace hg::cpu
