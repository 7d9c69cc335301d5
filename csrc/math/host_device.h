#pragma once

// Marks mathematics that the CPU kernels, the CUDA kernels and the tests share, and its namespace.
// In a CPU kernel, which is compiled once an instruction set, nothing may be left that the linker
// could take for another set's: all is inlined, and the names are the set's own.
#if defined(__CUDACC__)
#define VOXFUSE_HOST_DEVICE __host__ __device__
#elif defined(VOXFUSE_ISA)
#define VOXFUSE_HOST_DEVICE __attribute__((always_inline))
#else
#define VOXFUSE_HOST_DEVICE
#endif
#if defined(VOXFUSE_ISA)
#define VOXFUSE_MATH voxfuse::math::inline VOXFUSE_ISA
#else
#define VOXFUSE_MATH voxfuse::math
#endif
