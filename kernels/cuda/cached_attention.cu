// One query a sequence against keys and values that lie in any rows of a cache: self-attention of decoding.
//
//     out = softmax(q · kᵀ + bias[key − query]) · v        over the keys k[rows[t]], t = 0 … length − 1, the last its own
//
// Legend: a block has a head of a query, the grid is queries × heads. Its warps take keys in turns, each with a softmax of
// its own that is joined to the others' at the end; a lane has every 32nd number of a head. A token's step reads each key
// and value of a sequence once, which is all that it costs: products this thin would leave tensor cores idle.
#include "reduce.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3.402823466e38f;
constexpr u32 PARTS = (HEAD_SIZE + WARP - 1) / WARP;

DEVICE float exponential(float x) {
    return exp2f(x * LOG2_E);
}

KERNEL LAUNCH_BOUNDS(128) cached_attention(
    const element* q, u32 q_stride, const element* k, u32 k_stride, const element* v, u32 v_stride, const u32* rows,
    u32 rows_stride, u32 length, const float* bias, u32 bias_stride, u32 reach, element* out, u32 out_stride
) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Shared shared;
    float* most_of = shared.take<float>(warps);
    float* sum_of = shared.take<float>(warps);
    float* totals = shared.take<float>(warps * HEAD_SIZE);

    const u32 query = blockIdx.x, first = blockIdx.y * HEAD_SIZE;
    float own[PARTS], total[PARTS];
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        const u32 column = part * WARP + lane;
        own[part] = column < HEAD_SIZE ? to_float(q[u64(query) * q_stride + first + column]) : 0.0f;
        total[part] = 0.0f;
    }
    float most = LOWEST, sum = 0.0f;
    for (u32 position = warp; position < length; position += warps) {
        const u64 row = rows[u64(query) * rows_stride + position];
        float score = 0.0f;
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            const u32 column = part * WARP + lane;
            if (column < HEAD_SIZE) score += own[part] * to_float(k[row * k_stride + first + column]);
        }
        const u32 distance = min(length - 1 - position, reach);
        score = warp_sum(score) + bias[u64(blockIdx.y) * bias_stride + reach - distance];
        const float next = fmaxf(most, score);
        const float keep = exponential(most - next), probability = exponential(score - next);
        most = next;
        sum = sum * keep + probability;
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            const u32 column = part * WARP + lane;
            const float value = column < HEAD_SIZE ? to_float(v[row * v_stride + first + column]) : 0.0f;
            total[part] = total[part] * keep + probability * value;
        }
    }
    if (lane == 0) {
        most_of[warp] = most;
        sum_of[warp] = sum;
    }
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        const u32 column = part * WARP + lane;
        if (column < HEAD_SIZE) totals[warp * HEAD_SIZE + column] = total[part];
    }
    __syncthreads();

    for (u32 other = 0; other < warps; other++) most = fmaxf(most, most_of[other]);
    float all = 0.0f;
    for (u32 other = 0; other < warps; other++) all += sum_of[other] * exponential(most_of[other] - most);
    for (u32 column = threadIdx.x; column < HEAD_SIZE; column += blockDim.x) {
        float value = 0.0f;
        for (u32 other = 0; other < warps; other++) {
            value += totals[other * HEAD_SIZE + column] * exponential(most_of[other] - most);
        }
        out[u64(query) * out_stride + first + column] = from_float<element>(value / all);
    }
}
