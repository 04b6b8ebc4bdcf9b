/* What the emulator's libraries share: how a failing call tells Python why, and bfloat16 in C. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <stdint.h>
#include <string.h>

/* Keep a message for aclGetRecentErrMsg, which torch_npu puts into its exception, and return the status. */
int emulator_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

static inline float from_bfloat(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

/* Round to the nearest, ties to even. */
static inline uint16_t to_bfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

#endif
