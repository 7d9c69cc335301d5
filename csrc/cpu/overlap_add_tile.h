// Which patches lie over which tile of the result, in slots of a ring. Part of
// overlap_add_kernel.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/overlap_add.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

// Coordinates [first, last) whose slots are consecutive, from `slot` on.
struct Segment {
  int64_t first, last, slot;
};

int64_t slot_of(const Fusion& q, int axis, int64_t x) {
  return axis == q.ring_axis ? x % q.extent[axis] : x;
}

// Coordinates [first, last) of an axis, split where a ring wraps around.
struct Segments {
  Segment part[2];
  int count;

  Segments(const Fusion& q, int axis, int64_t first, int64_t last) {
    const int64_t slot = slot_of(q, axis, first);
    const int64_t split = std::min(last, first + q.extent[axis] - slot);
    part[0] = {first, split, slot};
    part[1] = {split, last, 0};
    count = split == last ? 1 : 2;
  }
  const Segment* begin() const { return part; }
  const Segment* end() const { return part + count; }
};

struct Tile {
  int64_t channel, channel_end, z, y, y_end, x, x_end;

  Tile(const Fusion& q, int64_t task) {
    const int64_t columns = blocks(q.high[2] - q.low[2], q.task_columns);
    const int64_t rows = blocks(q.high[1] - q.low[1], q.task_rows);
    const int64_t slices = q.high[0] - q.low[0];
    x = q.low[2] + task % columns * q.task_columns;
    x_end = std::min(x + q.task_columns, q.high[2]);
    task /= columns;
    y = q.low[1] + task % rows * q.task_rows;
    y_end = std::min(y + q.task_rows, q.high[1]);
    task /= rows;
    z = q.low[0] + task % slices;
    channel = task / slices * q.task_channels;
    channel_end = std::min(channel + q.task_channels, q.channels);
  }
};

// What a patch and a tile share: `size` columns from `x` on, in consecutive slots from `slot` on,
// of rows [y, y_end) of the patch's slice tz.
struct Shared {
  int64_t i, tz, y, y_end, x, size, slot;
  int64_t weights = 0;  // where its weights are, if they are made beforehand
};

// Appends what the patches share with the tile to `pieces`, in patch order.
void find_pieces(const Fusion& q, const Tile& tile, std::vector<Shared>& pieces) {
  const int64_t slice = tile.z - q.begin[0];
  for (int64_t k = q.first_of_slice[slice]; k < q.first_of_slice[slice + 1]; ++k) {
    const int64_t i = q.over_slice[k];
    const int64_t* origin = q.origins + 3 * i;
    const int64_t y = std::max(tile.y, origin[1]),
                  y_end = std::min(tile.y_end, origin[1] + q.patch[1]);
    const int64_t x = std::max(tile.x, origin[2]),
                  x_end = std::min(tile.x_end, origin[2] + q.patch[2]);
    if (y >= y_end || x >= x_end) continue;
    for (const Segment& xs : Segments(q, 2, x, x_end)) {
      pieces.push_back({i, tile.z - origin[0], y, y_end, xs.first, xs.last - xs.first, xs.slot});
    }
  }
}

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
