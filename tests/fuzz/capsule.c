/* capsule.c: fuzzes dlpack_check, which decides whether a stranger's DLPack tensor may be read.
 *
 * The input fills in a tensor: sizes and strides in blocks that are exactly as long as the tensor
 * says, numbers in a block of their own, so that AddressSanitizer sees a read too far. The verdict
 * is compared with one of 128-bit integers, and what is accepted and lies in the block is read.
 *
 * README.md has the command. Without libFuzzer (-DALONE, any compiler) it runs the files that it
 * is given and deterministic changes of them: fuzz-capsule ROUNDS FILE...
 */
#include "dlpack.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef __int128 wide;

/* What an input says, in this order; what is missing is 0. */
typedef struct input {
    uint8_t asked_code, asked_size; /* 255: any */
    uint8_t flags;
    uint8_t block; /* bytes of numbers, times 16 */
    int32_t device_type, n_dims;
    uint8_t code, bits;
    uint16_t lanes;
    uint64_t byte_offset, data; /* data: an address, or an offset into the block */
    int64_t shape[DLPACK_MAX_DIMS], strides[DLPACK_MAX_DIMS];
} input;

enum { NO_SHAPE = 1, NO_STRIDES = 2, NO_DATA = 4, OUTSIDE = 8 };

static void expect(bool right, const char *what)
{
    if (!right) {
        fprintf(stderr, "wrong: %s\n", what);
        abort();
    }
}

/* An exact copy, so long as the tensor says; nothing of a rank that is refused unseen. */
static int64_t *numbers(const int64_t *values, int32_t n)
{
    size_t bytes = n > 0 && n <= DLPACK_MAX_DIMS ? (size_t)n * sizeof *values : 0;
    int64_t *copy = malloc(bytes ? bytes : 1);
    if (!copy) {
        exit(1);
    }
    memcpy(copy, values, bytes);
    return copy;
}

/* May it be read? Bytes, if so. */
static bool is_readable(const dlpack_tensor *t, int code, unsigned size, wide *bytes)
{
    const wide most = PTRDIFF_MAX, end = UINTPTR_MAX;
    wide item = (wide)t->dtype.bits * t->dtype.lanes, all = 1, expected = 1, at;
    bool empty = false, row = true;
    *bytes = 0;
    if (t->device_type != 1 && t->device_type != 3 && t->device_type != 11) {
        return false;
    }
    if (code >= 0 && (t->dtype.code != code || t->dtype.bits != 8 * size || t->dtype.lanes != 1)) {
        return false;
    }
    if (item <= 0 || item % 8 || t->n_dims < 0 || t->n_dims > DLPACK_MAX_DIMS ||
        (t->n_dims > 0 && !t->shape)) {
        return false;
    }
    item /= 8;
    for (int i = t->n_dims - 1; i >= 0; i--) {
        if (t->shape[i] < 0) {
            return false;
        }
        empty |= t->shape[i] == 0;
        row &= !t->strides || t->shape[i] == 1 || t->strides[i] == expected;
        expected *= t->shape[i];
        all *= t->shape[i] ? t->shape[i] : 1;
        if (all * item > most) {
            return false;
        }
    }
    if (empty) {
        return true;
    }
    *bytes = all * item;
    at = (wide)(uintptr_t)t->data + t->byte_offset;
    wide alignment = item & -item;
    return row && t->data && t->byte_offset <= (uint64_t)most && at >= 4096 && at + *bytes <= end &&
           at % alignment == 0;
}

static void run(const input *in)
{
    size_t room = (size_t)in->block * 16;
    char *block = malloc(room ? room : 1);
    int64_t *shape = numbers(in->shape, in->n_dims), *strides = numbers(in->strides, in->n_dims);
    if (!block) {
        exit(1);
    }
    memset(block, 1, room ? room : 1);
    char *data = in->flags & OUTSIDE ? (char *)(uintptr_t)in->data
                                     : block + (room ? in->data % (room + 1) : 0);
    dlpack_tensor t = {
        .data = in->flags & NO_DATA ? NULL : data,
        .device_type = in->device_type,
        .n_dims = in->n_dims,
        .dtype = {in->code, in->bits, in->lanes},
        .shape = in->flags & NO_SHAPE ? NULL : shape,
        .strides = in->flags & NO_STRIDES ? NULL : strides,
        .byte_offset = in->byte_offset,
    };
    int code = in->asked_code == 255 ? -1 : in->asked_code;
    unsigned size = in->asked_size;
    dlpack_array array = {0};
    wide bytes;
    bool readable = is_readable(&t, code, size, &bytes);
    dlpack_fault fault = dlpack_check(&t, code, size, &array);
    expect((fault == DLPACK_FITS) == readable, "the verdict");
    if (readable) {
        const char *first = array.data;
        expect(array.bytes == (size_t)bytes && array.n_dims == t.n_dims, "the sizes");
        expect(!bytes == !first, "the data");
        for (int i = 0; i < array.n_dims; i++) {
            expect(array.shape[i] == t.shape[i], "a size");
        }
        if (bytes && first >= block && first <= block + room &&
            array.bytes <= (size_t)(block + room - first)) {
            size_t sum = 0;
            for (size_t i = 0; i < array.bytes; i++) {
                sum += (size_t)first[i];
            }
            expect(sum == array.bytes, "the numbers");
        }
    }
    free(block);
    free(shape);
    free(strides);
}

int LLVMFuzzerTestOneInput(const uint8_t *content, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *content, size_t size)
{
    input in;
    memset(&in, 0, sizeof in);
    memcpy(&in, content, size < sizeof in ? size : sizeof in);
    run(&in);
    return 0;
}

#ifdef ALONE
static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

/* Set a field of 1, 2, 4 or 8 bytes to something near a limit, or a bit to its opposite. */
static void change(uint8_t *content, uint64_t *state)
{
    static const uint64_t limits[] = {0, 1, 2, 3, 4, 8, 32, 255, UINT64_MAX, INT64_MAX};
    size_t at = next(state) % sizeof(input), width = (size_t)1 << next(state) % 4;
    uint64_t value = limits[next(state) % (sizeof limits / sizeof *limits)] - next(state) % 2;
    switch (next(state) % 4) {
    case 0:
        content[at] ^= (uint8_t)(1u << next(state) % 8);
        return;
    case 1:
        value = (uint64_t)1 << next(state) % 64;
        break;
    default:
        break;
    }
    at -= at % width;
    memcpy(content + at, &value, at + width <= sizeof(input) ? width : sizeof(input) - at);
}

int main(int n_args, char **args)
{
    long rounds = n_args > 1 ? atol(args[1]) : 0, ran = 0;
    uint64_t state = 88172645463325252u;
    for (int i = 2; i < n_args; i++) {
        uint8_t seed[sizeof(input)] = {0}, content[sizeof(input)];
        FILE *file = fopen(args[i], "rb");
        size_t size = file ? fread(seed, 1, sizeof seed, file) : 0;
        if (!file || !size || fclose(file)) {
            fprintf(stderr, "%s: cannot be read\n", args[i]);
            return 1;
        }
        for (long round = 0; round <= rounds; round++, ran++) {
            memcpy(content, seed, sizeof seed);
            for (uint64_t n = round ? 1 + next(&state) % 6 : 0; n > 0; n--) {
                change(content, &state);
            }
            LLVMFuzzerTestOneInput(content, sizeof content);
        }
    }
    printf("%ld inputs\n", ran);
    return 0;
}
#endif
