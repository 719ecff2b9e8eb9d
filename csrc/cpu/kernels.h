// What each kernel is given. Everything has been checked by the caller: pointers are valid for the
// shapes, per-token arrays hold batch·length numbers in order, and the vocabulary is contiguous.
//
// A label below 0 marks a row that is not read, and whose gradient row is zeros; a label of the
// vocabulary's size or more reads nothing and makes that token's log-prob NaN.
#pragma once

#include <cstdint>

#include "../token.h"

namespace r2vpo {

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
  int threads;
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
  float kl_coef, entropy_coef, log_ratio_clamp;
  KL kl;
  float* logps;
  float* entropy;
};

// The same kernels, compiled for one instruction set.
struct Kernels {
  void (*logps_forward)(const Rows&, const LogpsForward&);
  void (*logps_backward)(const Rows&, const LogpsBackward&);
  void (*one_pass)(const Rows&, const OnePass&);
  void (*scale)(const Rows&, float factor);
  void (*exp2)(const float* in, float* out, std::int64_t count);  // for its test
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace r2vpo
