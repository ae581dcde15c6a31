// Σ x² of a flat f32 range, and its first element that is infinite or not a number.
//
// Sums are f64, so that no square overflows: over a block's elements, then over the blocks, both in a fixed order. A card
// with few f64 units still adds faster than it reads. Every element is read once.
#include "reduce.cuh"

constexpr u32 BLOCK = 1 << 15; // elements of a block
constexpr u32 THREADS = 256;

DEVICE double square(float x) {
    return double(x) * double(x);
}

// hot
KERNEL LAUNCH_BOUNDS(THREADS) sum_of_squares(const float* x, u64 count, double* partials, u32 aligned) {
    Shared shared;
    double* of_warps = shared.take<double>(THREADS / WARP);
    const u64 begin = u64(blockIdx.x) * BLOCK;
    const u32 length = u32(min(count - begin, u64(BLOCK)));
    const float* part = x + begin;
    double sum = 0.0;
    const u32 whole = aligned ? length / 8 * 8 : 0;
#pragma unroll 2
    for (u32 i = threadIdx.x * 8; i < whole; i += THREADS * 8) {
        float values[8];
        load8(part + i, values);
#pragma unroll
        for (u32 k = 0; k < 8; k++) sum += square(values[k]);
    }
    for (u32 i = whole + threadIdx.x; i < length; i += THREADS) sum += square(part[i]);
    sum = block_sum(sum, of_warps);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// One block.
KERNEL LAUNCH_BOUNDS(1024) sum_of_partials(const double* partials, u32 count, double* total) {
    Shared shared;
    double* of_warps = shared.take<double>(WARP);
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
    sum = block_sum(sum, of_warps);
    if (threadIdx.x == 0) *total = sum;
}

// `found` is 0 beforehand, and then `count` less the first bad element's number, or 0 still. The one atomic does not depend
// on any order.
KERNEL LAUNCH_BOUNDS(THREADS) find_not_finite(const float* x, u64 count, u64* found, u32 aligned) {
    const u64 begin = u64(blockIdx.x) * BLOCK;
    const u32 length = u32(min(count - begin, u64(BLOCK)));
    const float* part = x + begin;
    const u32 NONE = 0xffffffff;
    u32 first = NONE;
    const u32 whole = aligned ? length / 8 * 8 : 0;
#pragma unroll 2
    for (u32 i = threadIdx.x * 8; i < whole; i += THREADS * 8) {
        float values[8];
        load8(part + i, values);
#pragma unroll
        for (u32 k = 0; k < 8; k++) {
            if (!isfinite(values[k])) first = min(first, i + k);
        }
    }
    for (u32 i = whole + threadIdx.x; i < length; i += THREADS) {
        if (!isfinite(part[i])) first = min(first, i);
    }
    if (first != NONE) atomicMax(found, count - (begin + first));
}
