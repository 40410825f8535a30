// Attention for each candidate as it is defined, for several heads, few dimensions and long
// histories: R itself is made, of a block of candidates side by side in vectors, compared with
// them, and forgotten. Included by stages.inl.h after candidate.inl.h. Where candidate.inl.h takes
// H^2 steps a candidate, this takes H D, without a library's products.

namespace {

// out_a = sum over b of matrix[a, b] in_b, vectors of kBlock numbers; `rows` is a multiple of 4.
inline void multiply_block(const float* matrix, int64_t rows, int64_t inner, int64_t stride,
                           const float* in, float* out) {
    for (int64_t a = 0; a < rows; a += 4) {
        const float *m0 = matrix + a * stride, *m1 = m0 + stride, *m2 = m1 + stride,
                    *m3 = m2 + stride;
        for (int64_t j = 0; j < kBlock; j += 2 * W) {
            vf s00 = {}, s01 = {}, s10 = {}, s11 = {}, s20 = {}, s21 = {}, s30 = {}, s31 = {};
            for (int64_t b = 0; b < inner; ++b) {
                const vf x = load(in + b * kBlock + j), y = load(in + b * kBlock + j + W);
                s00 += m0[b] * x, s01 += m0[b] * y;
                s10 += m1[b] * x, s11 += m1[b] * y;
                s20 += m2[b] * x, s21 += m2[b] * y;
                s30 += m3[b] * x, s31 += m3[b] * y;
            }
            float* o = out + a * kBlock + j;
            store(o, s00), store(o + W, s01);
            store(o + kBlock, s10), store(o + kBlock + W, s11);
            store(o + 2 * kBlock, s20), store(o + 2 * kBlock + W, s21);
            store(o + 3 * kBlock, s30), store(o + 3 * kBlock + W, s31);
        }
    }
}

inline int64_t by_four(int64_t n) { return (n + 3) / 4 * 4; }

// Some columns (a part of them) against one page.
struct DirectPage {
    const Direct& a;
    int64_t head_dim, wide;  // dimensions of a head, and rounded up to 4
    Scratch memory;
    int64_t page = 0, first = 0, rows = 0, padded = 0;
    // Per head: [padded, wide] k and v, [wide, padded] the transpose of k and v.
    float *k, *v, *k_turned, *v_turned;
    float *q, *e, *r, *d_r, *turned;  // [heads, wide, kBlock]
    float *weights;                   // [heads, padded, kBlock]
    float *slopes;                    // [padded, kBlock]
    float *k_sums, *v_sums;           // [heads, padded, wide, W]
    vf cosine[kBlockVectors], inverse[kBlockVectors];

    explicit DirectPage(const Direct& a)
        : a(a), head_dim(a.dim / a.heads), wide(by_four(head_dim)) {}

    void begin(int64_t which, bool backward) {
        page = which;
        first = a.start[page];
        rows = a.start[page + 1] - first;
        padded = by_four(rows);
        const int64_t side = a.heads * padded * wide, block = a.heads * wide * kBlock;
        const int64_t sums = backward ? side * W : 0;
        const int64_t all = 4 * side + 5 * block + (a.heads + 1) * padded * kBlock + 2 * sums;
        k = memory.get(all);
        std::memset(k, 0, sizeof(float) * all);
        v = k + side, k_turned = v + side, v_turned = k_turned + side;
        q = v_turned + side, e = q + block, r = e + block, d_r = r + block, turned = d_r + block;
        weights = turned + block, slopes = weights + a.heads * padded * kBlock;
        k_sums = slopes + padded * kBlock, v_sums = k_sums + sums;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t d = 0; d < a.dim; ++d) {
                const int64_t head = d / head_dim, within = d % head_dim;
                const int64_t at = (head * padded + i) * wide + within,
                              turn = (head * wide + within) * padded + i;
                k[at] = k_turned[turn] = a.k[(first + i) * a.dim + d];
                v[at] = v_turned[turn] = a.v[(first + i) * a.dim + d];
            }
    }

    int64_t at_head(int64_t d) const { return (d / head_dim * wide + d % head_dim) * kBlock; }

    // Columns j .. j + count of all dimensions, zeros past them.
    void load_columns(const float* from, int64_t j, int64_t count, float* to) const {
        for (int64_t d = 0; d < a.dim; ++d) {
            float* out = to + at_head(d);
            std::memcpy(out, from + d * a.stride + a.low + j, sizeof(float) * count);
            if (count < kBlock) std::memset(out + count, 0, sizeof(float) * (kBlock - count));
        }
    }
    void add_columns(const float* from, int64_t j, int64_t count, float* to) const {
        for (int64_t d = 0; d < a.dim; ++d)
            add_scaled(to + d * a.stride + a.low + j, 1.0f, from + at_head(d), count);
    }
    static vf part(const float* values, int64_t i, int64_t count) {
        if (i + W <= count) return load(values + i);
        vf x = {};
        for (int64_t l = 0; i + l < count; ++l) x[l] = values[i + l];
        return x;
    }

    // The softmax over the history, of the difference to the largest product: see triton/attention.py.
    void attend(int64_t head) {
        float* w = weights + head * padded * kBlock;
        multiply_block(k + head * padded * wide, padded, head_dim, wide, q + head * wide * kBlock,
                       w);
        const float sign = a.scale < 0 ? -1.0f : 1.0f, factor = sign * a.scale;
        for (int64_t i = 0; i < kBlock; i += W) {
            vf top = splat(-kInfinity), total = {};
            for (int64_t h = 0; h < rows; ++h) {
                const vf s = sign * load(w + h * kBlock + i);
                top = s > top ? s : top;
            }
            for (int64_t h = 0; h < rows; ++h) {
                float* at = w + h * kBlock + i;
                const vf p = exp_vector((sign * load(at) - top) * factor);
                total += p;
                store(at, p);
            }
            for (int64_t h = 0; h < rows; ++h) {
                float* at = w + h * kBlock + i;
                store(at, load(at) / total);
            }
        }
        multiply_block(v_turned + head * wide * padded, wide, rows, padded, w,
                       r + head * wide * kBlock);
    }

    // R, its cosines with the columns and 1 / |R|, 0 for a zero vector; `out` gets s.
    void scores(int64_t j, int64_t count, float* out) {
        load_columns(a.q, j, count, q);
        if (a.e == a.q) e = q;
        else load_columns(a.e, j, count, e);
        for (int64_t head = 0; head < a.heads; ++head) attend(head);
        for (int64_t i = 0, n = 0; i < kBlock; i += W, ++n) {
            vf square = {}, product = {};
            for (int64_t d = 0; d < a.heads * wide; ++d) {
                const vf x = load(r + d * kBlock + i);
                square += x * x;
                product += x * load(e + d * kBlock + i);
            }
            const vf norm = square_root(square);
            inverse[n] = norm <= kNormEps ? vf{} : 1.0f / norm;
            cosine[n] = product * inverse[n] * part(a.e_inverse + a.low + j, i, count);
            store(out + i, cosine[n] * a.inverse_tau);
        }
    }

    void columns(int64_t& begin, int64_t& end) const {
        if (!a.range) return;
        begin = larger(begin, a.range[2 * page]);
        end = smaller(end, a.range[2 * page + 1]);
    }

    void forward(int64_t begin, int64_t end) {
        columns(begin, end);
        float block[kBlock];
        for (int64_t j = begin; j < end; j += kBlock) {
            const int64_t count = smaller(kBlock, end - j);
            scores(j, count, block);
            std::memcpy(a.s + page * a.columns + j, block, sizeof(float) * count);
        }
    }

    // dL/ds to dL/dR; in R's place what it gives to dL/dE, but for `radial`. The sum of dL/ds s.
    double through_length(int64_t j, int64_t count, float* radial) {
        const float* g = a.s + page * a.columns + j;
        double slope = 0;
        for (int64_t i = 0, n = 0; i < kBlock; i += W, ++n) {
            const vf up = part(g, i, count), e_inverse = part(a.e_inverse + a.low + j, i, count);
            const vf c = up * a.inverse_tau * inverse[n];
            for (int64_t d = 0; d < a.heads * wide; ++d) {
                const vf unit_r = load(r + d * kBlock + i) * inverse[n],
                         unit_e = load(e + d * kBlock + i) * e_inverse;
                store(d_r + d * kBlock + i, c * (unit_e - cosine[n] * unit_r));
                store(r + d * kBlock + i, up * a.inverse_tau * e_inverse * unit_r);
            }
            const vf along = up * cosine[n] * a.inverse_tau;
            slope += lanes_sum(along);
            store(radial + i, along);
        }
        return slope;
    }

    // dL/dlogit in `slopes`; and what the block gives to dL/dk and dL/dv.
    void attend_backward(int64_t head) {
        const float *w = weights + head * padded * kBlock, *d = d_r + head * wide * kBlock;
        multiply_block(v + head * padded * wide, padded, head_dim, wide, d, slopes);
        for (int64_t i = 0; i < kBlock; i += W) {
            vf mean = {};
            for (int64_t h = 0; h < rows; ++h)
                mean += load(w + h * kBlock + i) * load(slopes + h * kBlock + i);
            for (int64_t h = 0; h < rows; ++h) {
                float* at = slopes + h * kBlock + i;
                store(at, a.scale * (load(w + h * kBlock + i) * (load(at) - mean)));
            }
        }
        multiply_block(k_turned + head * wide * padded, wide, rows, padded, slopes,
                       turned + head * wide * kBlock);
        add_products(slopes, q + head * wide * kBlock, padded, wide,
                     k_sums + head * padded * wide * W);
        add_products(w, d, padded, wide, v_sums + head * padded * wide * W);
    }

    void backward(int64_t begin, int64_t end, float* d_k, float* d_v, double* slope) {
        float block[kBlock];
        float* g = a.s + page * a.columns;
        // `s` is 0 where the page does not look.
        columns(begin, end);
        for (int64_t j = begin; j < end; j += kBlock) {
            const int64_t count = smaller(kBlock, end - j);
            scores(j, count, block);
            slope[page] += through_length(j, count, block);
            std::memcpy(g + j, block, sizeof(float) * count);
            if (a.d_e) add_columns(r, j, count, a.d_e);
            for (int64_t head = 0; head < a.heads; ++head) attend_backward(head);
            if (a.d_q) add_columns(turned, j, count, a.d_q);
        }
        for (int64_t h = 0; h < rows; ++h)
            for (int64_t d = 0; d < a.dim; ++d) {
                const int64_t at = ((d / head_dim * padded + h) * wide + d % head_dim) * W;
                d_k[(first + h) * a.dim + d] += lanes_sum(load(k_sums + at));
                d_v[(first + h) * a.dim + d] += lanes_sum(load(v_sums + at));
            }
    }
};

// Part number `part` of the columns, from `begin` to `end`.
void direct(const Direct& a, bool backward, int64_t part, int64_t begin, int64_t end) {
    DirectPage one(a);
    const int64_t rows = a.start[a.pages], gap = part * rows * a.dim;
    for (int64_t page = 0; page < a.pages; ++page) {
        one.begin(page, backward);
        if (backward) one.backward(begin, end, a.d_k + gap, a.d_v + gap, a.slope + part * a.pages);
        else one.forward(begin, end);
    }
}

}  // namespace
