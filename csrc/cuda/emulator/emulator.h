// Runs CUDA kernels on the CPU, thread for thread, so that tests see what the kernels compute without a GPU. Slow and
// strict: a barrier that not all threads reach, a kernel that waits for ever, shared memory beyond what was asked for
// are errors of the launch, with a message. Threads run one at a time and change only where they wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace hg::emulator {

// Of the device that kernels see: small, so that a grid that fills it is quick to emulate.
constexpr int kMultiprocessors = 4, kWarp = 32, kMaxThreads = 1024, kThreadsPerMultiprocessor = 2048;
constexpr int kSharedPerBlock = 48 << 10, kSharedPerBlockOptin = 227 << 10, kSharedPerMultiprocessor = 228 << 10;
constexpr int kSharedReserved = 1 << 10;

// Where in the source a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;
};

struct Launch {
  dim3 grid, block;
  size_t shared;
  bool cooperative;
  std::function<void()> kernel;  // run once per thread
};

// Runs the launch to its end. False if something is wrong with it; message() says what.
bool run(const Launch& launch);
const char* message();

// Since the process began: for tests of which path an op takes.
struct Counts {
  int64_t launches, bulk_copies;
};
Counts counts();

// Blocks of so many threads and bytes of dynamic shared memory that one multiprocessor holds.
int resident_blocks(int threads, size_t shared);

// The rest is called by kernels.

struct Value {
  alignas(16) unsigned char bytes[16];
};

// Waits for all threads of the block. Returns how many of them came with `predicate`.
int block_barrier(Site site, bool predicate);

// Waits for the lanes of the warp in `mask` that have not returned. Returns the value of lane `from`, or those of all
// 32 lanes; the value of a lane that took no part is NaN.
const Value& exchange(Site site, unsigned mask, const Value& mine, int from);
const Value* exchange_all(Site site, unsigned mask, const Value& mine);

// Lets others run: in every loop that waits for another block.
void spin();

char* dynamic_shared();
void* static_shared(const void* tag, size_t bytes);

// Barriers at which bulk copies arrive; see bulk.h.
void bulk_barrier_init(const void* barrier);
void bulk_expect(const void* barrier, size_t bytes);
void copy_bulk(void* to, const void* from, size_t bytes, const void* barrier);
bool bulk_try_wait(Site site, const void* barrier, unsigned parity);

void copy_later(void* to, const void* from, int bytes);
void end_copies();
void finish_copies(int pending);

}  // namespace hg::emulator

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
