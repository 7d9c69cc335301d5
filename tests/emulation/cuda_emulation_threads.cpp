// The emulation with one operating-system thread a CUDA thread, for ThreadSanitizer.
//
// Only what CUDA promises orders memory here: __syncthreads and __syncwarp do, shuffles and votes
// do not, and an atomic operation only together with __threadfence. Every second block runs beside
// the others, so that accesses of two blocks to one place are seen as well. A thread that is waited
// for and has ended aborts.
#include <pthread.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_emulation.h"

// ThreadSanitizer's own: between Begin and End it overlooks what the thread does.
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

thread_local voxfuse::emulation::Index threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace voxfuse::emulation {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr unsigned kSeats = 2;  // blocks that run at a time
constexpr std::size_t kStack = 256 * 1024;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s in block (%u, %u, %u)\n", message, blockIdx.x, blockIdx.y,
               blockIdx.z);
  std::abort();
}

/// Releases its threads when all have arrived.
class Barrier {
 public:
  void expect(unsigned count) { count_ = count; }

  void wait() {
    const unsigned turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      turn_.notify_all();
    } else {
      while (turn_.load(std::memory_order_acquire) == turn) {
        turn_.wait(turn, std::memory_order_acquire);
      }
    }
  }

  bool is_waited_at() const { return arrived_.load(std::memory_order_relaxed) > 0; }

 private:
  unsigned count_ = 0;
  std::atomic<unsigned> arrived_{0}, turn_{0};
};

/// What the emulation does on its own account: it neither races nor orders the kernel's accesses.
class Unseen {
 public:
  Unseen() {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }
};

struct Warp {
  Barrier barrier;     // __syncwarp
  Barrier collective;  // shuffles and votes
  std::atomic<unsigned> ended{0};
  std::array<std::array<std::atomic<std::uint64_t>, kWarp>, 2> slots{};
};

/// What the threads of one block at a time share.
struct Seat {
  std::vector<Warp> warps = std::vector<Warp>(kMaxThreads / kWarp);
  Barrier barrier;  // __syncthreads
  Barrier end;      // of a block
  std::atomic<unsigned> ended{0};
  std::mutex mutex;
  std::map<SharedMemory*, std::unique_ptr<unsigned char[]>> shared;
};

std::array<Seat, kSeats> seats;
unsigned threads = 0;
const std::function<void()>* kernel_body = nullptr;

thread_local Seat* seat = nullptr;
thread_local unsigned own_index = 0;    // within the block
thread_local unsigned collectives = 0;  // how many it has entered: picks one of two sets of slots
thread_local unsigned* last_atomic = nullptr;
thread_local bool fenced = false;

struct Worker {
  unsigned seat, index;
  pthread_t handle;
};

void run_blocks(const Worker& worker) {
  seat = &seats[worker.seat];
  own_index = worker.index;
  threadIdx = {worker.index % blockDim.x, worker.index / blockDim.x % blockDim.y,
               worker.index / (blockDim.x * blockDim.y)};
  const std::uint64_t blocks = std::uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  for (std::uint64_t b = worker.seat; b < blocks; b += kSeats) {
    blockIdx = {static_cast<unsigned>(b % gridDim.x),
                static_cast<unsigned>(b / gridDim.x % gridDim.y),
                static_cast<unsigned>(b / gridDim.x / gridDim.y)};
    collectives = 0;
    last_atomic = nullptr;
    fenced = false;
    (*kernel_body)();
    Warp& warp = seat->warps[own_index / kWarp];
    {
      const Unseen scope;
      warp.ended.fetch_add(1);
      seat->ended.fetch_add(1);
      if (warp.barrier.is_waited_at() || warp.collective.is_waited_at()) {
        fail("a thread has ended that a warp collective waits for");
      }
      if (seat->barrier.is_waited_at()) {
        fail("__syncthreads() after a thread of the block has ended");
      }
    }
    seat->end.wait();
    if (own_index == 0) {
      seat->shared.clear();
      seat->ended = 0;
      for (Warp& each : seat->warps) each.ended = 0;
    }
    seat->end.wait();
  }
}

Warp& enter_collective(unsigned mask) {
  Warp& warp = seat->warps[own_index / kWarp];
  if (mask != 0xffffffffu) fail("a warp collective of a part of the lanes is not supported");
  if (warp.ended.load(std::memory_order_relaxed) > 0) {
    fail("a warp collective waits for a thread that has ended");
  }
  return warp;
}

/// Publishes a value to the warp; the caller reads the slots of this set.
std::array<std::atomic<std::uint64_t>, kWarp>& publish(unsigned mask, std::uint64_t value) {
  const Unseen scope;
  Warp& warp = enter_collective(mask);
  auto& slots = warp.slots[collectives++ % 2];
  slots[own_index % kWarp].store(value, std::memory_order_relaxed);
  warp.collective.wait();
  return slots;
}

}  // namespace

cudaError_t run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    return cudaErrorInvalidConfiguration;
  }
  kernel_body = &body;
  blockDim = block;
  gridDim = grid;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  const unsigned used = blocks < kSeats ? static_cast<unsigned>(blocks) : kSeats;
  for (Seat& each : seats) {
    each.barrier.expect(threads);
    each.end.expect(threads);
    for (unsigned w = 0; w < each.warps.size(); ++w) {
      const unsigned first = w * kWarp;
      const unsigned lanes = first >= threads          ? 0
                             : threads - first < kWarp ? threads - first
                                                       : kWarp;
      each.warps[w].barrier.expect(lanes);
      each.warps[w].collective.expect(lanes);
    }
  }
  std::vector<Worker> workers;
  for (unsigned s = 0; s < used; ++s) {
    for (unsigned i = 0; i < threads; ++i) workers.push_back({s, i, {}});
  }
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kStack);
  for (Worker& worker : workers) {
    const auto start = [](void* argument) -> void* {
      run_blocks(*static_cast<const Worker*>(argument));
      return nullptr;
    };
    if (pthread_create(&worker.handle, &attributes, start, &worker) != 0) {
      std::perror("emulation: pthread_create");
      std::abort();
    }
  }
  for (Worker& worker : workers) pthread_join(worker.handle, nullptr);
  pthread_attr_destroy(&attributes);
  return cudaSuccess;
}

void block_barrier() {
  {
    const Unseen scope;
    if (seat->ended.load() > 0) fail("__syncthreads() after a thread of the block has ended");
  }
  seat->barrier.wait();
}

void warp_barrier(unsigned mask) { enter_collective(mask).barrier.wait(); }

std::uint64_t exchange(unsigned mask, std::uint64_t value, int source) {
  auto& slots = publish(mask, value);
  if (source < 0 || source >= static_cast<int>(kWarp)) return value;
  return slots[static_cast<unsigned>(source)].load(std::memory_order_relaxed);
}

unsigned ballot(unsigned mask, bool predicate) {
  auto& slots = publish(mask, predicate ? 1 : 0);
  unsigned bits = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    bits |= static_cast<unsigned>(slots[i].load(std::memory_order_relaxed)) << i;
  }
  return bits;
}

int lane() { return static_cast<int>(own_index % kWarp); }

void* SharedMemory::get(std::size_t bytes) {
  const Unseen scope;
  const std::lock_guard<std::mutex> guard(seat->mutex);
  std::unique_ptr<unsigned char[]>& data = seat->shared[this];
  if (!data) {
    data.reset(new unsigned char[bytes]);
    std::memset(data.get(), 0xff, bytes);
  }
  return data.get();
}

unsigned atomic_add(unsigned* address, unsigned value) {
  last_atomic = address;
  // A fence before makes it a release; one after, below, an acquisition.
  return __atomic_fetch_add(address, value, fenced ? __ATOMIC_RELEASE : __ATOMIC_RELAXED);
}

unsigned long long atomic_add(unsigned long long* address, unsigned long long value) {
  // Nothing is published by what counts in 64 bits: it orders nothing.
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

void fence() {
  fenced = true;
  if (last_atomic == nullptr) return;
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);  // the kernel reads nothing here
  (void)__atomic_load_n(last_atomic, __ATOMIC_ACQUIRE);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

}  // namespace voxfuse::emulation
