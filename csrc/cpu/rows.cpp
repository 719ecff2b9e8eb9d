// The kernels over logits on a CPU. Compiled once per instruction set; R2VPO_KERNELS names its
// table.

#include <algorithm>
#include <cmath>

#include "cpu.h"
#include "vector.h"

namespace r2vpo {
namespace {

constexpr double kLn2 = 0.6931471805599453;
constexpr float kLowest = std::numeric_limits<float>::lowest();
// Columns that are summed in float32: 64 to a lane, so that no chain of additions is longer.
constexpr std::int64_t kBlock = 64 * kLanes;
// Bytes between what is read and what is asked for: the processor's own prefetching stops at the end
// of each page of 4 KiB, which these exponentials are quick to reach.
constexpr std::int64_t kAhead = 8192;
// Bytes that a thread takes at a time, in whole rows: enough to be worth asking for, and where there
// is enough for everyone several huge pages, which two threads that touch one first would both clear.
constexpr std::int64_t kLeast = std::int64_t{1} << 16, kMost = std::int64_t{1} << 22;

// body(x) for each vector of columns from `begin` to `end`.
template <typename T, typename Body>
inline void read(const T* row, std::int64_t begin, std::int64_t end, Body body) {
  const auto both = [&](Pair x) {
    body(x.first);
    body(x.second);
  };
  std::int64_t column = begin;
  for (; column + kStep <= end; column += kStep) {
    __builtin_prefetch(reinterpret_cast<const char*>(row + column) + kAhead);
    both(load(row + column));
  }
  if (column < end) both(load_part(row + column, end - column));
}

// to = body(from) for each vector of columns.
template <typename T, typename Body>
inline void transform(const T* from, T* to, std::int64_t columns, Body body) {
  const auto both = [&](Pair x) { return Pair{body(x.first), body(x.second)}; };
  std::int64_t column = 0;
  for (; column + kStep <= columns; column += kStep) {
    store(to + column, both(load(from + column)));
  }
  if (column < columns) {
    const std::int64_t rest = columns - column;
    store_part(to + column, both(load_part(from + column, rest)), rest);
  }
}

template <typename T>
inline void store_one(T* to, float value) {
  store_part(to, {broadcast(value), broadcast(value)}, 1);
}

// An exponent bounded below, so that p·log p meets no 0·inf (Eq. 12).
inline Floats bounded(Floats x) { return larger(broadcast(kLowestExponent), x); }

// Eq. 1, 3 and 14 in one read from memory. A block of columns is summed about the largest logit so
// far; where it holds a larger one, which becomes rare, it is summed anew. Sums over blocks are in
// double precision.
template <bool kEntropy, typename T>
Look first_look(const T* row, std::int64_t vocabulary, std::int64_t label, float temperature) {
  const float scale = kLog2E / temperature;
  // Of the first block the largest is found beforehand: rows of one block are summed once. It is
  // finite at least: a block of -inf meets no inf - inf.
  Floats first_high = broadcast(kLowest);
  read(row, 0, std::min(kBlock, vocabulary), [&](Floats z) { first_high = larger(z, first_high); });
  float top = largest(first_high);
  Doubles s = {}, r = {};
  for (std::int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, vocabulary);
    Floats block_s, block_r;
    while (true) {
      Floats high = broadcast(kLowest);
      block_s = block_r = Floats{};
      read(row, begin, end, [&](Floats z) {
        high = larger(z, high);
        const Floats x = bounded((z - top) * scale);
        const Floats e = exp2(x);
        block_s += e;
        if (kEntropy) block_r = fma(e, x, block_r);
      });
      const float new_top = largest(high);
      if (!(new_top > top)) break;
      const double gap = (double(new_top) - top) * scale, decay = std::exp2(-gap);
      if (kEntropy) r = (r - gap * s) * decay;
      s *= decay;
      top = new_top;
    }
    s += __builtin_convertvector(block_s, Doubles);
    if (kEntropy) r += __builtin_convertvector(block_r, Doubles);
  }
  const double total = sum(s), log_total = std::log2(total);
  // A bad label reads nothing.
  const double z = label < vocabulary ? load_part(row + label, 1).first[0]
                                      : std::numeric_limits<float>::quiet_NaN();
  const double logp = ((z - top) * scale - log_total) * kLn2;
  const double entropy = kEntropy ? (log_total - sum(r) / total) * kLn2 : 0.0;
  return {float(logp), top, float(log_total), float(entropy)};
}

// Eq. 8: dL/dz of a row from dL/dlogp and dL/dH.
template <bool kEntropy, typename T>
void second_look(const T* row, T* grad_row, std::int64_t vocabulary, std::int64_t label,
                 float temperature, const Look& look, float dlogp, float dentropy) {
  const Floats scale = broadcast(kLog2E / temperature);
  const Floats top = broadcast(look.top), minus_log_total = broadcast(-look.log_total);
  dlogp /= temperature;
  dentropy /= temperature;
  const Floats minus_dlogp = broadcast(-dlogp), minus_dentropy = broadcast(-dentropy);
  const Floats ln_2 = broadcast(float(kLn2)), entropy = broadcast(look.entropy);
  transform(row, grad_row, vocabulary, [&](Floats z) {
    const Floats log2_p = bounded(fma(z - top, scale, minus_log_total));
    Floats slope = minus_dlogp;
    if (kEntropy) slope = fma(minus_dentropy, fma(log2_p, ln_2, entropy), slope);
    return exp2(log2_p) * slope;
  });
  if (label < vocabulary) {
    store_one(grad_row + label, label_slope(look.logp, look.entropy, dlogp, dentropy));
  }
}

template <typename T, typename Body>
void for_each_row(const CpuTarget& target, const Rows& rows, Body body) {
  const T* logits = static_cast<const T*>(rows.logits);
  T* dlogits = static_cast<T*>(rows.dlogits);
  const std::int64_t count = rows.batch * rows.length;
  if (count == 0) return;
  const int threads = static_cast<int>(std::min<std::int64_t>(target.threads, count));
  const std::int64_t bytes = rows.vocabulary * sizeof(T), even = count / (4 * threads);
  const std::int64_t share = std::max(kLeast / bytes, std::min(kMost / bytes, even)) + 1;
  // Which thread takes a row changes nothing in it.
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] FlushToZero flush;
#pragma omp for schedule(dynamic, share)
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t b = r / rows.length, t = r % rows.length;
      const T* row = logits + b * rows.stride_batch + t * rows.stride_token;
      T* grad_row = dlogits + b * rows.grad_stride_batch + t * rows.grad_stride_token;
      body(r, row, grad_row);
    }
  }
}

template <typename T>
void zero(T* row, std::int64_t vocabulary) {
  std::memset(row, 0, vocabulary * sizeof(T));
}

template <bool kEntropy, typename T>
void logps_forward_of(const CpuTarget& target, const Rows& rows, const LogpsForward& a) {
  for_each_row<T>(target, rows, [&](std::int64_t r, const T* row, T*) {
    const std::int64_t i = a.token(r), label = a.tokens.label(i);
    Look look = {};
    if (label >= 0) {
      look = first_look<kEntropy>(row, rows.vocabulary, label, a.tokens.temperature(i));
    }
    a.logps[i] = look.logp;
    a.top[i] = look.top;
    a.log_total[i] = look.log_total;
    if (kEntropy) a.entropy[i] = look.entropy;
  });
}

template <bool kEntropy, typename T>
void logps_backward_of(const CpuTarget& target, const Rows& rows, const LogpsBackward& a) {
  const float upstream = a.upstream ? *a.upstream : 1.0f;
  for_each_row<T>(target, rows, [&](std::int64_t r, const T* row, T* grad_row) {
    const std::int64_t i = a.token(r), label = a.tokens.label(i);
    if (label < 0) return zero(grad_row, rows.vocabulary);
    const Look look = {a.logps[i], a.top[i], a.log_total[i], kEntropy ? a.entropy[i] : 0.0f};
    second_look<kEntropy>(row, grad_row, rows.vocabulary, label, a.tokens.temperature(i), look,
                          a.grad_logps[i] * upstream,
                          kEntropy ? a.grad_entropy[i] * upstream : 0.0f);
  });
}

template <bool kEntropy, typename T>
void one_pass_of(const CpuTarget& target, const Rows& rows, const OnePass& a) {
  const Objective objective = a.tokens.objective();
  const float denominator = a.tokens.denominator();
  for_each_row<T>(target, rows, [&](std::int64_t r, const T* row, T* grad_row) {
    const std::int64_t i = a.token(r), label = a.tokens.label(i);
    Look look = {};
    if (label < 0) {
      zero(grad_row, rows.vocabulary);
    } else {
      const Token token = a.tokens.token(i, denominator);
      const float temperature = a.tokens.temperature(i);
      look = first_look<kEntropy>(row, rows.vocabulary, label, temperature);
      second_look<kEntropy>(row, grad_row, rows.vocabulary, label, temperature, look,
                            loss_slope(objective, token, look.logp),
                            kEntropy ? entropy_slope(objective, token.weight) : 0.0f);
    }
    a.logps[i] = look.logp;
    if (kEntropy) a.entropy[i] = look.entropy;
  });
}

template <typename T>
void scale_of(const CpuTarget& target, const Rows& rows, const Scale& a) {
  const float factor = *a.upstream;
  if (factor == 1.0f) return;
  for_each_row<T>(target, rows, [&](std::int64_t, const T* row, T* grad_row) {
    transform(row, grad_row, rows.vocabulary, [&](Floats dz) { return dz * factor; });
  });
}

// body(T{}) for the type of the logits.
template <typename Body>
void with_type(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::bfloat16: return body(BFloat16{});
    case Dtype::float16: return body(Float16{});
    default: return body(Float32{});
  }
}

void logps_forward(const CpuTarget& target, const Rows& rows, const LogpsForward& a) {
  with_type(rows.dtype, [&](auto z) {
    using T = decltype(z);
    a.entropy ? logps_forward_of<true, T>(target, rows, a)
              : logps_forward_of<false, T>(target, rows, a);
  });
}

void logps_backward(const CpuTarget& target, const Rows& rows, const LogpsBackward& a) {
  with_type(rows.dtype, [&](auto z) {
    using T = decltype(z);
    a.entropy ? logps_backward_of<true, T>(target, rows, a)
              : logps_backward_of<false, T>(target, rows, a);
  });
}

void one_pass(const CpuTarget& target, const Rows& rows, const OnePass& a) {
  with_type(rows.dtype, [&](auto z) {
    using T = decltype(z);
    a.entropy ? one_pass_of<true, T>(target, rows, a) : one_pass_of<false, T>(target, rows, a);
  });
}

void scale(const CpuTarget& target, const Rows& rows, const Scale& a) {
  with_type(rows.dtype, [&](auto z) { scale_of<decltype(z)>(target, rows, a); });
}

void exp2_of(const float* in, float* out, std::int64_t count) {
  const Float32* from = reinterpret_cast<const Float32*>(in);
  transform(from, reinterpret_cast<Float32*>(out), count, [](Floats x) { return exp2(x); });
}

}  // namespace

extern const CpuKernels R2VPO_KERNELS = {
    {logps_forward, logps_backward, one_pass, scale, prepare, means, finish, shard_parts,
     shard_combine, dual_step},
    exp2_of};

}  // namespace r2vpo
