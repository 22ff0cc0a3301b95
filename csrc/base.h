/* base.h: statuses, numbers and memory, for every layer below the edge. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tsad.h"

#define TSAD_ALIGN 256 /* bytes: every carved array starts on such a boundary */
#define TSAD_LANE 32   /* floats: rows of registers and slots are padded to a multiple of this */

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

/* ---- numbers.c -------------------------------------------------------------------------- */

/* Where x is first NaN or beyond `limit` in magnitude; n: nowhere. */
size_t tsad_first_beyond(const float *x, size_t n, float limit);
/* A failure that names the first number beyond TSAD_MAX_MAGNITUDE; x NULL: nothing to check. */
tsad_status tsad_check_numbers(const char *name, const float *x, size_t n);
tsad_status tsad_check_tensors(const tsad_tensor *tensors, int n);

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
