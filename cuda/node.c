/* node.c: what each kind of node launches. Between its launches rows lie in the engine's scratch:
 * [0] normalised or convolved, [1] and [2] the middle of a block. */
#include "cuda.h"

static float *reg(const tsad_cuda_context *c, int i) { return c->registers[i]; }

static const tsad_register *shape(const tsad_cuda_context *c, int i)
{
    return &c->net->registers[i];
}

tsad_term tsad_cuda_terms(const tsad_cuda_context *c, int at)
{
    return (tsad_term){.step = c->cuda->time_terms + (size_t)c->step * (size_t)c->m->n_terms + at,
                       .lane = c->lane->array[TSAD_ARRAY_TERMS] + at};
}

tsad_term tsad_cuda_gate(const tsad_cuda_context *c, const tsad_node *node)
{
    int channels = shape(c, node->out)->channels;
    if (node->modulated) {
        return tsad_cuda_terms(c, node->term + 2 * channels);
    }
    return (tsad_term){.step = tsad_cuda_node_of(node)->table + (size_t)c->step * (size_t)channels};
}

float *tsad_cuda_memory(const tsad_cuda_context *c, int tokens)
{
    size_t floats = (size_t)tokens * (size_t)tsad_pad(c->m->width);
    return c->lane->array[TSAD_ARRAY_MEMORY] + (c->m->encode_rows ? (size_t)c->row * floats : 0);
}

/* ---- parts of nodes ---------------------------------------------------------------------- */

static tsad_delivery overwrite(float *y, int ld) { return (tsad_delivery){.y = y, .ld = ld}; }

static tsad_delivery to_register(const tsad_cuda_context *c, int i)
{
    return overwrite(reg(c, i), tsad_pad(shape(c, i)->channels));
}

/* out register += branch, slot = branch */
static tsad_delivery branch(const tsad_cuda_context *c, const tsad_node *node, const tsad_op *op)
{
    tsad_delivery to = to_register(c, node->out);
    to.adds = true;
    to.slot = op->dst >= 0 ? tsad_cuda_slot(c, op->dst) : NULL;
    if (node->cache_point == TSAD_BEFORE_GATE) {
        to.gate = tsad_cuda_gate(c, node);
    }
    return to;
}

/* what a node does to its input first */
static tsad_normaliser normaliser(const tsad_cuda_context *c, const tsad_node *node)
{
    tsad_normaliser norm = {.used = node->normalise, .eps = node->eps};
    if (node->normalise && node->modulated) {
        norm.move = tsad_cuda_terms(c, node->term);
        norm.scale = tsad_cuda_terms(c, node->term + shape(c, node->in)->channels);
    }
    return norm;
}

/* matrix i of a convolution over `tokens` rows of x to the register's tokens */
static tsad_product taps(const tsad_node *node, int i, const float *x, int ld,
                         const tsad_register *in, int tokens_out, tsad_delivery to)
{
    tsad_product p = tsad_cuda_product(tsad_cuda_node_of(node), &node->m[i], i, x, ld, in->tokens,
                                       in->channels, to);
    p.taps = node->kernel;
    p.first = -(node->kernel / 2);
    p.stride = node->stride;
    p.rows = tokens_out;
    return p;
}

/* a node's first matrix, over its input */
static tsad_product first_product(const tsad_cuda_context *c, const tsad_node *node, int tokens_out,
                                  tsad_delivery to)
{
    const tsad_register *in = shape(c, node->in);
    int ld = tsad_pad(in->channels);
    const float *x = reg(c, node->in);
    tsad_normaliser norm = normaliser(c, node);
    if (norm.used && node->kernel > 1) { /* a row would be normalised once a tap */
        tsad_launch_layernorm(c->e->stream, (tsad_layernorm){.x = x,
                                                             .ldx = ld,
                                                             .rows = in->tokens,
                                                             .channels = in->channels,
                                                             .norm = norm,
                                                             .y = c->place->scratch[0],
                                                             .ldy = in->channels});
        x = c->place->scratch[0];
        ld = in->channels;
        norm.used = false;
    }
    tsad_product p = taps(node, 0, x, ld, in, tokens_out, to);
    p.norm = norm;
    return p;
}

/* ---- branches ---------------------------------------------------------------------------- */

static void self_attention(const tsad_cuda_context *c, const tsad_node *node, tsad_delivery to)
{
    const tsad_cuda_node *packed = tsad_cuda_node_of(node);
    float *qkv = c->place->scratch[1], *y = c->place->scratch[2];
    int T = shape(c, node->in)->tokens;
    int heads = node->n_heads, head_dim = node->m[0].n_out / 3 / heads;
    tsad_launch_product(c->e->stream, first_product(c, node, T, overwrite(qkv, node->m[0].n_out)));
    tsad_launch_attention(c->e->stream, (tsad_attention){.qkv = qkv,
                                                         .ld = node->m[0].n_out,
                                                         .tokens = T,
                                                         .heads = heads,
                                                         .head_dim = head_dim,
                                                         .turns = packed->table,
                                                         .causal = node->causal,
                                                         .y = y,
                                                         .ldy = heads * head_dim});
    tsad_launch_product(c->e->stream, tsad_cuda_product(packed, &node->m[1], 1, y, heads * head_dim,
                                                        T, heads * head_dim, to));
}

static void cross_attention(const tsad_cuda_context *c, const tsad_node *node, tsad_delivery to)
{
    const tsad_model *m = c->m;
    const tsad_register *in = shape(c, node->in);
    size_t tokens = (size_t)m->n_memory, layer = (size_t)node->layer, L = (size_t)m->n_layers;
    const float *folded = c->lane->array[TSAD_ARRAY_FOLDED];
    tsad_cross_attention p = {.rows = in->tokens,
                              .width = m->fold.width,
                              .heads = m->fold.n_heads,
                              .n_memory = m->n_memory,
                              .floats = m->fold.floats,
                              .value = m->fold.value,
                              .shift = m->fold.shift,
                              .bias = tsad_cuda_node_of(node)->bias[0],
                              .causal = node->causal,
                              .to = to};
    if (m->encode_rows) {
        p.first = folded + ((size_t)c->row * L + layer) * tokens * p.floats;
        p.rest = p.first + p.floats;
    } else {
        p.first = c->cuda->time_fold + ((size_t)c->step * L + layer) * p.floats;
        p.rest = folded + layer * (tokens - 1) * p.floats;
    }
    p.x = reg(c, node->in);
    p.ldx = tsad_pad(in->channels);
    p.norm = normaliser(c, node);
    tsad_launch_cross_attention(c->e->stream, p);
}

static void feed_forward(const tsad_cuda_context *c, const tsad_node *node, tsad_delivery to)
{
    int hidden = node->m[0].n_out;
    tsad_register in = *shape(c, node->in);
    tsad_product p = first_product(c, node, in.tokens, overwrite(c->place->scratch[1], hidden));
    p.activation = node->activation;
    tsad_launch_product(c->e->stream, p);
    in.channels = hidden;
    tsad_launch_product(c->e->stream,
                        taps(node, 1, c->place->scratch[1], hidden, &in, in.tokens, to));
}

/* the i-th convolution of a node with its GroupNorm, from register `in` */
static void conv_norm(const tsad_cuda_context *c, const tsad_node *node, int i, int in,
                      bool has_terms, tsad_delivery to)
{
    const tsad_register *from = shape(c, in), *out = shape(c, node->out);
    int channels = out->channels, ld = tsad_pad(from->channels);
    const float *norm = tsad_cuda_node_of(node)->norm + 2 * i * channels;
    tsad_groupnorm p = {.x = c->place->scratch[0],
                        .ldx = channels,
                        .rows = out->tokens,
                        .channels = channels,
                        .groups = node->groups[i],
                        .gain = norm,
                        .shift = norm + channels,
                        .activation = node->activation,
                        .to = to};
    if (has_terms) {
        p.move = tsad_cuda_terms(c, node->term + (node->scales ? channels : 0));
        p.scale = node->scales ? tsad_cuda_terms(c, node->term) : p.scale;
    }
    tsad_launch_product(c->e->stream, taps(node, i, reg(c, in), ld, from, out->tokens,
                                           overwrite(c->place->scratch[0], channels)));
    tsad_launch_groupnorm(c->e->stream, p);
}

void tsad_cuda_compute(const tsad_cuda_context *c, const tsad_op *op)
{
    const tsad_node *node = &c->net->nodes[op->node];
    tsad_delivery to = branch(c, node, op);
    switch (node->kind) {
    case TSAD_SELF_ATTENTION:
        self_attention(c, node, to);
        break;
    case TSAD_CROSS_ATTENTION:
        cross_attention(c, node, to);
        break;
    case TSAD_FILM_BRANCH:
        conv_norm(c, node, 0, node->in, true, to_register(c, node->in2));
        conv_norm(c, node, 1, node->in2, false, to);
        break;
    default: /* convolutions are that with more taps */
        feed_forward(c, node, to);
    }
}

/* ---- fixed nodes ------------------------------------------------------------------------- */

static void linear(const tsad_cuda_context *c, const tsad_node *node)
{
    tsad_product p = first_product(c, node, shape(c, node->out)->tokens, to_register(c, node->out));
    p.activation = node->activation;
    p.table = tsad_cuda_node_of(node)->table;
    tsad_launch_product(c->e->stream, p);
}

/* even tokens, then odd ones */
static void conv_transposed(const tsad_cuda_context *c, const tsad_node *node)
{
    const tsad_register *in = shape(c, node->in), *out = shape(c, node->out);
    int ld = tsad_pad(out->channels);
    for (int i = 0; i < 2; i++) {
        tsad_product p = tsad_cuda_product(
            tsad_cuda_node_of(node), &node->m[i], i, reg(c, node->in), tsad_pad(in->channels),
            in->tokens, in->channels, overwrite(reg(c, node->out) + i * ld, 2 * ld));
        p.taps = 2;
        p.first = i - 1;
        tsad_launch_product(c->e->stream, p);
    }
}

static void copy(const tsad_cuda_context *c, int from, int rows, int repeat, float *y, int ldy,
                 tsad_activation activation)
{
    const tsad_register *in = shape(c, from);
    tsad_launch_copy(c->e->stream, (tsad_copy){.x = reg(c, from),
                                               .ldx = tsad_pad(in->channels),
                                               .repeat = repeat,
                                               .rows = rows,
                                               .channels = in->channels,
                                               .activation = activation,
                                               .y = y,
                                               .ldy = ldy});
}

/* upsample, concat, copy, and the encoder's joining of tokens */
static void move(const tsad_cuda_context *c, const tsad_node *node)
{
    const tsad_register *in = shape(c, node->in), *out = shape(c, node->out);
    float *y = reg(c, node->out);
    int ld = tsad_pad(out->channels), repeat = node->kind == TSAD_UPSAMPLE ? node->stride : 1;
    int rows = in->tokens * repeat < out->tokens ? in->tokens * repeat : out->tokens;
    if (node->kind == TSAD_TOKENS) {
        const float *table = tsad_cuda_node_of(node)->table;
        tsad_launch_copy(c->e->stream,
                         (tsad_copy){.x = table + (size_t)c->step * (size_t)in->channels,
                                     .ldx = in->channels,
                                     .repeat = 1,
                                     .rows = 1,
                                     .channels = in->channels,
                                     .y = y,
                                     .ldy = ld});
        y += ld;
    }
    copy(c, node->in, rows, repeat, y, ld, TSAD_LINEAR_ONLY);
    if (node->kind == TSAD_CONCAT) {
        copy(c, node->in2, shape(c, node->in2)->tokens, 1, y + in->channels, ld, TSAD_LINEAR_ONLY);
    }
}

void tsad_cuda_fixed(const tsad_cuda_context *c, const tsad_node *node)
{
    const tsad_register *in = shape(c, node->in);
    switch (node->kind) {
    case TSAD_LINEAR:
    case TSAD_CONV:
        linear(c, node);
        break;
    case TSAD_CONV_NORM:
        conv_norm(c, node, 0, node->in, false, to_register(c, node->out));
        break;
    case TSAD_CONV_TRANSPOSED:
        conv_transposed(c, node);
        break;
    case TSAD_FLATTEN:
        copy(c, node->in, in->tokens, 1, reg(c, node->out), in->channels, node->activation);
        break;
    case TSAD_STORE: {
        int ld = node->padded ? tsad_pad(in->channels) : in->channels;
        float *row = c->lane->array[node->array] + (size_t)c->row * (size_t)(in->tokens * ld);
        copy(c, node->in, in->tokens, 1, row, ld, TSAD_LINEAR_ONLY);
        break;
    }
    case TSAD_FOLD:
        tsad_cuda_fold(c, node);
        break;
    default:
        if (!tsad_cuda_prune(c, node)) {
            move(c, node);
        }
    }
}

/* ---- the end of a step ----------------------------------------------------------------------- */

/* a matrix over single tokens, as many as the sample has */
static bool is_plain(const tsad_cuda_context *c, const tsad_node *node)
{
    return (node->kind == TSAD_LINEAR || node->kind == TSAD_CONV) && node->kernel == 1 &&
           node->stride == 1 && node->activation == TSAD_LINEAR_ONLY &&
           shape(c, node->in)->tokens == c->m->horizon;
}

bool tsad_cuda_is_head(const tsad_cuda_context *c, const tsad_node *node)
{
    int channels = shape(c, node->in)->channels;
    return is_plain(c, node) && node->out == c->net->output && !node->table &&
           channels + c->m->action_dim <= TSAD_SHARED_FLOATS;
}

bool tsad_cuda_begins(const tsad_cuda_context *c, const tsad_node *node)
{
    return is_plain(c, node) && node->in == c->net->input && !node->normalise;
}

void tsad_cuda_tail(const tsad_cuda_context *c, const tsad_node *head, tsad_sum sum,
                    tsad_update update, const tsad_node *next)
{
    const tsad_register *in = shape(c, head->in);
    const tsad_cuda_node *packed = tsad_cuda_node_of(head);
    tsad_tail p = {.x = reg(c, head->in),
                   .ldx = tsad_pad(in->channels),
                   .channels = in->channels,
                   .sum = sum,
                   .norm = normaliser(c, head),
                   .w = packed->w[0],
                   .w_precision = packed->precision,
                   .bias = packed->bias[0],
                   .update = update};
    if (next) {
        const tsad_cuda_node *begins = tsad_cuda_node_of(next);
        p.v = begins->w[0];
        p.v_precision = begins->precision;
        p.v_bias = begins->bias[0];
        p.table = begins->table;
        p.n_next = shape(c, next->out)->channels;
        p.y = reg(c, next->out);
        p.ldy = tsad_pad(p.n_next);
    }
    tsad_launch_tail(c->e->stream, p);
}
