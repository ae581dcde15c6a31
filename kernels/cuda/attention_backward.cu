// Attention of T5, backward.
//
// With `p` as in the forward pass, computed again from the scores and their `logsumexp`, `f` the dropout factors, and
// `d_p = f · (d_out · vᵀ)`:
//     d_v = (f · p)ᵀ · d_out        d_score = p · (d_p − δ), where δ = Σ p · d_p over the keys = Σ d_out · out
//     d_q = d_score · k             d_k = d_scoreᵀ · q         d_bias[distance] = Σ d_score of that distance
//
// Two kernels compute the scores, each in the order in which its results add up in registers: one over the keys of ROWS
// queries for d_q, δ and d_bias (3 products), one over the queries of ROWS keys for d_k and d_v (4 products). That is 7
// products where one kernel would need 5. For that, d_score does not go through shared memory from warp to warp, which the
// reading of operands keeps busy already, d_q is not summed by atomic additions to device memory, and the results are the
// same at every run.
//
// d_bias is summed by distance: first what a lane has of the same distance, then the lanes through shared memory, then the
// warps of a block, then the blocks in a kernel of its own. Tiles beyond the bias' reach only add up. All orders are fixed.
//
// δ is the sum over `out`, which is rounded to the element type, and not over the keys, which would cost two more products:
// as everywhere in FlashAttention, gradients of 16 bits see that rounding.
//
// Nq, Nk rows of queries and keys of all sequences; H heads; K head size; R reach of the bias; S sequences
#define KEYS (ROW_BYTES <= 256 ? 32u : 16u)
#include "attention.cuh"
#include "reduce.cuh"

// ---- d_bias ----

// A warp's sums of d_score by distance.
struct BiasGradient {
    // This warp's alone, like the table of `Bias`.
    float* table;
    // Of DIAGONALS · 64 floats, this warp's alone.
    float* stage;
    i32 reach;
    // Of this lane, for the distances that share the outermost values.
    float before, after;

    DEVICE BiasGradient(float* table, float* stage, i32 reach)
        : table(table), stage(stage), reach(reach), before(0.0f), after(0.0f) {
        for (u32 index = lane_number(); index < bias_table_length(reach); index += WARP) table[index] = 0.0f;
    }

    // Rows are queries; `distance` is that of the first row and column. All lanes must come.
    DEVICE void add(const Scores& d_scores, i32 distance) {
        const Distances which = distances<false>(distance, reach);
        if (which != Distances::NEAR) {
            float sum = 0.0f;
            for_each_score([&](u32 m, u32 n, u32 i) { sum += d_scores[m][n][i]; });
            if (which == Distances::ALL_BEFORE) before += sum;
            else after += sum;
            return;
        }
        // What a lane has of the same distance is summed first: that leaves row g of a matrix of 8 rows, in which column x
        // of row g has distance x − g (but for a constant).
        constexpr u32 COLUMNS = 8 * DIAGONALS;
        const u32 g = lane_group(), t = lane_in_group();
        __syncwarp();
#pragma unroll
        for (i32 place = 0; place < i32(DIAGONALS); place++) {
            const i32 diagonal = place + 1 - 2 * i32(M);
            Pair sum = {0.0f, 0.0f};
#pragma unroll
            for (i32 half = 0; half < 2 * i32(M); half++) {
                const i32 n = diagonal + half;
                if (n >= 0 && n < i32(KEY_SUMS)) {
                    sum.first += d_scores[half / 2][n][half % 2 * 2];
                    sum.second += d_scores[half / 2][n][half % 2 * 2 + 1];
                }
            }
            // COLUMNS mod 32 is 8 or 24: half a warp's pairs lie in different banks.
            *reinterpret_cast<Pair*>(stage + g * COLUMNS + 8 * place + 2 * t) = sum;
        }
        __syncwarp();
        float* at = table + distance + reach + i32(MARGIN) + 8 * (1 - 2 * i32(M)) - 7;
        for (u32 index = lane_number(); index < COLUMNS + 7; index += WARP) {
            float sum = 0.0f;
#pragma unroll
            for (u32 row = 0; row < 8; row++) {
                const u32 column = index + row - 7;
                if (column < COLUMNS) sum += stage[row * COLUMNS + column];
            }
            at[index] += sum;
        }
    }

    // Adds what is in the margins to the outermost distances. All lanes must come.
    DEVICE void finish() {
        __syncwarp();
        const u32 last = 2 * reach + MARGIN;
        for (u32 index = lane_number(); index < MARGIN; index += WARP) {
            before += table[index];
            after += table[last + 1 + index];
        }
        before = warp_sum(before);
        after = warp_sum(after);
        if (lane_number() == 0) {
            table[MARGIN] += before;
            table[last] += after;
        }
    }
};

// ---- Kernels ----

// For f32 some of these kernels would spill for one block more on a multiprocessor, so they are told that one is enough:
// the one over queries for wide heads in tf32 (on sm_100), the one over keys for all.
#if defined(ELEMENT_F32) && HEAD_SIZE > 64 && TF32
#undef LAUNCH_BOUNDS
#define LAUNCH_BOUNDS(threads) __launch_bounds__(threads, 1)
#endif

// Grid: (S · tiles, H), a tile being ROWS queries, as many as the longest sequence has.
// hot
KERNEL LAUNCH_BOUNDS(THREADS) attention_backward_queries(
    const element* q,             // [Nq, H·K]
    const element* k,             // [Nk, H·K]
    const element* v,             // [Nk, H·K]
    const float* bias,            // [H, 2R+1]
    const element* out,           // [Nq, H·K]
    const float* logsumexp,       // [Nq, H]
    const element* d_out,         // [Nq, H·K]
    element* d_q,                 // [Nq, H·K]
    float* delta,                 // [Nq, H]
    float* d_bias_partials,       // [H, S · tiles, 2R+1]
    const u32* query_starts, const u32* query_lengths, const u32* key_starts, const u32* key_lengths, // [S]
    u32 q_stride, u32 k_stride, u32 v_stride, u32 bias_stride, u32 out_stride, u32 logsumexp_stride, u32 d_out_stride,
    u32 d_q_stride,
    u32 heads, u32 tiles,
    i32 reach,                    // -1: no bias
    u32 causal, u32 aligned,
    DROPOUT_PARAMETERS
) {
    Shared shared;
    element* q_tile = shared.take<element>(ROWS * PITCH);
    element* d_out_tile = shared.take<element>(ROWS * PITCH);
    element* k_tiles = shared.take<element>(4 * KEYS * PITCH);
    element* v_tiles = k_tiles + 2 * KEYS * PITCH;
    float* deltas = shared.take<float>(ROWS);
    float* table = shared.take<float>(bias_table_length(reach));
    float* d_tables = shared.take<float>(WARPS * bias_table_length(reach));
    float* stages = shared.take<float>(reach < 0 ? 0 : WARPS * DIAGONALS * 64);

    // The last queries first: with `causal` they take longest.
    const u32 sequence = blockIdx.x / tiles, begin = (tiles - 1 - blockIdx.x % tiles) * ROWS, head = blockIdx.y;
    const u32 queries = query_lengths[sequence], keys = key_lengths[sequence];
    if (begin >= queries) return;
    const u32 query_row = query_starts[sequence], key_row = key_starts[sequence], column = head * HEAD_SIZE;
    const Rows k_rows = {k + u64(key_row) * k_stride + column, k_stride, keys};
    const Rows v_rows = {v + u64(key_row) * v_stride + column, v_stride, keys};
    // The first query's position among the keys.
    const i32 offset = i32(keys) - i32(queries);
    const u32 end = causal ? min(keys, u32(offset) + begin + ROWS) : keys;

    // δ first; `out` lies where keys and values will be.
    static_assert(4 * KEYS >= ROWS, "no room for a tile of outputs");
    load_tile<ROWS>(d_out_tile, {d_out + u64(query_row) * d_out_stride + column, d_out_stride, queries}, begin, aligned);
    load_tile<ROWS>(k_tiles, {out + u64(query_row) * out_stride + column, out_stride, queries}, begin, aligned);
    commit_copies();
    load_tile<ROWS>(q_tile, {q + u64(query_row) * q_stride + column, q_stride, queries}, begin, aligned);
    commit_copies();
    fill_bias_table(table, bias + head * bias_stride, reach);
    wait_for_copies<1>();
    __syncthreads();
    if (threadIdx.x < ROWS) {
        const u32 row = threadIdx.x;
        float sum = 0.0f;
#pragma unroll
        for (u32 col = 0; col < WIDTH; col += 8) {
            float a[8], b[8];
            load8(d_out_tile + row * PITCH + col, a);
            load8(k_tiles + row * PITCH + col, b);
#pragma unroll
            for (u32 i = 0; i < 8; i++) sum += a[i] * b[i];
        }
        deltas[row] = sum;
        if (begin + row < queries) delta[u64(query_row + begin + row) * heads + head] = sum;
    }
    __syncthreads();
    load_tile<KEYS>(k_tiles, k_rows, 0, aligned);
    load_tile<KEYS>(v_tiles, v_rows, 0, aligned);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();

    constexpr bool KEPT = sizeof(element) == 2;
    const Operand<KEPT> q_operand(q_tile), d_out_operand(d_out_tile);
    const u32 warp_begin = begin + warp_number() * WARP_ROWS;
    const i32 position = offset + i32(warp_begin);
    float shifts[M][2], row_deltas[M][2];
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 row = 16 * m + 8 * half + lane_group();
            const bool there = warp_begin + row < queries;
            const u64 at = u64(query_row + warp_begin + row) * logsumexp_stride + head;
            // Probabilities of queries that are not there become zero.
            shifts[m][half] = there ? logsumexp[at] * LOG2_E : INFINITE;
            row_deltas[m][half] = deltas[warp_number() * WARP_ROWS + row];
        }
    }
    BiasGradient d_bias(
        d_tables + warp_number() * bias_table_length(reach), stages + warp_number() * DIAGONALS * 64, reach);
    Outputs sums;
    for_each_element<WIDTH_SUMS>([&](u32 m, u32 n, u32 i) { sums[m][n][i] = 0.0f; });
    const Dropout dropout = DROPOUT;
    KeptKeys kept_keys;

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

        const element* k_tile = k_tiles + stage * KEYS * PITCH;
        Scores scores, d_scores;
        multiply_transposed(scores, q_operand, k_tile);
        if (reach >= 0) add_bias<false>(scores, {table, reach}, i32(key) - position);
        hide_keys(scores, key, keys, causal, position);
        multiply_transposed(d_scores, d_out_operand, v_tiles + stage * KEYS * PITCH);
        if (dropout.threshold > 0) {
            if (key % 128 == 0) kept_keys.draw(dropout, query_row + warp_begin, heads, head, key / 128);
            kept_keys.apply(d_scores, key);
        }
        for_each_score([&](u32 m, u32 n, u32 i) {
            const float p = exp2_fast(scores[m][n][i] * LOG2_E - shifts[m][i / 2]);
            d_scores[m][n][i] = p * (dropout.scale * d_scores[m][n][i] - row_deltas[m][i / 2]);
        });
        if (reach >= 0) d_bias.add(d_scores, i32(key) - position);
        multiply_add_rows(sums, d_scores, k_tile);
    }

    if (warp_begin < queries) {
        element* to = d_q + u64(query_row + warp_begin) * d_q_stride + column;
        element* stage = q_tile + warp_number() * WARP_ROWS * PITCH;
        store_rows(sums, stage, to, d_q_stride, queries - warp_begin, aligned);
    }
    if (reach >= 0) {
        d_bias.finish();
        __syncthreads();
        const u32 distances = 2 * reach + 1;
        float* to = d_bias_partials + (u64(head) * gridDim.x + blockIdx.x) * distances;
        for (u32 index = threadIdx.x; index < distances; index += THREADS) {
            float sum = 0.0f;
            for (u32 warp = 0; warp < WARPS; warp++) sum += d_tables[warp * bias_table_length(reach) + MARGIN + index];
            to[index] = sum;
        }
    }
}

// ---- Keys ----

// Which of its scores a lane has, in a word.
DEVICE u32 score_number(u32 m, u32 n, u32 i) {
    return (m * KEY_SUMS + n) * 4 + i;
}

// Minus infinity for the scores of queries that are not there (`queries` on) or do not see a key: with `causal` those
// before it. Rows are keys, the first of the warp at position `begin`; columns are queries, the first at `position`.
DEVICE void hide_queries(Scores& scores, u32 begin, u32 queries, bool causal, i32 position) {
    if (KEYS <= queries && !(causal && i32(begin + WARP_ROWS) > position + 1)) return;
    for_each_score([&](u32 m, u32 n, u32 i) {
        const u32 query = 8 * n + 2 * lane_in_group() + i % 2;
        const i32 key = i32(begin + 16 * m + i / 2 * 8 + lane_group());
        if (query >= queries || (causal && key > position + i32(query))) scores[m][n][i] = -INFINITE;
    });
}

// A lane's bits of dropout, by `score_number`: from a byte for each query and key mod 16, of which bit `bit` is of this
// warp's first 16 keys.
DEVICE u32 gather_kept(const u8* bytes, u32 bit) {
    static_assert(M * KEY_SUMS * 4 <= 32, "more scores than bits");
    u32 kept = 0;
#pragma unroll
    for (u32 n = 0; n < KEY_SUMS; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 query = 8 * n + 2 * lane_in_group() + i % 2;
            const u32 byte = bytes[query * 16 + i / 2 * 8 + lane_group()] >> bit;
#pragma unroll
            for (u32 m = 0; m < M; m++) kept |= (byte >> m & 1) << score_number(m, n, i);
        }
    }
    return kept;
}

// Adds the blocks' parts to d_bias, in a fixed order: lane by distance, warp by block. Grid: (2R+1 / 32, H); 8 warps.
KERNEL LAUNCH_BOUNDS(256) attention_backward_bias(
    const float* partials,        // [H, S · tiles, 2R+1]
    float* d_bias,                // [H, 2R+1]
    const u32* query_lengths,     // [S]
    u32 sequences, u32 tiles, u32 distances, u32 d_bias_stride
) {
    Shared shared;
    float* sums = shared.take<float>(256);
    const u32 head = blockIdx.y, distance = blockIdx.x * WARP + threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float sum = 0.0f;
    for (u32 block = warp; block < sequences * tiles && distance < distances; block += 8) {
        const bool there = (tiles - 1 - block % tiles) * ROWS < query_lengths[block / tiles];
        if (there) sum += partials[(u64(head) * sequences * tiles + block) * distances + distance];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && distance < distances) {
        for (u32 other = 1; other < 8; other++) sum += sums[other * WARP + threadIdx.x];
        d_bias[head * d_bias_stride + distance] += sum;
    }
}

#ifdef ELEMENT_F32
#undef LAUNCH_BOUNDS
#define LAUNCH_BOUNDS(threads) __launch_bounds__(threads, 1)
#endif

// Grid: (S · tiles, H), a tile being ROWS keys, as many as the longest sequence has. Rows of the scores are keys here.
// hot
KERNEL LAUNCH_BOUNDS(THREADS) attention_backward_keys(
    const element* q,             // [Nq, H·K]
    const element* k,             // [Nk, H·K]
    const element* v,             // [Nk, H·K]
    const float* bias,            // [H, 2R+1]
    const float* logsumexp,       // [Nq, H]
    const float* delta,           // [Nq, H]
    const element* d_out,         // [Nq, H·K]
    element* d_k,                 // [Nk, H·K]
    element* d_v,                 // [Nk, H·K]
    const u32* query_starts, const u32* query_lengths, const u32* key_starts, const u32* key_lengths, // [S]
    u32 q_stride, u32 k_stride, u32 v_stride, u32 bias_stride, u32 logsumexp_stride, u32 d_out_stride, u32 d_k_stride,
    u32 d_v_stride,
    u32 heads, u32 tiles,
    i32 reach,                    // -1: no bias
    u32 causal, u32 aligned,
    DROPOUT_PARAMETERS
) {
    Shared shared;
    element* k_tile = shared.take<element>(ROWS * PITCH);
    element* v_tile = shared.take<element>(ROWS * PITCH);
    element* q_tiles = shared.take<element>(2 * KEYS * PITCH);
    element* d_out_tiles = shared.take<element>(2 * KEYS * PITCH);
    float* logsumexps = shared.take<float>(2 * KEYS);
    float* deltas = shared.take<float>(2 * KEYS);
    u8* kept = shared.take<u8>(2 * KEYS * 16);
    float* table = shared.take<float>(bias_table_length(reach));

    const u32 sequence = blockIdx.x / tiles, begin = blockIdx.x % tiles * ROWS, head = blockIdx.y;
    const u32 queries = query_lengths[sequence], keys = key_lengths[sequence];
    if (begin >= keys) return;
    const u32 query_row = query_starts[sequence], key_row = key_starts[sequence], column = head * HEAD_SIZE;
    const Rows q_rows = {q + u64(query_row) * q_stride + column, q_stride, queries};
    const Rows d_out_rows = {d_out + u64(query_row) * d_out_stride + column, d_out_stride, queries};
    const i32 offset = i32(keys) - i32(queries);
    // With `causal` queries before the first key's position see none of these keys.
    const u32 first = causal && i32(begin) > offset ? (begin - offset) / KEYS * KEYS : 0;
    const Dropout dropout = DROPOUT;

    // Queries from `query` on, to stage `stage`.
    const auto load_queries = [&](u32 query, u32 stage) {
        load_tile<KEYS>(q_tiles + stage * KEYS * PITCH, q_rows, query, aligned);
        load_tile<KEYS>(d_out_tiles + stage * KEYS * PITCH, d_out_rows, query, aligned);
        if (threadIdx.x < KEYS) {
            const bool there = query + threadIdx.x < queries;
            const u64 row = there ? query_row + query + threadIdx.x : 0;
            copy_async4(logsumexps + stage * KEYS + threadIdx.x, logsumexp + row * logsumexp_stride + head, there);
            copy_async4(deltas + stage * KEYS + threadIdx.x, delta + row * heads + head, there);
        }
        commit_copies();
        if (dropout.threshold > 0) {
            // A byte for each query and key % 16, a bit for each 16 of the 128 keys around these ROWS.
            for (u32 index = threadIdx.x; index < KEYS * 16; index += THREADS) {
                const u64 blocks = first_block(query_row + query + index / 16, heads, head, begin / 128);
                kept[stage * KEYS * 16 + index] = dropout.kept_of_block(blocks + index % 16);
            }
        }
    };

    if (first < queries) {
        load_tile<ROWS>(k_tile, {k + u64(key_row) * k_stride + column, k_stride, keys}, begin, aligned);
        load_tile<ROWS>(v_tile, {v + u64(key_row) * v_stride + column, v_stride, keys}, begin, aligned);
        load_queries(first, 0);
    }
    fill_bias_table(table, bias + head * bias_stride, reach);

    const Operand<false> k_operand(k_tile), v_operand(v_tile);
    const u32 warp_begin = begin + warp_number() * WARP_ROWS;
    Outputs d_k_sums, d_v_sums;
    for_each_element<WIDTH_SUMS>([&](u32 m, u32 n, u32 i) { d_k_sums[m][n][i] = d_v_sums[m][n][i] = 0.0f; });

    for (u32 query = first, stage = 0; query < queries; query += KEYS, stage ^= 1) {
        wait_for_copies<0>();
        // These queries are there, and all warps have done with those before.
        __syncthreads();
        if (query + KEYS < queries) load_queries(query + KEYS, stage ^ 1);
        // The position of the first query among the keys.
        const i32 position = offset + i32(query);
        if (warp_begin >= keys || (causal && i32(warp_begin) >= position + i32(KEYS))) continue;

        const element *q_tile = q_tiles + stage * KEYS * PITCH, *d_out_tile = d_out_tiles + stage * KEYS * PITCH;
        Scores scores, d_scores;
        multiply_transposed(scores, k_operand, q_tile);
        if (reach >= 0) add_bias<true>(scores, {table, reach}, i32(warp_begin) - position);
        hide_queries(scores, warp_begin, queries - query, causal, position);
        multiply_transposed(d_scores, v_operand, d_out_tile);
        u32 kept_bits = 0;
        if (dropout.threshold > 0) {
            const u8* bytes = kept + stage * KEYS * 16;
            kept_bits = gather_kept(bytes, (warp_begin % 128) / 16);
            for_each_score([&](u32 m, u32 n, u32 i) {
                if (!(kept_bits >> score_number(m, n, i) & 1)) d_scores[m][n][i] = 0.0f;
            });
        }
#pragma unroll
        for (u32 n = 0; n < KEY_SUMS; n++) {
            const u32 at = stage * KEYS + 8 * n + 2 * lane_in_group();
            const float shifts[2] = {logsumexps[at] * LOG2_E, logsumexps[at + 1] * LOG2_E};
            const float column_deltas[2] = {deltas[at], deltas[at + 1]};
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const float p = exp2_fast(scores[m][n][i] * LOG2_E - shifts[i % 2]);
                    d_scores[m][n][i] = p * (dropout.scale * d_scores[m][n][i] - column_deltas[i % 2]);
                    scores[m][n][i] = p;
                }
            }
        }
        if (dropout.threshold > 0) {
            for_each_score([&](u32 m, u32 n, u32 i) {
                if (!(kept_bits >> score_number(m, n, i) & 1)) scores[m][n][i] = 0.0f;
            });
        }
        multiply_add_rows(d_v_sums, scores, d_out_tile);
        multiply_add_rows(d_k_sums, d_scores, q_tile);
    }
    if (warp_begin >= keys) return;

    const u64 row = key_row + warp_begin;
    const u32 own_rows = warp_number() * WARP_ROWS * PITCH, count = keys - warp_begin;
    store_rows(d_k_sums, k_tile + own_rows, d_k + row * d_k_stride + column, d_k_stride, count, aligned);
    for_each_element<WIDTH_SUMS>([&](u32 m, u32 n, u32 i) { d_v_sums[m][n][i] *= dropout.scale; });
    store_rows(d_v_sums, v_tile + own_rows, d_v + row * d_v_stride + column, d_v_stride, count, aligned);
}
