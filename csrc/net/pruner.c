/* pruner.c: the reference pruner (method.md 3: one pre-norm decoder layer over block tokens) with
 * everything hoisted that depends on neither step nor observation (method.md 3.2):
 *
 *   constant    the block tokens after self-attention, their queries, the output bias
 *   per step    scores and values of the time token (tables, made here)
 *   per chunk   scores and values of the observation tokens (PRUNE_KEYS)
 *   per cell    a softmax over S memory tokens, the feed-forward, the head
 */
#include "../model.h"

#include <math.h>
#include <string.h>

#define LAYER "transformer_decoder.layers.0."

static tsad_status take(const tsad_model_spec *spec, const char *name, int rows, int cols,
                        const float **out)
{
    return tsad_take(tsad_pruner_tensors_of(spec), name, rows, cols, out);
}

/* y (n) = LayerNorm(x) */
static void layernorm(const double *x, int n, const float *gain, const float *shift, double *y)
{
    double mean = 0, variance = 0;
    for (int i = 0; i < n; i++) {
        mean += x[i] / n;
    }
    for (int i = 0; i < n; i++) {
        variance += (x[i] - mean) * (x[i] - mean) / n;
    }
    double scale = 1 / sqrt(variance + 1e-5);
    for (int i = 0; i < n; i++) {
        y[i] = (x[i] - mean) * scale * gain[i] + shift[i];
    }
}

/* y (n_out) = W x + b, W torch layout (n_out, n_in) */
static void project(const float *w, const float *b, const double *x, int n_in, int n_out, double *y)
{
    for (int o = 0; o < n_out; o++) {
        double sum = b[o];
        for (int i = 0; i < n_in; i++) {
            sum += (double)w[(size_t)o * (size_t)n_in + (size_t)i] * x[i];
        }
        y[o] = sum;
    }
}

/* out (B, n) = token + self-attention(norm1(token)): constant per trained pruner */
static tsad_status constant_tokens(const tsad_model_spec *spec, double *out, double *work)
{
    int B = spec->n_blocks, n = spec->pruner_hidden, heads = spec->pruner_heads, dh = n / heads;
    const float *w, *b, *wo, *bo, *gain, *shift;
    TSAD_TRY(take(spec, LAYER "self_attn.in_proj_weight", 3 * n, n, &w));
    TSAD_TRY(take(spec, LAYER "self_attn.in_proj_bias", 3 * n, 0, &b));
    TSAD_TRY(take(spec, LAYER "self_attn.out_proj.weight", n, n, &wo));
    TSAD_TRY(take(spec, LAYER "self_attn.out_proj.bias", n, 0, &bo));
    TSAD_TRY(take(spec, LAYER "norm1.weight", n, 0, &gain));
    TSAD_TRY(take(spec, LAYER "norm1.bias", n, 0, &shift));
    if (!w) {
        return TSAD_OK;
    }
    double *qkv = work, *x = qkv + (size_t)B * 3 * (size_t)n, *y = x + n, *score = y + n;
    for (int t = 0; t < B; t++) {
        for (int i = 0; i < n; i++) {
            out[(size_t)t * (size_t)n + (size_t)i] =
                spec->block_emb[(size_t)t * (size_t)n + (size_t)i];
        }
        layernorm(out + (size_t)t * (size_t)n, n, gain, shift, x);
        project(w, b, x, n, 3 * n, qkv + (size_t)t * 3 * (size_t)n);
    }
    for (int t = 0; t < B; t++) {
        for (int h = 0; h < heads; h++) {
            double top = -INFINITY, sum = 0;
            const double *q = qkv + (size_t)t * 3 * (size_t)n + h * dh;
            for (int u = 0; u < B; u++) {
                const double *k = qkv + (size_t)u * 3 * (size_t)n + n + h * dh;
                double dot = 0;
                for (int j = 0; j < dh; j++) {
                    dot += q[j] * k[j];
                }
                score[u] = dot / sqrt(dh);
                top = fmax(top, score[u]);
            }
            for (int u = 0; u < B; u++) {
                score[u] = exp(score[u] - top);
                sum += score[u];
            }
            for (int j = 0; j < dh; j++) {
                x[h * dh + j] = 0;
                for (int u = 0; u < B; u++) {
                    x[h * dh + j] +=
                        score[u] / sum * qkv[(size_t)u * 3 * (size_t)n + 2 * n + h * dh + j];
                }
            }
        }
        project(wo, bo, x, n, n, y);
        for (int i = 0; i < n; i++) {
            out[(size_t)t * (size_t)n + (size_t)i] += y[i];
        }
    }
    return TSAD_OK;
}

/* m = memory_proj (wp, bp) followed by rows of the cross-attention's in-projection, times scale */
static tsad_status compose(const tsad_model_spec *spec, const float *wp, const float *bp,
                           const float *w, const float *b, double scale, tsad_matrix *m)
{
    int d = spec->n_emb, n = spec->pruner_hidden;
    TSAD_TRY(tsad_matrix_make(m, d, n));
    double *row = tsad_allocate(sizeof(double) * (size_t)d);
    if (!row) {
        return tsad_fail(TSAD_MEMORY, "out of memory for %d doubles", d);
    }
    for (int o = 0; o < n; o++) {
        double bias = b[o];
        memset(row, 0, sizeof(double) * (size_t)d);
        for (int j = 0; j < n; j++) {
            double wj = w[(size_t)o * (size_t)n + (size_t)j];
            bias += wj * bp[j];
            for (int i = 0; i < d; i++) {
                row[i] += wj * (double)wp[(size_t)j * (size_t)d + (size_t)i];
            }
        }
        for (int i = 0; i < d; i++) {
            m->data[(size_t)i * (size_t)n + (size_t)o] = (float)(row[i] * scale);
        }
        m->bias[o] = (float)(bias * scale);
    }
    tsad_deallocate(row);
    return TSAD_OK;
}

static void apply(const tsad_matrix *m, const float *x, double *y)
{
    for (int o = 0; o < m->n_out; o++) {
        y[o] = m->bias[o];
    }
    for (int i = 0; i < m->n_in; i++) {
        for (int o = 0; o < m->n_out; o++) {
            y[o] += (double)x[i] * (double)m->data[(size_t)i * (size_t)m->n_out + (size_t)o];
        }
    }
}

/* scores and values of the time tokens, for every step */
static tsad_status tabulate_time(tsad_pruner *p, int K, const float *time_memory, double *work)
{
    size_t n = (size_t)p->hidden, B = (size_t)p->n_blocks, heads = (size_t)p->n_heads,
           dh = n / heads;
    p->time_score = tsad_allocate(sizeof(float) * (size_t)K * B * heads);
    p->time_value = tsad_allocate(sizeof(float) * (size_t)K * heads * n);
    if (!p->time_score || !p->time_value) {
        return tsad_fail(TSAD_MEMORY, "out of memory for the pruner's tables of %d steps", K);
    }
    double *key = work, *value = work + n, *vector = work + 2 * n;
    for (int k = 0; k < K; k++) {
        const float *memory = time_memory + (size_t)k * (size_t)p->keys.n_in;
        apply(&p->keys, memory, key);
        apply(&p->values, memory, value);
        for (size_t h = 0; h < heads; h++) {
            for (size_t b = 0; b < B; b++) {
                double dot = 0;
                for (size_t j = h * dh; j < (h + 1) * dh; j++) {
                    dot += key[j] * (double)p->query[b * n + j];
                }
                p->time_score[((size_t)k * B + b) * heads + h] = (float)dot;
            }
            memset(vector, 0, sizeof(double) * n);
            for (size_t j = h * dh; j < (h + 1) * dh; j++) {
                for (size_t i = 0; i < n; i++) {
                    vector[i] += value[j] * (double)p->out.data[j * n + i];
                }
            }
            for (size_t i = 0; i < n; i++) {
                p->time_value[((size_t)k * heads + h) * n + i] = (float)vector[i];
            }
        }
    }
    return TSAD_OK;
}

static tsad_status build_nodes(const tsad_model_spec *spec, tsad_net *net)
{
    int B = spec->n_blocks, n = spec->pruner_hidden, ff = spec->pruner_ff;
    const float *w, *b, *gain, *shift;
    TSAD_TRY(tsad_net_begin(net, 5, 2));
    int x = tsad_net_register(net, B, n), scores = tsad_net_register(net, B, 4);
    net->input = x;
    net->output = scores;
    tsad_net_add(net, TSAD_PRUNE_KEYS, x, x);
    tsad_net_add(net, TSAD_PRUNE_QUERY, x, x);
    tsad_node *node = tsad_net_add(net, TSAD_FEED_FORWARD, x, x);
    node->activation = TSAD_RELU;
    node->normalise = true;
    TSAD_TRY(take(spec, LAYER "norm3.weight", n, 0, &gain));
    TSAD_TRY(take(spec, LAYER "norm3.bias", n, 0, &shift));
    TSAD_TRY(take(spec, LAYER "linear1.weight", ff, n, &w));
    TSAD_TRY(take(spec, LAYER "linear1.bias", ff, 0, &b));
    TSAD_TRY(tsad_matrix_linear(&node->m[0], n, ff, w, b, gain, shift));
    TSAD_TRY(take(spec, LAYER "linear2.weight", n, ff, &w));
    TSAD_TRY(take(spec, LAYER "linear2.bias", n, 0, &b));
    TSAD_TRY(tsad_matrix_linear(&node->m[1], ff, n, w, b, NULL, NULL));
    node = tsad_net_add(net, TSAD_LINEAR, x, scores);
    TSAD_TRY(take(spec, "head.weight", 4, n, &w));
    TSAD_TRY(take(spec, "head.bias", 4, 0, &b));
    TSAD_TRY(tsad_matrix_linear(&node->m[0], n, 4, w, b, NULL, NULL));
    tsad_net_add(net, TSAD_STORE, scores, scores)->array = TSAD_ARRAY_SCORES;
    return tsad_net_finish(net);
}

/* constants of the cross-attention: queries, composed key and value maps, output map */
static tsad_status build_attention(const tsad_model_spec *spec, tsad_pruner *p, double *token,
                                   double *work)
{
    int n = spec->pruner_hidden, B = spec->n_blocks;
    const float *w, *b, *wp, *bp, *wo, *bo, *gain, *shift;
    TSAD_TRY(take(spec, "memory_proj.weight", n, spec->n_emb, &wp));
    TSAD_TRY(take(spec, "memory_proj.bias", n, 0, &bp));
    TSAD_TRY(take(spec, LAYER "multihead_attn.in_proj_weight", 3 * n, n, &w));
    TSAD_TRY(take(spec, LAYER "multihead_attn.in_proj_bias", 3 * n, 0, &b));
    TSAD_TRY(take(spec, LAYER "multihead_attn.out_proj.weight", n, n, &wo));
    TSAD_TRY(take(spec, LAYER "multihead_attn.out_proj.bias", n, 0, &bo));
    TSAD_TRY(take(spec, LAYER "norm2.weight", n, 0, &gain));
    TSAD_TRY(take(spec, LAYER "norm2.bias", n, 0, &shift));
    if (!w || !b) {
        return TSAD_OK;
    }
    size_t square = (size_t)n * (size_t)n;
    double scale = 1 / sqrt((double)n / spec->pruner_heads);
    TSAD_TRY(compose(spec, wp, bp, w + square, b + n, scale, &p->keys));
    TSAD_TRY(compose(spec, wp, bp, w + 2 * square, b + 2 * n, 1, &p->values));
    TSAD_TRY(tsad_matrix_linear(&p->out, n, n, wo, NULL, NULL, NULL));
    p->query = tsad_allocate(sizeof(float) * (size_t)B * (size_t)n);
    p->token = tsad_allocate(sizeof(float) * (size_t)B * (size_t)n);
    if (!p->query || !p->token) {
        return tsad_fail(TSAD_MEMORY, "out of memory for the tokens of %d blocks", B);
    }
    double *x = work, *q = work + n;
    for (int t = 0; t < B; t++) {
        size_t row = (size_t)t * (size_t)n;
        layernorm(token + row, n, gain, shift, x);
        project(w, b, x, n, n, q);
        for (int i = 0; i < n; i++) {
            p->query[row + (size_t)i] = (float)q[i];
            p->token[row + (size_t)i] = (float)(token[row + (size_t)i] + bo[i]);
        }
    }
    return TSAD_OK;
}

tsad_status tsad_net_pruner(const tsad_model_spec *spec, tsad_model *model,
                            const float *time_memory)
{
    tsad_pruner *p = &model->pruner;
    int n = spec->pruner_hidden, B = spec->n_blocks, heads = spec->pruner_heads;
    if (n < 2 || heads < 1 || n % heads || spec->pruner_ff < 1) {
        return tsad_fail(TSAD_ARGUMENT,
                         "pruner: hidden (%d) must be a positive multiple of heads (%d)", n, heads);
    }
    p->hidden = n;
    p->n_heads = heads;
    p->n_blocks = B;
    p->query_tokens = model->encode_rows ? model->n_memory : model->n_memory - 1;
    size_t doubles = (size_t)B * 4 * (size_t)n + 2 * (size_t)n + (size_t)B;
    doubles += 3 * (size_t)n;
    double *token = tsad_allocate(sizeof(double) * ((size_t)B * (size_t)n + doubles));
    if (!token) {
        return tsad_fail(TSAD_MEMORY, "out of memory for the pruner's constants");
    }
    double *work = token + (size_t)B * (size_t)n;
    tsad_status status = constant_tokens(spec, token, work);
    if (status == TSAD_OK) {
        status = build_attention(spec, p, token, work);
    }
    if (status == TSAD_OK && time_memory) {
        status = tabulate_time(p, spec->n_steps, time_memory, work);
    }
    if (status == TSAD_OK) {
        status = build_nodes(spec, &model->nets[TSAD_PRUNER_NET]);
    }
    tsad_deallocate(token);
    model->has_pruner = status == TSAD_OK;
    return status;
}
