// Fibers: several stacks on one thread of the operating system, and a switch between them in a few instructions.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

struct Fiber {
    void* stack_pointer; // while it does not run
    const void* bottom;  // of its stack, and the stack's bytes
    size_t bytes;
    void* fake_stack; // AddressSanitizer's
};

// Saves the registers that a call preserves and the stack pointer, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to) __asm__("emulator_switch") __attribute__((visibility("hidden")));

#ifdef __APPLE__
#define EMULATOR_HIDDEN ".private_extern emulator_switch\n"
#else
#define EMULATOR_HIDDEN ".hidden emulator_switch\n"
#endif

#if defined(__x86_64__)
__asm__(".text\n"
        ".globl emulator_switch\n" EMULATOR_HIDDEN "emulator_switch:\n"
        "    pushq %rbp\n"
        "    pushq %rbx\n"
        "    pushq %r12\n"
        "    pushq %r13\n"
        "    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n"
        "    popq %r14\n"
        "    popq %r13\n"
        "    popq %r12\n"
        "    popq %rbx\n"
        "    popq %rbp\n"
        "    ret\n");

// A stack that enters `entry`, which must not return, when it is switched to. `top` is a multiple of 16.
inline void* new_stack(char* top, void (*entry)()) {
    void** slots = reinterpret_cast<void**>(top);
    *--slots = nullptr; // a caller's address would be here: `entry` finds the stack aligned as after a call
    *--slots = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; saved++) *--slots = nullptr;
    return slots;
}
#elif defined(__aarch64__)
__asm__(".text\n"
        ".p2align 2\n"
        ".globl emulator_switch\n" EMULATOR_HIDDEN "emulator_switch:\n"
        "    sub sp, sp, #160\n"
        "    stp x19, x20, [sp, #0]\n"
        "    stp x21, x22, [sp, #16]\n"
        "    stp x23, x24, [sp, #32]\n"
        "    stp x25, x26, [sp, #48]\n"
        "    stp x27, x28, [sp, #64]\n"
        "    stp x29, x30, [sp, #80]\n"
        "    stp d8, d9, [sp, #96]\n"
        "    stp d10, d11, [sp, #112]\n"
        "    stp d12, d13, [sp, #128]\n"
        "    stp d14, d15, [sp, #144]\n"
        "    mov x9, sp\n"
        "    str x9, [x0]\n"
        "    mov sp, x1\n"
        "    ldp x19, x20, [sp, #0]\n"
        "    ldp x21, x22, [sp, #16]\n"
        "    ldp x23, x24, [sp, #32]\n"
        "    ldp x25, x26, [sp, #48]\n"
        "    ldp x27, x28, [sp, #64]\n"
        "    ldp x29, x30, [sp, #80]\n"
        "    ldp d8, d9, [sp, #96]\n"
        "    ldp d10, d11, [sp, #112]\n"
        "    ldp d12, d13, [sp, #128]\n"
        "    ldp d14, d15, [sp, #144]\n"
        "    add sp, sp, #160\n"
        "    ret\n");

inline void* new_stack(char* top, void (*entry)()) {
    void** slots = reinterpret_cast<void**>(top) - 20;
    for (int saved = 0; saved < 20; saved++) slots[saved] = nullptr;
    slots[11] = reinterpret_cast<void*>(entry); // x30, to which the switch returns
    return slots;
}
#else
#error "the emulator switches stacks on x86-64 and aarch64 only"
#endif

// Goes on with `to`; returns when somebody switches back. `ends`: nobody will.
inline void switch_fiber(Fiber& from, Fiber& to, bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#else
    (void)ends;
#endif
    emulator_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// To be called first on a new stack; tells where the stack lies from which it was entered.
inline void fiber_entered(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.bytes);
#else
    (void)from;
#endif
}

} // namespace emulator
