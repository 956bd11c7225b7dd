// Helpers that the two Python modules share: pointers from integers, and the parser of the tuple that describes a side.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/fastntxent.h"

typedef unsigned long long Address;

inline void* pointer(Address address) { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); }

// Parse ((data, n, stride_row, stride_col), the same for the second matrix, ids, neg_lse, d_neg_lse, d_z[0], d_z[1]).
// Return false, with a Python exception set, if the tuple does not have this form.
inline bool parse_side(PyObject* tuple, fntx_side& side) {
    Address data[2], ids, neg_lse, d_neg_lse, d_z[2];
    long long n[2], stride_row[2], stride_col[2];
    if (!PyArg_ParseTuple(tuple, "(KLLL)(KLLL)KKKKK", &data[0], &n[0], &stride_row[0], &stride_col[0], &data[1], &n[1],
                          &stride_row[1], &stride_col[1], &ids, &neg_lse, &d_neg_lse, &d_z[0], &d_z[1]))
        return false;
    for (int i = 0; i < 2; ++i) {
        side.z[i] = {pointer(data[i]), n[i], stride_row[i], stride_col[i]};
        side.d_z[i] = pointer(d_z[i]);
    }
    side.ids = static_cast<const int64_t*>(pointer(ids));
    side.neg_lse = pointer(neg_lse);
    side.d_neg_lse = pointer(d_neg_lse);
    return true;
}
