/* worker.h: the CPU's engine: its memory, its threads, and how they share the chunk of a lane. */
#pragma once

#include "../backend.h"

#include <stdatomic.h>

#define TSAD_PARTS 4 /* at most: partial sums of a split block, fixed when weights are packed */

/* One lane's memory. */
typedef struct tsad_cpu_lane {
    float *slots; /* rollout: (rows, row_floats), else one row */
    float *array[TSAD_N_ARRAYS];
    tsad_arena sum_arena;
    size_t sum_floats; /* that sum_arena was carved for */
    float *sums;       /* of rollout slots, that the lane's program keeps; NULL: none */
} tsad_cpu_lane;

/* What a rule of rows remembers of a chunk: branch_floats each. */
typedef struct tsad_rule_state {
    float *now;  /* of this row: the input, or what the first blocks added to it */
    float *then; /* the input of the row before, or that of the last row computed */
    double total;
    int computed; /* rows */
} tsad_rule_state;

/* One lane of a gang: a queue's private memory for its chunk. */
typedef struct tsad_member {
    float **registers[TSAD_N_PARTS];
    float *x0;                      /* (2, T, A padded): of the last two rows, by their parity */
    float *sums[TSAD_REMEMBERED];   /* branch_floats each */
    float *tables[TSAD_REMEMBERED]; /* of the closed form, made when first needed */
    bool *table_ready;              /* (TSAD_REMEMBERED) */
    tsad_rule_state *rule;
} tsad_member;

/* A queue is a thread, alone or as rank 0 of the team that shares its lane; the others' ranks are
 * queues that no stage sees. A gang of more than one lane is the thread's own (size 1). */
typedef struct tsad_queue {
    tsad_engine *engine;
    int rank, size;       /* threads that share this lane's chunk; size 0: not, or no longer, one */
    bool shares;          /* others may help, and join: see join.c */
    tsad_member *members; /* (gang) */
    float *scratch;
    float *terms;                       /* (3, branch channels): move, scale and gate of a branch */
    uint32_t *read_epoch, *write_epoch; /* (B) see run.c */
    uint32_t epoch;
    unsigned parity;
    unsigned turns; /* taken in this chunk: see join.c */
    bool stalled;   /* rank 0: another thread's core seems taken */
    int64_t met_at; /* rank 0: when the threads last met, 0: not in this chunk */
    tsad_run run;   /* others: what they help with, */
    int row_end;    /* up to this row */
} tsad_worker;

/* ---- team.c ----------------------------------------------------------------------------- */

typedef struct tsad_barrier {
    _Alignas(64) atomic_uint arrived;
    _Alignas(64) atomic_uint generation;
} tsad_barrier;

void tsad_spin(int spins); /* one turn of a waiting loop */
void tsad_barrier_wait(tsad_barrier *barrier, int size);
/* Runs fn(context, rank, size) on up to `size` threads of the process's team, the caller being rank
 * 0: on those that wake before it is done. Alone (size 1) when the team is taken or can't be had.
 * Returns the size asked for. */
int tsad_team_run(void (*fn)(void *context, int rank, int size), void *context, int size);
void tsad_team_reserve(int size); /* start threads ahead of the first chunk */

/* ---- join.c ------------------------------------------------------------------------------ */

/* Where the threads of a chunk find each other. */
typedef struct tsad_meeting {
    /* rank 0's word at its latest turn: number << 8 | threads << 1 | go alone */
    _Alignas(64) atomic_uint ticket;
    _Alignas(64) atomic_int arrived;  /* threads that came, without rank 0 */
    _Alignas(64) atomic_int admitted; /* how many of these take part; -1: nobody any more */
    int row;                          /* where rank 0 was when it admitted the latest */
    tsad_run run;                     /* the program that the threads share */
    int row_end;
    /* rows that anybody may take: number of the offer << 16 | rows left, the last one is next */
    _Alignas(64) atomic_uint rows;
    const tsad_run *rows_of;
    int rows_before; /* the first of them */
    atomic_int done;
} tsad_meeting;

void tsad_meeting_begin(tsad_meeting *m); /* before a chunk */
void tsad_meeting_end(tsad_meeting *m);   /* rank 0: those who did not join may go */
/* Rank 0: rows [begin, end), with the help of whoever is there; returns when all are done. */
void tsad_share_rows(tsad_worker *w, const tsad_run *run, int begin, int end);
enum { TSAD_BEFORE_ROWS = -1 }; /* a turn: all is prepared, no row has begun */
/* All threads of a lane at the same points of its program. Rank 0 says whether they stay together,
 * and lets others join. False: this thread is released. */
bool tsad_turn(tsad_worker *w, int row);
/* Rank 0: the program that the threads share from the next turn on. */
void tsad_publish(tsad_worker *w, const tsad_run *run, int row_end);
/* Another rank, after a program: the next one, once rank 0 has published it. False: released. */
bool tsad_next(tsad_worker *w);
/* Rank 0: there is no next one. */
void tsad_dismiss(tsad_worker *w);
int tsad_arrive(tsad_engine *e); /* the rank of a thread that comes to a chunk */
/* Helps until rank 0 lets it join; then the worker is where rank 0 is, before the turn of that
 * row. False: the chunk went without it. */
bool tsad_join(tsad_worker *w, int *row);

/* ---- stall.c ----------------------------------------------------------------------------- */

/* A barrier of the threads that share a lane; rank 0 notes whether it was kept waiting. */
void tsad_worker_meet(tsad_worker *w);
void tsad_note_wait(tsad_worker *w, int64_t since); /* for rows that another thread took */
/* threads to ask for, and what the chunk just run says of them */
int tsad_stall_size(tsad_engine *e, int n_lanes);
void tsad_stall_note(tsad_engine *e);

/* ---- engine.c ---------------------------------------------------------------------------- */

struct tsad_engine {
    const tsad_model *model;
    int n_lanes, n_threads, gang; /* n_lanes without the last one, which no caller has */
    int slot_rows;                /* that slot_arena has room for */
    tsad_arena arena;             /* everything but the slots */
    tsad_arena slot_arena;        /* remade when rollout memory is first needed */
    tsad_cpu_lane *lanes;         /* n_lanes + 1 */
    tsad_worker *workers;         /* n_threads */
    float *exchange;              /* (2, TSAD_PARTS, branch_floats) partial sums between threads */
    size_t branch_floats;
    int branch_channels; /* of the widest, padded */
    tsad_barrier *barrier;
    tsad_meeting *meeting;
    const tsad_interrupt *interrupt; /* of the running call, NULL: none */
    int64_t asked_at;                /* when the call began, or its interrupt was asked last */
    unsigned float_mode;             /* the caller's */
    atomic_bool stop;                /* the call has been told to */
    int64_t stalled_at;              /* when rank 0 last waited for a core that seemed taken */
    bool stalled_before;             /* the last chunk that threads shared */
    int alone_for, patience; /* chunks to run without the team after a stall, and how many next */
};

tsad_status tsad_cpu_open(const tsad_model *model, int lanes, int threads, tsad_engine **out);
void tsad_cpu_close(tsad_engine *engine);
size_t tsad_cpu_bytes(const tsad_engine *engine);
tsad_status tsad_cpu_remember_rollouts(tsad_engine *engine, int rows);
bool tsad_cpu_prepare(tsad_engine *engine, int lane, const tsad_program *program);
tsad_status tsad_cpu_each(tsad_engine *engine, int count, bool alone, tsad_each_fn fn,
                          void *context, const tsad_interrupt *interrupt, int *queues);
tsad_status tsad_cpu_put(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows from);
tsad_status tsad_cpu_get(tsad_queue *queue, int place, tsad_part part, int reg, tsad_rows to);
tsad_status tsad_cpu_get_array(tsad_queue *queue, int lane, tsad_array which, float *to);

/* Where slot `slot` (k * B + b) lives. Without rollout memory the ring keeps one row. */
static inline float *tsad_slot(const tsad_net *net, const tsad_cpu_lane *lane, bool rollout,
                               int32_t slot)
{
    int row = rollout ? slot / net->n_blocks : 0;
    return lane->slots + (size_t)row * net->row_floats + net->slot_offset[slot % net->n_blocks];
}

/* Folded token s of memory for one row, which is of this step, and layer. */
static inline const float *tsad_folded(const tsad_model *m, const tsad_cpu_lane *lane, int row,
                                       int step, int layer, int s)
{
    const float *fold = lane->array[TSAD_ARRAY_FOLDED];
    size_t tokens = (size_t)m->n_memory;
    if (m->encode_rows) {
        size_t at = ((size_t)row * (size_t)m->n_layers + (size_t)layer) * tokens + (size_t)s;
        return fold + at * m->fold.floats;
    }
    if (s == 0) {
        size_t at = (size_t)step * (size_t)m->n_layers + (size_t)layer;
        return m->time_fold + at * m->fold.floats;
    }
    return fold + ((size_t)layer * (tokens - 1) + (size_t)(s - 1)) * m->fold.floats;
}
