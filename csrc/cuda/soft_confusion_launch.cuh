// Picks the kernel for a problem with logits of type T, forward or backward.
#pragma once

#include <algorithm>

#include "cuda/soft_confusion_few.cuh"
#include "cuda/soft_confusion_general.cuh"
#include "cuda/soft_confusion_many.cuh"
#include "cuda/soft_confusion_separate.cuh"

namespace voxfuse::cuda {
namespace {

template <bool kBackward, class T, int kClasses>
cudaError_t few(Launched& q, cudaStream_t stream) {
  if constexpr (kBackward) {
    using Shape = FewBackward<T, kClasses>;
    constexpr int kBlock = Shape::kVoxels * Shape::kThreads * Shape::kTiles;
    const int64_t blocks = q.batch * ((q.voxels + kBlock - 1) / kBlock);
    return launch(few_backward<T, kClasses>, dim3(static_cast<unsigned>(blocks)),
                  dim3(Shape::kThreads), stream, q);
  } else {
    const dim3 grid(static_cast<unsigned>(q.batch * q.rows));
    const dim3 block(FewShape<T, kClasses>::kThreads);
    q.threads = static_cast<int>(block.x);
    return q.columns == FULL ? launch(few_forward<T, kClasses, true>, grid, block, stream, q)
                             : launch(few_forward<T, kClasses, false>, grid, block, stream, q);
  }
}

template <bool kBackward, class T>
cudaError_t few(Launched& q, cudaStream_t stream) {
  switch (q.classes) {
    case 2:
      return few<kBackward, T, 2>(q, stream);
    case 3:
      return few<kBackward, T, 3>(q, stream);
    case 4:
      return few<kBackward, T, 4>(q, stream);
    case 5:
      return few<kBackward, T, 5>(q, stream);
    case 6:
      return few<kBackward, T, 6>(q, stream);
    case 7:
      return few<kBackward, T, 7>(q, stream);
    case 8:
      return few<kBackward, T, 8>(q, stream);
    case 9:
    case 10:
      return few<kBackward, T, 10>(q, stream);
    case 11:
    case 12:
      return few<kBackward, T, 12>(q, stream);
    case 13:
    case 14:
      return few<kBackward, T, 14>(q, stream);
    default:
      return few<kBackward, T, 16>(q, stream);
  }
}

template <bool kBackward, class T, int kClasses>
cudaError_t many(Launched& q, cudaStream_t stream) {
  const dim3 block(static_cast<unsigned>((q.classes + kClasses - 1) / kClasses * kWarp));
  if constexpr (kBackward) {
    constexpr int kBlock = ManyShape<kClasses>::kTile * ManyShape<kClasses>::kTiles;
    const int64_t blocks = q.batch * ((q.voxels + kBlock - 1) / kBlock);
    return launch(many_backward<T, kClasses>, dim3(static_cast<unsigned>(blocks)), block, stream,
                  q);
  } else {
    q.threads = static_cast<int>(block.x);
    return launch(many_forward<T, kClasses>, dim3(static_cast<unsigned>(q.batch * q.rows)), block,
                  stream, q);
  }
}

template <bool kBackward, class T, int kActivation>
cudaError_t separate(Launched& q, cudaStream_t stream) {
  const dim3 block(kSeparateThreads);
  if constexpr (kBackward) {
    constexpr int kBlock = kSeparateVoxels<T> * kSeparateThreads * kSeparateTiles;
    const int64_t blocks = q.batch * q.classes * ((q.voxels + kBlock - 1) / kBlock);
    return launch(separate_backward<T, kActivation>, dim3(static_cast<unsigned>(blocks)), block,
                  stream, q);
  } else {
    const dim3 grid(static_cast<unsigned>(q.batch * q.rows * q.classes));
    q.threads = static_cast<int>(block.x);
    return q.columns == FULL
               ? launch(separate_forward<T, kActivation, true>, grid, block, stream, q)
               : launch(separate_forward<T, kActivation, false>, grid, block, stream, q);
  }
}

template <bool kBackward, class T, bool kPartial>
cudaError_t general(Launched& q, cudaStream_t stream) {
  const dim3 block(kGeneralThreads);
  if constexpr (kBackward) {
    const int64_t blocks = q.batch * ((q.voxels + kGeneralThreads - 1) / kGeneralThreads);
    return launch(general_backward<T, kPartial>, dim3(static_cast<unsigned>(blocks)), block, stream,
                  q);
  } else {
    q.threads = static_cast<int>(block.x);
    return launch(general_forward<T, kPartial>, dim3(static_cast<unsigned>(q.batch * q.rows)),
                  block, stream, q);
  }
}

/// Whether every run of 16 bytes along the voxels can be read at once.
template <class T>
bool planar(const View& view) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return view.stride.voxel == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
         view.stride.batch % kElements == 0 && view.stride.channel % kElements == 0;
}

template <class T>
Layout layout_of(const View& view, const Launched& q) {
  constexpr int64_t kElements = 16 / sizeof(T);
  if (planar<T>(view)) return Layout::kPlanar;
  // The kernels for an even number of classes beyond 8 also run with one class less.
  const bool exact = q.classes <= 8 || (q.classes <= 16 && q.classes % 2 == 0);
  if (exact && view.stride.channel == 1 && view.stride.voxel == q.classes &&
      reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride.batch % kElements == 0) {
    return Layout::kInterleaved;
  }
  return Layout::kScalar;
}

/// Whether runs of 8 voxels, or what fills 16 bytes, can be read as vectors.
bool aligned(const View& view) {
  if (view.data == nullptr) return false;
  const int64_t bytes = bytes_of(view.type), elements = std::min<int64_t>(16 / bytes, 8);
  return view.stride.voxel == 1 && view.stride.batch % elements == 0 &&
         view.stride.channel % elements == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % (elements * bytes) == 0;
}

template <bool kBackward, class T>
cudaError_t start(Launched& q, cudaStream_t stream) {
  q.label_classes = static_cast<int>(std::min(q.classes, classes_held(q.target.type)));
  const bool ignores = q.has_ignore && q.ignore_index >= 0 && q.ignore_index < q.label_classes;
  q.ignored_label = ignores ? static_cast<int>(q.ignore_index) : -1;
  q.target.vector = aligned(q.target);
  q.weight.vector = aligned(q.weight);
  if (q.annotated != nullptr) return general<kBackward, T, true>(q, stream);
  const bool softmax = q.activation == Activation::softmax && q.likelihood == Activation::softmax;
  if constexpr (sizeof(T) < sizeof(double)) {
    q.input_layout = layout_of<T>(q.input, q);
    if (kBackward) {
      q.gradient_layout = layout_of<T>({q.gradient, q.input.type, q.gradient_stride}, q);
    }
    if (softmax && !q.dense && q.classes >= 2 && q.classes <= 16) {
      return few<kBackward, T>(q, stream);
    }
    // Here classes are never interleaved in registers.
    if (q.input_layout == Layout::kInterleaved) q.input_layout = Layout::kScalar;
    if (q.gradient_layout == Layout::kInterleaved) q.gradient_layout = Layout::kScalar;
    if (softmax && !q.dense && q.classes > 16 && q.classes <= 256 && q.columns == CORE) {
      return q.classes <= 128 ? many<kBackward, T, 8>(q, stream)
                              : many<kBackward, T, 16>(q, stream);
    }
    if (q.activation == Activation::sigmoid && q.likelihood == Activation::sigmoid) {
      return separate<kBackward, T, kSigmoid>(q, stream);
    }
    if (q.activation == Activation::none && q.likelihood == Activation::none) {
      return separate<kBackward, T, kNone>(q, stream);
    }
  }
  return general<kBackward, T, false>(q, stream);
}

}  // namespace

template <class T>
cudaError_t launch_forward(Launched& q, cudaStream_t stream) {
  return start<false, T>(q, stream);
}

template <class T>
cudaError_t launch_backward(Launched& q, cudaStream_t stream) {
  return start<true, T>(q, stream);
}

}  // namespace voxfuse::cuda
