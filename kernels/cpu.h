/* What the CPU kernels share: names for each width of vectors, and threads. */

#ifndef FASTLORA_CPU_H
#define FASTLORA_CPU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(stem) JOIN(stem, LANES)

/* -DPORTABLE=16 compiles this one width, for any machine: slow, so that every machine can test it. */
#if !defined(__x86_64__) && !defined(PORTABLE)
#define PORTABLE 4
#endif
/* whether vectors of so many floats have instructions of their own */
#ifdef PORTABLE
#define AVX(lanes) 0
#else
#define AVX(lanes) (LANES == (lanes))
#endif

/* run(&parts[i]) for each i < n on so many threads; parts are `size` bytes each. Where one cannot start, others do its work. */
void fastlora_run(void (*run)(void *), void *parts, size_t size, int n, int threads);

/* high + low += sums, which begin anew: n long sums of float32. A few of their terms at a time are first summed in `sums`. */
void fastlora_settle(float *sums, float *high, float *low, size_t n);

/* the function named `stem`, by the width of vectors */
#ifdef PORTABLE
#define CHOOSE(stem, lanes) ((void)(lanes), JOIN(stem, PORTABLE))
#else
#define CHOOSE(stem, lanes) ((lanes) == 16 ? stem##_16 : (lanes) == 8 ? stem##_8 : stem##_4)
#endif

#endif
