// The soft-confusion kernels. Compiled once an instruction set (see csrc/cpu/dispatch.h).
//
// A range of voxels of one sample is walked in blocks that fit the first-level cache, each of which
// is brought into one form (soft_confusion_staging.h). Then a core works on vectors of voxels:
//   - softmax: labels, the common options, all classes of a vector in registers (C <= 16);
//   - dense softmax: the gradient with soft targets and the common options;
//   - sigmoid: the common options;
//   - general: every option and any number of classes, the classes of a vector in scratch memory.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/simd.h"
#include "cpu/soft_confusion.h"
#include "cpu/soft_confusion_dense.h"
#include "cpu/soft_confusion_general.h"
#include "cpu/soft_confusion_selection.h"
#include "cpu/soft_confusion_sigmoid.h"
#include "cpu/soft_confusion_softmax.h"
#include "cpu/soft_confusion_staging.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

template <class R>
bool forward_range(const SoftConfusion& q, int64_t b, int64_t begin, int64_t end, double* out) {
  constexpr int64_t width = Lanes<R>::width;
  const Core core = core_of<R>(q);
  const bool full = q.columns == FULL;
  Workspace<R> work(q, b);
  Block<R> block{};
  const int64_t rows = q.classes * q.columns;
  std::vector<R> sums(rows * width);
  std::fill(out, out + rows, 0.0);
  for (int64_t chunk = begin; chunk < end; chunk += kChunkVoxels) {
    const int64_t stop = std::min(chunk + kChunkVoxels, end);
    std::fill(sums.begin(), sums.end(), R{0});
    for (int64_t at = chunk; at < stop; at += work.block) {
      const int64_t n = std::min(work.block, stop - at);
      const bool in_place = core == Core::softmax && !work.partial;
      const Form form = in_place ? form_of(q, n) : Form::rows;
      if (stage(q, b, at, n, form, work, block)) return true;
      if constexpr (std::is_same_v<R, float>) {
        if (core == Core::softmax) {
          softmax_forward_of(q.classes, full, block.weighted, form)(
              q.classes, block, work.scratch.data(), sums.data());
          continue;
        }
        if (core == Core::sigmoid) {
          full ? sigmoid_forward<true>(q, block, sums.data())
               : sigmoid_forward<false>(q, block, sums.data());
          continue;
        }
      }
      general_forward(q, block, work, sums.data());
    }
    for (int64_t i = 0; i < rows; ++i) out[i] += sum_of_lanes<R>(load(sums.data() + i * width));
  }
  if (work.partial) work.partial.clear(out, q.columns);
  return false;
}

template <class R>
bool backward_range(const SoftConfusion& q, int64_t b, int64_t begin, int64_t end,
                    bool past_caches) {
  Workspace<R> work(q, b);
  Block<R> block{};
  const int64_t rows = q.classes * q.columns;
  std::vector<R> cotangent(rows);
  for (int64_t i = 0; i < rows; ++i) cotangent[i] = static_cast<R>(q.cotangents[b * rows + i]);
  if (work.partial) work.partial.clear(cotangent.data(), q.columns);
  Core core = core_of<R>(q);
  Cotangents by_label;
  if constexpr (std::is_same_v<R, float>) {
    if (core == Core::softmax || core == Core::dense_softmax) {
      if (!basic_cotangents(cotangent, q.classes, q.columns)) {
        core = Core::general;
      } else if (core == Core::softmax) {
        by_label = Cotangents(cotangent.data(), q.classes, q.columns);
      }
    }
  }
  const bool streamed = past_caches && is_aligned<R>(q) && !work.partial;
  for (int64_t at = begin; at < end; at += work.block) {
    const int64_t n = std::min(work.block, end - at);
    const int64_t offset = b * q.gradient_stride.batch + at * q.gradient_stride.voxel;
    const bool in_place = core == Core::softmax && !work.partial;
    const Form form = in_place ? form_of(q, n) : Form::rows;
    const bool halves = form == Form::halves;
    const bool direct =
        form == Form::interleaved || (q.input.type == kOwnElement<R> &&
                                      q.gradient_stride.voxel == 1 && n % Lanes<R>::width == 0);
    // A core writes a voxel's gradient when it has read all its logits: it may take their place.
    R* gradient = direct ? static_cast<R*>(q.gradient) + offset : work.logits.data();
    const int64_t stride = direct || halves ? q.gradient_stride.channel : work.block;
    if (stage(q, b, at, n, form, work, block)) return true;
    bool done = false;
    if constexpr (std::is_same_v<R, float>) {
      if (core == Core::softmax) {
        uint16_t* half_rows = halves ? static_cast<uint16_t*>(q.gradient) + offset : nullptr;
        softmax_backward_of(q.classes, block.weighted, form)(
            q.classes, block, work.scratch.data(), by_label,
            {gradient, half_rows, block.bfloat, stride, direct && streamed});
        done = true;
      } else if (core == Core::dense_softmax) {
        dense_softmax_backward(q.classes, block, work.scratch.data(), cotangent.data(), q.columns,
                               gradient, stride);
        done = true;
      } else if (core == Core::sigmoid) {
        sigmoid_backward(q, block, cotangent.data(), gradient, stride);
        done = true;
      }
    }
    if (!done) general_backward(q, block, work, cotangent.data(), gradient, stride);
    if (work.partial) work.partial.change_gradient(gradient, stride, block.voxels);
    if (!direct && !halves) write_gradient(q, gradient, stride, n, offset, work);
  }
  if (streamed) stream_fence();
  return false;
}

}  // namespace

// Sums of voxels [begin, end) of sample b to out (classes, columns); returns whether a label
// without a class was met, which ends the walk.
bool confusion_forward(const SoftConfusion& q, int64_t b, int64_t begin, int64_t end, double* out) {
  return q.input.type == Element::f64 ? forward_range<double>(q, b, begin, end, out)
                                      : forward_range<float>(q, b, begin, end, out);
}

// Writes the gradient of voxels [begin, end) of sample b, past the caches if they need not hold it;
// returns as confusion_forward.
bool confusion_backward(const SoftConfusion& q, int64_t b, int64_t begin, int64_t end,
                        bool past_caches) {
  return q.input.type == Element::f64 ? backward_range<double>(q, b, begin, end, past_caches)
                                      : backward_range<float>(q, b, begin, end, past_caches);
}

}  // namespace voxfuse::VOXFUSE_ISA
