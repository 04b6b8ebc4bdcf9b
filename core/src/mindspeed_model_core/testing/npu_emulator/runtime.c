/* The part of Ascend's runtime (libascendcl) that torch_npu calls, over host memory.
 *
 * A device is a number, its memory is the process's own, and a stream is done with its work when a call returns.
 * Only functions whose results matter are here; what else the wheel links against is generated to return 0.
 * Signatures follow the public header acl_rt.h of CANN.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "emulator.h"

enum {
  OK = 0,
  BAD_PARAMETER = 107000,
  BAD_DEVICE = 107001,
  REPORT_TIMEOUT = 107019,
  REPEATED_INITIALIZE = 100002,
  OUT_OF_MEMORY = 207001,
};

static __thread char message[1024];
static __thread int device;
static int initialised;

int emulator_fail(int status, const char *format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(message, sizeof message, format, list);
  va_end(list);
  return status;
}

const char *aclGetRecentErrMsg(void) { return message[0] ? message : "(the emulator left no message)"; }

int aclInit(const char *config) {
  if (initialised) return REPEATED_INITIALIZE;
  initialised = 1;
  return OK;
}

int aclFinalize(void) {
  initialised = 0;
  return OK;
}

/* --- devices */

static int devices(void) {
  const char *text = getenv("MINDSPEED_EMULATED_NPUS");
  return text ? atoi(text) : 1;
}

const char *aclrtGetSocName(void) {
  const char *text = getenv("MINDSPEED_EMULATED_SOC");
  return text ? text : "Ascend910B1";
}

int aclrtGetDeviceCount(uint32_t *count) {
  *count = devices();
  return OK;
}

int aclrtSetDevice(int32_t number) {
  if (number < 0 || number >= devices()) return emulator_fail(BAD_DEVICE, "there is no device %d", number);
  device = number;
  return OK;
}

int aclrtGetDevice(int32_t *number) {
  *number = device;
  return OK;
}

/* A context stands for its device: the handle is the number, plus one so that it is not null. */
int aclrtGetCurrentContext(void **context) {
  *context = (void *)(intptr_t)(device + 1);
  return OK;
}

int aclrtSetCurrentContext(void *context) {
  device = (int)(intptr_t)context - 1;
  return OK;
}

int aclrtGetPrimaryCtxState(int32_t number, uint32_t *flags, int32_t *active) {
  if (flags) *flags = 0;
  *active = 1;
  return OK;
}

int aclrtDeviceCanAccessPeer(int32_t *can, int32_t one, int32_t other) {
  *can = 1;
  return OK;
}

int aclrtDeviceGetBareTgid(int32_t *process) {
  *process = 1;
  return OK;
}

int aclrtGetDeviceSatMode(int *mode) {
  *mode = 1;
  return OK;
}

int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) {
  *flag = 0;
  return OK;
}

int aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t *actual) {
  if (actual) *actual = timeout;
  return OK;
}

int aclrtGetSysParamOpt(int option, int64_t *value) {
  *value = 0;
  return OK;
}

int aclrtGetDeviceResLimit(int32_t number, int kind, uint32_t *value) {
  *value = kind == 0 ? 24 : 48; /* cube and vector cores of a 910B */
  return OK;
}

int aclrtGetDeviceInfo(uint32_t number, int kind, int64_t *value) {
  *value = 24;
  return OK;
}

int aclGetDeviceCapability(uint32_t number, int kind, int64_t *value) {
  *value = 24;
  return OK;
}

int aclrtGetRunMode(int *mode) {
  *mode = 1; /* host */
  return OK;
}

/* --- versions */

int aclGetCannAttribute(int attribute, int32_t *value) {
  *value = 1;
  return OK;
}

int aclGetCannAttributeList(const int **list, size_t *count) {
  static const int none[1];
  *list = none;
  *count = 0;
  return OK;
}

int aclsysGetVersionStr(char *package, char *version) {
  strcpy(version, "8.5.0");
  return OK;
}

int aclsysGetVersionNum(char *package, int32_t *version) {
  *version = 80500000;
  return OK;
}

int aclsysGetCANNVersion(int package, char *version) {
  memset(version, 0, 32);
  strcpy(version, "8.5.0");
  return OK;
}

/* --- streams and events */

typedef struct {
  int32_t id;
} Stream;

int aclrtCreateStream(void **out) {
  static int32_t next = 3;
  Stream *stream = calloc(1, sizeof *stream);
  stream->id = __sync_fetch_and_add(&next, 1);
  *out = stream;
  return OK;
}

int aclrtCreateStreamWithConfig(void **out, uint32_t priority, uint32_t flags) { return aclrtCreateStream(out); }

int aclrtDestroyStream(void *stream) {
  free(stream);
  return OK;
}

int aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }

int aclrtStreamQuery(void *stream, int *status) {
  *status = 0; /* complete */
  return OK;
}

int aclrtStreamGetId(void *stream, int32_t *id) {
  *id = stream ? ((Stream *)stream)->id : 2;
  return OK;
}

int aclrtStreamGetPriority(void *stream, uint32_t *priority) {
  *priority = 0;
  return OK;
}

static uint64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ull + now.tv_nsec;
}

int aclrtCreateEvent(void **out) {
  uint64_t *event = calloc(1, sizeof *event);
  *event = nanoseconds();
  *out = event;
  return OK;
}

int aclrtCreateEventWithFlag(void **out, uint32_t flag) { return aclrtCreateEvent(out); }

int aclrtCreateEventExWithFlag(void **out, uint32_t flag) { return aclrtCreateEvent(out); }

int aclrtDestroyEvent(void *event) {
  free(event);
  return OK;
}

int aclrtRecordEvent(void *event, void *stream) {
  *(uint64_t *)event = nanoseconds();
  return OK;
}

int aclrtQueryEvent(void *event, int *status) {
  *status = 0;
  return OK;
}

int aclrtQueryEventStatus(void *event, int *status) {
  *status = 1; /* here 1 is complete */
  return OK;
}

int aclrtQueryEventWaitStatus(void *event, int *status) {
  *status = 0;
  return OK;
}

int aclrtEventElapsedTime(float *milliseconds, void *from, void *to) {
  *milliseconds = ((int64_t) * (uint64_t *)to - (int64_t) * (uint64_t *)from) / 1e6f;
  return OK;
}

int aclrtEventGetTimestamp(void *event, uint64_t *microseconds) {
  *microseconds = *(uint64_t *)event / 1000;
  return OK;
}

uint64_t MsprofSysCycleTime(void) { return nanoseconds(); }

int aclmdlRICaptureGetInfo(void *stream, int *status, void **model) {
  *status = 0; /* not capturing */
  if (model) *model = 0;
  return OK;
}

/* --- calls back to the host */

int aclrtLaunchCallback(void (*function)(void *), void *data, int blocking, void *stream) {
  function(data);
  return OK;
}

int aclrtLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  function(data);
  return OK;
}

int aclrtProcessReport(int32_t timeout) {
  struct timespec rest = {0, 50000000};
  nanosleep(&rest, 0);
  return REPORT_TIMEOUT;
}

/* --- memory: what is device memory must be known by its address */

typedef struct {
  char *start;
  size_t bytes;
} Piece;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Piece *pieces;
static size_t count, room, used;

static size_t capacity(void) {
  const char *text = getenv("MINDSPEED_EMULATED_MEMORY");
  return text ? strtoull(text, 0, 10) : (size_t)64 << 30;
}

/* Fresh memory holds NaN in every floating-point type, so that an output that nobody wrote is seen. */
int aclrtMalloc(void **out, size_t bytes, int policy) {
  if (!bytes) return emulator_fail(BAD_PARAMETER, "an allocation of 0 bytes");
  pthread_mutex_lock(&lock);
  int full = used + bytes > capacity();
  if (!full) full = posix_memalign(out, 512, (bytes + 511) & ~(size_t)511) != 0;
  if (!full) {
    if (count == room) pieces = realloc(pieces, (room = 2 * room + 64) * sizeof *pieces);
    pieces[count++] = (Piece){*out, bytes};
    used += bytes;
  }
  pthread_mutex_unlock(&lock);
  if (full) return emulator_fail(OUT_OF_MEMORY, "no memory for %zu bytes", bytes);
  memset(*out, 0xff, bytes);
  return OK;
}

int aclrtMallocAlign32(void **out, size_t bytes, int policy) { return aclrtMalloc(out, bytes, policy); }

int aclrtFree(void *start) {
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < count; i++)
    if (pieces[i].start == start) {
      used -= pieces[i].bytes;
      pieces[i] = pieces[--count];
      break;
    }
  pthread_mutex_unlock(&lock);
  free(start);
  return OK;
}

int aclrtGetMemInfo(int kind, size_t *unused, size_t *total) {
  *total = capacity();
  *unused = *total - used;
  return OK;
}

int aclrtGetMemUceInfo(int32_t number, void *out, size_t size, size_t *found) {
  *found = 0;
  return OK;
}

int aclrtPointerGetAttributes(const void *address, void *out) {
  struct {
    uint32_t id;
    int kind;
    uint32_t page, reserved[4];
  } attributes = {0, 2 /* host */, 0, {0}};
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < count; i++)
    if ((char *)address >= pieces[i].start && (char *)address < pieces[i].start + pieces[i].bytes) attributes.kind = 1;
  pthread_mutex_unlock(&lock);
  memcpy(out, &attributes, sizeof attributes);
  return OK;
}

int aclrtMallocHost(void **out, size_t bytes) {
  return posix_memalign(out, 4096, bytes ? bytes : 1) ? emulator_fail(OUT_OF_MEMORY, "no host memory") : OK;
}

int aclrtMallocHostWithCfg(void **out, uint64_t bytes, void *config) { return aclrtMallocHost(out, bytes); }

int aclrtFreeHost(void *start) {
  free(start);
  return OK;
}

int aclrtHostRegister(void *start, uint64_t bytes, int kind, void **out) {
  *out = start;
  return OK;
}

int aclrtHostGetDevicePointer(void *start, void **out, uint32_t flag) {
  *out = start;
  return OK;
}

int aclrtMemcpy(void *to, size_t room_there, const void *from, size_t bytes, int kind) {
  if (bytes > room_there) return emulator_fail(BAD_PARAMETER, "a copy of %zu bytes to %zu", bytes, room_there);
  memmove(to, from, bytes);
  return OK;
}

int aclrtMemcpyAsync(void *to, size_t room_there, const void *from, size_t bytes, int kind, void *stream) {
  return aclrtMemcpy(to, room_there, from, bytes, kind);
}

int aclrtMemset(void *to, size_t room_there, int32_t value, size_t bytes) {
  memset(to, value, bytes);
  return OK;
}

int aclrtMemsetAsync(void *to, size_t room_there, int32_t value, size_t bytes, void *stream) {
  return aclrtMemset(to, room_there, value, bytes);
}

/* --- descriptors of the older operator path: opaque here; its launches refuse */

void *aclCreateTensorDesc(int type, int dims, const int64_t *sizes, int format) { return calloc(1, 64); }
void aclDestroyTensorDesc(void *descriptor) { free(descriptor); }
void *aclCreateDataBuffer(void *data, size_t bytes) { return calloc(1, 16); }
int aclDestroyDataBuffer(void *buffer) {
  free(buffer);
  return OK;
}
void *aclopCreateAttr(void) { return calloc(1, 16); }
void aclopDestroyAttr(void *attribute) { free(attribute); }
void *aclCreateGraphDumpOpt(void) { return calloc(1, 16); }
int aclDestroyGraphDumpOpt(void *option) {
  free(option);
  return OK;
}

int emulator_checking; /* torch_npu's own code runs for its checks and shapes alone: kernels need do nothing */

int aclopCompileAndExecute(const char *kind) {
  return emulator_checking ? OK : emulator_fail(500000, "operator %s was launched and has no CPU implementation", kind);
}

int aclopCompileAndExecuteV2(const char *kind) { return aclopCompileAndExecute(kind); }

int aclGetCompileopt(int option, char *value, size_t size) {
  if (size) *value = 0;
  return OK;
}

size_t aclGetCompileoptSize(int option) { return 16; }
