// The mathematics of one token, for C++ and CUDA: each equation of docs/derivation once.
//
// Functions are static: this header is compiled for several instruction sets, and the linker must
// not take one's code for another's. Members of structs are inlined always, for the same reason.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define R2VPO_MEMBER __host__ __device__ __forceinline__
#else
#define R2VPO_MEMBER __attribute__((always_inline)) inline
#endif
#if defined(__CUDACC__)
#define R2VPO_TOKEN static __host__ __device__ __forceinline__
#else
#define R2VPO_TOKEN [[maybe_unused]] static inline
#endif

namespace r2vpo {

enum class PolicyLoss { ratio, clip, cispo };
enum class KL { none, k1, k2, k3 };

// What is the same for all tokens.
struct Objective {
  float log_ratio_clamp;
  float kl_coef;
  float entropy_coef;
  float clip_low, clip_high, dual_clip;
  PolicyLoss policy_loss;
  KL kl;
  bool kl_unbiased;
  bool on_policy;
};

// A valid token, besides its log-prob.
struct Token {
  float weight;  // w
  float old_logp;
  float advantage;  // s·A
  float variance_coef;
  float center;  // c - 1
  float ref_logp;
};

// A term of the loss, and its derivatives: in the log ratio, which the tokens of a sequence may share,
// and in the token's log-prob besides.
struct Term {
  float value, ratio_slope, logp_slope;
};

struct Exponential {
  float value, minus_one;
};

R2VPO_TOKEN Exponential exponential_of(float x) {
#if defined(__CUDA_ARCH__)
  return {expf(x), expm1f(x)};
#else
  // One exponential of a double serves both, and takes a third of the time of glibc's expm1f. The
  // difference from 1 has a relative error of 2^-53/|x|; near 0 two terms of the series are closer.
  const double y = x, value = exp(y);
  const double minus_one = fabs(y) < 0x1p-20 ? y * (1.0 + 0.5 * y) : value - 1.0;
  return {static_cast<float>(value), static_cast<float>(minus_one)};
#endif
}

// Eq. 2: equal log-probs differ by 0, two infinities too.
R2VPO_TOKEN float difference(float a, float b) { return a == b ? 0.0f : a - b; }

// Comparisons, because fmin and fmax lose a NaN.
R2VPO_TOKEN float clamped(float x, float bound) {
  return x > bound ? bound : (x < -bound ? -bound : x);
}

// Where the clamp binds nothing depends on logp. A NaN is not past the bound, and stays.
R2VPO_TOKEN bool is_clamped(float x, float bound) { return fabsf(x) > bound; }

// Eq. 2.
struct Ratio {
  float raw, delta, d, ratio;
  bool clamped;
};

R2VPO_TOKEN float raw_log_ratio(const Objective& o, const Token& token, float logp) {
  // On-policy it is 0, and NaN where logp is.
  return difference(logp, o.on_policy ? logp : token.old_logp);
}

R2VPO_TOKEN Ratio ratio_of(const Objective& o, float raw) {
  const float delta = clamped(raw, o.log_ratio_clamp);
  const Exponential e = exponential_of(delta);
  return {raw, delta, e.minus_one, e.value, is_clamped(raw, o.log_ratio_clamp)};
}

// Where the clip of Eq. 5 binds: with "clip" only where it lowers the gain.
struct Clipped {
  bool low, high;
};

R2VPO_TOKEN Clipped clipped(const Objective& o, const Token& token, const Ratio& r) {
  const bool low = r.d < -o.clip_low, high = r.d > o.clip_high;
  switch (o.policy_loss) {
    case PolicyLoss::ratio: return {false, false};
    case PolicyLoss::cispo: return {low, high};
    case PolicyLoss::clip: break;
  }
  const bool gains = token.advantage > 0.0f, loses = token.advantage < 0.0f;
  return {loses && low, (gains && high) || (loses && r.ratio > o.dual_clip)};
}

// Eq. 5, P.
R2VPO_TOKEN Term policy_term(const Objective& o, const Token& token, const Ratio& r,
                             const Clipped& clip, float logp) {
  float factor = r.ratio;
  if (clip.low) factor = 1.0f - o.clip_low;
  if (clip.high) {
    const bool dual = o.policy_loss == PolicyLoss::clip && token.advantage < 0.0f;
    factor = dual ? o.dual_clip : 1.0f + o.clip_high;
  }
  const float value = -token.advantage * factor;
  // Its factor is a constant: the clamp of the log ratio stops nothing.
  if (o.policy_loss == PolicyLoss::cispo) return {value * logp, 0.0f, value};
  return {value, r.clamped || clip.low || clip.high ? 0.0f : value, 0.0f};
}

// Eq. 5, λ·(ρ - c)², for a centre of 1 + center.
R2VPO_TOKEN Term penalty_term(const Token& token, const Ratio& r, float center) {
  const float gap = r.d - center;  // ρ - c
  const float slope = 2.0f * token.variance_coef * gap * r.ratio;
  return {token.variance_coef * (gap * gap), r.clamped ? 0.0f : slope, 0.0f};
}

// Eq. 9: what the centre, which depends on logp too, takes off the slope, for κ of the group.
R2VPO_TOKEN float center_slope(const Ratio& r, float kappa) {
  return r.clamped ? 0.0f : 2.0f * r.ratio * kappa;
}

// Eq. 6, times m of Eq. 5.
R2VPO_TOKEN Term kl_term(const Objective& o, const Token& token, const Ratio& r, float logp) {
  if (o.kl == KL::none) return {0.0f, 0.0f, 0.0f};
  const float raw = difference(token.ref_logp, logp);
  const float gap = clamped(raw, o.log_ratio_clamp);
  float value = 0.0f, slope = 0.0f;
  if (o.kl == KL::k1) {
    value = -gap;
    slope = 1.0f;
  } else if (o.kl == KL::k2) {
    value = 0.5f * (gap * gap);
    slope = -gap;
  } else {
    const float minus_one = exponential_of(gap).minus_one;
    value = minus_one - gap;
    slope = -minus_one;
  }
  if (is_clamped(raw, o.log_ratio_clamp)) slope = 0.0f;
  if (!o.kl_unbiased) return {value, 0.0f, slope};
  const float weighted = r.ratio * value;
  return {weighted, r.clamped ? 0.0f : weighted, r.ratio * slope};
}

// Eq. 5: the token's loss.
R2VPO_TOKEN float loss_value(const Objective& o, const Token& token, const Term& policy,
                             const Term& penalty, const Term& kl, float entropy) {
  return token.weight *
         (policy.value + penalty.value + o.kl_coef * kl.value - o.entropy_coef * entropy);
}

// Eq. 7, the part of dL/dlogp through the ratio; `weight` is w times what reaches the token's loss.
R2VPO_TOKEN float ratio_slope(const Objective& o, const Term& policy, const Term& penalty,
                              const Term& kl, float weight) {
  return weight * (policy.ratio_slope + penalty.ratio_slope + o.kl_coef * kl.ratio_slope);
}

// Eq. 7, the rest.
R2VPO_TOKEN float logp_slope(const Objective& o, const Term& policy, const Term& kl, float weight) {
  return weight * (policy.logp_slope + o.kl_coef * kl.logp_slope);
}

// dL/dH.
R2VPO_TOKEN float entropy_slope(const Objective& o, float weight) {
  return -weight * o.entropy_coef;
}

// Eq. 7: dL/dlogp of a token that depends on no other one.
R2VPO_TOKEN float loss_slope(const Objective& o, const Token& token, float logp) {
  const Ratio r = ratio_of(o, raw_log_ratio(o, token, logp));
  const Term policy = policy_term(o, token, r, clipped(o, token, r), logp);
  const Term penalty = penalty_term(token, r, token.center), kl = kl_term(o, token, r, logp);
  return ratio_slope(o, policy, penalty, kl, token.weight) +
         logp_slope(o, policy, kl, token.weight);
}

// Eq. 8 at the label, but for the factor 1/temperature; -expm1(logp) is 1 - p without cancellation
// at p = 1.
R2VPO_TOKEN float label_slope(float logp, float entropy, float dlogp, float dentropy) {
  const Exponential e = exponential_of(logp);
  const float slope = -dlogp * e.minus_one, p = e.value;
  // Eq. 12: p·log p is 0 at p = 0, where log p is -inf.
  return p == 0.0f ? slope : slope - dentropy * p * (logp + entropy);
}

}  // namespace r2vpo
