#!/bin/sh
# Runs the operations' selftest on the emulator with kernels that g++ has instrumented with AddressSanitizer and
# UndefinedBehaviorSanitizer, and kernels with a planted error each, which the sanitizers must report.
#
#   tests/emulator/sanitize.sh        from anywhere in the repository; needs cargo and g++
set -eu
cd "$(dirname "$0")/../.."

runtime=$(realpath "$(${CXX:-g++} -print-file-name=libasan.so)")
if [ ! -f "$runtime" ]; then
    echo "sanitize.sh: cannot run: ${CXX:-g++} has no AddressSanitizer (libasan.so)" >&2
    exit 1
fi
tests=$(cargo test --release --package quintet-kernels --lib --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)

# The runtime is loaded first, and the emulator compiles for it when it finds it. Rust's own memory is not checked for
# leaks: what is meant to live as long as the process would be reported.
run() {
    LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 "$tests" "$@"
}

# A planted error must end the process with the sanitizer's words.
run_planted() {
    if output=$(run --ignored --exact "driver::emulated::tests::$1" 2>&1); then
        echo "sanitize.sh: $1 was not reported" >&2
        exit 1
    fi
    case $output in
    *"$2"*) echo "$1: reported" ;;
    *)
        echo "sanitize.sh: $1 failed, but not with \"$2\":" >&2
        echo "$output" >&2
        exit 1
        ;;
    esac
}

run driver::emulated
run_planted planted_write_out_of_device_memory "ERROR: AddressSanitizer: heap-buffer-overflow"
run_planted planted_write_out_of_shared_memory "ERROR: AddressSanitizer: use-after-poison"
run_planted planted_overflow "runtime error: signed integer overflow"
