/* smoke_vision.h: image encoders without Python, for smoke.c: every path beside plain C, in float32
 * and in 16 bits, with weights of 8 too, which are the same but for the head.
 */
#pragma once

#include "random_model.h"

/* 9 x 9 pixels after the pooling; 2 x 2 at last: of one, every keypoint would be in its middle,
 * whatever the image */
enum { IMAGE = 33, IMAGES = 2, KEYPOINTS = 3, FEATURES = 4 };

/* of the same numbers, every time */
static inline void draw_encoder(weights *w, bool group)
{
    static const char *const stages[] = {"layer1", "layer2", "layer3", "layer4"};
    random_state = 7;
    w->n = 0;
    char name[96];
    for (int stage = -1, c_in = 3, c = 64; stage < 4; stage++, c_in = c, c = 64 << stage) {
        for (int i = 0; i < (stage < 0 ? 1 : 5); i++) {
            static const char *const convs[] = {"0.conv1", "0.conv2", "1.conv1", "1.conv2",
                                                "0.downsample"};
            static const char *const norms[] = {"0.bn1", "0.bn2", "1.bn1", "1.bn2",
                                                "0.downsample_norm"};
            if (stage == 0 && i == 4) {
                continue; /* the identity */
            }
            int side = stage < 0 ? 7 : i == 4 ? 1 : 3;
            int from = stage < 0 ? 3 : i == 0 || i == 4 ? c_in : c;
            snprintf(name, sizeof name, "%s%s%s", stage < 0 ? "conv1" : stages[stage],
                     stage < 0 ? "" : ".", stage < 0 ? "" : convs[i]);
            char part[112];
            snprintf(part, sizeof part, "%s.weight", name);
            add(w, "", part, c, from * side * side);
            tsad_tensor *t = &w->tensors[w->n - 1];
            *t = (tsad_tensor){t->name, t->data, 4, {c, from, side, side}};
            for (int j = 0; j < c * from * side * side; j++) {
                ((float *)t->data)[j] *= 2; /* so that numbers stay about 1 behind each ReLU */
            }
            if (group) {
                snprintf(name, sizeof name, "%s%s%s", stage < 0 ? "bn1" : stages[stage],
                         stage < 0 ? "" : ".", stage < 0 ? "" : norms[i]);
                add_norm(w, "", name, c);
            } else {
                snprintf(part, sizeof part, "%s.bias", name);
                add(w, "", part, c, 0);
            }
        }
    }
    add(w, "", "pool.weight", KEYPOINTS, 512);
    tsad_tensor *t = &w->tensors[w->n - 1];
    *t = (tsad_tensor){t->name, t->data, 4, {KEYPOINTS, 512, 1, 1}};
    add(w, "", "pool.bias", KEYPOINTS, 0);
    add_linear(w, "", "out", 2 * KEYPOINTS, FEATURES);
}

/* The largest difference of any path, on two threads, from plain C, which is the last; more than
 * any where the two images have the same features, and nothing is compared. */
static inline float norm_apart(int bits, bool group)
{
    static weights w;
    static uint8_t pixels[IMAGES * IMAGE * IMAGE * 3];
    static const float ones[3] = {1, 1, 1}, halves[3] = {-0.5f, -0.5f, -0.5f};
    const char *names[8];
    float features[8][IMAGES * FEATURES], worst = 0;
    int n = tsad_backend_names(names, 8);
    draw_encoder(&w, group);
    for (int i = 0; i < IMAGES * IMAGE * IMAGE * 3; i++) {
        pixels[i] = (uint8_t)(127 + 127 * uniform());
    }
    for (int i = 0; i < n; i++) {
        tsad_vision_spec spec = {.depth = 18,
                                 .bits = bits,
                                 .group_norm = group,
                                 .n_keypoints = KEYPOINTS,
                                 .height = IMAGE,
                                 .width = IMAGE,
                                 .channels = 3,
                                 .scale = ones,
                                 .offset = halves,
                                 .n_threads = 2,
                                 .backend = names[i],
                                 .tensors = w.tensors,
                                 .n_tensors = w.n};
        tsad_images images = {.bytes = pixels, .n = IMAGES};
        tsad_vision *vision;
        must(tsad_vision_create(&spec, &vision));
        must(tsad_vision_acquire(vision));
        must(tsad_vision_encode(vision, &images, features[i], NULL));
        tsad_vision_release(vision);
        tsad_vision_destroy(vision);
    }
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < IMAGES * FEATURES; j++) {
            worst = fmaxf(worst, fabsf(features[i][j] - features[n - 1][j]));
        }
    }
    float apart = 0;
    for (int j = 0; j < FEATURES; j++) {
        apart = fmaxf(apart, fabsf(features[0][j] - features[0][FEATURES + j]));
    }
    worst = apart > 1e-3f ? worst : INFINITY;
    for (int i = 0; i < w.n; i++) {
        free((void *)w.tensors[i].data);
    }
    return worst;
}

static inline bool encoders_are_near_ref(void)
{
    bool near = true;
    for (int group = 0; group < 2; group++) {
        near = near && norm_apart(32, group) <= 1e-4f && norm_apart(16, group) <= 1e-5f &&
               norm_apart(8, group) <= 1e-5f;
    }
    return near;
}
