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
#include "piece.cuh"

// A sum that f16 would round to infinity (from 65520 on) becomes ±64504, where transformers clamps the residual stream.
DEVICE float in_range(float value) {
#ifdef ELEMENT_F16
    if (fabsf(value) >= 65520.0f) return copysignf(64504.0f, value);
#endif
    return value;
}

KERNEL LAUNCH_BOUNDS(256) dropout(const element* x, u32 x_stride, element* y, u32 y_stride, u32 rows, u32 cols,
                                  u32 whole_vectors, DROPOUT_PARAMETERS) {
    const Piece piece(rows, cols, whole_vectors);
    float values[8] = {}, factors[8];
    piece.load(x, x_stride, values);
    piece.factors(DROPOUT, factors);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] *= factors[i];
    piece.store(y, y_stride, values);
}

KERNEL LAUNCH_BOUNDS(256) residual_forward(const element* x, u32 x_stride, const element* delta, u32 delta_stride,
                                           element* y, u32 y_stride, u32 rows, u32 cols, u32 whole_vectors,
                                           DROPOUT_PARAMETERS) {
    const Piece piece(rows, cols, whole_vectors);
    float values[8] = {}, deltas[8] = {}, factors[8];
    piece.load(x, x_stride, values);
    piece.load(delta, delta_stride, deltas);
    piece.factors(DROPOUT, factors);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = in_range(values[i] + deltas[i] * factors[i]);
    piece.store(y, y_stride, values);
}
