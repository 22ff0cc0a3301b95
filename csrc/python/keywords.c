/* keywords.c: what constructors take by keyword: numbers, words, and tensors by name. */
#include "edge.h"

#include <string.h>

int edge_check_keywords(PyObject *dict, const char *const *known, size_t n, const char *where)
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
PyObject *edge_look_up(PyObject *dict, const char *name)
{
    PyObject *value = dict ? PyDict_GetItemString(dict, name) : NULL;
    return value == Py_None ? NULL : value;
}

int edge_missing(const char *who, const char *name)
{
    PyErr_Format(PyExc_TypeError, "%s: expected the keyword %s, got none; pass it", who, name);
    return -1;
}

/* required if fallback < 0 */
int edge_take_int(const char *who, PyObject *dict, const char *name, int fallback, int *out)
{
    PyObject *value = edge_look_up(dict, name);
    if (!value) {
        *out = fallback;
        return fallback < 0 ? edge_missing(who, name) : 0;
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
int edge_take_string(PyObject *dict, const char *name, const char *fallback, const char **out)
{
    PyObject *value = edge_look_up(dict, name);
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

/* ---- tensors ----------------------------------------------------------------------------- */

static int borrow_tensor(edge_state *state, edge_tensors *t, Py_ssize_t i, const char *dict_name)
{
    PyObject *item = PyList_GetItem(t->items, i);
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
    edge_view *view = &t->views[i];
    if (edge_borrow(state, value, shown, EDGE_FLOAT32, false, view) < 0) {
        return -1;
    }
    tsad_tensor *tensor = &t->list[i];
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

int edge_borrow_tensors(edge_state *state, PyObject *dict, const char *dict_name, edge_tensors *t)
{
    /* a list of its own keeps names and arrays alive, whatever happens to the dict */
    t->items = dict ? PyMapping_Items(dict) : NULL;
    if (!t->items) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a dict of name: float32 array, got %R; pass one", dict_name,
                     dict ? dict : Py_None);
        return -1;
    }
    Py_ssize_t n = PyList_Size(t->items);
    t->list = PyMem_Calloc((size_t)n + 1, sizeof(tsad_tensor));
    t->views = PyMem_Calloc((size_t)n + 1, sizeof(edge_view));
    if (!t->list || !t->views) {
        PyErr_NoMemory();
        return -1;
    }
    t->n = n;
    for (Py_ssize_t i = 0; i < n; i++) {
        if (borrow_tensor(state, t, i, dict_name) < 0) {
            return -1;
        }
    }
    return 0;
}

void edge_return_tensors(edge_tensors *t)
{
    for (Py_ssize_t i = 0; i < t->n; i++) {
        edge_return(&t->views[i]);
    }
    PyMem_Free(t->list);
    PyMem_Free(t->views);
    Py_XDECREF(t->items);
    *t = (edge_tensors){0};
}
