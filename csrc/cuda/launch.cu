// From a call to a launch: the plan for the rows, a persistent grid, and CUDA's errors.

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "dispatch.h"
#include "machine.h"

namespace r2vpo {
namespace {

// Chunks of a row that registers hold where there are no clusters: as many as are left over, of the
// 168 that a thread of nine warps may have.
constexpr int held(bool entropy) { return entropy ? 9 : 10; }

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

template <typename T, typename A, bool kEntropy, bool kSupport, int kHeld>
__global__ void __launch_bounds__(Gpu::kThreads, kHeld ? 1 : 2)
    row_kernel(const __grid_constant__ Rows rows, const __grid_constant__ A a,
               const __grid_constant__ Plan plan) {
#if __CUDA_ARCH__ >= 900
  // A cluster holds what one block cannot.
  if constexpr (kHeld > 0) return;
#endif
  Gpu gpu;
  run<Gpu, T, A, kEntropy, kSupport, kHeld>(gpu, rows, a, plan);
}

template <typename A>
__global__ void __launch_bounds__(TokenGpu::kThreads, 1)
    token_kernel(const __grid_constant__ A a) {
  TokenGpu gpu;
  run(gpu, a);
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

Limits limits_of(int device) {
  return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9};
}

// The clusters of config.gridDim blocks that the device holds at once: one more would wait for the
// others' end. CUDA is asked at the first launch of a thread, which then needs no lock.
int resident_of(const void* function, const cudaLaunchConfig_t& config, int device) {
  const int cluster = config.gridDim.x, bytes = config.dynamicSmemBytes;
  thread_local std::map<std::tuple<const void*, int, int, int>, int> known;
  int& resident = known[{function, device, cluster, bytes}];
  if (resident > 0) return resident;
  // Of a device a function always has the same shared memory, whatever the cluster.
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
  if (cluster > 1) {
    check(cudaOccupancyMaxActiveClusters(&resident, function, &config),
          "cudaOccupancyMaxActiveClusters");
  } else {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, Gpu::kThreads, bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    resident = blocks * attribute(cudaDevAttrMultiProcessorCount, device);
  }
  if (resident > 0) return resident;
  throw std::runtime_error("the device has no room for a cluster of " + std::to_string(cluster) +
                           " blocks with " + std::to_string(bytes) +
                           " bytes of shared memory each");
}

struct Launcher {
  template <typename T, typename A, bool kEntropy, bool kSupport>
  static void launch(const CudaTarget& target, const Rows& rows, const A& a) {
    const std::int64_t count = rows.batch * rows.length;
    if (count == 0) return;
    check(cudaSetDevice(target.device), "cudaSetDevice");
    const std::int64_t words = words_of<T, kSupport>(rows, a);
    constexpr Work work = work_of<A, kSupport>();
    const Plan plan = make_plan(limits_of(target.device), words, work);
    constexpr int kHeld = work.may_hold ? held(kEntropy) : 0;
    auto* const function = plan.holds ? row_kernel<T, A, kEntropy, kSupport, kHeld>
                                      : row_kernel<T, A, kEntropy, kSupport, 0>;
    const int bytes = kControl + plan.stages * kChunk * kWordBytes;

    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = plan.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = plan.cluster;
    config.blockDim = Gpu::kThreads;
    config.dynamicSmemBytes = bytes;
    config.stream = static_cast<cudaStream_t>(target.stream);
    config.attrs = &cluster;
    config.numAttrs = plan.cluster > 1;
    const int resident =
        resident_of(reinterpret_cast<const void*>(function), config, target.device);
    config.gridDim = plan.cluster * static_cast<int>(std::min<std::int64_t>(resident, count));
    check(cudaLaunchKernelEx(&config, function, rows, a, plan), "cudaLaunchKernelEx");
  }

  template <typename A>
  static void launch(const CudaTarget& target, const A& a) {
    check(cudaSetDevice(target.device), "cudaSetDevice");
    launch_tokens(target, a);
    if constexpr (std::is_same_v<A, Means> || std::is_same_v<A, Finish>) {
      if (groups_have_launch<TokenGpu>(a.tokens)) launch_tokens(target, Groups<A>{a});
    }
  }

 private:
  template <typename A>
  static void launch_tokens(const CudaTarget& target, const A& a) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks_of<TokenGpu>(a);
    config.blockDim = TokenGpu::kThreads;
    config.stream = static_cast<cudaStream_t>(target.stream);
    check(cudaLaunchKernelEx(&config, token_kernel<A>, a), "cudaLaunchKernelEx");
  }
};

}  // namespace

extern const Kernels<CudaTarget> kernels_cuda =
    Dispatch<Launcher, Float32, BFloat16, Float16>::kernels;

}  // namespace r2vpo
