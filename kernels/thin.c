/* LoRA's thin products on a CPU, for g groups of R ranks each:

    s = D(x) Aᵀ        dA = dsᵀ D(x)        dx += Dᵀ(ds A)        [M, K] x, dx   [M, g·R] s, ds   [g, R, K] A, dA

A BLAS is made for large products: with a few columns it reads x at a fraction of the memory's speed, and a mask takes passes of
its own. Here x is read once for all groups, sixteen rows at a time, and the mask's bits, those of fastlora.rng, are drawn where
they are used. Without D and with the columns of each group the same two loops are ds = dy B and dBᵀ = sᵀ dy.

The file is compiled once for each width of vectors (each_width.h); the machine that runs it chooses. */

#ifndef LANES

#include "cpu.h"

/* Sums of float32 are kept short: of so many rows, of so many tiles of them, and then what is lost is kept. */
enum { ROWS = 16, TILES = 16, COLUMNS = 128, WORDS = COLUMNS / 32, ROUNDS = 7 };

/* One call. What is not wanted is NULL; a mask of no planes keeps all. */
struct job {
    const float *x;
    int64_t stride, m, k; /* x's row stride; columns of a group */
    const float *a;
    float *s;
    const float *ds;
    float *dx, *da;
    const int64_t *starts; /* the first column of each group */
    int64_t g, r;
    const int64_t *rows, *groups; /* identities; rows NULL: their number */
    uint32_t key[2], j, planes;
    float factor; /* of what is kept */
};

/* What one thread has to itself: its rows, the decisions of a tile for all columns, dA of its last tiles and of all before. */
struct part {
    const struct job *job;
    int64_t first, last;
    uint32_t *words;
    float *da, *high, *low;
};

#define SELF "thin.c"
#include "each_width.h"

/* s and dA are written, dx is added to. 0, or 1 where there is no memory: then nothing was written. */
int fastlora_thin(const float *x, int64_t stride, int64_t m, int64_t k, const float *a, float *s, const float *ds, float *dx,
                  float *da, const int64_t *starts, int64_t g, int64_t r, const int64_t *rows, const int64_t *groups,
                  int64_t seed, int64_t site, int j, int planes, float factor, int threads, int lanes) {
    const struct job job = {
        x, stride, m, k, a, s, ds, dx, da, starts, g, r, rows, groups,
        {(uint32_t)seed, (uint32_t)((uint64_t)seed >> 32) ^ (uint32_t)site * 0x9E3779B9u}, (uint32_t)j, (uint32_t)planes, factor,
    };
    const int64_t tiles = (m + ROWS - 1) / ROWS, blocks = (k + COLUMNS - 1) / COLUMNS;
    const int64_t most = tiles / 8; /* threads take time to wake */
    const int n = most < 1 ? 1 : most < threads ? (int)most : threads;
    const size_t words = (size_t)blocks * WORDS * ROWS, sums = da ? (size_t)(g * r * k) : 0;
    struct part *const parts = calloc((size_t)n, sizeof *parts);
    uint32_t *const space = calloc((size_t)n * (words + 3 * sums), sizeof *space);
    if (!parts || !space) {
        free(parts), free(space);
        return 1;
    }
    for (int i = 0; i < n; i++) {
        uint32_t *const own = space + (size_t)i * (words + 3 * sums);
        float *const da = (float *)(own + words);
        const int64_t first = tiles * i / n * ROWS, last = tiles * (i + 1) / n * ROWS;
        parts[i] = (struct part){&job, first, last < m ? last : m, own, da, da + sums, da + 2 * sums};
    }
    fastlora_run(CHOOSE(pass, lanes), parts, sizeof *parts, n, threads);
    for (int i = 1; i < n; i++) {
        fastlora_settle(parts[i].high, parts[0].high, parts[0].low, sums);
        fastlora_settle(parts[i].low, parts[0].high, parts[0].low, sums);
    }
    for (size_t c = 0; c < sums; c++)
        da[c] = parts[0].high[c] + parts[0].low[c];
    free(parts), free(space);
    return 0;
}

#else /* for each width of vectors */

/* rows whose sums are kept in registers side by side */
#define ABREAST (LANES == 16 ? 4 : 2)

/* Both words of a · multiplier. */
TARGET INLINE void NAME(multiply)(const vu *a, uint32_t multiplier, vu *low, vu *high) {
#if AVX(16)
    const __m512i v = (__m512i)*a, by = _mm512_set1_epi32((int)multiplier);
    const __m512i even = _mm512_mul_epu32(v, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), by);
    *low = (vu)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
    *high = (vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif AVX(8)
    const __m256i v = (__m256i)*a, by = _mm256_set1_epi32((int)multiplier);
    const __m256i even = _mm256_mul_epu32(v, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), by);
    *low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    *high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
    for (int i = 0; i < LANES; i++) {
        const uint64_t product = (uint64_t)(*a)[i] * multiplier;
        (*low)[i] = (uint32_t)product, (*high)[i] = (uint32_t)(product >> 32);
    }
#endif
}

/* words [WORDS, ROWS]: bit j + 8 i of word w is set where column 32 w + 4 j + i of this block drops; see fastlora.rng. */
TARGET INLINE void NAME(draw)(const struct job *job, int64_t first, int64_t group, int64_t block, uint32_t *words) {
    for (int part = 0; part < ROWS; part += LANES) {
        vu less[WORDS] = {{0}};
        uint32_t ids[LANES];
        for (int i = 0; i < LANES; i++) {
            const int64_t row = first + part + i;
            ids[i] = (uint32_t)(job->rows && row < job->m ? job->rows[row] : row);
        }
        for (uint32_t plane = 0; plane < job->planes; plane++) {
            vu c[4] = {*(vu *)ids, (vu){0} + (uint32_t)block, (vu){0} + (uint32_t)group, (vu){0} + plane};
            uint32_t k0 = job->key[0], k1 = job->key[1];
            for (int round = 0; round < ROUNDS; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
                vu low0, high0, low1, high1;
                NAME(multiply)(&c[0], 0xD2511F53u, &low0, &high0);
                NAME(multiply)(&c[2], 0xCD9E8D57u, &low1, &high1);
                c[0] = high1 ^ c[1] ^ k0, c[1] = low1;
                c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
            }
            /* the numbers u < j of which this plane is a bit, as in fastlora.rng; j is odd */
            for (int w = 0; w < WORDS; w++)
                if (job->j >> plane & 1)
                    less[w] |= ~c[w];
                else
                    less[w] &= ~c[w];
        }
        for (int w = 0; w < WORDS; w++)
            *(vu *)(words + w * ROWS + part) = less[w];
    }
}

/* v where the bits of its columns, words of `draw` shifted to the first of them, are clear, else 0. */
TARGET INLINE void NAME(keep)(vf *v, uint32_t drop) {
#define FOUR(j) 1 << (j), 1 << ((j) + 8), 1 << ((j) + 16), 1 << ((j) + 24)
#if LANES == 16
    const vi bit = {FOUR(0), FOUR(1), FOUR(2), FOUR(3)};
#elif LANES == 8
    const vi bit = {FOUR(0), FOUR(1)};
#else
    const vi bit = {FOUR(0)};
#endif
#if AVX(16)
    *v = (vf)_mm512_maskz_mov_ps(_mm512_testn_epi32_mask((__m512i)bit, _mm512_set1_epi32((int)drop)), (__m512)*v);
#else
    const vi kept = (((vi){0} + (int32_t)drop) & bit) == 0;
    *v = (vf)((vi)*v & kept);
#endif
#undef FOUR
}

/* sums [rows, ranks] = x [rows, k] aᵀ of a few rows, every lane with sums of its own, of STEPS products and then of those. */
TARGET INLINE void NAME(dot)(const float *const *x, const float *a, int64_t k, const uint32_t *words, int masked, int ranks,
                             float (*sums)[4]) {
    enum { STEPS = 32 };
    vf total[ABREAST][4] = {{{0}}};
    for (size_t c = 0; c < (size_t)k;) {
        const size_t last = (size_t)k - c < STEPS * LANES ? (size_t)k : c + STEPS * LANES;
        vf sum[ABREAST][4] = {{{0}}};
        for (; c < last; c += LANES)
#pragma GCC unroll 4
            for (int row = 0; row < ABREAST; row++) {
                vf v = LOAD(x[row] + c);
                if (masked)
                    NAME(keep)(&v, words[c / 32 * ROWS + row] >> c % 32 / 4);
#pragma GCC unroll 4
                for (int rank = 0; rank < ranks; rank++)
                    sum[row][rank] += v * LOAD(a + rank * k + c);
            }
#pragma GCC unroll 4
        for (int row = 0; row < ABREAST; row++)
#pragma GCC unroll 4
            for (int rank = 0; rank < ranks; rank++)
                total[row][rank] += sum[row][rank];
    }
    for (int row = 0; row < ABREAST; row++)
        for (int rank = 0; rank < ranks; rank++)
            sums[row][rank] = NAME(sum)(&total[row][rank]);
}

/* da [ranks, columns] += dsᵀ D(x), dx += Dᵀ(ds a), of n rows. The tile is summed before it is added: sums of sums err less. */
TARGET INLINE void NAME(outer)(const struct job *job, int n, int64_t columns, const float *x, const float *a, const float *ds,
                               float *dx, float *da, const uint32_t *words, int masked, int ranks) {
    for (int64_t c = 0; c < columns; c += LANES) {
        vf sum[4] = {{0}}, own[4] = {{0}};
        if (dx)
#pragma GCC unroll 4
            for (int rank = 0; rank < ranks; rank++)
                own[rank] = LOAD(a + rank * job->k + c);
        for (int row = 0; row < n; row++) {
            const uint32_t drop = masked ? words[c / 32 * ROWS + row] >> c % 32 / 4 : 0;
            vf v = LOAD(x + row * job->stride + c), add = {0};
            if (masked)
                NAME(keep)(&v, drop);
#pragma GCC unroll 4
            for (int rank = 0; rank < ranks; rank++) {
                const vf d = SPLAT(ds[row * 4 + rank]);
                add += d * own[rank];
                sum[rank] += d * v;
            }
            if (dx) {
                if (masked)
                    NAME(keep)(&add, drop);
                STORE(dx + row * job->k + c, LOAD(dx + row * job->k + c) + add);
            }
        }
#pragma GCC unroll 4
        for (int rank = 0; rank < ranks; rank++)
            STORE(da + rank * job->k + c, LOAD(da + rank * job->k + c) + sum[rank]);
    }
}

/* The rows [first, first + n) of s for one group; ranks and masked are constants where this is inlined. */
TARGET INLINE void NAME(dots)(const struct job *job, int64_t first, int n, int64_t i, int64_t rank, const uint32_t *words,
                              int masked, int ranks) {
    const float *const x = job->x + first * job->stride + job->starts[i], *const a = job->a + (i * job->r + rank) * job->k;
    for (int row = 0; row < n; row += ABREAST) {
        const float *abreast[ABREAST];
        float sums[ABREAST][4];
        for (int q = 0; q < ABREAST; q++)
            abreast[q] = x + (row + q < n ? row + q : n - 1) * job->stride;
        NAME(dot)(abreast, a, job->k, words + row, masked, ranks, sums);
        for (int q = 0; q < ABREAST && row + q < n; q++)
            for (int c = 0; c < ranks; c++)
                job->s[(first + row + q) * job->g * job->r + i * job->r + rank + c] = sums[q][c] * job->factor;
    }
}

/* The same of dx and dA, for the columns of one block. */
TARGET INLINE void NAME(outers)(const struct part *part, int64_t first, int n, int64_t i, int64_t rank, int64_t column,
                                const uint32_t *words, int masked, int ranks) {
    const struct job *const job = part->job;
    const int64_t wide = job->k - column, place = (i * job->r + rank) * job->k + column;
    const float *const x = job->x + first * job->stride + job->starts[i] + column, *const a = job->a + place;
    float ds[ROWS * 4];
    for (int row = 0; row < n; row++)
        for (int c = 0; c < ranks; c++)
            ds[row * 4 + c] = job->ds[(first + row) * job->g * job->r + i * job->r + rank + c] * job->factor;
    if (job->dx)
        NAME(outer)(job, n, wide < COLUMNS ? wide : COLUMNS, x, a, ds, job->dx + first * job->k + column, part->da + place, words,
                    masked, ranks);
    else
        NAME(outer)(job, n, wide < COLUMNS ? wide : COLUMNS, x, a, ds, NULL, part->da + place, words, masked, ranks);
}

#define SOME(call, ...)                                                                                                       \
    do                                                                                                                        \
        switch (some * 2 + masked) {                                                                                          \
        case 2: call(__VA_ARGS__, 0, 1); break;                                                                               \
        case 3: call(__VA_ARGS__, 1, 1); break;                                                                               \
        case 4: call(__VA_ARGS__, 0, 2); break;                                                                               \
        case 5: call(__VA_ARGS__, 1, 2); break;                                                                               \
        case 8: call(__VA_ARGS__, 0, 4); break;                                                                               \
        case 9: call(__VA_ARGS__, 1, 4); break;                                                                               \
        }                                                                                                                     \
    while (0)

/* All rows of a part, a tile at a time, ranks by fours, twos and ones. */
TARGET static void NAME(pass)(void *given) {
    const struct part *const part = given;
    const struct job *const job = part->job;
    const int masked = job->planes > 0;
    const int64_t blocks = (job->k + COLUMNS - 1) / COLUMNS;
    for (int64_t first = part->first; first < part->last; first += ROWS) {
        const int n = part->last - first < ROWS ? (int)(part->last - first) : ROWS;
        if (job->s)
            for (int64_t i = 0; i < job->g; i++) {
                for (int64_t block = 0; masked && block < blocks; block++)
                    NAME(draw)(job, first, job->groups[i], block, part->words + block * WORDS * ROWS);
                for (int64_t rank = 0, some; rank < job->r; rank += some) {
                    some = job->r - rank >= 4 ? 4 : job->r - rank >= 2 ? 2 : 1;
                    SOME(NAME(dots), job, first, n, i, rank, part->words);
                }
            }
        if (job->da) /* all groups of a block before the next, which stays in the first cache */
            for (int64_t block = 0; block < blocks; block++)
                for (int64_t i = 0; i < job->g; i++) {
                    if (masked)
                        NAME(draw)(job, first, job->groups[i], block, part->words);
                    for (int64_t rank = 0, some; rank < job->r; rank += some) {
                        some = job->r - rank >= 4 ? 4 : job->r - rank >= 2 ? 2 : 1;
                        SOME(NAME(outers), part, first, n, i, rank, block * COLUMNS, part->words);
                    }
                }
        if (job->da && (first + ROWS >= part->last || (first - part->first) / ROWS % TILES == TILES - 1))
            fastlora_settle(part->da, part->high, part->low, (size_t)(job->g * job->r * job->k));
    }
}

#undef SOME
#undef ABREAST

#endif
