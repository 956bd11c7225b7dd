// The kernels, one for each type of operands: each is compiled on its own.
#pragma once

#include "arguments.h"

namespace fntx {

typedef void (*Kernel)(Arguments);

Kernel half_kernel();
Kernel bfloat_kernel();
Kernel split_kernel();

}  // namespace fntx
