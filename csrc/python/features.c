/* features.c: an observation as a dict of arrays by name, put side by side in the order of the
 * policy's features. They are copied: the core reads one array.
 */
#include "edge.h"

#include <string.h>

int edge_read_features(edge_policy *self, PyObject *features)
{
    if (features == Py_None) {
        return 0;
    }
    Py_ssize_t n = PyTuple_Check(features) ? PyTuple_Size(features) : 0;
    int64_t total = 0;
    self->features = n ? PyMem_Calloc((size_t)n, sizeof(edge_feature)) : NULL;
    if (n && !self->features) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PyTuple_GetItem(features, i), *name;
        edge_feature *f = &self->features[i];
        if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "Ui:features", &name, &f->dim)) {
            break;
        }
        f->name = Py_NewRef(name);
        f->label = PyUnicode_FromFormat("obs[%R]", name);
        if (!f->label) {
            return -1;
        }
        self->n_features++;
        total += f->dim > 0 ? f->dim : INT32_MAX;
    }
    if (PyErr_Occurred() || !n || self->n_features != n || total != self->info.obs_dim) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError,
                     "features: expected a tuple of (name, dim) whose dims add up to obs_dim, %d, "
                     "got %R; None is none",
                     self->info.obs_dim, features);
        return -1;
    }
    return 0;
}

void edge_free_features(edge_policy *self)
{
    for (int i = 0; self->features && i < self->n_features; i++) {
        Py_CLEAR(self->features[i].name);
        Py_CLEAR(self->features[i].label);
    }
    PyMem_Free(self->features);
    self->features = NULL;
    self->n_features = 0;
}

/* ---- keys -------------------------------------------------------------------------------- */

/* "did you mean 'x'?", or that the key is to be left out; a new reference */
static PyObject *advise(PyObject *unknown, PyObject *missing)
{
    PyObject *near = NULL, *advice = NULL;
    if (PyUnicode_Check(unknown)) {
        PyObject *difflib = PyImport_ImportModule("difflib");
        near = difflib ? PyObject_CallMethod(difflib, "get_close_matches", "OOid", unknown, missing,
                                             1, 0.4)
                       : NULL;
        Py_XDECREF(difflib);
        if (!near) {
            return NULL;
        }
    }
    advice = near && PyList_Size(near)
                 ? PyUnicode_FromFormat("did you mean %R?", PyList_GetItem(near, 0))
                 : PyUnicode_FromString("leave it out");
    Py_XDECREF(near);
    return advice;
}

static int refuse_keys(edge_policy *self, PyObject *obs)
{
    PyObject *names = PyList_New(0), *missing = PyList_New(0), *given = PyDict_Keys(obs);
    PyObject *advice = NULL;
    int status = names && missing && given ? 0 : -1;
    for (int i = 0; status == 0 && i < self->n_features; i++) {
        PyObject *name = self->features[i].name;
        int there = PySequence_Contains(given, name);
        status = there < 0 || PyList_Append(names, name) < 0 ||
                         (!there && PyList_Append(missing, name) < 0)
                     ? -1
                     : 0;
    }
    for (Py_ssize_t i = 0; status == 0 && !advice && i < PyList_Size(given); i++) {
        PyObject *key = PyList_GetItem(given, i);
        int known = PySequence_Contains(names, key);
        status = known < 0 ? -1 : 0;
        if (known == 0 && (advice = advise(key, missing))) {
            PyErr_Format(PyExc_ValueError, "obs: expected the keys %R, got an unknown one, %R; %U",
                         names, key, advice);
        }
        status = PyErr_Occurred() ? -1 : status;
    }
    if (status == 0 && PyList_Size(missing)) {
        PyErr_Format(PyExc_ValueError,
                     "obs: expected the keys %R, got no %R; add it, float32 with its numbers on "
                     "the last axis",
                     names, PyList_GetItem(missing, 0));
    }
    Py_XDECREF(names);
    Py_XDECREF(missing);
    Py_XDECREF(given);
    Py_XDECREF(advice);
    return -1;
}

/* 0: the keys are those of the features */
static int check_keys(edge_policy *self, PyObject *obs)
{
    if (!self->n_features) {
        PyErr_SetString(PyExc_TypeError,
                        "obs: expected an array, as the numbers of this policy's observations have "
                        "no names, got a dict; put them side by side, or load a LeRobot folder");
        return -1;
    }
    int found = 0;
    for (int i = 0; i < self->n_features; i++) {
        PyObject *value = PyDict_GetItemWithError(obs, self->features[i].name);
        if (!value && PyErr_Occurred()) {
            return -1;
        }
        found += value != NULL;
    }
    return found == self->n_features && PyDict_Size(obs) == found ? 0 : refuse_keys(self, obs);
}

/* ---- values ------------------------------------------------------------------------------ */

typedef struct joining {
    int n_rows, n_axes; /* of the observations; 0 axes: not known yet */
    bool bare_fits;     /* the axis of lanes may be missing */
    int at;             /* numbers of a row that are there */
    float *data;
    PyObject *array;
} joining;

/* One feature to its columns. */
static int place(edge_policy *self, const edge_feature *f, const edge_view *view, const char *label,
                 joining *j)
{
    int64_t shape[3] = {j->n_rows, self->info.n_obs_steps, f->dim};
    int64_t whole[3] = {j->n_rows, self->info.n_obs_steps, self->info.obs_dim};
    if (!j->n_axes) { /* the first one decides for all */
        j->n_axes = j->bare_fits && edge_has_shape(view, 2, shape + 1) ? 2 : 3;
    }
    int skip = 3 - j->n_axes;
    if (!edge_has_shape(view, j->n_axes, shape + skip)) {
        return edge_raise_shape(label, view, j->n_axes, shape + skip,
                                skip ? "these are (n_obs_steps, its numbers), as the first key has"
                                     : "these are (lanes, n_obs_steps, its numbers)");
    }
    if (edge_expect_finite(label, view) < 0) {
        return -1;
    }
    if (!j->array) {
        void *data;
        j->array = edge_new_array(EDGE_FLOAT32, j->n_axes, whole + skip, &data);
        if (!j->array) {
            return -1;
        }
        j->data = data;
    }
    size_t row = (size_t)self->info.obs_dim, n = (size_t)f->dim;
    const float *from = view->data;
    for (size_t i = 0; i < (size_t)j->n_rows * (size_t)self->info.n_obs_steps; i++) {
        memcpy(j->data + i * row + (size_t)j->at, from + i * n, n * sizeof(float));
    }
    j->at += f->dim;
    return 0;
}

PyObject *edge_side_by_side(edge_policy *self, PyObject *obs, int n_rows, bool bare_fits,
                            PyObject **like)
{
    joining j = {.n_rows = n_rows, .bare_fits = bare_fits};
    int status = check_keys(self, obs);
    for (int i = 0; status == 0 && i < self->n_features; i++) {
        const edge_feature *f = &self->features[i];
        const char *label = PyUnicode_AsUTF8AndSize(f->label, NULL);
        PyObject *value = PyDict_GetItemWithError(obs, f->name);
        edge_view view = {0};
        if (!label || !value) { /* lending a value may run anything, that changes the dict too */
            status = PyErr_Occurred() ? -1 : refuse_keys(self, obs);
            break;
        }
        Py_INCREF(value);
        status = edge_borrow(self->state, value, label, EDGE_FLOAT32, false, &view) < 0
                     ? -1
                     : place(self, f, &view, label, &j);
        edge_return(&view);
        if (like && status == 0 && i == 0) {
            *like = Py_NewRef(value);
        }
        Py_DECREF(value);
    }
    if (status < 0) {
        Py_CLEAR(j.array);
    }
    return j.array;
}

/* For who wants what a call made of the dict, after it. */
PyObject *edge_policy_side_by_side(PyObject *object, PyObject *args)
{
    edge_policy *self = (edge_policy *)object;
    PyObject *obs;
    int n_rows;
    if (!PyArg_ParseTuple(args, "O!i:_side_by_side", &PyDict_Type, &obs, &n_rows)) {
        return NULL;
    }
    return edge_side_by_side(self, obs, n_rows, self->n_lanes == 1 && n_rows == 1, NULL);
}
