// Work shared with torch's OpenMP threads. They are at hand while they spin after torch's last operation; but a thread
// that has lost its core on a busy machine keeps the others waiting for a slice of the scheduler's time, a few
// milliseconds. So a short job that had to wait too long sends the next ones back to a single thread for a while.
#pragma once

#include <ATen/Parallel.h>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <type_traits>

#include "crew.h"

namespace hg::cpu {

// Grains of work from which on a job is long.
constexpr int64_t kPatience = 128;
// Short jobs that run alone after one had to wait; twice as many each time that the next one has to wait again.
constexpr int64_t kFewAlone = 16, kManyAlone = 1024;

// A forked child has none of its parent's threads, and perhaps a lock that one of them held: it works alone.
inline std::atomic<bool> in_forked_child{false};
#if defined(__unix__) || defined(__APPLE__)
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

// How a job is shared.
struct Team {
  int64_t threads;
  bool patient;  // a long job: waiting for a slice of time is no great loss
  // Tasks are taken from the first to the last, the next time from the last to the first: what a thread read last is in
  // its caches, where the whole does not fit.
  bool alternating = false;

  // Ranges to make of so many units: a few per thread, so that one that comes late leaves the others as little to wait
  // for.
  int64_t ranges(int64_t units, int64_t per_thread) const {
    return threads > 1 ? std::min(units, per_thread * threads) : 1;
  }
};

// The first of so many units that is in a range, where every thread has as many ranges, each of which is smaller than
// the one before: what is taken last, by whoever is free, keeps the others waiting least.
inline int64_t falling_begin(int64_t range, int64_t ranges, int64_t threads, int64_t units) {
  if (ranges % threads != 0) return range * units / ranges;
  const int64_t each = ranges / threads, part = range / each, before = range % each;
  const int64_t begin = part * units / threads, end = (part + 1) * units / threads;
  return begin + (end - begin) * before * (2 * each + 1 - before) / (each * (each + 1));
}

// The team for so many units of work, of which every thread should have at least `grain`.
inline Team team_for(int64_t units, int64_t grain) {
  grain = std::max<int64_t>(1, grain);
  return {std::clamp<int64_t>(units / grain, 1, at::get_num_threads()), units / grain >= kPatience};
}

// Short jobs that still go to one thread, and how many it will be the next time.
inline std::atomic<int64_t> short_jobs_alone{0}, next_alone{kFewAlone};

// Whether a job goes from the last task to the first.
inline bool goes_back(const Team& team, int64_t tasks) {
  static std::atomic<bool> last{false};
  if (!team.alternating || tasks == 1) return false;
  const bool back = !last.load(std::memory_order_relaxed);
  last.store(back, std::memory_order_relaxed);
  return back;
}

// Whether there are other threads to work with.
inline bool has_help(const Team& team) {
  return team.threads > 1 && !in_forked_child && (!at::in_parallel_region() || Crew::led());
}

// Whether a job should wait for them.
inline bool may_wait(const Team& team) { return team.patient || short_jobs_alone.load(std::memory_order_relaxed) <= 0; }

// A short job took so long, part of which it had to wait for others: too long if one thread had been faster.
inline void note_wait(const Team& team, Crew::Clock::duration took, Crew::Clock::duration waited) {
  if (team.patient) return;
  if (waited > std::chrono::milliseconds(1) && team.threads * (took - waited) < took) {
    const int64_t count = next_alone.load(std::memory_order_relaxed);
    short_jobs_alone.store(count, std::memory_order_relaxed);
    next_alone.store(std::min(2 * count, kManyAlone), std::memory_order_relaxed);
  } else {
    next_alone.store(kFewAlone, std::memory_order_relaxed);
  }
}

// Calls f, and whatever it shares goes to the same threads, which stay for as long as it takes: between its jobs there
// is nothing to wait for. Only for what is made of jobs of this team, and no operation of torch that uses threads.
template <class F>
void lead(const Team& team, const F& f) {
  if (Crew::led() || !has_help(team) || !may_wait(team)) return f();
  Crew crew(team.threads);
  const auto begin = Crew::Clock::now();
  Crew::Clock::time_point done;
  struct Lead {
    Crew& crew;
    Crew::Clock::time_point& done;
    explicit Lead(Crew& crew, Crew::Clock::time_point& done) : crew(crew), done(done) { Crew::led() = &crew; }
    ~Lead() {
      Crew::led() = nullptr;
      crew.dismiss();
      done = Crew::Clock::now();
    }
  };
  at::parallel_for(0, team.threads, 1, [&](int64_t thread, int64_t) {
    if (thread > 0) return crew.help(thread);
    const Lead lead(crew, done);
    f();
  });
  const auto end = Crew::Clock::now();
  note_wait(team, end - begin, end - done);
}

// Calls f(task), or f(task, thread) with a number below the team's threads that no two calls at the same time share,
// for every task below `tasks`. Tasks are taken one by one, so that a thread that comes late leaves its share to the
// others.
template <class F>
void share(int64_t tasks, Team team, const F& f) {
  const auto call = [&](int64_t task, int64_t thread) {
    if constexpr (std::is_invocable_v<const F&, int64_t, int64_t>)
      f(task, thread);
    else
      f(task);
  };
  team.threads = std::min(team.threads, tasks);
  const bool back = goes_back(team, tasks);
  if (!has_help(team) || !may_wait(team)) {
    if (has_help(team)) short_jobs_alone.fetch_sub(1, std::memory_order_relaxed);
    for (int64_t task = 0; task < tasks; ++task) call(back ? tasks - 1 - task : task, 0);
    return;
  }
  lead(team, [&] {
    const auto begin = Crew::Clock::now();
    const auto waited = Crew::led()->run(tasks, team.threads, back, call);
    note_wait(team, Crew::Clock::now() - begin, waited);
  });
}

}  // namespace hg::cpu
