// What `prepare` does with one token and one unit, on a CPU and on a GPU: it reads what the caller
// gave, where it lies. Whatever the values are, nothing is read or written out of bounds.
#pragma once

#include <cstring>

#include "kernels.h"

namespace r2vpo {

constexpr float kMinTemperature = 1e-6f;

R2VPO_TOKEN float float_of_bits(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

R2VPO_TOKEN float float_of_half(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31;
  const std::uint32_t mantissa = half & 1023u;
  if (exponent == 0) {
    // Not by its bits: where the caller flushes subnormal numbers, that would lose them.
    const float x = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -x : x;
  }
  const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return float_of_bits(sign | (wide << 23) | (mantissa << 13));
}

// Element k of an array, as T: float, or int64 for integers.
template <typename T>
R2VPO_TOKEN T element(const void* data, Dtype dtype, std::int64_t k) {
  switch (dtype) {
    case Dtype::float64: return static_cast<T>(static_cast<const double*>(data)[k]);
    case Dtype::float32: return static_cast<T>(static_cast<const float*>(data)[k]);
    case Dtype::bfloat16: {
      const std::uint32_t bits = static_cast<const std::uint16_t*>(data)[k];
      return static_cast<T>(float_of_bits(bits << 16));
    }
    case Dtype::float16:
      return static_cast<T>(float_of_half(static_cast<const std::uint16_t*>(data)[k]));
    case Dtype::int64: return static_cast<T>(static_cast<const std::int64_t*>(data)[k]);
    case Dtype::int32: return static_cast<T>(static_cast<const std::int32_t*>(data)[k]);
    case Dtype::int16: return static_cast<T>(static_cast<const std::int16_t*>(data)[k]);
    case Dtype::int8: return static_cast<T>(static_cast<const std::int8_t*>(data)[k]);
    case Dtype::uint8:
    case Dtype::boolean: return static_cast<T>(static_cast<const std::uint8_t*>(data)[k]);
  }
  return T{};
}

R2VPO_TOKEN std::uint32_t bits_of_float(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// To nearest, ties to even.
R2VPO_TOKEN std::uint16_t bfloat16_of(float x) {
  const std::uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7fc0u;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

R2VPO_TOKEN std::uint16_t half_of(float x) {
  const std::uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude >= 143u << 23) {
    half = x != x ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 113u << 23) {
    // A sum with 1/2 rounds to multiples of 2^-24, which then stand in the low bits.
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// Make x element k of an array of float32, bfloat16 or float16.
R2VPO_TOKEN void put_element(void* data, Dtype dtype, std::int64_t k, float x) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(data)[k] = x;
  } else {
    static_cast<std::uint16_t*>(data)[k] = dtype == Dtype::bfloat16 ? bfloat16_of(x) : half_of(x);
  }
}

// Column c at token i of unit u.
template <typename T>
R2VPO_TOKEN T at(const Column& c, std::int64_t u, std::int64_t i) {
  return element<T>(c.data, c.dtype, u * c.stride_unit + i * c.stride_token);
}

// The same, `otherwise` where the column was not given.
R2VPO_TOKEN float value_at(const Column& c, std::int64_t u, std::int64_t i, float otherwise) {
  return c.data ? at<float>(c, u, i) : otherwise;
}

// Not by its float: a float64 of 1e-300 is not 0.
R2VPO_TOKEN bool is_nonzero(const Column& c, std::int64_t u, std::int64_t i) {
  const std::int64_t k = u * c.stride_unit + i * c.stride_token;
  if (c.dtype == Dtype::float64) return static_cast<const double*>(c.data)[k] != 0.0;
  return element<float>(c.data, c.dtype, k) != 0.0f;
}

R2VPO_TOKEN Numbers numbers_of(const Prepare& p) {
  if (!p.numbers_tensor) return p.numbers;
  const float* x = p.numbers_tensor;
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8]};
}

// A unit's tokens and group.
struct Unit {
  std::int64_t begin, end, group;
  bool bad_group;
};

R2VPO_TOKEN std::int64_t between(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

R2VPO_TOKEN Unit unit_of(const Prepare& p, std::int64_t u) {
  const std::int64_t count = p.tokens.count;
  Unit unit;
  if (p.cu_seqlens.data) {
    // Wrong offsets leave no token out either: row kernels go where its support says.
    const std::int64_t begin = u == 0 ? 0 : at<std::int64_t>(p.cu_seqlens, u, 0);
    const std::int64_t end =
        u == p.tokens.units - 1 ? count : at<std::int64_t>(p.cu_seqlens, u + 1, 0);
    unit.begin = between(begin, 0, count);
    unit.end = between(end, unit.begin, count);
  } else {
    unit.begin = between(u * p.unit_length, 0, count);
    unit.end = between(unit.begin + p.unit_length, unit.begin, count);
  }
  std::int64_t group = 0;
  if (p.group_ids.data) {
    group = at<std::int64_t>(p.group_ids, u, 0);
  } else if (p.units_per_group > 0) {
    group = u / p.units_per_group;
  }
  unit.group = between(group, 0, p.tokens.groups > 0 ? p.tokens.groups - 1 : 0);
  unit.bad_group = group < 0 || group >= p.tokens.groups;
  return unit;
}

R2VPO_TOKEN void write_unit(const Prepare& p, std::int64_t u, const Unit& unit) {
  p.tokens.unit_row(0)[u] = static_cast<std::int32_t>(unit.begin);
  p.tokens.unit_row(1)[u] = static_cast<std::int32_t>(unit.end);
  p.tokens.unit_row(2)[u] = static_cast<std::int32_t>(unit.group);
}

// Whether cu_seqlens, which must be given, is wrong about unit u: they begin at 0, do not fall, and
// end at the last token. With as many units as tokens every step is 1.
R2VPO_TOKEN bool bad_offset(const Prepare& p, std::int64_t u) {
  const std::int64_t begin = at<std::int64_t>(p.cu_seqlens, u, 0);
  const std::int64_t end = at<std::int64_t>(p.cu_seqlens, u + 1, 0);
  const bool bad_begin = u == 0 && begin != 0;
  const bool bad_end = u == p.tokens.units - 1 && end != p.tokens.count;
  const bool bad_step = p.tokens.units == p.tokens.count ? end <= begin : end < begin;
  return bad_begin || bad_end || bad_step;
}

// The same where there is no unit: then there are no tokens either.
R2VPO_TOKEN bool bad_offset_alone(const Prepare& p) {
  if (!p.cu_seqlens.data || p.tokens.units > 0) return false;
  return p.tokens.count > 0 || at<std::int64_t>(p.cu_seqlens, 0, 0) != 0;
}

R2VPO_TOKEN bool is_valid(const Prepare& p, std::int64_t u, std::int64_t i) {
  return !(p.mask.data && !is_nonzero(p.mask, u, i)) &&
         !(p.labels.data && at<std::int64_t>(p.labels, u, i) == p.ignore_index);
}

// The first of sorted ids from `begin` to `end` that is not less than a word, or `end`.
R2VPO_TOKEN std::int64_t first_at_least(const std::int32_t* ids, std::int64_t begin,
                                        std::int64_t end, std::int64_t word) {
  while (begin < end) {
    const std::int64_t middle = begin + (end - begin) / 2;
    if (ids[middle] < word) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// K of Eq. 1, as Tokens has it.
struct TokenSupport {
  std::int64_t begin, count, size;
};

// Sets that are wrong, or of another vocabulary.
R2VPO_TOKEN bool bad_sets(const SamplingMask& mask) {
  return mask.largest && *mask.largest >= mask.vocabulary;
}

// Of token i with this label; whether the label is not in the set, where it must be.
R2VPO_TOKEN TokenSupport support_of(const Prepare& p, std::int64_t i, std::int64_t label,
                                    bool& missing) {
  const SamplingMask& mask = p.sampling_mask;
  missing = bad_sets(mask);
  if (missing) return {0, 0, 0};
  const std::int64_t begin = between(mask.offsets[i], 0, mask.count);
  const std::int64_t end = between(mask.offsets[i + 1], begin, mask.count);
  const std::int64_t at = first_at_least(mask.token_ids, begin, end, label);
  const bool found = at < end && mask.token_ids[at] == label;
  if (begin == end || (!found && mask.missing_full)) return {0, -1, 0};
  missing = !found;
  const std::int64_t first = first_at_least(mask.token_ids, begin, end, p.first_word);
  const std::int64_t past = first_at_least(mask.token_ids, first, end, p.first_word + p.words);
  return {first, past - first, end - begin};
}

// Of the sparse head: whether it forms the logits of token i.
R2VPO_TOKEN bool is_supported(const Head& a, std::int64_t i) {
  return a.tokens.label(i) >= 0 && a.tokens.support_count(i) >= 0;
}

// Eq. 27 from W_j·h, of the word of a pair.
R2VPO_TOKEN void put_logit(const HeadLogits& a, std::int64_t pair, float product, float bias) {
  float z = (product + bias) * a.scale;
  if (a.slopes) {
    const float t = tanhf(z / a.softcap);
    z = a.softcap * t;
    a.slopes[pair] = 1.0f - t * t;
  }
  a.support.values[pair] = z;
}

// dL/dz of a kept word before its softcap.
R2VPO_TOKEN float slope_at(const Head& a, std::int64_t pair) {
  const float dz = a.support.values[pair];
  return a.slopes ? dz * a.slopes[pair] : dz;
}

// What a unit with so many valid tokens adds to a count.
R2VPO_TOKEN std::int32_t counted(const Prepare& p, std::int64_t valid_tokens) {
  if (p.count == Count::tokens) return static_cast<std::int32_t>(valid_tokens);
  return p.count == Count::units && valid_tokens > 0;
}

// Write all that stands of token i of unit u, which has so many valid tokens. Whether a value is
// bad; what depends on it is NaN then.
R2VPO_TOKEN bool write_token(const Prepare& p, const Numbers& numbers, std::int64_t u,
                             const Unit& unit, std::int64_t i, std::int64_t valid_tokens) {
  const Tokens& t = p.tokens;
  const float nan = __builtin_nanf("");
  const bool valid = is_valid(p, u, i);
  bool bad = false;
  std::int32_t label = -1;
  float temperature = 1.0f, weight = 0.0f, old_logp = 0.0f, advantage = 0.0f;
  float variance_coef = 0.0f, center = 0.0f, ref_logp = 0.0f;
  TokenSupport support = {0, -1, 0};
  if (valid) {
    label = 0;
    if (p.labels.data) {
      const std::int64_t given = at<std::int64_t>(p.labels, u, i);
      bad = given < 0 || given >= p.vocabulary;
      if (p.sampling_mask.offsets && !bad) support = support_of(p, i, given, bad);
      const std::int64_t word = bad ? -1 : given - p.first_word;
      label = static_cast<std::int32_t>(word >= 0 && word < p.words ? word : p.words);
    }
    temperature = value_at(p.temperature, u, i, numbers.temperature);
    if (!(temperature >= kMinTemperature)) {
      bad = true;
      temperature = nan;
    }
    weight = p.mean_over_unit ? 1.0f / static_cast<float>(valid_tokens) : 1.0f;
    if (unit.bad_group) {
      bad = true;
      weight = nan;
    }
    variance_coef = value_at(p.variance_coef, u, i, numbers.variance_coef);
    if (!(variance_coef >= 0.0f)) {
      bad = true;
      variance_coef = nan;
    }
    old_logp = value_at(p.old_logps, u, i, 0.0f);
    advantage = value_at(p.advantages, u, i, 0.0f);
    if (p.importance_weights.data) advantage *= at<float>(p.importance_weights, u, i);
    if (p.center.data && !unit.bad_group) center = at<float>(p.center, unit.group, 0) - 1.0f;
    ref_logp = value_at(p.ref_logps, u, i, 0.0f);
  }
  t.labels()[i] = label;
  t.row(1)[i] = temperature;
  t.row(2)[i] = weight;
  t.row(3)[i] = old_logp;
  t.row(4)[i] = advantage;
  t.row(5)[i] = variance_coef;
  t.row(6)[i] = center;
  t.row(7)[i] = ref_logp;
  if (p.sampling_mask.offsets) {
    t.support_row(0)[i] = static_cast<std::int32_t>(support.begin);
    t.support_row(1)[i] = static_cast<std::int32_t>(support.count);
    t.support_row(2)[i] = static_cast<std::int32_t>(support.size);
  }
  if (p.logps_out) p.logps_out[i] = valid ? at<float>(p.logps, u, i) : 0.0f;
  if (p.entropy_out) p.entropy_out[i] = valid ? at<float>(p.entropy, u, i) : 0.0f;
  if (p.activity) {
    // Whether Eq. 7 and dL/dH are 0 whatever the logits.
    const bool level = variance_coef == 0.0f || (!p.old_logps.data && center == 0.0f);
    const bool still = advantage == 0.0f && level && numbers.kl_coef == 0.0f &&
                       numbers.entropy_coef == 0.0f;
    // The one word of its set has all the probability.
    const int activity = valid ? still || support.size == 1 : 2;
    p.activity[i] = static_cast<std::uint8_t>(p.sparse_head && support.count >= 0 ? 3 : activity);
  }
  return bad;
}

// What stands once for all tokens, written by one program alone. Whether a value is bad.
R2VPO_TOKEN bool write_numbers(const Prepare& p, const Numbers& numbers, bool bad_offsets) {
  float factor = numbers.factor;
  if (p.normalizer.data) factor = at<float>(p.normalizer, 0, 0);
  const bool bad = bad_offsets || bad_sets(p.sampling_mask) ||
                   (p.normalizer.data && !(factor >= 0.0f));
  float* const to = p.tokens.workspace;
  to[0] = numbers.log_ratio_clamp;
  to[1] = numbers.kl_coef;
  to[2] = numbers.entropy_coef;
  to[3] = bad ? __builtin_nanf("") : factor;
  to[4] = numbers.clip_low;
  to[5] = numbers.clip_high;
  to[6] = numbers.dual_clip;
  for (int k = kTickets; k <= kShardFault; ++k) p.tokens.integers()[k] = 0;
  return bad;
}

// Token i of unit u: what reaches its loss from above.
R2VPO_TOKEN float upstream_at(const Column& upstream, std::int64_t u, std::int64_t i) {
  return value_at(upstream, u, i, 1.0f);
}

// Of valid tokens: what the loss and the metrics are made of.
struct Totals {
  // Tokens, Σd, Σd², clamped ones, Σ(d - δ), Σw·P, Σw·λ(ρ - c)², Σkl, ΣH, the loss; tokens whose set
  // has one word, those that have a set, the words of all sets; tokens clipped below, and above.
  static constexpr int kSums = 15;
  // Of -d and of d, the largest.
  static constexpr int kExtremes = 2;

  double sums[kSums] = {};
  double extremes[kExtremes] = {-__builtin_huge_val(), -__builtin_huge_val()};

  // A NaN is larger than any number.
  R2VPO_MEMBER static double larger(double a, double b) { return a > b || a != a ? a : b; }

  R2VPO_MEMBER void add(const Totals& other) {
    for (int k = 0; k < kSums; ++k) sums[k] += other.sums[k];
    for (int k = 0; k < kExtremes; ++k) extremes[k] = larger(extremes[k], other.extremes[k]);
  }

  R2VPO_MEMBER void add(const Token& token, const Ratio& r, const Clipped& clip,
                        const Term& policy, const Term& penalty, const Term& kl, float entropy,
                        float loss, std::int32_t support_size) {
    const double w = token.weight, d = r.d, clamped = r.clamped, low = clip.low, high = clip.high;
    const double single = support_size == 1, has_support = support_size > 0;
    add({{1.0, d, d * d, clamped, d - r.delta, w * policy.value, w * penalty.value, kl.value,
          entropy, loss, single, has_support, static_cast<double>(support_size), low, high},
         {-d, d}});
  }

  R2VPO_MEMBER float loss() const { return static_cast<float>(sums[9]); }

  // In the order of METRICS in Python.
  R2VPO_MEMBER void write_metrics(float* to) const {
    const bool none = sums[0] == 0.0;
    const double count = none ? 1.0 : sums[0], m1 = sums[1] / count;
    // A NaN is not below 0, and stays.
    const double difference = sums[2] / count - m1 * m1;
    const double variance = difference < 0.0 ? 0.0 : difference;
    const double square = (1.0 + m1) * (1.0 + m1), both = square + variance;
    const double metrics[kMetrics] = {
        1.0 + m1,
        variance,
        none ? 1.0 : 1.0 - extremes[0],
        none ? 1.0 : 1.0 + extremes[1],
        // All ratios vanishing alike is no spread.
        both == 0.0 ? 1.0 : square / both,
        sums[3] / count,
        sums[4] / count,
        sums[5],
        sums[6],
        sums[7] / count,
        sums[8] / count,
        sums[10] / count,
        sums[11] == 0.0 ? 0.0 : sums[12] / sums[11],
        sums[13] / count,
        sums[14] / count,
    };
    for (int k = 0; k < kMetrics; ++k) to[k] = static_cast<float>(metrics[k]);
  }
};

// Eq. 30, of token i: what this rank adds.
R2VPO_TOKEN void write_shard_parts(const ShardParts& a, std::int64_t i) {
  constexpr double ln2 = 0.6931471805599453, infinity = __builtin_huge_val();
  const Tokens& t = a.tokens;
  const bool here = t.label(i) >= 0 && t.label(i) < a.words;
  const double moved =
      (static_cast<double>(a.top[i]) - a.whole_top[i]) / (ln2 * t.temperature(i));
  const double log_part = a.log_total[i] + moved, part = ::exp2(log_part);
  // The label's distance from the maximum; in a shard of -inf alone it would be a NaN.
  const double at_label = a.log_total[i] == -infinity ? -infinity : a.logps[i] / ln2 + log_part;
  a.parts[i] = part;
  a.parts[t.count + i] = here ? at_label : 0.0;
  a.parts[2 * t.count + i] = here;
  a.parts[3 * t.count + i] = t.label(i) >= 0;
  // Eq. 12, for a shard without weight.
  if (a.entropy) {
    a.parts[4 * t.count + i] = part == 0.0 ? 0.0 : part * (log_part - a.entropy[i] / ln2);
  }
}

// And what follows from the sum of all ranks' parts. Whether the ranks are alike in label and mask.
R2VPO_TOKEN bool combine_shards(const ShardCombine& a, std::int64_t i) {
  constexpr double ln2 = 0.6931471805599453;
  const Tokens& t = a.tokens;
  const bool scored = t.label(i) >= 0;
  const double total = a.parts[i], at_label = a.parts[t.count + i];
  const double owners = a.parts[2 * t.count + i], readers = a.parts[3 * t.count + i];
  // One rank has the label and all score the token, or none does.
  const bool alike = scored ? owners == 1.0 && readers == a.ranks : readers == 0.0;
  const double log_total = ::log2(total);
  const double logp = scored ? (at_label - log_total) * ln2 : 0.0;
  a.logps[i] = alike ? static_cast<float>(logp) : __builtin_nanf("");
  a.log_total[i] = static_cast<float>(log_total);
  if (a.entropy) {
    const double mean = a.parts[4 * t.count + i];
    a.entropy[i] = scored ? static_cast<float>((log_total - mean / total) * ln2) : 0.0f;
  }
  return alike;
}

// Eq. 16: what a group adds to Σ w·v.
R2VPO_TOKEN double weighted_spread(const DualStep& a, std::int64_t group) {
  const double weight = a.weight[group], sum = a.d_sum[group], squares = a.d_sq_sum[group];
  if (!a.about_means || weight == 0.0) return squares;
  const double spread = squares - sum * sum / weight;
  // A NaN is not below 0, and stays.
  return spread < 0.0 ? 0.0 : spread;
}

// Statistics without tokens or not finite leave λ where it is.
R2VPO_TOKEN void move_coef(const DualStep& a, double weight, double spread) {
  const double excess = spread / weight / a.target - 1.0;
  if (!(fabs(excess) < static_cast<double>(INFINITY))) return;
  const double moved = *a.coef * exp(a.lr * (excess < 1.0 ? excess : 1.0));
  *a.coef = static_cast<float>(moved < a.min_coef ? a.min_coef
                                                  : (moved > a.max_coef ? a.max_coef : moved));
}

}  // namespace r2vpo
