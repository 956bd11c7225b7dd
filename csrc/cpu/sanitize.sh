#!/bin/sh
# Build check.cpp with the kernels and run it: csrc/cpu/sanitize.sh [address] [exact] [thread] [plain]
#
#   address  AddressSanitizer and UndefinedBehaviorSanitizer, threads by OpenMP as in production
#   exact    the same, and each piece of the kernels' own memory is allocated to the byte and starts as NaN
#   thread   ThreadSanitizer; threads are std::thread, because GCC's OpenMP runtime is not instrumented
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
        add kernels_avx512 kernels -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma
        ;;
    esac
    add dispatch dispatch $define
    add loss loss
    add team team
    add check check
    case $name in exact) ;; *) add memory memory ;; esac
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
for build in ${@:-address exact thread}; do
    case $build in
    address) build_and_run address $sanitizers ;;
    exact) build_and_run exact $sanitizers -DFNTX_EXACT_MEMORY ;;
    thread) build_and_run thread -O1 -g -fsanitize=thread -DFNTX_STD_THREADS ;;
    plain) build_and_run plain -O3 -fopenmp ;;
    *) echo "unknown build: $build" >&2 && exit 2 ;;
    esac
done
