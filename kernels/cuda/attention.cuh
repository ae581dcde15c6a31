// What the attention kernels have in common: tiles of rows in shared memory, small matrices in registers, the bias by
// distance, dropout.
//
// The scores of a head are cut into pieces of ROWS × KEYS. A block has ROWS rows and goes over the columns; each of its warps
// has WARP_ROWS of the rows to itself, from the scores to the sums over the columns, so that numbers of size query × key never
// leave a thread's registers: a sum of products comes out in the very layout that the next product wants as its left operand.
// Tiles of q, k, v, d_out lie in shared memory; what changes with the columns is there twice, and is copied in the background.
//
//                      K   element  block (warps × rows)  columns  shared memory  blocks a multiprocessor  limit
//   attention_forward  64  16 bits  4 × 32                64        57 KiB        2 (8 warps)              registers
//                     128  16 bits  8 × 16                64       104 KiB        1 (8 warps)              registers
//                      64  f32      8 × 16                64       104 KiB        2 (16 warps)             shared memory
//   …_backward_queries 64  16 bits  4 × 32                32        70 KiB        2 (8 warps)              registers
//                     128  16 bits  8 × 16                32       128 KiB        1 (8 warps)              registers
//   …_backward_keys    64  16 bits  4 × 32                32        58 KiB        2 (8 warps)              registers
// (on a GPU with 228 KiB of shared memory and 64 Ki registers, a bias that reaches 128). A multiprocessor is kept busy by two
// warps on each of its quarters and by the independent products of each, as in FlashAttention-2.
//
// Work against traffic, K = 64, 16 bits: a tile of 64 keys and values, 16 KiB, comes from the L2 cache for 128 queries: 2·2·128·
// 64·64 FLOP, 128 for each byte. From shared memory a warp reads 2 × 8 KiB for 128 products of 16 × 8 × 16: 128 bytes each,
// which is what the memory gives in the time of such a product on one of the four quarters at the tensor cores' full rate.
//
// Compiled for an element type and for the constants
//   HEAD_SIZE   K, up to 128
//   TF32        1: f32 operands are rounded to tf32; 0: they are split in two, for three products instead of one
// The file that includes this defines
//   KEYS        columns of the scores that a block computes at a time (of keys, or of queries): 16, 32 or 64
#pragma once

#include "element.cuh"
#include "ptx.cuh"
#include "random.cuh"

// Elements of 16 bytes, which is what is copied, and what a fragment's rows are made of.
constexpr u32 CHUNK = 16 / sizeof(element);
// Depth of a product of fragments.
constexpr u32 DEPTH = 2 * CHUNK;
// Columns of a tile: those beyond HEAD_SIZE are zero.
constexpr u32 WIDTH = (HEAD_SIZE + 15) / 16 * 16;
// Elements from a row of a tile to the next: an odd number of chunks, so that the same chunk of eight consecutive rows,
// which is what `load_matrices4` reads at a time, lies in different banks.
constexpr u32 PITCH = WIDTH + CHUNK;

// A warp has its rows of the scores, and of what they are multiplied with, in registers: 32 rows where they fit (operands
// from shared memory then serve twice as many products), else 16. A block has 128 rows, so that what all its warps read is
// loaded for many, or 64 if shared memory would not hold more. `kernels/src/ops/attention/gpu.rs` has the same numbers.
constexpr u32 ROW_BYTES = WIDTH * sizeof(element);
constexpr u32 WARP_ROWS = sizeof(element) == 2 && ROW_BYTES <= 128 ? 32 : 16;
constexpr u32 WARPS = WARP_ROWS == 32 || ROW_BYTES > 256 ? 4 : 8;
constexpr u32 ROWS = WARPS * WARP_ROWS;
constexpr u32 THREADS = WARP * WARPS;

// Fragments in the rows of a warp, in a tile's columns (as a sum, and as an operand), in KEYS (likewise).
constexpr u32 M = WARP_ROWS / 16;
constexpr u32 WIDTH_SUMS = WIDTH / 8, WIDTH_STEPS = WIDTH / DEPTH;
constexpr u32 KEY_SUMS = KEYS / 8, KEY_STEPS = KEYS / DEPTH;
static_assert(HEAD_SIZE <= 128 && KEYS % 16 == 0 && 128 % KEYS == 0, "tile sizes");

constexpr float LOG2_E = 1.4426950408889634f;

DEVICE u32 lane_number() { return threadIdx.x % 32; }
DEVICE u32 warp_number() { return threadIdx.x / 32; }
// The two coordinates of a lane in fragments (ptx.cuh): rows g and g + 8, columns 2t and 2t + 1 of a sum.
DEVICE u32 lane_group() { return threadIdx.x % 32 / 4; }
DEVICE u32 lane_in_group() { return threadIdx.x % 4; }

struct alignas(8) Pair {
    float first, second;
};

// ---- Fragments ----

struct Left {
    u32 x[4];
};
struct Right {
    u32 x[2];
};

// sum += left · right
template <class T> DEVICE void multiply_add(float (&sum)[4], const Left& left, const Right& right) {
    mma(sum, left.x, right.x, T());
}

// A number is the sum of two tf32 but for 2^-22 of it; of the four products the smallest, below 2^-22, is left out.
template <> DEVICE void multiply_add<float>(float (&sum)[4], const Left& left, const Right& right) {
    Left left_high, left_low;
    Right right_high, right_low;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float x = __uint_as_float(left.x[i]);
        left_high.x[i] = to_tf32(x);
        left_low.x[i] = to_tf32(x - __uint_as_float(left_high.x[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float x = __uint_as_float(right.x[i]);
        right_high.x[i] = to_tf32(x);
        right_low.x[i] = to_tf32(x - __uint_as_float(right_high.x[i]));
    }
    if (!TF32) {
        mma_tf32(sum, left_low.x, right_high.x);
        mma_tf32(sum, left_high.x, right_low.x);
    }
    mma_tf32(sum, left_high.x, right_high.x);
}

// Rows 0..16, columns 0..DEPTH of `tile`.
DEVICE Left load_left(const element* tile) {
    const u32 lane = lane_number();
    Left left;
    load_matrices4(left.x, tile + lane % 16 * PITCH + lane / 16 * CHUNK);
    return left;
}

// The transposed of rows 0..16, columns 0..DEPTH of `tile`: two fragments side by side.
DEVICE void load_right_transposed(Right (&right)[2], const element* tile) {
    const u32 lane = lane_number();
    u32 x[4];
    load_matrices4(x, tile + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * CHUNK);
    right[0] = {x[0], x[1]};
    right[1] = {x[2], x[3]};
}

// Rows 0..DEPTH, columns 0..16 of `tile`: two fragments side by side. For 32-bit elements the rows come in the order
// that `as_left` has its columns in.
DEVICE void load_right(Right (&right)[2], const element* tile) {
    if constexpr (sizeof(element) == 2) {
        const u32 lane = lane_number();
        u32 x[4];
        load_matrices4<true>(x, tile + lane % 16 * PITCH + lane / 16 * CHUNK);
        right[0] = {x[0], x[1]};
        right[1] = {x[2], x[3]};
    } else {
        const element* at = tile + 2 * lane_in_group() * PITCH + lane_group();
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            right[i] = {__float_as_uint(to_float(at[8 * i])), __float_as_uint(to_float(at[PITCH + 8 * i]))};
        }
    }
}

// Columns DEPTH·step.. of a row of sums as a left operand: the lanes hold what they need already. A left fragment of
// 32-bit elements wants columns t and t + 4 where a lane has 2t and 2t + 1, so the columns are taken in that order.
template <u32 SUMS, class T = element> DEVICE Left as_left(const float (&sums)[SUMS][4], u32 step) {
    if constexpr (sizeof(T) == 2) {
        const float(&a)[4] = sums[2 * step], (&b)[4] = sums[2 * step + 1];
        return {pack(a[0], a[1], T()), pack(a[2], a[3], T()), pack(b[0], b[1], T()), pack(b[2], b[3], T())};
    } else {
        const float(&a)[4] = sums[step];
        return {__float_as_uint(a[0]), __float_as_uint(a[2]), __float_as_uint(a[1]), __float_as_uint(a[3])};
    }
}

// A warp's rows of a tile as left operands: kept in registers, or read from shared memory each time.
template <bool KEPT>
struct Operand {
    const element* rows;
    Left kept[KEPT ? WIDTH_STEPS : 1][M];

    // `tile` must have been filled.
    DEVICE explicit Operand(const element* tile) : rows(tile + warp_number() * WARP_ROWS * PITCH) {
        if constexpr (KEPT) {
#pragma unroll
            for (u32 step = 0; step < WIDTH_STEPS; step++) load(kept[step], step);
        }
    }

    DEVICE void load(Left (&left)[M], u32 step) const {
#pragma unroll
        for (u32 m = 0; m < M; m++) left[m] = load_left(rows + 16 * m * PITCH + step * DEPTH);
    }

    DEVICE void get(Left (&left)[M], u32 step) const {
        if constexpr (KEPT) {
#pragma unroll
            for (u32 m = 0; m < M; m++) left[m] = kept[step][m];
        } else {
            load(left, step);
        }
    }
};

using Scores = float[M][KEY_SUMS][4];
using Outputs = float[M][WIDTH_SUMS][4];

// Calls `f(m, n, i)` for each element that a lane has.
template <u32 SUMS, class F> DEVICE void for_each_element(F f) {
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 n = 0; n < SUMS; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) f(m, n, i);
        }
    }
}

template <class F> DEVICE void for_each_score(F f) {
    for_each_element<KEY_SUMS>(f);
}

// scores = rows · tileᵀ
template <bool KEPT> DEVICE void multiply_transposed(Scores& scores, const Operand<KEPT>& rows, const element* tile) {
    for_each_score([&](u32 m, u32 n, u32 i) { scores[m][n][i] = 0.0f; });
#pragma unroll
    for (u32 step = 0; step < WIDTH_STEPS; step++) {
        Left left[M];
        rows.get(left, step);
#pragma unroll
        for (u32 n = 0; n < KEY_SUMS; n += 2) {
            Right right[2];
            load_right_transposed(right, tile + 8 * n * PITCH + step * DEPTH);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                multiply_add<element>(scores[m][n], left[m], right[0]);
                multiply_add<element>(scores[m][n + 1], left[m], right[1]);
            }
        }
    }
}

// outputs += scores · tile
DEVICE void multiply_add_rows(Outputs& outputs, const Scores& scores, const element* tile) {
#pragma unroll
    for (u32 step = 0; step < KEY_STEPS; step++) {
        Left left[M];
#pragma unroll
        for (u32 m = 0; m < M; m++) left[m] = as_left(scores[m], step);
#pragma unroll
        for (u32 n = 0; n < WIDTH_SUMS; n += 2) {
            Right right[2];
            load_right(right, tile + step * DEPTH * PITCH + 8 * n);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                multiply_add<element>(outputs[m][n], left[m], right[0]);
                multiply_add<element>(outputs[m][n + 1], left[m], right[1]);
            }
        }
    }
}

// ---- Tiles ----

// A head's columns of some rows of a tensor.
struct Rows {
    const element* first;
    u32 stride;
    u32 count;
};

// Begins to copy rows `begin..begin + TILE_ROWS` to shared memory, zeros where there are no more. `aligned`: all rows
// begin at multiples of 16 bytes and are whole chunks.
template <u32 TILE_ROWS> DEVICE void load_tile(element* tile, const Rows& rows, u32 begin, bool aligned) {
    constexpr u32 CHUNKS = WIDTH / CHUNK, COUNT = TILE_ROWS * CHUNKS;
    if (aligned) {
        // One product of 64 bits for all rows, since there is one tile after the other.
        const element* from = rows.first + u64(begin) * rows.stride;
        const u32 count = rows.count - begin;
#pragma unroll
        for (u32 start = 0; start < COUNT; start += THREADS) {
            const u32 index = start + threadIdx.x, row = index / CHUNKS, col = index % CHUNKS * CHUNK;
            if (start + THREADS > COUNT && index >= COUNT) break;
            copy_async16(tile + row * PITCH + col, from + (row * rows.stride + col), row < count && col < HEAD_SIZE);
        }
    } else {
#pragma unroll 1
        for (u32 index = threadIdx.x; index < COUNT * CHUNK; index += THREADS) {
            const u32 row = index / WIDTH, col = index % WIDTH;
            const bool there = begin + row < rows.count && col < HEAD_SIZE;
            tile[row * PITCH + col] = there ? rows.first[u64(begin + row) * rows.stride + col] : from_float<element>(0.0f);
        }
    }
}

// Writes this warp's rows of `sums` to the first `count` rows from `first` on; `stage` is a part of a tile that this warp
// alone uses.
DEVICE void store_rows(
    const Outputs& sums, element* stage, element* first, u32 stride, u32 count, bool aligned
) {
    const u32 g = lane_group(), t = lane_in_group();
    __syncwarp();
    for_each_element<WIDTH_SUMS>([&](u32 m, u32 n, u32 i) {
        const u32 row = 16 * m + i / 2 * 8 + g;
        stage[row * PITCH + 8 * n + 2 * t + i % 2] = from_float<element>(sums[m][n][i]);
    });
    __syncwarp();
    constexpr u32 CHUNKS = (HEAD_SIZE + CHUNK - 1) / CHUNK;
#pragma unroll
    for (u32 start = 0; start < WARP_ROWS * CHUNKS; start += 32) {
        const u32 index = start + lane_number();
        const u32 row = index / CHUNKS, col = index % CHUNKS * CHUNK;
        if (row >= WARP_ROWS || row >= count) break;
        element* to = first + u64(row) * stride + col;
        const element* from = stage + row * PITCH + col;
        if (aligned) {
            store16(to, load16(from));
        } else {
            for (u32 i = 0; i < CHUNK && col + i < HEAD_SIZE; i++) to[i] = from[i];
        }
    }
}

// ---- Bias ----

// Beyond the bias' own distances the table goes on with its outermost values: for a tile of scores of which only some
// have a distance of their own.
constexpr u32 MARGIN = WARP_ROWS + KEYS;

// A head's bias by distance, in shared memory.
struct Bias {
    // Distance d at `d + reach + MARGIN`; null: no bias.
    const float* table;
    // The largest distance with a value of its own.
    i32 reach;
};

DEVICE u32 bias_table_length(i32 reach) { return reach < 0 ? 0 : 2 * reach + 1 + 2 * MARGIN; }

// A barrier must follow.
DEVICE void fill_bias_table(float* table, const float* bias, i32 reach) {
    for (i32 index = threadIdx.x; index < i32(bias_table_length(reach)); index += THREADS) {
        i32 place = index - i32(MARGIN);
        table[index] = bias[place < 0 ? 0 : place > 2 * reach ? 2 * reach : place];
    }
}

enum class Distances { NEAR, ALL_BEFORE, ALL_AFTER };

// The columns of a warp's scores are keys, or queries if `TRANSPOSED`. `distance` is that of the first row and column.
template <bool TRANSPOSED> DEVICE Distances distances(i32 distance, i32 reach) {
    i32 before = i32(TRANSPOSED ? KEYS : WARP_ROWS) - 1, after = i32(TRANSPOSED ? WARP_ROWS : KEYS) - 1;
    if (distance + after <= -reach) return Distances::ALL_BEFORE;
    if (distance - before >= reach) return Distances::ALL_AFTER;
    return Distances::NEAR;
}

// Elements of a warp's scores have the same distance where `n - 2m - i / 2` is the same: so many pairs a lane needs.
constexpr u32 DIAGONALS = KEY_SUMS + 2 * M - 1;

template <bool TRANSPOSED> DEVICE void add_bias(Scores& scores, const Bias& bias, i32 distance) {
    Distances which = distances<TRANSPOSED>(distance, bias.reach);
    const float* middle = bias.table + bias.reach + i32(MARGIN);
    if (which != Distances::NEAR) {
        float value = middle[which == Distances::ALL_BEFORE ? -bias.reach : bias.reach];
        for_each_score([&](u32 m, u32 n, u32 i) { scores[m][n][i] += value; });
        return;
    }
    constexpr i32 SIGN = TRANSPOSED ? -1 : 1;
    const float* at = middle + distance + SIGN * (i32(2 * lane_in_group()) - i32(lane_group()));
#pragma unroll
    for (i32 diagonal = 1 - 2 * i32(M); diagonal < i32(KEY_SUMS); diagonal++) {
        float first = at[SIGN * 8 * diagonal], second = at[SIGN * (8 * diagonal + 1)];
#pragma unroll
        for (i32 half = 0; half < 2 * i32(M); half++) {
            i32 n = diagonal + half;
            if (n >= 0 && n < i32(KEY_SUMS)) {
                scores[half / 2][n][half % 2 * 2] += first;
                scores[half / 2][n][half % 2 * 2 + 1] += second;
            }
        }
    }
}

// Minus infinity for the scores of keys that are not there (`keys` on) or not seen: with `causal` those behind the query,
// of which the warp's first is at `position`. The columns are keys from `begin` on.
DEVICE void hide_keys(Scores& scores, u32 begin, u32 keys, bool causal, i32 position) {
    if (begin + KEYS <= keys && !(causal && i32(begin + KEYS) > position + 1)) return;
    for_each_score([&](u32 m, u32 n, u32 i) {
        i32 query = position + i32(16 * m + i / 2 * 8 + lane_group());
        i32 key = i32(begin + 8 * n + 2 * lane_in_group() + i % 2);
        if (key >= i32(keys) || (causal && key > query)) scores[m][n][i] = -INFINITE;
    });
}

// ---- Dropout ----

// Probabilities are numbered (query row · heads + head) · 2^20 + key: the first of the blocks of random numbers that decide
// on keys 128·group.. of a query; the next 15 blocks are of the keys after it, and block i also of keys i + 16, i + 32, ….
DEVICE u64 first_block(u64 query, u32 heads, u32 head, u32 group) {
    return ((query * heads + head) << 17) + 16 * group;
}

// What a lane's rows of scores keep of 128 keys: byte b of a word, a bit for each 16 keys, is of the keys that the
// lane has at element b % 2 of its even (b < 2) or odd sums.
struct KeptKeys {
    u32 words[M][2];

    // `query`: the row of the warp's first; `group`: of keys.
    DEVICE void draw(const Dropout& dropout, u64 query, u32 heads, u32 head, u32 group) {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u64 blocks = first_block(query + 16 * m + 8 * half + lane_group(), heads, head, group);
                u32 word = 0;
#pragma unroll
                for (u32 b = 0; b < 4; b++) {
                    const u32 number = 2 * lane_in_group() + b % 2 + b / 2 * 8;
                    word |= dropout.kept_of_block(blocks + number) << (8 * b);
                }
                words[m][half] = word;
            }
        }
    }

    // Zeroes what is dropped of keys `begin..begin + KEYS`; the rest is not scaled yet.
    DEVICE void apply(Scores& scores, u32 begin) const {
        for_each_score([&](u32 m, u32 n, u32 i) {
            const u32 word = words[m][i / 2] >> (begin % 128 / 16);
            if (!(word >> (8 * (n % 2 * 2 + i % 2) + n / 2) & 1)) scores[m][n][i] = 0.0f;
        });
    }
};
