// Adafactor (Shazeer & Stern 2018) over all tensors of an arena at once. For a matrix g `[rows, cols]`:
//
//     r ← β·r + (1 − β)·mean over columns of (g² + ε)        [rows]
//     c ← β·c + (1 − β)·mean over rows of (g² + ε)           [cols]
//     u = g / (√(r / mean r) · √c)
//     p ← p·(1 − η·λ) − η·u / max(1, RMS(u))
//
// and for a vector u = g / √v with v the running mean of g² + ε itself; ε = 1e-30.
//
// A block has a task: whole rows of one tensor. Five launches, because u needs all of r and c, and the update all of u. Bytes: 20 an element, of which the gradient is read three times; the sums over
// columns are taken from a task's rows while L2 still has them, and leave a row of partial sums a task.
#include "reduce.cuh"
#include "slots.cuh"

constexpr u32 THREADS = 256;
constexpr float EPSILON = 1e-30f;

DEVICE float square(float x) {
    return x * x;
}

// A running mean of squares.
struct Blend {
    float beta, one_minus_beta;

    DEVICE float of(float old, float mean) const {
        return beta * old + one_minus_beta * (mean + EPSILON);
    }
};

// Rows of a matrix: r, and the task's sums of squares by column in its row of `col_sums`. Vectors: v.
// hot
KERNEL LAUNCH_BOUNDS(THREADS) adafactor_moments(
    const Slot* slots, const Task* tasks, const float* g, float* moments, float* col_sums, float beta,
    float one_minus_beta, float gradient_scale
) {
    const Task task = tasks[blockIdx.x];
    const Slot slot = slots[task.slot];
    const Blend blend{beta, one_minus_beta};
    const float* part = g + Part(slot, task).offset;
    if (!slot.is_matrix) {
        float* v = moments + slot.col_moments;
        for (u32 i = threadIdx.x; i < slot.cols; i += THREADS) v[i] = blend.of(v[i], square(part[i] * gradient_scale));
        return;
    }
    float* r = moments + slot.row_moments + task.first_row;
    for (u32 row = threadIdx.x / WARP; row < task.rows; row += THREADS / WARP) {
        const float* values = part + u64(row) * slot.cols;
        float sum = 0.0f;
#pragma unroll 8
        for (u32 column = threadIdx.x % WARP; column < slot.cols; column += WARP) {
            sum += square(values[column] * gradient_scale);
        }
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) r[row] = blend.of(r[row], sum / float(slot.cols));
    }
    float* sums = col_sums + slot.col_sums + u64(blockIdx.x - slot.first_task) * slot.cols;
    for (u32 column = threadIdx.x; column < slot.cols; column += THREADS) {
        float sum = 0.0f;
#pragma unroll 8
        for (u32 row = 0; row < task.rows; row++) sum += square(part[u64(row) * slot.cols + column] * gradient_scale);
        sums[column] = sum;
    }
}

// The factors 1/√(r / mean r) and 1/√c of each matrix, which lie as the moments do; of vectors 1/√v. Row y of the grid has a
// tensor, and its blocks every `gridDim.x`-th stripe of 32 columns; the first of them has the rows, too.
KERNEL LAUNCH_BOUNDS(1024) adafactor_factors(
    const Slot* slots, float* moments, const float* col_sums, float* factors, float beta, float one_minus_beta
) {
    Shared shared;
    float* sums = shared.take<float>(blockDim.x);
    double* of_warps = shared.take<double>(WARP);
    const Slot slot = slots[blockIdx.y];
    const Blend blend{beta, one_minus_beta};
    const u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    float* c = moments + slot.col_moments;
    float* c_factors = factors + slot.col_moments;
    for (u32 stripe = blockIdx.x * WARP; stripe < slot.cols; stripe += gridDim.x * WARP) {
        const u32 column = stripe + threadIdx.x % WARP;
        float sum = 0.0f;
        if (slot.is_matrix && column < slot.cols) {
            const float* partials = col_sums + slot.col_sums + column;
#pragma unroll 4
            for (u32 task = warp; task < slot.tasks; task += warps) sum += partials[u64(task) * slot.cols];
        }
        __syncthreads(); // the last stripe's have been read
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (warp > 0 || column >= slot.cols) continue;
        if (slot.is_matrix) {
            for (u32 other = 1; other < warps; other++) sum += sums[other * WARP + threadIdx.x];
            c[column] = blend.of(c[column], sum / float(slot.rows));
        }
        c_factors[column] = float(1.0 / sqrt(double(c[column])));
    }
    if (blockIdx.x > 0 || !slot.is_matrix) return;
    const float* r = moments + slot.row_moments;
    double sum = 0.0;
    for (u32 row = threadIdx.x; row < slot.rows; row += blockDim.x) sum += double(r[row]);
    const double mean = block_sum(sum, of_warps) / double(slot.rows);
    for (u32 row = threadIdx.x; row < slot.rows; row += blockDim.x) {
        factors[slot.row_moments + row] = float(1.0 / sqrt(double(r[row]) / mean));
    }
}

// The factors of a task's tensor: u = g · f.
struct Factors {
    const float* rows; // from the task's first row on; null for vectors
    const float* cols;
    u32 count;

    DEVICE Factors(const Slot& slot, const Task& task, const float* factors)
        : rows(slot.is_matrix ? factors + slot.row_moments + task.first_row : nullptr),
          cols(factors + slot.col_moments), count(slot.cols) {}

    // Of element `i` of the task.
    DEVICE float of(u32 i) const {
        return rows ? rows[i / count] * cols[i % count] : cols[i];
    }

    // Of four elements.
    DEVICE void of4(u32 i, float (&f)[4]) const {
        if (count % 4 != 0) {
#pragma unroll
            for (u32 k = 0; k < 4; k++) f[k] = of(i + k);
            return;
        }
        const float row = rows ? rows[i / count] : 1.0f;
#pragma unroll
        for (u32 k = 0; k < 4; k++) f[k] = row * cols[i % count + k];
    }
};

// Σ u² of each task.
// hot
KERNEL LAUNCH_BOUNDS(THREADS) adafactor_squares(
    const Slot* slots, const Task* tasks, const float* g, const float* factors, double* partials, u32 aligned,
    float gradient_scale
) {
    Shared shared;
    double* of_warps = shared.take<double>(THREADS / WARP);
    const Task task = tasks[blockIdx.x];
    const Slot slot = slots[task.slot];
    const Part part(slot, task);
    const Factors factor(slot, task, factors);
    float sum = 0.0f;
    part.each(
        aligned,
        [&](u32 i) {
            float values[4], f[4];
            load4(g + part.offset + i, values);
            factor.of4(i, f);
#pragma unroll
            for (u32 k = 0; k < 4; k++) sum += square(values[k] * gradient_scale * f[k]);
        },
        [&](u32 i) { sum += square(g[part.offset + i] * gradient_scale * factor.of(i)); }
    );
    const double total = block_sum(double(sum), of_warps);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// η · (what g is of what is given as g) / max(1, RMS(u)) of each tensor, which a block has.
KERNEL LAUNCH_BOUNDS(THREADS) adafactor_rates(
    const Slot* slots, const double* partials, float* rates, float learning_rate, float gradient_scale
) {
    Shared shared;
    double* of_warps = shared.take<double>(THREADS / WARP);
    const Slot slot = slots[blockIdx.x];
    double sum = 0.0;
    for (u32 task = threadIdx.x; task < slot.tasks; task += THREADS) sum += partials[slot.first_task + task];
    sum = block_sum(sum, of_warps);
    if (threadIdx.x > 0) return;
    const double rms = sqrt(sum / (double(slot.rows) * double(slot.cols)));
    // Not `fmax`, which would make 1 of NaN.
    rates[blockIdx.x] = float(double(learning_rate) / (rms < 1.0 ? 1.0 : rms)) * gradient_scale;
}

// `decay` is η·λ.
// hot
KERNEL LAUNCH_BOUNDS(THREADS) adafactor(
    const Slot* slots, const Task* tasks, float* p, const float* g, const float* factors, const float* rates, u32 aligned,
    float decay
) {
    const Task task = tasks[blockIdx.x];
    const Slot slot = slots[task.slot];
    const Part part(slot, task);
    const Factors factor(slot, task, factors);
    const float rate = rates[task.slot], keep = slot.decays ? 1.0f - decay : 1.0f;
    part.each(
        aligned,
        [&](u32 i) {
            float ps[4], gs[4], f[4];
            load4(p + part.offset + i, ps);
            load4(g + part.offset + i, gs);
            factor.of4(i, f);
#pragma unroll
            for (u32 k = 0; k < 4; k++) ps[k] = ps[k] * keep - rate * (gs[k] * f[k]);
            store4(p + part.offset + i, ps);
        },
        [&](u32 i) {
            const u64 at = part.offset + i;
            p[at] = p[at] * keep - rate * (g[at] * factor.of(i));
        }
    );
}
