/* engine.c: the memory of a policy on a CPU, and how a call's lanes come to its threads: spread
 * over them where there are enough, otherwise one lane after the other, shared by all who are
 * there.
 *
 * Memory is two arenas. The first holds everything of fixed size; the second the branch outputs
 * (slots): one row a lane, or one a step once a plan reuses earlier rollouts.
 */
#include "cpu.h"

#include <string.h>

/* ---- layout ------------------------------------------------------------------------------ */

static float **carve_registers(tsad_arena *arena, const tsad_net *net)
{
    float **list = TSAD_CARVE(arena, float *, net->n_registers + 1);
    for (int r = 0; r < net->n_registers; r++) {
        const tsad_register *own = &net->registers[r];
        size_t halo = (size_t)own->halo * (size_t)tsad_pad(own->channels);
        float *data = TSAD_CARVE(arena, float, tsad_register_floats(own) + 2 * halo);
        if (list) {
            list[r] = data + halo;
        }
    }
    return list;
}

static void layout_member(const tsad_engine *e, tsad_member *member, tsad_arena *arena)
{
    const tsad_model *m = e->model;
    for (int part = 0; part < TSAD_N_PARTS; part++) {
        member->registers[part] = carve_registers(arena, &m->nets[part]);
    }
    member->x0 = TSAD_CARVE(arena, float, 2 * m->horizon * tsad_pad(m->action_dim));
    for (int i = 0; i < TSAD_REMEMBERED; i++) {
        member->sums[i] = TSAD_CARVE(arena, float, e->branch_floats);
        member->tables[i] = TSAD_CARVE(arena, float, m->horizon * (1 + 2 * m->action_dim));
    }
    member->table_ready = TSAD_CARVE(arena, bool, TSAD_REMEMBERED);
    member->rule = TSAD_CARVE(arena, tsad_rule_state, 1);
    float *now = TSAD_CARVE(arena, float, e->branch_floats);
    float *then = TSAD_CARVE(arena, float, e->branch_floats);
    if (member->rule) {
        *member->rule = (tsad_rule_state){.now = now, .then = then};
    }
}

static void layout_worker(tsad_engine *e, tsad_worker *w, tsad_arena *arena)
{
    const tsad_model *m = e->model;
    w->engine = e;
    w->members = TSAD_CARVE(arena, tsad_member, e->gang);
    for (int i = 0; i < e->gang; i++) {
        tsad_member unplaced = {0};
        layout_member(e, w->members ? &w->members[i] : &unplaced, arena);
    }
    w->scratch = TSAD_CARVE(arena, float, tsad_cpu_scratch(m) * (size_t)e->gang);
    w->terms = TSAD_CARVE(arena, float, 3 * e->branch_channels);
    w->read_epoch = TSAD_CARVE(arena, uint32_t, m->n_blocks);
    w->write_epoch = TSAD_CARVE(arena, uint32_t, m->n_blocks);
}

static void layout(tsad_engine *e, tsad_arena *arena)
{
    const tsad_model *m = e->model;
    e->lanes = TSAD_CARVE(arena, tsad_cpu_lane, e->n_lanes + 1);
    e->workers = TSAD_CARVE(arena, tsad_worker, e->n_threads);
    for (int i = 0; i <= e->n_lanes; i++) {
        for (int a = 0; a < TSAD_N_ARRAYS; a++) {
            float *data = TSAD_CARVE(arena, float, m->array_floats[a]);
            if (e->lanes) {
                e->lanes[i].array[a] = data;
            }
        }
    }
    for (int i = 0; i < e->n_threads; i++) {
        tsad_worker unplaced = {0};
        layout_worker(e, e->workers ? &e->workers[i] : &unplaced, arena);
    }
    e->barrier = TSAD_CARVE(arena, tsad_barrier, 1);
    e->meeting = TSAD_CARVE(arena, tsad_meeting, 1);
    e->exchange = TSAD_CARVE(arena, float, 2 * TSAD_PARTS * e->branch_floats);
}

/* Slots for every lane, `rows` rows each (the last one needs one). On failure the old slots stay.
 */
static tsad_status place_slots(tsad_engine *e, int rows)
{
    size_t floats = tsad_denoiser(e->model)->row_floats;
    tsad_arena arena = {0};
    for (int i = 0; i <= e->n_lanes; i++) {
        TSAD_CARVE(&arena, float, floats *(size_t)(i < e->n_lanes ? rows : 1));
    }
    TSAD_TRY(tsad_arena_allocate(&arena));
    for (int i = 0; i <= e->n_lanes; i++) {
        e->lanes[i].slots = TSAD_CARVE(&arena, float, floats *(size_t)(i < e->n_lanes ? rows : 1));
    }
    tsad_arena_free(&e->slot_arena);
    e->slot_arena = arena;
    e->slot_rows = rows;
    return TSAD_OK;
}

tsad_status tsad_cpu_open(const tsad_model *model, int lanes, int threads, tsad_engine **out)
{
    const tsad_net *net = tsad_denoiser(model);
    tsad_engine *e = tsad_allocate(sizeof *e);
    *out = e;
    if (!e) {
        return tsad_fail(TSAD_MEMORY, "out of memory for an engine");
    }
    e->model = model;
    e->n_lanes = lanes;
    e->n_threads = threads;
    e->gang = lanes < TSAD_GANG ? lanes : TSAD_GANG;
    for (int b = 0; b < net->n_blocks; b++) {
        const tsad_node *node = &net->nodes[net->block_node[b]];
        size_t floats = tsad_register_floats(&net->registers[node->out]);
        e->branch_floats = floats > e->branch_floats ? floats : e->branch_floats;
        int channels = tsad_pad(net->registers[node->out].channels);
        e->branch_channels = channels > e->branch_channels ? channels : e->branch_channels;
    }
    layout(e, &e->arena);
    TSAD_TRY(tsad_arena_allocate(&e->arena));
    layout(e, &e->arena);
    TSAD_TRY(place_slots(e, 1));
    tsad_team_reserve(threads);
    return TSAD_OK;
}

void tsad_cpu_close(tsad_engine *e)
{
    if (!e) {
        return;
    }
    for (int i = 0; e->lanes && i <= e->n_lanes; i++) {
        tsad_arena_free(&e->lanes[i].sum_arena);
    }
    tsad_arena_free(&e->slot_arena);
    tsad_arena_free(&e->arena);
    tsad_deallocate(e);
}

size_t tsad_cpu_bytes(const tsad_engine *e)
{
    size_t bytes = e->arena.size + e->slot_arena.size;
    for (int i = 0; i <= e->n_lanes; i++) {
        bytes += e->lanes[i].sum_arena.size;
    }
    return bytes;
}

tsad_status tsad_cpu_remember_rollouts(tsad_engine *e, int rows)
{
    return e->slot_rows == rows ? TSAD_OK : place_slots(e, rows);
}

/* Room for the sums that the lane's program keeps. Without it the program runs all the same, a
 * little slower. */
bool tsad_cpu_prepare(tsad_engine *e, int index, const tsad_program *program)
{
    tsad_cpu_lane *lane = &e->lanes[index];
    size_t floats = program->kept_floats;
    lane->sums = NULL;
    if (floats > lane->sum_floats) {
        tsad_arena arena = {0};
        TSAD_CARVE(&arena, float, floats);
        tsad_arena_free(&lane->sum_arena);
        lane->sum_floats = 0;
        if (tsad_arena_allocate(&arena) == TSAD_OK) {
            TSAD_CARVE(&arena, float, floats);
            lane->sum_arena = arena;
            lane->sum_floats = floats;
        }
    }
    if (floats > 0) {
        lane->sums = (float *)(void *)lane->sum_arena.base; /* NULL if there was no memory */
    }
    return lane->sums != NULL;
}

/* ---- lanes to threads --------------------------------------------------------------------- */

typedef struct job {
    tsad_engine *engine;
    tsad_each_fn fn;
    void *context;
    int count;
    atomic_int next;   /* row of the call to take, where lanes are spread over threads */
    atomic_int others; /* threads that are at it, without rank 0 */
    atomic_int status;
} job;

static void begin_worker(tsad_worker *w, int rank, int size)
{
    w->rank = rank;
    w->size = size;
    w->epoch = 1;
    w->parity = 0;
    w->turns = 0;
    w->shares = false;
    w->stalled = false;
    w->met_at = 0;
    memset(w->read_epoch, 0, sizeof(uint32_t) * (size_t)w->engine->model->n_blocks);
    memset(w->write_epoch, 0, sizeof(uint32_t) * (size_t)w->engine->model->n_blocks);
}

/* false: a gang has failed before, or the call is to stop */
static bool run_gang(job *j, tsad_worker *w, int rank, int first, int n)
{
    if (atomic_load_explicit(&j->status, memory_order_relaxed) != TSAD_OK || tsad_cpu_stops(w)) {
        return false;
    }
    tsad_status status = j->fn(j->context, w, rank, first, n);
    int before = TSAD_OK;
    return status == TSAD_OK || !atomic_compare_exchange_strong(&j->status, &before, (int)status);
}

/* Lanes to take at once when `left` are left: few at the end of a long call, so that no thread
 * waits long for the last. */
static int gang_size(int left, int size, int most)
{
    int n = left > size * most ? most : (left + 2 * size - 1) / (2 * size);
    n = n > 2 ? n : 2;
    n = n < most ? n : most;
    return n < left ? n : left;
}

/* lanes are spread: gangs, as equal as can be, to whoever is free */
static void work_apart(job *j, tsad_worker *w, int rank, int size)
{
    int fair = (j->count + size - 1) / size, gangs = (fair + TSAD_GANG - 1) / TSAD_GANG;
    int most = (fair + gangs - 1) / gangs;
    bool on = true;
    atomic_fetch_add(&j->others, rank > 0);
    for (int row = atomic_load(&j->next), n; on && row < j->count;) {
        n = gang_size(j->count - row, size, most);
        if (atomic_compare_exchange_strong(&j->next, &row, row + n)) {
            on = run_gang(j, w, rank, row, n);
            row = atomic_load(&j->next);
        }
    }
    atomic_fetch_sub(&j->others, rank > 0);
    for (int spins = 0; rank == 0 && atomic_load(&j->others) > 0; spins++) {
        tsad_spin(spins);
        tsad_cpu_stops(w); /* nobody else can ask */
    }
}

/* lanes are shared: rank 0 takes one after the other through its stages, */
static void lead(job *j, tsad_worker *w)
{
    w->shares = true;
    for (int row = 0; row < j->count && run_gang(j, w, 0, row, 1); row++) {
    }
    tsad_dismiss(w);
    tsad_meeting_end(w->engine->meeting);
}

/* and the others help with its programs */
static void help(tsad_worker *w)
{
    int row;
    w->shares = true;
    for (bool on = tsad_join(w, &row); on; on = tsad_next(w)) {
        if (!tsad_cpu_rows(w, &w->run, 1, row, w->row_end)) {
            return;
        }
        row = TSAD_BEFORE_ROWS;
    }
}

static void work(void *context, int rank, int size)
{
    job *j = context;
    tsad_engine *e = j->engine;
    if (size == 1 || j->count >= size) {
        begin_worker(&e->workers[rank], 0, 1);
        work_apart(j, &e->workers[rank], rank, size);
        return;
    }
    int place = rank == 0 ? 0 : tsad_arrive(e);
    tsad_worker *w = &e->workers[place];
    begin_worker(w, place, place == 0);
    if (place == 0) {
        lead(j, w);
    } else {
        help(w);
    }
}

static tsad_status status_of(const job *j)
{
    return atomic_load(&j->engine->stop) ? TSAD_INTERRUPTED : (tsad_status)atomic_load(&j->status);
}

tsad_status tsad_cpu_each(tsad_engine *e, int count, bool alone, tsad_each_fn fn, void *context,
                          const tsad_interrupt *interrupt, int *queues)
{
    job j = {.engine = e, .fn = fn, .context = context, .count = count};
    *queues = 1;
    tsad_cpu_listen(e, interrupt);
    if (alone) {
        work(&j, 0, 1);
        return status_of(&j);
    }
    tsad_meeting_begin(e->meeting);
    int size = tsad_team_run(work, &j, tsad_stall_size(e, count));
    if (size > 1 && count >= size) {
        *queues = size;
    } else if (size > 1) {
        tsad_stall_note(e);
    }
    return status_of(&j);
}

/* ---- arrays in and out --------------------------------------------------------------------- */

static float *place_of(tsad_queue *queue, int place, tsad_part part, int reg)
{
    return queue->members[place].registers[part][reg];
}

tsad_status tsad_cpu_put(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows from)
{
    const tsad_register *r = &queue->engine->model->nets[part].registers[reg];
    float *to = place_of(queue, place, part, reg) + from.first * tsad_pad(r->channels);
    for (int t = 0; t < from.rows; t++, to += tsad_pad(r->channels)) {
        const float *row = from.data + (size_t)t * (size_t)from.stride;
        for (int i = 0; i < from.channels; i++) {
            float x = from.shift ? row[i] - from.shift[i] : row[i];
            to[i] = from.scale ? x * from.scale[i] + from.offset[i] : x;
        }
    }
    return TSAD_OK;
}

tsad_status tsad_cpu_get(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows to)
{
    const tsad_register *r = &queue->engine->model->nets[part].registers[reg];
    const float *from = place_of(queue, place, part, reg) + to.first * tsad_pad(r->channels);
    for (int t = 0; t < to.rows; t++, from += tsad_pad(r->channels)) {
        float *row = to.data + (size_t)t * (size_t)to.stride;
        for (int i = 0; i < to.channels; i++) {
            float x = to.scale ? (from[i] - to.offset[i]) / to.scale[i] : from[i];
            row[i] = to.shift ? x + to.shift[i] : x;
        }
    }
    return TSAD_OK;
}

tsad_status tsad_cpu_get_array(tsad_queue *queue, int lane, tsad_array which, float *to)
{
    const tsad_engine *e = queue->engine;
    memcpy(to, e->lanes[lane].array[which], sizeof(float) * e->model->array_floats[which]);
    return TSAD_OK;
}
