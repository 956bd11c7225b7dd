#!/bin/sh
# Call every operator with invalid tensors, on CPU kernels under sanitizers: csrc/cpu/sanitize_calls.sh [PYTHON]
#
# Builds fastntxent._cpu with setup.py under AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize/calls,
# and runs tests/hostile.py on it. PYTHON needs PyTorch and the package's requirements.
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
# Python itself is not instrumented, so the runtimes are preloaded. Leak detection is off, because PyTorch leaks.
runtimes="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libubsan.so)"
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD=$runtimes \
    "$PYTHON" -m tests.hostile --kernels "$(echo "$out"/lib/fastntxent/_cpu*.so)"
