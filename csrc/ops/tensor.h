// What every operator needs to know about its tensors, on LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "contract/codes.h"
#include "math/layout.h"

namespace voxfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As STD_TORCH_CHECK for what depends on the data, or on a device's limits: Python knows it by the
// tag, and raises a ValueError with the rest.
#define VOXFUSE_CHECK_VALUE(condition, ...) STD_TORCH_CHECK(condition, VALUE_ERROR, __VA_ARGS__)

// The element type that kernels read, or nothing where they read none of this type.
inline std::optional<Element> known_element(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::Bool:
      return Element::boolean;
    case ScalarType::Byte:
      return Element::u8;
    case ScalarType::Char:
      return Element::i8;
    case ScalarType::Short:
      return Element::i16;
    case ScalarType::UInt16:
      return Element::u16;
    case ScalarType::Int:
      return Element::i32;
    case ScalarType::UInt32:
      return Element::u32;
    case ScalarType::Long:
      return Element::i64;
    case ScalarType::UInt64:
      return Element::u64;
    default:
      return std::nullopt;
  }
}

inline Element element_of(const Tensor& tensor, const char* name) {
  const std::optional<Element> element = known_element(tensor.scalar_type());
  STD_TORCH_CHECK(element.has_value(), name, ": got ",
                  torch::headeronly::toString(tensor.scalar_type()),
                  ", expected bool, an integer or a float");
  return *element;
}

// The shape as "(1, 2, 3)", for messages.
inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

// The stride from voxel to voxel when axes [first, dim) can be walked as one, else nothing.
inline std::optional<int64_t> voxel_stride(const Tensor& tensor, int64_t first) {
  int64_t stride = 1, expected = 0;
  bool found = false;
  for (int64_t axis = tensor.dim() - 1; axis >= first; --axis) {
    const int64_t size = tensor.size(axis);
    if (size == 1) continue;
    if (!found) {
      stride = tensor.stride(axis);
      expected = stride * size;
      found = true;
    } else {
      if (tensor.stride(axis) != expected) return std::nullopt;
      expected *= size;
    }
  }
  return stride;
}

// (batch, channel, voxel) strides of (B, *spatial) or (B, k, *spatial), or nothing if the spatial
// axes do not collapse.
inline std::optional<Strides> strides_of(const Tensor& tensor, bool has_channel) {
  if (tensor.numel() == 0) return Strides{0, 0, 1};
  const std::optional<int64_t> voxel = voxel_stride(tensor, has_channel ? 2 : 1);
  if (!voxel) return std::nullopt;
  return Strides{tensor.stride(0), has_channel ? tensor.stride(1) : 0, *voxel};
}

// A tensor that kernels can walk, kept alive as long as they do: the tensor itself or, at the price
// of one copy, a contiguous one.
struct Walkable {
  Tensor tensor;
  Strides strides;

  Walkable(const Tensor& original, bool has_channel) : tensor(original) {
    std::optional<Strides> own = strides_of(tensor, has_channel);
    if (!own) {
      tensor = torch::stable::contiguous(tensor);
      own = strides_of(tensor, has_channel);
    }
    strides = *own;
  }
};

// The gradient of a (B, k, *spatial) tensor, in its layout. Kernels write to `written`: where the
// tensor's axes do not collapse that is another one, of the layout of `walkable`.
struct Gradient {
  Tensor result, written;
  Strides strides;
  bool copied;

  Gradient(const Tensor& like, const Walkable& walkable)
      : result(torch::stable::empty_like(like)), written(result) {
    const std::optional<Strides> own = strides_of(result, true);
    copied = !own;
    if (copied) written = torch::stable::empty_like(walkable.tensor);
    strides = own ? *own : *strides_of(written, true);
  }

  Tensor finished() {
    if (copied) torch::stable::copy_(result, written);
    return result;
  }
};

}  // namespace voxfuse
