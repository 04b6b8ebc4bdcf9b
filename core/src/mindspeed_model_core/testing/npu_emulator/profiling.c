/* The profiler's part of libascendcl: it starts and stops, and there is nothing on the device to record. */
#include <stdint.h>
#include <stdlib.h>

int aclprofInit(const char *folder, size_t length) { return 0; }
int aclprofFinalize(void) { return 0; }
int aclprofStart(const void *config) { return 0; }
int aclprofStop(const void *config) { return 0; }
int aclprofWarmup(const void *config) { return 0; }
int aclprofSetConfig(int kind, const char *value, size_t length) { return 0; }
void *aclprofCreateConfig(uint32_t *devices, uint32_t count, int metrics, void *events, uint64_t what) {
  return calloc(1, 16);
}
int aclprofDestroyConfig(void *config) {
  free(config);
  return 0;
}
void *aclprofCreateStepInfo(void) { return calloc(1, 16); }
void aclprofDestroyStepInfo(void *info) { free(info); }
int aclprofGetStepTimestamp(void *info, int tag, void *stream) { return 0; }
int aclprofMarkEx(const char *text, size_t length, void *stream) { return 0; }

/* The driver's clock, which the profiler aligns its times with (libascend_hal). */
int halGetAPIVersion(int *version) {
  *version = 0x071905; /* from 7.25.5 on the clock can be asked for */
  return 0;
}

uint64_t MsprofSysCycleTime(void);
int halGetDeviceInfo(uint32_t device, int32_t module, int32_t kind, int64_t *value) {
  *value = (int64_t)MsprofSysCycleTime();
  return 0;
}
