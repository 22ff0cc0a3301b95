/* team.c: the process's worker threads.
 *
 * One team per process, leased to one chunk at a time by try-lock; the loser runs alone on its
 * own thread, with the same bits (the order of partial sums is fixed when weights are packed).
 * Between chunks workers sleep on a condition variable. Nobody waits for one to wake: a worker
 * that does while the job is open enters it, one that comes later goes back to sleep. Within a
 * chunk they meet at spin barriers that yield after a while, so that a core taken by another
 * process costs time, never a deadlock. After fork() the child has no team and makes a new one
 * when it first needs it.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include "worker.h"

#include <pthread.h>
#include <sched.h>

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

/* A yield hands the core to whatever else wants it, for milliseconds: only after a long wait. */
enum { MAX_TEAM = 64, SPINS_BEFORE_YIELD = 40000 };

#define CLOSED (1ull << 31)

static struct {
    pthread_mutex_t lock; /* guards the fields below */
    pthread_cond_t work;
    atomic_int leased;
    atomic_ullong entry;     /* generation of the job << 32 | CLOSED | workers that entered it */
    atomic_uint left;        /* of these, those that have left it again */
    int n_threads;           /* started, without the caller */
    unsigned generation;     /* of jobs */
    unsigned born[MAX_TEAM]; /* the generation at a worker's birth: it must not run older jobs */
    int job_size;
    void (*fn)(void *, int, int);
    void *context;
    pthread_t threads[MAX_TEAM];
#if defined(__linux__)
    int callers_core;             /* that the workers keep off, -1: none yet */
    cpu_set_t cores[MAX_TEAM];    /* where each may run by its owner's will, */
    cpu_set_t confined[MAX_TEAM]; /* and by ours */
#endif
} team = {.lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER};

void tsad_spin(int spins)
{
    if (spins < SPINS_BEFORE_YIELD) {
        PAUSE();
    } else {
        sched_yield();
    }
}

void tsad_barrier_wait(tsad_barrier *barrier, int size)
{
    if (size <= 1) {
        return;
    }
    unsigned generation = atomic_load_explicit(&barrier->generation, memory_order_acquire);
    unsigned before = atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel);
    if (before + 1 == (unsigned)size) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->generation, generation + 1, memory_order_release);
        return;
    }
    for (int spins = 0;
         atomic_load_explicit(&barrier->generation, memory_order_acquire) == generation; spins++) {
        tsad_spin(spins);
    }
}

/* into the job of this generation, unless it is over */
static bool enter(unsigned generation)
{
    unsigned long long entry = atomic_load_explicit(&team.entry, memory_order_relaxed);
    while (entry >> 32 == generation && !(entry & CLOSED)) {
        if (atomic_compare_exchange_weak_explicit(&team.entry, &entry, entry + 1,
                                                  memory_order_acquire, memory_order_relaxed)) {
            return true;
        }
    }
    return false;
}

/* nobody may enter any more, and those who did have left */
static void close_job(void)
{
    unsigned long long entry = atomic_fetch_or_explicit(&team.entry, CLOSED, memory_order_relaxed);
    unsigned entered = (unsigned)(entry & (CLOSED - 1));
    for (int spins = 0; atomic_load_explicit(&team.left, memory_order_acquire) < entered; spins++) {
        tsad_spin(spins);
    }
}

/* A worker that wakes on the caller's core takes it from the caller, until the scheduler's next
 * tick: milliseconds, at a robot's pace more often than not. So workers keep off it. */
#if defined(__linux__)
static void keep_off_callers_core(void)
{
    int core = sched_getcpu();
    if (core < 0 || core >= CPU_SETSIZE || core == team.callers_core) {
        return;
    }
    for (int i = 0; i < team.n_threads; i++) {
        cpu_set_t now, *own = &team.cores[i];
        if (pthread_getaffinity_np(team.threads[i], sizeof now, &now) != 0) {
            continue;
        }
        if (!CPU_EQUAL(&now, &team.confined[i])) {
            *own = now; /* as it was born, or somebody else has moved it since */
        }
        team.confined[i] = *own;
        CPU_CLR(core, &team.confined[i]);
        if (CPU_COUNT(&team.confined[i]) == 0 ||
            pthread_setaffinity_np(team.threads[i], sizeof now, &team.confined[i]) != 0) {
            team.confined[i] = now;
        }
    }
    team.callers_core = core;
}
#else
static void keep_off_callers_core(void) {}
#endif

static void *worker_main(void *argument)
{
    int rank = (int)(intptr_t)argument + 1;
    pthread_mutex_lock(&team.lock);
    unsigned seen = team.born[rank - 1];
    pthread_mutex_unlock(&team.lock);
    for (;;) {
        pthread_mutex_lock(&team.lock);
        while (team.generation == seen) {
            pthread_cond_wait(&team.work, &team.lock);
        }
        seen = team.generation;
        int size = team.job_size;
        void (*fn)(void *, int, int) = team.fn;
        void *context = team.context;
        pthread_mutex_unlock(&team.lock);
        if (rank < size && enter(seen)) {
            fn(context, rank, size);
            atomic_fetch_add_explicit(&team.left, 1, memory_order_release);
        }
    }
    return NULL;
}

/* the child of a fork has the parent's memory but none of its threads */
static void forget_after_fork(void)
{
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.work, NULL);
    atomic_store(&team.leased, 0);
    team.n_threads = 0;
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_after_fork); }

static void start_threads(int size)
{
    if (size > MAX_TEAM) {
        size = MAX_TEAM;
    }
    pthread_mutex_lock(&team.lock);
    while (team.n_threads < size - 1) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        team.born[team.n_threads] = team.generation;
        int failed = pthread_create(&team.threads[team.n_threads], &attributes, worker_main,
                                    (void *)(intptr_t)team.n_threads);
        pthread_attr_destroy(&attributes);
        if (failed) {
            break;
        }
#if defined(__linux__)
        team.callers_core = -1;
        CPU_ZERO(&team.confined[team.n_threads]);
#endif
        team.n_threads++;
    }
    pthread_mutex_unlock(&team.lock);
}

void tsad_team_reserve(int size)
{
    if (size <= 1) {
        return;
    }
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    int expected = 0;
    if (atomic_compare_exchange_strong(&team.leased, &expected, 1)) {
        start_threads(size);
        atomic_store(&team.leased, 0);
    } /* fewer threads than asked only cost time */
}

int tsad_team_run(void (*fn)(void *, int, int), void *context, int size)
{
    int expected = 0;
    if (size <= 1 || !atomic_compare_exchange_strong(&team.leased, &expected, 1)) {
        fn(context, 0, 1);
        return 1;
    }
    if (team.n_threads < size - 1) {
        start_threads(size); /* only after a fork, or where tsad_team_reserve could not */
    }
    if (size > team.n_threads + 1) {
        size = team.n_threads + 1;
    }
    if (size > 1) {
        keep_off_callers_core();
        pthread_mutex_lock(&team.lock);
        team.fn = fn;
        team.context = context;
        team.job_size = size;
        team.generation++;
        atomic_store_explicit(&team.left, 0, memory_order_relaxed);
        atomic_store_explicit(&team.entry, (unsigned long long)team.generation << 32,
                              memory_order_release);
        pthread_cond_broadcast(&team.work);
        pthread_mutex_unlock(&team.lock);
    }
    fn(context, 0, size);
    if (size > 1) {
        close_job();
    }
    atomic_store(&team.leased, 0);
    return size;
}
