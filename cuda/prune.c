/* prune.c: the encoder's folding of memory tokens, and the pruner's nodes. A product of a head's
 * part of some vectors with its own rows of a matrix is one batch of a launch. */
#include "cuda.h"

/* y (rows, n_out) of each head = its part of x (rows, heads * dh) times its rows of w (heads * dh,
 * n_out); y's heads are y_head floats apart, y's columns `step` */
static tsad_product by_heads(const float *x, int ldx, int rows, int heads, int dh, const void *w,
                             tsad_precision precision, int n_out, float *y, size_t ldy,
                             size_t y_head, int step)
{
    return (tsad_product){.x = x,
                          .ldx = ldx,
                          .tokens = rows,
                          .channels = dh,
                          .taps = 1,
                          .stride = 1,
                          .w = w,
                          .precision = precision,
                          .rows = rows,
                          .n_out = n_out,
                          .step = step,
                          .to = {.y = y, .ld = (int)ldy},
                          .batches = heads,
                          .x_batch = (size_t)dh,
                          .w_batch = (size_t)dh * (size_t)n_out,
                          .y_batch = y_head};
}

void tsad_cuda_fold(const tsad_cuda_context *c, const tsad_node *node)
{
    const tsad_fold *fold = &c->m->fold;
    const tsad_cuda_node *packed = tsad_cuda_node_of(node);
    tsad_stream *stream = c->e->stream;
    int tokens = c->net->registers[node->in].tokens, d = fold->width, heads = fold->n_heads;
    int dh = d / heads;
    size_t step = c->m->encode_rows ? (size_t)c->row : 0;
    size_t at = step * (size_t)c->m->n_layers + (size_t)node->layer;
    float *out = c->lane->array[TSAD_ARRAY_FOLDED] + at * (size_t)tokens * fold->floats;
    float *kv = c->place->scratch[1];
    tsad_launch_product(stream, tsad_cuda_product(packed, &node->m[0], 0,
                                                  tsad_cuda_memory(c, tokens), tsad_pad(d), tokens,
                                                  d, (tsad_delivery){.y = kv, .ld = 2 * d}));
    tsad_launch_product(stream, by_heads(kv, 2 * d, tokens, heads, dh, packed->w[1],
                                         packed->precision, d, out, fold->floats, (size_t)d, 1));
    tsad_launch_product(stream,
                        by_heads(kv + d, 2 * d, tokens, heads, dh, packed->w[2], packed->precision,
                                 d, out + fold->value, fold->floats, (size_t)d, 1));
    tsad_launch_product(stream, by_heads(kv, 2 * d, tokens, heads, dh, packed->table, TSAD_FLOAT32,
                                         1, out + fold->shift, fold->floats, 1, 1));
}

/* memory -> scores of the block tokens and values of the heads */
static void keys(const tsad_cuda_context *c)
{
    const tsad_pruner *p = &c->m->pruner;
    const tsad_cuda_model *cuda = c->cuda;
    int n = p->hidden, heads = p->n_heads, dh = n / heads, S = p->query_tokens, B = p->n_blocks;
    const float *tokens = tsad_cuda_memory(c, S);
    float *key = c->place->scratch[1], *value = c->place->scratch[2];
    size_t at = (size_t)c->row * (size_t)S;
    if (c->row > 0 && !c->m->encode_rows) {
        return; /* observation tokens are the same at every step */
    }
    const tsad_cuda_node packed = {.w = {cuda->keys, cuda->values},
                                   .bias = {cuda->keys_bias, cuda->values_bias}};
    int ld = tsad_pad(c->m->width), d = c->m->width;
    tsad_launch_product(c->e->stream, tsad_cuda_product(&packed, &p->keys, 0, tokens, ld, S, d,
                                                        (tsad_delivery){.y = key, .ld = n}));
    tsad_launch_product(c->e->stream, tsad_cuda_product(&packed, &p->values, 1, tokens, ld, S, d,
                                                        (tsad_delivery){.y = value, .ld = n}));
    size_t scores = (size_t)B * (size_t)heads, values = (size_t)heads * (size_t)n;
    tsad_launch_product(c->e->stream, by_heads(key, n, S, heads, dh, cuda->query, TSAD_FLOAT32, B,
                                               c->lane->array[TSAD_ARRAY_PRUNE_SCORE] + at * scores,
                                               scores, 1, heads));
    tsad_launch_product(c->e->stream, by_heads(value, n, S, heads, dh, cuda->out, TSAD_FLOAT32, n,
                                               c->lane->array[TSAD_ARRAY_PRUNE_VALUE] + at * values,
                                               values, (size_t)n, 1));
}

static void query(const tsad_cuda_context *c, const tsad_node *node)
{
    const tsad_pruner *p = &c->m->pruner;
    size_t scores = (size_t)p->n_blocks * (size_t)p->n_heads;
    size_t values = (size_t)p->n_heads * (size_t)p->hidden;
    const float *score = c->lane->array[TSAD_ARRAY_PRUNE_SCORE];
    const float *value = c->lane->array[TSAD_ARRAY_PRUNE_VALUE];
    tsad_prune_query q = {.token = c->cuda->token,
                          .score_floats = scores,
                          .value_floats = values,
                          .blocks = p->n_blocks,
                          .hidden = p->hidden,
                          .heads = p->n_heads,
                          .n_memory = c->m->n_memory,
                          .y = c->registers[node->out],
                          .ldy = tsad_pad(p->hidden)};
    if (p->time_score) {
        q.score_first = c->cuda->time_score + (size_t)c->row * scores;
        q.value_first = c->cuda->time_value + (size_t)c->row * values;
        q.score_rest = score;
        q.value_rest = value;
    } else {
        size_t at = (size_t)c->row * (size_t)p->query_tokens;
        q.score_first = score + at * scores;
        q.value_first = value + at * values;
        q.score_rest = q.score_first + scores;
        q.value_rest = q.value_first + values;
    }
    tsad_launch_prune_query(c->e->stream, q);
}

bool tsad_cuda_prune(const tsad_cuda_context *c, const tsad_node *node)
{
    const tsad_register *out = &c->net->registers[node->out];
    tsad_copy copy = {.repeat = 1, .y = c->registers[node->out], .ldy = tsad_pad(out->channels)};
    switch (node->kind) {
    case TSAD_PRUNE_KEYS:
        keys(c);
        return true;
    case TSAD_PRUNE_QUERY:
        query(c, node);
        return true;
    case TSAD_PRUNE_TOKENS: /* side by side */
        copy.x = tsad_cuda_memory(c, c->m->pruner.query_tokens);
        copy.ldx = tsad_pad(c->m->width);
        copy.rows = c->m->pruner.query_tokens;
        copy.channels = copy.ldy = c->m->width;
        break;
    case TSAD_PRUNE_SPREAD: /* one row, plus each of the table's */
        copy.x = c->registers[node->in];
        copy.repeat = copy.rows = out->tokens;
        copy.channels = out->channels;
        copy.table = tsad_cuda_node_of(node)->table;
        copy.activation = TSAD_RELU;
        break;
    default:
        return false;
    }
    tsad_launch_copy(c->e->stream, copy);
    return true;
}
