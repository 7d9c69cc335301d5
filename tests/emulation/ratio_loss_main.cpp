// Runs ratio_loss's CUDA kernels in the emulation. A record is one call, forward or backward, as
// tests/emulation/emulator.py writes it.
#include "cuda/ratio_loss.h"
#include "records.h"

using voxfuse::emulation::Buffer;
using voxfuse::emulation::Record;

namespace {

const double* or_null(const Buffer& buffer) {
  return buffer.size() == 0 ? nullptr : buffer.as<const double>();
}

cudaError_t forward(const Record& record) {
  voxfuse::RatioLoss q;
  const std::int64_t* x = record.integers.data() + 1;
  const double* d = record.doubles.data();
  q.samples = x[0];
  q.classes = x[1];
  voxfuse::RatioOptions& o = q.options;
  o.width = static_cast<int>(x[2]);
  o.first_class = static_cast<int>(x[3]);
  o.class_pooling = static_cast<voxfuse::ClassPooling>(x[4]);
  o.absent = static_cast<voxfuse::Absent>(x[5]);
  o.reduction = static_cast<voxfuse::Reduction>(x[6]);
  o.normaliser = static_cast<voxfuse::Normaliser>(x[7]);
  o.log = x[8] != 0;
  o.batch = x[9] != 0;
  q.double_loss = x[10] != 0;
  o.smooth_nr = d[0];
  o.smooth_dr = d[1];
  o.min_denominator = d[2];
  o.exponent = d[3];
  o.exponent_from = static_cast<int>(d[23]);
  o.ratio_scale = d[4];
  o.nll_scale = d[5];
  o.off_scale = d[6];
  for (int k = 0; k < voxfuse::FULL; ++k) {
    o.numerator[k] = d[7 + k];
    o.denominator[k] = d[7 + voxfuse::FULL + k];
  }
  q.stats = record.buffers[0].as<const double>();
  q.class_weight = or_null(record.buffers[1]);
  q.class_weight_stride = x[12];
  q.nll_weight = or_null(record.buffers[2]);
  q.off_weight = or_null(record.buffers[3]);
  const Buffer loss(x[11] * (q.double_loss ? 8 : 4)), cotangents(record.buffers[0].size());
  q.loss = loss.get();
  q.cotangents = cotangents.as<double>();
  const cudaError_t error = voxfuse::cuda::ratio_loss(q, nullptr);
  voxfuse::emulation::write({&loss, &cotangents});
  return error;
}

cudaError_t backward(const Record& record) {
  voxfuse::RatioLossBackward q;
  const std::int64_t* x = record.integers.data() + 1;
  q.samples = x[0];
  q.classes = x[1];
  q.width = x[2];
  q.double_grad = x[3] != 0;
  q.sample_stride = x[4];
  q.class_stride = x[5];
  q.first_class = x[6];
  q.grad_loss = record.buffers[0].get();
  q.cotangents = record.buffers[1].as<const double>();
  const Buffer result(record.buffers[1].size());
  q.result = result.as<double>();
  const cudaError_t error = voxfuse::cuda::ratio_loss_backward(q, nullptr);
  voxfuse::emulation::write({&result});
  return error;
}

}  // namespace

int main() {
  Record record;
  while (voxfuse::emulation::read(record)) {
    const cudaError_t error = record.integers[0] == 0 ? forward(record) : backward(record);
    if (error != cudaSuccess) {
      std::fprintf(stderr, "launch failed: error %d\n", static_cast<int>(error));
      return 1;
    }
  }
  return 0;
}
