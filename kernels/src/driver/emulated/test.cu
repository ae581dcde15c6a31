// Kernels that do one thing each, or fail to do it: with RIGHT=0 a kernel has a mistake that the emulator must find.
#include "ptx.cuh"
#include "random.cuh"
#include "reduce.cuh"

// y[t] = x[t + 1], round the block, through shared memory; the mistake is the missing barrier.
KERNEL rotate(const element* x, element* y) {
    Shared shared;
    element* row = shared.take<element>(blockDim.x);
    const u32 t = threadIdx.x, first = blockIdx.x * blockDim.x;
    row[t] = x[first + t];
    if (RIGHT) __syncthreads();
    y[first + t] = row[(t + 1) % blockDim.x];
}

// The same through a buffer that is used twice; the mistake is that it is written again while others still read it.
KERNEL rotate_twice(const element* x, element* y) {
    Shared shared;
    element* row = shared.take<element>(blockDim.x);
    const u32 t = threadIdx.x, first = blockIdx.x * blockDim.x;
    element value = x[first + t];
    for (int round = 0; round < 2; round++) {
        row[t] = value;
        __syncthreads();
        value = row[(t + 1) % blockDim.x];
        if (RIGHT) __syncthreads();
    }
    y[first + t] = value;
}

// The same among the lanes of a warp, which do not run in step either.
KERNEL rotate_lanes(const element* x, element* y) {
    Shared shared;
    element* row = shared.take<element>(blockDim.x);
    const u32 t = threadIdx.x, first = blockIdx.x * blockDim.x;
    row[t] = x[first + t];
    if (RIGHT) __syncwarp();
    y[first + t] = row[t / WARP * WARP + (t + 1) % WARP];
}

// y = x; the mistake is to write one element too many.
KERNEL copy(const element* x, element* y, u32 count) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count + !RIGHT) y[i] = x[i < count ? i : 0];
}

// y = x by way of shared memory, a third of the block's elements more than the threads write; the mistake is to write
// beyond the first array, where the second one would be on a GPU.
KERNEL copy_shared(const element* x, element* y) {
    Shared shared;
    element* one = shared.take<element>(blockDim.x);
    element* other = shared.take<element>(blockDim.x);
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    one[threadIdx.x + (RIGHT ? 0 : 16)] = x[i];
    __syncthreads();
    other[threadIdx.x] = one[threadIdx.x];
    y[i] = other[threadIdx.x];
}

// y = x by way of asynchronous copies of 16 bytes; the mistake is not to wait for the last of them.
KERNEL copy_in_the_background(const element* x, element* y) {
    constexpr u32 VECTOR = 16 / sizeof(element);
    Shared shared;
    element* one = shared.take<element>(VECTOR * blockDim.x);
    element* other = shared.take<element>(VECTOR * blockDim.x);
    const u32 i = 2 * blockIdx.x * blockDim.x + threadIdx.x;
    copy_async16(one + VECTOR * threadIdx.x, x + VECTOR * i);
    commit_copies();
    copy_async16(other + VECTOR * threadIdx.x, x + VECTOR * (i + blockDim.x));
    commit_copies();
    wait_for_copies<1>();
    store16(y + VECTOR * i, load16(one + VECTOR * threadIdx.x));
    if (RIGHT) wait_for_copies<0>();
    store16(y + VECTOR * (i + blockDim.x), load16(other + VECTOR * threadIdx.x));
}

// y = x by way of a sum that overflows, which C++ does not define.
KERNEL overflow(const element* x, element* y) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    const i32 large = 0x7fffffff - i32(threadIdx.x) + !RIGHT;
    y[i] = large + i32(threadIdx.x) > 0 ? x[i] : element();
}

// A barrier for some of the threads.
KERNEL leave_before_barrier(element* y) {
    if (!RIGHT && threadIdx.x == 40) return;
    __syncthreads();
    y[blockIdx.x * blockDim.x + threadIdx.x] = from_float<element>(1.0f);
}

// Barriers that threads reach from different places.
KERNEL part_ways(element* y) {
    if (RIGHT || threadIdx.x != 40) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[blockIdx.x * blockDim.x + threadIdx.x] = from_float<element>(1.0f);
}

// A shuffle of all lanes by some of them.
KERNEL shuffle(element* y) {
    float value = 1.0f;
    if (RIGHT || threadIdx.x % WARP < 7) value = __shfl_xor_sync(ALL_LANES, value, 1);
    y[blockIdx.x * blockDim.x + threadIdx.x] = from_float<element>(value);
}

// y[i] = x[i] as an element.
KERNEL convert(const float* x, element* y) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = from_float<element>(x[i]);
}

// y[i] = x[i] as a float.
KERNEL widen(const element* x, float* y) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = to_float(x[i]);
}

// For each thread: the sum and the largest of the block's x, of its warp's, and the x of lanes to its left and right.
KERNEL reductions(const float* x, float* y) {
    Shared shared;
    float* partial = shared.take<float>(32);
    const u32 t = threadIdx.x;
    const float value = x[t];
    float* row = y + 8 * t;
    row[0] = block_sum(value, partial);
    row[1] = block_max(value, partial);
    row[2] = warp_sum(value);
    row[3] = warp_max(value);
    row[4] = __shfl_up_sync(ALL_LANES, value, 3);
    row[5] = __shfl_down_sync(ALL_LANES, value, 5, 16);
    row[6] = __shfl_sync(ALL_LANES, value, 9);
    row[7] = float(__syncthreads_count(value > 0) * 100 + __popc(__ballot_sync(ALL_LANES, value > 0)));
}

// sums[0] += all of x, in any order; the largest of x's bits to sums[1].
KERNEL atomics(const u32* x, u32* sums) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&sums[0], x[i]);
    atomicMax(&sums[1], x[i]);
}

// y[i] = the factor of element i, by warps and one by one.
KERNEL factors(float* y, float* z, DROPOUT_PARAMETERS) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    float mine[8];
    DROPOUT.factors8(i - threadIdx.x % WARP, mine);
    store8(y + 8 * i, mine);
    for (u32 j = 0; j < 8; j++) z[8 * i + j] = DROPOUT.factor(8 * i + j);
}

#ifndef ELEMENT_F32
// c[16,8] = a[16,16] · b[16,8] by a warp, the operands by way of shared memory.
KERNEL product(const element* a, const element* b, float* c) {
    Shared shared;
    element* tile = shared.take<element>(32 * 16);
    const u32 lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
    for (u32 i = lane; i < 16 * 16; i += WARP) tile[i] = a[i];
    for (u32 i = lane; i < 16 * 8; i += WARP) tile[16 * 16 + i / 8 * 16 + i % 8] = b[i];
    __syncwarp();
    u32 left[4], right[4];
    const u32 row = lane % 8 + lane / 8 % 2 * 8, column = lane / 16 * 8;
    load_matrices4(left, tile + 16 * row + column);
    load_matrices4<true>(right, tile + 16 * 16 + 16 * row);
    float sum[4] = {};
    const u32 operand[2] = {right[0], right[1]};
    mma(sum, left, operand, element());
    c[8 * group + pair] = sum[0];
    c[8 * group + pair + 1] = sum[1];
    c[8 * (group + 8) + pair] = sum[2];
    c[8 * (group + 8) + pair + 1] = sum[3];
}
#else
// c[16,8] = a[16,8] · b[8,8] by a warp, in tf32.
KERNEL product(const element* a, const element* b, float* c) {
    const u32 lane = threadIdx.x, group = lane / 4, place = lane % 4, pair = 2 * place;
    const u32 left[4] = {__float_as_uint(a[8 * group + place]), __float_as_uint(a[8 * (group + 8) + place]),
                         __float_as_uint(a[8 * group + place + 4]), __float_as_uint(a[8 * (group + 8) + place + 4])};
    const u32 right[2] = {__float_as_uint(b[8 * place + group]), __float_as_uint(b[8 * (place + 4) + group])};
    float sum[4] = {};
    mma_tf32(sum, left, right);
    c[8 * group + pair] = sum[0];
    c[8 * group + pair + 1] = sum[1];
    c[8 * (group + 8) + pair] = sum[2];
    c[8 * (group + 8) + pair + 1] = sum[3];
}
#endif

KERNEL LAUNCH_BOUNDS(3 * WARP) bounded() {}
