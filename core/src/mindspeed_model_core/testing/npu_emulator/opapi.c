/* CANN's operator library (libopapi): five kernels that move data, and the descriptors that calls are made of.
 *
 * Every other aclnn function that the wheel names is generated as a call of emulator_kernel: it refuses, unless
 * torch_npu's own code runs for its checks and shapes alone. A kernel is called twice: XGetWorkspaceSize takes the
 * operands and makes an executor, X runs it.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "emulator.h"

enum { MOST_DIMS = 16, MOST_INTEGERS = 64, REFUSED = 561000 };

extern int emulator_checking;

int emulator_kernel(const char *name) {
  if (emulator_checking) return 0;
  return emulator_fail(REFUSED, "kernel %s was launched and has no CPU implementation", name);
}

typedef struct {
  int dims, type;
  int64_t size[MOST_DIMS], stride[MOST_DIMS], offset;
  char *data;
} Tensor;

typedef struct {
  int type;
  char value[16];
} Scalar;

typedef struct {
  uint64_t count;
  int64_t value[MOST_INTEGERS];
} Integers;

/* --- element types, numbered as in acl_base.h */

static int width(int type) {
  switch (type) {
    case 0: case 3: case 8: return 4;           /* float, int32, uint32 */
    case 1: case 6: case 7: case 27: return 2;  /* half, int16, uint16, bfloat16 */
    case 2: case 4: case 12: return 1;          /* int8, uint8, bool */
    case 9: case 10: case 11: case 16: return 8; /* int64, uint64, double, complex of floats */
    case 17: return 16;                         /* complex of doubles */
  }
  return 0;
}

#define LOAD(kind) { kind value; memcpy(&value, at, sizeof value); return value; }
#define STORE(kind) { kind it = (kind)value; memcpy(at, &it, sizeof it); return; }

static double load(const char *at, int type) {
  switch (type) {
    case 0: LOAD(float)
    case 1: LOAD(_Float16)
    case 2: LOAD(int8_t)
    case 3: LOAD(int32_t)
    case 4: case 12: LOAD(uint8_t)
    case 6: LOAD(int16_t)
    case 7: LOAD(uint16_t)
    case 8: LOAD(uint32_t)
    case 9: LOAD(int64_t)
    case 10: LOAD(uint64_t)
    case 11: LOAD(double)
    case 27: { uint16_t bits; memcpy(&bits, at, 2); return from_bfloat(bits); }
  }
  return 0;
}

static void store(char *at, int type, double value) {
  switch (type) {
    case 0: STORE(float)
    case 1: STORE(_Float16)
    case 2: STORE(int8_t)
    case 3: STORE(int32_t)
    case 4: STORE(uint8_t)
    case 6: STORE(int16_t)
    case 7: STORE(uint16_t)
    case 8: STORE(uint32_t)
    case 9: STORE(int64_t)
    case 10: STORE(uint64_t)
    case 11: STORE(double)
    case 12: *at = value != 0; return;
    case 27: { uint16_t bits = to_bfloat((float)value); memcpy(at, &bits, 2); return; }
  }
}

/* --- descriptors */

void *aclCreateTensor(const int64_t *sizes, uint64_t dims, int type, const int64_t *strides, int64_t offset, int format,
                      const int64_t *stored, uint64_t stored_dims, void *data) {
  Tensor *tensor = calloc(1, sizeof *tensor);
  tensor->dims = dims < MOST_DIMS ? (int)dims : MOST_DIMS;
  tensor->type = type;
  tensor->offset = offset;
  tensor->data = data;
  memcpy(tensor->size, sizes, tensor->dims * sizeof *sizes);
  if (strides) memcpy(tensor->stride, strides, tensor->dims * sizeof *strides);
  return tensor;
}

void *aclCreateScalar(void *value, int type) {
  Scalar *scalar = calloc(1, sizeof *scalar);
  scalar->type = type;
  memcpy(scalar->value, value, width(type) ? width(type) : 8);
  return scalar;
}

void *aclCreateIntArray(const int64_t *values, uint64_t count) {
  Integers *out = calloc(1, sizeof *out);
  out->count = count < MOST_INTEGERS ? count : MOST_INTEGERS;
  memcpy(out->value, values, out->count * sizeof *values);
  return out;
}

#define OPAQUE(kind) \
  void *aclCreate##kind(void) { return calloc(1, 16); } \
  DESTROY(kind)
#define DESTROY(kind) \
  int aclDestroy##kind(void *it) { free(it); return 0; }
DESTROY(Tensor)
DESTROY(Scalar)
DESTROY(IntArray)
OPAQUE(FloatArray)
OPAQUE(BoolArray)
OPAQUE(ScalarList)
OPAQUE(TensorList)

int InitHugeMemThreadLocal(void *unused, int also) { return 0; }
void UnInitHugeMemThreadLocal(void *unused, int also) {}
void ReleaseHugeMem(void *unused, int also) {}

/* --- the kernels: one walk over the elements of a tensor */

typedef struct {
  Tensor to, from;
  int filled, padded;          /* by a value; from a tensor, with a value around it */
  int64_t before[MOST_DIMS];   /* padding in front of each dim */
  double value;
} Job;

static int make(Job **out, const Tensor *to, const Tensor *from, uint64_t *workspace) {
  Job *job = calloc(1, sizeof *job);
  job->to = *to;
  if (from) job->from = *from;
  job->filled = !from;
  *workspace = 0;
  *out = job;
  return 0;
}

/* The element of the source at an index of the target, or null where there is none: padding, or a fill. */
static const char *source(const Job *job, const int64_t *index) {
  const Tensor *from = &job->from;
  if (job->filled) return 0;
  int lead = job->to.dims - from->dims;
  int64_t offset = from->offset;
  for (int dim = 0; dim < from->dims; dim++) {
    int64_t at = index[dim + lead] - job->before[dim + lead];
    if (from->size[dim] == 1 && !job->padded) at = 0; /* broadcast */
    if (at < 0 || at >= from->size[dim]) return 0;
    offset += at * from->stride[dim];
  }
  return from->data + offset * width(from->type);
}

static int run(Job *job) {
  const Tensor *to = &job->to;
  int64_t total = 1, index[MOST_DIMS] = {0};
  if (!width(to->type) || (!job->filled && (!width(job->from.type) || job->from.dims > to->dims))) {
    int type = to->type;
    free(job);
    return emulator_fail(REFUSED, "this kernel does not know element type %d or the shapes", type);
  }
  for (int dim = 0; dim < to->dims; dim++) total *= to->size[dim];
  for (int64_t i = 0; i < total; i++) {
    int64_t offset = to->offset;
    for (int dim = 0; dim < to->dims; dim++) offset += index[dim] * to->stride[dim];
    char *at = to->data + offset * width(to->type);
    const char *value = source(job, index);
    if (!value) store(at, to->type, job->value);
    else if (to->type == job->from.type) memcpy(at, value, width(to->type));
    else store(at, to->type, load(value, job->from.type));
    for (int dim = to->dims - 1; dim >= 0 && ++index[dim] == to->size[dim]; dim--) index[dim] = 0;
  }
  free(job);
  return 0;
}

#define RUNS(name) \
  int aclnn##name(void *workspace, uint64_t bytes, Job *job, void *stream) { return run(job); }

int aclnnInplaceCopyGetWorkspaceSize(Tensor *to, Tensor *from, uint64_t *workspace, Job **job) {
  return make(job, to, from, workspace);
}
RUNS(InplaceCopy)

int aclnnCastGetWorkspaceSize(Tensor *from, int type, Tensor *to, uint64_t *workspace, Job **job) {
  return make(job, to, from, workspace);
}
RUNS(Cast)

int aclnnInplaceZeroGetWorkspaceSize(Tensor *to, uint64_t *workspace, Job **job) { return make(job, to, 0, workspace); }
RUNS(InplaceZero)

int aclnnInplaceFillScalarGetWorkspaceSize(Tensor *to, Scalar *value, uint64_t *workspace, Job **job) {
  make(job, to, 0, workspace);
  (*job)->value = load(value->value, value->type);
  return 0;
}
RUNS(InplaceFillScalar)

int aclnnConstantPadNdGetWorkspaceSize(Tensor *from, Integers *pad, Scalar *value, Tensor *to, uint64_t *workspace,
                                       Job **job) {
  make(job, to, from, workspace);
  (*job)->padded = 1;
  for (uint64_t i = 0; 2 * i < pad->count; i++) (*job)->before[to->dims - 1 - i] = pad->value[2 * i];
  (*job)->value = load(value->value, value->type);
  return 0;
}
RUNS(ConstantPadNd)
