#!/bin/sh
# Check the CUDA kernels, with sanitizers or without: csrc/cuda/sanitize.sh [address] [plain] [device]
#
#   address  check.cpp on the emulated device, with AddressSanitizer and UndefinedBehaviorSanitizer
#   plain    check.cpp on the emulated device, without sanitizers
#   device   some tests of tests/test_cuda.py on a GPU under compute-sanitizer, with each tool in TOOLS (by default
#            memcheck, racecheck, synccheck and initcheck). PYTHON chooses the interpreter, which must have the package
#            installed with its extra "test".
#
# The default is address. The programs go to build/sanitize. CXX chooses the compiler.
set -eu
cd "$(dirname "$0")/../.."

build_and_run() {
    name=$1
    shift
    out=build/sanitize/cuda-$name
    mkdir -p "$out"
    sources="csrc/cuda/check.cpp csrc/cuda/host/launch.cpp csrc/cuda/host/emulator.cpp"
    ${CXX:-g++} -std=c++17 -Wall -Wextra -Wno-unknown-pragmas "$@" $sources -o "$out/check"
    echo "== cuda $name"
    ASAN_OPTIONS=detect_stack_use_after_return=0 "$out/check"
}

for build in ${@:-address}; do
    case $build in
    address) build_and_run address -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all ;;
    plain) build_and_run plain -O2 ;;
    device)
        for tool in ${TOOLS:-memcheck racecheck synccheck initcheck}; do
            echo "== compute-sanitizer $tool"
            compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
                "${PYTHON:-python3}" -m pytest -q tests/test_cuda.py -k "edges or bits or groups or layout or larger"
        done
        ;;
    *) echo "unknown build: $build (expected address, plain or device)" >&2 && exit 2 ;;
    esac
done
