/* eye.c: the memory of an image encoder on a CPU, and how its threads share a call.
 *
 * A gang of images goes through the nodes together, node after node; a node's tasks are taken by
 * whoever is free, and the calling thread opens the next node once all are done. It waits for
 * nobody who has not taken a task, so that a thread that wakes late, or never, costs only time.
 */
#include "../clock.h"
#include "eye.h"

enum { MAX_GANG = 8, GANG_BYTES = 16 << 20, ASK_NS = 100000000 };

/* ---- weights ------------------------------------------------------------------------------- */

/* torch's (c_out, c_in, kernel, kernel) to (panels, kernel, kernel, c_in, panel) */
static void pack_conv(const tsad_eye *e, const tsad_grid_node *node, float *w)
{
    int panel = e->kernels->panel, kernel = node->kernel;
    int c_in = e->vision->grids[node->in].channels, c_out = e->vision->grids[node->out].channels;
    for (int first = 0; first < c_out; first += panel) {
        for (int i = 0; i < kernel * kernel * c_in; i++, w += panel) {
            size_t tap = (size_t)(i / c_in), c = (size_t)(i % c_in);
            for (int o = 0; o < panel && first + o < c_out; o++) {
                size_t row = (size_t)(first + o) * (size_t)c_in + c;
                w[o] = node->weight[row * (size_t)(kernel * kernel) + tap];
            }
        }
    }
}

static void layout_weights(const tsad_eye *e, tsad_arena *arena)
{
    const tsad_vision *v = e->vision;
    for (int i = 0; i < v->n_nodes; i++) {
        const tsad_grid_node *node = &v->nodes[i];
        if (node->kind != TSAD_GRID_CONV && node->kind != TSAD_GRID_NORM) {
            continue;
        }
        bool norm = node->kind == TSAD_GRID_NORM;
        int c_in = v->grids[node->in].channels, c_out = v->grids[node->out].channels;
        int panel = e->kernels->panel, panels = (c_out + panel - 1) / panel;
        tsad_conv *c = &e->convs[i];
        *c = (tsad_conv){.lines = node->kernel, .run = node->kernel * c_in, .panels = panels};
        c->by_pixels = node->kernel * c->run > TSAD_WINDOW;
        if (c->by_pixels) {
            c->lines *= node->kernel;
            c->run = c_in;
        }
        size_t columns = (size_t)panels * (size_t)panel;
        c->wino = !norm && tsad_wino_fits(e, node);
        size_t rows = norm ? 1 : (size_t)c->lines * (size_t)c->run;
        rows = c->wino ? 16 * (size_t)c_in : rows;
        float *w = TSAD_CARVE(arena, float, node->rounded ? 0 : rows * columns);
        float *bias = TSAD_CARVE(arena, float, columns);
        if (node->rounded) {
            tsad_conv16_carve(e, node, arena, c);
        }
        if (!w) {
            continue; /* counting */
        }
        if (node->rounded) {
            w = NULL;
        } else if (norm) {
            memcpy(w, node->weight, sizeof(float) * (size_t)c_out);
        } else if (c->wino) {
            tsad_wino_pack(e, node, w);
        } else {
            pack_conv(e, node, w);
        }
        if (node->bias) {
            memcpy(bias, node->bias, sizeof(float) * (size_t)c_out);
        }
        c->w = w;
        c->bias = bias;
    }
}

/* ---- memory -------------------------------------------------------------------------------- */

static void layout_memory(tsad_eye *e, tsad_arena *arena)
{
    const tsad_vision *v = e->vision;
    e->convs = TSAD_CARVE(arena, tsad_conv, v->n_nodes);
    e->grids = TSAD_CARVE(arena, float *, v->n_grids);
    e->bytes = TSAD_CARVE(arena, float, v->grids[0].channels * 256);
    e->crew = TSAD_CARVE(arena, tsad_crew, 1);
    e->grids16 = TSAD_CARVE(arena, int16_t *, v->n_grids);
    e->units = TSAD_CARVE(arena, float, v->n_grids * e->gang);
    e->most = TSAD_CARVE(arena, atomic_uint, v->n_nodes * e->gang);
    e->bytes16 = TSAD_CARVE(arena, int16_t, v->grids[0].channels * 256);
    e->scratch = TSAD_CARVE(arena, tsad_scratch, e->n_threads);
    size_t room = 0;
    for (int i = 0; i < v->n_nodes; i++) {
        size_t floats = tsad_wino_scratch(e, &v->nodes[i]);
        room = floats > room ? floats : room;
    }
    for (int i = 0; i < e->n_threads; i++) {
        float *own = TSAD_CARVE(arena, float, room);
        if (e->scratch) {
            e->scratch[i].data = own;
        }
    }
    for (int i = 0; i < v->n_grids; i++) {
        const tsad_grid *g = &v->grids[i];
        size_t numbers = tsad_grid_floats(g) * (size_t)e->gang;
        size_t border = (size_t)g->halo * (tsad_grid_row(g) + (size_t)g->ld);
        float *data = TSAD_CARVE(arena, float, i == 0 && g->rounded ? 0 : numbers);
        /* one more: a window of the image has an odd number in a row, and is read in pairs */
        int16_t *data16 = TSAD_CARVE(arena, int16_t, g->rounded ? numbers + 1 : 0);
        if (e->grids) {
            e->grids[i] = data + border;
            e->grids16[i] = g->rounded ? data16 + border : NULL;
        }
    }
}

/* Pixels may be a 255th out of 0 to 1; the largest that they are in the trunk's units makes the
 * scale, of every image. */
static void round_pixels(tsad_eye *e)
{
    const tsad_vision *v = e->vision;
    uint32_t most = 0;
    float unit;
    for (int i = 0; i < 2 * v->grids[0].channels; i++) {
        float end = (i % 2 ? 256.0f : -1.0f) / 255.0f * v->scale[i / 2] + v->offset[i / 2];
        uint32_t bits = tsad_magnitude(end);
        most = bits > most ? bits : most;
    }
    e->pixel_scale = tsad_image_scale(most, &unit);
    for (int i = 0; i < e->gang; i++) {
        e->units[i] = unit;
    }
    for (int i = 0; i < v->grids[0].channels * 256; i++) {
        e->bytes16[i] = tsad_round_pixel(e, e->bytes[i]);
    }
}

static tsad_status allocate(tsad_eye *e)
{
    const tsad_vision *v = e->vision;
    size_t floats = 0;
    for (int i = 0; i < v->n_grids; i++) {
        floats += tsad_grid_floats(&v->grids[i]);
    }
    size_t most = GANG_BYTES / (floats * sizeof(float));
    e->gang = most < 1 ? 1 : most < MAX_GANG ? (int)most : MAX_GANG;
    layout_memory(e, &e->memory);
    TSAD_TRY(tsad_arena_allocate(&e->memory));
    layout_memory(e, &e->memory);
    layout_weights(e, &e->weights);
    TSAD_TRY(tsad_arena_allocate(&e->weights));
    layout_weights(e, &e->weights);
    for (int i = 0; i < v->grids[0].channels * 256; i++) {
        e->bytes[i] = (float)(i % 256) / 255.0f * v->scale[i / 256] + v->offset[i / 256];
    }
    if (v->grids[0].rounded) {
        round_pixels(e);
    }
    return TSAD_OK;
}

tsad_status tsad_cpu_open_vision(const tsad_vision *vision, int threads, tsad_eye **out)
{
    tsad_eye *e = tsad_allocate(sizeof *e);
    *out = e;
    if (!e) {
        return tsad_fail(TSAD_MEMORY, "out of memory for an image encoder");
    }
    e->vision = vision;
    e->kernels = ((const tsad_cpu_backend *)vision->backend)->kernels;
    e->n_threads = threads;
    TSAD_TRY(allocate(e));
    tsad_team_reserve(threads);
    return TSAD_OK;
}

void tsad_cpu_close_vision(tsad_eye *e)
{
    if (e) {
        tsad_arena_free(&e->weights);
        tsad_arena_free(&e->memory);
    }
    tsad_deallocate(e);
}

void tsad_cpu_size_vision(const tsad_eye *e, size_t *weights, size_t *rest)
{
    *weights = e->weights.size;
    *rest = e->memory.size + sizeof *e;
}

/* ---- threads ------------------------------------------------------------------------------- */

typedef struct tsad_look {
    const tsad_eye *eye;
    const tsad_images *images;
    float *features;
    const tsad_interrupt *interrupt; /* NULL: nobody is asked */
    int64_t asked_at;
    unsigned float_mode; /* the caller's */
    unsigned phases;     /* of all gangs */
    tsad_status status;
} tsad_look;

#define NO_PHASE UINT32_MAX

/* A phase is a node of a gang, or, before its first node, the gang's images put in place. */
typedef struct phase {
    int node, images;
    int64_t first; /* image of the call */
} phase;

static phase phase_of(const tsad_look *l, unsigned number)
{
    unsigned each = (unsigned)l->eye->vision->n_nodes + 1, gang = (number - 1) / each;
    phase p = {.node = (int)((number - 1) % each) - 1};
    p.first = (int64_t)gang * l->eye->gang;
    int64_t left = l->images->n - p.first;
    p.images = left < l->eye->gang ? (int)left : l->eye->gang;
    return p;
}

/* Takes the next task and runs it; false: there is none now. *over: there will be none. */
static bool run_one(const tsad_look *l, int rank, bool *over)
{
    tsad_crew *crew = l->eye->crew;
    unsigned long long ticket = atomic_load_explicit(&crew->ticket, memory_order_acquire);
    for (;;) {
        unsigned number = (unsigned)(ticket >> 32);
        *over = number == NO_PHASE;
        if (*over || number == 0) {
            return false;
        }
        phase p = phase_of(l, number);
        int task = (int)(uint32_t)ticket;
        if (task >= tsad_eye_tasks(l->eye, p.node, p.images)) {
            return false;
        }
        if (!atomic_compare_exchange_weak_explicit(&crew->ticket, &ticket, ticket + 1,
                                                   memory_order_acquire, memory_order_acquire)) {
            continue;
        }
        size_t pixels = (size_t)l->eye->vision->grids[0].height *
                        (size_t)l->eye->vision->grids[0].width *
                        (size_t)l->eye->vision->grids[0].channels;
        size_t at = (size_t)p.first * pixels;
        tsad_images from = {.bytes = l->images->bytes ? l->images->bytes + at : NULL,
                            .planes = l->images->planes ? l->images->planes + at : NULL};
        tsad_eye_task(l->eye, p.node, p.images, task, rank, &from);
        atomic_fetch_add_explicit(&crew->done, 1, memory_order_release);
        return true;
    }
}

static bool stops(tsad_look *l)
{
    if (!l->interrupt || tsad_now() - l->asked_at < ASK_NS) {
        return false;
    }
    unsigned mode = tsad_flush_denormals();
    tsad_restore_denormals(l->float_mode);
    bool stop = l->interrupt->wanted(l->interrupt->context);
    tsad_restore_denormals(mode);
    l->asked_at = tsad_now();
    return stop;
}

/* the gang's features to the caller */
static tsad_status hand_over(const tsad_look *l, phase p)
{
    const tsad_vision *v = l->eye->vision;
    const tsad_grid *g = &v->grids[v->n_grids - 1];
    size_t n = (size_t)g->channels;
    float *to = l->features + (size_t)p.first * n;
    for (int i = 0; i < p.images; i++, to += n) {
        memcpy(to, l->eye->grids[v->n_grids - 1] + (size_t)i * tsad_grid_floats(g),
               sizeof(float) * n);
        if (tsad_first_beyond(to, n, FLT_MAX) < n) {
            return tsad_fail(TSAD_NOT_FINITE,
                             "a number overflowed in the features of images[%lld]; check the "
                             "encoder's weights, scale and offset",
                             (long long)(p.first + i));
        }
    }
    return TSAD_OK;
}

/* The calling thread: phase after phase. */
static void lead(tsad_look *l)
{
    tsad_crew *crew = l->eye->crew;
    for (unsigned number = 1; number <= l->phases && l->status == TSAD_OK; number++) {
        phase p = phase_of(l, number);
        int tasks = tsad_eye_tasks(l->eye, p.node, p.images);
        atomic_store_explicit(&crew->done, 0, memory_order_relaxed);
        crew->turn++;
        atomic_store_explicit(&crew->ticket, (unsigned long long)number << 32,
                              memory_order_release);
        for (bool over; run_one(l, 0, &over);) {
        }
        for (int spins = 0; atomic_load_explicit(&crew->done, memory_order_acquire) < tasks;
             spins++) {
            tsad_spin(spins);
        }
        if (p.node == l->eye->vision->n_nodes - 1) {
            l->status = hand_over(l, p);
        }
        if (l->status == TSAD_OK && stops(l)) {
            l->status = TSAD_INTERRUPTED;
        }
    }
    atomic_store_explicit(&crew->ticket, (unsigned long long)NO_PHASE << 32, memory_order_release);
}

static void work(void *context, int rank, int size)
{
    tsad_look *l = context;
    (void)size;
    unsigned mode = tsad_flush_denormals();
    if (rank == 0) {
        lead(l);
    }
    bool over = false;
    for (int spins = 0; !over; spins++) {
        if (run_one(l, rank, &over)) {
            spins = 0;
        } else if (!over) {
            tsad_spin(spins);
        }
    }
    tsad_restore_denormals(mode);
}

tsad_status tsad_cpu_see(tsad_eye *e, const tsad_images *images, float *features,
                         const tsad_interrupt *interrupt)
{
    tsad_look l = {.eye = e,
                   .images = images,
                   .features = features,
                   .interrupt = interrupt,
                   .asked_at = tsad_now(),
                   .status = TSAD_OK};
    int64_t gangs = (images->n + e->gang - 1) / e->gang;
    l.phases = (unsigned)gangs * (unsigned)(e->vision->n_nodes + 1);
    l.float_mode = tsad_flush_denormals();
    tsad_restore_denormals(l.float_mode);
    atomic_store(&e->crew->ticket, 0);
    tsad_team_run(work, &l, e->n_threads);
    return l.status;
}
