// Work shared among threads without waiting for any that the operating system does not run: the caller
// takes tasks like everybody else, and in the end waits only for tasks that others have begun.
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

// How a job is shared.
struct Team {
  int64_t threads;
  // Long enough for OpenMP's threads: they are at hand while they spin after torch's last operation, but all of
  // them have to come, which on a busy machine can take a slice of the scheduler's time, a few milliseconds.
  bool openmp;
};

// The team for so many units of work, of which every thread should have at least `grain`.
inline Team team_for(int64_t units, int64_t grain) {
  grain = std::max<int64_t>(1, grain);
  return {std::clamp<int64_t>(units / grain, 1, at::get_num_threads()), units / grain >= 32};
}

// Calls f(task) for every task below `tasks`; f must not throw.
template <class F>
void share(int64_t tasks, const Team& team, const F& f) {
  const int64_t threads = std::min(team.threads, tasks);
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
  if (team.openmp) return at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { job->work(); });
  for (int64_t helper = 1; helper < threads; ++helper) at::launch([job] { job->work(); });
  job->work();
  for (int spins = 0; job->done.load(std::memory_order_acquire) < tasks; ++spins)
    if (spins > 2000) std::this_thread::yield();
}

}  // namespace hg::cpu
