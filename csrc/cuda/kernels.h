// The kernels, one for each operand type. Each is compiled in a separate file.
#pragma once

#include "arguments.h"

namespace fntx {

typedef void (*Kernel)(Arguments);

Kernel half_kernel();
Kernel bfloat_kernel();
Kernel split_kernel();

}  // namespace fntx
