#!/bin/sh
# Call every operator with invalid tensors, with the CPU kernels under sanitizers: csrc/cpu/sanitize_calls.sh [PYTHON]
#
# Runs setup.py to build fastntxent._cpu with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize/calls,
# and runs tests/hostile.py with that build. PYTHON must have PyTorch and the package's requirements installed.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${1:-python3}
CXX=${CXX:-g++}
out=build/sanitize/calls
flags="-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"

echo "== calls"
rm -rf "$out/lib"
CC=$CXX CFLAGS=$flags CXXFLAGS=$flags LDFLAGS=$flags FASTNTXENT_CUDA=0 \
    "$PYTHON" setup.py --quiet build_ext --build-lib "$out/lib" --build-temp "$out/objects"
# Python itself is not instrumented, so the sanitizers' runtimes are preloaded. Leak detection is off, because PyTorch
# leaks.
runtimes="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libubsan.so)"
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD=$runtimes \
    "$PYTHON" -m tests.hostile --kernels "$(echo "$out"/lib/fastntxent/_cpu*.so)"
