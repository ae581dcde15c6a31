// The language that kernels are written in, for a C++ compiler of the host.
#pragma once
#include "block.h"

#include <math.h>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (emulator::self().index)
#define blockIdx (emulator::self().block->index)
#define blockDim (emulator::self().block->dimensions)
#define gridDim (emulator::self().block->grid)
#define warpSize 32

// ---------------------------------------------------------------------------------------------------------------------
// Bits and numbers

namespace emulator {
template <class To, class From> To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same number of bits");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
} // namespace emulator

inline float __uint_as_float(unsigned bits) {
    return emulator::bits_as<float>(bits);
}
inline unsigned __float_as_uint(float value) {
    return emulator::bits_as<unsigned>(value);
}
inline float __int_as_float(int bits) {
    return emulator::bits_as<float>(bits);
}
inline int __float_as_int(float value) {
    return emulator::bits_as<int>(value);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned((unsigned long long)a * b >> 32);
}
inline int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
    return __builtin_ffs(bits);
}
inline int __clz(int bits) {
    return bits ? __builtin_clz(bits) : 32;
}
inline float rsqrtf(float value) {
    return 1.0f / sqrtf(value);
}
inline float __expf(float value) {
    return expf(value);
}
inline float __logf(float value) {
    return logf(value);
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __frcp_rn(float value) {
    return 1.0f / value;
}

inline int min(int a, int b) {
    return a < b ? a : b;
}
inline int max(int a, int b) {
    return a < b ? b : a;
}
inline unsigned min(unsigned a, unsigned b) {
    return a < b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
    return a < b ? b : a;
}
inline unsigned long long min(unsigned long long a, unsigned long long b) {
    return a < b ? a : b;
}
inline unsigned long long max(unsigned long long a, unsigned long long b) {
    return a < b ? b : a;
}
inline long long min(long long a, long long b) {
    return a < b ? a : b;
}
inline long long max(long long a, long long b) {
    return a < b ? b : a;
}
inline float min(float a, float b) {
    return fminf(a, b);
}
inline float max(float a, float b) {
    return fmaxf(a, b);
}

namespace emulator {

inline float float_from_half(unsigned short half) {
    const unsigned magnitude = half & 0x7fff, sign = unsigned(half & 0x8000) << 16;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | magnitude << 13);
    const float value = __uint_as_float(magnitude << 13) * 0x1p112f; // also of subnormal numbers
    return __uint_as_float(__float_as_uint(value) | sign);
}

// To nearest, ties to even.
inline unsigned short half_from_float(float value) {
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7fff;
    if (magnitude >= (127 + 16) << 23) return sign | 0x7c00;
    if (magnitude < (127 - 14) << 23) { // subnormal: the addition rounds
        const float shift = 0.5f;
        return sign | (__float_as_uint(__uint_as_float(magnitude) + shift) - __float_as_uint(shift));
    }
    return sign | (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

inline unsigned short bf16_from_float(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

} // namespace emulator

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and votes

inline void __syncthreads(EMULATOR_PLACE) {
    emulator::barrier(false, {file, line});
}
inline int __syncthreads_count(int vote, EMULATOR_PLACE) {
    return emulator::barrier(vote != 0, {file, line});
}
inline int __syncthreads_or(int vote, EMULATOR_PLACE) {
    return emulator::barrier(vote != 0, {file, line}) != 0;
}
inline int __syncthreads_and(int vote, EMULATOR_PLACE) {
    return emulator::barrier(vote == 0, {file, line}) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_PLACE) {
    emulator::collective(mask, nullptr, nullptr, {file, line});
}

namespace emulator {

struct Vote {
    bool vote;
    u32 ballot;
};

inline void ballot_of_warp(Thread* const* lanes, u32 mask) {
    u32 ballot = 0;
    for (u32 lane = 0; lane < LANES; lane++) {
        if (mask >> lane & 1) ballot |= u32(static_cast<Vote*>(lanes[lane]->payload)->vote) << lane;
    }
    for (u32 lane = 0; lane < LANES; lane++) {
        if (mask >> lane & 1) static_cast<Vote*>(lanes[lane]->payload)->ballot = ballot;
    }
}

} // namespace emulator

inline unsigned __ballot_sync(unsigned mask, int vote, EMULATOR_PLACE) {
    emulator::Vote payload{vote != 0, 0};
    emulator::collective(mask, emulator::ballot_of_warp, &payload, {file, line});
    return payload.ballot;
}
inline int __any_sync(unsigned mask, int vote, EMULATOR_PLACE) {
    return __ballot_sync(mask, vote, file, line) != 0;
}
inline int __all_sync(unsigned mask, int vote, EMULATOR_PLACE) {
    return __ballot_sync(mask, vote, file, line) == mask;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shuffles

namespace emulator {

struct Exchange {
    u64 value, result;
    u32 source;
};

inline void exchange_of_warp(Thread* const* lanes, u32 mask) {
    for (u32 lane = 0; lane < LANES; lane++) {
        if (!(mask >> lane & 1)) continue;
        Exchange& mine = *static_cast<Exchange*>(lanes[lane]->payload);
        if (!(mask >> mine.source & 1)) {
            fail("lane %u reads lane %u, which does not take part in the shuffle of %s:%u", lane, mine.source,
                 lanes[lane]->place.name(), lanes[lane]->place.line);
        }
        mine.result = static_cast<Exchange*>(lanes[mine.source]->payload)->value;
    }
}

template <class T> T exchange(u32 mask, T value, u32 source, Place place) {
    static_assert(sizeof(T) <= 8, "shuffles exchange up to 8 bytes");
    Exchange payload{0, 0, source};
    memcpy(&payload.value, &value, sizeof value);
    collective(mask, exchange_of_warp, &payload, place);
    memcpy(&value, &payload.result, sizeof value);
    return value;
}

} // namespace emulator

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_PLACE) {
    const unsigned lane = emulator::self().lane();
    return emulator::exchange(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), {file, line});
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, EMULATOR_PLACE) {
    const unsigned lane = emulator::self().lane(), source = lane ^ flip;
    return emulator::exchange(mask, value, source > (lane | (width - 1)) ? lane : source, {file, line});
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_PLACE) {
    const unsigned lane = emulator::self().lane();
    return emulator::exchange(mask, value, lane % width < delta ? lane : lane - delta, {file, line});
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_PLACE) {
    const unsigned lane = emulator::self().lane();
    return emulator::exchange(mask, value, lane % width + delta >= unsigned(width) ? lane : lane + delta, {file, line});
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory that several blocks reach

inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block() {}
template <class T> T __ldg(const T* address) {
    return *address;
}

namespace emulator {

// Replaces the value at `address` by `f` of it; returns the old one.
template <class T, class F> T update(T* address, F f) {
    T old;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    for (;;) {
        T wanted = f(old);
        if (__atomic_compare_exchange(address, &old, &wanted, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return old;
    }
}

} // namespace emulator

template <class T> T atomicAdd(T* address, std::common_type_t<T> value) {
    return emulator::update(address, [=](T old) { return T(old + value); });
}
template <class T> T atomicMax(T* address, std::common_type_t<T> value) {
    return emulator::update(address, [=](T old) { return old < value ? value : old; });
}
template <class T> T atomicMin(T* address, std::common_type_t<T> value) {
    return emulator::update(address, [=](T old) { return value < old ? value : old; });
}
template <class T> T atomicOr(T* address, std::common_type_t<T> value) {
    return emulator::update(address, [=](T old) { return T(old | value); });
}
template <class T> T atomicExch(T* address, std::common_type_t<T> value) {
    return emulator::update(address, [=](T) { return value; });
}
template <class T> T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    return emulator::update(address, [=](T old) { return old == expected ? value : old; });
}

// ---------------------------------------------------------------------------------------------------------------------
// A kernel as the driver calls it

namespace emulator {

template <class T> constexpr char parameter_letter() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    if constexpr (std::is_same_v<T, u32>) return 'u';
    if constexpr (std::is_same_v<T, int>) return 'i';
    if constexpr (std::is_same_v<T, u64>) return 'U';
    if constexpr (std::is_same_v<T, float>) return 'f';
    return '?';
}

template <auto F> struct Caller;
template <class... P, void (*F)(P...)> struct Caller<F> {
    static constexpr char signature[] = {parameter_letter<P>()..., '\0'};

    template <size_t... I> static void call_with(const void* const* arguments, std::index_sequence<I...>) {
        F(*static_cast<const P*>(arguments[I])...);
    }
    static void call(const void* const* arguments) {
        call_with(arguments, std::index_sequence_for<P...>{});
    }
};

} // namespace emulator

// A row of the table of kernels; `bounds` are its launch bounds, whose constants the kernels' own file defines.
#define EMULATOR_KERNEL(function, bounds) \
    { #function, emulator::Caller<function>::signature, emulator::Caller<function>::call, bounds }
