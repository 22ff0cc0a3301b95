/* roofline.c: what the machine can do: fused multiply-adds from registers, pairs of 16-bit products
 * added into 32 bits, and reads of a buffer of the weights' size, in one instruction set.
 * roofline.py compiles and runs it.
 *
 *   roofline THREADS BYTES SECONDS   ->   one line of JSON
 *
 * The buffer is split evenly; each thread streams its own part over and over, as the engine's
 * threads do. Figures are sums over the threads, of the best and of the median repetition.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif
#if defined(__aarch64__)
#define IN_REGISTER(x) __asm__ volatile("" : "+w"(x))
#else
#define IN_REGISTER(x) __asm__ volatile("" : "+v"(x))
#endif
/* Independent chains in named variables: an array would live in memory. Twelve hide a latency of
 * up to six cycles with two units, and fit 16 registers beside the operands. */
#define EACH_CHAIN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define EACH_STREAM(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

enum {
    LANES = VECTOR_BYTES / 4,
    CHAINS = 12,
    STREAM = 8,
    FMA_LOOPS = 1000 * 1000,
    READ_PASSES = 16,
    MIN_BYTES = 65536,
    MAX_REPEATS = 4096,
    MAX_THREADS = 64
};
enum { FMA, DOT16, READ, READ_AHEAD, N_KINDS };

typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));

/* a + the sums of pairs of 16-bit products of x and y; PAIR16 multiply-adds a vector */
#if defined(__AVX512VNNI__) && VECTOR_BYTES == 64
#define DOT(a, x, y) ((ints)_mm512_dpwssd_epi32((__m512i)(a), (__m512i)(x), (__m512i)(y)))
#elif defined(__AVX512BW__) && VECTOR_BYTES == 64
#define DOT(a, x, y) ((a) + (ints)_mm512_madd_epi16((__m512i)(x), (__m512i)(y)))
#elif defined(__AVX2__) && VECTOR_BYTES == 32
#define DOT(a, x, y) ((a) + (ints)_mm256_madd_epi16((__m256i)(x), (__m256i)(y)))
#elif defined(__x86_64__) && VECTOR_BYTES == 16
#define DOT(a, x, y) ((a) + (ints)_mm_madd_epi16((__m128i)(x), (__m128i)(y)))
#elif defined(__aarch64__)
#define DOT(a, x, y)                                                                               \
    ((ints)vmlal_s16((int32x4_t)(a), vget_low_s16((int16x8_t)(x)), vget_low_s16((int16x8_t)(y))))
#endif
#if defined(__aarch64__)
enum { PAIR16 = 4 }; /* half of a vector's sixteen bits a time */
#else
enum { PAIR16 = 2 * LANES };
#endif

typedef struct worker {
    pthread_t thread;
    int rank;
    const char *data; /* this thread's part */
    size_t bytes;
    float sink; /* so that nothing is optimised away */
} worker;

static pthread_barrier_t gate;
static double budget, deadline; /* rank 0 writes between barriers */
static int go_on;
static double seconds[N_KINDS][MAX_REPEATS];
static int n_repeats[N_KINDS];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static vec filled(float value)
{
    vec v;
    for (int i = 0; i < LANES; i++) {
        v[i] = value;
    }
    return v;
}

static float fma_pass(void)
{
    vec m = filled(0.999f), c = filled(0.001f);
#define START(i) vec a##i = filled(i);
#define STEP(i)                                                                                    \
    a##i = a##i * m + c;                                                                           \
    IN_REGISTER(a##i);
#define SUM(i) +a##i
    EACH_CHAIN(START)
    for (int n = 0; n < FMA_LOOPS; n++) {
        EACH_CHAIN(STEP)
    }
    vec sum = filled(0) EACH_CHAIN(SUM);
#undef START
#undef STEP
#undef SUM
    return sum[0];
}

static float dot16_pass(void)
{
#ifdef DOT
    ints x = (ints){0} + 1, y = x; /* no sum overflows */
#define START(i) ints a##i = (ints){0};
#define STEP(i)                                                                                    \
    IN_REGISTER(x); /* or a product would be made once, before the loop */                         \
    a##i = DOT(a##i, x, y);                                                                        \
    IN_REGISTER(a##i);
#define SUM(i) +a##i
    EACH_CHAIN(START)
    for (int n = 0; n < FMA_LOOPS; n++) {
        EACH_CHAIN(STEP)
    }
    ints sum = (ints){0} EACH_CHAIN(SUM);
#undef START
#undef STEP
#undef SUM
    return (float)sum[0];
#else
    return 0;
#endif
}

static float read_pass(const char *data, size_t bytes, size_t ahead)
{
#define START(i) vec a##i = filled(0);
#define STEP(i)                                                                                    \
    a##i += p[i];                                                                                  \
    IN_REGISTER(a##i);
#define SUM(i) +a##i
    EACH_STREAM(START)
    enum { TURN = STREAM * VECTOR_BYTES };
    for (size_t at = 0; at + TURN <= bytes; at += TURN) {
        const vec *p = (const vec *)(data + at);
        if (ahead) {
            for (int line = 0; line < TURN; line += 64) {
                __builtin_prefetch(data + at + ahead + line);
            }
        }
        EACH_STREAM(STEP)
    }
    vec sum = filled(0) EACH_STREAM(SUM);
    return sum[0];
}

static void work(worker *w, int kind)
{
    if (kind == FMA) {
        w->sink += fma_pass();
        return;
    }
    if (kind == DOT16) {
        w->sink += dot16_pass();
        return;
    }
    for (int pass = 0; pass < READ_PASSES; pass++) {
        w->sink += read_pass(w->data, w->bytes, kind == READ_AHEAD ? 4096 : 0);
    }
}

static void *run(void *argument)
{
    worker *w = argument;
    for (int kind = 0; kind < N_KINDS; kind++) {
        for (int n = 0; n < MAX_REPEATS; n++) {
            if (w->rank == 0) {
                if (n == 0) {
                    deadline = now() + budget / N_KINDS;
                }
                go_on = n < 3 || now() < deadline;
            }
            pthread_barrier_wait(&gate);
            if (!go_on) {
                break;
            }
            double start = now();
            work(w, kind);
            pthread_barrier_wait(&gate); /* until the slowest is done */
            if (w->rank == 0) {
                seconds[kind][n] = now() - start;
                n_repeats[kind] = n + 1;
            }
        }
        pthread_barrier_wait(&gate);
    }
    return NULL;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int start(worker *workers, int threads, size_t part)
{
    for (int i = 0; i < threads; i++) {
        size_t size = part + 8192; /* prefetches run past the end */
        char *data = aligned_alloc(4096, size);
        if (!data) {
            fprintf(stderr, "roofline: out of memory\n");
            return 1;
        }
        memset(data, 1, size);
        workers[i] = (worker){.rank = i, .data = data, .bytes = part};
        if (i > 0 && pthread_create(&workers[i].thread, NULL, run, &workers[i]) != 0) {
            fprintf(stderr, "roofline: no thread\n");
            return 1;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    static worker workers[MAX_THREADS];
    int threads = argc > 1 ? atoi(argv[1]) : 0;
    size_t bytes = argc > 2 ? strtoull(argv[2], NULL, 10) : 0;
    budget = argc > 3 ? atof(argv[3]) : 0;
    if (threads < 1 || threads > MAX_THREADS || bytes < MIN_BYTES * (size_t)threads ||
        budget <= 0) {
        fprintf(stderr, "usage: roofline THREADS(1-%d) BYTES(>= %d a thread) SECONDS\n",
                MAX_THREADS, MIN_BYTES);
        return 2;
    }
    size_t part = bytes / (size_t)threads / 4096 * 4096;
    pthread_barrier_init(&gate, NULL, (unsigned)threads);
    if (start(workers, threads, part)) {
        return 1;
    }
    run(&workers[0]);
    float sink = workers[0].sink;
    for (int i = 1; i < threads; i++) {
        pthread_join(workers[i].thread, NULL);
        sink += workers[i].sink;
    }
    double best[N_KINDS], median[N_KINDS];
    for (int kind = 0; kind < N_KINDS; kind++) {
        double amount = kind == FMA     ? 2.0 * CHAINS * LANES * FMA_LOOPS
                        : kind == DOT16 ? 2.0 * CHAINS * PAIR16 * FMA_LOOPS
                                        : (double)READ_PASSES * part;
        amount *= 1e-9 * threads;
        qsort(seconds[kind], (size_t)n_repeats[kind], sizeof(double), ascending);
        best[kind] = amount / seconds[kind][0];
        median[kind] = amount / seconds[kind][n_repeats[kind] / 2];
    }
    int kind = best[READ_AHEAD] > best[READ] ? READ_AHEAD : READ;
    printf("{\"threads\": %d, \"vector_bytes\": %d, \"bytes\": %zu, \"gflops\": %.2f, "
           "\"gflops_median\": %.2f, \"int16_gops\": %.2f, \"read_gbs\": %.2f, "
           "\"read_gbs_median\": %.2f, "
           "\"prefetch\": %s, \"sink\": %.1f}\n",
           threads, VECTOR_BYTES, part * (size_t)threads, best[FMA], median[FMA], best[DOT16],
           best[kind], median[kind], kind == READ_AHEAD ? "true" : "false", (double)sink);
    return 0;
}
