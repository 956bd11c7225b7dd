#pragma once

#include <stdint.h>

// The device that is emulated from now on, a block to each multiprocessor, and the order in which things happen on it;
// with an even seed half of a grid is all that it takes. Its matrix units add `block` products at once and keep
// `extra_bits` of them (tensor_core.h).
void fntx_emulate(int multiprocessors, int64_t shared, unsigned seed, int block, int extra_bits);

// c (16, 8) += a (16, 16) b (16, 8) by these matrix units.
void fntx_emulated_product(bool bfloat, int block, int extra_bits, const float* a, const float* b, float* c);
