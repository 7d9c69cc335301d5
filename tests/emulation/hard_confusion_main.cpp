// Runs hard_confusion's CUDA kernel in the emulation. A record is one call of the operator, as
// tests/emulation/emulator.py writes it.
#include "cuda/hard_confusion.h"
#include "records.h"

using voxfuse::HardConfusion;
using voxfuse::emulation::Record;

int main() {
  Record record;
  while (voxfuse::emulation::read(record)) {
    const std::int64_t* x = record.integers.data();
    const auto& buffers = record.buffers;
    HardConfusion q{};
    q.batch = x[0];
    q.classes = x[1];
    q.voxels = x[2];
    q.decision = static_cast<voxfuse::Decision>(x[3]);
    q.dense = x[4] != 0;
    q.has_ignore = x[5] != 0;
    q.ignore_index = x[6];
    q.least = static_cast<float>(record.doubles[0]);
    voxfuse::View* views[] = {&q.input, &q.target, &q.mask};
    for (int i = 0; i < 3; ++i) {
      const std::int64_t* view = x + 7 + 5 * i;
      if (view[1] < 0) continue;
      *views[i] = {buffers[i].get() + view[1],
                   static_cast<voxfuse::Element>(view[0]),
                   {view[2], view[3], view[4]}};
    }
    const cudaError_t error =
        voxfuse::cuda::hard_confusion(q, buffers[3].as<std::int64_t>(), nullptr);
    voxfuse::emulation::write({&buffers[3]});
    if (error != cudaSuccess) {
      std::fprintf(stderr, "launch failed: error %d\n", static_cast<int>(error));
      return 1;
    }
  }
  return 0;
}
