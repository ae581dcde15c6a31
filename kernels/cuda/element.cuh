// What every kernel starts from: integer types, the element type of a module and its conversions, vectors of 16 bytes, and
// the declaration of kernels and of shared memory. No header of CUDA's is used, so that the runtime compiler needs none.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

// A kernel's declaration begins at the beginning of a line: `KERNEL name(…)` or `KERNEL LAUNCH_BOUNDS(256) name(…)`.
#define KERNEL extern "C" __global__ void
#define LAUNCH_BOUNDS(threads) __launch_bounds__(threads)
#define DEVICE __device__ __forceinline__

#define WARP 32u
#define ALL_LANES 0xffffffffu

#define INFINITE __uint_as_float(0x7f800000u)

// ---------------------------------------------------------------------------------------------------------------------
// Elements: f32, or 16 bits of our own types. Everything is computed in float and rounded once, to nearest even.

struct alignas(2) bf16 {
    u16 bits;
};
struct alignas(2) f16 {
    u16 bits;
};

#if defined(ELEMENT_F32)
typedef float element;
#elif defined(ELEMENT_BF16)
typedef bf16 element;
#elif defined(ELEMENT_F16)
typedef f16 element;
#else
#error "a module is compiled with ELEMENT_F32, ELEMENT_BF16 or ELEMENT_F16"
#endif

DEVICE float to_float(float value) {
    return value;
}
DEVICE float to_float(bf16 value) {
    return __uint_as_float(u32(value.bits) << 16);
}
DEVICE float to_float(f16 value) {
#ifdef EMULATED
    return emulator::float_from_half(value.bits);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#endif
}

template <class T> struct Rounded;
template <> struct Rounded<float> {
    static DEVICE float from(float value) {
        return value;
    }
};
template <> struct Rounded<bf16> {
    static DEVICE bf16 from(float value) {
#ifdef EMULATED
        return bf16{emulator::bf16_from_float(value)};
#else
        bf16 narrow;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
        return narrow;
#endif
    }
};
template <> struct Rounded<f16> {
    static DEVICE f16 from(float value) {
#ifdef EMULATED
        return f16{emulator::half_from_float(value)};
#else
        f16 narrow;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
        return narrow;
#endif
    }
};

// `from_float<element>(value)`
template <class T> DEVICE T from_float(float value) {
    return Rounded<T>::from(value);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory accesses of 16 bytes. Addresses must be multiples of 16.

struct alignas(16) Bytes16 {
    u32 words[4];
};

DEVICE Bytes16 load16(const void* from) {
#ifdef EMULATED
    emulator::check_alignment(from, 16);
#endif
    return *reinterpret_cast<const Bytes16*>(from);
}
DEVICE void store16(void* to, Bytes16 bytes) {
#ifdef EMULATED
    emulator::check_alignment(to, 16);
#endif
    *reinterpret_cast<Bytes16*>(to) = bytes;
}

// Eight elements next to each other, as floats: one access for 16-bit elements, two for f32.
DEVICE void load8(const float* from, float (&values)[8]) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const Bytes16 bytes = load16(from + 4 * part);
#pragma unroll
        for (int i = 0; i < 4; i++) values[4 * part + i] = __uint_as_float(bytes.words[i]);
    }
}
template <class T> DEVICE void load8(const T* from, float (&values)[8]) {
    const Bytes16 bytes = load16(from);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = to_float(T{u16(bytes.words[i])});
        values[2 * i + 1] = to_float(T{u16(bytes.words[i] >> 16)});
    }
}

DEVICE void store8(float* to, const float (&values)[8]) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
        Bytes16 bytes;
#pragma unroll
        for (int i = 0; i < 4; i++) bytes.words[i] = __float_as_uint(values[4 * part + i]);
        store16(to + 4 * part, bytes);
    }
}
template <class T> DEVICE void store8(T* to, const float (&values)[8]) {
    Bytes16 bytes;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 low = from_float<T>(values[2 * i]).bits;
        const u32 high = from_float<T>(values[2 * i + 1]).bits;
        bytes.words[i] = low | high << 16;
    }
    store16(to, bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory is given with the launch and carved by every thread alike:
//     Shared shared;
//     float* partial = shared.take<float>(n);

#ifndef EMULATED
extern __shared__ __align__(128) u8 shared_memory[];
#endif

struct Shared {
    u32 used = 0;

    // Room for `count` values, aligned to 16 bytes.
    template <class T> DEVICE T* take(u32 count) {
        const u32 start = used;
        used = (start + count * u32(sizeof(T)) + 15) & ~15u;
#ifdef EMULATED
        return static_cast<T*>(emulator::take_shared(start, count * sizeof(T)));
#else
        return reinterpret_cast<T*>(shared_memory + start);
#endif
    }
};
