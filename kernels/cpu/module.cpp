// Python module courier_fast._native: the CPU stages on torch tensors, through DLPack. No torch
// headers: any torch will do.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#ifdef __linux__
#include <dlfcn.h>
#endif
#ifdef COURIER_X86
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "stages.h"

namespace nb = nanobind;

courier::Finished courier::finished(double top, double others, double positive) {
    const double shift = others == 0 ? -std::numeric_limits<double>::infinity() : top;
    const double highest = positive > shift || std::isnan(positive) ? positive : shift;
    Finished f;
    f.scale = std::exp(shift - highest);
    others *= f.scale;
    const double everything = others + std::exp(positive - highest);
    f.lse = highest + std::log(everything);
    f.loss = highest == positive ? std::log1p(others) : std::log(everything) + (highest - positive);
    f.miss = others / everything;
    f.scale /= everything;
    return f;
}

using courier::Stages;
using courier::Type;

namespace {

using Array = nb::ndarray<nb::device::cpu, nb::c_contig>;
using Strided = nb::ndarray<nb::device::cpu>;
using Floats = nb::ndarray<float, nb::device::cpu, nb::c_contig>;
using Doubles = nb::ndarray<double, nb::device::cpu, nb::c_contig>;
using Rows = nb::ndarray<int64_t, nb::device::cpu, nb::c_contig>;
using Bools = nb::ndarray<bool, nb::device::cpu, nb::c_contig>;
using Words = nb::ndarray<int32_t, nb::device::cpu, nb::c_contig>;
using Variant = std::optional<std::string>;  // an instruction set; none: the best this CPU runs

constexpr uint8_t kDlpackBfloat = 4;

#ifdef COURIER_X86
// Bit of the EDX register of CPUID leaf 7.
bool has_amx_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
#endif

bool supported(const std::string& name) {
    if (name == "portable") return true;
#ifdef COURIER_X86
    __builtin_cpu_init();
    if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (name == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef COURIER_AVX512BF16
    if (name == "avx512bf16") return supported("avx512") && __builtin_cpu_supports("avx512bf16");
#endif
#endif
    return false;
}

const Stages* by_name(const std::string& name) {
#ifdef COURIER_X86
#ifdef COURIER_AVX512BF16
    if (name == "avx512bf16") return &courier::avx512bf16_stages();
#endif
    if (name == "avx512") return &courier::avx512_stages();
    if (name == "avx2") return &courier::avx2_stages();
#endif
    return &courier::portable_stages();
}

std::vector<std::string> variants() {
    std::vector<std::string> found;
    for (const char* name : {"avx512bf16", "avx512", "avx2", "portable"})
        if (supported(name)) found.emplace_back(name);
#ifdef COURIER_X86
    // Where the CPU has matrix units, the library's products use them and ours would not.
    if (found.front() == "avx512bf16" && has_amx_bf16()) std::swap(found[0], found[1]);
#endif
    return found;
}

const Stages& stages_of(const Variant& name) {
    static const Stages* best = by_name(variants().front());
    if (!name) return *best;
    const auto all = variants();
    if (std::find(all.begin(), all.end(), *name) == all.end())
        throw std::invalid_argument("variant: this CPU does not run '" + *name + "'");
    return *by_name(*name);
}

template <class A>
Type type_of(const A& x, const char* name) {
    const auto t = x.dtype();
    if (t.code == uint8_t(nb::dlpack::dtype_code::Float) && t.bits == 32) return Type::f32;
    if (t.code == kDlpackBfloat && t.bits == 16) return Type::bf16;
    throw std::invalid_argument(std::string(name) + ": expected float32 or bfloat16");
}

// A part of a range, and which of the threads takes it.
using Range = std::function<void(int64_t, int64_t, int)>;

// Parts of a range, taken one after the other by whichever thread is free.
struct Job {
    const Range* run;
    std::vector<std::pair<int64_t, int64_t>> parts;
    std::atomic<size_t> next{0};
    std::atomic<int> threads{0};
    void work() {
        const int thread = threads.fetch_add(1);
        for (size_t i; (i = next.fetch_add(1)) < parts.size();)
            (*run)(parts[i].first, parts[i].second, thread);
    }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that torch has loaded, if it is one. Its threads spin for a while after each
// product; threads of our own would compete with them for the cores. Looked up by name: nothing is
// linked, and nothing is missing without it.
GompParallel openmp() {
#ifdef __linux__
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

// Numbers to read or write (about 10 us) for which another thread is woken; that can take as long.
constexpr int64_t kWorthAThread = 1 << 15;

// [0, n) in contiguous parts, one a thread; `row`: numbers of one. Cut at `cuts` alone, if given.
void run_parts(Job& job, int threads);

void parallel(int64_t n, int64_t row, int threads, const Range& run, const int64_t* cuts = nullptr,
              int64_t n_cuts = 0) {
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, n * row / kWorthAThread)));
    Job job;
    job.run = &run;
    for (int64_t t = 1, begin = 0; t <= threads; ++t) {
        int64_t end = n * t / threads;
        if (cuts && t < threads) {
            const int64_t* cut = std::lower_bound(cuts, cuts + n_cuts, end);
            end = cut == cuts + n_cuts ? n : *cut;
        }
        if (begin < end) job.parts.emplace_back(begin, end);
        begin = end;
    }
    run_parts(job, threads);
}

// [0, n) in parts of one, for what takes long: a thread whose core is shared takes fewer of them.
void parallel_each(int64_t n, int threads, const Range& run) {
    Job job;
    job.run = &run;
    for (int64_t i = 0; i < n; ++i) job.parts.emplace_back(i, i + 1);
    run_parts(job, threads);
}

void run_parts(Job& job, int threads) {
    threads = std::min(threads, int(job.parts.size()));
    if (threads < 2) return job.work();
    if (const auto in_openmp = openmp())
        return in_openmp([](void* x) { static_cast<Job*>(x)->work(); }, &job, unsigned(threads), 0);
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(&Job::work, &job);
    job.work();
    for (auto& other : others) other.join();
}

// A stage over [0, n), as `parallel`.
template <class A>
void run(void (*Stages::*stage)(const A&, int64_t, int64_t), const A& a, int64_t n, int64_t row,
         int threads, const Variant& variant, const int64_t* cuts = nullptr, int64_t n_cuts = 0) {
    const auto rows = stages_of(variant).*stage;
    nb::gil_scoped_release release;
    parallel(n, row, threads, [&](int64_t b, int64_t e, int) { rows(a, b, e); }, cuts, n_cuts);
}

template <class A>
auto* data_or_null(const std::optional<A>& x) {
    return x ? x->data() : nullptr;
}

// Rows that are no padding, in order: their places, their pages, their rows of the table, and where
// each page begins among them. How many there are. Under torch.compile nobody else looks at what
// the user gives: offsets and indices out of range are errors here, before anything is read through
// them.
int64_t real_rows(const std::string& name, Rows offsets, std::optional<Bools> mask,
                  std::optional<Rows> index, int64_t rows, int64_t table, Rows keep, Rows page,
                  Rows source, Rows start) {
    const int64_t pages = int64_t(offsets.shape(0)) - 1;
    if (int64_t(keep.size()) < rows || int64_t(page.size()) < rows ||
        int64_t(source.size()) < rows || int64_t(start.size()) < pages + 1 ||
        (mask && int64_t(mask->size()) < rows) || (index && int64_t(index->size()) < rows))
        throw std::invalid_argument(name + ": expected a mask and an index as long as its rows");
    const int64_t* at = offsets.data();
    const bool* real = data_or_null(mask);
    const int64_t* row = data_or_null(index);
    const auto wrong = [&](const std::string& of, const std::string& expected, int64_t came) {
        return std::invalid_argument(of + ": expected " + expected + ", got " +
                                     std::to_string(came));
    };
    if (at[0] != 0) throw wrong(name + "_offsets", "to start at 0", at[0]);
    int64_t count = 0, i = 0;
    start.data()[0] = 0;
    for (int64_t b = 0; b < pages; ++b) {
        const int64_t end = at[b + 1];
        if (end < at[b])
            throw wrong(name + "_offsets", "non-decreasing values after " + std::to_string(at[b]),
                        end);
        if (end > rows)
            throw wrong(name + "_offsets", "to end at " + std::to_string(rows) + " rows or before",
                        end);
        for (; i < end; ++i) {
            if (real && !real[i]) continue;
            const int64_t from = row ? row[i] : i;
            if (from < 0 || from >= table)
                throw wrong(name, "indices from 0 to " + std::to_string(table - 1), from);
            keep.data()[count] = i;
            source.data()[count] = from;
            page.data()[count++] = b;
        }
        start.data()[b + 1] = count;
    }
    return count;
}

// For each row the history of its page, and where its attention weights begin; where the rows of
// another page begin, so that no two threads share a page. The numbers of weights and of pages.
std::pair<int64_t, int64_t> spans(Rows page, Rows start, int64_t heads, Rows first, Rows last,
                                  Rows weights_at, Rows page_starts) {
    const int64_t n = int64_t(page.size());
    int64_t weights = 0, pages = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t b = page.data()[i];
        first.data()[i] = start.data()[b];
        last.data()[i] = start.data()[b + 1];
        weights_at.data()[i] = weights;
        weights += heads * (start.data()[b + 1] - start.data()[b]);
        if (i == 0 || b != page.data()[i - 1]) page_starts.data()[pages++] = i;
    }
    return {weights, pages};
}

// What a row's maximum, sum and positive give: log-sum-exp and loss; with g, the factors of its
// part of both gradients.
void finish(Floats top, Doubles total, std::optional<Doubles> positive, std::optional<Floats> g,
            Doubles lse, Doubles loss, std::optional<Floats> factor, std::optional<Floats> pull) {
    const int64_t n = int64_t(top.size());
    for (int64_t i = 0; i < n; ++i) {
        const double others = total.data()[i];
        double scale = 1 / others, miss = 0;
        if (!positive) {
            lse.data()[i] = top.data()[i] + std::log(others);
        } else {
            const courier::Finished f =
                courier::finished(top.data()[i], others, positive->data()[i]);
            lse.data()[i] = f.lse;
            loss.data()[i] = f.loss;
            scale = f.scale;
            miss = f.miss;
        }
        if (!g) continue;
        // A row without weight has no share, also where its log-sum-exp is over nothing.
        const float weight = g->data()[i];
        factor->data()[i] = weight == 0 ? 0.0f : float(weight * scale);
        if (pull) pull->data()[i] = float(weight * miss);
    }
}

void normalize(Array source, Rows row, Array unit, Floats norm, int threads, Variant variant) {
    courier::Normalize a{};
    a.type = type_of(source, "source");
    a.source = source.data();
    a.row = row.data();
    a.unit = unit.data();
    a.norm = norm.data();
    a.dim = int64_t(source.shape(1));
    run(&Stages::normalize, a, int64_t(row.shape(0)), a.dim, threads, variant);
}

courier::Attend attention(const Array& q, const Rows& q_row, const Array& k, const Rows& k_row,
                          const Array& v, const Rows& v_row, const Rows& first, const Rows& last,
                          const Rows& weights_at, const Floats& weights, double scale,
                          int64_t heads) {
    courier::Attend a{};
    a.type = type_of(q, "q");
    a.q = q.data();
    a.k = k.data();
    a.v = v.data();
    a.q_row = q_row.data();
    a.k_row = k_row.data();
    a.v_row = v_row.data();
    a.first = first.data();
    a.last = last.data();
    a.weights_at = weights_at.data();
    a.weights = weights.data();
    a.dim = int64_t(q.shape(1));
    a.heads = heads;
    a.scale = float(scale);
    return a;
}

void attend(Array q, Rows q_row, Array k, Rows k_row, Array v, Rows v_row, Rows first, Rows last,
            Rows weights_at, Floats weights, Array e, Rows e_row, Array out, Floats norm,
            Doubles positive, double scale, int64_t heads, bool raw, int threads, Variant variant) {
    courier::Attend a =
        attention(q, q_row, k, k_row, v, v_row, first, last, weights_at, weights, scale, heads);
    a.e = e.data();
    a.e_row = e_row.data();
    a.out = out.data();
    a.norm = norm.data();
    a.positive = positive.data();
    a.raw = raw;
    run(&Stages::attend, a, int64_t(q_row.shape(0)), 8 * a.dim, threads, variant);
}

void attend_backward(Array q, Rows q_row, Array k, Rows k_row, Array v, Rows v_row, Rows first,
                     Rows last, Rows weights_at, Floats weights, Floats d_r,
                     std::optional<Floats> d_q, std::optional<Floats> d_k,
                     std::optional<Floats> d_v, Rows page_starts, double scale, int64_t heads,
                     int threads, Variant variant) {
    courier::Attend a =
        attention(q, q_row, k, k_row, v, v_row, first, last, weights_at, weights, scale, heads);
    a.d_r = d_r.data();
    a.d_q = data_or_null(d_q);
    a.d_k = data_or_null(d_k);
    a.d_v = data_or_null(d_v);
    run(&Stages::attend_backward, a, int64_t(q_row.shape(0)), 16 * a.dim, threads, variant,
        page_starts.data(), int64_t(page_starts.shape(0)));
}

void set_candidates(courier::Candidates& a, int64_t low, const std::optional<Floats>& bias,
                    const std::optional<Floats>& rank_bias, const std::optional<Floats>& count,
                    const Rows& own, const std::optional<Rows>& order,
                    const std::optional<Rows>& same, const std::optional<Rows>& page,
                    const std::optional<Rows>& above) {
    a.low = low;
    a.bias = data_or_null(bias);
    a.rank_bias = data_or_null(rank_bias);
    a.count = data_or_null(count);
    a.own = own.data();
    a.order = data_or_null(order);
    a.same = data_or_null(same);
    a.same_ranges = same ? int64_t(same->shape(1)) : 0;
    a.page = data_or_null(page);
    a.above = data_or_null(above);
}

void contrast(Strided scores, int64_t low, double inverse_tau, std::optional<Floats> bias,
              std::optional<Floats> rank_bias, std::optional<Floats> count, Rows own,
              std::optional<Rows> order, std::optional<Rows> same, std::optional<Rows> page,
              bool page_only, Floats top, Doubles total, std::optional<Rows> above, int threads,
              Variant variant) {
    if (scores.ndim() != 2 || scores.stride(1) != 1)
        throw std::invalid_argument("scores: expected rows of consecutive numbers");
    courier::Contrast a{};
    set_candidates(a, low, bias, rank_bias, count, own, order, same, page, above);
    a.type = type_of(scores, "scores");
    a.inverse_tau = float(inverse_tau);
    a.page_only = page_only;
    a.top = top.data();
    a.total = total.data();
    a.scores = scores.data();
    a.stride = scores.stride(0);
    a.columns = int64_t(scores.shape(1));
    run(&Stages::contrast, a, int64_t(scores.shape(0)), a.columns, threads, variant);
}

// The sizes of what `pack` and `tile` fill, so that only C++ knows the layouts: 0 where this
// variant has no products.
int64_t panel_columns(Variant variant) {
    return stages_of(variant).tile ? courier::kPanelColumns : 0;
}

int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Numbers (of 4 bytes) in Pack::across, Pack::along, Tile::kept, and of a thread in Tile::scratch.
std::vector<int64_t> packed_sizes(int64_t rows, int64_t columns, int64_t dim) {
    return {parts_of(columns, courier::kPanelColumns) * courier::kPanelColumns * dim / 2,
            parts_of(columns, 2) * dim,
            parts_of(columns, courier::kBlockColumns) * courier::kBlockColumns * parts_of(rows, 2),
            courier::kGroupRows * courier::scores_stride(columns) / 2};
}

// The most rows at a time with which all threads end at about the same time; a group has a cost of
// its own, as of 3 rows.
int64_t group_rows(int64_t rows, int threads) {
    int64_t best = courier::kGroupRows, least = INT64_MAX;
    for (int64_t group = courier::kGroupRows; group >= 12; group -= 6) {
        const int64_t cost = parts_of(parts_of(rows, group), threads) * (group + 3);
        if (cost < least) {
            least = cost;
            best = group;
        }
    }
    return best;
}

uint32_t* words(const std::optional<Words>& x, int64_t at_least) {
    if (!x) return nullptr;
    if (int64_t(x->size()) < at_least) throw std::invalid_argument("packed: too small");
    return reinterpret_cast<uint32_t*>(x->data());
}

void pack(Array rows, std::optional<Words> across, std::optional<Words> along, int threads,
          Variant variant) {
    const int64_t n = int64_t(rows.shape(0)), dim = int64_t(rows.shape(1));
    const auto sizes = packed_sizes(0, n, dim);
    courier::Pack a{rows.data(), n, dim, words(across, sizes[0]), words(along, sizes[1])};
    const Stages& s = stages_of(variant);
    nb::gil_scoped_release release;
    parallel(parts_of(n, courier::kPanelColumns), courier::kPanelColumns * dim, threads,
             [&](int64_t b, int64_t e, int) { s.pack(a, b, e); });
}

void tile(Array x, Words across, std::optional<Words> along, int64_t columns, double inverse_tau,
          std::optional<Floats> bias, std::optional<Floats> rank_bias, std::optional<Floats> count,
          Rows own, std::optional<Rows> order, std::optional<Rows> same, std::optional<Rows> page,
          Floats top, Doubles total, std::optional<Rows> above, std::optional<Floats> product,
          std::optional<Words> kept, Words scratch, int threads, Variant variant) {
    courier::Tile a{};
    a.rows = int64_t(x.shape(0));
    a.dim = int64_t(x.shape(1));
    const auto sizes = packed_sizes(a.rows, columns, a.dim);
    a.x = x.data();
    a.across = words(across, sizes[0]);
    a.along = words(along, sizes[1]);
    set_candidates(a.contrast, 0, bias, rank_bias, count, own, order, same, page, above);
    a.contrast.type = Type::bf16;
    a.contrast.inverse_tau = float(inverse_tau);
    a.contrast.top = top.data();
    a.contrast.total = total.data();
    a.contrast.columns = columns;
    a.product = data_or_null(product);
    a.kept = words(kept, sizes[2]);
    a.scratch = words(scratch, threads * sizes[3]);
    a.group = group_rows(a.rows, threads);
    const Stages& s = stages_of(variant);
    nb::gil_scoped_release release;
    parallel_each(parts_of(a.rows, a.group), threads, [&](int64_t b, int64_t e, int thread) {
        courier::Tile own = a;
        own.scratch += thread * sizes[3];
        s.tile(own, b, e);
    });
}

void transposed(Words kept, Words weighted, int64_t rows, Floats d_y, int threads,
                Variant variant) {
    const int64_t columns = int64_t(d_y.shape(0)), dim = int64_t(d_y.shape(1));
    courier::Transposed a{words(kept, packed_sizes(rows, columns, dim)[2]),
                          words(weighted, packed_sizes(0, rows, dim)[1]), parts_of(rows, 2),
                          columns, dim, d_y.data()};
    const Stages& s = stages_of(variant);
    nb::gil_scoped_release release;
    parallel_each(parts_of(columns, courier::kBlockColumns), threads,
                  [&](int64_t b, int64_t e, int) { s.transposed(a, b, e); });
}

void weigh(Array product, Array x, std::optional<Array> own, Floats factor,
           std::optional<Floats> pull, Floats d_x, Array weighted, std::optional<Floats> d_own,
           int threads, Variant variant) {
    courier::Weigh a{};
    a.type = type_of(x, "x");
    a.product_type = type_of(product, "product");
    a.product = product.data();
    a.x = x.data();
    a.own = data_or_null(own);
    a.factor = factor.data();
    a.pull = data_or_null(pull);
    a.d_x = d_x.data();
    a.weighted = weighted.data();
    a.d_own = data_or_null(d_own);
    a.dim = int64_t(x.shape(1));
    run(&Stages::weigh, a, int64_t(x.shape(0)), 3 * a.dim, threads, variant);
}

void normalize_backward(Floats d_unit, Array unit, Floats norm, Array out, double scale,
                        int threads, Variant variant) {
    courier::NormalizeBackward a{};
    a.type = type_of(unit, "unit");
    a.out_type = type_of(out, "out");
    a.scale = float(scale);
    a.d_unit = d_unit.data();
    a.unit = unit.data();
    a.norm = norm.data();
    a.out = out.data();
    a.dim = int64_t(unit.shape(1));
    run(&Stages::normalize_backward, a, int64_t(unit.shape(0)), 2 * a.dim, threads, variant);
}

void candidate(Array x, std::optional<Array> y, Rows start, std::optional<Rows> range, Array v,
               Rows v_row, std::optional<Floats> column_scale, std::optional<Floats> row_scale,
               Floats e_inverse, double scale, double inverse_tau, Floats s, bool backward,
               std::optional<Floats> q_radial, std::optional<Floats> k_radial,
               std::optional<Floats> d_v, std::optional<Doubles> slope, int threads,
               Variant variant) {
    courier::Candidate a{};
    a.type = type_of(x, "x");
    a.x = x.data();
    a.y = data_or_null(y);
    a.columns = int64_t(x.shape(1));
    a.dim = int64_t(v.shape(1));
    a.start = start.data();
    a.range = data_or_null(range);
    a.v = v.data();
    a.v_row = v_row.data();
    a.column_scale = data_or_null(column_scale);
    a.row_scale = data_or_null(row_scale);
    a.e_inverse = e_inverse.data();
    a.scale = float(scale);
    a.inverse_tau = float(inverse_tau);
    a.s = s.data();
    a.q_radial = data_or_null(q_radial);
    a.k_radial = data_or_null(k_radial);
    a.d_v = data_or_null(d_v);
    a.slope = data_or_null(slope);
    if (backward && !slope) throw std::invalid_argument("slope: expected with backward");
    const Stages& stages = stages_of(variant);
    const int64_t pages = int64_t(start.size()) - 1;
    nb::gil_scoped_release release;
    parallel_each(pages, threads,
                  [&](int64_t b, int64_t e, int) { stages.candidate(a, backward, b, e); });
}

// The columns are divided into `parts`, each with sums of its own.
void direct(Floats q, Floats e, int64_t low, Floats k, Floats v, Rows start,
            std::optional<Rows> range, Floats e_inverse, double scale, double inverse_tau,
            int64_t heads, Floats s, bool backward, int64_t parts, std::optional<Floats> d_q,
            std::optional<Floats> d_e, std::optional<Floats> d_k, std::optional<Floats> d_v,
            std::optional<Doubles> slope, int threads, Variant variant) {
    courier::Direct a{};
    a.q = q.data();
    a.e = e.data();
    a.k = k.data();
    a.v = v.data();
    a.low = low;
    a.dim = int64_t(q.shape(0));
    a.stride = int64_t(q.shape(1));
    a.pages = int64_t(s.shape(0));
    a.columns = int64_t(s.shape(1));
    a.heads = heads;
    a.start = start.data();
    a.range = data_or_null(range);
    a.e_inverse = e_inverse.data();
    a.scale = float(scale);
    a.inverse_tau = float(inverse_tau);
    a.s = s.data();
    a.d_q = data_or_null(d_q);
    a.d_e = data_or_null(d_e);
    a.d_k = data_or_null(d_k);
    a.d_v = data_or_null(d_v);
    a.slope = data_or_null(slope);
    if (backward && !(d_k && d_v && slope))
        throw std::invalid_argument("d_k, d_v, slope: expected with backward");
    const Stages& stages = stages_of(variant);
    nb::gil_scoped_release release;
    parallel_each(parts, threads, [&](int64_t part, int64_t, int) {
        // At whole blocks, but for the last.
        const auto cut = [&](int64_t p) {
            return p == parts ? a.columns : a.columns * p / parts / 128 * 128;
        };
        stages.direct(a, backward, part, cut(part), cut(part + 1));
    });
}

void softmax(Floats s, int64_t low, Rows anchors, std::optional<Rows> range,
             std::optional<Floats> bias, std::optional<Floats> rank_bias,
             std::optional<Floats> count, Rows own, std::optional<Rows> order,
             std::optional<Rows> same, std::optional<Rows> page, std::optional<Floats> g,
             Doubles lse, Doubles loss, Doubles positive, std::optional<Rows> above, int threads,
             Variant variant) {
    courier::Softmax a{};
    set_candidates(a, low, bias, rank_bias, count, own, order, same, page, above);
    a.s = s.data();
    a.columns = int64_t(s.shape(1));
    a.anchors = anchors.data();
    a.range = data_or_null(range);
    a.g = data_or_null(g);
    a.lse = lse.data();
    a.loss = loss.data();
    a.positive = positive.data();
    run(&Stages::softmax, a, int64_t(s.shape(0)), a.columns, threads, variant);
}

void add(Floats sum, Array part, int threads, Variant variant) {
    if (sum.size() != part.size())
        throw std::invalid_argument("part: expected as many numbers as in sum");
    courier::Add a{sum.data(), part.data(), type_of(part, "part")};
    run(&Stages::add, a, int64_t(sum.size()), 1, threads, variant);
}

// Arguments go by their place. Arrays are written in place: a silent copy of one of another type or
// order would lose the result, hence noconvert.
template <class T>
struct Argument {
    static auto make() { return nb::arg(); }
};
template <class... Parameters>
struct Argument<nb::ndarray<Parameters...>> {
    static auto make() { return nb::arg().noconvert(); }
};
template <class T>
struct Argument<std::optional<T>> {
    static auto make() { return Argument<T>::make().none(); }
};

template <class Result, class... A>
void define(nb::module_& m, const char* name, Result (*function)(A...)) {
    m.def(name, function, Argument<A>::make()...);
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("variants", &variants, "Instruction sets this CPU runs, the best first.");
    m.def("panel_columns", &panel_columns, nb::arg().none(),
          "What the dimension has to be a multiple of for `pack`, `tile` and `transposed`; 0: the "
          "variant has none.");
    define(m, "real_rows", &real_rows);
    define(m, "spans", &spans);
    define(m, "finish", &finish);
    define(m, "normalize", &normalize);
    define(m, "attend", &attend);
    define(m, "attend_backward", &attend_backward);
    define(m, "contrast", &contrast);
    define(m, "packed_sizes", &packed_sizes);
    define(m, "pack", &pack);
    define(m, "tile", &tile);
    define(m, "transposed", &transposed);
    define(m, "weigh", &weigh);
    define(m, "normalize_backward", &normalize_backward);
    define(m, "candidate", &candidate);
    define(m, "direct", &direct);
    define(m, "softmax", &softmax);
    define(m, "add", &add);
}
