/* edge.h: what the files of the Python edge share. The edge knows Python and nothing of diffusion:
 * it borrows arrays, checks them, leaves the GIL, calls the core, and turns statuses into
 * exceptions. Limited API 3.10; NumPy's headers are included by array.c and noise.c alone.
 */
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

#include "../tsad.h"

/* ---- module.c ---------------------------------------------------------------------------- */

typedef struct edge_state {
    PyTypeObject *model_type, *policy_type, *vision_type;
    PyObject *pcg64, *seed_sequence; /* numpy.random.PCG64, numpy.random.SeedSequence */
    PyObject *max_version;           /* {"max_version": (1, 0)}, for __dlpack__ */
    PyObject *empty;                 /* () */
} edge_state;

/* The state of the module that defined `type` or one of its bases; NULL with an exception. */
edge_state *edge_state_of_type(PyTypeObject *type);
extern PyModuleDef edge_module;

/* The one place where a status becomes an exception; always returns NULL. */
PyObject *edge_raise(tsad_status status);

extern PyType_Spec edge_model_spec, edge_policy_spec, edge_vision_spec;

/* The name of an object's type, NULL with an exception; PyType_GetName is of Python 3.11. */
static inline PyObject *edge_type_name(PyObject *object)
{
    return PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
}

/* ---- array.c ----------------------------------------------------------------------------- */

typedef struct edge_policy edge_policy;

typedef enum edge_dtype {
    EDGE_FLOAT32,
    EDGE_UINT8,
    EDGE_INT32,
    EDGE_INT64,
    EDGE_UINT32,
    EDGE_ANY
} edge_dtype;

enum { EDGE_MAX_DIMS = 8 };

/* Somebody's C-contiguous array in host memory, borrowed until edge_return. A zeroed view is
 * empty and may be returned. */
typedef struct edge_view {
    void *data;
    int n_dims;
    int64_t shape[EDGE_MAX_DIMS];
    size_t bytes;
    bool read_only;
    const char *kind;                /* "numpy", "dlpack", "dlpack_versioned" */
    char dtype[24];                  /* "float32" */
    PyObject *owner;                 /* strong */
    void *managed;                   /* the DLPack struct to give back */
    bool on_device, stream_is_known; /* `data` is memory of a device */
    uintptr_t stream;                /* the caller's; known: what the caller does next is on it */
} edge_view;

/* Borrow `object` or raise an exception that calls it `name`. */
int edge_borrow(edge_state *state, PyObject *object, const char *name, edge_dtype dtype,
                bool writable, edge_view *view);
void edge_return(edge_view *view);

/* ---- device.c ---------------------------------------------------------------------------- */

/* Borrow a float32 array, which may also be where the policy runs. */
int edge_borrow_there(edge_policy *self, PyObject *object, const char *name, bool writable,
                      edge_view *view);

/* Does the view have this shape? A dimension of -1 accepts any size. */
bool edge_has_shape(const edge_view *view, int n_dims, const int64_t *shape);
/* ValueError: "name: expected shape (2, 20), got (2, 19); advice"; always returns -1. */
int edge_raise_shape(const char *name, const edge_view *view, int n_dims, const int64_t *shape,
                     const char *advice);
int edge_expect_shape(const char *name, const edge_view *view, int n_dims, const int64_t *shape);
/* ValueError naming the first NaN or Inf of float32 data. */
int edge_expect_finite(const char *name, const edge_view *view);
/* ValueError if the two memory ranges meet. */
int edge_expect_apart(const char *name, const edge_view *view, const char *other_name,
                      const edge_view *other);

/* A new NumPy array; *data is its memory. */
PyObject *edge_new_array(edge_dtype dtype, int n_dims, const int64_t *shape, void **data);
/* from_dlpack of the library that the array is of, a new reference: it takes our arrays, copying
 * nothing. NULL without an exception for NumPy's own arrays, and for what belongs to no library. */
PyObject *edge_library_of(PyObject *object);
int edge_import_numpy(void);

/* ---- noise.c ----------------------------------------------------------------------------- */

/* The stream of one lane: a numpy.random.PCG64 of its own. */
typedef struct edge_stream {
    PyObject *generator; /* owns what bits points at */
    void *bits;          /* bitgen_t */
} edge_stream;

/* PCG64(SeedSequence(seed, spawn_key=(spawn,))), without a spawn key if spawn < 0. */
int edge_stream_open(edge_state *state, PyObject *seed, Py_ssize_t spawn, edge_stream *stream);
void edge_stream_close(edge_stream *stream);
/* n normal numbers as numpy.random.Generator draws them; needs no GIL. */
void edge_stream_normal(edge_stream *stream, size_t n, float *out);

/* ---- keywords.c -------------------------------------------------------------------------- */

int edge_check_keywords(PyObject *dict, const char *const *known, size_t n, const char *where);
/* Borrowed; NULL without an exception where it is missing or None. */
PyObject *edge_look_up(PyObject *dict, const char *name);
/* TypeError: `who` needs this keyword; always returns -1 */
int edge_missing(const char *who, const char *name);
/* required if fallback < 0 */
int edge_take_int(const char *who, PyObject *dict, const char *name, int fallback, int *out);
/* The string lives as long as the dict's value does. */
int edge_take_string(PyObject *dict, const char *name, const char *fallback, const char **out);

/* Named tensors, borrowed until edge_return_tensors; zeroed it is empty and may be returned. */
typedef struct edge_tensors {
    PyObject *items; /* a list of (name, array), strong */
    tsad_tensor *list;
    edge_view *views;
    Py_ssize_t n;
} edge_tensors;

int edge_borrow_tensors(edge_state *state, PyObject *dict, const char *dict_name, edge_tensors *t);
void edge_return_tensors(edge_tensors *t);

/* ---- model_type.c ------------------------------------------------------------------------ */

typedef struct edge_model {
    PyObject_HEAD tsad_model *model; /* NULL until initialised */
} edge_model;

PyObject *edge_describe(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *edge_block_types(const tsad_model *model);
PyObject *edge_block_costs(const tsad_model *model);

/* ---- policy_type.c, policy_call.c, policy_state.c ------------------------------------------ */

/* Some numbers of an observation that go by a name. */
typedef struct edge_feature {
    PyObject *name, *label; /* "state", and "obs['state']" for errors */
    int dim;
} edge_feature;

struct edge_policy {
    PyObject_HEAD edge_state *state;
    PyObject *model;      /* edge_model */
    tsad_policy *policy;  /* NULL until initialised */
    tsad_model_info info; /* the policy's own */
    int all_steps;        /* the model's */
    bool warm_start;
    bool follows; /* chunks know the one before: warm start, or a lead */
    int n_lanes, n_threads;
    edge_stream *streams;   /* (n_lanes) */
    edge_feature *features; /* (n_features), side by side they are an observation; or none */
    int n_features;
    int *lanes;      /* (n_lanes) scratch of the call: the lanes listed */
    int *executed;   /* (n_lanes) scratch of the call */
    uint8_t *listed; /* (n_lanes) scratch of edge_parse_lanes, zero between calls */
    bool deferred;   /* a call was not waited for: the device may still read and write these */
    edge_view kept[3];
};

/* RuntimeError if the policy is not initialised or busy; else it is ours until edge_leave. A call
 * that was not waited for is ended first; what it failed of is raised here. */
int edge_enter(edge_policy *self);
void edge_leave(edge_policy *self);

/* ---- lanes.c ----------------------------------------------------------------------------- */

/* `lanes` (None: all, a number, a sequence of numbers, or a mask) into self->lanes; returns how
 * many, 0 of an empty list; -1 on error. */
int edge_parse_lanes(edge_policy *self, PyObject *lanes);
/* A single lane number; -1 on error. */
int edge_parse_lane(edge_policy *self, PyObject *lane);
PyObject *edge_policy_lanes(PyObject *self, PyObject *lanes);

/* What any library's array or number says in Python's own; anything else as it is. New reference */
PyObject *edge_as_python(PyObject *object, const char *name);
/* 1: *out is a new list of what edge_as_python makes of the elements; 0: the object is no sequence,
 * *out is what edge_as_python makes of it; -1: an exception, *out is NULL */
int edge_as_list(PyObject *object, const char *name, PyObject **out);

/* ---- features.c -------------------------------------------------------------------------- */

/* None, or a tuple of (name, dim); -1 on error. */
int edge_read_features(edge_policy *self, PyObject *features);
void edge_free_features(edge_policy *self);
/* A dict of arrays by the features' names as one NumPy array (n_rows, n_obs_steps, obs_dim), or
 * without the first axis if all are and `bare_fits`; NULL with an exception that names the key.
 * *like, unless NULL: a new reference to the first feature's array. */
PyObject *edge_side_by_side(edge_policy *self, PyObject *obs, int n_rows, bool bare_fits,
                            PyObject **like);
PyObject *edge_policy_side_by_side(PyObject *self, PyObject *args);

/* A test counts allocations between these two, which tests/malloc_count.c defines; weak, so they
 * are otherwise absent. The GIL is not held there. */
#if defined(__ELF__)
__attribute__((weak, visibility("default"))) extern void tsad_mark_chunk_begin(void);
__attribute__((weak, visibility("default"))) extern void tsad_mark_chunk_end(void);
#define EDGE_MARK(which)                                                                           \
    do {                                                                                           \
        if (tsad_mark_chunk_##which) {                                                             \
            tsad_mark_chunk_##which();                                                             \
        }                                                                                          \
    } while (0)
#else
#define EDGE_MARK(which) ((void)0)
#endif

/* For a call that has left the GIL: whom it asks whether a signal's handler has raised. */
typedef struct edge_listener {
    PyThreadState *thread; /* of the caller */
    bool deaf;             /* Python handles signals in its main thread alone */
} edge_listener;

int edge_hear(void *listener);
/* -1 with an exception, unless all went well */
int edge_raise_or_explain(tsad_status status);

PyObject *edge_load_backend(PyObject *module, PyObject *path); /* plugin.c */

PyObject *edge_policy_call(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *edge_policy_predict_noise(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *edge_policy_pruner_scores(PyObject *self, PyObject *obs);

PyObject *edge_policy_reset(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *edge_policy_set_plan(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *edge_policy_set_plans(PyObject *self, PyObject *plans);
PyObject *edge_policy_set_pruner(PyObject *self, PyObject *sparsity);
PyObject *edge_policy_set_rule(PyObject *self, PyObject *args);
PyObject *edge_policy_set_audit(PyObject *self, PyObject *on);
PyObject *edge_policy_audit(PyObject *self, PyObject *lane);
PyObject *edge_policy_get_plan(PyObject *self, PyObject *lane);
PyObject *edge_policy_ages(PyObject *self, PyObject *lane);
PyObject *edge_policy_stats(PyObject *self, PyObject *lane);
PyObject *edge_policy_timings(PyObject *self, PyObject *unused);
