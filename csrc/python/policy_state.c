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

enum { SOURCES, FIRST, COLD, N_PLANS };

/* The plans of one lane, borrowed and of the right shapes. `cold` may be None. */
static int borrow_plan(edge_policy *self, PyObject *const objects[N_PLANS], edge_view *view,
                       tsad_lane_plan *plan)
{
    static const char *const names[N_PLANS] = {"plan", "first", "cold_plan"};
    const uint8_t **data[N_PLANS] = {&plan->sources, &plan->first, &plan->cold};
    for (int i = 0; i < N_PLANS; i++) {
        int64_t shape[2] = {i == COLD ? self->all_steps : self->info.n_steps, self->info.n_blocks};
        if (i == COLD && objects[i] == Py_None) {
            continue;
        }
        if (edge_borrow(self->state, objects[i], names[i], EDGE_UINT8, false, &view[i]) < 0) {
            return -1;
        }
        if (!edge_has_shape(&view[i], 2, shape)) {
            return edge_raise_shape(names[i], &view[i], 2, shape,
                                    "these are (num_inference_steps, blocks) of this policy; make "
                                    "a plan for it");
        }
        *data[i] = view[i].data;
    }
    return 0;
}

PyObject *edge_policy_set_plan(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"lane", "sources", "first", NULL};
    edge_policy *self = (edge_policy *)object;
    PyObject *lane, *given[N_PLANS] = {NULL, NULL, Py_None}, *result = NULL;
    edge_view view[N_PLANS] = {0};
    tsad_lane_plan plan = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:_set_plan", names, &lane, &given[SOURCES],
                                     &given[FIRST]) ||
        edge_enter(self) < 0) {
        return NULL;
    }
    int index = edge_parse_lane(self, lane);
    if (index >= 0 && borrow_plan(self, given, view, &plan) == 0) {
        tsad_status status = tsad_policy_set_plans(self->policy, index, 1, &plan);
        result = status == TSAD_OK ? Py_NewRef(Py_None) : edge_raise(status);
    }
    edge_leave(self);
    for (int i = 0; i < N_PLANS; i++) {
        edge_return(&view[i]);
    }
    return result;
}

static int set_plans(edge_policy *self, PyObject *list, edge_view (*view)[N_PLANS],
                     tsad_lane_plan *plans)
{
    if (PyList_Size(list) != self->n_lanes) {
        PyErr_Format(PyExc_ValueError,
                     "plan: expected one plan per lane, %d, got %zd; pass a "
                     "single plan for all lanes",
                     self->n_lanes, PyList_Size(list));
        return -1;
    }
    for (int i = 0; i < self->n_lanes; i++) {
        PyObject *item = PyList_GetItem(list, i), *given[N_PLANS];
        if (!PyTuple_Check(item) || PyTuple_Size(item) < COLD || PyTuple_Size(item) > N_PLANS) {
            PyErr_SetString(PyExc_TypeError,
                            "plans: expected (sources, first) per lane, and with a "
                            "warm start (sources, first, cold); pass tuples of "
                            "arrays");
            return -1;
        }
        for (int j = 0; j < N_PLANS; j++) {
            given[j] = j < PyTuple_Size(item) ? PyTuple_GetItem(item, j) : Py_None;
        }
        if (borrow_plan(self, given, view[i], &plans[i]) < 0) {
            return -1;
        }
    }
    tsad_status status = tsad_policy_set_plans(self->policy, 0, self->n_lanes, plans);
    return status == TSAD_OK ? 0 : (edge_raise(status), -1);
}

PyObject *edge_policy_set_plans(PyObject *object, PyObject *plans)
{
    edge_policy *self = (edge_policy *)object;
    PyObject *list = PySequence_List(plans);
    if (!list || edge_enter(self) < 0) {
        Py_XDECREF(list);
        return NULL;
    }
    edge_view(*view)[N_PLANS] = PyMem_Calloc((size_t)self->n_lanes, sizeof *view);
    tsad_lane_plan *plan = PyMem_Calloc((size_t)self->n_lanes, sizeof *plan);
    int status = view && plan ? set_plans(self, list, view, plan) : (PyErr_NoMemory(), -1);
    edge_leave(self);
    for (int i = 0; view && i < self->n_lanes; i++) {
        for (int j = 0; j < N_PLANS; j++) {
            edge_return(&view[i][j]);
        }
    }
    PyMem_Free(view);
    PyMem_Free(plan);
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

PyObject *edge_policy_set_rule(PyObject *object, PyObject *args)
{
    edge_policy *self = (edge_policy *)object;
    tsad_rule rule;
    double *p = rule.polynomial;
    if (!PyArg_ParseTuple(args, "idi(ddddd)", &rule.blocks, &rule.threshold, &rule.most, &p[0],
                          &p[1], &p[2], &p[3], &p[4]) ||
        edge_enter(self) < 0) {
        return NULL;
    }
    tsad_status status = tsad_policy_set_rule(self->policy, &rule);
    edge_leave(self);
    return status == TSAD_OK ? Py_NewRef(Py_None) : edge_raise(status);
}

PyObject *edge_policy_set_audit(PyObject *object, PyObject *on)
{
    edge_policy *self = (edge_policy *)object;
    int value = PyObject_IsTrue(on);
    if (value < 0 || edge_enter(self) < 0) {
        return NULL;
    }
    tsad_status status = tsad_policy_set_audit(self->policy, value);
    edge_leave(self);
    return status == TSAD_OK ? Py_NewRef(Py_None) : edge_raise(status);
}

/* ---- what the last chunk did ---------------------------------------------------------------- */

PyObject *edge_policy_audit(PyObject *object, PyObject *lane)
{
    edge_policy *self = (edge_policy *)object;
    double sums[4] = {0};
    if (edge_enter(self) < 0) {
        return NULL;
    }
    int index = edge_parse_lane(self, lane);
    if (index >= 0) {
        tsad_policy_get_audit(self->policy, index, sums);
    }
    edge_leave(self);
    return index < 0 ? NULL : Py_BuildValue("(dddd)", sums[0], sums[1], sums[2], sums[3]);
}

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
    int index = edge_parse_lane(self, lane);
    if (index >= 0) {
        stats = tsad_policy_get_stats(self->policy, index);
    }
    edge_leave(self);
    if (index < 0) {
        return NULL;
    }
    const int32_t *cells = stats.cells;
    return Py_BuildValue("{s:K,s:L,s:L,s:(iiiii),s:i,s:I}", "chunks",
                         (unsigned long long)stats.chunks, "cost", (long long)stats.cost, "spent",
                         (long long)stats.spent, "cells", cells[0], cells[1], cells[2], cells[3],
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
