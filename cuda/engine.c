/* engine.c: the memory of a policy on a GPU, one allocation for everything of fixed size and one
 * for the branch outputs (slots), and what goes in and out of it.
 */
#include "cuda.h"
#include "clock.h"

#include <stdlib.h>
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

static size_t most(size_t a, size_t b) { return a > b ? a : b; }

static size_t widest_branch(const tsad_net *net)
{
    size_t floats = 0;
    for (int b = 0; b < net->n_blocks; b++) {
        const tsad_node *node = &net->nodes[net->block_node[b]];
        floats = most(floats, tsad_register_floats(&net->registers[node->out]));
    }
    return floats;
}

/* rows between two launches of a node of these parts: normalised, or of a matrix of its own */
static size_t widest_rows(const tsad_model *m, bool denoises)
{
    size_t floats = (size_t)m->pruner.query_tokens * (size_t)m->pruner.hidden;
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        const tsad_net *net = &m->nets[i];
        for (int n = 0; n < net->n_nodes && (denoises || i != TSAD_DENOISER); n++) {
            const tsad_node *node = &net->nodes[n];
            const tsad_register *in = &net->registers[node->in], *out = &net->registers[node->out];
            int rows = in->tokens > out->tokens ? in->tokens : out->tokens, width = in->channels;
            for (int j = 0; j < 4; j++) {
                width = node->m[j].n_out > width ? node->m[j].n_out : width;
            }
            floats = most(floats, (size_t)rows * (size_t)width);
        }
    }
    return floats;
}

/* the places that have registers of a part */
static int places(const tsad_engine *e, int part)
{
    return part == TSAD_DENOISER ? e->n_gang : TSAD_TOGETHER;
}

static void place_register(tsad_engine *e, space *s, int part, int reg)
{
    size_t floats = tsad_register_floats(&e->model->nets[part].registers[reg]);
    for (int i = 0; i < places(e, part); i++) {
        e->place[i].registers[part][reg] = place_floats(s, floats);
    }
}

/* what a chunk puts in, in one piece */
static void layout_in(tsad_engine *e, space *s)
{
    const tsad_model *m = e->model;
    size_t from = s->used;
    e->in = s->base + from;
    for (int part = 0; part < TSAD_N_PARTS; part++) {
        if (m->nets[part].n_registers > 0 && part != TSAD_PRUNER_NET) {
            place_register(e, s, part, m->nets[part].input);
        }
    }
    for (int i = 0; i < e->n_gang; i++) {
        size_t chunk = (size_t)m->horizon * (size_t)m->action_dim;
        e->place[i].noise = place_floats(s, (size_t)m->n_steps * chunk);
    }
    for (int i = 0; i < e->n_gang; i++) {
        size_t chunk = (size_t)m->horizon * (size_t)m->action_dim;
        e->place[i].begins = place_floats(s, chunk);
        e->place[i].finish = place_floats(s, 3 * chunk);
    }
    e->in_bytes = s->used - from;
}

/* inputs and outputs of a launch of a node's product, all tracks' rows */
static void product_floats(const tsad_net *net, const tsad_node *node, size_t tracks, size_t *in,
                           size_t *out)
{
    const tsad_register *from = &net->registers[node->in], *to = &net->registers[node->out];
    size_t rows = tracks * most((size_t)from->tokens, (size_t)to->tokens);
    size_t taps = node->kernel > 2 ? (size_t)node->kernel : 2; /* a transposed one has two */
    size_t width = most((size_t)from->channels, (size_t)to->channels);
    *in = *out = 0;
    for (int i = 0; i < 4; i++) {
        *out = most(*out, rows * (size_t)node->m[i].n_out);
        width = most(width, (size_t)node->m[i].n_out);
    }
    *in = rows * taps * width;
}

/* room for the launches of so many rows and more, with what cuBLAS needs for itself; or none */
static void layout_blas(tsad_engine *e, space *s)
{
    tsad_blas_room *room = &e->blas;
    room->columns_floats = room->sums_floats = 0;
    for (int part = 0; part < TSAD_N_PARTS && room->rows; part++) {
        const tsad_net *net = &e->model->nets[part];
        for (int n = 0; n < net->n_nodes; n++) {
            const tsad_node *node = &net->nodes[n];
            int tokens = net->registers[node->in].tokens, made = net->registers[node->out].tokens;
            size_t in, out;
            if (places(e, part) * (tokens > made ? tokens : made) >= room->rows) {
                product_floats(net, node, (size_t)places(e, part), &in, &out);
                room->columns_floats = most(room->columns_floats, in);
                room->sums_floats = most(room->sums_floats, out);
            }
        }
    }
    if (room->sums_floats) {
        room->columns = place_floats(s, room->columns_floats);
        room->sums = place_floats(s, room->sums_floats);
        room->workspace_bytes = tsad_blas_workspace();
        room->workspace = place(s, room->workspace_bytes);
    }
}

static void layout(tsad_engine *e, space *s)
{
    const tsad_model *m = e->model;
    size_t cells = (size_t)m->n_steps * (size_t)m->n_blocks;
    layout_in(e, s);
    for (int i = 0; i <= e->n_lanes; i++) {
        for (int a = 0; a < TSAD_N_ARRAYS; a++) {
            e->lanes[i].array[a] = place_floats(s, m->array_floats[a]);
        }
        e->lanes[i].sources = place(s, sizeof(tsad_reused) * cells);
    }
    for (int part = 0; part < TSAD_N_PARTS; part++) {
        const tsad_net *net = &m->nets[part];
        for (int r = 0; r < net->n_registers; r++) {
            if (r != net->input || part == TSAD_PRUNER_NET) {
                place_register(e, s, part, r);
            }
        }
    }
    for (int i = 0; i < TSAD_TOGETHER; i++) {
        bool denoises = i < e->n_gang;
        for (int j = 0; j < 3; j++) {
            e->place[i].scratch[j] = place_floats(s, widest_rows(m, denoises));
        }
        for (int j = 0; j < TSAD_REMEMBERED && denoises; j++) {
            e->place[i].sums[j] = place_floats(s, widest_branch(tsad_denoiser(m)));
        }
        if (denoises) {
            size_t floats = (size_t)m->horizon * (size_t)tsad_pad(m->action_dim);
            e->place[i].x0 = place_floats(s, 2 * floats);
        }
    }
    layout_blas(e, s);
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
    tsad_cuda_drop_graphs(e); /* which have the old addresses */
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
    for (int i = 0; i < TSAD_TOGETHER; i++) {
        for (int part = 0; part < TSAD_N_PARTS; part++) {
            int n = e->model->nets[part].n_registers;
            e->place[i].registers[part] = TSAD_CARVE(&e->host, float *, n + 1);
        }
    }
}

/* of one place's register, with what guards it */
static size_t place_bytes(const tsad_register *r)
{
    space s = {0};
    place_floats(&s, tsad_register_floats(r));
    return s.used;
}

/* memory of the host that copies are made from and to */
static tsad_status open_staging(tsad_engine *e)
{
    const tsad_net *net = tsad_denoiser(e->model);
    size_t cells = (size_t)e->model->n_steps * (size_t)e->model->n_blocks;
    size_t input = place_bytes(&net->registers[net->input]) * (size_t)e->n_gang;
    size_t output = place_bytes(&net->registers[net->output]) * (size_t)e->n_gang;
    size_t scores = sizeof(float) * e->model->array_floats[TSAD_ARRAY_SCORES];
    void *in, *sources, *out, *fault;
    TSAD_TRY(tsad_pinned_allocate(e->in_bytes, &in));
    e->staged_in = in;
    TSAD_TRY(tsad_pinned_allocate(sizeof(tsad_reused) * cells * (size_t)e->n_gang, &sources));
    e->staged_sources = sources;
    TSAD_TRY(tsad_pinned_allocate(most(most(input, output), scores), &out));
    e->staged_out = out;
    TSAD_TRY(tsad_pinned_allocate(sizeof *e->fault * TSAD_N_GIVEN, &fault));
    e->fault = fault;
    memset(fault, 0xff, sizeof *e->fault * TSAD_N_GIVEN);
    return TSAD_OK;
}

static tsad_status open_memory(tsad_engine *e)
{
    space s = {0};
    layout_host(e);
    TSAD_TRY(tsad_arena_allocate(&e->host));
    layout_host(e);
    TSAD_TRY(tsad_stream_make(&e->stream));
    TSAD_TRY(tsad_blas_rows(&e->blas.rows));
    TSAD_TRY(tsad_list_blocks(&e->one_kernel));
    if (e->one_kernel) {
        TSAD_TRY(tsad_list_make(&e->list));
        e->blas.rows = 0; /* a kernel can't ask for it */
    }
    layout(e, &s);
    TSAD_TRY(tsad_device_allocate(s.used, &e->memory));
    s = (space){.base = e->memory};
    layout(e, &s);
    e->bytes = s.used;
    if (e->blas.sums_floats) {
        TSAD_TRY(tsad_blas_open(e->stream, e->blas));
    }
    TSAD_TRY(open_staging(e));
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
    const char *graphs = getenv("TSAD_CUDA_GRAPHS");
    e->model = model;
    e->n_lanes = lanes;
    e->n_gang = lanes < TSAD_GANG ? lanes : TSAD_GANG;
    e->out_reg = -1;
    e->graphs_used = !graphs || strcmp(graphs, "0") != 0;
    return open_memory(e);
}

static void cuda_close(tsad_engine *e)
{
    if (!e) {
        return;
    }
    tsad_cuda_drop_graphs(e);
    tsad_stream_free(e->stream);
    tsad_list_free(e->list);
    tsad_pinned_free(e->staged_list);
    tsad_device_free(e->list_memory);
    tsad_pinned_free(e->staged_in);
    tsad_pinned_free(e->staged_sources);
    tsad_pinned_free(e->staged_out);
    tsad_pinned_free(e->fault);
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

/* Nothing is under way any more, and what was brought for programs may not be there. */
static void forget(tsad_engine *e)
{
    for (int i = 0; i <= e->n_lanes; i++) {
        e->lanes[i].program = NULL;
    }
    tsad_cuda_drop_graphs(e);
}

static tsad_status wait(tsad_engine *e)
{
    e->waits = false;
    e->list_used = 0;
    tsad_status status = tsad_stream_wait(e->stream);
    if (status != TSAD_OK) {
        forget(e);
    }
    return status;
}

/* what was staged of `in` is to be copied */
static void note_in(tsad_engine *e, const void *device, size_t bytes)
{
    size_t from = (size_t)((const char *)device - e->in);
    bool none = e->in_from == e->in_to;
    e->in_from = none || from < e->in_from ? from : e->in_from;
    e->in_to = none || from + bytes > e->in_to ? from + bytes : e->in_to;
}

void *tsad_cuda_stage(tsad_engine *e, const void *device, size_t bytes)
{
    note_in(e, device, bytes);
    return e->staged_in + ((const char *)device - e->in);
}

void tsad_cuda_upload(tsad_engine *e)
{
    if (e->in_from < e->in_to) {
        tsad_upload(e->stream, e->in + e->in_from, e->staged_in + e->in_from,
                    e->in_to - e->in_from);
        e->waits = true;
    }
    e->in_from = e->in_to = 0;
}

void tsad_cuda_ask_for(tsad_engine *e, tsad_part part, int reg, int n)
{
    const float *first = e->place[0].registers[part][reg];
    const tsad_register *r = &e->model->nets[part].registers[reg];
    size_t apart = n > 1 ? (size_t)(e->place[1].registers[part][reg] - first) : 0;
    size_t floats = apart * (size_t)(n - 1) + tsad_register_floats(r);
    tsad_download(e->stream, e->staged_out, first, sizeof(float) * floats);
    e->waits = true;
    e->out_part = part;
    e->out_reg = reg;
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
    for (int row = 0; row < count && status == TSAD_OK; row += e->n_gang) {
        int n = count - row < e->n_gang ? count - row : e->n_gang;
        status = tsad_cuda_stops(e) ? TSAD_INTERRUPTED : fn(context, &queue, 0, row, n);
    }
    if (status != TSAD_OK) {
        wait(e); /* nothing of the call goes on; what failed is said */
        forget(e);
        e->in_from = e->in_to = 0;
        e->out_reg = -1; /* otherwise it may still be asked for */
    }
    e->n_deferred = 0;
    return status;
}

/* ---- arrays in and out --------------------------------------------------------------------- */

static tsad_status cuda_put(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows from)
{
    tsad_engine *e = queue->engine;
    int ld = tsad_pad(e->model->nets[part].registers[reg].channels);
    float *device = e->place[place].registers[part][reg] + (size_t)from.first * (size_t)ld;
    if (from.there) {
        tsad_cuda_take(e, place, device, ld, &from);
        return TSAD_OK;
    }
    float *staged = tsad_cuda_stage(e, device, sizeof(float) * (size_t)from.rows * (size_t)ld);
    for (int t = 0; t < from.rows; t++) {
        const float *row = from.data + (size_t)t * (size_t)from.stride;
        float *to = staged + (size_t)t * (size_t)ld;
        for (int i = 0; i < from.channels; i++) {
            float x = from.shift ? row[i] - from.shift[i] : row[i];
            to[i] = from.scale ? x * from.scale[i] + from.offset[i] : x;
        }
    }
    return TSAD_OK;
}

static tsad_status cuda_get(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows to)
{
    tsad_engine *e = queue->engine;
    int ld = tsad_pad(e->model->nets[part].registers[reg].channels);
    if (e->out_reg != reg || e->out_part != part) {
        tsad_cuda_ask_for(e, part, reg, place + 1);
    }
    if (e->waits) {
        TSAD_TRY(wait(e));
    }
    float *const *registers = e->place[place].registers[part];
    size_t at = (size_t)(registers[reg] - e->place[0].registers[part][reg]);
    const float *staged = (const float *)(const void *)e->staged_out + at;
    for (int t = 0; t < to.rows; t++) {
        const float *from = staged + (size_t)(to.first + t) * (size_t)ld;
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
    tsad_download(e->stream, e->staged_out, e->lanes[lane].array[which], bytes);
    e->out_reg = -1;
    TSAD_TRY(wait(e));
    memcpy(to, e->staged_out, bytes);
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
                                        .get_array = cuda_get_array,
                                        .owns = tsad_device_owns,
                                        .unfit = tsad_cuda_unfit,
                                        .follow = tsad_cuda_follow,
                                        .precede = tsad_cuda_precede,
                                        .hand_over = tsad_cuda_hand_over,
                                        .fault = tsad_cuda_fault};
