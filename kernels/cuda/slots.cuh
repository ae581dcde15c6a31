// The tensors of a flat f32 arena, as src/ops/slots.rs uploads them, and how a block works on a part of one.
#pragma once
#include "element.cuh"

// Four floats next to each other, at a multiple of 16 bytes.
DEVICE void load4(const float* from, float (&values)[4]) {
    const Bytes16 bytes = load16(from);
#pragma unroll
    for (u32 i = 0; i < 4; i++) values[i] = __uint_as_float(bytes.words[i]);
}
DEVICE void store4(float* to, const float (&values)[4]) {
    Bytes16 bytes;
#pragma unroll
    for (u32 i = 0; i < 4; i++) bytes.words[i] = __float_as_uint(values[i]);
    store16(to, bytes);
}

// A matrix row by row, or a vector as a single row.
struct Slot {
    u64 offset; // of its first element
    u64 row_moments, col_moments; // Adafactor's: where they begin in the arena of moments; a vector has the latter only
    u64 col_sums; // where its first task's begin in Adafactor's partial sums; a row of `cols` a task
    u32 rows, cols;
    u32 first_task, tasks;
    u32 is_matrix, decays;
};

// Whole rows of a slot: what a block takes, some 32 thousand elements.
struct Task {
    u32 slot, first_row, rows, unused;
};

// The elements of a task.
struct Part {
    u64 offset;
    u32 length;

    DEVICE Part(const Slot& slot, const Task& task)
        : offset(slot.offset + u64(task.first_row) * slot.cols), length(task.rows * slot.cols) {}

    // Calls `f(index, count)` for groups of four elements, or for single ones where the part does not begin at a multiple
    // of 16 bytes, each in one thread of the block.
    template <class Four, class One> DEVICE void each(bool aligned, Four four, One one) const {
        const u32 whole = aligned && offset % 4 == 0 ? length / 4 * 4 : 0;
        for (u32 i = threadIdx.x * 4; i < whole; i += blockDim.x * 4) four(i);
        for (u32 i = whole + threadIdx.x; i < length; i += blockDim.x) one(i);
    }
};
