// What each kernel is given, on a CPU and on a GPU. Everything has been checked by the caller:
// pointers are valid for the shapes, per-token arrays hold batch·length numbers in order, and the
// vocabulary is contiguous.
//
// A label below 0 marks a row that is not read, and whose gradient row is zeros; a label of the
// vocabulary's size or more reads nothing and makes that token's log-prob NaN.
#pragma once

#include <cstdint>

#include "token.h"

namespace r2vpo {

constexpr float kLog2E = 1.4426950408889634f;

enum class Dtype { float32, bfloat16, float16 };

// Logits (batch, length, vocabulary), and where their gradient goes, which may be the same memory.
// Strides are in elements.
struct Rows {
  Dtype dtype;
  std::int64_t batch, length, vocabulary;
  const void* logits;
  std::int64_t stride_batch, stride_token;
  void* dlogits;  // null where there is none
  std::int64_t grad_stride_batch, grad_stride_token;
};

// `entropy` is null where it is not wanted, here and below.
struct LogpsForward {
  const std::int64_t* labels;
  const float* temperature;
  float* logps;
  float* top;        // max z and
  float* log_total;  // log2 Σ 2^((z - top)·scale), for LogpsBackward
  float* entropy;
};

struct LogpsBackward {
  const std::int64_t* labels;
  const float* temperature;
  const float* logps;
  const float* top;
  const float* log_total;
  const float* entropy;
  const float* grad_logps;
  const float* grad_entropy;
};

struct OnePass {
  const std::int64_t* labels;
  const float* temperature;
  const float* weight;
  const float* old_logps;  // null: on-policy
  const float* advantages;
  const float* variance_coef;
  const float* center;
  const float* ref_logps;  // null: no KL term
  const float* kl_coef;    // one number each, as the next two
  const float* entropy_coef;
  const float* log_ratio_clamp;
  KL kl;
  float* logps;
  float* entropy;
};

// The rows' gradient times one number, in place; by 1 nothing is read or written.
struct Scale {
  const float* upstream;
};

// The kernels of one backend, or of one instruction set; R is Rows and what says where they run.
template <typename R>
struct Kernels {
  void (*logps_forward)(const R&, const LogpsForward&);
  void (*logps_backward)(const R&, const LogpsBackward&);
  void (*one_pass)(const R&, const OnePass&);
  void (*scale)(const R&, const Scale&);
};

// What the first look at a row finds: the label's log-prob, max z, log2 of the sum about it, the
// entropy.
struct Look {
  float logp, top, log_total, entropy;
};

// The numbers of token i that Eq. 7 is made of.
R2VPO_TOKEN Token token_of(const OnePass& a, std::int64_t i, float logp) {
  Token token;
  token.weight = a.weight[i];
  token.old_logp = a.old_logps ? a.old_logps[i] : logp;
  token.advantage = a.advantages[i];
  token.variance_coef = a.variance_coef[i];
  token.center = a.center[i];
  token.ref_logp = a.ref_logps ? a.ref_logps[i] : 0.0f;
  token.kl_coef = *a.kl_coef;
  token.clamp = *a.log_ratio_clamp;
  token.kl = a.kl;
  return token;
}

}  // namespace r2vpo
