// Checks of the patch fusion operators' arguments, shared by the CPU and the CUDA operators. They
// repeat the Python wrapper's for callers that reach the operators directly.
#pragma once

#include <string>
#include <vector>

#include "ops/tensor.h"

namespace voxfuse {

inline std::string shape_of(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

// Whether there is one table of weights an axis (or else one dense window).
inline bool weights_are_separable(const std::vector<Tensor>& weights, int64_t axes) {
  return static_cast<int64_t>(weights.size()) == axes;
}

// The patch's extent, which the weights carry.
inline std::vector<int64_t> patch_shape_of(const std::vector<Tensor>& weights, int64_t axes) {
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < axes; ++axis) {
    shape.push_back(weights_are_separable(weights, axes) ? weights[axis].size(1)
                                                         : weights[0].size(axis + 1));
  }
  return shape;
}

inline void check_fusion_dtype(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16 || type == ScalarType::Double,
                  name, ": got ", torch::headeronly::toString(type),
                  ", expected float32, float16, bfloat16 or float64");
}

// Checks the tables' shapes and dtypes; `count` patches over `axes` spatial axes.
inline void check_fusion_tables(const Tensor& origins, const Tensor& rows,
                                const std::vector<Tensor>& weights, int64_t count, int64_t axes) {
  STD_TORCH_CHECK(axes >= 1 && axes <= 3, "patches: got ", axes, " spatial axes, expected 1 to 3");
  const auto check_table = [&](const Tensor& table, const char* name) {
    STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                        table.size(0) == count && table.size(1) == axes,
                    name, ": got shape ", shape_of(table), ", expected int64 (", count, ", ", axes,
                    ")");
  };
  check_table(origins, "origins");
  check_table(rows, "rows");
  bool fits = weights_are_separable(weights, axes) || weights.size() == 1;
  for (const Tensor& w : weights) {
    STD_TORCH_CHECK(w.scalar_type() == ScalarType::Double, "weights: got ",
                    torch::headeronly::toString(w.scalar_type()), ", expected float64");
    fits = fits && (weights_are_separable(weights, axes) ? w.dim() == 2
                                                         : w.dim() == axes + 1 && w.size(0) == 1);
  }
  STD_TORCH_CHECK(fits, "weights: expected one (k, extent) tensor an axis, or one dense ",
                  "(1, *patch) tensor");
}

inline void check_fusion_patches(const Tensor& patches, const std::vector<Tensor>& weights,
                                 int64_t axes) {
  check_fusion_dtype(patches, "patches");
  STD_TORCH_CHECK(patches.dim() == axes + 2, "patches: got shape ", shape_of(patches),
                  ", expected (N, C, *patch) with ", axes, " spatial axes");
  const std::vector<int64_t> shape = patch_shape_of(weights, axes);
  for (int64_t axis = 0; axis < axes; ++axis) {
    STD_TORCH_CHECK(patches.size(axis + 2) == shape[axis], "weights: are for patches ",
                    shape_of(shape), ", but patches are ", shape_of(patches));
  }
}

inline void check_fusion_total(const std::optional<Tensor>& total,
                               const std::vector<int64_t>& extent, const Tensor& partner) {
  if (!total) return;
  bool fits = total->scalar_type() == ScalarType::Double &&
              total->dim() == static_cast<int64_t>(extent.size());
  for (size_t axis = 0; fits && axis < extent.size(); ++axis) {
    fits = total->size(axis) == extent[axis];
  }
  STD_TORCH_CHECK(fits, "total: got shape ", shape_of(*total), ", expected float64 ",
                  shape_of(extent));
  STD_TORCH_CHECK(total->device() == partner.device(), "total: is on another device");
}

// `extent` are the spatial sizes of `ring`, which holds [start, stop) along `ring_axis`.
inline void check_fusion_ring(const Tensor& ring, const char* name,
                              const std::vector<int64_t>& extent, int64_t ring_axis, int64_t start,
                              int64_t stop) {
  STD_TORCH_CHECK(ring.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(ring_axis >= 0 && ring_axis < static_cast<int64_t>(extent.size()),
                  "ring_axis: got ", ring_axis, ", expected 0 <= ring_axis < ", extent.size());
  STD_TORCH_CHECK(0 <= start && start <= stop && stop - start <= extent[ring_axis],
                  "start, stop: got ", start, ", ", stop,
                  ", expected 0 <= start <= stop <= start + ", extent[ring_axis], ", the slots of ",
                  name);
}

// Takes the tables of all patches' weights from the end of `weights`: with a least weight there is
// one an axis, beside the axes' own. Coordinates run to `extent`, along `ring_axis` to `stop` at
// least.
inline std::vector<Tensor> take_cover(std::vector<Tensor>& weights, double floor,
                                      const std::optional<Tensor>& total,
                                      const std::vector<int64_t>& extent, int64_t ring_axis,
                                      int64_t stop) {
  STD_TORCH_CHECK(floor >= 0, "floor: got ", floor, ", expected a weight >= 0");
  if (floor == 0) return {};
  const size_t axes = extent.size();
  STD_TORCH_CHECK(weights.size() == 2 * axes, "weights: are ", weights.size(), ", expected ",
                  2 * axes, " with floor");
  STD_TORCH_CHECK(!total, "total: got one beside floor, expected one of the two");
  std::vector<Tensor> cover(weights.begin() + axes, weights.end());
  weights.resize(axes);
  for (size_t axis = 0; axis < axes; ++axis) {
    const Tensor& table = cover[axis];
    const bool fits = table.scalar_type() == ScalarType::Double && table.dim() == 2;
    const bool moves = static_cast<int64_t>(axis) == ring_axis;
    STD_TORCH_CHECK(fits && (moves ? table.size(1) >= stop : table.size(1) == extent[axis]),
                    "weights: got shape ", shape_of(table), ", expected float64 (k, ",
                    moves ? stop : extent[axis], moves ? " or more)" : ")");
  }
  return cover;
}

// Bit a of `flip`: the patches are mirrored along spatial axis a.
inline void check_fusion_flip(int64_t flip, int64_t axes) {
  STD_TORCH_CHECK(flip >= 0 && flip < (int64_t{1} << axes), "flip: got ", flip,
                  ", expected one bit an axis, 0 to ", (int64_t{1} << axes) - 1);
}

// What is made of the patches before they are weighted; the codes are those of csrc/math.
inline void check_fusion_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation: got ", activation,
                  ", expected 0 (none), 1 (sigmoid) or 2 (softmax)");
}

// With an activation the gradient depends on the patches, which are like those of the forward.
inline void check_fusion_activated(const std::optional<Tensor>& patches, int64_t activation,
                                   const Tensor& grad, const std::vector<Tensor>& weights,
                                   int64_t count) {
  check_fusion_activation(activation);
  if (activation == 0) return;
  STD_TORCH_CHECK(patches, "patches: got None, expected the patches that were activated");
  check_fusion_patches(*patches, weights, grad.dim() - 1);
  STD_TORCH_CHECK(patches->size(0) == count && patches->size(1) == grad.size(0) &&
                      patches->scalar_type() == grad.scalar_type() &&
                      patches->device() == grad.device(),
                  "patches: do not go with grad and origins");
}

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace voxfuse
