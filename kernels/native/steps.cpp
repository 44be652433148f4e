// Runs the steps of a network one after another, each on all threads, within one call.
#include <omp.h>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "affine.h"
#include "chain.h"
#include "digest.h"
#include "direct.h"
#include "grouped.h"
#include "pool.h"
#include "step.h"
#include "strips.h"
#include "winograd.h"

static void run_part(const Step& step, long t, long threads) {
  if (step.joined) {
    return (&step)[1].rows ? strips(&step, t, threads) : chain(&step, t, threads);
  }
  switch (step.kind) {
    case DIRECT: direct(step, t, threads); break;
    case WINOGRAD:
    case WINOGRAD_INLINE: winograd(step, t, threads); break;
    case GROUPED: grouped(step, t, threads); break;
    case MAX_POOL: max_pool(step, t, threads); break;
    case MEAN: mean(step, t, threads); break;
    case AFFINE: affine(step, t, threads); break;
    case AVERAGE_POOL: average_pool(step, t, threads); break;
    case PICK: pick(step, t, threads); break;
  }
}

// A forked process has none of its parent's threads, and OpenMP would wait for them for ever: its
// steps run on the thread that calls. (They part themselves by the threads there are.)
static bool forked = false;
#if defined(__unix__) || defined(__APPLE__)
static const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

extern "C" void resfuse_run(const Step* steps, long count, long threads) {
#pragma omp parallel num_threads(forked ? 1 : threads)
  {
    const long t = omp_get_thread_num(), of = omp_get_num_threads();
    for (long i = 0; i < count; i += 1 + steps[i].joined) {
      run_part(steps[i], t, of);
#pragma omp barrier
    }
  }
}

extern "C" void resfuse_digest(Watched* parts, long count) {
  for (long i = 0; i < count; ++i) parts[i].digest = digest_of(parts[i]);
}

// Whether parts [0, always) and [from, to) have the digests they had.
extern "C" long resfuse_unchanged(const Watched* parts, long always, long from, long to) {
  for (long i = 0; i < always; ++i) {
    if (digest_of(parts[i]) != parts[i].digest) return 0;
  }
  for (long i = from; i < to; ++i) {
    if (digest_of(parts[i]) != parts[i].digest) return 0;
  }
  return 1;
}

// What Python must know to lay memory out.
extern "C" long resfuse_lanes() { return LANES; }
extern "C" long resfuse_panel() { return PANEL; }
extern "C" long resfuse_pixels() { return PIXELS; }
extern "C" long resfuse_step_bytes() { return sizeof(Step); }
extern "C" long resfuse_watched_bytes() { return sizeof(Watched); }
