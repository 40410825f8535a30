// Attention for each candidate (README.md): what happens between the products E v^T and those with
// its gradient, a page at a time. Included by stages.inl.h, once per instruction set.
//
// For one page with history k and one candidate j, x_k = E_j . v_k, logits l_k = scale (q_j . k_k),
// w_k = exp(l_k - max):
//
//     u = sum_k w_k x_k,   |sum_k w_k v_k|^2 = |L^T w|^2 = n  with  v v^T = L L^T,
//     s = u / (tau |E_j| sqrt(n))
//
// The softmax's denominator cancels. L (and not the Gram matrix itself) keeps n as exact as R
// itself would be. Where rows are float32 what follows w is float64 (Real): dL/dlogit is a
// difference that vanishes where R points to E.

namespace {

// Candidates at a time: w, and what is made of it, stay in the L1 and L2 cache.
constexpr int64_t kBlockVectors = 8, kBlock = kBlockVectors * W;

// sum over d of a_d b_d in float64
template <class T>
inline double exact_dot(const T* a, const T* b, int64_t dim) {
    constexpr int64_t kLanes = 8;
    double part[kLanes] = {};
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes)
        for (int64_t l = 0; l < kLanes; ++l)
            part[l] += double(widen(a[d + l])) * double(widen(b[d + l]));
    double sum = 0;
    for (int64_t l = 0; l < kLanes; ++l) sum += part[l];
    for (; d < dim; ++d) sum += double(widen(a[d])) * double(widen(b[d]));
    return sum;
}

// Vectors of Real, from and to either type.
template <class Real>
struct Lanes;
template <>
struct Lanes<float> {
    typedef vf type;
    static constexpr int64_t n = W;
    static type get(const float* p) { return load(p); }
    static void put(float* p, type x) { store(p, x); }
};
template <>
struct Lanes<double> {
    typedef double type __attribute__((vector_size(W * 4)));
    typedef float narrow_type __attribute__((vector_size(W * 2)));
    static constexpr int64_t n = W / 2;
    static type get(const double* p) {
        type x;
        std::memcpy(&x, p, sizeof(x));
        return x;
    }
    static type get(const float* p) {
        narrow_type x;
        std::memcpy(&x, p, sizeof(x));
        return __builtin_convertvector(x, type);
    }
    static void put(double* p, type x) { std::memcpy(p, &x, sizeof(x)); }
    static void put(float* p, type x) {
        const narrow_type y = __builtin_convertvector(x, narrow_type);
        std::memcpy(p, &y, sizeof(y));
    }
};

template <class V>
inline V square_root(V x) {
    V y{};
    for (size_t l = 0; l < sizeof(V) / sizeof(x[0]); ++l) y[l] = __builtin_sqrt(x[l]);
    return y;
}

// out_a = sum over b of matrix[a, b] in_b, vectors of kBlock numbers; `matrix` [n, n] is zero above
// (lower) or below its diagonal, n is a multiple of 4.
template <class Real, class In>
inline void combine(const Real* matrix, int64_t n, bool lower, const In* in, Real* out) {
    using V = Lanes<Real>;
    using vr = typename V::type;
    for (int64_t a = 0; a < n; a += 4) {
        const Real* row = matrix + a * n;
        const int64_t first = lower ? 0 : a, last = lower ? a + 4 : n;
        for (int64_t j = 0; j < kBlock; j += 2 * V::n) {
            vr s00 = {}, s01 = {}, s10 = {}, s11 = {}, s20 = {}, s21 = {}, s30 = {}, s31 = {};
            for (int64_t b = first; b < last; ++b) {
                const vr x = V::get(in + b * kBlock + j), y = V::get(in + b * kBlock + j + V::n);
                const Real m0 = row[b], m1 = row[n + b], m2 = row[2 * n + b], m3 = row[3 * n + b];
                s00 += m0 * x, s01 += m0 * y;
                s10 += m1 * x, s11 += m1 * y;
                s20 += m2 * x, s21 += m2 * y;
                s30 += m3 * x, s31 += m3 * y;
            }
            Real* o = out + a * kBlock + j;
            V::put(o, s00), V::put(o + V::n, s01);
            V::put(o + kBlock, s10), V::put(o + kBlock + V::n, s11);
            V::put(o + 2 * kBlock, s20), V::put(o + 2 * kBlock + V::n, s21);
            V::put(o + 3 * kBlock, s30), V::put(o + 3 * kBlock + V::n, s31);
        }
    }
}

// sums[k, l] += sum over the block of a_k b_l, k < n and l < m, multiples of 4; of a symmetric one
// (m = 0) for l <= k rounded up to 4: a vector of lanes each.
inline void add_products(const float* a, const float* b, int64_t n, int64_t m, float* sums) {
    const int64_t stride = m ? m : n;
    for (int64_t k = 0; k < n; k += 4)
        for (int64_t l = 0; l < (m ? m : k + 4); l += 4) {
            vf s[4][4] = {};
            for (int64_t j = 0; j < kBlock; j += W) {
                vf y[4];
                for (int c = 0; c < 4; ++c) y[c] = load(b + (l + c) * kBlock + j);
                for (int r = 0; r < 4; ++r) {
                    const vf x = load(a + (k + r) * kBlock + j);
                    for (int c = 0; c < 4; ++c) s[r][c] += x * y[c];
                }
            }
            for (int r = 0; r < 4; ++r)
                for (int c = 0; c < 4; ++c) {
                    float* at = sums + ((k + r) * stride + l + c) * W;
                    store(at, load(at) + s[r][c]);
                }
        }
}

// One page, and its scratch memory.
template <class T, class Real>
struct CandidatePage {
    using V = Lanes<Real>;
    using vr = typename V::type;

    const Candidate& a;
    int64_t page, first, rows, padded;  // rows of the tile, and their number rounded up to 4
    Scratch memory;
    Real *lower, *upper;     // [padded, padded] L and its transpose
    Real *z, *t;             // [padded, kBlock]
    Real *u, *n;             // [kBlock]
    float *x, *logit, *w;    // [padded, kBlock]

    CandidatePage(const Candidate& a, int64_t page) : a(a), page(page) {
        first = a.start[page];
        rows = a.start[page + 1] - first;
        padded = (rows + 3) / 4 * 4;
        const int64_t square = padded * padded, block = padded * kBlock;
        const int64_t reals = 2 * square + 2 * block + 2 * kBlock;
        const int64_t floats = reals * int64_t(sizeof(Real) / sizeof(float)) + 3 * block;
        lower = reinterpret_cast<Real*>(memory.get(floats));
        std::memset(lower, 0, sizeof(float) * floats);
        upper = lower + square;
        z = upper + square, t = z + block, u = t + block, n = u + kBlock;
        x = reinterpret_cast<float*>(n + kBlock), logit = x + block, w = logit + block;
        factorise();
    }

    const T* value(int64_t k) const {
        return static_cast<const T*>(a.v) + a.v_row[first + k] * a.dim;
    }

    // v v^T = L L^T in float64; a row that adds no dimension gets no column: as to its own length,
    // the others may be millions of times as long.
    void factorise() {
        double* g = static_cast<double*>(std::malloc(sizeof(double) * rows * rows));
        if (!g) std::abort();
        for (int64_t k = 0; k < rows; ++k)
            for (int64_t l = 0; l <= k; ++l) g[k * rows + l] = exact_dot(value(k), value(l), a.dim);
        for (int64_t i = 0; i < rows; ++i) {
            const double square = g[i * rows + i];
            double pivot = square;
            for (int64_t b = 0; b < i; ++b) pivot -= g[i * rows + b] * g[i * rows + b];
            // NaN and inf go on, to be seen in the loss.
            const double root = pivot <= 1e-14 * square ? 0.0 : sqrt(pivot);
            for (int64_t k = i; k < rows; ++k) {
                double sum = g[k * rows + i];
                for (int64_t b = 0; b < i; ++b) sum -= g[k * rows + b] * g[i * rows + b];
                g[k * rows + i] = root == 0 ? 0.0 : k == i ? root : sum / root;
            }
        }
        for (int64_t k = 0; k < rows; ++k)
            for (int64_t i = 0; i <= k; ++i)
                lower[k * padded + i] = upper[i * padded + k] = Real(g[k * rows + i]);
        std::free(g);
    }

    void load_block(const void* tile, int64_t j, int64_t count, float* out) const {
        const T* from = static_cast<const T*>(tile) + first * a.columns + j;
        for (int64_t k = 0; k < rows; ++k) {
            float* to = out + k * kBlock;
            int64_t i = 0;
            for (; i + W <= count; i += W) store(to + i, load(from + k * a.columns + i));
            for (; i < count; ++i) to[i] = widen(from[k * a.columns + i]);
            for (; i < kBlock; ++i) to[i] = 0;
        }
    }

    // Of values of the columns, zeros past the block's.
    vr part(const float* values, int64_t j, int64_t i, int64_t count) const {
        if (i + V::n <= count) return V::get(values + j + i);
        vr x = {};
        for (int64_t l = 0; i + l < count; ++l) x[l] = values[j + i + l];
        return x;
    }
    vf factors(int64_t j, int64_t i, int64_t count) const {
        if (!a.column_scale) return splat(a.scale);
        if (i + W <= count) return load(a.column_scale + j + i);
        vf x = {};
        for (int64_t l = 0; i + l < count; ++l) x[l] = a.column_scale[j + i + l];
        return x;
    }

    // Scores of candidates j .. j + count: fills w, z, u and n; `out` gets s.
    void scores(int64_t j, int64_t count, float* out) {
        load_block(a.x, j, count, x);
        if (a.y) load_block(a.y, j, count, logit);
        const float* products = a.y ? logit : x;
        for (int64_t i = 0; i < kBlock; i += W) {
            const vf column = factors(j, i, count);
            vf top = splat(-kInfinity);
            for (int64_t k = 0; k < rows; ++k) {
                vf l = load(products + k * kBlock + i) * column;
                if (a.row_scale) l *= a.row_scale[first + k];
                store(logit + k * kBlock + i, l);
                top = l > top ? l : top;
            }
            for (int64_t k = 0; k < rows; ++k)
                store(w + k * kBlock + i, exp_vector(load(logit + k * kBlock + i) - top));
        }
        combine(upper, padded, false, w, z);
        for (int64_t i = 0; i < kBlock; i += V::n) {
            vr sum = {}, product = {}, square = {};
            for (int64_t k = 0; k < rows; ++k) {
                const vr p = V::get(w + k * kBlock + i), q = V::get(z + k * kBlock + i);
                sum += p;
                product += p * V::get(x + k * kBlock + i);
                square += q * q;
            }
            // A vector no longer than that, times the sum, counts as zero.
            const vr least = sum * Real(kNormEps);
            square = square <= least * least ? vr{} : square;
            V::put(u + i, product);
            V::put(n + i, square);
            vr s = product * part(a.e_inverse, j, i, count) * a.inverse_tau / square_root(square);
            s = square == vr{} ? vr{} : s;
            V::put(out + i, s);
        }
    }

    void columns(int64_t& begin, int64_t& end) const {
        begin = a.range ? a.range[2 * page] : 0;
        end = a.range ? a.range[2 * page + 1] : a.columns;
    }

    void forward() {
        int64_t begin, end;
        columns(begin, end);
        float block[kBlock];
        float* s = a.s + page * a.columns;
        for (int64_t j = begin; j < end; j += kBlock) {
            const int64_t count = smaller(kBlock, end - j);
            scores(j, count, block);
            std::memcpy(s + j, block, sizeof(float) * count);
        }
    }

    static float sum_of(vr x) {
        Real sum = 0;
        for (int64_t l = 0; l < V::n; ++l) sum += x[l];
        return float(sum);
    }

    void store_block(const float* from, void* tile, int64_t j, int64_t count) const {
        T* to = static_cast<T*>(tile) + first * a.columns + j;
        for (int64_t k = 0; k < rows; ++k) {
            int64_t i = 0;
            for (; i + W <= count; i += W)
                store(to + k * a.columns + i, load(from + k * kBlock + i));
            for (; i < count; ++i) narrow(from[k * kBlock + i], to + k * a.columns + i);
        }
    }

    // Zeros where the page does not look: all but the columns from `begin` to `end`.
    void clear(void* tile, int64_t begin, int64_t end) const {
        T* to = static_cast<T*>(tile) + first * a.columns;
        for (int64_t k = 0; k < rows; ++k, to += a.columns) {
            std::memset(to, 0, sizeof(T) * begin);
            std::memset(to + end, 0, sizeof(T) * (a.columns - end));
        }
    }
    void clear_scores(float* scores, int64_t begin, int64_t end) const {
        float* row = scores + page * a.columns;
        std::memset(row, 0, sizeof(float) * begin);
        std::memset(row + end, 0, sizeof(float) * (a.columns - end));
    }

    // dL/ds, in place of the scores, to the gradients of both products, in their place.
    void backward() {
        int64_t begin, end;
        columns(begin, end);
        Scratch more;
        const int64_t size = padded * padded * W;
        float* sums = more.get(size + padded * kBlock);
        float* weighted = sums + size;
        std::memset(sums, 0, sizeof(float) * (size + padded * kBlock));
        double slope = 0;
        float block[kBlock], turns[kBlock];
        float* g = a.s + page * a.columns;
        for (int64_t j = begin; j < end; j += kBlock) {
            const int64_t count = smaller(kBlock, end - j);
            scores(j, count, block);
            combine(lower, padded, true, z, t);
            for (int64_t i = 0; i < kBlock; i += V::n) {
                const vr up = part(g, j, i, count), s = V::get(block + i), square = V::get(n + i);
                const auto none = square == vr{};
                vr c = up * part(a.e_inverse, j, i, count) * a.inverse_tau / square_root(square);
                vr along = V::get(u + i) / square, shrink = -up * s / square;
                c = none ? vr{} : c;
                along = none ? vr{} : along;
                shrink = none ? vr{} : shrink;
                const vr column =
                    a.column_scale ? part(a.column_scale, j, i, count) : vr{} + a.scale;
                // On paper 0; but where one weight is all there is, dL/dlogit has to be 0 itself:
                // it is multiplied by rows as long as they are.
                vr sum = {}, mean = {};
                for (int64_t k = 0; k < rows; ++k) {
                    const int64_t at = k * kBlock + i;
                    const vr p = V::get(w + at);
                    sum += p;
                    mean += p * (V::get(x + at) - along * V::get(t + at));
                }
                mean /= sum;
                vr turned = {};
                for (int64_t k = 0; k < rows; ++k) {
                    const int64_t at = k * kBlock + i;
                    const vr p = V::get(w + at);
                    const vr dl = p * c * ((V::get(x + at) - along * V::get(t + at)) - mean);
                    V::put(weighted + at, shrink * p);
                    const vr both = dl * V::get(logit + at);
                    turned += both;
                    if (a.k_radial) a.k_radial[first + k] += sum_of(both);
                    vr dy = dl * column;
                    if (a.row_scale) dy *= a.row_scale[first + k];
                    // x is not needed any more, and the logit neither.
                    V::put(x + at, a.y ? p * c : p * c + dy);
                    if (a.y) V::put(logit + at, dy);
                }
                const vr radial = up * s;
                slope += sum_of(radial);
                V::put(block + i, !a.y && a.k_radial ? radial + turned : radial);
                V::put(turns + i, turned);
            }
            add_products(weighted, w, padded, 0, sums);
            store_block(x, a.x, j, count);
            if (a.y) store_block(logit, a.y, j, count);
            std::memcpy(g + j, block, sizeof(float) * count);
            if (a.q_radial)
                std::memcpy(a.q_radial + page * a.columns + j, turns, sizeof(float) * count);
        }
        clear(a.x, begin, end);
        if (a.y) clear(a.y, begin, end);
        clear_scores(a.s, begin, end);
        if (a.q_radial) clear_scores(a.q_radial, begin, end);
        a.slope[page] = slope;
        if (!a.d_v) return;
        for (int64_t k = 0; k < rows; ++k) {
            float* out = a.d_v + (first + k) * a.dim;
            std::memset(out, 0, sizeof(float) * a.dim);
            for (int64_t l = 0; l < rows; ++l) {
                const int64_t high = larger(k, l), low = smaller(k, l);
                add_scaled(out, lanes_sum(load(sums + (high * padded + low) * W)), value(l), a.dim);
            }
        }
    }
};

template <class T, class Real>
void candidate_pages(const Candidate& a, bool backward, int64_t begin, int64_t end) {
    for (int64_t page = begin; page < end; ++page) {
        CandidatePage<T, Real> one(a, page);
        backward ? one.backward() : one.forward();
    }
}

void candidate(const Candidate& a, bool backward, int64_t begin, int64_t end) {
    a.type == Type::f32 ? candidate_pages<float, double>(a, backward, begin, end)
                        : candidate_pages<bf16, float>(a, backward, begin, end);
}

// ---- the softmax over a page's candidates, for each of its anchors ------------------------------

// Scores of a page's candidates as each of its anchors sees them: without those it leaves out.
struct AnchorScores {
    const Softmax& a;
    float* t;  // [columns]
    int64_t *place, count;
    float* before;

    void leave_out(int64_t j) {
        j -= a.low;
        if (j < 0 || j >= a.columns) return;
        place[count] = j;
        before[count++] = t[j];
        t[j] = -kInfinity;
    }
    void put_back() {
        while (count) --count, t[place[count]] = before[count];
    }
};

void softmax_page(const Softmax& a, int64_t page, Scratch& memory) {
    float* s = a.s + page * a.columns;
    const int64_t begin = a.range ? a.range[2 * page] : 0,
                  end = a.range ? a.range[2 * page + 1] : a.columns;
    const int64_t most = 2 * a.columns + 1;  // a column may be left out for more than one reason
    float* t = memory.get(2 * a.columns + 3 * most + 2);
    float* d = t + a.columns;
    int64_t* place =
        reinterpret_cast<int64_t*>((reinterpret_cast<uintptr_t>(d + a.columns) + 7) / 8 * 8);
    AnchorScores own{a, t, place, 0, reinterpret_cast<float*>(place + most)};
    for (int64_t j = begin; j < end; ++j) t[j] = a.bias ? s[j] + a.bias[j] : s[j];
    for (int64_t j = begin; j < end; ++j) d[j] = 0;
    for (int64_t i = a.anchors[page]; i < a.anchors[page + 1]; ++i) {
        const int64_t mine = a.own[i] - a.low;
        const float score = s[mine] + (a.rank_bias ? a.rank_bias[mine] : 0.0f);
        own.leave_out(a.own[i]);
        for (int64_t r = 0; r < a.same_ranges; ++r) {
            const int64_t* range = a.same + (i * a.same_ranges + r) * 2;
            for (int64_t o = range[0]; o < range[1]; ++o) own.leave_out(a.order[o]);
        }
        if (a.page && !a.range)
            for (int64_t j = a.page[2 * i]; j < a.page[2 * i + 1]; ++j) own.leave_out(j);
        if (a.above) {
            double above = 0;
            for (int64_t j = begin; j < end; ++j)
                if (t[j] > -kInfinity && s[j] + (a.rank_bias ? a.rank_bias[j] : 0.0f) > score)
                    above += a.count ? a.count[j] : 1.0f;
            a.above[i] = int64_t(above);
        }
        float top = -kInfinity;
        vf tops = splat(top);
        int64_t j = begin;
        for (; j + W <= end; j += W) tops = load(t + j) > tops ? load(t + j) : tops;
        for (int l = 0; l < W; ++l) top = larger(top, tops[l]);
        for (; j < end; ++j) top = larger(top, t[j]);
        if (top == -kInfinity) top = 0;  // no other candidate: the sum is 0
        double total = 0;
        float part = 0;
        for (j = begin; j + W <= end;) {
            const int64_t stop = smaller(j + 64 * W, end - W + 1);
            vf sum = {};
            for (; j < stop; j += W) sum += exp_vector(load(t + j) - top);
            total += lanes_sum(sum);
        }
        vf rest = splat(-kInfinity);
        for (int64_t l = 0; j + l < end; ++l) rest[l] = t[j + l];
        part = lanes_sum(exp_vector(rest - top));
        total += part;
        const Finished f = finished(top, total, double(score));
        a.lse[i] = f.lse;
        a.loss[i] = f.loss;
        a.positive[i] = double(s[mine]);
        if (a.g && a.g[i] != 0) {
            const float share = float(a.g[i] * f.scale);
            if (total != 0)
                for (j = begin; j + W <= end; j += W)
                    store(d + j, load(d + j) + share * exp_vector(load(t + j) - top));
            if (total != 0 && j < end) {
                const vf p = share * exp_vector(rest - top);
                for (int64_t l = 0; j + l < end; ++l) d[j + l] += p[l];
            }
            d[mine] -= float(a.g[i] * f.miss);
        }
        own.put_back();
    }
    if (a.g)
        for (int64_t j = begin; j < end; ++j) s[j] = d[j];
}

void softmax(const Softmax& a, int64_t begin, int64_t end) {
    Scratch memory;
    for (int64_t page = begin; page < end; ++page) softmax_page(a, page, memory);
}

}  // namespace
