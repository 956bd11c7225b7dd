#!/bin/sh
# Build check.cpp with the kernels and run it: csrc/cpu/sanitize.sh [BUILD ...] [-- [--quick] [GROUP ...]]
#
#   address  AddressSanitizer and UndefinedBehaviorSanitizer, threads by OpenMP as in production
#   exact    the same, and each piece of the kernels' own memory is allocated to the byte and starts as NaN
#   thread   ThreadSanitizer; threads are std::thread, because GCC's OpenMP runtime is not instrumented
#   emulated as exact, with AVX512_BF16's and AMX's instructions emulated, on bfloat16 rows alone; wants AVX-512
#   plain    as setup.py builds it
#   arm      as setup.py builds it on aarch64, run by an emulator of that machine
#   arm-address  the same, by AddressSanitizer and UndefinedBehaviorSanitizer, without the search for leaks
#
# The default is address, exact, thread and emulated. What follows -- goes to check.cpp: --quick, and names of its groups ("two
# views", slabs, ...; all by default). Objects go to build/sanitize. CXX chooses the compiler of this machine, ARM_CXX
# that of aarch64, ARM_RUN the emulator.
set -eu
cd "$(dirname "$0")/../.."

builds=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    builds="$builds $1"
    shift
done
[ $# -eq 0 ] || shift # what is left is for check.cpp

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
    # GCC's ThreadSanitizer wants its addresses where they are without randomisation.
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

# Some calls ask for more memory than there is.
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
            echo "== emulated: left out, because this processor has no AVX-512"
        fi
        ;;
    thread) here thread "-O1 -g -fsanitize=thread -DFNTX_STD_THREADS" "$@" ;;
    plain) here plain "-O3 -fopenmp" "$@" ;;
    arm) on_arm arm "-O3 -fopenmp" "$@" ;;
    arm-address) # the search for leaks would trace the process, which the emulator does not allow
        (export ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0" && on_arm arm-address "$sanitizers" "$@")
        ;;
    *) echo "unknown build: $build" >&2 && exit 2 ;;
    esac
done
