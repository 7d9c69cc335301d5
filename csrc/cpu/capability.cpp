// Tells `voxfuse info` which of the compiled instruction sets this machine runs.
#include "cpu/dispatch.h"

extern "C" __attribute__((visibility("default"))) const char* voxfuse_cpu_capability() {
  return voxfuse::name_of(voxfuse::instruction_set());
}
