/* model_type.c: _core.Model, an immutable model built from arrays. The arrays are read by the
 * constructor alone: weights are packed into the core's own memory.
 */
#include "edge.h"

#include <string.h>

/* ---- keywords ---------------------------------------------------------------------------- */

static const char *const keywords[] = {
    "family",        "horizon",       "n_obs_steps", "n_action_steps",
    "obs_dim",       "action_dim",    "n_layers",    "n_heads",
    "n_emb",         "n_cond_layers", "causal",      "sampler",
    "time_emb",      "obs_scale",     "obs_offset",  "action_scale",
    "action_offset", "block_cost",    "tensors",     "pruner",
    "nodes",         "registers",     "backend",     "precision",
    "down_dims",     "kernel_size",   "n_groups",    "use_film_scale_modulation",
    "obs_shift",     "action_shift",  "hidden_dim",  "rotation",
};
static const char *const pruner_keywords[] = {"tensors", "hidden", "heads", "ff", "block_emb"};

static int check_keywords(PyObject *dict, const char *const *known, size_t n, const char *where)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(dict, &at, &key, &value)) {
        bool found = false;
        for (size_t i = 0; i < n; i++) {
            found |= PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, known[i]) == 0;
        }
        if (!found) {
            PyErr_Format(PyExc_TypeError, "%s: unknown key %R; remove it", where, key);
            return -1;
        }
    }
    return 0;
}

/* Borrowed; NULL without an exception where it is missing or None. */
static PyObject *look_up(PyObject *dict, const char *name)
{
    PyObject *value = dict ? PyDict_GetItemString(dict, name) : NULL;
    return value == Py_None ? NULL : value;
}

static int missing(const char *name)
{
    PyErr_Format(PyExc_TypeError, "Model: expected the keyword %s, got none; pass it", name);
    return -1;
}

/* required if fallback < 0 */
static int take_int(PyObject *dict, const char *name, int fallback, int *out)
{
    PyObject *value = look_up(dict, name);
    if (!value) {
        *out = fallback;
        return fallback < 0 ? missing(name) : 0;
    }
    PyObject *index = PyNumber_Index(value);
    int overflow = 0;
    long long number = index ? PyLong_AsLongLongAndOverflow(index, &overflow) : -1;
    Py_XDECREF(index);
    if (!index) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: expected an integer, got %R; pass an int", name, value);
        return -1;
    }
    if (overflow || number < 0 || number > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: expected 0 to %d, got %R; correct it", name, INT32_MAX,
                     value);
        return -1;
    }
    *out = (int)number;
    return 0;
}

/* The string lives as long as the dict's value does. */
static int take_string(PyObject *dict, const char *name, const char *fallback, const char **out)
{
    PyObject *value = look_up(dict, name);
    *out = fallback;
    if (!value) {
        return 0;
    }
    if (!PyUnicode_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a string, got %R; pass a str", name, value);
        return -1;
    }
    *out = PyUnicode_AsUTF8AndSize(value, NULL);
    return *out ? 0 : -1;
}

/* ---- arrays ------------------------------------------------------------------------------ */

/* What a specification borrows while the model is built. */
typedef struct source {
    edge_state *state;
    edge_view view[14];
    int n_views;
    PyObject *items[2]; /* lists of (name, array): network, pruner */
    tsad_tensor *tensors[2];
    edge_view *tensor_views[2];
    Py_ssize_t n_tensors[2];
} source;

static void source_close(source *s)
{
    for (int i = 0; i < s->n_views; i++) {
        edge_return(&s->view[i]);
    }
    for (int i = 0; i < 2; i++) {
        for (Py_ssize_t t = 0; t < s->n_tensors[i]; t++) {
            edge_return(&s->tensor_views[i][t]);
        }
        PyMem_Free(s->tensors[i]);
        PyMem_Free(s->tensor_views[i]);
        Py_XDECREF(s->items[i]);
    }
}

/* An array of a fixed shape; -1 accepts any size. NULL where an optional one is missing. */
static edge_view *take_array(source *s, PyObject *dict, const char *name, edge_dtype dtype,
                             int n_dims, const int64_t *shape, bool required)
{
    PyObject *value = look_up(dict, name);
    if (!value) {
        if (required) {
            missing(name);
        }
        return NULL;
    }
    edge_view *view = &s->view[s->n_views];
    if (edge_borrow(s->state, value, name, dtype, false, view) < 0) {
        return NULL;
    }
    s->n_views++;
    return edge_expect_shape(name, view, n_dims, shape) < 0 ? NULL : view;
}

static int take_tensor(source *s, int which, Py_ssize_t i, const char *dict_name)
{
    PyObject *item = PyList_GetItem(s->items[which], i);
    PyObject *key = PyTuple_GetItem(item, 0), *value = PyTuple_GetItem(item, 1);
    if (!PyUnicode_Check(key)) {
        PyErr_Format(PyExc_TypeError, "%s: expected names as keys, got %R; pass str", dict_name,
                     key);
        return -1;
    }
    const char *name = PyUnicode_AsUTF8AndSize(key, NULL);
    if (!name) {
        return -1;
    }
    char shown[256];
    PyOS_snprintf(shown, sizeof shown, "%s['%.200s']", dict_name, name);
    edge_view *view = &s->tensor_views[which][i];
    if (edge_borrow(s->state, value, shown, EDGE_FLOAT32, false, view) < 0) {
        return -1;
    }
    tsad_tensor *tensor = &s->tensors[which][i];
    if (view->n_dims > 4) {
        PyErr_Format(PyExc_ValueError, "%s: expected at most 4 dimensions, got %d; reshape it",
                     shown, view->n_dims);
        return -1;
    }
    tensor->name = name;
    tensor->data = view->data;
    tensor->n_dims = view->n_dims;
    memcpy(tensor->shape, view->shape, sizeof(int64_t) * (size_t)view->n_dims);
    return 0;
}

static int take_tensors(source *s, int which, PyObject *dict, const char *dict_name)
{
    /* a list of its own keeps names and arrays alive, whatever happens to the dict */
    s->items[which] = dict ? PyMapping_Items(dict) : NULL;
    if (!s->items[which]) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a dict of name: float32 array, got %R; pass one", dict_name,
                     dict ? dict : Py_None);
        return -1;
    }
    Py_ssize_t n = PyList_Size(s->items[which]);
    s->tensors[which] = PyMem_Calloc((size_t)n + 1, sizeof(tsad_tensor));
    s->tensor_views[which] = PyMem_Calloc((size_t)n + 1, sizeof(edge_view));
    if (!s->tensors[which] || !s->tensor_views[which]) {
        PyErr_NoMemory();
        return -1;
    }
    s->n_tensors[which] = n;
    for (Py_ssize_t i = 0; i < n; i++) {
        if (take_tensor(s, which, i, dict_name) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- specification ----------------------------------------------------------------------- */

static int read_sizes(PyObject *kw, tsad_model_spec *spec)
{
    if (take_string(kw, "family", "diffusion_policy_transformer", &spec->family) < 0 ||
        take_string(kw, "backend", NULL, &spec->backend) < 0) {
        return -1;
    }
    const char *precision;
    if (take_string(kw, "precision", "float32", &precision) < 0) {
        return -1;
    }
    static const char *const precisions[] = {"float32", "int16", "int8"}; /* tsad_precision */
    int which = 0;
    while (which < 3 && strcmp(precision, precisions[which]) != 0) {
        which++;
    }
    if (which == 3) {
        PyErr_Format(PyExc_ValueError, "precision: expected 'float32', 'int16' or 'int8', got '%s'",
                     precision);
        return -1;
    }
    spec->precision = (tsad_precision)which;
    bool transformer = strcmp(spec->family, "diffusion_policy_transformer") == 0;
    int layered = transformer ? -1 : 0; /* others have no layers */
    return take_int(kw, "horizon", -1, &spec->horizon) < 0 ||
                   take_int(kw, "n_obs_steps", -1, &spec->n_obs_steps) < 0 ||
                   take_int(kw, "n_action_steps", -1, &spec->n_action_steps) < 0 ||
                   take_int(kw, "obs_dim", -1, &spec->obs_dim) < 0 ||
                   take_int(kw, "action_dim", -1, &spec->action_dim) < 0 ||
                   take_int(kw, "n_layers", layered, &spec->n_layers) < 0 ||
                   take_int(kw, "n_heads", layered, &spec->n_heads) < 0 ||
                   take_int(kw, "n_emb", layered, &spec->n_emb) < 0 ||
                   take_int(kw, "kernel_size", 0, &spec->kernel_size) < 0 ||
                   take_int(kw, "n_groups", 0, &spec->n_groups) < 0 ||
                   take_int(kw, "hidden_dim", 0, &spec->hidden_dim) < 0 ||
                   take_int(kw, "use_film_scale_modulation", 0, &spec->use_film_scale_modulation) <
                       0 ||
                   take_int(kw, "n_cond_layers", 0, &spec->n_cond_layers) < 0 ||
                   take_int(kw, "causal", 1, &spec->causal) < 0
               ? -1
               : 0;
}

static int read_tables(source *s, PyObject *kw, tsad_model_spec *spec)
{
    int64_t rows[2] = {-1, TSAD_SAMPLER_COLUMNS}, any = -1, obs = spec->obs_dim,
            action = spec->action_dim;
    edge_view *view = take_array(s, kw, "sampler", EDGE_FLOAT32, 2, rows, true);
    if (!view) {
        return -1;
    }
    if (view->shape[0] < 1 || view->shape[0] > TSAD_MAX_STEPS) {
        return edge_raise_shape("sampler", view, 2, rows, "one row per denoising step, 1 to 65536");
    }
    spec->sampler = view->data;
    spec->n_steps = (int)view->shape[0];
    int64_t time_shape[2] = {spec->n_steps, spec->n_emb};
    view = take_array(s, kw, "time_emb", EDGE_FLOAT32, 2, time_shape,
                      strcmp(spec->family, "nodes") != 0);
    spec->time_emb = view ? view->data : NULL;
    struct {
        const char *name;
        int64_t *size;
        const float **out;
    } affine[] = {
        {"obs_scale", &obs, &spec->obs_scale},
        {"obs_offset", &obs, &spec->obs_offset},
        {"action_scale", &action, &spec->action_scale},
        {"action_offset", &action, &spec->action_offset},
        {"obs_shift", &obs, &spec->obs_shift}, /* optional from here on */
        {"action_shift", &action, &spec->action_shift},
    };
    for (int i = 0; i < 6 && !PyErr_Occurred(); i++) {
        view = take_array(s, kw, affine[i].name, EDGE_FLOAT32, 1, affine[i].size, i < 4);
        *affine[i].out = view ? view->data : NULL;
    }
    view = PyErr_Occurred() ? NULL : take_array(s, kw, "block_cost", EDGE_INT64, 1, &any, true);
    if (!view) {
        return -1;
    }
    if (view->shape[0] < 1 || view->shape[0] > TSAD_MAX_BLOCKS) {
        return edge_raise_shape("block_cost", view, 1, &any, "one number per block, 1 to 16384");
    }
    spec->block_cost = view->data;
    spec->n_blocks = (int)view->shape[0];
    return 0;
}

static int read_pruner(source *s, PyObject *kw, tsad_model_spec *spec)
{
    PyObject *pruner = look_up(kw, "pruner");
    if (!pruner) {
        return 0;
    }
    if (!PyDict_Check(pruner)) {
        PyErr_Format(PyExc_TypeError, "pruner: expected a dict or None, got %R; pass one", pruner);
        return -1;
    }
    if (check_keywords(pruner, pruner_keywords, 5, "pruner") < 0 ||
        take_int(pruner, "hidden", -1, &spec->pruner_hidden) < 0 ||
        take_int(pruner, "heads", 0, &spec->pruner_heads) < 0 ||
        take_int(pruner, "ff", 0, &spec->pruner_ff) < 0) {
        return -1;
    }
    int64_t shape[2] = {spec->n_blocks, spec->pruner_hidden};
    bool transformer = spec->pruner_heads != 0;
    edge_view *view = take_array(s, pruner, "block_emb", EDGE_FLOAT32, 2, shape, transformer);
    if (PyErr_Occurred() ||
        take_tensors(s, 1, look_up(pruner, "tensors"), "pruner['tensors']") < 0) {
        return -1;
    }
    spec->block_emb = view ? view->data : NULL;
    spec->pruner_tensors = s->tensors[1];
    spec->n_pruner_tensors = (int)s->n_tensors[1];
    return 0;
}

static int read_nodes(source *s, PyObject *kw, tsad_model_spec *spec)
{
    int64_t nodes[2] = {-1, 10}, registers[2] = {-1, 2}, levels = -1;
    bool needed = strcmp(spec->family, "nodes") == 0;
    edge_view *view = take_array(s, kw, "nodes", EDGE_INT32, 2, nodes, needed);
    if (view) {
        spec->nodes = view->data;
        spec->n_nodes = (int)view->shape[0];
    }
    view =
        PyErr_Occurred() ? NULL : take_array(s, kw, "registers", EDGE_INT32, 2, registers, needed);
    if (view) {
        spec->registers = view->data;
        spec->n_registers = (int)view->shape[0];
    }
    needed = strcmp(spec->family, "unet1d") == 0;
    view = PyErr_Occurred() ? NULL : take_array(s, kw, "down_dims", EDGE_INT32, 1, &levels, needed);
    if (view) {
        spec->down_dims = view->data;
        spec->n_levels = (int)view->shape[0];
    }
    int64_t turns[2] = {spec->horizon, spec->n_heads ? spec->hidden_dim / spec->n_heads : -1};
    view = PyErr_Occurred() ? NULL : take_array(s, kw, "rotation", EDGE_FLOAT32, 2, turns, false);
    spec->rotation = view ? view->data : NULL;
    return PyErr_Occurred() ? -1 : 0;
}

static int read_spec(source *s, PyObject *kw, tsad_model_spec *spec)
{
    size_t n = sizeof keywords / sizeof keywords[0];
    if (check_keywords(kw, keywords, n, "Model") < 0 || read_sizes(kw, spec) < 0 ||
        read_tables(s, kw, spec) < 0 || read_pruner(s, kw, spec) < 0 ||
        read_nodes(s, kw, spec) < 0 || take_tensors(s, 0, look_up(kw, "tensors"), "tensors") < 0) {
        return -1;
    }
    spec->tensors = s->tensors[0];
    spec->n_tensors = (int)s->n_tensors[0];
    return 0;
}

/* ---- the type ---------------------------------------------------------------------------- */

static int model_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    edge_model *self = (edge_model *)object;
    if (self->model) {
        PyErr_SetString(PyExc_RuntimeError, "Model: already initialised, and immutable; make "
                                            "another one");
        return -1;
    }
    if (PyTuple_Size(args) > 0 || !kwargs) {
        PyErr_SetString(PyExc_TypeError, "Model: expected keyword arguments only; name them");
        return -1;
    }
    source s = {.state = edge_state_of_type(Py_TYPE(object))};
    if (!s.state) {
        return -1;
    }
    tsad_model_spec spec = {0};
    tsad_status status;
    int result = read_spec(&s, kwargs, &spec);
    if (result == 0) {
        tsad_model *model = NULL;
        PyThreadState *thread = PyEval_SaveThread();
        status = tsad_model_create(&spec, &model);
        PyEval_RestoreThread(thread);
        if (status != TSAD_OK) {
            edge_raise(status);
            result = -1;
        } else if (self->model) { /* another thread was faster */
            tsad_model_destroy(model);
        } else {
            self->model = model;
        }
    }
    source_close(&s);
    return result;
}

static void model_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    tsad_model_destroy(((edge_model *)object)->model);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

PyObject *edge_block_types(const tsad_model *model)
{
    tsad_model_info info = tsad_model_get_info(model);
    int64_t n = info.n_blocks;
    void *data;
    PyObject *array = edge_new_array(EDGE_UINT8, 1, &n, &data);
    if (array) {
        memcpy(data, info.block_type, (size_t)n);
    }
    return array;
}

PyObject *edge_block_costs(const tsad_model *model)
{
    tsad_model_info info = tsad_model_get_info(model);
    int64_t n = info.n_blocks;
    void *data;
    PyObject *array = edge_new_array(EDGE_INT64, 1, &n, &data);
    if (array) {
        memcpy(data, info.block_cost, sizeof(int64_t) * (size_t)n);
    }
    return array;
}

enum fact {
    N_STEPS,
    N_BLOCKS,
    HORIZON,
    N_OBS_STEPS,
    N_ACTION_STEPS,
    OBS_DIM,
    ACTION_DIM,
    HAS_PRUNER,
    ADDS_NOISE,
    BLOCK_TYPE,
    BLOCK_COST,
    BACKEND,
    WEIGHT_BYTES,
    RING_BYTES,
    ROLLOUT_BYTES
};

static PyObject *get_fact(PyObject *object, void *closure)
{
    const tsad_model *model = ((edge_model *)object)->model;
    if (!model) {
        PyErr_SetString(PyExc_RuntimeError, "Model: not initialised; call __init__");
        return NULL;
    }
    tsad_model_info info = tsad_model_get_info(model);
    switch ((enum fact)(intptr_t)closure) {
    case N_STEPS:
        return PyLong_FromLong(info.n_steps);
    case N_BLOCKS:
        return PyLong_FromLong(info.n_blocks);
    case HORIZON:
        return PyLong_FromLong(info.horizon);
    case N_OBS_STEPS:
        return PyLong_FromLong(info.n_obs_steps);
    case N_ACTION_STEPS:
        return PyLong_FromLong(info.n_action_steps);
    case OBS_DIM:
        return PyLong_FromLong(info.obs_dim);
    case ACTION_DIM:
        return PyLong_FromLong(info.action_dim);
    case HAS_PRUNER:
        return PyBool_FromLong(info.has_pruner);
    case ADDS_NOISE:
        return PyBool_FromLong(info.adds_noise);
    case BLOCK_TYPE:
        return edge_block_types(model);
    case BLOCK_COST:
        return edge_block_costs(model);
    case BACKEND:
        return PyUnicode_FromString(info.backend);
    case WEIGHT_BYTES:
        return PyLong_FromSize_t(info.weight_bytes);
    case RING_BYTES:
        return PyLong_FromSize_t(info.ring_bytes);
    case ROLLOUT_BYTES:
        return PyLong_FromSize_t(info.rollout_bytes);
    }
    Py_UNREACHABLE();
}

#define FACT(name, id, doc) {name, get_fact, NULL, doc, (void *)(intptr_t)(id)}
static PyGetSetDef facts[] = {
    FACT("n_steps", N_STEPS, "K, denoising steps"),
    FACT("n_blocks", N_BLOCKS, "B, prunable blocks"),
    FACT("horizon", HORIZON, "T, actions that one denoising loop predicts"),
    FACT("n_obs_steps", N_OBS_STEPS, "observations in the window"),
    FACT("n_action_steps", N_ACTION_STEPS, "actions executed of the horizon"),
    FACT("obs_dim", OBS_DIM, "numbers per observation"),
    FACT("action_dim", ACTION_DIM, "numbers per action"),
    FACT("has_pruner", HAS_PRUNER, "whether a pruner can plan"),
    FACT("adds_noise", ADDS_NOISE, "whether the sampler reads noise rows after the first"),
    FACT("block_type", BLOCK_TYPE, "uint8 (B,); equal numbers are interchangeable"),
    FACT("block_cost", BLOCK_COST, "int64 (B,), multiply-accumulates of a cell"),
    FACT("backend", BACKEND, "what runs it, e.g. 'avx2'"),
    FACT("weight_bytes", WEIGHT_BYTES, "memory of the packed weights"),
    FACT("ring_bytes", RING_BYTES, "branch outputs of one lane without rollout reuse"),
    FACT("rollout_bytes", ROLLOUT_BYTES, "branch outputs of one lane with rollout reuse"),
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(
    model_doc,
    "Model(*, family='diffusion_policy_transformer', horizon, n_obs_steps, n_action_steps,\n"
    "      obs_dim, action_dim, n_layers=0, n_heads=0, n_emb=0, n_cond_layers=0, causal=True,\n"
    "      sampler, time_emb=None, obs_scale, obs_offset, action_scale, action_offset,\n"
    "      block_cost, tensors, pruner=None, nodes=None, registers=None, backend=None,\n"
    "      precision='float32', down_dims=None, kernel_size=0, n_groups=0,\n"
    "      use_film_scale_modulation=False, obs_shift=None, action_shift=None,\n"
    "      hidden_dim=0, rotation=None)\n--\n\n"
    "An immutable model, shared by policies: weights packed for one backend, rewritten tables,\n"
    "sampler. The arguments are those of struct tsad_model_spec in csrc/tsad.h; arrays are read\n"
    "by the constructor alone. Only family 'nodes' may leave out sizes of layers and time_emb.");

static PyType_Slot model_slots[] = {
    {Py_tp_doc, (void *)model_doc}, {Py_tp_new, PyType_GenericNew}, {Py_tp_init, model_init},
    {Py_tp_dealloc, model_dealloc}, {Py_tp_getset, facts},          {0, NULL},
};

PyType_Spec edge_model_spec = {
    .name = "tsad._core.Model",
    .basicsize = sizeof(edge_model),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = model_slots,
};
