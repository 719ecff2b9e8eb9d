// What rows.h and tokens.h share: how code is declared that runs on a GPU and on the emulated one,
// and sums over the lanes of a warp.
#pragma once

#include "../kernels.h"

#if defined(__CUDACC__)
#define R2VPO_DEVICE __device__ __forceinline__
#define R2VPO_UNROLL _Pragma("unroll")
#else
#define R2VPO_DEVICE inline
#define R2VPO_UNROLL
#endif

namespace r2vpo {

constexpr int kWarpSize = 32;

struct Sum {
  template <typename N>
  static R2VPO_DEVICE N of(N a, N b) {
    return a + b;
  }
};

// Put together what `count` neighbouring lanes have, a power of two: in each of them, with the same
// bits.
template <typename Op, typename Machine, typename N>
R2VPO_DEVICE N over_lanes(Machine& machine, N x, int count = kWarpSize) {
  for (int step = 1; step < count; step *= 2) x = Op::of(x, machine.shuffle_xor(x, step));
  return x;
}

// D of Eq. 4, by whole warps.
template <typename Machine>
R2VPO_DEVICE float denominator_of(Machine& machine, const Tokens& tokens) {
  int counted = 0;
  for (int part = machine.lane(); part < tokens.parts; part += kWarpSize) {
    counted += tokens.integers()[kCounts + part];
  }
  return tokens.denominator(over_lanes<Sum>(machine, counted));
}

}  // namespace r2vpo
