// Runs the finalisation's CUDA kernel in the emulation. A record is one call of the operator, as
// tests/emulation/emulator.py writes it.
#include "cuda/finalize_slab.h"
#include "records.h"

using voxfuse::Element;
using voxfuse::Finish;
using voxfuse::Slab;
using voxfuse::emulation::Record;

int main() {
  Record record;
  while (voxfuse::emulation::read(record)) {
    const std::int64_t* x = record.integers.data();
    const auto& buffers = record.buffers;
    Slab q{};
    q.channels = x[0];
    q.classes = x[1];
    q.outer = x[2];
    q.turn = x[3];
    q.first = x[4];
    q.voxels = x[5];
    q.is_double = x[6] != 0;
    q.type = static_cast<Element>(x[7]);
    q.out_channel = x[8];
    q.out_outer = x[9];
    q.activation = static_cast<voxfuse::Activation>(x[11]);
    q.applied = x[12] != 0;
    q.mode = static_cast<Finish>(x[13]);
    q.clear = x[14] != 0;
    q.divisor = record.doubles[0];
    q.threshold = record.doubles[1];
    q.fill = record.doubles[2];
    q.ring = buffers[0].get();
    q.out = buffers[1].get() + x[10];
    if (buffers[2].size() > 0) q.total = buffers[2].as<const double>();
    if (buffers[3].size() > 0) q.weight = buffers[3].get();
    if (buffers[4].size() > 0) q.bias = buffers[4].get();
    const cudaError_t error = voxfuse::cuda::finalize_slab(q, nullptr);
    voxfuse::emulation::write({&buffers[0], &buffers[1]});
    if (error != cudaSuccess) {
      std::fprintf(stderr, "launch failed: error %d\n", static_cast<int>(error));
      return 1;
    }
  }
  return 0;
}
