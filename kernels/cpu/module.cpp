// Python module courier_fast._native: the CPU stages on torch tensors, through DLPack. No torch headers: any torch will do.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#ifdef __linux__
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "stages.h"

namespace nb = nanobind;
using courier::Stages;
using courier::Type;

namespace {

using Array = nb::ndarray<nb::device::cpu, nb::c_contig>;
using Strided = nb::ndarray<nb::device::cpu>;
using Floats = nb::ndarray<float, nb::device::cpu, nb::c_contig>;
using Doubles = nb::ndarray<double, nb::device::cpu, nb::c_contig>;
using Rows = nb::ndarray<int64_t, nb::device::cpu, nb::c_contig>;

constexpr uint8_t kDlpackBfloat = 4;

bool supported(const std::string& name) {
    if (name == "portable") return true;
#ifdef COURIER_X86
    __builtin_cpu_init();
    if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (name == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return false;
}

const Stages* by_name(const std::string& name) {
#ifdef COURIER_X86
    if (name == "avx512") return &courier::avx512_stages();
    if (name == "avx2") return &courier::avx2_stages();
#endif
    return &courier::portable_stages();
}

std::vector<std::string> variants() {
    std::vector<std::string> found;
    for (const char* name : {"avx512", "avx2", "portable"})
        if (supported(name)) found.emplace_back(name);
    return found;
}

const Stages& stages_of(const std::optional<std::string>& name) {
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

using Range = std::function<void(int64_t, int64_t)>;

// Parts of a range, taken one after the other by whichever thread is free.
struct Job {
    const Range* run;
    std::vector<std::pair<int64_t, int64_t>> parts;
    std::atomic<size_t> next{0};
    void work() {
        for (size_t i; (i = next.fetch_add(1)) < parts.size();) (*run)(parts[i].first, parts[i].second);
    }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that torch has loaded, if it is one. Its threads spin for a while after each product; threads of our
// own would compete with them for the cores. Looked up by name: nothing is linked, and nothing is missing without it.
GompParallel openmp() {
#ifdef __linux__
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

// [0, n) in contiguous parts, one a thread. `cuts`: only these places may divide it.
void parallel(int64_t n, int threads, const Range& run, const int64_t* cuts = nullptr, int64_t n_cuts = 0) {
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, n / 8)));
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
    if (job.parts.size() < 2) return job.work();
    if (const auto in_openmp = openmp())
        return in_openmp([](void* x) { static_cast<Job*>(x)->work(); }, &job, unsigned(job.parts.size()), 0);
    std::vector<std::thread> others;
    for (size_t t = 1; t < job.parts.size(); ++t) others.emplace_back(&Job::work, &job);
    job.work();
    for (auto& other : others) other.join();
}

template <class A>
auto* data_or_null(const std::optional<A>& x) {
    return x ? x->data() : nullptr;
}

void normalize(Array source, Rows row, Array unit, Floats norm, int threads, std::optional<std::string> variant) {
    courier::Normalize a{};
    a.type = type_of(source, "source");
    a.source = source.data();
    a.row = row.data();
    a.unit = unit.data();
    a.norm = norm.data();
    a.dim = int64_t(source.shape(1));
    const Stages& s = stages_of(variant);
    const int64_t n = int64_t(row.shape(0));
    nb::gil_scoped_release release;
    parallel(n, threads, [&](int64_t b, int64_t e) { s.normalize(a, b, e); });
}

courier::Attend attention(const Array& q, const Rows& q_row, const Array& k, const Rows& k_row, const Array& v,
                          const Rows& v_row, const Rows& first, const Rows& last, const Rows& weights_at,
                          const Floats& weights, double scale, int64_t heads) {
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

void attend(Array q, Rows q_row, Array k, Rows k_row, Array v, Rows v_row, Rows first, Rows last, Rows weights_at,
            Floats weights, Array e, Rows e_row, Array out, Floats norm, Doubles positive, double scale, int64_t heads,
            bool raw, int threads, std::optional<std::string> variant) {
    courier::Attend a = attention(q, q_row, k, k_row, v, v_row, first, last, weights_at, weights, scale, heads);
    a.e = e.data();
    a.e_row = e_row.data();
    a.out = out.data();
    a.norm = norm.data();
    a.positive = positive.data();
    a.raw = raw;
    const Stages& s = stages_of(variant);
    const int64_t n = int64_t(q_row.shape(0));
    nb::gil_scoped_release release;
    parallel(n, threads, [&](int64_t b, int64_t e) { s.attend(a, b, e); });
}

void attend_backward(Array q, Rows q_row, Array k, Rows k_row, Array v, Rows v_row, Rows first, Rows last,
                     Rows weights_at, Floats weights, Floats d_r, std::optional<Floats> d_q, std::optional<Floats> d_k,
                     std::optional<Floats> d_v, Rows page_starts, double scale, int64_t heads, int threads,
                     std::optional<std::string> variant) {
    courier::Attend a = attention(q, q_row, k, k_row, v, v_row, first, last, weights_at, weights, scale, heads);
    a.d_r = d_r.data();
    a.d_q = data_or_null(d_q);
    a.d_k = data_or_null(d_k);
    a.d_v = data_or_null(d_v);
    const Stages& s = stages_of(variant);
    const int64_t n = int64_t(q_row.shape(0));
    nb::gil_scoped_release release;
    parallel(
        n, threads, [&](int64_t b, int64_t e) { s.attend_backward(a, b, e); }, page_starts.data(),
        int64_t(page_starts.shape(0)));
}

void contrast(Strided scores, int64_t low, double inverse_tau, std::optional<Floats> bias,
              std::optional<Floats> rank_bias, std::optional<Floats> count, Rows own, std::optional<Rows> order,
              std::optional<Rows> same, std::optional<Rows> page, bool page_only, Floats top,
              Doubles total, std::optional<Rows> above, int threads, std::optional<std::string> variant) {
    if (scores.ndim() != 2 || scores.stride(1) != 1)
        throw std::invalid_argument("scores: expected rows of consecutive numbers");
    courier::Contrast a{};
    a.type = type_of(scores, "scores");
    a.scores = scores.data();
    a.stride = scores.stride(0);
    a.low = low;
    a.columns = int64_t(scores.shape(1));
    a.inverse_tau = float(inverse_tau);
    a.bias = data_or_null(bias);
    a.rank_bias = data_or_null(rank_bias);
    a.count = data_or_null(count);
    a.own = own.data();
    a.order = data_or_null(order);
    a.same = data_or_null(same);
    a.same_ranges = same ? int64_t(same->shape(1)) : 0;
    a.page = data_or_null(page);
    a.page_only = page_only;
    a.top = top.data();
    a.total = total.data();
    a.above = data_or_null(above);
    const Stages& s = stages_of(variant);
    const int64_t n = int64_t(scores.shape(0));
    nb::gil_scoped_release release;
    parallel(n, threads, [&](int64_t b, int64_t e) { s.contrast(a, b, e); });
}

void weigh(Array product, Array x, std::optional<Array> own, Floats factor, std::optional<Floats> pull, Floats d_x,
           Array weighted, std::optional<Floats> d_own, int threads, std::optional<std::string> variant) {
    courier::Weigh a{};
    a.type = type_of(x, "x");
    a.product = product.data();
    a.x = x.data();
    a.own = data_or_null(own);
    a.factor = factor.data();
    a.pull = data_or_null(pull);
    a.d_x = d_x.data();
    a.weighted = weighted.data();
    a.d_own = data_or_null(d_own);
    a.dim = int64_t(x.shape(1));
    const Stages& s = stages_of(variant);
    const int64_t n = int64_t(x.shape(0));
    nb::gil_scoped_release release;
    parallel(n, threads, [&](int64_t b, int64_t e) { s.weigh(a, b, e); });
}

void normalize_backward(Floats d_unit, Array unit, Floats norm, Array out, double scale, int threads,
                        std::optional<std::string> variant) {
    courier::NormalizeBackward a{};
    a.type = type_of(unit, "unit");
    a.out_type = type_of(out, "out");
    a.scale = float(scale);
    a.d_unit = d_unit.data();
    a.unit = unit.data();
    a.norm = norm.data();
    a.out = out.data();
    a.dim = int64_t(unit.shape(1));
    const Stages& s = stages_of(variant);
    const int64_t n = int64_t(unit.shape(0));
    nb::gil_scoped_release release;
    parallel(n, threads, [&](int64_t b, int64_t e) { s.normalize_backward(a, b, e); });
}

void add(Floats sum, Array part, int threads, std::optional<std::string> variant) {
    if (sum.size() != part.size()) throw std::invalid_argument("part: expected as many numbers as in sum");
    courier::Add a{sum.data(), part.data(), type_of(part, "part")};
    const Stages& s = stages_of(variant);
    const int64_t n = int64_t(sum.size());
    nb::gil_scoped_release release;
    parallel(n, threads, [&](int64_t b, int64_t e) { s.add(a, b, e); });
}

}  // namespace

// Arrays are written in place: a silent copy of a non-contiguous one would lose the result, hence noconvert.
NB_MODULE(_native, m) {
    m.def("variants", &variants, "Instruction sets this CPU runs, the best first.");
    m.def("normalize", &normalize, nb::arg("source").noconvert(), nb::arg("row").noconvert(),
          nb::arg("unit").noconvert(), nb::arg("norm").noconvert(), nb::arg("threads"),
          nb::arg("variant").none() = nb::none());
    m.def("attend", &attend, nb::arg("q").noconvert(), nb::arg("q_row").noconvert(), nb::arg("k").noconvert(),
          nb::arg("k_row").noconvert(), nb::arg("v").noconvert(), nb::arg("v_row").noconvert(),
          nb::arg("first").noconvert(), nb::arg("last").noconvert(), nb::arg("weights_at").noconvert(),
          nb::arg("weights").noconvert(), nb::arg("e").noconvert(), nb::arg("e_row").noconvert(),
          nb::arg("out").noconvert(), nb::arg("norm").noconvert(), nb::arg("positive").noconvert(), nb::arg("scale"),
          nb::arg("heads"), nb::arg("raw"), nb::arg("threads"), nb::arg("variant").none() = nb::none());
    m.def("attend_backward", &attend_backward, nb::arg("q").noconvert(), nb::arg("q_row").noconvert(),
          nb::arg("k").noconvert(), nb::arg("k_row").noconvert(), nb::arg("v").noconvert(),
          nb::arg("v_row").noconvert(), nb::arg("first").noconvert(), nb::arg("last").noconvert(),
          nb::arg("weights_at").noconvert(), nb::arg("weights").noconvert(), nb::arg("d_r").noconvert(),
          nb::arg("d_q").noconvert().none(), nb::arg("d_k").noconvert().none(), nb::arg("d_v").noconvert().none(),
          nb::arg("page_starts").noconvert(), nb::arg("scale"), nb::arg("heads"), nb::arg("threads"),
          nb::arg("variant").none() = nb::none());
    m.def("contrast", &contrast, nb::arg("scores").noconvert(), nb::arg("low"), nb::arg("inverse_tau"),
          nb::arg("bias").noconvert().none(), nb::arg("rank_bias").noconvert().none(),
          nb::arg("count").noconvert().none(), nb::arg("own").noconvert(), nb::arg("order").noconvert().none(),
          nb::arg("same").noconvert().none(), nb::arg("page").noconvert().none(), nb::arg("page_only"),
          nb::arg("top").noconvert(), nb::arg("total").noconvert(),
          nb::arg("above").noconvert().none(), nb::arg("threads"), nb::arg("variant").none() = nb::none());
    m.def("weigh", &weigh, nb::arg("product").noconvert(), nb::arg("x").noconvert(), nb::arg("own").noconvert().none(),
          nb::arg("factor").noconvert(), nb::arg("pull").noconvert().none(), nb::arg("d_x").noconvert(),
          nb::arg("weighted").noconvert(), nb::arg("d_own").noconvert().none(), nb::arg("threads"),
          nb::arg("variant").none() = nb::none());
    m.def("normalize_backward", &normalize_backward, nb::arg("d_unit").noconvert(), nb::arg("unit").noconvert(),
          nb::arg("norm").noconvert(), nb::arg("out").noconvert(), nb::arg("scale"), nb::arg("threads"),
          nb::arg("variant").none() = nb::none());
    m.def("add", &add, nb::arg("sum").noconvert(), nb::arg("part").noconvert(), nb::arg("threads"),
          nb::arg("variant").none() = nb::none());
}
