// What each kernel is given, on a CPU and on a GPU. Everything has been checked by the caller, but
// for values in tensors: pointers are valid for the shapes, and the vocabulary is contiguous.
#pragma once

#include <cstdint>

#include "token.h"

namespace r2vpo {

constexpr float kLog2E = 1.4426950408889634f;

// Logits are of one of the first three.
enum class Dtype {
  float32, bfloat16, float16, float64, int64, int32, int16, int8, uint8, boolean
};

// What the caller gave, one number for each token: token i of unit u has the one
// u·stride_unit + i·stride_token elements in.
struct Column {
  const void* data;  // null where nothing was given
  Dtype dtype;
  std::int64_t stride_unit, stride_token;
};

// The workspace, float32 and int32 by turns (backends/calls.py): numbers, counts and faults of
// prepare's programs, then kRows numbers for each token, then for each unit begin, end and group.
constexpr int kTickets = 8;  // of means, and of finish
constexpr int kShardFault = 10;
constexpr int kCounts = 16;
constexpr int kMostParts = 512;
constexpr int kFaults = kCounts + kMostParts;
constexpr int kHeader = kFaults + kMostParts;
constexpr int kRows = 11;

// What `prepare` writes, and the other kernels read. Unit u is the tokens from begin(u) to end(u).
struct Tokens {
  float* workspace;
  std::int64_t count, units, groups;
  int parts;  // of the denominator's count
  bool on_policy, sequence_level;
  PolicyLoss policy_loss;
  KL kl;
  bool kl_unbiased;
  bool with_support;  // a sampling mask was given

  R2VPO_MEMBER std::int32_t* integers() const {
    return reinterpret_cast<std::int32_t*>(workspace);
  }
  R2VPO_MEMBER float* row(int k) const { return workspace + kHeader + k * count; }
  R2VPO_MEMBER std::int32_t* labels() const { return integers() + kHeader; }
  R2VPO_MEMBER std::int32_t* unit_row(int k) const {
    return integers() + kHeader + kRows * count + k * units;
  }

  R2VPO_MEMBER float log_ratio_clamp() const { return workspace[0]; }
  R2VPO_MEMBER float kl_coef() const { return workspace[1]; }
  R2VPO_MEMBER float entropy_coef() const { return workspace[2]; }
  R2VPO_MEMBER float factor() const { return workspace[3]; }
  R2VPO_MEMBER float clip_low() const { return workspace[4]; }
  R2VPO_MEMBER float clip_high() const { return workspace[5]; }
  R2VPO_MEMBER float dual_clip() const { return workspace[6]; }

  // Below 0: masked, not read, and its gradient row is zeros. The vocabulary's size: bad, or of
  // another shard; it reads nothing and makes logp NaN.
  R2VPO_MEMBER std::int32_t label(std::int64_t i) const { return labels()[i]; }
  R2VPO_MEMBER float temperature(std::int64_t i) const { return row(1)[i]; }
  R2VPO_MEMBER float token_weight(std::int64_t i) const { return row(2)[i]; }  // a of Eq. 4
  R2VPO_MEMBER float old_logp(std::int64_t i) const { return row(3)[i]; }
  R2VPO_MEMBER float advantage(std::int64_t i) const { return row(4)[i]; }
  R2VPO_MEMBER float variance_coef(std::int64_t i) const { return row(5)[i]; }
  R2VPO_MEMBER float center(std::int64_t i) const { return row(6)[i]; }
  R2VPO_MEMBER float ref_logp(std::int64_t i) const { return row(7)[i]; }

  // Written with a sampling mask alone. The first of the token's ids that are words of these logits,
  // and how many are: below 0, it has the full vocabulary. How many words its set has: 0, all.
  R2VPO_MEMBER std::int32_t* support_row(int k) const {
    return integers() + kHeader + (8 + k) * count;
  }
  R2VPO_MEMBER std::int32_t support_begin(std::int64_t i) const { return support_row(0)[i]; }
  R2VPO_MEMBER std::int32_t support_count(std::int64_t i) const { return support_row(1)[i]; }
  R2VPO_MEMBER std::int32_t support_size(std::int64_t i) const { return support_row(2)[i]; }

  R2VPO_MEMBER std::int32_t begin(std::int64_t u) const { return unit_row(0)[u]; }
  R2VPO_MEMBER std::int32_t end(std::int64_t u) const { return unit_row(1)[u]; }
  R2VPO_MEMBER std::int32_t group(std::int64_t u) const { return unit_row(2)[u]; }

  // Eq. 4: D, from the sum of the partial counts.
  R2VPO_MEMBER float denominator(std::int64_t counted) const {
    const float d = static_cast<float>(counted) * factor();
    return d == 0.0f ? 1.0f : d;
  }
  R2VPO_MEMBER float denominator() const {
    std::int64_t counted = 0;
    for (int part = 0; part < parts; ++part) counted += integers()[kCounts + part];
    return denominator(counted);
  }

  R2VPO_MEMBER Objective objective() const {
    return {log_ratio_clamp(), kl_coef(), entropy_coef(), clip_low(), clip_high(), dual_clip(),
            policy_loss, kl, kl_unbiased, on_policy};
  }
  R2VPO_MEMBER Token token(std::int64_t i, float denominator) const {
    return {token_weight(i) / denominator, old_logp(i), advantage(i), variance_coef(i), center(i),
            ref_logp(i)};
  }
};

// The sets that tokens were sampled from: that of token i is token_ids from offsets[i] to
// offsets[i + 1], rising. No id is larger than `largest`, which must be below `vocabulary`.
struct SamplingMask {
  const std::int32_t* token_ids;  // null where none was given
  const std::int64_t* offsets;
  const std::int64_t* largest;
  std::int64_t count, vocabulary;
  bool missing_full;  // a label that is not in its set means the full vocabulary
};

// What the denominator counts (Eq. 4).
enum class Count { nothing, tokens, units };

// In the order of `numbers` in backends/calls.py.
struct Numbers {
  float variance_coef, temperature, factor, kl_coef, entropy_coef, log_ratio_clamp, clip_low,
      clip_high, dual_clip;
};

struct Prepare {
  Tokens tokens;
  Column advantages, labels, mask, old_logps, importance_weights, variance_coef, temperature,
      ref_logps, logps, entropy;
  // Of these stride_unit alone counts: one number for each unit (cu_seqlens: and one more; center:
  // for each group), and one for all.
  Column cu_seqlens, group_ids, center, normalizer;
  std::int64_t unit_length, units_per_group;
  std::int64_t ignore_index, vocabulary, first_word, words;
  bool mean_over_unit;
  Count count;
  Numbers numbers;
  const float* numbers_tensor;  // in place of `numbers`, unless null
  float* logps_out;             // null where not wanted, as the next two
  float* entropy_out;
  std::uint8_t* activity;
  bool sparse_head;  // which then is 3 of tokens that have a support
  SamplingMask sampling_mask;
};

// The empirical centre (Eq. 9): μ - 1 of each group, then κ of each.
struct Means {
  Tokens tokens;
  const float* logps;
  Column upstream;  // float32; without it 1
  float* means;
  double* scratch;  // as the backend's launcher in Python made it, or null
};

struct Finish {
  Tokens tokens;
  const float* logps;
  const float* entropy;  // null where there is none
  Column upstream;
  const float* means;  // null: the centre is given
  float* loss;
  bool per_token;  // a loss for each token
  float* stats;
  float* metrics;
  float* dlogps;  // null where not wanted, as the next
  float* dentropy;
  // What the caller gets, who may change it: backward reads the others. Null where not wanted.
  float* logps_out;
  float* entropy_out;
  double* scratch;
};

constexpr int kMetrics = 15;

// Eq. 30: what this rank adds to the SUM, and what follows from it. `entropy` is null where it is
// not wanted, here and below.
struct ShardParts {
  Tokens tokens;
  std::int64_t words;  // of this shard
  const float* logps;
  const float* top;
  const float* log_total;
  const float* entropy;
  const float* whole_top;
  double* parts;
};

struct ShardCombine {
  Tokens tokens;
  std::int64_t ranks;
  const double* parts;
  float* logps;
  float* log_total;
  float* entropy;
};

// Eq. 16: λ moved once, by the ratio's statistics (Eq. 10), one number for each group.
struct DualStep {
  float* coef;  // one number, in place
  const float* weight;
  const float* d_sum;
  const float* d_sq_sum;
  std::int64_t groups;
  bool about_means;  // the variance within groups, in place of the second moment about one
  double target, lr, min_coef, max_coef;
};

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

// Where a row's words are not all of its logits' (calls.Support): the ids of the sampling mask, and
// as many numbers, the logits of these words and then their gradients. `compact`: they are there
// already, no other logits are, and tokens of the full vocabulary are left out.
struct Support {
  const std::int32_t* token_ids;  // null: every row has the full vocabulary
  float* values;
  std::int64_t first_word;  // of these logits
  bool compact;
};

// Which token a row of logits belongs to; arrays of tokens are read and written there.
struct RowTokens {
  Tokens tokens;
  Support support;
  const std::int64_t* index;  // of each row; null: they follow each other from `first` on
  std::int64_t first;

  R2VPO_MEMBER std::int64_t token(std::int64_t row) const {
    return index ? index[row] : first + row;
  }
  // Whether the row has words of its own, and not the full vocabulary.
  R2VPO_MEMBER bool has_support(std::int64_t i) const {
    return support.token_ids && tokens.support_count(i) >= 0;
  }
  // Column of the k-th of them; none is outside.
  R2VPO_MEMBER std::int64_t column(std::int64_t i, std::int64_t k) const {
    return support.token_ids[tokens.support_begin(i) + k] - support.first_word;
  }
  // Where the label is among them; their number, where it is not.
  R2VPO_MEMBER std::int64_t label_place(std::int64_t i) const {
    const std::int64_t count = tokens.support_count(i), label = tokens.label(i);
    std::int64_t k = 0;
    while (k < count && column(i, k) != label) ++k;
    return k;
  }
};

struct LogpsForward : RowTokens {
  float* logps;
  float* top;        // max z and
  float* log_total;  // log2 Σ 2^((z - top)·scale), for LogpsBackward
  float* entropy;
};

struct LogpsBackward : RowTokens {
  const float* logps;
  const float* top;
  const float* log_total;
  const float* entropy;
  const float* grad_logps;
  const float* grad_entropy;
  const float* upstream;  // a number that multiplies both, or null
};

struct OnePass : RowTokens {
  float* logps;
  float* entropy;
};

// The rows' gradient times one number, in place; by 1 nothing is read or written.
struct Scale {
  const float* upstream;
};

// Hidden states and a head, of whose products the words of each token's support are formed.
struct Head : RowTokens {
  Dtype dtype;  // of both, and of the bias
  std::int64_t width, words;
  const void* hidden;
  std::int64_t hidden_stride;
  const void* weight;
  std::int64_t weight_stride;
  float scale;
  float* slopes;  // of the softcap, at each kept word; null where there is none
};

// Into support.values the logits of Eq. 27, and into slopes.
struct HeadLogits : Head {
  const void* bias;
  float softcap;
};

// From support.values, which now are dL/dz.
struct HeadDhidden : Head {
  void* dhidden;    // contiguous
  bool in_float32;  // what is written, otherwise of the head's dtype
};

// Of every word, once; on top of what is there, or in its place.
struct HeadDweight : Head {
  const std::int32_t* by_word;   // the places of all ids, by word and, of one word, by token
  const std::int32_t* token_of;  // the token of each id
  std::int64_t pairs;            // how many ids there are
  void* dweight;                 // contiguous; null where not wanted, as the next
  void* dbias;
  bool in_float32;               // as in HeadDhidden
  bool on_top;
};

// The kernels of one backend, or of one instruction set; Target says where they run.
template <typename Target>
struct Kernels {
  void (*logps_forward)(const Target&, const Rows&, const LogpsForward&);
  void (*logps_backward)(const Target&, const Rows&, const LogpsBackward&);
  void (*one_pass)(const Target&, const Rows&, const OnePass&);
  void (*scale)(const Target&, const Rows&, const Scale&);
  void (*prepare)(const Target&, const Prepare&);
  void (*means)(const Target&, const Means&);
  void (*finish)(const Target&, const Finish&);
  void (*shard_parts)(const Target&, const ShardParts&);
  void (*shard_combine)(const Target&, const ShardCombine&);
  void (*dual_step)(const Target&, const DualStep&);
  void (*head_logits)(const Target&, const HeadLogits&);
  void (*head_dhidden)(const Target&, const HeadDhidden&);
  void (*head_dweight)(const Target&, const HeadDweight&);
};

// What the first look at a row finds: the label's log-prob, max z, log2 of the sum about it, the
// entropy.
struct Look {
  float logp, top, log_total, entropy;
};

}  // namespace r2vpo
