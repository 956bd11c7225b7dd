#!/bin/sh
# Build check.cpp with the kernels and run it: csrc/cpu/sanitize.sh [address] [exact] [thread] [emulated] [plain]
#
#   address  AddressSanitizer and UndefinedBehaviorSanitizer, threads by OpenMP as in production
#   exact    the same, and each piece of the kernels' own memory is allocated to the byte and starts as NaN
#   thread   ThreadSanitizer; threads are std::thread, because GCC's OpenMP runtime is not instrumented
#   emulated as exact, with AVX512_BF16's and AMX's instructions emulated, on bfloat16 rows alone; wants AVX-512
#   plain    as setup.py builds it
#
# All but plain by default. Objects go to build/sanitize; CXX chooses the compiler.
set -eu
cd "$(dirname "$0")/../.."
CXX=${CXX:-g++}

build_and_run() {
    name=$1
    shift
    out=build/sanitize/$name
    mkdir -p "$out"
    compile() { "$CXX" -std=c++17 -Wall -Wextra -Icsrc/cpu "$@"; }
    objects=""
    add() { # OBJECT SOURCE [FLAGS]
        object=$out/$1.o source=csrc/cpu/$2.cpp
        shift 2
        compile $flags "$@" -c "$source" -o "$object"
        objects="$objects $object"
    }
    flags=$*
    define=""
    add kernels_portable kernels
    case $(uname -m) in
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
    $run "$out/check"
}

# GCC's ThreadSanitizer wants its addresses where they are without randomisation.
run=""
if setarch "$(uname -m)" -R true 2>/dev/null; then run="setarch $(uname -m) -R"; fi

# Some calls ask for more memory than there is.
export ASAN_OPTIONS=allocator_may_return_null=1 TSAN_OPTIONS=allocator_may_return_null=1:halt_on_error=1

sanitizers="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -fopenmp"
for build in ${@:-address exact thread emulated}; do
    case $build in
    address) build_and_run address $sanitizers ;;
    exact) build_and_run exact $sanitizers -DFNTX_EXACT_MEMORY ;;
    emulated)
        if grep -qs avx512vl /proc/cpuinfo; then
            build_and_run emulated $sanitizers -DFNTX_EXACT_MEMORY -DFNTX_EMULATE
        else
            echo "== emulated: left out, because this processor has no AVX-512"
        fi
        ;;
    thread) build_and_run thread -O1 -g -fsanitize=thread -DFNTX_STD_THREADS ;;
    plain) build_and_run plain -O3 -fopenmp ;;
    *) echo "unknown build: $build" >&2 && exit 2 ;;
    esac
done
