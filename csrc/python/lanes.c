/* lanes.c: which lanes somebody means, in Python's own numbers or any library's: numbers list
 * lanes, bools mark them, and an empty list names none.
 */
#include <string.h>

#include "array.h"

static int refuse_kind(const char *name, const char *expected, PyObject *got, const char *fix)
{
    PyObject *type = edge_type_name(got);
    if (type) {
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %U; %s", name, expected, type, fix);
        Py_DECREF(type);
    }
    return -1;
}

/* ---- any library's numbers ----------------------------------------------------------------- */

static PyObject *to_list(PyObject *object)
{
    if (PyObject_HasAttrString(object, "tolist")) { /* NumPy, torch, JAX, pandas, array.array */
        return PyObject_CallMethod(object, "tolist", NULL);
    }
    if (PyObject_HasAttrString(object, "__array__")) { /* TensorFlow */
        PyObject *array = PyObject_CallMethod(object, "__array__", NULL);
        PyObject *list = array ? PyObject_CallMethod(array, "tolist", NULL) : NULL;
        Py_XDECREF(array);
        return list;
    }
    return Py_NewRef(object);
}

PyObject *edge_as_python(PyObject *object, const char *name)
{
    if (PyLong_Check(object) || PyList_Check(object) || PyTuple_Check(object) ||
        PyType_Check(object)) {
        return Py_NewRef(object);
    }
    PyObject *result = to_list(object);
    if (!result && PyErr_ExceptionMatches(PyExc_Exception) &&
        !PyErr_ExceptionMatches(PyExc_MemoryError)) {
        PyObject *type = (PyObject *)Py_TYPE(object);
        edge_raise_from(PyExc_TypeError,
                        "%s: expected ints, got %R, whose numbers can't be read; pass a list of "
                        "ints",
                        name, type);
    }
    return result;
}

int edge_as_list(PyObject *object, const char *name, PyObject **out)
{
    PyObject *plain = *out = edge_as_python(object, name);
    if (!plain) {
        return -1;
    }
    if (PyLong_Check(plain) || PyUnicode_Check(plain) || PyBytes_Check(plain)) {
        return 0;
    }
    if (PyAnySet_Check(plain) || PyDict_Check(plain)) {
        refuse_kind(name, "a sequence, which has an order", plain, "use sorted(...)");
        Py_CLEAR(*out);
        return -1;
    }
    PyObject *list = PyObject_Size(plain) < 0 ? NULL : PySequence_List(plain);
    PyErr_Clear();
    if (!list) {
        return 0;
    }
    *out = list;
    Py_DECREF(plain);
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        char place[48];
        PyOS_snprintf(place, sizeof place, "%.24s[%zd]", name, i);
        PyObject *item = edge_as_python(PyList_GetItem(list, i), place);
        if (!item || PyList_SetItem(list, i, item) < 0) {
            Py_CLEAR(*out);
            return -1;
        }
    }
    return 1;
}

/* ---- lanes --------------------------------------------------------------------------------- */

/* One lane number; `name` is what to call it in an error. */
static int read_lane(const edge_policy *self, PyObject *object, const char *name)
{
    if (PyBool_Check(object)) {
        return refuse_kind(name, "a lane number", object,
                           "a mask has one bool per lane and nothing else");
    }
    PyObject *index = PyNumber_Index(object);
    if (!index) {
        PyErr_Clear();
        return refuse_kind(name, "a lane number", object, "pass an int");
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

int edge_parse_lane(edge_policy *self, PyObject *lane)
{
    PyObject *plain = edge_as_python(lane, "lane");
    int number = plain ? read_lane(self, plain, "lane") : -1;
    Py_XDECREF(plain);
    return number;
}

static int read_mask(edge_policy *self, PyObject *list)
{
    Py_ssize_t n = PyList_Size(list);
    int count = 0;
    if (n != self->n_lanes) {
        PyErr_Format(PyExc_ValueError,
                     "lanes: expected a mask of %d bools, one per lane, got %zd; pass one of all "
                     "lanes, or lane numbers",
                     self->n_lanes, n);
        return -1;
    }
    for (int i = 0; i < self->n_lanes; i++) {
        if (PyList_GetItem(list, i) == Py_True) {
            self->lanes[count++] = i;
        }
    }
    return count;
}

static int read_numbers(edge_policy *self, PyObject *list)
{
    Py_ssize_t n = PyList_Size(list);
    if (n > self->n_lanes) {
        PyErr_Format(PyExc_ValueError,
                     "lanes: expected at most %d distinct lanes, got %zd; list each once",
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

/* An empty array of bools is a mask of too few lanes; an empty list names none. */
static bool is_mask(PyObject *lanes, PyObject *list)
{
    Py_ssize_t n = PyList_Size(list), bools = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        bools += PyBool_Check(PyList_GetItem(list, i));
    }
    if (n) {
        return bools == n;
    }
    PyObject *dtype = PyObject_GetAttrString(lanes, "dtype");
    PyObject *text = dtype ? PyObject_Str(dtype) : NULL;
    const char *name = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
    bool yes = name && strstr(name, "bool");
    Py_XDECREF(text);
    Py_XDECREF(dtype);
    PyErr_Clear();
    return yes;
}

int edge_parse_lanes(edge_policy *self, PyObject *lanes)
{
    if (lanes == Py_None) {
        for (int i = 0; i < self->n_lanes; i++) {
            self->lanes[i] = i;
        }
        return self->n_lanes;
    }
    PyObject *plain;
    int n = edge_as_list(lanes, "lanes", &plain);
    if (n > 0) {
        n = is_mask(lanes, plain) ? read_mask(self, plain) : read_numbers(self, plain);
    } else if (n == 0) {
        self->lanes[0] = read_lane(self, plain, "lanes");
        n = self->lanes[0] < 0 ? -1 : 1;
    }
    Py_XDECREF(plain);
    return n;
}

PyObject *edge_policy_lanes(PyObject *object, PyObject *lanes)
{
    edge_policy *self = (edge_policy *)object;
    if (edge_enter(self) < 0) {
        return NULL;
    }
    int n = edge_parse_lanes(self, lanes);
    PyObject *list = n < 0 ? NULL : PyList_New(n);
    for (int i = 0; list && i < n; i++) {
        PyObject *lane = PyLong_FromLong(self->lanes[i]);
        if (!lane || PyList_SetItem(list, i, lane) < 0) {
            Py_CLEAR(list);
        }
    }
    edge_leave(self);
    return list;
}
