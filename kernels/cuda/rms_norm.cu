// RMSNorm as T5 has it: no mean, no bias.
//
//     y = cast(x · r) · w        r = (mean(x²) + eps)^-½ of the row, kept as `rstd`
//
// Backward, with g = d_y · w:
//
//     d_x += r · g − x · r³ · mean(g · x)        d_w += Σ d_y · cast(x · r) over the rows
//
// Legend: N rows, D columns. A team of WARPS warps has a row, a thread PACKS packs of 8 of its columns, all in registers:
// WARPS · PACKS · 256 ≥ D. A block is as many teams as there are in 256 threads.
//
// Bytes: the fewest there are. Forward reads x and writes y; backward reads d_y, x and d_x and writes d_x. The sum d_w runs
// down the rows of a block in registers, then over its teams, and leaves a row of partial sums per block, which
// `rms_norm_d_weight` adds in the blocks' order: 4 · D bytes written and read for each `rows_per_block`.
#include "pack.cuh"
#include "reduce.cuh"

constexpr u32 TEAM = WARPS * WARP;
// Columns that a team takes at a time.
constexpr u32 SPAN = TEAM * PACK;
constexpr u32 THREADS = 256;

// The sum over a team, in each of its threads. All threads of the block call.
DEVICE float team_sum(float value, float* of_warps) {
    value = warp_sum(value);
    if (WARPS == 1) return value;
    __syncthreads(); // all have read the sum before this one
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0.0f;
    for (u32 warp = 0; warp < WARPS; warp++) value += of_warps[threadIdx.x / TEAM * WARPS + warp];
    return value;
}

// Rounded to an element, as it is where the weight is multiplied.
DEVICE float cast(float value) {
    return to_float(from_float<element>(value));
}

// hot
KERNEL LAUNCH_BOUNDS(THREADS) rms_norm_forward(
    const element* x, u32 x_stride, const element* weight, float eps, element* y, u32 y_stride, float* rstd, u32 rows,
    u32 cols, u32 aligned
) {
    Shared shared;
    float* of_warps = shared.take<float>(THREADS / WARP);
    const u32 row = blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM;
    const u32 first = threadIdx.x % TEAM * PACK;
    const bool exists = row < rows;
    const element* x_row = x + u64(row) * x_stride;

    Pack<element> xs[PACKS] = {};
    float squares = 0.0f;
    if (exists) {
#pragma unroll
        for (u32 k = 0; k < PACKS; k++) xs[k] = load_pack(x_row, first + k * SPAN, cols, aligned);
#pragma unroll
        for (u32 k = 0; k < PACKS; k++) {
#pragma unroll
            for (u32 i = 0; i < PACK; i++) squares += unpack(xs[k], i) * unpack(xs[k], i);
        }
    }
    const float r = 1.0f / sqrtf(team_sum(squares, of_warps) / float(cols) + eps);
    if (!exists) return;
    if (first == 0) rstd[row] = r;
#pragma unroll
    for (u32 k = 0; k < PACKS; k++) {
        const u32 column = first + k * SPAN;
        float values[PACK];
        load8(weight, column, cols, aligned, values);
#pragma unroll
        for (u32 i = 0; i < PACK; i++) values[i] *= cast(unpack(xs[k], i) * r);
        store8(y + u64(row) * y_stride, column, cols, aligned, values);
    }
}

// Block b takes rows b · rows_per_block and on, a team every `teams`-th of them, and leaves row b of `partials`.
// hot
KERNEL LAUNCH_BOUNDS(THREADS) rms_norm_backward(
    const element* d_y, u32 d_y_stride, const element* x, u32 x_stride, const element* weight, const float* rstd,
    element* d_x, u32 d_x_stride, float* partials, u32 rows, u32 cols, u32 rows_per_block, u32 aligned
) {
    Shared shared;
    const u32 teams = THREADS / TEAM, team = threadIdx.x / TEAM;
    float* of_warps = shared.take<float>(THREADS / WARP);
    float* d_weight_of_teams = shared.take<float>(teams * cols);
    const u32 first = threadIdx.x % TEAM * PACK;
    const u32 begin = blockIdx.x * rows_per_block, end = min(rows, begin + rows_per_block);

    float d_weight[PACKS][PACK] = {};
    for (u32 turn = begin; turn < end; turn += teams) {
        const u32 row = turn + team;
        const bool exists = row < end;
        element* d_x_row = d_x + u64(row) * d_x_stride;
        Pack<element> xs[PACKS] = {}, d_ys[PACKS] = {}, olds[PACKS] = {};
        float r = 0.0f, along = 0.0f;
        if (exists) {
            r = rstd[row];
#pragma unroll
            for (u32 k = 0; k < PACKS; k++) {
                const u32 column = first + k * SPAN;
                xs[k] = load_pack(x + u64(row) * x_stride, column, cols, aligned);
                d_ys[k] = load_pack(d_y + u64(row) * d_y_stride, column, cols, aligned);
                olds[k] = load_pack(d_x_row, column, cols, aligned);
            }
        }
#pragma unroll
        for (u32 k = 0; k < PACKS; k++) {
            float w[PACK];
            load8(weight, first + k * SPAN, cols, aligned, w);
#pragma unroll
            for (u32 i = 0; i < PACK; i++) {
                const float value = unpack(xs[k], i), gradient = unpack(d_ys[k], i);
                along += gradient * w[i] * value;
                d_weight[k][i] += gradient * cast(value * r);
            }
        }
        along = r * r * r * (team_sum(along, of_warps) / float(cols));
        if (!exists) continue;
#pragma unroll
        for (u32 k = 0; k < PACKS; k++) {
            const u32 column = first + k * SPAN;
            float values[PACK];
            load8(weight, column, cols, aligned, values);
#pragma unroll
            for (u32 i = 0; i < PACK; i++) {
                const float gradient = r * (unpack(d_ys[k], i) * values[i]) - unpack(xs[k], i) * along;
                values[i] = unpack(olds[k], i) + gradient;
            }
            store8(d_x_row, column, cols, aligned, values);
        }
    }

#pragma unroll
    for (u32 k = 0; k < PACKS; k++) {
        store8(d_weight_of_teams + team * cols, first + k * SPAN, cols, cols % 8 == 0, d_weight[k]);
    }
    __syncthreads();
    for (u32 column = threadIdx.x; column < cols; column += blockDim.x) {
        float sum = 0.0f;
        for (u32 other = 0; other < teams; other++) sum += d_weight_of_teams[other * cols + column];
        partials[u64(blockIdx.x) * cols + column] = sum;
    }
}

// d_weight += the sum of the `count` rows of partials. A block has 32 columns, a warp every `warps`-th row of them; their
// sums are added in the warps' order.
KERNEL LAUNCH_BOUNDS(1024) rms_norm_d_weight(const float* partials, u32 count, float* d_weight, u32 cols) {
    Shared shared;
    float* sums = shared.take<float>(blockDim.x);
    const u32 warps = blockDim.x / WARP, warp = threadIdx.x / WARP;
    const u32 column = blockIdx.x * WARP + threadIdx.x % WARP;
    float sum = 0.0f;
    if (column < cols) {
#pragma unroll 4
        for (u32 row = warp; row < count; row += warps) sum += partials[u64(row) * cols + column];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || column >= cols) return;
    float total = d_weight[column];
    for (u32 other = 0; other < warps; other++) total += sums[other * WARP + threadIdx.x];
    d_weight[column] = total;
}
