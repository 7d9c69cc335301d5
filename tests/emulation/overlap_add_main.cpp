// Runs the patch fusion's CUDA kernels in the emulation. A record is one call of one operator, as
// tests/emulation/emulator.py writes it.
#include "cuda/overlap_add.h"
#include "records.h"

using voxfuse::Element;
using voxfuse::cuda::Fusion;
using voxfuse::emulation::Record;

int main() {
  Record record;
  while (voxfuse::emulation::read(record)) {
    const std::int64_t* x = record.integers.data();
    const auto& buffers = record.buffers;
    Fusion q;
    q.patches = x[1];
    q.channels = x[2];
    q.axes = static_cast<int>(x[3]);
    q.separable = x[4] != 0;
    q.type = static_cast<Element>(x[5]);
    q.ring_axis = static_cast<int>(x[6]);
    for (int axis = 0; axis < 3; ++axis) {
      q.patch[axis] = static_cast<int>(x[7 + axis]);
      q.extent[axis] = static_cast<int>(x[10 + axis]);
      q.begin[axis] = static_cast<int>(x[13 + axis]);
      q.end[axis] = static_cast<int>(x[16 + axis]);
      q.row_count[axis] = x[19 + axis];
      if (buffers[4 + axis].size() > 0) q.weights[axis] = buffers[4 + axis].as<const double>();
    }
    q.flip = static_cast<int>(x[22]);
    q.source = buffers[0].get();
    q.target = buffers[1].get();
    q.origins = buffers[2].as<const std::int64_t>();
    q.rows = buffers[3].as<const std::int64_t>();
    if (buffers[7].size() > 0) q.total = buffers[7].as<const double>();
    for (int axis = 0; axis < 3; ++axis) {
      q.cover_count[axis] = static_cast<int>(x[23 + axis]);
      q.cover_extent[axis] = static_cast<int>(x[26 + axis]);
      if (buffers[8 + axis].size() > 0) q.cover[axis] = buffers[8 + axis].as<const double>();
    }
    q.floor = record.doubles[0];
    q.activation = static_cast<voxfuse::Activation>(x[29]);
    if (buffers[11].size() > 0) q.activated = buffers[11].get();
    const std::int64_t kept = x[0] < 2 ? voxfuse::cuda::softmax_workspace(q) : 0;
    const voxfuse::emulation::Buffer workspace(kept * (q.type == Element::f64 ? 8 : 4));
    if (kept > 0) q.softmax = workspace.get();
    cudaError_t error = cudaErrorInvalidValue;
    if (x[0] == 0) error = voxfuse::cuda::overlap_add_forward(q, nullptr);
    if (x[0] == 1) error = voxfuse::cuda::overlap_add_ring(q, nullptr);
    if (x[0] == 2) error = voxfuse::cuda::overlap_add_weights(q, nullptr);
    if (x[0] == 3) error = voxfuse::cuda::overlap_add_backward(q, nullptr);
    voxfuse::emulation::write({&buffers[1]});
    if (error != cudaSuccess) {
      std::fprintf(stderr, "launch failed: error %d\n", static_cast<int>(error));
      return 1;
    }
  }
  return 0;
}
