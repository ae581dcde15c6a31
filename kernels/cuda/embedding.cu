// Token embeddings, with the dropout that follows them; f is an element's dropout factor.
//
//     y[n] = f · table[ids[n]]        d_table[id] += Σ f · d_y[n] over the rows n with ids[n] = id
//
// Legend: N rows, D columns, V vocabulary. An id of V or more gives NaN in its row, and no gradient.
//
// Forward: a thread takes a piece of 8; every element is read and written once.
//
// Backward adds the rows of an id in their order, whatever the launch: no atomics, no sorting, no waiting for the host. A
// block owns the ids that are its number modulo the grid, a power of two. It looks through all ids, a window of 2048 at a
// time, lists its own rows in order, and links each to the next one with the same id; a warp then follows the chain that
// begins at an id's first row, 256 columns at a time. Bytes: d_y once, each touched row of d_table read and written once
// for every window that it occurs in (the second time from L2: the same block wrote it), and 4N from L2 for each block.
// A frequent id is one chain, of UNROLL loads in flight: 800 rows (5 % of 16 thousand) take some 80 µs, beside the others.
#include "pack.cuh"
#include "piece.cuh"

// hot
KERNEL LAUNCH_BOUNDS(256) embedding_forward(
    const u32* ids, u32 vocabulary, const element* table, u32 table_stride, element* y, u32 y_stride, u32 rows, u32 cols,
    u32 whole_vectors, DROPOUT_PARAMETERS
) {
    const Piece piece(rows, cols, whole_vectors);
    const float none = __uint_as_float(0x7fffffff);
    float values[8] = {}, factors[8];
    if (!piece.whole_vectors) {
        piece.each([&](u32 i, u32 row, u32 column) {
            const u32 id = ids[row];
            values[i] = id < vocabulary ? to_float(table[u64(id) * table_stride + column]) : none;
        });
    } else if (piece.row < rows) {
        const u32 id = ids[piece.row];
        load8(table + u64(min(id, vocabulary - 1)) * table_stride + piece.column, values);
        if (id >= vocabulary) values[0] = none;
    }
    piece.factors(DROPOUT, factors);
#pragma unroll
    for (u32 i = 0; i < 8; i++) values[i] *= factors[i];
    piece.store(y, y_stride, values);
}

constexpr u32 THREADS = 256;
constexpr u32 IDS = 8; // that a thread looks at in a window
constexpr u32 WINDOW = THREADS * IDS;
constexpr u32 COLUMNS = WARP * PACK; // of a warp
constexpr u32 UNROLL = 8;

// The rows of a window that a block owns, in order.
struct Rows {
    u32 count;
    u32* ids;
    u32* numbers;
    u32* nexts; // index of the next one with the same id, or `count`
    u8* firsts; // whether it is the first one with its id
};

// How many of the block's threads before this one have how many; and how many all have.
DEVICE u32 block_scan(u32 value, u32* of_warps, u32& total) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 sum = value;
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 other = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == WARP - 1) of_warps[warp] = sum;
    __syncthreads();
    u32 before = 0;
    total = 0;
    for (u32 other = 0; other < blockDim.x / WARP; other++) {
        if (other == warp) before = total;
        total += of_warps[other];
    }
    return before + sum - value;
}

DEVICE void list_rows(Rows& list, const u32* ids, u32 window, u32 rows, u32 vocabulary, u32* of_warps) {
    u32 mine[IDS], count = 0;
    const u32 first = window + threadIdx.x * IDS;
#pragma unroll
    for (u32 i = 0; i < IDS; i++) mine[i] = first + i < rows ? ids[first + i] : vocabulary;
#pragma unroll
    for (u32 i = 0; i < IDS; i++) {
        if (mine[i] % gridDim.x != blockIdx.x) mine[i] = vocabulary;
        count += mine[i] < vocabulary;
    }
    u32 at = block_scan(count, of_warps, list.count); // all warps are done with the last window
#pragma unroll
    for (u32 i = 0; i < IDS; i++) {
        if (mine[i] < vocabulary) {
            list.ids[at] = mine[i];
            list.numbers[at] = first + i;
            at++;
        }
    }
    __syncthreads();
}

// Frequent ids are soon found again, rare ones are in short lists.
DEVICE void link_rows(Rows& list) {
    for (u32 i = threadIdx.x; i < list.count; i += blockDim.x) {
        u32 next = i + 1, before = i;
        while (next < list.count && list.ids[next] != list.ids[i]) next++;
        while (before > 0 && list.ids[before - 1] != list.ids[i]) before--;
        list.nexts[i] = next;
        list.firsts[i] = before == 0;
    }
    __syncthreads();
}

// The gradient `[N,D]` and its mask.
struct Gradient {
    const element* d_y;
    u32 stride, cols;
    bool aligned;
    Dropout dropout;

    // Of 8 columns from `column` on, which in lane 0 is a multiple of COLUMNS. All lanes must call.
    DEVICE void factors(u32 row, u32 column, float (&factors)[PACK]) const {
        const u64 first = u64(row) * cols + column;
        if (cols % 128 == 0) {
            dropout.factors8(first / 8 - threadIdx.x % WARP, factors);
        } else {
#pragma unroll
            for (u32 i = 0; i < PACK; i++) factors[i] = dropout.factor(first + i);
        }
    }
};

// d_table_row += the rows of the list from `entry` on that have its id, in 8 columns from `column` on.
DEVICE void add_rows(const Rows& list, u32 entry, u32 column, const Gradient& gradient, float* d_table_row) {
    float totals[PACK];
    load8(d_table_row, column, gradient.cols, gradient.aligned, totals);
    while (entry < list.count) {
        u32 rows[UNROLL], count = 0;
        Pack<element> packs[UNROLL];
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            if (entry < list.count) {
                rows[k] = list.numbers[entry];
                packs[k] = load_pack(
                    gradient.d_y + u64(rows[k]) * gradient.stride, column, gradient.cols, gradient.aligned
                );
                entry = list.nexts[entry];
                count++;
            }
        }
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            if (k < count) {
                float factors[PACK];
                gradient.factors(rows[k], column, factors);
#pragma unroll
                for (u32 i = 0; i < PACK; i++) totals[i] += unpack(packs[k], i) * factors[i];
            }
        }
    }
    store8(d_table_row, column, gradient.cols, gradient.aligned, totals);
}

// hot
KERNEL LAUNCH_BOUNDS(256) embedding_backward(
    const u32* ids, const element* d_y, u32 d_y_stride, float* d_table, u32 d_table_stride, u32 rows, u32 cols,
    u32 vocabulary, u32 aligned, DROPOUT_PARAMETERS
) {
    Shared shared;
    u32* of_warps = shared.take<u32>(THREADS / WARP);
    Rows list{0, shared.take<u32>(WINDOW), shared.take<u32>(WINDOW), shared.take<u32>(WINDOW), shared.take<u8>(WINDOW)};
    const Gradient gradient{d_y, d_y_stride, cols, aligned != 0, DROPOUT};
    const u32 stripes = (cols + COLUMNS - 1) / COLUMNS;
    for (u32 window = 0; window < rows; window += WINDOW) {
        list_rows(list, ids, window, rows, vocabulary, of_warps);
        link_rows(list);
        for (u32 task = threadIdx.x / WARP; task < list.count * stripes; task += THREADS / WARP) {
            const u32 entry = task / stripes;
            const u32 column = task % stripes * COLUMNS + threadIdx.x % WARP * PACK;
            if (list.firsts[entry]) {
                add_rows(list, entry, column, gradient, d_table + u64(list.ids[entry]) * d_table_stride);
            }
        }
    }
}
