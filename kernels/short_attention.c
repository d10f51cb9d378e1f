/* Attention over short sequences on a CPU, packed end to end:

    P = softmax(q kᵀ / √d)    o = P v        dv = Pᵀ do    dS = P ∘ (do vᵀ − rowsum(P ∘ do vᵀ)) / √d    dq = dS k    dk = dSᵀ q

A sequence and a head at a time: P fits into the first cache, so that q, k, v are read once and only the results are written.
Sequences lie in runs of equal length. Before them there may be a prefix, a causal sequence of its own that all of them read.

The file is compiled once for each width of vectors (each_width.h); the machine that runs it chooses. */

#ifndef LANES

#include "cpu.h"

/* One call. Forward writes out; backward, where dy is not NULL, dq, dk and dv. Strides are of rows, in floats. */
struct job {
    const float *q, *k, *v, *dy;
    float *out, *dq, *dk, *dv;
    int64_t q_stride, k_stride, out_stride, dq_stride, dk_stride; /* k's are v's too, out's are dy's, dk's are dv's */
    int64_t heads, d, prefix;
    const int64_t *runs; /* (count, length) of each */
    int64_t n_runs;
    int causal, pooled; /* pooled: one query a sequence, which reads all of it */
};

/* What one thread has to itself: sequences that begin in these rows (counted without the prefix), and space. */
struct part {
    const struct job *job;
    int64_t first, last, wide; /* wide: the most keys, in whole vectors of 16 */
    float *p, *dp;             /* [wide, wide] */
    float *k, *v;              /* [wide, d], with the prefix before */
    float *dk, *dv;            /* [prefix, heads · d] each, of the prefix and the last sequences */
    float *high, *low;         /* [2, prefix, heads · d], of all before */
};

#define SELF "short_attention.c"
#include "each_width.h"

/* 0, or 1 where there is no memory: then nothing was written. */
int fastlora_attend(const float *q, int64_t q_stride, const float *k, const float *v, int64_t k_stride, float *out,
                    const float *dy, int64_t out_stride, float *dq, int64_t dq_stride, float *dk, float *dv,
                    int64_t dk_stride, int64_t heads, int64_t d, int64_t prefix, const int64_t *runs, int64_t n_runs, int causal,
                    int pooled, int threads, int lanes) {
    const struct job job = {q,         k,         v,     dy, out,    dq,   dk,     dv,     q_stride, k_stride, out_stride,
                            dq_stride, dk_stride, heads, d,  prefix, runs, n_runs, causal, pooled};
    int64_t longest = 0, rows = 0;
    for (int64_t i = 0; i < n_runs; i++) {
        longest = runs[2 * i + 1] > longest ? runs[2 * i + 1] : longest;
        rows += runs[2 * i] * runs[2 * i + 1];
    }
    const int64_t wide = (prefix + longest + 15) / 16 * 16, most = rows * heads * d / 16384; /* threads take time to wake */
    const int n = most < 1 ? 1 : most < threads ? (int)most : threads;
    const size_t square = (size_t)(wide * wide), tall = (size_t)(wide * d), shared = dy ? (size_t)(prefix * heads * d) : 0;
    const size_t each = 2 * square + 2 * tall + 6 * shared;
    struct part *const parts = calloc((size_t)n, sizeof *parts);
    float *const space = calloc((size_t)n * each, sizeof *space);
    if (!parts || !space) {
        free(parts), free(space);
        return 1;
    }
    for (int i = 0; i < n; i++) {
        float *p = space + (size_t)i * each;
        struct part *const part = &parts[i];
        *part = (struct part){&job, rows * i / n, rows * (i + 1) / n, wide,
                              NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
        part->k = p, p += tall;
        part->v = p, p += tall;
        part->p = p, p += square;
        part->dp = p, p += square;
        part->dk = p, part->dv = p + shared, p += 2 * shared;
        part->high = p, part->low = p + 2 * shared;
    }
    if (prefix && !pooled)
        CHOOSE(attend_prefix, lanes)(&parts[0]);
    fastlora_run(CHOOSE(attend, lanes), parts, sizeof *parts, n, threads);
    for (int i = 1; i < n; i++) {
        fastlora_settle(parts[i].high, parts[0].high, parts[0].low, 2 * shared);
        fastlora_settle(parts[i].low, parts[0].high, parts[0].low, 2 * shared);
    }
    for (int64_t row = 0; dy && row < prefix; row++)
        for (int64_t c = 0; c < heads * d; c++) {
            float *const to_k = dk + row * dk_stride + c, *const to_v = dv + row * dk_stride + c;
            if (pooled) /* else the prefix' own rows were there first */
                *to_k = *to_v = 0;
            const float *const high = parts[0].high + row * heads * d + c, *const low = parts[0].low + row * heads * d + c;
            *to_k += *high + *low;
            *to_v += high[shared] + low[shared];
        }
    free(parts), free(space);
    return 0;
}

#else /* for each width of vectors */

/* vectors of a row of C that are kept in registers, for four rows */
#define VECTORS (LANES == 8 ? 2 : 4)

/* C [rows, LANES · vectors] = A B, or added to it: A's element (r, i) at a[r · ar + i · ai], first ≤ i < last. */
TARGET INLINE void NAME(block)(int rows, int vectors, int64_t first, int64_t last, const float *a, int64_t ar, int64_t ai,
                               const float *b, int64_t bs, float *c, int64_t cs, int add) {
    vf sum[4][4] = {{{0}}};
    for (int64_t i = first; i < last; i++)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const vf factor = SPLAT(a[r * ar + i * ai]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[r][v] += factor * LOAD(b + i * bs + v * LANES);
        }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *const to = c + r * cs + v * LANES;
            if (add)
                sum[r][v] += LOAD(to);
            STORE(to, sum[r][v]);
        }
}

/* C [m, width] = A [m, n] B [n, width]; width in whole vectors. Where A is a triangle, what is 0 is left out: below > 0 says that
   row r holds nothing from r + below on, below < 0 that it holds nothing before r + 1 + below. */
TARGET static void NAME(product)(int64_t m, int64_t n, int64_t width, const float *a, int64_t ar, int64_t ai, const float *b,
                                 int64_t bs, float *c, int64_t cs, int64_t below, int add) {
    for (int64_t r = 0, rows; r < m; r += rows) {
        rows = m - r >= 4 ? 4 : 1;
        const int64_t first = below < 0 && r + 1 + below > 0 ? r + 1 + below : 0;
        const int64_t last = below > 0 && r + rows - 1 + below < n ? r + rows - 1 + below : n;
        for (int64_t column = 0, some; column < width; column += some * LANES) {
            some = (width - column) / LANES < VECTORS ? (width - column) / LANES : VECTORS;
            const float *const ra = a + r * ar, *const cb = b + column;
            float *const to = c + r * cs + column;
            switch (some * 8 + rows) {
            case 9: NAME(block)(1, 1, first, last, ra, ar, ai, cb, bs, to, cs, add); break;
            case 17: NAME(block)(1, 2, first, last, ra, ar, ai, cb, bs, to, cs, add); break;
            case 25: NAME(block)(1, 3, first, last, ra, ar, ai, cb, bs, to, cs, add); break;
            case 33: NAME(block)(1, 4, first, last, ra, ar, ai, cb, bs, to, cs, add); break;
            case 12: NAME(block)(4, 1, first, last, ra, ar, ai, cb, bs, to, cs, add); break;
            case 20: NAME(block)(4, 2, first, last, ra, ar, ai, cb, bs, to, cs, add); break;
            case 28: NAME(block)(4, 3, first, last, ra, ar, ai, cb, bs, to, cs, add); break;
            case 36: NAME(block)(4, 4, first, last, ra, ar, ai, cb, bs, to, cs, add); break;
            }
        }
    }
}

/* e^x for x ≤ 0, to two units in the last place: 2^n e^r with |r| ≤ ln 2 / 2, Cephes' polynomial. */
TARGET INLINE void NAME(exponential)(vf *x) {
    const vf low = SPLAT(-87.0f), at_least = (vf)(((vi)*x & (*x > low)) | ((vi)low & ~(*x > low)));
    /* adding 1.5 · 2^23 rounds to a whole number, which then stands in the lowest bits; NaN goes through *x below */
    const vf shifted = at_least * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const vf r = at_least - n * 0.693359375f + n * 2.12194440e-4f;
    vf e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    e = e * (vf)(((vi)shifted - 0x4B400000 + 127) << 23);
    const vi number = *x == *x;
    *x = (vf)(((vi)e & number) | ((vi)*x & ~number));
}

/* which of the keys LANES · block … are among the first n */
TARGET INLINE void NAME(among)(vi *kept, int64_t block, int64_t n) {
    vi column;
    for (int i = 0; i < LANES; i++)
        column[i] = (int32_t)(block * LANES + i);
    *kept = column < (int32_t)n;
}

/* p [n] = softmax(factor · p) over the first `keys`; the rest is 0. */
TARGET INLINE void NAME(softmax)(float *p, int64_t n, int64_t keys, float factor) {
    vf most = SPLAT(-INFINITY), total = {0};
    for (int64_t c = 0; c < n; c += LANES) {
        vi kept;
        NAME(among)(&kept, c / LANES, keys);
        const vf score = (vf)(((vi)(LOAD(p + c) * factor) & kept) | ((vi)SPLAT(-INFINITY) & ~kept));
        STORE(p + c, score);
        const vi more = score > most;
        most = (vf)(((vi)score & more) | ((vi)most & ~more));
    }
    const float largest = NAME(fold)(&most, 1);
    for (int64_t c = 0; c < n; c += LANES) {
        vi kept;
        NAME(among)(&kept, c / LANES, keys);
        vf e = LOAD(p + c) - largest;
        NAME(exponential)(&e);
        e = (vf)((vi)e & kept);
        total += e;
        STORE(p + c, e);
    }
    const float over = 1.0f / NAME(sum)(&total);
    for (int64_t c = 0; c < n; c += LANES)
        STORE(p + c, LOAD(p + c) * over);
}

/* Brings n rows of d floats to the second cache: a head's rows lie too far apart for the machine to guess what comes next. */
TARGET INLINE void NAME(fetch)(const float *x, int64_t stride, int64_t n, int64_t d) {
    for (int64_t row = 0; row < n; row++)
        for (int64_t c = 0; c < d; c += 16)
            __builtin_prefetch(x + row * stride + c, 0, 1);
}

/* The sums over their lanes of four vectors, in every quarter a part of each. */
TARGET INLINE void NAME(quarter)(const vf *sums, vf *quarters) {
#if AVX(16)
    const __m512 a = (__m512)sums[0], b = (__m512)sums[1], c = (__m512)sums[2], d = (__m512)sums[3];
    const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    *quarters = (vf)((__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd));
#elif AVX(8)
    const __m256 a = (__m256)sums[0], b = (__m256)sums[1], c = (__m256)sums[2], d = (__m256)sums[3];
    const __m256d ab = (__m256d)(_mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b));
    const __m256d cd = (__m256d)(_mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d));
    *quarters = (vf)((__m256)_mm256_unpacklo_pd(ab, cd) + (__m256)_mm256_unpackhi_pd(ab, cd));
#else
    for (int i = 0; i < LANES; i++) {
        const int at = i / 4 * 4;
        (*quarters)[i] = (sums[i % 4][at] + sums[i % 4][at + 2]) + (sums[i % 4][at + 1] + sums[i % 4][at + 3]);
    }
#endif
}

/* The quarters of four times LANES / 4 vectors, added up: one number of each vector, in order. */
TARGET INLINE void NAME(gather)(const vf *quarters, vf *sums) {
#if AVX(16)
    const __m512 a = (__m512)quarters[0], b = (__m512)quarters[1], c = (__m512)quarters[2], d = (__m512)quarters[3];
    const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xDD);
    const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x88) + _mm512_shuffle_f32x4(c, d, 0xDD);
    *sums = (vf)(_mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xDD));
#elif AVX(8)
    const __m256 a = (__m256)quarters[0], b = (__m256)quarters[1];
    *sums = (vf)(_mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31));
#else
    for (int i = 0; i < LANES; i++) {
        float part[LANES / 4];
        for (int quarter = 0; quarter < LANES / 4; quarter++)
            part[quarter] = quarters[i / 4 % (LANES / 4)][quarter * 4 + i % 4];
        for (int n = LANES / 8; n; n /= 2)
            for (int j = 0; j < n; j++)
                part[j] = part[2 * j] + part[2 * j + 1];
        (*sums)[i] = part[0];
    }
#endif
}

/* to [rows, n] = q kᵀ of one or two rows q [rows, d] and n rows of k, in whole vectors: what lies beyond n means nothing. */
TARGET INLINE void NAME(dots)(int rows, const float *q, int64_t q_stride, const float *k, int64_t stride, int64_t n, int64_t d,
                              float *to, int64_t wide) {
    for (int64_t first = 0; first < n; first += LANES) {
        vf quarters[2][LANES / 4] = {{{0}}};
        for (int64_t i = 0; i < LANES && first + i < n; i += 4) {
            const float *key[4];
            vf sums[2][4] = {{{0}}};
            for (int c = 0; c < 4; c++)
                key[c] = k + (first + i + c < n ? first + i + c : n - 1) * stride;
            for (int64_t c = 0; c < d; c += LANES)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const vf column = LOAD(key[j] + c);
#pragma GCC unroll 2
                    for (int row = 0; row < rows; row++)
                        sums[row][j] += LOAD(q + row * q_stride + c) * column;
                }
            for (int row = 0; row < rows; row++)
                NAME(quarter)(sums[row], &quarters[row][i / 4]);
        }
        for (int row = 0; row < rows; row++) {
            vf sums;
            NAME(gather)(quarters[row], &sums);
            STORE(to + row * wide + first, sums);
        }
    }
}

/* The same of all rows; where causal, row r reads r + `shared` + 1 of the n keys. */
TARGET INLINE void NAME(scores)(int64_t m, const float *q, int64_t q_stride, const float *k, int64_t stride, int64_t n, int64_t d,
                                float *to, int64_t wide, int64_t shared, int causal) {
    int64_t row = 0;
    for (; row + 2 <= m; row += 2)
        NAME(dots)(2, q + row * q_stride, q_stride, k, stride, causal ? shared + row + 2 : n, d, to + row * wide, wide);
    if (row < m)
        NAME(dots)(1, q + row * q_stride, q_stride, k, stride, causal ? shared + row + 1 : n, d, to + row * wide, wide);
}

/* What comes next is read and written: the next head of this sequence, or the first head of the next. */
TARGET INLINE void NAME(fetch_next)(const struct job *job, int64_t head, int64_t q_row, int64_t queries, int64_t k_row,
                                    int64_t own) {
    const int64_t last = head + 1 == job->heads, d = job->d, at = last ? 0 : (head + 1) * d;
    const int64_t q = (q_row + last * queries) * job->q_stride + at, k = (k_row + last * own) * job->k_stride + at;
    const int64_t out = (q_row + last * queries) * job->out_stride + at;
    NAME(fetch)(job->q + q, job->q_stride, queries, d);
    NAME(fetch)(job->k + k, job->k_stride, own, d);
    NAME(fetch)(job->v + k, job->k_stride, own, d);
    NAME(fetch)((job->dy ? job->dy : job->out) + out, job->out_stride, queries, d);
    if (job->dy) {
        const int64_t dq = (q_row + last * queries) * job->dq_stride + at, dk = (k_row + last * own) * job->dk_stride + at;
        NAME(fetch)(job->dq + dq, job->dq_stride, queries, d);
        NAME(fetch)(job->dk + dk, job->dk_stride, own, d);
        NAME(fetch)(job->dv + dk, job->dk_stride, own, d);
    }
}

/* One head of one sequence: `queries` rows of q from q_row on read `shared` rows of the prefix and `own` rows from k_row on. */
TARGET static void NAME(one)(const struct part *part, int64_t head, int64_t q_row, int64_t queries, int64_t k_row, int64_t own,
                             int64_t shared, int causal) {
    const struct job *const job = part->job;
    const int64_t d = job->d, keys = shared + own, wide = part->wide, n = (keys + LANES - 1) / LANES * LANES, at = head * d;
    const float *const q = job->q + q_row * job->q_stride + at;
    const float *k = job->k + k_row * job->k_stride + at, *v = job->v + k_row * job->k_stride + at;
    const float factor = 1.0f / sqrtf((float)d);
    NAME(fetch_next)(job, head, q_row, queries, k_row, own);
    int64_t ks = job->k_stride;
    if (shared) {
        for (int64_t row = 0; row < keys; row++) {
            const int64_t from = (row < shared ? row : k_row + row - shared) * ks + at;
            memcpy(part->k + row * d, job->k + from, (size_t)d * sizeof *k);
            memcpy(part->v + row * d, job->v + from, (size_t)d * sizeof *v);
        }
        k = part->k, v = part->v, ks = d;
    }
    NAME(scores)(queries, q, job->q_stride, k, ks, keys, d, part->p, wide, shared, causal);
    for (int64_t row = 0; row < queries; row++)
        NAME(softmax)(part->p + row * wide, n, causal ? shared + row + 1 : keys, factor);
    const int64_t lower = causal ? shared + 1 : 0;
    if (!job->dy) {
        float *const out = job->out + q_row * job->out_stride + at;
        NAME(product)(queries, keys, d, part->p, wide, 1, v, ks, out, job->out_stride, lower, 0);
        return;
    }
    const float *const dy = job->dy + q_row * job->out_stride + at;
    const int64_t past = causal ? -1 : 0;
    float *const dk = job->dk + k_row * job->dk_stride + at, *const dv = job->dv + k_row * job->dk_stride + at;
    NAME(scores)(queries, dy, job->out_stride, v, ks, keys, d, part->dp, wide, shared, causal);
    for (int64_t row = 0; row < queries; row++) {
        float *const p = part->p + row * wide, *const dp = part->dp + row * wide;
        const int64_t readable = causal ? shared + row + 1 : keys;
        vf total = {0};
        for (int64_t c = 0; c < n; c += LANES) {
            vi kept;
            NAME(among)(&kept, c / LANES, readable);
            total += (vf)((vi)(LOAD(p + c) * LOAD(dp + c)) & kept);
        }
        const float row_sum = NAME(sum)(&total);
        for (int64_t c = 0; c < n; c += LANES) {
            vi kept;
            NAME(among)(&kept, c / LANES, readable);
            STORE(dp + c, (vf)((vi)((LOAD(dp + c) - row_sum) * LOAD(p + c) * factor) & kept));
        }
    }
    NAME(product)(queries, keys, d, part->dp, wide, 1, k, ks, job->dq + q_row * job->dq_stride + at, job->dq_stride, lower, 0);
    /* what the prefix gets is summed over sequences; its keys are all read by every query */
    if (shared) {
        const int64_t width = job->heads * d;
        NAME(product)(shared, queries, d, part->dp, 1, wide, q, job->q_stride, part->dk + at, width, 0, 1);
        NAME(product)(shared, queries, d, part->p, 1, wide, dy, job->out_stride, part->dv + at, width, 0, 1);
    }
    NAME(product)(own, queries, d, part->dp + shared, 1, wide, q, job->q_stride, dk, job->dk_stride, past, 0);
    NAME(product)(own, queries, d, part->p + shared, 1, wide, dy, job->out_stride, dv, job->dk_stride, past, 0);
}

/* The prefix, a causal sequence of its own. */
TARGET static void NAME(attend_prefix)(const struct part *part) {
    for (int64_t head = 0; head < part->job->heads; head++)
        NAME(one)(part, head, 0, part->job->prefix, 0, part->job->prefix, 0, 1);
}

/* All sequences of a part. */
TARGET static void NAME(attend)(void *given) {
    const struct part *const part = given;
    const struct job *const job = part->job;
    const size_t shared = job->dy ? (size_t)(2 * job->prefix * job->heads * job->d) : 0;
    int64_t row = 0, sequence = 0, unsettled = 0;
    for (int64_t run = 0; run < job->n_runs; run++) {
        const int64_t length = job->runs[2 * run + 1];
        for (int64_t i = 0; i < job->runs[2 * run]; i++, row += length, sequence++) {
            if (row < part->first || row >= part->last)
                continue;
            const int64_t at = job->prefix + row;
            for (int64_t head = 0; head < job->heads; head++)
                NAME(one)(part, head, job->pooled ? sequence : at, job->pooled ? 1 : length, at, length, job->prefix,
                          job->causal && !job->pooled);
            if (++unsettled % 16 == 0)
                fastlora_settle(part->dk, part->high, part->low, shared);
        }
    }
    fastlora_settle(part->dk, part->high, part->low, shared);
}

#undef VECTORS

#endif
