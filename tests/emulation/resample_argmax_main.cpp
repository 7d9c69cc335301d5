// Runs resample_argmax's CUDA kernel in the emulation. A record is one call of the operator, as
// tests/emulation/resample_argmax.py writes it.
#include "cuda/resample_argmax.h"
#include "records.h"

using voxfuse::Element;
using voxfuse::Resampling;
using voxfuse::emulation::Record;

int main() {
  Record record;
  while (voxfuse::emulation::read(record)) {
    const std::int64_t* x = record.integers.data();
    const auto& buffers = record.buffers;  // result, input, regions, an index and weights an axis
    Resampling q{};
    q.channels = x[0];
    q.channel_stride = x[1];
    q.type = static_cast<Element>(x[2]);
    q.out_type = static_cast<Element>(x[3]);
    q.kept = static_cast<voxfuse::Resampled>(x[4]);
    q.round_to_half = x[5] != 0;
    q.out = buffers[0].get();
    q.input = buffers[1].get() + x[6];
    q.regions = buffers[2].as<const std::int64_t>();
    q.least = static_cast<float>(record.doubles[0]);
    for (int axis = 0; axis < 3; ++axis) {
      const std::int64_t* place = x + 7 + 3 * axis;
      q.source[axis] = place[0];
      q.target[axis] = place[1];
      q.stride[axis] = place[2];
      if (buffers[3 + axis].size() == 0) continue;  // the input has no such axis
      q.index[axis] = buffers[3 + axis].as<const std::int64_t>();
      q.weight[axis] = buffers[6 + axis].as<const float>();
    }
    const cudaError_t error = voxfuse::cuda::resample_argmax(q, nullptr);
    voxfuse::emulation::write({&buffers[0]});
    if (error != cudaSuccess) {
      std::fprintf(stderr, "launch failed: error %d\n", static_cast<int>(error));
      return 1;
    }
  }
  return 0;
}
