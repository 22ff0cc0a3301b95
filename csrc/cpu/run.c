/* run.c: the interpreter that all CPU paths share: rows of a program, op by op (block.c, fixed.c,
 * reuse.c). Threads that come late join at the start of a row, and are released there when a core
 * is taken by another process (join.c).
 */
#include "../clock.h"
#include "cpu.h"

#include <limits.h>
#include <string.h>

/* ---- being told to stop --------------------------------------------------------------------- */

enum { ASK_NS = 100000000 };

void tsad_cpu_listen(tsad_engine *e, const tsad_interrupt *interrupt)
{
    e->interrupt = interrupt;
    e->asked_at = tsad_now();
    e->float_mode = tsad_flush_denormals();
    tsad_restore_denormals(e->float_mode);
    atomic_store(&e->stop, false);
}

bool tsad_cpu_stops(tsad_worker *w)
{
    tsad_engine *e = w->engine;
    bool stop = atomic_load_explicit(&e->stop, memory_order_relaxed);
    bool asks = !stop && w == e->workers && e->interrupt; /* on the calling thread */
    if (asks && tsad_now() - e->asked_at > ASK_NS) {
        unsigned mode = tsad_flush_denormals();
        tsad_restore_denormals(e->float_mode);
        stop = e->interrupt->wanted(e->interrupt->context);
        tsad_restore_denormals(mode);
        e->asked_at = tsad_now();
        atomic_store(&e->stop, stop);
    }
    return stop;
}

/* Whether a row has work to share. All threads see the same program, so they agree. */
static bool shares_work(const tsad_net *net, const tsad_program *program, int row)
{
    if (net->wide) {
        return true;
    }
    for (int i = program->row_start[row]; i < program->row_start[row + 1]; i++) {
        if (program->ops[i].kind == TSAD_OP_COMPUTE) {
            return true;
        }
    }
    return false;
}

/* ---- the sampler and the loop ------------------------------------------------------------- */

static void update_sample(const context *c)
{
    const float *t = c->run->sampler + (size_t)c->row * TSAD_SAMPLER_COLUMNS;
    float a = t[0], b = t[1], r = t[2], cx0 = t[3], d = t[4], f = t[5], g = t[6], h = t[7],
          q = t[8];
    const tsad_run *run = c->run;
    const float *z = h != 0 ? run->noise + (size_t)(c->row + 1) * run->noise_step : NULL;
    float *x = reg(c, c->net->input);
    const float *e = reg(c, c->net->output);
    int ld = tsad_pad(c->m->action_dim), A = c->m->action_dim, floats = c->m->horizon * ld;
    const float *last = c->member->x0 + (c->row % 2 ? 0 : floats);
    float *older = c->member->x0 + (c->row % 2 ? floats : 0); /* where this row's goes */
    for (int i = 0; i < c->m->horizon; i++) {
        for (int j = 0; j < A; j++) {
            int at = i * ld + j;
            float x0 = a * x[at] + b * e[at];
            x0 = x0 > r ? r : x0 < -r ? -r : x0;
            /* the range hides nothing: where e is infinite f e is NaN, also if f is 0 */
            float next = cx0 * x0 + d * x[at] + f * e[at] + g * last[at];
            next = q != 0 ? next + q * older[at] : next;
            x[at] = z ? next + h * z[i * A + j] : next;
            older[at] = x0;
        }
    }
}

static void run_wide_op(const context *c, const tsad_op *op);

static void run_op(const context *c, const tsad_op *op)
{
    if (c->net->wide) {
        run_wide_op(c, op);
        return;
    }
    switch (op->kind) {
    case TSAD_OP_NODE:
        tsad_cpu_fixed(c, &c->net->nodes[op->node]);
        break;
    case TSAD_OP_COMPUTE:
        tsad_cpu_compute(c, 1, &op);
        break;
    case TSAD_OP_ADD:
        tsad_cpu_add(c, op);
        break;
    case TSAD_OP_GATED:
        tsad_cpu_add_gated(c, op);
        break;
    case TSAD_OP_UPDATE:
        if (c->run->sampler) {
            update_sample(c);
        }
        break;
    default:
        break;
    }
}

/* an op of a wide net: everything but the sampler's few numbers is shared */
static void run_wide_op(const context *c, const tsad_op *op)
{
    const tsad_node *node = op->node >= 0 ? &c->net->nodes[op->node] : NULL;
    float *slot = op->dst >= 0 ? tsad_cpu_slot(c, op->dst) : NULL;
    switch (op->kind) {
    case TSAD_OP_NODE:
    case TSAD_OP_COMPUTE:
        tsad_cpu_wide(c, 1, node, &slot);
        return;
    case TSAD_OP_ADD:
        tsad_cpu_add(c, op);
        break;
    default:
        if (c->run->sampler && c->w->rank == 0) {
            update_sample(c);
        }
    }
    tsad_worker_meet(c->w);
}

/* a row in closed form; false: this one is not */
static bool run_closed(const context *c)
{
    int closed = c->run->program->closed[c->row];
    if (!closed || !c->run->sampler) {
        return false;
    }
    tsad_cpu_closed(c, closed - 1);
    update_sample(c);
    return true;
}

/* NULL: the row is done */
static const tsad_op *op_at(context *c, int32_t *at, int32_t *end)
{
    if (*at >= *end) {
        return NULL;
    }
    return c->rest ? tsad_cpu_look(c, at, end) : &c->run->program->ops[*at];
}

/* One row of n lanes with programs of their own: always the earliest node that any of them has
 * next, and where several compute it, all of them at once. */
static void run_row_of_gang(context *members, int n)
{
    int32_t at[TSAD_GANG], end[TSAD_GANG];
    for (int i = 0; i < n; i++) {
        const tsad_program *program = members[i].run->program;
        at[i] = program->row_start[members[i].row];
        end[i] = program->row_start[members[i].row + 1];
        if (run_closed(&members[i])) {
            at[i] = end[i];
        }
    }
    for (;;) {
        int node = INT_MAX; /* of the sampler's row, which comes last */
        bool any = false;
        for (int i = 0; i < n; i++) {
            const tsad_op *op = op_at(&members[i], &at[i], &end[i]);
            any |= op != NULL;
            node = op && op->node >= 0 && op->node < node ? op->node : node;
        }
        if (!any) {
            return;
        }
        context together[TSAD_GANG];
        const tsad_op *ops[TSAD_GANG];
        int m = 0;
        for (int i = 0; i < n; i++) {
            const tsad_op *op = op_at(&members[i], &at[i], &end[i]);
            if (!op || (op->node >= 0 ? op->node : INT_MAX) != node) {
                continue;
            }
            at[i]++;
            bool heavy = op->kind == TSAD_OP_NODE &&
                         (members->net->wide || members->net->nodes[node].kind == TSAD_FOLD);
            if (op->kind == TSAD_OP_COMPUTE || heavy) {
                together[m] = members[i];
                ops[m++] = op;
            } else {
                run_op(&members[i], op);
            }
        }
        if (m && members->net->wide) {
            float *slots[TSAD_GANG];
            for (int i = 0; i < m; i++) {
                slots[i] = ops[i]->dst >= 0 ? tsad_cpu_slot(&together[i], ops[i]->dst) : NULL;
            }
            tsad_cpu_wide(together, m, &members->net->nodes[node], slots);
        } else if (m && ops[0]->kind == TSAD_OP_COMPUTE) {
            tsad_cpu_compute(together, m, ops);
        } else if (m) {
            tsad_cpu_fold(together, m, &members->net->nodes[node]);
        }
    }
}

static context context_of(tsad_worker *w, const tsad_run *run, int place)
{
    const tsad_engine *e = w->engine;
    bool one_set = e->model->nets[run->part].wide && w->shares; /* rank 0's */
    const tsad_member *member = one_set ? &e->workers[0].members[place] : &w->members[place];
    return (context){.w = w,
                     .run = run,
                     .k = tsad_cpu_kernels(e->model),
                     .m = e->model,
                     .net = &e->model->nets[run->part],
                     .member = member,
                     .lane = &e->lanes[run->lane],
                     .registers = member->registers[run->part]};
}

bool tsad_cpu_rows(tsad_worker *w, const tsad_run *runs, int n, int row, int row_end)
{
    const tsad_program *program = runs[0].program;
    context members[TSAD_GANG];
    tsad_run rests[TSAD_GANG];
    bool stays = true;
    for (int i = 0; i < n; i++) {
        members[i] = context_of(w, &runs[i], i);
        if (runs[i].rule) {
            rests[i] = runs[i];
            rests[i].program = runs[i].rest;
            members[i].rest = &rests[i];
        }
    }
    unsigned mode = tsad_flush_denormals();
    if (row == TSAD_BEFORE_ROWS) {
        for (int i = 0; i < n; i++) {
            if (runs[i].sums == TSAD_MAKE_SUMS) {
                tsad_cpu_keep_sums(&members[i]);
                tsad_worker_meet(w);
            }
        }
        row = 0;
    }
    for (; row < row_end; row++) {
        for (int i = 0; i < n; i++) {
            members[i].row = row;
            members[i].step = row + runs[i].first_step;
            members[i].run = &runs[i];
            members[i].looks = 0;
        }
        if (n == 1 && w->shares && runs->sampler && shares_work(members->net, program, row) &&
            !tsad_turn(w, row)) {
            stays = false;
            break;
        }
        if (w->size == 1 && runs->sampler && tsad_cpu_stops(w)) {
            break;
        }
        if (n > 1) {
            run_row_of_gang(members, n);
            continue;
        }
        if (run_closed(members)) {
            continue;
        }
        int32_t at = program->row_start[row], end = program->row_start[row + 1];
        for (const tsad_op *op; (op = op_at(members, &at, &end)); at++) {
            run_op(members, op);
        }
    }
    tsad_restore_denormals(mode);
    return stays;
}

tsad_status tsad_cpu_run(tsad_queue *w, const tsad_run *runs, int n, int row_begin, int row_end)
{
    if (runs->sampler) {
        const tsad_model *m = w->engine->model;
        for (int i = 0; i < n; i++) {
            memset(w->members[i].x0, 0,
                   sizeof(float) * 2 * (size_t)m->horizon * (size_t)tsad_pad(m->action_dim));
        }
        if (w->shares) {
            tsad_publish(w, runs, row_end);
            tsad_turn(w, TSAD_BEFORE_ROWS);
        }
        tsad_cpu_rows(w, runs, n, row_begin == 0 ? TSAD_BEFORE_ROWS : row_begin, row_end);
    } else if (runs->rows_apart && n == 1) {
        tsad_share_rows(w, runs, row_begin, row_end);
    } else { /* rank 0's */
        int size = w->size;
        w->size = 1;
        tsad_cpu_rows(w, runs, n, row_begin, row_end);
        w->size = size;
    }
    return tsad_cpu_stops(w) ? TSAD_INTERRUPTED : TSAD_OK;
}
