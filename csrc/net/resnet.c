/* resnet.c: ResNet-18 and ResNet-34 as image encoders, a list of nodes over grids.
 *
 *   image -> 7x7 / 2, ReLU -> max 3x3 / 2 -> 4 layers of blocks -> 1x1 (K) -> softmax over pixels:
 *   each keypoint's expected x and y -> linear, ReLU where it is asked for -> features
 *
 * A block is two 3x3 convolutions beside the identity, or beside a 1x1 of stride 2 in the first
 * block of the layers 2 to 4. Tensor names are torchvision's (conv1, layer1.0.conv1, with GroupNorm
 * layer1.0.bn1, layer2.0.downsample and downsample_norm), then pool.weight, pool.bias,
 * pool.temperature (), out.weight, out.bias. Sums of a convolution start from the identity, where
 * no GroupNorm stands between: the two grids of a layer are enough, and a third with GroupNorm.
 * With 16 bits, or 8, the trunk's convolutions are rounded, and what they read is, once for all of
 * them.
 */
#include "../vision.h"
#include "net.h"

#include <stdio.h>
#include <string.h>

enum { N_LAYERS = 4, MAX_TENSORS = 256, STEM = 64 };
/* one pixel for a window of 3, one more for outputs that are computed two by two */
enum { HALO = 2 };

typedef struct builder {
    const tsad_vision_spec *spec;
    tsad_vision *v;
    bool used[MAX_TENSORS];
} builder;

/* A tensor of exactly this shape; *out is NULL where an optional one is missing. */
static tsad_status take(builder *b, const char *layer, const char *part, bool optional, int n_dims,
                        const int64_t *shape, const float **out)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", layer, part);
    const tsad_tensor *tensors = b->spec->tensors;
    const tsad_tensor *found = tsad_find(tensors, b->spec->n_tensors, name);
    *out = NULL;
    if (found) {
        b->used[found - tensors] = true;
    } else if (optional) {
        return TSAD_OK;
    }
    tsad_tensors from = {.list = tensors, .n = b->spec->n_tensors};
    return tsad_take_shape(from, name, n_dims, shape, out);
}

static tsad_status check_all_used(const builder *b)
{
    for (int i = 0; i < b->spec->n_tensors; i++) {
        if (!b->used[i]) {
            return tsad_fail(TSAD_ARGUMENT,
                             "tensor '%s': expected those of a ResNet-%d with %s, got one more; "
                             "remove it, or correct depth and norm",
                             b->spec->tensors[i].name, b->spec->depth,
                             b->spec->group_norm ? "GroupNorm" : "BatchNorm folded");
        }
    }
    return TSAD_OK;
}

static int add_grid(builder *b, int height, int width, int channels, int halo)
{
    tsad_vision *v = b->v;
    v->grids[v->n_grids] = (tsad_grid){.height = height,
                                       .width = width,
                                       .channels = channels,
                                       .halo = halo,
                                       .ld = tsad_pad(channels)};
    return v->n_grids++;
}

/* as grid `in` after a window of this size and stride */
static int add_grid_after(builder *b, int in, int kernel, int stride, int channels, int halo)
{
    const tsad_grid *g = &b->v->grids[in];
    int pad = kernel / 2;
    return add_grid(b, (g->height + 2 * pad - kernel) / stride + 1,
                    (g->width + 2 * pad - kernel) / stride + 1, channels, halo);
}

static tsad_grid_node *add_node(builder *b, tsad_grid_kind kind, int in, int out)
{
    tsad_grid_node *node = &b->v->nodes[b->v->n_nodes++];
    *node = (tsad_grid_node){.kind = kind, .in = in, .out = out, .residual = -1};
    node->kernel = node->stride = 1;
    return node;
}

static tsad_status add_conv(builder *b, const char *name, int in, int out, int kernel, int stride,
                            bool needs_bias, tsad_grid_node **node)
{
    int64_t c_out = b->v->grids[out].channels;
    int64_t shape[4] = {c_out, b->v->grids[in].channels, kernel, kernel};
    *node = add_node(b, TSAD_GRID_CONV, in, out);
    (*node)->kernel = kernel;
    (*node)->stride = stride;
    (*node)->pad = kernel / 2;
    (*node)->rounded = b->v->grids[in].rounded;
    (*node)->bytes = b->spec->bits == 8 && in > 0; /* the first's are few, and see the pixels */
    TSAD_TRY(take(b, name, "weight", false, 4, shape, &(*node)->weight));
    return take(b, name, "bias", !needs_bias, 1, &c_out, &(*node)->bias);
}

/* A convolution into `out` and what follows it. With GroupNorm its own output goes to `raw`;
 * `residual` is -1 or `out`. */
static tsad_status add_conv_norm(builder *b, const char *conv, const char *norm, int in, int raw,
                                 int out, int residual, int kernel, int stride, bool relu)
{
    bool group = b->spec->group_norm;
    tsad_grid_node *node;
    TSAD_TRY(add_conv(b, conv, in, group ? raw : out, kernel, stride, !group, &node));
    if (group) {
        int64_t channels = b->v->grids[out].channels;
        node = add_node(b, TSAD_GRID_NORM, raw, out);
        TSAD_TRY(take(b, norm, "weight", false, 1, &channels, &node->weight));
        TSAD_TRY(take(b, norm, "bias", false, 1, &channels, &node->bias));
    }
    node->residual = residual;
    node->relu = relu;
    return TSAD_OK;
}

/* What the node before made is read by the trunk's convolutions. */
static void add_rounding(builder *b, int grid)
{
    if (b->spec->bits < 32) {
        b->v->grids[grid].rounded = true;
        add_node(b, TSAD_GRID_ROUND, grid, grid);
    }
}

/* The blocks of a layer, from grid *at on; *at becomes their output. */
static tsad_status add_layer(builder *b, int layer, int n_blocks, int *at)
{
    int stride = layer > 1 ? 2 : 1, channels = STEM << (layer - 1);
    int same = layer > 1 ? add_grid_after(b, *at, 3, stride, channels, HALO) : *at;
    int between = add_grid_after(b, *at, 3, stride, channels, HALO);
    int raw = b->spec->group_norm ? add_grid_after(b, *at, 3, stride, channels, 0) : -1;
    char conv[48], norm[48];
    for (int i = 0; i < n_blocks; i++, stride = 1) {
        snprintf(conv, sizeof conv, "layer%d.%d.conv1", layer, i);
        snprintf(norm, sizeof norm, "layer%d.%d.bn1", layer, i);
        TSAD_TRY(add_conv_norm(b, conv, norm, *at, between, between, -1, 3, stride, true));
        add_rounding(b, between);
        if (stride > 1) {
            snprintf(conv, sizeof conv, "layer%d.%d.downsample", layer, i);
            snprintf(norm, sizeof norm, "layer%d.%d.downsample_norm", layer, i);
            TSAD_TRY(add_conv_norm(b, conv, norm, *at, same, same, -1, 1, stride, false));
            *at = same;
        }
        snprintf(conv, sizeof conv, "layer%d.%d.conv2", layer, i);
        snprintf(norm, sizeof norm, "layer%d.%d.bn2", layer, i);
        TSAD_TRY(add_conv_norm(b, conv, norm, between, raw, same, same, 3, 1, true));
        if (layer < N_LAYERS || i < n_blocks - 1) {
            add_rounding(b, same);
        }
    }
    return TSAD_OK;
}

/* spatial softmax and the linear layer */
static tsad_status add_head(builder *b, int at)
{
    const tsad_vision_spec *s = b->spec;
    tsad_grid_node *node;
    int logits = add_grid_after(b, at, 1, 1, s->n_keypoints, 0);
    TSAD_TRY(add_conv(b, "pool", at, logits, 1, 1, true, &node));
    node->rounded = node->bytes = false; /* keypoints are sharp, and this is little work */
    int points = add_grid(b, 1, 1, 2 * s->n_keypoints, 0);
    node = add_node(b, TSAD_GRID_KEYPOINTS, logits, points);
    const float *temperature;
    TSAD_TRY(take(b, "pool", "temperature", true, 0, (int64_t[]){0}, &temperature));
    node->temperature = temperature ? *temperature : 1;
    if (!(node->temperature > 0)) {
        return tsad_fail(TSAD_ARGUMENT,
                         "tensor 'pool.temperature': expected more than 0, got %g; correct it",
                         (double)node->temperature);
    }
    const tsad_tensor *bias = tsad_find(s->tensors, s->n_tensors, "out.bias");
    if (!bias || bias->n_dims != 1 || bias->shape[0] < 1 || bias->shape[0] > 1 << 20) {
        return tsad_fail(TSAD_SHAPE, "tensor 'out.bias': expected shape (features,), got %s",
                         bias ? "another one" : "none");
    }
    int64_t shape[2] = {bias->shape[0], 2 * s->n_keypoints};
    int features = add_grid(b, 1, 1, (int)shape[0], 0);
    node = add_node(b, TSAD_GRID_CONV, points, features);
    node->relu = s->relu;
    TSAD_TRY(take(b, "out", "weight", false, 2, shape, &node->weight));
    return take(b, "out", "bias", false, 1, shape, &node->bias);
}

tsad_status tsad_net_resnet(const tsad_vision_spec *spec, tsad_vision *v)
{
    static const int blocks[2][N_LAYERS] = {{2, 2, 2, 2}, {3, 4, 6, 3}};
    builder b = {.spec = spec, .v = v};
    if (spec->n_tensors > MAX_TENSORS) {
        return tsad_fail(TSAD_ARGUMENT,
                         "tensors: expected at most %d, got %d; pass the encoder's "
                         "alone",
                         MAX_TENSORS, spec->n_tensors);
    }
    int image = add_grid(&b, spec->height, spec->width, spec->channels, 3);
    v->grids[image].ld = spec->channels;
    v->grids[image].rounded = spec->bits < 32;
    int stem = add_grid_after(&b, image, 7, 2, STEM, 0);
    TSAD_TRY(add_conv_norm(&b, "conv1", "bn1", image, stem, stem, -1, 7, 2, true));
    int at = add_grid_after(&b, stem, 3, 2, STEM, HALO);
    tsad_grid_node *pool = add_node(&b, TSAD_GRID_MAXPOOL, stem, at);
    pool->kernel = TSAD_POOL;
    pool->stride = 2;
    pool->pad = 1;
    add_rounding(&b, at);
    for (int layer = 1; layer <= N_LAYERS; layer++) {
        TSAD_TRY(add_layer(&b, layer, blocks[spec->depth == 34][layer - 1], &at));
    }
    TSAD_TRY(add_head(&b, at));
    TSAD_TRY(check_all_used(&b));
    /* after the shapes, which say how many numbers there are */
    return tsad_check_tensors(spec->tensors, spec->n_tensors);
}
