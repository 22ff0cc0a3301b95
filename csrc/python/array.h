/* array.h: what the files that borrow arrays share: array.c (NumPy's door), dlpack.c (everybody
 * else's), refuse.c (the errors).
 */
#pragma once

#include "edge.h"

typedef struct edge_dtype_facts {
    const char *name;
    char kind;         /* NumPy's */
    int code;          /* DLPack's; -1: any */
    unsigned int size; /* bytes */
} edge_dtype_facts;

extern const edge_dtype_facts edge_dtypes[]; /* by edge_dtype */

/* A device whose memory may be borrowed beside the host's: number 0 of its type. */
typedef struct edge_device {
    bool is_there;
    int type;
    int (*find_stream)(PyObject *object, long id, edge_view *view); /* the caller's; -1 on error */
} edge_device;

/* edge_borrow, also from this device (NULL: none). */
int edge_borrow_on(edge_state *state, PyObject *object, const char *name, edge_dtype dtype,
                   bool writable, const edge_device *device, edge_view *view);
/* Borrow through __dlpack__. */
int edge_borrow_dlpack(edge_state *state, PyObject *object, const char *name, edge_dtype dtype,
                       bool writable, const edge_device *device, edge_view *view);

/* Is the object's type, or a base of it, defined in this package ("torch")? */
bool edge_is_of(PyObject *object, const char *package);

/* All of these return -1. The first raises with the exception that is set now as its cause. */
int edge_raise_from(PyObject *type, const char *format, ...);
int edge_refuse_type(PyObject *object, const char *name, edge_dtype dtype);
int edge_refuse_dtype(PyObject *object, const char *name, edge_dtype dtype, bool writable,
                      const char *got);
int edge_refuse_strides(PyObject *object, const char *name, PyObject *strides, const char *unit,
                        bool writable);
int edge_refuse_read_only(const char *name);
int edge_refuse_rank(const char *name, int n_dims);
int edge_refuse_alignment(PyObject *object, const char *name);
