/* unet1d.c: the conditional UNet over time of LeRobot and Diffusion Policy as a list of nodes.
 *
 *   sample (T, A) -> [two residual blocks, half the tokens] x levels -> two blocks
 *                 -> [skip, two residual blocks, twice the tokens] x (levels - 1) -> block -> (T,
 * A)
 *
 * A residual block is a prunable branch, two convolutions with GroupNorm and Mish, the first one's
 * output scaled and moved by a term of step and observation (FiLM), beside a 1x1 convolution where
 * the channels change. Exact rewrites: Mish of [time, observation] goes element by element, so the
 * linear layer that makes a block's term splits into a table over the steps, made here in double,
 * and one product per chunk, which is the encoder; a transposed convolution is two of two taps.
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
    tsad_model *model;
    tsad_net *net;
    int n_terms, halo;
    int n_conds;        /* FiLM layers so far: */
    const float **cond; /* weight, bias of each */
    int *cond_rows;
    int64_t types[TSAD_MAX_TYPES]; /* shapes of branches, tokens << 32 | channels */
    int n_types;
} builder;

static tsad_status take(const builder *b, const char *prefix, const char *name, int64_t d0,
                        int64_t d1, int64_t d2, const float **out)
{
    char full[160];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    return tsad_take_shape(b->spec->tensors, b->spec->n_tensors, full,
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
    float *to = node->norm + 2 * (size_t)i * (size_t)c_out;
    memcpy(to, gain, sizeof(float) * (size_t)c_out);
    memcpy(to + c_out, shift, sizeof(float) * (size_t)c_out);
    node->groups[i] = groups;
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
    node->term = b->n_terms;
    node->scales = b->spec->use_film_scale_modulation;
    snprintf(node->label, sizeof node->label, "%s", name);
    TSAD_TRY(type_of(b, &b->net->registers[*out], &node->type));
    TSAD_TRY(take_conv_norm(b, prefix, "conv1", c_in, channels, b->spec->n_groups, 0, node));
    TSAD_TRY(take_conv_norm(b, prefix, "conv2", channels, channels, b->spec->n_groups, 1, node));
    int cond = b->spec->n_emb + b->spec->n_obs_steps * b->spec->obs_dim;
    const float **at = b->cond + 2 * b->n_conds;
    TSAD_TRY(take(b, prefix, "cond_encoder.1.weight", rows, cond, 0, &at[0]));
    TSAD_TRY(take(b, prefix, "cond_encoder.1.bias", rows, 0, 0, &at[1]));
    b->cond_rows[b->n_conds++] = rows;
    b->n_terms += rows;
    return TSAD_OK;
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

/* obs -> terms: the observations' columns of all FiLM layers as one matrix */
static tsad_status build_encoder(builder *b)
{
    const tsad_model_spec *s = b->spec;
    tsad_net *net = &b->model->nets[TSAD_ENCODER];
    int cond = s->n_obs_steps * s->obs_dim, n = b->n_terms, D = s->n_emb;
    TSAD_TRY(tsad_net_begin(net, 3, 3));
    net->input = tsad_net_register(net, s->n_obs_steps, s->obs_dim);
    int flat = tsad_net_register(net, 1, cond);
    net->output = tsad_net_register(net, 1, n);
    tsad_net_add(net, TSAD_FLATTEN, net->input, flat)->activation = TSAD_MISH;
    tsad_node *node = tsad_net_add(net, TSAD_LINEAR, flat, net->output);
    tsad_net_add(net, TSAD_TERMS, net->output, net->output);
    tsad_matrix *m = &node->m[0];
    TSAD_TRY(tsad_matrix_make(m, cond, n));
    for (int c = 0, at = 0; c < b->n_conds; at += b->cond_rows[c++]) {
        for (int o = 0; o < b->cond_rows[c]; o++) {
            const float *row = b->cond[2 * c] + (size_t)o * (size_t)(D + cond) + D;
            for (int i = 0; i < cond; i++) {
                m->data[(size_t)i * (size_t)n + (size_t)(at + o)] = row[i];
            }
        }
    }
    return tsad_net_finish(net);
}

static double mish(double x) { return x > 30 ? x : x * tanh(log1p(exp(x))); }

/* what a row of a torch linear layer makes of x (n) */
static double row_of(const float *weight, double bias, const double *x, int n)
{
    double part[4] = {bias};
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        for (int j = 0; j < 4; j++) {
            part[j] += (double)weight[i + j] * x[i + j];
        }
    }
    for (; i < n; i++) {
        part[0] += (double)weight[i] * x[i];
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
}

/* the steps' columns, for every step */
static tsad_status tabulate_time(const builder *b)
{
    const tsad_model_spec *s = b->spec;
    int D = s->n_emb, cond = D + s->n_obs_steps * s->obs_dim;
    const float *w1, *b1, *w3, *b3;
    TSAD_TRY(take(b, "diffusion_step_encoder", ".1.weight", 4 * D, D, 0, &w1));
    TSAD_TRY(take(b, "diffusion_step_encoder", ".1.bias", 4 * D, 0, 0, &b1));
    TSAD_TRY(take(b, "diffusion_step_encoder", ".3.weight", D, 4 * D, 0, &w3));
    TSAD_TRY(take(b, "diffusion_step_encoder", ".3.bias", D, 0, 0, &b3));
    float *table = tsad_allocate(sizeof(float) * (size_t)s->n_steps * (size_t)b->n_terms);
    double *x = tsad_allocate(sizeof(double) * 6 * (size_t)D);
    b->model->time_terms = table;
    if (!table || !x) {
        tsad_deallocate(x);
        return tsad_fail(TSAD_MEMORY, "out of memory for the tables of %d steps", s->n_steps);
    }
    double *hidden = x + D, *time = x + 5 * D;
    for (int k = 0; k < s->n_steps; k++) {
        for (int i = 0; i < D; i++) {
            x[i] = s->time_emb[(size_t)k * (size_t)D + (size_t)i];
        }
        for (int i = 0; i < 4 * D; i++) {
            hidden[i] = mish(row_of(w1 + (size_t)i * (size_t)D, b1[i], x, D));
        }
        for (int i = 0; i < D; i++) {
            time[i] = mish(row_of(w3 + (size_t)i * 4 * (size_t)D, b3[i], hidden, 4 * D));
        }
        for (int c = 0; c < b->n_conds; c++) {
            for (int o = 0; o < b->cond_rows[c]; o++) {
                *table++ = (float)row_of(b->cond[2 * c] + (size_t)o * (size_t)cond,
                                         b->cond[2 * c + 1][o], time, D);
            }
        }
    }
    tsad_deallocate(x);
    return TSAD_OK;
}

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
    if (s->n_groups < 1 || s->n_emb < 4 || s->n_emb % 2) {
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
    size_t most = 4 * (size_t)spec->n_levels + 2;
    builder b = {.spec = spec, .model = model, .net = &model->nets[TSAD_DENOISER]};
    b.halo = spec->kernel_size / 2 > 1 ? spec->kernel_size / 2 : 1;
    b.cond = tsad_allocate(sizeof *b.cond * 2 * most);
    b.cond_rows = tsad_allocate(sizeof *b.cond_rows * most);
    tsad_status status = TSAD_OK;
    if (!b.cond || !b.cond_rows) {
        status = tsad_fail(TSAD_MEMORY, "out of memory for %zu blocks", most);
    }
    if (status == TSAD_OK) {
        status = build_denoiser(&b);
    }
    model->n_terms = b.n_terms;
    if (status == TSAD_OK) {
        status = build_encoder(&b);
    }
    if (status == TSAD_OK) {
        status = tabulate_time(&b);
    }
    tsad_deallocate(b.cond);
    tsad_deallocate(b.cond_rows);
    return status;
}
