/* model_type.c: _core.Model, an immutable model built from arrays. The arrays are read by the
 * constructor alone: weights are packed into the core's own memory.
 */
#include "edge.h"

#include <string.h>

/* ---- keywords ---------------------------------------------------------------------------- */

static const char *const keywords[] = {
    "family",        "horizon",
    "n_obs_steps",   "n_action_steps",
    "obs_dim",       "action_dim",
    "n_layers",      "n_heads",
    "n_emb",         "n_cond_layers",
    "causal",        "sampler",
    "time_emb",      "obs_scale",
    "obs_offset",    "action_scale",
    "action_offset", "block_cost",
    "tensors",       "pruner",
    "nodes",         "registers",
    "backend",       "precision",
    "down_dims",     "kernel_size",
    "n_groups",      "use_film_scale_modulation",
    "obs_shift",     "action_shift",
    "hidden_dim",    "use_rope",
    "rotation",      "use_positional_encoding",
};
static const char *const described_keywords[] = {
    "family",         "horizon",  "n_obs_steps",
    "n_action_steps", "obs_dim",  "action_dim",
    "n_layers",       "n_heads",  "n_emb",
    "n_cond_layers",  "causal",   "down_dims",
    "kernel_size",    "n_groups", "use_film_scale_modulation",
    "hidden_dim",     "use_rope", "use_positional_encoding",
    "pruner",
};
static const char *const pruner_keywords[] = {"tensors", "hidden", "heads", "ff", "block_emb"};
#define LENGTH(array) (sizeof(array) / sizeof(array)[0])

/* ---- arrays ------------------------------------------------------------------------------ */

/* What a specification borrows while the model is built. */
typedef struct source {
    edge_state *state;
    const char *who; /* for errors */
    edge_view view[14];
    int n_views;
    edge_tensors network, pruner;
} source;

static void source_close(source *s)
{
    for (int i = 0; i < s->n_views; i++) {
        edge_return(&s->view[i]);
    }
    edge_return_tensors(&s->network);
    edge_return_tensors(&s->pruner);
}

/* An array of a fixed shape; -1 accepts any size. NULL where an optional one is missing. */
static edge_view *take_array(source *s, PyObject *dict, const char *name, edge_dtype dtype,
                             int n_dims, const int64_t *shape, bool required)
{
    PyObject *value = edge_look_up(dict, name);
    if (!value) {
        if (required) {
            edge_missing(s->who, name);
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

/* ---- specification ----------------------------------------------------------------------- */

typedef struct size {
    const char *name;
    int fallback; /* -1: required */
    int *out;
} size;

static int take_sizes(const char *who, PyObject *kw, const size *sizes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (edge_take_int(who, kw, sizes[i].name, sizes[i].fallback, sizes[i].out) < 0) {
            return -1;
        }
    }
    return 0;
}

static int read_sizes(const char *who, PyObject *kw, tsad_model_spec *spec)
{
    if (edge_take_string(kw, "family", "diffusion_policy_transformer", &spec->family) < 0) {
        return -1;
    }
    bool transformer = strcmp(spec->family, "diffusion_policy_transformer") == 0;
    int layered = transformer ? -1 : 0; /* others have no layers */
    const size sizes[] = {
        {"horizon", -1, &spec->horizon},
        {"n_obs_steps", -1, &spec->n_obs_steps},
        {"n_action_steps", -1, &spec->n_action_steps},
        {"obs_dim", -1, &spec->obs_dim},
        {"action_dim", -1, &spec->action_dim},
        {"n_layers", layered, &spec->n_layers},
        {"n_heads", layered, &spec->n_heads},
        {"n_emb", layered, &spec->n_emb},
        {"kernel_size", 0, &spec->kernel_size},
        {"n_groups", 0, &spec->n_groups},
        {"hidden_dim", 0, &spec->hidden_dim},
        {"use_rope", 0, &spec->use_rope},
        {"use_positional_encoding", 0, &spec->use_positional_encoding},
        {"use_film_scale_modulation", 0, &spec->use_film_scale_modulation},
        {"n_cond_layers", 0, &spec->n_cond_layers},
        {"causal", 1, &spec->causal},
    };
    return take_sizes(who, kw, sizes, LENGTH(sizes));
}

static int read_precision(PyObject *kw, tsad_model_spec *spec)
{
    const char *precision;
    if (edge_take_string(kw, "backend", NULL, &spec->backend) < 0 ||
        edge_take_string(kw, "precision", "float32", &precision) < 0) {
        return -1;
    }
    static const char *const precisions[] = {/* tsad_precision */
                                             "float32", "int16",    "int8",
                                             "float16", "bfloat16", "tf32"};
    int which = 0, n = (int)(sizeof precisions / sizeof precisions[0]);
    while (which < n && strcmp(precision, precisions[which]) != 0) {
        which++;
    }
    if (which == n) {
        PyErr_Format(PyExc_ValueError,
                     "precision: expected 'float32', 'int16', 'int8', 'float16', 'bfloat16' or "
                     "'tf32', got '%s'",
                     precision);
        return -1;
    }
    spec->precision = (tsad_precision)which;
    return 0;
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

/* *pruner: borrowed; NULL where there is none */
static int read_pruner_sizes(const char *who, PyObject *kw, tsad_model_spec *spec,
                             PyObject **pruner)
{
    const size sizes[] = {{"hidden", -1, &spec->pruner_hidden},
                          {"heads", 0, &spec->pruner_heads},
                          {"ff", 0, &spec->pruner_ff}};
    *pruner = edge_look_up(kw, "pruner");
    if (!*pruner) {
        return 0;
    }
    if (!PyDict_Check(*pruner)) {
        PyErr_Format(PyExc_TypeError, "pruner: expected a dict or None, got %R; pass one", *pruner);
        return -1;
    }
    if (edge_check_keywords(*pruner, pruner_keywords, LENGTH(pruner_keywords), "pruner") < 0) {
        return -1;
    }
    return take_sizes(who, *pruner, sizes, LENGTH(sizes));
}

static int read_pruner(source *s, PyObject *kw, tsad_model_spec *spec)
{
    PyObject *pruner;
    if (read_pruner_sizes("Model", kw, spec, &pruner) < 0) {
        return -1;
    }
    if (!pruner) {
        return 0;
    }
    int64_t shape[2] = {spec->n_blocks, spec->pruner_hidden};
    bool transformer = spec->pruner_heads != 0;
    edge_view *view = take_array(s, pruner, "block_emb", EDGE_FLOAT32, 2, shape, transformer);
    if (PyErr_Occurred() || edge_borrow_tensors(s->state, edge_look_up(pruner, "tensors"),
                                                "pruner['tensors']", &s->pruner) < 0) {
        return -1;
    }
    spec->block_emb = view ? view->data : NULL;
    spec->pruner_tensors = s->pruner.list;
    spec->n_pruner_tensors = (int)s->pruner.n;
    return 0;
}

static int read_levels(source *s, PyObject *kw, tsad_model_spec *spec)
{
    int64_t levels = -1;
    bool needed = strcmp(spec->family, "unet1d") == 0;
    edge_view *view = take_array(s, kw, "down_dims", EDGE_INT32, 1, &levels, needed);
    if (view) {
        spec->down_dims = view->data;
        spec->n_levels = (int)view->shape[0];
    }
    return PyErr_Occurred() ? -1 : 0;
}

static int read_nodes(source *s, PyObject *kw, tsad_model_spec *spec)
{
    int64_t nodes[2] = {-1, 10}, registers[2] = {-1, 2};
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
    int64_t turns[2] = {spec->horizon, spec->n_heads ? spec->hidden_dim / spec->n_heads : -1};
    view = PyErr_Occurred() ? NULL : take_array(s, kw, "rotation", EDGE_FLOAT32, 2, turns, false);
    spec->rotation = view ? view->data : NULL;
    spec->use_rope |= spec->rotation != NULL;
    return PyErr_Occurred() ? -1 : 0;
}

static int read_spec(source *s, PyObject *kw, tsad_model_spec *spec)
{
    if (edge_check_keywords(kw, keywords, LENGTH(keywords), "Model") < 0 ||
        read_sizes("Model", kw, spec) < 0 || read_precision(kw, spec) < 0 ||
        read_tables(s, kw, spec) < 0 || read_pruner(s, kw, spec) < 0 ||
        read_levels(s, kw, spec) < 0 || read_nodes(s, kw, spec) < 0 ||
        edge_borrow_tensors(s->state, edge_look_up(kw, "tensors"), "tensors", &s->network) < 0) {
        return -1;
    }
    spec->tensors = s->network.list;
    spec->n_tensors = (int)s->network.n;
    return 0;
}

/* ---- descriptions ------------------------------------------------------------------------ */

static PyObject *shapes_of(const tsad_wanted_list *wanted)
{
    PyObject *dict = PyDict_New();
    for (int i = 0; dict && i < wanted->n; i++) {
        const tsad_wanted *t = &wanted->list[i];
        PyObject *shape = PyTuple_New(t->n_dims);
        for (int d = 0; shape && d < t->n_dims; d++) {
            PyObject *size = PyLong_FromLongLong(t->shape[d]);
            if (!size || PyTuple_SetItem(shape, d, size) < 0) {
                Py_CLEAR(shape);
            }
        }
        if (!shape || PyDict_SetItemString(dict, t->name, shape) < 0) {
            Py_CLEAR(dict);
        }
        Py_XDECREF(shape);
    }
    return dict;
}

static PyObject *blocks_of(const tsad_description *d)
{
    PyObject *list = PyList_New(0);
    for (int b = 0; list && b < d->n_blocks; b++) {
        const tsad_block_description *block = &d->blocks[b];
        PyObject *item = Py_BuildValue("(ssL)", block->name, block->type, (long long)block->cost);
        if (!item || PyList_Append(list, item) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(item);
    }
    return list;
}

PyObject *edge_describe(PyObject *module, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_Size(args) > 0 || !kwargs) {
        PyErr_SetString(PyExc_TypeError, "describe: expected keyword arguments only; name them");
        return NULL;
    }
    source s = {.state = PyModule_GetState(module), .who = "describe"};
    tsad_model_spec spec = {0};
    tsad_description d = {0};
    PyObject *pruner, *result = NULL;
    if (edge_check_keywords(kwargs, described_keywords, LENGTH(described_keywords), s.who) == 0 &&
        read_sizes(s.who, kwargs, &spec) == 0 &&
        read_pruner_sizes(s.who, kwargs, &spec, &pruner) == 0 &&
        read_levels(&s, kwargs, &spec) == 0) {
        tsad_status status = tsad_describe(&spec, &d);
        if (status != TSAD_OK) {
            edge_raise(status);
        } else {
            PyObject *tensors = shapes_of(&d.tensors), *of_pruner = shapes_of(&d.pruner);
            PyObject *blocks = blocks_of(&d);
            if (tensors && of_pruner && blocks) {
                result = Py_BuildValue("{s:O,s:O,s:O}", "tensors", tensors, "pruner", of_pruner,
                                       "blocks", blocks);
            }
            Py_XDECREF(tensors);
            Py_XDECREF(of_pruner);
            Py_XDECREF(blocks);
        }
    }
    tsad_description_free(&d);
    source_close(&s);
    return result;
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
    source s = {.state = edge_state_of_type(Py_TYPE(object)), .who = "Model"};
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
    "      hidden_dim=0, use_rope=False, rotation=None,\n"
    "      use_positional_encoding=False)\n--\n\n"
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
