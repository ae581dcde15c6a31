// Attention of T5, forward.
//
// For a head, `p = softmax(q · kᵀ + bias[clamp(key − query)])`, not scaled by `K^-½`; `out = dropout(p) · v`, and the
// logarithm of the sum of the scores' exponentials is kept for the backward pass.
//
// FlashAttention-2 (Dao, 2023): a block has ROWS queries of one head of one sequence; a warp WARP_ROWS of them. It goes
// over the keys in tiles of KEYS, with a running maximum and sum of each query's scores, and multiplies what it has so
// far by e^(old − new maximum) when the maximum rises. Nothing of size query × key leaves the registers.
//
// Nq, Nk rows of queries and keys of all sequences; H heads; K head size; R reach of the bias
#define KEYS (ROW_BYTES <= 256 ? 64u : 32u)
#include "attention.cuh"

// The running softmax of a warp's queries, of which a lane has rows g and g + 8 of each 16.
struct Softmax {
    float most[M][2];
    // Of this lane's keys.
    float total[M][2];

    DEVICE Softmax() {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) most[m][half] = -INFINITE, total[m][half] = 0.0f;
        }
    }

    // Scores become probabilities (but for the sum), `out` is brought to the new maximum.
    DEVICE void add(Scores& scores, Outputs& out) {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                float high = most[m][half];
#pragma unroll
                for (u32 n = 0; n < KEY_SUMS; n++) {
                    high = fmaxf(high, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                }
                high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, 1));
                high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, 2));
                float rescale = exp2_fast((most[m][half] - high) * LOG2_E), shift = high * LOG2_E;
                most[m][half] = high;
                float sum = total[m][half] * rescale;
#pragma unroll
                for (u32 n = 0; n < KEY_SUMS; n++) {
#pragma unroll
                    for (u32 i = 2 * half; i < 2 * half + 2; i++) {
                        scores[m][n][i] = exp2_fast(scores[m][n][i] * LOG2_E - shift);
                        sum += scores[m][n][i];
                    }
                }
                total[m][half] = sum;
#pragma unroll
                for (u32 n = 0; n < WIDTH_SUMS; n++) out[m][n][2 * half] *= rescale, out[m][n][2 * half + 1] *= rescale;
            }
        }
    }

    // The total over all keys; all lanes must come.
    DEVICE void finish() {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                total[m][half] += __shfl_xor_sync(0xffffffff, total[m][half], 1);
                total[m][half] += __shfl_xor_sync(0xffffffff, total[m][half], 2);
            }
        }
    }
};

// Grid: (sequences · tiles, H), a tile being ROWS queries, as many as the longest sequence has.
// hot
KERNEL LAUNCH_BOUNDS(THREADS) attention_forward(
    const element* q,            // [Nq, H·K]
    const element* k,            // [Nk, H·K]
    const element* v,            // [Nk, H·K]
    const float* bias,           // [H, 2R+1]
    element* out,                // [Nq, H·K]
    float* logsumexp,            // [Nq, H]
    const u32* query_starts, const u32* query_lengths, const u32* key_starts, const u32* key_lengths,
    u32 q_stride, u32 k_stride, u32 v_stride, u32 bias_stride, u32 out_stride, u32 logsumexp_stride,
    u32 heads, u32 tiles,
    i32 reach,                   // -1: no bias
    u32 causal, u32 aligned,
    DROPOUT_PARAMETERS
) {
    Shared shared;
    element* q_tile = shared.take<element>(ROWS * PITCH);
    element* k_tiles = shared.take<element>(2 * KEYS * PITCH);
    element* v_tiles = shared.take<element>(2 * KEYS * PITCH);
    float* table = shared.take<float>(bias_table_length(reach));

    // The last queries first: with `causal` they take longest.
    u32 sequence = blockIdx.x / tiles, begin = (tiles - 1 - blockIdx.x % tiles) * ROWS, head = blockIdx.y;
    u32 queries = query_lengths[sequence], keys = key_lengths[sequence];
    if (begin >= queries) return;
    u32 query_row = query_starts[sequence], key_row = key_starts[sequence], column = head * HEAD_SIZE;
    Rows q_rows = {q + u64(query_row) * q_stride + column, q_stride, queries};
    Rows k_rows = {k + u64(key_row) * k_stride + column, k_stride, keys};
    Rows v_rows = {v + u64(key_row) * v_stride + column, v_stride, keys};
    // The first query's position among the keys.
    i32 offset = i32(keys) - i32(queries);
    u32 end = causal ? min(keys, u32(offset) + begin + ROWS) : keys;

    load_tile<ROWS>(q_tile, q_rows, begin, aligned);
    commit_copies();
    load_tile<KEYS>(k_tiles, k_rows, 0, aligned);
    load_tile<KEYS>(v_tiles, v_rows, 0, aligned);
    commit_copies();
    fill_bias_table(table, bias + head * bias_stride, reach);
    wait_for_copies<1>();
    __syncthreads();

    // Narrow rows are read again instead: then three blocks have room on a multiprocessor.
    const Operand<(sizeof(element) == 2 && WIDTH > 32)> q_operand(q_tile);
    Softmax softmax;
    Outputs sums;
    for_each_element<WIDTH_SUMS>([&](u32 m, u32 n, u32 i) { sums[m][n][i] = 0.0f; });
    const Dropout dropout = DROPOUT;
    KeptKeys kept_keys;
    u32 warp_begin = begin + warp_number() * WARP_ROWS;
    i32 position = offset + i32(warp_begin);

    for (u32 key = 0, stage = 0; key < end; key += KEYS, stage ^= 1) {
        wait_for_copies<0>();
        // This tile is there, and all warps have done with the one before.
        __syncthreads();
        if (key + KEYS < end) {
            load_tile<KEYS>(k_tiles + (stage ^ 1) * KEYS * PITCH, k_rows, key + KEYS, aligned);
            load_tile<KEYS>(v_tiles + (stage ^ 1) * KEYS * PITCH, v_rows, key + KEYS, aligned);
            commit_copies();
        }
        if (warp_begin >= queries || (causal && i32(key) >= position + i32(WARP_ROWS))) continue;

        Scores scores;
        multiply_transposed(scores, q_operand, k_tiles + stage * KEYS * PITCH);
        if (reach >= 0) add_bias<false>(scores, {table, reach}, i32(key) - position);
        hide_keys(scores, key, keys, causal, position);
        softmax.add(scores, sums);
        if (dropout.threshold > 0) {
            if (key % 128 == 0) kept_keys.draw(dropout, query_row + warp_begin, heads, head, key / 128);
            kept_keys.apply(scores, key);
        }
        multiply_add_rows(sums, scores, v_tiles + stage * KEYS * PITCH);
    }
    if (warp_begin >= queries) return;

    softmax.finish();
    u32 count = queries - warp_begin;
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 row = 16 * m + 8 * half + lane_group();
            if (lane_in_group() == 0 && row < count) {
                const float value = softmax.most[m][half] + logf(softmax.total[m][half]);
                logsumexp[u64(query_row + warp_begin + row) * logsumexp_stride + head] = value;
            }
            softmax.total[m][half] = dropout.scale / softmax.total[m][half];
        }
    }
    for_each_element<WIDTH_SUMS>([&](u32 m, u32 n, u32 i) { sums[m][n][i] *= softmax.total[m][i / 2]; });
    element* to = out + u64(query_row + warp_begin) * out_stride + column;
    store_rows(sums, q_tile + warp_number() * WARP_ROWS * PITCH, to, out_stride, count, aligned);
}
