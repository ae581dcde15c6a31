// Sums and maxima over a warp and over a block, in a fixed order: the same bits in every lane and at every run.
#pragma once
#include "element.cuh"

template <class T> DEVICE T warp_sum(T value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

DEVICE float warp_max(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// Over all threads of the block, which must all call; `partial` is shared memory for a float a warp (32 suffice) and may be
// used again afterwards.
template <class T> DEVICE T block_sum(T value, T* partial) {
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    value = warp_sum(value);
    if (lane == 0) partial[threadIdx.x / WARP] = value;
    __syncthreads();
    value = warp_sum(lane < warps ? partial[lane] : T(0));
    __syncthreads();
    return value;
}

DEVICE float block_max(float value, float* partial) {
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    value = warp_max(value);
    if (lane == 0) partial[threadIdx.x / WARP] = value;
    __syncthreads();
    value = warp_max(partial[lane < warps ? lane : 0]);
    __syncthreads();
    return value;
}
