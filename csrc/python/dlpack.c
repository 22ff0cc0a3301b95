/* dlpack.c: borrow from any library through __dlpack__: versioned capsules and those from before
 * 1.0. What the protocol cannot say about torch's tensors is asked of them.
 */
#include "dlpack.h"

#include <string.h>

#include "array.h"

_Static_assert((int)DLPACK_MAX_DIMS == (int)EDGE_MAX_DIMS, "views hold what fits");

/* ---- errors ------------------------------------------------------------------------------ */

/* What can't be borrowed of torch, by the attribute that says so. */
static const struct {
    const char *attribute, *what, *method;
} unborrowable[] = {
    {"requires_grad", "a tensor that requires grad", "detach"},
    {"is_sparse", "a sparse tensor", "to_dense"},
    {"is_sparse_csr", "a sparse tensor", "to_dense"},
    {"is_mkldnn", "a tensor in the layout of oneDNN", "to_dense"},
    {"is_quantized", "a quantized tensor", "dequantize"},
};

static bool is_true(PyObject *object, const char *attribute)
{
    PyObject *value = PyObject_GetAttrString(object, attribute);
    bool yes = value == Py_True;
    Py_XDECREF(value);
    PyErr_Clear();
    return yes;
}

static const char *advice(PyObject *object)
{
    return edge_is_of(object, "torch") ? "a plain tensor on the CPU" : "a NumPy array of it";
}

/* An exception of the producer's own code, told as ours; out of memory and the like stay. */
static int refuse_producer(PyObject *object, const char *name, const char *method)
{
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) {
        return -1;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    size_t i = 0, n = sizeof unborrowable / sizeof unborrowable[0];
    while (i < n && !is_true(object, unborrowable[i].attribute)) {
        i++;
    }
    PyObject *text = value ? PyObject_Repr(value) : NULL;
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
    if (i < n) {
        edge_raise_from(PyExc_ValueError, "%s: expected plain numbers, got %s; use %s.%s()", name,
                        unborrowable[i].what, name, unborrowable[i].method);
    } else if (text) {
        edge_raise_from(PyExc_TypeError,
                        "%s: expected an array that can be borrowed, but its %s failed: %U; pass "
                        "%s",
                        name, method, text, advice(object));
    }
    Py_XDECREF(text);
    return -1;
}

static int refuse_device(const char *name, long type, long id, const edge_device *here)
{
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
                 "%s: expected memory of the CPU%s where this policy runs, got %s; "
                 "use %s.cpu()",
                 name, here ? ", or of cuda:0," : ",", text, name);
    return -1;
}

static int refuse_content(PyObject *object, const char *name, const char *got)
{
    PyErr_Format(PyExc_ValueError, "%s: expected an array of numbers in memory, got %s; pass %s",
                 name, got, advice(object));
    return -1;
}

static int refuse_elements(PyObject *object, const char *name, const dlpack_tensor *t,
                           bool writable)
{
    PyObject *strides = PyTuple_New(t->n_dims);
    for (int i = 0; strides && i < t->n_dims; i++) {
        PyObject *stride = PyLong_FromLongLong(t->strides[i]);
        if (!stride || PyTuple_SetItem(strides, i, stride) < 0) {
            Py_CLEAR(strides);
        }
    }
    if (strides) {
        edge_refuse_strides(object, name, strides, "elements", writable);
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

static int refuse_fault(PyObject *object, const char *name, edge_dtype dtype, bool writable,
                        const dlpack_tensor *t, const edge_device *device, const edge_view *view,
                        dlpack_fault fault)
{
    switch (fault) {
    case DLPACK_OTHER_DEVICE:
        return refuse_device(name, t->device_type, t->device_id, device);
    case DLPACK_OTHER_DTYPE:
        return edge_refuse_dtype(object, name, dtype, writable, view->dtype);
    case DLPACK_BAD_RANK:
        return edge_refuse_rank(name, t->n_dims);
    case DLPACK_STRIDED:
        return refuse_elements(object, name, t, writable);
    case DLPACK_MISALIGNED:
        return edge_refuse_alignment(object, name);
    case DLPACK_NO_SHAPE:
        return refuse_content(object, name, "a capsule without a shape (a null pointer)");
    case DLPACK_NEGATIVE_SIZE:
        return refuse_content(object, name, "a negative size");
    case DLPACK_TOO_LARGE:
        return refuse_content(object, name, "more bytes than memory has");
    default:
        return refuse_content(object, name,
                              "none (a null pointer, as of a fake, functional or zero tensor)");
    }
}

/* ---- torch: what DLPack cannot say --------------------------------------------------------- */

/* A negative or conjugate view is the memory of another tensor with a bit that says how to read
 * it. The numbers themselves, a new reference. */
static PyObject *resolve_views(PyObject *tensor, const char *name, bool writable)
{
    static const char *const questions[] = {"is_conj", "is_neg"};
    static const char *const answers[] = {"resolve_conj", "resolve_neg"};
    PyObject *result = Py_NewRef(tensor);
    for (int i = 0; result && i < 2; i++) {
        PyObject *lazy = PyObject_CallMethod(result, questions[i], NULL);
        int yes = lazy ? PyObject_IsTrue(lazy) : -1;
        Py_XDECREF(lazy);
        if (yes < 0) {
            refuse_producer(tensor, name, questions[i]);
            Py_CLEAR(result);
        } else if (yes && writable) {
            PyErr_Format(PyExc_ValueError,
                         "%s: expected plain memory, got a lazy view of another tensor (%s() is "
                         "True); allocate it with torch.empty(shape)",
                         name, questions[i]);
            Py_CLEAR(result);
        } else if (yes) {
            PyObject *lazily = result;
            result = PyObject_CallMethod(lazily, answers[i], NULL);
            Py_DECREF(lazily);
            if (!result) {
                refuse_producer(tensor, name, answers[i]);
            }
        }
    }
    return result;
}

/* A number that a method of the storage returns. */
static size_t ask_storage(PyObject *storage, const char *method)
{
    PyObject *number = PyObject_CallMethod(storage, method, NULL);
    size_t value = number ? PyLong_AsSize_t(number) : (size_t)-1;
    Py_XDECREF(number);
    return value;
}

/* Do the numbers lie in the tensor's storage? Those of a wrapper (fake, functional) do not exist,
 * those of a resized storage may have gone. */
static int check_storage(PyObject *tensor, const char *name, const edge_view *view)
{
    PyObject *storage = PyObject_CallMethod(tensor, "untyped_storage", NULL);
    if (!storage) {
        return refuse_producer(tensor, name, "untyped_storage");
    }
    size_t begin = ask_storage(storage, "data_ptr");
    size_t bytes = PyErr_Occurred() ? 0 : ask_storage(storage, "nbytes");
    Py_DECREF(storage);
    if (PyErr_Occurred()) {
        return refuse_producer(tensor, name, "untyped_storage");
    }
    size_t at = (size_t)view->data - begin; /* wraps if before it */
    if (view->bytes && (at > bytes || view->bytes > bytes - at)) {
        return refuse_content(tensor, name, "a tensor that reaches beyond its storage");
    }
    return 0;
}

/* ---- the protocol -------------------------------------------------------------------------- */

static int check_device(PyObject *object, const char *name, const edge_device *device,
                        edge_view *view)
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
                     "%s: expected __dlpack_device__ to return (device type, id); pass %s", name,
                     advice(object));
        return -1;
    }
    if (dlpack_is_host(type)) {
        return 0;
    }
    if (!device || type != device->type || id != 0) {
        return refuse_device(name, type, id, device);
    }
    view->on_device = true;
    return device->find_stream(object, id, view);
}

/* The capsule, by the newest protocol that the producer knows. */
static PyObject *take_capsule(edge_state *state, PyObject *object, const char *name,
                              const edge_view *view)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    PyObject *old = PyDict_New(), *new = old ? PyDict_Copy(state->max_version) : NULL;
    PyObject *stream = view->on_device ? PyLong_FromSize_t(view->stream) : NULL, *capsule = NULL;
    bool fails = !method || !new || (view->on_device && !stream);
    if (!fails && stream) { /* what is done by then is done before what is asked of this stream */
        fails = PyDict_SetItemString(old, "stream", stream) < 0 ||
                PyDict_SetItemString(new, "stream", stream) < 0;
    }
    if (!fails) {
        capsule = PyObject_Call(method, state->empty, new);
    }
    if (!fails && !capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear(); /* from before max_version */
        capsule = PyObject_Call(method, state->empty, old);
    }
    Py_XDECREF(method);
    Py_XDECREF(old);
    Py_XDECREF(new);
    Py_XDECREF(stream);
    if (!capsule) {
        refuse_producer(object, name, "__dlpack__");
    }
    return capsule;
}

/* Make the capsule's content ours: the view gives it back. */
static const dlpack_tensor *consume(PyObject *object, PyObject *capsule, const char *name,
                                    edge_view *view)
{
    if (PyCapsule_IsValid(capsule, DLPACK_CAPSULE_VERSIONED)) {
        dlpack_versioned *v = PyCapsule_GetPointer(capsule, DLPACK_CAPSULE_VERSIONED);
        if (PyCapsule_SetName(capsule, DLPACK_CAPSULE_VERSIONED_USED) < 0) {
            return NULL;
        }
        view->managed = v;
        view->kind = "dlpack_versioned";
        if (v->major != DLPACK_MAJOR) {
            PyErr_Format(PyExc_TypeError, "%s: expected DLPack version %d, got %u.%u; pass %s",
                         name, DLPACK_MAJOR, (unsigned)v->major, (unsigned)v->minor,
                         advice(object));
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
                 "%s: expected __dlpack__ to return an unused DLPack capsule, got %R; pass %s",
                 name, capsule, advice(object));
    return NULL;
}

static int fill_view(PyObject *object, const char *name, edge_dtype dtype, bool writable,
                     const dlpack_tensor *t, const edge_device *device, edge_view *view)
{
    dlpack_array array = {0};
    write_dtype(view->dtype, sizeof view->dtype, t);
    int code = edge_dtypes[dtype].code;
    unsigned size = edge_dtypes[dtype].size;
    dlpack_fault fault = view->on_device ? dlpack_check_on(t, device->type, code, size, &array)
                                         : dlpack_check(t, code, size, &array);
    if (fault != DLPACK_FITS) {
        return refuse_fault(object, name, dtype, writable, t, device, view, fault);
    }
    /* JAX's arrays are constants, but its capsules from before 1.0 can't say so */
    if (writable &&
        (view->read_only || edge_is_of(object, "jax") || edge_is_of(object, "jaxlib"))) {
        return edge_refuse_read_only(name);
    }
    view->data = array.data;
    view->bytes = array.bytes;
    view->n_dims = array.n_dims;
    memcpy(view->shape, array.shape, sizeof array.shape);
    return 0;
}

static int borrow(edge_state *state, PyObject *object, const char *name, edge_dtype dtype,
                  bool writable, const edge_device *device, edge_view *view)
{
    if (check_device(object, name, device, view) < 0) {
        return -1;
    }
    PyObject *capsule = take_capsule(state, object, name, view);
    if (!capsule) {
        return -1;
    }
    const dlpack_tensor *tensor = consume(object, capsule, name, view);
    Py_DECREF(capsule); /* renamed: its destructor leaves the content alone */
    return tensor ? fill_view(object, name, dtype, writable, tensor, device, view) : -1;
}

int edge_borrow_dlpack(edge_state *state, PyObject *object, const char *name, edge_dtype dtype,
                       bool writable, const edge_device *device, edge_view *view)
{
    bool torch = edge_is_of(object, "torch");
    view->owner = torch ? resolve_views(object, name, writable) : Py_NewRef(object);
    if (!view->owner || borrow(state, view->owner, name, dtype, writable, device, view) < 0) {
        return -1;
    }
    return torch ? check_storage(view->owner, name, view) : 0;
}
