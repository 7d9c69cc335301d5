// The epilogue of the overlap losses on the GPU. The statistics are tiny (samples x classes x 8),
// so one block does everything, in float64 and in a fixed order.
#include "cuda/launch.h"
#include "cuda/ratio_loss.h"
#include "math/ratio_loss.h"

namespace voxfuse::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

/// Sum over the block in every thread, always in the same order.
__device__ inline double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  __syncthreads();  // the scratch of the sum before has been read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += scratch[w];
  return sum;
}

__device__ inline double warp_max(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

/// The sums of class c (from first_class on) in row r: a sample's, or of all that are annotated.
__device__ inline void load_row(const RatioLoss& q, int64_t r, int64_t c, double (&sums)[FULL]) {
  const RatioOptions& o = q.options;
#pragma unroll
  for (int k = 0; k < FULL; ++k) sums[k] = 0;
  const int64_t first = o.batch ? 0 : r, last = o.batch ? q.samples : r + 1;
  for (int64_t b = first; b < last; ++b) {
    if (o.batch && !is_annotated(q, b, c)) continue;
#pragma unroll
    for (int k = 0; k < FULL; ++k) {
      if (k < o.width) sums[k] += q.stats[(b * q.classes + o.first_class + c) * o.width + k];
    }
  }
}

__device__ inline bool has_class(const RatioLoss& q, int64_t r, int64_t c,
                                 const double (&sums)[FULL]) {
  return is_present(q, sums[Sum::TP] + sums[Sum::FN], weight_in_row(q, r, c));
}

__device__ inline void store_loss(const RatioLoss& q, int64_t index, double value) {
  if (q.double_loss) {
    static_cast<double*>(q.loss)[index] = value;
  } else {
    static_cast<float*>(q.loss)[index] = static_cast<float>(value);
  }
}

/// Slopes of a term, times the class's factor, for every sample of the row.
__device__ inline void store_slopes(const RatioLoss& q, int64_t r, int64_t c, double scale,
                                    double factor, const RatioTerm& term) {
  const RatioOptions& o = q.options;
  const int64_t first = o.batch ? 0 : r, last = o.batch ? q.samples : r + 1;
  for (int64_t b = first; b < last; ++b) {
    if (o.batch && !is_annotated(q, b, c)) continue;  // stays 0
    for (int k = 0; k < o.width; ++k) {
      q.cotangents[(b * q.classes + o.first_class + c) * o.width + k] =
          scale * (factor * ratio_slope(term, k, o));
    }
  }
}

__device__ inline bool is_counted(const RatioOptions& o, bool present) {
  return present || o.absent != Absent::ignore;
}

__device__ inline RatioTerm term_of(const RatioOptions& o, const RatioSums& sums, bool present,
                                    double exponent) {
  return present || o.absent == Absent::keep ? ratio_term(sums, exponent, o) : RatioTerm{0, 0, 0};
}

/// Terms of single classes: a thread takes every kThreads-th (row, class).
__device__ inline double class_terms(const RatioLoss& q, int64_t rows, double* scratch) {
  const RatioOptions& o = q.options;
  const int64_t count = q.classes - o.first_class, items = rows * count;
  double scale = o.ratio_scale;
  if (o.reduction == Reduction::mean) {
    double counted = 0;
    for (int64_t i = threadIdx.x; i < items; i += kThreads) {
      double sums[FULL];
      load_row(q, i / count, i % count, sums);
      counted += is_counted(o, has_class(q, i / count, i % count, sums)) ? 1 : 0;
    }
    counted = block_sum(counted, scratch);
    scale /= counted < 1 ? 1 : counted;
  }
  double value = 0;
  for (int64_t i = threadIdx.x; i < items; i += kThreads) {
    const int64_t r = i / count, c = i % count;
    double sums[FULL];
    load_row(q, r, c, sums);
    const double factor = weight_in_row(q, r, c);
    const RatioTerm term = term_of(o, ratio_sums(sums, o), has_class(q, r, c, sums),
                                   exponent_of(o.first_class + c, o));
    const double part = scale * (term.value * factor);
    if (o.reduction == Reduction::none) store_loss(q, i, part);
    value += part;
    store_slopes(q, r, c, scale, factor, term);
  }
  return value;
}

/// Weight of a class in the pooled ratio; `largest` replaces an infinite one.
__device__ inline double pooled_weight(const RatioLoss& q, int64_t r, int64_t c,
                                       const double (&sums)[FULL], double largest) {
  const RatioOptions& o = q.options;
  double weight = pooling_weight(sums[Sum::TP] + sums[Sum::FN], o.class_pooling);
  if (std::isinf(weight)) weight = largest == 0 ? 1 : largest;
  if (o.absent == Absent::ignore && !has_class(q, r, c, sums)) weight = 0;
  return weight * weight_in_row(q, r, c);
}

/// Terms of classes pooled with weights: a warp takes every kWarps-th row.
__device__ inline double pooled_terms(const RatioLoss& q, int64_t rows, double* scratch) {
  const RatioOptions& o = q.options;
  const int64_t count = q.classes - o.first_class;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  double sums[FULL];
  double scale = o.ratio_scale;
  if (o.reduction == Reduction::mean) {
    double counted = 0;
    for (int64_t r = warp; r < rows; r += kWarps) {
      bool present = false;
      for (int64_t c = lane; c < count; c += kWarp) {
        load_row(q, r, c, sums);
        present = present || has_class(q, r, c, sums);
      }
      present = __any_sync(kAllLanes, present);
      counted += lane == 0 && is_counted(o, present) ? 1 : 0;
    }
    counted = block_sum(counted, scratch);
    scale /= counted < 1 ? 1 : counted;
  }
  double value = 0;
  for (int64_t r = warp; r < rows; r += kWarps) {
    bool present = false;
    double largest = 0;
    for (int64_t c = lane; c < count; c += kWarp) {
      load_row(q, r, c, sums);
      present = present || has_class(q, r, c, sums);
      const double weight = pooling_weight(sums[Sum::TP] + sums[Sum::FN], o.class_pooling);
      if (!std::isinf(weight) && weight > largest) largest = weight;
    }
    present = __any_sync(kAllLanes, present);
    largest = warp_max(largest);
    RatioSums total{0, 0, 0};
    for (int64_t c = lane; c < count; c += kWarp) {
      load_row(q, r, c, sums);
      const double weight = pooled_weight(q, r, c, sums, largest);
      const RatioSums part = ratio_sums(sums, o);
      total.misses += weight * part.misses;
      total.hits += weight * part.hits;
      total.size += weight * part.size;
    }
    total = {warp_sum(total.misses), warp_sum(total.hits), warp_sum(total.size)};
    const RatioTerm term = term_of(o, total, present, o.exponent);
    if (lane == 0) {
      value += scale * term.value;
      if (o.reduction == Reduction::none) store_loss(q, r, scale * term.value);
    }
    for (int64_t c = lane; c < count; c += kWarp) {
      load_row(q, r, c, sums);
      const double weight = pooled_weight(q, r, c, sums, largest);
      store_slopes(q, r, c, scale, weight, term);
    }
  }
  return value;
}

/// The weighted log-likelihood over its normaliser; adds its slopes to the cotangents.
__device__ inline double likelihood(const RatioLoss& q, double* scratch) {
  const RatioOptions& o = q.options;
  const int64_t items = q.samples * q.classes;
  const auto nll_weight = [&](int64_t c) { return q.nll_weight == nullptr ? 1 : q.nll_weight[c]; };
  const auto off_weight = [&](int64_t c) { return q.off_weight == nullptr ? 1 : q.off_weight[c]; };
  double total = 0, divisor = 0;
  for (int64_t i = threadIdx.x; i < items; i += kThreads) {
    const double* s = q.stats + i * o.width;
    const int64_t c = i % q.classes;
    divisor += normaliser_part(s, static_cast<int>(c), nll_weight(c), o.normaliser);
    total += likelihood_part(s[Sum::NLL], nll_weight(c), o.nll_scale);
    if (o.off_scale != 0) total += likelihood_part(s[Sum::OFF], off_weight(c), o.off_scale);
  }
  total = block_sum(total, scratch);
  divisor = block_sum(divisor, scratch);
  if (o.normaliser == Normaliser::one) divisor = 1;
  if (divisor == 0) return 0;
  for (int64_t i = threadIdx.x; i < items; i += kThreads) {
    double* out = q.cotangents + i * o.width;
    const int64_t c = i % q.classes;
    if (o.nll_scale != 0) out[Sum::NLL] += o.nll_scale * nll_weight(c) / divisor;
    if (o.off_scale != 0) out[Sum::OFF] += o.off_scale * off_weight(c) / divisor;
  }
  return total / divisor;
}

__global__ void __launch_bounds__(kThreads) epilogue(const __grid_constant__ RatioLoss q) {
  VOXFUSE_SHARED(double, scratch, [kWarps]);
  const RatioOptions& o = q.options;
  const int64_t rows = o.batch ? 1 : q.samples;
  const int64_t values = q.samples * q.classes * o.width;
  for (int64_t i = threadIdx.x; i < values; i += kThreads) q.cotangents[i] = 0;
  __syncthreads();
  const bool pooled = o.class_pooling != ClassPooling::none;
  double value = 0;
  if (o.ratio_scale != 0) {
    value = pooled ? pooled_terms(q, rows, scratch) : class_terms(q, rows, scratch);
    value = block_sum(value, scratch);  // also: every slope is written before more is added
  } else if (o.reduction == Reduction::none) {
    const int64_t losses = rows * (pooled ? 1 : q.classes - o.first_class);
    for (int64_t i = threadIdx.x; i < losses; i += kThreads) store_loss(q, i, 0);
  }
  if (o.reduction == Reduction::none) return;
  if (o.nll_scale != 0 || o.off_scale != 0) value += likelihood(q, scratch);
  if (threadIdx.x == 0) store_loss(q, 0, value);
}

__global__ void __launch_bounds__(kThreads)
    epilogue_backward(const __grid_constant__ RatioLossBackward q) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= q.samples * q.classes * q.width) return;
  const int64_t c = i / q.width % q.classes, b = i / q.width / q.classes;
  double grad = 0;
  if (c >= q.first_class) {
    const int64_t at = b * q.sample_stride + (c - q.first_class) * q.class_stride;
    grad = q.double_grad ? static_cast<const double*>(q.grad_loss)[at]
                         : static_cast<double>(static_cast<const float*>(q.grad_loss)[at]);
  }
  q.result[i] = grad * q.cotangents[i];
}

}  // namespace

cudaError_t ratio_loss(const RatioLoss& q, cudaStream_t stream) {
  return launch(epilogue, dim3(1), dim3(kThreads), stream, q);
}

cudaError_t ratio_loss_backward(const RatioLossBackward& q, cudaStream_t stream) {
  const int64_t values = q.samples * q.classes * q.width;
  if (values == 0) return cudaSuccess;
  return launch(epilogue_backward, dim3(static_cast<unsigned>((values + kThreads - 1) / kThreads)),
                dim3(kThreads), stream, q);
}

}  // namespace voxfuse::cuda
