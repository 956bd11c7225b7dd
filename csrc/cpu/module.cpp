// fastntxent._cpu: the C interface as a Python module. It uses only Python's stable ABI, so one build works with every
// Python from 3.10 on. Addresses are passed as integers (Tensor.data_ptr()). Shapes and dtypes are checked in Python
// (fastntxent/ops/contract.py).
#include <chrono>
#include <thread>

#include "../python.h"
#include "schedule.h"

namespace {

// Return whether a signal handler raised an exception (Ctrl-C). Only the main thread calls this, after it has released
// the GIL. Signal handlers run in no other thread. Any other thread would never return from here once the interpreter
// is shutting down.
int signal_raised() {
    const PyGILState_STATE state = PyGILState_Ensure();
    const int raised = PyErr_CheckSignals();
    PyGILState_Release(state);
    return raised;
}

// Reacquire the GIL. During shutdown, Python before 3.14 ends every thread except the main thread in this call, by
// unwinding the thread's stack. Some of PyTorch's frames abort the process when they are unwound. So the thread waits
// here until the process ends, as Python 3.14 and later make it do anyway.
void take_back(PyThreadState* thread) {
    try {
        PyEval_RestoreThread(thread);
    } catch (...) {
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

unsigned long long count_rows(const fntx_side& side) {
    return static_cast<unsigned long long>(side.z[0].n) + static_cast<unsigned long long>(side.z[1].n);
}

PyObject* failure(int status, const fntx_call& call) {
    const fntx_side& side = call.cols && count_rows(*call.cols) > count_rows(call.rows) ? *call.cols : call.rows;
    const auto D = static_cast<long long>(call.D);
    if (status == FNTX_TOO_LARGE)
        return PyErr_Format(PyExc_ValueError,
                            "the CPU kernels take at most %d rows (both views together) and "
                            "fewer than 2^59 numbers, got %llu rows of %lld features",
                            FNTX_MOST_ROWS, count_rows(side), D);
    if (status == FNTX_NO_MEMORY)
        return PyErr_Format(PyExc_MemoryError,
                            "the CPU kernels could not allocate memory for %llu rows of %lld features",
                            count_rows(side), D);
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_RuntimeError,
                     "the CPU kernels rejected a call (status %d): please report this bug in fastntxent", status);
    return nullptr;
}

// Rarely used groups of arguments: each is a tuple or None.
bool parse_limits(PyObject* given, fntx_call& call, fntx_side& cols) {
    Address of_rows, of_cols;
    if (given == Py_None) return true;
    if (!PyArg_ParseTuple(given, "KKpdd", &of_rows, &of_cols, &call.limited, &call.limit_scale, &call.limit_shift))
        return false;
    call.rows.limits = pointer(of_rows);
    cols.limits = pointer(of_cols);
    return true;
}

bool parse_against(PyObject* given, fntx_call& call) {
    Address against, d_against;
    if (given == Py_None) return true;
    if (!PyArg_ParseTuple(given, "KK", &against, &d_against)) return false;
    call.against = pointer(against);
    call.d_against = pointer(d_against);
    return true;
}

bool parse_classes(PyObject* given, fntx_call& call) {
    Address classes;
    if (given == Py_None) return true;
    if (!PyArg_ParseTuple(given, "Kip", &classes, &call.form, &call.mean_of_classes)) return false;
    call.classes = static_cast<const int64_t*>(pointer(classes));
    return true;
}

PyObject* run(PyObject*, PyObject* args) {
    fntx_call call = {};
    fntx_side cols = {};
    PyObject *row_tuple, *col_tuple, *limits, *against, *classes;
    Address pos, d_pos, loss, d_inv_tau, d_bias;
    long long D, workspace;
    int interruptible;
    if (!PyArg_ParseTuple(args, "iiipiLdddO!OKKKddKKOOOLp", &call.phases, &call.function, &call.dtype, &call.normalize,
                          &call.threads, &D, &call.inv_tau, &call.bias, &call.eps, &PyTuple_Type, &row_tuple,
                          &col_tuple, &pos, &d_pos, &loss, &call.loss_weight, &call.cols_loss_weight, &d_inv_tau,
                          &d_bias, &limits, &against, &classes, &workspace, &interruptible))
        return nullptr;
    if (!parse_side(row_tuple, call.rows)) return nullptr;
    if (col_tuple != Py_None) {
        if (!parse_side(col_tuple, cols)) return nullptr;
        call.cols = &cols;
    }
    if (!parse_limits(limits, call, cols) || !parse_against(against, call) || !parse_classes(classes, call))
        return nullptr;
    call.D = D;
    call.workspace = workspace;
    call.pos = pointer(pos);
    call.d_pos = pointer(d_pos);
    call.loss = pointer(loss);
    call.d_inv_tau = pointer(d_inv_tau);
    call.d_bias = pointer(d_bias);
    call.poll = interruptible ? signal_raised : nullptr;

    PyThreadState* const thread = PyEval_SaveThread();
    const int status = fntx_run(&call);
    take_back(thread);
    if (status == FNTX_OK) Py_RETURN_NONE;
    return failure(status, call);
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
    return PyErr_Format(PyExc_ValueError, "exp2 supports only float32 and float64");
}

PyObject* schedule(PyObject*, PyObject* args) {
    long long rows, cols, D;
    int threads;
    if (!PyArg_ParseTuple(args, "LLLi", &rows, &cols, &D, &threads)) return nullptr;
    if (rows < 1 || cols < 0 || rows > FNTX_MOST_ROWS || cols > FNTX_MOST_ROWS || D < 1 || threads < 1)
        return PyErr_Format(PyExc_ValueError,
                            "rows, D and threads must be at least 1, cols at least 0 (0: symmetric), and rows and cols "
                            "at most 2^31 - 1, got rows %lld, cols %lld, D %lld, threads %d",
                            rows, cols, D, threads);
    const bool symmetric = cols == 0;
    if (symmetric) cols = rows;
    const fntx::Schedule of_call(rows, cols, symmetric, fntx::useful_threads(rows, cols, D, threads));
    PyObject* const tasks = PyList_New(Py_ssize_t(of_call.size()));
    for (int64_t index = 0; tasks && index < of_call.size(); ++index) {
        const fntx::Task task = of_call[index];
        PyObject* const item = Py_BuildValue("LLLiiL", (long long)task.slab, (long long)of_call.first_row(task, 0),
                                             (long long)of_call.first_col(task, 0), int(task.row_turn),
                                             int(task.col_turn), (long long)of_call.first_place(index));
        if (!item || PyList_SetItem(tasks, Py_ssize_t(index), item) < 0) {
            Py_DECREF(tasks);
            return nullptr;
        }
    }
    if (!tasks) return nullptr;
    const auto rows_per_take = [&](int64_t n) {
        return (long long)(fntx::ALIGNED_ROWS *
                           fntx::chunks_per_take(fntx::divide_up(n, fntx::ALIGNED_ROWS), of_call.threads));
    };
    return Py_BuildValue("iLLLLLN", of_call.threads, (long long)of_call.edge, (long long)of_call.block_tiles,
                         rows_per_take(rows), rows_per_take(cols), (long long)of_call.slabs.count, tasks);
}

PyMethodDef methods[] = {
    {"run", run, METH_VARARGS,
     "run(phases, function, dtype, normalize, threads, D, inv_tau, bias, eps, rows, cols, pos, "
     "d_pos, loss, loss_weight, cols_loss_weight, d_inv_tau, d_bias, (row_limits, col_limits, "
     "limited, limit_scale, limit_shift) or None, (against, d_against) or None, (classes, "
     "form, mean_of_classes) or None, workspace, interruptible): call fntx_run of csrc/cpu/fastntxent.h. "
     "interruptible (in the main thread only): whether Ctrl-C stops the call."},
    {"instruction_set", instruction_set, METH_NOARGS, "Return the instruction set in use."},
    {"use_instruction_set", use_instruction_set, METH_VARARGS, "Switch to another instruction set."},
    {"schedule", schedule, METH_VARARGS,
     "schedule(rows, cols or 0, D, threads): return how csrc/cpu/schedule.h cuts a call: (threads, edge, "
     "block_tiles, rows per take, columns per take, slabs, tasks), where "
     "a task is (slab, first row, first column, row_turn, col_turn, place)."},
    {"exp2", exp2, METH_VARARGS, "exp2(dtype, x, y, n): write 2^x to y with the kernels' exponential."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cpu", "The CPU kernels of csrc/cpu.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&definition); }
