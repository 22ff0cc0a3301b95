/* dlpack.h: the part of the DLPack ABI that a consumer of arrays needs, no more.
 *
 * Field order and values are those of DLPack 1.x (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
 * Both capsules are understood: "dltensor" (before 1.0) and "dltensor_versioned". Widening this
 * subset is a deliberate change; the asserts below hold the layout. dlpack_check looks at a struct
 * that a stranger filled in; it knows no Python, so that a fuzzer can call it.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DLPACK_CAPSULE "dltensor"
#define DLPACK_CAPSULE_USED "used_dltensor"
#define DLPACK_CAPSULE_VERSIONED "dltensor_versioned"
#define DLPACK_CAPSULE_VERSIONED_USED "used_dltensor_versioned"
#define DLPACK_MAJOR 1
#define DLPACK_READ_ONLY ((uint64_t)1)

enum dlpack_device {
    DLPACK_CPU = 1,
    DLPACK_CUDA = 2,
    DLPACK_CUDA_HOST = 3,
    DLPACK_ROCM = 10,
    DLPACK_ROCM_HOST = 11,
    DLPACK_METAL = 8
};
enum dlpack_code {
    DLPACK_INT = 0,
    DLPACK_UINT = 1,
    DLPACK_FLOAT = 2,
    DLPACK_BFLOAT = 4,
    DLPACK_COMPLEX = 5,
    DLPACK_BOOL = 6
};

typedef struct dlpack_tensor {
    void *data;
    int32_t device_type, device_id;
    int32_t n_dims;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL: C-contiguous */
    uint64_t byte_offset;
} dlpack_tensor;

typedef struct dlpack_managed {
    dlpack_tensor tensor;
    void *context;
    void (*deleter)(struct dlpack_managed *self); /* may be NULL */
} dlpack_managed;

typedef struct dlpack_versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dlpack_versioned *self); /* may be NULL */
    uint64_t flags;
    dlpack_tensor tensor;
} dlpack_versioned;

enum { DLPACK_MAX_DIMS = 8 };

/* What a tensor says, once nothing in it can lead astray: its bytes lie in one row in host memory,
 * and their number and their end can be counted. */
typedef struct dlpack_array {
    void *data; /* aligned; NULL if there is nothing in it */
    int n_dims;
    int64_t shape[DLPACK_MAX_DIMS];
    size_t bytes;
} dlpack_array;

typedef enum dlpack_fault {
    DLPACK_FITS,
    DLPACK_OTHER_DEVICE,
    DLPACK_OTHER_DTYPE,
    DLPACK_BAD_RANK,
    DLPACK_NO_SHAPE, /* dimensions, but no sizes: a null pointer */
    DLPACK_NEGATIVE_SIZE,
    DLPACK_TOO_LARGE, /* more bytes, or further away, than memory has */
    DLPACK_STRIDED,
    DLPACK_NO_DATA, /* a null pointer, or as good as one */
    DLPACK_MISALIGNED
} dlpack_fault;

bool dlpack_is_host(long device_type);
/* Numbers of `code` and `size` bytes; a negative code accepts what whole bytes hold. `array` is set
 * if it fits. The first fault in the order above counts. */
dlpack_fault dlpack_check(const dlpack_tensor *tensor, int code, unsigned size,
                          dlpack_array *array);
/* The same of memory of a device, number 0 of its type. */
dlpack_fault dlpack_check_on(const dlpack_tensor *tensor, int device_type, int code, unsigned size,
                             dlpack_array *array);

#if UINTPTR_MAX == UINT64_MAX
_Static_assert(sizeof(dlpack_tensor) == 48, "DLTensor");
_Static_assert(offsetof(dlpack_tensor, n_dims) == 16, "DLTensor.ndim");
_Static_assert(offsetof(dlpack_tensor, dtype) == 20, "DLTensor.dtype");
_Static_assert(offsetof(dlpack_tensor, shape) == 24, "DLTensor.shape");
_Static_assert(offsetof(dlpack_tensor, strides) == 32, "DLTensor.strides");
_Static_assert(offsetof(dlpack_tensor, byte_offset) == 40, "DLTensor.byte_offset");
_Static_assert(offsetof(dlpack_managed, context) == 48, "DLManagedTensor.manager_ctx");
_Static_assert(offsetof(dlpack_managed, deleter) == 56, "DLManagedTensor.deleter");
_Static_assert(offsetof(dlpack_versioned, context) == 8, "DLManagedTensorVersioned.manager_ctx");
_Static_assert(offsetof(dlpack_versioned, deleter) == 16, "DLManagedTensorVersioned.deleter");
_Static_assert(offsetof(dlpack_versioned, flags) == 24, "DLManagedTensorVersioned.flags");
_Static_assert(offsetof(dlpack_versioned, tensor) == 32, "DLManagedTensorVersioned.dl_tensor");
#endif
