/* unet1d.c: the conditional UNet over time of LeRobot and Diffusion Policy as a list of nodes.
 *
 *   sample (T, A) -> [two residual blocks, half the tokens] x levels -> two blocks
 *                 -> [skip, two residual blocks, twice the tokens] x (levels - 1) -> block -> (T,
 * A)
 *
 * A residual block is a prunable branch, two convolutions with GroupNorm and Mish, the first one's
 * output scaled and moved by a term of step and observation (FiLM, terms.c), beside a 1x1
 * convolution where the channels change. A transposed convolution is two of two taps.
 * Tensor names are LeRobot's, without the prefix.
 */
#include "../model.h"
#include "../plan/plan_core.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { FINAL_GROUPS = 8, MAX_LEVELS = 16 };

typedef struct builder {
    const tsad_model_spec *spec;
    tsad_net *net;
    int halo;
    tsad_terms terms;              /* of FiLM layers so far */
    int64_t types[TSAD_MAX_TYPES]; /* shapes of branches, tokens << 32 | channels */
    int n_types;
} builder;

static tsad_status take(const builder *b, const char *prefix, const char *name, int64_t d0,
                        int64_t d1, int64_t d2, const float **out)
{
    char full[160];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    return tsad_take_shape(tsad_tensors_of(b->spec), full,
                           d2   ? 3
                           : d1 ? 2
                                : 1,
                           (int64_t[]){d0, d1, d2}, out);
}

static int add_register(builder *b, int tokens, int channels)
{
    int r = tsad_net_register(b->net, tokens, channels);
    b->net->registers[r].halo = b->halo;
    return r;
}

/* weight and bias of convolution `name`, (c_out, c_in, kernel) */
static tsad_status take_conv(const builder *b, const char *prefix, const char *name, int c_in,
                             int c_out, int kernel, tsad_matrix *m)
{
    char text[96];
    const float *weight, *bias;
    snprintf(text, sizeof text, "%s.weight", name);
    TSAD_TRY(take(b, prefix, text, c_out, c_in, kernel, &weight));
    snprintf(text, sizeof text, "%s.bias", name);
    TSAD_TRY(take(b, prefix, text, c_out, 0, 0, &bias));
    *m = tsad_matrix_taps(weight, bias, c_in, c_out, kernel, kernel, 0, 1, false);
    return TSAD_OK;
}

/* the i-th convolution of a node with its GroupNorm: "name.block.0", "name.block.1" */
static tsad_status take_conv_norm(const builder *b, const char *prefix, const char *name, int c_in,
                                  int c_out, int groups, int i, tsad_node *node)
{
    char text[96];
    const float *gain, *shift;
    if (c_out % groups) {
        return tsad_fail(TSAD_ARGUMENT, "n_groups: expected a divisor of %d channels, got %d",
                         c_out, groups);
    }
    snprintf(text, sizeof text, "%s.block.0", name);
    TSAD_TRY(take_conv(b, prefix, text, c_in, c_out, node->kernel, &node->m[i]));
    snprintf(text, sizeof text, "%s.block.1.weight", name);
    TSAD_TRY(take(b, prefix, text, c_out, 0, 0, &gain));
    snprintf(text, sizeof text, "%s.block.1.bias", name);
    TSAD_TRY(take(b, prefix, text, c_out, 0, 0, &shift));
    node->groups[i] = groups;
    if (gain && shift) {
        float *to = node->norm + 2 * (size_t)i * (size_t)c_out;
        memcpy(to, gain, sizeof(float) * (size_t)c_out);
        memcpy(to + c_out, shift, sizeof(float) * (size_t)c_out);
    }
    return TSAD_OK;
}

static tsad_status add_conv_norm(builder *b, tsad_node_kind kind, int in, int out, tsad_node **node)
{
    *node = tsad_net_add(b->net, kind, in, out);
    (*node)->kernel = b->spec->kernel_size;
    (*node)->activation = TSAD_MISH;
    size_t floats = 4 * (size_t)b->net->registers[out].channels;
    (*node)->norm = tsad_allocate(sizeof(float) * floats);
    return (*node)->norm ? TSAD_OK : tsad_fail(TSAD_MEMORY, "out of memory for %zu floats", floats);
}

/* branches of one shape can stand in for each other */
static tsad_status type_of(builder *b, const tsad_register *r, int *type)
{
    int64_t shape = (int64_t)r->tokens << 32 | r->channels;
    for (*type = 0; *type < b->n_types; (*type)++) {
        if (b->types[*type] == shape) {
            return TSAD_OK;
        }
    }
    if (b->n_types == TSAD_MAX_TYPES) {
        return tsad_fail(TSAD_ARGUMENT, "down_dims: expected at most %d shapes of blocks",
                         TSAD_MAX_TYPES);
    }
    b->types[b->n_types++] = shape;
    return TSAD_OK;
}

/* residual block `name` from register `in`; *out: a new one where the channels change */
static tsad_status add_block(builder *b, const char *name, int in, int channels, int *out)
{
    int c_in = b->net->registers[in].channels, tokens = b->net->registers[in].tokens;
    int residual = -1, rows = b->spec->use_film_scale_modulation ? 2 * channels : channels;
    char prefix[64];
    snprintf(prefix, sizeof prefix, "%s.", name);
    *out = in;
    if (c_in == channels && in == b->net->input) { /* blocks work in place, the sample stays */
        *out = add_register(b, tokens, channels);
        tsad_net_add(b->net, TSAD_COPY, in, *out);
        in = *out;
    }
    if (c_in != channels) {
        *out = add_register(b, tokens, channels);
        residual = b->net->n_nodes;
        tsad_node *map = tsad_net_add(b->net, TSAD_CONV, in, *out);
        TSAD_TRY(take_conv(b, prefix, "residual_conv", c_in, channels, 1, &map->m[0]));
    }
    tsad_node *node;
    TSAD_TRY(add_conv_norm(b, TSAD_FILM_BRANCH, in, *out, &node));
    node->residual = residual;
    node->in2 = add_register(b, tokens, channels); /* between its convolutions */
    node->term = b->terms.n_terms;
    node->scales = b->spec->use_film_scale_modulation;
    snprintf(node->label, sizeof node->label, "%s", name);
    snprintf(node->kin, sizeof node->kin, "conv_residual[%dx%d]", channels, tokens);
    TSAD_TRY(type_of(b, &b->net->registers[*out], &node->type));
    TSAD_TRY(take_conv_norm(b, prefix, "conv1", c_in, channels, b->spec->n_groups, 0, node));
    TSAD_TRY(take_conv_norm(b, prefix, "conv2", channels, channels, b->spec->n_groups, 1, node));
    snprintf(prefix, sizeof prefix, "%s.cond_encoder.1", name);
    return tsad_terms_add(&b->terms, b->spec, prefix, rows);
}

static tsad_status add_pair(builder *b, const char *level, int *reg, int channels)
{
    for (int i = 0; i < 2; i++) {
        char name[32];
        snprintf(name, sizeof name, "%.20s.%d", level, i & 1);
        TSAD_TRY(add_block(b, name, *reg, channels, reg));
    }
    return TSAD_OK;
}

static tsad_status add_down(builder *b, const char *level, int *reg)
{
    const tsad_register r = b->net->registers[*reg];
    int out = add_register(b, r.tokens / 2, r.channels);
    tsad_node *node = tsad_net_add(b->net, TSAD_CONV, *reg, out);
    node->kernel = 3;
    node->stride = 2;
    *reg = out;
    return take_conv(b, level, ".2", r.channels, r.channels, 3, &node->m[0]);
}

static tsad_status add_up(builder *b, const char *level, int *reg)
{
    const tsad_register r = b->net->registers[*reg];
    int c = r.channels, out = add_register(b, 2 * r.tokens, c);
    const float *weight, *bias;
    tsad_node *node = tsad_net_add(b->net, TSAD_CONV_TRANSPOSED, *reg, out);
    TSAD_TRY(take(b, level, ".2.weight", c, c, 4, &weight));
    TSAD_TRY(take(b, level, ".2.bias", c, 0, 0, &bias));
    /* token 2 i: x[i - 1], x[i] by taps 3, 1; token 2 i + 1: x[i], x[i + 1] by taps 2, 0 */
    node->m[0] = tsad_matrix_taps(weight, bias, c, c, 4, 2, 3, -2, true);
    node->m[1] = tsad_matrix_taps(weight, bias, c, c, 4, 2, 2, -2, true);
    *reg = out;
    return TSAD_OK;
}

static int add_skip(builder *b, int reg, int skip)
{
    const tsad_register *x = &b->net->registers[reg], *y = &b->net->registers[skip];
    int out = add_register(b, x->tokens, x->channels + y->channels);
    tsad_net_add(b->net, TSAD_CONCAT, reg, out)->in2 = skip;
    return out;
}

static tsad_status build_denoiser(builder *b)
{
    const tsad_model_spec *s = b->spec;
    const int32_t *dims = s->down_dims;
    int levels = s->n_levels, skip[MAX_LEVELS];
    char name[48];
    TSAD_TRY(tsad_net_begin(b->net, 9 * levels + 5, 10 * levels + 8));
    b->net->wide = true;
    int x = add_register(b, s->horizon, s->action_dim);
    b->net->input = x;
    for (int i = 0; i < levels; i++) {
        snprintf(name, sizeof name, "down_modules.%d", i);
        TSAD_TRY(add_pair(b, name, &x, dims[i]));
        skip[i] = x;
        if (i + 1 < levels) {
            TSAD_TRY(add_down(b, name, &x));
        }
    }
    x = add_register(b, b->net->registers[x].tokens, dims[levels - 1]);
    tsad_net_add(b->net, TSAD_COPY, skip[levels - 1], x);
    TSAD_TRY(add_pair(b, "mid_modules", &x, dims[levels - 1]));
    for (int i = 0; i + 1 < levels; i++) {
        snprintf(name, sizeof name, "up_modules.%d", i);
        x = add_skip(b, x, skip[levels - 1 - i]);
        TSAD_TRY(add_pair(b, name, &x, dims[levels - 2 - i]));
        TSAD_TRY(add_up(b, name, &x));
    }
    tsad_node *last;
    int h = add_register(b, s->horizon, dims[0]);
    TSAD_TRY(add_conv_norm(b, TSAD_CONV_NORM, x, h, &last));
    TSAD_TRY(take_conv_norm(b, "", "final_conv.0", dims[0], dims[0], FINAL_GROUPS, 0, last));
    b->net->output = add_register(b, s->horizon, s->action_dim);
    tsad_node *head = tsad_net_add(b->net, TSAD_CONV, h, b->net->output);
    TSAD_TRY(take_conv(b, "", "final_conv.1", dims[0], s->action_dim, 1, &head->m[0]));
    return tsad_net_finish(b->net);
}

static double mish(double x) { return x > 30 ? x : x * tanh(log1p(exp(x))); }

static tsad_status check(const tsad_model_spec *s)
{
    if (s->n_levels < 1 || s->n_levels > MAX_LEVELS) {
        return tsad_fail(TSAD_ARGUMENT, "down_dims: expected 1 to %d levels, got %d", MAX_LEVELS,
                         s->n_levels);
    }
    for (int i = 0; i < s->n_levels; i++) {
        if (s->down_dims[i] < 1 || s->down_dims[i] > 1 << 16) {
            return tsad_fail(TSAD_ARGUMENT, "down_dims[%d]: expected 1 to 65536, got %d", i,
                             s->down_dims[i]);
        }
    }
    int factor = 1 << (s->n_levels - 1);
    if (s->horizon % factor) {
        return tsad_fail(TSAD_ARGUMENT,
                         "horizon: expected a multiple of %d, as %d levels halve it, got %d",
                         factor, s->n_levels, s->horizon);
    }
    if (s->kernel_size < 1 || s->kernel_size > 31 || s->kernel_size % 2 == 0) {
        return tsad_fail(TSAD_ARGUMENT, "kernel_size: expected an odd number up to 31, got %d",
                         s->kernel_size);
    }
    if (s->n_groups < 1 || s->n_emb < 4 || s->n_emb % 2 || s->n_emb > 1 << 16) {
        return tsad_fail(TSAD_ARGUMENT,
                         "n_groups, n_emb: expected at least 1, and an even number from 4, got %d "
                         "and %d",
                         s->n_groups, s->n_emb);
    }
    return TSAD_OK;
}

tsad_status tsad_net_unet1d(const tsad_model_spec *spec, tsad_model *model)
{
    TSAD_TRY(check(spec));
    if (spec->n_pruner_tensors) {
        return tsad_fail(TSAD_ARGUMENT, "pruner: there is none for a UNet yet; leave it out");
    }
    tsad_time_mlp time = {.first = "diffusion_step_encoder.1",
                          .second = "diffusion_step_encoder.3",
                          .hidden = 4 * spec->n_emb,
                          .between = mish,
                          .after = mish};
    builder b = {.spec = spec, .net = &model->nets[TSAD_DENOISER]};
    b.halo = spec->kernel_size / 2 > 1 ? spec->kernel_size / 2 : 1;
    tsad_status status = tsad_terms_begin(&b.terms, 4 * spec->n_levels + 2);
    if (status == TSAD_OK) {
        status = build_denoiser(&b);
    }
    if (status == TSAD_OK) {
        status = tsad_terms_finish(&b.terms, spec, &time, TSAD_MISH, model);
    }
    tsad_terms_free(&b.terms);
    return status;
}
