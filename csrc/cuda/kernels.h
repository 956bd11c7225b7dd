// The kernels, one for each type of operands and form: each type is compiled on its own.
#pragma once

#include "arguments.h"

typedef void (*Kernel)(Arguments);

// Of kernel_half.cu, kernel_bfloat.cu, kernel_split.cu.
Kernel half_kernel(bool tall);
Kernel bfloat_kernel(bool tall);
Kernel split_kernel(bool tall);
