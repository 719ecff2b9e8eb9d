// The instructions that rows.h and tokens.h are made of, on a GPU: PTX where CUDA C++ has no word
// for it.
//
// From sm_90 on chunks come by bulk copies that complete on an mbarrier, and blocks form clusters;
// before, the loading warp copies 16 bytes per lane and instruction, and every block is alone.
#pragma once

#include "rows.h"
#include "head.h"
#include "tokens.h"

namespace r2vpo {

struct Float32 {
  float value;
};
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

__device__ __forceinline__ void widen(std::uint32_t pair, float& low, float& high, BFloat16) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ void widen(std::uint32_t pair, float& low, float& high, Float16) {
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

__device__ __forceinline__ std::uint32_t narrow(float low, float high, BFloat16) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ std::uint32_t narrow(float low, float high, Float16) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

class Gpu {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr bool kBulk = true;
#else
  static constexpr bool kBulk = false;
#endif

  int cluster_ = 1, rank_ = 0;

  static __device__ __forceinline__ unsigned shared(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
  }

 public:
  static constexpr int kWarps = r2vpo::kWarps, kWords = r2vpo::kWords, kChunk = r2vpo::kChunk;
  static constexpr int kLoaders = kBulk ? 1 : kWarpSize;
  static constexpr int kThreads = (kWarps + 1) * kWarpSize;

  using Barrier = std::uint64_t;

  __device__ __forceinline__ Gpu() {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(cluster_));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank_));
#endif
  }

  // Where a thread is. A cluster takes every row_step-th row.
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / kWarpSize; }
  __device__ __forceinline__ int cluster() const { return cluster_; }
  __device__ __forceinline__ int rank() const { return rank_; }
  __device__ __forceinline__ bool speaks() const { return threadIdx.x == 0 && rank_ == 0; }
  __device__ __forceinline__ int first_row() const { return blockIdx.x / cluster_; }
  __device__ __forceinline__ int row_step() const { return gridDim.x / cluster_; }

  // Arithmetic.
  static __device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ float fma(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
  }
  static __device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

  template <typename T>
  static __device__ __forceinline__ void unpack(const Word& word, float* z) {
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        z[i] = __uint_as_float(word.bits[i]);
      } else {
        widen(word.bits[i], z[2 * i], z[2 * i + 1], T{});
      }
    }
  }

  template <typename T>
  static __device__ __forceinline__ Word pack(const float* z) {
    Word word;
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        word.bits[i] = __float_as_uint(z[i]);
      } else {
        word.bits[i] = narrow(z[2 * i], z[2 * i + 1], T{});
      }
    }
    return word;
  }

  // Memory. What is stored is not read again here: it leaves the cache first.
  __device__ __forceinline__ void* control() const {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
  }
  __device__ __forceinline__ Word* ring() const {
    return reinterpret_cast<Word*>(static_cast<unsigned char*>(control()) + kControl);
  }
  __device__ __forceinline__ Word read(const Word* from) const {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    return {{x.x, x.y, x.z, x.w}};
  }
  __device__ __forceinline__ void store(void* to, const Word& word) const {
    __stcs(static_cast<uint4*>(to),
           make_uint4(word.bits[0], word.bits[1], word.bits[2], word.bits[3]));
  }
  template <typename T>
  __device__ __forceinline__ float load_one(const T* from) const {
    if constexpr (sizeof(T) == 4) {
      return from->value;
    } else {
      float low, high;
      widen(from->bits, low, high, T{});
      return low;
    }
  }
  template <typename T>
  __device__ __forceinline__ void store_one(T* to, float z) const {
    if constexpr (sizeof(T) == 4) {
      to->value = z;
    } else {
      to->bits = static_cast<std::uint16_t>(narrow(z, 0.0f, T{}));
    }
  }

  // Where threads meet.
  template <typename N>
  __device__ __forceinline__ N shuffle_xor(N x, int step) const {
    return __shfl_xor_sync(0xffffffffu, x, step);
  }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ void sync_computing() const {
    asm volatile("bar.sync 1, %0;" ::"n"(kWarps * kWarpSize) : "memory");
  }
  __device__ __forceinline__ void sync_cluster() const {
#if __CUDA_ARCH__ >= 900
    if (cluster_ > 1) {
      asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }

  __device__ __forceinline__ void start(Barrier& barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(&barrier)), "r"(arrivals)
                 : "memory");
  }
  // For the copies and for the other blocks of the cluster.
  __device__ __forceinline__ void publish_starts() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void arrive(Barrier& barrier) const {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(
                     shared(&barrier))
                 : "memory");
  }
#if __CUDA_ARCH__ >= 900
#define R2VPO_WAIT "mbarrier.try_wait.parity"
#define R2VPO_OF_CLUSTER ".acquire.cluster"
#else
#define R2VPO_WAIT "mbarrier.test_wait.parity"
#define R2VPO_OF_CLUSTER
#endif
  // For what this block and its copies wrote.
  __device__ __forceinline__ void wait(Barrier& barrier, unsigned parity) const {
    unsigned done;
    do {
      asm volatile("{ .reg .pred p; " R2VPO_WAIT
                   ".shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(shared(&barrier)), "r"(parity)
                   : "memory");
    } while (!done);
  }
  // For what other blocks of the cluster sent.
  __device__ __forceinline__ void wait_sent(Barrier& barrier, unsigned parity) const {
    unsigned done;
    do {
      asm volatile("{ .reg .pred p; " R2VPO_WAIT R2VPO_OF_CLUSTER
                   ".shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(shared(&barrier)), "r"(parity)
                   : "memory");
    } while (!done);
  }
#undef R2VPO_WAIT
#undef R2VPO_OF_CLUSTER

  // By the loading warp: `count` words, whose arrival completes the barrier.
  __device__ __forceinline__ void load(Word* to, const Word* from, int count,
                                       Barrier& barrier) const {
    if constexpr (kBulk) {
#if __CUDA_ARCH__ >= 900
      if (lane() == 0) {
        const unsigned bytes = count * sizeof(Word);
        expect(barrier, bytes);
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
            "[%3];" ::"r"(shared(to)),
            "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared(&barrier))
            : "memory");
      }
      __syncwarp();
#endif
    } else {
      for (int word = lane(); word < count; word += kWarpSize) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to + word)),
                     "l"(__cvta_generic_to_global(from + word))
                     : "memory");
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared(&barrier))
                   : "memory");
    }
  }

  // Between the blocks of a cluster: the bytes that a barrier waits for, and a part on its way to
  // another block's memory at the same place, whose arrival the barrier there counts.
  __device__ __forceinline__ void expect(Barrier& barrier, unsigned bytes) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
            shared(&barrier)),
        "r"(bytes)
        : "memory");
#endif
  }
  __device__ __forceinline__ void send(const Part& part, Part& to, Barrier& barrier,
                                       int rank) const {
#if __CUDA_ARCH__ >= 900
    unsigned address, counted;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared(&to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(shared(&barrier)), "r"(rank));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(address),
        "f"(part.top), "f"(part.s), "f"(part.r), "f"(part.z_label), "r"(counted)
        : "memory");
#endif
  }
};

static_assert(sizeof(Control<Gpu>) <= kControl, "");

// For tokens.h: blocks that are all alike, and meet in global memory alone.
class TokenGpu {
 public:
  static constexpr int kWarps = 16, kThreads = kWarps * kWarpSize;
  static constexpr int kMostBlocks = r2vpo::kMostBlocks;
  // Units times groups that the last block goes through, alone on the device; more have a launch.
  static constexpr std::int64_t kGroupWork = std::int64_t{1} << 18;

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / kWarpSize; }
  __device__ __forceinline__ int block() const { return blockIdx.x; }
  __device__ __forceinline__ int blocks() const { return gridDim.x; }

  __device__ __forceinline__ double* shared() const {
    __shared__ double memory[kWarps * kSums];
    return memory;
  }
  template <typename N>
  __device__ __forceinline__ N shuffle_xor(N x, int step) const {
    return __shfl_xor_sync(0xffffffffu, x, step);
  }
  template <typename N>
  __device__ __forceinline__ N shuffle(N x, int lane) const {
    return __shfl_sync(0xffffffffu, x, lane);
  }
  __device__ __forceinline__ void sync_block() const { __syncthreads(); }

  // Between blocks: what one puts, and another fetches once it knows of it.
  __device__ __forceinline__ void put(double* to, double x) const { *to = x; }
  __device__ __forceinline__ double fetched(const double* from) const { return __ldcg(from); }
  __device__ __forceinline__ int increment(std::int32_t* to) const { return atomicAdd(to, 1); }
  __device__ __forceinline__ void fence() const { __threadfence(); }
};

}  // namespace r2vpo
