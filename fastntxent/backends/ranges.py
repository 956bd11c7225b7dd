"""The numbers that keep exponentials and weights in the range of their dtype, the same in every backend.

`csrc/ranges.h` has them for C++ and CUDA, and `tests/test_numbers.py` fails if one of the two changes alone.
"""

from __future__ import annotations

import torch

# exp(k s) itself is formed while k max|s| + ln M stays below this: two thirds of the largest exponent (88.7 for
# float32, 709.8 for float64), which leaves products with exp(-nu) and with the weights a third to move in. Beyond it,
# logits are shifted by their maximum or by nu.
DIRECT_LIMIT = {torch.float32: 60.0, torch.float64: 480.0}

# In that form the factors w exp(-nu), with the largest w at 1, stay between this and its inverse: three decades inside
# either end of float32's range (1.2e-38 to 3.4e38), eight inside float64's.
SMALLEST_FACTOR = {torch.float32: 1e-35, torch.float64: 1e-300}

# With a shift no factor exceeds its weight, and the largest weight takes this value: the middle of the range above 1,
# so that neither small factors nor sums of large ones leave the range.
LARGEST_WEIGHT = {torch.float32: 2.0**64, torch.float64: 2.0**512}

# The largest weight in a tile of the Triton kernels' G, by the dtype of the operands. A float16 lies between 6e-8 and
# 65,504. |G_ij| is at most 2 G_SCALE = 8,192, for P_ij, P_ji and the factor of a column are at most 1. bfloat16 and
# TF32 have float32's range and need no scale. (The CUDA kernels' scale is twice this one: csrc/ranges.h.)
G_SCALE = {torch.float16: 4096.0, torch.bfloat16: 1.0, torch.float32: 1.0}
