/* A stand-in for libcuda.so.1 whose "device memory" is host memory. It is strict where a real GPU is unforgiving: a
   call without a context, an address that is not on the device or not on the current one, memory freed while another
   process has it open are errors; copies happen when their stream is waited for, not before. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201 };
enum { DEVICES = 2, BLOCKS = 256, PENDING = 1024, DEPTH = 8 };
typedef struct { char *begin; size_t size; int device, open, shared; } Block;
typedef struct { char *to; const char *from; int byte; size_t size; void *stream; } Copy;
typedef struct { char *begin; char rest[56]; } Handle;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block blocks[BLOCKS];
static Copy pending[PENDING];
static int pendings;
static uint64_t to_device, to_host, within, streams, violations;
static size_t room = (size_t)1 << 40;
static __thread int stack[DEPTH], depth;

static int current(void) { return depth ? stack[depth - 1] : -1; }

static Block *block_of(uint64_t address, size_t size) {
  char *place = (char *)address;
  for (Block *b = blocks; b < blocks + BLOCKS; b++)
    if (b->begin && place >= b->begin && place + size <= b->begin + b->size) return b;
  return 0;
}

static int here(uint64_t address, size_t size) {
  Block *b = block_of(address, size);
  if (current() < 0) return INVALID_CONTEXT;
  return b && b->device == current() ? OK : INVALID_VALUE;
}

static int queue(char *to, const char *from, int byte, size_t size, void *stream) {
  if (pendings == PENDING) return INVALID_VALUE;
  pending[pendings++] = (Copy){to, from, byte, size, stream};
  return OK;
}

static void run(void *stream, int all) {
  int left = 0;
  for (int i = 0; i < pendings; i++) {
    Copy c = pending[i];
    if (!all && c.stream != stream) pending[left++] = c;
    else if (c.from) memcpy(c.to, c.from, c.size);
    else memset(c.to, c.byte, c.size);
  }
  pendings = left;
}

#define LOCKED(expression) \
  pthread_mutex_lock(&lock); int status = (expression); pthread_mutex_unlock(&lock); return status

int cuInit(unsigned flags) { return getenv("FAKE_CUDA_NO_GPU") ? 100 : OK; }
int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < DEVICES ? OK : INVALID_DEVICE;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(intptr_t)(device + 1); return OK; }
int cuCtxPushCurrent_v2(void *context) {
  if (depth == DEPTH) return INVALID_VALUE;
  stack[depth++] = (int)(intptr_t)context - 1;
  return OK;
}
int cuCtxPopCurrent_v2(void **context) { if (!depth) return INVALID_CONTEXT; depth--; return OK; }

static int synchronize(void *stream, int all) { if (current() < 0) return INVALID_CONTEXT; run(stream, all); return OK; }
int cuCtxSynchronize(void) { LOCKED(synchronize(0, 1)); }
int cuStreamSynchronize(void *stream) { LOCKED(synchronize(stream, 0)); }
int cuStreamCreate(void **stream, unsigned flags) {
  static intptr_t next = 100;
  pthread_mutex_lock(&lock); streams++; *stream = (void *)next++; pthread_mutex_unlock(&lock);
  return current() < 0 ? INVALID_CONTEXT : OK;
}
int cuStreamDestroy_v2(void *stream) { pthread_mutex_lock(&lock); streams--; pthread_mutex_unlock(&lock); return OK; }

static int allocate(uint64_t *address, size_t size) {
  size_t used = 0;
  Block *free_one = 0;
  if (current() < 0) return INVALID_CONTEXT;
  for (Block *b = blocks; b < blocks + BLOCKS; b++) {
    if (b->begin) used += b->size;
    else if (!free_one) free_one = b;
  }
  if (!free_one || used + size > room) return OUT_OF_MEMORY;
  *free_one = (Block){aligned_alloc(4096, (size + 4095) / 4096 * 4096), size, current(), 0, size < (2 << 20)};
  memset(free_one->begin, 0xA5, size);
  *address = (uint64_t)free_one->begin;
  return OK;
}
int cuMemAlloc_v2(uint64_t *address, size_t size) { LOCKED(allocate(address, size)); }

static int release(uint64_t address) {
  Block *b = block_of(address, 1);
  if (!b || b->begin != (char *)address || b->device != current()) return INVALID_VALUE;
  if (b->open) violations++;
  free(b->begin);
  *b = (Block){0};
  return OK;
}
int cuMemFree_v2(uint64_t address) { LOCKED(release(address)); }

static int copy_in(uint64_t to, const void *from, size_t size, void *stream) {
  int bad = here(to, size);
  to_device += size;
  return bad ? bad : queue((char *)to, from, 0, size, stream);
}
static int copy_out(void *to, uint64_t from, size_t size, void *stream) {
  int bad = here(from, size);
  to_host += size;
  return bad ? bad : queue(to, (char *)from, 0, size, stream);
}
static int copy_within(uint64_t to, uint64_t from, size_t size, void *stream) {
  int bad = here(to, size) | here(from, size);
  within += size;
  return bad ? bad : queue((char *)to, (char *)from, 0, size, stream);
}
static int fill(uint64_t to, unsigned char byte, size_t size, void *stream) {
  int bad = here(to, size);
  return bad ? bad : queue((char *)to, 0, byte, size, stream);
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *s) { LOCKED(copy_in(to, from, size, s)); }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *s) { LOCKED(copy_out(to, from, size, s)); }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void *s) { LOCKED(copy_within(to, from, size, s)); }
int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t size, void *s) { LOCKED(fill(to, byte, size, s)); }

static int handle_of(Handle *handle, uint64_t address) {
  Block *b = block_of(address, 1);
  if (!b || b->begin != (char *)address || b->shared) return INVALID_VALUE; /* a small one may share its block */
  memset(handle, 0, sizeof *handle);
  handle->begin = b->begin;
  return OK;
}
int cuIpcGetMemHandle(Handle *handle, uint64_t address) { LOCKED(handle_of(handle, address)); }
int cuPointerGetAttribute(int *value, int attribute, uint64_t address) {
  Block *b = block_of(address, 1);
  if (attribute != 9 || !b) return INVALID_VALUE;
  *value = b->device;
  return OK;
}
int cuGetErrorString(int status, const char **words) {
  *words = status == OUT_OF_MEMORY ? "out of memory" : status == 100 ? "no CUDA-capable device is detected" : "refused";
  return OK;
}

/* What the other side and the test use. */
char *fake_open(const Handle *handle, int device, size_t size) {
  pthread_mutex_lock(&lock);
  Block *b = block_of((uint64_t)handle->begin, size);
  if (b && b->device == device) b->open++;
  else b = 0;
  pthread_mutex_unlock(&lock);
  return b ? b->begin : 0;
}
void fake_close(uint64_t address) {
  pthread_mutex_lock(&lock);
  Block *b = block_of(address, 1);
  if (b) b->open--;
  pthread_mutex_unlock(&lock);
}
void fake_room(size_t bytes) { room = bytes; }
void fake_counts(uint64_t counts[6]) {
  pthread_mutex_lock(&lock);
  uint64_t used = 0;
  for (Block *b = blocks; b < blocks + BLOCKS; b++) used += b->begin != 0;
  uint64_t now[6] = {used, streams, to_device, to_host, within, violations};
  memcpy(counts, now, sizeof now);
  to_device = to_host = within = 0;
  pthread_mutex_unlock(&lock);
}
