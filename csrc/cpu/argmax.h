// The greatest of several rows, voxel by voxel, and which row it is in. Included only by
// *_kernel.cpp, like simd.h.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace voxfuse::VOXFUSE_ISA {

// An index as wide as R, so that a vector of them has as many lanes as one of values.
template <class R>
using Index = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;

// Takes `row` of number `c` where it is greater than `best`, which it then is, with c in `where`:
// ties stay with the row before, and so does everything with a NaN, which is greater than all else.
template <class R>
void keep_greater(const R* row, int64_t n, Index<R> c, R* best, Index<R>* where) {
  constexpr int kWidth = Lanes<R>::width;
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    const Vec<R> v = load(row + j), b = load(best + j);
    Mask<R> w;
    std::memcpy(&w, where + j, sizeof(w));
    const Mask<R> better = (v > b) | ((v != v) & (b == b));
    store(best + j, better ? v : b);
    w = better ? Mask<R>{} + c : w;
    std::memcpy(where + j, &w, sizeof(w));
  }
  for (; j < n; ++j) {
    if (row[j] > best[j] || (row[j] != row[j] && best[j] == best[j])) {
      best[j] = row[j];
      where[j] = c;
    }
  }
}

}  // namespace voxfuse::VOXFUSE_ISA
