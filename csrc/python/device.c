/* device.c: arrays in the memory of the device that a policy runs on. They are borrowed like
 * others, and the device reads and writes them itself.
 */
#include "array.h"

#include "dlpack.h"

/* The stream that torch's current work is on; the default one of all libraries otherwise. */
static int find_stream(PyObject *object, long id, edge_view *view)
{
    enum { DEFAULT = 1 }; /* DLPack's and CUDA's number for it */
    view->stream = DEFAULT;
    if (!edge_is_of(object, "torch")) {
        return 0;
    }
    PyObject *torch = PyImport_ImportModule("torch");
    PyObject *cuda = torch ? PyObject_GetAttrString(torch, "cuda") : NULL;
    PyObject *stream = cuda ? PyObject_CallMethod(cuda, "current_stream", "l", id) : NULL;
    PyObject *number = stream ? PyObject_GetAttrString(stream, "cuda_stream") : NULL;
    size_t handle = number ? PyLong_AsSize_t(number) : 0;
    Py_XDECREF(number);
    Py_XDECREF(stream);
    Py_XDECREF(cuda);
    Py_XDECREF(torch);
    if (PyErr_Occurred()) {
        return -1;
    }
    view->stream = handle ? handle : DEFAULT; /* torch calls the default one 0 */
    view->stream_is_known = true;
    return 0;
}

int edge_borrow_there(edge_policy *self, PyObject *object, const char *name, bool writable,
                      edge_view *view)
{
    const edge_device device = {.is_there = tsad_policy_owns(self->policy, DLPACK_CUDA, 0),
                                .type = DLPACK_CUDA,
                                .find_stream = find_stream};
    return edge_borrow_on(self->state, object, name, EDGE_FLOAT32, writable,
                          device.is_there ? &device : NULL, view);
}
