// The most probable tokens of rows of logits.
//
// A block has a row; a thread has every blockDim-th logit of it, and knows the best that it has left. A round of the
// selection takes the block's best, and only the thread that had it looks through its logits again: a row is read from
// memory three times, however many tokens are wanted.
#include "reduce.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr u32 NONE = 0xffffffff;

// An integer that orders logits, and of equal ones those of lower tokens first; 0 is below all.
DEVICE u64 key_of(float logit, u32 token) {
    const u32 bits = __float_as_uint(logit);
    const u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return u64(ordered) << 32 | (NONE - token);
}

DEVICE float logit_of(u64 key) {
    const u32 ordered = u32(key >> 32);
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

DEVICE u64 larger(u64 a, u64 b) {
    return a > b ? a : b;
}

DEVICE u64 warp_largest(u64 key) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) key = larger(key, __shfl_xor_sync(ALL_LANES, key, step));
    return key;
}

// The best of this thread's logits that comes after `bound`.
DEVICE u64 best_below(const float* row, u32 vocabulary, u64 bound) {
    u64 best = 0;
    for (u32 token = threadIdx.x; token < vocabulary; token += blockDim.x) {
        const u64 key = key_of(row[token], token);
        if (key < bound) best = larger(best, key);
    }
    return best;
}

// `apart[A]`, `apart_starts[B+1]`, `tokens[B,count]`, `log_probs[B,count]`, `apart_log_probs[A]`, `logsumexp[B]`.
KERNEL LAUNCH_BOUNDS(1024) top_tokens(
    float* logits, u32 vocabulary, float scale, const u32* apart, const u32* apart_starts, u32 count, u32* tokens,
    float* log_probs, float* apart_log_probs, float* logsumexp
) {
    Shared shared;
    float* partial = shared.take<float>(32);
    u64* of_warps = shared.take<u64>(32);
    u64* chosen = shared.take<u64>(1);
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    float* row = logits + u64(blockIdx.x) * vocabulary;

    float most = row[threadIdx.x % vocabulary] * scale;
    for (u32 token = threadIdx.x; token < vocabulary; token += blockDim.x) most = fmaxf(most, row[token] * scale);
    most = block_max(most, partial);
    float sum = 0.0f;
    for (u32 token = threadIdx.x; token < vocabulary; token += blockDim.x) {
        sum += exp2f((row[token] * scale - most) * LOG2_E);
    }
    const float lse = most + logf(block_sum(sum, partial));
    if (threadIdx.x == 0) logsumexp[blockIdx.x] = lse;

    // All have read the row: the sum waited for them.
    for (u32 index = apart_starts[blockIdx.x] + threadIdx.x; index < apart_starts[blockIdx.x + 1]; index += blockDim.x) {
        float* logit = row + apart[index];
        apart_log_probs[index] = *logit * scale - lse;
        *logit = -INFINITE;
    }
    __syncthreads();

    const u64 nothing = key_of(-INFINITE, 0);
    u64 best = best_below(row, vocabulary, ~u64(0));
    for (u32 place = 0; place < count; place++) {
        const u64 of_warp = warp_largest(best);
        if (lane == 0) of_warps[warp] = of_warp;
        __syncthreads();
        if (warp == 0) {
            const u64 key = warp_largest(lane < warps ? of_warps[lane] : 0);
            if (lane == 0) *chosen = key;
        }
        __syncthreads();
        const u64 key = *chosen;
        if (threadIdx.x == 0) {
            const u64 at = u64(blockIdx.x) * count + place;
            tokens[at] = key > nothing ? NONE - u32(key) : NONE;
            log_probs[at] = key > nothing ? logit_of(key) * scale - lse : -INFINITE;
        }
        if (key != 0 && key == best) best = best_below(row, vocabulary, key);
    }
}
