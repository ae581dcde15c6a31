// What a warp does together on matrices, as ptx.cuh describes it.
#pragma once
#include "cuda.h"

namespace emulator {

// ldmatrix
struct Matrices {
    u32* fragment;
    u32 count;
    const void* row;
    bool transposed;
};

inline void load_matrices_of_warp(Thread* const* lanes, u32) {
    for (u32 lane = 0; lane < LANES; lane++) {
        const Matrices& mine = *static_cast<Matrices*>(lanes[lane]->payload);
        for (u32 matrix = 0; matrix < mine.count; matrix++) {
            unsigned short pair[2];
            for (u32 i = 0; i < 2; i++) {
                const u32 row = mine.transposed ? lane % 4 * 2 + i : lane / 4;
                const u32 col = mine.transposed ? lane / 4 : lane % 4 * 2 + i;
                const Matrices& holder = *static_cast<Matrices*>(lanes[matrix * 8 + row]->payload);
                pair[i] = static_cast<const unsigned short*>(holder.row)[col];
            }
            mine.fragment[matrix] = pair[0] | u32(pair[1]) << 16;
        }
    }
}

// Lanes 8m … 8m + 7 give the rows of matrix m.
inline void load_matrices(u32* fragment, u32 count, const void* row, bool transposed, EMULATOR_PLACE) {
    if (self().lane() < 8 * count) check_alignment(row, 16);
    Matrices payload{fragment, count, row, transposed};
    collective(~0u, load_matrices_of_warp, &payload, Place{file, line});
}

// mma.sync: c[16,8] += a[16,K] · b[K,8], K = 16 for elements of 16 bits and 8 for tf32.
struct Fragments {
    float* c;
    const u32 *a, *b;
};

// Element `half` of a register, as a float; tf32 is a float of which the low 13 bits do not count.
template <class T> float fragment_element(u32 bits, u32 half) {
    if constexpr (sizeof(T) == 4) {
        return __uint_as_float(bits & 0xffffe000u);
    } else {
        return to_float(T{(unsigned short)(bits >> 16 * half)});
    }
}

template <class T> void multiply_of_warp(Thread* const* lanes, u32) {
    constexpr u32 PAIR = 4 / sizeof(T), DEPTH = 8 * PAIR;
    float a[16][DEPTH], b[DEPTH][8];
    for (u32 lane = 0; lane < LANES; lane++) {
        const Fragments& mine = *static_cast<Fragments*>(lanes[lane]->payload);
        const u32 group = lane / 4, position = lane % 4 * PAIR;
        for (u32 half = 0; half < PAIR; half++) {
            for (u32 i = 0; i < 4; i++) {
                a[group + i % 2 * 8][position + half + i / 2 * DEPTH / 2] = fragment_element<T>(mine.a[i], half);
            }
            for (u32 i = 0; i < 2; i++) {
                b[position + half + i * DEPTH / 2][group] = fragment_element<T>(mine.b[i], half);
            }
        }
    }
    for (u32 row = 0; row < 16; row++) {
        float sum[8] = {};
        for (u32 k = 0; k < DEPTH; k++) {
            for (u32 col = 0; col < 8; col++) sum[col] += a[row][k] * b[k][col];
        }
        for (u32 col = 0; col < 8; col++) {
            const Fragments& holder = *static_cast<Fragments*>(lanes[row % 8 * 4 + col / 2]->payload);
            holder.c[row / 8 * 2 + col % 2] += sum[col];
        }
    }
}

template <class T> void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], EMULATOR_PLACE) {
    Fragments payload{c, a, b};
    collective(~0u, multiply_of_warp<T>, &payload, Place{file, line});
}

} // namespace emulator
