// Cases for check.cpp: input of every type and layout, and the results by definition, O(M^2 D) in long double.
#pragma once

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "fastntxent.h"

typedef long double Real;
typedef std::vector<Real> Reals;
constexpr Real INF = std::numeric_limits<Real>::infinity();

constexpr double LOSS_WEIGHT = 0.75;

inline std::mt19937 draw(1);

inline double noise() { return double(draw()) / 2147483648.0 - 1; }

// --- input -----------------------------------------------------------------------------------------------------------

const char* const DTYPES[] = {"float16", "bfloat16", "float32", "float64"};
const char* const LAYOUTS[] = {"contiguous", "gapped", "transposed", "every second", "expanded"};
const char* const IDS[] = {"by index", "unique", "labels", "all the same"};

struct Case {
    int64_t rows[2], cols[2];  // of the two matrices of each side; no columns: symmetric
    int64_t D;
    int dtype = FNTX_FLOAT32, layout = 0, ids = 0, normalize = 1;
    double tau = 0.07, eps = 1e-12, scale = 1;
    int wanted = 15;  // a bit for each d_z

    std::string name() const {
        char text[300];
        snprintf(text, sizeof text, "rows %d + %d, cols %d + %d, D %d, %s, %s, ids %s, normalize %d, tau %g, eps %g, "
                 "scale %g, wanted %d", int(rows[0]), int(rows[1]), int(cols[0]), int(cols[1]), int(D), DTYPES[dtype],
                 LAYOUTS[layout], IDS[ids], normalize, tau, eps, scale, wanted);
        return text;
    }
};

// Rounded towards zero: the definition reads the same bits.
inline uint16_t to_float16(double x) {
    if (!(fabs(x) < 65536)) return uint16_t((x < 0 ? 0xfc00 : 0x7c00) + (x != x ? 0x3ff : 0));
    int exponent = 0;
    frexp(x, &exponent);
    exponent = std::max(exponent, -13);
    return uint16_t((x < 0 ? 0x8000 : 0) + (exponent + 13) * 1024 + int(ldexp(fabs(x), 11 - exponent)));
}

inline Real from_float16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const Real size = exponent ? ldexpl(1024 + fraction, exponent - 25) : ldexpl(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

struct Matrix {
    int dtype;
    int64_t n, width, stride_row, stride_col;  // width: of an element, in words
    std::vector<uint16_t> words;               // NaN where there is no element

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

    Real get(int64_t row, int64_t d) const {
        const uint16_t* from = &words[(row * stride_row + d * stride_col) * width];
        float single = 0;
        double x = 0;
        if (dtype == FNTX_FLOAT16) return from_float16(*from);
        if (dtype == FNTX_FLOAT64) return memcpy(&x, from, 8), x;
        memcpy(reinterpret_cast<char*>(&single) + 4 - 2 * width, from, 2 * width);
        return single;
    }
};

// One side: what goes in, and its rows and results by the definition.
struct Side {
    Matrix z[2];
    int64_t n;
    std::vector<int64_t> ids;
    Reals w, u, length, nu;  // w: the weights of nu that a call is given
    Real longest = 0;        // |u|

    // Rows near those of `like`, as two views are.
    Side(const Case& c, const int64_t* n_of, const Matrix* like)
        : z{{c.dtype, n_of[0], c.D, c.layout}, {c.dtype, n_of[1], c.D, (c.layout + 2) % 5}}, n(n_of[0] + n_of[1]) {
        for (Matrix& m : z) {
            for (int64_t i = 0; i < m.n; ++i)
                for (int64_t d = 0; d < c.D; ++d) {
                    const double base = like && i < like->n ? 0.8 * double(like->get(i, d)) : 0;
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

struct Gradient {
    Reals d_z[2];
    Real d_inv_tau = 0;
    Real size_of_z = 0, size_of_inv_tau = 0;  // of a gradient's terms before any cancel out: what errors compare with
};

struct Problem {
    const Case c;
    const int last;  // the side of the columns
    const bool two_views;
    const Real k;
    Side sides[2];
    Reals s, pos, d_pos;
    Real loss = 0;
    Gradient of_weights, of_loss;

    explicit Problem(const Case& c)
        : c(c),
          last(c.cols[0] + c.cols[1] > 0),
          two_views(!last && c.rows[0] == c.rows[1]),
          k(1 / c.tau),
          sides{{c, c.rows, nullptr}, {c, c.cols, &sides[0].z[0]}} {
        for (Side& side : sides) load(side);
        const int64_t m = sides[0].n, n = sides[last].n;
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) s.push_back(dot(row(sides[0].u, i), row(sides[last].u, j)));
        for (int64_t i = 0; i < m; ++i) sides[0].nu.push_back(log_sum(n, [&](int64_t j) { return logit(i, j); }));
        for (int64_t j = 0; j < sides[1].n; ++j)
            sides[1].nu.push_back(log_sum(m, [&](int64_t i) { return logit(i, j); }));
        Reals q, d_loss;
        for (int64_t i = 0; two_views && i < m; ++i) {
            pos.push_back(k * s[i * m + partner(i)]);
            d_pos.push_back(noise());
            const Real x = sides[0].nu[i] - pos[i];
            loss += LOSS_WEIGHT * (x > 0 ? x + log1pl(expl(-x)) : log1pl(expl(x)));
            q.push_back(LOSS_WEIGHT / (1 + expl(-x)));
            d_loss.push_back(-q[i]);
        }
        of_weights = gradient(sides[0].w, d_pos);
        if (two_views) of_loss = gradient(q, d_loss);
    }

    Real largest_logit() const { return k * sides[0].longest * sides[last].longest; }
    int64_t partner(int64_t i) const { return i < c.rows[0] ? i + c.rows[0] : i - c.rows[0]; }
    const Real* row(const Reals& u, int64_t i) const { return u.data() + i * c.D; }

    Real dot(const Real* a, const Real* b) const {
        Real sum = 0;
        for (int64_t d = 0; d < c.D; ++d) sum += a[d] * b[d];
        return sum;
    }

    void load(Side& side) {
        for (const Matrix& z : side.z)
            for (int64_t i = 0; i < z.n; ++i) {
                Reals u;
                for (int64_t d = 0; d < c.D; ++d) u.push_back(z.get(i, d));
                const Real length = sqrtl(dot(u.data(), u.data()));
                for (Real& x : u) x /= c.normalize ? std::max(length, Real(c.eps)) : 1;
                side.u.insert(side.u.end(), u.begin(), u.end());
                side.length.push_back(length);
                side.longest = std::max(side.longest, c.normalize ? 1 : length);
            }
    }

    Real logit(int64_t i, int64_t j) const {
        return sides[0].ids[i] == sides[last].ids[j] ? -INF : k * s[i * sides[last].n + j];
    }

    template <class Logit> static Real log_sum(int64_t n, Logit logit) {
        Real peak = -INF, sum = 0;
        for (int64_t j = 0; j < n; ++j) peak = std::max(peak, logit(j));
        for (int64_t j = 0; j < n && peak > -INF; ++j) sum += expl(logit(j) - peak);
        return peak + logl(sum);
    }

    // Of sum_i w_i nu_i + sum_i d_pos_i pi_i, and with columns + sum_j w_j nu_j.
    Gradient gradient(const Reals& w, const Reals& d_pos) const {
        Gradient out;
        Reals d_u[2], sizes[2];
        for (int side : {0, 1}) d_u[side].resize(sides[side].u.size()), sizes[side].resize(sides[side].n);
        const auto add = [&](int64_t i, int64_t j, Real x) {  // x times the gradient of s_ij
            const Real *u_i = row(sides[0].u, i), *u_j = row(sides[last].u, j);
            Real *d_i = &d_u[0][i * c.D], *d_j = &d_u[last][j * c.D];
            for (int64_t d = 0; d < c.D; ++d) d_i[d] += k * x * u_j[d], d_j[d] += k * x * u_i[d];
            out.d_inv_tau += x * s[i * sides[last].n + j];
            sizes[0][i] += fabsl(k * x) * sides[last].longest;
            sizes[last][j] += fabsl(k * x) * sides[0].longest;
            out.size_of_inv_tau += fabsl(x) * largest_logit() / k;
        };
        for (int64_t i = 0; i < sides[0].n; ++i) {
            for (int64_t j = 0; j < sides[last].n; ++j) {
                const Real x = logit(i, j);
                if (x == -INF) continue;
                const Real of_column = last ? sides[1].w[j] * expl(x - sides[1].nu[j]) : 0;
                add(i, j, w[i] * expl(x - sides[0].nu[i]) + of_column);
            }
            if (two_views) add(i, partner(i), d_pos[i]);
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
