// The stages of the CPU path: what happens between two matrix products, a range of rows at a time.
#pragma once

#include <cstdint>

namespace courier {

enum class Type : int { f32 = 0, bf16 = 1 };

// e = E / |E| of listed rows. unit [n, dim], norm [n].
struct Normalize {
    Type type;
    const void* source;
    const int64_t* row;  // [n] rows of source
    void* unit;
    float* norm;
    int64_t dim;
};

// Attention of listed PV rows over their page's history, and its gradients. History is listed too,
// page after page.
struct Attend {
    Type type;
    const void *q, *k, *v, *e;
    const int64_t *q_row, *e_row;  // [M]
    const int64_t *k_row, *v_row;  // [K]
    const int64_t *first, *last;   // [M] range of each row's page in the history list
    const int64_t* weights_at;     // [M] where the row's attention weights begin: heads x history
    float* weights;
    void* out;                     // [M, dim] R / |R|, or R itself with raw
    float* norm;                   // [M] |R|
    double* positive;              // [M] cos(R, E)
    int64_t dim, heads;
    float scale;
    bool raw;
    // Gradients.
    const float* d_r;              // [M, dim]
    float *d_q, *d_k, *d_v;        // [M, dim], [K, dim], [K, dim]; null: none. d_k = d_v: the sum
};

// The columns that rows meet, which of them are no candidates of a row, and what is added to their
// scores. Columns are numbered among all; these begin at column `low`.
struct Candidates {
    int64_t low, columns;
    const float* bias;       // [columns] or null
    const float* rank_bias;  // [columns] or null: the part of the bias that ranks see
    const float* count;      // [columns] or null: how many candidates a column stands for
    const int64_t* own;      // [rows] the row's own column, left out: its positive, or itself
    const int64_t* order;    // columns by item id, or null
    const int64_t* same;     // [rows, same_ranges, 2] ranges of `order` that are left out
    int64_t same_ranges;
    const int64_t* page;     // [rows, 2] columns of the row's page, or null
    int64_t* above;          // [rows] candidates that score above the row's own column, or null
};

// Scores to probabilities, in place: P_ij = exp(s_ij - top_i) with s_ij = cos_ij / tau + bias_j, 0
// where the row has no such candidate.
struct Contrast : Candidates {
    Type type;
    void* scores;    // [rows, columns] with stride
    int64_t stride;
    float inverse_tau;
    bool page_only;  // the columns of the page are the candidates; else they are left out
    float* top;      // [rows]
    double* total;   // [rows]
};

// What follows the product P y of a chunk: d_x = factor P y - pull own, weighted = factor x,
// d_own = -pull x.
struct Weigh {
    Type type, product_type;
    const void *product, *x;               // [rows, dim]; the product may be d_x itself
    const void* own;                       // [rows, dim] or null: no pull
    const float *factor, *pull;            // [rows]
    float* d_x;                            // [rows, dim]
    void* weighted;                        // [rows, dim]
    float* d_own;                          // [rows, dim] or null
    int64_t dim;
};

// dL/dx = scale (dL/du - (dL/du . u) u) / |x| for u = x / |x|.
struct NormalizeBackward {
    Type type;
    float scale;
    const float* d_unit;                   // [n, dim]
    const void* unit;
    const float* norm;
    void* out;                             // [n, dim] of out_type
    Type out_type;
    int64_t dim;
};

// sum += part
struct Add {
    float* sum;
    const void* part;
    Type type;
};

// The products of the contrast in bfloat16, for instruction sets that have them; dim is a multiple
// of kPanelColumns.
constexpr int64_t kPanelColumns = 64, kBlockColumns = 48, kGroupRows = 48;

// Rows [n, dim] as the right side of a product, in pairs of numbers summed over; one may be null.
struct Pack {
    const void* rows;
    int64_t n, dim;
    uint32_t* across;  // [panels, dim / 2, kPanelColumns]: rows as columns, pairs along dim; zeros
                       // past the last row
    uint32_t* along;   // [dim / kPanelColumns, (n + 1) / 2, kPanelColumns]: pairs of rows
};

// Scores of `rows` rows against all columns, what Contrast makes of them, and the product with
// the columns.
struct Tile {
    const void* x;                   // [rows, dim]
    const uint32_t *across, *along;  // the columns
    int64_t rows, dim;
    int64_t group;                   // rows at a time: even, at most kGroupRows
    Contrast contrast;               // without scores
    float* product;                  // [rows, dim] P y, or null
    uint32_t* kept;                  // [blocks of kBlockColumns, (rows + 1) / 2, kBlockColumns] P
                                     // or null
    uint32_t* scratch;               // [kGroupRows, scores_stride / 2] of this thread
};
// Of a row of bfloat16 scores: whole panels, and whole blocks of what is kept.
// (static: see the note in stages.inl.h.)
static constexpr int64_t scores_stride(int64_t columns) {
    return ((columns + kPanelColumns - 1) / kPanelColumns + 1) * kPanelColumns;
}

struct Transposed {
    const uint32_t *kept, *weighted;       // P as Tile left it; [rows, dim] packed along
    int64_t pairs, columns, dim;           // (rows + 1) / 2
    float* d_y;                            // [columns, dim], added to
};

// What a sum over exp(score - top), the positive apart, gives for its row. Without other candidates
// the loss is exactly 0.
struct Finished {
    double lse, loss;
    double miss;   // 1 - p of the positive
    double scale;  // of exp(score - top) to p
};
Finished finished(double top, double others, double positive);

// Attention for each candidate (candidate.inl.h): products of the columns with rows of history,
// page after page.
struct Candidate {
    Type type;
    void *x, *y;                // [rows, columns] E_j . v_k and q_j . k_k (null: the same);
                                // backward: their gradients
    int64_t columns, dim;
    const int64_t* start;       // [pages + 1] first row of each page
    const int64_t* range;       // [pages, 2] columns that a page looks at, or null: all
    const void* v;
    const int64_t* v_row;       // [rows] rows of v
    const float* column_scale;  // [columns] of the logits, or null: `scale`
    const float* row_scale;     // [rows] of the logits, or null
    const float* e_inverse;     // [columns] 1 / |E_j|, 0 for a zero vector
    float scale, inverse_tau;
    float* s;                   // [pages, columns] cos / tau; backward: dL/ds, then what
                                // E_j / |E_j|^2 is subtracted by
    // Gradients.
    float* q_radial;            // [pages, columns] the same for q, or null
    float* k_radial;            // [rows] and for k where the logits are cosines, or null; added to
    float* d_v;                 // [rows, dim] through |R|, or null
    double* slope;              // [pages] sum of dL/ds s
};

// The same without products made before (direct.inl.h): rows [n, dim] of float32, of the columns as
// columns.
struct Direct {
    const float *q, *e;      // [dim, stride] from column `low` on, columns of them; may be the same
    const float *k, *v;      // [rows, dim]
    int64_t low, stride, columns, dim, heads, pages;
    const int64_t* start;    // [pages + 1] first row of each page
    const int64_t* range;    // [pages, 2] columns that a page looks at, or null: all
    const float* e_inverse;  // [stride] 1 / |E_j|, 0 for a zero vector
    float scale, inverse_tau;
    float* s;                // [pages, columns] cos / tau; backward: dL/ds, then what
                             // E_j / |E_j|^2 is subtracted by
    // Gradients, added to; of each part of the columns: d_k, d_v and slope.
    float *d_q, *d_e;        // [dim, stride], or null
    float *d_k, *d_v;        // [parts, rows, dim]
    double* slope;           // [parts, pages] sum of dL/ds s
};

// The contrast of those scores, for each anchor (row) of a page.
struct Softmax : Candidates {
    float* s;                     // [pages, columns]; with g: dL/ds in its place
    const int64_t* anchors;       // [pages + 1] first anchor of each page
    const int64_t* range;         // [pages, 2] columns that a page looks at, or null: all
    const float* g;               // [M] or null
    double *lse, *loss, *positive;  // [M]
};

struct Stages {
    const char* name;
    void (*normalize)(const Normalize&, int64_t begin, int64_t end);
    void (*attend)(const Attend&, int64_t begin, int64_t end);
    void (*attend_backward)(const Attend&, int64_t begin, int64_t end);
    void (*contrast)(const Contrast&, int64_t begin, int64_t end);
    void (*weigh)(const Weigh&, int64_t begin, int64_t end);
    void (*normalize_backward)(const NormalizeBackward&, int64_t begin, int64_t end);
    void (*add)(const Add&, int64_t begin, int64_t end);
    void (*candidate)(const Candidate&, bool backward, int64_t begin, int64_t end);
    void (*direct)(const Direct&, bool backward, int64_t part, int64_t begin, int64_t end);
    void (*softmax)(const Softmax&, int64_t begin, int64_t end);
    // These three are null where torch.mm is used.
    void (*pack)(const Pack&, int64_t begin, int64_t end);
    void (*tile)(const Tile&, int64_t begin, int64_t end);
    void (*transposed)(const Transposed&, int64_t begin, int64_t end);
};

const Stages& portable_stages();
#ifdef COURIER_X86
const Stages& avx2_stages();
const Stages& avx512_stages();
const Stages& avx512bf16_stages();
#endif

}  // namespace courier
