// The kernels over logits on a CPU. Compiled once per instruction set; R2VPO_KERNELS names its
// table.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu.h"
#include "head.h"
#include "huge_pages.h"
#include "vector.h"

namespace r2vpo {
namespace {

constexpr double kLn2 = 0.6931471805599453;
constexpr float kLowest = std::numeric_limits<float>::lowest();
// Under it no finite float is -127 times 1/scale: a temperature above 3.8e36 counts as 3.8e36.
constexpr float kLeastScale = 3.75e-37f;
// Columns that are summed in float32: 64 to a lane of each vector of a pair, so that no chain of
// additions is longer.
constexpr std::int64_t kBlock = 64 * kStep;
// Bytes between what is read and what is asked for: the processor's own prefetching stops at the end
// of each page of 4 KiB, which these exponentials are quick to reach.
constexpr std::int64_t kAhead = 8192;
// Bytes that a thread takes at a time, in whole rows: enough to be worth asking for, and where there
// is enough for everyone several huge pages, which two threads that touch one first would both clear.
constexpr std::int64_t kLeast = std::int64_t{1} << 16, kMost = std::int64_t{1} << 22;
// Rows, of so many bytes together at most, that are all looked at once before the first of them is
// looked at again: of a short row alone the second look would wait for a chain of logarithms.
constexpr std::int64_t kTogether = 8, kShort = std::int64_t{1} << 13;

// body(column, x) for each two vectors of columns from `begin` to `end`.
template <typename T, typename Body>
inline void read(const T* row, std::int64_t begin, std::int64_t end, Body body) {
  std::int64_t column = begin;
  for (; column + kStep <= end; column += kStep) body(column, load(row + column));
  if (column < end) body(column, load_part(row + column, end - column));
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

// A NaN as BFloat16::narrow takes it.
inline float plain_nan(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }

// The largest logit, but for NaN; finite at least, so that -inf meets no inf - inf.
template <typename T>
inline float largest_of(const T* row, std::int64_t begin, std::int64_t end) {
  Pair high = {broadcast(kLowest), broadcast(kLowest)};
  const auto add = [&](Pair x) {
    high = {larger(x.first, high.first), larger(x.second, high.second)};
  };
  // Four vectors at a time: a chain of maxima takes longer than what it waits for.
  for (; begin + 2 * kStep <= end; begin += 2 * kStep) {
    const Pair x = load(row + begin), y = load(row + begin + kStep);
    add({larger(x.first, y.first), larger(x.second, y.second)});
  }
  read(row, begin, end, [&](std::int64_t, Pair x) { add(x); });
  return largest(larger(high.first, high.second));
}

// What takes distances from the largest logit to base 2.
struct Base2 {
  float scale, least;

  explicit Base2(float temperature) : scale(kLog2E / temperature) {
    if (scale < kLeastScale) scale = kLeastScale;
    least = kLowestExponent / scale;
  }

  // Bounded below, so that p·log p meets no 0·inf (Eq. 12).
  Floats distance(Floats z, float top) const {
    return larger(broadcast(least), z - broadcast(top));
  }
  Floats exp2_of(Floats d) const { return exp2(d, broadcast(scale)); }
};

// What a row's first look leaves to its second: the exponentials, in the order of pairs, and the
// logit that those of each block are relative to.
struct Exponentials {
  explicit Exponentials(std::int64_t vocabulary)
      : pairs(new Pair[(vocabulary + kStep - 1) / kStep]),
        tops(new float[(vocabulary + kBlock - 1) / kBlock]) {}

  // Not as pairs: see `load`.
  Float32* at(std::int64_t column) const {
    return reinterpret_cast<Float32*>(pairs.get()) + column;
  }

  std::unique_ptr<Pair[]> pairs;
  std::unique_ptr<float[]> tops;
  double total;  // of the whole row, about the last of them
};

// Row r, between its two looks.
template <typename T>
struct Row {
  explicit Row(std::int64_t kept_columns) : kept(kept_columns) {}

  std::int64_t r;
  const T* logits;
  T* dlogits;
  Look look;
  Exponentials kept;
};

// Eq. 1, 3 and 14 in one read from memory. A block of columns is summed about the largest logit so
// far, its own included. Sums over blocks are in double precision.
template <bool kEntropy, bool kKeep, typename T>
Look first_look(const T* row, std::int64_t vocabulary, std::int64_t label, const Base2& base,
                Exponentials& kept) {
  float top = kLowest;
  double s = 0.0, r = 0.0;
  for (std::int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, vocabulary);
    const float high = largest_of(row, begin, end);
    if (high > top) {
      if (begin > 0) {
        const double gap = (double(high) - top) * base.scale, decay = std::exp2(-gap);
        if (kEntropy) r = (r - gap * s) * decay;
        s *= decay;
      }
      top = high;
    }
    if (kKeep) kept.tops[begin / kBlock] = top;
    Pair block_s = {}, block_r = {};
    read(row, begin, end, [&](std::int64_t column, Pair z) {
      __builtin_prefetch(reinterpret_cast<const char*>(row + column) + kAhead);
      const Pair d = {base.distance(z.first, top), base.distance(z.second, top)};
      const Pair e = {base.exp2_of(d.first), base.exp2_of(d.second)};
      if (kKeep) store(kept.at(column), e);
      block_s = {block_s.first + e.first, block_s.second + e.second};
      if (kEntropy) {
        block_r = {fma(e.first, d.first * base.scale, block_r.first),
                   fma(e.second, d.second * base.scale, block_r.second)};
      }
    });
    s += sum(block_s.first + block_s.second);
    if (kEntropy) r += sum(block_r.first + block_r.second);
  }
  kept.total = s;
  const double log_total = std::log2(s);
  // A bad label reads nothing.
  const double z = label < vocabulary ? load_one(row + label)
                                      : std::numeric_limits<float>::quiet_NaN();
  const double logp = ((z - top) * base.scale - log_total) * kLn2;
  const double entropy = kEntropy ? (log_total - r / s) * kLn2 : 0.0;
  return {float(logp), top, float(log_total), float(entropy)};
}

template <typename T>
void set_label(T* grad_row, std::int64_t vocabulary, std::int64_t label, const Look& look,
               float dlogp, float dentropy) {
  if (label < vocabulary) {
    const float dz = label_slope(look.logp, look.entropy, dlogp, dentropy);
    store_one(grad_row + label, plain_nan(dz));
  }
}

// Eq. 8: dL/dz of a row from dL/dlogp and dL/dH.
template <bool kEntropy, typename T>
void second_look(const T* row, T* grad_row, std::int64_t vocabulary, std::int64_t label,
                 const Base2& base, float temperature, const Look& look, double total, float dlogp,
                 float dentropy) {
  dlogp /= temperature;
  dentropy /= temperature;
  // p·(-dlogp - dentropy·(log p + H)) is e·(slope + curve·d).
  const double mean = look.entropy - look.log_total * kLn2;
  const Floats slope = broadcast(plain_nan((-dlogp - dentropy * mean) / total));
  const Floats curve = broadcast(plain_nan(-dentropy * base.scale * kLn2 / total));
  transform(row, grad_row, vocabulary, [&](Floats z) {
    const Floats d = base.distance(z, look.top), e = base.exp2_of(d);
    return e * (kEntropy ? fma(curve, d, slope) : slope);
  });
  set_label(grad_row, vocabulary, label, look, dlogp, dentropy);
}

// The same without entropy, from what the first look kept.
template <typename T>
void second_look(const Exponentials& kept, T* grad_row, std::int64_t vocabulary,
                 std::int64_t label, const Base2& base, float temperature, const Look& look,
                 float dlogp) {
  dlogp /= temperature;
  const double slope = -dlogp / kept.total;
  for (std::int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, vocabulary);
    const float top = kept.tops[begin / kBlock];
    const double decay = top == look.top ? 1.0 : std::exp2((double(top) - look.top) * base.scale);
    const Floats factor = broadcast(plain_nan(slope * decay));
    const auto dz = [&](std::int64_t column) {
      const Pair e = load(kept.at(column));
      return Pair{e.first * factor, e.second * factor};
    };
    std::int64_t column = begin;
    for (; column + kStep <= end; column += kStep) store(grad_row + column, dz(column));
    if (column < end) store_part(grad_row + column, dz(column), end - column);
  }
  set_label(grad_row, vocabulary, label, look, dlogp, 0.0f);
}

// first(row) for each, then second(row).
template <typename T, typename First, typename Second>
void for_each_row(const CpuTarget& target, const Rows& rows, std::int64_t kept_columns, First first,
                  Second second) {
  const T* logits = static_cast<const T*>(rows.logits);
  T* dlogits = static_cast<T*>(rows.dlogits);
  const std::int64_t count = rows.batch * rows.length;
  if (count == 0) return;
  const int threads = static_cast<int>(std::min<std::int64_t>(target.threads, count));
  const std::int64_t bytes = rows.vocabulary * sizeof(T), even = count / (4 * threads);
  const std::int64_t share = std::max(kLeast / bytes, std::min(kMost / bytes, even)) + 1;
  const std::int64_t together = std::max(std::min(kTogether, kShort / bytes), std::int64_t{1});
  // Which thread takes a row changes nothing in it.
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] FlushToZero flush;
    std::vector<Row<T>> some;
    for (std::int64_t k = 0; k < together; ++k) some.emplace_back(kept_columns);
#pragma omp for schedule(dynamic)
    for (std::int64_t begin = 0; begin < count; begin += share) {
      std::int64_t b = begin / rows.length, t = begin % rows.length;
      const std::int64_t end = std::min(begin + share, count);
      for (std::int64_t r = begin; r < end; r += together) {
        const std::int64_t here = std::min(together, end - r);
        for (std::int64_t k = 0; k < here; ++k) {
          some[k].r = r + k;
          some[k].logits = logits + b * rows.stride_batch + t * rows.stride_token;
          some[k].dlogits = dlogits + b * rows.grad_stride_batch + t * rows.grad_stride_token;
          first(some[k]);
          if (++t == rows.length) ++b, t = 0;
        }
        for (std::int64_t k = 0; k < here; ++k) second(some[k]);
      }
    }
  }
}

template <typename T, typename Body>
void for_each_row(const CpuTarget& target, const Rows& rows, Body body) {
  for_each_row<T>(target, rows, 0, body, [](const Row<T>&) {});
}

template <typename T>
void zero(T* row, std::int64_t vocabulary) {
  std::memset(row, 0, vocabulary * sizeof(T));
}

// The values of token i's support, as a row of their own.
Float32* values_of(const RowTokens& a, std::int64_t i) {
  return reinterpret_cast<Float32*>(a.support.values) + a.tokens.support_begin(i);
}

// Fill them with the logits of its words.
template <typename T>
void gather(const RowTokens& a, const T* logits, std::int64_t i) {
  if (!a.has_support(i) || a.support.compact) return;
  Float32* const values = values_of(a, i);
  for (std::int64_t k = 0; k < a.tokens.support_count(i); ++k) {
    store_one(values + k, load_one(logits + a.column(i, k)));
  }
}

// body(z, columns, the label's): of the row or, where it has one, of its support.
template <typename T, typename Body>
Look look_at(const Rows& rows, const RowTokens& a, const Row<T>& row, std::int64_t i, Body body) {
  if (!a.has_support(i)) return body(row.logits, rows.vocabulary, a.tokens.label(i));
  return body(values_of(a, i), a.tokens.support_count(i), a.label_place(i));
}

// body(z, dz, columns, the label's), and the row's gradient.
template <typename T, typename Body>
void pull_back(const Rows& rows, const RowTokens& a, const Row<T>& row, std::int64_t i, Body body) {
  if (!a.has_support(i)) {
    return body(row.logits, row.dlogits, rows.vocabulary, a.tokens.label(i));
  }
  Float32* const values = values_of(a, i);
  const std::int64_t count = a.tokens.support_count(i);
  body(values, values, count, a.label_place(i));
  if (a.support.compact) return;
  zero(row.dlogits, rows.vocabulary);
  for (std::int64_t k = 0; k < count; ++k) {
    store_one(row.dlogits + a.column(i, k), plain_nan(load_one(values + k)));
  }
}

// Of a masked token.
template <typename T>
void pull_back_nothing(const Rows& rows, const RowTokens& a, const Row<T>& row) {
  if (!a.support.compact) zero(row.dlogits, rows.vocabulary);
}

// Whether a row is somebody else's.
bool is_left_out(const RowTokens& a, std::int64_t i) {
  return a.support.compact && a.tokens.label(i) >= 0 && !a.has_support(i);
}

template <bool kEntropy, typename T>
void logps_forward_of(const CpuTarget& target, const Rows& rows, const LogpsForward& a) {
  for_each_row<T>(target, rows, [&](Row<T>& row) {
    const std::int64_t i = a.token(row.r);
    if (is_left_out(a, i)) return;
    Look look = {};
    if (a.tokens.label(i) >= 0) {
      const Base2 base(a.tokens.temperature(i));
      gather(a, row.logits, i);
      look = look_at(rows, a, row, i, [&](const auto* z, std::int64_t n, std::int64_t at) {
        return first_look<kEntropy, false>(z, n, at, base, row.kept);
      });
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
  for_each_row<T>(target, rows, [&](const Row<T>& row) {
    const std::int64_t i = a.token(row.r);
    if (is_left_out(a, i)) return;
    if (a.tokens.label(i) < 0) return pull_back_nothing(rows, a, row);
    const Look look = {a.logps[i], a.top[i], a.log_total[i], kEntropy ? a.entropy[i] : 0.0f};
    const float temperature = a.tokens.temperature(i);
    const float dentropy = kEntropy ? a.grad_entropy[i] * upstream : 0.0f;
    gather(a, row.logits, i);
    pull_back(rows, a, row, i, [&](const auto* z, auto* dz, std::int64_t n, std::int64_t at) {
      second_look<kEntropy>(z, dz, n, at, Base2(temperature), temperature, look,
                            std::exp2(double(look.log_total)), a.grad_logps[i] * upstream,
                            dentropy);
    });
  });
}

template <bool kEntropy, typename T>
void one_pass_of(const CpuTarget& target, const Rows& rows, const OnePass& a) {
  const Objective objective = a.tokens.objective();
  const float denominator = a.tokens.denominator();
  const auto first = [&](Row<T>& row) {
    const std::int64_t i = a.token(row.r);
    if (is_left_out(a, i)) return;
    row.look = {};
    if (a.tokens.label(i) >= 0) {
      const Base2 base(a.tokens.temperature(i));
      gather(a, row.logits, i);
      row.look = look_at(rows, a, row, i, [&](const auto* z, std::int64_t n, std::int64_t at) {
        return first_look<kEntropy, !kEntropy>(z, n, at, base, row.kept);
      });
    }
    a.logps[i] = row.look.logp;
    if (kEntropy) a.entropy[i] = row.look.entropy;
  };
  const auto second = [&](const Row<T>& row) {
    const std::int64_t i = a.token(row.r);
    if (is_left_out(a, i)) return;
    if (a.tokens.label(i) < 0) return pull_back_nothing(rows, a, row);
    const Token token = a.tokens.token(i, denominator);
    const float temperature = a.tokens.temperature(i);
    const Base2 base(temperature);
    const float dlogp = loss_slope(objective, token, row.look.logp);
    pull_back(rows, a, row, i, [&](const auto* z, auto* dz, std::int64_t n, std::int64_t at) {
      if (kEntropy) {
        second_look<true>(z, dz, n, at, base, temperature, row.look, row.kept.total, dlogp,
                          entropy_slope(objective, token.weight));
      } else {
        second_look(row.kept, dz, n, at, base, temperature, row.look, dlogp);
      }
    });
  };
  for_each_row<T>(target, rows, kEntropy ? 0 : rows.vocabulary, first, second);
}

template <typename T>
void scale_of(const CpuTarget& target, const Rows& rows, const Scale& a) {
  const float factor = plain_nan(*a.upstream);
  if (factor == 1.0f) return;
  for_each_row<T>(target, rows, [&](const Row<T>& row) {
    transform(row.logits, row.dlogits, rows.vocabulary,
              [&](Floats dz) { return T::ties_to_even(dz * factor); });
  });
}

// Before the gradient is written, into memory that may be untouched.
void expect_huge_pages(const Rows& rows) {
  if (rows.dlogits == rows.logits) return;
  const std::int64_t elements = (rows.batch - 1) * rows.grad_stride_batch +
                                (rows.length - 1) * rows.grad_stride_token + rows.vocabulary;
  advise_huge_pages(reinterpret_cast<std::uintptr_t>(rows.dlogits),
                    elements * (rows.dtype == Dtype::float32 ? 4 : 2));
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
  expect_huge_pages(rows);
  with_type(rows.dtype, [&](auto z) {
    using T = decltype(z);
    a.entropy ? logps_backward_of<true, T>(target, rows, a)
              : logps_backward_of<false, T>(target, rows, a);
  });
}

void one_pass(const CpuTarget& target, const Rows& rows, const OnePass& a) {
  expect_huge_pages(rows);
  with_type(rows.dtype, [&](auto z) {
    using T = decltype(z);
    a.entropy ? one_pass_of<true, T>(target, rows, a) : one_pass_of<false, T>(target, rows, a);
  });
}

void scale(const CpuTarget& target, const Rows& rows, const Scale& a) {
  with_type(rows.dtype, [&](auto z) { scale_of<decltype(z)>(target, rows, a); });
}

void head_logits(const CpuTarget& target, const HeadLogits& a) {
  with_type(a.dtype, [&](auto z) { head_logits_of<decltype(z)>(target, a); });
}

void head_dhidden(const CpuTarget& target, const HeadDhidden& a) {
  with_type(a.dtype, [&](auto z) {
    using T = decltype(z);
    a.in_float32 ? head_dhidden_of<T, Float32>(target, a) : head_dhidden_of<T, T>(target, a);
  });
}

void head_dweight(const CpuTarget& target, const HeadDweight& a) {
  with_type(a.dtype, [&](auto z) {
    using T = decltype(z);
    a.in_float32 ? head_dweight_of<T, Float32>(target, a) : head_dweight_of<T, T>(target, a);
  });
}

void exp2_of(const float* in, float* out, std::int64_t count) {
  const Float32* from = reinterpret_cast<const Float32*>(in);
  transform(from, reinterpret_cast<Float32*>(out), count,
            [](Floats x) { return exp2(x, broadcast(1.0f)); });
}

}  // namespace

extern const CpuKernels R2VPO_KERNELS = {
    {logps_forward, logps_backward, one_pass, scale, prepare, means, finish, shard_parts,
     shard_combine, dual_step, head_logits, head_dhidden, head_dweight},
    exp2_of};

}  // namespace r2vpo
