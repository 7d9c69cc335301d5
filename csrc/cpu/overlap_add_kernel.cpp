// The patch fusion kernels. Compiled once an instruction set (see csrc/cpu/dispatch.h).
//
// Forward (gather form): a task owns a tile of the result and adds the patches over it one after
// the other while the tile stays in cache, so that every result byte is written to memory once and
// no two tasks meet. Backward: a task owns one slice of one patch.
#include <algorithm>
#include <vector>

#include "cpu/overlap_add_activated.h"
#include "cpu/overlap_add_gather.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

template <class T, class R>
void scale_row(const T* __restrict source, R scale, const R* __restrict weight, int64_t n,
               T* __restrict out) {
  for (int64_t j = 0; j < n; ++j) {
    out[j] = from_real<T>((scale * weight[j]) * to_real<R>(source[j]));
  }
}

// One task is slice tz of patch i.
template <class T, class R>
void backward(const Fusion& q, int64_t first_task, int64_t last_task) {
  const T* source = static_cast<const T*>(q.source);
  T* target = static_cast<T*>(q.target);
  const int64_t patch_voxels = q.patch[0] * q.patch[1] * q.patch[2];
  const int64_t volume_voxels = q.extent[0] * q.extent[1] * q.extent[2];
  std::vector<R> divided(q.total != nullptr ? q.patch[2] : 0);

  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t i = task / q.patch[0], tz = task % q.patch[0];
    const int64_t* origin = q.origins + 3 * i;
    const int64_t z = origin[0] + tz;
    const bool slice_inside = z >= 0 && z < q.extent[0];
    const int64_t x = std::max<int64_t>(0, origin[2]);
    const int64_t x_end = std::min(q.extent[2], origin[2] + q.patch[2]);
    const auto gradient_row = [&](int64_t c, int64_t ty, const RowWeights<R>& w) {
      T* out = target + (i * q.channels + c) * patch_voxels + (tz * q.patch[1] + ty) * q.patch[2];
      const int64_t y = origin[1] + ty;
      if (!slice_inside || y < 0 || y >= q.extent[1] || x >= x_end) {
        std::fill(out, out + q.patch[2], T{});
        return;
      }
      const int64_t tx = x - origin[2], n = x_end - x;
      std::fill(out, out + tx, T{});
      scale_row<T, R>(source + c * volume_voxels + (z * q.extent[1] + y) * q.extent[2] + x, w.scale,
                      w.row + tx, n, out + tx);
      std::fill(out + tx + n, out + q.patch[2], T{});
    };
    if (q.total == nullptr) {
      for (int64_t c = 0; c < q.channels; ++c) {
        for (int64_t ty = 0; ty < q.patch[1]; ++ty) {
          gradient_row(c, ty, row_weights<R>(q, q.rounded, i, tz, ty));
        }
      }
      continue;
    }
    for (int64_t ty = 0; ty < q.patch[1]; ++ty) {
      const int64_t y = origin[1] + ty;
      if (slice_inside && y >= 0 && y < q.extent[1] && x < x_end) {
        const int64_t tx = x - origin[2];
        divided_weights<R>(row_weights<double>(q, q.weights, i, tz, ty), tx,
                           q.total + (z * q.extent[1] + y) * q.extent[2] + x, x_end - x,
                           divided.data() + tx);
      }
      for (int64_t c = 0; c < q.channels; ++c) gradient_row(c, ty, {R(1), divided.data()});
    }
  }
}

// Calls f with a value of the patches' type and one of the accumulation type.
template <class F>
void by_type(Element type, const F& f) {
  switch (type) {
    case Element::f16:
      return f(Half{}, float{});
    case Element::bf16:
      return f(BFloat16{}, float{});
    case Element::f64:
      return f(double{}, double{});
    default:
      return f(float{}, float{});
  }
}

}  // namespace

void overlap_forward(const Fusion& q, int64_t first_task, int64_t last_task) {
  by_type(q.type, [&](auto patch, auto sum) {
    using T = decltype(patch);
    using R = decltype(sum);
    if (q.activation != Activation::none) return forward_activated<T, R>(q, first_task, last_task);
    forward<T, R>(q, first_task, last_task);
  });
}

void overlap_backward(const Fusion& q, int64_t first_task, int64_t last_task) {
  by_type(q.type, [&](auto patch, auto sum) {
    using T = decltype(patch);
    using R = decltype(sum);
    if (q.activation != Activation::none) return backward_activated<T, R>(q, first_task, last_task);
    backward<T, R>(q, first_task, last_task);
  });
}

void overlap_weights(const Fusion& q, int64_t first_task, int64_t last_task) {
  double* target = static_cast<double*>(q.target);
  std::vector<Shared> pieces;
  for (int64_t task = first_task; task < last_task; ++task) {
    const Tile tile(q, task);
    const int64_t z_slot = slot_of(q, 0, tile.z);
    pieces.clear();
    find_pieces(q, tile, pieces);
    for (int64_t y = tile.y; y < tile.y_end; ++y) {
      double* line = target + (z_slot * q.extent[1] + slot_of(q, 1, y)) * q.extent[2];
      for (const Shared& p : pieces) {
        if (y < p.y || y >= p.y_end) continue;
        const int64_t* origin = q.origins + 3 * p.i;
        const RowWeights<double> w = row_weights<double>(q, q.weights, p.i, p.tz, y - origin[1]);
        const double* __restrict row = w.row + (p.x - origin[2]);
        double* __restrict sums = line + p.slot;
        for (int64_t j = 0; j < p.size; ++j) sums[j] += w.scale * row[j];
      }
    }
  }
}

}  // namespace voxfuse::VOXFUSE_ISA
