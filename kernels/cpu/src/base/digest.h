// Digests of contiguous bytes and of samples of elements, to find out whether memory has changed. A
// change of one word always changes the digest; a change of several is missed with a chance of
// 2^-32.
#pragma once

#include <cstdint>
#include <cstring>

// Python fills these in (kernels/cpu/weight_digest.py has the same fields in the same order).
struct Region {
  const unsigned char* start;
  long count;  // contiguous bytes or, with a step, elements
  long unit;   // bytes of an element
  long step;   // elements from one read to the next, modulo total; 0: contiguous bytes
  long total;  // elements
  uint64_t digest;
};

// The names of all fields, for exports.h.
#define REGION_FIELDS(FIELD) \
  FIELD(start) FIELD(count) FIELD(unit) FIELD(step) FIELD(total) FIELD(digest)

// Mixes a word into a digest; one-to-one in each argument.
static inline uint64_t mix(uint64_t mixed, uint64_t read) {
  return (((mixed << 29) | (mixed >> 35)) ^ read) * 0x9E3779B97F4A7C15ull;
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
      // Rotated, since after a multiplication alone changes of the top bits, such as all signs,
      // could cancel each other.
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

static uint64_t digest_of_sample(const Region& region) {
  uint64_t mixed = region.count;
  long element = 0;
  for (long i = 0; i < region.count; ++i) {
    uint64_t read = 0;
    std::memcpy(&read, region.start + element * region.unit, region.unit);
    mixed = mix(mixed, read);
    element += region.step;
    if (element >= region.total) element -= region.total;
  }
  return mixed;
}

static uint64_t digest_of(const Region& region) {
  return region.step ? digest_of_sample(region) : digest_of_row(region.start, region.count);
}
