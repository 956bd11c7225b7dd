#pragma once

#include "kernels.h"

namespace fntx {

// Run a call that has been validated. Return false if it was interrupted; throw std::bad_alloc if memory runs out.
template <class T> bool run(const fntx_call& call, const Kernels<T>& kernels);

}  // namespace fntx
