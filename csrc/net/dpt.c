/* dpt.c: the Diffusion Policy transformer (TransformerForDiffusion) as a list of nodes.
 *
 *   sample (T, A) -> embed -> [self-attention, cross-attention, feed-forward] x layers -> head
 *
 * with the exact rewrites of design.md 6 applied to the weights here, in double precision:
 * LayerNorm's scale and shift go into the next matrix, the softmax scale into the queries,
 * cross-attention over the few memory tokens becomes score and value vectors (tsad_fold), and
 * all that depends on the step alone becomes a table. Tensor names are Diffusion Policy's.
 */
#include "../model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct source {
    const tsad_model_spec *spec;
    char prefix[64];
} source;

/* the named tensor under the prefix, (rows, cols) or (rows) */
static tsad_status take(const source *s, const char *name, int rows, int cols, const float **out)
{
    char full[256];
    snprintf(full, sizeof full, "%s%s", s->prefix, name);
    return tsad_take(tsad_tensors_of(s->spec), full, rows, cols, out);
}

/* a learned position for each of `tokens` */
static tsad_status take_positions(const tsad_model_spec *spec, const char *name, int tokens,
                                  const float **out)
{
    return tsad_take_shape(tsad_tensors_of(spec), name, 3, (int64_t[]){1, tokens, spec->n_emb},
                           out);
}

/* node matrix = linear layer `name`, after the LayerNorm `norm` if given */
static tsad_status take_linear(const source *s, const char *name, const char *norm, int n_in,
                               int n_out, tsad_matrix *m)
{
    char text[96];
    const float *weight, *bias, *gain = NULL, *shift = NULL;
    snprintf(text, sizeof text, "%s%s", name, strstr(name, "in_proj") ? "_weight" : ".weight");
    TSAD_TRY(take(s, text, n_out, n_in, &weight));
    snprintf(text, sizeof text, "%s%s", name, strstr(name, "in_proj") ? "_bias" : ".bias");
    TSAD_TRY(take(s, text, n_out, 0, &bias));
    if (norm) {
        snprintf(text, sizeof text, "%s.weight", norm);
        TSAD_TRY(take(s, text, n_in, 0, &gain));
        snprintf(text, sizeof text, "%s.bias", norm);
        TSAD_TRY(take(s, text, n_in, 0, &shift));
    }
    return tsad_matrix_linear(m, n_in, n_out, weight, bias, gain, shift);
}

static tsad_status add_self_attention(tsad_net *net, const source *s, int reg, const char *norm,
                                      int type, bool causal)
{
    int d = s->spec->n_emb, heads = s->spec->n_heads;
    tsad_node *node = tsad_net_add(net, TSAD_SELF_ATTENTION, reg, reg);
    node->n_heads = heads;
    node->causal = causal;
    node->normalise = true;
    node->type = type;
    TSAD_TRY(take_linear(s, "self_attn.in_proj", norm, d, 3 * d, &node->m[0]));
    tsad_scale_queries(&node->m[0], d / heads);
    return take_linear(s, "self_attn.out_proj", NULL, d, d, &node->m[1]);
}

static tsad_status add_feed_forward(tsad_net *net, const source *s, int reg, const char *norm,
                                    int type)
{
    int d = s->spec->n_emb;
    tsad_node *node = tsad_net_add(net, TSAD_FEED_FORWARD, reg, reg);
    node->activation = TSAD_GELU;
    node->normalise = true;
    node->type = type;
    TSAD_TRY(take_linear(s, "linear1", norm, d, 4 * d, &node->m[0]));
    return take_linear(s, "linear2", NULL, 4 * d, d, &node->m[1]);
}

static tsad_status add_cross_attention(tsad_net *net, const source *s, int reg, int layer, int type)
{
    int d = s->spec->n_emb;
    const float *bias;
    tsad_node *node = tsad_net_add(net, TSAD_CROSS_ATTENTION, reg, reg);
    node->n_heads = s->spec->n_heads;
    node->causal = s->spec->causal; /* Diffusion Policy's memory mask */
    node->normalise = true;
    node->type = type;
    node->layer = layer;
    TSAD_TRY(take(s, "multihead_attn.out_proj.bias", d, 0, &bias));
    TSAD_TRY(tsad_matrix_make(&node->m[0], 1, d));
    if (bias) {
        memcpy(node->m[0].bias, bias, sizeof(float) * (size_t)d);
    }
    return TSAD_OK;
}

/* keys and values of one layer's cross-attention, folded with its query and output projections:
 * m0 memory -> (key, value); m1 row h * dh + j: what key element j adds to head h's score vector;
 * m2 the same for values; table: what it adds to the score constant */
static tsad_status add_fold(tsad_net *net, const source *s, int reg, int layer)
{
    int d = s->spec->n_emb, heads = s->spec->n_heads;
    const float *w, *b, *wo, *gain, *shift;
    tsad_node *node = tsad_net_add(net, TSAD_FOLD, reg, reg);
    node->layer = layer;
    node->n_heads = heads;
    TSAD_TRY(take(s, "multihead_attn.in_proj_weight", 3 * d, d, &w));
    TSAD_TRY(take(s, "multihead_attn.in_proj_bias", 3 * d, 0, &b));
    TSAD_TRY(take(s, "multihead_attn.out_proj.weight", d, d, &wo));
    TSAD_TRY(take(s, "norm2.weight", d, 0, &gain));
    TSAD_TRY(take(s, "norm2.bias", d, 0, &shift));
    if (!w || !b || !wo || !gain || !shift) {
        return TSAD_OK;
    }
    TSAD_TRY(
        tsad_matrix_linear(&node->m[0], d, 2 * d, w + (size_t)d * (size_t)d, b + d, NULL, NULL));
    TSAD_TRY(tsad_matrix_make(&node->m[1], d, d));
    TSAD_TRY(tsad_matrix_make(&node->m[2], d, d));
    TSAD_TRY(tsad_copy_floats(&node->table, b, (size_t)d));
    double scale = 1.0 / sqrt((double)d / heads);
    for (int j = 0; j < d; j++) {
        double constant = b[j];
        for (int i = 0; i < d; i++) {
            size_t at = (size_t)j * (size_t)d + (size_t)i;
            double q = w[at];
            node->m[1].data[at] = (float)(q * gain[i] * scale);
            constant += q * shift[i];
            node->m[2].data[at] = wo[(size_t)i * (size_t)d + (size_t)j];
        }
        node->table[j] = (float)(constant * scale);
    }
    return TSAD_OK;
}

static tsad_status build_denoiser(const tsad_model_spec *spec, tsad_model *model)
{
    tsad_net *net = &model->nets[TSAD_DENOISER];
    int T = spec->horizon, d = spec->n_emb;
    TSAD_TRY(tsad_net_begin(net, 2 + 3 * spec->n_layers, 3));
    int sample = tsad_net_register(net, T, spec->action_dim);
    int h = tsad_net_register(net, T, d);
    int noise = tsad_net_register(net, T, spec->action_dim);
    net->input = sample;
    net->output = noise;

    source top = {spec, ""};
    const float *pos;
    TSAD_TRY(take_positions(spec, "pos_emb", T, &pos));
    tsad_node *embed = tsad_net_add(net, TSAD_LINEAR, sample, h);
    TSAD_TRY(take_linear(&top, "input_emb", NULL, spec->action_dim, d, &embed->m[0]));
    TSAD_TRY(tsad_copy_floats(&embed->table, pos, (size_t)T * (size_t)d));

    for (int l = 0; l < spec->n_layers; l++) {
        source layer = {spec, ""};
        snprintf(layer.prefix, sizeof layer.prefix, "decoder.layers.%d.", l);
        TSAD_TRY(add_self_attention(net, &layer, h, "norm1", 0, spec->causal));
        TSAD_TRY(add_cross_attention(net, &layer, h, l, 1));
        TSAD_TRY(add_feed_forward(net, &layer, h, "norm3", 2));
        static const char *const names[] = {"self_attn", "cross_attn", "feed_forward"};
        for (int i = 0; i < 3; i++) {
            tsad_node *node = &net->nodes[net->n_nodes - 3 + i];
            snprintf(node->kin, sizeof node->kin, "%s", names[i]);
            snprintf(node->label, sizeof node->label, "layers.%d.%s", l, names[i]);
        }
    }
    tsad_node *head = tsad_net_add(net, TSAD_LINEAR, h, noise);
    head->normalise = true;
    TSAD_TRY(take_linear(&top, "head", "ln_f", d, spec->action_dim, &head->m[0]));
    return tsad_net_finish(net);
}

static tsad_status build_encoder(const tsad_model_spec *spec, tsad_model *model)
{
    tsad_net *net = &model->nets[TSAD_ENCODER];
    int d = spec->n_emb, n_obs = spec->n_obs_steps, S = 1 + n_obs;
    source top = {spec, ""};
    const float *pos;
    TSAD_TRY(tsad_net_begin(net, 6 + 2 * spec->n_cond_layers + spec->n_layers, 4));
    TSAD_TRY(take_positions(spec, "cond_pos_emb", S, &pos));
    int obs = tsad_net_register(net, n_obs, spec->obs_dim);
    int token = tsad_net_register(net, n_obs, d);
    net->input = obs;
    tsad_node *embed = tsad_net_add(net, TSAD_LINEAR, obs, token);
    TSAD_TRY(take_linear(&top, "cond_obs_emb", NULL, spec->obs_dim, d, &embed->m[0]));
    TSAD_TRY(tsad_copy_floats(&embed->table, pos ? pos + d : NULL, (size_t)n_obs * (size_t)d));

    if (spec->n_cond_layers == 0) {
        int hidden = tsad_net_register(net, n_obs, 4 * d);
        net->output = tsad_net_register(net, n_obs, d);
        tsad_node *first = tsad_net_add(net, TSAD_LINEAR, token, hidden);
        first->activation = TSAD_MISH;
        TSAD_TRY(take_linear(&top, "encoder.0", NULL, d, 4 * d, &first->m[0]));
        tsad_node *second = tsad_net_add(net, TSAD_LINEAR, hidden, net->output);
        TSAD_TRY(take_linear(&top, "encoder.2", NULL, 4 * d, d, &second->m[0]));
    } else {
        net->output = tsad_net_register(net, S, d);
        tsad_node *join = tsad_net_add(net, TSAD_TOKENS, token, net->output);
        TSAD_TRY(tsad_copy_floats(&join->table, spec->time_emb, (size_t)spec->n_steps * (size_t)d));
        for (int k = 0; k < spec->n_steps; k++) {
            for (int i = 0; i < d; i++) {
                join->table[(size_t)k * (size_t)d + (size_t)i] += pos[i];
            }
        }
        for (int l = 0; l < spec->n_cond_layers; l++) {
            source layer = {spec, ""};
            snprintf(layer.prefix, sizeof layer.prefix, "encoder.layers.%d.", l);
            TSAD_TRY(add_self_attention(net, &layer, net->output, "norm1", 0, false));
            TSAD_TRY(add_feed_forward(net, &layer, net->output, "norm2", 1));
        }
    }
    tsad_node *store = tsad_net_add(net, TSAD_STORE, net->output, net->output);
    store->array = TSAD_ARRAY_MEMORY;
    store->padded = true;
    for (int l = 0; l < spec->n_layers; l++) {
        source layer = {spec, ""};
        snprintf(layer.prefix, sizeof layer.prefix, "decoder.layers.%d.", l);
        TSAD_TRY(add_fold(net, &layer, net->output, l));
    }
    return tsad_net_finish(net);
}

/* y = x (rows from..to of m) [+ bias], in double */
static void apply(const tsad_matrix *m, const double *x, int from, int to, bool bias, double *y)
{
    for (int o = 0; o < m->n_out; o++) {
        y[o] = bias ? m->bias[o] : 0;
    }
    for (int i = from; i < to; i++) {
        const float *row = m->data + (size_t)i * (size_t)m->n_out;
        double xi = x[i - from];
        for (int o = 0; o < m->n_out; o++) {
            y[o] += xi * (double)row[o];
        }
    }
}

/* fold one memory token for one layer, as the backend's fold node does in float32 */
static void fold_token(const tsad_model *model, const tsad_node *node, const double *memory,
                       double *kv, double *vector, float *out)
{
    int d = model->width, heads = node->n_heads, dh = d / heads;
    apply(&node->m[0], memory, 0, d, true, kv);
    for (int h = 0; h < heads; h++) {
        double shift = 0;
        for (int j = h * dh; j < (h + 1) * dh; j++) {
            shift += kv[j] * node->table[j];
        }
        out[model->fold.shift + (size_t)h] = (float)shift;
        apply(&node->m[1], kv + h * dh, h * dh, (h + 1) * dh, false, vector);
        for (int i = 0; i < d; i++) {
            out[(size_t)h * (size_t)d + (size_t)i] = (float)vector[i];
        }
        apply(&node->m[2], kv + d + h * dh, h * dh, (h + 1) * dh, false, vector);
        for (int i = 0; i < d; i++) {
            out[model->fold.value + (size_t)h * (size_t)d + (size_t)i] = (float)vector[i];
        }
    }
}

/* the time token's memory and folded keys and values, for every step: tables, made once */
static tsad_status tabulate_time(const tsad_model_spec *spec, tsad_model *model, float **memory_out)
{
    int d = spec->n_emb, K = spec->n_steps;
    size_t layer_floats = model->fold.floats;
    const float *pos;
    TSAD_TRY(take_positions(spec, "cond_pos_emb", 1 + spec->n_obs_steps, &pos));
    model->time_fold =
        tsad_allocate(sizeof(float) * layer_floats * (size_t)spec->n_layers * (size_t)K);
    float *table = tsad_allocate(sizeof(float) * (size_t)K * (size_t)d);
    double *work = tsad_allocate(sizeof(double) * 10 * (size_t)d);
    *memory_out = table;
    if (!model->time_fold || !table || !work) {
        tsad_deallocate(work);
        return tsad_fail(TSAD_MEMORY, "out of memory for the tables of %d steps", K);
    }
    double *x = work, *hidden = work + d, *memory = work + 5 * d, *kv = work + 6 * d;
    double *vector = work + 8 * d;
    const tsad_node *nodes = model->nets[TSAD_ENCODER].nodes;
    for (int k = 0; k < K; k++) {
        for (int i = 0; i < d; i++) {
            x[i] = (double)spec->time_emb[(size_t)k * (size_t)d + (size_t)i] + pos[i];
        }
        apply(&nodes[1].m[0], x, 0, d, true, hidden);
        for (int i = 0; i < 4 * d; i++) {
            hidden[i] *= tanh(log1p(exp(hidden[i]))); /* Mish */
        }
        apply(&nodes[2].m[0], hidden, 0, 4 * d, true, memory);
        for (int i = 0; i < d; i++) {
            table[(size_t)k * (size_t)d + (size_t)i] = (float)memory[i];
        }
        for (int n = 0; n < model->nets[TSAD_ENCODER].n_nodes; n++) {
            if (nodes[n].kind == TSAD_FOLD) {
                size_t at = (size_t)k * (size_t)spec->n_layers + (size_t)nodes[n].layer;
                fold_token(model, &nodes[n], memory, kv, vector,
                           model->time_fold + at * layer_floats);
            }
        }
    }
    tsad_deallocate(work);
    return TSAD_OK;
}

tsad_status tsad_net_dpt(const tsad_model_spec *spec, tsad_model *model)
{
    int d = spec->n_emb, heads = spec->n_heads;
    if (d < 4 || d % 2 || heads < 1 || d % heads || d > 1 << 16) {
        return tsad_fail(TSAD_ARGUMENT,
                         "n_emb: expected an even multiple of n_head (%d), 4 to 65536, got %d",
                         heads, d);
    }
    if (spec->n_layers > TSAD_MAX_BLOCKS / 3 || spec->n_cond_layers > TSAD_MAX_BLOCKS / 3) {
        return tsad_fail(TSAD_ARGUMENT, "n_layers, n_cond_layers: expected at most %d, got %d, %d",
                         TSAD_MAX_BLOCKS / 3, spec->n_layers, spec->n_cond_layers);
    }
    if (spec->n_obs_steps > TSAD_MAX_MEMORY - 1) {
        return tsad_fail(TSAD_ARGUMENT, "n_obs_steps: expected at most %d, got %d",
                         TSAD_MAX_MEMORY - 1, spec->n_obs_steps);
    }
    model->width = d;
    model->n_layers = spec->n_layers;
    model->n_memory = 1 + spec->n_obs_steps;
    model->encode_rows = spec->n_cond_layers > 0;
    size_t vectors = (size_t)heads * (size_t)d;
    model->fold = (tsad_fold){.n_heads = heads, .width = d, .value = vectors, .shift = 2 * vectors};
    model->fold.floats = 2 * vectors + (size_t)tsad_pad(heads);
    TSAD_TRY(build_denoiser(spec, model));
    TSAD_TRY(build_encoder(spec, model));
    float *time_memory = NULL;
    tsad_status status = TSAD_OK;
    if (!model->encode_rows) {
        status = tabulate_time(spec, model, &time_memory);
    }
    if (status == TSAD_OK && spec->n_pruner_tensors) {
        tsad_model_spec own = *spec;
        own.n_blocks = spec->wanted ? tsad_denoiser(model)->n_blocks : spec->n_blocks;
        status = spec->pruner_heads ? tsad_net_pruner(&own, model, time_memory)
                                    : tsad_net_pruner_mlp(&own, model, time_memory);
    }
    tsad_deallocate(time_memory);
    return status;
}
