// The module r2vpo_kernels.backends._cuda on the emulated GPU: the same kernels, the same plan, and
// addresses of a CPU's memory.

#include <pybind11/stl.h>

#include "../../../csrc/bind.h"
#include "../../../csrc/cuda/dispatch.h"
#include "machine.h"

namespace r2vpo {
namespace {

constexpr int kHeld = 2;

struct Device {
  Limits limits;
  int clusters;  // that it holds at once
  unsigned seed;
  bool counts = false;
  Tally reads, writes;
} device;

template <typename Machine, typename T, typename A, bool kEntropy, bool kSupport, int kHeld>
void emulate(const Rows& rows, const A& a, const Plan& plan) {
  const std::int64_t count = rows.batch * rows.length;
  const int of = static_cast<int>(std::min<std::int64_t>(device.clusters, count));
  for (int index = 0; index < of; ++index) {
    Cluster cluster(device.seed++);
    cluster.index = index;
    cluster.of = of;
    cluster.reads = device.counts ? &device.reads : nullptr;
    cluster.writes = device.counts ? &device.writes : nullptr;
    cluster.blocks.resize(plan.cluster);
    cluster.everyone.needed = plan.cluster * Machine::kThreads;
    for (int rank = 0; rank < plan.cluster; ++rank) {
      Block& block = cluster.blocks[rank];
      block.cluster = &cluster;
      block.rank = rank;
      block.control.resize(sizeof(Control<Machine>));
      block.ring.resize(plan.stages * Machine::kChunk);
      block.arrived.resize(block.ring.size());
      block.warps.resize(Machine::kWarps + 1);
      for (Meeting& warp : block.warps) warp.needed = kWarpSize;
      block.exchange.resize(Machine::kThreads);
      block.computing.needed = Machine::kWarps * kWarpSize;
      for (int thread = 0; thread < Machine::kThreads; ++thread) {
        cluster.scheduler.add([&, thread] {
          Machine machine(block, thread);
          r2vpo::run<Machine, T, A, kEntropy, kSupport, kHeld>(machine, rows, a, plan);
        });
      }
    }
    cluster.scheduler.run();
  }
}

template <typename A>
void emulate(const A& a) {
  using Machine = EmulatedTokens;
  Grid grid(device.seed++);
  grid.blocks.resize(blocks_of<Machine>(a));
  for (std::size_t index = 0; index < grid.blocks.size(); ++index) {
    Grid::Block& block = grid.blocks[index];
    block.everyone.needed = Machine::kThreads;
    block.warps.resize(Machine::kWarps);
    for (Meeting& warp : block.warps) warp.needed = kWarpSize;
    block.exchange.resize(Machine::kThreads);
    block.shared.resize(Machine::kWarps * kSums);
    for (int thread = 0; thread < Machine::kThreads; ++thread) {
      grid.scheduler.add([&grid, &a, index, thread] {
        Machine machine(grid, static_cast<int>(index), thread);
        r2vpo::run(machine, a);
        // All is there for the next launch.
        machine.fence();
      });
    }
  }
  grid.scheduler.run();
}

struct Launcher {
  template <typename T, typename A, bool kEntropy, bool kSupport>
  static void launch(const CudaTarget&, const Rows& rows, const A& a) {
    using Bulk = Emulated<true>;
    using Narrow = Emulated<false>;
    const std::int64_t words = words_of<T, kSupport>(rows, a);
    constexpr Work work = work_of<A, kSupport>();
    const Plan plan = make_plan(device.limits, words, work, Bulk::kChunk, 0);
    device.limits.clusters
        ? emulate<Bulk, T, A, kEntropy, kSupport, 0>(rows, a, plan)
        : emulate<Narrow, T, A, kEntropy, kSupport, work.may_hold ? kHeld : 0>(rows, a, plan);
  }

  template <typename A>
  static void launch(const CudaTarget&, const A& a) {
    emulate(a);
    if constexpr (std::is_same_v<A, Means> || std::is_same_v<A, Finish>) {
      if (groups_have_launch<EmulatedTokens>(a.tokens)) emulate(Groups<A>{a});
    }
  }
};

}  // namespace

extern const Kernels<CudaTarget> kernels_cuda =
    Dispatch<Launcher, Float32, BFloat16, Float16>::kernels;

inline void take(Arguments& a, CudaTarget& to) {
  to = {a, reinterpret_cast<void*>(static_cast<std::uintptr_t>(a))};
}

}  // namespace r2vpo

PYBIND11_MODULE(_cuda, m) {
  using namespace r2vpo;
  bind_kernels<Kernels<CudaTarget>>(m);
  m.attr("kernels") = py::cast(&kernels_cuda, py::return_value_policy::reference);
  m.attr("EMULATED") = true;
  // What the GPU has: stages of a block that is one of two on its multiprocessor, and of one that
  // is alone; whether it has clusters; how many of them it holds at once.
  m.def(
      "configure",
      [](int stages, int most_stages, bool clusters, int held_at_once, int seed) {
        constexpr int kStage = Emulated<true>::kChunk * kWordBytes;
        device.limits = {most_stages * kStage, 2 * (stages * kStage + kReserved), clusters};
        device.clusters = held_at_once;
        device.seed = seed;
      },
      py::arg("stages"), py::arg("most_stages"), py::arg("clusters"), py::arg("held_at_once"),
      py::arg("seed"));
  // (shares, blocks, stages, whether registers hold a part) for rows of `words` words on a real GPU,
  // and a kernel that does one thing or both.
  m.def("plan", [](int of_block, int of_multiprocessor, bool clusters, std::int64_t words,
                   bool sums, bool writes) {
    const Plan plan = make_plan({of_block, of_multiprocessor, clusters}, words,
                                {sums, writes, sums && writes});
    return std::make_tuple(plan.shares, plan.cluster, plan.stages, plan.holds);
  });
  // (address, bytes) of what was read and written since.
  m.def("count", [](bool counts) {
    device.counts = counts;
    const auto found = std::make_pair(device.reads, device.writes);
    device.reads.clear();
    device.writes.clear();
    return found;
  });
}
