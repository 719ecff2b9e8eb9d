// The kernels on a CPU, compiled for several instruction sets.
#pragma once

#include "../kernels.h"

namespace r2vpo {

struct CpuRows : Rows {
  int threads;
};

struct CpuKernels : Kernels<CpuRows> {
  void (*exp2)(const float* in, float* out, std::int64_t count);  // for its test
};

extern const CpuKernels kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
#endif

}  // namespace r2vpo
