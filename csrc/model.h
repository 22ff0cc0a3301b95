/* model.h: an immutable model: its networks and tables, packed for one backend. */
#pragma once

#include "net/net.h"

#include <stdatomic.h>

struct tsad_backend;

/* Cross-attention over few memory tokens, folded exactly (method.md 7.4; Diffusion Policy's
 * masks kept): per head h and token s a score vector, a score constant and a value vector:
 *   score = LN(x) . key + shift,   branch = sum_s softmax(score)_s value_s + bias
 * A folded token is key (H, D), value (H, D), shift (H padded). */
typedef struct tsad_fold {
    int n_heads, width;
    size_t floats;       /* of one folded token */
    size_t value, shift; /* offsets; key is at 0 */
} tsad_fold;

typedef struct tsad_pruner {
    bool at_once;                  /* one row of its program makes the scores of all steps */
    int hidden, n_heads, n_blocks; /* of the transformer; 0: an MLP, which is all in its net */
    int query_tokens;              /* memory tokens that it reads at once: To, or S per row */
    tsad_matrix keys;              /* memory (D) -> keys (hidden), query scale folded */
    tsad_matrix values;            /* memory (D) -> values (hidden) */
    tsad_matrix out;               /* (hidden, hidden): values -> branch, head by head */
    float *query;                  /* (B, hidden) constant queries */
    float *token;      /* (B, hidden) constant block tokens after self-attention, plus out bias */
    float *time_score; /* (K, B, H) scores against the time token; NULL with an encoder */
    float *time_value; /* (K, H, hidden) */
    void *packed;
} tsad_pruner;

/* Rows that compute nothing, in closed form: see net/closed.c. base NULL: this net has none. */
typedef struct tsad_closed {
    int tokens, width, actions;
    float *base;             /* (T, D); the others follow in the same allocation */
    float *embed, *head;     /* (A, D) */
    float *head_bias;        /* (A) */
    float *square, *through; /* (A, A) */
} tsad_closed;

/* The parts of a model that are networks. */
typedef enum tsad_part { TSAD_ENCODER, TSAD_PRUNER_NET, TSAD_DENOISER, TSAD_N_PARTS } tsad_part;

/* What carries everything that is not the sample from one program to another: arrays of a lane,
 * made anew for every chunk. */
typedef enum tsad_array {
    TSAD_ARRAY_MEMORY,      /* encoder output: (To or K * S, D padded) */
    TSAD_ARRAY_FOLDED,      /* (rows, layers, tokens, fold.floats) */
    TSAD_ARRAY_PRUNE_SCORE, /* (rows, tokens, B, H) */
    TSAD_ARRAY_PRUNE_VALUE, /* (rows, tokens, H, hidden) */
    TSAD_ARRAY_SCORES,      /* (K, B, 4), memory order */
    TSAD_ARRAY_TERMS,       /* what each node's term has of the observation; the model's tables have
                               what it has of the step */
    TSAD_N_ARRAYS
} tsad_array;

struct tsad_model {
    atomic_int references;
    const struct tsad_backend *backend;
    int horizon, n_obs_steps, n_action_steps, obs_dim, action_dim;
    int width, n_layers, n_memory; /* n_memory: tokens of memory, S */
    int n_steps, n_blocks;
    bool adds_noise;
    tsad_precision precision;
    bool encode_rows; /* the memory depends on step and observation: the encoder runs per step */
    float *sampler;   /* (K, 9) */
    float *obs_scale, *obs_offset, *action_scale, *action_offset;
    float *obs_shift, *action_shift; /* NULL: none */
    int64_t *block_cost;
    int64_t dense_cost; /* of one chunk */
    tsad_net nets[TSAD_N_PARTS];
    size_t array_floats[TSAD_N_ARRAYS]; /* of one lane; 0: this model has none */
    bool has_pruner;
    tsad_pruner pruner;
    tsad_fold fold;
    tsad_closed closed;
    float *time_fold;  /* (K, layers, fold.floats); NULL when encode_rows */
    float *time_terms; /* (K, n_terms), added to the lane's terms */
    int n_terms;
    tsad_arena packed; /* the backend's weights */
    size_t weight_bytes;
};

static inline const tsad_net *tsad_denoiser(const tsad_model *m) { return &m->nets[TSAD_DENOISER]; }

/* Is this a sampler's table? *adds_noise: it reads noise after the first. */
tsad_status tsad_sampler_check(const float *sampler, int n_steps, bool *adds_noise);

/* A failure that names the number; least to most. */
tsad_status tsad_check_size(const char *name, int value, int least, int most);
/* what every family has: horizon, observations, actions */
tsad_status tsad_check_interface(const tsad_model_spec *spec);

/* ---- families ---------------------------------------------------------------------------- */

/* The nets of the family that the specification names. */
tsad_status tsad_net_of_family(const tsad_model_spec *spec, tsad_model *model);

tsad_status tsad_net_dpt(const tsad_model_spec *spec, tsad_model *model);
tsad_status tsad_net_unet1d(const tsad_model_spec *spec, tsad_model *model);
tsad_status tsad_net_dit(const tsad_model_spec *spec, tsad_model *model);
tsad_status tsad_net_nodes(const tsad_model_spec *spec, tsad_model *model);
/* time_memory (K, D): the encoder's output for the time tokens; NULL if it runs per step */
tsad_status tsad_net_pruner(const tsad_model_spec *spec, tsad_model *model,
                            const float *time_memory);
tsad_status tsad_net_pruner_mlp(const tsad_model_spec *spec, tsad_model *model,
                                const float *time_memory);
tsad_status tsad_net_closed(tsad_model *model); /* from the plain matrices */

/* ---- terms.c ----------------------------------------------------------------------------- */

/* Linear layers of the activated condition [time (n_emb), observations]; borrowed tensors. */
typedef struct tsad_terms {
    int n_layers, n_terms;
    const float **weight, **bias; /* torch's, (rows, n_emb + n_obs_steps * obs_dim) and (rows) */
    int *rows;
} tsad_terms;

/* The embedding of a step's time code, as far as into those layers. */
typedef struct tsad_time_mlp {
    const char *first, *second; /* linear layers, n_emb -> hidden -> n_emb */
    int hidden;
    double (*between)(double), (*after)(double); /* activations; the condition's own included */
} tsad_time_mlp;

tsad_status tsad_terms_begin(tsad_terms *t, int max_layers);
void tsad_terms_free(tsad_terms *t);
tsad_status tsad_terms_add(tsad_terms *t, const tsad_model_spec *s, const char *name, int rows);
/* The encoder, which makes the lane's terms of the observations, and the table of the steps'.
 * `act`: the condition's activation. */
tsad_status tsad_terms_finish(const tsad_terms *t, const tsad_model_spec *s,
                              const tsad_time_mlp *mlp, tsad_activation act, tsad_model *model);
