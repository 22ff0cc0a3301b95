/* array.c: anybody's array -> edge_view, and new NumPy arrays.
 *
 * Nothing is copied or converted: what does not fit is refused with the call that would make it
 * fit. Two doors, tried in this order: NumPy's C API for its arrays, DLPack (dlpack.c) for
 * everything else. Torch's lazy views are the one exception, see dlpack.c.
 */
#include "array.h"

#include <string.h>

#define PY_ARRAY_UNIQUE_SYMBOL tsad_numpy_api
#include <numpy/arrayobject.h>

#include "dlpack.h"

int edge_import_numpy(void)
{
    import_array1(-1);
    return 0;
}

PyObject *edge_new_array(edge_dtype dtype, int n_dims, const int64_t *shape, void **data)
{
    static const int numbers[] = {
        [EDGE_FLOAT32] = NPY_FLOAT32, [EDGE_UINT8] = NPY_UINT8,   [EDGE_INT32] = NPY_INT32,
        [EDGE_INT64] = NPY_INT64,     [EDGE_UINT32] = NPY_UINT32,
    };
    npy_intp dims[EDGE_MAX_DIMS];
    for (int i = 0; i < n_dims; i++) {
        dims[i] = (npy_intp)shape[i];
    }
    PyObject *array = PyArray_SimpleNew(n_dims, dims, numbers[dtype]);
    if (array) {
        *data = PyArray_DATA((PyArrayObject *)array);
    }
    return array;
}

/* Asked before a chunk runs, so that nothing but the library itself can fail afterwards. */
PyObject *edge_library_of(PyObject *object)
{
    if (PyArray_Check(object)) {
        return NULL;
    }
    PyObject *library;
    if (edge_is_of(object, "torch")) {
        PyObject *name = PyUnicode_FromString("torch");
        library = name ? PyImport_GetModule(name) : NULL;
        Py_XDECREF(name);
    } else {
        library = PyObject_CallMethod(object, "__array_namespace__", NULL);
    }
    PyObject *from_dlpack = library ? PyObject_GetAttrString(library, "from_dlpack") : NULL;
    Py_XDECREF(library);
    PyErr_Clear();
    return from_dlpack;
}

/* ---- checks ---------------------------------------------------------------------------------- */

static void write_shape(char *text, size_t size, int n_dims, const int64_t *shape)
{
    size_t at = 0;
    text[at++] = '(';
    for (int i = 0; i < n_dims && at + 32 < size; i++) {
        const char *before = i ? ", " : "";
        at += (size_t)(shape[i] < 0 ? PyOS_snprintf(text + at, size - at, "%sn", before)
                                    : PyOS_snprintf(text + at, size - at, "%s%lld", before,
                                                    (long long)shape[i]));
    }
    PyOS_snprintf(text + at, size - at, n_dims == 1 ? ",)" : ")");
}

int edge_raise_shape(const char *name, const edge_view *view, int n_dims, const int64_t *shape,
                     const char *advice)
{
    char wanted[256], got[256];
    write_shape(wanted, sizeof wanted, n_dims, shape);
    write_shape(got, sizeof got, view->n_dims, view->shape);
    PyErr_Format(PyExc_ValueError, "%s: expected shape %s, got %s; %s", name, wanted, got, advice);
    return -1;
}

bool edge_has_shape(const edge_view *view, int n_dims, const int64_t *shape)
{
    if (view->n_dims != n_dims) {
        return false;
    }
    for (int i = 0; i < n_dims; i++) {
        if (shape[i] >= 0 && view->shape[i] != shape[i]) {
            return false;
        }
    }
    return true;
}

int edge_expect_shape(const char *name, const edge_view *view, int n_dims, const int64_t *shape)
{
    if (edge_has_shape(view, n_dims, shape)) {
        return 0;
    }
    return edge_raise_shape(name, view, n_dims, shape, "reshape it, or select what belongs to it");
}

int edge_expect_finite(const char *name, const edge_view *view)
{
    const uint32_t exponent = 0x7f800000u;
    const uint32_t *bits = view->data;
    size_t n = view->on_device ? 0 : view->bytes / sizeof(float); /* there it looks itself */
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) { /* no branch: the compiler vectorises it */
        bad |= (uint32_t)((bits[i] & exponent) == exponent);
    }
    if (!bad) {
        return 0;
    }
    size_t at = 0;
    while ((bits[at] & exponent) != exponent) {
        at++;
    }
    int64_t index[EDGE_MAX_DIMS];
    size_t rest = at;
    for (int i = view->n_dims - 1; i >= 0; i--) {
        index[i] = (int64_t)(rest % (size_t)view->shape[i]);
        rest /= (size_t)view->shape[i];
    }
    char text[256];
    write_shape(text, sizeof text, view->n_dims, index);
    text[strlen(text) - 1] = 0; /* "(0, 1, 3)" -> "0, 1, 3" */
    const char *got = bits[at] & 0x007fffffu ? "nan" : bits[at] >> 31 ? "-inf" : "inf";
    PyErr_Format(PyExc_ValueError,
                 "%s: expected finite numbers, got %s at %s[%s]; check where it comes from, or use "
                 "np.nan_to_num(%s)",
                 name, got, name, text + 1, name);
    return -1;
}

int edge_expect_apart(const char *name, const edge_view *view, const char *other_name,
                      const edge_view *other)
{
    const char *a = view->data, *b = other->data;
    if (view->on_device != other->on_device || !a || !b || !view->bytes || !other->bytes ||
        a + view->bytes <= b || b + other->bytes <= a) {
        return 0;
    }
    PyErr_Format(
        PyExc_ValueError,
        "%s: expected memory of its own, got an array that overlaps `%s`; allocate it with "
        "np.empty(shape, np.float32)",
        name, other_name);
    return -1;
}

/* ---- NumPy ------------------------------------------------------------------------------- */

static int refuse_numpy_dtype(PyArrayObject *array, const char *name, edge_dtype dtype,
                              bool writable)
{
    PyObject *text = PyObject_Str((PyObject *)PyArray_DESCR(array));
    const char *got = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
    if (got) {
        edge_refuse_dtype((PyObject *)array, name, dtype, writable, got);
    }
    Py_XDECREF(text);
    return -1;
}

static int refuse_numpy_strides(PyArrayObject *array, const char *name, bool writable)
{
    PyObject *strides = PyObject_GetAttrString((PyObject *)array, "strides");
    if (strides) {
        edge_refuse_strides((PyObject *)array, name, strides, "bytes", writable);
        Py_DECREF(strides);
    }
    return -1;
}

static int refuse_masked(const char *name, bool writable)
{
    PyErr_Format(PyExc_TypeError,
                 writable ? "%s: expected plain memory, got a masked array; allocate it with "
                            "np.empty(shape, np.float32)"
                          : "%s: expected plain numbers, got a masked array, whose mask would be "
                            "lost; use %s.filled(value)",
                 name, name);
    return -1;
}

static int borrow_numpy(PyObject *object, const char *name, edge_dtype dtype, bool writable,
                        edge_view *view)
{
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_CheckExact(object) && edge_is_of(object, "numpy.ma")) {
        return refuse_masked(name, writable);
    }
    if (dtype == EDGE_ANY) {
        PyObject *text = PyObject_Str((PyObject *)PyArray_DESCR(array));
        const char *got = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
        if (!got) {
            Py_XDECREF(text);
            return -1;
        }
        PyOS_snprintf(view->dtype, sizeof view->dtype, "%s", got);
        Py_DECREF(text);
    } else if (PyArray_DESCR(array)->kind != edge_dtypes[dtype].kind ||
               (unsigned)PyArray_ITEMSIZE(array) != edge_dtypes[dtype].size ||
               !PyArray_ISNOTSWAPPED(array)) {
        return refuse_numpy_dtype(array, name, dtype, writable);
    }
    if (!PyArray_IS_C_CONTIGUOUS(array)) {
        return refuse_numpy_strides(array, name, writable);
    }
    if (!PyArray_ISALIGNED(array)) {
        return edge_refuse_alignment(object, name);
    }
    view->read_only = !PyArray_ISWRITEABLE(array);
    if (writable && view->read_only) {
        return edge_refuse_read_only(name);
    }
    if (PyArray_NDIM(array) > EDGE_MAX_DIMS) {
        return edge_refuse_rank(name, PyArray_NDIM(array));
    }
    view->n_dims = PyArray_NDIM(array);
    for (int i = 0; i < view->n_dims; i++) {
        view->shape[i] = (int64_t)PyArray_DIM(array, i);
    }
    view->data = PyArray_DATA(array);
    view->bytes = (size_t)PyArray_NBYTES(array);
    view->kind = "numpy";
    view->owner = Py_NewRef(object);
    return 0;
}

/* ---- borrow and return -------------------------------------------------------------------- */

int edge_borrow(edge_state *state, PyObject *object, const char *name, edge_dtype dtype,
                bool writable, edge_view *view)
{
    return edge_borrow_on(state, object, name, dtype, writable, NULL, view);
}

int edge_borrow_on(edge_state *state, PyObject *object, const char *name, edge_dtype dtype,
                   bool writable, const edge_device *device, edge_view *view)
{
    memset(view, 0, sizeof *view);
    int status;
    if (PyArray_Check(object)) {
        status = borrow_numpy(object, name, dtype, writable, view);
    } else if (!PyObject_HasAttrString(object, "__dlpack__") ||
               !PyObject_HasAttrString(object, "__dlpack_device__") || PyType_Check(object)) {
        status = edge_refuse_type(object, name, dtype);
    } else {
        status = edge_borrow_dlpack(state, object, name, dtype, writable, device, view);
    }
    if (status < 0) {
        edge_return(view);
    }
    return status;
}

void edge_return(edge_view *view)
{
    if (!view->managed && !view->owner) {
        return;
    }
    PyObject *type, *value, *trace; /* a deleter may run Python code */
    PyErr_Fetch(&type, &value, &trace);
    if (view->managed && strcmp(view->kind, "dlpack") == 0) {
        dlpack_managed *m = view->managed;
        if (m->deleter) {
            m->deleter(m);
        }
    } else if (view->managed) {
        dlpack_versioned *v = view->managed;
        if (v->deleter) {
            v->deleter(v);
        }
    }
    Py_XDECREF(view->owner);
    view->managed = NULL;
    view->owner = NULL;
    PyErr_Restore(type, value, trace);
}
