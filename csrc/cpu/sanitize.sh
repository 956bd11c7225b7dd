#!/bin/sh
# Build check.cpp with the kernels and run it: csrc/cpu/sanitize.sh [BUILD ...] [-- [--quick] [GROUP ...]]
#
#   address      AddressSanitizer and UndefinedBehaviorSanitizer, with OpenMP threads as in production
#   exact        like address; the kernels' own buffers have their exact sizes and start as NaN
#   thread       ThreadSanitizer, with std::thread, because GCC's OpenMP runtime is not instrumented
#   emulated     like exact, on bfloat16 rows only, with emulated AVX512_BF16 and AMX instructions; needs AVX-512
#   plain        as setup.py builds it
#   arm          as setup.py builds it on aarch64, run in an aarch64 emulator
#   arm-address  like arm, with AddressSanitizer and UndefinedBehaviorSanitizer, without leak detection
#
# The default is address, exact, thread and emulated. Arguments after -- go to check.cpp: --quick, and the names of its
# groups ("two views", slabs, ...; all by default). Objects go to build/sanitize. CXX chooses the compiler for this
# machine, ARM_CXX the compiler for aarch64, and ARM_RUN the emulator.
set -eu
cd "$(dirname "$0")/../.."

builds=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    builds="$builds $1"
    shift
done
[ $# -eq 0 ] || shift # the rest goes to check.cpp

build_and_run() { # NAME FLAGS [ARGUMENT ...]
    name=$1 flags=$2
    shift 2
    out=build/sanitize/$name
    mkdir -p "$out"
    compile() { "$cxx" -std=c++17 -Wall -Wextra -Icsrc/cpu "$@"; }
    objects=""
    add() { # OBJECT SOURCE [FLAG ...]
        object=$out/$1.o source=csrc/cpu/$2.cpp
        shift 2
        compile $flags "$@" -c "$source" -o "$object"
        objects="$objects $object"
    }
    define=""
    add kernels_baseline kernels
    case $machine in
    x86_64 | amd64)
        define=-DFNTX_X86
        add kernels_avx2 kernels -mavx2 -mfma
        avx512="-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma"
        add kernels_avx512 kernels $avx512
        case $name in
        emulated)
            define="$define -DFNTX_BFLOAT"
            add kernels_avx512_bf16 kernels $avx512 -DFNTX_EMULATE_AVX512_BF16
            add kernels_amx kernels $avx512 -DFNTX_EMULATE_AMX
            ;;
        plain)
            define="$define -DFNTX_BFLOAT"
            add kernels_avx512_bf16 kernels $avx512 -mavx512bf16
            add kernels_amx kernels $avx512 -mavx512bf16 -mamx-tile -mamx-bf16
            ;;
        esac
        ;;
    esac
    add dispatch dispatch $define
    add loss loss
    add team team
    add check check
    case $name in exact | emulated) ;; *) add memory memory ;; esac
    compile $flags $objects -pthread -o "$out/check"
    echo "== $name"
    $run "$out/check" "$@"
}

here() {
    machine=$(uname -m) cxx=${CXX:-g++} run=""
    # GCC's ThreadSanitizer needs address randomisation turned off.
    if setarch "$machine" -R true 2>/dev/null; then run="setarch $machine -R"; fi
    build_and_run "$@"
}

on_arm() {
    machine=aarch64 cxx=${ARM_CXX:-aarch64-linux-gnu-g++} run=${ARM_RUN:-qemu-aarch64 -L /usr/aarch64-linux-gnu}
    for tool in "$cxx" "${run%% *}"; do
        command -v "$tool" >/dev/null && continue
        echo "$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user" >&2
        exit 2
    done
    build_and_run "$@"
}

# Some calls request more memory than the machine has.
export ASAN_OPTIONS=allocator_may_return_null=1 TSAN_OPTIONS=allocator_may_return_null=1:halt_on_error=1

sanitizers="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -fopenmp"
for build in ${builds:-address exact thread emulated}; do
    case $build in
    address) here address "$sanitizers" "$@" ;;
    exact) here exact "$sanitizers -DFNTX_EXACT_MEMORY" "$@" ;;
    emulated)
        if grep -qs avx512vl /proc/cpuinfo; then
            here emulated "$sanitizers -DFNTX_EXACT_MEMORY -DFNTX_EMULATE" "$@"
        else
            echo "== emulated: skipped, because this processor has no AVX-512"
        fi
        ;;
    thread) here thread "-O1 -g -fsanitize=thread -DFNTX_STD_THREADS" "$@" ;;
    plain) here plain "-O3 -fopenmp" "$@" ;;
    arm) on_arm arm "-O3 -fopenmp" "$@" ;;
    arm-address) # leak detection traces the process, which the emulator does not allow
        (export ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0" && on_arm arm-address "$sanitizers" "$@")
        ;;
    *) echo "unknown build: $build" >&2 && exit 2 ;;
    esac
done
