// The kernels on a CPU, compiled for several instruction sets.
#pragma once

#include "../kernels.h"

namespace r2vpo {

struct CpuTarget {
  int threads;
};

struct CpuKernels : Kernels<CpuTarget> {
  void (*exp2)(const float* in, float* out, std::int64_t count);  // for its test
};

extern const CpuKernels kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
#endif

// Of tokens, which are few: the same for all instruction sets.
void prepare(const CpuTarget&, const Prepare&);
void means(const CpuTarget&, const Means&);
void finish(const CpuTarget&, const Finish&);
void shard_parts(const CpuTarget&, const ShardParts&);
void shard_combine(const CpuTarget&, const ShardCombine&);
void dual_step(const CpuTarget&, const DualStep&);

}  // namespace r2vpo
