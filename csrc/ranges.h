// The numbers that keep exponentials and weights in the range of their type, for the C++ and the CUDA kernels.
// fastntxent/backends/ranges.py has them for Python, and tests/test_numbers.py fails if one of the two changes alone.
#pragma once

namespace fntx {

template <class T> constexpr T LOG2_E = T(1.4426950408889634);  // exp(x) is 2^(x log2 e)

// exp(k s) itself is formed while k max|s| + ln M stays below this: two thirds of the largest exponent (88.7 of float,
// 709.8 of double), which leaves products with exp(-nu) and with the weights a third to move in. Beyond it, logits are
// shifted by their maximum or by nu.
template <class T> constexpr T DIRECT_LIMIT = sizeof(T) == 4 ? 60 : 480;

// In that form the factors w exp(-nu), with the largest w at 1, stay between this and its inverse: three decades inside
// either end of float's range (1.2e-38 to 3.4e38), eight inside double's.
template <class T> constexpr double SMALLEST_FACTOR = sizeof(T) == 4 ? 1e-35 : 1e-300;

// With a shift no factor exceeds its weight, and the largest weight takes this value: the middle of the range above 1,
// so that neither small factors nor sums of large ones leave the range.
template <class T> constexpr double LARGEST_WEIGHT = sizeof(T) == 4 ? 0x1p64 : 0x1p512;

// The largest weight in a tile of the CUDA kernels' G. A float16 lies between 6e-8 and 65504. |G_ij| stays below
// 4 G_SCALE = 32768, for P_ij and P_ji are at most 1 and the factor of a column is below 2. (The Triton kernels, whose
// factor of a column is at most 1, take half this scale.)
constexpr float G_SCALE = 8192;

// The largest weight of a CUDA call counts as at least this, the unit in which weights enter the tiles: where all are 0
// nothing is divided by 0, and both G_SCALE / unit (8e36) and unit / G_SCALE (1.2e-37) are normal floats.
constexpr float SMALLEST_UNIT = 1e-33f;

}  // namespace fntx
