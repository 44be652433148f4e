// torch's operations run on libgomp's threads, which look for work for some 4 ms after an operation
// before they sleep: on cores that the team's threads want meanwhile. In turns on two cores, ResNet-50
// between whose layers torch ran took 1.25 times as long for that.
//
// libgomp looks 3000 times as shortly where it counts more threads than there are cores. Two more of
// them, which sleep for ever, are enough, as torch has as many as there are cores or few enough to
// leave some to the team. An operation of torch's own then has to wake its threads: 30 us.
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

namespace openmp {

static void* crowd(void* run) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  const auto sleep = [](void*) {
    for (;;) ::pause();
  };
  reinterpret_cast<Parallel>(run)(sleep, nullptr, 2, 0);
  return nullptr;
}

// For the whole process, unless somebody has said how threads are to wait.
static void let_sleep() {
  if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
  void* const loaded = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);  // or torch has another
  void* const run = loaded ? dlsym(loaded, "GOMP_parallel") : nullptr;
  pthread_t thread;
  if (run && !pthread_create(&thread, nullptr, crowd, run)) pthread_detach(thread);
}

}  // namespace openmp
