/* array.c: anybody's array -> edge_view, and new NumPy arrays.
 *
 * Nothing is copied or converted: what does not fit is refused with the call that would make it
 * fit. Two doors, tried in this order: an exact numpy.ndarray through NumPy's C API, everything
 * else through DLPack (versioned capsules and those from before 1.0).
 */
#include "edge.h"

#include <string.h>

#define PY_ARRAY_UNIQUE_SYMBOL tsad_numpy_api
#include <numpy/arrayobject.h>

#include "dlpack.h"

static const struct {
    const char *name;
    int numpy; /* type number */
    char kind;
    uint8_t code, size; /* DLPack's code, bytes */
} dtypes[] = {
    [EDGE_FLOAT32] = {"float32", NPY_FLOAT32, 'f', DLPACK_FLOAT, 4},
    [EDGE_UINT8] = {"uint8", NPY_UINT8, 'u', DLPACK_UINT, 1},
    [EDGE_INT32] = {"int32", NPY_INT32, 'i', DLPACK_INT, 4},
    [EDGE_INT64] = {"int64", NPY_INT64, 'i', DLPACK_INT, 8},
    [EDGE_UINT32] = {"uint32", NPY_UINT32, 'u', DLPACK_UINT, 4},
    [EDGE_ANY] = {"any", -1, 0, 0, 0},
};

int edge_import_numpy(void)
{
    import_array1(-1);
    return 0;
}

PyObject *edge_new_array(edge_dtype dtype, int n_dims, const int64_t *shape, void **data)
{
    npy_intp dims[EDGE_MAX_DIMS];
    for (int i = 0; i < n_dims; i++) {
        dims[i] = (npy_intp)shape[i];
    }
    PyObject *array = PyArray_SimpleNew(n_dims, dims, dtypes[dtype].numpy);
    if (array) {
        *data = PyArray_DATA((PyArrayObject *)array);
    }
    return array;
}

/* ---- errors ------------------------------------------------------------------------------ */

/* Raise what the format says, with the exception that is set now as its cause. */
static int raise_from(PyObject *type, const char *format, ...)
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

/* Is the object's type defined in this package ("torch")? */
static bool is_of(PyObject *object, const char *package)
{
    PyObject *module = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__module__");
    const char *text =
        module && PyUnicode_Check(module) ? PyUnicode_AsUTF8AndSize(module, NULL) : NULL;
    size_t n = strlen(package);
    bool yes = text && strncmp(text, package, n) == 0 && (text[n] == 0 || text[n] == '.');
    if (!text) {
        PyErr_Clear();
    }
    Py_XDECREF(module);
    return yes;
}

static int refuse_type(PyObject *object, const char *name, edge_dtype dtype)
{
    PyObject *type = edge_type_name(object);
    const char *wanted = dtype == EDGE_ANY ? "float32" : dtypes[dtype].name;
    if (type) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a %s array (NumPy, or anything with __dlpack__), got %U; use "
                     "np.asarray(%s, dtype=np.%s)",
                     name, wanted, type, name, wanted);
        Py_DECREF(type);
    }
    return -1;
}

static int refuse_dtype(PyObject *object, const char *name, edge_dtype dtype, bool writable,
                        const char *got)
{
    const char *wanted = dtypes[dtype].name;
    if (writable) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected %s, got %s; allocate it with np.empty(shape, "
                     "np.%s)",
                     name, wanted, got, wanted);
    } else if (is_of(object, "torch")) {
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s; use %s.to(torch.%s)", name, wanted,
                     got, name, wanted);
    } else {
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s; use %s.astype(np.%s)", name, wanted,
                     got, name, wanted);
    }
    return -1;
}

static int refuse_strides(PyObject *object, const char *name, PyObject *strides, const char *unit,
                          bool writable)
{
    const char *before = "np.ascontiguousarray(", *after = ")";
    if (is_of(object, "torch")) {
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

static int refuse_read_only(const char *name)
{
    PyErr_Format(PyExc_ValueError,
                 "%s: expected a writable array, got a read-only one; allocate it with "
                 "np.empty(shape, np.float32)",
                 name);
    return -1;
}

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
    size_t n = view->bytes / sizeof(float);
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
    if (!a || !b || !view->bytes || !other->bytes || a + view->bytes <= b ||
        b + other->bytes <= a) {
        return 0;
    }
    PyErr_Format(
        PyExc_ValueError,
        "%s: expected memory of its own, got an array that overlaps `%s`; allocate it with "
        "np.empty(shape, np.float32)",
        name, other_name);
    return -1;
}

static int refuse_rank(const char *name, int n_dims)
{
    PyErr_Format(PyExc_ValueError, "%s: expected at most %d dimensions, got %d; reshape it", name,
                 EDGE_MAX_DIMS, n_dims);
    return -1;
}

static int refuse_alignment(const char *name)
{
    PyErr_Format(PyExc_ValueError,
                 "%s: expected aligned memory, got an address in the middle of a number; use "
                 "%s.copy()",
                 name, name);
    return -1;
}

/* ---- NumPy ------------------------------------------------------------------------------- */

static int refuse_numpy_dtype(PyArrayObject *array, const char *name, edge_dtype dtype,
                              bool writable)
{
    PyObject *text = PyObject_Str((PyObject *)PyArray_DESCR(array));
    const char *got = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
    if (got) {
        refuse_dtype((PyObject *)array, name, dtype, writable, got);
    }
    Py_XDECREF(text);
    return -1;
}

static int refuse_numpy_strides(PyArrayObject *array, const char *name, bool writable)
{
    PyObject *strides = PyObject_GetAttrString((PyObject *)array, "strides");
    if (strides) {
        refuse_strides((PyObject *)array, name, strides, "bytes", writable);
        Py_DECREF(strides);
    }
    return -1;
}

static int borrow_numpy(PyObject *object, const char *name, edge_dtype dtype, bool writable,
                        edge_view *view)
{
    PyArrayObject *array = (PyArrayObject *)object;
    if (dtype == EDGE_ANY) {
        PyObject *text = PyObject_Str((PyObject *)PyArray_DESCR(array));
        const char *got = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
        if (!got) {
            Py_XDECREF(text);
            return -1;
        }
        PyOS_snprintf(view->dtype, sizeof view->dtype, "%s", got);
        Py_DECREF(text);
    } else if (PyArray_DESCR(array)->kind != dtypes[dtype].kind ||
               PyArray_ITEMSIZE(array) != dtypes[dtype].size || !PyArray_ISNOTSWAPPED(array)) {
        return refuse_numpy_dtype(array, name, dtype, writable);
    }
    if (!PyArray_IS_C_CONTIGUOUS(array)) {
        return refuse_numpy_strides(array, name, writable);
    }
    if (!PyArray_ISALIGNED(array)) {
        return refuse_alignment(name);
    }
    view->read_only = !PyArray_ISWRITEABLE(array);
    if (writable && view->read_only) {
        return refuse_read_only(name);
    }
    if (PyArray_NDIM(array) > EDGE_MAX_DIMS) {
        return refuse_rank(name, PyArray_NDIM(array));
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

/* ---- DLPack ------------------------------------------------------------------------------ */

/* An exception of the producer's own code, told as ours; out of memory and the like stay. */
static int refuse_producer(PyObject *object, const char *name, const char *method)
{
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) {
        return -1;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *grad = PyObject_GetAttrString(object, "requires_grad");
    bool requires_grad = grad && PyObject_IsTrue(grad) == 1;
    Py_XDECREF(grad);
    PyErr_Clear();
    PyObject *text = value ? PyObject_Repr(value) : NULL;
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
    if (requires_grad) {
        raise_from(PyExc_ValueError,
                   "%s: expected plain numbers, got a tensor that requires grad; use %s.detach()",
                   name, name);
    } else if (text) {
        raise_from(PyExc_TypeError,
                   "%s: expected an array that can be borrowed, but its %s failed: %U; pass "
                   "np.asarray(%s)",
                   name, method, text, name);
    }
    Py_XDECREF(text);
    return -1;
}

static int check_device(PyObject *object, const char *name)
{
    PyObject *pair = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (!pair) {
        return refuse_producer(object, name, "__dlpack_device__");
    }
    long type = -1, id = 0;
    PyObject *first =
        PyTuple_Check(pair) && PyTuple_Size(pair) == 2 ? PyTuple_GetItem(pair, 0) : NULL;
    if (first) {
        type = PyLong_AsLong(first); /* an IntEnum in some producers */
        id = PyLong_AsLong(PyTuple_GetItem(pair, 1));
    }
    Py_DECREF(pair);
    if (PyErr_Occurred() || !first) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError,
                     "%s: expected __dlpack_device__ to return (device type, id); pass "
                     "np.asarray(%s)",
                     name, name);
        return -1;
    }
    if (type == DLPACK_CPU || type == DLPACK_CUDA_HOST || type == DLPACK_ROCM_HOST) {
        return 0;
    }
    const char *device = type == DLPACK_CUDA    ? "cuda"
                         : type == DLPACK_ROCM  ? "rocm"
                         : type == DLPACK_METAL ? "metal"
                                                : "DLPack device type";
    char text[64];
    if (type == DLPACK_CUDA || type == DLPACK_ROCM || type == DLPACK_METAL) {
        PyOS_snprintf(text, sizeof text, "%s:%ld", device, id);
    } else {
        PyOS_snprintf(text, sizeof text, "%s %ld", device, type);
    }
    PyErr_Format(PyExc_TypeError,
                 "%s: expected memory of the CPU, where this policy runs, got %s; use %s.cpu()",
                 name, text, name);
    return -1;
}

/* The capsule, by the newest protocol that the producer knows. */
static PyObject *take_capsule(edge_state *state, PyObject *object, const char *name)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    PyObject *capsule = method ? PyObject_Call(method, state->empty, state->max_version) : NULL;
    if (!capsule && method && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear(); /* from before max_version */
        capsule = PyObject_CallNoArgs(method);
    }
    Py_XDECREF(method);
    if (!capsule) {
        refuse_producer(object, name, "__dlpack__");
    }
    return capsule;
}

/* Make the capsule's content ours: the view gives it back. */
static const dlpack_tensor *consume(PyObject *capsule, const char *name, edge_view *view)
{
    if (PyCapsule_IsValid(capsule, DLPACK_CAPSULE_VERSIONED)) {
        dlpack_versioned *v = PyCapsule_GetPointer(capsule, DLPACK_CAPSULE_VERSIONED);
        if (PyCapsule_SetName(capsule, DLPACK_CAPSULE_VERSIONED_USED) < 0) {
            return NULL;
        }
        view->managed = v;
        view->kind = "dlpack_versioned";
        if (v->major != DLPACK_MAJOR) {
            PyErr_Format(PyExc_TypeError,
                         "%s: expected DLPack version %d, got %u.%u; pass np.asarray(%s)", name,
                         DLPACK_MAJOR, (unsigned)v->major, (unsigned)v->minor, name);
            return NULL;
        }
        view->read_only = v->flags & DLPACK_READ_ONLY;
        return &v->tensor;
    }
    if (PyCapsule_IsValid(capsule, DLPACK_CAPSULE)) {
        dlpack_managed *m = PyCapsule_GetPointer(capsule, DLPACK_CAPSULE);
        if (PyCapsule_SetName(capsule, DLPACK_CAPSULE_USED) < 0) {
            return NULL;
        }
        view->managed = m;
        view->kind = "dlpack";
        return &m->tensor;
    }
    PyErr_Format(PyExc_TypeError,
                 "%s: expected __dlpack__ to return an unused DLPack capsule, got %R; pass "
                 "np.asarray(%s)",
                 name, capsule, name);
    return NULL;
}

static int check_strides(PyObject *object, const char *name, const dlpack_tensor *t, bool writable)
{
    int64_t expected = 1;
    bool contiguous = true, empty = false;
    for (int i = t->n_dims - 1; t->strides && i >= 0; i--) {
        contiguous &= t->shape[i] == 1 || t->strides[i] == expected;
        empty |= t->shape[i] == 0;
        expected *= t->shape[i];
    }
    if (contiguous || empty) {
        return 0;
    }
    PyObject *strides = PyTuple_New(t->n_dims);
    for (int i = 0; strides && i < t->n_dims; i++) {
        PyObject *stride = PyLong_FromLongLong(t->strides[i]);
        if (!stride || PyTuple_SetItem(strides, i, stride) < 0) {
            Py_CLEAR(strides);
        }
    }
    if (strides) {
        refuse_strides(object, name, strides, "elements", writable);
        Py_DECREF(strides);
    }
    return -1;
}

static void write_dtype(char *text, size_t size, const dlpack_tensor *t)
{
    static const char *const names[] = {"int",    "uint",    "float", "opaque",
                                        "bfloat", "complex", "bool"};
    unsigned code = t->dtype.code, bits = t->dtype.bits, lanes = t->dtype.lanes;
    if (code == DLPACK_BOOL) {
        PyOS_snprintf(text, size, "bool");
    } else if (code < sizeof names / sizeof names[0] && lanes == 1) {
        PyOS_snprintf(text, size, "%s%u", names[code], bits);
    } else {
        PyOS_snprintf(text, size, "DLPack (%u, %u, %u)", code, bits, lanes);
    }
}

static int fill_view(PyObject *object, const char *name, edge_dtype dtype, bool writable,
                     const dlpack_tensor *t, edge_view *view)
{
    size_t size = t->dtype.bits / 8u;
    write_dtype(view->dtype, sizeof view->dtype, t);
    if (dtype != EDGE_ANY && (t->dtype.code != dtypes[dtype].code || size != dtypes[dtype].size ||
                              t->dtype.lanes != 1)) {
        return refuse_dtype(object, name, dtype, writable, view->dtype);
    }
    if (t->n_dims < 0 || t->n_dims > EDGE_MAX_DIMS) {
        return refuse_rank(name, t->n_dims);
    }
    if (check_strides(object, name, t, writable) < 0) {
        return -1;
    }
    view->data = t->data ? (char *)t->data + t->byte_offset : NULL;
    if (size && (uintptr_t)view->data % size) {
        return refuse_alignment(name);
    }
    /* JAX's arrays are constants, but its capsules from before 1.0 can't say so */
    if (writable && (view->read_only || is_of(object, "jax") || is_of(object, "jaxlib"))) {
        return refuse_read_only(name);
    }
    view->n_dims = t->n_dims;
    view->bytes = size;
    for (int i = 0; i < t->n_dims; i++) {
        view->shape[i] = t->shape[i];
        view->bytes *= (size_t)t->shape[i];
    }
    view->owner = Py_NewRef(object);
    return 0;
}

static int borrow_dlpack(edge_state *state, PyObject *object, const char *name, edge_dtype dtype,
                         bool writable, edge_view *view)
{
    if (check_device(object, name) < 0) {
        return -1;
    }
    PyObject *capsule = take_capsule(state, object, name);
    if (!capsule) {
        return -1;
    }
    const dlpack_tensor *tensor = consume(capsule, name, view);
    Py_DECREF(capsule); /* renamed: its destructor leaves the content alone */
    return tensor ? fill_view(object, name, dtype, writable, tensor, view) : -1;
}

/* ---- borrow and return -------------------------------------------------------------------- */

int edge_borrow(edge_state *state, PyObject *object, const char *name, edge_dtype dtype,
                bool writable, edge_view *view)
{
    memset(view, 0, sizeof *view);
    int status;
    if (PyArray_CheckExact(object)) {
        status = borrow_numpy(object, name, dtype, writable, view);
    } else if (!PyObject_HasAttrString(object, "__dlpack__") ||
               !PyObject_HasAttrString(object, "__dlpack_device__") || PyType_Check(object)) {
        status = refuse_type(object, name, dtype);
    } else {
        status = borrow_dlpack(state, object, name, dtype, writable, view);
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
