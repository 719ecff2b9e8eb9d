// The products of hidden states and a head of which only the kept words' are formed (Eq. 27, 28).
// Included by each instruction set's rows.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../tokens.h"
#include "cpu.h"
#include "vector.h"

namespace r2vpo {
namespace {

// Tokens that a thread takes at a time.
constexpr std::int64_t kTokensAtOnce = 8;
// Words that it takes, and columns, so that threads share out a word that is in every set.
constexpr std::int64_t kWordsAtOnce = 64, kColumnsAtOnce = 1024;

// body(pair, x) for each two vectors of a row, x past its end being 0.
template <typename T, typename Body>
inline void for_each_pair(const T* row, std::int64_t width, Body body) {
  std::int64_t column = 0;
  for (; column + kStep <= width; column += kStep) body(column / kStep, load(row + column));
  if (column < width) body(column / kStep, load_part(row + column, width - column, 0.0f));
}

inline Pair fma(Pair a, Pair b, Pair c) {
  return {fma(a.first, b.first, c.first), fma(a.second, b.second, c.second)};
}

// As columns of float32 lie, of what was read from halves.
inline Pair in_order(Pair x) {
  float columns[kStep];
  for (int lane = 0; lane < kLanes; ++lane) {
    columns[2 * lane] = x.first[lane];
    columns[2 * lane + 1] = x.second[lane];
  }
  return load(reinterpret_cast<const Float32*>(columns));
}

// A row of float32 sums, or of numbers that are taken apart once, in the order of pairs.
class PairRow {
 public:
  explicit PairRow(std::int64_t width) : pairs_((width + kStep - 1) / kStep), width_(width) {}

  void clear() { std::fill(pairs_.begin(), pairs_.end(), Pair{}); }

  template <typename T>
  void set(const T* row) {
    for_each_pair(row, width_, [&](std::int64_t k, Pair x) { pairs_[k] = x; });
  }

  template <typename T>
  void add(float factor, const T* row) {
    const Pair by = {broadcast(factor), broadcast(factor)};
    for_each_pair(row, width_, [&](std::int64_t k, Pair x) { pairs_[k] = fma(by, x, pairs_[k]); });
  }

  template <typename T>
  float dot(const T* row) const {
    // Two chains of additions: one takes longer than what it waits for.
    Pair even = {}, odd = {};
    std::int64_t column = 0;
    for (; column + 2 * kStep <= width_; column += 2 * kStep) {
      even = fma(pairs_[column / kStep], load(row + column), even);
      odd = fma(pairs_[column / kStep + 1], load(row + column + kStep), odd);
    }
    const Pair* const rest = pairs_.data() + column / kStep;
    for_each_pair(row + column, width_ - column,
                  [&](std::int64_t k, Pair x) { even = fma(rest[k], x, even); });
    return static_cast<float>(sum(even.first + odd.first) + sum(even.second + odd.second));
  }

  // Times a factor, on top of what is there or in its place. T is what the numbers were read as.
  template <typename T, typename Out>
  void write(float factor, Out* row, bool on_top) const {
    const Floats by = broadcast(factor);
    for (std::int64_t column = 0; column < width_; column += kStep) {
      const std::int64_t rest = width_ - column;
      Pair sum = pairs_[column / kStep];
      if constexpr (sizeof(T) != sizeof(Out)) sum = in_order(sum);
      Pair x = {sum.first * by, sum.second * by};
      if (on_top) {
        const Pair there = rest < kStep ? load_part(row + column, rest, 0.0f) : load(row + column);
        x = {x.first + there.first, x.second + there.second};
      }
      x = {Out::ties_to_even(x.first), Out::ties_to_even(x.second)};
      rest < kStep ? store_part(row + column, x, rest) : store(row + column, x);
    }
  }

 private:
  std::vector<Pair> pairs_;
  std::int64_t width_;
};

// body(i, row) for each token that has a support; `row` is the thread's.
template <typename Body>
void for_each_supported(const CpuTarget& target, const Head& a, Body body) {
#pragma omp parallel num_threads(target.threads)
  {
    [[maybe_unused]] FlushToZero flush;
    PairRow row(a.width);
#pragma omp for schedule(dynamic, kTokensAtOnce)
    for (std::int64_t i = 0; i < a.tokens.count; ++i) {
      if (is_supported(a, i)) body(i, row);
    }
  }
}

template <typename T>
const T* row_of(const void* rows, std::int64_t stride, std::int64_t index) {
  return static_cast<const T*>(rows) + index * stride;
}

// Ask for a row ahead of its use: the processor's own prefetching finds no pattern in its place.
template <typename T>
void prefetch(const T* row, std::int64_t width) {
  const char* const begin = reinterpret_cast<const char*>(row);
  for (std::size_t at = 0; at < width * sizeof(T); at += 64) __builtin_prefetch(begin + at);
}

template <typename T>
void head_logits_of(const CpuTarget& target, const HeadLogits& a) {
  for_each_supported(target, a, [&](std::int64_t i, PairRow& hidden) {
    const std::int64_t begin = a.tokens.support_begin(i), count = a.tokens.support_count(i);
    // All the probability is on one word, whatever its logit.
    const bool single = a.tokens.support_size(i) == 1;
    if (!single) hidden.set(row_of<T>(a.hidden, a.hidden_stride, i));
    const auto row = [&](std::int64_t k) {
      return row_of<T>(a.weight, a.weight_stride, a.column(i, k));
    };
    for (std::int64_t k = 0; k < count; ++k) {
      float product = 0.0f, bias = 0.0f;
      if (!single) {
        if (k + 1 < count) prefetch(row(k + 1), a.width);
        product = hidden.dot(row(k));
        if (a.bias) bias = load_one(static_cast<const T*>(a.bias) + a.column(i, k));
      }
      put_logit(a, begin + k, product, bias);
    }
  });
}

// Out: of the sums, as in head_dweight_of.
template <typename T, typename Out>
void head_dhidden_of(const CpuTarget& target, const HeadDhidden& a) {
  for_each_supported(target, a, [&](std::int64_t i, PairRow& sum) {
    const std::int64_t begin = a.tokens.support_begin(i), count = a.tokens.support_count(i);
    const auto row = [&](std::int64_t k) {
      return row_of<T>(a.weight, a.weight_stride, a.column(i, k));
    };
    sum.clear();
    for (std::int64_t k = 0; k < count; ++k) {
      const float slope = slope_at(a, begin + k);
      if (slope == 0.0f) continue;
      if (k + 1 < count) prefetch(row(k + 1), a.width);
      sum.add(slope, row(k));
    }
    sum.template write<T>(a.scale, static_cast<Out*>(a.dhidden) + i * a.width, false);
  });
}

// Out: of the sums, float32 where others are added to them.
template <typename T, typename Out>
void head_dweight_of(const CpuTarget& target, const HeadDweight& a) {
  Out* const dweight = static_cast<Out*>(a.dweight);
  Out* const dbias = static_cast<Out*>(a.dbias);
  const std::int64_t pairs = a.pairs;
  const auto word_of = [&](std::int64_t n) {
    return a.support.token_ids[a.by_word[n]] - a.support.first_word;
  };
  const std::int64_t blocks = (a.words + kWordsAtOnce - 1) / kWordsAtOnce;
#pragma omp parallel num_threads(target.threads)
  {
    [[maybe_unused]] FlushToZero flush;
#pragma omp for collapse(2) schedule(dynamic)
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::int64_t left = 0; left < a.width; left += kColumnsAtOnce) {
        const std::int64_t width = std::min(kColumnsAtOnce, a.width - left);
        PairRow sum(width);
        const std::int64_t first = block * kWordsAtOnce;
        const std::int64_t last = std::min(first + kWordsAtOnce, a.words);
        // The first pair, in the order of words, of this block.
        std::int64_t n = 0;
        for (std::int64_t past = pairs; n < past;) {
          const std::int64_t middle = n + (past - n) / 2;
          word_of(middle) < first ? n = middle + 1 : past = middle;
        }
        for (std::int64_t word = first; word < last; ++word) {
          bool any = false;
          double bias = 0.0;
          for (; n < pairs && word_of(n) == word; ++n) {
            const std::int64_t pair = a.by_word[n], i = a.token_of[pair];
            if (!is_supported(a, i)) continue;
            const float slope = slope_at(a, pair);
            if (slope == 0.0f) continue;
            if (!any) sum.clear();
            any = true;
            if (dweight) sum.add(slope, row_of<T>(a.hidden, a.hidden_stride, i) + left);
            bias += slope;
          }
          if (dweight) {
            Out* const row = dweight + word * a.width + left;
            if (any) {
              sum.template write<T>(a.scale, row, a.on_top);
            } else if (!a.on_top) {
              stream_zeros(row, width * sizeof(Out));
            }
          }
          if (dbias && left == 0 && (any || !a.on_top)) {
            const float there = a.on_top ? load_one(dbias + word) : 0.0f;
            const Floats x = broadcast(there + static_cast<float>(bias * a.scale));
            store_one(dbias + word, Out::ties_to_even(x)[0]);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace r2vpo
