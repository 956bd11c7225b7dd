#pragma once

#include "kernels.h"

namespace fntx {

// Run a checked call. False if it was interrupted; throws std::bad_alloc.
template <class T> bool run(const fntx_call& call, const Kernels<T>& kernels);

}  // namespace fntx
