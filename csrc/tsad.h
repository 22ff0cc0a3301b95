/* tsad.h: every public type and function of the core. Read this file first.
 *
 * The core runs diffusion action heads with test-time sparsity: before each action chunk a plan
 * says, for every residual block b at every denoising step k, whether to compute it or to reuse
 * a cached result. The core knows nothing of Python. A model is immutable and shared, a policy
 * is mutable and used by one thread at a time (tsad_policy_acquire).
 *
 * Letters in shape comments: K denoising steps, B prunable blocks, T action tokens (horizon),
 * A action size, S memory tokens, O observation size, D width, L lanes.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ---------------------------------------------------------------------------- */

/* One list: code and text cannot drift apart. */
#define TSAD_STATUS_LIST(X)                                                                        \
    X(OK, "ok")                                                                                    \
    X(ARGUMENT, "bad argument")                                                                    \
    X(SHAPE, "bad shape")                                                                          \
    X(PLAN, "invalid plan")                                                                        \
    X(MEMORY, "out of memory")                                                                     \
    X(BUSY, "policy is busy")                                                                      \
    X(NOT_FINITE, "a number overflowed")                                                           \
    X(INTERRUPTED, "interrupted")                                                                  \
    X(BACKEND, "backend failure")

typedef enum tsad_status {
#define X(code, text) TSAD_##code,
    TSAD_STATUS_LIST(X)
#undef X
} tsad_status;

/* The fixed text of a status, and the detail of this thread's last failure ("" if none). */
const char *tsad_status_text(tsad_status status);
const char *tsad_error_detail(void);

/* The largest magnitude of a number that goes into a network: of observations as it sees them
 * (normalised), noise, weights, normaliser. Measured on the shapes of tests/cases.py and the
 * bundled policy: at 1e16 float32 and 16 bits agree with float64 as well as at 1 (so does PyTorch),
 * from 1e18 on the squares of a LayerNorm overflow. The rest is room for weights that amplify more;
 * what overflows all the same is TSAD_NOT_FINITE. */
#define TSAD_MAX_MAGNITUDE 1e12f

/* The most of each: what indices and tables have room for. */
#define TSAD_MAX_STEPS 65536
#define TSAD_MAX_BLOCKS 16384
#define TSAD_MAX_TYPES 32 /* distinct reuse types in one network */

/* ---- plans ------------------------------------------------------------------------------ */

/* Where the value of a (step, block) cell comes from. */
enum tsad_source {
    TSAD_COMPUTE = 0,       /* run the branch */
    TSAD_REUSE_TYPE = 1,    /* last computed block of the same type, any layer, this chunk */
    TSAD_REUSE_STEP = 2,    /* same block, an earlier step of this chunk */
    TSAD_REUSE_ROLLOUT = 3, /* same cell, an earlier chunk of this episode */
    TSAD_SKIP = 4,          /* add nothing */
    TSAD_N_SOURCES = 5
};

/* Why a plan is refused; the position of the first offending cell. */
typedef enum tsad_plan_reason {
    TSAD_PLAN_VALID = 0,
    TSAD_PLAN_UNKNOWN_SOURCE,
    TSAD_PLAN_EMPTY_TYPE,    /* no block of this type has been computed yet */
    TSAD_PLAN_EMPTY_STEP,    /* this block has not been computed yet */
    TSAD_PLAN_FIRST_ROLLOUT, /* the first plan after a reset reads a rollout slot */
    TSAD_PLAN_EMPTY_ROLLOUT  /* the rollout slot was not filled */
} tsad_plan_reason;

typedef struct tsad_plan_fault {
    tsad_plan_reason reason;
    int step, block;
} tsad_plan_fault;

/* Resolve a plan to slots on integers. slot[k * B + b] becomes the slot that cell (k, b) writes
 * (compute) or reads (reuse), -1 for skip; slots are k * B + b. `filled[k * B + b]` says which
 * rollout slots hold a value; NULL means none does. slot may be NULL (validation only). */
tsad_plan_fault tsad_plan_resolve(const uint8_t *sources, int n_steps, int n_blocks,
                                  const uint8_t *block_type, const uint8_t *filled, int32_t *slot);
const char *tsad_plan_reason_text(tsad_plan_reason reason);

/* ---- model ------------------------------------------------------------------------------ */

typedef struct tsad_model tsad_model;
typedef struct tsad_policy tsad_policy;

/* A named float32 array, C-contiguous, borrowed for the call. */
typedef struct tsad_tensor {
    const char *name;
    const float *data;
    int n_dims;
    int64_t shape[4];
} tsad_tensor;

/* How the large matrices are kept and multiplied. Everything else is float32 always.
 * TSAD_INT16: 16-bit weights, one scale a column, times activations rounded to 16 bits, one scale
 * a row; products and sums are exact integers. TSAD_INT8: the same with 8-bit weights where a
 * matrix is large: half as many bytes to read. TSAD_FLOAT16, TSAD_BFLOAT16: weights rounded to
 * that, products and sums in float32: a GPU's. A CPU rounds them as well and keeps them in float32:
 * it says what is right. TSAD_TF32: weights stay as they are; a GPU's library rounds them and what
 * meets them to 10 bits of mantissa where it multiplies. A CPU rounds the weights alone: what that
 * costs says how much the GPU's may. */
typedef enum tsad_precision {
    TSAD_FLOAT32,
    TSAD_INT16,
    TSAD_INT8,
    TSAD_FLOAT16,
    TSAD_BFLOAT16,
    TSAD_TF32
} tsad_precision;

#define TSAD_SAMPLER_COLUMNS 9 /* a b r c d f g h q: see tsad/samplers.py */
#define TSAD_SAMPLER_CLIP 2    /* r */
#define TSAD_SAMPLER_NOISE 7   /* h */

/* Everything a model is made of; borrowed for the call. */
typedef struct tsad_model_spec {
    const char *family; /* "diffusion_policy_transformer", "unet1d", "dit", or "nodes", a list */
    int horizon, n_obs_steps, n_action_steps, obs_dim, action_dim;
    int n_emb; /* D: of the transformer; of others' code of the time */
    int n_layers, n_heads, n_cond_layers, causal;
    /* family "unet1d" only: LeRobot's names */
    const int32_t *down_dims; /* (n_levels) */
    int n_levels, kernel_size, n_groups, use_film_scale_modulation;
    /* family "dit" only */
    int hidden_dim, use_rope, use_positional_encoding;
    const float *rotation; /* use_rope: (horizon, hidden_dim / n_heads): cosines, then sines */

    int n_steps;
    const float *sampler;  /* (K, 9) */
    const float *time_emb; /* (K, D), the sinusoidal code of each step's timestep */

    /* normalised = (raw - shift) * scale + offset; a shift of NULL is none */
    const float *obs_scale, *obs_offset, *obs_shift;          /* (O) */
    const float *action_scale, *action_offset, *action_shift; /* (A) */

    int n_blocks;              /* B, checked against the network */
    const int64_t *block_cost; /* (B) multiply-accumulates as executed */

    const tsad_tensor *tensors;
    int n_tensors;

    /* optional pruner; n_pruner_tensors == 0 means none */
    const tsad_tensor *pruner_tensors;
    int n_pruner_tensors;
    int pruner_hidden;
    int pruner_heads, pruner_ff; /* of a transformer; 0: an MLP, which needs no block_emb either */
    const float *block_emb;      /* (B, pruner_hidden), the sinusoidal code of each block id */

    /* family "nodes" only: see net/nodes.c */
    const int32_t *nodes;     /* (n_nodes, 10) */
    const int32_t *registers; /* (n_registers, 2): tokens, channels */
    int n_nodes, n_registers;

    const char
        *backend; /* NULL or "auto": the best this CPU has; "ref", "avx2", "avx512", "neon" */
    tsad_precision precision;

    /* tsad_describe's own; NULL otherwise */
    struct tsad_wanted_list *wanted, *pruner_wanted;
} tsad_model_spec;

tsad_status tsad_model_create(const tsad_model_spec *spec, tsad_model **out);
void tsad_model_retain(tsad_model *model);
void tsad_model_destroy(tsad_model *model); /* drops one reference; NULL is fine */

/* Facts of a model that its users need. */
typedef struct tsad_model_info {
    int n_steps, n_blocks, horizon, n_obs_steps, n_action_steps, obs_dim, action_dim;
    int has_pruner;
    int adds_noise;            /* the sampler reads noise rows after the first */
    const uint8_t *block_type; /* (B) small integers; equal means interchangeable */
    const int64_t *block_cost; /* (B) */
    const char *backend;
    size_t weight_bytes;
    size_t ring_bytes;    /* branch outputs of one lane without rollout reuse */
    size_t rollout_bytes; /* ... and with it */
} tsad_model_info;

tsad_model_info tsad_model_get_info(const tsad_model *model);

/* What a family makes of its settings, by its own builder, run without a tensor. */
typedef struct tsad_wanted {
    char name[112];
    int n_dims;
    int64_t shape[4];
} tsad_wanted;

typedef struct tsad_wanted_list {
    int n, capacity;
    tsad_wanted *list;
} tsad_wanted_list;

typedef struct tsad_block_description {
    char name[40], type[40]; /* blocks of one type can stand in for each other */
    int64_t cost;            /* multiply-accumulates of a cell, as executed */
} tsad_block_description;

typedef struct tsad_description {
    tsad_wanted_list tensors, pruner; /* pruner: with spec->pruner_hidden */
    int n_blocks;
    tsad_block_description *blocks; /* in order of execution */
} tsad_description;

/* Of the specification the sizes alone are read, those of the interface, the family, the pruner.
 * Free it, whatever the status. */
tsad_status tsad_describe(const tsad_model_spec *spec, tsad_description *out);
void tsad_description_free(tsad_description *description);

/* Backends compiled in and usable on this CPU, best first; returns the count. */
int tsad_backend_names(const char **names, int capacity);

/* One more backend, asked for by its name alone. `plugin` is the function that a library of ours
 * exports (plugin.h). *device: what it runs on; *absent: why it can't here, NULL: it can. */
tsad_status tsad_backend_attach(void *plugin, const char **device, const char **absent);

/* ---- policy ----------------------------------------------------------------------------- */

enum { TSAD_ENCODE, TSAD_PRUNE, TSAD_PLAN_STAGE, TSAD_DENOISE, TSAD_TOTAL, TSAD_N_TIMERS };

/* What the last chunk of a lane did. */
typedef struct tsad_lane_stats {
    int64_t cost;                  /* multiply-accumulates of the computed cells */
    int32_t cells[TSAD_N_SOURCES]; /* cells by source */
    int32_t forced;                /* cells computed because the slot to reuse was empty */
    uint32_t max_age;              /* oldest rollout slot read, in chunks; 0 if none */
    uint64_t chunks;               /* chunks since the last reset, */
    int64_t spent;                 /* and what they cost together */
} tsad_lane_stats;

/* Decides row by row, within a chunk, whether the rest of a row is computed or repeats what each
 * block was when it was last computed. With `blocks` above 0, by the first-block cache: every row
 * computes so many of its blocks, and the rest if what these add differs from that of the last row
 * computed whole, relative, by at least the threshold. With 0 by TeaCache: before a row the changes
 * of its input from row to row, through a polynomial, are added up, and at the threshold it is
 * computed and they begin anew; so is the last row. The first row is always computed. */
#define TSAD_RULE_TERMS 5
typedef struct tsad_rule {
    int blocks;
    double threshold;
    int most; /* rows that are computed whole, of a chunk; with TeaCache the last is one of them */
    double polynomial[TSAD_RULE_TERMS]; /* from the constant on */
} tsad_rule;

/* Chunks that start from the one before. After a reset a lane's first chunk is cold: all K steps,
 * from noise. Later ones are warm: the last N steps, from
 *   signal * shifted + noise * z
 * where `shifted` is the lane's previous chunk, normalised, moved by the actions executed since,
 * its last action repeated. Plans, ages and statistics are those of warm chunks. There is no
 * pruner: it plans all steps. */
typedef struct tsad_warm_start {
    int n_steps;          /* N, of the model's K */
    const float *sampler; /* (N, 9), borrowed for the call */
    float signal, noise;
} tsad_warm_start;

/* Should a call stop? It asks now and then, always on the calling thread: after a tenth of a second
 * for the first time, between two rows of a program, so that a chunk at a robot's pace never does.
 */
typedef struct tsad_interrupt {
    int (*wanted)(void *context);
    void *context;
} tsad_interrupt;

/* One chunk for n_lanes distinct lanes. Row i of obs, noise and actions belongs to lanes[i]. */
typedef struct tsad_call {
    const int *lanes;
    int n_lanes;
    const float *obs;   /* (n_lanes, n_obs_steps, O), raw units */
    const float *noise; /* z of step k, call row i at noise + k * noise_step + i * noise_lane */
    size_t noise_step, noise_lane;
    const float *initial; /* (n_lanes, T, A) or NULL: noise of the chunk's first step */
    const int *
        executed; /* warm start, lead: actions (n_lanes) since the last chunk; NULL: all returned */
    float *actions; /* (n_lanes, n_action_steps, A) or (n_lanes, T, A), raw units */
    int whole_horizon;
    const tsad_interrupt *interrupt; /* NULL: nobody is asked */
    /* Which of obs, noise (initial alone, where that is given) and actions are memory of the
     * policy's device, where it reads and writes them itself (tsad_policy_owns). What the chunk
     * reads of them is checked there, so it is refused when the chunk is waited for: the lanes are
     * reset then, and actions are NaN. */
    int obs_there, noise_there, actions_there;
    const uintptr_t *streams; /* (n_streams) of the caller: the chunk comes after what they hold */
    int n_streams;            /* now, and what they get later comes after the chunk */
    int deferred;             /* of actions there: nobody waits for them; tsad_policy_settle does */
    int bare;                 /* obs came without the axis of lanes: for words */
} tsad_call;

/* warm NULL: every chunk starts from noise */
tsad_status tsad_policy_create(tsad_model *model, const tsad_warm_start *warm, int n_lanes,
                               int n_threads, tsad_policy **out);
void tsad_policy_destroy(tsad_policy *policy); /* NULL is fine */

/* What is made of the actions that a chunk returns; at first nothing. `smoothing` weighs each with
 * its neighbours in the horizon, 1/4, 1/2, 1/4; the first and the last of the horizon have one
 * neighbour alone and stay, so that a straight line stays one. `lead`, 0 to TSAD_MAX_LEAD, moves it
 * further away from what the lane's last chunk has for its time, its last action repeated:
 *   a + lead (a - last),
 * within what the sampler clips to. The first chunk after a reset has none before it. The whole
 * horizon, and what a warm chunk starts from, stay as they were predicted. */
#define TSAD_MAX_LEAD 10.0f
tsad_status tsad_policy_set_lead(tsad_policy *policy, float lead, int smoothing);

/* What is made of a chunk itself, before anything else: of its final sample x, normalised,
 *   x + gain (x - start) + shift,
 * each (T, A), within what the sampler clips to. `start` is what a warm chunk starts from, without
 * noise. With a warm start the cold chunk stays as it is; without one every chunk is shifted, and
 * gain must be zero. At first nothing. */
tsad_status tsad_policy_set_correction(tsad_policy *policy, const float *gain, const float *shift);

/* The model's facts as they are here: with a warm start, steps and noise of its chunks. */
tsad_model_info tsad_policy_get_info(const tsad_policy *policy);

/* One thread at a time: every call below needs an acquired policy, except the two themselves. */
tsad_status tsad_policy_acquire(tsad_policy *policy); /* TSAD_BUSY if another thread holds it */
void tsad_policy_release(tsad_policy *policy);

/* Start of an episode for one lane: its rollout slots are forgotten. */
void tsad_policy_reset(tsad_policy *policy, int lane);

/* The plans of a lane, uint8 (K, B) each; `first` runs on the first chunk after a reset. With a
 * warm start both are of warm chunks, (N, B), and `cold` (K, B) is of the chunk before them. */
typedef struct tsad_lane_plan {
    const uint8_t *sources, *first;
    const uint8_t *cold; /* NULL: dense */
} tsad_lane_plan;

/* Fix the plans of lanes first .. first + n. Refused, and nothing changed for any of them, if a
 * cell reads an empty slot or memory is short. */
tsad_status tsad_policy_set_plans(tsad_policy *policy, int first, int n,
                                  const tsad_lane_plan *plans);
/* ... of one lane */
tsad_status tsad_policy_set_plan(tsad_policy *policy, int lane, const uint8_t *sources,
                                 const uint8_t *first);
/* Let the pruner plan every chunk of every lane. sparsity < 0: its own argmax; otherwise the
 * cells with the highest compute score that fit the budget. */
tsad_status tsad_policy_set_pruner(tsad_policy *policy, double sparsity);
/* Let a rule decide in every chunk of every lane, each by itself; rollouts are forgotten. */
tsad_status tsad_policy_set_rule(tsad_policy *policy, const tsad_rule *rule);

/* From now on compare what chunks compute with the values that this replaces, and that reuse would
 * have taken; refused where the backend can't. Lanes that remember rollouts are left out. */
tsad_status tsad_policy_set_audit(tsad_policy *policy, int on);
/* Of a lane's last chunk, (4): the sum of the squares of these differences and of the values
 * computed, where the value was of an earlier step, then both where it was the same cell's in an
 * earlier chunk. Zeros: none was there, or nobody asked. */
void tsad_policy_get_audit(const tsad_policy *policy, int lane, double *sums);

/* Would this call be refused? Of its noise what is there already; for callers who draw the rest. */
tsad_status tsad_policy_check(const tsad_policy *policy, const tsad_call *call);
/* Has the policy's device such memory? DLPack's numbers of it; no, on a CPU, whose memory is the
 * host's. */
int tsad_policy_owns(const tsad_policy *policy, int device_type, int device_id);
/* Run one chunk. Everything that can be refused is refused before any state changes, but numbers
 * that are on the device. Where a chunk fails (TSAD_NOT_FINITE) or the call is told to stop
 * (TSAD_INTERRUPTED), no actions are written on the host and all lanes of the call are reset. */
tsad_status tsad_policy_step(tsad_policy *policy, const tsad_call *call);
/* Waits for a deferred call and ends it, before anything else is asked of the policy; its failure
 * is returned now, once. Nothing to do where there is none. */
tsad_status tsad_policy_settle(tsad_policy *policy);

/* The network alone, dense, no state touched: of a call's obs, raw, and its initial samples
 * (n_lanes, T, A), normalised, each on the host or there, into its actions, of that shape, on the
 * host. Its lanes mean nothing. */
tsad_status tsad_policy_predict_noise(tsad_policy *policy, const tsad_call *call, int step);

/* Scores of the pruner for one observation: out (K, B, 4), already flipped to loop order. */
tsad_status tsad_policy_pruner_scores(tsad_policy *policy, const float *obs, float *out);

/* Copies of the last executed plan (K, B), the ages of rollout slots (K, B; 0: empty, 1: computed
 * in the last chunk), statistics, nanoseconds per stage. */
void tsad_policy_get_plan(const tsad_policy *policy, int lane, uint8_t *sources);
void tsad_policy_get_ages(const tsad_policy *policy, int lane, uint32_t *ages);
tsad_lane_stats tsad_policy_get_stats(const tsad_policy *policy, int lane);
void tsad_policy_get_timings(const tsad_policy *policy, int64_t ns[TSAD_N_TIMERS]);
size_t tsad_policy_bytes(const tsad_policy *policy);
/* (L, K, T, A): room for one chunk's noise, for callers that draw it themselves, */
float *tsad_policy_noise_buffer(tsad_policy *policy);
/* and how many steps' noise the lane's next chunk reads, from step *first on. */
int tsad_policy_noise_steps(const tsad_policy *policy, int lane, int *first);

/* ---- image encoders --------------------------------------------------------------------- */

typedef struct tsad_vision tsad_vision;

#define TSAD_MAX_IMAGE 8192 /* pixels of a side */
#define TSAD_MAX_CHANNELS 16

/* A ResNet trunk (torchvision's, without its last two layers), keypoints by spatial softmax, a
 * linear layer: what LeRobot's and Diffusion Policy's image encoders are made of. Tensor names
 * stand in net/resnet.c. Borrowed for the call. */
typedef struct tsad_vision_spec {
    int depth;      /* 18 or 34 */
    int group_norm; /* 1: groups of 16 channels; 0: BatchNorm, folded into weights and biases */
    int n_keypoints;
    int height, width, channels; /* of the image that the trunk sees */
    /* (channels) the trunk sees pixel * scale + offset, of pixels from 0 to 1 */
    const float *scale, *offset;
    int relu; /* after the linear layer */
    int bits; /* 32; 16: the trunk's convolutions multiply integers; 8: their weights are bytes */
    int n_threads;
    const char *backend; /* as a model's */
    const tsad_tensor *tensors;
    int n_tensors;
} tsad_vision_spec;

typedef struct tsad_vision_info {
    int n_features, n_keypoints, height, width, channels, n_threads;
    const char *backend;
    size_t weight_bytes; /* packed */
    size_t bytes;        /* everything else */
} tsad_vision_info;

/* n images, one of the two. */
typedef struct tsad_images {
    const uint8_t *bytes; /* (n, height, width, channels), 255 is 1 */
    const float *planes;  /* (n, channels, height, width), 0 to 1 */
    int64_t n;
} tsad_images;

tsad_status tsad_vision_create(const tsad_vision_spec *spec, tsad_vision **out);
void tsad_vision_destroy(tsad_vision *vision); /* NULL is fine */
tsad_vision_info tsad_vision_get_info(const tsad_vision *vision);
/* One thread at a time: to encode, it must be acquired. */
tsad_status tsad_vision_acquire(tsad_vision *vision); /* TSAD_BUSY if another thread holds it */
void tsad_vision_release(tsad_vision *vision);
/* features (n, n_features). Bits depend on the instruction set alone, neither on threads nor on how
 * many images there are. Where it fails (TSAD_NOT_FINITE, TSAD_INTERRUPTED) some are written. */
tsad_status tsad_vision_encode(tsad_vision *vision, const tsad_images *images, float *features,
                               const tsad_interrupt *interrupt);

#ifdef __cplusplus
}
#endif
