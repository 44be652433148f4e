// Distributes the steps of a run over OpenMP's threads, with work stealing. These are also torch's
// threads: separate ones would compete for the cores with torch's, which spin for some 4 ms
// after each operation (ResNet-50 is then 1.15 times slower, MobileNetV2 twice as slow).
//
// All steps of a run are one parallel region. A step is divided into a range of pieces per thread.
// A thread computes the pieces of its own range in order and then steals what is left of the
// others', so that undisturbed it computes the same part of every layer, and what it reads next is
// in its cache. Within the region no thread waits for one that is not running: the caller computes
// what no helper takes, and waits at a step's end only for pieces that a helper is computing. Only
// at the region's end does OpenMP wait for all its threads.
//
// The result does not depend on which thread computes a piece.
#pragma once

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#include "base/dcheck.h"

namespace team {

constexpr int MAX_THREADS = 256;

// Microseconds for which a thread without work spins before it yields to other processes after each
// look, and before it steals the last piece of another thread's range.
constexpr long YIELD_AFTER_US = 200, STEAL_LAST_AFTER_US = 10;

static inline long now() {
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * 1000000L + at.tv_nsec / 1000;
}

static inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Piece `index` of range `range` of `ranges` of a step. `step` is a number that no other step of
// the process has; `slot`, which is below `ranges`, says whose scratch memory to use.
struct Piece {
  uint64_t step;
  long range, ranges, index;
  int slot;
};

// In a library that tests compile, pieces take a random time or fail.
#if defined(RESFUSE_DISTURBED)
static std::atomic<int> failing_slot{-1};

static void disturb(const Piece& piece) {
  uint64_t chance = piece.step * 1000003 + piece.range * 10007 + piece.index * 101 + piece.slot;
  chance = (chance ^ chance >> 7) * 0x9E3779B97F4A7C15u >> 48;
  if (chance % 3 == 0) usleep(chance % 512);
  if (failing_slot.load() == piece.slot) throw piece.slot;
}
#else
static inline void disturb(const Piece&) {}
#endif

class Work {
 public:
  virtual bool is_worth_sharing() const = 0;
  virtual long pieces(long range, long ranges) const = 0;  // at most MAX_PIECES
  virtual void compute(const Piece& piece) const = 0;

 protected:
  ~Work() = default;
};

constexpr long MAX_PIECES = (1 << 12) - 1;  // of a range

// The pieces [next, end) of a range that have not been taken, the number of ranges and the step,
// all in one word, so that a thread that has slept meanwhile cannot take a piece of another step.
struct alignas(64) PieceQueue {
  std::atomic<uint64_t> word{0};

  void open(uint64_t step, long ranges, long pieces) {
    DCHECK(0 < ranges && ranges <= MAX_THREADS && 0 <= pieces && pieces <= MAX_PIECES);
    word.store(step << 32 | static_cast<uint64_t>(ranges - 1) << 24 |
                   static_cast<uint64_t>(pieces) << 12,
               std::memory_order_release);
  }

  // Takes a piece and returns its index; -1 if fewer than `at_least` are left or the thread has no
  // scratch memory.
  long take(int slot, long at_least) {
    uint64_t seen = word.load(std::memory_order_acquire);
    for (;;) {
      const long next = seen & MAX_PIECES, end = seen >> 12 & MAX_PIECES;
      const int ranges = static_cast<int>(seen >> 24 & 0xff) + 1;
      if (next + at_least > end || slot >= ranges) return -1;
      if (word.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
        return next;
      }
    }
  }
};

// A caller's step. The members that are not atomic change only while no piece is being computed, so
// a thread that has taken one may read them.
struct alignas(64) Job {
  std::atomic<bool> finished{false};  // whether the caller has finished its last step
  std::atomic<int> ranges{0};
  const Work* work = nullptr;
  uint64_t step = 0;
  std::atomic<bool> failed{false};
  alignas(64) std::atomic<long> unfinished{0};  // pieces
  PieceQueue range[MAX_THREADS];

  // Computes pieces until none can be taken, beginning with the thread's own range; another range
  // must have at least `at_least` pieces left. Returns how many it computed.
  long help(int slot, long at_least) {
    const int of = ranges.load(std::memory_order_relaxed);
    long done = 0;
    for (int i = 0; i < of; i++) {
      const int at = (slot + i) % of;
      for (long index; (index = range[at].take(slot, i ? at_least : 1)) >= 0;) {
        try {
          const Piece piece{step, at, ranges.load(std::memory_order_relaxed), index, slot};
          disturb(piece);
          work->compute(piece);
        } catch (...) {
          failed.store(true, std::memory_order_relaxed);
        }
        done++;
      }
    }
    return done;
  }

  void finish(long pieces) { unfinished.fetch_sub(pieces, std::memory_order_acq_rel); }
};

// The threads that compute for callers now. A forked process has none of OpenMP's other threads.
static std::atomic<int> active{0};
static std::atomic<uint64_t> last_step{0};
static bool forked = false;
static const int registered = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  active.store(0);
});

static inline long next_step() { return last_step.fetch_add(1) + 1; }

static bool run_serial(const Work& work) {
  const uint64_t step = next_step();
  const long pieces = work.pieces(0, 1);
  try {
    for (long i = 0; i < pieces; i++) {
      disturb({step, 0, 1, i, 0});
      work.compute({step, 0, 1, i, 0});
    }
  } catch (...) {
    return false;
  }
  return true;
}

// Runs a single step, of which each thread computes its own range: stealing costs more than it
// saves where OpenMP waits for all threads right afterwards.
static bool run_by_ranges(const Work& work, int threads) {
  if (!work.is_worth_sharing()) return run_serial(work);
  std::atomic<bool> failed{false};
  const uint64_t step = next_step();
#pragma omp parallel num_threads(threads)
  try {
    const int range = omp_get_thread_num(), ranges = omp_get_num_threads();
    const long pieces = work.pieces(range, ranges);
    for (long i = 0; i < pieces; i++) {
      disturb({step, range, ranges, i, range});
      work.compute({step, range, ranges, i, range});
    }
  } catch (...) {
    failed.store(true, std::memory_order_relaxed);
  }
  return !failed.load();
}

// Computes the pieces that no helper has taken, and waits for those that helpers compute.
static void wait_for_helpers(Job& job) {
  const long start = now();
  for (long tries = 1; job.unfinished.load(std::memory_order_acquire) > 0; tries++) {
    pause();
    if (tries % 16) continue;
    const long waited = now() - start;
    if (waited >= STEAL_LAST_AFTER_US) job.finish(job.help(0, 1));
    if (waited >= YIELD_AFTER_US) sched_yield();
  }
}

static bool run_shared(Job& job, const Work& work, int threads) {
  if (!work.is_worth_sharing()) return run_serial(work);
  long pieces[MAX_THREADS], all = 0;
  for (int i = 0; i < threads; i++) all += pieces[i] = work.pieces(i, threads);
  job.work = &work;
  job.step = next_step();
  job.failed.store(false, std::memory_order_relaxed);
  job.ranges.store(threads, std::memory_order_relaxed);
  job.unfinished.store(all, std::memory_order_relaxed);
  for (int i = 0; i < threads; i++) job.range[i].open(job.step, threads, pieces[i]);
  job.finish(job.help(0, 2));
  wait_for_helpers(job);
  return !job.failed.load(std::memory_order_relaxed);
}

// Computes pieces of the caller's steps until the last is finished, in a thread other than the
// caller's.
static void help(Job& job, int id) {
  long idle_since = now();
  for (long tries = 1; !job.finished.load(std::memory_order_acquire); tries++) {
    const bool waited = tries % 64 == 0 && now() - idle_since >= STEAL_LAST_AFTER_US;
    const bool open = job.unfinished.load(std::memory_order_acquire) > 0;
    const long done = open ? job.help(id, waited ? 1 : 2) : 0;
    if (done) {
      job.finish(done);
      idle_since = now();
      tries = 0;
    } else {
      pause();
      if (tries % 64 == 0 && now() - idle_since >= YIELD_AFTER_US) sched_yield();
    }
  }
}

// Runs the steps one after another on at most `threads` threads, fewer where other callers compute
// at the same time. Returns whether no piece threw.
template <class Steps>
bool run(const Steps& steps, int threads) {
  threads = threads < MAX_THREADS ? threads : MAX_THREADS;
  const int others = active.fetch_add(1);
  const int count = forked ? 1 : threads - others;
  bool well = true;
  if (count < 2) {
    well = steps.each([](const Work& work) { return run_serial(work); });
  } else {
    active.fetch_add(count - 1);
    if (steps.is_one()) {
      well = steps.each([&](const Work& work) { return run_by_ranges(work, count); });
      active.fetch_sub(count);
      return well;
    }
    static thread_local Job own;
    Job& job = own;
    job.finished.store(false, std::memory_order_relaxed);
#pragma omp parallel num_threads(count)
    if (const int id = omp_get_thread_num()) {
      help(job, id);
    } else {
      well = steps.each([&](const Work& work) { return run_shared(job, work, count); });
      job.finished.store(true, std::memory_order_release);
    }
    active.fetch_sub(count - 1);
  }
  active.fetch_sub(1);
  return well;
}

}  // namespace team
