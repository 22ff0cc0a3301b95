/* policy_state.c: what changes between chunks: resets, streams, plans; and what the last chunk did.
 * A refused call changes nothing, even where it names many lanes.
 */
#include "edge.h"

/* ---- reset ------------------------------------------------------------------------------- */

/* A new reference to a non-negative int of any size; NULL on error. */
static PyObject *read_seed(PyObject *object, const char *name)
{
    PyObject *index = PyBool_Check(object) ? NULL : PyNumber_Index(object);
    if (!index) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError,
                     "%s: expected an int, or one int per lane, got %R; pass an int", name, object);
        return NULL;
    }
    PyObject *zero = PyLong_FromLong(0);
    int negative = zero ? PyObject_RichCompareBool(index, zero, Py_LT) : -1;
    Py_XDECREF(zero);
    if (negative != 0) {
        if (negative > 0) {
            PyErr_Format(PyExc_ValueError, "%s: expected 0 or more, got %S; use abs(seed)", name,
                         index);
        }
        Py_CLEAR(index);
    }
    return index;
}

/* New streams for the n lanes listed in self->lanes. */
static int open_streams(edge_policy *self, int n, PyObject *seed, edge_stream *streams)
{
    PyObject *plain;
    int is_list = edge_as_list(seed, "seed", &plain), status = is_list < 0 ? -1 : 0;
    if (is_list > 0 && PyList_Size(plain) != n) {
        PyErr_Format(PyExc_ValueError,
                     "seed: expected one seed per lane, %d, got %zd; pass an int to seed all lanes "
                     "from one",
                     n, PyList_Size(plain));
        status = -1;
    }
    if (is_list == 0 && n == 0) { /* is looked at, even if it seeds no lane */
        PyObject *number = read_seed(plain, "seed");
        status = number ? 0 : -1;
        Py_XDECREF(number);
    }
    for (int i = 0; i < n && status == 0; i++) {
        char name[48];
        PyOS_snprintf(name, sizeof name, is_list ? "seed[%d]" : "seed", i);
        PyObject *number = read_seed(is_list ? PyList_GetItem(plain, i) : plain, name);
        status = number ? edge_stream_open(self->state, number, is_list ? -1 : self->lanes[i],
                                           &streams[i])
                        : -1;
        Py_XDECREF(number);
    }
    Py_XDECREF(plain);
    return status;
}

static int reset(edge_policy *self, PyObject *lanes, PyObject *seed)
{
    int n = edge_parse_lanes(self, lanes);
    if (n < 0) {
        return -1;
    }
    edge_stream *streams = NULL;
    if (seed != Py_None) {
        streams = PyMem_Calloc((size_t)n + 1, sizeof *streams); /* n may be 0 */
        int status = streams ? open_streams(self, n, seed, streams) : (PyErr_NoMemory(), -1);
        for (int i = 0; i < n && streams; i++) {
            if (status == 0) {
                edge_stream old = self->streams[self->lanes[i]];
                self->streams[self->lanes[i]] = streams[i];
                streams[i] = old;
            }
            edge_stream_close(&streams[i]);
        }
        PyMem_Free(streams);
        if (status < 0) {
            return -1;
        }
    }
    for (int i = 0; i < n; i++) {
        tsad_policy_reset(self->policy, self->lanes[i]);
        self->ran[self->lanes[i]] = 0;
    }
    return 0;
}

PyObject *edge_policy_reset(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"lanes", "seed", NULL};
    edge_policy *self = (edge_policy *)object;
    PyObject *lanes = Py_None, *seed = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO:reset", names, &lanes, &seed) ||
        edge_enter(self) < 0) {
        return NULL;
    }
    int status = reset(self, lanes, seed);
    edge_leave(self);
    return status < 0 ? NULL : Py_NewRef(Py_None);
}

/* ---- plans ------------------------------------------------------------------------------- */

/* `sources` and `first` of one lane, borrowed and of the right shape. */
static int borrow_plan(edge_policy *self, PyObject *sources, PyObject *first, edge_view view[2])
{
    int64_t shape[2] = {self->info.n_steps, self->info.n_blocks};
    const char *names[2] = {"plan", "first"};
    PyObject *arrays[2] = {sources, first};
    for (int i = 0; i < 2; i++) {
        if (edge_borrow(self->state, arrays[i], names[i], EDGE_UINT8, false, &view[i]) < 0) {
            return -1;
        }
        if (!edge_has_shape(&view[i], 2, shape)) {
            return edge_raise_shape(names[i], &view[i], 2, shape,
                                    "these are (num_inference_steps, blocks) of this policy; make "
                                    "a plan for it");
        }
    }
    return 0;
}

/* Would the core take this plan for this lane now? In the middle of an episode a plan may read
 * rollout slots that are not filled. `scratch` has room for K * B ages. */
static bool is_acceptable(const edge_policy *self, int lane, const edge_view view[2],
                          uint32_t *scratch)
{
    const tsad_model_info *info = &self->info;
    int K = info->n_steps, B = info->n_blocks;
    const uint8_t *sources = view[0].data, *first = view[1].data;
    uint8_t *filled = (uint8_t *)scratch;
    for (int i = 0; i < K * B; i++) {
        filled[i] = first[i] == TSAD_COMPUTE;
    }
    if (tsad_plan_resolve(first, K, B, info->block_type, NULL, NULL).reason ||
        tsad_plan_resolve(sources, K, B, info->block_type, filled, NULL).reason) {
        return false;
    }
    if (!self->ran[lane]) {
        return true;
    }
    tsad_policy_get_ages(self->policy, lane, scratch);
    for (int i = 0; i < K * B; i++) { /* in place: byte i is written after word i is read */
        filled[i] = scratch[i] != 0;
    }
    return !tsad_plan_resolve(sources, K, B, info->block_type, filled, NULL).reason;
}

static int set_plan(edge_policy *self, int lane, const edge_view view[2])
{
    tsad_status status = tsad_policy_set_plan(self->policy, lane, view[0].data, view[1].data);
    if (status == TSAD_PLAN && self->n_lanes > 1) {
        PyErr_Format(PyExc_ValueError, "%s (lane %d)", tsad_error_detail(), lane);
    } else if (status != TSAD_OK) {
        edge_raise(status);
    }
    return status == TSAD_OK ? 0 : -1;
}

PyObject *edge_policy_set_plan(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"lane", "sources", "first", NULL};
    edge_policy *self = (edge_policy *)object;
    PyObject *lane, *sources, *first;
    edge_view view[2] = {0};
    int status = -1, index;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:_set_plan", names, &lane, &sources,
                                     &first) ||
        edge_enter(self) < 0) {
        return NULL;
    }
    index = edge_parse_lane(self, lane);
    if (index >= 0 && borrow_plan(self, sources, first, view) == 0) {
        status = set_plan(self, index, view);
    }
    edge_leave(self);
    edge_return(&view[0]);
    edge_return(&view[1]);
    return status < 0 ? NULL : Py_NewRef(Py_None);
}

/* All lanes are checked before any is set. */
static int set_plans(edge_policy *self, PyObject *list, edge_view (*view)[2], uint32_t *scratch)
{
    for (int i = 0; i < self->n_lanes; i++) {
        PyObject *pair = PyList_GetItem(list, i);
        if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2) {
            PyErr_SetString(PyExc_TypeError, "plans: expected (sources, first) per lane; pass "
                                             "tuples of two arrays");
            return -1;
        }
        if (borrow_plan(self, PyTuple_GetItem(pair, 0), PyTuple_GetItem(pair, 1), view[i]) < 0) {
            return -1;
        }
        if (!is_acceptable(self, i, view[i], scratch)) {
            return set_plan(self, i, view[i]); /* refuses, and says why */
        }
    }
    for (int i = 0; i < self->n_lanes; i++) {
        if (set_plan(self, i, view[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

PyObject *edge_policy_set_plans(PyObject *object, PyObject *plans)
{
    edge_policy *self = (edge_policy *)object;
    PyObject *list = PySequence_List(plans);
    if (!list || edge_enter(self) < 0) {
        Py_XDECREF(list);
        return NULL;
    }
    int status = -1;
    size_t cells = (size_t)self->info.n_steps * (size_t)self->info.n_blocks;
    edge_view(*view)[2] = PyMem_Calloc((size_t)self->n_lanes, sizeof *view);
    uint32_t *scratch = PyMem_Calloc(cells, sizeof *scratch);
    if (!view || !scratch) {
        PyErr_NoMemory();
    } else if (PyList_Size(list) != self->n_lanes) {
        PyErr_Format(PyExc_ValueError,
                     "plan: expected one plan per lane, %d, got %zd; pass a "
                     "single plan for all lanes",
                     self->n_lanes, PyList_Size(list));
    } else {
        status = set_plans(self, list, view, scratch);
    }
    edge_leave(self);
    for (int i = 0; view && i < self->n_lanes; i++) {
        edge_return(&view[i][0]);
        edge_return(&view[i][1]);
    }
    PyMem_Free(view);
    PyMem_Free(scratch);
    Py_DECREF(list);
    return status < 0 ? NULL : Py_NewRef(Py_None);
}

PyObject *edge_policy_set_pruner(PyObject *object, PyObject *sparsity)
{
    edge_policy *self = (edge_policy *)object;
    double value = PyFloat_AsDouble(sparsity);
    if ((value == -1 && PyErr_Occurred()) || edge_enter(self) < 0) {
        return NULL;
    }
    tsad_status status = tsad_policy_set_pruner(self->policy, value);
    edge_leave(self);
    return status == TSAD_OK ? Py_NewRef(Py_None) : edge_raise(status);
}

/* ---- what the last chunk did ---------------------------------------------------------------- */

/* (K, B) of a lane: its plan as uint8, or the ages of its rollout slots as uint32 */
static PyObject *cells(PyObject *object, PyObject *lane, edge_dtype dtype)
{
    edge_policy *self = (edge_policy *)object;
    int64_t shape[2] = {self->info.n_steps, self->info.n_blocks};
    PyObject *array = NULL;
    void *data;
    if (edge_enter(self) < 0) {
        return NULL;
    }
    int index = edge_parse_lane(self, lane);
    if (index >= 0 && (array = edge_new_array(dtype, 2, shape, &data))) {
        if (dtype == EDGE_UINT8) {
            tsad_policy_get_plan(self->policy, index, data);
        } else {
            tsad_policy_get_ages(self->policy, index, data);
        }
    }
    edge_leave(self);
    return array;
}

PyObject *edge_policy_get_plan(PyObject *object, PyObject *lane)
{
    return cells(object, lane, EDGE_UINT8);
}

PyObject *edge_policy_ages(PyObject *object, PyObject *lane)
{
    return cells(object, lane, EDGE_UINT32);
}

PyObject *edge_policy_stats(PyObject *object, PyObject *lane)
{
    edge_policy *self = (edge_policy *)object;
    if (edge_enter(self) < 0) {
        return NULL;
    }
    tsad_lane_stats stats = {0};
    int index = edge_parse_lane(self, lane), ran = 0;
    if (index >= 0) {
        stats = tsad_policy_get_stats(self->policy, index);
        ran = self->ran[index];
    }
    edge_leave(self);
    if (index < 0) {
        return NULL;
    }
    const int32_t *cells = stats.cells;
    return Py_BuildValue("{s:K,s:L,s:(iiiii),s:i,s:I}", "chunks",
                         ran ? (unsigned long long)stats.chunks : 0ull, "cost",
                         (long long)stats.cost, "cells", cells[0], cells[1], cells[2], cells[3],
                         cells[4], "forced", stats.forced, "max_age", stats.max_age);
}

PyObject *edge_policy_timings(PyObject *object, PyObject *unused)
{
    edge_policy *self = (edge_policy *)object;
    int64_t ns[TSAD_N_TIMERS];
    (void)unused;
    if (edge_enter(self) < 0) {
        return NULL;
    }
    tsad_policy_get_timings(self->policy, ns);
    edge_leave(self);
    return Py_BuildValue("{s:d,s:d,s:d,s:d,s:d}", "encode", (double)ns[TSAD_ENCODE] * 1e-6, "prune",
                         (double)ns[TSAD_PRUNE] * 1e-6, "plan", (double)ns[TSAD_PLAN_STAGE] * 1e-6,
                         "denoise", (double)ns[TSAD_DENOISE] * 1e-6, "total",
                         (double)ns[TSAD_TOTAL] * 1e-6);
}
