/* backend.h: what a backend offers. Stages know no hardware, backends know no diffusion.
 *
 * The unit is a whole block, never a matrix product: at ten action tokens the cost is in the
 * hand-over between operations. A backend packs a model's plain matrices into its own execution
 * order once, and runs programs. Contract of run: no allocation, no failure, no Python; all
 * `w->size` threads that share a lane call it together with the same arguments, but for the first
 * row of one that joins (join.c): a backend that wants threads to join takes turns.
 */
#pragma once

#include "internal.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TSAD_BACKEND_ABI 3u

/* Which of a policy's programs runs, and on whose data. */
typedef struct tsad_run {
    const tsad_net *net;
    const tsad_program *program;
    float **registers;         /* the calling worker's */
    const tsad_member *member; /* where the program has sums or a sampler */
    tsad_lane *lane;
    const float *noise; /* z of row k at noise + k * noise_step; NULL: none */
    size_t noise_step;
    bool update; /* false: stop before the sampler (predict_noise) */
} tsad_run;

typedef struct tsad_backend {
    uint32_t abi;
    const char *name;
    bool (*usable)(void); /* on this machine */
    tsad_status (*pack)(
        tsad_model *model);            /* plain matrices -> packed; plain ones are freed after */
    void (*unpack)(tsad_model *model); /* frees what pack made; accepts half-packed models */
    size_t (*scratch_floats)(const tsad_model *model);
    /* n > 1: lanes of one net that go through the rows together and share every pass over the
     * weights that they can; the worker is then alone (size 1) */
    void (*run)(tsad_worker *w, const tsad_run *runs, int n, int row_begin, int row_end);
    /* fills the lane's sums of rollout slots that its program's ops keep; to be met after */
    void (*keep)(tsad_worker *w, tsad_lane *lane);
} tsad_backend;

/* Best first; NULL-terminated. */
extern const tsad_backend *const tsad_backends[];
const tsad_backend *tsad_backend_find(const char *name);

#ifdef __cplusplus
}
#endif
