// AVX-512 with its bfloat16 dot products: beside the stages, the three products of the contrast
// themselves. What a library cannot do: the columns are packed once and not once a chunk, a few
// rows of scores become probabilities and meet their second product while they are in the cache,
// and what is kept for the third is kept as that one reads it.
#define COURIER_LANES 16
#include "stages.inl.h"

#include <immintrin.h>

namespace courier {
namespace {

#define UNROLL _Pragma("GCC unroll 8")  // or the sums go through memory

// A tile of kTall rows by one panel of columns is what the registers hold: 24 sums, 4 vectors of
// columns, one of a row.
constexpr int64_t kTall = 6, kPanel = kPanelColumns, kVectors = kPanel / 16;
// Pairs of the contraction at a time: as much of a panel as stays in the L1 cache beside the rows.
constexpr int64_t kDepth = 128;

inline uint32_t pair_at(const void* p) {
    uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

// sums[r][16 v ..] += sum over k of A(r, k) B(k, 16 v ..), pairs of bfloat16 each.
// A(r, k) is at a + r row + k step. `ahead`: a line of this for each k is asked for meanwhile; the
// CPU's own prefetching is late where panels end.
template <int R>
inline void multiply(__m512 (&sums)[R][kVectors], const uint32_t* a, int64_t row, int64_t step,
                     const uint32_t* b, int64_t pairs, const void* ahead) {
    for (int64_t k = 0; k < pairs; ++k) {
        _mm_prefetch(static_cast<const char*>(ahead) + 64 * k, _MM_HINT_T1);
        __m512i columns[kVectors];
        UNROLL for (int v = 0; v < kVectors; ++v)
            columns[v] = _mm512_loadu_si512(b + k * kPanel + 16 * v);
        UNROLL for (int r = 0; r < R; ++r) {
            const __m512bh x =
                (__m512bh)_mm512_set1_epi32(int32_t(pair_at(a + r * row + k * step)));
            UNROLL for (int v = 0; v < kVectors; ++v)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, (__m512bh)columns[v]);
        }
    }
}

// out (bfloat16) = A B
template <int R>
void product_rounded(const uint32_t* a, int64_t row, const uint32_t* b, int64_t pairs,
                     const void* ahead, uint16_t* out, int64_t stride) {
    __m512 sums[R][kVectors] = {};
    multiply<R>(sums, a, row, 1, b, pairs, ahead);
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int v = 0; v < kVectors; v += 2)
            _mm512_storeu_si512(out + r * stride + 16 * v,
                                (__m512i)_mm512_cvtne2ps_pbh(sums[r][v + 1], sums[r][v]));
}

// out (float32) += A B
template <int R>
void product_added(const uint32_t* a, int64_t row, int64_t step, const uint32_t* b, int64_t pairs,
                   const void* ahead, float* out, int64_t stride) {
    __m512 sums[R][kVectors];
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int v = 0; v < kVectors; ++v)
            sums[r][v] = _mm512_loadu_ps(out + r * stride + 16 * v);
    multiply<R>(sums, a, row, step, b, pairs, ahead);
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int v = 0; v < kVectors; ++v)
            _mm512_storeu_ps(out + r * stride + 16 * v, sums[r][v]);
}

using Rounded = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, const void*, uint16_t*,
                         int64_t);
using Added = void (*)(const uint32_t*, int64_t, int64_t, const uint32_t*, int64_t, const void*,
                       float*, int64_t);
constexpr Rounded kRounded[] = {product_rounded<1>, product_rounded<2>, product_rounded<3>,
                                product_rounded<4>, product_rounded<5>, product_rounded<6>};
constexpr Added kAdded[] = {product_added<1>, product_added<2>, product_added<3>,
                            product_added<4>, product_added<5>, product_added<6>};

// Panels [begin, end) of the rows.
void pack(const Pack& a, int64_t begin, int64_t end) {
    const int64_t pairs = a.dim / 2, row_pairs = (a.n + 1) / 2;
    const auto* rows = static_cast<const uint16_t*>(a.rows);
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kPanel, last = smaller(first + kPanel, a.n);
        if (a.across) {
            uint32_t* out = a.across + panel * kPanel * pairs;
            if (last < first + kPanel) std::memset(out, 0, 4 * kPanel * pairs);
            for (int64_t k = 0; k < pairs; k += 16)  // a line of each row at a time
                for (int64_t i = first; i < last; ++i)
                    for (int64_t l = k; l < k + 16; ++l)
                        out[l * kPanel + i - first] = pair_at(rows + i * a.dim + 2 * l);
        }
        if (!a.along) continue;
        for (int64_t i = first; i < last; i += 2) {
            const uint16_t* x = rows + i * a.dim;
            const bool two = i + 1 < a.n;
            for (int64_t d = 0; d < a.dim; d += 16) {
                __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + d)));
                if (two) {
                    const __m512i high =
                        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + a.dim + d)));
                    low = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                }
                _mm512_storeu_si512(
                    a.along + ((d / kPanel) * row_pairs + i / 2) * kPanel + d % kPanel, low);
            }
        }
    }
}

// Groups [begin, end) of rows: scores, probabilities, their product with the columns.
void tile(const Tile& a, int64_t begin, int64_t end) {
    const int64_t n = a.contrast.columns, panels = (n + kPanel - 1) / kPanel;
    const int64_t stride = scores_stride(n), pairs = a.dim / 2, column_pairs = (n + 1) / 2;
    const int64_t kept_pairs = (a.rows + 1) / 2, blocks = (n + kBlockColumns - 1) / kBlockColumns;
    auto* s = reinterpret_cast<uint16_t*>(a.scratch);
    for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * a.group, rows = smaller(a.group, a.rows - first);
        const auto* x =
            reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(a.x) + first * a.dim);
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t r = 0; r < rows; r += kTall)
                kRounded[smaller(kTall, rows - r) - 1](
                    x + r * pairs, pairs, a.across + panel * kPanel * pairs, pairs,
                    a.across + ((panel + 1) * kPanel + r / kTall % 4 * 16) * pairs,
                    s + r * stride + panel * kPanel, stride);
        Contrast c = a.contrast;
        c.scores = s - first * stride;
        c.stride = stride;
        contrast_rows<bf16>(c, first, first + rows);
        if (!a.product) continue;

        // Zeros past the last column, and in the other row of a pair.
        for (int64_t r = 0; r < rows; ++r) std::memset(s + r * stride + n, 0, 2 * (stride - n));
        if (rows % 2) std::memset(s + rows * stride, 0, 2 * stride);
        float* product = a.product + first * a.dim;
        std::memset(product, 0, sizeof(float) * rows * a.dim);
        for (int64_t k = 0; k < column_pairs; k += kDepth)
            for (int64_t d = 0; d < a.dim; d += kPanel)
                for (int64_t r = 0; r < rows; r += kTall) {
                    const bool more = d + kPanel < a.dim;
                    const int64_t next =
                        more ? (d + kPanel) * column_pairs + k * kPanel : (k + kDepth) * kPanel;
                    kAdded[smaller(kTall, rows - r) - 1](
                        reinterpret_cast<const uint32_t*>(s + r * stride) + k, stride / 2, 1,
                        a.along + d * column_pairs + k * kPanel, smaller(kDepth, column_pairs - k),
                        a.along + next + r / kTall % 4 * 16 * kDepth, product + r * a.dim + d,
                        a.dim);
                }
        if (!a.kept) continue;
        for (int64_t block = 0; block < blocks; ++block) {
            uint32_t* out = a.kept + (block * kept_pairs + first / 2) * kBlockColumns;
            for (int64_t r = 0; r < rows; r += 2)
                for (int64_t j = 0; j < kBlockColumns; j += 16, out += 16) {
                    const uint16_t* from = s + r * stride + block * kBlockColumns + j;
                    const __m512i low =
                        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
                    const __m512i high =
                        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + stride)));
                    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                }
        }
    }
}

// Blocks [begin, end) of kBlockColumns columns: d_y += P^T weighted.
void transposed(const Transposed& a, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        const uint32_t* p = a.kept + block * a.pairs * kBlockColumns;
        const int64_t first = block * kBlockColumns,
                      columns = smaller(kBlockColumns, a.columns - first);
        for (int64_t k = 0; k < a.pairs; k += kDepth)
            for (int64_t d = 0; d < a.dim; d += kPanel)
                for (int64_t j = 0; j < columns; j += kTall) {
                    // The next part of P, then the next block's gradients, both from memory.
                    const int64_t part = d / kPanel * (kBlockColumns / kTall) + j / kTall;
                    const void* ahead = p + (k + kDepth) * kBlockColumns + part % 3 * 16 * kDepth;
                    if (k == 0 && part >= 3)
                        ahead = a.d_y + (first + kBlockColumns) * a.dim + (part - 3) * 16 * kDepth;
                    kAdded[smaller(kTall, columns - j) - 1](
                        p + k * kBlockColumns + j, 1, kBlockColumns,
                        a.weighted + d * a.pairs + k * kPanel, smaller(kDepth, a.pairs - k), ahead,
                        a.d_y + (first + j) * a.dim + d, a.dim);
                }
    }
}

}  // namespace

const Stages& avx512bf16_stages() {
    static const Stages stages = [] {
        Stages s = make_stages("avx512bf16");
        s.pack = pack;
        s.tile = tile;
        s.transposed = transposed;
        return s;
    }();
    return stages;
}
}  // namespace courier
