// Dropout: the same decisions as src/random.rs.
//
// Element e is decided by 16 bits: half-word h = (e / 16) mod 8 of Philox block 16 · (e / 128) + e mod 16, where half-word
// h < 4 is the low half of word h, and h ≥ 4 the high half of word h − 4. It is dropped if that number is below the
// threshold, else multiplied with the scale. So a block serves elements e, e + 16, …, e + 112.
#pragma once
#include "element.cuh"

// The mask as kernels take it (`dropout_arguments` passes it), and how they put it together.
#define DROPOUT_PARAMETERS u64 dropout_seed, u64 dropout_stream, u32 dropout_threshold, float dropout_scale
#define DROPOUT Dropout{dropout_seed, dropout_stream, dropout_threshold, dropout_scale}

struct Words4 {
    u32 words[4];
};

// Block `counter` of stream `stream` of Philox4x32 with 7 rounds (Salmon, Moraes, Dror and Shaw, SC11).
DEVICE Words4 philox(u64 seed, u64 stream, u64 counter) {
    u32 x0 = u32(counter), x1 = u32(counter >> 32), x2 = u32(stream), x3 = u32(stream >> 32);
    u32 key0 = u32(seed), key1 = u32(seed >> 32);
#pragma unroll
    for (int round = 0; round < 7; round++) {
        const u32 high0 = __umulhi(x0, 0xD2511F53u), low0 = x0 * 0xD2511F53u;
        const u32 high2 = __umulhi(x2, 0xCD9E8D57u), low2 = x2 * 0xCD9E8D57u;
        x0 = high2 ^ x1 ^ key0;
        x1 = low2;
        x2 = high0 ^ x3 ^ key1;
        x3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return Words4{{x0, x1, x2, x3}};
}

struct Dropout {
    u64 seed;
    u64 stream;
    u32 threshold; // 0: nothing is dropped
    float scale;

    // Bit h tells whether the element that half-word h of block `block` decides is kept.
    DEVICE u32 kept_of_block(u64 block) const {
        const Words4 random = philox(seed, stream, block);
        u32 kept = 0;
#pragma unroll
        for (int word = 0; word < 4; word++) {
            kept |= u32((random.words[word] & 0xffff) >= threshold) << word;
            kept |= u32((random.words[word] >> 16) >= threshold) << (word + 4);
        }
        return kept;
    }

    // The factor of one element: 0 or the scale. For stragglers: it computes a block for it.
    DEVICE float factor(u64 index) const {
        if (threshold == 0) return 1.0f;
        const u32 kept = kept_of_block(index / 128 * 16 + index % 16);
        return kept >> (index / 16 % 8) & 1 ? scale : 0.0f;
    }

    // The factors of elements 8 · (first + lane) … + 7, where `first` is the same in all lanes of the warp and a multiple
    // of 16; all of them must call. A lane computes one block, and they exchange decisions by eight ballots: lanes 16·g + t
    // hold blocks t of group g of 128 elements, and elements 8t … 8t + 7 are half-words t / 2 of blocks 8 · (t mod 2) … + 7.
    DEVICE void factors8(u64 first, float (&factors)[8]) const {
        if (threshold == 0) {
#pragma unroll
            for (int i = 0; i < 8; i++) factors[i] = 1.0f;
            return;
        }
        const u32 lane = threadIdx.x % WARP;
        const u32 kept = kept_of_block(first + lane);
        u32 mine = 0;
#pragma unroll
        for (u32 half = 0; half < 8; half++) {
            const u32 ballot = __ballot_sync(ALL_LANES, kept >> half & 1);
            if (half == lane % 16 / 2) mine = ballot;
        }
        mine >>= lane / 16 * 16 + lane % 2 * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) factors[i] = mine >> i & 1 ? scale : 0.0f;
    }
};
