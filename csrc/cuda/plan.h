// How a row is shared out over the chip: by what the device has, the length of the row and nothing
// else, so that a row's result depends on no batch. No CUDA header is needed.
#pragma once

#include <cstdint>

namespace r2vpo {

constexpr int kWordBytes = 16;
// Of a block: the warps that compute, and the words that each of their threads has in a chunk.
constexpr int kWarps = 8, kWords = 2;
constexpr int kChunk = kWarps * 32 * kWords;
// Bytes of shared memory before the ring.
constexpr int kControl = 1024;
constexpr int kMostStages = 28, kLargestCluster = 8;

// Of a device: shared memory that a block may have and that a multiprocessor has, in bytes, and
// whether blocks form clusters.
struct Limits {
  int of_block, of_multiprocessor;
  bool clusters;
};

// What a kernel does: sums a row, writes its gradient, and may hold a part of it in registers.
struct Work {
  bool sums, writes, may_hold;
};

struct Plan {
  int shares;   // of a row: each is summed by itself
  int cluster;  // blocks that a row takes: one for each share, or one that walks them all
  int stages;   // of each block's ring
  bool holds;   // registers hold a part of the row, and a block has its multiprocessor for itself
};

// Stages that the next row has while this one fills the others.
constexpr int kAhead = 4;
// Bytes of shared memory that the system takes for itself, for each block.
constexpr int kReserved = 1024;

// For rows of `words` whole words. All kernels that sum a row do it by the same shares. Where a share
// must stay on the chip until the second look it has a block of a cluster. A cluster's blocks are
// placed together, and multiprocessors that are too few for one more idle: elsewhere there is none.
inline Plan make_plan(const Limits& limits, std::int64_t words, const Work& work,
                      int chunk = kChunk, int control = kControl) {
  const auto stages_in = [&](int bytes) {
    const int room = bytes < limits.of_block ? bytes : limits.of_block;
    const int stages = (room - control) / (chunk * kWordBytes);
    return stages < kMostStages ? stages : kMostStages;
  };
  // Two blocks to a multiprocessor: one computes while the other waits for a row's sum.
  const int stages = stages_in(limits.of_multiprocessor / 2 - kReserved);
  const auto chunks_in = [&](int cluster) {
    const std::int64_t share = (words + cluster - 1) / cluster;
    return (share + chunk - 1) / chunk;
  };
  const int largest = limits.clusters && work.sums ? kLargestCluster : 1;
  int shares = 1;
  while (shares < largest && chunks_in(shares) + kAhead > stages) shares *= 2;
  const bool fits = chunks_in(shares) + kAhead <= stages;
  if (work.may_hold && !limits.clusters && !fits) return {1, 1, stages_in(limits.of_block), true};
  return {shares, work.writes ? shares : 1, stages, false};
}

}  // namespace r2vpo
