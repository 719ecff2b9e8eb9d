// From a call to the instance of the kernel: for its dtype, with or without entropy and a sampling
// mask.
#pragma once

#include "cuda.h"

namespace r2vpo {

// To::launch<T, A, kEntropy, kSupport>(target, rows, a) for rows, where T is what `To` calls a
// number of the dtype, and To::launch(target, a) for tokens.
template <typename To, typename Float32, typename BFloat16, typename Float16>
class Dispatch {
  template <typename A, bool kEntropy, bool kSupport>
  static void by_type(const CudaTarget& target, const Rows& rows, const A& a) {
    const auto launch = [&](auto number) {
      To::template launch<decltype(number), A, kEntropy, kSupport>(target, rows, a);
    };
    switch (rows.dtype) {
      case Dtype::float32: return launch(Float32{});
      case Dtype::bfloat16: return launch(BFloat16{});
      case Dtype::float16: return launch(Float16{});
      default: return;
    }
  }

  template <typename A, bool kEntropy>
  static void by_support(const CudaTarget& target, const Rows& rows, const A& a) {
    a.support.token_ids ? by_type<A, kEntropy, true>(target, rows, a)
                        : by_type<A, kEntropy, false>(target, rows, a);
  }

  template <typename A>
  static void by_entropy(const CudaTarget& target, const Rows& rows, const A& a) {
    a.entropy ? by_support<A, true>(target, rows, a) : by_support<A, false>(target, rows, a);
  }

 public:
  static constexpr Kernels<CudaTarget> kernels = {
      by_entropy<LogpsForward>, by_entropy<LogpsBackward>, by_entropy<OnePass>,
      by_type<Scale, false, false>, To::launch, To::launch, To::launch, To::launch, To::launch,
      To::launch, To::launch, To::launch, To::launch};
};

}  // namespace r2vpo
