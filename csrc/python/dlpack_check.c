/* dlpack_check.c: may the memory that a DLPack tensor describes be read? Every field comes from
 * somebody else's code. Knows no Python.
 */
#include "dlpack.h"

/* No array begins in the first page of memory. Tensors without memory of their own (fake,
 * functional, of zeros) say NULL, and their slices say NULL plus an offset. */
enum { FIRST_PAGE = 4096 };

bool dlpack_is_host(long device_type)
{
    return device_type == DLPACK_CPU || device_type == DLPACK_CUDA_HOST ||
           device_type == DLPACK_ROCM_HOST;
}

/* Bytes per number, 0 if the tensor has other numbers than those asked for. */
static size_t item_size(const dlpack_tensor *t, int code, unsigned size)
{
    unsigned bits = t->dtype.bits * t->dtype.lanes;
    if (code < 0) {
        return bits % 8 ? 0 : bits / 8;
    }
    bool same = t->dtype.code == code && t->dtype.bits == 8 * size && t->dtype.lanes == 1;
    return same ? size : 0;
}

/* Sizes, and their product in bytes. Sizes beside a 0 are held to the same limit, as NumPy does: so
 * products of some of them are safe too. */
static dlpack_fault count_bytes(const dlpack_tensor *t, size_t item, dlpack_array *array)
{
    size_t bytes = item;
    bool empty = false;
    for (int i = 0; i < t->n_dims; i++) {
        int64_t n = t->shape[i];
        array->shape[i] = n;
        if (n < 0) {
            return DLPACK_NEGATIVE_SIZE;
        }
        if (n == 0) {
            empty = true;
        } else if ((uint64_t)n > (size_t)PTRDIFF_MAX / bytes) {
            return DLPACK_TOO_LARGE;
        } else {
            bytes *= (size_t)n;
        }
    }
    array->n_dims = t->n_dims;
    array->bytes = empty ? 0 : bytes;
    return DLPACK_FITS;
}

static bool is_contiguous(const dlpack_tensor *t, const dlpack_array *array)
{
    int64_t expected = 1;
    for (int i = array->n_dims - 1; t->strides && array->bytes && i >= 0; i--) {
        if (array->shape[i] != 1 && t->strides[i] != expected) {
            return false;
        }
        expected *= array->shape[i];
    }
    return true;
}

static dlpack_fault find_data(const dlpack_tensor *t, size_t item, dlpack_array *array)
{
    uintptr_t begin = (uintptr_t)t->data;
    array->data = NULL;
    if (!array->bytes) {
        return DLPACK_FITS;
    }
    if (!t->data) {
        return DLPACK_NO_DATA;
    }
    if (t->byte_offset > PTRDIFF_MAX || t->byte_offset > UINTPTR_MAX - begin ||
        array->bytes > UINTPTR_MAX - begin - (uintptr_t)t->byte_offset) {
        return DLPACK_TOO_LARGE;
    }
    if (begin + t->byte_offset < FIRST_PAGE) {
        return DLPACK_NO_DATA;
    }
    array->data = (char *)t->data + t->byte_offset;
    size_t alignment = item & (~item + 1); /* of a number of 24 bytes: 8 */
    return (uintptr_t)array->data % alignment ? DLPACK_MISALIGNED : DLPACK_FITS;
}

static dlpack_fault check(const dlpack_tensor *t, int code, unsigned size, dlpack_array *array)
{
    size_t item = item_size(t, code, size);
    if (!item) {
        return DLPACK_OTHER_DTYPE;
    }
    if (t->n_dims < 0 || t->n_dims > DLPACK_MAX_DIMS) {
        return DLPACK_BAD_RANK;
    }
    if (t->n_dims && !t->shape) {
        return DLPACK_NO_SHAPE;
    }
    dlpack_fault fault = count_bytes(t, item, array);
    if (fault != DLPACK_FITS) {
        return fault;
    }
    return is_contiguous(t, array) ? find_data(t, item, array) : DLPACK_STRIDED;
}

dlpack_fault dlpack_check(const dlpack_tensor *t, int code, unsigned size, dlpack_array *array)
{
    return dlpack_is_host(t->device_type) ? check(t, code, size, array) : DLPACK_OTHER_DEVICE;
}

dlpack_fault dlpack_check_on(const dlpack_tensor *t, int device_type, int code, unsigned size,
                             dlpack_array *array)
{
    bool there = t->device_type == device_type && t->device_id == 0;
    return there ? check(t, code, size, array) : DLPACK_OTHER_DEVICE;
}
