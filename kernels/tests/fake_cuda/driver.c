// A CUDA driver that is made up: libcuda.so.1 for tests on machines without a GPU. Device memory is host memory, and the
// stream is as lazy as it may be: nothing happens before somebody waits for it. So whoever changes memory that a copy has
// yet to read, or reads what a copy has yet to write, gets wrong numbers; addresses outside of allocations are errors.
// It runs no kernels but `report_launch`.
//
// FAKE_CUDA_VERSION, FAKE_CUDA_DEVICES and FAKE_CUDA_CAPABILITY change what it claims to be.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201, NOT_FOUND = 500, NOT_READY = 600,
       ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719 };

#define MEMORY_BYTES (1ul << 30)
#define SHARED_BYTES_MAX 166912

typedef struct Operation {
    int (*run)(void*);
    struct Operation* next;
    uint64_t number;
    char data[];
} Operation;

// cublaslt.c knows the first member.
typedef struct Stream {
    int (*enqueue)(struct Stream*, int (*run)(void*), const void* data, size_t bytes);
    Operation *first, *last;
    uint64_t issued, asked;
    int failed; // with what, for every later call
    struct Stream* next;
} Stream;

typedef struct Event {
    Stream* stream;
    uint64_t number;
} Event;

typedef struct Allocation {
    char* address;
    size_t bytes;
    int pinned;
    struct Allocation* next;
} Allocation;

typedef struct Function {
    char name[64];
    int shared_bytes;
} Function;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Allocation* allocations;
static size_t allocated;
static Stream* streams;
static __thread void* current;
static int context;

static int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int lies_in(const void* address, size_t bytes, int pinned) {
    for (Allocation* block = allocations; block; block = block->next) {
        const char* from = address;
        if (block->pinned == pinned && from >= block->address && from + bytes <= block->address + block->bytes) return 1;
    }
    return 0;
}

static int run_until(Stream* stream, uint64_t number) {
    while (stream->first && stream->first->number <= number) {
        Operation* operation = stream->first;
        stream->first = operation->next;
        int status = operation->run(operation->data);
        if (status) stream->failed = status;
        free(operation);
    }
    if (!stream->first) stream->last = NULL;
    return stream->failed;
}

static int enqueue(Stream* stream, int (*run)(void*), const void* data, size_t bytes) {
    if (!current) return INVALID_CONTEXT;
    if (stream->failed) return stream->failed;
    Operation* operation = malloc(sizeof(Operation) + bytes);
    operation->run = run;
    operation->next = NULL;
    operation->number = ++stream->issued;
    memcpy(operation->data, data, bytes);
    if (stream->last) stream->last->next = operation;
    else stream->first = operation;
    stream->last = operation;
    return SUCCESS;
}

static int enqueue_locked(Stream* stream, int (*run)(void*), const void* data, size_t bytes) {
    pthread_mutex_lock(&mutex);
    int status = enqueue(stream, run, data, bytes);
    pthread_mutex_unlock(&mutex);
    return status;
}

#define LOCKED(body)                \
    pthread_mutex_lock(&mutex);     \
    int status = SUCCESS;           \
    do { body } while (0);          \
    pthread_mutex_unlock(&mutex);   \
    return status

int cuDriverGetVersion(int* version) { *version = setting("FAKE_CUDA_VERSION", 13000); return SUCCESS; }
int cuInit(unsigned flags) { return setting("FAKE_CUDA_DEVICES", 1) ? SUCCESS : NO_DEVICE; }
int cuDeviceGetCount(int* count) { *count = setting("FAKE_CUDA_DEVICES", 1); return SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDeviceGetName(char* name, int bytes, int device) { snprintf(name, bytes, "Made Up %d", device); return SUCCESS; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = MEMORY_BYTES; return SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    int capability = setting("FAKE_CUDA_CAPABILITY", 90);
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 97 ? SHARED_BYTES_MAX : 132;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** result, int device) { *result = &context; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
int cuCtxSetCurrent(void* context) { current = context; return SUCCESS; }

int cuStreamCreate(Stream** stream, unsigned flags) {
    *stream = calloc(1, sizeof(Stream));
    (*stream)->enqueue = enqueue_locked;
    LOCKED((*stream)->next = streams; streams = *stream;);
}
int cuStreamSynchronize(Stream* stream) { LOCKED(status = run_until(stream, stream->issued);); }
// What a side stream waits for happens when it does, and not before.
typedef struct Wait { Stream* stream; uint64_t number; } Wait;
static int run_wait(void* data) {
    Wait* wait = data;
    return run_until(wait->stream, wait->number);
}
int cuStreamWaitEvent(Stream* stream, Event* event, unsigned flags) {
    Wait wait = {event->stream, event->number};
    LOCKED(status = enqueue(stream, run_wait, &wait, sizeof wait););
}
// Not done when first asked.
int cuStreamQuery(Stream* stream) {
    LOCKED(
        if (stream->asked != stream->issued) { stream->asked = stream->issued; status = NOT_READY; }
        else status = run_until(stream, stream->issued);
    );
}
int cuStreamDestroy_v2(Stream* stream) { LOCKED(status = run_until(stream, stream->issued);); }
int cuDeviceGetUuid_v2(char* uuid, int device) { memset(uuid, device, 16); return SUCCESS; }

static int allocate(void** address, size_t bytes, int pinned) {
    if (!current) return INVALID_CONTEXT;
    if (!pinned && allocated + bytes > MEMORY_BYTES) return OUT_OF_MEMORY;
    Allocation* block = malloc(sizeof(Allocation));
    *block = (Allocation){aligned_alloc(256, (bytes + 255) / 256 * 256), bytes, pinned, allocations};
    memset(block->address, 0xff, bytes);
    allocations = block;
    if (!pinned) allocated += bytes;
    *address = block->address;
    return SUCCESS;
}

static int release(void* address) {
    for (Allocation** place = &allocations; *place; place = &(*place)->next) {
        Allocation* block = *place;
        if (block->address != address) continue;
        for (Stream* stream = streams; stream; stream = stream->next) run_until(stream, stream->issued);
        *place = block->next;
        if (!block->pinned) allocated -= block->bytes;
        free(block->address);
        free(block);
        return SUCCESS;
    }
    return INVALID_VALUE;
}

int cuMemAlloc_v2(void** address, size_t bytes) { LOCKED(status = allocate(address, bytes, 0);); }
int cuMemHostAlloc(void** address, size_t bytes, unsigned flags) { LOCKED(status = allocate(address, bytes, 1);); }
int cuMemFree_v2(void* address) { LOCKED(status = release(address);); }
int cuMemFreeHost(void* address) { LOCKED(status = release(address);); }
int cuMemGetInfo_v2(size_t* available, size_t* total) {
    LOCKED(*available = MEMORY_BYTES - allocated; *total = MEMORY_BYTES;);
}

typedef struct Copy { char* to; const char* from; size_t bytes; int to_pinned, from_pinned; } Copy;
static int run_copy(void* data) {
    Copy* copy = data;
    if (!lies_in(copy->to, copy->bytes, copy->to_pinned) || !lies_in(copy->from, copy->bytes, copy->from_pinned)) {
        return ILLEGAL_ADDRESS;
    }
    memmove(copy->to, copy->from, copy->bytes);
    return SUCCESS;
}
static int copy(void* to, const void* from, size_t bytes, int to_pinned, int from_pinned, Stream* stream) {
    Copy copy = {to, from, bytes, to_pinned, from_pinned};
    LOCKED(status = enqueue(stream, run_copy, &copy, sizeof copy););
}
int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, Stream* stream) { return copy(to, from, bytes, 0, 1, stream); }
int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, Stream* stream) { return copy(to, from, bytes, 1, 0, stream); }
int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, Stream* stream) { return copy(to, from, bytes, 0, 0, stream); }

typedef struct Fill { char* to; size_t pitch, width, height; int value; } Fill;
static int run_fill(void* data) {
    Fill* fill = data;
    for (size_t row = 0; row < fill->height; row++) {
        if (!lies_in(fill->to + row * fill->pitch, fill->width, 0)) return ILLEGAL_ADDRESS;
        memset(fill->to + row * fill->pitch, fill->value, fill->width);
    }
    return SUCCESS;
}
int cuMemsetD2D8Async(void* to, size_t pitch, unsigned char value, size_t width, size_t height, Stream* stream) {
    Fill fill = {to, pitch, width, height, value};
    LOCKED(status = enqueue(stream, run_fill, &fill, sizeof fill););
}
int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, Stream* stream) {
    return cuMemsetD2D8Async(to, bytes, value, bytes, 1, stream);
}

int cuModuleLoadData(void** module, const void* image) {
    if (strncmp(image, "made up cubin", 13)) return 200;
    *module = malloc(1);
    return SUCCESS;
}
int cuModuleUnload(void* module) { free(module); return SUCCESS; }
int cuModuleGetFunction(Function** function, void* module, const char* name) {
    if (!strcmp(name, "missing")) return NOT_FOUND;
    *function = calloc(1, sizeof(Function));
    strncpy((*function)->name, name, 63);
    (*function)->shared_bytes = 48 << 10;
    return SUCCESS;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute != 8 || value > SHARED_BYTES_MAX) return INVALID_VALUE;
    function->shared_bytes = value;
    return SUCCESS;
}

// The arguments of `report_launch(u32* report, u32 a, i32 b, u64 c, float d)`, and how it was launched.
typedef struct Report { uint32_t* to; uint32_t a; int32_t b; uint64_t c; float d; uint32_t grid[3], block, shared_bytes; } Report;
static int run_report(void* data) {
    Report* report = data;
    if (!lies_in(report->to, 40, 0)) return ILLEGAL_ADDRESS;
    uint32_t words[10] = {report->a, report->b, report->c, report->c >> 32, 0, report->grid[0], report->grid[1],
                          report->grid[2], report->block, report->shared_bytes};
    memcpy(words + 4, &report->d, 4);
    memcpy(report->to, words, sizeof words);
    return SUCCESS;
}
static int run_failure(void* data) { return LAUNCH_FAILED; }
int cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned block, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, Stream* stream, void** arguments, void** extra) {
    if (shared_bytes > (unsigned)function->shared_bytes || block_y != 1 || block_z != 1) return INVALID_VALUE;
    if (!strcmp(function->name, "refused")) return INVALID_VALUE;
    if (strcmp(function->name, "report_launch")) {
        char nothing = 0;
        LOCKED(status = enqueue(stream, run_failure, &nothing, 1););
    }
    Report report = {*(uint32_t**)arguments[0], *(uint32_t*)arguments[1], *(int32_t*)arguments[2],
                     *(uint64_t*)arguments[3], *(float*)arguments[4], {x, y, z}, block, shared_bytes};
    LOCKED(status = enqueue(stream, run_report, &report, sizeof report););
}

int cuEventCreate(Event** event, unsigned flags) { *event = calloc(1, sizeof(Event)); return SUCCESS; }
int cuEventDestroy_v2(Event* event) { free(event); return SUCCESS; }
int cuEventRecord(Event* event, Stream* stream) { LOCKED(event->stream = stream; event->number = stream->issued;); }
int cuEventSynchronize(Event* event) { LOCKED(if (event->stream) status = run_until(event->stream, event->number);); }

int cuGetErrorName(int status, const char** name) {
    *name = status == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : status == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_OTHER";
    return SUCCESS;
}
int cuGetErrorString(int status, const char** text) { *text = "made up"; return SUCCESS; }
