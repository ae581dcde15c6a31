// A block of threads as fibers: who runs next, barriers, what a warp does together, shared memory.
//
// A thread runs until it waits for others. When a warp's lanes have all come to the same collective operation, the last
// one carries it out for all of them; when no thread can run, either all of them are at the same barrier, which then opens,
// or they wait for each other in vain, which is an error. The seed draws the order in which threads go on after each.
#pragma once
#include "fiber.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emulator {

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 LANES = 32;
constexpr u32 THREADS_MAX = 1024;
constexpr u32 REGIONS_MAX = 64;
// Between regions of shared memory, and after the last one.
constexpr u32 GAP = 64;
constexpr unsigned char GAP_BYTE = 0xa5;
// Of memory that nobody has written: NaN as a float of any width.
constexpr unsigned char POISON_BYTE = 0xff;
constexpr u64 CANARY = 0x5afe57ac4ca11ab1;

struct Index3 {
    u32 x, y, z;
};

// Where in the source a thread waits.
struct Place {
    const char* file;
    u32 line;

    bool operator==(const Place& other) const {
        return line == other.line && (file == other.file || strcmp(file, other.file) == 0);
    }
    const char* name() const {
        const char* slash = strrchr(file, '/');
        return slash ? slash + 1 : file;
    }
};
// The place of a call, as the default value of the callee's last parameters.
#define EMULATOR_PLACE const char *file = __builtin_FILE(), emulator::u32 line = __builtin_LINE()

// Ready is also a thread that is running.
enum class State : u32 { Ready, AtBarrier, AtCollective, Returned };

struct Block;
struct Thread;
// Does what the lanes in `mask` have come together for; each has brought its `payload`.
typedef void (*Collective)(Thread* const* lanes, u32 mask);

// A copy that has been asked for and has not happened.
struct PendingCopy {
    void* to;
    const void* from;
    u32 bytes, valid_bytes;
    u32 group;
};

// Lies near the low end of the thread's stack.
struct Thread {
    Index3 index;
    State state;
    Block* block;
    u32 mask;
    Place place;
    Collective collective;
    void* payload;
    Fiber fiber;
    PendingCopy* copies;
    u32 copy_count, copy_capacity;
    u32 copy_group; // the one that is open
    u64 canary;     // overwritten by a stack that is too small

    u32 number() const {
        return index.x;
    }
    u32 lane() const {
        return index.x % LANES;
    }
};

struct Kernel {
    const char* name;
    // A letter for each parameter: p pointer, u u32, i i32, U u64, f float.
    const char* signature;
    void (*call)(const void* const* arguments);
    u32 threads_max; // of a block
};

struct Launch {
    u32 grid[3];
    u32 block;
    u64 shared_bytes;
    const void* const* arguments;
    u64 seed;
};

// A part of shared memory.
struct Region {
    u32 start, bytes; // as the kernel counts
    u32 place;        // with the gaps
};

struct Block {
    const Kernel* kernel;
    const Launch* launch;
    Index3 index, dimensions, grid;
    char* stacks;
    Fiber host;
    u64 random;

    u32 ready_count;
    unsigned short ready[THREADS_MAX]; // a stack
    u32 returned;
    u32 at_collective[THREADS_MAX / LANES]; // lanes, by warp
    u32 at_barrier, votes;                  // threads, and those of them that voted
    u32 opened_votes;                       // of the last barrier that opened
    u32 first_at_barrier;

    char* shared;
    u32 region_count;
    Region regions[REGIONS_MAX];

    char* message;
    size_t message_bytes;
    bool failed;

    char* stack(u32 number) {
        return stacks + size_t(number) * STACK_BYTES;
    }
    Thread& thread(u32 number) {
        return thread_of(reinterpret_cast<uintptr_t>(stack(number)));
    }

    // The record on a stack, which is aligned to its size. Records and frames lie at different distances from the ends of
    // their stacks: otherwise those of all threads would compete for the same few lines of the cache.
    static Thread& thread_of(uintptr_t stack) {
        return *reinterpret_cast<Thread*>(stack + spread(stack));
    }
    static uintptr_t spread(uintptr_t stack) {
        return stack / STACK_BYTES % 128 * 64;
    }
};

// The thread that is running: its record is on the stack that is in use.
inline Thread& self() {
    const uintptr_t frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return Block::thread_of(frame & ~uintptr_t(STACK_BYTES - 1));
}

// SplitMix64.
inline u64 draw(u64& state) {
    u64 z = state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

// Ends the launch with a message.
[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
    Thread& thread = self();
    Block& block = *thread.block;
    const Index3 at = block.index;
    int length = snprintf(block.message, block.message_bytes, "block (%u, %u, %u), thread %u: ", at.x, at.y, at.z,
                          thread.number());
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(block.message + length, block.message_bytes - length, format, arguments);
    va_end(arguments);
    block.failed = true;
    switch_fiber(thread.fiber, block.host, true);
    __builtin_unreachable();
}

// ---------------------------------------------------------------------------------------------------------------------
// Who runs next

// Makes the lanes in `mask` of a warp ready, to run in an order that is drawn.
inline void make_ready(Block& block, u32 warp, u32 mask) {
    const u64 random = draw(block.random);
    const u32 step = u32(random) | 1, shift = u32(random >> 32), flip = u32(random >> 40);
    for (u32 i = 0; i < LANES; i++) {
        const u32 lane = ((i * step + shift) ^ flip) % LANES;
        if (mask >> lane & 1) block.ready[block.ready_count++] = warp * LANES + lane;
    }
}

// Makes all threads ready.
inline void make_all_ready(Block& block) {
    const u32 warps = block.launch->block / LANES;
    unsigned char order[THREADS_MAX / LANES];
    for (u32 i = 0; i < warps; i++) {
        const u32 other = draw(block.random) % (i + 1);
        order[i] = order[other];
        order[other] = i;
    }
    for (u32 i = 0; i < warps; i++) make_ready(block, order[i], ~0u);
}

inline const char* describe(const Thread& thread, char (&text)[128]) {
    switch (thread.state) {
    case State::Returned: return "has returned";
    case State::AtBarrier:
        snprintf(text, sizeof text, "is at the barrier of %s:%u", thread.place.name(), thread.place.line);
        return text;
    default:
        snprintf(text, sizeof text, "is at the warp operation of %s:%u with lanes %08x", thread.place.name(),
                 thread.place.line, thread.mask);
        return text;
    }
}

[[noreturn]] inline void fail_divergent(const Thread& one, const Thread& other) {
    char first[128], second[128];
    fail("divergent: threads wait for each other in vain: thread %u %s, thread %u %s", one.number(),
         describe(one, first), other.number(), describe(other, second));
}

// No thread is ready and not all are at a barrier: says which two do not fit together.
[[noreturn]] inline void fail_stuck(Block& block) {
    for (u32 i = 0; i < block.launch->block; i++) {
        // A warp's operation is the more telling, if there is one.
        const Thread& thread = block.thread(i);
        for (u32 lane = 0; thread.state == State::AtCollective && lane < LANES; lane++) {
            const Thread& other = block.thread(i / LANES * LANES + lane);
            const bool together = other.state == State::AtCollective && other.place == thread.place;
            if ((thread.mask >> lane & 1) && !together) fail_divergent(thread, other);
        }
    }
    const Thread& first = block.thread(block.first_at_barrier);
    for (u32 i = 0; i < block.launch->block; i++) {
        if (block.thread(i).state != State::AtBarrier) fail_divergent(first, block.thread(i));
    }
    fail("threads wait for each other in vain");
}

// Lets others run until this thread is ready again.
inline void wait(Thread& thread) {
    Block& block = *thread.block;
    if (block.ready_count == 0) {
        if (block.returned == block.launch->block) {
            switch_fiber(thread.fiber, block.host, true);
            __builtin_unreachable();
        }
        if (block.at_barrier != block.launch->block) fail_stuck(block);
        block.opened_votes = block.votes;
        block.at_barrier = block.votes = 0;
        make_all_ready(block);
    }
    Thread& next = block.thread(block.ready[--block.ready_count]);
    if (&next != &thread) switch_fiber(thread.fiber, next.fiber, thread.state == State::Returned);
    thread.state = State::Ready;
}

// Waits for all threads of the block; returns how many of them voted.
__attribute__((noinline)) inline u32 barrier(bool vote, Place place) {
    Thread& thread = self();
    Block& block = *thread.block;
    thread.state = State::AtBarrier;
    thread.place = place;
    if (block.at_barrier++ == 0) block.first_at_barrier = thread.number();
    const Thread& first = block.thread(block.first_at_barrier);
    if (!(first.place == place)) fail_divergent(first, thread);
    block.votes += vote;
    wait(thread);
    return block.opened_votes;
}

// Waits for the lanes in `mask`; the last one carries out the operation.
__attribute__((noinline)) inline void collective(u32 mask, Collective operation, void* payload, Place place) {
    Thread& thread = self();
    Block& block = *thread.block;
    const u32 warp = thread.number() / LANES;
    thread.state = State::AtCollective;
    thread.place = place;
    thread.mask = mask;
    thread.collective = operation;
    thread.payload = payload;
    if (!(mask >> thread.lane() & 1)) fail("a warp operation of lanes %08x at %s:%u by another lane", mask, place.name(), place.line);
    block.at_collective[warp] |= 1u << thread.lane();
    if ((block.at_collective[warp] & mask) == mask) {
        Thread* lanes[LANES];
        for (u32 lane = 0; lane < LANES; lane++) {
            lanes[lane] = &block.thread(warp * LANES + lane);
            const Thread& other = *lanes[lane];
            const bool together =
                other.mask == mask && other.collective == operation && other.place == place;
            if ((mask >> lane & 1) && !together) fail_divergent(thread, *lanes[lane]);
        }
        if (operation) operation(lanes, mask);
        block.at_collective[warp] &= ~mask;
        make_ready(block, warp, mask);
    }
    wait(thread);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// `bytes` of shared memory from byte `start` on, the same for all threads. Regions lie apart, so that writing beyond one
// is seen; they cannot overlap.
inline void* take_shared(u32 start, u64 bytes) {
    Block& block = *self().block;
    if (start + bytes > block.launch->shared_bytes) {
        fail("takes %llu bytes of shared memory from byte %u on, but the launch gives %llu", bytes, start,
             block.launch->shared_bytes);
    }
    u32 end = 0, place = 0;
    for (u32 i = 0; i < block.region_count; i++) {
        const Region& region = block.regions[i];
        if (region.start == start && region.bytes == bytes) return block.shared + region.place;
        end = region.start + region.bytes;
        place = region.place + region.bytes + GAP;
    }
    if (start < end) fail("takes shared memory from byte %u on, which is taken already in another way", start);
    if (block.region_count == REGIONS_MAX) fail("takes more than %u regions of shared memory", REGIONS_MAX);
    place = (place + 127) / 128 * 128 + start % 128 / 16 * 16;
    block.regions[block.region_count++] = Region{start, u32(bytes), place};
    char* memory = block.shared + place;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory, bytes);
#endif
    memset(memory, POISON_BYTE, bytes);
    return memory;
}

inline size_t shared_capacity(const Launch& launch) {
    return launch.shared_bytes + REGIONS_MAX * (GAP + 256);
}

// All of shared memory is a gap until it is taken.
inline void begin_shared(Block& block) {
    block.region_count = 0;
    const size_t capacity = shared_capacity(*block.launch);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block.shared, capacity);
#endif
    memset(block.shared, GAP_BYTE, capacity);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(block.shared, capacity);
#endif
}

// Whether nothing was written beyond the regions; else says which.
inline void check_shared(Block& block) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block.shared, shared_capacity(*block.launch));
#endif
    u32 from = 0;
    for (u32 i = 0; i <= block.region_count; i++) {
        const size_t to = i < block.region_count ? block.regions[i].place : shared_capacity(*block.launch);
        for (size_t at = from; at < to; at++) {
            if ((unsigned char)block.shared[at] == GAP_BYTE) continue;
            block.failed = true;
            const Region none{0, 0, 0}, &before = i > 0 ? block.regions[i - 1] : none;
            snprintf(block.message, block.message_bytes,
                     "block (%u, %u, %u): out of bounds in shared memory: wrote beyond the %u bytes taken from byte %u on",
                     block.index.x, block.index.y, block.index.z, before.bytes, before.start);
            return;
        }
        if (i < block.region_count) from = block.regions[i].place + block.regions[i].bytes;
    }
}

inline void check_alignment(const void* address, u32 alignment, EMULATOR_PLACE) {
    (void)file, (void)line;
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
        fail("an access of %u bytes at address %p, which is not a multiple of that", alignment, address);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies: they happen when they are waited for, and not at all if nobody waits.

inline void copy_async(void* to, const void* from, u32 bytes, u32 valid_bytes) {
    Thread& thread = self();
    check_alignment(to, bytes);
    if (valid_bytes) check_alignment(from, bytes);
    if (thread.copy_count == thread.copy_capacity) {
        thread.copy_capacity = 2 * thread.copy_capacity + 16;
        thread.copies = static_cast<PendingCopy*>(realloc(thread.copies, thread.copy_capacity * sizeof(PendingCopy)));
    }
    thread.copies[thread.copy_count++] = PendingCopy{to, from, bytes, valid_bytes, thread.copy_group};
}

inline void commit_copies() {
    self().copy_group++;
}

// All but the latest `pending` groups.
inline void wait_for_copies(u32 pending) {
    Thread& thread = self();
    u32 kept = 0;
    for (u32 i = 0; i < thread.copy_count; i++) {
        const PendingCopy copy = thread.copies[i];
        if (copy.group + pending < thread.copy_group) {
            memset(copy.to, 0, copy.bytes);
            memcpy(copy.to, copy.from, copy.valid_bytes);
        } else {
            thread.copies[kept++] = copy;
        }
    }
    thread.copy_count = kept;
}

// ---------------------------------------------------------------------------------------------------------------------
// Running blocks

inline void thread_main() {
    Thread& thread = self();
    Block& block = *thread.block;
    Fiber from = {};
    fiber_entered(from);
    if (!block.host.bottom) { // the first thread of all is entered from the host
        block.host.bottom = from.bottom;
        block.host.bytes = from.bytes;
    }
    block.kernel->call(block.launch->arguments);
    thread.state = State::Returned;
    block.returned++;
    wait(thread);
    __builtin_unreachable();
}

inline void begin_thread(Block& block, u32 number) {
    Thread& thread = block.thread(number);
    char* bottom = block.stack(number);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom, STACK_BYTES);
#endif
    char* top = bottom + STACK_BYTES - Block::spread(reinterpret_cast<uintptr_t>(bottom));
    thread = Thread{};
    thread.index = Index3{number, 0, 0};
    thread.block = &block;
    thread.fiber = Fiber{new_stack(top, thread_main), bottom, STACK_BYTES, nullptr};
    thread.canary = CANARY;
}

inline void check_stacks(Block& block) {
    for (u32 i = 0; i < block.launch->block && !block.failed; i++) {
        if (block.thread(i).canary == CANARY) continue;
        block.failed = true;
        snprintf(block.message, block.message_bytes, "thread %u needs a stack of more than %zu bytes", i,
                 size_t(STACK_BYTES));
    }
}

inline void run_block(Block& block) {
    begin_shared(block);
    for (u32 i = 0; i < block.launch->block; i++) begin_thread(block, i);
    block.returned = 0;
    block.ready_count = 0;
    block.at_barrier = block.votes = 0;
    memset(block.at_collective, 0, sizeof block.at_collective);
    make_all_ready(block);
    switch_fiber(block.host, block.thread(block.ready[--block.ready_count]).fiber);
    for (u32 i = 0; i < block.launch->block; i++) free(block.thread(i).copies);
    if (!block.failed) check_stacks(block);
    if (!block.failed) check_shared(block);
}

} // namespace emulator

// Runs the blocks of these numbers, in this order, on stacks for `launch->block` threads. Returns 0, or 1 with a message.
extern "C" __attribute__((visibility("default"))) int emulator_run(const emulator::Kernel* kernel,
                                                                     const emulator::Launch* launch,
                                                                     const emulator::u64* blocks, emulator::u64 count,
                                                                     char* stacks, char* message,
                                                                     emulator::u64 message_bytes) {
    using namespace emulator;
    Block* block = static_cast<Block*>(calloc(1, sizeof(Block)));
    block->kernel = kernel;
    block->launch = launch;
    block->dimensions = Index3{launch->block, 1, 1};
    block->grid = Index3{launch->grid[0], launch->grid[1], launch->grid[2]};
    block->stacks = stacks;
    block->shared = static_cast<char*>(aligned_alloc(128, (shared_capacity(*launch) + 127) / 128 * 128));
    block->message = message;
    block->message_bytes = message_bytes;
    for (u64 i = 0; i < count && !block->failed; i++) {
        const u64 number = blocks[i];
        const u64 column = number / launch->grid[0];
        block->index = Index3{u32(number % launch->grid[0]), u32(column % launch->grid[1]), u32(column / launch->grid[1])};
        block->random = launch->seed + number * 0xD1342543DE82EF95;
        run_block(*block);
    }
    const bool failed = block->failed;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block->shared, shared_capacity(*launch));
#endif
    free(block->shared);
    free(block);
    return failed;
}
