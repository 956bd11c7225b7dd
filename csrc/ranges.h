// The constants that keep exponentials and weights in range, for the C++ and the CUDA kernels.
// fastntxent/backends/ranges.py has the constants that Python also needs, and tests/test_numbers.py compares the two
// files. Below, k is the inverse temperature, s a similarity, M the number of rows of the longer side, nu a row's
// log-sum-exp, w the weight of nu in the gradient, and P and G are the matrices of docs/architecture.md.
#pragma once

namespace fntx {

template <class T> constexpr T LOG2_E = T(1.4426950408889634);  // exp(x) = 2^(x log2 e)

// The kernels compute exp(k s) without a shift if k max|s| + ln M is below this limit, which is two thirds of the
// largest argument of exp (88.7 for float, 709.8 for double). The last third is left for products with exp(-nu) and
// with weights. Beyond the limit, logits are shifted by their maximum or by nu.
template <class T> constexpr T DIRECT_LIMIT = sizeof(T) == 4 ? 60 : 480;

// For the CPU kernels. Without a shift, weights are scaled so that the largest w is 1. If w exp(-nu) of any row whose
// weight is not 0 is then smaller than this constant or larger than its inverse, the tiles are shifted. That leaves
// three decades at either end of float's range (1.2e-38 to 3.4e38), and eight at either end of double's.
template <class T> constexpr double SMALLEST_FACTOR = sizeof(T) == 4 ? 1e-35 : 1e-300;

// For the CPU kernels. With a shift, no w exp(k s - nu) exceeds w, and the largest weight is scaled to this value. It
// is the geometric middle of the range above 1, so that neither small products nor sums of large products leave the
// range.
template <class T> constexpr double LARGEST_WEIGHT = sizeof(T) == 4 ? 0x1p64 : 0x1p512;

// The largest weight in a tile of G in the CUDA kernels. float16 holds magnitudes from 6e-8 to 65504. |G_ij| stays
// below 4 G_SCALE = 32768, because P_ij and P_ji are at most 1 and the factor of a column (r in gradient.h) is below 2.
// (In the Triton kernels, that factor is at most 1, and the scale for float16 is half of this one.)
constexpr float G_SCALE = 8192;

// In a CUDA call, weights enter the tiles in units of the call's largest weight, or of this number if the largest
// weight is smaller. So nothing is divided by 0 if all weights are 0, and both G_SCALE / unit (8e36) and unit / G_SCALE
// (1.2e-37) are normal floats.
constexpr float SMALLEST_UNIT = 1e-33f;

}  // namespace fntx
