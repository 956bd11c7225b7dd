// Test cases for check.cpp: inputs of every dtype and layout, and the expected results. The results follow the formulas
// directly, in O(M^2 D) operations, or O(M^3) with classes.
#pragma once

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "fastntxent.h"

// The definition is computed in a wider type than the kernels' T. For float, the wider type is double; long double
// would prove no more and is emulated in software on aarch64.
template <class T> struct RealOf {
    typedef double Type;
};
template <> struct RealOf<double> {
    typedef long double Type;
};

constexpr double INF = std::numeric_limits<double>::infinity();

constexpr double LOSS_WEIGHT = 0.75;  // loss_weight of every case

inline std::mt19937 draw(1);

inline double noise() { return double(draw()) / 0x1p31 - 1; }  // uniform in [-1, 1)

// --- input -----------------------------------------------------------------------------------------------------------

const char* const DTYPES[] = {"float16", "bfloat16", "float32", "float64"};
const char* const LAYOUTS[] = {"contiguous", "gapped", "transposed", "every second", "expanded"};
const char* const IDS[] = {"by index", "unique", "labels", "all the same"};
const char* const FORMS[] = {"out", "in", "ratio", "pairs"};

const double TEMPERATURES[] = {0.5, 0.07, 0.005, 0.001};
constexpr int ALL_WANTED = 15;  // one bit for each of the four d_z

enum Limits { NO_LIMITS, LIMITS_OF_ROWS, LIMITS_OF_POSITIVES };

struct Case {
    int64_t rows[2], cols[2];  // numbers of rows of each side's two matrices; no columns: symmetric
    int64_t D;
    int dtype = FNTX_FLOAT32, layout = 0, ids = 0, normalize = 1;
    double tau = 0.07, eps = 1e-12, scale = 1;
    int wanted = ALL_WANTED;  // one bit for each d_z
    // Weight of the columns' losses. If negative, a case with columns has no loss, except with `against`.
    double cols_loss_weight = -1;
    int function = FNTX_LOG_SUM_EXP;
    double bias = 0;
    Limits limits = NO_LIMITS;
    double limit_scale = 0, limit_shift = 0;  // for LIMITS_OF_POSITIVES
    double against = 0;                       // > 0: random numbers up to this size replace pi in the loss
    bool classes = false, mean = false;       // classes: ids are classes; mean: average over rows with a positive
    int form = FNTX_OUT;                      // form of the loss with classes

    std::string name() const {
        char text[400];
        snprintf(text, sizeof text,
                 "rows %d + %d, cols %d + %d, D %d, %s, %s, ids %s, normalize %d, tau %g, eps %g, "
                 "scale %g, wanted %d, cols_loss_weight %g, function %d, bias %g, limits %d: %g s + %g, against %g, "
                 "classes %d, form %s, mean %d",
                 int(rows[0]), int(rows[1]), int(cols[0]), int(cols[1]), int(D), DTYPES[dtype], LAYOUTS[layout],
                 IDS[ids], normalize, tau, eps, scale, wanted, cols_loss_weight, function, bias, int(limits),
                 limit_scale, limit_shift, against, int(classes), FORMS[form], int(mean));
        return text;
    }
};

// Draw the options of a case at random, with one of the first `dtypes` dtypes.
inline void draw_options(Case& c, size_t dtypes) {
    c.dtype = draw() % dtypes, c.layout = draw() % std::size(LAYOUTS), c.ids = draw() % std::size(IDS);
    c.normalize = draw() % 2, c.wanted = draw() % 2 ? ALL_WANTED : draw() % (ALL_WANTED + 1);
    c.tau = TEMPERATURES[draw() % std::size(TEMPERATURES)];
}

// Convert to float16, rounding toward zero. The definition reads the same bits, so the rounding does not matter.
inline uint16_t to_float16(double x) {
    if (!(fabs(x) < 65536)) return uint16_t((x < 0 ? 0xfc00 : 0x7c00) + (x != x ? 0x3ff : 0));
    int exponent = 0;
    frexp(x, &exponent);
    exponent = std::max(exponent, -13);
    return uint16_t((x < 0 ? 0x8000 : 0) + (exponent + 13) * 1024 + int(ldexp(fabs(x), 11 - exponent)));
}

inline double from_float16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

struct Matrix {
    int dtype;
    int64_t n, width, stride_row, stride_col;  // width: 16-bit words per element
    std::vector<uint16_t> words;               // NaN between the elements

    Matrix(int dtype, int64_t n, int64_t D, int layout) : dtype(dtype), n(n) {
        const int64_t widths[] = {1, 1, 2, 4}, strides[][2] = {{D, 1}, {D + 5, 1}, {1, n}, {2 * D + 1, 2}, {0, 1}};
        width = widths[dtype], stride_row = strides[layout][0], stride_col = strides[layout][1];
        words.assign(n ? ((n - 1) * stride_row + (D - 1) * stride_col + 1) * width : 0, 0xffff);
    }

    fntx_matrix view() const { return {n ? words.data() : nullptr, n, stride_row, stride_col}; }

    void set(int64_t row, int64_t d, double x) {
        uint16_t* to = &words[(row * stride_row + d * stride_col) * width];
        const float single = float(x);
        if (dtype == FNTX_FLOAT16) *to = to_float16(x);
        if (dtype == FNTX_BFLOAT16) memcpy(to, reinterpret_cast<const char*>(&single) + 2, 2);
        if (dtype == FNTX_FLOAT32) memcpy(to, &single, 4);
        if (dtype == FNTX_FLOAT64) memcpy(to, &x, 8);
    }

    double get(int64_t row, int64_t d) const {
        const uint16_t* from = &words[(row * stride_row + d * stride_col) * width];
        float single = 0;
        double x = 0;
        if (dtype == FNTX_FLOAT16) return from_float16(*from);
        if (dtype == FNTX_FLOAT64) return memcpy(&x, from, 8), x;
        memcpy(reinterpret_cast<char*>(&single) + 4 - 2 * width, from, 2 * width);
        return single;
    }
};

// Return the layout of a side's second matrix.
inline int other_layout(int layout) { return (layout + 2) % int(std::size(LAYOUTS)); }

// One side of a problem: its inputs, and the rows and results expected from them.
template <class Real> struct ProblemSide {
    typedef std::vector<Real> Reals;

    Matrix z[2];
    int64_t n;
    std::vector<int64_t> ids;
    Reals limits;            // largest similarity that counts for each row
    Reals w, u, length, nu;  // w: the upstream gradient of nu
    Real longest = 0;        // largest |u|

    // Draw rows near the rows of `like`, as the two views of a sample are near each other.
    ProblemSide(const Case& c, const int64_t* n_of, const Matrix* like)
        : z{{c.dtype, n_of[0], c.D, c.layout}, {c.dtype, n_of[1], c.D, other_layout(c.layout)}}, n(n_of[0] + n_of[1]) {
        for (Matrix& m : z) {
            for (int64_t i = 0; i < m.n; ++i)
                for (int64_t d = 0; d < c.D; ++d) {
                    const double base = like && i < like->n ? 0.8 * like->get(i, d) : 0;
                    m.set(i, d, base + 1.5 * c.scale * noise() / sqrt(double(c.D)));
                }
            like = &z[0];
        }
        for (int64_t i = 0; i < n; ++i) {
            const int64_t label = draw() % 5;
            const int64_t id[] = {i < n_of[0] ? i : i - n_of[0], INT32_MAX - i, label ? label : INT32_MAX, 7};
            ids.push_back(id[c.ids]);
            w.push_back(noise());
        }
    }
};

// --- the definition --------------------------------------------------------------------------------------------------

template <class Real> struct Gradient {
    std::vector<Real> d_z[2];
    Real d_inv_tau = 0, d_bias = 0;
    // The size of the gradient's terms before they cancel. Errors are measured relative to this size.
    Real size_of_z = 0, size_of_inv_tau = 0, size_of_bias = 0;
};

template <class T> struct Problem {
    typedef typename RealOf<T>::Type Real;
    typedef std::vector<Real> Reals;

    const Case c;
    const int last;  // index of the columns' side
    const bool two_views;
    const bool paired;  // the problem has a loss
    const bool softplus, sigmoid;
    const Real k;
    ProblemSide<Real> sides[2];
    Reals s, pos, d_pos, against, d_against;
    Reals class_weights;  // weight of each row's loss
    bool ambiguous = false;
    Real loss = 0;
    Gradient<Real> of_weights, of_loss;

    explicit Problem(const Case& c)
        : c(c),
          last(c.cols[0] + c.cols[1] > 0),
          two_views(!last && c.rows[0] == c.rows[1]),
          paired(two_views || (last && c.cols_loss_weight >= 0) || c.against > 0 || c.classes),
          softplus(c.function != FNTX_LOG_SUM_EXP),
          sigmoid(c.function == FNTX_SIGMOID),
          k(1 / c.tau),
          sides{{c, c.rows, nullptr}, {c, c.cols, &sides[0].z[0]}} {
        for (ProblemSide<Real>& side : sides) load(side);
        const int64_t m = sides[0].n, n = sides[last].n;
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) s.push_back(dot(row(sides[0].u, i), row(sides[last].u, j)));
        for (int side = 0; side <= last; ++side) set_limits(side);
        for (int64_t i = 0; i < m; ++i) sides[0].nu.push_back(over(0, i, n, [&](int64_t j) { return pair(i, j); }));
        for (int64_t j = 0; j < sides[1].n; ++j)
            sides[1].nu.push_back(over(1, j, m, [&](int64_t i) { return pair(i, j); }));
        Reals q[2], d_loss(m);
        for (int side = 0; sigmoid && side <= last; ++side) {
            const Real weight = side ? c.cols_loss_weight : LOSS_WEIGHT;
            for (Real nu : sides[side].nu) loss += weight * nu;
            q[side].assign(sides[side].n, weight);
        }
        for (int64_t i = 0; c.against > 0 && i < m; ++i) {
            against.push_back(float(c.against * noise()));
            const Real x = sides[0].nu[i] - against[i];
            loss += LOSS_WEIGHT * log1p_exp(x);
            q[0].push_back(LOSS_WEIGHT / (1 + exp(-x)));
            d_against.push_back(-q[0][i]);
        }
        if (c.against > 0) q[1].assign(sides[last].n, 0), d_loss.clear();
        if (c.classes) {
            int64_t counted = 0;
            for (int64_t i = 0; i < m; ++i) counted += count_positives(i) > 0;
            const Real weight = LOSS_WEIGHT / (c.mean ? std::max(counted, int64_t(1)) : 1);
            for (int64_t i = 0; i < m; ++i) {
                Real slope = 0;
                loss += count_positives(i) ? weight * class_loss(i, slope) : 0;
                q[0].push_back(count_positives(i) ? weight * slope : 0);
                class_weights.push_back(weight);
            }
            d_loss.clear();
        }
        for (int64_t i = 0; paired && !sigmoid && c.against == 0 && !c.classes && i < m; ++i) {
            pos.push_back(k * s[i * n + partner(i)]);
            for (int side = 0; side <= last; ++side) {
                const Real weight = side ? c.cols_loss_weight : LOSS_WEIGHT, nu = sides[side].nu[i];
                if (softplus) {
                    loss += weight * (nu + log1p_exp(-pos[i] - c.bias));
                    q[side].push_back(weight);
                    d_loss[i] -= weight / (1 + exp(pos[i] + c.bias));
                    continue;
                }
                const Real x = nu - pos[i];
                loss += weight * log1p_exp(x);
                q[side].push_back(weight / (1 + exp(-x)));
                d_loss[i] -= q[side][i];
            }
        }
        if (sigmoid) d_loss.clear();
        if (paired) of_loss = gradient(q[0], q[1], d_loss);
        for (int64_t i = 0; two_views && !softplus && !c.classes && i < m; ++i) d_pos.push_back(noise());
        if (!c.classes) of_weights = gradient(sides[0].w, sides[1].w, d_pos);
    }

    bool same_class(int64_t i, int64_t j) const { return i != j && sides[0].ids[i] == sides[0].ids[j]; }

    int64_t count_positives(int64_t i) const {
        int64_t count = 0;
        for (int64_t j = 0; j < sides[0].n; ++j) count += same_class(i, j);
        return count;
    }

    // Return row i's loss, and in `slope` the loss's derivative with respect to nu. The row must have a positive.
    Real class_loss(int64_t i, Real& slope) const {
        const int64_t n = sides[0].n;
        const Real nu = sides[0].nu[i], count = count_positives(i);
        if (c.form == FNTX_OUT) return slope = 1, nu - mean_positive(i);
        if (c.form != FNTX_PAIRS) {
            const Real x = nu - lse_of_positives(i);
            slope = 1 / (1 + expl(-x));
            return log1p_exp(x) + (c.form == FNTX_IN ? logl(count) : 0);
        }
        Real sum = 0;
        for (int64_t j = 0; j < n; ++j) {
            if (!same_class(i, j)) continue;
            sum += log1p_exp(nu - k * s[i * n + j]) / count;
            slope += 1 / (1 + expl(k * s[i * n + j] - nu)) / count;
        }
        return sum;
    }

    Real lse_of_positives(int64_t i) const {
        const int64_t n = sides[0].n;
        return log_sum(n, [&](int64_t j) { return same_class(i, j) ? k * s[i * n + j] : -INF; });
    }

    // Return the derivative of row i's weighted loss with respect to the logit of its positive j, with nu_i held fixed.
    Real of_positive(int64_t i, int64_t j, Real w) const {
        const Real nu = sides[0].nu[i], logit = k * s[i * sides[0].n + j], count = count_positives(i);
        if (c.form == FNTX_OUT) return -w / count;
        if (c.form == FNTX_PAIRS) return -class_weights[i] / count / (1 + expl(logit - nu));
        return -w * expl(logit - lse_of_positives(i));
    }

    Real mean_positive(int64_t i) const {
        Real sum = 0;
        for (int64_t j = 0; j < sides[0].n; ++j) sum += same_class(i, j) ? k * s[i * sides[0].n + j] : 0;
        return sum / count_positives(i);
    }

    Real largest_logit() const { return k * sides[0].longest * sides[last].longest; }
    int64_t partner(int64_t i) const { return last ? i : i < c.rows[0] ? i + c.rows[0] : i - c.rows[0]; }
    const Real* row(const Reals& u, int64_t i) const { return u.data() + i * c.D; }

    Real dot(const Real* a, const Real* b) const {
        Real sum = 0;
        for (int64_t d = 0; d < c.D; ++d) sum += a[d] * b[d];
        return sum;
    }

    void load(ProblemSide<Real>& side) {
        for (const Matrix& z : side.z)
            for (int64_t i = 0; i < z.n; ++i) {
                Reals u;
                for (int64_t d = 0; d < c.D; ++d) u.push_back(z.get(i, d));
                const Real length = sqrt(dot(u.data(), u.data()));
                for (Real& x : u) x /= c.normalize ? std::max(length, Real(c.eps)) : 1;
                side.u.insert(side.u.end(), u.begin(), u.end());
                side.length.push_back(length);
                side.longest = std::max(side.longest, c.normalize ? 1 : length);
            }
    }

    struct Pair {
        bool agree;
        int64_t index;
    };

    Pair pair(int64_t i, int64_t j) const {
        const bool agree = c.classes && c.form == FNTX_OUT ? i == j : sides[0].ids[i] == sides[last].ids[j];
        return {agree, i * sides[last].n + j};
    }

    // Return the pair's logit in the sum of a side's row, or -inf if that sum leaves the pair out.
    Real logit(const Pair& at, int side, int64_t row) const {
        const bool left_out = c.limits && s[at.index] > sides[side].limits[row];
        return at.agree || left_out ? -INF : k * s[at.index];
    }

    Real similarity(int side, int64_t row, int64_t other) const {
        return side ? s[other * sides[1].n + row] : s[row * sides[last].n + other];
    }

    // LIMITS_OF_ROWS puts each limit halfway between the two middle similarities, or above the only one. If rounding
    // could move a similarity across a limit, the case is ambiguous.
    void set_limits(int side) {
        const int64_t n = sides[side].n, others = side ? sides[0].n : sides[last].n;
        const Real near = sizeof(T) == 8 ? 1e-12 : 1e-5, scale = 1 + sides[0].longest * sides[last].longest;
        for (int64_t row = 0; row < n && c.limits; ++row) {
            Reals sorted;
            for (int64_t other = 0; other < others; ++other) sorted.push_back(similarity(side, row, other));
            std::sort(sorted.begin(), sorted.end());
            Real limit = c.limits == LIMITS_OF_POSITIVES
                             ? c.limit_scale * similarity(side, row, partner(row)) + c.limit_shift
                         : others < 2 ? sorted[0] + 1
                                      : (sorted[others / 2] + sorted[others / 2 - 1]) / 2;
            limit = T(limit);
            for (Real x : sorted) ambiguous |= fabs(x - limit) < near * scale;
            sides[side].limits.push_back(limit);
        }
    }

    // Return the sign y in the pair's term log(1 + exp(y x)): -1 for a positive of SigLIP, 0 if the pair is left out,
    // else 1.
    int sign(const Pair& at) const { return !at.agree ? 1 : sigmoid ? -1 : 0; }

    static Real log1p_exp(Real x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

    // Return nu of a row or column, computed from its n pairs: at(j) is its pair with row j of the other side.
    template <class At> Real over(int side, int64_t row, int64_t n, At at) const {
        if (!softplus) return log_sum(n, [&](int64_t j) { return logit(at(j), side, row); });
        Real sum = 0;
        for (int64_t j = 0; j < n; ++j)
            if (sign(at(j)) != 0) sum += log1p_exp(sign(at(j)) * (k * s[at(j).index] + c.bias));
        return sum;
    }

    template <class Logit> static Real log_sum(int64_t n, Logit logit) {
        Real peak = -INF, sum = 0;
        for (int64_t j = 0; j < n; ++j) peak = std::max(peak, logit(j));
        for (int64_t j = 0; j < n && peak > -INF; ++j) sum += exp(logit(j) - peak);
        return peak + log(sum);
    }

    // Return the gradient of sum_i w_i nu_i + sum_j cols_w_j nu_j + sum_i d_pos_i pi_i. An empty d_pos leaves out the
    // last sum. With classes, add the terms of each row's positives.
    Gradient<Real> gradient(const Reals& w, const Reals& cols_w, const Reals& d_pos) const {
        Gradient<Real> out;
        Reals d_u[2], sizes[2];
        for (int side : {0, 1}) d_u[side].resize(sides[side].u.size()), sizes[side].resize(sides[side].n);
        const auto add = [&](int64_t i, int64_t j, Real x) {  // add x times the gradient of logit (i, j)
            out.d_bias += x, out.size_of_bias += fabs(x);
            const Real *u_i = row(sides[0].u, i), *u_j = row(sides[last].u, j);
            Real *d_i = &d_u[0][i * c.D], *d_j = &d_u[last][j * c.D];
            for (int64_t d = 0; d < c.D; ++d) d_i[d] += k * x * u_j[d], d_j[d] += k * x * u_i[d];
            out.d_inv_tau += x * s[i * sides[last].n + j];
            sizes[0][i] += fabs(k * x) * sides[last].longest;
            sizes[last][j] += fabs(k * x) * sides[0].longest;
            out.size_of_inv_tau += fabs(x) * largest_logit() / k;
        };
        for (int64_t i = 0; i < sides[0].n; ++i) {
            for (int64_t j = 0; j < sides[last].n; ++j) {
                if (softplus) {
                    const int y = sign(pair(i, j));
                    const Real weight = w[i] + (last ? cols_w[j] : 0), x = y * (k * s[pair(i, j).index] + c.bias);
                    if (y) add(i, j, y * weight / (1 + exp(-x)));
                    continue;
                }
                const Real of_row = logit(pair(i, j), 0, i), of_col = last ? logit(pair(i, j), 1, j) : -INF;
                const Real part = of_row == -INF ? 0 : w[i] * exp(of_row - sides[0].nu[i]);
                const Real of_column = of_col == -INF ? 0 : cols_w[j] * exp(of_col - sides[1].nu[j]);
                if (part != 0 || of_column != 0) add(i, j, part + of_column);
            }
            if (!d_pos.empty()) add(i, partner(i), d_pos[i]);
            for (int64_t j = 0; c.classes && w[i] != 0 && j < sides[0].n; ++j)
                if (same_class(i, j)) add(i, j, of_positive(i, j, w[i]));
        }
        for (int side : {0, 1})
            for (int64_t i = 0; i < sides[side].n; ++i) {
                const Real *u = row(sides[side].u, i), *g = row(d_u[side], i), length = sides[side].length[i];
                const Real radial = c.normalize && length > c.eps ? dot(u, g) : 0;
                const Real divisor = c.normalize ? std::max(length, Real(c.eps)) : 1;
                for (int64_t d = 0; d < c.D; ++d) out.d_z[side].push_back((g[d] - u[d] * radial) / divisor);
                out.size_of_z = std::max(out.size_of_z, sizes[side][i] / divisor);
            }
        return out;
    }
};
