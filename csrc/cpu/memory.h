// Advice to the operating system about large, freshly allocated results.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace voxfuse {

// A large gradient is memory that nobody has touched: with 4 KiB pages the kernel's page faults
// cost more than the arithmetic. Asking for transparent huge pages makes the first touch cheap;
// where the system does not offer them this does nothing.
inline void advise_huge_pages(void* data, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uint64_t kHugePage = uint64_t{1} << 21;
  if (bytes < 4 * kHugePage) return;
  const uint64_t begin = (reinterpret_cast<uint64_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uint64_t end = (reinterpret_cast<uint64_t>(data) + bytes) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace voxfuse
