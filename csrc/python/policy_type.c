/* policy_type.c: _core.Policy, the type: life, facts, locking. A policy is used by one thread at a
 * time; whoever comes second gets RuntimeError.
 */
#include "edge.h"

#include <string.h>

static int raise_unless_ok(tsad_status status)
{
    if (status != TSAD_OK) {
        edge_raise(status);
    }
    return status == TSAD_OK ? 0 : -1;
}

/* End the call that was not waited for and give its arrays back, which may run anything: the policy
 * is free then. */
static int settle(edge_policy *self)
{
    edge_view kept[3];
    tsad_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = tsad_policy_settle(self->policy);
    Py_END_ALLOW_THREADS;
    memcpy(kept, self->kept, sizeof kept);
    memset(self->kept, 0, sizeof self->kept);
    self->deferred = false;
    tsad_policy_release(self->policy);
    int result = raise_unless_ok(status);
    for (int i = 0; i < 3; i++) {
        edge_return(&kept[i]);
    }
    return result;
}

int edge_enter(edge_policy *self)
{
    if (!self->policy) {
        PyErr_SetString(PyExc_RuntimeError, "policy: not initialised; a subclass must call "
                                            "super().__init__(model, lanes=..., threads=...)");
        return -1;
    }
    if (raise_unless_ok(tsad_policy_acquire(self->policy)) < 0) {
        return -1;
    }
    return self->deferred ? (settle(self) < 0 ? -1 : edge_enter(self)) : 0;
}

void edge_leave(edge_policy *self) { tsad_policy_release(self->policy); }

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
    self->executed = PyMem_Calloc((size_t)self->n_lanes, sizeof(int));
    self->listed = PyMem_Calloc((size_t)self->n_lanes, 1);
    if (!self->streams || !self->lanes || !self->executed || !self->listed) {
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
    PyMem_Free(self->executed);
    PyMem_Free(self->listed);
    self->streams = NULL;
    self->lanes = self->executed = NULL;
    self->listed = NULL;
    edge_free_features(self);
    tsad_policy_destroy(self->policy);
    self->policy = NULL;
    for (int i = 0; i < 3; i++) { /* of a call that was not waited for: it is done now */
        edge_return(&self->kept[i]);
    }
    Py_CLEAR(self->model);
}

/* warm_start: (sampler float32 (N, 9), signal, noise) */
static int read_warm_start(edge_policy *self, PyObject *object, edge_view *sampler,
                           tsad_warm_start *warm)
{
    int64_t shape[2] = {-1, TSAD_SAMPLER_COLUMNS};
    PyObject *table;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "warm_start: expected (sampler, signal, noise); use "
                                         "tsad.load(..., warm_start=N)");
        return -1;
    }
    if (!PyArg_ParseTuple(object, "Off:warm_start", &table, &warm->signal, &warm->noise) ||
        edge_borrow(self->state, table, "warm_start", EDGE_FLOAT32, false, sampler) < 0 ||
        edge_expect_shape("warm_start", sampler, 2, shape) < 0) {
        return -1;
    }
    warm->n_steps = sampler->shape[0] > INT32_MAX ? INT32_MAX : (int)sampler->shape[0];
    warm->sampler = sampler->data;
    return 0;
}

/* correction: (gain, shift), float32 (T, A) each */
static int read_correction(edge_policy *self, PyObject *object)
{
    int64_t shape[2] = {self->info.horizon, self->info.action_dim};
    static const char *const names[2] = {"gain", "shift"};
    PyObject *given[2];
    edge_view views[2] = {0};
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "correction: expected (gain, shift); use "
                                         "tsad.load(..., fitted=FILE)");
        return -1;
    }
    int result = PyArg_ParseTuple(object, "OO:correction", &given[0], &given[1]) ? 0 : -1;
    for (int i = 0; i < 2 && result == 0; i++) {
        result = edge_borrow(self->state, given[i], names[i], EDGE_FLOAT32, false, &views[i]);
        result = result < 0 ? -1 : edge_expect_shape(names[i], &views[i], 2, shape);
    }
    if (result == 0) {
        tsad_status status = tsad_policy_set_correction(self->policy, views[0].data, views[1].data);
        result = status == TSAD_OK ? 0 : (edge_raise(status), -1);
    }
    edge_return(&views[0]);
    edge_return(&views[1]);
    return result;
}

static int policy_open(edge_policy *self, PyObject *model, PyObject *warm_start,
                       PyObject *correction, float lead, int smoothing, PyObject *features)
{
    tsad_model *m = ((edge_model *)model)->model;
    tsad_policy *policy = NULL;
    tsad_warm_start warm;
    edge_view sampler = {0};
    self->model = Py_NewRef(model);
    self->warm_start = warm_start != Py_None;
    int result = self->warm_start ? read_warm_start(self, warm_start, &sampler, &warm) : 0;
    if (result == 0) {
        tsad_status status = tsad_policy_create(m, self->warm_start ? &warm : NULL, self->n_lanes,
                                                self->n_threads, &policy);
        result = status == TSAD_OK ? 0 : (edge_raise(status), -1);
    }
    edge_return(&sampler);
    if (result < 0) {
        return -1;
    }
    self->policy = policy;
    tsad_status status = tsad_policy_set_lead(policy, lead, smoothing);
    if (status != TSAD_OK) {
        edge_raise(status);
        return -1;
    }
    self->follows = self->warm_start || lead > 0;
    self->info = tsad_policy_get_info(policy);
    self->all_steps = tsad_model_get_info(m).n_steps;
    if (correction != Py_None && read_correction(self, correction) < 0) {
        return -1;
    }
    return edge_read_features(self, features) < 0 ? -1 : open_streams(self);
}

static int policy_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model",     "lanes",    "threads",    "warm_start", "lead",
                            "smoothing", "features", "correction", NULL};
    edge_policy *self = (edge_policy *)object;
    PyObject *model, *lanes = NULL, *threads = NULL, *warm_start = Py_None, *features = Py_None;
    PyObject *correction = Py_None;
    float lead = 0;
    int smoothing = 0;
    if (self->policy) {
        PyErr_SetString(PyExc_RuntimeError, "policy: already initialised; make another one");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOOfpOO:Policy", names, &model, &lanes,
                                     &threads, &warm_start, &lead, &smoothing, &features,
                                     &correction)) {
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
    if (policy_open(self, model, warm_start, correction, lead, smoothing, features) < 0) {
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

PyDoc_STRVAR(
    call_doc,
    "__call__($self, /, obs, *, out=None, noise=None, lanes=None, return_horizon=False,\n"
    "         executed=None)\n--\n\n"
    "Run a chunk: actions in raw units, float32 (lanes, n_action_steps, action_dim).\n\n"
    "obs: float32 (lanes, n_obs_steps, obs_dim), raw units, the newest last; with one lane\n"
    "also (n_obs_steps, obs_dim), and the result lacks the first axis. NumPy, torch, JAX, or\n"
    "anything with __dlpack__ in host memory; the result is of the library of obs. On a GPU these\n"
    "arrays may be there too: the result is NumPy's then, unless there is out. An out of torch's\n"
    "there is not waited for: it comes next on torch's current stream. Where the\n"
    "features of an observation have names: a dict of such arrays by name, (lanes, n_obs_steps,\n"
    "numbers of the feature) each, and the result is of the library of the first feature's.\n"
    "out: where to write the actions; it is returned.\n"
    "noise: float32 (num_inference_steps, lanes, horizon, action_dim) in place of the policy's\n"
    "own, or (lanes, horizon, action_dim), the initial sample alone. With a warm start the first\n"
    "axis is of all the model's steps, and warm chunks read its last ones.\n"
    "lanes: which lanes the rows of obs are: numbers, or a mask of one bool per lane.\n"
    "return_horizon: all (lanes, horizon, action_dim) actions, as they were predicted: without\n"
    "smoothing and lead.\n"
    "executed: with a warm start or a lead, how many actions each lane listed has executed since "
    "its\n"
    "previous chunk, 0 to horizon: an int for all, or one per row; None: all that a chunk\n"
    "returns.\n\n"
    "ValueError, TypeError: an argument does not fit; nothing has changed, unless it is a number\n"
    "on the GPU: it is found while the chunk runs, so that the lanes start anew, out there is\n"
    "NaN, and where that was not waited for the next use raises it. RuntimeError: another\n"
    "thread is using the policy.");
PyDoc_STRVAR(predict_noise_doc,
             "predict_noise($self, /, sample, step, obs)\n--\n\n"
             "The network alone, dense, no state touched.\n\n"
             "sample: float32 (N, horizon, action_dim), normalised; step: a loop index, 0 is the\n"
             "noisiest; obs: float32 (N, n_obs_steps, obs_dim), raw units, or a dict as of a call. "
             "Returns the network's\n"
             "output, float32 (N, horizon, action_dim), an array of the library that obs is of.");
PyDoc_STRVAR(
    reset_doc,
    "reset($self, /, lanes=None, seed=None)\n--\n\n"
    "Start of an episode for all lanes or the listed ones: earlier rollouts are forgotten.\n\n"
    "lanes: None, a lane number, a list of them, or a mask of one bool per lane; an empty list\n"
    "is nothing to do.\n\n"
    "seed: an int gives lane i the stream PCG64(SeedSequence(seed, spawn_key=(i,))); a\n"
    "sequence with one int per lane listed gives each PCG64(SeedSequence(its seed)); None\n"
    "continues the streams.");

#define KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))
static PyMethodDef policy_methods[] = {
    /* beside the slot, whose wrapper has no signature */
    {"__call__", KEYWORDS(edge_policy_call), METH_VARARGS | METH_KEYWORDS | METH_COEXIST, call_doc},
    {"predict_noise", KEYWORDS(edge_policy_predict_noise), METH_VARARGS | METH_KEYWORDS,
     predict_noise_doc},
    {"reset", KEYWORDS(edge_policy_reset), METH_VARARGS | METH_KEYWORDS, reset_doc},
    {"_lanes", edge_policy_lanes, METH_O,
     "_lanes($self, lanes, /)\n--\n\nThe lane numbers that `lanes` means, a list of ints."},
    {"_side_by_side", edge_policy_side_by_side, METH_VARARGS,
     "_side_by_side($self, obs, n_rows, /)\n--\n\nWhat a call with a dict makes of it: one NumPy "
     "array."},
    {"_set_plan", KEYWORDS(edge_policy_set_plan), METH_VARARGS | METH_KEYWORDS,
     "_set_plan($self, /, lane, sources, first)\n--\n\nFix the plan of a lane: uint8 (K, B) each."},
    {"_set_plans", edge_policy_set_plans, METH_O,
     "_set_plans($self, plans, /)\n--\n\nFix the plans of all lanes, or of none: one (sources, "
     "first) per lane."},
    {"_set_pruner", edge_policy_set_pruner, METH_O,
     "_set_pruner($self, sparsity, /)\n--\n\nLet the pruner plan; sparsity -1: its own argmax."},
    {"_set_rule", edge_policy_set_rule, METH_VARARGS,
     "_set_rule($self, blocks, threshold, most, polynomial, /)\n--\n\nLet a rule of rows decide."},
    {"_set_audit", edge_policy_set_audit, METH_O,
     "_set_audit($self, on, /)\n--\n\nCompare what is computed with what it replaces."},
    {"_audit", edge_policy_audit, METH_O,
     "_audit($self, lane, /)\n--\n\nOf the last chunk: squares of differences and of values, to "
     "earlier steps, then to earlier chunks."},
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
    "Policy(model, *, lanes=1, threads=1, warm_start=None, lead=0.0, smoothing=False,\n"
    "       features=None, correction=None)\n--\n\n"
    "A model with memory for some lanes. Use tsad.load, which makes a SparsePolicy of it.\n\n"
    "policy(obs, *, out=None, noise=None, lanes=None, return_horizon=False, executed=None)\n"
    "-> actions");

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
