// The launches of an emulation program, for tests of which kernels run and how many.
#include <cstdio>
#include <cstdlib>

#include "cuda_emulation.h"

extern "C" const char __executable_start;  // the linker's: where the program was loaded

namespace voxfuse::emulation {

void log_launch(const void* kernel, const std::string& features) {
  static std::FILE* const log = [] {
    const char* path = std::getenv("EMULATION_LOG");
    return path == nullptr ? nullptr : std::fopen(path, "a");
  }();
  if (log == nullptr) return;
  const auto offset = reinterpret_cast<std::uintptr_t>(kernel) -
                      reinterpret_cast<std::uintptr_t>(&__executable_start);
  std::fprintf(log, "%zx%s\n", static_cast<std::size_t>(offset), features.c_str());
  std::fflush(log);
}

}  // namespace voxfuse::emulation
