/* HCCL over shared memory: the ranks are processes of one machine, and a call is done when it returns.
 *
 * Before a collective moves data the ranks compare what they called: operation, count, element type, reduction, root.
 * Where they differ all fail and say so; on the hardware such a call hangs or mixes up data. Signatures follow the
 * public header hccl.h.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "emulator.h"

enum { OK = 0, INTERNAL = 4, TIMEOUT = 9 };
enum { NAME = 128, ROOT_INFO = 4108, SLOT = 1 << 20, LETTER = 1 << 16, MOST_RANKS = 1024 };

typedef struct {
  volatile uint32_t arrived, generation, broken, telling;
  char why[512];
} Hall;

typedef struct {
  uint64_t operation, count, type, reduction, root;
} Call;

/* A mailbox from one rank to one other holds one letter at a time. */
typedef struct {
  volatile uint64_t full;
  uint64_t bytes;
  char data[LETTER];
} Box;

typedef struct Comm {
  int ranks, rank;
  char name[NAME];
  Hall *hall;
  Call *calls;
  char *slots;
  Box *boxes;
  void *map;
  size_t bytes;
  uint64_t number;
  int buffer; /* MB, as asked for; 0 for the default */
  struct Comm *next;
} Comm;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Comm *open_comms;

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + now.tv_nsec * 1e-9;
}

static double patience(void) {
  const char *text = getenv("MINDSPEED_EMULATED_HCCL_TIMEOUT");
  return text ? atof(text) : 60;
}

static void rest(int *turns) {
  struct timespec pause = {0, 50000};
  if (++*turns < 200) sched_yield();
  else nanosleep(&pause, 0);
}

static int broken(Comm *c) { return emulator_fail(INTERNAL, "%s", c->hall->why); }

static int fail(Comm *c, int status, const char *what) {
  char why[sizeof c->hall->why];
  if (c->hall->broken) return emulator_fail(status, "%s", c->hall->why);
  snprintf(why, sizeof why, "emulated HCCL: rank %d of %d, call %llu of the group: %s", c->rank, c->ranks,
           (unsigned long long)c->number, what);
  /* Ranks may find the mistake at once: one of them tells the others, each has words of its own. */
  if (__sync_bool_compare_and_swap(&c->hall->telling, 0, 1)) {
    memcpy(c->hall->why, why, sizeof why);
    __sync_synchronize();
    c->hall->broken = 1;
  }
  return emulator_fail(status, "%s", why);
}

#define TRY(call) do { int status_ = (call); if (status_) return status_; } while (0)

static int meet(Comm *c) {
  Hall *hall = c->hall;
  uint32_t generation = hall->generation;
  double begin = seconds();
  int turns = 0;
  if (__sync_add_and_fetch(&hall->arrived, 1) == (uint32_t)c->ranks) {
    hall->arrived = 0;
    __sync_synchronize();
    hall->generation = generation + 1;
    return OK;
  }
  while (hall->generation == generation) {
    rest(&turns);
    if (hall->broken) return broken(c);
    if (!(turns & 1023) && seconds() - begin > patience()) return fail(c, TIMEOUT, "timeout: not every rank came");
  }
  __sync_synchronize();
  return OK;
}

static const char *const operations[] = {"?",          "broadcast",      "all_reduce", "reduce",  "all_gather",
                                         "reduce_scatter", "all_to_all", "barrier",    "scatter", "all_gather_v",
                                         "reduce_scatter_v"};
enum { BROADCAST = 1, ALL_REDUCE, REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, BARRIER, SCATTER, ALL_GATHER_V,
       REDUCE_SCATTER_V };

/* Agree that every rank made the same call; with ``uneven`` their counts may differ. */
static int agree(Comm *c, int operation, uint64_t count, int type, int reduction, uint64_t root, int uneven) {
  Call mine = {operation, count, type, reduction, root};
  c->calls[c->rank] = mine;
  c->number++;
  TRY(meet(c));
  for (int rank = 0; rank < c->ranks; rank++) {
    Call other = c->calls[rank];
    if (uneven) other.count = count;
    if (memcmp(&other, &mine, sizeof mine)) {
      char text[400];
      snprintf(text, sizeof text,
               "ranks disagree: %s of %llu elements (type %d, reduction %d, root %llu) here, "
               "%s of %llu elements (type %d, reduction %d, root %llu) on rank %d",
               operations[operation], (unsigned long long)count, type, reduction, (unsigned long long)root,
               operations[other.operation], (unsigned long long)other.count, (int)other.type, (int)other.reduction,
               (unsigned long long)other.root, rank);
      return fail(c, INTERNAL, text);
    }
  }
  return meet(c);
}

/* --- communicators */

int HcclGetRootInfo(char *info) {
  static int number;
  memset(info, 0, ROOT_INFO);
  snprintf(info, NAME, "/mindspeed_hccl_%d_%d_%llx", getpid(), __sync_fetch_and_add(&number, 1),
           (unsigned long long)(seconds() * 1e9));
  return OK;
}

int HcclCommInitRootInfo(uint32_t ranks, const char *info, uint32_t rank, Comm **out) {
  Comm *c = calloc(1, sizeof *c);
  c->ranks = ranks;
  c->rank = rank;
  snprintf(c->name, NAME, "%s", info);
  size_t hall = 4096, calls = (sizeof(Call) * ranks + 4095) & ~(size_t)4095, slots = (size_t)SLOT * ranks;
  c->bytes = hall + calls + slots + sizeof(Box) * ranks * ranks;
  int file = shm_open(c->name, O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, c->bytes)) return emulator_fail(INTERNAL, "emulated HCCL: no shared memory");
  c->map = mmap(0, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (c->map == MAP_FAILED) return emulator_fail(INTERNAL, "emulated HCCL: no shared memory");
  c->hall = c->map;
  c->calls = (Call *)((char *)c->map + hall);
  c->slots = (char *)c->calls + calls;
  c->boxes = (Box *)(c->slots + slots);
  int status = meet(c);
  if (rank == 0 || status) shm_unlink(c->name);
  if (status) return status;
  pthread_mutex_lock(&lock);
  c->next = open_comms;
  open_comms = c;
  pthread_mutex_unlock(&lock);
  *out = c;
  return OK;
}

/* The configuration begins with 24 bytes about itself, then the buffer's size in MB (HcclCommConfig of hccl_types.h). */
int HcclCommInitRootInfoConfig(uint32_t ranks, const char *info, uint32_t rank, const char *config, Comm **out) {
  TRY(HcclCommInitRootInfo(ranks, info, rank, out));
  uint32_t megabytes;
  memcpy(&megabytes, config + 24, sizeof megabytes);
  (*out)->buffer = megabytes == 0xffffffff ? 0 : (int)megabytes;
  return OK;
}

int HcclCommDestroy(Comm *c) {
  pthread_mutex_lock(&lock);
  for (Comm **at = &open_comms; *at; at = &(*at)->next)
    if (*at == c) {
      *at = c->next;
      break;
    }
  pthread_mutex_unlock(&lock);
  munmap(c->map, c->bytes);
  free(c);
  return OK;
}

/* Operators name their group; fused ones look it up here. */
Comm *emulator_comm(const char *name) {
  pthread_mutex_lock(&lock);
  Comm *c = open_comms;
  while (c && strcmp(c->name, name)) c = c->next;
  pthread_mutex_unlock(&lock);
  return c;
}

int emulator_comm_buffer(const char *name) {
  Comm *c = emulator_comm(name);
  return c ? c->buffer : -1;
}

int HcclGetRankSize(Comm *c, uint32_t *ranks) {
  *ranks = c->ranks;
  return OK;
}

int HcclGetRankId(Comm *c, uint32_t *rank) {
  *rank = c->rank;
  return OK;
}

int HcclGetCommName(Comm *c, char *name) {
  snprintf(name, NAME, "%s", c->name);
  return OK;
}

int HcclGetCommAsyncError(Comm *c, int *status) {
  *status = c->hall->broken ? INTERNAL : OK;
  return OK;
}

uint32_t HcclGetCommConfigCapability(void) { return 4; }

const char *aclGetRecentErrMsg(void);
const char *HcclGetErrorString(int status) { return status ? aclGetRecentErrMsg() : "success"; }

/* --- element types, numbered as in hccl_types.h */

static size_t width(int type) {
  static const char bytes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16, 0, 1, 1, 1, 1};
  return type >= 0 && type < (int)sizeof bytes ? bytes[type] : 0;
}

static float from_half(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
}

static uint16_t to_half(float value) {
  _Float16 half = (_Float16)value;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

#define SAME(x) (x)
#define COMBINE(a, b) \
  (reduction == 0 ? (a) + (b) : reduction == 1 ? (a) * (b) : reduction == 2 ? ((a) > (b) ? (a) : (b)) : ((a) < (b) ? (a) : (b)))
/* Combine in a wider type and round once, in the order of ranks: every rank gets the same bits. */
#define REDUCE_AS(stored, wide, read, write) \
  for (uint64_t i = 0; i < count; i++) { \
    wide sum = read(((stored *)c->slots)[i]); \
    for (int rank = 1; rank < c->ranks; rank++) { \
      wide next = read(((stored *)(c->slots + (size_t)SLOT * rank))[i]); \
      sum = COMBINE(sum, next); \
    } \
    ((stored *)out)[i] = write(sum); \
  } \
  return OK

/* Reduce the first elements of all slots. */
static int reduce_slots(Comm *c, char *out, uint64_t count, int type, int reduction) {
  switch (type) {
    case 0: REDUCE_AS(int8_t, int8_t, SAME, SAME);
    case 1: REDUCE_AS(int16_t, int16_t, SAME, SAME);
    case 2: REDUCE_AS(int32_t, int32_t, SAME, SAME);
    case 3: REDUCE_AS(uint16_t, float, from_half, to_half);
    case 4: REDUCE_AS(float, float, SAME, SAME);
    case 5: REDUCE_AS(int64_t, int64_t, SAME, SAME);
    case 11: REDUCE_AS(uint16_t, float, from_bfloat, to_bfloat);
  }
  return fail(c, INTERNAL, "HCCL reduces int8, int16, int32, int64, fp16, bf16 and fp32, not this element type");
}

static char *slot(Comm *c, int rank) { return c->slots + (size_t)SLOT * rank; }

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* --- collectives, a slot's worth at a time */

int HcclBarrier(Comm *c, void *stream) { return agree(c, BARRIER, 0, 0, 0, 0, 0); }

int HcclBroadcast(char *data, uint64_t count, int type, uint32_t root, Comm *c, void *stream) {
  TRY(agree(c, BROADCAST, count, type, 0, root, 0));
  uint64_t bytes = count * width(type);
  for (uint64_t at = 0; at < bytes; at += SLOT) {
    uint64_t part = least(bytes - at, SLOT);
    if (c->rank == (int)root) memcpy(slot(c, 0), data + at, part);
    TRY(meet(c));
    if (c->rank != (int)root) memcpy(data + at, slot(c, 0), part);
    TRY(meet(c));
  }
  return OK;
}

/* Reduce to one rank, or with root -1 to all. Input and output may be the same memory. */
static int reduce_to(const char *in, char *out, uint64_t count, int type, int reduction, int root, Comm *c) {
  size_t size = width(type);
  if (!size) return fail(c, INTERNAL, "unknown element type");
  for (uint64_t at = 0; at < count; at += SLOT / size) {
    uint64_t part = least(count - at, SLOT / size);
    memcpy(slot(c, c->rank), in + at * size, part * size);
    TRY(meet(c));
    if (root < 0 || root == c->rank) TRY(reduce_slots(c, out + at * size, part, type, reduction));
    TRY(meet(c));
  }
  return OK;
}

int HcclAllReduce(char *in, char *out, uint64_t count, int type, int reduction, Comm *c, void *stream) {
  TRY(agree(c, ALL_REDUCE, count, type, reduction, 0, 0));
  return reduce_to(in, out, count, type, reduction, -1, c);
}

int HcclReduce(char *in, char *out, uint64_t count, int type, int reduction, uint32_t root, Comm *c, void *stream) {
  TRY(agree(c, REDUCE, count, type, reduction, root, 0));
  return reduce_to(in, out, count, type, reduction, root, c);
}

int HcclAllGather(char *in, char *out, uint64_t count, int type, Comm *c, void *stream) {
  TRY(agree(c, ALL_GATHER, count, type, 0, 0, 0));
  uint64_t bytes = count * width(type);
  for (uint64_t at = 0; at < bytes; at += SLOT) {
    uint64_t part = least(bytes - at, SLOT);
    memcpy(slot(c, c->rank), in + at, part);
    TRY(meet(c));
    for (int rank = 0; rank < c->ranks; rank++) memcpy(out + rank * bytes + at, slot(c, rank), part);
    TRY(meet(c));
  }
  return OK;
}

static int scatter_reduced(const char *in, const uint64_t *counts, const uint64_t *starts, char *out, int type,
                           int reduction, Comm *c) {
  size_t size = width(type);
  if (!size) return fail(c, INTERNAL, "unknown element type");
  for (int rank = 0; rank < c->ranks; rank++)
    for (uint64_t at = 0; at < counts[rank]; at += SLOT / size) {
      uint64_t part = least(counts[rank] - at, SLOT / size);
      memcpy(slot(c, c->rank), in + (starts[rank] + at) * size, part * size);
      TRY(meet(c));
      if (rank == c->rank) TRY(reduce_slots(c, out + at * size, part, type, reduction));
      TRY(meet(c));
    }
  return OK;
}

int HcclReduceScatter(char *in, char *out, uint64_t count, int type, int reduction, Comm *c, void *stream) {
  TRY(agree(c, REDUCE_SCATTER, count, type, reduction, 0, 0));
  uint64_t counts[MOST_RANKS], starts[MOST_RANKS];
  for (int rank = 0; rank < c->ranks; rank++) {
    counts[rank] = count;
    starts[rank] = rank * count;
  }
  /* The output may be the rank's own part of the input: collect it beside. */
  char *own = malloc(count * width(type) + 1);
  int status = scatter_reduced(in, counts, starts, own, type, reduction, c);
  if (!status) memcpy(out, own, count * width(type));
  free(own);
  return status;
}

int HcclReduceScatterV(char *in, const uint64_t *counts, const uint64_t *starts, char *out, uint64_t count, int type,
                       int reduction, Comm *c, void *stream) {
  TRY(agree(c, REDUCE_SCATTER_V, count, type, reduction, 0, 1));
  if (counts[c->rank] != count) return fail(c, INTERNAL, "reduce_scatter_v: this rank's own counts differ");
  return scatter_reduced(in, counts, starts, out, type, reduction, c);
}

/* --- from rank to rank: letters of several transfers at once, in order for each pair of ranks */

typedef struct {
  int sends, peer, started, done;
  char *data;
  uint64_t left;
} Transfer;

/* Move one letter of a transfer if its mailbox allows; 1 if anything happened, -1 on error. */
static int move(Comm *c, Transfer *t) {
  Box *box = t->sends ? &c->boxes[c->rank * c->ranks + t->peer] : &c->boxes[t->peer * c->ranks + c->rank];
  if (t->started && !t->left) {
    t->done = 1;
    return 1;
  }
  if ((int)box->full == t->sends) return 0;
  __sync_synchronize();
  uint64_t part = t->sends ? least(t->left, LETTER) : box->bytes;
  if (part > t->left) {
    fail(c, INTERNAL, "a rank sent more than this one receives");
    return -1;
  }
  if (t->sends) memcpy(box->data, t->data, part);
  else memcpy(t->data, box->data, part);
  if (t->sends) box->bytes = part;
  t->data += part;
  t->left -= part;
  t->started = 1;
  __sync_synchronize();
  box->full = t->sends;
  return 1;
}

static int transfer(Comm *c, Transfer *all, int count) {
  double begin = seconds();
  int turns = 0, left = count;
  while (left) {
    int moved = 0;
    for (int i = 0; i < count; i++) {
      Transfer *t = &all[i];
      int waits = t->done;
      for (int before = 0; before < i; before++)
        waits |= !all[before].done && all[before].sends == t->sends && all[before].peer == t->peer;
      if (waits) continue;
      int status = move(c, t);
      if (status < 0) return INTERNAL;
      moved |= status;
      left -= t->done;
    }
    if (moved) {
      turns = 0;
      begin = seconds();
      continue;
    }
    rest(&turns);
    if (c->hall->broken) return broken(c);
    if (!(turns & 1023) && seconds() - begin > patience()) return fail(c, TIMEOUT, "timeout in send or receive");
  }
  return OK;
}

int HcclSend(char *data, uint64_t count, int type, uint32_t peer, Comm *c, void *stream) {
  Transfer one = {.sends = 1, .peer = peer, .data = data, .left = count * width(type)};
  c->number++;
  return transfer(c, &one, 1);
}

int HcclRecv(char *data, uint64_t count, int type, uint32_t peer, Comm *c, void *stream) {
  Transfer one = {.sends = 0, .peer = peer, .data = data, .left = count * width(type)};
  c->number++;
  return transfer(c, &one, 1);
}

typedef struct {
  int receives;
  char *data;
  uint64_t count;
  int type;
  uint32_t peer;
} Item;

int HcclBatchSendRecv(Item *items, uint32_t count, Comm *c, void *stream) {
  Transfer *all = calloc(count, sizeof *all);
  c->number++;
  for (uint32_t i = 0; i < count; i++)
    all[i] = (Transfer){.sends = !items[i].receives, .peer = items[i].peer, .data = items[i].data,
                        .left = items[i].count * width(items[i].type)};
  int status = transfer(c, all, count);
  free(all);
  return status;
}

int HcclAlltoAllV(char *in, const uint64_t *sent, const uint64_t *sent_at, int type, char *out, const uint64_t *got,
                  const uint64_t *got_at, int out_type, Comm *c, void *stream) {
  TRY(agree(c, ALL_TO_ALL, 0, type, 0, 0, 0));
  size_t size = width(type);
  if (type != out_type || sent[c->rank] != got[c->rank])
    return fail(c, INTERNAL, "all_to_all: what this rank sends itself is not what it receives");
  memcpy(out + got_at[c->rank] * size, in + sent_at[c->rank] * size, sent[c->rank] * size);
  Transfer *all = calloc(2 * c->ranks, sizeof *all);
  int count = 0;
  for (int rank = 0; rank < c->ranks; rank++) {
    if (rank == c->rank) continue;
    all[count++] = (Transfer){.sends = 1, .peer = rank, .data = in + sent_at[rank] * size, .left = sent[rank] * size};
    all[count++] = (Transfer){.sends = 0, .peer = rank, .data = out + got_at[rank] * size, .left = got[rank] * size};
  }
  int status = transfer(c, all, count);
  free(all);
  return status ? status : meet(c);
}

int HcclAlltoAll(char *in, uint64_t sent, int type, char *out, uint64_t got, int out_type, Comm *c, void *stream) {
  uint64_t a[MOST_RANKS], b[MOST_RANKS], at[MOST_RANKS], bt[MOST_RANKS];
  for (int rank = 0; rank < c->ranks; rank++) {
    a[rank] = sent;
    b[rank] = got;
    at[rank] = rank * sent;
    bt[rank] = rank * got;
  }
  return HcclAlltoAllV(in, a, at, type, out, b, bt, out_type, c, stream);
}

/* The matrix says how much each rank sends to each. */
int HcclAlltoAllVC(char *in, const uint64_t *matrix, int type, char *out, int out_type, Comm *c, void *stream) {
  uint64_t a[MOST_RANKS], b[MOST_RANKS], at[MOST_RANKS], bt[MOST_RANKS], i = 0, j = 0;
  for (int rank = 0; rank < c->ranks; rank++) {
    a[rank] = matrix[c->rank * c->ranks + rank];
    b[rank] = matrix[rank * c->ranks + c->rank];
    at[rank] = i;
    bt[rank] = j;
    i += a[rank];
    j += b[rank];
  }
  return HcclAlltoAllV(in, a, at, type, out, b, bt, out_type, c, stream);
}

int HcclScatter(char *in, char *out, uint64_t count, int type, uint32_t root, Comm *c, void *stream) {
  TRY(agree(c, SCATTER, count, type, 0, root, 0));
  uint64_t bytes = count * width(type);
  if (c->rank != (int)root) {
    Transfer one = {.sends = 0, .peer = root, .data = out, .left = bytes};
    return transfer(c, &one, 1);
  }
  Transfer *all = calloc(c->ranks, sizeof *all);
  int number = 0;
  memcpy(out, in + c->rank * bytes, bytes);
  for (int rank = 0; rank < c->ranks; rank++)
    if (rank != c->rank) all[number++] = (Transfer){.sends = 1, .peer = rank, .data = in + rank * bytes, .left = bytes};
  int status = transfer(c, all, number);
  free(all);
  return status;
}

int HcclAllGatherV(char *in, uint64_t count, char *out, const uint64_t *got, const uint64_t *got_at, int type, Comm *c,
                   void *stream) {
  TRY(agree(c, ALL_GATHER_V, count, type, 0, 0, 1));
  size_t size = width(type);
  Transfer *all = calloc(2 * c->ranks, sizeof *all);
  int number = 0;
  memcpy(out + got_at[c->rank] * size, in, count * size);
  for (int rank = 0; rank < c->ranks; rank++) {
    if (rank == c->rank) continue;
    all[number++] = (Transfer){.sends = 1, .peer = rank, .data = in, .left = count * size};
    all[number++] = (Transfer){.sends = 0, .peer = rank, .data = out + got_at[rank] * size, .left = got[rank] * size};
  }
  int status = transfer(c, all, number);
  free(all);
  return status ? status : meet(c);
}
