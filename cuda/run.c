/* run.c: rows of programs, op by op, as launches on the engine's stream. Tracks that do the same at
 * the same time go through the same launches, each with its own arguments: lanes of a gang, whose
 * plans may differ, and rows that need nothing of each other. */
#include "cuda.h"

#include <limits.h>
#include <string.h>

/* A lane in a row, or a row of those apart, and what of it is still to be done. */
typedef struct track {
    tsad_cuda_context c;
    const tsad_op *at, *end;
    int row_end;
    bool first; /* its run's first row */
    bool begun; /* the tail of the row before has done this row's first node */
} track;

/* What a track does next: `n_ops` ops in one. */
typedef struct action {
    enum { OP, TAIL } kind;
    int node;         /* that orders it; tracks with the same one and the same kind go together */
    int n_sum, n_ops; /* so many ops are additions */
} action;

static float *reg(const tsad_cuda_context *c, int i) { return c->registers[i]; }

static const tsad_node *node_of(const tsad_cuda_context *c, const tsad_op *op)
{
    return &c->net->nodes[op->node];
}

/* whether the gate is one of the terms, which a sum can apply to each source */
static bool is_termed(const tsad_cuda_context *c, const tsad_op *op)
{
    return op->kind == TSAD_OP_GATED && node_of(c, op)->modulated;
}

/* how many ops from here on are one addition */
static int summed(const track *t)
{
    const tsad_op *op = t->at;
    int n = op->kind == TSAD_OP_ADD || op->kind == TSAD_OP_GATED;
    while (n && is_termed(&t->c, op) && op + n < t->end && is_termed(&t->c, &op[n]) &&
           op[n].src == op[n - 1].src + 1 &&
           node_of(&t->c, &op[n])->out == node_of(&t->c, op)->out) {
        n++;
    }
    return n;
}

/* where the sources of a program's additions are in the lane's slots */
static void make_sources(const tsad_cuda_context *c, tsad_reused *to)
{
    const tsad_program *program = c->run->program;
    for (int i = 0; i < program->n_sources; i++) {
        to[i] = (tsad_reused){.offset = tsad_cuda_slot(c, program->sources[i]) - c->lane->slots,
                              .count = program->counts[i],
                              .gate = -1};
    }
    for (int i = 0; i < program->n_ops; i++) {
        const tsad_op *op = &program->ops[i];
        if (is_termed(c, op)) {
            const tsad_node *node = node_of(c, op);
            to[op->src].gate = node->term + 2 * c->net->registers[node->out].channels;
        }
    }
}

static tsad_sum sum_of(const tsad_cuda_context *c, const tsad_op *op, int n)
{
    int ld = tsad_pad(c->net->registers[node_of(c, op)->out].channels);
    tsad_sum sum = {.base = c->lane->slots,
                    .source = c->lane->sources + op->src,
                    .n = n > 1 ? n : op->n_src,
                    .ld = ld};
    if (is_termed(c, op)) {
        sum.terms = tsad_cuda_terms(c, 0);
    } else if (op->repeat) {
        sum.base = c->place->sums[op->repeat - 1];
        sum.source = NULL;
    } else if (op->remember) {
        sum.kept = c->place->sums[op->remember - 1];
    }
    return sum;
}

static void add(const tsad_cuda_context *c, const tsad_op *op, int n)
{
    const tsad_node *node = node_of(c, op);
    const tsad_register *out = &c->net->registers[node->out];
    tsad_addition p = {
        .sum = sum_of(c, op, n),
        .rows = out->tokens,
        .channels = out->channels,
        .to = {.y = reg(c, node->out), .ld = tsad_pad(out->channels), .adds = true},
    };
    if (op->kind == TSAD_OP_GATED && !is_termed(c, op)) {
        p.to.gate = tsad_cuda_gate(c, node);
    }
    tsad_launch_addition(c->e->stream, p);
}

static tsad_update update_of(const tsad_cuda_context *c, bool first)
{
    const tsad_run *run = c->run;
    size_t floats = (size_t)c->m->horizon * (size_t)c->m->action_dim;
    size_t padded = (size_t)c->m->horizon * (size_t)tsad_pad(c->m->action_dim);
    bool odd = c->row % 2;
    tsad_update p = {
        .x = reg(c, c->net->input),
        .e = reg(c, c->net->output),
        .last = first ? NULL : c->place->x0 + (odd ? 0 : padded),
        .older = c->place->x0 + (odd ? padded : 0),
        .ld = tsad_pad(c->m->action_dim),
        .rows = c->m->horizon,
        .channels = c->m->action_dim,
    };
    memcpy(p.coefficient, run->sampler + (size_t)c->row * TSAD_SAMPLER_COLUMNS,
           sizeof p.coefficient);
    if (c->row < 2) { /* there is no older x0 yet */
        p.coefficient[8] = 0;
    }
    p.z = p.coefficient[TSAD_SAMPLER_NOISE] != 0 ? c->place->noise + (size_t)(c->row + 1) * floats
                                                 : NULL;
    return p;
}

/* does the step end after n additions, with a head that a tail can have? */
static bool ends(const track *t, int n)
{
    const tsad_op *op = t->at, *head = op + n;
    if (!t->c.run->sampler || head + 2 != t->end || head->kind != TSAD_OP_NODE ||
        !tsad_cuda_is_head(&t->c, node_of(&t->c, head))) {
        return false;
    }
    return n == 0 || (node_of(&t->c, op)->out == node_of(&t->c, head)->in &&
                      (op->kind == TSAD_OP_ADD || is_termed(&t->c, op)));
}

static action next_of(const track *t)
{
    action a = {.kind = OP, .node = t->at->node >= 0 ? t->at->node : INT_MAX, .n_sum = summed(t)};
    a.n_ops = a.n_sum ? a.n_sum : 1;
    if (ends(t, a.n_sum)) {
        a.kind = TAIL;
        a.node = t->at[a.n_sum].node;
        a.n_ops = a.n_sum + 2;
    }
    return a;
}

static void tail(track *t, const action *a)
{
    const tsad_cuda_context *c = &t->c;
    const tsad_program *program = c->run->program;
    const tsad_op *next = &program->ops[program->row_start[c->row + 1]];
    tsad_sum sum = {0};
    if (a->n_sum) {
        sum = sum_of(c, t->at, a->n_sum);
    }
    t->begun = c->row + 1 < t->row_end && next->kind == TSAD_OP_NODE &&
               tsad_cuda_begins(c, node_of(c, next));
    tsad_cuda_tail(c, node_of(c, &t->at[a->n_sum]), sum, update_of(c, t->first),
                   t->begun ? node_of(c, next) : NULL);
}

static void perform(track *t, const action *a)
{
    const tsad_cuda_context *c = &t->c;
    const tsad_op *op = t->at;
    if (a->kind == TAIL) {
        tail(t, a);
        return;
    }
    switch (op->kind) {
    case TSAD_OP_NODE:
        tsad_cuda_fixed(c, node_of(c, op));
        break;
    case TSAD_OP_COMPUTE:
        tsad_cuda_compute(c, op);
        break;
    case TSAD_OP_ADD:
    case TSAD_OP_GATED:
        add(c, op, a->n_sum);
        break;
    default:
        if (c->run->sampler) {
            tsad_launch_update(c->e->stream, update_of(c, t->first));
        }
    }
}

/* Folds of all layers have one shape, and rows apart may be of different layers. */
static bool alike(const track *s, const action *a, const track *t, const action *b)
{
    bool folds = s->at->kind == TSAD_OP_NODE && t->at->kind == TSAD_OP_NODE &&
                 node_of(&s->c, s->at)->kind == TSAD_FOLD &&
                 node_of(&t->c, t->at)->kind == TSAD_FOLD;
    return a->kind == b->kind && s->at->kind == t->at->kind && (a->node == b->node || folds);
}

/* One row of each track, in the order of the nodes: a track whose plan has nothing to do at a node
 * waits for those that have. */
static void run_tracks(tsad_engine *e, track *tracks, int n)
{
    for (;;) {
        action todo[TSAD_TOGETHER];
        int first = -1;
        for (int i = 0; i < n; i++) {
            if (tracks[i].at < tracks[i].end) {
                todo[i] = next_of(&tracks[i]);
                first = first < 0 || todo[i].node < todo[first].node ? i : first;
            }
        }
        if (first < 0) {
            return;
        }
        const track leader = tracks[first];
        for (int i = 0; i < n; i++) {
            track *t = &tracks[i];
            if (t->at < t->end && alike(&leader, &todo[first], t, &todo[i])) {
                tsad_together(e->stream);
                perform(t, &todo[i]);
                t->at += todo[i].n_ops;
            }
        }
        tsad_launch_all(e->stream);
    }
}

static track track_of(tsad_engine *e, const tsad_run *run, int place, int row_begin, int row_end)
{
    const tsad_cuda_place *p = &e->place[place];
    return (track){.c = {.e = e,
                         .run = run,
                         .m = e->model,
                         .cuda = tsad_cuda_of(e->model),
                         .net = &e->model->nets[run->part],
                         .lane = &e->lanes[run->lane],
                         .place = p,
                         .registers = p->registers[run->part],
                         .row = row_begin},
                   .row_end = row_end};
}

static void enter_row(track *t, int row, bool first)
{
    const tsad_program *program = t->c.run->program;
    t->c.row = row;
    t->c.step = row + t->c.run->first_step;
    t->at = &program->ops[program->row_start[row] + t->begun];
    t->end = &program->ops[program->row_start[row + 1]];
    t->first = first;
}

static void run_apart(tsad_engine *e, const tsad_run *runs, int n, int row_begin, int row_end)
{
    track tracks[TSAD_TOGETHER];
    int found = 0, all = n * (row_end - row_begin);
    for (int i = 0; i < all; i++) {
        tracks[found] = track_of(e, &runs[i % n], found, row_begin, row_end);
        enter_row(&tracks[found++], row_begin + i / n, true);
        if (found == TSAD_TOGETHER || i + 1 == all) {
            run_tracks(e, tracks, found);
            found = 0;
        }
    }
}

tsad_status tsad_cuda_run_rows(tsad_engine *e, const tsad_run *runs, int n, int row_begin,
                               int row_end, bool capturing)
{
    track tracks[TSAD_GANG];
    tsad_cuda_upload(e);
    e->waits = true;
    if (runs->rows_apart) {
        run_apart(e, runs, n, row_begin, row_end);
        return TSAD_OK;
    }
    for (int i = 0; i < n; i++) {
        tracks[i] = track_of(e, &runs[i], i, row_begin, row_end);
    }
    for (int row = row_begin; row < row_end; row++) {
        if (runs->sampler && !capturing && tsad_cuda_stops(e)) {
            return TSAD_INTERRUPTED;
        }
        for (int i = 0; i < n; i++) {
            enter_row(&tracks[i], row, row == row_begin);
        }
        run_tracks(e, tracks, n);
    }
    if (runs->sampler) {
        tsad_cuda_ask_for(e, runs->part, e->model->nets[runs->part].input, n);
    }
    return TSAD_OK;
}

void tsad_cuda_list_rows(tsad_engine *e, const tsad_run *runs, int n, int row_begin, int row_end)
{
    for (int i = 0; i < n; i++) {
        track t = track_of(e, &runs[i], i, row_begin, row_end);
        tsad_list_lane(e->list, i);
        for (int row = row_begin; row < row_end; row++) {
            enter_row(&t, row, row == row_begin);
            run_tracks(e, &t, 1);
        }
    }
}

/* ---- what runs need besides the weights ---------------------------------------------------- */

static void bring_sources(tsad_engine *e, const tsad_run *run, int place)
{
    track t = track_of(e, run, place, 0, 0);
    const tsad_program *program = run->program;
    tsad_cuda_lane *lane = &e->lanes[run->lane];
    size_t cells = (size_t)e->model->n_steps * (size_t)e->model->n_blocks;
    tsad_reused *staged = e->staged_sources + (size_t)place * cells;
    if (program->n_sources == 0 || (lane->program == program && lane->serial == program->serial &&
                                    lane->rollout == run->rollout)) {
        return;
    }
    make_sources(&t.c, staged);
    tsad_upload(e->stream, lane->sources, staged, sizeof(tsad_reused) * (size_t)program->n_sources);
    e->waits = true;
    lane->program = program;
    lane->serial = program->serial;
    lane->rollout = run->rollout;
}

/* what the sampler adds after these rows */
static void stage_noise(tsad_engine *e, const tsad_run *run, int place, int row_begin, int row_end)
{
    size_t floats = (size_t)e->model->horizon * (size_t)e->model->action_dim;
    int rows = 0; /* the last one that any of them reads, and one */
    for (int k = row_begin; k < row_end && run->sampler; k++) {
        bool adds = run->sampler[(size_t)k * TSAD_SAMPLER_COLUMNS + TSAD_SAMPLER_NOISE] != 0;
        rows = adds ? k + 2 : rows;
    }
    if (rows == 0) {
        return;
    }
    float *device = e->place[place].noise + floats * (size_t)(row_begin + 1);
    if (run->noise_there) {
        size_t from = (size_t)(row_begin + 1) * run->noise_step;
        tsad_rows z = {.data = (float *)run->noise + from,
                       .rows = rows - row_begin - 1,
                       .channels = (int)floats,
                       .stride = (int)run->noise_step,
                       .given = TSAD_GIVEN_NOISE,
                       .index = run->noise_index + from};
        tsad_cuda_take(e, place, device, (int)floats, &z);
        return;
    }
    float *staged =
        tsad_cuda_stage(e, device, sizeof(float) * floats * (size_t)(rows - row_begin - 1));
    for (int k = row_begin + 1; k < rows; k++, staged += floats) {
        memcpy(staged, run->noise + (size_t)k * run->noise_step, sizeof(float) * floats);
    }
}

void tsad_cuda_bring(tsad_engine *e, const tsad_run *runs, int n, int row_begin, int row_end)
{
    for (int i = 0; i < n; i++) {
        bring_sources(e, &runs[i], i);
        stage_noise(e, &runs[i], i, row_begin, row_end);
    }
}
