/* arena.c: memory. A layout function carves an arena twice, first to count (base NULL), then to
 * place, so size and placement cannot disagree.
 *
 *   base -> | array | pad to 256 | array | pad | ...            | end
 *
 * Under the address sanitizer the padding and a red zone after each array are poisoned, so an
 * overrun inside the arena is caught like one outside.
 */
#include "base.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, HUGE_PAGE = 2 << 20 };

#if defined(__SANITIZE_ADDRESS__)
#define TSAD_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TSAD_ASAN 1
#endif
#endif

#ifdef TSAD_ASAN
#include <sanitizer/asan_interface.h>
#define RED_ZONE TSAD_ALIGN
#define POISON(from, bytes) ASAN_POISON_MEMORY_REGION(from, bytes)
#define UNPOISON(from, bytes) ASAN_UNPOISON_MEMORY_REGION(from, bytes)
#else
#define RED_ZONE 0
#define POISON(from, bytes) ((void)0)
#define UNPOISON(from, bytes) ((void)0)
#endif

static size_t round_up(size_t bytes) { return (bytes + TSAD_ALIGN - 1) / TSAD_ALIGN * TSAD_ALIGN; }

void *tsad_carve(tsad_arena *arena, size_t bytes)
{
    size_t taken = round_up(bytes) + RED_ZONE;
    void *at = arena->base ? arena->base + arena->used : NULL;
    if (at) {
        POISON((char *)at + bytes, taken - bytes);
    }
    arena->used += taken;
    return at;
}

tsad_status tsad_arena_allocate(tsad_arena *arena)
{
    arena->size = (arena->used + PAGE - 1) / PAGE * PAGE; /* pages of its own */
    arena->used = 0;
    arena->base = tsad_allocate(arena->size);
    if (!arena->base) {
        return tsad_fail(TSAD_MEMORY, "out of memory: %zu bytes for the policy's arena",
                         arena->size);
    }
    return TSAD_OK;
}

void tsad_arena_free(tsad_arena *arena)
{
    if (arena->base) {
        UNPOISON(arena->base, arena->size);
    }
    tsad_deallocate(arena->base);
    *arena = (tsad_arena){0};
}

void *tsad_allocate(size_t bytes)
{
    bytes = round_up(bytes ? bytes : 1);
    size_t unit = bytes >= HUGE_PAGE ? HUGE_PAGE : bytes >= PAGE ? PAGE : TSAD_ALIGN;
    void *memory = aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
    if (memory) {
#ifdef MADV_HUGEPAGE
        if (bytes >= HUGE_PAGE) {
            madvise(memory, bytes, MADV_HUGEPAGE); /* a hint: fewer TLB misses on weights, slots */
        }
#endif
        memset(memory, 0, bytes);
    }
    return memory;
}

void tsad_deallocate(void *memory) { free(memory); }
