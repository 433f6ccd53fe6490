// The scheduler of the emulator. Every CUDA thread is a fiber, a stack of its own between which one CPU thread
// switches.
#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bulk.h"
#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace hg::emulator {
namespace {

// Rounds in which every thread that can run only waits, after which they will wait for ever.
constexpr int kIdleRounds = 1000;

enum class State { ready, spinning, at_barrier, at_exchange, returned };

struct Thread {
  int rank = 0;
  uint3 index{};
  State state = State::ready;
  Site site{};
  // Of a warp operation: what this thread gives, the lane whose value it asks for, or all if negative, and the answer.
  unsigned mask = 0;
  int from = 0;
  Value mine, answer;
  std::vector<Value> answers;
  // Copies of the batch that has not ended, and batches that have not been waited for.
  std::vector<Copy> batch;
  std::vector<std::vector<Copy>> batches;
};

struct Shared {
  const void* tag;
  std::unique_ptr<char, decltype(&std::free)> memory;
};

// What it holds at first reads as NaN in every format, and as -1.
Shared shared_memory(const void* tag, size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(bytes, 1)) != 0) std::abort();
  std::memset(memory, 0xff, bytes);
  return {tag, {static_cast<char*>(memory), &std::free}};
}

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Shared> shared;  // the dynamic part first
  BulkBarriers bulk;
  // Threads at the barrier, the first of them, how many of them came with a predicate, and how many did last time.
  size_t arrived = 0;
  const Thread* first = nullptr;
  int predicates = 0, result = 0;
};

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

std::string name(const Thread& t) {
  const std::string who = "thread " + std::to_string(t.rank);
  if (!t.site.what) return who;
  return who + " at " + t.site.what + " (" + t.site.file + ":" + std::to_string(t.site.line) + ")";
}

class Scheduler {
 public:
  bool run(const Launch& launch) {
    launch_ = &launch;
    ++counts_.launches;
    message_.clear();
    const char* seed = std::getenv("HYPERGRAD_EXT_EMULATE_SEED");
    shuffled_ = seed && *seed;
    if (shuffled_) random_.seed(std::strtoul(seed, nullptr, 10));
    blockDim = launch.block, gridDim = launch.grid;
    std::vector<int64_t> order(int64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
    std::iota(order.begin(), order.end(), int64_t{0});
    shuffle(order);
    const size_t together = launch.cooperative ? order.size() : 1;
    std::vector<Block> blocks(together);
    idle_ = 0;
    for (size_t i = 0; i < order.size() && message_.empty(); i += together) {
      for (size_t b = 0; b < together; ++b) begin(blocks[b], order[i + b], b);
      while (round(blocks) && message_.empty()) {
      }
      for (size_t b = 0; b < together && message_.empty(); ++b) message_ = blocks[b].bulk.end();
    }
    // Threads that will not run again leave their stacks as they are.
    if (!message_.empty()) fibers_.clear();
    return message_.empty();
  }

  const std::string& message() const { return message_; }
  Counts& counts() { return counts_; }
  Block& block() { return *block_; }
  Thread& thread() { return *thread_; }

  // Ends the launch: no thread runs again.
  void fail(const std::string& what) {
    message_ = what;
    fiber_->leave();
  }

  void spin() {
    thread_->state = State::spinning;
    fiber_->leave();
  }

  void barrier(Site site, bool predicate) {
    thread_->site = site;
    if (block_->arrived == 0) block_->first = thread_;
    if (!same(block_->first->site, site))
      fail("threads of one block wait at different barriers: " + name(*block_->first) + ", and " + name(*thread_));
    block_->predicates += predicate;
    if (++block_->arrived < block_->threads.size()) {
      thread_->state = State::at_barrier;
      return fiber_->leave();
    }
    for (Thread& t : block_->threads) t.state = State::ready;
    block_->result = block_->predicates;
    block_->arrived = 0, block_->predicates = 0;
  }

  void exchange(Site site, unsigned mask, const Value& mine, int from) {
    Thread& t = *thread_;
    t.site = site, t.mask = mask, t.mine = mine, t.from = from;
    if (!(mask >> t.rank % kWarp & 1)) fail("a thread is not in the mask of its own warp operation: " + name(t));
    t.state = State::at_exchange;
    if (!finish_exchange(t)) fiber_->leave();
  }

 private:
  void begin(Block& block, int64_t index, size_t slot) {
    const dim3 grid = launch_->grid, size = launch_->block;
    block.index = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                   static_cast<unsigned>(index / grid.x / grid.y)};
    block.threads.resize(size_t{size.x} * size.y * size.z);
    block.bulk.clear();
    block.shared.clear();
    block.shared.push_back(shared_memory(nullptr, launch_->shared));
    first_fiber(slot + 1);
    for (size_t i = 0; i < block.threads.size(); ++i) {
      Thread& t = block.threads[i];
      const unsigned rank = static_cast<unsigned>(i);
      t.rank = static_cast<int>(i);
      t.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
      t.state = State::ready;
      t.site = {};
      t.batch.clear();
      t.batches.clear();
      fibers_[first_fiber(slot) + i]->begin([this] {
        launch_->kernel();
        thread_->state = State::returned;
      });
    }
  }

  // Of the block in this slot; there are as many before it.
  size_t first_fiber(size_t slot) {
    const size_t count = slot * launch_->block.x * launch_->block.y * launch_->block.z;
    while (fibers_.size() < count) fibers_.push_back(std::make_unique<Fiber>());
    return count;
  }

  // Gives every thread that can run a turn. False once all have returned.
  bool round(std::vector<Block>& blocks) {
    bool progress = false, running = false, spins = false;
    fill(block_turns_, blocks.size());
    for (const size_t b : block_turns_) {
      block_ = &blocks[b];
      blockIdx = block_->index;
      fill(turns_, block_->threads.size());
      for (const size_t i : turns_) {
        thread_ = &block_->threads[i];
        if (thread_->state != State::ready && thread_->state != State::spinning) continue;
        thread_->state = State::ready;
        threadIdx = thread_->index;
        fiber_ = fibers_[first_fiber(b) + i].get();
        fiber_->enter();
        if (!message_.empty()) return false;
        if (thread_->state == State::returned) finish_waiting_for_returned();
        (thread_->state == State::spinning ? spins : progress) = true;
      }
      for (const Thread& t : block_->threads) running |= t.state != State::returned;
    }
    idle_ = progress ? 0 : idle_ + 1;
    if (running && !progress && (!spins || idle_ > kIdleRounds)) message_ = deadlock(blocks);
    return running;
  }

  // Other lanes of the warp may have waited for one that has now returned.
  void finish_waiting_for_returned() {
    const size_t first = thread_->rank / kWarp * kWarp;
    for (size_t i = first; i < std::min(first + kWarp, block_->threads.size()); ++i)
      if (block_->threads[i].state == State::at_exchange) finish_exchange(block_->threads[i]);
  }

  // Gives all lanes of the operation that `last` waits for their answers, if all are there.
  bool finish_exchange(const Thread& last) {
    const unsigned mask = last.mask;
    const size_t first = last.rank / kWarp * kWarp, lanes = std::min<size_t>(kWarp, block_->threads.size() - first);
    Thread* warp = &block_->threads[first];
    for (size_t l = lanes; l-- > 0;) {
      if (!(mask >> l & 1) || warp[l].state == State::returned) continue;
      if (warp[l].state != State::at_exchange || warp[l].mask != mask || !same(warp[l].site, last.site)) return false;
    }
    Value values[kWarp];
    std::memset(values, 0xff, sizeof values);
    for (size_t l = 0; l < lanes; ++l)
      if (mask >> l & 1 && warp[l].state == State::at_exchange) values[l] = warp[l].mine;
    for (size_t l = 0; l < lanes; ++l) {
      Thread& t = warp[l];
      if (!(mask >> l & 1) || t.state != State::at_exchange) continue;
      if (t.from < 0)
        t.answers.assign(values, values + kWarp);
      else
        t.answer = values[t.from];
      t.state = State::ready;
    }
    return true;
  }

  static std::string deadlock(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) {
      int counts[5] = {};
      const Thread *waiting = nullptr, *elsewhere = nullptr;
      for (const Thread& t : block.threads) {
        ++counts[static_cast<int>(t.state)];
        if (t.state != State::at_barrier && t.state != State::at_exchange) continue;
        if (!waiting)
          waiting = &t;
        else if (!same(t.site, waiting->site))
          elsewhere = &t;
      }
      const auto count = [&](State state) { return std::to_string(counts[static_cast<int>(state)]); };
      if (!waiting && counts[static_cast<int>(State::spinning)] == 0) continue;
      return "threads wait for ever: in block " + std::to_string(block.index.x) + ", " + count(State::at_barrier) +
             " at a barrier, " + count(State::at_exchange) + " at a warp operation, " + count(State::spinning) +
             " for other blocks or copies, " + count(State::returned) + " have returned" +
             (waiting ? "; " + name(*waiting) : std::string()) + (elsewhere ? "; " + name(*elsewhere) : std::string());
    }
    return "threads wait for ever";
  }

  void fill(std::vector<size_t>& order, size_t count) {
    if (order.size() != count || shuffled_) {
      order.resize(count);
      std::iota(order.begin(), order.end(), size_t{0});
    }
    shuffle(order);
  }

  template <class T>
  void shuffle(std::vector<T>& order) {
    if (shuffled_) std::shuffle(order.begin(), order.end(), random_);
  }

  const Launch* launch_ = nullptr;
  std::string message_;
  Counts counts_{};
  bool shuffled_ = false;
  std::mt19937 random_;
  int idle_ = 0;
  std::vector<size_t> block_turns_, turns_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  // Whose turn it is.
  Block* block_ = nullptr;
  Thread* thread_ = nullptr;
  Fiber* fiber_ = nullptr;
};

Scheduler& scheduler() {
  static Scheduler* one = new Scheduler;
  return *one;
}

}  // namespace

bool run(const Launch& launch) {
  // threadIdx and the like are global: one launch at a time.
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  return scheduler().run(launch);
}

const char* message() { return scheduler().message().c_str(); }

int resident_blocks(int threads, size_t shared) {
  if (threads < 1 || threads > kMaxThreads) return 0;
  const int warps = (threads + kWarp - 1) / kWarp;
  return std::min<int>(kThreadsPerMultiprocessor / (warps * kWarp),
                       static_cast<int>(kSharedPerMultiprocessor / (shared + kSharedReserved)));
}

int block_barrier(Site site, bool predicate) {
  scheduler().barrier(site, predicate);
  return scheduler().block().result;
}

const Value& exchange(Site site, unsigned mask, const Value& mine, int from) {
  scheduler().exchange(site, mask, mine, from);
  return scheduler().thread().answer;
}

const Value* exchange_all(Site site, unsigned mask, const Value& mine) {
  scheduler().exchange(site, mask, mine, -1);
  return scheduler().thread().answers.data();
}

void spin() { scheduler().spin(); }

Counts counts() { return scheduler().counts(); }

namespace {
// Of a faulty use of barriers: ends the launch.
void check(const std::string& fault) {
  if (!fault.empty()) scheduler().fail(fault + ": " + name(scheduler().thread()));
}
}  // namespace

void bulk_barrier_init(const void* barrier) { check(scheduler().block().bulk.init(barrier)); }

void bulk_expect(const void* barrier, size_t bytes) { check(scheduler().block().bulk.expect(barrier, bytes)); }

void copy_bulk(void* to, const void* from, size_t bytes, const void* barrier) {
  ++scheduler().counts().bulk_copies;
  check(scheduler().block().bulk.copy({to, from, bytes}, barrier));
}

bool bulk_try_wait(Site site, const void* barrier, unsigned parity) {
  scheduler().thread().site = site;
  bool over = false;
  check(scheduler().block().bulk.try_wait(barrier, parity, over));
  if (!over) spin();
  return over;
}

char* dynamic_shared() { return scheduler().block().shared.front().memory.get(); }

void* static_shared(const void* tag, size_t bytes) {
  auto& all = scheduler().block().shared;
  for (const Shared& shared : all)
    if (shared.tag == tag) return shared.memory.get();
  all.push_back(shared_memory(tag, bytes));
  return all.back().memory.get();
}

void copy_later(void* to, const void* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0)
    scheduler().fail("a copy of " + std::to_string(bytes) + " bytes is not aligned");
  scheduler().thread().batch.push_back({to, from, static_cast<size_t>(bytes)});
}

void end_copies() {
  Thread& t = scheduler().thread();
  t.batches.push_back(std::move(t.batch));
  t.batch.clear();
}

void finish_copies(int pending) {
  auto& batches = scheduler().thread().batches;
  for (; static_cast<int>(batches.size()) > pending; batches.erase(batches.begin()))
    for (const Copy& copy : batches.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace hg::emulator
