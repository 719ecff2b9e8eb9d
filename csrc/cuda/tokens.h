// The kernels of what is per token, on a GPU, but for the instructions that they are made of.
//
// A `Machine` gives those, as for rows.h. Every block takes each blocks-th unit, whose tokens its
// threads share out. Where units are tokens, each thread takes one by itself. Sums are float64: a
// thread's own tokens in order, then a tree of the block's threads. What a block found of its units
// and of all its tokens goes to scratch. Each block then takes a ticket, and the one with the last
// ticket sums what stands in scratch, in an order that depends on the shape alone.
#pragma once

#include "../tokens.h"
#include "device.h"

namespace r2vpo {

// Of a launch, whatever the device: what blocks found is summed over them.
constexpr int kMostBlocks = 512;

// In scratch: kMoments numbers of each unit, then the totals of each block.
constexpr int kMoments = 4, kSums = Totals::kSums, kExtremes = Totals::kExtremes;

struct Largest {
  static R2VPO_DEVICE double of(double a, double b) { return Totals::larger(a, b); }
};

// Which units a thread works on, and which of their tokens.
struct Share {
  bool alone;  // it has its units for itself
  std::int64_t unit, unit_step;
  int token, token_step;

  // Of the threads that work on a unit one writes what there is once of it.
  R2VPO_DEVICE bool leads() const { return token == 0; }
};

R2VPO_TOKEN bool are_tokens(const Tokens& units) { return units.units == units.count; }

template <typename Machine>
R2VPO_DEVICE Share share_of(const Machine& machine, const Tokens& t) {
  const std::int64_t block = machine.block(), blocks = machine.blocks();
  constexpr int kThreads = Machine::kThreads;
  if (!are_tokens(t)) return {false, block, blocks, machine.thread(), kThreads};
  return {true, block * kThreads + machine.thread(), blocks * kThreads, 0, 1};
}

// Put together what all threads of a block have: in each of them, with the same bits.
template <typename Op, int kCount, typename Machine>
R2VPO_DEVICE void over_block(Machine& machine, double (&x)[kCount]) {
  double* const of_warps = machine.shared();
  for (int k = 0; k < kCount; ++k) {
    x[k] = over_lanes<Op>(machine, x[k]);
    if (machine.lane() == 0) of_warps[k * Machine::kWarps + machine.warp()] = x[k];
  }
  machine.sync_block();
  for (int k = 0; k < kCount; ++k) {
    x[k] = of_warps[k * Machine::kWarps + machine.lane() % Machine::kWarps];
    x[k] = over_lanes<Op>(machine, x[k], Machine::kWarps);
  }
  // Before the next ones take their place.
  machine.sync_block();
}

template <int kCount, typename Machine>
R2VPO_DEVICE void over_unit(Machine& machine, const Share& share, double (&x)[kCount]) {
  if (!share.alone) over_block<Sum>(machine, x);
}

// body(u) for each of a thread's units, body(i) for each of its tokens in one.

template <typename Body>
R2VPO_DEVICE void for_each_unit(const Share& share, const Tokens& t, Body body) {
  for (std::int64_t u = share.unit; u < t.units; u += share.unit_step) body(u);
}

template <typename Body>
R2VPO_DEVICE void for_each_token(const Share& share, std::int64_t begin, std::int64_t end,
                                 Body body) {
  for (std::int64_t i = begin + share.token; i < end; i += share.token_step) body(i);
}

// prepare

template <typename Machine>
R2VPO_DEVICE void run(Machine& machine, const Prepare& p) {
  const Tokens& t = p.tokens;
  const Share share = share_of(machine, t);
  const Numbers numbers = numbers_of(p);
  double found[2] = {};  // what the denominator counts, and bad values
  for_each_unit(share, t, [&](std::int64_t u) {
    const Unit unit = unit_of(p, u);
    double valid[1] = {};
    for_each_token(share, unit.begin, unit.end,
                   [&](std::int64_t i) { valid[0] += is_valid(p, u, i); });
    over_unit(machine, share, valid);
    const auto valid_tokens = static_cast<std::int64_t>(valid[0]);
    for_each_token(share, unit.begin, unit.end, [&](std::int64_t i) {
      found[1] += write_token(p, numbers, u, unit, i, valid_tokens);
    });
    if (!share.leads()) return;
    found[0] += counted(p, valid_tokens);
    write_unit(p, u, unit);
  });
  const bool first = machine.block() == 0;
  double bad_offsets[1] = {};
  if (first && machine.thread() == 0) bad_offsets[0] = bad_offset_alone(p);
  if (first && p.cu_seqlens.data) {
    for (std::int64_t u = machine.thread(); u < t.units; u += Machine::kThreads) {
      bad_offsets[0] += bad_offset(p, u);
    }
  }
  if (first) over_block<Sum>(machine, bad_offsets);
  over_block<Sum>(machine, found);
  std::int32_t* const counts = t.integers() + kCounts;
  float* const faults = t.workspace + kFaults;
  if (first) {
    for (int part = machine.blocks() + machine.thread(); part < t.parts;
         part += Machine::kThreads) {
      counts[part] = 0;
      faults[part] = 0.0f;
    }
  }
  if (machine.thread() != 0) return;
  bool bad = found[1] != 0.0;
  // A denominator that is given is counted once.
  if (first && p.count == Count::nothing) found[0] = 1.0;
  if (first && write_numbers(p, numbers, bad_offsets[0] != 0.0)) bad = true;
  counts[machine.block()] = static_cast<std::int32_t>(found[0]);
  faults[machine.block()] = bad;
}

// What means and finish have in common.

// At sequence level: the mean of a unit's log-ratios (Eq. 11), over so many valid tokens or one.
struct Level {
  float raw;
  double divisor;
};

template <typename Machine>
R2VPO_DEVICE Level level_of(Machine& machine, const Share& share, const Tokens& t,
                            const Objective& o, const float* logps, std::int64_t u) {
  double sums[2] = {};
  for_each_token(share, t.begin(u), t.end(u), [&](std::int64_t i) {
    if (t.label(i) < 0) return;
    sums[0] += 1.0;
    sums[1] += raw_log_ratio(o, t.token(i, 1.0f), logps[i]);
  });
  over_unit(machine, share, sums);
  const double divisor = sums[0] > 1.0 ? sums[0] : 1.0;
  return {static_cast<float>(sums[1] / divisor), divisor};
}

template <typename Machine>
R2VPO_DEVICE void put_moments(Machine& machine, const Tokens& t, double* scratch, std::int64_t u,
                              const double (&moments)[kMoments]) {
  for (int k = 0; k < kMoments; ++k) machine.put(scratch + k * t.units + u, moments[k]);
}

// For all threads of a block: whether it is the last one that comes here. Then it sees what the
// others have put, and the ticket is 0 again.
template <typename Machine>
R2VPO_DEVICE bool is_last(Machine& machine, std::int32_t* ticket) {
  machine.fence();
  machine.sync_block();
  double* const came = machine.shared();
  if (machine.thread() == 0) *came = machine.increment(ticket);
  machine.sync_block();
  const bool last = *came == machine.blocks() - 1;
  machine.sync_block();
  if (last && machine.thread() == 0) *ticket = 0;
  machine.fence();
  return last;
}

// body(group, sums) by one lane, for each step-th group from `first` on, which a warp takes by
// itself, with the sums of the moments of its units.
template <typename Machine, typename Body>
R2VPO_DEVICE void for_each_group(Machine& machine, const Tokens& t, const double* scratch,
                                 std::int64_t first, std::int64_t step, Body body) {
  for (std::int64_t group = first; group < t.groups; group += step) {
    double sums[kMoments] = {};
    for (std::int64_t u = machine.lane(); u < t.units; u += kWarpSize) {
      if (t.group(u) != group) continue;
      R2VPO_UNROLL
      for (int k = 0; k < kMoments; ++k) sums[k] += machine.fetched(scratch + k * t.units + u);
    }
    R2VPO_UNROLL
    for (int k = 0; k < kMoments; ++k) sums[k] = over_lanes<Sum>(machine, sums[k]);
    if (machine.lane() == 0) body(group, sums);
  }
}

template <typename Machine>
R2VPO_DEVICE void combine_groups(Machine& machine, const Means& a, std::int64_t first,
                                 std::int64_t step) {
  for_each_group(machine, a.tokens, a.scratch, first, step,
                 [&](std::int64_t group, const double (&sums)[kMoments]) {
                   const double mean = sums[0] == 0.0 ? 0.0 : sums[1] / sums[0];
                   const double kappa =
                       sums[0] == 0.0 ? 0.0 : (sums[2] - mean * sums[3]) / sums[0];
                   a.means[group] = static_cast<float>(mean);
                   a.means[a.tokens.groups + group] = static_cast<float>(kappa);
                 });
}

template <typename Machine>
R2VPO_DEVICE void combine_groups(Machine& machine, const Finish& a, std::int64_t first,
                                 std::int64_t step) {
  for_each_group(machine, a.tokens, a.scratch, first, step,
                 [&](std::int64_t group, const double (&sums)[kMoments]) {
                   for (int k = 0; k < 3; ++k) {
                     a.stats[k * a.tokens.groups + group] = static_cast<float>(sums[k]);
                   }
                 });
}

// A launch of its own for the groups, where they are many: a warp compares its group with that of
// every unit.
template <typename A>
struct Groups {
  A a;
};

template <typename Machine>
R2VPO_TOKEN bool groups_have_launch(const Tokens& t) {
  return t.groups * t.units > Machine::kGroupWork;
}

template <typename Machine, typename A>
R2VPO_DEVICE void run(Machine& machine, const Groups<A>& groups) {
  constexpr int kWarps = Machine::kWarps;
  combine_groups(machine, groups.a, machine.block() * kWarps + machine.warp(),
                 machine.blocks() * kWarps);
}

// means

template <typename Machine>
R2VPO_DEVICE void run(Machine& machine, const Means& a) {
  const Tokens& t = a.tokens;
  const Objective o = t.objective();
  const Share share = share_of(machine, t);
  for_each_unit(share, t, [&](std::int64_t u) {
    const Level level = t.sequence_level ? level_of(machine, share, t, o, a.logps, u) : Level{};
    // Σa, Σa·d, Σu·a·λ·d, Σu·a·λ (Eq. 9), u the upstream.
    double moments[kMoments] = {};
    for_each_token(share, t.begin(u), t.end(u), [&](std::int64_t i) {
      if (t.label(i) < 0) return;
      const Token token = t.token(i, 1.0f);
      const float raw = t.sequence_level ? level.raw : raw_log_ratio(o, token, a.logps[i]);
      const double d = ratio_of(o, raw).d, weight = token.weight;
      const double penalty = weight * upstream_at(a.upstream, u, i) * token.variance_coef;
      moments[0] += weight;
      moments[1] += weight * d;
      moments[2] += penalty * d;
      moments[3] += penalty;
    });
    over_unit(machine, share, moments);
    if (share.leads()) put_moments(machine, t, a.scratch, u, moments);
  });
  if (!is_last(machine, t.integers() + kTickets)) return;
  if (!groups_have_launch<Machine>(t)) combine_groups(machine, a, machine.warp(), Machine::kWarps);
}

// finish

template <typename Machine>
R2VPO_DEVICE void over_block(Machine& machine, Totals& totals) {
  over_block<Sum>(machine, totals.sums);
  over_block<Largest>(machine, totals.extremes);
}

template <typename Machine>
R2VPO_DEVICE void run(Machine& machine, const Finish& a) {
  const Tokens& t = a.tokens;
  const Objective o = t.objective();
  const float denominator = denominator_of(machine, t);
  const Share share = share_of(machine, t);
  Totals totals;
  for_each_unit(share, t, [&](std::int64_t u) {
    const std::int64_t begin = t.begin(u), end = t.end(u), group = t.group(u);
    const Level level = t.sequence_level ? level_of(machine, share, t, o, a.logps, u) : Level{};
    const float mean = a.means ? a.means[group] : 0.0f;
    const float kappa = a.means ? a.means[t.groups + group] : 0.0f;
    // Σa, Σa·d, Σa·d² (Eq. 10), and the ratio's part of the slopes.
    double moments[kMoments] = {};
    for_each_token(share, begin, end, [&](std::int64_t i) {
      float loss = 0.0f, logp = 0.0f, entropy = 0.0f, dlogp = 0.0f, dentropy = 0.0f;
      if (t.label(i) >= 0) {
        const Token token = t.token(i, denominator);
        logp = a.logps[i];
        if (a.entropy) entropy = a.entropy[i];
        const Ratio r = ratio_of(o, t.sequence_level ? level.raw : raw_log_ratio(o, token, logp));
        const Clipped clip = clipped(o, token, r);
        const Term policy = policy_term(o, token, r, clip, logp), kl = kl_term(o, token, r, logp);
        const Term penalty = penalty_term(token, r, a.means ? mean : token.center);
        loss = loss_value(o, token, policy, penalty, kl, entropy);
        const std::int32_t size = t.with_support ? t.support_size(i) : 0;
        totals.add(token, r, clip, policy, penalty, kl, entropy, loss, size);
        const float weight = token.weight * upstream_at(a.upstream, u, i);
        const float slope = ratio_slope(o, policy, penalty, kl, weight) -
                            token.weight * center_slope(r, kappa);
        dlogp = logp_slope(o, policy, kl, weight);
        if (!t.sequence_level) dlogp += slope;
        dentropy = entropy_slope(o, weight);
        const double d = r.d, token_weight = t.token_weight(i);
        moments[0] += token_weight;
        moments[1] += token_weight * d;
        moments[2] += token_weight * d * d;
        moments[3] += slope;
      }
      if (a.per_token) a.loss[i] = loss;
      if (a.dlogps) a.dlogps[i] = dlogp;
      if (a.dentropy) a.dentropy[i] = dentropy;
      if (a.logps_out) a.logps_out[i] = logp;
      if (a.entropy_out) a.entropy_out[i] = entropy;
    });
    over_unit(machine, share, moments);
    if (share.leads()) put_moments(machine, t, a.scratch, u, moments);
    if (!a.dlogps || !t.sequence_level) return;
    // Eq. 11: the ratio's part is shared out evenly.
    const float slope = static_cast<float>(moments[3] / level.divisor);
    for_each_token(share, begin, end, [&](std::int64_t i) {
      if (t.label(i) >= 0) a.dlogps[i] += slope;
    });
  });
  over_block(machine, totals);
  // Number k of each block.
  const auto of_blocks = [&](int k) { return a.scratch + kMoments * t.units + k * kMostBlocks; };
  if (machine.thread() == 0) {
    const int block = machine.block();
    for (int k = 0; k < kSums; ++k) machine.put(of_blocks(k) + block, totals.sums[k]);
    for (int k = 0; k < kExtremes; ++k) {
      machine.put(of_blocks(kSums + k) + block, totals.extremes[k]);
    }
  }
  if (!is_last(machine, t.integers() + kTickets + 1)) return;
  totals = {};
  for (int block = machine.thread(); block < machine.blocks(); block += Machine::kThreads) {
    Totals of_block;
    for (int k = 0; k < kSums; ++k) of_block.sums[k] = machine.fetched(of_blocks(k) + block);
    for (int k = 0; k < kExtremes; ++k) {
      of_block.extremes[k] = machine.fetched(of_blocks(kSums + k) + block);
    }
    totals.add(of_block);
  }
  over_block(machine, totals);
  if (machine.thread() == 0) {
    totals.write_metrics(a.metrics);
    if (!a.per_token) *a.loss = totals.loss();
  }
  if (!groups_have_launch<Machine>(t)) combine_groups(machine, a, machine.warp(), Machine::kWarps);
}

// Eq. 30

template <typename Machine, typename Body>
R2VPO_DEVICE void for_all_tokens(const Machine& machine, const Tokens& t, Body body) {
  const std::int64_t step = std::int64_t{machine.blocks()} * Machine::kThreads;
  std::int64_t i = std::int64_t{machine.block()} * Machine::kThreads + machine.thread();
  for (; i < t.count; i += step) body(i);
}

template <typename Machine>
R2VPO_DEVICE void run(Machine& machine, const ShardParts& a) {
  for_all_tokens(machine, a.tokens, [&](std::int64_t i) { write_shard_parts(a, i); });
}

template <typename Machine>
R2VPO_DEVICE void run(Machine& machine, const ShardCombine& a) {
  for_all_tokens(machine, a.tokens, [&](std::int64_t i) {
    if (!combine_shards(a, i)) a.tokens.integers()[kShardFault] = 1;
  });
}

// Eq. 16

template <typename Machine>
R2VPO_DEVICE void run(Machine& machine, const DualStep& a) {
  double sums[2] = {};  // Σw, Σw·v
  for (std::int64_t group = machine.thread(); group < a.groups; group += Machine::kThreads) {
    sums[0] += a.weight[group];
    sums[1] += weighted_spread(a, group);
  }
  over_block<Sum>(machine, sums);
  if (machine.thread() == 0) move_coef(a, sums[0], sums[1]);
}

// How many blocks of a machine have something to do; one at least is launched.

template <typename Machine>
R2VPO_TOKEN int blocks_for(std::int64_t work, int of_block, int most = kMostBlocks) {
  most = most < Machine::kMostBlocks ? most : Machine::kMostBlocks;
  return static_cast<int>(between((work + of_block - 1) / of_block, 1, most));
}
template <typename Machine>
R2VPO_TOKEN int blocks_of_units(const Tokens& t, int most = kMostBlocks) {
  return blocks_for<Machine>(t.units, are_tokens(t) ? Machine::kThreads : 1, most);
}
template <typename Machine>
R2VPO_TOKEN int blocks_of(const Prepare& p) {
  return blocks_of_units<Machine>(p.tokens, p.tokens.parts);
}
template <typename Machine>
R2VPO_TOKEN int blocks_of(const Means& a) {
  return blocks_of_units<Machine>(a.tokens);
}
template <typename Machine>
R2VPO_TOKEN int blocks_of(const Finish& a) {
  return blocks_of_units<Machine>(a.tokens);
}
template <typename Machine, typename A>
R2VPO_TOKEN int blocks_of(const Groups<A>& groups) {
  return blocks_for<Machine>(groups.a.tokens.groups, Machine::kWarps);
}
template <typename Machine>
R2VPO_TOKEN int blocks_of(const ShardParts& a) {
  return blocks_for<Machine>(a.tokens.count, Machine::kThreads);
}
template <typename Machine>
R2VPO_TOKEN int blocks_of(const ShardCombine& a) {
  return blocks_for<Machine>(a.tokens.count, Machine::kThreads);
}

template <typename Machine>
R2VPO_TOKEN int blocks_of(const DualStep&) {
  return 1;
}

}  // namespace r2vpo
