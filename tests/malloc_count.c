/* malloc_count.c: an LD_PRELOAD library that counts allocations of the whole process, all threads,
 * while a chunk runs. The extension calls the two marks just after it has left the GIL and just
 * before it takes it again (csrc/python/policy_call.c). For glibc.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *memory, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *memory);

static atomic_int armed;
static atomic_long n_chunks, n_allocations, n_frees;

void tsad_mark_chunk_begin(void)
{
    atomic_fetch_add(&n_chunks, 1);
    atomic_store(&armed, 1);
}

void tsad_mark_chunk_end(void) { atomic_store(&armed, 0); }

long tsad_count_chunks(void) { return atomic_load(&n_chunks); }
long tsad_count_allocations(void) { return atomic_load(&n_allocations); }
long tsad_count_frees(void) { return atomic_load(&n_frees); }

static void note(void)
{
    if (atomic_load_explicit(&armed, memory_order_relaxed)) {
        atomic_fetch_add(&n_allocations, 1);
    }
}

void *malloc(size_t size)
{
    note();
    return __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    note();
    return __libc_calloc(n, size);
}

void *realloc(void *memory, size_t size)
{
    note();
    return __libc_realloc(memory, size);
}

void *memalign(size_t alignment, size_t size)
{
    note();
    return __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    note();
    return __libc_memalign(alignment, size);
}

int posix_memalign(void **out, size_t alignment, size_t size)
{
    note();
    *out = __libc_memalign(alignment, size);
    return *out ? 0 : ENOMEM;
}

void free(void *memory)
{
    if (memory && atomic_load_explicit(&armed, memory_order_relaxed)) {
        atomic_fetch_add(&n_frees, 1);
    }
    __libc_free(memory);
}
