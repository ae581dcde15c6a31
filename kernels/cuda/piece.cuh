// What a thread of an elementwise kernel takes: 8 elements that follow each other in the order of the rows, which is also
// how dropout numbers them.
#pragma once
#include "element.cuh"
#include "random.cuh"

// Eight elements of `[rows, cols]` matrices, whose rows may begin any number of elements apart. With `whole_vectors` (rows
// are whole vectors of 8 at addresses of 16 bytes) they are in one row and are read and written at once; otherwise one by
// one.
struct Piece {
    u32 rows, cols;
    bool whole_vectors;
    // Of the first element; beyond the last row in threads that are too many.
    u32 row, column;

    DEVICE Piece(u32 rows, u32 cols, u32 whole_vectors) : rows(rows), cols(cols), whole_vectors(whole_vectors != 0) {
        const u64 first = 8 * number();
        if (u64(gridDim.x) * blockDim.x <= 0x1fffffff) { // 32 bits are enough, and divide five times as fast
            row = u32(first) / cols;
            column = u32(first) % cols;
        } else {
            row = u32(first / cols);
            column = u32(first % cols);
        }
    }

    // Of the piece, which is the thread's.
    DEVICE u64 number() const {
        return u64(blockIdx.x) * blockDim.x + threadIdx.x;
    }

    // Calls `f(i, row, column)` for each of the eight that exists.
    template <class F> DEVICE void each(F f) const {
        u32 r = row, c = column;
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            if (r < rows) f(i, r, c);
            if (++c == cols) c = 0, r++;
        }
    }

    template <class T> DEVICE void load(const T* matrix, u32 stride, float (&values)[8]) const {
        if (!whole_vectors) {
            each([&](u32 i, u32 row, u32 column) { values[i] = to_float(matrix[u64(row) * stride + column]); });
        } else if (row < rows) {
            load8(matrix + u64(row) * stride + column, values);
        }
    }

    template <class T> DEVICE void store(T* matrix, u32 stride, const float (&values)[8]) const {
        if (!whole_vectors) {
            each([&](u32 i, u32 row, u32 column) { matrix[u64(row) * stride + column] = from_float<T>(values[i]); });
        } else if (row < rows) {
            store8(matrix + u64(row) * stride + column, values);
        }
    }

    // All lanes of the warp must call.
    DEVICE void factors(const Dropout& dropout, float (&factors)[8]) const {
        dropout.factors8(number() - threadIdx.x % WARP, factors);
    }
};
