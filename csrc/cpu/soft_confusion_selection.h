// Which core computes a problem, and which instance of the softmax core a block. Part of
// soft_confusion_kernel.cpp.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/soft_confusion_softmax.h"
#include "cpu/soft_confusion_staging.h"

namespace voxfuse::VOXFUSE_ISA {
namespace {

enum class Core { general, sigmoid, softmax, dense_softmax };

// What the common options are; the rest goes through the general core.
template <class R>
Core core_of(const SoftConfusion& q) {
  if (!std::is_same_v<R, float> || q.activation != q.likelihood || q.overlap != Overlap::product ||
      q.gamma != 0) {
    return Core::general;
  }
  if (q.activation == Activation::sigmoid) return Core::sigmoid;
  if (q.activation != Activation::softmax || q.classes < 2 ||
      q.classes >= std::numeric_limits<int32_t>::max()) {
    return Core::general;
  }
  return q.dense ? Core::dense_softmax : Core::softmax;
}

// Whether the softmax cores have what the cotangents ask for: none of OFF and of P2.
template <class R>
bool basic_cotangents(const std::vector<R>& cotangent, int64_t classes, int columns) {
  if (columns == CORE) return true;
  for (int64_t c = 0; c < classes; ++c) {
    if (cotangent[c * FULL + Sum::OFF] != 0 || cotangent[c * FULL + Sum::P2] != 0) return false;
  }
  return true;
}

// The softmax core has an instance for each number of classes from 2 to kMaxFastClasses, and one,
// of 0, for more.
inline constexpr int kMaxFastClasses = 16;

constexpr bool has_instance(int classes, Form form, bool full) {
  if (form == Form::interleaved) return !full && exchanges_in_registers(classes);
  return classes != 1 && (form == Form::rows || kHalvesInRegisters);
}

template <bool Full, bool Weighted, Form F>
struct Forward {
  using Function = void (*)(int64_t classes, const Block<float>&, float* scratch, float* sums);
  template <int C>
  static constexpr Function instance() {
    if constexpr (!has_instance(C, F, Full)) {
      return nullptr;
    } else if constexpr (C == 2) {
      return two_classes_forward<Full, Weighted, F>;
    } else {
      return softmax_forward<C, Full, Weighted, F>;
    }
  }
};

template <bool Weighted, Form F>
struct Backward {
  using Function = void (*)(int64_t classes, const Block<float>&, float* scratch, const Cotangents&,
                            const BlockGradient&);
  template <int C>
  static constexpr Function instance() {
    if constexpr (!has_instance(C, F, false)) {
      return nullptr;
    } else if constexpr (C == 2) {
      return two_classes_backward<Weighted, F>;
    } else {
      return softmax_backward<C, Weighted, F>;
    }
  }
};

template <class Instances, int... C>
typename Instances::Function instance_for(int64_t classes, std::integer_sequence<int, C...>) {
  static constexpr typename Instances::Function table[] = {Instances::template instance<C>()...};
  return table[classes <= kMaxFastClasses ? classes : 0];
}

template <class F>
auto with_flag(bool flag, F&& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

template <class F>
auto with_form(Form form, F&& f) {
  if (form == Form::halves) return f(std::integral_constant<Form, Form::halves>{});
  if (form == Form::interleaved) return f(std::integral_constant<Form, Form::interleaved>{});
  return f(std::integral_constant<Form, Form::rows>{});
}

inline auto softmax_forward_of(int64_t classes, bool full, bool weighted, Form form) {
  return with_form(form, [&](auto f) {
    return with_flag(full, [&](auto whole) {
      return with_flag(weighted, [&](auto w) {
        return instance_for<Forward<whole(), w(), f()>>(
            classes, std::make_integer_sequence<int, kMaxFastClasses + 1>{});
      });
    });
  });
}

inline auto softmax_backward_of(int64_t classes, bool weighted, Form form) {
  return with_form(form, [&](auto f) {
    return with_flag(weighted, [&](auto w) {
      return instance_for<Backward<w(), f()>>(
          classes, std::make_integer_sequence<int, kMaxFastClasses + 1>{});
    });
  });
}

}  // namespace
}  // namespace voxfuse::VOXFUSE_ISA
