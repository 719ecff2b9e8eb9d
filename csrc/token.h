// The mathematics of one token, for C++ and CUDA. Equations are those of DERIVATION.md.
//
// Functions are static: this header is compiled for several instruction sets, and the linker must
// not take one's code for another's.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define R2VPO_TOKEN static __host__ __device__ __forceinline__
#else
#define R2VPO_TOKEN static inline
#endif

namespace r2vpo {

enum class KL { none, k1, k2, k3 };

// What a token's coefficient is made of, besides its log-prob.
struct Token {
  float weight;
  float old_logp;
  float advantage;  // s·A
  float variance_coef;
  float center;  // c - 1
  float ref_logp;
  float kl_coef;
  float clamp;
  KL kl;
};

// Eq. 2: equal log-probs differ by 0, two infinities too.
R2VPO_TOKEN float difference(float a, float b) { return a == b ? 0.0f : a - b; }

// Comparisons, because fmin and fmax lose a NaN.
R2VPO_TOKEN float clamped(float x, float bound) {
  return x > bound ? bound : (x < -bound ? -bound : x);
}

// Eq. 6: the KL estimator's derivative at gap = ref - logp.
R2VPO_TOKEN float kl_slope(KL kl, float gap) {
  switch (kl) {
    case KL::k1: return 1.0f;
    case KL::k2: return -gap;
    case KL::k3: return -expm1f(gap);
    default: return 0.0f;
  }
}

// Eq. 7: dL/dlogp.
R2VPO_TOKEN float loss_slope(float logp, const Token& token) {
  const float raw = difference(logp, token.old_logp);
  const float delta = clamped(raw, token.clamp);
  const float gap = expm1f(delta) - token.center;  // ρ - c
  float slope = expf(delta) * (2.0f * token.variance_coef * gap - token.advantage);
  // Where the clamp binds nothing depends on logp. A NaN is not past the bound, and stays.
  if (fabsf(raw) > token.clamp) slope = 0.0f;
  if (token.kl != KL::none) {
    const float kl_gap = difference(token.ref_logp, logp);
    if (!(fabsf(kl_gap) > token.clamp)) slope += token.kl_coef * kl_slope(token.kl, kl_gap);
  }
  return token.weight * slope;
}

// Eq. 8 at the label, but for the factor 1/temperature; -expm1(logp) is 1 - p without cancellation
// at p = 1.
R2VPO_TOKEN float label_slope(float logp, float entropy, float dlogp, float dentropy) {
  const float slope = -dlogp * expm1f(logp);
  const float p = expf(logp);
  // Eq. 12: p·log p is 0 at p = 0, where log p is -inf.
  return p == 0.0f ? slope : slope - dentropy * p * (logp + entropy);
}

}  // namespace r2vpo
