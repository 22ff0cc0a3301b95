/* block.c: prunable branches, and how threads share them.
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
 */
#include "cpu.h"

#include <string.h>

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
    if (!tsad_is_rounded(w)) {
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

/* queries and keys of one lane's heads by their positions */
static void rotate(const float *turns, float *qkv, int ld, int tokens, int heads, int head_dim)
{
    int half = head_dim / 2;
    for (int t = 0; t < tokens; t++) {
        const float *cosine = turns + (size_t)t * (size_t)head_dim, *sine = cosine + half;
        for (int h = 0; h < 2 * heads; h++) { /* keys follow queries */
            float *x = qkv + (size_t)t * (size_t)ld + h * head_dim;
            for (int i = 0; i < half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a * cosine[i] - b * sine[i];
                x[i + half] = b * cosine[i] + a * sine[i];
            }
        }
    }
}

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
    if (tsad_is_rounded(first)) {
        c->k->linear16(first, &input->rounded, rows, act, work, ld);
    } else {
        c->k->linear(first, input->x, ldx, rows, act, work, ld);
    }
    if (attention) {
        int width = first->n_out / 3, heads = node->n_heads / packed->n_parts;
        size_t lane = (size_t)T * (size_t)tsad_pad(width);
        for (int i = 0; i < n; i++) {
            if (node->table) {
                rotate(node->table, work + (size_t)(i * T) * (size_t)ld, ld, T, heads,
                       width / heads);
            }
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
        tokens[s] = tsad_folded(m, c->lane, c->row, c->step, node->layer, s);
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
    if (tsad_is_rounded(((const tsad_cpu_node *)node->packed)->list)) {
        const tsad_register *in = &c->net->registers[node->in];
        int rows = n * in->tokens;
        input.rounded = tsad_cpu_round(c->k, x, tsad_pad(in->channels), rows, in->channels, work);
        work += tsad_rounded_floats(rows, in->channels);
    }
    for (int p = begin; p < end; p++) {
        block_part(c, n, node, p, &input, work, part[p]);
    }
}

const float *tsad_cpu_gate(const context *c, const tsad_node *node)
{
    int channels = c->net->registers[node->out].channels;
    if (!node->modulated) {
        return node->table + (size_t)c->step * (size_t)channels;
    }
    float *gate = c->w->terms + 2 * c->w->engine->branch_channels;
    tsad_cpu_terms(c, node->term + 2 * channels, channels, gate);
    return gate;
}

/* rows of a lane's normalised input, moved and scaled by its terms */
static void modulate(const context *c, const tsad_node *node, float *x)
{
    const tsad_register *in = &c->net->registers[node->in];
    float *move = c->w->terms, *scale = move + c->w->engine->branch_channels;
    tsad_cpu_terms(c, node->term, in->channels, move);
    tsad_cpu_terms(c, node->term + in->channels, in->channels, scale);
    for (int t = 0; t < in->tokens; t++, x += tsad_pad(in->channels)) {
        for (int i = 0; i < in->channels; i++) {
            x[i] = x[i] * scale[i] + move[i];
        }
    }
}

/* out register += branch, slot = branch */
static void deliver(const context *c, const tsad_op *op, const float *const *group, int n,
                    size_t floats)
{
    const tsad_node *node = &c->net->nodes[op->node];
    float *slot = op->dst >= 0 ? tsad_cpu_slot(c, op->dst) : NULL;
    float *x = reg(c, node->out);
    if (node->cache_point == TSAD_BEFORE_GATE) {
        int C = c->net->registers[node->out].channels, ld = tsad_pad(C);
        const float *gate = tsad_cpu_gate(c, node);
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
    tsad_cpu_share(c->w, floats, &from, &to);
    const float *at[TSAD_PARTS];
    const size_t cut[4] = {0, from, to, floats};
    for (int piece = 0; piece < 3; piece++) {
        for (int g = 0; g < n; g++) {
            at[g] = group[g] + cut[piece];
        }
        if (piece == 1 && c->run->audit) {
            tsad_cpu_audit(c, op, slot + from, at, n, from, to - from);
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
            c->k->layernorm(x, tsad_pad(in->channels), in->tokens, in->channels, node->eps,
                            to + (size_t)i * floats);
            if (node->modulated) {
                modulate(&members[i], node, to + (size_t)i * floats);
            }
        } else {
            memcpy(to + (size_t)i * floats, x, sizeof(float) * floats);
        }
    }
    return to;
}

void tsad_cpu_compute(const context *members, int n, const tsad_op *const *op)
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
    float *shared = w->engine->exchange + w->parity * TSAD_PARTS * w->engine->branch_floats;
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
        deliver(&members[i], op[i], group, groups, floats);
    }
    if (keeps) {
        w->write_epoch[node->block] = w->epoch;
    }
}
