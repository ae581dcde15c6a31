// y = x in another type, rounded to nearest even where y is narrower. x is of type `element`, y of the one that TO names.
//
// A thread takes a piece of 8; everything is read and written once.
#include "piece.cuh"

#if TO == 0
typedef float target;
#elif TO == 1
typedef bf16 target;
#else
typedef f16 target;
#endif

KERNEL LAUNCH_BOUNDS(256) cast(
    const element* x, u32 x_stride, target* y, u32 y_stride, u32 rows, u32 cols, u32 whole_vectors
) {
    const Piece piece(rows, cols, whole_vectors);
    float values[8] = {};
    piece.load(x, x_stride, values);
    piece.store(y, y_stride, values);
}
