// Work shared with torch's inter-op threads, without a barrier: the caller takes tasks like everybody
// else, and in the end waits only for tasks that others have begun. A helper that the operating system
// does not run in time costs nothing; in an OpenMP region all would wait for it.
#pragma once

#include <ATen/Parallel.h>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace hg::cpu {

// A forked child has none of its parent's threads, and perhaps a lock that one of them held: it works alone.
inline std::atomic<bool> in_forked_child{false};
#if defined(__unix__) || defined(__APPLE__)
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

// Threads that are worth waking for so many units of work, of which one thread should have at least `grain`.
inline int64_t threads_for(int64_t units, int64_t grain) {
  return std::clamp<int64_t>(units / std::max<int64_t>(1, grain), 1, at::get_num_threads());
}

// Calls f(task) for every task below `tasks`, on at most `threads` threads; f must not throw.
template <class F>
void share(int64_t tasks, int64_t threads, const F& f) {
  threads = std::min(threads, tasks);
  if (threads <= 1 || at::in_parallel_region() || in_forked_child) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  // Shared, because a helper may start after the caller has returned; it then finds no task and leaves f alone.
  struct Job {
    std::atomic<int64_t> next{0}, done{0};
    int64_t tasks;
    const F* f;

    void work() {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        (*f)(task);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  const auto job = std::make_shared<Job>();
  job->tasks = tasks;
  job->f = &f;
  for (int64_t helper = 1; helper < threads; ++helper) at::launch([job] { job->work(); });
  job->work();
  for (int spins = 0; job->done.load(std::memory_order_acquire) < tasks; ++spins)
    if (spins > 2000) std::this_thread::yield();
}

}  // namespace hg::cpu
