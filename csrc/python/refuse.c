/* refuse.c: what an array that can't be borrowed is told: the argument, what came, what was
 * expected and the call that would make it fit.
 */
#include "array.h"

#include <string.h>

#include "dlpack.h"

const edge_dtype_facts edge_dtypes[] = {
    [EDGE_FLOAT32] = {"float32", 'f', DLPACK_FLOAT, 4},
    [EDGE_UINT8] = {"uint8", 'u', DLPACK_UINT, 1},
    [EDGE_INT32] = {"int32", 'i', DLPACK_INT, 4},
    [EDGE_INT64] = {"int64", 'i', DLPACK_INT, 8},
    [EDGE_UINT32] = {"uint32", 'u', DLPACK_UINT, 4},
    [EDGE_ANY] = {"any", 0, -1, 0},
};

int edge_raise_from(PyObject *type, const char *format, ...)
{
    PyObject *old_type, *old, *trace;
    PyErr_Fetch(&old_type, &old, &trace);
    PyErr_NormalizeException(&old_type, &old, &trace);
    va_list args;
    va_start(args, format);
    PyErr_FormatV(type, format, args);
    va_end(args);
    if (old) {
        PyObject *new_type, *new, *new_trace;
        PyErr_Fetch(&new_type, &new, &new_trace);
        PyErr_NormalizeException(&new_type, &new, &new_trace);
        if (trace) {
            PyException_SetTraceback(old, trace);
        }
        PyException_SetCause(new, old); /* steals old */
        PyErr_Restore(new_type, new, new_trace);
    }
    Py_XDECREF(old_type);
    Py_XDECREF(trace);
    return -1;
}

bool edge_is_of(PyObject *object, const char *package)
{
    size_t n = strlen(package);
    bool yes = false;
    for (PyTypeObject *type = Py_TYPE(object); type && !yes;
         type = PyType_GetSlot(type, Py_tp_base)) {
        PyObject *module = PyObject_GetAttrString((PyObject *)type, "__module__");
        const char *text =
            module && PyUnicode_Check(module) ? PyUnicode_AsUTF8AndSize(module, NULL) : NULL;
        yes = text && strncmp(text, package, n) == 0 && (text[n] == 0 || text[n] == '.');
        if (!text) {
            PyErr_Clear();
        }
        Py_XDECREF(module);
    }
    return yes;
}

int edge_refuse_type(PyObject *object, const char *name, edge_dtype dtype)
{
    PyObject *type = edge_type_name(object);
    const char *wanted = dtype == EDGE_ANY ? "float32" : edge_dtypes[dtype].name;
    if (type) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a %s array (NumPy, or anything with __dlpack__), got %U; use "
                     "np.asarray(%s, dtype=np.%s)",
                     name, wanted, type, name, wanted);
        Py_DECREF(type);
    }
    return -1;
}

int edge_refuse_dtype(PyObject *object, const char *name, edge_dtype dtype, bool writable,
                      const char *got)
{
    const char *wanted = edge_dtypes[dtype].name;
    if (writable) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected %s, got %s; allocate it with np.empty(shape, "
                     "np.%s)",
                     name, wanted, got, wanted);
    } else if (edge_is_of(object, "torch")) {
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s; use %s.to(torch.%s)", name, wanted,
                     got, name, wanted);
    } else {
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s; use %s.astype(np.%s)", name, wanted,
                     got, name, wanted);
    }
    return -1;
}

int edge_refuse_strides(PyObject *object, const char *name, PyObject *strides, const char *unit,
                        bool writable)
{
    const char *before = "np.ascontiguousarray(", *after = ")";
    if (edge_is_of(object, "torch")) {
        before = "";
        after = ".contiguous()";
    }
    if (writable) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected a C-contiguous array, got strides %S (%s); allocate it with "
                     "np.empty(shape, np.float32)",
                     name, strides, unit);
    } else {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected a C-contiguous array, got strides %S (%s); use %s%s%s", name,
                     strides, unit, before, name, after);
    }
    return -1;
}

int edge_refuse_read_only(const char *name)
{
    PyErr_Format(PyExc_ValueError,
                 "%s: expected a writable array, got a read-only one; allocate it with "
                 "np.empty(shape, np.float32)",
                 name);
    return -1;
}

int edge_refuse_rank(const char *name, int n_dims)
{
    PyErr_Format(PyExc_ValueError, "%s: expected at most %d dimensions, got %d; reshape it", name,
                 EDGE_MAX_DIMS, n_dims);
    return -1;
}

int edge_refuse_alignment(PyObject *object, const char *name)
{
    PyErr_Format(PyExc_ValueError,
                 "%s: expected aligned memory, got an address in the middle of a number; use "
                 "%s.%s()",
                 name, name, edge_is_of(object, "torch") ? "clone" : "copy");
    return -1;
}
