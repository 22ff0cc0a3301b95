/* policy_call.c: policy(obs) and its relatives: parse and borrow, check everything, leave the GIL,
 * run, take the GIL. A refused call has drawn no noise and changed nothing.
 *
 * Nothing calls Python between the start and the end of a chunk, with one exception: a call that
 * lasts longer than a tenth of a second looks for signals now and then, for Ctrl-C must not wait
 * for a hundred lanes.
 */
#include "edge.h"

#include <string.h>

typedef struct chunk {
    edge_view obs, out, noise;
    PyObject *like; /* the array whose library the result is of; new reference */
    int n_lanes;
    bool drop_axis;   /* obs came without the axis of lanes */
    bool noise_given; /* all of it */
    bool initial_given;
    bool executed_given;
    bool deferred; /* the device may still read and write the arrays */
    int whole_horizon;
    PyObject *actions; /* new reference */
    PyObject *library; /* that `actions` is handed over to, or NULL */
    float *data;
} chunk;

static void chunk_close(chunk *c)
{
    edge_return(&c->obs);
    edge_return(&c->out);
    edge_return(&c->noise);
}

/* Until the policy is entered again: see edge_enter. */
static void keep(edge_policy *self, chunk *c)
{
    edge_view *views[] = {&c->obs, &c->noise, &c->out};
    for (int i = 0; i < 3; i++) {
        self->kept[i] = *views[i];
        memset(views[i], 0, sizeof *views[i]);
    }
    self->deferred = true;
}

/* Give everything back; the result, an array of the library that obs came from. Here the policy is
 * free already: a deleter and another library may run anything. */
static PyObject *chunk_end(chunk *c)
{
    chunk_close(c);
    if (c->actions && c->library) {
        PyObject *actions = PyObject_CallFunctionObjArgs(c->library, c->actions, NULL);
        Py_DECREF(c->actions);
        c->actions = actions;
    }
    Py_XDECREF(c->library);
    Py_XDECREF(c->like);
    return c->actions;
}

/* The array, or what a dict of arrays is side by side. */
static int borrow_numbers(edge_policy *self, chunk *c, PyObject *obs, bool bare_fits)
{
    if (!PyDict_Check(obs)) {
        c->like = Py_NewRef(obs);
        return edge_borrow_there(self, obs, "obs", false, &c->obs);
    }
    PyObject *joined = edge_side_by_side(self, obs, c->n_lanes, bare_fits, &c->like);
    int status =
        joined ? edge_borrow(self->state, joined, "obs", EDGE_FLOAT32, false, &c->obs) : -1;
    Py_XDECREF(joined);
    return status;
}

static int borrow_obs(edge_policy *self, chunk *c, PyObject *obs)
{
    int64_t shape[3] = {c->n_lanes, self->info.n_obs_steps, self->info.obs_dim};
    bool bare_fits = self->n_lanes == 1 && c->n_lanes == 1;
    if (borrow_numbers(self, c, obs, bare_fits) < 0) {
        return -1;
    }
    if (bare_fits && edge_has_shape(&c->obs, 2, shape + 1)) {
        c->drop_axis = true;
    } else if (!edge_has_shape(&c->obs, 3, shape)) {
        return edge_raise_shape(
            "obs", &c->obs, 3, shape,
            self->n_lanes == 1 ? "these are (lanes, n_obs_steps, obs_dim); without the first "
                                 "axis is fine too"
                               : "these are (lanes, n_obs_steps, obs_dim); pass lanes=[...] to "
                                 "run a subset");
    }
    return 0;
}

static int place_actions(edge_policy *self, chunk *c, PyObject *out)
{
    int64_t shape[3] = {c->n_lanes,
                        c->whole_horizon ? self->info.horizon : self->info.n_action_steps,
                        self->info.action_dim};
    int skip = c->drop_axis ? 1 : 0;
    if (out == Py_None) {
        void *data;
        c->library = c->obs.on_device ? NULL : edge_library_of(c->like);
        c->actions = edge_new_array(EDGE_FLOAT32, 3 - skip, shape + skip, &data);
        c->data = c->actions ? data : NULL;
        return c->actions ? 0 : -1;
    }
    if (edge_borrow_there(self, out, "out", true, &c->out) < 0) {
        return -1;
    }
    if (!edge_has_shape(&c->out, 3 - skip, shape + skip)) {
        return edge_raise_shape("out", &c->out, 3 - skip, shape + skip,
                                "allocate it with np.empty(shape, np.float32)");
    }
    c->actions = Py_NewRef(out);
    c->data = c->out.data;
    return edge_expect_apart("out", &c->out, "obs", &c->obs);
}

static int borrow_noise(edge_policy *self, chunk *c, PyObject *noise)
{
    const tsad_model_info *info = &self->info;
    int64_t shape[4] = {self->all_steps, c->n_lanes, info->horizon, info->action_dim};
    if (noise == Py_None) {
        return 0;
    }
    if (edge_borrow_there(self, noise, "noise", false, &c->noise) < 0) {
        return -1;
    }
    c->noise_given = edge_has_shape(&c->noise, 4, shape);
    c->initial_given = edge_has_shape(&c->noise, 3, shape + 1);
    if (!c->noise_given && !c->initial_given) {
        return edge_raise_shape("noise", &c->noise, 4, shape,
                                self->warm_start
                                    ? "these are (all steps, with those before a warm start, "
                                      "lanes, horizon, action_dim); without the first axis it is "
                                      "what each chunk begins with"
                                    : "these are (num_inference_steps, lanes, horizon, "
                                      "action_dim); without the first axis it is the initial "
                                      "sample alone");
    }
    if (c->out.kind && edge_expect_apart("out", &c->out, "noise", &c->noise) < 0) {
        return -1;
    }
    return edge_expect_finite("noise", &c->noise);
}

/* None, an int for all rows, or one per row. */
static int read_executed(edge_policy *self, chunk *c, PyObject *executed)
{
    PyObject *plain;
    if (executed == Py_None) {
        return 0;
    }
    if (!self->follows) {
        PyErr_SetString(PyExc_TypeError, "executed: expected None, as this policy's chunks need "
                                         "nothing of the one before; load it with warm_start=N, or "
                                         "with a lead");
        return -1;
    }
    int is_list = edge_as_list(executed, "executed", &plain), n = c->n_lanes;
    bool fits = is_list == 0 || (is_list > 0 && PyList_Size(plain) == n);
    for (int i = 0; i < (is_list || n ? n : 1) && fits; i++) {
        PyObject *item = is_list ? PyList_GetItem(plain, i) : plain;
        int overflow = 0;
        long moved = PyLong_Check(item) && !PyBool_Check(item)
                         ? PyLong_AsLongAndOverflow(item, &overflow)
                         : -1;
        fits = !overflow && moved >= 0 && moved <= self->info.horizon;
        if (i < n) {
            self->executed[i] = (int)moved;
        }
    }
    Py_XDECREF(plain);
    if (is_list < 0) {
        return -1;
    }
    if (!fits) {
        PyErr_Format(PyExc_ValueError,
                     "executed: expected an int from 0 to %d (horizon), or %d, one per row, got "
                     "%R; pass how many actions were executed since the last chunk",
                     self->info.horizon, n, executed);
        return -1;
    }
    c->executed_given = true;
    return 0;
}

/* Draw what the caller did not give. Per chunk and lane that is standard_normal((K, T, A)), or its
 * first row alone where the sampler adds no noise; K of the steps that the lane will run. Needs no
 * GIL. */
static void draw(edge_policy *self, tsad_call *call)
{
    const tsad_model_info *info = &self->info;
    size_t row = (size_t)info->horizon * (size_t)info->action_dim;
    if (call->noise) {
        return;
    }
    float *buffer = tsad_policy_noise_buffer(self->policy);
    call->noise = buffer;
    call->noise_step = row;
    call->noise_lane = row * (size_t)self->all_steps;
    for (int i = 0; i < call->n_lanes; i++) {
        int first, n = tsad_policy_noise_steps(self->policy, self->lanes[i], &first);
        float *own = buffer + (size_t)i * call->noise_lane + (size_t)first * row;
        if (n > 1 || !call->initial) {
            edge_stream_normal(&self->streams[self->lanes[i]], row * (size_t)n, own);
        }
    }
}

/* ---- signals ------------------------------------------------------------------------------- */

/* -1 with an exception: this runs Python, too */
static int is_main_thread(void)
{
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread = threading ? PyObject_CallMethod(threading, "main_thread", NULL) : NULL;
    PyObject *ident = thread ? PyObject_GetAttrString(thread, "ident") : NULL;
    int is_main = ident ? PyLong_AsUnsignedLong(ident) == PyThread_get_thread_ident() : -1;
    Py_XDECREF(ident);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    return is_main;
}

/* Runs the handlers of signals that came; 1 if one raised, and its exception stays set. */
int edge_hear(void *context)
{
    edge_listener *l = context;
    if (l->deaf) {
        return 0;
    }
    PyEval_RestoreThread(l->thread);
    int is_main = is_main_thread(), raised = is_main < 0 || PyErr_CheckSignals() < 0;
    l->deaf = is_main == 0;
    l->thread = PyEval_SaveThread();
    return raised;
}

/* The exception that a handler raised says what became of the call; a handler's own type stays. */
static void explain_interrupt(void)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (type == PyExc_KeyboardInterrupt) {
        PyErr_SetString(type, tsad_error_detail());
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        return;
    }
    PyObject *done = PyObject_CallMethod(value, "add_note", "s", tsad_error_detail());
    PyErr_Clear(); /* no notes before 3.11 */
    Py_XDECREF(done);
    PyErr_Restore(type, value, trace);
}

int edge_raise_or_explain(tsad_status status)
{
    if (status == TSAD_INTERRUPTED) {
        explain_interrupt();
    } else if (status != TSAD_OK) {
        edge_raise(status);
    }
    return status == TSAD_OK ? 0 : -1;
}

/* ---- chunks -------------------------------------------------------------------------------- */

/* The streams of arrays that the device reads and writes, each once. */
static int find_streams(const chunk *c, uintptr_t *streams)
{
    const edge_view *views[] = {&c->obs, &c->noise, &c->out};
    int n = 0;
    for (int i = 0; i < 3; i++) {
        bool found = !views[i]->on_device || !views[i]->bytes;
        for (int j = 0; j < n; j++) {
            found |= streams[j] == views[i]->stream;
        }
        if (!found) {
            streams[n++] = views[i]->stream;
        }
    }
    return n;
}

static int run(edge_policy *self, chunk *c)
{
    if (!c->n_lanes) {
        return 0;
    }
    uintptr_t streams[3];
    size_t row = (size_t)self->info.horizon * (size_t)self->info.action_dim;
    edge_listener l = {0};
    tsad_interrupt interrupt = {edge_hear, &l};
    tsad_call call = {
        .lanes = self->lanes,
        .n_lanes = c->n_lanes,
        .obs = c->obs.data,
        .noise = c->noise_given ? c->noise.data : NULL,
        .noise_step = row * (size_t)c->n_lanes,
        .noise_lane = row,
        .initial = c->initial_given ? c->noise.data : NULL,
        .executed = c->executed_given ? self->executed : NULL,
        .actions = c->data,
        .whole_horizon = c->whole_horizon,
        .interrupt = &interrupt,
        .obs_there = c->obs.on_device,
        .noise_there = c->noise.on_device,
        .actions_there = c->out.on_device,
        .streams = streams,
        .n_streams = find_streams(c, streams),
        .bare = c->drop_axis,
    };
    /* what the caller does next with `out` is on a stream that is known to come after it */
    call.deferred = call.actions_there && c->out.stream_is_known;
    c->deferred = call.deferred;
    l.thread = PyEval_SaveThread(); /* leaves the GIL */
    EDGE_MARK(begin);
    tsad_status status = tsad_policy_check(self->policy, &call);
    if (status == TSAD_OK) {
        draw(self, &call);
        status = tsad_policy_step(self->policy, &call);
    }
    EDGE_MARK(end);
    PyEval_RestoreThread(l.thread);
    return edge_raise_or_explain(status);
}

PyObject *edge_policy_call(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"obs", "out", "noise", "lanes", "return_horizon", "executed", NULL};
    edge_policy *self = (edge_policy *)object;
    PyObject *obs, *out = Py_None, *noise = Py_None, *lanes = Py_None, *executed = Py_None;
    chunk c = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOOpO:policy", names, &obs, &out, &noise,
                                     &lanes, &c.whole_horizon, &executed) ||
        edge_enter(self) < 0) {
        return NULL;
    }
    c.n_lanes = edge_parse_lanes(self, lanes);
    if (c.n_lanes < 0 || borrow_obs(self, &c, obs) < 0 || place_actions(self, &c, out) < 0 ||
        borrow_noise(self, &c, noise) < 0 || read_executed(self, &c, executed) < 0 ||
        edge_expect_finite("obs", &c.obs) < 0 || run(self, &c) < 0) {
        Py_CLEAR(c.actions);
    } else if (c.deferred) {
        keep(self, &c);
    }
    edge_leave(self);
    return chunk_end(&c);
}

/* ---- the network alone -------------------------------------------------------------------- */

static int borrow_samples(edge_policy *self, PyObject *sample, PyObject *obs, chunk *c)
{
    const tsad_model_info *info = &self->info;
    int64_t shape[3] = {-1, info->horizon, info->action_dim};
    if (edge_borrow_there(self, sample, "sample", false, &c->noise) < 0 ||
        edge_expect_shape("sample", &c->noise, 3, shape) < 0) {
        return -1;
    }
    if (c->noise.shape[0] > 1 << 20) {
        return edge_raise_shape("sample", &c->noise, 3, shape, "n is 0 to 1048576");
    }
    c->n_lanes = (int)c->noise.shape[0];
    int64_t obs_shape[3] = {c->n_lanes, info->n_obs_steps, info->obs_dim};
    if (borrow_numbers(self, c, obs, false) < 0 ||
        edge_expect_shape("obs", &c->obs, 3, obs_shape) < 0 ||
        edge_expect_finite("sample", &c->noise) < 0 || edge_expect_finite("obs", &c->obs) < 0) {
        return -1;
    }
    void *data;
    c->library = c->obs.on_device ? NULL : edge_library_of(c->like);
    c->actions = edge_new_array(EDGE_FLOAT32, 3, c->noise.shape, &data);
    c->data = c->actions ? data : NULL;
    return c->actions ? 0 : -1;
}

PyObject *edge_policy_predict_noise(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sample", "step", "obs", NULL};
    edge_policy *self = (edge_policy *)object;
    PyObject *sample, *obs;
    int step;
    chunk c = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OiO:predict_noise", names, &sample, &step,
                                     &obs) ||
        edge_enter(self) < 0) {
        return NULL;
    }
    if (borrow_samples(self, sample, obs, &c) < 0) {
        Py_CLEAR(c.actions);
    } else {
        uintptr_t streams[3];
        edge_listener l = {0};
        tsad_interrupt interrupt = {edge_hear, &l};
        tsad_call call = {.n_lanes = c.n_lanes,
                          .obs = c.obs.data,
                          .initial = c.noise.data,
                          .actions = c.data,
                          .interrupt = &interrupt,
                          .obs_there = c.obs.on_device,
                          .noise_there = c.noise.on_device,
                          .streams = streams,
                          .n_streams = find_streams(&c, streams)};
        l.thread = PyEval_SaveThread();
        tsad_status status = tsad_policy_predict_noise(self->policy, &call, step);
        PyEval_RestoreThread(l.thread);
        if (edge_raise_or_explain(status) < 0) {
            Py_CLEAR(c.actions);
        }
    }
    edge_leave(self);
    return chunk_end(&c);
}

PyObject *edge_policy_pruner_scores(PyObject *object, PyObject *obs)
{
    edge_policy *self = (edge_policy *)object;
    const tsad_model_info *info = &self->info;
    int64_t obs_shape[2] = {info->n_obs_steps, info->obs_dim};
    int64_t shape[3] = {info->n_steps, info->n_blocks, 4};
    chunk c = {0};
    void *data;
    if (edge_enter(self) < 0) {
        return NULL;
    }
    if (edge_borrow(self->state, obs, "obs", EDGE_FLOAT32, false, &c.obs) == 0 &&
        edge_expect_shape("obs", &c.obs, 2, obs_shape) == 0 &&
        edge_expect_finite("obs", &c.obs) == 0 &&
        (c.actions = edge_new_array(EDGE_FLOAT32, 3, shape, &data))) {
        tsad_status status = tsad_policy_pruner_scores(self->policy, c.obs.data, data);
        if (status != TSAD_OK) {
            edge_raise(status);
            Py_CLEAR(c.actions);
        }
    }
    edge_leave(self);
    return chunk_end(&c);
}
