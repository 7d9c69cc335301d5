// What the files of soft_confusion on the CPU share.
#pragma once

#include <cstdint>

#include "contract/soft_confusion.h"

namespace voxfuse {

// Voxels whose sums are kept in the compute type before they go to float64. Fixed, so that the
// bits of a result depend on the inputs alone.
inline constexpr int64_t kChunkVoxels = 2048;

}  // namespace voxfuse
