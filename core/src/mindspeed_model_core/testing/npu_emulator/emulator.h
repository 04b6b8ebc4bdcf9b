/* What the emulator's libraries share: how a failing call tells Python why. */
#ifndef EMULATOR_H
#define EMULATOR_H

/* Keep a message for aclGetRecentErrMsg, which torch_npu puts into its exception, and return the status. */
int emulator_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
