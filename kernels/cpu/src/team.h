// How the steps of a run are shared out among OpenMP's threads, those that torch computes on, too:
// threads of our own would have to share the cores with them, which look for work for some 4 ms after
// each of torch's operations (ResNet-50 then takes 1.15 times as long, MobileNetV2 twice).
//
// All steps of a run are one parallel region. A step is cut into a range of pieces for each thread. A
// thread takes the pieces of its own range one after another and then what is left of the others', so
// that undisturbed each computes the same part of every layer, and what it reads next is in its
// cache. Within the region nobody waits for a thread that is not running: the caller computes what
// no helper takes, and waits at a step's end only for pieces that a helper is computing. Only at the
// region's end does OpenMP wait for all its threads.
//
// Which thread computes a piece makes no difference to the result.
#pragma once

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace team {

constexpr int MOST_THREADS = 256;

// Microseconds that a thread without work looks for some before it gives way to other processes at
// each look, and before it takes the last piece of another's range.
constexpr long LOOKS = 200, LAST_PIECE = 10;

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

// A step as it is shared out: piece `index` of range `range` of `ranges`. `step` is a number that no
// other step of the process has, `slot` says whose scratch memory it is: below `ranges`.
struct Piece {
  uint64_t step;
  long range, ranges, index;
  int slot;
};

// In a library that tests compile, pieces take as long as chance has it, or fail.
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
  virtual bool worth_sharing() const = 0;
  virtual long pieces(long range, long ranges) const = 0;  // at most MOST_PIECES
  virtual void compute(const Piece& piece) const = 0;

 protected:
  ~Work() = default;
};

constexpr long MOST_PIECES = (1 << 12) - 1;  // of a range

// Pieces [next, end) of a range that are still to be taken, the number of ranges, and the step they
// are of, in one word: a thread that has slept meanwhile cannot take a piece of another step.
struct alignas(64) Range {
  std::atomic<uint64_t> word{0};

  void open(uint64_t step, long ranges, long pieces) {
    word.store(step << 32 | static_cast<uint64_t>(ranges - 1) << 24 |
                   static_cast<uint64_t>(pieces) << 12,
               std::memory_order_release);
  }

  // Takes a piece, unless fewer than `least` are left or the thread has no scratch memory; -1: none.
  long take(int slot, long least) {
    uint64_t seen = word.load(std::memory_order_acquire);
    for (;;) {
      const long next = seen & MOST_PIECES, end = seen >> 12 & MOST_PIECES;
      const int ranges = static_cast<int>(seen >> 24 & 0xff) + 1;
      if (next + least > end || slot >= ranges) return -1;
      if (word.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
        return next;
      }
    }
  }
};

// A caller's step. What is no atomic changes only while no piece is being computed, so whoever has
// taken one may read it.
struct alignas(64) Job {
  std::atomic<bool> over{false};  // the caller has come to its last step's end
  std::atomic<int> ranges{0};
  const Work* work = nullptr;
  uint64_t step = 0;
  std::atomic<bool> failed{false};
  alignas(64) std::atomic<long> unfinished{0};  // pieces
  Range range[MOST_THREADS];

  // Computes what is there to be taken, beginning with the thread's own range; of the others' at
  // least `least` pieces must be left. Returns how many it computed.
  long help(int slot, long least) {
    const int of = ranges.load(std::memory_order_relaxed);
    long done = 0;
    for (int i = 0; i < of; i++) {
      const int at = (slot + i) % of;
      for (long index; (index = range[at].take(slot, i ? least : 1)) >= 0;) {
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

// Threads that compute for callers now; in a forked process OpenMP's others stayed behind.
static std::atomic<int> active{0};
static std::atomic<uint64_t> last_step{0};
static bool forked = false;
static const int watching = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  active.store(0);
});

static inline long next_step() { return last_step.fetch_add(1) + 1; }

static bool alone(const Work& work) {
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

// A single step: each thread computes its range. Handing over what is left of another's costs more
// than it saves where OpenMP waits for all threads right afterwards.
static bool by_ranges(const Work& work, int threads) {
  if (!work.worth_sharing()) return alone(work);
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

// Waits for pieces that a helper computes; those that nobody has taken, the caller computes.
static void await(Job& job) {
  const long start = now();
  for (long tries = 1; job.unfinished.load(std::memory_order_acquire) > 0; tries++) {
    pause();
    if (tries % 16) continue;
    const long waited = now() - start;
    if (waited >= LAST_PIECE) job.finish(job.help(0, 1));
    if (waited >= LOOKS) sched_yield();
  }
}

static bool share(Job& job, const Work& work, int threads) {
  if (!work.worth_sharing()) return alone(work);
  long pieces[MOST_THREADS], all = 0;
  for (int i = 0; i < threads; i++) all += pieces[i] = work.pieces(i, threads);
  job.work = &work;
  job.step = next_step();
  job.failed.store(false, std::memory_order_relaxed);
  job.ranges.store(threads, std::memory_order_relaxed);
  job.unfinished.store(all, std::memory_order_relaxed);
  for (int i = 0; i < threads; i++) job.range[i].open(job.step, threads, pieces[i]);
  job.finish(job.help(0, 2));
  await(job);
  return !job.failed.load(std::memory_order_relaxed);
}

// What the other threads do until the caller has come to its last step's end.
static void help(Job& job, int id) {
  long idle_since = now();
  for (long tries = 1; !job.over.load(std::memory_order_acquire); tries++) {
    const bool waited = tries % 64 == 0 && now() - idle_since >= LAST_PIECE;
    const bool open = job.unfinished.load(std::memory_order_acquire) > 0;
    const long done = open ? job.help(id, waited ? 1 : 2) : 0;
    if (done) {
      job.finish(done);
      idle_since = now();
      tries = 0;
    } else {
      pause();
      if (tries % 64 == 0 && now() - idle_since >= LOOKS) sched_yield();
    }
  }
}

// Computes the steps one after another on at most `threads` threads, fewer where other callers
// compute at the same time; false: a piece threw.
template <class Steps>
bool run(const Steps& steps, int threads) {
  threads = threads < MOST_THREADS ? threads : MOST_THREADS;
  const int others = active.fetch_add(1);
  const int room = forked ? 1 : threads - others;
  bool well = true;
  if (room < 2) {
    well = steps.each([](const Work& work) { return alone(work); });
  } else {
    active.fetch_add(room - 1);
    if (steps.is_one()) {
      well = steps.each([&](const Work& work) { return by_ranges(work, room); });
      active.fetch_sub(room);
      return well;
    }
    static thread_local Job own;
    Job& job = own;
    job.over.store(false, std::memory_order_relaxed);
#pragma omp parallel num_threads(room)
    if (const int id = omp_get_thread_num()) {
      help(job, id);
    } else {
      well = steps.each([&](const Work& work) { return share(job, work, room); });
      job.over.store(true, std::memory_order_release);
    }
    active.fetch_sub(room - 1);
  }
  active.fetch_sub(1);
  return well;
}

}  // namespace team
