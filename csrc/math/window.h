// Windows that weight a patch, and where the patches of a grid start: scalar mathematics.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace voxfuse::window {

constexpr int kMaxOrder = 9;

// Position of the centre of voxel t in a patch of `size` voxels, mirrored into the first half so
// that the windows are symmetric to the bit.
inline double mirrored_centre(int64_t t, int64_t size) {
  return static_cast<double>(std::min(t, size - 1 - t)) + 0.5;
}

// Cardinal B-spline of degree `order` at u in (0, order + 1), by the Cox-de Boor recursion
//   B_d(u) = (u B_{d-1}(u) + (d + 1 - u) B_{d-1}(u - 1)) / d.
// Every term is positive: the relative error stays a few ulp even in the tails.
inline double cardinal_bspline(double u, int order) {
  const int interval = static_cast<int>(u);
  const double fraction = u - interval;
  std::array<double, kMaxOrder + 1> value{};  // value[j] = B_d(fraction + j)
  value[0] = 1.0;
  for (int degree = 1; degree <= order; ++degree) {
    for (int j = degree; j >= 0; --j) {
      const double left = j < degree ? (fraction + j) * value[j] : 0.0;
      const double right = j > 0 ? (degree + 1 - j - fraction) * value[j - 1] : 0.0;
      value[j] = (left + right) / degree;
    }
  }
  return interval <= order ? value[interval] : 0.0;
}

// Centred B-spline on uniform knots stretched over the patch.
inline double bspline(int64_t t, int64_t size, int order) {
  return cardinal_bspline(mirrored_centre(t, size) * (order + 1) / static_cast<double>(size),
                          order);
}

// Quadratic B-spline on the knots {0, N/4, 3N/4, N}, scaled to the peak 1 (Hashemi et al. 2018).
inline double hashemi(int64_t t, int64_t size) {
  const double rise = 2.0 * mirrored_centre(t, size) / static_cast<double>(size);
  return rise <= 0.5 ? 2.0 * rise * rise : 1.0 - 2.0 * (1.0 - rise) * (1.0 - rise);
}

// exp(-x^2 / 2 sigma^2) with x measured from `centre`.
inline double gaussian(int64_t t, double centre, double sigma) {
  const double x = (static_cast<double>(t) - centre) / sigma;
  return std::exp(-0.5 * x * x);
}

// Hann window without its zero end points.
inline double hann(int64_t t, int64_t size) {
  constexpr double kPi = 3.14159265358979323846;
  const double sine =
      std::sin(kPi * (mirrored_centre(t, size) + 0.5) / static_cast<double>(size + 1));
  return sine * sine;
}

// Normalises `window` along one axis for patches at `starts`: row i holds w(t) / sum_j w(o_i + t -
// o_j), so that overlapping rows sum to 1 at every coordinate of [0, extent). Rows are 0 outside,
// and where all weights are 0. Returns (starts, window) in C order.
inline std::vector<double> normalised_rows(const std::vector<double>& window,
                                           const std::vector<int64_t>& starts, int64_t extent) {
  const int64_t size = static_cast<int64_t>(window.size());
  std::vector<double> total(static_cast<size_t>(extent), 0.0);
  const auto clipped = [&](int64_t start, auto&& visit) {
    const int64_t first = std::max<int64_t>(0, -start);
    const int64_t last = std::min(size, extent - start);
    for (int64_t t = first; t < last; ++t) visit(t, start + t);
  };
  for (const int64_t start : starts)
    clipped(start, [&](int64_t t, int64_t x) { total[x] += window[t]; });
  std::vector<double> rows(starts.size() * window.size(), 0.0);
  for (size_t i = 0; i < starts.size(); ++i)
    clipped(starts[i], [&](int64_t t, int64_t x) {
      if (total[x] != 0.0) rows[i * window.size() + t] = window[t] / total[x];
    });
  return rows;
}

// MONAI's rule: step int(patch (1 - overlap)), the last patch shifted back inside. A patch larger
// than the volume is centred on it.
inline std::vector<int64_t> shifted_starts(int64_t extent, int64_t patch, double overlap) {
  if (extent <= patch) return {-((patch - extent) / 2)};
  const int64_t step =
      std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(patch) * (1.0 - overlap)));
  std::vector<int64_t> starts;
  for (int64_t start = 0;; start += step) {
    starts.push_back(std::min(start, extent - patch));
    if (start + patch >= extent) return starts;
  }
}

// nnU-Net's rule: as few patches as a step of patch (1 - overlap) allows, evenly re-spread.
inline std::vector<int64_t> even_starts(int64_t extent, int64_t patch, double overlap) {
  if (extent <= patch) return {-((patch - extent) / 2)};
  const double target = static_cast<double>(patch) * (1.0 - overlap);
  const double room = static_cast<double>(extent - patch);
  const int64_t count = static_cast<int64_t>(std::ceil(room / target)) + 1;
  const double step = room / static_cast<double>(count - 1);
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < count; ++i)
    starts.push_back(static_cast<int64_t>(std::nearbyint(step * static_cast<double>(i))));
  return starts;
}

// The papers' grid: steps of half a patch from half a patch before the volume to its end, so that
// every voxel lies in two patches an axis; what sticks out is filled by reflection.
inline std::vector<int64_t> half_patch_starts(int64_t extent, int64_t patch) {
  const int64_t step = std::max<int64_t>(1, patch / 2);
  std::vector<int64_t> starts;
  for (int64_t start = -(patch / 2); start < extent; start += step) starts.push_back(start);
  return starts;
}

}  // namespace voxfuse::window
