#pragma once

// Marks scalar mathematics that the CPU kernels, the CUDA kernels and the tests share.
#if defined(__CUDACC__)
#define VOXFUSE_HOST_DEVICE __host__ __device__
#else
#define VOXFUSE_HOST_DEVICE
#endif
