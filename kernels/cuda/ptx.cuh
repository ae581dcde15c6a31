// Instructions that C++ has no name for: asynchronous copies to shared memory, and the tensor cores' products. Each is PTX
// for the GPU and plain C++ for the emulator.
#pragma once
#include "element.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies of 16 bytes from device to shared memory (sm_80). They have arrived, for the thread that began them,
// after a wait that covers them; for the others after a barrier that follows it.

// Copies 16 bytes; if not `valid`, the destination becomes zeros and the source is not read.
DEVICE void copy_async16(void* shared, const void* device, bool valid = true) {
#ifdef EMULATED
    emulator::copy_async(shared, device, 16, valid ? 16 : 0);
#else
    const u32 to = u32(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(device), "r"(valid ? 16 : 0) : "memory");
#endif
}

// Of 4 bytes.
DEVICE void copy_async4(void* shared, const void* device, bool valid = true) {
#ifdef EMULATED
    emulator::copy_async(shared, device, 4, valid ? 4 : 0);
#else
    const u32 to = u32(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(device), "r"(valid ? 4 : 0) : "memory");
#endif
}

// Closes a group of this thread's copies.
DEVICE void commit_copies() {
#ifdef EMULATED
    emulator::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all but the latest `PENDING` groups of this thread.
template <int PENDING> DEVICE void wait_for_copies() {
#ifdef EMULATED
    emulator::wait_for_copies(PENDING);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Four 8 × 8 matrices of 16-bit elements from shared memory (sm_75). Lane l gives the address of row l % 8 of matrix l / 8,
// a multiple of 16 bytes; of matrix m, lane l gets elements (row l / 4, columns 2 · (l % 4) and + 1) in fragment[m],
// or, transposed, (rows 2 · (l % 4) and + 1, column l / 4).

template <bool TRANSPOSED = false> DEVICE void load_matrices4(u32 (&fragment)[4], const void* row) {
#ifdef EMULATED
    emulator::load_matrices(fragment, 4, row, TRANSPOSED);
#else
    const u32 from = u32(__cvta_generic_to_shared(row));
    if (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                     : "r"(from)
                     : "memory");
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// c[16,8] += a[16,K] · b[K,8] by a warp, on tensor cores (sm_80). With group g = lane / 4 and t = lane % 4 a lane holds
//   c: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
//   16-bit elements, K = 16, two in a register, low half first:
//     a: (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..)      b: (2t.., g), (2t+8.., g)
//   tf32, K = 8, the bits of a float:
//     a: (g, t), (g+8, t), (g, t+4), (g+8, t+4)                  b: (t, g), (t+4, g)

DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) {
#ifdef EMULATED
    emulator::multiply<bf16>(c, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
#ifdef EMULATED
    emulator::multiply<f16>(c, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

DEVICE void mma_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef EMULATED
    emulator::multiply<float>(c, a, b);
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The nearest tf32, which is f32 with 10 bits of mantissa; ties away from zero.
DEVICE u32 to_tf32(float value) {
#ifdef EMULATED
    return value == value ? (__float_as_uint(value) + 0x1000) & ~0x1fffu : __float_as_uint(value);
#else
    u32 rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
    return rounded;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

// Two 16-bit elements in a register, `low` in its low half: first in memory.
DEVICE u32 pack(float low, float high, bf16) {
#ifdef EMULATED
    return from_float<bf16>(low).bits | u32(from_float<bf16>(high).bits) << 16;
#else
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

DEVICE u32 pack(float low, float high, f16) {
#ifdef EMULATED
    return from_float<f16>(low).bits | u32(from_float<f16>(high).bits) << 16;
#else
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

// 2^value to 2 units in the last place; zero where that would be subnormal.
DEVICE float exp2_fast(float value) {
#ifdef EMULATED
    return exp2f(value);
#else
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
#endif
}
