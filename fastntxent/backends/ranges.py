"""Constants that keep exponentials and weights in the range of their dtype, for the backends written in Python.

`csrc/ranges.h` has the same constants for C++ and CUDA (with a different G_SCALE), and `tests/test_numbers.py` compares
the two files. Below, k is the inverse temperature, s a similarity, M the number of rows of the longer side, nu a row's
log-sum-exp, and w the weight of nu in the gradient. docs/architecture.md defines the matrices P and G.
"""

from __future__ import annotations

import torch

# Direct regime: exp(k s) is computed without a shift if k max|s| + ln M is below this limit. The limit is two thirds of
# the largest argument of exp (88.7 for float32, 709.8 for float64); the rest is headroom for products with exp(-nu) and
# with the weights. Above the limit (the shifted regime), logits are shifted by their maximum or by nu.
DIRECT_LIMIT = {torch.float32: 60.0, torch.float64: 480.0}

# Direct regime of `blocked`: the largest weight w is scaled to 1. All factors w exp(-nu) other than 0 must then lie
# between this number and its inverse, or the backward uses the shifted regime. This leaves three decades at either end
# of float32's range (1.2e-38 to 3.4e38), and eight at either end of float64's.
SMALLEST_FACTOR = {torch.float32: 1e-35, torch.float64: 1e-300}

# Shifted regime of `blocked`: no factor w exp(k s - nu) exceeds its weight, and the largest weight is scaled to at most
# this value. It is the geometric mean of 1 and the largest number of the type, so that small factors do not underflow
# and sums of large ones do not overflow.
LARGEST_WEIGHT = {torch.float32: 2.0**64, torch.float64: 2.0**512}

# The largest weight in a tile of the Triton kernels' G, by the dtype of the operands. The range of float16 is 6e-8 to
# 65,504. |G_ij| is at most 2 G_SCALE = 8,192, because P_ij, P_ji and a column's factor are at most 1. bfloat16 and TF32
# have float32's range and need no scale. (The CUDA kernels use twice this scale: csrc/ranges.h.)
G_SCALE = {torch.float16: 4096.0, torch.bfloat16: 1.0, torch.float32: 1.0}
