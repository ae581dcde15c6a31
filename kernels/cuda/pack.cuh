// Eight neighbours of a row at a time, which is what a thread of the row-wise kernels holds; at the end of a row, and where
// rows do not begin at multiples of 16 bytes, one element at a time.
#pragma once
#include "element.cuh"

// Columns of a pack.
constexpr u32 PACK = 8;

// As they are in memory: 16-bit elements take half the registers of floats.
template <class T> struct Pack {
    Bytes16 parts[sizeof(T) / 2];
};

DEVICE float unpack(const Pack<float>& pack, u32 i) {
    return __uint_as_float(pack.parts[i / 4].words[i % 4]);
}
template <class T> DEVICE float unpack(const Pack<T>& pack, u32 i) {
    return to_float(T{u16(pack.parts[0].words[i / 2] >> (i % 2 * 16))});
}

DEVICE u32 bits(float value) {
    return __float_as_uint(value);
}
template <class T> DEVICE u32 bits(T value) {
    return value.bits;
}

// Columns `column`, … of a row of `cols`, zeros beyond its end. `aligned`: rows begin at multiples of 16 bytes, and `cols`
// is a multiple of 8.
template <class T> DEVICE Pack<T> load_pack(const T* row, u32 column, u32 cols, bool aligned) {
    constexpr u32 PARTS = sizeof(T) / 2;
    constexpr u32 IN_WORD = 4 / sizeof(T);
    Pack<T> pack = {};
    if (aligned) {
        if (column < cols) {
#pragma unroll
            for (u32 part = 0; part < PARTS; part++) pack.parts[part] = load16(row + column + part * PACK / PARTS);
        }
        return pack;
    }
#pragma unroll
    for (u32 i = 0; i < PACK; i++) {
        const u32 word = i / IN_WORD;
        if (column + i < cols) pack.parts[word / 4].words[word % 4] |= bits(row[column + i]) << (i % IN_WORD * 16);
    }
    return pack;
}

// The same as floats.
template <class T> DEVICE void load8(const T* row, u32 column, u32 cols, bool aligned, float (&values)[PACK]) {
    const Pack<T> pack = load_pack(row, column, cols, aligned);
#pragma unroll
    for (u32 i = 0; i < PACK; i++) values[i] = unpack(pack, i);
}

// Writes what of the eight lies before the row's end.
template <class T> DEVICE void store8(T* row, u32 column, u32 cols, bool aligned, const float (&values)[PACK]) {
    if (aligned) {
        if (column < cols) store8(row + column, values);
        return;
    }
#pragma unroll
    for (u32 i = 0; i < PACK; i++) {
        if (column + i < cols) row[column + i] = from_float<T>(values[i]);
    }
}
