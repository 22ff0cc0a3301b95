/* plugin.c: loading a backend's library. */
#include "edge.h"

#include <dlfcn.h>

PyObject *edge_load_backend(PyObject *module, PyObject *path)
{
    PyObject *bytes;
    const char *device = "", *absent = NULL;
    (void)module;
    if (!PyUnicode_FSConverter(path, &bytes)) {
        return NULL;
    }
    /* never closed: models may be of it */
    void *library = dlopen(PyBytes_AsString(bytes), RTLD_NOW | RTLD_LOCAL);
    void *plugin = library ? dlsym(library, "tsad_plugin") : NULL;
    Py_DECREF(bytes);
    if (!plugin) {
        PyErr_Format(PyExc_ImportError, "%S: %s", path, dlerror());
        return NULL;
    }
    if (tsad_backend_attach(plugin, &device, &absent) != TSAD_OK) {
        PyErr_Format(PyExc_ImportError, "%S: %s; build it again", path, tsad_error_detail());
        return NULL;
    }
    return Py_BuildValue("(sz)", device, absent);
}
