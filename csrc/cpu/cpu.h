/* cpu.h: what the CPU paths share: packed weights and the table of kernels a path fills.
 *
 * Contract of every kernel: arrays are float32, rows `ld` floats apart, ld a multiple of
 * TSAD_LANE; a kernel may write a row up to its padded end. Outputs never alias inputs unless
 * said. The order of every sum depends on sizes only, never on threads or lanes.
 */
#pragma once

#include "../activate.h"
#include "../vision.h"
#include "worker.h"

#include <float.h>
#include <math.h>
#include <string.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

enum { TSAD_THIN = 4 }; /* a panel's columns would be mostly empty */
/* weights of a matrix, from where on halving their bytes is worth what 8 bits lose */
enum { TSAD_LARGE = 1 << 16 };

/* Weights of y = x W + bias in panels of `panel` columns: [n_out / panel][n_in][panel], the order
 * in which they are streamed. Columns beyond n_out are zero. */
typedef struct tsad_packed {
    int n_in, n_out;
    bool thin;         /* few outputs: w is [n_out][n_in padded], one row an output */
    const float *w;    /* NULL where the matrix is kept in 16 bits */
    const float *bias; /* padded */
    /* 16 bits: panels of pairs of inputs, [n_out / panel][pairs][panel][2]; unit (padded) is what
     * 1 stands for in each column */
    const int16_t *q;
    const int8_t *q8; /* the same in 8 bits, in place of q */
    const float *unit;
} tsad_packed;

static inline bool tsad_is_rounded(const tsad_packed *w) { return w->q || w->q8; }

/* 16-bit products cannot overflow 32-bit sums: a column's length is at most COLUMN, a row's at
 * most ROW, so by Cauchy and Schwarz no partial sum passes COLUMN * ROW < 2^31. Rounding adds at
 * most sqrt(n) / 2 to a length; both leave room for n = 65536. A row's length bounds its largest
 * number as well, so rounding a row needs no search for that. */
enum {
    TSAD_COLUMN_LENGTH = 65000,
    TSAD_ROW_LENGTH = 32600,
    TSAD_LARGEST = 32767,
    TSAD_LARGEST_8 = 127
};

/* Rows of 16-bit activations, each a multiple of its unit. */
typedef struct tsad_rounded {
    int16_t *q;  /* (rows, ld) */
    float *unit; /* (rows) */
    int ld;
} tsad_rounded;

/* A node's packed matrices. */
typedef struct tsad_cpu_node {
    int n_parts; /* split blocks: list[2p], list[2p + 1] are part p's two matrices */
    int unit;    /* wide nodes: output channels of a part */
    tsad_packed *list;
} tsad_cpu_node;

typedef struct tsad_cpu_pruner {
    tsad_packed keys, values;
    tsad_packed *out; /* (H) */
} tsad_cpu_pruner;

typedef struct tsad_cross {
    const float *const *tokens; /* (S) folded memory tokens */
    int n_tokens;
    const tsad_fold *fold;
    const float *bias;
    bool causal; /* row i sees token s iff i >= s - 1 */
    float *work; /* (S, rows * H rounded up to TSAD_LANE) */
} tsad_cross;

/* What happens to the channels of a group after a convolution. */
typedef struct tsad_after {
    const float *gain, *shift; /* of the GroupNorm, from the group's first channel on */
    tsad_activation activation;
    const float *scale, *move; /* after the activation; NULL: no such */
} tsad_after;

/* Pixels of an output grid by one panel of its channels, over n inputs that lie in one row, in each
 * of `rows` rows of the window: weights in that order. */
typedef struct tsad_tile {
    int pixels;            /* at most the kernels' tile */
    const float *const *x; /* (pixels) the first number of each one's window; */
    size_t skip, ld;       /* floats from there to the first input, and from row to row */
    float *const *y;       /* (pixels) */
    size_t at;             /* floats from there to the panel */
    int rows, n;
    const float *w;      /* (rows, n, panel) */
    const float *bias;   /* sums start from it; NULL: from what is in y */
    bool residual, relu; /* start from both; the sums are whole after this */
} tsad_tile;

enum { TSAD_MAX_TILE = 12 };

/* Weights in 16 bits, or in 8: one of the two. */
typedef struct tsad_weights16 {
    const int16_t *q;
    const int8_t *q8;
} tsad_weights16;

/* those from number `at` on */
static inline tsad_weights16 tsad_weights_from(tsad_weights16 w, size_t at)
{
    return w.q8 ? (tsad_weights16){.q8 = w.q8 + at} : (tsad_weights16){.q = w.q + at};
}

/* The same of inputs in 16 bits, and of weights that are integers: the sums, exact, times both
 * units are added to what the floats start from. */
typedef struct tsad_tile16 {
    int pixels;
    const int16_t *const *x;
    const float *units; /* (pixels) */
    size_t skip, ld;
    float *const *y;
    size_t at;
    int rows, pairs;   /* of inputs in a row */
    tsad_weights16 w;  /* (rows, pairs, panel, 2) */
    const float *unit; /* (panel) */
    const float *bias; /* as a tile's, */
    bool residual, relu;
    bool fresh; /* and the sums start from nothing */
} tsad_tile16;

/* Winograd's F(2x2, 3x3): outputs two by two from inputs four by four, 16 products for 36. */
typedef struct tsad_wino_out {
    const float *m; /* the 16 sums of a panel, `plane` floats apart */
    size_t plane;
    float *y; /* the panel of the first output */
    size_t row, ld;
    int rows, columns; /* of the four outputs, 1 or 2: those that are in the grid */
    const float *bias;
    bool residual, relu; /* added to what is in y */
} tsad_wino_out;

/* A group's channels in a row of an image: (x - mean) gain + shift, and y where it is added. */
typedef struct tsad_norm_row {
    const float *x, *gain, *shift;
    float *y, mean;
    int width;
    size_t ldx, ldy;
    bool residual, relu;
} tsad_norm_row;

/* The bits of |x|, in the order of magnitude; NaN's are the largest. */
static inline uint32_t tsad_magnitude(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & INT32_MAX;
}

typedef struct tsad_kernels {
    int panel, tile; /* columns; pixels */
    /* y (rows, n_out) = activation(x (rows, n_in) W + bias) */
    void (*linear)(const tsad_packed *w, const float *x, int ldx, int rows, tsad_activation act,
                   float *y, int ldy);
    /* rows of x to 16 bits; ld of the result is at least n rounded up to even */
    void (*round)(const float *x, int ldx, int rows, int n, const tsad_rounded *out);
    /* linear, for a matrix and rows in 16 bits */
    void (*linear16)(const tsad_packed *w, const tsad_rounded *x, int rows, tsad_activation act,
                     float *y, int ldy);
    /* y = (x - mean) / sqrt(variance + eps) over n channels */
    void (*layernorm)(const float *x, int ld, int rows, int n, float eps, float *y);
    /* x (rows, n) of one group, in place: ((x - mean) / sqrt(variance + 1e-5)) gain + shift over
     * rows and channels, activation, times scale, plus move */
    void (*groupnorm)(float *x, int ld, int rows, int n, const tsad_after *after);
    /* qkv rows: queries (already scaled) of all heads, keys, values; y (rows, heads * dh) */
    void (*attention)(const float *qkv, int ld, int rows, int heads, int head_dim, bool causal,
                      float *y, int ldy);
    /* folded cross-attention of normalised x (rows, D) */
    void (*cross)(const tsad_cross *c, const float *x, int ld, int rows, float *y);
    /* x += sum of n arrays, each times its weight, summed first, in order */
    void (*add)(float *x, const float *const *source, const float *weight, int n, size_t floats);
    void (*conv)(const tsad_tile *t);
    /* the same bits on every path */
    void (*conv16)(const tsad_tile16 *t);
    /* wino_in of numbers in 16 bits, which come to four times as much at most */
    void (*wino_in16)(const int16_t *x, size_t row, size_t ld, int channels, int16_t *v,
                      size_t plane);
    /* of TSAD_NORM_GROUP channels: the sums over a row's pixels, or of squared distances from the
     * mean; a row, and the bits of its largest magnitude as `most` has them */
    void (*group_sums)(const float *x, int width, size_t ld, float mean, bool squares, float *sum);
    uint32_t (*group_row)(const tsad_norm_row *r);
    /* y = the largest of n pixels' channels, a multiple of TSAD_LANE; NaN stays */
    void (*pool)(const float *const *x, int n, int channels, float *y);
    /* n numbers, a multiple of TSAD_LANE, times scale, to the nearest integer */
    void (*to16)(const float *x, size_t n, float scale, int16_t *to);
    /* the bits of the largest magnitude of n numbers, a multiple of the panel, of each row; those
     * of infinities and NaN are larger than any number's */
    uint32_t (*most)(float *const *row, size_t at, int rows, int n);
    /* 4x4 inputs of some channels, a multiple of the vector, to 16 planes; NULL: none of this */
    void (*wino_in)(const float *x, size_t row, size_t ld, int channels, float *v, size_t plane);
    void (*wino_out)(const tsad_wino_out *t);
    /* s = ((g0 + g1) + (g2 + g3)) of the n given; x += s; slot = s where slot is not NULL */
    void (*finish)(float *x, float *slot, const float *const *group, int n, size_t floats);
} tsad_kernels;

/* A CPU backend is the shared interpreter with a path's kernels. */
typedef struct tsad_cpu_backend {
    tsad_backend base;
    const tsad_kernels *kernels;
} tsad_cpu_backend;

static inline const tsad_kernels *tsad_cpu_kernels(const tsad_model *m)
{
    return ((const tsad_cpu_backend *)m->backend)->kernels;
}

/* How denormal numbers are treated, before; the caller's own treatment comes back. */
#if defined(__SSE__)
static inline unsigned tsad_flush_denormals(void)
{
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); /* flush to zero, denormals are zero */
    return before;
}
static inline void tsad_restore_denormals(unsigned before) { _mm_setcsr(before); }
#elif defined(__aarch64__)
static inline unsigned tsad_flush_denormals(void)
{
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" ::"r"(before | (1u << 24)));
    return (unsigned)before;
}
static inline void tsad_restore_denormals(unsigned before)
{
    __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)before));
}
#else
static inline unsigned tsad_flush_denormals(void) { return 0; }
static inline void tsad_restore_denormals(unsigned before) { (void)before; }
#endif

/* Where the interpreter is. */
typedef struct context {
    tsad_worker *w;
    const tsad_run *run;
    const tsad_kernels *k;
    const tsad_model *m;
    const tsad_net *net;
    const tsad_member *member;
    const tsad_cpu_lane *lane;
    float **registers;
    int row;              /* of the program */
    int step;             /* of the tables over steps */
    const tsad_run *rest; /* with a rule: what it may go on with; NULL: there is none */
    int looks;            /* of this row: before its first block, and where the rule decides */
} context;

/* What a row is multiplied by before rounding, from its squared length. A row of zeros has scale
 * and unit 0; one that is not finite has scale 0 and the unit NaN, so that it is seen. */
static inline float tsad_row_scale(float square, float *unit)
{
    if (!(square > 0 && square <= FLT_MAX)) {
        *unit = square * 0;
        return 0;
    }
    float length = sqrtf(square);
    *unit = length / TSAD_ROW_LENGTH;
    return TSAD_ROW_LENGTH / length;
}

/* What a LayerNorm or GroupNorm multiplies by; NaN where the squares overflowed, so that it is
 * seen. */
static inline float tsad_norm_scale(float variance, float eps)
{
    return 1 / sqrtf(variance + eps) + (variance - variance);
}

/* floats of room for `rows` rows of n activations in 16 bits */
static inline size_t tsad_rounded_floats(int rows, int n)
{
    return (size_t)rows * (size_t)tsad_pad(n) / 2 + (size_t)tsad_pad(rows);
}
tsad_rounded tsad_cpu_round(const tsad_kernels *k, const float *x, int ldx, int rows, int n,
                            float *room);
/* linear in the matrix's own precision; room: for 16 bits */
void tsad_cpu_linear(const tsad_kernels *k, const tsad_packed *w, const float *x, int ldx, int rows,
                     tsad_activation act, float *y, int ldy, float *room);

static inline float *reg(const context *c, int i) { return c->registers[i]; }

static inline float *tsad_cpu_slot(const context *c, int32_t slot)
{
    return tsad_slot(c->net, c->lane, c->run->rollout, slot);
}

/* n of a row's terms from `at` on: what depends on the step, and what on the observation */
static inline void tsad_cpu_terms(const context *c, int at, int n, float *to)
{
    const float *time = c->m->time_terms + (size_t)c->step * (size_t)c->m->n_terms + at;
    const float *lane = c->lane->array[TSAD_ARRAY_TERMS] + at;
    for (int i = 0; i < n; i++) {
        to[i] = time[i] + lane[i];
    }
}

/* a thread's share of `floats`, on cache-line pairs */
static inline void tsad_cpu_share(const tsad_worker *w, size_t floats, size_t *from, size_t *to)
{
    size_t units = floats / TSAD_LANE;
    *from = units * (size_t)w->rank / (size_t)w->size * TSAD_LANE;
    *to = units * (size_t)(w->rank + 1) / (size_t)w->size * TSAD_LANE;
}

/* block.c: the same branch of n lanes, each with its own slot to keep it in; n > 1 on one thread
 * only */
void tsad_cpu_compute(const context *members, int n, const tsad_op *const *op);
/* audit.c: `floats` of a branch, from one on, the sum of n arrays, beside what its slot has until
 * then; all pointers are to that one */
void tsad_cpu_audit(const context *c, const tsad_op *op, const float *slot,
                    const float *const *group, int n, size_t from, size_t floats);
/* the gate (c_out) of a branch that is cached before it, in this row */
const float *tsad_cpu_gate(const context *c, const tsad_node *node);

/* reuse.c: an addition of slots; of one slot times its gate; the lane's sums of rollout slots that
 * its program keeps (to be met after) */
void tsad_cpu_add(const context *c, const tsad_op *op);
void tsad_cpu_add_gated(const context *c, const tsad_op *op);

/* ---- rule.c ------------------------------------------------------------------------------- */

/* The op at `at`, where the rule may look: then at and end may be another program's. */
const tsad_op *tsad_cpu_look(context *c, int32_t *at, int32_t *end);
void tsad_cpu_keep_sums(const context *c);

/* wide.c: a node of a wide net for n lanes, shared by the threads; slots: where a branch is kept,
 * or NULL. And a fixed share of an addition or a copy. */
void tsad_cpu_wide(const context *members, int n, const tsad_node *node, float *const *slots);

/* x (tokens, channels) as rows of `kernel` taps around each output token, zero-padded */
const float *tsad_cpu_taps(const tsad_node *node, const float *x, int tokens, int channels,
                           int tokens_out, int stride, float *taps);
void tsad_cpu_fixed(const context *c, const tsad_node *node); /* run a fixed node */
/* the encoder's folding node for n lanes, which share its weights */
void tsad_cpu_fold(const context *members, int n, const tsad_node *node);

/* the network's output of a row that only adds a remembered sum */
void tsad_cpu_closed(const context *c, int remembered);

tsad_status tsad_cpu_pack(tsad_model *model);
void tsad_cpu_unpack(tsad_model *model);
size_t tsad_cpu_scratch(const tsad_model *model);
tsad_status tsad_cpu_run(tsad_queue *queue, const tsad_run *runs, int n, int row_begin,
                         int row_end);
/* At the start of a call: whom its threads ask whether to stop. */
void tsad_cpu_listen(tsad_engine *e, const tsad_interrupt *interrupt);
/* Whether the call is to stop; asks, if this is the calling thread and it has not for a while. */
bool tsad_cpu_stops(tsad_worker *w);
/* Rows of a program by one of the threads that take part, until the call is to stop; false: the
 * thread was released. */
bool tsad_cpu_rows(tsad_worker *w, const tsad_run *runs, int n, int row, int row_end);

/* eye.c: image encoders */
tsad_status tsad_cpu_open_vision(const tsad_vision *vision, int threads, tsad_eye **out);
void tsad_cpu_close_vision(tsad_eye *eye);
void tsad_cpu_size_vision(const tsad_eye *eye, size_t *weights, size_t *rest);
tsad_status tsad_cpu_see(tsad_eye *eye, const tsad_images *images, float *features,
                         const tsad_interrupt *interrupt);

#define TSAD_CPU_BACKEND(symbol, label, usable_function, kernel_table)                             \
    const tsad_cpu_backend symbol = {.base = {.name = label,                                       \
                                              .usable = usable_function,                           \
                                              .rules = true,                                       \
                                              .audits = true,                                      \
                                              .pack = tsad_cpu_pack,                               \
                                              .unpack = tsad_cpu_unpack,                           \
                                              .open = tsad_cpu_open,                               \
                                              .close = tsad_cpu_close,                             \
                                              .bytes = tsad_cpu_bytes,                             \
                                              .remember_rollouts = tsad_cpu_remember_rollouts,     \
                                              .prepare = tsad_cpu_prepare,                         \
                                              .each = tsad_cpu_each,                               \
                                              .run = tsad_cpu_run,                                 \
                                              .put = tsad_cpu_put,                                 \
                                              .get = tsad_cpu_get,                                 \
                                              .get_array = tsad_cpu_get_array,                     \
                                              .open_vision = tsad_cpu_open_vision,                 \
                                              .close_vision = tsad_cpu_close_vision,               \
                                              .size_vision = tsad_cpu_size_vision,                 \
                                              .see = tsad_cpu_see},                                \
                                     .kernels = kernel_table}

extern const tsad_kernels tsad_ref_kernels;
extern const tsad_cpu_backend tsad_cpu_ref, tsad_cpu_guarded;
#if defined(__x86_64__)
extern const tsad_cpu_backend tsad_cpu_avx2, tsad_cpu_avx512;
#elif defined(__aarch64__)
extern const tsad_cpu_backend tsad_cpu_neon;
#endif
