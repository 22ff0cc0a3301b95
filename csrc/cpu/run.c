/* run.c: the interpreter that all CPU paths share, and how threads share one lane.
 *
 * Every thread keeps its own copy of the registers and walks the same program. A split block
 * (self-attention by heads, feed-forward by hidden units) is computed in parts whose number is
 * fixed at packing; each thread computes its parts, they meet once, and each sums all parts in
 * the same tree, so the bits do not depend on the number of threads. Everything else is small
 * and done by each thread for itself.
 *
 * Slots are shared: after a block each thread writes its share of the rows. Two hazards follow,
 * settled by epochs (an epoch ends at every meeting): a slot read in the epoch it was written in,
 * and a slot overwritten by a block that has no meeting (cross-attention) in the epoch in which
 * another thread may still read it. Both cost one extra meeting; all threads see the same ops,
 * so they agree on when.
 *
 * Threads that come late join at the start of a row, and are released there when a core is taken by
 * another process (join.c).
 */
#include "cpu.h"

#include <limits.h>
#include <string.h>

#if defined(__SSE__)
#include <xmmintrin.h>
static unsigned flush_denormals(void)
{
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); /* flush to zero, denormals are zero */
    return before;
}
static void restore_denormals(unsigned before) { _mm_setcsr(before); }
#elif defined(__aarch64__)
static unsigned flush_denormals(void)
{
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" ::"r"(before | (1u << 24)));
    return (unsigned)before;
}
static void restore_denormals(unsigned before)
{
    __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)before));
}
#else
static unsigned flush_denormals(void) { return 0; }
static void restore_denormals(unsigned before) { (void)before; }
#endif

/* Whether a row has work to share. All threads see the same program, so they agree. */
static bool shares_work(const tsad_program *program, int row)
{
    for (int i = program->row_start[row]; i < program->row_start[row + 1]; i++) {
        if (program->ops[i].kind == TSAD_OP_COMPUTE) {
            return true;
        }
    }
    return false;
}

/* a thread's share of `floats`, on cache-line pairs */
static void share(const tsad_worker *w, size_t floats, size_t *from, size_t *to)
{
    size_t units = floats / TSAD_LANE;
    *from = units * (size_t)w->rank / (size_t)w->size * TSAD_LANE;
    *to = units * (size_t)(w->rank + 1) / (size_t)w->size * TSAD_LANE;
}

/* ---- blocks ------------------------------------------------------------------------------ */

tsad_rounded tsad_cpu_round(const tsad_kernels *k, const float *x, int ldx, int rows, int n,
                            float *room)
{
    tsad_rounded r = {.unit = room, .q = (int16_t *)(room + tsad_pad(rows)), .ld = tsad_pad(n)};
    k->round(x, ldx, rows, n, &r);
    return r;
}

void tsad_cpu_linear(const tsad_kernels *k, const tsad_packed *w, const float *x, int ldx, int rows,
                     tsad_activation act, float *y, int ldy, float *room)
{
    if (!w->q) {
        k->linear(w, x, ldx, rows, act, y, ldy);
        return;
    }
    tsad_rounded r = tsad_cpu_round(k, x, ldx, rows, w->n_in, room);
    k->linear16(w, &r, rows, act, y, ldy);
}

/* A block's normalised input; in 16 bits too where its weights are. */
typedef struct operand {
    const float *x;
    tsad_rounded rounded;
} operand;

/* part p of a split block for n lanes' rows together, into y */
static void block_part(const context *c, int n, const tsad_node *node, int p, const operand *input,
                       float *work, float *y)
{
    const tsad_cpu_node *packed = node->packed;
    const tsad_packed *first = &packed->list[2 * p], *second = &packed->list[2 * p + 1];
    const tsad_register *in = &c->net->registers[node->in], *out = &c->net->registers[node->out];
    int T = in->tokens, rows = n * T, ldx = tsad_pad(in->channels), ldy = tsad_pad(out->channels);
    int ld = tsad_pad(first->n_out);
    float *next = work + (size_t)rows * (size_t)ld;
    bool attention = node->kind == TSAD_SELF_ATTENTION;
    tsad_activation act = attention ? TSAD_LINEAR_ONLY : node->activation;
    if (first->q) {
        c->k->linear16(first, &input->rounded, rows, act, work, ld);
    } else {
        c->k->linear(first, input->x, ldx, rows, act, work, ld);
    }
    if (attention) {
        int width = first->n_out / 3, heads = node->n_heads / packed->n_parts;
        size_t lane = (size_t)T * (size_t)tsad_pad(width);
        for (int i = 0; i < n; i++) {
            c->k->attention(work + (size_t)(i * T) * (size_t)ld, ld, T, heads, width / heads,
                            node->causal, next + (size_t)i * lane, tsad_pad(width));
        }
        work = next;
        ld = tsad_pad(width);
        next += (size_t)n * lane;
    }
    tsad_cpu_linear(c->k, second, work, ld, rows, TSAD_LINEAR_ONLY, y, ldy, next);
}

static void conv_branch(const context *c, const tsad_node *node, const float *x, float *work,
                        float *y)
{
    const tsad_packed *list = ((const tsad_cpu_node *)node->packed)->list;
    const tsad_register *in = &c->net->registers[node->in], *out = &c->net->registers[node->out];
    int T = in->tokens, hidden = list[0].n_out, ld = tsad_pad(hidden);
    float *middle = work + (size_t)T * (size_t)tsad_pad(list[0].n_in);
    float *taps = middle + (size_t)T * (size_t)ld;
    const float *from = tsad_cpu_taps(node, x, T, in->channels, T, 1, work);
    float *room = taps + (size_t)T * (size_t)tsad_pad(list[1].n_in);
    tsad_cpu_linear(c->k, &list[0], from, tsad_pad(list[0].n_in), T, node->activation, middle, ld,
                    room);
    from = tsad_cpu_taps(node, middle, T, hidden, T, 1, taps);
    tsad_cpu_linear(c->k, &list[1], from, tsad_pad(list[1].n_in), T, TSAD_LINEAR_ONLY, y,
                    tsad_pad(out->channels), room);
}

static void cross_attention(const context *c, const tsad_node *node, const float *x, float *work,
                            float *y)
{
    const tsad_model *m = c->m;
    const float *tokens[TSAD_MAX_MEMORY];
    for (int s = 0; s < m->n_memory; s++) {
        tokens[s] = tsad_folded(m, c->run->lane, c->row, node->layer, s);
    }
    const tsad_register *in = &c->net->registers[node->in];
    tsad_cross cross = {.tokens = tokens,
                        .n_tokens = m->n_memory,
                        .fold = &m->fold,
                        .bias = ((const tsad_cpu_node *)node->packed)->list[0].bias,
                        .causal = node->causal,
                        .work = work};
    c->k->cross(&cross, x, tsad_pad(in->channels), in->tokens, y);
}

/* how many of `size` threads work on a block of n parts: as many as keep the sum's tree whole */
static int useful_threads(int size, int parts)
{
    if (parts == 4) {
        return size >= 4 ? 4 : size >= 2 ? 2 : 1;
    }
    return size >= parts ? parts : 1;
}

/* this thread's parts of a split block, n lanes' rows together */
static void own_parts(const context *c, int n, const tsad_node *node, int begin, int end,
                      const float *x, float *work, float *const *part)
{
    operand input = {.x = x};
    if (((const tsad_cpu_node *)node->packed)->list[0].q) {
        const tsad_register *in = &c->net->registers[node->in];
        int rows = n * in->tokens;
        input.rounded = tsad_cpu_round(c->k, x, tsad_pad(in->channels), rows, in->channels, work);
        work += tsad_rounded_floats(rows, in->channels);
    }
    for (int p = begin; p < end; p++) {
        block_part(c, n, node, p, &input, work, part[p]);
    }
}

/* out register += branch, slot = branch */
static void deliver(const context *c, const tsad_node *node, float *slot, const float *const *group,
                    int n, size_t floats)
{
    float *x = reg(c, node->out);
    if (node->cache_point == TSAD_BEFORE_GATE) {
        int C = c->net->registers[node->out].channels, ld = tsad_pad(C);
        const float *gate = node->table + (size_t)c->row * (size_t)C;
        memset(c->w->scratch, 0, sizeof(float) * floats);
        c->k->finish(c->w->scratch, NULL, group, n, floats);
        for (size_t i = 0; i < floats; i++) {
            x[i] += (int)(i % (size_t)ld) < C ? c->w->scratch[i] * gate[i % (size_t)ld] : 0;
        }
        x = c->w->scratch; /* the slot keeps the branch before its gate */
        memset(x, 0, sizeof(float) * floats);
    }
    if (!slot) {
        c->k->finish(x, NULL, group, n, floats);
        return;
    }
    size_t from, to;
    share(c->w, floats, &from, &to);
    const float *at[TSAD_PARTS];
    const size_t cut[4] = {0, from, to, floats};
    for (int piece = 0; piece < 3; piece++) {
        for (int g = 0; g < n; g++) {
            at[g] = group[g] + cut[piece];
        }
        c->k->finish(x + cut[piece], piece == 1 ? slot + from : NULL, at, n,
                     cut[piece + 1] - cut[piece]);
    }
}

/* inputs of n lanes, normalised where the node asks for it, one after the other; a lane alone that
 * needs no normalising stays where it is */
static const float *gather(const context *members, int n, const tsad_node *node, float *to)
{
    const context *c = members;
    const tsad_register *in = &c->net->registers[node->in];
    size_t floats = tsad_register_floats(in);
    if (n == 1 && !node->normalise) {
        return reg(c, node->in);
    }
    for (int i = 0; i < n; i++) {
        const float *x = reg(&members[i], node->in);
        if (node->normalise) {
            c->k->layernorm(x, tsad_pad(in->channels), in->tokens, in->channels,
                            to + (size_t)i * floats);
        } else {
            memcpy(to + (size_t)i * floats, x, sizeof(float) * floats);
        }
    }
    return to;
}

/* The same branch of n lanes, each with its own slot to keep it in; n > 1 on one thread only. */
static void compute(const context *members, int n, const tsad_op *const *op)
{
    const context *c = members;
    tsad_worker *w = c->w;
    const tsad_node *node = &c->net->nodes[op[0]->node];
    size_t floats = tsad_register_floats(&c->net->registers[node->out]), all = floats * (size_t)n;
    size_t in_floats = tsad_register_floats(&c->net->registers[node->in]);
    float *scratch = w->scratch + floats; /* the first stretch belongs to deliver */
    const float *x = gather(members, n, node, scratch);
    scratch += x == scratch ? in_floats * (size_t)n : 0;
    bool keeps = op[0]->dst >= 0;
    int parts = ((const tsad_cpu_node *)node->packed)->n_parts;
    bool split = node->kind == TSAD_SELF_ATTENTION || node->kind == TSAD_FEED_FORWARD;
    float *part[TSAD_PARTS] = {NULL};
    const float *group[TSAD_PARTS];
    float *shared = w->policy->exchange + w->parity * TSAD_PARTS * w->policy->branch_floats;
    for (int p = 0; p < parts; p++) {
        part[p] = split && w->size > 1 ? shared + (size_t)p * floats : scratch + (size_t)p * all;
    }
    float *work = split && w->size > 1 ? scratch : scratch + (size_t)parts * all;
    int groups = 1, own = parts;
    if (!split) {
        for (int i = 0; i < n; i++) {
            const float *from = x + (size_t)i * in_floats;
            float *to = part[0] + (size_t)i * floats;
            if (node->kind == TSAD_CROSS_ATTENTION) {
                cross_attention(&members[i], node, from, work, to);
            } else {
                conv_branch(&members[i], node, from, work, to);
            }
        }
        if (keeps && w->size > 1 &&
            (w->read_epoch[node->block] == w->epoch || w->write_epoch[node->block] == w->epoch)) {
            tsad_worker_meet(w);
        }
    } else {
        groups = useful_threads(w->size, parts);
        own = parts / groups;
        bool pairs = groups == 2 && own == 2; /* half as much to read for the other thread */
        if (w->rank < groups) {
            own_parts(c, n, node, w->rank * own, (w->rank + 1) * own, x, work, part);
        }
        if (pairs && w->rank < groups) {
            const float *second = part[2 * w->rank + 1], one = 1;
            c->k->add(part[2 * w->rank], &second, &one, 1, all);
        }
        if (!pairs) {
            groups = parts;
            own = 1;
        }
        if (w->size > 1) {
            tsad_worker_meet(w);
            w->parity ^= 1;
        }
    }
    for (int i = 0; i < n; i++) {
        for (int g = 0; g < groups; g++) {
            group[g] = part[g * own] + (size_t)i * floats;
        }
        float *slot = keeps ? tsad_slot(c->net, members[i].run->lane, op[i]->dst) : NULL;
        deliver(&members[i], node, slot, group, groups, floats);
    }
    if (keeps) {
        w->write_epoch[node->block] = w->epoch;
    }
}

/* ---- reuse ------------------------------------------------------------------------------- */

/* before reading slots: meet if any was written since the last meeting */
static void settle_reads(const context *c, const int32_t *source, int n)
{
    tsad_worker *w = c->w;
    if (w->size == 1) {
        return;
    }
    for (int i = 0; i < n; i++) {
        if (w->write_epoch[source[i] % c->net->n_blocks] == w->epoch) {
            tsad_worker_meet(w);
            break;
        }
    }
    for (int i = 0; i < n; i++) {
        w->read_epoch[source[i] % c->net->n_blocks] = w->epoch;
    }
}

enum { AT_ONCE = 64 }; /* arrays that one addition sums */

/* x += n slots, after `kept` where that is not NULL */
static void add_slots(const context *c, float *x, const float *kept, const int32_t *source,
                      const float *count, int n, size_t floats)
{
    const float *from[AT_ONCE];
    float weight[AT_ONCE];
    int m = 0;
    if (kept) {
        from[m] = kept;
        weight[m++] = 1;
    }
    for (int i = 0; i < n || m; i++) {
        if (m == AT_ONCE || i >= n) {
            c->k->add(x, from, weight, m, floats);
            m = 0;
        }
        if (i < n) {
            from[m] = tsad_slot(c->net, c->run->lane, source[i]);
            weight[m++] = count[i];
        }
    }
}

/* ask for memory that will be read soon */
static void fetch(const float *from, size_t floats)
{
    for (size_t i = 0; i < floats; i += 16) {
        __builtin_prefetch(from + i, 0, 2);
    }
}

static void add_reused(const context *c, const tsad_op *op)
{
    const tsad_node *node = &c->net->nodes[op->node];
    size_t floats = tsad_register_floats(&c->net->registers[node->out]);
    float *x = reg(c, node->out);
    if (!op->repeat) {
        const float *sums = c->run->lane->sums_use ? c->run->lane->sums : NULL;
        const float *kept = op->kept >= 0 && sums ? sums + op->kept : NULL;
        int known = kept ? op->n_rollout : 0;
        const int32_t *source = c->run->program->sources + op->src + known;
        const float *count = c->run->program->counts + op->src + known;
        float *to = op->remember ? c->run->member->sums[op->remember - 1] : x;
        if (op->remember) {
            c->run->member->table_ready[op->remember - 1] = false;
            memset(to, 0, sizeof(float) * floats);
        }
        settle_reads(c, source, op->n_src - known);
        add_slots(c, to, kept, source, count, op->n_src - known, floats);
        if (kept) { /* the next sum of the lane: they lie in the order of their use */
            fetch(kept + floats, floats);
        }
    }
    if (op->repeat || op->remember) {
        const float *sum = c->run->member->sums[(op->repeat ? op->repeat : op->remember) - 1];
        const float one = 1;
        c->k->add(x, &sum, &one, 1, floats);
    }
}

void tsad_cpu_keep(tsad_worker *w, tsad_lane *lane)
{
    const tsad_model *m = w->policy->model;
    const tsad_program *program = lane->program;
    const tsad_kernels *k = tsad_cpu_kernels(m);
    const float one = 1;
    unsigned mode = flush_denormals();
    for (int i = 0; i < program->n_ops; i++) {
        const tsad_op *op = &program->ops[i];
        if (op->kind != TSAD_OP_ADD || op->kept < 0) {
            continue;
        }
        size_t from, to;
        share(w, tsad_register_floats(&m->net.registers[m->net.nodes[op->node].out]), &from, &to);
        float *sum = lane->sums + op->kept + from;
        memset(sum, 0, sizeof(float) * (to - from));
        for (int s = 0; s < op->n_rollout; s++) {
            const float *slot = tsad_slot(&m->net, lane, program->sources[op->src + s]) + from;
            k->add(sum, &slot, &one, 1, to - from);
        }
    }
    restore_denormals(mode);
}

static void add_gated(const context *c, const tsad_op *op)
{
    const int32_t *source = c->run->program->sources + op->src;
    const tsad_node *node = &c->net->nodes[op->node];
    const tsad_register *out = &c->net->registers[node->out];
    settle_reads(c, source, 1);
    const float *slot = tsad_slot(c->net, c->run->lane, source[0]);
    const float *gate = node->table + (size_t)c->row * (size_t)out->channels;
    int ld = tsad_pad(out->channels);
    float *x = reg(c, node->out);
    for (int t = 0; t < out->tokens; t++) {
        for (int i = 0; i < out->channels; i++) {
            x[t * ld + i] += slot[t * ld + i] * gate[i];
        }
    }
}

/* ---- the sampler and the loop ------------------------------------------------------------- */

static void update_sample(const context *c)
{
    const float *t = c->m->sampler + (size_t)c->row * TSAD_SAMPLER_COLUMNS;
    float a = t[0], b = t[1], r = t[2], cx0 = t[3], d = t[4], f = t[5], g = t[6], h = t[7];
    const tsad_run *run = c->run;
    const float *z = h != 0 ? run->noise + (size_t)(c->row + 1) * run->noise_step : NULL;
    float *x = reg(c, c->net->input), *previous = run->member->previous_x0;
    const float *e = reg(c, c->net->output);
    int ld = tsad_pad(c->m->action_dim), A = c->m->action_dim;
    for (int i = 0; i < c->m->horizon; i++) {
        for (int j = 0; j < A; j++) {
            int at = i * ld + j;
            float x0 = a * x[at] + b * e[at];
            x0 = x0 > r ? r : x0 < -r ? -r : x0;
            float next = cx0 * x0 + d * x[at] + f * e[at] + g * previous[at];
            x[at] = z ? next + h * z[i * A + j] : next;
            previous[at] = x0;
        }
    }
}

static void run_op(const context *c, const tsad_op *op)
{
    switch (op->kind) {
    case TSAD_OP_NODE:
        tsad_cpu_fixed(c, &c->net->nodes[op->node]);
        break;
    case TSAD_OP_COMPUTE:
        compute(c, 1, &op);
        break;
    case TSAD_OP_ADD:
        add_reused(c, op);
        break;
    case TSAD_OP_GATED:
        add_gated(c, op);
        break;
    case TSAD_OP_UPDATE:
        if (c->run->update) {
            update_sample(c);
        }
        break;
    default:
        break;
    }
}

/* a row in closed form; false: this one is not */
static bool run_closed(const context *c)
{
    int closed = c->run->program->closed[c->row];
    if (!closed || !c->run->update) {
        return false;
    }
    tsad_cpu_closed(c, closed - 1);
    update_sample(c);
    return true;
}

/* One row of n lanes with programs of their own: always the earliest node that any of them has
 * next, and where several compute it, all of them at once. */
static void run_row_of_gang(const context *members, int n)
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
            const tsad_op *op = at[i] < end[i] ? &members[i].run->program->ops[at[i]] : NULL;
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
            const tsad_op *op = at[i] < end[i] ? &members[i].run->program->ops[at[i]] : NULL;
            if (!op || (op->node >= 0 ? op->node : INT_MAX) != node) {
                continue;
            }
            at[i]++;
            bool fold = op->kind == TSAD_OP_NODE && members->net->nodes[node].kind == TSAD_FOLD;
            if (op->kind == TSAD_OP_COMPUTE || fold) {
                together[m] = members[i];
                ops[m++] = op;
            } else {
                run_op(&members[i], op);
            }
        }
        if (m && ops[0]->kind == TSAD_OP_COMPUTE) {
            compute(together, m, ops);
        } else if (m) {
            tsad_cpu_fold(together, m, &members->net->nodes[node]);
        }
    }
}

void tsad_cpu_run(tsad_worker *w, const tsad_run *runs, int n, int row_begin, int row_end)
{
    const tsad_model *m = w->policy->model;
    context members[TSAD_GANG];
    for (int i = 0; i < n; i++) {
        members[i] = (context){
            .w = w, .run = &runs[i], .k = tsad_cpu_kernels(m), .m = m, .net = runs[i].net};
    }
    const tsad_program *program = runs[0].program;
    unsigned mode = flush_denormals();
    for (int row = row_begin; row < row_end; row++) {
        for (int i = 0; i < n; i++) {
            members[i].row = row;
        }
        if (n > 1) {
            run_row_of_gang(members, n);
            continue;
        }
        if (w->shares && runs->update && shares_work(program, row) && !tsad_turn(w, row)) {
            break;
        }
        if (run_closed(members)) {
            continue;
        }
        for (int i = program->row_start[row]; i < program->row_start[row + 1]; i++) {
            run_op(members, &program->ops[i]);
        }
    }
    restore_denormals(mode);
}
