// The kernels on a GPU. No CUDA header is needed.
#pragma once

#include "../kernels.h"

namespace r2vpo {

struct CudaTarget {
  int device;
  void* stream;
};

// Each launches on the target's stream and returns; what CUDA refuses is thrown as
// std::runtime_error, in CUDA's own words. For logits and dlogits whose rows lie alike within 16
// bytes.
extern const Kernels<CudaTarget> kernels_cuda;

}  // namespace r2vpo
