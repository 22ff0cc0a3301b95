/* noise.c: one numpy.random.PCG64 per lane, read through NumPy's C interface (bitgen_t), so that
 * noise can be drawn without the GIL and equals numpy.random.Generator's to the bit.
 */
#include "edge.h"

#include <numpy/random/distributions.h>

int edge_stream_open(edge_state *state, PyObject *seed, Py_ssize_t spawn, edge_stream *stream)
{
    PyObject *sequence = NULL, *capsule = NULL, *kwargs = NULL;
    PyObject *args = PyTuple_Pack(1, seed);
    int status = -1;
    stream->generator = NULL;
    kwargs = spawn < 0 ? PyDict_New() : Py_BuildValue("{s(n)}", "spawn_key", spawn);
    if (!args || !kwargs) {
        goto done;
    }
    sequence = PyObject_Call(state->seed_sequence, args, kwargs);
    if (!sequence) {
        goto done;
    }
    stream->generator = PyObject_CallFunctionObjArgs(state->pcg64, sequence, NULL);
    if (!stream->generator) {
        goto done;
    }
    capsule = PyObject_GetAttrString(stream->generator, "capsule");
    stream->bits = capsule ? PyCapsule_GetPointer(capsule, "BitGenerator") : NULL;
    if (!stream->bits) {
        Py_CLEAR(stream->generator);
        goto done;
    }
    status = 0;
done:
    Py_XDECREF(capsule);
    Py_XDECREF(sequence);
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    return status;
}

void edge_stream_close(edge_stream *stream)
{
    Py_CLEAR(stream->generator);
    stream->bits = NULL;
}

void edge_stream_normal(edge_stream *stream, size_t n, float *out)
{
    random_standard_normal_fill_f(stream->bits, (npy_intp)n, out);
}
