// The patch fusion operators from tensors to problems, the same for every device. What is checked
// here keeps memory safe for callers that reach the operators directly; the rest is the Python
// wrappers'.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "contract/overlap_add.h"
#include "ops/tensor.h"

namespace voxfuse {

inline std::string shape_of(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

inline std::vector<int64_t> sizes_from(const Tensor& tensor, int64_t first) {
  std::vector<int64_t> sizes;
  for (int64_t axis = first; axis < tensor.dim(); ++axis) sizes.push_back(tensor.size(axis));
  return sizes;
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
                               const std::vector<int64_t>& extent) {
  if (!total) return;
  STD_TORCH_CHECK(total->scalar_type() == ScalarType::Double && sizes_from(*total, 0) == extent,
                  "total: got shape ", shape_of(*total), ", expected float64 ", shape_of(extent));
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

// With a least weight `cover` has a table an axis, beside the axes' own weights. Coordinates run to
// `extent`, along `ring_axis` to `stop` at least.
inline void check_fusion_cover(const std::vector<Tensor>& cover, const std::vector<Tensor>& weights,
                               double floor, const std::vector<int64_t>& extent, int64_t ring_axis,
                               int64_t stop) {
  STD_TORCH_CHECK(floor >= 0, "floor: got ", floor, ", expected a weight >= 0");
  const size_t expected = floor > 0 ? extent.size() : 0;
  STD_TORCH_CHECK(cover.size() == expected, "cover: are ", cover.size(), ", expected ", expected,
                  floor > 0 ? " with floor" : " without floor");
  STD_TORCH_CHECK(floor == 0 || weights.size() == extent.size(), "weights: are ", weights.size(),
                  ", expected ", extent.size(), " with floor");
  for (size_t axis = 0; axis < cover.size(); ++axis) {
    const Tensor& table = cover[axis];
    const bool fits = table.scalar_type() == ScalarType::Double && table.dim() == 2;
    const bool moves = static_cast<int64_t>(axis) == ring_axis;
    STD_TORCH_CHECK(fits && (moves ? table.size(1) >= stop : table.size(1) == extent[axis]),
                    "cover: got shape ", shape_of(table), ", expected float64 (k, ",
                    moves ? stop : extent[axis], moves ? " or more)" : ")");
  }
}

inline Activation fusion_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::softmax),
                  "activation: got ", activation,
                  ", expected 0 (none), 1 (sigmoid) or 2 (softmax)");
  return static_cast<Activation>(activation);
}

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The part of a ring's coordinates that it holds; axis -1 stands for a plain volume.
struct Ring {
  int64_t axis = -1, start = 0, stop = 0;
};

// A problem and the tensors that its pointers point into; a device's plan adds the tables of
// patches and weights.
template <class Problem>
class FusionPlan {
 public:
  Problem q{};

  FusionPlan(const FusionPlan&) = delete;
  FusionPlan& operator=(const FusionPlan&) = delete;

  void take_cover(const std::vector<Tensor>& cover, double floor) {
    q.floor = floor;
    for (size_t k = 0; k < cover.size(); ++k) {
      const Tensor& table = keep(cover[k], "cover");
      const int axis = lead_ + static_cast<int>(k);
      q.cover[axis] = static_cast<const double*>(table.const_data_ptr());
      q.cover_count[axis] = coordinate(table.size(0), "cover");
      q.cover_extent[axis] = coordinate(table.size(1), "cover");
    }
  }

  void take_flip(int64_t flip) {
    const int64_t axes = 3 - lead_;
    STD_TORCH_CHECK(flip >= 0 && flip < (int64_t{1} << axes), "flip: got ", flip,
                    ", expected one bit an axis, 0 to ", (int64_t{1} << axes) - 1);
    q.flip = static_cast<int>(flip << lead_);
  }

 protected:
  using Size = std::remove_reference_t<decltype(Problem{}.patch[0])>;

  FusionPlan(const Tensor& partner, const Tensor& origins, const std::vector<Tensor>& weights,
             const std::optional<Tensor>& total, const std::vector<int64_t>& extent,
             int64_t channels, Ring ring)
      : partner_(partner), lead_(3 - static_cast<int>(extent.size())) {
    const int axes = static_cast<int>(extent.size());
    const std::vector<int64_t> patch = patch_shape_of(weights, axes);
    q.patches = origins.size(0);
    q.channels = channels;
    q.axes = axes;
    q.separable = weights_are_separable(weights, axes);
    for (int axis = lead_; axis < 3; ++axis) {
      q.patch[axis] = coordinate(patch[axis - lead_], "weights");
      q.extent[axis] = q.end[axis] = coordinate(extent[axis - lead_], "volume_shape");
    }
    if (ring.axis >= 0) {
      q.ring_axis = lead_ + static_cast<int>(ring.axis);
      q.begin[q.ring_axis] = coordinate(ring.start, "start");
      q.end[q.ring_axis] = coordinate(ring.stop, "stop");
    }
    if (total) q.total = static_cast<const double*>(keep(*total, "total").const_data_ptr());
  }

  // The tensor, contiguous, as long as the plan lives.
  const Tensor& keep(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.device() == partner_.device(), name,
                    ": is on another device than the data");
    tensors_.push_back(torch::stable::contiguous(tensor));
    return tensors_.back();
  }

  const Tensor partner_;
  const int lead_;  // axes of extent 1 in front
  std::vector<Tensor> tensors_;

 private:
  // A coordinate plus a patch must not overflow.
  static Size coordinate(int64_t size, const char* name) {
    constexpr int64_t kLargest = std::numeric_limits<Size>::max() / 2;
    VOXFUSE_CHECK_VALUE(size >= 0 && size <= kLargest, name, ": got ", size, ", expected 0 to ",
                        kLargest);
    return static_cast<Size>(size);
  }
};

// The operators. A device's Plan is made from (partner, origins, rows, weights, total, extent,
// channels, ring) and has forward(result), add(), add_weights() and backward().

template <class Plan>
Tensor overlap_add_on(const Tensor& patches, const Tensor& origins, const Tensor& rows,
                      std::vector<Tensor> weights, const std::optional<Tensor>& total,
                      std::vector<int64_t> volume_shape, int64_t activation) {
  const int64_t axes = static_cast<int64_t>(volume_shape.size());
  STD_TORCH_CHECK(patches.dim() >= 1, "patches: got shape ", shape_of(patches));
  check_fusion_tables(origins, rows, weights, patches.size(0), axes);
  check_fusion_patches(patches, weights, axes);
  check_fusion_total(total, volume_shape);
  Plan plan(patches, origins, rows, weights, total, volume_shape, patches.size(1), Ring{});
  std::vector<int64_t> shape{patches.size(1)};
  shape.insert(shape.end(), volume_shape.begin(), volume_shape.end());
  const Tensor source = torch::stable::contiguous(patches);
  Tensor result = torch::stable::new_empty(patches, shape);
  plan.q.type = element_of(patches, "patches");
  plan.q.source = source.const_data_ptr();
  plan.q.target = result.mutable_data_ptr();
  plan.q.activation = fusion_activation(activation);
  plan.forward(result);
  return result;
}

template <class Plan>
void overlap_add_to_ring_on(const Tensor& ring, const Tensor& patches, const Tensor& origins,
                            const Tensor& rows, std::vector<Tensor> weights,
                            const std::optional<Tensor>& total, int64_t ring_axis, int64_t start,
                            int64_t stop, int64_t flip, double floor, int64_t activation,
                            std::optional<std::vector<Tensor>> given_cover) {
  const std::vector<Tensor> cover = given_cover.value_or(std::vector<Tensor>{});
  STD_TORCH_CHECK(
      ring.dim() >= 2 && patches.dim() == ring.dim() + 1 && ring.size(0) == patches.size(1),
      "ring: got shape ", shape_of(ring), ", expected (C, *extent) to go with patches of shape ",
      shape_of(patches));
  const std::vector<int64_t> extent = sizes_from(ring, 1);
  const int64_t axes = static_cast<int64_t>(extent.size());
  check_fusion_tables(origins, rows, weights, patches.size(0), axes);
  check_fusion_patches(patches, weights, axes);
  check_fusion_total(total, extent);
  check_fusion_ring(ring, "ring", extent, ring_axis, start, stop);
  check_fusion_cover(cover, weights, floor, extent, ring_axis, stop);
  STD_TORCH_CHECK(ring.scalar_type() == accumulation_type(patches.scalar_type()), "ring: got ",
                  torch::headeronly::toString(ring.scalar_type()), ", expected ",
                  torch::headeronly::toString(accumulation_type(patches.scalar_type())));
  STD_TORCH_CHECK(ring.device() == patches.device(), "ring: is on another device than patches");
  Plan plan(patches, origins, rows, weights, total, extent, ring.size(0),
            Ring{ring_axis, start, stop});
  plan.take_cover(cover, floor);
  plan.take_flip(flip);
  const Tensor source = torch::stable::contiguous(patches);
  plan.q.type = element_of(patches, "patches");
  plan.q.source = source.const_data_ptr();
  plan.q.target = ring.mutable_data_ptr();
  plan.q.activation = fusion_activation(activation);
  plan.add();
}

template <class Plan>
void overlap_weights_on(const Tensor& total, const Tensor& origins, const Tensor& rows,
                        std::vector<Tensor> weights, int64_t ring_axis, int64_t start,
                        int64_t stop) {
  const std::vector<int64_t> extent = sizes_from(total, 0);
  check_fusion_tables(origins, rows, weights, origins.dim() > 0 ? origins.size(0) : 0, total.dim());
  check_fusion_total(total, extent);
  check_fusion_ring(total, "total", extent, ring_axis, start, stop);
  Plan plan(total, origins, rows, weights, std::nullopt, extent, 1, Ring{ring_axis, start, stop});
  plan.q.type = Element::f64;
  plan.q.target = total.mutable_data_ptr();
  plan.add_weights();
}

template <class Plan>
Tensor overlap_add_backward_on(const Tensor& grad, const Tensor& origins, const Tensor& rows,
                               std::vector<Tensor> weights, const std::optional<Tensor>& total,
                               const std::optional<Tensor>& patches, int64_t activation) {
  check_fusion_dtype(grad, "grad");
  STD_TORCH_CHECK(grad.dim() >= 2, "grad: got shape ", shape_of(grad), ", expected (C, *volume)");
  const std::vector<int64_t> extent = sizes_from(grad, 1);
  const int64_t axes = static_cast<int64_t>(extent.size());
  check_fusion_tables(origins, rows, weights, origins.dim() > 0 ? origins.size(0) : 0, axes);
  check_fusion_total(total, extent);
  Plan plan(grad, origins, rows, weights, total, extent, grad.size(0), Ring{});
  plan.q.activation = fusion_activation(activation);
  Tensor activated;
  if (plan.q.activation != Activation::none) {
    STD_TORCH_CHECK(patches, "patches: got None, expected the patches that were activated");
    check_fusion_patches(*patches, weights, axes);
    STD_TORCH_CHECK(patches->size(0) == origins.size(0) && patches->size(1) == grad.size(0) &&
                        patches->scalar_type() == grad.scalar_type() &&
                        patches->device() == grad.device(),
                    "patches: do not go with grad and origins");
    activated = torch::stable::contiguous(*patches);
    plan.q.activated = activated.const_data_ptr();
  }
  std::vector<int64_t> shape{origins.size(0), grad.size(0)};
  for (const int64_t size : patch_shape_of(weights, axes)) shape.push_back(size);
  const Tensor source = torch::stable::contiguous(grad);
  Tensor result = torch::stable::new_empty(grad, shape);
  plan.q.type = element_of(grad, "grad");
  plan.q.source = source.const_data_ptr();
  plan.q.target = result.mutable_data_ptr();
  plan.backward(result);
  return result;
}

}  // namespace voxfuse
