// NCCL that is made up: for emulated GPUs (as libnccl_emulated.so), whose memory is the host's, and for the made-up driver
// (as libnccl.so.2), where it knows but one rank, which it doubles, so that one sees when. Ranks, be they processes or
// threads, meet at a loopback socket of rank 0, which adds up what they send, in the order of ranks. As with a real communicator
// that does not block, a call only begins something: a thread does it, and ncclCommGetAsyncError tells how it goes.
// Stricter than NCCL: ranks that do not give the same counts in the same order are told so.
//
// FAKE_NCCL_FAULT=KIND:RANK:SUM has a rank's SUMth sum (counted from 0) of the process's first communicator go wrong:
// "fail" at once, as if the network broke; "hang" for as long as nobody aborts; "kill" its process.
// FAKE_NCCL_FAULT=absent:RANK has that rank never meet the others.
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define VERSION 29900
#define RANKS_MAX 64
#define SUMS_MAX 4096

typedef enum { SUCCESS = 0, UNHANDLED_CUDA_ERROR, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 } Result;
typedef struct { char internal[128]; } UniqueId;
typedef struct { size_t size; unsigned magic, version; int blocking; } Config;
typedef struct { uint64_t magic, nonce; uint32_t port; int32_t listener; } Meeting;
typedef struct { uint64_t nonce; uint32_t rank, ranks; } Hello;
typedef struct { uint64_t number, count; } Header;
typedef struct { float* numbers; size_t count; } Sum;
// The first member of driver.c's.
typedef struct Stream { int (*enqueue)(struct Stream*, int (*run)(void*), const void* data, size_t bytes); } Stream;

typedef struct {
    int rank, ranks, is_first;
    Meeting meeting;
    int sockets[RANKS_MAX]; // of rank 0: to every other; of others: to rank 0
    Sum sums[SUMS_MAX];
    uint64_t issued, done; // sums
    Result failure;
    int is_formed;
    atomic_int aborted;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t thread;
} Communicator;

static atomic_int communicators;
static __thread const char* last_error = "";

static int fault(const Communicator* self, const char* kind, long long number) {
    const char* text = getenv("FAKE_NCCL_FAULT");
    char wanted[64];
    if (!text || !self->is_first) return 0;
    if (number < 0) snprintf(wanted, sizeof wanted, "%s:%d", kind, self->rank);
    else snprintf(wanted, sizeof wanted, "%s:%d:%lld", kind, self->rank, number);
    return !strcmp(text, wanted);
}

// Reads or writes all of it, unless aborted or the other is gone.
static Result transfer(Communicator* self, int socket, void* data, size_t bytes, int is_read) {
    for (char* at = data; bytes;) {
        struct pollfd ready = {socket, is_read ? POLLIN : POLLOUT, 0};
        if (atomic_load(&self->aborted)) return REMOTE_ERROR;
        if (poll(&ready, 1, 20) <= 0) continue;
        ssize_t moved = is_read ? recv(socket, at, bytes, MSG_DONTWAIT) : send(socket, at, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (moved < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (moved <= 0) return REMOTE_ERROR;
        at += moved, bytes -= moved;
    }
    return SUCCESS;
}
#define TRY(call) do { Result result_ = (call); if (result_) return result_; } while (0)
#define READ(socket, data, bytes) TRY(transfer(self, socket, data, bytes, 1))
#define WRITE(socket, data, bytes) TRY(transfer(self, socket, data, bytes, 0))

static void send_at_once(int socket) {
    int yes = 1;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

static Result accept_all(Communicator* self) {
    for (int missing = self->ranks - 1; missing;) {
        struct pollfd ready = {self->meeting.listener, POLLIN, 0};
        if (atomic_load(&self->aborted)) return REMOTE_ERROR;
        if (poll(&ready, 1, 20) <= 0) continue;
        int socket = accept(self->meeting.listener, NULL, NULL);
        Hello hello;
        if (socket < 0) continue;
        READ(socket, &hello, sizeof hello);
        if (hello.nonce != self->meeting.nonce || hello.ranks != (uint32_t)self->ranks || self->sockets[hello.rank] >= 0) return INVALID_USAGE;
        send_at_once(socket);
        self->sockets[hello.rank] = socket;
        missing--;
    }
    char go = 1;
    for (int rank = 1; rank < self->ranks; rank++) WRITE(self->sockets[rank], &go, 1);
    return SUCCESS;
}

static Result meet(Communicator* self) {
    while (fault(self, "absent", -1)) {
        if (atomic_load(&self->aborted)) return REMOTE_ERROR;
        usleep(1000);
    }
    if (self->rank == 0) return accept_all(self);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(self->meeting.port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    self->sockets[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(self->sockets[0], (struct sockaddr*)&address, sizeof address)) return SYSTEM_ERROR;
    send_at_once(self->sockets[0]);
    Hello hello = {self->meeting.nonce, self->rank, self->ranks};
    char go;
    WRITE(self->sockets[0], &hello, sizeof hello);
    READ(self->sockets[0], &go, 1);
    return SUCCESS;
}

static Result add_up(Communicator* self, Sum sum, uint64_t number) {
    Header mine = {number, sum.count}, theirs;
    size_t bytes = sum.count * sizeof(float);
    if (fault(self, "kill", number)) raise(SIGKILL);
    if (fault(self, "fail", number)) return REMOTE_ERROR;
    while (fault(self, "hang", number)) {
        if (atomic_load(&self->aborted)) return REMOTE_ERROR;
        usleep(1000);
    }
    if (self->rank) {
        WRITE(self->sockets[0], &mine, sizeof mine);
        WRITE(self->sockets[0], sum.numbers, bytes);
        READ(self->sockets[0], sum.numbers, bytes);
        return SUCCESS;
    }
    float* part = malloc(bytes);
    Result result = SUCCESS;
    for (int rank = 1; rank < self->ranks && !result; rank++) {
        result = transfer(self, self->sockets[rank], &theirs, sizeof theirs, 1);
        if (!result && memcmp(&mine, &theirs, sizeof mine)) result = INVALID_USAGE;
        if (!result) result = transfer(self, self->sockets[rank], part, bytes, 1);
        for (size_t index = 0; index < sum.count && !result; index++) sum.numbers[index] += part[index];
    }
    free(part);
    for (int rank = 1; rank < self->ranks && !result; rank++) {
        result = transfer(self, self->sockets[rank], sum.numbers, bytes, 0);
    }
    return result;
}

static void leave(Communicator* self) {
    for (int rank = 0; rank < RANKS_MAX; rank++) {
        if (self->sockets[rank] >= 0) close(self->sockets[rank]);
        self->sockets[rank] = -1;
    }
    if (self->rank == 0) close(self->meeting.listener);
}

static void* serve(void* argument) {
    Communicator* self = argument;
    Result result = meet(self);
    pthread_mutex_lock(&self->mutex);
    self->is_formed = 1;
    while (!result) {
        while (self->done == self->issued && !atomic_load(&self->aborted)) pthread_cond_wait(&self->changed, &self->mutex);
        if (atomic_load(&self->aborted)) break;
        uint64_t number = self->done;
        Sum sum = self->sums[number % SUMS_MAX];
        pthread_mutex_unlock(&self->mutex);
        result = add_up(self, sum, number);
        pthread_mutex_lock(&self->mutex);
        self->done++;
    }
    self->failure = result;
    pthread_mutex_unlock(&self->mutex);
    leave(self);
    return NULL;
}

API Result ncclGetVersion(int* version) { *version = VERSION; return SUCCESS; }

API const char* ncclGetErrorString(Result result) {
    return result == INVALID_USAGE ? "invalid usage" : result == REMOTE_ERROR ? "remote process exited or there was a network error" : "made-up error";
}

API const char* ncclGetLastError(Communicator* self) { return last_error; }

API Result ncclGetUniqueId(UniqueId* id) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof address;
    Meeting meeting = {0x4e43434c, 0, 0, socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (bind(meeting.listener, (struct sockaddr*)&address, bytes) || listen(meeting.listener, RANKS_MAX) ||
        getsockname(meeting.listener, (struct sockaddr*)&address, &bytes)) {
        last_error = "no loopback socket";
        return SYSTEM_ERROR;
    }
    meeting.port = ntohs(address.sin_port);
    meeting.nonce = (uint64_t)getpid() << 32 | (uint32_t)rand() << 16 | meeting.port;
    memset(id, 0, sizeof *id);
    memcpy(id, &meeting, sizeof meeting);
    return SUCCESS;
}

API Result ncclCommInitRankConfig(Communicator** result, int ranks, UniqueId id, int rank, Config* config) {
    if (config->magic != 0xcafebeef || config->blocking != 0 || rank < 0 || rank >= ranks || ranks > RANKS_MAX) {
        last_error = "a configuration that is not expected";
        return INVALID_ARGUMENT;
    }
    Communicator* self = calloc(1, sizeof *self);
    self->rank = rank, self->ranks = ranks;
    self->is_first = atomic_fetch_add(&communicators, 1) == 0;
    memcpy(&self->meeting, &id, sizeof self->meeting);
    memset(self->sockets, 0xff, sizeof self->sockets);
    pthread_mutex_init(&self->mutex, NULL);
    pthread_cond_init(&self->changed, NULL);
    *result = self;
    pthread_create(&self->thread, NULL, serve, self);
    return IN_PROGRESS;
}

API Result ncclCommGetAsyncError(Communicator* self, Result* state) {
    pthread_mutex_lock(&self->mutex);
    *state = self->failure ? self->failure : self->is_formed && self->done == self->issued ? SUCCESS : IN_PROGRESS;
    pthread_mutex_unlock(&self->mutex);
    return SUCCESS;
}

static int run_doubling(void* data) {
    Sum* sum = data;
    for (size_t index = 0; index < sum->count; index++) sum->numbers[index] *= 2;
    return 0;
}

API Result ncclAllReduce(const float* from, float* to, size_t count, int type, int operation, Communicator* self, Stream* stream) {
    if (type != 7 || operation != 0 || from != to || (stream && self->ranks > 1)) {
        last_error = "only sums of f32 in place, and of one rank in streams";
        return INVALID_ARGUMENT;
    }
    if (stream) {
        Sum sum = {to, count};
        return stream->enqueue(stream, run_doubling, &sum, sizeof sum) ? UNHANDLED_CUDA_ERROR : SUCCESS;
    }
    pthread_mutex_lock(&self->mutex);
    self->sums[self->issued++ % SUMS_MAX] = (Sum){to, count};
    pthread_cond_signal(&self->changed);
    pthread_mutex_unlock(&self->mutex);
    return IN_PROGRESS;
}

API Result ncclCommAbort(Communicator* self) {
    pthread_mutex_lock(&self->mutex);
    atomic_store(&self->aborted, 1);
    pthread_cond_signal(&self->changed);
    pthread_mutex_unlock(&self->mutex);
    pthread_join(self->thread, NULL);
    pthread_mutex_destroy(&self->mutex);
    pthread_cond_destroy(&self->changed);
    free(self);
    return SUCCESS;
}
