/* Which vectors this machine has, and threads: those of torch's own pool where that is GNU's OpenMP, as they wait for work in a
   busy loop and would take a core from ours; else threads of one call. */

#include "cpu.h"

#include <pthread.h>

/* The widest vectors of this machine, at most so many floats: 16, 8 or 4. */
int fastlora_lanes(int most) {
#ifdef PORTABLE
    (void)most;
    return PORTABLE;
#else
    if (most >= 16 && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return 16;
    if (most >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 8;
    return 4;
#endif
}

void fastlora_settle(float *sums, float *high, float *low, size_t n) {
    for (size_t i = 0; i < n; i++) { /* what the rounded sum lost, exactly: Knuth, TAOCP vol. 2, 4.2.2, theorem B */
        const float total = high[i] + sums[i], added = total - high[i];
        const float lost = (high[i] - (total - added)) + (sums[i] - added);
        low[i] += lost == lost ? lost : 0; /* of an infinite sum it is NaN */
        high[i] = total, sums[i] = 0;
    }
}

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

/* GOMP_parallel of the OpenMP that torch runs on, or NULL. */
void fastlora_parallel(void *of_torch) { parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))of_torch; }

struct crowd {
    void (*run)(void *);
    char *parts;
    size_t size;
    int n, next;
};

/* One thread of a crowd: parts until none is left. */
static void work(void *given) {
    struct crowd *const crowd = given;
    for (int i; (i = __atomic_fetch_add(&crowd->next, 1, __ATOMIC_RELAXED)) < crowd->n;)
        crowd->run(crowd->parts + (size_t)i * crowd->size);
}

static void *enter(void *crowd) {
    work(crowd);
    return NULL;
}

void fastlora_run(void (*run)(void *), void *parts, size_t size, int n, int threads) {
    enum { MOST = 256 };
    struct crowd crowd = {run, parts, size, n, 0};
    if (n > 1 && parallel) { /* always the whole pool: OpenMP ends threads that a smaller team leaves out */
        parallel(work, &crowd, (unsigned)threads, 0);
        return;
    }
    pthread_t ids[MOST];
    int started = 0;
    while (started < n - 1 && started < MOST && pthread_create(&ids[started], NULL, enter, &crowd) == 0)
        started++;
    work(&crowd);
    while (started)
        pthread_join(ids[--started], NULL);
}
