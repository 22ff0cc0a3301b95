/* model.c: check a specification, build its networks, pack them for a backend. Immutable after. */
#include "backend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const tsad_backend *tsad_backend_find(const char *name)
{
    if (!name || !*name || strcmp(name, "auto") == 0) {
        name = getenv("TSAD_CPU");
    }
    bool any = !name || !*name || strcmp(name, "auto") == 0;
    for (int i = 0; tsad_backends[i]; i++) {
        if (tsad_backends[i]->usable() && (any || strcmp(name, tsad_backends[i]->name) == 0)) {
            return tsad_backends[i];
        }
    }
    const tsad_backend *plugged = tsad_backend_plugged();
    return !any && plugged && strcmp(name, plugged->name) == 0 && plugged->usable() ? plugged
                                                                                    : NULL;
}

tsad_status tsad_backend_choose(const char *name, const tsad_backend **out)
{
    *out = tsad_backend_find(name);
    if (!*out) {
        const char *wanted = name && strcmp(name, "auto") ? name : getenv("TSAD_CPU");
        return tsad_fail(TSAD_ARGUMENT, "backend '%s' is unknown or not usable on this CPU",
                         wanted ? wanted : "auto");
    }
    return TSAD_OK;
}

int tsad_backend_names(const char **names, int capacity)
{
    int n = 0;
    for (int i = 0; tsad_backends[i]; i++) {
        if (tsad_backends[i]->usable() && !tsad_backends[i]->for_tests) {
            if (n < capacity) {
                names[n] = tsad_backends[i]->name;
            }
            n++;
        }
    }
    return n;
}

tsad_status tsad_check_size(const char *name, int value, int least, int most)
{
    return value >= least && value <= most
               ? TSAD_OK
               : tsad_fail(TSAD_ARGUMENT, "%s: expected %d to %d, got %d", name, least, most,
                           value);
}

tsad_status tsad_check_interface(const tsad_model_spec *s)
{
    TSAD_TRY(tsad_check_size("horizon", s->horizon, 1, 4096));
    TSAD_TRY(tsad_check_size("n_obs_steps", s->n_obs_steps, 1, 4096));
    TSAD_TRY(tsad_check_size("obs_dim", s->obs_dim, 1, 1 << 16)); /* all steps' fit an int */
    return tsad_check_size("action_dim", s->action_dim, 1, 1 << 16);
}

static tsad_status check_spec(const tsad_model_spec *s)
{
    int most = s->horizon - s->n_obs_steps + 1;
    TSAD_TRY(tsad_check_interface(s));
    TSAD_TRY(tsad_check_size("n_action_steps", s->n_action_steps, 1, most));
    TSAD_TRY(tsad_check_size("n_steps", s->n_steps, 1, TSAD_MAX_STEPS));
    TSAD_TRY(tsad_check_size("n_blocks", s->n_blocks, 1, TSAD_MAX_BLOCKS));
    for (int b = 0; b < s->n_blocks; b++) {
        if (s->block_cost[b] < 0) {
            return tsad_fail(TSAD_ARGUMENT, "block_cost[%d]: expected >= 0, got %lld", b,
                             (long long)s->block_cost[b]);
        }
    }
    return TSAD_OK;
}

static tsad_status check_tables(const tsad_model_spec *s)
{
    size_t O = (size_t)s->obs_dim, A = (size_t)s->action_dim, K = (size_t)s->n_steps;
    TSAD_TRY(tsad_check_numbers("obs_scale", s->obs_scale, O));
    TSAD_TRY(tsad_check_numbers("obs_offset", s->obs_offset, O));
    TSAD_TRY(tsad_check_numbers("action_scale", s->action_scale, A));
    TSAD_TRY(tsad_check_numbers("action_offset", s->action_offset, A));
    TSAD_TRY(tsad_check_numbers("obs_shift", s->obs_shift, O));
    TSAD_TRY(tsad_check_numbers("action_shift", s->action_shift, A));
    for (size_t a = 0; a < A; a++) {
        if (fabsf(s->action_scale[a]) < 1 / TSAD_MAX_MAGNITUDE) {
            return tsad_fail(TSAD_ARGUMENT,
                             "action_scale[%zu]: expected a magnitude of at least %g (actions are "
                             "divided by it), got %g",
                             a, 1 / (double)TSAD_MAX_MAGNITUDE, (double)s->action_scale[a]);
        }
    }
    TSAD_TRY(tsad_check_numbers("time_emb", s->time_emb, K * (size_t)s->n_emb));
    size_t head = s->n_heads ? (size_t)(s->hidden_dim / s->n_heads) : 0;
    TSAD_TRY(tsad_check_numbers("rotation", s->rotation, (size_t)s->horizon * head));
    if (s->n_pruner_tensors) {
        size_t n = (size_t)s->n_blocks * (size_t)s->pruner_hidden;
        TSAD_TRY(tsad_check_numbers("block_emb", s->block_emb, n));
    }
    return TSAD_OK;
}

tsad_status tsad_sampler_check(const float *sampler, int n_steps, bool *adds_noise)
{
    for (int i = 0; i < n_steps * TSAD_SAMPLER_COLUMNS; i++) {
        int k = i / TSAD_SAMPLER_COLUMNS, column = i % TSAD_SAMPLER_COLUMNS;
        bool range = column == TSAD_SAMPLER_CLIP; /* infinite where nothing is clipped */
        if (range ? !(sampler[i] >= 0) : !(fabsf(sampler[i]) <= TSAD_MAX_MAGNITUDE)) {
            return tsad_fail(TSAD_ARGUMENT, "sampler: expected %s at step %d, column %d, got %g",
                             range ? "0 or more" : "a magnitude up to 1e12", k, column,
                             (double)sampler[i]);
        }
    }
    *adds_noise = false;
    for (int k = 1; k <= n_steps; k++) {
        *adds_noise |= sampler[(k - 1) * TSAD_SAMPLER_COLUMNS + TSAD_SAMPLER_NOISE] != 0;
    }
    if (sampler[(n_steps - 1) * TSAD_SAMPLER_COLUMNS + TSAD_SAMPLER_NOISE] != 0) {
        return tsad_fail(TSAD_ARGUMENT, "sampler: its last row adds noise, expected none (0): "
                                        "there is no step after it");
    }
    return TSAD_OK;
}

static tsad_status copy_tables(const tsad_model_spec *s, tsad_model *m)
{
    m->horizon = s->horizon;
    m->n_obs_steps = s->n_obs_steps;
    m->n_action_steps = s->n_action_steps;
    m->obs_dim = s->obs_dim;
    m->action_dim = s->action_dim;
    m->n_blocks = s->n_blocks;
    m->n_steps = s->n_steps;
    TSAD_TRY(tsad_sampler_check(s->sampler, s->n_steps, &m->adds_noise));
    TSAD_TRY(tsad_copy_floats(&m->sampler, s->sampler, (size_t)s->n_steps * TSAD_SAMPLER_COLUMNS));
    TSAD_TRY(tsad_copy_floats(&m->obs_scale, s->obs_scale, (size_t)s->obs_dim));
    TSAD_TRY(tsad_copy_floats(&m->obs_offset, s->obs_offset, (size_t)s->obs_dim));
    TSAD_TRY(tsad_copy_floats(&m->action_scale, s->action_scale, (size_t)s->action_dim));
    TSAD_TRY(tsad_copy_floats(&m->action_offset, s->action_offset, (size_t)s->action_dim));
    if (s->obs_shift) {
        TSAD_TRY(tsad_copy_floats(&m->obs_shift, s->obs_shift, (size_t)s->obs_dim));
    }
    if (s->action_shift) {
        TSAD_TRY(tsad_copy_floats(&m->action_shift, s->action_shift, (size_t)s->action_dim));
    }
    m->block_cost = tsad_allocate(sizeof(int64_t) * (size_t)s->n_blocks);
    if (!m->block_cost) {
        return tsad_fail(TSAD_MEMORY, "out of memory for %d block costs", s->n_blocks);
    }
    for (int b = 0; b < s->n_blocks; b++) {
        m->block_cost[b] = s->block_cost[b];
        m->dense_cost += s->block_cost[b] * s->n_steps;
    }
    return TSAD_OK;
}

static void free_plain(tsad_model *m)
{
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        for (int n = 0; n < m->nets[i].n_nodes; n++) {
            for (int j = 0; j < 4; j++) {
                tsad_matrix_free(&m->nets[i].nodes[n].m[j]);
            }
        }
    }
    tsad_matrix_free(&m->pruner.keys);
    tsad_matrix_free(&m->pruner.values);
    tsad_matrix_free(&m->pruner.out);
}

static void size_arrays(tsad_model *m)
{
    size_t rows = m->encode_rows ? (size_t)m->n_steps : 1, B = (size_t)m->n_blocks;
    size_t tokens = rows * (size_t)(m->encode_rows ? m->n_memory : m->n_obs_steps);
    m->array_floats[TSAD_ARRAY_TERMS] = (size_t)m->n_terms;
    if (m->n_memory) {
        m->array_floats[TSAD_ARRAY_MEMORY] = tokens * (size_t)tsad_pad(m->width);
        m->array_floats[TSAD_ARRAY_FOLDED] = tokens * (size_t)m->n_layers * m->fold.floats;
    }
    if (m->has_pruner) {
        size_t hidden = (size_t)m->pruner.hidden, heads = (size_t)m->pruner.n_heads;
        m->array_floats[TSAD_ARRAY_PRUNE_SCORE] = tokens * B * heads;
        m->array_floats[TSAD_ARRAY_PRUNE_VALUE] = tokens * heads * hidden;
        m->array_floats[TSAD_ARRAY_SCORES] = (size_t)m->n_steps * B * 4;
    }
}

/* programs count their ops in 32 bits */
static tsad_status check_length(const tsad_model *m)
{
    int64_t most = 0;
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        most = m->nets[i].n_nodes > most ? m->nets[i].n_nodes : most;
    }
    if ((most + 1) * m->n_steps > INT32_MAX) {
        return tsad_fail(TSAD_ARGUMENT,
                         "n_steps: %d steps of %lld nodes are more than one program can hold "
                         "(2147483647); use fewer steps",
                         m->n_steps, (long long)most);
    }
    return TSAD_OK;
}

tsad_status tsad_net_of_family(const tsad_model_spec *spec, tsad_model *m)
{
    static const struct {
        const char *name;
        tsad_status (*build)(const tsad_model_spec *spec, tsad_model *model);
    } families[] = {{"diffusion_policy_transformer", tsad_net_dpt},
                    {"unet1d", tsad_net_unet1d},
                    {"dit", tsad_net_dit},
                    {"nodes", tsad_net_nodes}};
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        if (strcmp(spec->family, families[i].name) == 0) {
            return families[i].build(spec, m);
        }
    }
    return tsad_fail(TSAD_ARGUMENT,
                     "family: expected 'diffusion_policy_transformer', 'unet1d', 'dit' or 'nodes', "
                     "got '%s'",
                     spec->family);
}

/* weights that float16 has no number for */
static tsad_status check_float16(const tsad_model *m)
{
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        for (int n = 0; n < m->nets[i].n_nodes; n++) {
            for (int j = 0; j < 4; j++) {
                const tsad_matrix *w = &m->nets[i].nodes[n].m[j];
                size_t n_out = (size_t)w->n_out,
                       all = w->data || w->source ? (size_t)w->n_in * n_out : 0;
                for (size_t k = 0; k < all; k++) {
                    float v = tsad_matrix_at(w, (int)(k / n_out), (int)(k % n_out));
                    if (!(fabsf(v) < 65520)) {
                        return tsad_fail(TSAD_ARGUMENT,
                                         "precision: expected weights of magnitude up to 65504, as "
                                         "'float16' has, got %g; use 'bfloat16' or 'float32'",
                                         (double)v);
                    }
                }
            }
        }
    }
    return TSAD_OK;
}

static tsad_status build(const tsad_model_spec *spec, tsad_model *m)
{
    TSAD_TRY(check_spec(spec));
    TSAD_TRY(tsad_backend_choose(spec->backend, &m->backend));
    TSAD_TRY(check_tables(spec));
    m->precision = spec->precision;
    TSAD_TRY(copy_tables(spec, m));
    TSAD_TRY(tsad_net_of_family(spec, m));
    /* after the shapes, which say how many numbers there are */
    TSAD_TRY(tsad_check_tensors(spec->tensors, spec->n_tensors));
    TSAD_TRY(tsad_check_tensors(spec->pruner_tensors, spec->n_pruner_tensors));
    if (tsad_denoiser(m)->n_blocks != spec->n_blocks) {
        return tsad_fail(TSAD_SHAPE, "block_cost: expected %d entries, one per block, got %d",
                         tsad_denoiser(m)->n_blocks, spec->n_blocks);
    }
    TSAD_TRY(check_length(m));
    size_arrays(m);
    TSAD_TRY(tsad_net_closed(m));
    if (m->precision == TSAD_FLOAT16) {
        TSAD_TRY(check_float16(m));
    }
    TSAD_TRY(m->backend->pack(m));
    free_plain(m);
    return TSAD_OK;
}

tsad_status tsad_model_create(const tsad_model_spec *spec, tsad_model **out)
{
    *out = NULL;
    tsad_model *m = tsad_allocate(sizeof *m);
    if (!m) {
        return tsad_fail(TSAD_MEMORY, "out of memory for a model");
    }
    atomic_store(&m->references, 1);
    tsad_status status = build(spec, m);
    if (status != TSAD_OK) {
        tsad_model_destroy(m);
        return status;
    }
    *out = m;
    return TSAD_OK;
}

void tsad_model_retain(tsad_model *m) { atomic_fetch_add(&m->references, 1); }

void tsad_model_destroy(tsad_model *m)
{
    if (!m || atomic_fetch_sub(&m->references, 1) > 1) {
        return;
    }
    if (m->backend) {
        m->backend->unpack(m);
    }
    free_plain(m);
    for (int i = 0; i < TSAD_N_PARTS; i++) {
        tsad_net_free(&m->nets[i]);
    }
    float *tables[] = {
        m->obs_shift,    m->action_shift,      m->sampler,           m->obs_scale,  m->obs_offset,
        m->action_scale, m->action_offset,     m->time_fold,         m->time_terms, m->pruner.query,
        m->pruner.token, m->pruner.time_score, m->pruner.time_value, m->closed.base};
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        tsad_deallocate(tables[i]);
    }
    tsad_deallocate(m->block_cost);
    tsad_deallocate(m);
}

tsad_model_info tsad_model_get_info(const tsad_model *m)
{
    return (tsad_model_info){
        .n_steps = m->n_steps,
        .n_blocks = m->n_blocks,
        .horizon = m->horizon,
        .n_obs_steps = m->n_obs_steps,
        .n_action_steps = m->n_action_steps,
        .obs_dim = m->obs_dim,
        .action_dim = m->action_dim,
        .has_pruner = m->has_pruner,
        .adds_noise = m->adds_noise,
        .block_type = tsad_denoiser(m)->block_type,
        .block_cost = m->block_cost,
        .backend = m->backend->name,
        .weight_bytes = m->weight_bytes,
        .ring_bytes = sizeof(float) * tsad_denoiser(m)->row_floats,
        .rollout_bytes = sizeof(float) * tsad_denoiser(m)->row_floats * (size_t)m->n_steps,
    };
}
