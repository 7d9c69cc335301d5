// Choice of the instruction set at run time.
#pragma once

#include <cstdlib>
#include <cstring>

namespace voxfuse {

enum class InstructionSet { baseline, avx2, avx512 };

// The best instruction set of this machine, or a lower one that VOXFUSE_CPU_CAPABILITY asks for
// (baseline, avx2 or avx512).
inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    InstructionSet best = InstructionSet::baseline;
#ifdef VOXFUSE_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      best = InstructionSet::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        best = InstructionSet::avx512;
      }
    }
#endif
    const char* wanted = std::getenv("VOXFUSE_CPU_CAPABILITY");
    if (wanted != nullptr) {
      if (std::strcmp(wanted, "baseline") == 0) return InstructionSet::baseline;
      if (std::strcmp(wanted, "avx2") == 0 && best > InstructionSet::avx2) {
        return InstructionSet::avx2;
      }
    }
    return best;
  }();
  return chosen;
}

inline const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace voxfuse

// Calls FUNCTION of the namespace that was compiled for this machine's instruction set.
#ifdef VOXFUSE_X86
#define VOXFUSE_DISPATCH(FUNCTION, ...)                                   \
  (::voxfuse::instruction_set() == ::voxfuse::InstructionSet::avx512      \
       ? ::voxfuse::avx512::FUNCTION(__VA_ARGS__)                         \
       : (::voxfuse::instruction_set() == ::voxfuse::InstructionSet::avx2 \
              ? ::voxfuse::avx2::FUNCTION(__VA_ARGS__)                    \
              : ::voxfuse::baseline::FUNCTION(__VA_ARGS__)))
#else
#define VOXFUSE_DISPATCH(FUNCTION, ...) (::voxfuse::baseline::FUNCTION(__VA_ARGS__))
#endif

// Declares FUNCTION in every instruction set's namespace.
#ifdef VOXFUSE_X86
#define VOXFUSE_DECLARE_KERNEL(RETURN, SIGNATURE) \
  namespace voxfuse::baseline {                   \
  RETURN SIGNATURE;                               \
  }                                               \
  namespace voxfuse::avx2 {                       \
  RETURN SIGNATURE;                               \
  }                                               \
  namespace voxfuse::avx512 {                     \
  RETURN SIGNATURE;                               \
  }
#else
#define VOXFUSE_DECLARE_KERNEL(RETURN, SIGNATURE) \
  namespace voxfuse::baseline {                   \
  RETURN SIGNATURE;                               \
  }
#endif
