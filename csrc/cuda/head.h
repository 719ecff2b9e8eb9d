// The products of hidden states and a head of which only the kept words' are formed (Eq. 27, 28), on
// a GPU, but for the instructions that they are made of: a `Machine` gives those, as for tokens.h.
//
// Warps work alone. Sums are float32: a lane's columns or pairs in order, then a tree of the lanes.
#pragma once

#include "tokens.h"

namespace r2vpo {

// Warps that share out the kept words of a token.
template <typename Machine>
constexpr int kWarpsOfToken = Machine::kWarps < 4 ? Machine::kWarps : 4;
// Columns of a stripe that a lane has, and words whose gradient a warp writes.
constexpr int kColumnsOfLane = 8, kStripe = kColumnsOfLane * kWarpSize;
constexpr std::int64_t kWordsOfWarp = 16;

// body(dtype) with a dtype that is known when it is compiled.
template <Dtype dtype>
using DtypeConstant = std::integral_constant<Dtype, dtype>;
template <typename Body>
R2VPO_DEVICE void with_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::bfloat16: return body(DtypeConstant<Dtype::bfloat16>{});
    case Dtype::float16: return body(DtypeConstant<Dtype::float16>{});
    default: return body(DtypeConstant<Dtype::float32>{});
  }
}

R2VPO_DEVICE std::int64_t stripes_of(const Head& a) { return (a.width + kStripe - 1) / kStripe; }

// sum[j] += factor · row[left + j·32 + lane]
template <Dtype dtype, typename Machine>
R2VPO_DEVICE void add_row(const Machine& machine, const void* rows, std::int64_t begin,
                          std::int64_t left, std::int64_t width, float factor,
                          float (&sum)[kColumnsOfLane]) {
  R2VPO_UNROLL
  for (int j = 0; j < kColumnsOfLane; ++j) {
    const std::int64_t column = left + j * kWarpSize + machine.lane();
    if (column < width) sum[j] += factor * element<float>(rows, dtype, begin + column);
  }
}

// Times the scale, on top of what is there or in its place.
template <typename Machine>
R2VPO_DEVICE void write_row(const Machine& machine, const Head& a, void* rows, Dtype dtype,
                            std::int64_t begin, std::int64_t left,
                            const float (&sum)[kColumnsOfLane], bool on_top) {
  R2VPO_UNROLL
  for (int j = 0; j < kColumnsOfLane; ++j) {
    const std::int64_t column = left + j * kWarpSize + machine.lane();
    if (column >= a.width) continue;
    const float there = on_top ? element<float>(rows, dtype, begin + column) : 0.0f;
    put_element(rows, dtype, begin + column, there + a.scale * sum[j]);
  }
}

template <typename Machine>
R2VPO_DEVICE void run(Machine& machine, const HeadLogits& a) {
  constexpr int kGroup = kWarpsOfToken<Machine>, kGroups = Machine::kWarps / kGroup;
  with_dtype(a.dtype, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    const std::int64_t step = std::int64_t{machine.blocks()} * kGroups;
    std::int64_t i = std::int64_t{machine.block()} * kGroups + machine.warp() / kGroup;
    for (; i < a.tokens.count; i += step) {
      if (!is_supported(a, i)) continue;
      const std::int64_t begin = a.tokens.support_begin(i), count = a.tokens.support_count(i);
      for (std::int64_t k = machine.warp() % kGroup; k < count; k += kGroup) {
        float product = 0.0f, bias = 0.0f;
        // All the probability of a set of one is on its word, whatever the logit.
        if (a.tokens.support_size(i) != 1) {
          const std::int64_t word = a.column(i, k);
          float sums[4] = {};
          for (std::int64_t left = 0; left < a.width; left += 4 * kWarpSize) {
            R2VPO_UNROLL
            for (int j = 0; j < 4; ++j) {
              const std::int64_t column = left + j * kWarpSize + machine.lane();
              if (column >= a.width) continue;
              sums[j] += element<float>(a.hidden, dtype, i * a.hidden_stride + column) *
                         element<float>(a.weight, dtype, word * a.weight_stride + column);
            }
          }
          product = over_lanes<Sum>(machine, (sums[0] + sums[1]) + (sums[2] + sums[3]));
          if (a.bias) bias = element<float>(a.bias, dtype, word);
        }
        if (machine.lane() == 0) put_logit(a, begin + k, product, bias);
      }
    }
  });
}

template <typename Machine>
R2VPO_DEVICE void run(Machine& machine, const HeadDhidden& a) {
  with_dtype(a.dtype, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    const std::int64_t stripes = stripes_of(a), items = a.tokens.count * stripes;
    const std::int64_t step = std::int64_t{machine.blocks()} * Machine::kWarps;
    std::int64_t item = std::int64_t{machine.block()} * Machine::kWarps + machine.warp();
    for (; item < items; item += step) {
      const std::int64_t i = item / stripes, left = item % stripes * kStripe;
      if (!is_supported(a, i)) continue;
      const std::int64_t begin = a.tokens.support_begin(i), count = a.tokens.support_count(i);
      float sum[kColumnsOfLane] = {};
      for (std::int64_t k = 0; k < count; ++k) {
        const float slope = slope_at(a, begin + k);
        if (slope == 0.0f) continue;
        add_row<dtype>(machine, a.weight, a.column(i, k) * a.weight_stride, left, a.width, slope,
                       sum);
      }
      write_row(machine, a, a.dhidden, a.in_float32 ? Dtype::float32 : dtype, i * a.width, left,
                sum, false);
    }
  });
}

template <typename Machine>
R2VPO_DEVICE void run(Machine& machine, const HeadDweight& a) {
  with_dtype(a.dtype, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    const Dtype out = a.in_float32 ? Dtype::float32 : dtype;
    const std::int32_t* const ids = a.support.token_ids;
    const std::int64_t stripes = stripes_of(a);
    const std::int64_t items = (a.words + kWordsOfWarp - 1) / kWordsOfWarp * stripes;
    const std::int64_t step = std::int64_t{machine.blocks()} * Machine::kWarps;
    std::int64_t item = std::int64_t{machine.block()} * Machine::kWarps + machine.warp();
    for (; item < items; item += step) {
      const std::int64_t first = item / stripes * kWordsOfWarp;
      const std::int64_t last = between(first + kWordsOfWarp, 0, a.words);
      const std::int64_t left = item % stripes * kStripe;
      float sum[kColumnsOfLane] = {}, bias = 0.0f;
      bool any = false;
      const auto write = [&](std::int64_t word) {
        if (a.dweight && (any || !a.on_top)) {
          write_row(machine, a, a.dweight, out, word * a.width, left, sum, a.on_top);
        }
        if (a.dbias && left == 0 && machine.lane() == 0 && (any || !a.on_top)) {
          const float there = a.on_top ? element<float>(a.dbias, out, word) : 0.0f;
          put_element(a.dbias, out, word, there + a.scale * bias);
        }
        for (int j = 0; j < kColumnsOfLane; ++j) sum[j] = 0.0f;
        bias = 0.0f;
        any = false;
      };

      // The first pair, in the order of words, of these.
      std::int64_t n = 0;
      for (std::int64_t past = a.pairs; n < past;) {
        const std::int64_t middle = n + (past - n) / 2;
        if (ids[a.by_word[middle]] - a.support.first_word < first) {
          n = middle + 1;
        } else {
          past = middle;
        }
      }
      std::int64_t word = first;
      bool more = true;
      for (; more; n += kWarpSize) {
        // A pair for each lane, and then one after another for all.
        int of_word = static_cast<int>(last), of_token = 0;
        float of_slope = 0.0f;
        if (n + machine.lane() < a.pairs) {
          const std::int64_t pair = a.by_word[n + machine.lane()];
          of_word = static_cast<int>(
              between(ids[pair] - a.support.first_word, first, last));
          of_token = a.token_of[pair];
          if (of_word < last && is_supported(a, of_token)) of_slope = slope_at(a, pair);
        }
        for (int lane = 0; lane < kWarpSize && more; ++lane) {
          const int of = machine.shuffle(of_word, lane);
          const float slope = machine.shuffle(of_slope, lane);
          const std::int64_t i = machine.shuffle(of_token, lane);
          for (; word < of; ++word) write(word);
          more = of < last;
          if (slope == 0.0f) continue;
          any = true;
          bias += slope;
          if (a.dweight) {
            add_row<dtype>(machine, a.hidden, i * a.hidden_stride, left, a.width, slope, sum);
          }
        }
      }
    }
  });
}

template <typename Machine>
R2VPO_TOKEN int blocks_of(const HeadLogits& a) {
  return blocks_for<Machine>(a.tokens.count, Machine::kWarps / kWarpsOfToken<Machine>);
}
template <typename Machine>
R2VPO_TOKEN int blocks_of(const HeadDhidden& a) {
  return blocks_for<Machine>(a.tokens.count * ((a.width + kStripe - 1) / kStripe), Machine::kWarps);
}
template <typename Machine>
R2VPO_TOKEN int blocks_of(const HeadDweight& a) {
  const std::int64_t items = (a.words + kWordsOfWarp - 1) / kWordsOfWarp;
  return blocks_for<Machine>(items * ((a.width + kStripe - 1) / kStripe), Machine::kWarps);
}

}  // namespace r2vpo
