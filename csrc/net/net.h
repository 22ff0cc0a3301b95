/* net.h: a network is a list of nodes over registers, built once at load. What a family describes
 * (dpt.c, nodes.c, ...), and what a backend packs and runs. No sampler, no plan, no hardware. */
#pragma once

#include "../base.h"

#define TSAD_MAX_NODES 32767 /* what an op's 16 bits can name */
#define TSAD_MAX_MEMORY 256  /* memory tokens of a step */

typedef enum tsad_node_kind {
    /* prunable branches: out = residual(in) + branch(in), with a slot of their own */
    TSAD_SELF_ATTENTION,  /* m0 qkv (d, 3d), m1 out (d, d) */
    TSAD_CROSS_ATTENTION, /* folded: see tsad_fold; only m0.bias (d) is used */
    TSAD_FEED_FORWARD,    /* m0 (d, h), activation, m1 (h, d_out) */
    TSAD_CONV_BRANCH,     /* m0 (k * d, h), activation, m1 (k * h, d_out), same length */
    /* fixed nodes */
    TSAD_LINEAR,   /* m0 (c_in, c_out), optional LayerNorm before, activation after, table added */
    TSAD_CONV,     /* m0 (k * c_in, c_out), stride, zero padding k / 2 */
    TSAD_UPSAMPLE, /* each token repeated `stride` times */
    TSAD_CONCAT,   /* channels of in, then of in2 */
    TSAD_COPY,
    TSAD_TOKENS,       /* out = [row's table token, in]: memory tokens of one step */
    TSAD_STORE,        /* in -> an array of the lane, at this row */
    TSAD_FOLD,         /* memory tokens -> folded keys and values of one layer (tsad_fold) */
    TSAD_PRUNE_KEYS,   /* the lane's memory -> the pruner's scores and values */
    TSAD_PRUNE_QUERY,  /* softmax over memory of one step, added to the constant block tokens */
    TSAD_PRUNE_TOKENS, /* the lane's memory of this row, its tokens in a row -> out */
    TSAD_PRUNE_SPREAD, /* out (K, n) = ReLU of in (1, n) added to every row of the table */
    /* of wide nets (explicit lists give kinds as numbers: new ones come last); a branch first */
    TSAD_FILM_BRANCH,     /* two of CONV_NORM, the first one's output, in register in2, scaled and
                             moved by a term */
    TSAD_CONV_NORM,       /* m0 (k * c_in, c_out), GroupNorm, activation, same length */
    TSAD_CONV_TRANSPOSED, /* kernel 4, stride 2, padding 1: m0 even tokens, m1 odd ones */
    TSAD_FLATTEN          /* out (1, tokens * channels) = activation(in), token by token */
} tsad_node_kind;

typedef enum tsad_activation {
    TSAD_LINEAR_ONLY,
    TSAD_GELU,
    TSAD_RELU,
    TSAD_MISH,
    TSAD_GELU_TANH, /* torch's approximate="tanh" */
    TSAD_SILU
} tsad_activation;

/* What a slot holds. After the gate sums of reused branches fold; before it they do not. */
typedef enum tsad_cache_point { TSAD_AFTER_GATE, TSAD_BEFORE_GATE } tsad_cache_point;

/* A plain matrix (n_in, n_out) that a backend packs: its own, row-major, with the exact rewrites
 * already applied, or a tensor of the specification as it lies, borrowed until the model is made:
 * input j * width + c is channel c (below `channels`, else 0) of tap tap + j * step. */
typedef struct tsad_matrix {
    int n_in, n_out;
    float *data; /* NULL: borrowed */
    float *bias; /* (n_out) */
    const float *source, *source_bias;
    int width, channels, tap, step;
    size_t channel_stride, out_stride;
} tsad_matrix;

static inline float tsad_matrix_at(const tsad_matrix *m, int i, int o)
{
    if (m->data) {
        return m->data[(size_t)i * (size_t)m->n_out + (size_t)o];
    }
    int c = i % m->width, tap = m->tap + i / m->width * m->step;
    return c < m->channels
               ? m->source[(size_t)o * m->out_stride + (size_t)c * m->channel_stride + (size_t)tap]
               : 0;
}
static inline float tsad_matrix_bias(const tsad_matrix *m, int o)
{
    return m->data ? m->bias[o] : m->source_bias ? m->source_bias[o] : 0;
}

typedef struct tsad_node {
    tsad_node_kind kind;
    int in, in2, out; /* registers */
    int residual;     /* -1: identity; else the fixed node that maps in to out */
    int block;        /* index among prunable nodes, -1: fixed */
    char label[40];   /* of a prunable node: "layers.3.cross_attn", */
    char kin[40];     /* and of all that can stand in for it: "cross_attn" */
    int type;         /* reuse type of a prunable node: the number of its kin */
    int layer;        /* cross-attention and fold: which layer's keys and values */
    tsad_cache_point cache_point;
    tsad_activation activation;
    bool normalise; /* LayerNorm (its scale and shift folded into m0) before m0 */
    float eps;      /* of the LayerNorm */
    bool modulated; /* the LayerNorm is moved and scaled, the branch gated, by terms */
    bool causal;
    bool is_residual; /* a later branch's residual map: runs with that branch */
    int n_heads, kernel, stride;
    int array;     /* STORE: which (tsad_array), its tokens side by side or, */
    bool padded;   /* like a register's, on padded rows */
    int groups[2]; /* of the GroupNorm after m0, m1 */
    int term;      /* where its terms are: move, or scale and move; modulated: move, scale, gate */
    bool scales;
    tsad_matrix m[4];
    float *table; /* added after: (tokens, c_out); TOKENS: (K, c); gate rows: (K, c);
                     SELF_ATTENTION: (tokens, head_dim), cosines and sines that turn queries and
                     keys, channel i with channel i + head_dim / 2 */
    float *norm;  /* GroupNorm's scale and shift after m0, then after m1: (2 or 4, c_out) */
    void *packed; /* the backend's own form of m */
} tsad_node;

typedef struct tsad_register {
    int tokens, channels;
    int halo; /* rows of zeros before and after its own: what a convolution's taps meet there */
} tsad_register;

typedef struct tsad_net {
    int n_nodes, n_registers, n_blocks, max_nodes, max_registers;
    tsad_node *nodes;
    tsad_register *registers;
    int input, output; /* registers */
    bool wide; /* its nodes are worth sharing by channels: one set of registers for all threads */
    int *block_node;     /* (B) */
    uint8_t *block_type; /* (B) */
    size_t *slot_offset; /* (B) floats from the start of a row of slots */
    size_t row_floats;   /* floats of a row of slots */
} tsad_net;

static inline size_t tsad_register_floats(const tsad_register *r)
{
    return (size_t)r->tokens * (size_t)tsad_pad(r->channels);
}

/* ---- build.c ---------------------------------------------------------------------------- */

tsad_status tsad_net_begin(tsad_net *net, int max_nodes, int max_registers);
int tsad_net_register(tsad_net *net, int tokens, int channels);
tsad_node *tsad_net_add(tsad_net *net, tsad_node_kind kind, int in, int out);
tsad_status tsad_net_finish(tsad_net *net); /* numbers blocks, checks shapes, places slots */
void tsad_net_free(tsad_net *net);
bool tsad_node_is_prunable(tsad_node_kind kind);
tsad_status tsad_matrix_make(tsad_matrix *m, int n_in, int n_out); /* zeroed */
/* Taps `tap`, `tap` + `step`, ... (n of them) of a torch convolution (n_out, channels, kernel), or,
 * transposed, (channels, n_out, kernel), over registers of `channels`; borrowed. */
tsad_matrix tsad_matrix_taps(const float *weight, const float *bias, int channels, int n_out,
                             int kernel, int n, int tap, int step, bool transposed);
void tsad_matrix_free(tsad_matrix *m);

/* Where a family's tensors come from. `wanted` (tsad_describe): from nowhere; what is asked for is
 * written down there, each tensor is NULL, and what a builder makes of it has a size alone. */
typedef struct tsad_tensors {
    const tsad_tensor *list;
    int n;
    tsad_wanted_list *wanted;
} tsad_tensors;

static inline tsad_tensors tsad_tensors_of(const tsad_model_spec *s)
{
    return (tsad_tensors){s->tensors, s->n_tensors, s->wanted};
}
static inline tsad_tensors tsad_pruner_tensors_of(const tsad_model_spec *s)
{
    return (tsad_tensors){s->pruner_tensors, s->n_pruner_tensors, s->pruner_wanted};
}

const tsad_tensor *tsad_find(const tsad_tensor *tensors, int n, const char *name);
/* The named tensor, or a failure that names it; a shape of 0 ends the list. */
tsad_status tsad_take(tsad_tensors tensors, const char *name, int64_t rows, int64_t cols,
                      const float **out);
/* The named tensor of exactly this shape, or a failure that names it. */
tsad_status tsad_take_shape(tsad_tensors tensors, const char *name, int n_dims,
                            const int64_t *shape, const float **out);
/* m = transpose of a torch weight (n_out, n_in), with LayerNorm's scale and shift folded in when
 * gain is given. */
tsad_status tsad_matrix_linear(tsad_matrix *m, int n_in, int n_out, const float *weight,
                               const float *bias, const float *gain, const float *shift);
void tsad_scale_queries(tsad_matrix *qkv, int head_dim); /* by what softmax divides scores by */
tsad_status tsad_copy_floats(float **out, const float *source, size_t n); /* NULL of NULL */
