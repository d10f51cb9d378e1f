/* Vectors of LANES floats, loaded from and stored to any address. */

typedef float NAME(floats) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#ifndef LOAD
#define vf NAME(floats)
#define vi NAME(ints)
#define vu NAME(words)
#define LOAD(p) (*(const vf *)(p))
#define STORE(p, v) (*(vf *)(p) = (v))
#define SPLAT(f) ((f) - (vf){0})
#endif

/* The sum of a vector's numbers, or the largest of them. */
TARGET INLINE float NAME(fold)(const vf *v, int largest) {
#if AVX(16)
    return largest ? _mm512_reduce_max_ps((__m512)*v) : _mm512_reduce_add_ps((__m512)*v);
#else
    float half[LANES];
    memcpy(half, v, sizeof half);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) {
            const float a = half[i], b = half[i + width];
            half[i] = !largest ? a + b : a > b ? a : b;
        }
    return half[0];
#endif
}

TARGET INLINE float NAME(sum)(const vf *v) { return NAME(fold)(v, 0); }
