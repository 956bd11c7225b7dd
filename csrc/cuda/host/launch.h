#pragma once

#include <stdint.h>

// The device that is emulated from now on, a block to each multiprocessor, and the order in which things happen on it.
void fntx_emulate(int multiprocessors, int64_t shared, bool warpgroups, unsigned seed);
