/* vision_type.c: _core.Vision, an image encoder. Immutable but for its memory: one thread at a time
 * encodes with it.
 */
#include "array.h"

#include <string.h>

typedef struct edge_vision {
    PyObject_HEAD edge_state *state;
    tsad_vision *vision; /* NULL until initialised */
    tsad_vision_info info;
} edge_vision;

static const char *const keywords[] = {"tensors", "depth",    "norm",     "keypoints", "height",
                                       "width",   "channels", "scale",    "offset",    "relu",
                                       "threads", "backend",  "precision"};

/* ---- specification ------------------------------------------------------------------------- */

/* A number per channel: an array, or None, which is `fallback` for each. */
static int read_affine(edge_state *state, PyObject *kw, const char *name, int channels,
                       float fallback, edge_view *view, float *own, const float **out)
{
    PyObject *value = edge_look_up(kw, name);
    int64_t shape = channels;
    for (int c = 0; c < TSAD_MAX_CHANNELS; c++) {
        own[c] = fallback;
    }
    *out = own;
    if (!value) {
        return 0;
    }
    if (edge_borrow(state, value, name, EDGE_FLOAT32, false, view) < 0) {
        return -1;
    }
    *out = view->data;
    return edge_has_shape(view, 1, &shape)
               ? 0
               : edge_raise_shape(name, view, 1, &shape, "one number per channel");
}

static int read_choices(PyObject *kw, tsad_vision_spec *spec)
{
    const char *norm, *precision;
    if (edge_take_string(kw, "norm", "folded", &norm) < 0 ||
        edge_take_string(kw, "precision", "float32", &precision) < 0 ||
        edge_take_string(kw, "backend", NULL, &spec->backend) < 0) {
        return -1;
    }
    spec->group_norm = strcmp(norm, "group") == 0;
    if (!spec->group_norm && strcmp(norm, "folded") != 0) {
        PyErr_Format(PyExc_ValueError,
                     "norm: expected 'folded' (BatchNorm, folded into the weights) or 'group', got "
                     "'%s'",
                     norm);
        return -1;
    }
    spec->bits = strcmp(precision, "int16") == 0 ? 16 : strcmp(precision, "int8") == 0 ? 8 : 32;
    if (spec->bits == 32 && strcmp(precision, "float32") != 0) {
        PyErr_Format(PyExc_ValueError, "precision: expected 'float32', 'int16' or 'int8', got '%s'",
                     precision);
        return -1;
    }
    return 0;
}

static int read_spec(PyObject *kw, tsad_vision_spec *spec)
{
    const char *who = "Vision";
    return edge_check_keywords(kw, keywords, sizeof keywords / sizeof keywords[0], who) < 0 ||
                   edge_take_int(who, kw, "depth", 18, &spec->depth) < 0 ||
                   edge_take_int(who, kw, "keypoints", -1, &spec->n_keypoints) < 0 ||
                   edge_take_int(who, kw, "height", -1, &spec->height) < 0 ||
                   edge_take_int(who, kw, "width", -1, &spec->width) < 0 ||
                   edge_take_int(who, kw, "channels", 3, &spec->channels) < 0 ||
                   edge_take_int(who, kw, "relu", 0, &spec->relu) < 0 ||
                   edge_take_int(who, kw, "threads", 1, &spec->n_threads) < 0 ||
                   read_choices(kw, spec) < 0
               ? -1
               : 0;
}

/* The encoder, NULL with an exception. */
static tsad_vision *make(edge_state *state, PyObject *kw)
{
    tsad_vision_spec spec = {0};
    edge_view view[2] = {0};
    edge_tensors tensors = {0};
    float scale[TSAD_MAX_CHANNELS], offset[TSAD_MAX_CHANNELS];
    tsad_vision *vision = NULL;
    if (read_spec(kw, &spec) == 0 &&
        read_affine(state, kw, "scale", spec.channels, 1, &view[0], scale, &spec.scale) == 0 &&
        read_affine(state, kw, "offset", spec.channels, 0, &view[1], offset, &spec.offset) == 0 &&
        edge_borrow_tensors(state, edge_look_up(kw, "tensors"), "tensors", &tensors) == 0) {
        spec.tensors = tensors.list;
        spec.n_tensors = (int)tensors.n;
        PyThreadState *thread = PyEval_SaveThread();
        tsad_status status = tsad_vision_create(&spec, &vision);
        PyEval_RestoreThread(thread);
        if (status != TSAD_OK) {
            edge_raise(status);
        }
    }
    edge_return_tensors(&tensors);
    edge_return(&view[0]);
    edge_return(&view[1]);
    return vision;
}

static int vision_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    edge_vision *self = (edge_vision *)object;
    if (self->vision) {
        PyErr_SetString(PyExc_RuntimeError, "Vision: already initialised, and immutable; make "
                                            "another one");
        return -1;
    }
    Py_ssize_t given = PyTuple_Size(args);
    PyObject *kw = kwargs ? PyDict_Copy(kwargs) : PyDict_New();
    if (!kw) {
        return -1;
    }
    tsad_vision *vision = NULL;
    self->state = edge_state_of_type(Py_TYPE(object));
    if (given > 1 || (given == 1 && PyDict_GetItemString(kw, "tensors"))) {
        PyErr_SetString(PyExc_TypeError, "Vision: expected tensors, then keyword arguments; name "
                                         "the others, each once");
    } else if (self->state &&
               (!given || PyDict_SetItemString(kw, "tensors", PyTuple_GetItem(args, 0)) == 0)) {
        vision = make(self->state, kw);
    }
    Py_DECREF(kw);
    if (vision && self->vision) { /* another thread was faster */
        tsad_vision_destroy(vision);
    } else if (vision) {
        self->info = tsad_vision_get_info(vision);
        self->vision = vision;
    }
    return vision ? 0 : -1;
}

static void vision_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    tsad_vision_destroy(((edge_vision *)object)->vision);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

/* ---- images -------------------------------------------------------------------------------- */

/* Says what is wrong with the shape; always returns -1. */
static int refuse_images(const tsad_vision_info *info, const edge_view *view, bool bytes,
                         bool torch)
{
    int64_t last[4] = {-1, info->height, info->width, info->channels};
    int64_t first[4] = {-1, info->channels, info->height, info->width};
    const int64_t *wanted = bytes ? last : first, *other = bytes ? first : last;
    const char *advice = "resize and crop them to the size that the encoder was made for";
    if (view->n_dims == 3) {
        advice = "give it the axis of images: images[None]";
    } else if (edge_has_shape(view, 4, other)) {
        static const char *const turns[2][2] = {
            {"float32 images have their channels first, as torch's: use "
             "np.ascontiguousarray(images.transpose(0, 3, 1, 2))",
             "float32 images have their channels first, as torch's: use images.permute(0, 3, 1, "
             "2).contiguous()"},
            {"uint8 images have their channels last, as a camera's: use "
             "np.ascontiguousarray(images.transpose(0, 2, 3, 1))",
             "uint8 images have their channels last, as a camera's: use images.permute(0, 2, 3, "
             "1).contiguous()"}};
        advice = turns[bytes][torch];
    }
    return edge_raise_shape("images", view, 4, wanted, advice);
}

/* Pixels are 0 to 1, give or take what a resizing rounds. */
static int expect_pixels(const edge_view *view)
{
    const float least = -1.0f / 255, most = 1 + 1.0f / 255, *x = view->data;
    size_t n = view->bytes / sizeof *x, at = 0;
    int beyond = 0;
    for (size_t i = 0; i < n; i++) { /* to the end, as a vector; NaN was refused before */
        beyond |= (x[i] < least) | (x[i] > most);
    }
    if (!beyond) {
        return 0;
    }
    while (x[at] >= least && x[at] <= most) {
        at++;
    }
    size_t row = (size_t)view->shape[3], plane = row * (size_t)view->shape[2];
    size_t image = plane * (size_t)view->shape[1];
    PyObject *got = PyFloat_FromDouble((double)x[at]);
    PyErr_Format(PyExc_ValueError,
                 "images: expected numbers from 0 to 1, got %R at images[%zu, %zu, %zu, %zu]; "
                 "divide by 255, or pass uint8 (n, height, width, channels)",
                 got, at / image, at % image / plane, at % plane / row, at % row);
    Py_XDECREF(got);
    return -1;
}

static int borrow_images(edge_vision *self, PyObject *object, edge_view *view, tsad_images *images)
{
    if (edge_borrow(self->state, object, "images", EDGE_ANY, false, view) < 0) {
        return -1;
    }
    bool bytes = strcmp(view->dtype, "uint8") == 0, torch = edge_is_of(object, "torch");
    if (!bytes && strcmp(view->dtype, "float32") != 0) {
        PyErr_Format(PyExc_TypeError,
                     "images: expected uint8 (n, height, width, channels) or float32 (n, channels, "
                     "height, width), got %s; use images.%s, from 0 to 1",
                     view->dtype, torch ? "to(torch.float32)" : "astype(np.float32)");
        return -1;
    }
    int64_t last[4] = {-1, self->info.height, self->info.width, self->info.channels};
    int64_t first[4] = {-1, self->info.channels, self->info.height, self->info.width};
    if (!edge_has_shape(view, 4, bytes ? last : first)) {
        return refuse_images(&self->info, view, bytes, torch);
    }
    if (view->shape[0] > 1 << 20) {
        return edge_raise_shape("images", view, 4, bytes ? last : first, "n is 0 to 1048576");
    }
    images->n = view->shape[0];
    images->bytes = bytes ? view->data : NULL;
    images->planes = bytes ? NULL : view->data;
    return bytes || (edge_expect_finite("images", view) == 0 && expect_pixels(view) == 0) ? 0 : -1;
}

/* Where the features go; a new reference to what is returned. */
static PyObject *place_features(edge_vision *self, PyObject *out, int64_t n,
                                const edge_view *images, edge_view *view, float **data)
{
    int64_t shape[2] = {n, self->info.n_features};
    if (out == Py_None) {
        void *memory;
        PyObject *array = edge_new_array(EDGE_FLOAT32, 2, shape, &memory);
        *data = array ? memory : NULL;
        return array;
    }
    if (edge_borrow(self->state, out, "out", EDGE_FLOAT32, true, view) < 0) {
        return NULL;
    }
    *data = view->data;
    if (!edge_has_shape(view, 2, shape)) {
        edge_raise_shape("out", view, 2, shape, "allocate it with np.empty(shape, np.float32)");
        return NULL;
    }
    return edge_expect_apart("out", view, "images", images) < 0 ? NULL : Py_NewRef(out);
}

static int enter(edge_vision *self)
{
    if (!self->vision) {
        PyErr_SetString(PyExc_RuntimeError, "Vision: not initialised; call __init__");
        return -1;
    }
    tsad_status status = tsad_vision_acquire(self->vision);
    return status == TSAD_OK ? 0 : (edge_raise(status), -1);
}

static int run(edge_vision *self, const tsad_images *images, float *features)
{
    edge_listener l = {0};
    tsad_interrupt interrupt = {edge_hear, &l};
    l.thread = PyEval_SaveThread();
    EDGE_MARK(begin);
    tsad_status status = tsad_vision_encode(self->vision, images, features, &interrupt);
    EDGE_MARK(end);
    PyEval_RestoreThread(l.thread);
    return edge_raise_or_explain(status);
}

PyDoc_STRVAR(
    encode_doc,
    "encode($self, /, images, out=None)\n--\n\n"
    "Features of images, float32 (n, features).\n\n"
    "images: uint8 (n, height, width, channels), or float32 (n, channels, height, width) from 0\n"
    "to 1; NumPy, torch, JAX, or anything with __dlpack__ in host memory. The result is of the\n"
    "same library, unless `out` is given: where to write it, and it is returned.\n\n"
    "ValueError, TypeError: an argument does not fit; nothing has changed. RuntimeError: another\n"
    "thread is encoding with it, or a number overflowed.");

static PyObject *encode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"images", "out", NULL};
    edge_vision *self = (edge_vision *)object;
    PyObject *given, *out = Py_None, *result = NULL, *library = NULL;
    edge_view view[2] = {0};
    tsad_images images = {0};
    float *data;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:encode", names, &given, &out) ||
        enter(self) < 0) {
        return NULL;
    }
    if (borrow_images(self, given, &view[0], &images) == 0) {
        library = out == Py_None ? edge_library_of(given) : NULL;
        result = place_features(self, out, images.n, &view[0], &view[1], &data);
    }
    if (result && run(self, &images, data) < 0) {
        Py_CLEAR(result);
    }
    tsad_vision_release(self->vision);
    edge_return(&view[0]);
    edge_return(&view[1]);
    if (result && library) {
        PyObject *theirs = PyObject_CallFunctionObjArgs(library, result, NULL);
        Py_DECREF(result);
        result = theirs;
    }
    Py_XDECREF(library);
    return result;
}

/* ---- the type ------------------------------------------------------------------------------ */

enum fact { FEATURES, KEYPOINTS, HEIGHT, WIDTH, CHANNELS, THREADS, BACKEND, WEIGHT_BYTES, BYTES };

static PyObject *get_fact(PyObject *object, void *closure)
{
    const edge_vision *self = (const edge_vision *)object;
    if (!self->vision) {
        PyErr_SetString(PyExc_RuntimeError, "Vision: not initialised; call __init__");
        return NULL;
    }
    const tsad_vision_info *info = &self->info;
    switch ((enum fact)(intptr_t)closure) {
    case FEATURES:
        return PyLong_FromLong(info->n_features);
    case KEYPOINTS:
        return PyLong_FromLong(info->n_keypoints);
    case HEIGHT:
        return PyLong_FromLong(info->height);
    case WIDTH:
        return PyLong_FromLong(info->width);
    case CHANNELS:
        return PyLong_FromLong(info->channels);
    case THREADS:
        return PyLong_FromLong(info->n_threads);
    case BACKEND:
        return PyUnicode_FromString(info->backend);
    case WEIGHT_BYTES:
        return PyLong_FromSize_t(info->weight_bytes);
    case BYTES:
        return PyLong_FromSize_t(info->bytes);
    }
    Py_UNREACHABLE();
}

#define FACT(name, id, doc) {name, get_fact, NULL, doc, (void *)(intptr_t)(id)}
static PyGetSetDef facts[] = {
    FACT("features", FEATURES, "numbers of an image's features"),
    FACT("keypoints", KEYPOINTS, "keypoints of the spatial softmax"),
    FACT("height", HEIGHT, "rows of an image"),
    FACT("width", WIDTH, "columns of an image"),
    FACT("channels", CHANNELS, "numbers of a pixel"),
    FACT("threads", THREADS, "threads that an encoding may use"),
    FACT("backend", BACKEND, "what runs it, e.g. 'avx2'"),
    FACT("weight_bytes", WEIGHT_BYTES, "memory of the packed weights"),
    FACT("_bytes", BYTES, "all other memory"),
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef methods[] = {
    {"encode", (PyCFunction)(void (*)(void))encode, METH_VARARGS | METH_KEYWORDS, encode_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(
    vision_doc,
    "Vision(tensors, *, depth=18, norm='folded', keypoints, height, width, channels=3,\n"
    "       scale=None, offset=None, relu=False, threads=1, backend=None,\n"
    "       precision='float32')\n--\n\n"
    "An image encoder: a ResNet trunk, spatial softmax, a linear layer. Arrays are read by the\n"
    "constructor alone. Names of tensors are torchvision's, without fc: conv1.weight,\n"
    "layer1.0.conv1.weight ...; pool.weight (keypoints, 512, 1, 1), pool.bias, pool.temperature "
    "()\n"
    "(optional), out.weight (features, 2 * keypoints), out.bias.\n\n"
    "norm: 'folded', BatchNorm as part of each convolution's weight and bias; 'group', GroupNorm\n"
    "of 16 channels a group (bn1.weight, bn1.bias ..., layer2.0.downsample_norm.weight).\n"
    "height, width: of the images that encode gets; they see no resizing.\n"
    "scale, offset: float32 (channels,); the trunk sees pixel * scale + offset, of pixels from 0\n"
    "to 1, and zeros around that.\n"
    "relu: whether one follows the linear layer.\n"
    "precision: 'int16' rounds the trunk's weights, and what its convolutions read, to 16 bits;\n"
    "their products are exact, and the rest is float32; 'int8' rounds weights to 8 bits, but for\n"
    "the first convolution's.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)vision_doc},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, vision_init},
    {Py_tp_dealloc, vision_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, facts},
    {0, NULL},
};

PyType_Spec edge_vision_spec = {
    .name = "tsad._core.Vision",
    .basicsize = sizeof(edge_vision),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
