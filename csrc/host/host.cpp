// Python module voxfuse._host: build information, windows and grid planning. No torch headers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../cpu/memory.h"
#include "../math/window.h"

namespace py = pybind11;
namespace window = voxfuse::window;

namespace {

#define VOXFUSE_STRING_(x) #x
#define VOXFUSE_STRING(x) VOXFUSE_STRING_(x)

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " VOXFUSE_STRING(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
#if defined(VOXFUSE_CUDA_ARCHITECTURES)
  info["cuda_architectures"] = VOXFUSE_CUDA_ARCHITECTURES;
#else
  info["cuda_architectures"] = "";
#endif
  return info;
}

template <typename Value>
py::array_t<double> sampled(int64_t size, Value value) {
  py::array_t<double> result(static_cast<py::ssize_t>(size));
  double* out = result.mutable_data();
  for (int64_t t = 0; t < size; ++t) out[t] = value(t);
  return result;
}

py::array_t<double> normalised_rows(const std::vector<double>& window,
                                    const std::vector<int64_t>& starts, int64_t extent) {
  const std::vector<double> rows = window::normalised_rows(window, starts, extent);
  py::array_t<double> result(
      {static_cast<py::ssize_t>(starts.size()), static_cast<py::ssize_t>(window.size())});
  std::copy(rows.begin(), rows.end(), result.mutable_data());
  return result;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Compiled host helpers of voxfuse; voxfuse.reference.windows is their NumPy twin.";
  module.def("build_info", &build_info);
  module.def("bspline", [](int64_t size, int order) {
    return sampled(size, [=](int64_t t) { return window::bspline(t, size, order); });
  });
  module.def("hashemi", [](int64_t size) {
    return sampled(size, [=](int64_t t) { return window::hashemi(t, size); });
  });
  module.def("gaussian", [](int64_t size, double centre, double sigma) {
    return sampled(size, [=](int64_t t) { return window::gaussian(t, centre, sigma); });
  });
  module.def("hann", [](int64_t size) {
    return sampled(size, [=](int64_t t) { return window::hann(t, size); });
  });
  module.def("normalised_rows", &normalised_rows);
  module.def("shifted_starts", &window::shifted_starts);
  module.def("even_starts", &window::even_starts);
  module.def("half_patch_starts", &window::half_patch_starts);
  module.def("advise_huge_pages", [](uintptr_t address, uint64_t bytes) {
    voxfuse::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
  });
}
