// A GPU for csrc/cuda/rows.h and tokens.h on a CPU: threads take turns in an order drawn at random,
// copies arrive late and in another order than they were asked for, and what has not arrived is
// NaN. One warp at a time is so slow, and one copy, that the others come a row or two ahead
// wherever nothing stops them.
//
// A switch from one thread to another happens where threads meet, and now and then elsewhere. What
// would be undefined on a GPU ends the launch with an error: a deadlock, a word of the ring that is
// read before it arrived, a store to memory that a copy still reads. What a block puts into memory
// for another one is there after a fence, and not before.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../../../csrc/cpu/vector.h"
#include "../../../csrc/cuda/rows.h"
#include "../../../csrc/cuda/head.h"
#include "../../../csrc/cuda/tokens.h"

namespace r2vpo {

// Where `needed` threads meet.
struct Meeting {
  int needed = 0, came = 0;
  std::vector<int> waiting;
};

// Threads that one of them at a time runs, each on a stack of its own.
class Scheduler {
  static constexpr int kStack = 64 * 1024;
  // Steps until another warp is slow.
  static constexpr int kChange = 4096;

  struct Fiber {
    jmp_buf at;
    ucontext_t first;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool begun = false;
  };

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> runnable_;
  std::vector<std::function<void()>> bodies_;
  jmp_buf outside_;
  int current_ = -1, alive_ = 0, slow_ = 0;

  static Scheduler*& self() {
    static thread_local Scheduler* scheduler = nullptr;
    return scheduler;
  }

  static void begin() {
    Scheduler& s = *self();
    s.bodies_[s.current_]();
    --s.alive_;
    _longjmp(s.outside_, 1);
  }

  void resume(int fiber) {
    current_ = fiber;
    if (_setjmp(outside_) != 0) return;
    Fiber& f = *fibers_[fiber];
    if (f.begun) _longjmp(f.at, 1);
    f.begun = true;
    getcontext(&f.first);
    f.first.uc_stack.ss_sp = f.stack.get();
    f.first.uc_stack.ss_size = kStack;
    f.first.uc_link = nullptr;
    makecontext(&f.first, &Scheduler::begin, 0);
    setcontext(&f.first);
  }

  // One of some, not among the first `but`.
  template <typename Items>
  auto take(Items& items, int but = 0) {
    const int i = but + draw(static_cast<int>(items.size()) - but);
    std::swap(items[i], items.back());
    const auto item = std::move(items.back());
    items.pop_back();
    return item;
  }

  // A thread of another warp than the slow one, unless none is found.
  int take_fast() {
    for (int tries = 0; tries < 64; ++tries) {
      const int fiber = take(runnable_);
      if (fiber / kWarpSize != slow_) return fiber;
      runnable_.push_back(fiber);
    }
    return take(runnable_);
  }

  void leave() {
    if (_setjmp(fibers_[current_]->at) == 0) _longjmp(outside_, 1);
  }

 public:
  std::mt19937 random;
  std::string error;
  // Copies on their way; each does its work when it is called.
  std::vector<std::pair<std::function<void()>, std::pair<const char*, int>>> copies;

  // By what they wait for.
  std::unordered_map<const void*, std::vector<int>> waiting;

  explicit Scheduler(unsigned seed) : random(seed) { self() = this; }

  int draw(int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); }

  void add(std::function<void()> body) {
    fibers_.push_back(std::make_unique<Fiber>());
    bodies_.push_back(std::move(body));
    runnable_.push_back(static_cast<int>(fibers_.size()) - 1);
    ++alive_;
  }

  void run() {
    while (alive_ > 0 && error.empty()) {
      if (draw(kChange) == 0) slow_ = draw(static_cast<int>(fibers_.size()) / kWarpSize);
      if (runnable_.empty() && copies.empty()) {
        error = "deadlock: every thread waits";
      } else if (runnable_.empty() || (copies.size() > 1 && draw(16) == 0) ||
                 (!copies.empty() && draw(kChange) == 0)) {
        take(copies, copies.size() > 1 && draw(kChange) != 0 ? 1 : 0).first();
      } else {
        resume(take_fast());
      }
    }
    if (error.empty() && !copies.empty()) error = "a copy arrives after the end";
    if (!error.empty()) throw std::runtime_error("emulator: " + error);
  }

  // By a thread: others run, and it goes on when it was woken, or in its turn.
  void sleep(std::vector<int>& waiting) {
    waiting.push_back(current_);
    leave();
  }
  void wake(std::vector<int>& waiting) {
    runnable_.insert(runnable_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }
  void yield() {
    runnable_.push_back(current_);
    leave();
  }
  void maybe_yield() {
    if (draw(64) == 0) yield();
  }
  void meet(Meeting& meeting) {
    if (++meeting.came < meeting.needed) return sleep(meeting.waiting);
    meeting.came = 0;
    wake(meeting.waiting);
  }
  void fail(const std::string& message) {
    error = message;
    leave();
  }
};

// Bytes from `address` that were read from or written to the rows.
using Tally = std::vector<std::pair<std::uintptr_t, int>>;

struct Cluster;

struct Block {
  Cluster* cluster;
  int rank;
  std::vector<unsigned char> control;
  std::vector<Word> ring;
  std::vector<char> arrived;  // of each word of the ring
  std::vector<Meeting> warps;
  std::vector<double> exchange;  // a number per thread
  Meeting computing;
};

struct Cluster {
  Scheduler scheduler;
  std::vector<Block> blocks;
  Meeting everyone;
  int index, of;
  Tally *reads, *writes;  // null where nobody counts

  Cluster(unsigned seed) : scheduler(seed) {}
};

// kBulk: as from sm_90 on, where one lane asks for a chunk; before, each asks for its words.
template <bool kBulk>
class Emulated {
  Block& block_;
  Cluster& cluster_;
  const int thread_;

  void meet(Meeting& meeting) { scheduler().meet(meeting); }
  Scheduler& scheduler() const { return cluster_.scheduler; }

  void count(Tally* tally, const void* address, int bytes) const {
    if (tally) tally->emplace_back(reinterpret_cast<std::uintptr_t>(address), bytes);
  }

  void check_store(const void* to, int bytes) const {
    const char* const begin = static_cast<const char*>(to);
    for (const auto& copy : scheduler().copies) {
      const auto& [from, length] = copy.second;
      if (begin < from + length && from < begin + bytes) {
        scheduler().fail("a store to what a copy still reads");
      }
    }
  }

 public:
  static constexpr int kWarps = 2, kWords = 2;
  static constexpr int kLoaders = kBulk ? 1 : kWarpSize;
  static constexpr int kChunk = kWarps * kWarpSize * kWords;
  static constexpr int kThreads = (kWarps + 1) * kWarpSize;

  struct Barrier {
    int arrivals = -1, pending = 0;
    long bytes = 0;
    unsigned phase = 0;
  };

  Emulated(Block& block, int thread) : block_(block), cluster_(*block.cluster), thread_(thread) {}

  int thread() const { return thread_; }
  int lane() const { return thread_ % kWarpSize; }
  int warp() const { return thread_ / kWarpSize; }
  int cluster() const { return static_cast<int>(cluster_.blocks.size()); }
  int rank() const { return block_.rank; }
  bool speaks() const { return thread_ == 0 && block_.rank == 0; }
  int first_row() const { return cluster_.index; }
  int row_step() const { return cluster_.of; }

  // As wrong as a GPU's may be: 2 ulp, and exact for whole numbers; what is not normal is 0.
  static float exp2(float x) {
    const float y = std::exp2(x);
    if (y < 0x1p-126f) return 0.0f;
    if (x == std::floor(x)) return y;
    std::uint32_t hash;
    std::memcpy(&hash, &x, sizeof(hash));
    hash = (hash * 2654435761u) >> 16;
    return y * (1.0f + (static_cast<int>(hash % 3) - 1) * 0x1p-23f);
  }
  static float fma(float a, float b, float c) { return std::fma(a, b, c); }
  static float larger(float a, float b) { return std::fmax(a, b); }

  template <typename T>
  static void unpack(const Word& word, float* z) {
    constexpr int kColumns = sizeof(Word) / sizeof(T);
    T columns[kColumns];
    std::memcpy(columns, &word, sizeof(word));
    for (int i = 0; i < kColumns; ++i) z[i] = load_part(columns + i, 1).first[0];
  }
  template <typename T>
  static Word pack(const float* z) {
    constexpr int kColumns = sizeof(Word) / sizeof(T);
    T columns[kColumns];
    for (int i = 0; i < kColumns; ++i) narrow(columns + i, z[i]);
    Word word;
    std::memcpy(&word, columns, sizeof(word));
    return word;
  }
  template <typename T>
  static void narrow(T* to, float z) {
    const Floats all = z - Floats{};
    store_part(to, {all, all}, 1);
  }

  void* control() const { return block_.control.data(); }
  Word* ring() const { return block_.ring.data(); }
  Word read(const Word* from) const {
    scheduler().maybe_yield();
    if (!block_.arrived[from - ring()]) scheduler().fail("a word is read before it arrived");
    return *from;
  }
  void store(void* to, const Word& word) const {
    check_store(to, sizeof(word));
    count(cluster_.writes, to, sizeof(word));
    std::memcpy(to, &word, sizeof(word));
  }
  template <typename T>
  float load_one(const T* from) const {
    count(cluster_.reads, from, sizeof(T));
    return load_part(from, 1).first[0];
  }
  template <typename T>
  void store_one(T* to, float z) const {
    check_store(to, sizeof(T));
    count(cluster_.writes, to, sizeof(T));
    narrow(to, z);
  }

  template <typename N>
  N shuffle_xor(N x, int step) {
    block_.exchange[thread_] = x;
    sync_warp();
    const N y = static_cast<N>(block_.exchange[thread_ ^ step]);
    sync_warp();
    return y;
  }
  void sync_warp() { meet(block_.warps[warp()]); }
  void sync_computing() { meet(block_.computing); }
  void sync_cluster() { meet(cluster_.everyone); }

  void start(Barrier& barrier, int arrivals) const {
    barrier = {arrivals, arrivals, 0, 0};
  }
  void publish_starts() const {}
  void arrive(Barrier& barrier) const {
    scheduler().maybe_yield();
    if (barrier.pending == 0) scheduler().fail("a barrier is arrived at too often");
    --barrier.pending;
    complete(barrier);
  }
  void wait(Barrier& barrier, unsigned parity) const {
    scheduler().maybe_yield();
    while (barrier.phase % 2 == parity) scheduler().sleep(scheduler().waiting[&barrier]);
  }
  void wait_sent(Barrier& barrier, unsigned parity) const { wait(barrier, parity); }
  void complete(Barrier& barrier) const {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    scheduler().wake(scheduler().waiting[&barrier]);
  }
  void expect(Barrier& barrier, unsigned bytes) const {
    barrier.bytes += bytes;
    arrive(barrier);
  }

  void load(Word* to, const Word* from, int count, Barrier& barrier) {
    if (kBulk) {
      if (lane() == 0) {
        expect(barrier, count * sizeof(Word));
        copy(to, from, count, [this, &barrier, count] {
          barrier.bytes -= count * sizeof(Word);
          complete(barrier);
        });
      }
      sync_warp();
      return;
    }
    // A lane's words arrive one by one; its share of the barrier with the last.
    auto left = std::make_shared<int>(1);
    const auto one_less = [this, &barrier, left] {
      if (--*left > 0) return;
      --barrier.pending;
      complete(barrier);
    };
    for (int word = lane(); word < count; word += kWarpSize) {
      ++*left;
      copy(to + word, from + word, 1, one_less);
    }
    scheduler().copies.push_back({one_less, {nullptr, 0}});
  }

  // From the request on the old words are gone.
  void copy(Word* to, const Word* from, int count, std::function<void()> then) {
    if (reinterpret_cast<std::uintptr_t>(from) % sizeof(Word) != 0) {
      scheduler().fail("a copy from what is not a whole word");
    }
    std::memset(to, 0xff, count * sizeof(Word));
    std::memset(block_.arrived.data() + (to - ring()), 0, count);
    const auto work = [this, to, from, count, then] {
      std::memcpy(to, from, count * sizeof(Word));
      std::memset(block_.arrived.data() + (to - ring()), 1, count);
      this->count(cluster_.reads, from, count * sizeof(Word));
      then();
    };
    const int bytes = count * static_cast<int>(sizeof(Word));
    scheduler().copies.push_back({work, {reinterpret_cast<const char*>(from), bytes}});
  }

  void send(const Part& part, Part& to, Barrier& barrier, int rank) {
    Block& other = cluster_.blocks[rank];
    const auto there = [&](void* here) {
      const auto offset = static_cast<unsigned char*>(here) - block_.control.data();
      return other.control.data() + offset;
    };
    Part* const target = reinterpret_cast<Part*>(there(&to));
    Barrier* const counted = reinterpret_cast<Barrier*>(there(&barrier));
    const auto work = [this, part, target, counted] {
      *target = part;
      counted->bytes -= sizeof(Part);
      complete(*counted);
    };
    scheduler().copies.push_back({work, {nullptr, 0}});
  }
};

// The blocks of a launch of tokens.h, all at once.
struct Grid {
  struct Block {
    std::vector<Meeting> warps;
    Meeting everyone;
    std::vector<double> exchange, shared;
  };

  Scheduler scheduler;
  std::vector<Block> blocks;

  explicit Grid(unsigned seed) : scheduler(seed) {}
};

class EmulatedTokens {
  Grid& grid_;
  Grid::Block& block_;
  const int index_, thread_;
  std::vector<std::pair<double*, double>> put_;  // and not yet there

 public:
  static constexpr int kWarps = 2, kThreads = kWarps * kWarpSize, kMostBlocks = 4;
  static constexpr std::int64_t kGroupWork = 512;

  EmulatedTokens(Grid& grid, int block, int thread)
      : grid_(grid), block_(grid.blocks[block]), index_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int lane() const { return thread_ % kWarpSize; }
  int warp() const { return thread_ / kWarpSize; }
  int block() const { return index_; }
  int blocks() const { return static_cast<int>(grid_.blocks.size()); }

  double* shared() const {
    grid_.scheduler.maybe_yield();
    return block_.shared.data();
  }
  template <typename N>
  N shuffle_xor(N x, int step) {
    Meeting& lanes = block_.warps[warp()];
    block_.exchange[thread_] = x;
    grid_.scheduler.meet(lanes);
    const N y = static_cast<N>(block_.exchange[thread_ ^ step]);
    grid_.scheduler.meet(lanes);
    return y;
  }
  template <typename N>
  N shuffle(N x, int lane) {
    Meeting& lanes = block_.warps[warp()];
    block_.exchange[thread_] = x;
    grid_.scheduler.meet(lanes);
    const N y = static_cast<N>(block_.exchange[warp() * kWarpSize + lane]);
    grid_.scheduler.meet(lanes);
    return y;
  }
  void sync_block() { grid_.scheduler.meet(block_.everyone); }

  void put(double* to, double x) { put_.emplace_back(to, x); }
  double fetched(const double* from) const { return *from; }
  int increment(std::int32_t* to) const {
    grid_.scheduler.maybe_yield();
    return (*to)++;
  }
  void fence() {
    // Some stores take so long that other blocks end meanwhile, where nothing makes them wait.
    const int steps = grid_.scheduler.draw(kThreads / 2) == 0 ? 512 : 1;
    for (int step = 0; step < steps; ++step) grid_.scheduler.yield();
    for (const auto& [to, x] : put_) *to = x;
    put_.clear();
  }
};

}  // namespace r2vpo
