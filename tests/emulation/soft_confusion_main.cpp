// Runs soft_confusion's CUDA kernels in the emulation. A record is one call, forward or backward,
// as tests/emulation/emulator.py writes it.
#include "cuda/soft_confusion.h"
#include "records.h"

using voxfuse::Activation;
using voxfuse::Element;
using voxfuse::Overlap;
using voxfuse::SoftConfusion;
using voxfuse::Strides;
using voxfuse::Unlabelled;
using voxfuse::View;
using voxfuse::emulation::Buffer;
using voxfuse::emulation::Record;

namespace {

/// A view into a buffer, from [element type, offset in bytes or -1 for none, three strides].
View view_of(const Record& record, std::size_t buffer, std::size_t at) {
  View view;
  const std::int64_t* x = record.integers.data() + at;
  view.type = static_cast<Element>(x[0]);
  if (x[1] >= 0) view.data = record.buffers[buffer].get() + x[1];
  view.stride = Strides{x[2], x[3], x[4]};
  return view;
}

}  // namespace

int main() {
  Record record;
  while (voxfuse::emulation::read(record)) {
    const std::int64_t* x = record.integers.data();
    SoftConfusion q;
    const bool backward = x[0] != 0;
    q.batch = x[1];
    q.classes = x[2];
    q.voxels = x[3];
    q.dense = x[4] != 0;
    q.activation = static_cast<Activation>(x[5]);
    q.likelihood = static_cast<Activation>(x[6]);
    q.overlap = static_cast<Overlap>(x[7]);
    q.has_ignore = x[8] != 0;
    q.ignore_index = x[9];
    q.columns = static_cast<int>(x[10]);
    q.gamma = record.doubles[0];
    q.focal_classes = static_cast<std::int64_t>(record.doubles[1]);
    q.unlabelled = static_cast<Unlabelled>(x[11]);
    if (x[12] != 0) q.annotated = record.buffers[3].as<const std::uint8_t>();
    q.input = view_of(record, 0, 13);
    q.target = view_of(record, 1, 18);
    q.weight = view_of(record, 2, 23);
    cudaError_t error = cudaSuccess;
    if (backward) {
      q.cotangents = record.buffers[4].as<const double>();
      q.gradient = record.buffers[5].get() + x[29];
      q.gradient_stride = Strides{x[30], x[31], x[32]};
      error = voxfuse::cuda::soft_confusion_backward(q, nullptr);
      voxfuse::emulation::write({&record.buffers[5]});
    } else {
      const auto bytes = static_cast<std::int64_t>(sizeof(double));
      const Buffer sums(q.batch * q.classes * q.columns * bytes);
      const Buffer workspace(voxfuse::cuda::workspace_doubles(q) * bytes);
      error = voxfuse::cuda::soft_confusion_forward(q, sums.as<double>(), workspace.as<double>(),
                                                    nullptr);
      voxfuse::emulation::write({&sums});
    }
    if (error != cudaSuccess) {
      std::fprintf(stderr, "launch failed: error %d\n", static_cast<int>(error));
      return 1;
    }
  }
  return 0;
}
