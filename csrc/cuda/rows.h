// A row's way over the chip: the kernels on a GPU, but for the instructions that they are made of.
//
// A `Machine` gives those: machine.h on a GPU, tests/support/emulator/machine.h on a CPU, where the same
// code runs with every barrier and every copy in an order drawn at random.
//
// A block is kWarps warps that compute and one that loads. Its shared memory is a ring of stages,
// into which the loading warp copies a row's chunks in order, as far ahead as stages are free: into
// the next rows, while this one is computed and stored. A chunk's stage is free again after the
// last look at it. A row that is too long for one block has several shares, each summed by itself:
// by the blocks of a cluster where they are needed twice, else by one block, one after another.
//
//     chunks of a row      [0, reload)       [reload, reload + held)    the rest
//     first look           read, freed       read into registers, freed read
//     second look          loaded again      from registers             read again, freed
//
// `reload` is 0 wherever ring and registers hold the row: each logit is then read from DRAM once.
//
// A row with a support of its own (a sampling mask) never comes through the ring: the computing
// threads read the kept logits where they lie, share by share: a block may write its own while
// another block still reads. Gradients wait in
// Support::values until the share is zeroed, and are scattered into it.
#pragma once

#include "../tokens.h"
#include "device.h"
#include "plan.h"

namespace r2vpo {

// Which looks a kernel takes at a row.
template <typename A>
struct Looks {
  static constexpr bool kFirst = false, kSecond = true;
};
template <>
struct Looks<LogpsForward> {
  static constexpr bool kFirst = true, kSecond = false;
};
template <>
struct Looks<OnePass> {
  static constexpr bool kFirst = true, kSecond = true;
};

// What a plan is made for. Registers may hold a part of a row between two looks, in a block that is
// then alone on its multiprocessor. Not under a sampling mask: most rows there wait for a few kept
// logits, and two blocks wait for two rows at once.
template <typename A, bool kSupport>
constexpr Work work_of() {
  return {Looks<A>::kFirst, Looks<A>::kSecond,
          Looks<A>::kFirst && Looks<A>::kSecond && !kSupport};
}

// 16 bytes, which is what lanes read and write.
struct alignas(16) Word {
  std::uint32_t bits[4];
};
static_assert(sizeof(Word) == kWordBytes, "");

constexpr float kLowest = -3.4028234663852886e38f;  // finite: -inf meets no inf - inf
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLn2 = 0.6931471805599453f;

// What is found of a row by one thread, by a warp, in a share or in all: max z, Σ 2^x and Σ 2^x·x with
// x = (z - top)·scale, and the label's logit. 16 bytes, because that is what blocks send.
struct alignas(16) Part {
  float top, s, r, z_label;
};

template <typename Machine>
struct Control {
  typename Machine::Barrier full[kMostStages], empty[kMostStages];
  typename Machine::Barrier exchanged[2];
  Part of_warps[2][Machine::kWarps];
  Part of_blocks[2][kLargestCluster];
};

// A place in the ring: a stage, and the parity of how often the ring was gone round.
struct Cursor {
  int stage = 0;
  unsigned parity = 0;

  R2VPO_DEVICE void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// A row, and a share of it.
template <typename T>
struct Place {
  static constexpr int kColumns = sizeof(Word) / sizeof(T);  // of a word

  const T* row;
  T* grad_row;
  int head;          // columns before the first 16-byte boundary
  int tail;          // the first column after the last whole word
  int share;         // which one; the first has the columns that are in no whole word
  int first, count;  // of the whole words, the share's
};

template <typename T>
R2VPO_DEVICE Place<T> place_of(const Rows& rows, std::int64_t row, int share, int shares) {
  constexpr int kColumns = Place<T>::kColumns;
  const std::int64_t b = row / rows.length, t = row % rows.length;
  Place<T> place;
  place.row = static_cast<const T*>(rows.logits) + b * rows.stride_batch + t * rows.stride_token;
  place.grad_row = static_cast<T*>(rows.dlogits) + b * rows.grad_stride_batch +
                   t * rows.grad_stride_token;
  const int columns = static_cast<int>(rows.vocabulary);
  const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(place.row) % sizeof(Word));
  const int head = (kColumns - past / static_cast<int>(sizeof(T))) % kColumns;
  place.head = head < columns ? head : columns;
  const int words = (columns - place.head) / kColumns;
  place.tail = place.head + words * kColumns;
  const int most = (words + shares - 1) / shares, first = most * share;
  place.share = share;
  place.first = first < words ? first : words;
  place.count = words - place.first < most ? words - place.first : most;
  return place;
}

// Which chunks of a row are loaded twice, which stay in registers.
struct Schedule {
  int chunks, reload, held;

  template <typename A, int kHeld>
  R2VPO_DEVICE static Schedule of(int words, int stages, int chunk) {
    Schedule s;
    s.chunks = (words + chunk - 1) / chunk;
    if (!(Looks<A>::kFirst && Looks<A>::kSecond)) {
      s.reload = s.chunks;
      s.held = 0;
      return s;
    }
    const int over = s.chunks - stages - kHeld;
    s.reload = over > 0 ? over : 0;
    s.held = s.chunks - s.reload < kHeld ? s.chunks - s.reload : kHeld;
    return s;
  }
};

// Kernels without a sampling mask are compiled as if there were none.
template <bool kSupport>
R2VPO_TOKEN Support support_of(const Scale&) {
  return {};
}
template <bool kSupport>
R2VPO_TOKEN Support support_of(const RowTokens& a) {
  return kSupport ? a.support : Support{};
}

// Of a launch: the whole words of a row that have shares. Compact values have no rows.
template <typename T, bool kSupport, typename A>
R2VPO_TOKEN std::int64_t words_of(const Rows& rows, const A& a) {
  return support_of<kSupport>(a).compact ? 0 : rows.vocabulary / Place<T>::kColumns;
}

// What a row needs: its label and its support, as Tokens has them.
struct Task {
  int label, begin, count;
  bool compact;

  R2VPO_DEVICE bool is_masked() const { return label < 0; }
  R2VPO_DEVICE bool has_support() const { return count >= 0; }
  // It is somebody else's.
  R2VPO_DEVICE bool is_left_out() const { return compact && !is_masked() && !has_support(); }
  // All its logits are read, through the ring. The loading warp and the others must agree on it.
  R2VPO_DEVICE bool is_loaded() const { return !compact && !is_masked() && !has_support(); }
};

template <bool kSupport>
R2VPO_DEVICE Task task_of(const Scale&, std::int64_t) {
  return {0, 0, -1, false};
}
template <bool kSupport>
R2VPO_DEVICE Task task_of(const RowTokens& a, std::int64_t row) {
  const std::int64_t i = a.token(row);
  if (!kSupport) return {a.tokens.label(i), 0, -1, false};
  return {a.tokens.label(i), a.tokens.support_begin(i), a.tokens.support_count(i),
          a.support.compact};
}

// What is the same for all rows of a launch.
struct Common {
  Objective objective;
  float denominator, upstream;
};

template <typename Machine, typename A>
R2VPO_DEVICE Common common_of(Machine&, const A&) {
  return {};
}
template <typename Machine>
R2VPO_DEVICE Common common_of(Machine&, const LogpsBackward& a) {
  return {{}, 1.0f, a.upstream ? *a.upstream : 1.0f};
}
template <typename Machine>
R2VPO_DEVICE Common common_of(Machine& machine, const OnePass& a) {
  return {a.tokens.objective(), denominator_of(machine, a.tokens), 1.0f};
}

// Whether a launch has nothing to do.
R2VPO_DEVICE bool idle(const Scale& a) { return *a.upstream == 1.0f; }
template <typename A>
R2VPO_DEVICE bool idle(const A&) {
  return false;
}

// Eq. 14, a thread's part. Columns at the same place of a word share a chain of additions, which is
// then as long as the thread's words are many.
template <bool kEntropy, int kColumns>
struct Sums {
  float top = kLowest;
  float s[kColumns] = {}, r[kColumns] = {};

  template <typename Machine, int kCount>
  R2VPO_DEVICE void add(const float (&z)[kCount], float scale) {
    // The maximum loses a NaN, which the sum then takes.
    float highs[kCount];
    for (int i = 0; i < kCount; ++i) highs[i] = z[i];
    for (int half = kCount / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) highs[i] = Machine::larger(highs[i], highs[i + half]);
    }
    const float high = Machine::larger(top, highs[0]);
    if (high > top) {
      const float gap = (top - high) * scale;
      const float decay = Machine::exp2(gap);
      for (int i = 0; i < kColumns; ++i) {
        // As in `merged`.
        if (kEntropy) r[i] = decay == 0.0f ? 0.0f : Machine::fma(gap, s[i], r[i]) * decay;
        s[i] *= decay;
      }
      top = high;
    }
    for (int i = 0; i < kCount; ++i) {
      const float x = (z[i] - top) * scale;
      const float e = Machine::exp2(x);
      s[i % kColumns] += e;
      // Bounded where e is 0: -inf meets no 0·inf.
      if (kEntropy) {
        const float bounded = Machine::larger(x, kLowestExponent);
        r[i % kColumns] = Machine::fma(e, bounded, r[i % kColumns]);
      }
    }
  }

  R2VPO_DEVICE Part part(float z_label) const {
    float s_sum[kColumns], r_sum[kColumns];
    for (int i = 0; i < kColumns; ++i) {
      s_sum[i] = s[i];
      r_sum[i] = r[i];
    }
    for (int half = kColumns / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        s_sum[i] += s_sum[i + half];
        if (kEntropy) r_sum[i] += r_sum[i + half];
      }
    }
    return {top, s_sum[0], r_sum[0], z_label};
  }

  static constexpr float kLowestExponent = -150.0f;  // 2^x is 0 below
};

// The sum of the parts that `count` neighbouring lanes have, a power of two, in each of them and
// with the same bits.
template <bool kEntropy, typename Machine>
R2VPO_DEVICE Part merged(Machine& machine, Part part, int count, float scale) {
  float top = part.top;
  for (int step = 1; step < count; step *= 2) {
    top = Machine::larger(top, machine.shuffle_xor(top, step));
  }
  const float gap = (part.top - top) * scale;
  const float decay = Machine::exp2(gap);
  // decay = 0 stands for a factor whose product with an infinite gap is 0.
  if (kEntropy) part.r = decay == 0.0f ? 0.0f : Machine::fma(gap, part.s, part.r) * decay;
  part.s *= decay;
  part.top = top;
  for (int step = 1; step < count; step *= 2) {
    part.s += machine.shuffle_xor(part.s, step);
    if (kEntropy) part.r += machine.shuffle_xor(part.r, step);
  }
  return part;
}

// The sum of `count` parts in shared memory, a power of two of them; the label's logit is in the
// first.
template <bool kEntropy, typename Machine>
R2VPO_DEVICE Part gathered(Machine& machine, const Part* parts, int count, float scale) {
  Part part = merged<kEntropy>(machine, parts[machine.lane() % count], count, scale);
  part.z_label = parts[0].z_label;
  return part;
}

// The sum of the parts of all threads of a block. `round` counts the shares that went through here.
template <bool kEntropy, typename Machine>
R2VPO_DEVICE Part of_share(Machine& machine, Control<Machine>& control, Part part, unsigned round,
                           float scale) {
  // Two halves take turns: what a slow warp still reads is overwritten two shares later, and before
  // that all have met again.
  const unsigned turn = round % 2;
  part = merged<kEntropy>(machine, part, kWarpSize, scale);
  if (machine.lane() == 0) control.of_warps[turn][machine.warp()] = part;
  machine.sync_computing();
  return gathered<kEntropy>(machine, control.of_warps[turn], Machine::kWarps, scale);
}

// The sum of the parts of a cluster's blocks, each a share. `round` counts likewise.
template <bool kEntropy, typename Machine>
R2VPO_DEVICE Part of_row(Machine& machine, Control<Machine>& control, const Part& part,
                         unsigned round, float scale) {
  const unsigned turn = round % 2;
  auto& exchanged = control.exchanged[turn];
  if (machine.thread() == 0) machine.expect(exchanged, machine.cluster() * sizeof(Part));
  if (machine.thread() < machine.cluster()) {
    machine.send(part, control.of_blocks[turn][machine.rank()], exchanged, machine.thread());
  }
  machine.wait_sent(exchanged, round / 2 % 2);
  return gathered<kEntropy>(machine, control.of_blocks[turn], machine.cluster(), scale);
}

// Eq. 8 of one row: dL/dz from z.
template <bool kEntropy>
struct Slope {
  float scale, top, minus_log_total, minus_dlogp, minus_dentropy, entropy, at_label;

  template <typename Machine>
  R2VPO_DEVICE float of(float z) const {
    const float log2_p = Machine::fma(z - top, scale, minus_log_total);
    const float p = Machine::exp2(log2_p);
    if (!kEntropy) return p * minus_dlogp;
    // p·log p is 0 at p = 0, where log p is -inf (Eq. 12).
    const float bounded = Machine::larger(log2_p, Sums<kEntropy, 1>::kLowestExponent);
    const float slope = Machine::fma(minus_dentropy, Machine::fma(bounded, kLn2, entropy),
                                     minus_dlogp);
    return p * slope;
  }
};

struct Factor {
  float factor, at_label;

  template <typename Machine>
  R2VPO_DEVICE float of(float z) const {
    return z * factor;
  }
};

template <bool kEntropy>
R2VPO_DEVICE Slope<kEntropy> slope_of(const Look& look, float temperature, float dlogp,
                                      float dentropy) {
  dlogp /= temperature;
  dentropy /= temperature;
  const float at_label = label_slope(look.logp, look.entropy, dlogp, dentropy);
  return {kLog2E / temperature, look.top, -look.log_total, -dlogp, -dentropy, look.entropy,
          at_label};
}

// A thread of the warps that compute, on its way over the rows of its cluster.
template <typename Machine, typename T, bool kEntropy, int kHeld>
class Walker {
  static constexpr int kColumns = Place<T>::kColumns;
  static constexpr int kChunk = Machine::kChunk;
  static constexpr int kCount = Machine::kWords * kColumns;
  static constexpr int kComputing = Machine::kWarps * kWarpSize;

  Machine& machine_;
  Control<Machine>& control_;
  const Rows& rows_;
  const Support support_;
  const int first_word_, stages_, shares_;
  Cursor at_;    // the next chunk that comes
  Cursor kept_;  // the first that stays in the ring between the looks
  Word held_[kHeld + 1][Machine::kWords];
  Word nothing_;  // columns of -inf
  float at_edge_ = 0.0f;
  unsigned round_ = 0;  // shares that were summed

  // Of the columns that belong to no whole word each of the first threads has one at most.
  R2VPO_DEVICE int edge_of(const Place<T>& place) const {
    const int columns = static_cast<int>(rows_.vocabulary), thread = machine_.thread();
    if (place.share != 0) return -1;
    if (thread < place.head) return thread;
    const int past = thread - kColumns;
    return past >= 0 && past < columns - place.tail ? place.tail + past : -1;
  }

  // body(j, word) for each of this thread's words in a chunk, which is word `word` of the share.
  template <typename Body>
  R2VPO_DEVICE void for_each_word(const Place<T>& place, int chunk, Body body) const {
    R2VPO_UNROLL
    for (int j = 0; j < Machine::kWords; ++j) {
      const int word = chunk * kChunk + j * kComputing + machine_.thread();
      if (word < place.count) body(j, word);
    }
  }

  // Past the end of the share it finds -inf, which adds nothing to a sum.
  R2VPO_DEVICE void read(const Place<T>& place, int chunk, int stage,
                         Word (&words)[Machine::kWords]) const {
    const Word* const ring = machine_.ring() + stage * kChunk;
    R2VPO_UNROLL
    for (int j = 0; j < Machine::kWords; ++j) words[j] = nothing_;
    for_each_word(place, chunk, [&](int j, int word) {
      words[j] = machine_.read(ring + (word - chunk * kChunk));
    });
  }

  // After the last read of a stage.
  R2VPO_DEVICE void release(int stage) {
    machine_.sync_warp();
    if (machine_.lane() == 0) machine_.arrive(control_.empty[stage]);
  }

  R2VPO_DEVICE static void add(const Word (&words)[Machine::kWords], float scale,
                               Sums<kEntropy, kColumns>& sums) {
    float z[kCount];
    R2VPO_UNROLL
    for (int j = 0; j < Machine::kWords; ++j) {
      Machine::template unpack<T>(words[j], z + j * kColumns);
    }
    sums.template add<Machine>(z, scale);
  }

  template <typename Map>
  R2VPO_DEVICE void store(const Place<T>& place, int chunk, const Word (&words)[Machine::kWords],
                          const Map& map, int label) const {
    for_each_word(place, chunk, [&](int j, int word) {
      const int column = place.head + (place.first + word) * kColumns;
      float z[kColumns], dz[kColumns];
      Machine::template unpack<T>(words[j], z);
      R2VPO_UNROLL
      for (int i = 0; i < kColumns; ++i) dz[i] = map.template of<Machine>(z[i]);
      if (label >= column && label < column + kColumns) {
        R2VPO_UNROLL
        for (int i = 0; i < kColumns; ++i) {
          if (label == column + i) dz[i] = map.at_label;
        }
      }
      machine_.store(place.grad_row + column, Machine::template pack<T>(dz));
    });
  }

  // Whether a kept word is in the share: no branch here, so that loads of ids are in flight
  // together. Each word is in one share, compact or not.
  R2VPO_DEVICE bool owns(const Place<T>& place, int column) const {
    const int begin = place.head + place.first * kColumns, end = begin + place.count * kColumns;
    const bool at_edge = (column < place.head) | (column >= place.tail);
    return ((column >= begin) & (column < end)) | ((place.share == 0) & at_edge);
  }

  // body(at, columns) for this thread's words of a row's support, kColumns at a time, so that no
  // chain of additions is longer than in a row of the full vocabulary. The i-th has the mask's id
  // number at + i·kComputing; columns[i] is its column, or -1 where it is not in the share.
  template <typename Body>
  R2VPO_DEVICE void for_each_kept(const Place<T>& place, const Task& task, Body body) const {
    for (int k = machine_.thread(); k < task.count; k += kColumns * kComputing) {
      const int at = task.begin + k;
      int columns[kColumns];
      R2VPO_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const int j = i * kComputing;
        columns[i] = k + j < task.count ? support_.token_ids[at + j] - first_word_ : -1;
      }
      R2VPO_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        if (!((columns[i] >= 0) & owns(place, columns[i]))) columns[i] = -1;
      }
      body(at, columns);
    }
  }

  // x[i] = value(i) for each word of the share, else -inf.
  template <typename Value>
  R2VPO_DEVICE static void fill(float (&x)[kColumns], const int (&columns)[kColumns],
                                Value value) {
    R2VPO_UNROLL
    for (int i = 0; i < kColumns; ++i) x[i] = columns[i] < 0 ? -kInfinity : value(i);
  }

  R2VPO_DEVICE void read_values(int at, const int (&columns)[kColumns],
                                float (&x)[kColumns]) const {
    fill(x, columns, [&](int i) { return support_.values[at + i * kComputing]; });
  }

  R2VPO_DEVICE void read_kept(const Place<T>& place, int at, const int (&columns)[kColumns],
                              float (&z)[kColumns]) const {
    if (support_.compact) return read_values(at, columns, z);
    fill(z, columns, [&](int i) { return machine_.load_one(place.row + columns[i]); });
  }

  // A bad label, or one of another shard, reads nothing and makes logp NaN. `prepare` has seen that
  // any other is in its support.
  R2VPO_DEVICE float label_logit(const Place<T>& place, const Task& task) const {
    const float nan = __builtin_nanf("");
    if (!support_.compact) {
      return task.label < rows_.vocabulary ? machine_.load_one(place.row + task.label) : nan;
    }
    const int word = task.label + first_word_, end = task.begin + task.count;
    const std::int64_t at = first_at_least(support_.token_ids, task.begin, end, word);
    return at < end && support_.token_ids[at] == word ? support_.values[at] : nan;
  }

  template <typename Map>
  R2VPO_DEVICE void second_look_at_support(const Place<T>& place, const Map& map,
                                           const Task& task) const {
    for_each_kept(place, task, [&](int at, const int (&columns)[kColumns]) {
      float z[kColumns];
      read_kept(place, at, columns, z);
      R2VPO_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const float dz = columns[i] == task.label ? map.at_label : map.template of<Machine>(z[i]);
        if (columns[i] >= 0) support_.values[at + i * kComputing] = dz;
      }
    });
    if (support_.compact) return;
    // In place, this thread is about to overwrite what others read above.
    machine_.sync_computing();
    zero(place);
    machine_.sync_computing();
    for_each_kept(place, task, [&](int at, const int (&columns)[kColumns]) {
      float dz[kColumns];
      read_values(at, columns, dz);
      R2VPO_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        if (columns[i] >= 0) machine_.store_one(place.grad_row + columns[i], dz[i]);
      }
    });
  }

 public:
  R2VPO_DEVICE Walker(Machine& machine, Control<Machine>& control, const Rows& rows,
                      const Support& support, const Plan& plan)
      : machine_(machine), control_(control), rows_(rows), support_(support),
        first_word_(static_cast<int>(support.first_word)), stages_(plan.stages),
        shares_(plan.shares) {
    float z[kColumns];
    R2VPO_UNROLL
    for (int i = 0; i < kColumns; ++i) z[i] = -kInfinity;
    nothing_ = Machine::template pack<T>(z);
  }

  // A masked row's gradient. Compact values have no row.
  R2VPO_DEVICE void zero(const Place<T>& place) const {
    if (support_.compact) return;
    const int edge = edge_of(place);
    if (edge >= 0) machine_.store_one(place.grad_row + edge, 0.0f);
    const int chunks = (place.count + kChunk - 1) / kChunk;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      for_each_word(place, chunk, [&](int, int word) {
        machine_.store(place.grad_row + place.head + (place.first + word) * kColumns, Word{});
      });
    }
  }

  // The first of the shares that this block takes.
  R2VPO_DEVICE Place<T> place(std::int64_t row) const {
    return place_of<T>(rows_, row, machine_.rank(), shares_);
  }

  // The sums of this thread's part of a share that comes through the ring.
  template <typename A>
  R2VPO_DEVICE void add_loaded(const Place<T>& place, float scale,
                               Sums<kEntropy, kColumns>& sums) {
    const Schedule schedule = Schedule::of<A, kHeld>(place.count, stages_, kChunk);
    const int edge = edge_of(place);
    at_edge_ = edge < 0 ? -kInfinity : machine_.load_one(place.row + edge);
    Word words[Machine::kWords];
    const auto look = [&](int chunk, bool last) {
      machine_.wait(control_.full[at_.stage], at_.parity);
      read(place, chunk, at_.stage, words);
      if (last) release(at_.stage);
      add(words, scale, sums);
      at_.advance(stages_);
    };
    for (int chunk = 0; chunk < schedule.reload; ++chunk) look(chunk, true);
    R2VPO_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      if (h >= schedule.held) continue;
      look(schedule.reload + h, true);
      R2VPO_UNROLL
      for (int j = 0; j < Machine::kWords; ++j) held_[h][j] = words[j];
    }
    kept_ = at_;
    for (int chunk = schedule.reload + schedule.held; chunk < schedule.chunks; ++chunk) {
      look(chunk, false);
    }
    const float edges[1] = {at_edge_};
    sums.template add<Machine>(edges, scale);
  }

  // The sum of a share; `z_label` counts in the first.
  template <typename A>
  R2VPO_DEVICE Part summed(const Place<T>& place, const Task& task, float scale, float z_label) {
    Sums<kEntropy, kColumns> sums;
    if (task.has_support()) {
      for_each_kept(place, task, [&](int at, const int (&columns)[kColumns]) {
        float z[kColumns];
        read_kept(place, at, columns, z);
        sums.template add<Machine>(z, scale);
      });
    } else {
      add_loaded<A>(place, scale, sums);
    }
    return of_share<kEntropy>(machine_, control_, sums.part(z_label), round_++, scale);
  }

  template <typename A>
  R2VPO_DEVICE Look first_look(std::int64_t row, const Place<T>& first, const Task& task,
                               float temperature) {
    const float scale = kLog2E / temperature;
    // One thread reads it and hands it on: in place another will overwrite it.
    float z_label = __builtin_nanf("");
    if (machine_.speaks()) z_label = label_logit(first, task);
    Part all;
    if (Looks<A>::kSecond) {
      all = summed<A>(first, task, scale, z_label);
      if (machine_.cluster() > 1) {
        all = of_row<kEntropy>(machine_, control_, all, round_ - 1, scale);
      }
    } else {
      // A slow warp may still read these: they change only after the next row's first barrier.
      Part* const parts = control_.of_blocks[0];
      for (int share = 0; share < shares_; ++share) {
        all = summed<A>(place_of<T>(rows_, row, share, shares_), task, scale, z_label);
        if (machine_.thread() == 0) parts[share] = all;
      }
      if (shares_ > 1) {
        machine_.sync_computing();
        all = gathered<kEntropy>(machine_, parts, shares_, scale);
      }
    }
    const float log_total = log2f(all.s);
    const float logp = ((all.z_label - all.top) * scale - log_total) * kLn2;
    const float entropy = kEntropy ? (log_total - all.r / all.s) * kLn2 : 0.0f;
    return {logp, all.top, log_total, entropy};
  }

  template <typename A, typename Map>
  R2VPO_DEVICE void second_look(const Place<T>& place, const Map& map, const Task& task) {
    if (task.has_support()) return second_look_at_support(place, map, task);
    const Schedule schedule = Schedule::of<A, kHeld>(place.count, stages_, kChunk);
    const int column = task.label < rows_.vocabulary ? task.label : -1;
    const int edge = edge_of(place);
    if (edge >= 0) {
      const float z = Looks<A>::kFirst ? at_edge_ : machine_.load_one(place.row + edge);
      machine_.store_one(place.grad_row + edge,
                         edge == column ? map.at_label : map.template of<Machine>(z));
    }
    R2VPO_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      if (h < schedule.held) store(place, schedule.reload + h, held_[h], map, column);
    }
    Word words[Machine::kWords];
    for (int chunk = schedule.reload + schedule.held; chunk < schedule.chunks; ++chunk) {
      read(place, chunk, kept_.stage, words);
      release(kept_.stage);
      store(place, chunk, words, map, column);
      kept_.advance(stages_);
    }
    for (int chunk = 0; chunk < schedule.reload; ++chunk) {
      machine_.wait(control_.full[at_.stage], at_.parity);
      read(place, chunk, at_.stage, words);
      release(at_.stage);
      store(place, chunk, words, map, column);
      at_.advance(stages_);
    }
  }
};

// One row, by kernel.

template <bool kEntropy, typename T, typename Machine, typename W>
R2VPO_DEVICE void compute(Machine& machine, const LogpsForward& a, const Common&, std::int64_t row,
                          const Task& task, const Place<T>& place, W& walker) {
  const std::int64_t i = a.token(row);
  Look look = {};
  if (!task.is_masked()) {
    look = walker.template first_look<LogpsForward>(row, place, task, a.tokens.temperature(i));
  }
  if (!machine.speaks()) return;
  a.logps[i] = look.logp;
  a.top[i] = look.top;
  a.log_total[i] = look.log_total;
  if (kEntropy) a.entropy[i] = look.entropy;
}

template <bool kEntropy, typename T, typename Machine, typename W>
R2VPO_DEVICE void compute(Machine&, const LogpsBackward& a, const Common& common, std::int64_t row,
                          const Task& task, const Place<T>& place, W& walker) {
  if (task.is_masked()) return walker.zero(place);
  const std::int64_t i = a.token(row);
  const Look look = {a.logps[i], a.top[i], a.log_total[i], kEntropy ? a.entropy[i] : 0.0f};
  const float dlogp = a.grad_logps[i] * common.upstream;
  const float dentropy = kEntropy ? a.grad_entropy[i] * common.upstream : 0.0f;
  const auto slope = slope_of<kEntropy>(look, a.tokens.temperature(i), dlogp, dentropy);
  walker.template second_look<LogpsBackward>(place, slope, task);
}

template <bool kEntropy, typename T, typename Machine, typename W>
R2VPO_DEVICE void compute(Machine& machine, const OnePass& a, const Common& common,
                          std::int64_t row, const Task& task, const Place<T>& place, W& walker) {
  const std::int64_t i = a.token(row);
  Look look = {};
  if (task.is_masked()) {
    walker.zero(place);
  } else {
    const float temperature = a.tokens.temperature(i);
    look = walker.template first_look<OnePass>(row, place, task, temperature);
    const Token token = a.tokens.token(i, common.denominator);
    const float dlogp = loss_slope(common.objective, token, look.logp);
    const float dentropy = kEntropy ? entropy_slope(common.objective, token.weight) : 0.0f;
    const auto slope = slope_of<kEntropy>(look, temperature, dlogp, dentropy);
    walker.template second_look<OnePass>(place, slope, task);
  }
  if (!machine.speaks()) return;
  a.logps[i] = look.logp;
  if (kEntropy) a.entropy[i] = look.entropy;
}

template <bool kEntropy, typename T, typename Machine, typename W>
R2VPO_DEVICE void compute(Machine&, const Scale& a, const Common&, std::int64_t, const Task&,
                          const Place<T>& place, W& walker) {
  const Task no_label = {-1, 0, -1, false};
  walker.template second_look<Scale>(place, Factor{*a.upstream, 0.0f}, no_label);
}

// The loading warp: every chunk of every row, in the order in which the others read them.
template <typename Machine, typename T, typename A, bool kSupport, int kHeld>
R2VPO_DEVICE void load_rows(Machine& machine, Control<Machine>& control, const Rows& rows,
                            const A& a, const Plan& plan) {
  constexpr int kChunk = Machine::kChunk;
  const std::int64_t count = rows.batch * rows.length;
  Cursor at;
  for (std::int64_t row = machine.first_row(); row < count; row += machine.row_step()) {
    if (!task_of<kSupport>(a, row).is_loaded()) continue;
    for (int share = machine.rank(); share < plan.shares; share += machine.cluster()) {
      const Place<T> place = place_of<T>(rows, row, share, plan.shares);
      const Schedule schedule = Schedule::of<A, kHeld>(place.count, plan.stages, kChunk);
      const Word* const words =
          reinterpret_cast<const Word*>(place.row + place.head) + place.first;
      const int in_first = Looks<A>::kFirst ? schedule.chunks : 0;
      const int loads = in_first + (Looks<A>::kSecond ? schedule.reload : 0);
      for (int load = 0; load < loads; ++load) {
        const int begin = (load < in_first ? load : load - in_first) * kChunk;
        const int count = place.count - begin < kChunk ? place.count - begin : kChunk;
        // The first time round every stage is free.
        machine.wait(control.empty[at.stage], at.parity ^ 1);
        // A lane that came here later could miss that phase: the chunk may be read and freed by
        // then.
        machine.sync_warp();
        machine.load(machine.ring() + at.stage * kChunk, words + begin, count,
                     control.full[at.stage]);
        at.advance(plan.stages);
      }
    }
  }
}

// The computing warps: every row of their cluster.
template <typename Machine, typename T, typename A, bool kEntropy, bool kSupport, int kHeld>
R2VPO_DEVICE void compute_rows(Machine& machine, Control<Machine>& control, const Rows& rows,
                               const A& a, const Plan& plan) {
  Walker<Machine, T, kEntropy, kHeld> walker(machine, control, rows, support_of<kSupport>(a),
                                               plan);
  const Common common = common_of(machine, a);
  const std::int64_t count = rows.batch * rows.length, step = machine.row_step();
  Task task = task_of<kSupport>(a, machine.first_row());
  for (std::int64_t row = machine.first_row(); row < count; row += step) {
    // Ahead of the row that waits for it.
    const Task next = row + step < count ? task_of<kSupport>(a, row + step) : task;
    if (!task.is_left_out()) {
      compute<kEntropy>(machine, a, common, row, task, walker.place(row), walker);
    }
    task = next;
  }
}

// What each thread of a launch does. A launch has no more clusters than rows.
template <typename Machine, typename T, typename A, bool kEntropy, bool kSupport, int kHeld>
R2VPO_DEVICE void run(Machine& machine, const Rows& rows, const A& a, const Plan& plan) {
  if (idle(a)) return;
  auto& control = *static_cast<Control<Machine>*>(machine.control());
  if (machine.thread() == 0) {
    for (int stage = 0; stage < plan.stages; ++stage) {
      machine.start(control.full[stage], Machine::kLoaders);
      machine.start(control.empty[stage], Machine::kWarps);
    }
    for (auto& exchanged : control.exchanged) machine.start(exchanged, 1);
    machine.publish_starts();
  }
  machine.sync_cluster();
  if (machine.warp() == Machine::kWarps) {
    load_rows<Machine, T, A, kSupport, kHeld>(machine, control, rows, a, plan);
  } else {
    compute_rows<Machine, T, A, kEntropy, kSupport, kHeld>(machine, control, rows, a, plan);
  }
  // No block leaves while another may still write to its memory.
  machine.sync_cluster();
}

}  // namespace r2vpo
