// The loss of rows of logits, and its gradient in their place.
//
//     logsumexp = log Σ e^x        loss = logsumexp − x[label]        d_x = e^(x − logsumexp) − s/V − (1 − s)·[label]
//
// for a label smoothing of s; the loss that is returned is the one without smoothing. The logits x are f32 and carry the
// head's scale already. d_x, times `scale`, is rounded once, to `element`, which is what the two products that follow take,
// and is written over the row that it came from: number i of 16 bits lies where x[i / 2] was.
//
// Legend: V vocabulary. A block has a row; the grid is the rows of a chunk.
//
// Bytes of a row: 4V read by the first pass, 4V by the second, 2V written. The second reading should come from L2 for the
// most part: a row of T5 has 128 KiB, and with 40 registers there are three blocks of 512 threads on a processor, 396 rows
// or 50 MiB on an H200. Keeping the row in registers would save that reading, but then a processor holds one row and loads
// nothing while it computes.
#include "pack.cuh"
#include "reduce.cuh"

constexpr u32 IGNORED_LABEL = 0xffffffff;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3.402823466e38f;

// Packs that a thread loads before it computes on any.
constexpr u32 UNROLL = 2;

DEVICE float exponential(float x) {
    return exp2f(x * LOG2_E);
}

// The largest of some numbers, and Σ e^(x − most). Of none: the lowest number and not −∞, whose difference with itself is
// no number.
struct Exponentials {
    float most, sum;
};

DEVICE Exponentials join(Exponentials a, Exponentials b) {
    const float most = fmaxf(a.most, b.most);
    return Exponentials{most, a.sum * exponential(a.most - most) + b.sum * exponential(b.most - most)};
}

DEVICE Exponentials take_in(Exponentials total, const float (&values)[PACK], u32 count) {
    float most = total.most;
#pragma unroll
    for (u32 i = 0; i < PACK; i++) most = i < count ? fmaxf(most, values[i]) : most;
    float sum = total.sum * exponential(total.most - most);
#pragma unroll
    for (u32 i = 0; i < PACK; i++) sum += i < count ? exponential(values[i] - most) : 0.0f;
    return Exponentials{most, sum};
}

// log Σ e^x of the block's row, in every thread.
DEVICE float logsumexp(const float* row, u32 vocabulary, bool aligned, Exponentials* of_warps) {
    const u32 step = blockDim.x * PACK, warps = blockDim.x / WARP;
    Exponentials total{LOWEST, 0.0f};
    for (u32 begin = threadIdx.x * PACK; begin < vocabulary; begin += UNROLL * step) {
        float values[UNROLL][PACK];
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) load8(row, begin + k * step, vocabulary, aligned, values[k]);
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            const u32 column = begin + k * step;
            if (column < vocabulary) total = take_in(total, values[k], vocabulary - column);
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float most = __shfl_down_sync(ALL_LANES, total.most, step);
        const float sum = __shfl_down_sync(ALL_LANES, total.sum, step);
        total = join(total, Exponentials{most, sum});
    }
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = total;
    __syncthreads();
    total = of_warps[0];
    for (u32 warp = 1; warp < warps; warp++) total = join(total, of_warps[warp]);
    return total.most + logf(total.sum);
}

// NaN for a label that there is not.
DEVICE float loss_of_row(const float* row, u32 label, u32 vocabulary, float logsumexp) {
    return label < vocabulary ? logsumexp - row[label] : __uint_as_float(0x7fffffff);
}

// `labels[N]`, `losses[N]` and `logits[N,V]` of the chunk's rows.
KERNEL LAUNCH_BOUNDS(512) cross_entropy_forward(
    const float* logits, const u32* labels, float* losses, u32 vocabulary, u32 aligned
) {
    Shared shared;
    Exponentials* of_warps = shared.take<Exponentials>(blockDim.x / WARP);
    const float* row = logits + u64(blockIdx.x) * vocabulary;
    const u32 label = labels[blockIdx.x];
    if (label == IGNORED_LABEL) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        return;
    }
    const float lse = logsumexp(row, vocabulary, aligned, of_warps);
    if (threadIdx.x == 0) losses[blockIdx.x] = loss_of_row(row, label, vocabulary, lse);
}

// hot
KERNEL LAUNCH_BOUNDS(512) cross_entropy_forward_backward(
    float* logits, const u32* labels, float* losses, u32 vocabulary, float smoothing, float scale, u32 aligned
) {
    Shared shared;
    Exponentials* of_warps = shared.take<Exponentials>(blockDim.x / WARP);
    float* row = logits + u64(blockIdx.x) * vocabulary;
    element* gradient = reinterpret_cast<element*>(row);
    const u32 label = labels[blockIdx.x];
    const bool ignored = label == IGNORED_LABEL;
    const float lse = ignored ? 0.0f : logsumexp(row, vocabulary, aligned, of_warps);
    if (threadIdx.x == 0) losses[blockIdx.x] = ignored ? 0.0f : loss_of_row(row, label, vocabulary, lse);

    const float background = smoothing / float(vocabulary);
    const u32 step = blockDim.x * PACK;
    for (u32 base = 0; base < vocabulary; base += UNROLL * step) {
        const u32 begin = base + threadIdx.x * PACK;
        float values[UNROLL][PACK];
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) load8(row, begin + k * step, vocabulary, aligned, values[k]);
        // The gradients of these take the place of logits before them, or of these: all have been read now.
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            const u32 column = begin + k * step;
#pragma unroll
            for (u32 i = 0; i < PACK; i++) {
                const float target = column + i == label ? 1.0f - smoothing + background : background;
                values[k][i] = ignored ? 0.0f : scale * (exponential(values[k][i] - lse) - target);
            }
            store8(gradient, column, vocabulary, aligned, values[k]);
        }
    }
}
