/* vision.c: an image encoder's life: a specification checked, its nodes built, and packed by a
 * backend; then immutable but for the memory that an encoding runs in.
 */
#include "vision.h"
#include "backend.h"

#include <string.h>

enum { MAX_THREADS = 64, MAX_KEYPOINTS = 4096 };

static tsad_status check_spec(const tsad_vision_spec *s)
{
    const struct {
        const char *name;
        int value, most;
    } sizes[] = {
        {"height", s->height, TSAD_MAX_IMAGE},        {"width", s->width, TSAD_MAX_IMAGE},
        {"channels", s->channels, TSAD_MAX_CHANNELS}, {"keypoints", s->n_keypoints, MAX_KEYPOINTS},
        {"threads", s->n_threads, MAX_THREADS},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most) {
            return tsad_fail(TSAD_ARGUMENT, "%s: expected 1 to %d, got %d; correct it",
                             sizes[i].name, sizes[i].most, sizes[i].value);
        }
    }
    if (s->depth != 18 && s->depth != 34) {
        return tsad_fail(TSAD_ARGUMENT,
                         "depth: expected 18 or 34, got %d; deeper ResNets have other blocks",
                         s->depth);
    }
    if (s->bits != 32 && s->bits != 16 && s->bits != 8) {
        return tsad_fail(TSAD_ARGUMENT, "bits: expected 32, 16 or 8, got %d; correct it", s->bits);
    }
    TSAD_TRY(tsad_check_numbers("scale", s->scale, (size_t)s->channels));
    return tsad_check_numbers("offset", s->offset, (size_t)s->channels);
}

static tsad_status find_backend(const char *name, tsad_vision *v)
{
    TSAD_TRY(tsad_backend_choose(name, &v->backend));
    if (!v->backend->open_vision) {
        return tsad_fail(TSAD_ARGUMENT,
                         "backend: expected one that encodes images, got '%s'; leave it out, and "
                         "the CPU does",
                         v->backend->name);
    }
    return TSAD_OK;
}

static tsad_status build(const tsad_vision_spec *spec, tsad_vision *v)
{
    TSAD_TRY(check_spec(spec));
    TSAD_TRY(find_backend(spec->backend, v));
    v->n_threads = spec->n_threads;
    v->n_keypoints = spec->n_keypoints;
    memcpy(v->scale, spec->scale, sizeof(float) * (size_t)spec->channels);
    memcpy(v->offset, spec->offset, sizeof(float) * (size_t)spec->channels);
    TSAD_TRY(tsad_net_resnet(spec, v));
    v->n_features = v->grids[v->n_grids - 1].channels;
    TSAD_TRY(v->backend->open_vision(v, v->n_threads, &v->eye));
    for (int i = 0; i < v->n_nodes; i++) {
        v->nodes[i].weight = v->nodes[i].bias = NULL; /* the caller's: packed, and gone */
    }
    return TSAD_OK;
}

tsad_status tsad_vision_create(const tsad_vision_spec *spec, tsad_vision **out)
{
    tsad_vision *v = tsad_allocate(sizeof *v);
    *out = NULL;
    if (!v) {
        return tsad_fail(TSAD_MEMORY, "out of memory for an image encoder");
    }
    tsad_status status = build(spec, v);
    if (status != TSAD_OK) {
        tsad_vision_destroy(v);
        return status;
    }
    *out = v;
    return TSAD_OK;
}

void tsad_vision_destroy(tsad_vision *v)
{
    if (v && v->eye) {
        v->backend->close_vision(v->eye);
    }
    tsad_deallocate(v);
}

tsad_vision_info tsad_vision_get_info(const tsad_vision *v)
{
    tsad_vision_info info = {.n_features = v->n_features,
                             .n_keypoints = v->n_keypoints,
                             .height = v->grids[0].height,
                             .width = v->grids[0].width,
                             .channels = v->grids[0].channels,
                             .n_threads = v->n_threads,
                             .backend = v->backend->name};
    v->backend->size_vision(v->eye, &info.weight_bytes, &info.bytes);
    info.bytes += sizeof *v;
    return info;
}

tsad_status tsad_vision_acquire(tsad_vision *v)
{
    int idle = 0;
    if (!atomic_compare_exchange_strong(&v->busy, &idle, 1)) {
        return tsad_fail(TSAD_BUSY, "the image encoder is at work in another thread; it is used by "
                                    "one thread at a time: make another one");
    }
    return TSAD_OK;
}

void tsad_vision_release(tsad_vision *v) { atomic_store(&v->busy, 0); }

tsad_status tsad_vision_encode(tsad_vision *v, const tsad_images *images, float *features,
                               const tsad_interrupt *interrupt)
{
    tsad_status status = v->backend->see(v->eye, images, features, interrupt);
    if (status == TSAD_INTERRUPTED) {
        return tsad_fail(status, "interrupted while encoding images; the features are not all "
                                 "there");
    }
    return status;
}
