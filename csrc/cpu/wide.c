/* wide.c: nodes of a net whose weights are most of its work: convolutions over few tokens.
 *
 * All threads see one set of registers. A node has one phase or two; in each, every thread makes
 * its share of the output channels, whole groups of a GroupNorm, for all tokens, and then they
 * meet. So every weight is read once, by one thread, and a channel's sum does not depend on who
 * makes it.
 *
 * A convolution is a matrix product over rows that overlap: a register's rows lie one after the
 * other between rows of zeros, so the taps of token t are the `kernel` rows from t - kernel / 2 on.
 */
#include "cpu.h"

#include <string.h>

/* output channels of a node that are this thread's */
typedef struct range {
    int from, to;
} range;

static range own(const context *c, int n_parts, int unit)
{
    const tsad_worker *w = c->w;
    return (range){n_parts * w->rank / w->size * unit, n_parts * (w->rank + 1) / w->size * unit};
}

/* Rows of one lane's registers that a product reads, and where it writes. */
typedef struct product {
    const float *x;
    float *y; /* at the first channel of the range */
} product;

/* Channels [r.from, r.to) of n lanes' products with one matrix, `rows` rows each. Panel by panel
 * for all lanes, so that a panel comes from memory once. */
static void multiply(const context *c, const tsad_packed *w, const product *lanes, int n, int rows,
                     int ldx, range r, int ldy, float *room)
{
    int panel = n > 1 && !w->thin ? c->k->panel : r.to - r.from;
    tsad_rounded rounded[TSAD_GANG];
    for (int i = 0; i < n && tsad_is_rounded(w); i++) {
        rounded[i] = tsad_cpu_round(c->k, lanes[i].x, ldx, rows, w->n_in,
                                    room + (size_t)i * tsad_rounded_floats(rows, w->n_in));
    }
    size_t inputs = w->thin ? (size_t)tsad_pad(w->n_in) : (size_t)w->n_in;
    size_t pairs = ((size_t)w->n_in + 1) / 2 * 2;
    for (int at = r.from; at < r.to; at += panel) {
        tsad_packed part = *w;
        part.n_out = r.to - at < panel ? r.to - at : panel;
        part.bias = w->bias + at;
        if (tsad_is_rounded(w)) {
            part.q = w->q ? w->q + (size_t)at * pairs : NULL;
            part.q8 = w->q8 ? w->q8 + (size_t)at * pairs : NULL;
            part.unit = w->unit + at;
        } else {
            part.w = w->w + (size_t)at * inputs;
        }
        for (int i = 0; i < n; i++) {
            float *y = lanes[i].y + (at - r.from);
            if (tsad_is_rounded(w)) {
                c->k->linear16(&part, &rounded[i], rows, TSAD_LINEAR_ONLY, y, ldy);
            } else {
                c->k->linear(&part, lanes[i].x, ldx, rows, TSAD_LINEAR_ONLY, y, ldy);
            }
        }
    }
}

/* scale and move of this row for channels [r.from, r.to): what depends on the step, and what on the
 * observation; to: room for twice as many */
static void add_terms(const context *c, const tsad_node *node, range r, tsad_after *after,
                      float *to)
{
    int n = r.to - r.from, channels = c->net->registers[node->out].channels;
    for (int part = 0; part <= node->scales; part++) {
        tsad_cpu_terms(c, node->term + part * channels + r.from, n, to + part * n);
    }
    after->scale = node->scales ? to : NULL;
    after->move = node->scales ? to + n : to;
}

/* what follows the i-th convolution of a node, in place on y (rows, r) */
static void finish(const context *c, const tsad_node *node, int i, bool terms, float *y, int ldy,
                   int rows, range r, float *room)
{
    int channels = c->net->registers[node->out].channels, n = channels / node->groups[i];
    const float *norm = node->norm + 2 * (size_t)i * (size_t)channels;
    tsad_after all = {.activation = node->activation};
    if (terms) {
        add_terms(c, node, r, &all, room);
    }
    for (int g = r.from; g < r.to; g += n) {
        int at = g - r.from;
        tsad_after after = all;
        after.gain = norm + g;
        after.shift = norm + channels + g;
        after.scale = all.scale ? all.scale + at : NULL;
        after.move = all.move ? all.move + at : NULL;
        c->k->groupnorm(y + at, ldy, rows, n, &after);
    }
}

/* The i-th convolution of a node with what follows it, from register `in`. The result is written to
 * `to` (n lanes), or, with slots, kept in them where given and added to `to`. */
static void conv_norm(const context *members, int n, const tsad_node *node, int i, int in, int to,
                      bool terms, bool adds, float *const *slots)
{
    const context *c = members;
    const tsad_cpu_node *packed = node->packed;
    const tsad_packed *w = &packed->list[i];
    range r = own(c, packed->n_parts, packed->unit);
    int rows = c->net->registers[to].tokens, ld = tsad_pad(c->net->registers[to].channels);
    int ldx = tsad_pad(c->net->registers[in].channels), ldy = tsad_pad(r.to - r.from);
    if (r.from == r.to) {
        return;
    }
    float *y = c->w->scratch, *room = y + (size_t)(n * rows) * (size_t)ldy;
    product lanes[TSAD_GANG] = {0};
    for (int l = 0; l < n; l++) {
        lanes[l].x = reg(&members[l], in) - node->kernel / 2 * ldx;
        lanes[l].y = y + (size_t)(l * rows) * (size_t)ldy;
    }
    multiply(c, w, lanes, n, rows, ldx, r, ldy, room);
    size_t bytes = sizeof(float) * (size_t)(r.to - r.from);
    for (int l = 0; l < n; l++) {
        finish(&members[l], node, i, terms, lanes[l].y, ldy, rows, r, room);
        for (int t = 0; t < rows; t++) {
            const float *from = lanes[l].y + (size_t)t * (size_t)ldy;
            size_t at = (size_t)t * (size_t)ld + (size_t)r.from;
            float *out = reg(&members[l], to) + at;
            if (!adds) {
                memcpy(out, from, bytes);
                continue;
            }
            if (slots[l]) {
                memcpy(slots[l] + at, from, bytes);
            }
            for (int o = 0; o < r.to - r.from; o++) {
                out[o] += from[o];
            }
        }
    }
}

/* the i-th matrix of a convolution without more: rows from `first` on, `stride` apart, to rows from
 * `begin` on, `step` apart */
static void conv(const context *members, int n, const tsad_node *node, int i, int first, int stride,
                 int begin, int step)
{
    const context *c = members;
    const tsad_cpu_node *packed = node->packed;
    const tsad_register *in = &c->net->registers[node->in], *out = &c->net->registers[node->out];
    range r = own(c, packed->n_parts, packed->unit);
    int ldx = tsad_pad(in->channels), ldy = tsad_pad(out->channels);
    product lanes[TSAD_GANG] = {0};
    if (r.from == r.to) {
        return;
    }
    for (int l = 0; l < n; l++) {
        lanes[l].x = reg(&members[l], node->in) + first * ldx;
        lanes[l].y = reg(&members[l], node->out) + begin * ldy + r.from;
    }
    multiply(c, &packed->list[i], lanes, n, out->tokens / step, stride * ldx, r, step * ldy,
             c->w->scratch);
}

/* copies, by tokens */
static void move(const context *c, const tsad_node *node)
{
    const tsad_register *in = &c->net->registers[node->in], *out = &c->net->registers[node->out];
    int ld = tsad_pad(in->channels), ldy = tsad_pad(out->channels);
    range r = own(c, out->tokens, 1);
    for (int t = r.from; t < r.to; t++) {
        memcpy(reg(c, node->out) + t * ldy, reg(c, node->in) + t * ld,
               sizeof(float) * (size_t)in->channels);
        if (node->kind == TSAD_CONCAT) {
            const tsad_register *in2 = &c->net->registers[node->in2];
            memcpy(reg(c, node->out) + t * ldy + in->channels,
                   reg(c, node->in2) + t * tsad_pad(in2->channels),
                   sizeof(float) * (size_t)in2->channels);
        }
    }
}

void tsad_cpu_wide(const context *members, int n, const tsad_node *node, float *const *slots)
{
    switch (node->kind) {
    case TSAD_FILM_BRANCH:
        conv_norm(members, n, node, 0, node->in, node->in2, true, false, NULL);
        tsad_worker_meet(members->w);
        conv_norm(members, n, node, 1, node->in2, node->out, false, true, slots);
        break;
    case TSAD_CONV_NORM:
        conv_norm(members, n, node, 0, node->in, node->out, false, false, NULL);
        break;
    case TSAD_CONV_TRANSPOSED:
        conv(members, n, node, 0, -1, 1, 0, 2);
        conv(members, n, node, 1, 0, 1, 1, 2);
        break;
    case TSAD_CONV:
        conv(members, n, node, 0, -(node->kernel / 2), node->stride, 0, 1);
        break;
    default:
        for (int l = 0; l < n; l++) {
            move(&members[l], node);
        }
    }
    tsad_worker_meet(members->w);
}
