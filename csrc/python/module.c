/* module.c: tsad._core. Multi-phase initialisation, heap types, no global state; statuses of the
 * core become exceptions here and nowhere else.
 */
#include "edge.h"

#include <string.h>

static edge_state *state_of(PyObject *module) { return PyModule_GetState(module); }

edge_state *edge_state_of_type(PyTypeObject *type)
{
    for (; type; type = PyType_GetSlot(type, Py_tp_base)) {
        PyObject *module = PyType_GetModule(type); /* a type error for types of no module */
        if (module && PyModule_GetDef(module) == &edge_module) {
            return state_of(module);
        }
        PyErr_Clear();
    }
    PyErr_SetString(PyExc_TypeError, "expected a type derived from tsad._core.Policy");
    return NULL;
}

PyObject *edge_raise(tsad_status status)
{
    PyObject *type = PyExc_RuntimeError; /* BUSY, BACKEND */
    switch (status) {
    case TSAD_ARGUMENT:
    case TSAD_SHAPE:
    case TSAD_PLAN:
        type = PyExc_ValueError;
        break;
    case TSAD_MEMORY:
        type = PyExc_MemoryError;
        break;
    default:
        break;
    }
    const char *detail = tsad_error_detail();
    PyErr_SetString(type, *detail ? detail : tsad_status_text(status));
    return NULL;
}

/* ---- functions --------------------------------------------------------------------------- */

PyDoc_STRVAR(resolve_doc,
             "resolve($module, /, sources, block_type, filled=None)\n--\n\n"
             "Slots of a plan: int32 (K, B), the slot k * B + b that a cell writes (compute) or\n"
             "reads (reuse), -1 for skip. sources: uint8 (K, B); block_type: uint8 (B,), equal\n"
             "numbers are of one type; filled: uint8 (K, B), which rollout slots hold a value\n"
             "(None: none). ValueError names the step, the block and the reason.");

static int borrow_plan(edge_state *state, PyObject *sources, PyObject *types, PyObject *filled,
                       edge_view view[3])
{
    int64_t any[2] = {-1, -1};
    if (edge_borrow(state, sources, "sources", EDGE_UINT8, false, &view[0]) < 0 ||
        edge_expect_shape("sources", &view[0], 2, any) < 0 ||
        edge_borrow(state, types, "block_type", EDGE_UINT8, false, &view[1]) < 0 ||
        edge_expect_shape("block_type", &view[1], 1, &view[0].shape[1]) < 0) {
        return -1;
    }
    if (filled == Py_None) {
        return 0;
    }
    if (edge_borrow(state, filled, "filled", EDGE_UINT8, false, &view[2]) < 0) {
        return -1;
    }
    return edge_expect_shape("filled", &view[2], 2, view[0].shape);
}

static int check_plan_size(const edge_view *sources, const edge_view *types)
{
    if (sources->shape[0] < 1 || sources->shape[1] < 1 || sources->shape[1] > TSAD_MAX_BLOCKS ||
        sources->shape[0] > INT32_MAX / TSAD_MAX_BLOCKS) {
        PyErr_Format(PyExc_ValueError,
                     "sources: expected 1 to %d steps and 1 to %d blocks, got (%lld, %lld); check "
                     "its shape",
                     INT32_MAX / TSAD_MAX_BLOCKS, TSAD_MAX_BLOCKS, (long long)sources->shape[0],
                     (long long)sources->shape[1]);
        return -1;
    }
    const uint8_t *type = types->data;
    for (int64_t b = 0; b < types->shape[0]; b++) {
        if (type[b] >= TSAD_MAX_TYPES) {
            PyErr_Format(PyExc_ValueError,
                         "block_type[%lld]: expected 0 to %d, got %d; number the types from 0",
                         (long long)b, TSAD_MAX_TYPES - 1, type[b]);
            return -1;
        }
    }
    return 0;
}

/* Slots if the plan is valid; else NULL without an exception, and *fault says why. */
static PyObject *resolve_plan(PyObject *module, PyObject *args, PyObject *kwargs,
                              tsad_plan_fault *fault)
{
    static char *names[] = {"sources", "block_type", "filled", NULL};
    PyObject *sources, *types, *filled = Py_None, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:resolve", names, &sources, &types,
                                     &filled)) {
        return NULL;
    }
    edge_view view[3] = {0};
    void *slots;
    if (borrow_plan(state_of(module), sources, types, filled, view) == 0 &&
        check_plan_size(&view[0], &view[1]) == 0 &&
        (result = edge_new_array(EDGE_INT32, 2, view[0].shape, &slots))) {
        *fault = tsad_plan_resolve(view[0].data, (int)view[0].shape[0], (int)view[0].shape[1],
                                   view[1].data, view[2].data, slots);
        if (fault->reason != TSAD_PLAN_VALID) {
            Py_CLEAR(result);
        }
    }
    for (int i = 0; i < 3; i++) {
        edge_return(&view[i]);
    }
    return result;
}

static PyObject *resolve(PyObject *module, PyObject *args, PyObject *kwargs)
{
    tsad_plan_fault fault = {TSAD_PLAN_VALID, -1, -1};
    PyObject *slots = resolve_plan(module, args, kwargs, &fault);
    if (fault.reason != TSAD_PLAN_VALID) {
        PyErr_Format(PyExc_ValueError, "step %d, block %d: %s", fault.step, fault.block,
                     tsad_plan_reason_text(fault.reason));
    }
    return slots;
}

PyDoc_STRVAR(plan_fault_doc,
             "_plan_fault($module, /, sources, block_type, filled=None)\n--\n\n"
             "What resolve would refuse: (step, block, reason code, reason), or None.");

static PyObject *plan_fault(PyObject *module, PyObject *args, PyObject *kwargs)
{
    tsad_plan_fault fault = {TSAD_PLAN_VALID, -1, -1};
    PyObject *slots = resolve_plan(module, args, kwargs, &fault);
    if (fault.reason != TSAD_PLAN_VALID) {
        return Py_BuildValue("(iiis)", fault.step, fault.block, (int)fault.reason,
                             tsad_plan_reason_text(fault.reason));
    }
    if (!slots) {
        return NULL;
    }
    Py_DECREF(slots);
    return Py_NewRef(Py_None);
}

PyDoc_STRVAR(backends_doc, "backends($module, /)\n--\n\n"
                           "Names of the backends that this CPU can use, best first.");

static PyObject *backends(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    const char *names[16];
    int n = tsad_backend_names(names, 16);
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < n && i < 16; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyList_Append(list, name) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

PyDoc_STRVAR(describe_doc,
             "describe($module, /, *, family='diffusion_policy_transformer', horizon,\n"
             "         n_obs_steps, n_action_steps, obs_dim, action_dim, n_layers=0, n_heads=0,\n"
             "         n_emb=0, n_cond_layers=0, causal=True, down_dims=None, kernel_size=0,\n"
             "         n_groups=0, use_film_scale_modulation=False, hidden_dim=0,\n"
             "         use_rope=False, use_positional_encoding=False, pruner=None)\n--\n\n"
             "What Model makes of these settings, said by the family's builder without a tensor:\n"
             "{'tensors': {name: shape}, 'pruner': {name: shape} of its tensors,\n"
             "'blocks': [(name, type, multiply-accumulates of a cell)] in order of execution}.");

PyDoc_STRVAR(load_doc,
             "_load_backend($module, path, /)\n--\n\n"
             "Loads the library of one more backend, for Model(backend=...): (the name of its\n"
             "device, why it can't be used here or None). ImportError says what is wrong with it.");

PyDoc_STRVAR(borrow_doc,
             "_borrow($module, array, /)\n--\n\n"
             "For tests: what the core would see of an array: a dict of ptr, shape, dtype,\n"
             "read_only and kind ('numpy', 'dlpack', 'dlpack_versioned').");

static PyObject *borrow(PyObject *module, PyObject *array)
{
    edge_view view;
    if (edge_borrow(state_of(module), array, "array", EDGE_ANY, false, &view) < 0) {
        return NULL;
    }
    PyObject *shape = PyTuple_New(view.n_dims), *result = NULL;
    for (int i = 0; shape && i < view.n_dims; i++) {
        PyObject *size = PyLong_FromLongLong(view.shape[i]);
        if (!size || PyTuple_SetItem(shape, i, size) < 0) {
            Py_CLEAR(shape);
        }
    }
    if (shape) {
        result = Py_BuildValue("{s:N,s:N,s:s,s:O,s:s}", "ptr", PyLong_FromVoidPtr(view.data),
                               "shape", shape, "dtype", view.dtype, "read_only",
                               view.read_only ? Py_True : Py_False, "kind", view.kind);
    }
    edge_return(&view);
    return result;
}

PyDoc_STRVAR(copy_doc, "_copy($module, array, name, /)\n--\n\n"
                       "A float32 NumPy array of the numbers of any library's float32 array, with "
                       "the checks\nand errors of a policy's arguments.");

static PyObject *copy(PyObject *module, PyObject *args)
{
    PyObject *array, *result;
    const char *name;
    edge_view view;
    void *data;
    if (!PyArg_ParseTuple(args, "Os:_copy", &array, &name) ||
        edge_borrow(state_of(module), array, name, EDGE_FLOAT32, false, &view) < 0) {
        return NULL;
    }
    result = edge_new_array(EDGE_FLOAT32, view.n_dims, view.shape, &data);
    if (result && view.bytes) {
        memcpy(data, view.data, view.bytes);
    }
    edge_return(&view);
    return result;
}

PyDoc_STRVAR(hand_doc,
             "_hand($module, array, like, /)\n--\n\n"
             "For tests: the NumPy array as one of the library that `like` is of, nothing copied "
             "where the\nlibrary allows.");

static PyObject *hand(PyObject *module, PyObject *args)
{
    PyObject *array, *like;
    (void)module;
    if (!PyArg_ParseTuple(args, "OO:_hand", &array, &like)) {
        return NULL;
    }
    PyObject *library = edge_library_of(like);
    PyObject *result =
        library ? PyObject_CallFunctionObjArgs(library, array, NULL) : Py_NewRef(array);
    Py_XDECREF(library);
    return result;
}

static PyMethodDef methods[] = {
    {"resolve", (PyCFunction)(void (*)(void))resolve, METH_VARARGS | METH_KEYWORDS, resolve_doc},
    {"_plan_fault", (PyCFunction)(void (*)(void))plan_fault, METH_VARARGS | METH_KEYWORDS,
     plan_fault_doc},
    {"backends", backends, METH_NOARGS, backends_doc},
    {"describe", (PyCFunction)(void (*)(void))edge_describe, METH_VARARGS | METH_KEYWORDS,
     describe_doc},
    {"_load_backend", edge_load_backend, METH_O, load_doc},
    {"_borrow", borrow, METH_O, borrow_doc},
    {"_copy", copy, METH_VARARGS, copy_doc},
    {"_hand", hand, METH_VARARGS, hand_doc},
    {NULL, NULL, 0, NULL},
};

/* ---- module ------------------------------------------------------------------------------ */

static int add_types(PyObject *module, edge_state *state)
{
    state->model_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &edge_model_spec, NULL);
    if (!state->model_type || PyModule_AddType(module, state->model_type) < 0) {
        return -1;
    }
    state->policy_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &edge_policy_spec, NULL);
    if (!state->policy_type || PyModule_AddType(module, state->policy_type) < 0) {
        return -1;
    }
    state->vision_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &edge_vision_spec, NULL);
    return state->vision_type ? PyModule_AddType(module, state->vision_type) : -1;
}

static int exec(PyObject *module)
{
    edge_state *state = state_of(module);
    if (edge_import_numpy() < 0) {
        return -1;
    }
    PyObject *random = PyImport_ImportModule("numpy.random");
    if (!random) {
        return -1;
    }
    state->pcg64 = PyObject_GetAttrString(random, "PCG64");
    state->seed_sequence = PyObject_GetAttrString(random, "SeedSequence");
    Py_DECREF(random);
    state->max_version = Py_BuildValue("{s(ii)}", "max_version", 1, 0);
    state->empty = PyTuple_New(0);
    if (!state->pcg64 || !state->seed_sequence || !state->max_version || !state->empty) {
        return -1;
    }
    return add_types(module, state);
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    edge_state *state = state_of(module);
    Py_VISIT(state->model_type);
    Py_VISIT(state->policy_type);
    Py_VISIT(state->vision_type);
    Py_VISIT(state->pcg64);
    Py_VISIT(state->seed_sequence);
    Py_VISIT(state->max_version);
    Py_VISIT(state->empty);
    return 0;
}

static int clear(PyObject *module)
{
    edge_state *state = state_of(module);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->policy_type);
    Py_CLEAR(state->vision_type);
    Py_CLEAR(state->pcg64);
    Py_CLEAR(state->seed_sequence);
    Py_CLEAR(state->max_version);
    Py_CLEAR(state->empty);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec},
    {0, NULL},
};

PyModuleDef edge_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "tsad._core",
    .m_doc = "The C core of tsad: models, policies, image encoders, the resolver of plans.",
    .m_size = sizeof(edge_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&edge_module); }
