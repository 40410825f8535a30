// Body of every variant: included once per instruction set, compiled with that set's flags. Vectors
// are the compiler's own, COURIER_LANES floats wide, so one text serves AVX-512, AVX2, SSE2, NEON
// and anything else. Wider than a register they become scalar code: as slow as no vectors at all.
//
// No templates of the standard library here: the linker keeps one copy of each, and it might be the
// AVX-512 one.
#include <cmath>
#include <cstdlib>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "stages.h"

namespace courier {
namespace {

constexpr int64_t W = COURIER_LANES;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

constexpr float kInfinity = __builtin_inff();
constexpr float kNormEps = 1e-12f;

template <class X>
inline X larger(X a, X b) {
    return b > a ? b : a;
}
template <class X>
inline X smaller(X a, X b) {
    return b < a ? b : a;
}

// Floats of a call, given back at its end.
struct Scratch {
    float* data = nullptr;
    int64_t size = 0;
    float* get(int64_t n) {
        if (n > size) {
            std::free(data);
            data = static_cast<float*>(std::malloc(sizeof(float) * n));
            if (!data) std::abort();
            size = n;
        }
        return data;
    }
    ~Scratch() { std::free(data); }
};

inline vf splat(float x) { return vf{} + x; }

// bfloat16 <-> float32
struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline bf16 round_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if (x != x) return {uint16_t((u >> 16) | 0x40)};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) { *out = round_bf16(x); }

inline vf load(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
inline vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof(h));
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(bf16* p, vf x) {
#ifdef __AVX512BF16__
    const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &h, sizeof(h));
#else
    vu u = (vu)x;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu nan = (u >> 16) | 0x40u;
    vu bits = (vu)((x != x) ? (vi)nan : (vi)rounded);
    vh h = __builtin_convertvector(bits, vh);
    std::memcpy(p, &h, sizeof(h));
#endif
}

inline float lanes_sum(vf x) {
    float s = 0;
    for (int i = 0; i < W; ++i) s += x[i];
    return s;
}

// exp of f within half of ln2 of zero
inline vf exp_polynomial(vf f) {
    vf p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    return p * (f * f) + f + 1.0f;
}

// exp to about one ulp: 2^n * polynomial(f), x = n ln2 + f. Below -87.3 it is 0; NaN stays NaN.
inline vf exp_vector(vf x) {
#ifdef __AVX512F__
    // The same with instructions that round to an integer and scale by 2^n: no clamping,
    // half the instructions.
    const __mmask16 whole = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
    const vf n =
        (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT);
    vf f = x - n * 0.693359375f;
    f = f - n * -2.12194440e-4f;
    vf p = exp_polynomial(f);
    return (vf)_mm512_maskz_scalef_ps(whole, (__m512)p, (__m512)n);
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vf lowest = splat(-87.3f);
    vi underflow = x < lowest;
    x = underflow ? lowest : x;
    vi overflow = x > 88.7f;
    x = overflow ? splat(88.0f) : x;
    vf n = x * 1.44269504088896341f + magic;
    vi exponent = (vi)n - (vi)magic;
    n = n - magic;
    vf f = x - n * 0.693359375f;
    f = f - n * -2.12194440e-4f;
    vf p = exp_polynomial(f);
    vf y = (vf)((vi)p + (exponent << 23));
    y = underflow ? vf{} : y;
    return overflow ? splat(kInfinity) : y;
#endif
}

// Sums over `dim` numbers, sixteen at a time and the rest one by one.
template <class A, class B>
inline float dot(const A* a, const B* b, int64_t dim) {
    vf acc = {}, acc2 = {};
    int64_t d = 0;
    for (; d + 2 * W <= dim; d += 2 * W) {
        acc += load(a + d) * load(b + d);
        acc2 += load(a + d + W) * load(b + d + W);
    }
    for (; d + W <= dim; d += W) acc += load(a + d) * load(b + d);
    float s = lanes_sum(acc + acc2);
    for (; d < dim; ++d) s += widen(a[d]) * widen(b[d]);
    return s;
}

// y += c x
template <class X>
inline void add_scaled(float* y, float c, const X* x, int64_t dim) {
    int64_t d = 0;
    for (; d + W <= dim; d += W) store(y + d, load(y + d) + c * load(x + d));
    for (; d < dim; ++d) y[d] += c * widen(x[d]);
}

// y = c x
template <class X, class Y>
inline void scaled(Y* y, float c, const X* x, int64_t dim) {
    int64_t d = 0;
    for (; d + W <= dim; d += W) store(y + d, c * load(x + d));
    for (; d < dim; ++d) narrow(c * widen(x[d]), y + d);
}

// y = x / c
template <class X, class Y>
inline void divided(Y* y, float c, const X* x, int64_t dim) {
    int64_t d = 0;
    for (; d + W <= dim; d += W) store(y + d, load(x + d) / c);
    for (; d < dim; ++d) narrow(widen(x[d]) / c, y + d);
}

// What a vector is divided by to be a unit vector: its norm, or infinity for a zero vector; NaN
// stays NaN. (A product with the reciprocal would round twice, and the gradient across the vector
// is a difference in which that shows.)
template <class X>
inline X divisor(X norm) {
    return norm <= X(kNormEps) ? X(kInfinity) : norm;
}

template <class T>
void normalize_rows(const Normalize& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T* x = static_cast<const T*>(a.source) + a.row[i] * a.dim;
        float norm = sqrtf(dot(x, x, a.dim));
        a.norm[i] = norm;
        divided(static_cast<T*>(a.unit) + i * a.dim, divisor(norm), x, a.dim);
    }
}

template <class T>
void attend_rows(const Attend& a, int64_t begin, int64_t end) {
    const int64_t head_dim = a.dim / a.heads;
    Scratch scratch;
    float* r = scratch.get(a.dim);
    for (int64_t i = begin; i < end; ++i) {
        const T* q = static_cast<const T*>(a.q) + a.q_row[i] * a.dim;
        const int64_t first = a.first[i], n = a.last[i] - first;
        std::memset(r, 0, sizeof(float) * a.dim);
        for (int64_t h = 0; h < a.heads; ++h) {
            float* w = a.weights + a.weights_at[i] + h * n;
            const int64_t at = h * head_dim;
            float top = -kInfinity;
            for (int64_t k = 0; k < n; ++k) {
                const T* key = static_cast<const T*>(a.k) + a.k_row[first + k] * a.dim;
                w[k] = a.scale * dot(q + at, key + at, head_dim);
                top = larger(top, w[k]);
            }
            float total = 0;
            for (int64_t k = 0; k < n; ++k) total += w[k] = expf(w[k] - top);
            for (int64_t k = 0; k < n; ++k) {
                w[k] /= total;
                const T* value = static_cast<const T*>(a.v) + a.v_row[first + k] * a.dim;
                add_scaled(r + at, w[k], value + at, head_dim);
            }
        }
        T* out = static_cast<T*>(a.out) + i * a.dim;
        if (a.raw) {
            scaled(out, 1.0f, r, a.dim);
            continue;
        }
        float norm = sqrtf(dot(r, r, a.dim));
        a.norm[i] = norm;
        divided(out, divisor(norm), r, a.dim);
        const T* e = static_cast<const T*>(a.e) + a.e_row[i] * a.dim;
        double re = 0, rr = 0, ee = 0;
        for (int64_t d = 0; d < a.dim; ++d) {
            const double x = r[d], y = widen(e[d]);
            re += x * y;
            rr += x * x;
            ee += y * y;
        }
        a.positive[i] = re / divisor(sqrt(rr)) / divisor(sqrt(ee));
    }
}

// Rows of one page must all be in one range: they add to the same history rows.
template <class T>
void attend_backward_rows(const Attend& a, int64_t begin, int64_t end) {
    const int64_t head_dim = a.dim / a.heads;
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
        const T* q = static_cast<const T*>(a.q) + a.q_row[i] * a.dim;
        const float* dr = a.d_r + i * a.dim;
        const int64_t first = a.first[i], n = a.last[i] - first;
        float* da = scratch.get(n);
        for (int64_t h = 0; h < a.heads; ++h) {
            const float* w = a.weights + a.weights_at[i] + h * n;
            const int64_t at = h * head_dim;
            float delta = 0;
            for (int64_t k = 0; k < n; ++k) {
                const T* value = static_cast<const T*>(a.v) + a.v_row[first + k] * a.dim;
                da[k] = dot(dr + at, value + at, head_dim);
                delta += w[k] * da[k];
            }
            for (int64_t k = 0; k < n; ++k) {
                const int64_t at_k = (first + k) * a.dim + at;
                const float ds = a.scale * w[k] * (da[k] - delta);
                if (a.d_v) add_scaled(a.d_v + at_k, w[k], dr + at, head_dim);
                if (a.d_k) add_scaled(a.d_k + at_k, ds, q + at, head_dim);
                if (a.d_q) {
                    const T* key = static_cast<const T*>(a.k) + a.k_row[first + k] * a.dim;
                    add_scaled(a.d_q + i * a.dim + at, ds, key + at, head_dim);
                }
            }
        }
    }
}

// One row: the largest score, then the probabilities and their sum. BIAS and RANK are compile-time,
// so that the plain loop is one multiply-add and one exp a number.
template <class T, bool BIAS>
float row_maximum(const Contrast& a, const T* s) {
    vf top = splat(-kInfinity);
    float rest = -kInfinity;
    int64_t j = 0;
    for (; j + W <= a.columns; j += W) {
        vf t = load(s + j) * a.inverse_tau;
        if (BIAS) t += load(a.bias + j);
        top = t > top ? t : top;
    }
    for (; j < a.columns; ++j)
        rest = larger(rest, widen(s[j]) * a.inverse_tau + (BIAS ? a.bias[j] : 0.0f));
    for (int l = 0; l < W; ++l) rest = larger(rest, top[l]);
    return rest;
}

template <class T, bool BIAS>
double row_probabilities(const Contrast& a, T* s, float top) {
    constexpr int64_t kBlock = 64 * W;  // float32 sums over a block, float64 over blocks
    double total = 0;
    int64_t j = 0;
    while (j + W <= a.columns) {
        const int64_t stop = smaller(j + kBlock, a.columns - a.columns % W);
        vf sum = {};
        for (; j < stop; j += W) {
            vf t = load(s + j) * a.inverse_tau;
            if (BIAS) t += load(a.bias + j);
            vf p = exp_vector(t - top);
            sum += p;
            store(s + j, p);
        }
        total += lanes_sum(sum);
    }
    if (j < a.columns) {
        vf t = splat(-kInfinity);
        for (int64_t l = 0; j + l < a.columns; ++l)
            t[l] = widen(s[j + l]) * a.inverse_tau + (BIAS ? a.bias[j + l] : 0.0f);
        vf p = exp_vector(t - top);
        for (int64_t l = 0; j + l < a.columns; ++l) {
            narrow(p[l], s + j + l);
            total += p[l];
        }
    }
    return total;
}

template <class T, bool BIAS, bool COUNT>
int64_t row_rank(const Contrast& a, const T* s, float positive) {
    // Compared as the product gave them, scores of equal items are equal and not above each other.
    // Counts of a block are exact in float32 up to 2^24 a lane.
    constexpr int64_t kBlock = 1024 * W;
    double above = 0;
    int64_t j = 0;
    while (j + W <= a.columns) {
        const int64_t stop = smaller(j + kBlock, a.columns - a.columns % W);
        vf sum = {};
        for (; j < stop; j += W) {
            vf t = load(s + j) * a.inverse_tau;
            if (BIAS) t += load(a.rank_bias + j);
            sum += t > positive ? (COUNT ? load(a.count + j) : splat(1.0f)) : vf{};
        }
        for (int l = 0; l < W; ++l) above += sum[l];
    }
    for (; j < a.columns; ++j) {
        float t = widen(s[j]) * a.inverse_tau + (BIAS ? a.rank_bias[j] : 0.0f);
        above += t > positive ? (COUNT ? a.count[j] : 1.0f) : 0.0f;
    }
    return int64_t(above);
}

template <class T>
int64_t rank_of(const Contrast& a, const T* s, float positive) {
    if (a.rank_bias)
        return a.count ? row_rank<T, true, true>(a, s, positive)
                       : row_rank<T, true, false>(a, s, positive);
    return a.count ? row_rank<T, false, true>(a, s, positive)
                   : row_rank<T, false, false>(a, s, positive);
}

template <class T>
void leave_out(T* s, int64_t first, int64_t last, int64_t columns) {
    last = smaller(last, columns);
    for (int64_t j = larger(first, int64_t(0)); j < last; ++j) narrow(-kInfinity, s + j);
}

template <class T>
void contrast_rows(const Contrast& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        T* s = static_cast<T*>(a.scores) + i * a.stride;
        const int64_t own = a.own[i] - a.low;
        const float own_score =
            a.above ? widen(s[own]) * a.inverse_tau + (a.rank_bias ? a.rank_bias[own] : 0.0f)
                    : 0.0f;
        leave_out(s, own, own + 1, a.columns);
        for (int64_t r = 0; r < a.same_ranges; ++r) {
            const int64_t* range = a.same + (i * a.same_ranges + r) * 2;
            for (int64_t x = range[0]; x < range[1]; ++x)
                leave_out(s, a.order[x] - a.low, a.order[x] - a.low + 1, a.columns);
        }
        if (a.page) {
            const int64_t first = a.page[2 * i] - a.low, last = a.page[2 * i + 1] - a.low;
            if (a.page_only) {
                leave_out(s, 0, first, a.columns);
                leave_out(s, last, a.columns, a.columns);
            } else {
                leave_out(s, first, last, a.columns);
            }
        }
        if (a.above) a.above[i] = rank_of(a, s, own_score);
        // The largest score, not the 1/tau that bounds all: rounding of s - top then is least where
        // P is largest.
        float top = a.bias ? row_maximum<T, true>(a, s) : row_maximum<T, false>(a, s);
        if (top == -kInfinity) top = 0;  // no candidate: the sum is 0
        a.top[i] = top;
        a.total[i] =
            a.bias ? row_probabilities<T, true>(a, s, top) : row_probabilities<T, false>(a, s, top);
    }
}

template <class T, class P>
void weigh_rows(const Weigh& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * a.dim;
        const T* x = static_cast<const T*>(a.x) + at;
        const float factor = a.factor[i], pull = a.own ? a.pull[i] : 0.0f;
        scaled(a.d_x + at, factor, static_cast<const P*>(a.product) + at, a.dim);
        scaled(static_cast<T*>(a.weighted) + at, factor, x, a.dim);
        if (a.own) add_scaled(a.d_x + at, -pull, static_cast<const T*>(a.own) + at, a.dim);
        if (a.d_own) scaled(a.d_own + at, -pull, x, a.dim);
    }
}

template <class T, class O>
void normalize_backward_rows(const NormalizeBackward& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const float* g = a.d_unit + i * a.dim;
        const T* u = static_cast<const T*>(a.unit) + i * a.dim;
        O* out = static_cast<O*>(a.out) + i * a.dim;
        const float along = dot(g, u, a.dim), c = a.scale / divisor(a.norm[i]);
        int64_t d = 0;
        for (; d + W <= a.dim; d += W) store(out + d, c * (load(g + d) - along * load(u + d)));
        for (; d < a.dim; ++d) narrow(c * (g[d] - along * widen(u[d])), out + d);
    }
}

void normalize(const Normalize& a, int64_t begin, int64_t end) {
    a.type == Type::f32 ? normalize_rows<float>(a, begin, end)
                        : normalize_rows<bf16>(a, begin, end);
}
void attend(const Attend& a, int64_t begin, int64_t end) {
    a.type == Type::f32 ? attend_rows<float>(a, begin, end) : attend_rows<bf16>(a, begin, end);
}
void attend_backward(const Attend& a, int64_t begin, int64_t end) {
    a.type == Type::f32 ? attend_backward_rows<float>(a, begin, end)
                        : attend_backward_rows<bf16>(a, begin, end);
}
void contrast(const Contrast& a, int64_t begin, int64_t end) {
    a.type == Type::f32 ? contrast_rows<float>(a, begin, end) : contrast_rows<bf16>(a, begin, end);
}
void weigh(const Weigh& a, int64_t begin, int64_t end) {
    if (a.type == Type::f32) return weigh_rows<float, float>(a, begin, end);
    a.product_type == Type::f32 ? weigh_rows<bf16, float>(a, begin, end)
                                : weigh_rows<bf16, bf16>(a, begin, end);
}
void normalize_backward(const NormalizeBackward& a, int64_t begin, int64_t end) {
    if (a.type == Type::f32) return normalize_backward_rows<float, float>(a, begin, end);
    a.out_type == Type::f32 ? normalize_backward_rows<bf16, float>(a, begin, end)
                            : normalize_backward_rows<bf16, bf16>(a, begin, end);
}

void add(const Add& a, int64_t begin, int64_t end) {
    if (a.type == Type::f32)
        add_scaled(a.sum + begin, 1.0f, static_cast<const float*>(a.part) + begin, end - begin);
    else
        add_scaled(a.sum + begin, 1.0f, static_cast<const bf16*>(a.part) + begin, end - begin);
}

}  // namespace

#include "candidate.inl.h"
#include "direct.inl.h"

namespace {

constexpr Stages make_stages(const char* name) {
    return {name, normalize, attend, attend_backward, contrast, weigh, normalize_backward, add,
            candidate, direct, softmax, nullptr, nullptr, nullptr};
}

}  // namespace
}  // namespace courier
