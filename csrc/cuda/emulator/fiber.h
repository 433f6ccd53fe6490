// A function with a stack of its own, which can be left in its middle and entered again. The standard library's
// swapcontext would do, but asks the kernel to change the signal mask at every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace hg::emulator {

#if defined(__x86_64__)

// Saves the registers that a call must keep on this stack, and loads them from the other.
extern "C" void hg_switch_stack(void** from, void* to);
asm(R"(
.text
.local hg_switch_stack
.type hg_switch_stack, @function
hg_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hg_switch_stack, .-hg_switch_stack
)");

class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    // As hg_switch_stack leaves a stack: six registers, then the address to go on at.
    auto top = reinterpret_cast<uintptr_t*>(stack + bytes) - 2;
    *top = reinterpret_cast<uintptr_t>(entry);
    at_ = top - 6;
    for (int i = 0; i < 6; ++i) static_cast<uintptr_t*>(at_)[i] = 0;
  }
  static void change(Context& from, Context& to) { hg_switch_stack(&from.at_, to.at_); }

 private:
  void* at_ = nullptr;
};

#else

class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack;
    at_.uc_stack.ss_size = bytes;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.at_, &to.at_); }

 private:
  ucontext_t at_;
};

#endif

class Fiber {
 public:
  Fiber() {
    // The lowest page stays without access: a stack that grows too large ends the process there.
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, sysconf(_SC_PAGESIZE), PROT_NONE) != 0) std::abort();
    stack_ = static_cast<char*>(memory);
    inside_.prepare(stack_, kStack, &Fiber::main);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack_, kStack);
#endif
    munmap(stack_, kStack);
  }

  // Sets what the next `enter` starts; the fiber's last function must have returned.
  void begin(std::function<void()> body) { body_ = std::move(body); }

  // Runs the function until it leaves or returns.
  void enter() {
    running_ = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, stack_, kStack);
    Context::change(outside_, inside_);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    Context::change(outside_, inside_);
#endif
  }

  // Back to `enter`, from inside the function.
  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, caller_, caller_size_);
    Context::change(inside_, outside_);
    __sanitizer_finish_switch_fiber(fake, &caller_, &caller_size_);
#else
    Context::change(inside_, outside_);
#endif
  }

 private:
  static constexpr size_t kStack = 256 << 10;

  static void main() {
    Fiber* fiber = running_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fiber->caller_, &fiber->caller_size_);
#endif
    for (;;) {
      fiber->body_();
      fiber->leave();
    }
  }

  static inline Fiber* running_ = nullptr;
  char* stack_;
  std::function<void()> body_;
  Context inside_, outside_;
#if defined(__SANITIZE_ADDRESS__)
  const void* caller_ = nullptr;
  size_t caller_size_ = 0;
#endif
};

}  // namespace hg::emulator
