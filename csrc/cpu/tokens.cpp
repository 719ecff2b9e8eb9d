// The kernels over tokens on a CPU. Sums are in double precision, over the tokens of a unit, then
// over units, in their order: threads take whole units, and how many there are changes no bit.

#include "../tokens.h"

#include <algorithm>
#include <vector>

#include "cpu.h"

namespace r2vpo {
namespace {

// Units and tokens that a thread takes at a time: enough to be worth waking it up.
constexpr std::int64_t kBlock = 4096;

// The first unit of each block of consecutive units, and their end.
std::vector<std::int64_t> blocks_of(const Tokens& t) {
  std::vector<std::int64_t> blocks = {0};
  std::int64_t size = 0;
  for (std::int64_t u = 0; u < t.units; ++u) {
    size += 1 + t.end(u) - t.begin(u);
    if (size < kBlock && u + 1 < t.units) continue;
    blocks.push_back(u + 1);
    size = 0;
  }
  return blocks;
}

// body(block, u) for each unit; the units of a block in order, and by one thread.
template <typename Body>
void for_each_unit(const CpuTarget& target, const std::vector<std::int64_t>& blocks, Body body) {
  const std::int64_t count = static_cast<std::int64_t>(blocks.size()) - 1;
#pragma omp parallel for num_threads(target.threads) schedule(static) if (count > 1)
  for (std::int64_t block = 0; block < count; ++block) {
    for (std::int64_t u = blocks[block]; u < blocks[block + 1]; ++u) body(block, u);
  }
}

// body(i, token, ratio) for each valid token of unit u, at the level of the ratio.
template <typename Body>
void for_each_ratio(const Tokens& t, const Objective& o, float denominator, const float* logps,
                    std::int64_t u, Body body) {
  Ratio of_sequence = {};
  if (t.sequence_level) {
    // Eq. 11.
    double total = 0.0;
    std::int64_t valid = 0;
    for (std::int64_t i = t.begin(u); i < t.end(u); ++i) {
      if (t.label(i) < 0) continue;
      total += raw_log_ratio(o, t.token(i, denominator), logps[i]);
      ++valid;
    }
    of_sequence = ratio_of(o, static_cast<float>(valid ? total / valid : 0.0));
  }
  for (std::int64_t i = t.begin(u); i < t.end(u); ++i) {
    if (t.label(i) < 0) continue;
    const Token token = t.token(i, denominator);
    body(i, token, t.sequence_level ? of_sequence : ratio_of(o, raw_log_ratio(o, token, logps[i])));
  }
}

// Numbers of each unit, added up by group.
template <int kCount>
class GroupSums {
 public:
  explicit GroupSums(const Tokens& t) : tokens_(t), of_units_(t.units * kCount) {}

  // Those of unit u, at first 0.
  double* unit(std::int64_t u) { return of_units_.data() + u * kCount; }

  // body(g, sums) for each group.
  template <typename Body>
  void for_each_group(Body body) {
    std::vector<double> of_groups(std::max<std::int64_t>(tokens_.groups, 1) * kCount);
    for (std::int64_t u = 0; u < tokens_.units; ++u) {
      double* const group = of_groups.data() + tokens_.group(u) * kCount;
      for (int k = 0; k < kCount; ++k) group[k] += unit(u)[k];
    }
    for (std::int64_t g = 0; g < tokens_.groups; ++g) body(g, of_groups.data() + g * kCount);
  }

 private:
  const Tokens& tokens_;
  std::vector<double> of_units_;
};

}  // namespace

void prepare(const CpuTarget& target, const Prepare& p) {
  const Tokens& t = p.tokens;
  const Numbers numbers = numbers_of(p);
  bool bad_offsets = bad_offset_alone(p);
  std::vector<Unit> units(t.units);
  for (std::int64_t u = 0; u < t.units; ++u) {
    if (p.cu_seqlens.data) bad_offsets |= bad_offset(p, u);
    units[u] = unit_of(p, u);
    write_unit(p, u, units[u]);
  }
  std::vector<std::int64_t> blocks = blocks_of(t);
  std::vector<std::int64_t> counts(blocks.size());
  std::vector<char> faults(blocks.size());
  for_each_unit(target, blocks, [&](std::int64_t block, std::int64_t u) {
    const Unit& unit = units[u];
    std::int64_t valid = 0;
    for (std::int64_t i = unit.begin; i < unit.end; ++i) valid += is_valid(p, u, i);
    for (std::int64_t i = unit.begin; i < unit.end; ++i) {
      faults[block] |= write_token(p, numbers, u, unit, i, valid);
    }
    counts[block] += counted(p, valid);
  });
  std::int64_t count = p.count == Count::nothing;
  bool bad = write_numbers(p, numbers, bad_offsets);
  for (std::size_t block = 0; block < blocks.size(); ++block) {
    count += counts[block];
    bad |= faults[block];
  }
  for (int part = 0; part < t.parts; ++part) {
    t.integers()[kCounts + part] = part == 0 ? static_cast<std::int32_t>(count) : 0;
    t.workspace[kFaults + part] = part == 0 && bad;
  }
}

void means(const CpuTarget& target, const Means& a) {
  const Tokens& t = a.tokens;
  const Objective o = t.objective();
  // Σa, Σa·d, Σuaλd, Σuaλ
  GroupSums<4> sums(t);
  for_each_unit(target, blocks_of(t), [&](std::int64_t, std::int64_t u) {
    double* const of_unit = sums.unit(u);
    for_each_ratio(t, o, 1.0f, a.logps, u, [&](std::int64_t i, const Token& token, const Ratio& r) {
      const double weight = token.weight;
      const double pull = weight * upstream_at(a.upstream, u, i) * token.variance_coef;
      of_unit[0] += weight;
      of_unit[1] += weight * r.d;
      of_unit[2] += pull * r.d;
      of_unit[3] += pull;
    });
  });
  sums.for_each_group([&](std::int64_t g, const double* sum) {
    const double weight = sum[0] == 0 ? 1 : sum[0], mean = sum[1] / weight;
    a.means[g] = static_cast<float>(mean);
    a.means[t.groups + g] = static_cast<float>((sum[2] - mean * sum[3]) / weight);
  });
}

void finish(const CpuTarget& target, const Finish& a) {
  const Tokens& t = a.tokens;
  const Objective o = t.objective();
  const float denominator = t.denominator();
  const std::vector<std::int64_t> blocks = blocks_of(t);
  std::vector<Totals> totals(blocks.size());
  GroupSums<3> moments(t);
  for_each_unit(target, blocks, [&](std::int64_t block, std::int64_t u) {
    Totals& total = totals[block];
    double* const moment = moments.unit(u);
    const float mean = a.means ? a.means[t.group(u)] : 0.0f;
    const float kappa = a.means ? a.means[t.groups + t.group(u)] : 0.0f;
    for (std::int64_t i = t.begin(u); i < t.end(u); ++i) {
      if (t.label(i) >= 0) continue;
      if (a.per_token) a.loss[i] = 0.0f;
      if (a.dlogps) a.dlogps[i] = 0.0f;
      if (a.dentropy) a.dentropy[i] = 0.0f;
      if (a.logps_out) a.logps_out[i] = 0.0f;
      if (a.entropy_out) a.entropy_out[i] = 0.0f;
    }
    double slopes = 0.0;
    std::int64_t valid = 0;
    for_each_ratio(t, o, denominator, a.logps, u,
                   [&](std::int64_t i, const Token& token, const Ratio& r) {
      const Clipped clip = clipped(o, token, r);
      const Term policy = policy_term(o, token, r, clip, a.logps[i]);
      const Term penalty = penalty_term(token, r, a.means ? mean : token.center);
      const Term kl = kl_term(o, token, r, a.logps[i]);
      const float entropy = a.entropy ? a.entropy[i] : 0.0f;
      const float loss = loss_value(o, token, policy, penalty, kl, entropy);
      const double weight = t.token_weight(i), d = r.d;
      moment[0] += weight;
      moment[1] += weight * d;
      moment[2] += weight * d * d;
      total.add(token, r, clip, policy, penalty, kl, entropy, loss,
                t.with_support ? t.support_size(i) : 0);
      ++valid;
      if (a.per_token) a.loss[i] = loss;
      if (a.logps_out) a.logps_out[i] = a.logps[i];
      if (a.entropy_out) a.entropy_out[i] = entropy;
      const float reached = token.weight * upstream_at(a.upstream, u, i);
      if (a.dentropy) a.dentropy[i] = entropy_slope(o, reached);
      if (!a.dlogps) return;
      const float slope =
          ratio_slope(o, policy, penalty, kl, reached) - token.weight * center_slope(r, kappa);
      const float own = logp_slope(o, policy, kl, reached);
      a.dlogps[i] = t.sequence_level ? own : slope + own;
      slopes += slope;
    });
    if (!a.dlogps || !t.sequence_level) return;
    // Eq. 11: spread evenly.
    const float slope = static_cast<float>(slopes / std::max<std::int64_t>(valid, 1));
    for (std::int64_t i = t.begin(u); i < t.end(u); ++i) {
      if (t.label(i) >= 0) a.dlogps[i] += slope;
    }
  });
  Totals all;
  for (const Totals& total : totals) all.add(total);
  if (!a.per_token) *a.loss = all.loss();
  all.write_metrics(a.metrics);
  moments.for_each_group([&](std::int64_t g, const double* sum) {
    for (int k = 0; k < 3; ++k) a.stats[k * t.groups + g] = static_cast<float>(sum[k]);
  });
}

void shard_parts(const CpuTarget& target, const ShardParts& a) {
  const std::int64_t count = a.tokens.count;
#pragma omp parallel for num_threads(target.threads) schedule(static) if (count > kBlock)
  for (std::int64_t i = 0; i < count; ++i) write_shard_parts(a, i);
}

void shard_combine(const CpuTarget& target, const ShardCombine& a) {
  const std::int64_t count = a.tokens.count;
  bool alike = true;
#pragma omp parallel for num_threads(target.threads) schedule(static) if (count > kBlock) \
    reduction(&& : alike)
  for (std::int64_t i = 0; i < count; ++i) alike = combine_shards(a, i) && alike;
  if (!alike) a.tokens.integers()[kShardFault] = 1;
}

void dual_step(const CpuTarget&, const DualStep& a) {
  double weight = 0.0, spread = 0.0;
  for (std::int64_t group = 0; group < a.groups; ++group) {
    weight += a.weight[group];
    spread += weighted_spread(a, group);
  }
  move_coef(a, weight, spread);
}

}  // namespace r2vpo
