/* The end of a cycle over dense tensors on a CPU: each operation reads an element once and writes it once.
 *
 * A list is cut into parts of at most a few ten thousand elements; `parts` is int64 [n, 6], a row for each: addresses
 * of param, anchor and drift estimate (0: none), number of elements, bytes per element (4: float32, 2: bfloat16), index
 * of its tensor in the list. Threads take parts in turn. Arithmetic is float32, each product and sum of what is written
 * fused, as torch's own kernels have it; nothing depends on the number of threads.
 */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) /* chosen when loaded */
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, RUN = 1024, COLUMNS = 6, MOST_THREADS = 256 }; /* a run's sums are float32, longer ones double */

typedef uint16_t bfloat16;

INLINE float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE float load_float(const float *x) { return *x; }
INLINE float load_bfloat16(const bfloat16 *x) { return bits_float((uint32_t)*x << 16); }
INLINE float store_float(float *to, float x) { return *to = x; }

INLINE float store_bfloat16(bfloat16 *to, float x) { /* to the nearest, ties to even; returns what was stored */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *to = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bfloat16)rounded;
    return load_bfloat16(to);
}

/* <D, V>, <D, D>, <V, V>, <E, E> of one part, added to `out`. */
#define SUMS(T)                                                                                                        \
    INLINE void add_##T(const T *p, const T *a, const T *v, int has_v, int64_t n, double *out) {                       \
        for (int64_t start = 0; start < n; start += RUN) {                                                             \
            int64_t end = start + RUN < n ? start + RUN : n, i = start;                                                \
            float dv[LANES] = {0}, dd[LANES] = {0}, vv[LANES] = {0}, ee[LANES] = {0};                                  \
            for (; i + LANES <= end; i += LANES)                                                                       \
                for (int l = 0; l < LANES; l++) {                                                                      \
                    float e = load_##T(p + i + l), d = e - load_##T(a + i + l);                                        \
                    float w = has_v ? load_##T(v + i + l) : 0;                                                         \
                    dv[l] += d * w, dd[l] += d * d, vv[l] += w * w, ee[l] += e * e;                                    \
                }                                                                                                      \
            for (int l = 0; i < end; i++, l++) {                                                                       \
                float e = load_##T(p + i), d = e - load_##T(a + i), w = has_v ? load_##T(v + i) : 0;                   \
                dv[l] += d * w, dd[l] += d * d, vv[l] += w * w, ee[l] += e * e;                                        \
            }                                                                                                          \
            for (int l = 0; l < LANES; l++) out[0] += dv[l], out[1] += dd[l], out[2] += vv[l], out[3] += ee[l];        \
        }                                                                                                              \
    }                                                                                                                  \
    CLONES static void sums_##T(const T *p, const T *a, const T *v, int64_t n, double *out) {                          \
        if (v) add_##T(p, a, v, 1, n, out);                                                                            \
        else add_##T(p, a, v, 0, n, out);                                                                              \
    }

/* p += ratio (p - a); a = p. */
#define JUMP(T)                                                                                                        \
    CLONES static void jump_##T(T *restrict p, T *restrict a, int64_t n, float ratio) {                                \
        if (ratio == 0) memcpy(a, p, n * sizeof(T)); /* 0 d + p would lose the sign of -0.0 */                         \
        else for (int64_t i = 0; i < n; i++) {                                                                         \
            float e = load_##T(p + i);                                                                                 \
            store_##T(a + i, store_##T(p + i, fmaf(e - load_##T(a + i), ratio, e)));                                   \
        }                                                                                                              \
    }

/* d = p - a; v = lerp(v, d, weight), in the form that torch uses; a = p - retreat d. */
#define RETREAT(T)                                                                                                     \
    INLINE void retreat_loop_##T(const T *restrict p, T *restrict a, T *restrict v, int returns, int64_t n,            \
                                 float retreat, float weight) {                                                        \
        int small = weight < 0.5f;                                                                                     \
        float part = small ? weight : weight - 1.0f;                                                                   \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            float e = load_##T(p + i), d = e - load_##T(a + i), w = load_##T(v + i);                                   \
            store_##T(v + i, fmaf(d - w, part, small ? w : d));                                                        \
            if (returns) e = fmaf(d, -retreat, e); /* 0 d + e would lose the sign of -0.0 */                           \
            store_##T(a + i, e);                                                                                       \
        }                                                                                                              \
    }                                                                                                                  \
    CLONES static void retreat_##T(const T *p, T *a, T *v, int64_t n, float retreat, float weight) {                   \
        if (retreat == 0) retreat_loop_##T(p, a, v, 0, n, retreat, weight);                                            \
        else retreat_loop_##T(p, a, v, 1, n, retreat, weight);                                                         \
    }

/* p = a + ratio v. */
#define TRIAL(T)                                                                                                       \
    CLONES static void trial_##T(T *restrict p, const T *restrict a, const T *restrict v, int64_t n, float ratio) {    \
        if (ratio == 0) memcpy(p, a, n * sizeof(T));                                                                   \
        else for (int64_t i = 0; i < n; i++) store_##T(p + i, fmaf(load_##T(v + i), ratio, load_##T(a + i)));          \
    }

SUMS(float)
SUMS(bfloat16)
JUMP(float)
JUMP(bfloat16)
RETREAT(float)
RETREAT(bfloat16)
TRIAL(float)
TRIAL(bfloat16)

typedef enum { SUM, JUMP, RETREAT, TRY, ANCHOR } operation;

typedef struct {
    operation operation;
    const int64_t *parts;
    int64_t n, first, stride;
    double *partials;     /* SUM: [n, 4] */
    const float *factors; /* of each tensor, JUMP and TRY: ratio [T]; RETREAT: retreat, weight [T, 2] */
} work;

static void do_part(const work *w, int64_t i) {
    const int64_t *row = w->parts + i * COLUMNS, n = row[3], index = row[5];
    void *p = (void *)row[0], *a = (void *)row[1], *v = (void *)row[2];
    const float *f = w->factors;
    int wide = row[4] == 4;
    switch (w->operation) {
    case SUM:
        if (wide) sums_float(p, a, v, n, w->partials + 4 * i);
        else sums_bfloat16(p, a, v, n, w->partials + 4 * i);
        break;
    case JUMP:
        if (wide) jump_float(p, a, n, f[index]);
        else jump_bfloat16(p, a, n, f[index]);
        break;
    case RETREAT:
        if (wide) retreat_float(p, a, v, n, f[2 * index], f[2 * index + 1]);
        else retreat_bfloat16(p, a, v, n, f[2 * index], f[2 * index + 1]);
        break;
    case TRY:
        if (wide) trial_float(p, a, v, n, f[index]);
        else trial_bfloat16(p, a, v, n, f[index]);
        break;
    case ANCHOR:
        memcpy(a, p, n * row[4]);
    }
}

static void *work_through(void *argument) {
    const work *w = argument;
    for (int64_t i = w->first; i < w->n; i += w->stride) do_part(w, i);
    return NULL;
}

static void share(work w, int64_t threads) {
    pthread_t others[MOST_THREADS];
    work shares[MOST_THREADS];
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > w.n) threads = w.n;
    int64_t started = 1;
    for (int64_t i = 0; i < threads; i++) {
        shares[i] = w;
        shares[i].first = i;
        shares[i].stride = threads;
    }
    while (started < threads && !pthread_create(&others[started], NULL, work_through, &shares[started])) started++;
    for (int64_t i = started; i < threads; i++) work_through(&shares[i]); /* the system gave no more threads */
    if (threads > 0) work_through(&shares[0]);
    for (int64_t i = 1; i < started; i++) pthread_join(others[i], NULL);
}

/* `partials`: double [n, 4], zeros; `sums`: double [T, 4], zeros. */
void extraopt_cycle_sums(const int64_t *parts, int64_t n, int64_t threads, double *partials, double *sums) {
    share((work){.operation = SUM, .parts = parts, .n = n, .partials = partials}, threads);
    for (int64_t i = 0; i < n; i++)
        for (int j = 0; j < 4; j++) sums[4 * parts[i * COLUMNS + 5] + j] += partials[4 * i + j];
}

void extraopt_plain_jump(const int64_t *parts, int64_t n, int64_t threads, const float *factors) {
    share((work){.operation = JUMP, .parts = parts, .n = n, .factors = factors}, threads);
}

void extraopt_retreat(const int64_t *parts, int64_t n, int64_t threads, const float *factors) {
    share((work){.operation = RETREAT, .parts = parts, .n = n, .factors = factors}, threads);
}

void extraopt_trial(const int64_t *parts, int64_t n, int64_t threads, const float *factors) {
    share((work){.operation = TRY, .parts = parts, .n = n, .factors = factors}, threads);
}

void extraopt_anchor(const int64_t *parts, int64_t n, int64_t threads) {
    share((work){.operation = ANCHOR, .parts = parts, .n = n}, threads);
}
