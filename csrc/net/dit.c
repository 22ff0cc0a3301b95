/* dit.c: the diffusion transformer of LeRobot's multi_task_dit as a list of nodes.
 *
 *   sample (T, A) -> embed -> [attention, MLP] x layers -> head
 *
 * Both branches are adaLN-Zero: the LayerNorm before them is scaled and moved, and what they add
 * is gated, by terms of step and observation (terms.c). A slot keeps a branch before its gate,
 * which differs from step to step. Tensor names are LeRobot's, without the prefix.
 */
#include "../model.h"

#include <math.h>
#include <stdio.h>

enum { TERMS = 6 }; /* of a layer: move, scale, gate of attention, and the same of the MLP */

static tsad_status take(const tsad_model_spec *s, const char *prefix, const char *name, int rows,
                        int cols, const float **out)
{
    char full[160];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    return tsad_take(tsad_tensors_of(s), full, rows, cols, out);
}

/* linear layer `name`: weight and bias follow after `dot` */
static tsad_status take_linear(const tsad_model_spec *s, const char *prefix, const char *name,
                               const char *dot, int n_in, int n_out, tsad_matrix *m)
{
    char text[96];
    const float *weight, *bias;
    snprintf(text, sizeof text, "%s%sweight", name, dot);
    TSAD_TRY(take(s, prefix, text, n_out, n_in, &weight));
    snprintf(text, sizeof text, "%s%sbias", name, dot);
    TSAD_TRY(take(s, prefix, text, n_out, 0, &bias));
    return tsad_matrix_linear(m, n_in, n_out, weight, bias, NULL, NULL);
}

static tsad_node *add_branch(tsad_net *net, tsad_node_kind kind, int reg, const char *prefix,
                             int term)
{
    tsad_node *node = tsad_net_add(net, kind, reg, reg);
    bool attention = kind == TSAD_SELF_ATTENTION;
    snprintf(node->kin, sizeof node->kin, attention ? "attn" : "mlp");
    snprintf(node->label, sizeof node->label, "%.32s%.6s", prefix, node->kin);
    node->type = attention ? 0 : 1;
    node->normalise = true;
    node->eps = 1e-6f;
    node->modulated = true;
    node->term = term;
    node->cache_point = TSAD_BEFORE_GATE;
    return node;
}

static tsad_status add_layer(const tsad_model_spec *s, tsad_net *net, tsad_terms *terms, int layer,
                             int reg)
{
    int D = s->hidden_dim, head = D / s->n_heads;
    char prefix[48], name[96];
    snprintf(prefix, sizeof prefix, "transformer_blocks.%d.", layer);

    tsad_node *node = add_branch(net, TSAD_SELF_ATTENTION, reg, prefix, terms->n_terms);
    node->n_heads = s->n_heads;
    if (s->use_rope) {
        TSAD_TRY(take_linear(s, prefix, "attn.qkv_proj", ".", D, 3 * D, &node->m[0]));
        TSAD_TRY(take_linear(s, prefix, "attn.out_proj", ".", D, D, &node->m[1]));
        size_t n = (size_t)s->horizon * (size_t)head;
        TSAD_TRY(tsad_copy_floats(&node->table, s->rotation, n));
    } else {
        TSAD_TRY(take_linear(s, prefix, "multihead_attn.in_proj", "_", D, 3 * D, &node->m[0]));
        TSAD_TRY(take_linear(s, prefix, "multihead_attn.out_proj", ".", D, D, &node->m[1]));
    }
    tsad_scale_queries(&node->m[0], head);

    node = add_branch(net, TSAD_FEED_FORWARD, reg, prefix, terms->n_terms + TERMS / 2 * D);
    node->activation = TSAD_GELU_TANH;
    TSAD_TRY(take_linear(s, prefix, "mlp.0", ".", D, 4 * D, &node->m[0]));
    TSAD_TRY(take_linear(s, prefix, "mlp.2", ".", 4 * D, D, &node->m[1]));

    snprintf(name, sizeof name, "%sadaLN_modulation.1", prefix);
    return tsad_terms_add(terms, s, name, TERMS * D);
}

static tsad_status build_denoiser(const tsad_model_spec *s, tsad_net *net, tsad_terms *terms)
{
    int T = s->horizon, D = s->hidden_dim;
    const float *position;
    TSAD_TRY(tsad_net_begin(net, 2 + 2 * s->n_layers, 3));
    net->input = tsad_net_register(net, T, s->action_dim);
    int h = tsad_net_register(net, T, D);
    net->output = tsad_net_register(net, T, s->action_dim);
    tsad_node *embed = tsad_net_add(net, TSAD_LINEAR, net->input, h);
    TSAD_TRY(take_linear(s, "", "input_proj", ".", s->action_dim, D, &embed->m[0]));
    if (s->use_positional_encoding) {
        TSAD_TRY(tsad_take_shape(tsad_tensors_of(s), "pos_embedding", 3, (int64_t[]){1, T, D},
                                 &position));
        TSAD_TRY(tsad_copy_floats(&embed->table, position, (size_t)T * (size_t)D));
    }
    for (int layer = 0; layer < s->n_layers; layer++) {
        TSAD_TRY(add_layer(s, net, terms, layer, h));
    }
    tsad_node *head = tsad_net_add(net, TSAD_LINEAR, h, net->output);
    TSAD_TRY(take_linear(s, "", "output_proj", ".", D, s->action_dim, &head->m[0]));
    return tsad_net_finish(net);
}

static double gelu(double x) { return x * 0.5 * erfc(-x * sqrt(0.5)); }
static double silu_of_gelu(double x)
{
    double y = gelu(x);
    return y / (1 + exp(-y));
}

/* a LayerNorm is multiplied by 1 + scale */
static void add_one(const tsad_model_spec *s, float *table)
{
    size_t D = (size_t)s->hidden_dim, halves = 2 * (size_t)s->n_layers * (size_t)s->n_steps;
    for (size_t i = 0; i < halves; i++) {
        for (size_t j = D; j < 2 * D; j++) {
            table[i * TERMS / 2 * D + j] += 1;
        }
    }
}

static tsad_status check(const tsad_model_spec *s)
{
    if (s->n_layers < 1 || s->n_layers > TSAD_MAX_BLOCKS / 2 || s->hidden_dim < 1 ||
        s->hidden_dim > 1 << 16) {
        return tsad_fail(TSAD_ARGUMENT,
                         "n_layers, hidden_dim: expected 1 to %d and 1 to 65536, got %d and %d",
                         TSAD_MAX_BLOCKS / 2, s->n_layers, s->hidden_dim);
    }
    if (s->n_heads < 1 || s->hidden_dim % s->n_heads ||
        (s->use_rope && s->hidden_dim / s->n_heads % 2)) {
        return tsad_fail(TSAD_ARGUMENT,
                         "hidden_dim: expected a multiple of n_heads (%d), with rotation an even "
                         "one, got %d",
                         s->n_heads, s->hidden_dim);
    }
    if (s->use_rope && !s->rotation && !s->wanted) {
        return tsad_fail(TSAD_ARGUMENT, "rotation: expected cosines and sines, as use_rope is set, "
                                        "got none; pass them");
    }
    if (s->n_emb < 4 || s->n_emb % 2 || s->n_emb > 1 << 16) {
        return tsad_fail(TSAD_ARGUMENT, "n_emb: expected an even number from 4, got %d", s->n_emb);
    }
    if (s->n_pruner_tensors) {
        return tsad_fail(TSAD_ARGUMENT, "pruner: there is none for a DiT yet; leave it out");
    }
    return TSAD_OK;
}

tsad_status tsad_net_dit(const tsad_model_spec *spec, tsad_model *model)
{
    TSAD_TRY(check(spec));
    tsad_time_mlp time = {.first = "time_mlp.1",
                          .second = "time_mlp.3",
                          .hidden = 2 * spec->n_emb,
                          .between = gelu,
                          .after = silu_of_gelu};
    tsad_terms terms;
    tsad_status status = tsad_terms_begin(&terms, spec->n_layers);
    if (status == TSAD_OK) {
        status = build_denoiser(spec, &model->nets[TSAD_DENOISER], &terms);
    }
    if (status == TSAD_OK) {
        status = tsad_terms_finish(&terms, spec, &time, TSAD_SILU, model);
    }
    if (status == TSAD_OK) {
        add_one(spec, model->time_terms);
    }
    tsad_terms_free(&terms);
    return status;
}
