#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

voxfuse::emulation::Index threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace voxfuse::emulation {
namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, stores its pointer and continues on another one.
// glibc's swapcontext would do, but makes two system calls a switch.
extern "C" void voxfuse_switch_stack(void** save, void* load);
asm(R"(
.text
.type voxfuse_switch_stack, @function
voxfuse_switch_stack:
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
.size voxfuse_switch_stack, .-voxfuse_switch_stack
)");
#endif

void fiber_main();

/// An execution context with its own stack (none for the scheduler's, which has the process's).
class Context {
 public:
  void allocate() {
    if (stack_) return;
    stack_ = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (stack_ == MAP_FAILED) {
      std::perror("emulation: mmap");
      std::abort();
    }
  }

  /// Makes the next switch to this context enter fiber_main.
  void prepare() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStack);
#endif
#if defined(__x86_64__)
    auto** top = reinterpret_cast<void**>(stack_ + kStack);
    *--top = nullptr;  // fiber_main's caller: none, it never returns
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, fiber_main, 0);
#endif
  }

  void switch_to(Context& other, bool leaving_for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(leaving_for_good ? nullptr : &fake_stack_,
                                   other.bottom_or_main(), other.stack_ ? kStack : main_size_);
#else
    (void)leaving_for_good;
#endif
#if defined(__x86_64__)
    voxfuse_switch_stack(&pointer_, other.pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
    arrived(fake_stack_);
  }

  /// Tells AddressSanitizer that control is on this stack now.
  static void arrived(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
    if (main_bottom_ == nullptr) {  // the first switch ever comes from the process's stack
      main_bottom_ = bottom;
      main_size_ = size;
    }
#else
    (void)fake_stack;
#endif
  }

 private:
  const void* bottom_or_main() const { return stack_ ? stack_ : main_bottom_; }

  char* stack_ = nullptr;
  void* fake_stack_ = nullptr;
#if defined(__x86_64__)
  void* pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
  inline static const void* main_bottom_ = nullptr;
  inline static std::size_t main_size_ = 0;
};

struct Fiber {
  Context context;
  State state = State::kReady;
  Index index;
  unsigned mask = 0;         // of the warp barrier it waits at
  unsigned collectives = 0;  // how many it has entered: picks one of two sets of slots
  std::uint64_t slots[2] = {0, 0};
};

Context scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* current = nullptr;
unsigned threads = 0;
const std::function<void()>* kernel_body = nullptr;
std::uint64_t blocks_started = 0;

unsigned linear(const Fiber& fiber) {
  return fiber.index.x + blockDim.x * (fiber.index.y + blockDim.y * fiber.index.z);
}

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s in block (%u, %u, %u)\n", message, blockIdx.x, blockIdx.y,
               blockIdx.z);
  std::abort();
}

void fiber_main() {
  Context::arrived(nullptr);
  (*kernel_body)();
  current->state = State::kDone;
  current->context.switch_to(scheduler, true);
  std::abort();
}

void wait(State state) {
  Fiber* self = current;
  self->state = state;
  self->context.switch_to(scheduler, false);
}

bool release_block() {
  bool waiting = false, done = false;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::kAtBlockBarrier) {
      waiting = true;
    } else if (fibers[i]->state == State::kDone) {
      done = true;
    } else {
      return false;
    }
  }
  if (waiting && done) fail("__syncthreads() after a thread of the block has ended");
  for (unsigned i = 0; waiting && i < threads; ++i) fibers[i]->state = State::kReady;
  return waiting;
}

bool release_warp(unsigned first) {
  bool released = false;
  for (unsigned i = first; i < first + kWarp && i < threads; ++i) {
    if (fibers[i]->state != State::kAtWarpBarrier) continue;
    const unsigned mask = fibers[i]->mask;
    bool complete = true;
    for (unsigned lane = 0; lane < kWarp && complete; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      if (first + lane >= threads) fail("a warp collective names a lane that does not exist");
      const Fiber& other = *fibers[first + lane];
      complete = other.state == State::kAtWarpBarrier && other.mask == mask;
    }
    for (unsigned lane = 0; complete && lane < kWarp; ++lane) {
      if (mask >> lane & 1u) fibers[first + lane]->state = State::kReady;
    }
    released = released || complete;
  }
  return released;
}

void run_block(bool reverse) {
  ++blocks_started;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = State::kReady;
    fiber.collectives = 0;
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.context.allocate();
    fiber.context.prepare();
  }
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  unsigned left = threads;
  while (left > 0) {
    bool progress = false;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned warp = reverse ? warps - 1 - w : w;
      const unsigned first = warp * kWarp;
      const unsigned count = threads - first < kWarp ? threads - first : kWarp;
      do {  // a warp runs on until its threads wait for the block or have ended
        for (unsigned k = 0; k < count; ++k) {
          Fiber& fiber = *fibers[first + (reverse ? count - 1 - k : k)];
          if (fiber.state != State::kReady) continue;
          progress = true;
          current = &fiber;
          threadIdx = fiber.index;
          scheduler.switch_to(fiber.context, false);
          if (fiber.state == State::kDone) --left;
        }
      } while (release_warp(first));
    }
    if (left > 0 && !release_block() && !progress) {
      fail("deadlock: threads wait at barriers that the others do not reach");
    }
  }
}

}  // namespace

cudaError_t run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    return cudaErrorInvalidConfiguration;
  }
  const char* order = std::getenv("EMULATION_ORDER");
  const bool reverse = order != nullptr && std::strcmp(order, "reverse") == 0;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  kernel_body = &body;
  blockDim = block;
  gridDim = grid;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  for (std::uint64_t i = 0; i < blocks; ++i) {
    const std::uint64_t b = reverse ? blocks - 1 - i : i;
    blockIdx.x = static_cast<unsigned>(b % grid.x);
    blockIdx.y = static_cast<unsigned>(b / grid.x % grid.y);
    blockIdx.z = static_cast<unsigned>(b / grid.x / grid.y);
    run_block(reverse);
  }
  return cudaSuccess;
}

void block_barrier() { wait(State::kAtBlockBarrier); }

void warp_barrier(unsigned mask) {
  if (!(mask >> lane() & 1u)) fail("a thread calls a warp collective without being in its mask");
  current->mask = mask;
  wait(State::kAtWarpBarrier);
}

std::uint64_t exchange(unsigned mask, std::uint64_t value, int source) {
  // Two sets of slots suffice: nobody enters the collective after next before all have left this.
  const unsigned set = current->collectives++ % 2;
  current->slots[set] = value;
  const unsigned first = linear(*current) / kWarp * kWarp;
  warp_barrier(mask);
  if (source < 0 || source >= kWarp || !(mask >> source & 1u)) return value;
  return fibers[first + static_cast<unsigned>(source)]->slots[set];
}

void* SharedMemory::get(std::size_t bytes) {
  if (block_ != blocks_started) {
    block_ = blocks_started;
    data_.reset(new unsigned char[bytes]);
    std::memset(data_.get(), 0xff, bytes);
  }
  return data_.get();
}

unsigned ballot(unsigned mask, bool predicate) {
  const unsigned set = current->collectives++ % 2;
  current->slots[set] = predicate ? 1 : 0;
  const unsigned first = linear(*current) / kWarp * kWarp;
  warp_barrier(mask);
  unsigned bits = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1u) bits |= static_cast<unsigned>(fibers[first + i]->slots[set]) << i;
  }
  return bits;
}

int lane() { return static_cast<int>(linear(*current) % kWarp); }

unsigned atomic_add(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}

unsigned long long atomic_add(unsigned long long* address, unsigned long long value) {
  const unsigned long long before = *address;
  *address += value;
  return before;
}

void fence() {}

}  // namespace voxfuse::emulation
