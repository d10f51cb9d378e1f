/* Includes SELF once for each width of vectors, with LANES floats in one: AVX-512, AVX2, and what any machine can do. */

#ifndef PORTABLE
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma")))
#include "vectors.h"
#include SELF
#undef LANES
#undef TARGET
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#include "vectors.h"
#include SELF
#undef LANES
#undef TARGET
#define LANES 4
#else
#define LANES PORTABLE
#endif
#define TARGET
#include "vectors.h"
#include SELF
#undef LANES
#undef TARGET
