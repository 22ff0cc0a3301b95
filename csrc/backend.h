/* backend.h: what a backend offers. Stages know no hardware, backends know no diffusion.
 *
 * A backend packs a model's plain matrices into its own execution order once. For every policy it
 * opens an engine, which owns all memory of its device, and runs whole programs on queues: the unit
 * is a block, never a matrix product, since at ten action tokens the cost is in the hand-over
 * between operations. What a queue is, a thread, a team of threads, a stream, and how lanes spread
 * over queues is the backend's own affair.
 *
 * From the start to the end of a call of `each` nothing allocates, and nothing calls Python but the
 * caller's interrupt, in calls that last.
 */
#pragma once

#include "plan/program.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tsad_engine tsad_engine;
typedef struct tsad_queue tsad_queue;
typedef struct tsad_eye tsad_eye; /* an image encoder's memory and threads: vision.h */

#define TSAD_GANG 4 /* lanes that one queue takes through the steps together, at most */

typedef enum tsad_sums_use { TSAD_NO_SUMS, TSAD_MAKE_SUMS, TSAD_HAVE_SUMS } tsad_sums_use;

/* A caller's argument that may be on the device. */
typedef enum tsad_given { TSAD_GIVEN_OBS, TSAD_GIVEN_NOISE, TSAD_N_GIVEN } tsad_given;

/* What cells that a chunk computed differ by from the values that were in their slots, and that
 * reuse would have taken: those of an earlier row, and those of the same cell in an earlier chunk.
 * Sums of squares in units of 2^-BITS: whole numbers, as then the order of additions, and so who
 * adds what, makes no difference. */
enum { TSAD_AUDIT_BITS = 24 };
enum { TSAD_AUDIT_STEP, TSAD_AUDIT_ROLLOUT, TSAD_N_AUDITS };
typedef struct tsad_audit {
    int32_t *known; /* (B) 1 + the row whose value an earlier chunk left in the slot, 0: none */
    int32_t *wrote; /* (B) as it is for the next chunk */
    int64_t apart[TSAD_N_AUDITS], size[TSAD_N_AUDITS];
} tsad_audit;

/* One lane's program on a queue; the i-th run of a call uses the queue's i-th set of registers. */
typedef struct tsad_run {
    int lane; /* whose slots and arrays */
    tsad_part part;
    const tsad_program *program;
    int first_step;     /* row of the tables over steps that the program's row 0 has */
    bool rows_apart;    /* rows need nothing of each other: any order, side by side */
    bool rollout;       /* slots hold all rows, not one */
    bool fixed;         /* the chunk's programs are not made for it: they are likely to run again */
    tsad_sums_use sums; /* of rollout slots: leave, make before the first row, or use */
    const float *sampler; /* on the host: (rows, 9); NULL: the network alone */
    const float *noise;   /* on the host: z of row k at noise + k * noise_step; NULL: none */
    size_t noise_step;
    bool noise_there;         /* not on the host: on the device, */
    size_t noise_index;       /* of the caller's numbers this one */
    const tsad_rule *rule;    /* NULL: none. Where a row looks, what is left of it may be */
    const tsad_program *rest; /* this program's */
    uint8_t *looked;          /* (rows) which of them were computed whole */
    tsad_audit *audit;        /* NULL: nobody asks */
} tsad_run;

/* Rows of floats in a caller's memory. */
typedef struct tsad_rows {
    float *data;                       /* on the host, or `there` */
    int first, rows, channels, stride; /* first: of the register's rows */
    /* (channels) put: (x - shift) * scale + offset, get: (x - offset) / scale + shift */
    const float *scale, *offset, *shift;
    /* On the device, where a number whose result is beyond TSAD_MAX_MAGNITUDE becomes NaN: */
    bool there;
    tsad_given given;  /* of this argument, */
    size_t index;      /* of its numbers `data` is this one */
    const float *base; /* (rows, channels) put, there: base + share * data; NULL: data */
    float share;
} tsad_rows;

/* What is made of a chunk's actions (tsad_policy_set_lead, _set_correction); all on the host. */
typedef struct tsad_finish {
    const float *expected;     /* (T, A) what the chunk before has for them; NULL: none */
    const float *gain, *shift; /* (T, A); NULL: no correction. Without `expected`: shift alone */
    float lead;                /* 0: none */
    bool smoothing;
    float clip; /* the sampler's last, which corrected and led actions stay within */
} tsad_finish;

typedef tsad_status (*tsad_each_fn)(void *context, tsad_queue *queue, int rank, int first, int n);

typedef struct tsad_backend {
    const char *name;
    bool (*usable)(void);                   /* on this machine */
    bool for_tests;                         /* nobody is offered it */
    bool rules;                             /* knows rules of rows, in nets that are not wide */
    bool audits;                            /* knows audits, in such nets without gates */
    tsad_status (*pack)(tsad_model *model); /* plain matrices -> packed; plain ones are freed */
    void (*unpack)(tsad_model *model);      /* frees what pack made; accepts half-packed models */

    /* `lanes` and one more, the last, that needs one row of slots alone */
    tsad_status (*open)(const tsad_model *model, int lanes, int threads, tsad_engine **out);
    void (*close)(tsad_engine *engine); /* NULL is fine */
    size_t (*bytes)(const tsad_engine *engine);
    /* `rows` rows of slots for every lane from now on; what they held is lost. On failure nothing
     * changes. */
    tsad_status (*remember_rollouts)(tsad_engine *engine, int rows);
    /* A program that will run often was compiled: uploads, makes room for the sums that it keeps.
     * False: there is no room for sums, so runs must not ask for them. */
    bool (*prepare)(tsad_engine *engine, int lane, const tsad_program *program);

    /* Calls fn for all rows first .. first + count of a call, n at a time (a gang at most), on one
     * queue or several, ranks 0 to threads - 1. `alone`: with this thread only. Returns the first
     * failure, or TSAD_INTERRUPTED; `queues` is how many were used. */
    tsad_status (*each)(tsad_engine *engine, int count, bool alone, tsad_each_fn fn, void *context,
                        const tsad_interrupt *interrupt, int *queues);
    /* Within fn. All n runs are of one part and one range of rows. */
    tsad_status (*run)(tsad_queue *queue, const tsad_run *runs, int n, int row_begin, int row_end);
    tsad_status (*put)(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows from);
    tsad_status (*get)(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows to);
    tsad_status (*get_array)(tsad_queue *queue, int lane, tsad_array which, float *to);

    /* Callers' arrays in memory of the device: see tsad_policy_owns. NULL: it has none but the
     * host's. */
    bool (*owns)(int device_type, int device_id);
    /* Why a caller's stream can't be worked with now; NULL: it can. What is asked of the engine
     * next comes after what the stream holds; what the stream gets next comes after what the engine
     * was asked for. */
    const char *(*unfit)(uintptr_t stream);
    tsad_status (*follow)(tsad_engine *engine, uintptr_t stream);
    tsad_status (*precede)(tsad_engine *engine, uintptr_t stream);
    /* Within fn: as `get` of these rows of all of the register's, to memory of the device, and not
     * waited for. They are NaN if any of the register's is not finite. `finish` NULL: as they are;
     * its arrays are read at once. */
    tsad_status (*hand_over)(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows to,
                             const tsad_finish *finish);
    /* The first number of an argument that became NaN when it was put, since this was asked last;
     * after a wait. */
    bool (*fault)(tsad_engine *engine, tsad_given given, size_t *index, float *raw);

    /* Image encoders; NULL: this backend has none. Opening packs the weights of the nodes, which
     * are borrowed until then. */
    tsad_status (*open_vision)(const tsad_vision *vision, int threads, tsad_eye **out);
    void (*close_vision)(tsad_eye *eye); /* NULL is fine */
    /* bytes of packed weights, and of all else */
    void (*size_vision)(const tsad_eye *eye, size_t *weights, size_t *rest);
    tsad_status (*see)(tsad_eye *eye, const tsad_images *images, float *features,
                       const tsad_interrupt *interrupt);
} tsad_backend;

/* Best first; NULL-terminated. */
extern const tsad_backend *const tsad_backends[];
const tsad_backend *tsad_backend_find(const char *name);
/* ... or a failure that names it */
tsad_status tsad_backend_choose(const char *name, const tsad_backend **out);
const tsad_backend *tsad_backend_plugged(void); /* plugin.c; NULL: none */

#ifdef __cplusplus
}
#endif
