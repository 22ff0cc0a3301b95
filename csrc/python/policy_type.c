/* policy_type.c: _core.Policy, the type: life, facts, locking, lane lists. A policy is used by one
 * thread at a time; whoever comes second gets RuntimeError.
 */
#include "edge.h"

#include <string.h>

int edge_enter(edge_policy *self)
{
    if (!self->policy) {
        PyErr_SetString(PyExc_RuntimeError, "policy: not initialised; a subclass must call "
                                            "super().__init__(model, lanes=..., threads=...)");
        return -1;
    }
    tsad_status status = tsad_policy_acquire(self->policy);
    if (status != TSAD_OK) {
        edge_raise(status);
        return -1;
    }
    return 0;
}

void edge_leave(edge_policy *self) { tsad_policy_release(self->policy); }

/* ---- lanes ------------------------------------------------------------------------------- */

/* One lane number; `name` is what to call it in an error. */
static int read_lane(const edge_policy *self, PyObject *object, const char *name)
{
    if (PyBool_Check(object)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a lane number, got a bool; use "
                     "np.flatnonzero(mask) for a mask",
                     name);
        return -1;
    }
    PyObject *index = PyNumber_Index(object);
    if (!index) {
        PyObject *type = edge_type_name(object);
        PyErr_Clear();
        if (type) {
            PyErr_Format(PyExc_TypeError, "%s: expected a lane number, got %U; pass an int", name,
                         type);
            Py_DECREF(type);
        }
        return -1;
    }
    int overflow = 0;
    long lane = PyLong_AsLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (overflow || lane < 0 || lane >= self->n_lanes) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: expected a lane from 0 to %d, got %R; load the policy with more lanes, or "
            "correct it",
            name, self->n_lanes - 1, object);
        return -1;
    }
    return (int)lane;
}

int edge_parse_lane(edge_policy *self, PyObject *lane) { return read_lane(self, lane, "lane"); }

/* NULL without an exception if the object is no sequence */
static PyObject *as_sequence(PyObject *object)
{
    Py_ssize_t size = PyObject_Size(object);
    if (size < 0 || PyUnicode_Check(object) || PyBytes_Check(object)) {
        PyErr_Clear();
        return NULL;
    }
    PyObject *list = PySequence_List(object);
    if (!list) {
        PyErr_Clear();
    }
    return list;
}

static int read_lanes(edge_policy *self, PyObject *list)
{
    Py_ssize_t n = PyList_Size(list);
    if (n < 1 || n > self->n_lanes) {
        PyErr_Format(PyExc_ValueError,
                     "lanes: expected 1 to %d distinct lanes, got %zd; leave it out to run all",
                     self->n_lanes, n);
        return -1;
    }
    int count = 0;
    for (; count < n; count++) {
        char name[48];
        PyOS_snprintf(name, sizeof name, "lanes[%d]", count);
        int lane = read_lane(self, PyList_GetItem(list, count), name);
        if (lane < 0) {
            break;
        }
        if (self->listed[lane]) {
            PyErr_Format(PyExc_ValueError,
                         "%s: expected distinct lanes, got lane %d twice; list each once", name,
                         lane);
            break;
        }
        self->listed[lane] = 1;
        self->lanes[count] = lane;
    }
    for (int i = 0; i < count; i++) {
        self->listed[self->lanes[i]] = 0;
    }
    return count == n ? count : -1;
}

int edge_parse_lanes(edge_policy *self, PyObject *lanes)
{
    if (lanes == Py_None) {
        for (int i = 0; i < self->n_lanes; i++) {
            self->lanes[i] = i;
        }
        return self->n_lanes;
    }
    PyObject *list = PyLong_Check(lanes) ? NULL : as_sequence(lanes);
    if (list) {
        int n = read_lanes(self, list);
        Py_DECREF(list);
        return n;
    }
    self->lanes[0] = read_lane(self, lanes, "lanes");
    return self->lanes[0] < 0 ? -1 : 1;
}

/* ---- life -------------------------------------------------------------------------------- */

static int read_size(PyObject *object, const char *name, int *out)
{
    int overflow = 0;
    PyObject *index = PyNumber_Index(object);
    long size = index ? PyLong_AsLongAndOverflow(index, &overflow) : -1;
    Py_XDECREF(index);
    if (!index || PyBool_Check(object)) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: expected an integer, got %R; pass an int", name, object);
        return -1;
    }
    if (overflow || size < 1 || size > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: expected at least 1, got %R; correct it", name, object);
        return -1;
    }
    *out = (int)size;
    return 0;
}

/* lane i draws from SeedSequence(entropy of the system, spawn_key=(i,)) */
static int open_streams(edge_policy *self)
{
    self->streams = PyMem_Calloc((size_t)self->n_lanes, sizeof(edge_stream));
    self->lanes = PyMem_Calloc((size_t)self->n_lanes, sizeof(int));
    self->listed = PyMem_Calloc((size_t)self->n_lanes, 1);
    self->ran = PyMem_Calloc((size_t)self->n_lanes, 1);
    if (!self->streams || !self->lanes || !self->listed || !self->ran) {
        PyErr_NoMemory();
        return -1;
    }
    PyObject *sequence = PyObject_CallNoArgs(self->state->seed_sequence);
    PyObject *entropy = sequence ? PyObject_GetAttrString(sequence, "entropy") : NULL;
    int status = entropy ? 0 : -1;
    for (int i = 0; status == 0 && i < self->n_lanes; i++) {
        status = edge_stream_open(self->state, entropy, i, &self->streams[i]);
    }
    Py_XDECREF(entropy);
    Py_XDECREF(sequence);
    return status;
}

static void policy_close(edge_policy *self)
{
    for (int i = 0; self->streams && i < self->n_lanes; i++) {
        edge_stream_close(&self->streams[i]);
    }
    PyMem_Free(self->streams);
    PyMem_Free(self->lanes);
    PyMem_Free(self->listed);
    PyMem_Free(self->ran);
    self->streams = NULL;
    self->lanes = NULL;
    self->listed = self->ran = NULL;
    tsad_policy_destroy(self->policy);
    self->policy = NULL;
    Py_CLEAR(self->model);
}

static int policy_open(edge_policy *self, PyObject *model)
{
    const tsad_model *m = ((edge_model *)model)->model;
    tsad_policy *policy = NULL;
    self->model = Py_NewRef(model);
    self->info = tsad_model_get_info(m);
    tsad_status status =
        tsad_policy_create((tsad_model *)m, self->n_lanes, self->n_threads, &policy);
    if (status != TSAD_OK) {
        edge_raise(status);
        return -1;
    }
    self->policy = policy;
    return open_streams(self);
}

static int policy_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "lanes", "threads", NULL};
    edge_policy *self = (edge_policy *)object;
    PyObject *model, *lanes = NULL, *threads = NULL;
    if (self->policy) {
        PyErr_SetString(PyExc_RuntimeError, "policy: already initialised; make another one");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OO:Policy", names, &model, &lanes,
                                     &threads)) {
        return -1;
    }
    self->state = edge_state_of_type(Py_TYPE(object));
    if (!self->state) {
        return -1;
    }
    if (!PyObject_TypeCheck(model, self->state->model_type) || !((edge_model *)model)->model) {
        PyErr_Format(PyExc_TypeError, "model: expected a tsad._core.Model, got %R; use tsad.load",
                     model);
        return -1;
    }
    self->n_lanes = self->n_threads = 1;
    if ((lanes && read_size(lanes, "lanes", &self->n_lanes) < 0) ||
        (threads && read_size(threads, "threads", &self->n_threads) < 0)) {
        return -1;
    }
    if (policy_open(self, model) < 0) {
        policy_close(self);
        return -1;
    }
    return 0;
}

static void policy_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    policy_close((edge_policy *)object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

/* ---- facts: constant, so they may be read while a chunk runs ------------------------------- */

enum fact {
    MODEL,
    LANES,
    THREADS,
    HORIZON,
    N_OBS_STEPS,
    N_ACTION_STEPS,
    OBS_DIM,
    ACTION_DIM,
    NUM_INFERENCE_STEPS,
    N_BLOCKS,
    HAS_PRUNER,
    ADDS_NOISE,
    BLOCK_COSTS,
    BACKEND
};

static PyObject *get_fact(PyObject *object, void *closure)
{
    edge_policy *self = (edge_policy *)object;
    const tsad_model_info *info = &self->info;
    if (!self->policy) {
        PyErr_SetString(PyExc_RuntimeError, "policy: not initialised; call super().__init__");
        return NULL;
    }
    switch ((enum fact)(intptr_t)closure) {
    case MODEL:
        return Py_NewRef(self->model);
    case LANES:
        return PyLong_FromLong(self->n_lanes);
    case THREADS:
        return PyLong_FromLong(self->n_threads);
    case HORIZON:
        return PyLong_FromLong(info->horizon);
    case N_OBS_STEPS:
        return PyLong_FromLong(info->n_obs_steps);
    case N_ACTION_STEPS:
        return PyLong_FromLong(info->n_action_steps);
    case OBS_DIM:
        return PyLong_FromLong(info->obs_dim);
    case ACTION_DIM:
        return PyLong_FromLong(info->action_dim);
    case NUM_INFERENCE_STEPS:
        return PyLong_FromLong(info->n_steps);
    case N_BLOCKS:
        return PyLong_FromLong(info->n_blocks);
    case HAS_PRUNER:
        return PyBool_FromLong(info->has_pruner);
    case ADDS_NOISE:
        return PyBool_FromLong(info->adds_noise);
    case BLOCK_COSTS:
        return edge_block_costs(((edge_model *)self->model)->model);
    case BACKEND:
        return PyUnicode_FromString(info->backend);
    }
    Py_UNREACHABLE();
}

/* changes when rollout memory is first needed, but is one number */
static PyObject *get_bytes(PyObject *object, void *closure)
{
    edge_policy *self = (edge_policy *)object;
    (void)closure;
    if (edge_enter(self) < 0) {
        return NULL;
    }
    size_t bytes = tsad_policy_bytes(self->policy);
    edge_leave(self);
    return PyLong_FromSize_t(bytes);
}

#define FACT(name, id, doc) {name, get_fact, NULL, doc, (void *)(intptr_t)(id)}
static PyGetSetDef facts[] = {
    FACT("model", MODEL, "the immutable model, shared"),
    FACT("lanes", LANES, "environments stepped together"),
    FACT("threads", THREADS, "threads that a chunk may use"),
    FACT("horizon", HORIZON, "T, actions that one denoising loop predicts"),
    FACT("n_obs_steps", N_OBS_STEPS, "observations in the window"),
    FACT("n_action_steps", N_ACTION_STEPS, "actions executed of the horizon"),
    FACT("obs_dim", OBS_DIM, "numbers per observation"),
    FACT("action_dim", ACTION_DIM, "numbers per action"),
    FACT("num_inference_steps", NUM_INFERENCE_STEPS, "K, denoising steps of a chunk"),
    FACT("n_blocks", N_BLOCKS, "B, prunable blocks of the network"),
    FACT("has_pruner", HAS_PRUNER, "whether the planner 'pruner' is there"),
    FACT("adds_noise", ADDS_NOISE, "whether the sampler adds noise after the first sample"),
    FACT("block_costs", BLOCK_COSTS, "int64 (B,), multiply-accumulates of a cell"),
    FACT("backend", BACKEND, "what runs it, e.g. 'avx2'"),
    {"_bytes", get_bytes, NULL, "memory of this policy without the model", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- methods ----------------------------------------------------------------------------- */

PyDoc_STRVAR(predict_noise_doc,
             "predict_noise($self, /, sample, step, obs)\n--\n\n"
             "The network alone, dense, no state touched.\n\n"
             "sample: float32 (N, horizon, action_dim), normalised; step: a loop index, 0 is the\n"
             "noisiest; obs: float32 (N, n_obs_steps, obs_dim), raw units. Returns the network's\n"
             "output, float32 (N, horizon, action_dim).");
PyDoc_STRVAR(
    reset_doc,
    "reset($self, /, lanes=None, seed=None)\n--\n\n"
    "Start of an episode for all lanes or the listed ones: earlier rollouts are forgotten.\n\n"
    "seed: an int gives lane i the stream PCG64(SeedSequence(seed, spawn_key=(i,))); a\n"
    "sequence with one int per lane listed gives each PCG64(SeedSequence(its seed)); None\n"
    "continues the streams.");

#define KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))
static PyMethodDef policy_methods[] = {
    {"predict_noise", KEYWORDS(edge_policy_predict_noise), METH_VARARGS | METH_KEYWORDS,
     predict_noise_doc},
    {"reset", KEYWORDS(edge_policy_reset), METH_VARARGS | METH_KEYWORDS, reset_doc},
    {"_set_plan", KEYWORDS(edge_policy_set_plan), METH_VARARGS | METH_KEYWORDS,
     "_set_plan($self, /, lane, sources, first)\n--\n\nFix the plan of a lane: uint8 (K, B) each."},
    {"_set_plans", edge_policy_set_plans, METH_O,
     "_set_plans($self, plans, /)\n--\n\nFix the plans of all lanes, or of none: one (sources, "
     "first) per lane."},
    {"_set_pruner", edge_policy_set_pruner, METH_O,
     "_set_pruner($self, sparsity, /)\n--\n\nLet the pruner plan; sparsity -1: its own argmax."},
    {"_get_plan", edge_policy_get_plan, METH_O,
     "_get_plan($self, lane, /)\n--\n\nThe last executed plan of a lane, uint8 (K, B)."},
    {"_ages", edge_policy_ages, METH_O,
     "_ages($self, lane, /)\n--\n\nAges of rollout slots, uint32 (K, B); 0 is empty, 1 is new."},
    {"_stats", edge_policy_stats, METH_O,
     "_stats($self, lane, /)\n--\n\nWhat the last chunk of a lane did, as a dict."},
    {"_timings", edge_policy_timings, METH_NOARGS,
     "_timings($self, /)\n--\n\nMilliseconds of the last chunk by stage, as a dict."},
    {"_pruner_scores", edge_policy_pruner_scores, METH_O,
     "_pruner_scores($self, obs, /)\n--\n\nScores of one observation, float32 (K, B, 4), in loop "
     "order."},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(
    policy_doc,
    "Policy(model, *, lanes=1, threads=1)\n--\n\n"
    "A model with memory for some lanes. Use tsad.load, which makes a SparsePolicy of it.\n\n"
    "policy(obs, *, out=None, noise=None, lanes=None, return_horizon=False) -> actions");

static PyType_Slot policy_slots[] = {
    {Py_tp_doc, (void *)policy_doc}, {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, policy_init},       {Py_tp_dealloc, policy_dealloc},
    {Py_tp_call, edge_policy_call},  {Py_tp_methods, policy_methods},
    {Py_tp_getset, facts},           {0, NULL},
};

PyType_Spec edge_policy_spec = {
    .name = "tsad._core.Policy",
    .basicsize = sizeof(edge_policy),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = policy_slots,
};
