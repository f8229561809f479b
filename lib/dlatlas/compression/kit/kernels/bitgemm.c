/* Products of vectors of signs, packed 64 to a word (bit 1: +1, bit 0: -1; bits beyond the vector are 0), on one thread.

   Everything rests on one routine, `differing`: in how many bits a row differs from eight others. Processors with AVX-512 VPOPCNTDQ
   count the bits of 512 at once; elsewhere the compiler's population count of a word is used. Both give the same integers. */

#include <stdint.h>
#include <stdlib.h>

#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define WIDE 1
#endif

#define EXPORT __attribute__((visibility("default")))
#define ROWS 8      /* rows of the second factor that are handled together */
#define MAX_BITS 4  /* of a multi-bit code */
#define AHEAD 8192  /* bytes: about one block of rows, which arrives from memory while the one before it is at work */

EXPORT int wide(void) {
#ifdef WIDE
    return 1;
#else
    return 0;
#endif
}

/* --- differing bits ------------------------------------------------------------------------------------------------------------- */

#ifdef WIDE

static inline __m512i differing_lanes(const uint64_t *a, const uint64_t *b, int64_t words) {
    __m512i sum = _mm512_setzero_si512();
    int64_t w = 0;
    for (; w + 8 <= words; w += 8) {
        _mm_prefetch((const char *)(b + w) + AHEAD, _MM_HINT_T0);
        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(_mm512_loadu_si512(a + w), _mm512_loadu_si512(b + w))));
    }
    if (w < words) {
        __mmask8 rest = (__mmask8)((1u << (words - w)) - 1);
        __m512i x = _mm512_xor_si512(_mm512_maskz_loadu_epi64(rest, a + w), _mm512_maskz_loadu_epi64(rest, b + w));
        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(x));
    }
    return sum;
}

static inline int32_t differing_one(const uint64_t *a, const uint64_t *b, int64_t words) {
    return (int32_t)_mm512_reduce_add_epi64(differing_lanes(a, b, words));
}

/* Pairs of 128-bit lanes added: those of x in the lower half, those of y in the upper one. */
static inline __m512i add_lanes(__m512i x, __m512i y) {
    return _mm512_add_epi64(_mm512_shuffle_i64x2(x, y, 0x88), _mm512_shuffle_i64x2(x, y, 0xdd));
}

static inline void differing(const uint64_t *a, const uint64_t *b, int64_t stride, int64_t words, int32_t *out) {
    __m512i s[ROWS], pair[4];
    for (int r = 0; r < ROWS; r++) /* row after row: the memory is read in its order */
        s[r] = differing_lanes(a, b + r * stride, words);
    /* Eight sums over eight lanes, as a transposition that adds. */
    for (int r = 0; r < 4; r++)
        pair[r] = _mm512_add_epi64(_mm512_unpacklo_epi64(s[2 * r], s[2 * r + 1]), _mm512_unpackhi_epi64(s[2 * r], s[2 * r + 1]));
    __m512i all = add_lanes(add_lanes(pair[0], pair[1]), add_lanes(pair[2], pair[3]));
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi64_epi32(all));
}

#else

static inline int32_t differing_one(const uint64_t *a, const uint64_t *b, int64_t words) {
    int64_t sum = 0;
    for (int64_t w = 0; w < words; w++) sum += __builtin_popcountll(a[w] ^ b[w]);
    return (int32_t)sum;
}

static inline void differing(const uint64_t *a, const uint64_t *b, int64_t stride, int64_t words, int32_t *out) {
    for (int r = 0; r < ROWS; r++) out[r] = differing_one(a, b + r * stride, words);
}

#endif

/* Rows of `a` that fit into the second-level cache beside the rows of `b` at work. */
static inline int64_t block_of(int64_t words) {
    int64_t rows = 32768 / (words ? words : 1);
    return rows > 0 ? rows : 1;
}

/* out[m][k] = n - 2 * differing(a[m], b[k]) */
EXPORT void xnor_gemm(const uint64_t *a, const uint64_t *b, int64_t M, int64_t N, int64_t words, int32_t n, int32_t *out) {
    int64_t block = block_of(words);
    for (int64_t m0 = 0; m0 < M; m0 += block) {
        int64_t m1 = m0 + block < M ? m0 + block : M;
        int64_t k = 0;
        for (; k + ROWS <= N; k += ROWS)
            for (int64_t m = m0; m < m1; m++) {
                int32_t d[ROWS];
                differing(a + m * words, b + k * words, words, words, d);
                for (int r = 0; r < ROWS; r++) out[m * N + k + r] = n - 2 * d[r];
            }
        for (; k < N; k++)
            for (int64_t m = m0; m < m1; m++) out[m * N + k] = n - 2 * differing_one(a + m * words, b + k * words, words);
    }
}

/* Up to eight outputs of one row of `a`; inlined with a constant number of rows, so that the loops over them become vectors. */
static inline __attribute__((always_inline)) void combine(const uint64_t *a, const float *beta, int64_t ka, const uint64_t *b,
                                                          const float *alpha, int64_t kb, int64_t rows, int64_t words, int32_t n,
                                                          float *out) {
    float total[ROWS] = {0};
    for (int64_t i = 0; i < kb; i++) {
        float part[ROWS] = {0};
        for (int64_t j = 0; j < ka; j++) {
            int32_t d[ROWS];
            if (rows == ROWS)
                differing(a + j * words, b + i * words, kb * words, words, d);
            else
                for (int64_t r = 0; r < rows; r++) d[r] = differing_one(a + j * words, b + (r * kb + i) * words, words);
            for (int64_t r = 0; r < rows; r++) part[r] += beta[j] * (float)(n - 2 * d[r]);
        }
        for (int64_t r = 0; r < rows; r++) total[r] += alpha[r * kb + i] * part[r];
    }
    for (int64_t r = 0; r < rows; r++) out[r] = total[r];
}

/* out[m][k] = sum_ij alpha[k][i] beta[m][j] (n - 2 * differing(a[m][j], b[k][i])), with `ka` codes a row of a and `kb` a row of b */
EXPORT void multibit_gemm(const uint64_t *a, const float *beta, int64_t ka, const uint64_t *b, const float *alpha, int64_t kb, int64_t M,
                          int64_t N, int64_t words, int32_t n, float *out) {
    int64_t block = block_of(words * ka);
    for (int64_t m0 = 0; m0 < M; m0 += block) {
        int64_t m1 = m0 + block < M ? m0 + block : M;
        int64_t k = 0;
        for (; k + ROWS <= N; k += ROWS)
            for (int64_t m = m0; m < m1; m++)
                combine(a + m * ka * words, beta + m * ka, ka, b + k * kb * words, alpha + k * kb, kb, ROWS, words, n, out + m * N + k);
        if (k < N)
            for (int64_t m = m0; m < m1; m++)
                combine(a + m * ka * words, beta + m * ka, ka, b + k * kb * words, alpha + k * kb, kb, N - k, words, n, out + m * N + k);
    }
}

/* --- packing -------------------------------------------------------------------------------------------------------------------- */

static inline int64_t words_of(int64_t n) { return (n + 63) / 64; }

/* Bit 1 where x > 0. */
EXPORT void pack_positive(const float *x, int64_t rows, int64_t n, uint64_t *out) {
    for (int64_t r = 0; r < rows; r++, x += n)
        for (int64_t i = 0; i < n; i += 64) {
            uint64_t word = 0;
            int64_t count = n - i < 64 ? n - i : 64, l = 0;
#ifdef WIDE
            for (; l + 16 <= count; l += 16)
                word |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(x + i + l), _mm512_setzero_ps(), _CMP_GT_OQ) << l;
#endif
            for (; l < count; l++) word |= (uint64_t)(x[i + l] > 0) << l;
            *out++ = word;
        }
}

/* Bit 1 where z >= threshold of its column. */
EXPORT void pack_reached(const int32_t *z, const int32_t *threshold, int64_t rows, int64_t n, uint64_t *out) {
    for (int64_t r = 0; r < rows; r++, z += n)
        for (int64_t i = 0; i < n; i += 64) {
            uint64_t word = 0;
            int64_t count = n - i < 64 ? n - i : 64, l = 0;
#ifdef WIDE
            for (; l + 16 <= count; l += 16)
                word |= (uint64_t)_mm512_cmpge_epi32_mask(_mm512_loadu_si512(z + i + l), _mm512_loadu_si512(threshold + i + l)) << l;
#endif
            for (; l < count; l++) word |= (uint64_t)(z[i + l] >= threshold[i + l]) << l;
            *out++ = word;
        }
}

/* Eight planes [8][rows][words]: plane b holds bit b of every byte. */
EXPORT void pack_planes(const uint8_t *x, int64_t rows, int64_t n, uint64_t *out) {
    int64_t words = words_of(n), plane = rows * words;
    for (int64_t r = 0; r < rows; r++, x += n)
        for (int64_t w = 0; w < words; w++, out++) {
            int64_t count = n - 64 * w < 64 ? n - 64 * w : 64;
#ifdef WIDE
            __mmask64 part = count == 64 ? ~(__mmask64)0 : ((__mmask64)1 << count) - 1;
            __m512i bytes = _mm512_maskz_loadu_epi8(part, x + 64 * w);
            for (int b = 0; b < 8; b++) out[b * plane] = _mm512_test_epi8_mask(bytes, _mm512_set1_epi8((char)(1 << b)));
#else
            uint64_t word[8] = {0};
            for (int64_t l = 0; l < count; l++)
                for (int b = 0; b < 8; b++) word[b] |= (uint64_t)(x[64 * w + l] >> b & 1) << l;
            for (int b = 0; b < 8; b++) out[b * plane] = word[b];
#endif
        }
}

/* --- alternating quantisation of rows ------------------------------------------------------------------------------------------- */

/* A code of k signs is a level; with the levels symmetric about 0 it is enough to look at |x| and at h = 2^(k-1) intervals, which the
   ascending thresholds cut[0..h-2] separate. Interval c has the signs sign[c][0..k-1]; a negative x has the opposite ones. */
typedef struct {
    int k, h;
    double alpha[MAX_BITS], cut[8], count[8], sum[8];
    int sign[8][MAX_BITS];
} Grid;

typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));

/* How many |x| reach each threshold and what they add up to; then the same for each interval. */
static void tally(Grid *g, const float *x, int64_t n) {
    double count[9] = {0}, sum[9] = {0};
    for (int c = 0; c < g->h; c++) {
        double cut = c ? g->cut[c - 1] : 0.0; /* every |x| reaches 0 */
        Doubles sums = {0};
        Longs counts = {0};
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) {
            Floats part;
            __builtin_memcpy(&part, x + i, sizeof part);
            Doubles v = __builtin_convertvector(part, Doubles);
            v = (Doubles)((Longs)v & INT64_MAX); /* clears the sign */
            Longs reached = v >= cut;
            sums += (Doubles)((Longs)v & reached);
            counts -= reached;
        }
        for (int l = 0; l < 8; l++) sum[c] += sums[l], count[c] += (double)counts[l];
        for (; i < n; i++) {
            double v = __builtin_fabs((double)x[i]);
            if (v >= cut) sum[c] += v, count[c] += 1;
        }
    }
    for (int c = 0; c < g->h; c++) g->sum[c] = sum[c] - sum[c + 1], g->count[c] = count[c] - count[c + 1];
}

static double level(const Grid *g, int c) {
    double s = 0;
    for (int i = 0; i < g->k; i++) s += g->alpha[i] * g->sign[c][i];
    return s;
}

/* One sign after the other: every interval is cut at its level, and the next alpha is the mean distance from it. */
static void greedy(Grid *g, const float *x, int64_t n, int bits) {
    g->k = g->h = 1;
    g->sign[0][0] = 1;
    tally(g, x, n);
    g->alpha[0] = g->sum[0] / n;
    while (g->k < bits) {
        Grid old = *g;
        for (int c = 0; c < old.h; c++) {
            double low = c ? old.cut[c - 1] : 0, at = level(&old, c);
            if (at < low) at = low;
            if (c < old.h - 1 && at > old.cut[c]) at = old.cut[c];
            g->cut[2 * c] = at;
            if (c < old.h - 1) g->cut[2 * c + 1] = old.cut[c];
            for (int side = 0; side < 2; side++) {
                for (int i = 0; i < old.k; i++) g->sign[2 * c + side][i] = old.sign[c][i];
                g->sign[2 * c + side][old.k] = side ? 1 : -1;
            }
        }
        g->h = 2 * old.h;
        tally(g, x, n);
        double distance = 0;
        for (int c = 0; c < g->h; c++) distance += __builtin_fabs(g->sum[c] - g->count[c] * level(&old, c / 2));
        g->alpha[g->k++] = distance / n;
    }
}

/* Least squares for alpha with the codes fixed. Equal codes make the system singular; the ridge, far below rounding error of the
   result, then leads to the shortest solution. */
static void solve(Grid *g, int64_t n) {
    double G[MAX_BITS][MAX_BITS + 1] = {{0}};
    int k = g->k;
    for (int i = 0; i < k; i++) {
        for (int c = 0; c < g->h; c++) {
            for (int j = 0; j < k; j++) G[i][j] += g->count[c] * g->sign[c][i] * g->sign[c][j];
            G[i][k] += g->sum[c] * g->sign[c][i];
        }
        G[i][i] += 1e-8 * n;
    }
    for (int p = 0; p < k; p++) /* positive definite: no pivoting */
        for (int i = p + 1; i < k; i++) {
            double f = G[i][p] / G[p][p];
            for (int j = p; j <= k; j++) G[i][j] -= f * G[p][j];
        }
    for (int i = k - 1; i >= 0; i--) {
        double s = G[i][k];
        for (int j = i + 1; j < k; j++) s -= G[i][j] * g->alpha[j];
        g->alpha[i] = s / G[i][i];
    }
    for (int i = 0; i < k; i++) g->alpha[i] = __builtin_fabs(g->alpha[i]); /* the code turns round: all codes are assigned anew */
}

/* Every x gets the nearest level: of each pair of opposite codes the one that is not below 0, sorted; the cuts are half-way. */
static void assign(Grid *g) {
    double at[8];
    for (int c = 0; c < g->h; c++) {
        int sign[MAX_BITS] = {1};
        for (int i = 1; i < g->k; i++) sign[i] = c >> (i - 1) & 1 ? 1 : -1;
        double s = 0;
        for (int i = 0; i < g->k; i++) s += g->alpha[i] * sign[i];
        int flip = s < 0 ? -1 : 1, place = c;
        s *= flip;
        for (; place > 0 && at[place - 1] > s; place--) { /* insertion sort */
            at[place] = at[place - 1];
            for (int i = 0; i < g->k; i++) g->sign[place][i] = g->sign[place - 1][i];
        }
        at[place] = s;
        for (int i = 0; i < g->k; i++) g->sign[place][i] = flip * sign[i];
    }
    for (int c = 0; c + 1 < g->h; c++) g->cut[c] = (at[c] + at[c + 1]) / 2;
}

/* Bit l where |x[l]| >= cut, l < count <= 64. */
static inline uint64_t reached(const float *x, int64_t count, double cut) {
    uint64_t word = 0;
    int64_t l = 0;
#ifdef WIDE
    for (; l + 8 <= count; l += 8)
        word |= (uint64_t)_mm512_cmp_pd_mask(_mm512_abs_pd(_mm512_cvtps_pd(_mm256_loadu_ps(x + l))), _mm512_set1_pd(cut), _CMP_GE_OQ) << l;
#endif
    for (; l < count; l++) word |= (uint64_t)(__builtin_fabs((double)x[l]) >= cut) << l;
    return word;
}

static inline uint64_t negative(const float *x, int64_t count) {
    uint64_t word = 0;
    int64_t l = 0;
#ifdef WIDE
    for (; l + 16 <= count; l += 16) word |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(x + l), _mm512_setzero_ps(), _CMP_LT_OQ) << l;
#endif
    for (; l < count; l++) word |= (uint64_t)(x[l] < 0) << l;
    return word;
}

/* Codes out[bits][words] of one row: crossing a threshold turns those signs round in which its two intervals differ. */
static void write_codes(const Grid *g, const float *x, int64_t n, uint64_t *out) {
    int64_t words = words_of(n);
    for (int64_t w = 0; w < words; w++, x += 64) {
        int64_t count = n - 64 * w < 64 ? n - 64 * w : 64;
        uint64_t all = count == 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1;
        uint64_t minus = negative(x, count), code[MAX_BITS];
        for (int i = 0; i < g->k; i++) code[i] = (g->sign[0][i] > 0 ? all : 0) ^ minus;
        for (int c = 0; c + 1 < g->h; c++) {
            uint64_t crossed = reached(x, count, g->cut[c]);
            for (int i = 0; i < g->k; i++)
                if (g->sign[c][i] != g->sign[c + 1][i]) code[i] ^= crossed;
        }
        for (int i = 0; i < g->k; i++) out[i * words + w] = code[i];
    }
}

/* The level of every entry, with its sign. */
static void write_values(const Grid *g, const float *x, int64_t n, float *out) {
    double at[8];
    for (int c = 0; c < g->h; c++) at[c] = level(g, c);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        Floats part;
        __builtin_memcpy(&part, x + i, sizeof part);
        Doubles v = __builtin_convertvector(part, Doubles), value = {0};
        Longs minus = (Longs)(v < 0) & INT64_MIN; /* the sign bit */
        Doubles size = (Doubles)((Longs)v & INT64_MAX);
        value += at[0];
        for (int c = 0; c + 1 < g->h; c++) {
            Longs reached = size >= g->cut[c];
            Doubles next = {0};
            next += at[c + 1];
            value = (Doubles)(((Longs)next & reached) | ((Longs)value & ~reached));
        }
        part = __builtin_convertvector((Doubles)((Longs)value ^ minus), Floats);
        __builtin_memcpy(out + i, &part, sizeof part);
    }
    for (; i < n; i++) {
        double size = __builtin_fabs((double)x[i]), value = at[0];
        for (int c = 0; c + 1 < g->h; c++) value = size >= g->cut[c] ? at[c + 1] : value;
        out[i] = (float)(x[i] < 0 ? -value : value);
    }
}

/* Rows x[M][n] as alpha[M][bits] and codes[M][bits][words], or, if `codes` is NULL, as values[M][n]. */
EXPORT void alternating(const float *x, int64_t M, int64_t n, int64_t bits, int64_t iters, float *alpha, uint64_t *codes, float *values) {
    int64_t words = words_of(n);
    for (int64_t m = 0; m < M; m++, x += n) {
        Grid g;
        greedy(&g, x, n, (int)bits);
        for (int64_t t = 0; t < iters; t++) {
            if (t) tally(&g, x, n); /* the greedy start has just counted */
            solve(&g, n);
            assign(&g);
        }
        if (codes) {
            for (int i = 0; i < bits; i++) alpha[m * bits + i] = (float)g.alpha[i];
            write_codes(&g, x, n, codes + m * bits * words);
        } else
            write_values(&g, x, n, values + m * n);
    }
}

/* --- packing and product in one call: between two calls an interpreter can take longer than the product ------------------------------- */

/* out[m][k] = <sign x[m], b[k]> + bias[k], sign(0) = -1; bias may be NULL. Returns 0, or 1 without memory. */
EXPORT int sign_linear(const float *x, int64_t M, int64_t n, const uint64_t *b, const float *bias, int64_t N, float *out) {
    int64_t words = words_of(n);
    uint64_t *a = malloc((size_t)(M * words) * sizeof *a + 1);
    if (!a) return 1;
    pack_positive(x, M, n, a);
    int32_t *z = (int32_t *)out; /* an integer takes the place of the float that it becomes */
    xnor_gemm(a, b, M, N, words, (int32_t)n, z);
    free(a);
    for (int64_t m = 0; m < M; m++, out += N, z += N)
        for (int64_t k = 0; k < N; k++) out[k] = (float)z[k] + (bias ? bias[k] : 0.0f);
    return 0;
}

/* out[m][k] = <code of x[m], code of row k> + bias[k], the code of x[m] being found on the way. Returns 0, or 1 without memory. */
EXPORT int multibit_linear(const float *x, int64_t M, int64_t n, int64_t bits, int64_t iters, const uint64_t *b, const float *alpha,
                           int64_t kb, const float *bias, int64_t N, float *out) {
    int64_t words = words_of(n);
    uint64_t *a = malloc((size_t)(M * bits * words) * sizeof *a + 1);
    float *beta = malloc((size_t)(M * bits) * sizeof *beta + 1);
    if (a && beta) {
        alternating(x, M, n, bits, iters, beta, a, NULL);
        multibit_gemm(a, beta, bits, b, alpha, kb, M, N, words, (int32_t)n, out);
        if (bias)
            for (int64_t m = 0; m < M; m++)
                for (int64_t k = 0; k < N; k++) out[m * N + k] += bias[k];
    }
    int failed = !a || !beta;
    free(a);
    free(beta);
    return failed;
}
