/* kernels.h: what is launched on a device: one structure of arguments and one function a kernel.
 * All pointers are a device's, all numbers but weights float32, rows `ld` floats apart. Only the
 * columns and rows that are named are read or written: what lies between is never initialised.
 *
 * Tracks, lanes of a call or rows that need nothing of each other, go through the same launches:
 * between tsad_together and tsad_launch_all the i-th launch of each joins the others'.
 */
#pragma once

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

#include "net/net.h"

enum { TSAD_TOGETHER = 4 }; /* tracks of a launch, at most */

/* The launches that follow are those of the next track, held back. */
void tsad_together(tsad_stream *stream);
void tsad_launch_all(tsad_stream *stream);

/* n numbers of a row's terms: what depends on the step and what on the observation, added. */
typedef struct tsad_term {
    const float *step; /* NULL: there is no such term */
    const float *lane; /* NULL: 0 */
} tsad_term;

/* x becomes (x - mean) / sqrt(variance + eps) over a row's channels, times scale, plus move */
typedef struct tsad_normaliser {
    bool used;
    float eps;
    tsad_term scale, move;
} tsad_normaliser;

/* Where a result goes: y = v; or, for a branch, slot = v and y += v * gate. */
typedef struct tsad_delivery {
    float *y;
    int ld;
    bool adds;
    float *slot; /* of the same ld; NULL: none */
    tsad_term gate;
} tsad_delivery;

/* y (rows, n_out) = activation(x W + bias) + table, where row r of x is the `taps` tokens from
 * r * stride + first on, zero outside of x. With one tap, x may be normalised first. Batches: the
 * same with all pointers moved. */
typedef struct tsad_product {
    const float *x;
    int ldx, tokens, channels;
    int taps, first, stride;
    tsad_normaliser norm;
    const void *w; /* (taps * channels, n_out) in 32 or 16 bits */
    tsad_precision precision;
    const float *bias;  /* NULL: 0 */
    const float *table; /* (rows, n_out); NULL: 0 */
    int rows, n_out;
    int step; /* from column to column of y */
    tsad_activation activation;
    tsad_delivery to;
    int batches;
    size_t x_batch, w_batch, y_batch;
} tsad_product;
void tsad_launch_product(tsad_stream *stream, tsad_product p);

/* y = x, normalised: for what has several taps */
typedef struct tsad_layernorm {
    const float *x;
    int ldx, rows, channels;
    tsad_normaliser norm;
    float *y;
    int ldy;
} tsad_layernorm;
void tsad_launch_layernorm(tsad_stream *stream, tsad_layernorm p);

/* y = activation(GroupNorm(x) gain + shift) times scale, plus move */
typedef struct tsad_groupnorm {
    const float *x;
    int ldx, rows, channels, groups;
    const float *gain, *shift;
    tsad_activation activation;
    tsad_term scale, move;
    tsad_delivery to;
} tsad_groupnorm;
void tsad_launch_groupnorm(tsad_stream *stream, tsad_groupnorm p);

/* qkv rows: queries (already scaled) of all heads, keys, values; y (tokens, heads * head_dim) */
typedef struct tsad_attention {
    const float *qkv;
    int ld, tokens, heads, head_dim;
    const float *turns; /* (tokens, head_dim): cosines, sines; NULL: positions turn nothing */
    bool causal;
    float *y;
    int ldy;
} tsad_attention;
void tsad_launch_attention(tsad_stream *stream, tsad_attention p);

/* folded cross-attention of x (rows, width): see tsad_fold */
typedef struct tsad_cross_attention {
    const float *x;
    int ldx, rows, width, heads, n_memory;
    tsad_normaliser norm;
    const float *first, *rest; /* folded token 0, and from token 1 on, `floats` apart */
    size_t floats, value, shift;
    const float *bias;
    bool causal; /* row i sees token s iff i >= s - 1 */
    tsad_delivery to;
} tsad_cross_attention;
void tsad_launch_cross_attention(tsad_stream *stream, tsad_cross_attention p);

/* One reused branch of an addition. */
typedef struct tsad_reused {
    int64_t offset; /* of the slot: floats from the lane's first */
    float count;    /* how often it is taken */
    int32_t gate;   /* where its gate is among the terms; -1: it has none */
} tsad_reused;

/* Rows of a caller's array, normalised: y = (x - shift) * scale + offset, or y = base + share * x,
 * rounded as the host rounds. Where what is normalised of x is beyond `limit` y is NaN, and *fault,
 * memory of the host, becomes the least of itself and (which of the caller's numbers this is) << 32
 * | the bits of x. */
typedef struct tsad_taking {
    const float *x;
    size_t ldx;
    int rows, channels;
    const float *scale, *offset, *shift; /* (channels); NULL: none */
    const float *base;                   /* (rows, channels); NULL: none */
    float share, limit;
    float *y;
    int ldy;
    size_t index; /* of the first */
    unsigned long long *fault;
} tsad_taking;
void tsad_launch_take(tsad_stream *stream, tsad_taking p);

/* Rows first .. first + n of all of a register's, (x - offset) / scale + shift, to a caller's array
 * side by side; NaN if any of all rows' is not finite. What is made of them first is the host's in
 * csrc/chunk.c, rounded alike: corrected by gain and move, weighed with their neighbours, ahead of
 * what was expected by `lead` of the difference, within `clip`, normalised. */
typedef struct tsad_hand_over {
    const float *x;
    int ldx, rows, channels;
    const float *scale, *offset, *shift; /* (channels); NULL: none */
    int first, n;
    float *y;
    const float *expected, *gain, *move; /* (rows, channels); NULL: none. gain needs expected */
    float lead;
    bool smooths;
    float clip;
} tsad_hand_over;
void tsad_launch_hand_over(tsad_stream *stream, tsad_hand_over p);

/* The sum of n sources in order, each times its count and gate, (rows, channels). */
typedef struct tsad_sum {
    const float *base;
    const tsad_reused *source; /* (n) on the device; NULL: the one source is base */
    tsad_term terms;           /* gates are of them */
    int n, ld;
    float *kept; /* the sum, for later; NULL: nowhere */
} tsad_sum;

/* y += the sum, or += the sum * gate */
typedef struct tsad_addition {
    tsad_sum sum;
    int rows, channels;
    tsad_delivery to;
} tsad_addition;
void tsad_launch_addition(tsad_stream *stream, tsad_addition p);

/* y row t = activation(x row t / repeat + table row t) */
typedef struct tsad_copy {
    const float *x;
    int ldx, repeat, rows, channels;
    const float *table; /* (rows, channels); NULL: 0 */
    tsad_activation activation;
    float *y;
    int ldy;
} tsad_copy;
void tsad_launch_copy(tsad_stream *stream, tsad_copy p);

/* the sampler's row: x0 = clip(a x + b e), x = c x0 + d x + f e + g x0' + h z + q x0'' */
typedef struct tsad_update {
    float coefficient[TSAD_SAMPLER_COLUMNS];
    float *x;
    const float *e;
    const float *last; /* x0'; NULL: none, in the first row */
    float *older;      /* x0'', which is read where q is not 0, and this row's x0 afterwards */
    const float *z;    /* (rows, channels); NULL: none */
    int ld, rows, channels;
} tsad_update;
void tsad_launch_update(tsad_stream *stream, tsad_update p);

/* The end of a step, token by token: e = (x + sum, normalised) W + bias, the sampler's row, and
 * what the next step begins with, y = sample V + its bias + table. */
typedef struct tsad_tail {
    const float *x;
    int ldx, channels;
    tsad_sum sum; /* n 0: nothing is added */
    tsad_normaliser norm;
    const void *w; /* (channels, update.channels) */
    tsad_precision w_precision;
    const float *bias;
    tsad_update update; /* its e is not read */
    const void *v;      /* (update.channels, n_next); NULL: there is no next step */
    tsad_precision v_precision;
    const float *v_bias, *table;
    int n_next;
    float *y;
    int ldy;
} tsad_tail;
void tsad_launch_tail(tsad_stream *stream, tsad_tail p);

/* y (blocks, hidden) = token + softmax over memory of the scores, times the values */
typedef struct tsad_prune_query {
    const float *token;                    /* (blocks, hidden) */
    const float *score_first, *score_rest; /* token 0 (blocks, heads); from token 1 on, apart: */
    const float *value_first, *value_rest; /* (heads, hidden) */
    size_t score_floats, value_floats;
    int blocks, hidden, heads, n_memory;
    float *y;
    int ldy;
} tsad_prune_query;
void tsad_launch_prune_query(tsad_stream *stream, tsad_prune_query p);

/* floats that a block of threads can share */
enum { TSAD_SHARED_FLOATS = 48 * 1024 / (int)sizeof(float) };

#ifdef __cplusplus
}
#endif
