// Whether memory is as it was: digests of bytes in a row, and of elements here and there. Changing
// one word changes the digest, always; changing several leaves it with a chance of 2^-32.
#pragma once

#include <cstdint>
#include <cstring>

// Python fills these in (kernels/cpu/weight_digest.py has the same fields in the same order).
struct Watched {
  const unsigned char* start;
  long count;  // of bytes in a row; of elements, where there is a step
  long unit;   // bytes of an element
  long step;   // elements from one that is read to the next, modulo total; 0: bytes in a row
  long total;  // elements
  uint64_t digest;
};

// The names of all fields, for exports.h.
#define WATCHED_FIELDS(FIELD) \
  FIELD(start) FIELD(count) FIELD(unit) FIELD(step) FIELD(total) FIELD(digest)

static inline uint64_t mix(uint64_t mixed, uint64_t read) {
  return (((mixed << 29) | (mixed >> 35)) ^ read) * 0x9E3779B97F4A7C15ull;  // one to one in each
}

static uint64_t digest_of_row(const unsigned char* start, long bytes) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  const uint32_t odd = 0x85EBCA6Bu;
  Words sums[4] = {};
  const long whole = bytes / 256 * 256;
  for (long at = 0; at < whole; at += 256) {
    for (int i = 0; i < 4; ++i) {
      Words read;
      std::memcpy(&read, start + at + 64 * i, 64);
      // rotated: a multiplication alone leaves the top bits, all signs, to cancel each other
      sums[i] = (((sums[i] << 13) | (sums[i] >> 19)) ^ read) * odd;
    }
  }
  uint64_t mixed = bytes;
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < 16; ++lane) mixed = mix(mixed, sums[i][lane]);
  }
  for (long at = whole; at < bytes; ++at) mixed = mix(mixed, start[at]);
  return mixed;
}

static uint64_t digest_of_sample(const Watched& part) {
  uint64_t mixed = part.count;
  long element = 0;
  for (long i = 0; i < part.count; ++i) {
    uint64_t read = 0;
    std::memcpy(&read, part.start + element * part.unit, part.unit);
    mixed = mix(mixed, read);
    element += part.step;
    if (element >= part.total) element -= part.total;
  }
  return mixed;
}

static uint64_t digest_of(const Watched& part) {
  return part.step ? digest_of_sample(part) : digest_of_row(part.start, part.count);
}
