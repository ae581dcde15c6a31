// AdamW (Loshchilov & Hutter 2019) over all tensors of an arena at once:
//
//     p ← p − η·λ·p
//     m ← m + (1 − β₁)·(g − m)
//     v ← β₂·v + (1 − β₂)·g²
//     p ← p − η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//
// Where the rate η is scaled, it is multiplied by s = max(RMS(p), 1e-3) of each matrix: two small kernels find s before.
//
// A block has a task: whole rows of one tensor. Bytes: the fewest there are, 28 an element; 4 more for s.
#include "reduce.cuh"
#include "slots.cuh"

constexpr u32 THREADS = 256;
constexpr float SCALE_MIN = 1e-3f;

// Σ p² of each task, of matrices only.
// hot
KERNEL LAUNCH_BOUNDS(THREADS) adamw_squares(
    const Slot* slots, const Task* tasks, const float* p, double* partials, u32 aligned
) {
    Shared shared;
    double* of_warps = shared.take<double>(THREADS / WARP);
    const Task task = tasks[blockIdx.x];
    const Slot slot = slots[task.slot];
    if (!slot.is_matrix) return;
    const Part part(slot, task);
    double sum = 0.0;
    part.each(
        aligned,
        [&](u32 i) {
            float values[4];
            load4(p + part.offset + i, values);
#pragma unroll
            for (u32 k = 0; k < 4; k++) sum += double(values[k]) * double(values[k]);
        },
        [&](u32 i) { sum += double(p[part.offset + i]) * double(p[part.offset + i]); }
    );
    sum = block_sum(sum, of_warps);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// s of each tensor, which a block has; 1 for vectors.
KERNEL LAUNCH_BOUNDS(THREADS) adamw_scales(const Slot* slots, const double* partials, float* scales) {
    Shared shared;
    double* of_warps = shared.take<double>(THREADS / WARP);
    const Slot slot = slots[blockIdx.x];
    double sum = 0.0;
    if (slot.is_matrix) {
        for (u32 task = threadIdx.x; task < slot.tasks; task += THREADS) sum += partials[slot.first_task + task];
    }
    sum = block_sum(sum, of_warps);
    if (threadIdx.x > 0) return;
    const float rms = float(sqrt(sum / (double(slot.rows) * double(slot.cols))));
    scales[blockIdx.x] = slot.is_matrix ? fmaxf(rms, SCALE_MIN) : 1.0f;
}

// The scalars of a tensor's update.
struct Update {
    float keep; // 1 − η·λ
    float one_minus_beta1, beta2, one_minus_beta2;
    float step_size; // η / (1 − β₁ᵗ)
    float root_correction; // 1 / √(1 − β₂ᵗ)
    float epsilon, gradient_scale;

    DEVICE void apply(float& p, float g, float& m, float& v) const {
        g *= gradient_scale;
        m += one_minus_beta1 * (g - m);
        v = beta2 * v + one_minus_beta2 * (g * g);
        p = p * keep - step_size * m / (sqrtf(v) * root_correction + epsilon);
    }
};

// `scales` may be null.
// hot
KERNEL LAUNCH_BOUNDS(THREADS) adamw(
    const Slot* slots, const Task* tasks, float* p, const float* g, float* m, float* v, const float* scales, u32 aligned,
    float decay, float one_minus_beta1, float beta2, float one_minus_beta2, float step_size, float root_correction,
    float epsilon, float gradient_scale
) {
    const Task task = tasks[blockIdx.x];
    const Slot slot = slots[task.slot];
    const Part part(slot, task);
    const float scale = scales ? scales[task.slot] : 1.0f;
    const Update update{
        slot.decays ? 1.0f - scale * decay : 1.0f,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        scale * step_size,
        root_correction,
        epsilon,
        gradient_scale,
    };
    part.each(
        aligned,
        [&](u32 i) {
            const u64 at = part.offset + i;
            float ps[4], gs[4], ms[4], vs[4];
            load4(p + at, ps);
            load4(g + at, gs);
            load4(m + at, ms);
            load4(v + at, vs);
#pragma unroll
            for (u32 k = 0; k < 4; k++) update.apply(ps[k], gs[k], ms[k], vs[k]);
            store4(p + at, ps);
            store4(m + at, ms);
            store4(v + at, vs);
        },
        [&](u32 i) {
            const u64 at = part.offset + i;
            update.apply(p[at], g[at], m[at], v[at]);
        }
    );
}
