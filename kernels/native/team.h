// The threads that compute steps: one team for the whole process.
//
// A step is cut into a range of pieces for each thread. A thread takes the pieces of its own range
// one after another and then what is left of the others', so that undisturbed each computes the
// same part of every layer, and what it reads next is in its cache. Nobody waits for a thread that
// has not begun: the caller computes what no helper takes, and waits at a step's end only for pieces
// that a helper is computing.
//
// Which thread computes a piece makes no difference to the result.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <time.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <new>

#include "openmp.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace team {

constexpr int MOST_THREADS = 256;
constexpr int MOST_JOBS = 32;  // callers with helpers at a time; others compute alone

// Microseconds that a thread without work looks for some before it sleeps: a helper, a caller whose
// step a helper still computes, and either before it takes the last piece of another's range.
constexpr long HELPER_LOOKS = 200, CALLER_LOOKS = 200, LAST_PIECE = 10;

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

// Sleeps while `word` is `value`; may also return earlier.
static void sleep_on(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  word.wait(value);
#endif
}

static void wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  word.notify_all();
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
  std::atomic<bool> taken{false};  // by a caller
  std::atomic<int> ranges{0};
  const Work* work = nullptr;
  uint64_t step = 0;
  std::atomic<bool> failed{false};
  alignas(64) std::atomic<long> unfinished{0};  // pieces
  std::atomic<uint32_t> awaited{0};             // the caller sleeps until there are none
  Range range[MOST_THREADS];

  // Computes what is there to be taken, beginning with the thread's own range; of the others' at
  // least `least` pieces must be left. Returns how many it computed.
  template <class Leave>
  long help(int slot, long least, const Leave& leave) {
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
        if (leave()) return done;
      }
    }
    return done;
  }

  void finish(long pieces) {
    if (unfinished.fetch_sub(pieces) == pieces && awaited.exchange(0)) wake(awaited);
  }
};

struct Helper {
  alignas(64) std::atomic<uint32_t> asleep{0};
  int id = 0;
};

class Team;
static Team* here;

class Team {
 public:
  explicit Team(uint64_t steps) : steps_(steps) {}

  uint64_t steps() const { return steps_.load(); }

  // Computes the steps one after another on at most `threads` threads; false: a piece threw.
  template <class Steps>
  bool run(const Steps& steps, int threads) {
    threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    active_.fetch_add(1);
    Job* const job = threads > 1 ? take() : nullptr;
    if (job) grow(threads - 1);
    const bool well = job ? steps.each([&](const Work& work) { return share(*job, work, threads); })
                          : steps.each([&](const Work& work) { return alone(work); });
    active_.fetch_sub(1);
    if (job) job->taken.store(false, std::memory_order_release);
    return well;
  }

 private:
  bool alone(const Work& work) {
    const uint64_t step = steps_.fetch_add(1) + 1;
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

  bool share(Job& job, const Work& work, int threads) {
    if (!work.worth_sharing()) return alone(work);
    long pieces[MOST_THREADS], all = 0;
    for (int i = 0; i < threads; i++) all += pieces[i] = work.pieces(i, threads);
    job.work = &work;
    job.step = steps_.fetch_add(1) + 1;
    job.failed.store(false, std::memory_order_relaxed);
    job.ranges.store(threads, std::memory_order_relaxed);
    job.unfinished.store(all, std::memory_order_relaxed);
    for (int i = 0; i < threads; i++) job.range[i].open(job.step, threads, pieces[i]);
    news_.fetch_add(1);
    if (sleeping_.load() > 0) rouse(threads);
    const auto never = [] { return false; };
    job.finish(job.help(0, 2, never));
    await(job, never);
    return !job.failed.load(std::memory_order_relaxed);
  }

  // Until all pieces are computed; those that nobody takes, by the caller.
  template <class Stay>
  void await(Job& job, const Stay& stay) {
    const long start = now();
    for (long tries = 0; job.unfinished.load(std::memory_order_acquire) > 0; tries++) {
      pause();
      if (tries % 16) continue;
      const long waited = now() - start;
      if (waited >= LAST_PIECE) {
        if (const long done = job.help(0, 1, stay)) job.finish(done);
      }
      if (waited >= CALLER_LOOKS) {
        job.awaited.store(1);
        if (job.unfinished.load() > 0) sleep_on(job.awaited, 1);
        job.awaited.store(0);
      }
    }
  }

  Job* take() {
    for (int i = 0; i < MOST_JOBS; i++) {
      bool free = false;
      if (jobs_[i].taken.compare_exchange_strong(free, true)) {
        int known = used_.load();
        while (known < i + 1 && !used_.compare_exchange_weak(known, i + 1)) {}
        return &jobs_[i];
      }
    }
    return nullptr;
  }

  // Wakes helpers that sleep, as far as there is room for them beside those that compute.
  void rouse(int threads) {
    int room = threads - active_.load();
    for (int id = 1; id < threads && room > 0; id++) {
      uint32_t asleep = 1;
      if (helpers_[id].asleep.compare_exchange_strong(asleep, 0)) {
        sleeping_.fetch_sub(1);
        wake(helpers_[id].asleep);
        room--;
      }
    }
  }

  void grow(int helpers) {
    if (spawned_.load(std::memory_order_acquire) >= helpers || growing_.exchange(true)) return;
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);  // signals are Python's
    if (!spawned_.load()) openmp::let_sleep();
    while (spawned_.load() < helpers && spawn()) {}
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    growing_.store(false);
  }

  // Without a further thread, those that there are do the work.
  bool spawn() {
    const int id = spawned_.load() + 1;
    helpers_[id].id = id;
    pthread_t thread;
    const auto begin = [](void* helper) -> void* { here->help(static_cast<Helper*>(helper)->id); };
    if (pthread_create(&thread, nullptr, begin, &helpers_[id])) return false;
    pthread_detach(thread);
    spawned_.store(id, std::memory_order_release);
    return true;
  }

  [[noreturn]] void help(int id) {
    long idle_since = now();
    for (long tries = 0;; tries++) {
      const uint32_t news = news_.load();
      bool worked = false;
      const long least = tries % 64 == 63 && now() - idle_since >= LAST_PIECE ? 1 : 2;
      for (int i = 0, used = used_.load(std::memory_order_acquire); i < used; i++) {
        worked |= help(jobs_[i], id, least);
      }
      if (worked) {
        idle_since = now();
        tries = 0;
      } else {
        pause();
        if (tries % 64 == 63 && now() - idle_since >= HELPER_LOOKS) {
          sleep(id, news);
          idle_since = now();
          tries = 0;
        }
      }
    }
  }

  bool help(Job& job, int id, long least) {
    const int threads = job.ranges.load(std::memory_order_relaxed);
    if (id >= threads || job.unfinished.load(std::memory_order_relaxed) <= 0) return false;
    const auto crowded = [&] { return active_.load(std::memory_order_relaxed) > threads; };
    active_.fetch_add(1);
    const long done = crowded() ? 0 : job.help(id, least, crowded);
    if (done) job.finish(done);
    active_.fetch_sub(1);
    return done > 0;
  }

  // Until there is news later than `news`.
  void sleep(int id, uint32_t news) {
    std::atomic<uint32_t>& asleep = helpers_[id].asleep;
    asleep.store(1);
    sleeping_.fetch_add(1);
    if (news_.load() == news) {
      while (asleep.load() == 1) sleep_on(asleep, 1);
      return;  // whoever woke it has counted it
    }
    uint32_t still = 1;
    if (asleep.compare_exchange_strong(still, 0)) sleeping_.fetch_sub(1);
  }

  alignas(64) std::atomic<uint32_t> news_{0};    // steps that were opened
  alignas(64) std::atomic<uint64_t> steps_;      // and those of callers without helpers
  alignas(64) std::atomic<int> active_{0};       // callers, and helpers that compute
  alignas(64) std::atomic<int> sleeping_{0};     // helpers
  std::atomic<int> spawned_{0}, used_{0};        // helpers; jobs [0, used_)
  std::atomic<bool> growing_{false};
  Job jobs_[MOST_JOBS];
  Helper helpers_[MOST_THREADS];
};

// Never destroyed, as its helpers run to the end of the process. A forked process has none of its
// parent's threads, and makes a team of its own.
alignas(Team) static unsigned char memory[sizeof(Team)];
static const int watching = [] {
  here = new (memory) Team(0);
  return pthread_atfork(nullptr, nullptr, [] { here = new (memory) Team(here->steps()); });
}();

}  // namespace team
