// fastntxent._cuda: the C interface as a Python module, limited to Python's stable ABI. Addresses are passed as
// integers (Tensor.data_ptr()). The operators check shapes and dtypes (fastntxent/ops/contract.py).
#include "../python.h"
#include "fastntxent_cuda.h"
#ifdef FNTX_EMULATED
#include "host/launch.h"
#endif

namespace {

PyObject* fail() { return PyErr_Format(PyExc_RuntimeError, "fastntxent's CUDA kernel: %s", fntx_cuda_error()); }

PyObject* devices(PyObject*, PyObject*) {
    const int count = fntx_cuda_devices();
    return count < 0 ? fail() : PyLong_FromLong(count);
}

PyObject* workspace(PyObject*, PyObject* args) {
    int device, dtype, blocks;
    long long n_rows, n_cols, D;
    if (!PyArg_ParseTuple(args, "iiLLLi", &device, &dtype, &n_rows, &n_cols, &D, &blocks)) return nullptr;
    const int64_t bytes = fntx_cuda_workspace(device, dtype, n_rows, n_cols, D, blocks);
    return bytes < 0 ? fail() : PyLong_FromLongLong(bytes);
}

PyObject* run(PyObject*, PyObject* args) {
    fntx_cuda_call call = {};
    fntx_side cols = {};
    PyObject *row_tuple, *col_tuple;
    Address inv_tau_ptr, pos, d_pos, loss, d_inv_tau, workspace, stream;
    long long D;
    if (!PyArg_ParseTuple(args, "iipLfKfO!OKKKfKKiiK", &call.phases, &call.dtype, &call.normalize, &D, &call.inv_tau,
                          &inv_tau_ptr, &call.eps, &PyTuple_Type, &row_tuple, &col_tuple, &pos, &d_pos, &loss,
                          &call.loss_weight, &d_inv_tau, &workspace, &call.blocks, &call.device, &stream))
        return nullptr;
    if (!parse_side(row_tuple, call.rows)) return nullptr;
    if (col_tuple != Py_None) {
        if (!parse_side(col_tuple, cols)) return nullptr;
        call.cols = &cols;
    }
    call.D = D;
    call.inv_tau_ptr = static_cast<const float*>(pointer(inv_tau_ptr));
    call.pos = static_cast<float*>(pointer(pos));
    call.d_pos = static_cast<const float*>(pointer(d_pos));
    call.loss = static_cast<float*>(pointer(loss));
    call.d_inv_tau = static_cast<float*>(pointer(d_inv_tau));
    call.workspace = pointer(workspace);
    call.stream = pointer(stream);
    if (fntx_cuda_run(&call) != FNTX_OK) return fail();
    Py_RETURN_NONE;
}

#ifdef FNTX_EMULATED
PyObject* emulate(PyObject*, PyObject* args) {
    int multiprocessors, block, extra_bits;
    long long shared;
    unsigned seed;
    if (!PyArg_ParseTuple(args, "iLIii", &multiprocessors, &shared, &seed, &block, &extra_bits)) return nullptr;
    fntx_emulate(multiprocessors, shared, seed, block, extra_bits);
    Py_RETURN_NONE;
}

PyObject* product(PyObject*, PyObject* args) {
    int bfloat, block, extra_bits;
    Address a, b, c;
    if (!PyArg_ParseTuple(args, "piiKKK", &bfloat, &block, &extra_bits, &a, &b, &c)) return nullptr;
    fntx_emulated_product(bfloat, block, extra_bits, static_cast<const float*>(pointer(a)),
                          static_cast<const float*>(pointer(b)), static_cast<float*>(pointer(c)));
    Py_RETURN_NONE;
}
#endif

PyMethodDef methods[] = {
    {"devices", devices, METH_NOARGS, "Return the number of CUDA devices."},
    {"workspace", workspace, METH_VARARGS,
     "workspace(device, dtype, n_rows, n_cols, D, blocks): return the bytes of workspace that a call needs."},
    {"run", run, METH_VARARGS,
     "run(phases, dtype, normalize, D, inv_tau, inv_tau_ptr, eps, rows, cols, pos, d_pos, loss, "
     "loss_weight, d_inv_tau, workspace, blocks, device, stream): call fntx_cuda_run of "
     "csrc/cuda/fastntxent_cuda.h."},
#ifdef FNTX_EMULATED
    {"emulate", emulate, METH_VARARGS,
     "emulate(multiprocessors, shared, seed, block, extra_bits): set the emulated device and the seed of "
     "the order of its events."},
    {"product", product, METH_VARARGS,
     "product(bfloat, block, extra_bits, a, b, c): c += a b, with a 16 x 16 and b 16 x 8."},
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cuda", "The CUDA kernels of csrc/cuda.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda(void) { return PyModule_Create(&definition); }
