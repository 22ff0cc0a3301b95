/* reuse.c: additions of branches that were computed before, and their sums. */
#include "cpu.h"

#include <string.h>

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

/* x += n slots from `at` on, after `kept` where that is not NULL */
static void add_slots(const context *c, float *x, const float *kept, const int32_t *source,
                      const float *count, int n, size_t at, size_t floats)
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
            from[m] = tsad_cpu_slot(c, source[i]) + at;
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

void tsad_cpu_add(const context *c, const tsad_op *op)
{
    const tsad_node *node = &c->net->nodes[op->node];
    size_t at = 0, floats = tsad_register_floats(&c->net->registers[node->out]);
    if (c->net->wide) { /* one set of registers: to each thread its share */
        size_t end;
        tsad_cpu_share(c->w, floats, &at, &end);
        floats = end - at;
    }
    float *x = reg(c, node->out) + at;
    if (!op->repeat) {
        const float *sums = c->run->sums != TSAD_NO_SUMS ? c->lane->sums : NULL;
        const float *kept = op->kept >= 0 && sums ? sums + op->kept + at : NULL;
        int known = kept ? op->n_rollout : 0;
        const int32_t *source = c->run->program->sources + op->src + known;
        const float *count = c->run->program->counts + op->src + known;
        float *to = op->remember ? c->member->sums[op->remember - 1] + at : x;
        if (op->remember) {
            c->member->table_ready[op->remember - 1] = false;
            memset(to, 0, sizeof(float) * floats);
        }
        if (!c->net->wide) { /* there the threads have met */
            settle_reads(c, source, op->n_src - known);
        }
        add_slots(c, to, kept, source, count, op->n_src - known, at, floats);
        if (kept) { /* the next sum of the lane: they lie in the order of their use */
            fetch(kept + floats, floats);
        }
    }
    if (op->repeat || op->remember) {
        const float *sum = c->member->sums[(op->repeat ? op->repeat : op->remember) - 1] + at;
        const float one = 1;
        c->k->add(x, &sum, &one, 1, floats);
    }
}

void tsad_cpu_keep_sums(const context *c)
{
    const tsad_program *program = c->run->program;
    const float one = 1;
    for (int i = 0; i < program->n_ops; i++) {
        const tsad_op *op = &program->ops[i];
        if (op->kind != TSAD_OP_ADD || op->kept < 0) {
            continue;
        }
        size_t from, to;
        tsad_cpu_share(c->w, tsad_register_floats(&c->net->registers[c->net->nodes[op->node].out]),
                       &from, &to);
        float *sum = c->lane->sums + op->kept + from;
        memset(sum, 0, sizeof(float) * (to - from));
        for (int s = 0; s < op->n_rollout; s++) {
            const float *slot = tsad_cpu_slot(c, program->sources[op->src + s]) + from;
            c->k->add(sum, &slot, &one, 1, to - from);
        }
    }
}

void tsad_cpu_add_gated(const context *c, const tsad_op *op)
{
    const int32_t *source = c->run->program->sources + op->src;
    const tsad_node *node = &c->net->nodes[op->node];
    const tsad_register *out = &c->net->registers[node->out];
    settle_reads(c, source, 1);
    const float *slot = tsad_cpu_slot(c, source[0]);
    const float *gate = tsad_cpu_gate(c, node);
    int ld = tsad_pad(out->channels);
    float *x = reg(c, node->out);
    for (int t = 0; t < out->tokens; t++) {
        for (int i = 0; i < out->channels; i++) {
            x[t * ld + i] += slot[t * ld + i] * gate[i];
        }
    }
}
