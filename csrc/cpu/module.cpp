// fastntxent._cpu: the C interface for Python, within the stable ABI, so that one build serves every Python 3 from 3.10.
// Addresses come as integers (Tensor.data_ptr()); fastntxent/backends/cpu.py sees to shapes and dtypes.
#include "../python.h"

namespace {

// Whether a signal's handler raised (Ctrl-C): asked by the calling thread, which has let go of the interpreter.
int signal_raised() {
    const PyGILState_STATE state = PyGILState_Ensure();
    const int raised = PyErr_CheckSignals();
    PyGILState_Release(state);
    return raised;
}

PyObject* run(PyObject*, PyObject* args) {
    fntx_call call = {};
    fntx_side cols = {};
    PyObject *row_tuple, *col_tuple;
    Address pos, d_pos, loss, d_inv_tau;
    long long D, workspace;
    if (!PyArg_ParseTuple(args, "iipiLddO!OKKKdKL", &call.phases, &call.dtype, &call.normalize, &call.threads, &D,
                          &call.inv_tau, &call.eps, &PyTuple_Type, &row_tuple, &col_tuple, &pos, &d_pos, &loss,
                          &call.loss_weight, &d_inv_tau, &workspace))
        return nullptr;
    if (!parse_side(row_tuple, call.rows)) return nullptr;
    if (col_tuple != Py_None) {
        if (!parse_side(col_tuple, cols)) return nullptr;
        call.cols = &cols;
    }
    call.D = D;
    call.workspace = workspace;
    call.pos = pointer(pos);
    call.d_pos = pointer(d_pos);
    call.loss = pointer(loss);
    call.d_inv_tau = pointer(d_inv_tau);
    call.poll = signal_raised;

    int status;
    Py_BEGIN_ALLOW_THREADS
    status = fntx_run(&call);
    Py_END_ALLOW_THREADS
    if (status == FNTX_OK) Py_RETURN_NONE;
    if (status == FNTX_NO_MEMORY) return PyErr_NoMemory();
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_RuntimeError, "fastntxent's CPU kernel refused a call (status %d): a defect, please report it",
                     status);
    return nullptr;
}

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(fntx_instruction_set()); }

PyObject* use_instruction_set(PyObject*, PyObject* args) {
    const char* name;
    if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
    if (fntx_use_instruction_set(name) == FNTX_OK) Py_RETURN_NONE;
    return PyErr_Format(PyExc_ValueError, "this machine has no instruction set '%s'", name);
}

PyObject* exp2(PyObject*, PyObject* args) {
    int dtype;
    Address x, y;
    long long n;
    if (!PyArg_ParseTuple(args, "iKKL", &dtype, &x, &y, &n)) return nullptr;
    if (fntx_exp2(dtype, pointer(x), pointer(y), n) == FNTX_OK) Py_RETURN_NONE;
    return PyErr_Format(PyExc_ValueError, "exp2 takes float32 or float64");
}

PyMethodDef methods[] = {
    {"run", run, METH_VARARGS, "run(phases, dtype, normalize, threads, D, inv_tau, eps, rows, cols, pos, d_pos, loss, "
                               "loss_weight, d_inv_tau, workspace): fntx_run of csrc/cpu/fastntxent.h."},
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set in use."},
    {"use_instruction_set", use_instruction_set, METH_VARARGS, "Use another one from now on."},
    {"exp2", exp2, METH_VARARGS, "exp2(dtype, x, y, n): the kernels' own 2^x."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", "The CPU kernels of csrc/cpu.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&definition); }
