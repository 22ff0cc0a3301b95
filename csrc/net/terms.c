/* terms.c: what a net's nodes have of the condition, of linear layers of [time, observation].
 *
 * Before such a layer an activation goes element by element, so that the layer splits exactly into
 * a table over the steps, made here in double, and one product per chunk, which is the encoder.
 */
#include "../model.h"

#include <math.h>
#include <stdio.h>

tsad_status tsad_terms_begin(tsad_terms *t, int max_layers)
{
    *t = (tsad_terms){0};
    t->weight = tsad_allocate(sizeof *t->weight * (size_t)max_layers);
    t->bias = tsad_allocate(sizeof *t->bias * (size_t)max_layers);
    t->rows = tsad_allocate(sizeof *t->rows * (size_t)max_layers);
    return t->weight && t->bias && t->rows
               ? TSAD_OK
               : tsad_fail(TSAD_MEMORY, "out of memory for %d layers", max_layers);
}

void tsad_terms_free(tsad_terms *t)
{
    tsad_deallocate(t->weight);
    tsad_deallocate(t->bias);
    tsad_deallocate(t->rows);
}

static tsad_status take(const tsad_model_spec *s, const char *name, const char *part, int rows,
                        int columns, const float **out)
{
    char full[160];
    snprintf(full, sizeof full, "%s.%s", name, part);
    return tsad_take_shape(tsad_tensors_of(s), full, columns ? 2 : 1, (int64_t[]){rows, columns},
                           out);
}

tsad_status tsad_terms_add(tsad_terms *t, const tsad_model_spec *s, const char *name, int rows)
{
    int i = t->n_layers;
    if (rows > INT32_MAX - t->n_terms) {
        return tsad_fail(TSAD_ARGUMENT,
                         "'%s': with its %d rows there are more terms than %d; use a narrower "
                         "network, or fewer layers",
                         name, rows, INT32_MAX);
    }
    TSAD_TRY(take(s, name, "weight", rows, s->n_emb + s->n_obs_steps * s->obs_dim, &t->weight[i]));
    TSAD_TRY(take(s, name, "bias", rows, 0, &t->bias[i]));
    t->rows[i] = rows;
    t->n_layers++;
    t->n_terms += rows;
    return TSAD_OK;
}

/* obs -> terms: the observations' columns of all layers as one matrix */
static tsad_status build_encoder(const tsad_terms *t, const tsad_model_spec *s, tsad_activation act,
                                 tsad_net *net)
{
    int cond = s->n_obs_steps * s->obs_dim, n = t->n_terms, D = s->n_emb;
    TSAD_TRY(tsad_net_begin(net, 3, 3));
    net->input = tsad_net_register(net, s->n_obs_steps, s->obs_dim);
    int flat = tsad_net_register(net, 1, cond);
    net->output = tsad_net_register(net, 1, n);
    tsad_net_add(net, TSAD_FLATTEN, net->input, flat)->activation = act;
    tsad_node *node = tsad_net_add(net, TSAD_LINEAR, flat, net->output);
    tsad_net_add(net, TSAD_STORE, net->output, net->output)->array = TSAD_ARRAY_TERMS;
    tsad_matrix *m = &node->m[0];
    if (s->wanted) {
        return TSAD_OK;
    }
    TSAD_TRY(tsad_matrix_make(m, cond, n));
    for (int c = 0, at = 0; c < t->n_layers; at += t->rows[c++]) {
        for (int o = 0; o < t->rows[c]; o++) {
            const float *row = t->weight[c] + (size_t)o * (size_t)(D + cond) + D;
            for (int i = 0; i < cond; i++) {
                m->data[(size_t)i * (size_t)n + (size_t)(at + o)] = row[i];
            }
        }
    }
    return tsad_net_finish(net);
}

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
static tsad_status tabulate_time(const tsad_terms *t, const tsad_model_spec *s,
                                 const tsad_time_mlp *mlp, float **out)
{
    int D = s->n_emb, H = mlp->hidden, cond = D + s->n_obs_steps * s->obs_dim;
    const float *w1, *b1, *w2, *b2;
    TSAD_TRY(take(s, mlp->first, "weight", H, D, &w1));
    TSAD_TRY(take(s, mlp->first, "bias", H, 0, &b1));
    TSAD_TRY(take(s, mlp->second, "weight", D, H, &w2));
    TSAD_TRY(take(s, mlp->second, "bias", D, 0, &b2));
    float *table = tsad_allocate(sizeof(float) * (size_t)s->n_steps * (size_t)t->n_terms);
    double *x = tsad_allocate(sizeof(double) * (size_t)(2 * D + H));
    *out = table;
    if (!table || !x) {
        tsad_deallocate(x);
        return tsad_fail(TSAD_MEMORY, "out of memory for the tables of %d steps", s->n_steps);
    }
    double *hidden = x + D, *time = hidden + H;
    for (int k = 0; k < s->n_steps; k++) {
        for (int i = 0; i < D; i++) {
            x[i] = s->time_emb[(size_t)k * (size_t)D + (size_t)i];
        }
        for (int i = 0; i < H; i++) {
            hidden[i] = mlp->between(row_of(w1 + (size_t)i * (size_t)D, b1[i], x, D));
        }
        for (int i = 0; i < D; i++) {
            time[i] = mlp->after(row_of(w2 + (size_t)i * (size_t)H, b2[i], hidden, H));
        }
        for (int c = 0; c < t->n_layers; c++) {
            for (int o = 0; o < t->rows[c]; o++) {
                *table++ =
                    (float)row_of(t->weight[c] + (size_t)o * (size_t)cond, t->bias[c][o], time, D);
            }
        }
    }
    tsad_deallocate(x);
    return TSAD_OK;
}

tsad_status tsad_terms_finish(const tsad_terms *t, const tsad_model_spec *s,
                              const tsad_time_mlp *mlp, tsad_activation act, tsad_model *model)
{
    model->n_terms = t->n_terms;
    TSAD_TRY(build_encoder(t, s, act, &model->nets[TSAD_ENCODER]));
    return tabulate_time(t, s, mlp, &model->time_terms);
}
