#pragma once

#include <stdint.h>

// Set the emulated device, which runs one block per multiprocessor, and the seed of its random order of events. With an
// even seed, calls run on half of the planned grid, as if the whole grid had been too large to launch. The device's
// matrix units add `block` products at once, with `extra_bits` extra bits (tensor_core.h).
void fntx_emulate(int multiprocessors, int64_t shared, unsigned seed, int block, int extra_bits);

// c (16, 8) += a (16, 16) b (16, 8), as matrix units with this `block` and these `extra_bits` compute it.
void fntx_emulated_product(bool bfloat, int block, int extra_bits, const float* a, const float* b, float* c);
