// Dropout, and the addition of a sub-layer's output to the residual stream:
//
//     dropout           y[N,D] = f · x
//     residual_forward  y[N,D] = x + f · delta
//
// where f is an element's dropout factor; elements are numbered row by row. N rows, D columns.
//
// A thread takes 8 elements that follow each other in that order. With `whole_vectors` (rows of whole vectors of 8 at
// addresses of 16 bytes) they are in one row and are read and written at once; otherwise one by one. Each element is read
// and written once, and of 8 elements one Philox block is computed.
#include "element.cuh"
#include "random.cuh"

// Eight elements of a matrix whose rows begin `stride` elements apart.
struct Piece {
    u32 rows, cols;
    u64 first; // number of the first element
    bool whole_vectors;

    template <class T> DEVICE void load(const T* matrix, u32 stride, float (&values)[8]) const {
        if (whole_vectors) {
            if (first < u64(rows) * cols) load8(matrix + offset(first, stride), values);
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                if (first + i < u64(rows) * cols) values[i] = to_float(matrix[offset(first + i, stride)]);
            }
        }
    }

    template <class T> DEVICE void store(T* matrix, u32 stride, const float (&values)[8]) const {
        if (whole_vectors) {
            if (first < u64(rows) * cols) store8(matrix + offset(first, stride), values);
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                if (first + i < u64(rows) * cols) matrix[offset(first + i, stride)] = from_float<T>(values[i]);
            }
        }
    }

    DEVICE u64 offset(u64 number, u32 stride) const {
        return number / cols * stride + number % cols;
    }
};

KERNEL LAUNCH_BOUNDS(256) dropout(const element* x, u32 x_stride, element* y, u32 y_stride, u32 rows, u32 cols,
                                  u32 whole_vectors, DROPOUT_PARAMETERS) {
    const u64 piece_number = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    const Piece piece{rows, cols, 8 * piece_number, whole_vectors != 0};
    float values[8] = {}, factors[8];
    piece.load(x, x_stride, values);
    DROPOUT.factors8(piece_number - threadIdx.x % WARP, factors);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] *= factors[i];
    piece.store(y, y_stride, values);
}

KERNEL LAUNCH_BOUNDS(256) residual_forward(const element* x, u32 x_stride, const element* delta, u32 delta_stride,
                                           element* y, u32 y_stride, u32 rows, u32 cols, u32 whole_vectors,
                                           DROPOUT_PARAMETERS) {
    const u64 piece_number = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    const Piece piece{rows, cols, 8 * piece_number, whole_vectors != 0};
    float values[8] = {}, deltas[8] = {}, factors[8];
    piece.load(x, x_stride, values);
    piece.load(delta, delta_stride, deltas);
    DROPOUT.factors8(piece_number - threadIdx.x % WARP, factors);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] += deltas[i] * factors[i];
    piece.store(y, y_stride, values);
}
