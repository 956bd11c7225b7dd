// The kernels, one for each type of operands and form: each type is compiled on its own.
#pragma once

#include "arguments.h"

namespace fntx {

typedef void (*Kernel)(Arguments);

// Of kernel_half.cu, kernel_bfloat.cu, kernel_split.cu.
Kernel half_kernel(int form);
Kernel bfloat_kernel(int form);
Kernel split_kernel(int form);

}  // namespace fntx
