/* internal.h: the structures behind tsad.h, shared by stages, networks and backends.
 *
 * A network is a list of nodes built once at load (net/). A plan compiles to a program (stage/
 * plan.c): a flat list of ops over those nodes. A backend (backend.h) runs programs. Encoder and
 * pruner are node lists and programs too, so a backend has one entry.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tsad.h"

#define TSAD_ALIGN 256 /* bytes: every carved array starts on such a boundary */
#define TSAD_LANE 32   /* floats: rows of registers and slots are padded to a multiple of this */
#define TSAD_MAX_BLOCKS 16384
#define TSAD_MAX_MEMORY 256 /* memory tokens of a step */
#define TSAD_PARTS 4 /* at most: partial sums of a split block, fixed when weights are packed */

static inline int tsad_pad(int n) { return (n + TSAD_LANE - 1) / TSAD_LANE * TSAD_LANE; }

/* ---- status.c --------------------------------------------------------------------------- */

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
tsad_status tsad_fail(tsad_status status, const char *format, ...);
#define TSAD_TRY(expr)                                                                             \
    do {                                                                                           \
        tsad_status try_status = (expr);                                                           \
        if (try_status != TSAD_OK) {                                                               \
            return try_status;                                                                     \
        }                                                                                          \
    } while (0)

/* ---- arena.c ---------------------------------------------------------------------------- */

/* One allocation carved by a layout function that runs twice: with base NULL it only counts. */
typedef struct tsad_arena {
    char *base;
    size_t used, size;
} tsad_arena;

void *tsad_carve(tsad_arena *arena, size_t bytes);
#define TSAD_CARVE(arena, type, count) ((type *)tsad_carve((arena), sizeof(type) * (size_t)(count)))
tsad_status tsad_arena_allocate(tsad_arena *arena); /* after the counting pass: size = used */
void tsad_arena_free(tsad_arena *arena);
void *tsad_allocate(size_t bytes); /* aligned and zeroed; NULL when there is none */
void tsad_deallocate(void *memory);

/* ---- network ---------------------------------------------------------------------------- */

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
    TSAD_KEEP_MEMORY,  /* in -> the lane's memory of this row, for the pruner */
    TSAD_FOLD,         /* memory tokens -> folded keys and values of one layer (tsad_fold) */
    TSAD_PRUNE_KEYS,   /* the lane's memory -> the pruner's scores and values */
    TSAD_PRUNE_QUERY,  /* softmax over memory of one step, added to the constant block tokens */
    TSAD_PRUNE_TOKENS, /* the lane's memory of this row, its tokens in a row -> out */
    TSAD_PRUNE_SPREAD, /* out (K, n) = ReLU of in (1, n) added to every row of the table */
    TSAD_PRUNE_STORE   /* in -> the lane's scores, from this row on */
} tsad_node_kind;

typedef enum tsad_activation { TSAD_LINEAR_ONLY, TSAD_GELU, TSAD_RELU, TSAD_MISH } tsad_activation;

/* What a slot holds. After the gate sums of reused branches fold; before it they do not. */
typedef enum tsad_cache_point { TSAD_AFTER_GATE, TSAD_BEFORE_GATE } tsad_cache_point;

/* A plain matrix, row-major (n_in, n_out), with the exact rewrites already applied. */
typedef struct tsad_matrix {
    int n_in, n_out;
    float *data;
    float *bias; /* (n_out) */
} tsad_matrix;

typedef struct tsad_node {
    tsad_node_kind kind;
    int in, in2, out; /* registers */
    int residual;     /* -1: identity; else the fixed node that maps in to out */
    int block;        /* index among prunable nodes, -1: fixed */
    char label[40];   /* of a prunable node, for messages: "layers.3.cross_attn" */
    int type;         /* reuse type of a prunable node */
    int layer;        /* cross-attention and fold: which layer's keys and values */
    tsad_cache_point cache_point;
    tsad_activation activation;
    bool normalise; /* LayerNorm (its scale and shift folded into m0) before m0 */
    bool causal;
    bool is_residual; /* a later branch's residual map: runs with that branch */
    int n_heads, kernel, stride;
    tsad_matrix m[4];
    float *table; /* added after: (tokens, c_out); TOKENS: (K, c); gate rows: (K, c) */
    void *packed; /* the backend's own form of m */
} tsad_node;

typedef struct tsad_register {
    int tokens, channels;
} tsad_register;

typedef struct tsad_net {
    int n_nodes, n_registers, n_blocks, max_nodes, max_registers;
    tsad_node *nodes;
    tsad_register *registers;
    int input, output;   /* registers */
    int *block_node;     /* (B) */
    uint8_t *block_type; /* (B) */
    size_t *slot_offset; /* (B) floats from the start of a row of slots */
    size_t row_floats;   /* floats of a row of slots */
} tsad_net;

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

/* ---- programs --------------------------------------------------------------------------- */

typedef enum tsad_op_kind {
    TSAD_OP_NODE,    /* run a fixed node */
    TSAD_OP_COMPUTE, /* run a branch, keep it in slot dst, add it */
    TSAD_OP_ADD,     /* add the sum of n_src slots, sources[src ...], to the node's register */
    TSAD_OP_GATED,   /* add one slot times the node's gate of this row */
    TSAD_OP_UPDATE   /* the sampler's row */
} tsad_op_kind;

#define TSAD_REMEMBERED 4 /* sums a worker keeps for rows that add the same slots again */

typedef struct tsad_op {
    uint8_t kind;
    uint8_t remember, repeat; /* ADD: 1 + the worker's sum to make, or to add instead; 0: none */
    int16_t node;
    int16_t n_src, n_rollout; /* ADD: the rollout slots come first */
    int32_t dst;
    int32_t src;
    int32_t kept; /* ADD: where the sum of its rollout slots is in the lane's sums; -1: nowhere */
} tsad_op;

typedef struct tsad_program {
    int n_rows, n_ops, n_sources;
    int max_ops, max_sources;
    int32_t *row_start; /* (n_rows + 1) into ops */
    uint8_t *closed;    /* (n_rows) 1 + the remembered sum that the closed form is of, 0: run ops */
    tsad_op *ops;
    int32_t *sources;
    float *counts; /* how often an addition takes each of its sources */
    int64_t cost;
    int32_t cells[TSAD_N_SOURCES];
    bool reads_rollout;
    size_t kept_floats; /* of the lane's sums that its ops use */
} tsad_program;

/* ---- model ------------------------------------------------------------------------------ */

struct tsad_backend;

struct tsad_model {
    atomic_int references;
    const struct tsad_backend *backend;
    int horizon, n_obs_steps, n_action_steps, obs_dim, action_dim;
    int width, n_layers, n_memory; /* n_memory: tokens of memory, S */
    int n_steps, n_blocks;
    bool adds_noise;
    tsad_precision precision;
    bool encode_rows; /* the memory depends on step and observation: the encoder runs per step */
    float *sampler;   /* (K, 8) */
    float *obs_scale, *obs_offset, *action_scale, *action_offset;
    int64_t *block_cost;
    int64_t dense_cost; /* of one chunk */
    tsad_net net, encoder, pruner_net;
    bool has_pruner;
    tsad_pruner pruner;
    tsad_fold fold;
    tsad_closed closed;
    float *time_fold;  /* (K, layers, fold.floats); NULL when encode_rows */
    tsad_arena packed; /* the backend's weights */
    size_t weight_bytes;
};

/* ---- policy ----------------------------------------------------------------------------- */

typedef enum tsad_planner_kind { TSAD_FIXED_PLAN, TSAD_PRUNER_PLAN } tsad_planner_kind;

typedef enum tsad_sums_use { TSAD_NO_SUMS, TSAD_MAKE_SUMS, TSAD_HAVE_SUMS } tsad_sums_use;

typedef struct tsad_lane {
    float *slots;                      /* rollout: (K, row_floats), else one row */
    uint32_t *computed_at;             /* (K, B) rollout memory only: chunk number, 0: empty */
    float *memory;                     /* encoder output: (To or K * S, D padded) */
    float *fold;                       /* (rows, layers, tokens, fold.floats) */
    float *prune_score;                /* (rows, tokens, B, H) */
    float *prune_value;                /* (rows, tokens, H, hidden) */
    float *scores;                     /* (K, B, 4), memory order */
    uint8_t *plan;                     /* (K, B) last executed */
    uint8_t *plan_first, *plan_steady; /* (K, B) what a fixed plan runs */
    tsad_program first, steady, dynamic;
    const tsad_program *program; /* of the running chunk */
    uint64_t chunk;              /* since the reset; 0: the next one is the first */
    bool rollout_memory;         /* slots hold K rows, not one */
    /* A fixed plan reads the same rollout slots in every chunk and never writes them: from its
     * second chunk on their sums are kept. sums NULL: there was no memory, or no use, for them. */
    tsad_arena sum_arena;
    float *sums;
    bool plan_is_new, sums_ready;
    tsad_sums_use sums_use; /* in the running chunk */
    tsad_planner_kind planner;
    tsad_lane_stats stats;
} tsad_lane;

#define TSAD_GANG 4 /* lanes that one thread takes through the steps together, at most */

/* One lane of a gang: a thread's private memory for its chunk. */
typedef struct tsad_member {
    tsad_lane *lane;
    const float *obs;  /* (To, O) */
    int row;           /* in the call's arrays */
    float **registers; /* denoiser's registers, private copies */
    float **encoder_registers;
    float *previous_x0;             /* (T, A padded) */
    float *sums[TSAD_REMEMBERED];   /* branch_floats each */
    float *tables[TSAD_REMEMBERED]; /* of the closed form, made when first needed */
    bool *table_ready;              /* (TSAD_REMEMBERED) */
} tsad_member;

/* One thread's private memory. A gang of more than one lane is the thread's own (size 1). */
typedef struct tsad_worker {
    struct tsad_policy *policy;
    int rank, size;       /* threads that share this lane's chunk; size 0: not, or no longer, one */
    bool shares;          /* others may help, and join: see join.c */
    tsad_member *members; /* (gang) */
    float **pruner_registers;
    float *scratch;                     /* backend's */
    uint32_t *read_epoch, *write_epoch; /* (B) see cpu/run.c */
    uint32_t epoch;
    unsigned parity;
    tsad_lane *prepared;    /* whose rows of the pruner these are */
    unsigned turns;         /* taken in this chunk: see join.c */
    bool stalled;           /* rank 0: another thread's core seems taken */
    int64_t met_at;         /* rank 0: when the threads last met, 0: not in this chunk */
    int32_t *last_of_block; /* (B) the planner's */
    int32_t *keys;          /* (K, B) the planner's */
    int64_t ns[TSAD_N_TIMERS];
} tsad_worker;

struct tsad_policy {
    tsad_model *model;
    atomic_int busy;
    int n_lanes, n_threads, gang;
    int slot_rows;         /* that slot_arena has room for: 1 or K */
    double sparsity;       /* of the pruner's budget; < 0: argmax */
    tsad_arena arena;      /* everything but the slots */
    tsad_arena slot_arena; /* remade when rollout memory is first needed */
    tsad_lane *lanes;      /* n_lanes, and one more for predict_noise */
    tsad_worker *workers;  /* n_threads */
    float *exchange;       /* (2, TSAD_PARTS, branch_floats) partial sums between threads */
    size_t branch_floats;
    tsad_program dense, encode, prune;
    float *noise;           /* (L, K, T, A) */
    int32_t *last_of_block; /* (B) scratch of the planner outside chunks */
    uint8_t *dense_plan;    /* (K, B) zeros */
    uint8_t *filled;        /* (K, B) scratch of tsad_policy_set_plan */
    int64_t ns[TSAD_N_TIMERS];
    struct tsad_barrier *barrier;
    struct tsad_meeting *meeting;
    int64_t stalled_at;      /* when rank 0 last waited for a core that seemed taken */
    bool stalled_before;     /* the last chunk that threads shared */
    int alone_for, patience; /* chunks to run without the team after a stall, and how many next */
};

static inline size_t tsad_register_floats(const tsad_register *r)
{
    return (size_t)r->tokens * (size_t)tsad_pad(r->channels);
}

/* Where slot `slot` (k * B + b) lives. Without rollout memory the ring keeps one row. */
static inline float *tsad_slot(const tsad_net *net, const tsad_lane *lane, int32_t slot)
{
    int row = lane->rollout_memory ? slot / net->n_blocks : 0;
    return lane->slots + (size_t)row * net->row_floats + net->slot_offset[slot % net->n_blocks];
}

/* Folded token s of memory for one step and layer. */
static inline const float *tsad_folded(const tsad_model *m, const tsad_lane *lane, int step,
                                       int layer, int s)
{
    size_t tokens = (size_t)m->n_memory;
    if (m->encode_rows) {
        size_t at = ((size_t)step * (size_t)m->n_layers + (size_t)layer) * tokens + (size_t)s;
        return lane->fold + at * m->fold.floats;
    }
    if (s == 0) {
        size_t at = (size_t)step * (size_t)m->n_layers + (size_t)layer;
        return m->time_fold + at * m->fold.floats;
    }
    return lane->fold + ((size_t)layer * (tokens - 1) + (size_t)(s - 1)) * m->fold.floats;
}

/* ---- net/ ------------------------------------------------------------------------------- */

tsad_status tsad_net_dpt(const tsad_model_spec *spec, tsad_model *model);
tsad_status tsad_net_nodes(const tsad_model_spec *spec, tsad_model *model);
/* time_memory (K, D): the encoder's output for the time tokens; NULL if it runs per step */
tsad_status tsad_net_pruner(const tsad_model_spec *spec, tsad_model *model,
                            const float *time_memory);
tsad_status tsad_net_pruner_mlp(const tsad_model_spec *spec, tsad_model *model,
                                const float *time_memory);

tsad_status tsad_net_closed(tsad_model *model); /* from the plain matrices */

/* builder (net/build.c) */
tsad_status tsad_net_begin(tsad_net *net, int max_nodes, int max_registers);
int tsad_net_register(tsad_net *net, int tokens, int channels);
tsad_node *tsad_net_add(tsad_net *net, tsad_node_kind kind, int in, int out);
tsad_status tsad_net_finish(tsad_net *net); /* numbers blocks, checks shapes, places slots */
void tsad_net_free(tsad_net *net);
bool tsad_node_is_prunable(tsad_node_kind kind);
tsad_status tsad_matrix_make(tsad_matrix *m, int n_in, int n_out); /* zeroed */
void tsad_matrix_free(tsad_matrix *m);
const tsad_tensor *tsad_find(const tsad_tensor *tensors, int n, const char *name);
/* The named tensor, or a failure that names it; a shape of 0 ends the list. */
tsad_status tsad_take(const tsad_tensor *tensors, int n, const char *name, int64_t rows,
                      int64_t cols, const float **out);
/* m = transpose of a torch weight (n_out, n_in), with LayerNorm's scale and shift folded in when
 * gain is given, all times `scale`. */
void tsad_matrix_fold(tsad_matrix *m, const float *weight, const float *bias, const float *gain,
                      const float *shift, float scale);
tsad_status tsad_copy_floats(float **out, const float *source, size_t n);

/* ---- stage/ ----------------------------------------------------------------------------- */

void tsad_encode(tsad_worker *w, int n); /* the worker's first n members */
void tsad_prune(tsad_worker *w, tsad_lane *lane);
/* Chooses the lane's program for this chunk and records the plan. */
void tsad_plan(tsad_worker *w, tsad_lane *lane);
/* After a lane's fixed plan was compiled: room for the sums that it keeps. */
void tsad_sums_place(tsad_lane *lane);
/* After tsad_plan: whether this chunk makes them, has them, or goes without. */
void tsad_sums_choose(tsad_lane *lane);
/* Runs the programs of the first n members' lanes from noise to actions; a thread that joined later
 * from the row where the others are. */
void tsad_denoise(tsad_worker *w, int n, const tsad_call *call, int row);

void tsad_program_carve(tsad_program *program, tsad_arena *arena, int n_rows, int max_ops,
                        int max_sources);
/* Sources (already valid) to a program. `keep`: it will run many times between resets, so sums of
 * rollout slots are worth keeping. */
void tsad_program_compile(tsad_program *program, const tsad_model *model, const uint8_t *sources,
                          bool keep, int32_t *last_of_block);
/* A program that runs every node of a net once per row. */
void tsad_program_straight(tsad_program *program, const tsad_net *net, int n_rows);
/* The encoder's, where it runs once: its first row makes the memory, each other folds a layer. */
int tsad_program_encoder_rows(const tsad_net *net);
void tsad_program_encoder(tsad_program *program, const tsad_net *net);

/* ---- team.c ----------------------------------------------------------------------------- */

typedef struct tsad_barrier {
    _Alignas(64) atomic_uint arrived;
    _Alignas(64) atomic_uint generation;
} tsad_barrier;

void tsad_spin(int spins); /* one turn of a waiting loop */
void tsad_barrier_wait(tsad_barrier *barrier, int size);
/* A barrier of the threads that share a lane; rank 0 notes whether it was kept waiting (stall.c).
 */
void tsad_worker_meet(tsad_worker *w);
/* Runs fn(context, rank, size) on up to `size` threads of the process's team, the caller being rank
 * 0: on those that wake before it is done. Alone (size 1) when the team is taken or can't be had.
 * Returns the size asked for. */
int tsad_team_run(void (*fn)(void *context, int rank, int size), void *context, int size);
tsad_status tsad_team_reserve(int size); /* start threads ahead of the first chunk */

/* ---- join.c ------------------------------------------------------------------------------ */

/* Where the threads of a chunk find each other. */
typedef struct tsad_meeting {
    /* rank 0's word at its latest turn: number << 8 | threads << 1 | go alone */
    _Alignas(64) atomic_uint ticket;
    _Alignas(64) atomic_int arrived;  /* threads that came, without rank 0 */
    _Alignas(64) atomic_int admitted; /* how many of these take part; -1: nobody any more */
    int call_row, row;                /* where rank 0 was when it admitted the latest */
    /* rows that anybody may take: number of the offer << 16 | rows left, the last one is next */
    _Alignas(64) atomic_uint rows;
    void (*run)(tsad_worker *w, int row);
    atomic_int done;
} tsad_meeting;

void tsad_meeting_begin(tsad_meeting *m); /* before a chunk */
void tsad_meeting_end(tsad_meeting *m);   /* rank 0: those who did not join may go */
/* Rank 0: rows n..1 of `run`, with the help of whoever is there; returns when all are done. */
void tsad_share_rows(tsad_worker *w, void (*run)(tsad_worker *w, int row), int n);
enum { TSAD_BEFORE_ROWS = -1 }; /* a turn: all is prepared, no row has begun */
/* All threads of a lane at the same points of its chunk. Rank 0 says whether they stay together,
 * and lets others join. False: this thread is released. */
bool tsad_turn(tsad_worker *w, int row);
int tsad_arrive(tsad_policy *p); /* the rank of a thread that comes to a chunk */
/* Helps until rank 0 lets it join; then the worker is where rank 0 is, before the turn of that
 * row. False: the chunk went without it. */
bool tsad_join(tsad_worker *w, int *call_row, int *row);

void tsad_note_wait(tsad_worker *w, int64_t since); /* stall.c: for rows that another thread took */
/* stall.c: threads to ask for, and what the chunk just run says of them */
int tsad_stall_size(tsad_policy *p, int n_lanes);
void tsad_stall_note(tsad_policy *p);

int64_t tsad_now(void); /* nanoseconds, monotonic */
