/* rule.c: a rule of rows looks at what a row has come to, and says whether its rest is computed.
 *
 * Every thread that shares a chunk has the same numbers in registers of its own, so each decides by
 * itself and all decide alike; so does every lane of a gang, by nothing but its own numbers.
 */
#include "cpu.h"

#include <limits.h>
#include <math.h>
#include <string.h>

/* sum |now - then| / sum |then| of what the network sees: beside it may be anything; sums in one
 * order, whoever computes them */
static double change(const tsad_rule_state *s, const tsad_register *r)
{
    double apart = 0, size = 0;
    for (int t = 0; t < r->tokens; t++) {
        const float *now = s->now + (size_t)t * (size_t)tsad_pad(r->channels);
        const float *then = s->then + (size_t)t * (size_t)tsad_pad(r->channels);
        for (int i = 0; i < r->channels; i++) {
            apart += fabs((double)now[i] - (double)then[i]);
            size += fabs((double)then[i]);
        }
    }
    return apart / (size > 0 ? size : 1);
}

/* The first blocks' residual differs by the threshold from that of the last row computed. */
static bool blocks_differ(const tsad_rule *rule, tsad_rule_state *s, int row,
                          const tsad_register *r)
{
    if (row > 0 && (s->computed >= rule->most || change(s, r) < rule->threshold)) {
        return false;
    }
    memcpy(s->then, s->now, sizeof(float) * tsad_register_floats(r));
    return true;
}

/* Changes of the input from row to row have added up to the threshold; or this is the last row, for
 * which one of `most` is kept. */
static bool inputs_differ(const tsad_rule *rule, tsad_rule_state *s, int row, int rows,
                          const tsad_register *r)
{
    double moved = row > 0 ? change(s, r) : 0, term = 0;
    for (int i = TSAD_RULE_TERMS - 1; i >= 0; i--) {
        term = term * moved + rule->polynomial[i];
    }
    memcpy(s->then, s->now, sizeof(float) * tsad_register_floats(r));
    s->total += row > 0 ? term : 0;
    bool ends = row == 0 || row == rows - 1;
    if (!ends && (s->computed >= rule->most - 1 || s->total < rule->threshold)) {
        return false;
    }
    s->total = 0;
    return true;
}

static bool computes(const context *c)
{
    const tsad_run *run = c->run;
    const tsad_node *first = &c->net->nodes[c->net->block_node[0]];
    tsad_rule_state *s = c->member->rule;
    const float *x = reg(c, first->out);
    const tsad_register *r = &c->net->registers[first->out];
    size_t n = tsad_register_floats(r);
    bool yes;
    if (c->row == 0) {
        s->computed = 0;
        s->total = 0;
    }
    if (run->rule->blocks > 0) {
        for (size_t i = 0; i < n; i++) {
            s->now[i] = x[i] - s->now[i];
        }
        yes = blocks_differ(run->rule, s, c->row, r);
    } else {
        memcpy(s->now, x, sizeof(float) * n);
        yes = inputs_differ(run->rule, s, c->row, run->program->n_rows, r);
    }
    s->computed += yes;
    if (c->w->rank == 0) {
        run->looked[c->row] = yes;
    }
    return yes;
}

const tsad_op *tsad_cpu_look(context *c, int32_t *at, int32_t *end)
{
    const tsad_run *run = c->run;
    const tsad_op *op = &run->program->ops[*at];
    int node = op->node >= 0 ? op->node : INT_MAX, first = c->net->block_node[0];
    if (c->looks == 0 && node >= first) {
        c->looks = 1;
        if (run->rule->blocks > 0) { /* what these add is seen by what was there before */
            memcpy(c->member->rule->now, reg(c, c->net->nodes[first].out),
                   sizeof(float) *
                       tsad_register_floats(&c->net->registers[c->net->nodes[first].out]));
        }
    }
    if (c->looks == 1 && node >= c->net->block_node[run->rule->blocks]) {
        c->looks = 2;
        if (!computes(c)) { /* up to here the two programs are the same */
            int32_t done = *at - run->program->row_start[c->row];
            c->run = c->rest;
            *at = c->rest->program->row_start[c->row] + done;
            *end = c->rest->program->row_start[c->row + 1];
            op = &c->rest->program->ops[*at];
        }
    }
    return op;
}
