// DCHECK(condition): in a debug build (-DRESFUSE_DEBUG) says which condition does not hold and ends
// the process; in others it costs nothing.
#pragma once

#if defined(RESFUSE_DEBUG)
#include <cstdio>
#include <cstdlib>

[[noreturn]] static inline void dcheck_failed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: precondition does not hold: %s\n", file, line, condition);
  std::abort();
}

#define DCHECK(condition) \
  ((condition) ? static_cast<void>(0) : dcheck_failed(#condition, __FILE__, __LINE__))
#else
#define DCHECK(condition) static_cast<void>(sizeof(condition))
#endif
