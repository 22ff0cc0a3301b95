/* engine.c: the memory of a policy on a GPU, one allocation for everything of fixed size and one
 * for the branch outputs (slots), and what goes in and out of it.
 */
#include "cuda.h"
#include "clock.h"

#include <string.h>

/* ---- layout ------------------------------------------------------------------------------ */

/* A device's memory: base NULL counts. After each array lies what nobody may write. */
typedef struct space {
    char *base;
    size_t used;
} space;

static void *place(space *s, size_t bytes)
{
    size_t taken = (bytes + TSAD_ALIGN - 1) / TSAD_ALIGN * TSAD_ALIGN + TSAD_ALIGN;
    char *at = s->base ? s->base + s->used : NULL;
    if (at) {
        tsad_device_guard(at + bytes, taken - bytes);
    }
    s->used += taken;
    return at;
}

static float *place_floats(space *s, size_t n) { return place(s, sizeof(float) * n); }

static size_t widest_branch(const tsad_net *net)
{
    size_t most = 0;
    for (int b = 0; b < net->n_blocks; b++) {
        size_t n = tsad_register_floats(&net->registers[net->nodes[net->block_node[b]].out]);
        most = n > most ? n : most;
    }
    return most;
}

/* rows between two launches of a node: normalised, or of a matrix of its own */
static size_t widest_rows(const tsad_model *m)
{
    size_t most = (size_t)m->pruner.query_tokens * (size_t)m->pruner.hidden;
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        const tsad_net *net = &m->nets[i];
        for (int n = 0; n < net->n_nodes; n++) {
            const tsad_node *node = &net->nodes[n];
            const tsad_register *in = &net->registers[node->in], *out = &net->registers[node->out];
            int rows = in->tokens > out->tokens ? in->tokens : out->tokens, width = in->channels;
            for (int j = 0; j < 4; j++) {
                width = node->m[j].n_out > width ? node->m[j].n_out : width;
            }
            size_t floats = (size_t)rows * (size_t)width;
            most = floats > most ? floats : most;
        }
    }
    return most;
}

static void layout(tsad_engine *e, space *s)
{
    const tsad_model *m = e->model;
    size_t K = (size_t)m->n_steps, T = (size_t)m->horizon, cells = K * (size_t)m->n_blocks;
    for (int i = 0; i <= e->n_lanes; i++) {
        for (int a = 0; a < TSAD_N_ARRAYS; a++) {
            e->lanes[i].array[a] = place_floats(s, m->array_floats[a]);
        }
    }
    for (int part = 0; part < TSAD_N_PARTS; part++) {
        const tsad_net *net = &m->nets[part];
        for (int r = 0; r < net->n_registers; r++) {
            e->registers[part][r] = place_floats(s, tsad_register_floats(&net->registers[r]));
        }
    }
    e->previous_x0 = place_floats(s, T * (size_t)tsad_pad(m->action_dim));
    for (int i = 0; i < TSAD_REMEMBERED; i++) {
        e->sums[i] = place_floats(s, widest_branch(tsad_denoiser(m)));
    }
    for (int i = 0; i < 3; i++) {
        e->scratch[i] = place_floats(s, widest_rows(m));
    }
    e->noise = place_floats(s, K * T * (size_t)m->action_dim);
    e->offsets = place(s, sizeof(int64_t) * cells);
    e->counts = place_floats(s, cells);
}

static void layout_slots(tsad_engine *e, space *s, int rows)
{
    size_t floats = tsad_denoiser(e->model)->row_floats;
    for (int i = 0; i <= e->n_lanes; i++) {
        float *slots = place_floats(s, floats * (size_t)(i < e->n_lanes ? rows : 1));
        if (s->base) {
            e->lanes[i].slots = slots;
        }
    }
}

/* Slots for every lane, `rows` rows each (the last one needs one). On failure the old slots stay.
 */
static tsad_status place_slots(tsad_engine *e, int rows)
{
    space s = {0};
    void *memory;
    layout_slots(e, &s, rows);
    TSAD_TRY(tsad_device_allocate(s.used, &memory));
    tsad_device_free(e->slot_memory);
    s = (space){.base = memory};
    layout_slots(e, &s, rows);
    e->slot_memory = memory;
    e->slot_bytes = s.used;
    e->slot_rows = rows;
    return TSAD_OK;
}

/* arrays of pointers, on the host */
static void layout_host(tsad_engine *e)
{
    e->lanes = TSAD_CARVE(&e->host, tsad_cuda_lane, e->n_lanes + 1);
    for (int part = 0; part < TSAD_N_PARTS; part++) {
        e->registers[part] = TSAD_CARVE(&e->host, float *, e->model->nets[part].n_registers + 1);
    }
}

/* what a chunk copies at most between two waits */
static size_t staging_bytes(const tsad_model *m)
{
    size_t K = (size_t)m->n_steps, cells = K * (size_t)m->n_blocks;
    size_t floats = K * (size_t)m->horizon * (size_t)m->action_dim + cells;
    for (int part = 0; part < TSAD_N_PARTS; part++) {
        const tsad_net *net = &m->nets[part];
        floats += net->n_registers ? tsad_register_floats(&net->registers[net->input]) : 0;
    }
    floats += m->array_floats[TSAD_ARRAY_SCORES];
    return sizeof(float) * floats + sizeof(int64_t) * cells + 16 * TSAD_ALIGN;
}

static tsad_status open_memory(tsad_engine *e)
{
    space s = {0};
    void *pinned;
    layout_host(e);
    TSAD_TRY(tsad_arena_allocate(&e->host));
    layout_host(e);
    TSAD_TRY(tsad_stream_make(&e->stream));
    layout(e, &s);
    TSAD_TRY(tsad_device_allocate(s.used, &e->memory));
    s = (space){.base = e->memory};
    layout(e, &s);
    e->bytes = s.used;
    e->staging.size = staging_bytes(e->model);
    TSAD_TRY(tsad_pinned_allocate(e->staging.size, &pinned));
    e->staging.base = pinned;
    return place_slots(e, 1);
}

static tsad_status cuda_open(const tsad_model *model, int lanes, int threads, tsad_engine **out)
{
    (void)threads; /* a stream is one */
    tsad_engine *e = tsad_allocate(sizeof *e);
    *out = e;
    if (!e) {
        return tsad_fail(TSAD_MEMORY, "out of memory for an engine");
    }
    e->model = model;
    e->n_lanes = lanes;
    return open_memory(e);
}

static void cuda_close(tsad_engine *e)
{
    if (!e) {
        return;
    }
    tsad_stream_free(e->stream);
    tsad_pinned_free(e->staging.base);
    tsad_device_free(e->slot_memory);
    tsad_device_free(e->memory);
    tsad_arena_free(&e->host);
    tsad_deallocate(e);
}

static size_t cuda_bytes(const tsad_engine *e) { return e->bytes + e->slot_bytes; }

static tsad_status cuda_remember_rollouts(tsad_engine *e, int rows)
{
    return e->slot_rows == rows ? TSAD_OK : place_slots(e, rows);
}

/* Sums of rollout slots are not kept: an addition of any number of slots is one launch anyway. */
static bool cuda_prepare(tsad_engine *e, int lane, const tsad_program *program)
{
    (void)e, (void)lane, (void)program;
    return false;
}

/* ---- a call ------------------------------------------------------------------------------ */

static tsad_status wait(tsad_engine *e)
{
    e->staging.used = 0;
    return tsad_stream_wait(e->stream);
}

tsad_status tsad_cuda_stage(tsad_engine *e, size_t bytes, void **out)
{
    size_t taken = (bytes + TSAD_ALIGN - 1) / TSAD_ALIGN * TSAD_ALIGN;
    if (e->staging.used + taken > e->staging.size) {
        TSAD_TRY(wait(e));
    }
    *out = e->staging.base + e->staging.used;
    e->staging.used += taken;
    return TSAD_OK;
}

bool tsad_cuda_stops(tsad_engine *e)
{
    enum { ASK_NS = 100000000 };
    if (!e->interrupt || tsad_now() - e->asked_at < ASK_NS) {
        return false;
    }
    e->asked_at = tsad_now();
    return e->interrupt->wanted(e->interrupt->context);
}

static tsad_status cuda_each(tsad_engine *e, int count, bool alone, tsad_each_fn fn, void *context,
                             const tsad_interrupt *interrupt, int *queues)
{
    tsad_queue queue = {e};
    tsad_status status = TSAD_OK;
    (void)alone;
    *queues = 1;
    e->interrupt = interrupt;
    e->asked_at = tsad_now();
    for (int row = 0; row < count && status == TSAD_OK; row++) {
        status = tsad_cuda_stops(e) ? TSAD_INTERRUPTED : fn(context, &queue, 0, row, 1);
    }
    if (status != TSAD_OK) {
        tsad_stream_wait(e->stream); /* nothing of the call goes on; what failed is said */
        e->staging.used = 0;
    }
    return status;
}

/* ---- arrays in and out --------------------------------------------------------------------- */

static float *rows_of(tsad_queue *queue, tsad_part part, int reg, int first, int *ld)
{
    *ld = tsad_pad(queue->engine->model->nets[part].registers[reg].channels);
    return queue->engine->registers[part][reg] + (size_t)first * (size_t)*ld;
}

static tsad_status cuda_put(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows from)
{
    tsad_engine *e = queue->engine;
    int ld;
    float *device = rows_of(queue, part, reg, from.first, &ld);
    size_t bytes = sizeof(float) * (size_t)from.rows * (size_t)ld;
    void *staged;
    (void)place; /* one lane at a time */
    TSAD_TRY(tsad_cuda_stage(e, bytes, &staged));
    memset(staged, 0, bytes);
    for (int t = 0; t < from.rows; t++) {
        const float *row = from.data + (size_t)t * (size_t)from.stride;
        float *to = (float *)staged + (size_t)t * (size_t)ld;
        for (int i = 0; i < from.channels; i++) {
            float x = from.shift ? row[i] - from.shift[i] : row[i];
            to[i] = from.scale ? x * from.scale[i] + from.offset[i] : x;
        }
    }
    tsad_upload(e->stream, device, staged, bytes);
    return TSAD_OK;
}

static tsad_status cuda_get(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows to)
{
    tsad_engine *e = queue->engine;
    int ld;
    const float *device = rows_of(queue, part, reg, to.first, &ld);
    size_t bytes = sizeof(float) * (size_t)to.rows * (size_t)ld;
    void *staged;
    (void)place;
    TSAD_TRY(tsad_cuda_stage(e, bytes, &staged));
    tsad_download(e->stream, staged, device, bytes);
    TSAD_TRY(wait(e));
    for (int t = 0; t < to.rows; t++) {
        const float *from = (const float *)staged + (size_t)t * (size_t)ld;
        float *row = to.data + (size_t)t * (size_t)to.stride;
        for (int i = 0; i < to.channels; i++) {
            float x = to.scale ? (from[i] - to.offset[i]) / to.scale[i] : from[i];
            row[i] = to.shift ? x + to.shift[i] : x;
        }
    }
    return TSAD_OK;
}

static tsad_status cuda_get_array(tsad_queue *queue, int lane, tsad_array which, float *to)
{
    tsad_engine *e = queue->engine;
    size_t bytes = sizeof(float) * e->model->array_floats[which];
    void *staged;
    TSAD_TRY(tsad_cuda_stage(e, bytes, &staged));
    tsad_download(e->stream, staged, e->lanes[lane].array[which], bytes);
    TSAD_TRY(wait(e));
    memcpy(to, staged, bytes);
    return TSAD_OK;
}

/* ---- the backend ------------------------------------------------------------------------- */

static bool usable(void) { return tsad_device_absent() == NULL; }

const tsad_backend tsad_cuda_backend = {.name = "cuda",
                                        .usable = usable,
                                        .pack = tsad_cuda_pack,
                                        .unpack = tsad_cuda_unpack,
                                        .open = cuda_open,
                                        .close = cuda_close,
                                        .bytes = cuda_bytes,
                                        .remember_rollouts = cuda_remember_rollouts,
                                        .prepare = cuda_prepare,
                                        .each = cuda_each,
                                        .run = tsad_cuda_run,
                                        .put = cuda_put,
                                        .get = cuda_get,
                                        .get_array = cuda_get_array};
