// What Python, Triton and C++ agree on, under the names of src/voxfuse/contract.py, which says what
// they mean. A test compares the two files.
#pragma once

namespace voxfuse {

enum class Activation : int { none, sigmoid, softmax };
enum class Overlap : int { product, min };
enum class Unlabelled : int { exclude, background };
enum class TargetKind : int { labels, dense, indicator, binary };
enum class ClassPooling : int { none, uniform, simple, square };
enum class Absent : int { keep, ignore, zero };
enum class Reduction : int { none, mean, sum };
enum class Normaliser : int { one, target, voxels, elements, volume };
enum class Decision : int { argmax, threshold, labels };
enum class Finish : int { values, labels, mask, foreground, entropy };
enum class Resampled : int { labels, mask, regions, values };

// Columns of the sums of one sample and class. Indices, hence integers: Sum::TP.
struct Sum {
  enum Column : int { TP, FP, FN, NLL, OFF, P2, G2, W };
};

// How many of the columns there are: TP to NLL, or all.
inline constexpr int CORE = 4, FULL = 8;

// What the message of an error begins with that a value in the data is the reason of.
inline constexpr char VALUE_ERROR[] = "ValueError: ";

/// How far the values of a dense target may lie outside [0, 1], for rounding's sake.
inline constexpr double TARGET_ROOM = 1e-3;

}  // namespace voxfuse
