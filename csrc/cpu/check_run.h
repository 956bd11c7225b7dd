// The calls of check.cpp: one call with its inputs and outputs, and the comparison of the outputs with the definition.
#pragma once

#include <stdlib.h>

#include "check_problem.h"

inline long checks = 0;

inline void expect(bool holds, const std::string& what) {
    ++checks;
    if (holds) return;
    fflush(stdout);
    fprintf(stderr, "check: FAILED: %s\n", what.c_str());
    exit(1);
}

enum Mode { FORWARD = FNTX_FORWARD, BACKWARD = FNTX_BACKWARD, BOTH = FORWARD | BACKWARD, LOSS };
const char* const MODES[] = {"", "forward", "backward", "forward and backward", "loss"};

// One call with its inputs and outputs.
template <class T> struct CheckedCall {
    typedef typename Problem<T>::Real Real;

    const Problem<T>& p;
    const Mode mode;
    std::vector<T> against, d_against, limits[2], nu[2], w[2], d_z[2][2], pos, d_pos, scalars;
    fntx_side cols;
    fntx_call call = {};

    CheckedCall(const Problem<T>& p, Mode mode, int threads, int64_t workspace) : p(p), mode(mode) {
        call.phases = mode == LOSS ? BOTH : mode;
        call.dtype = p.c.dtype, call.normalize = p.c.normalize, call.threads = threads, call.D = p.c.D;
        call.limited = p.c.limits == LIMITS_OF_POSITIVES;
        call.limit_scale = p.c.limit_scale, call.limit_shift = p.c.limit_shift;
        call.function = p.c.function, call.bias = p.c.bias;
        call.inv_tau = double(p.k), call.eps = p.c.eps, call.workspace = workspace;
        call.rows = fill(0);
        if (p.last) cols = fill(1), call.cols = &cols;
        pos = unwritten(p.two_views ? p.pos.size() : 0), scalars = unwritten(3);
        d_pos.assign(p.d_pos.begin(), p.d_pos.end());
        if (p.two_views && !p.softplus && !p.c.classes && mode != BACKWARD) call.pos = pos.data();
        if (p.two_views && !p.softplus && (mode == BACKWARD || mode == BOTH)) call.d_pos = d_pos.data();
        if (p.paired && (mode == LOSS || mode == FORWARD)) call.loss = &scalars[0], call.loss_weight = LOSS_WEIGHT;
        if (p.c.against > 0 && call.loss) {
            against.assign(p.against.begin(), p.against.end()), d_against = unwritten(against.size());
            call.against = against.data(), call.d_against = mode == LOSS ? d_against.data() : nullptr;
        }
        if (p.c.classes) call.classes = p.sides[0].ids.data(), call.form = p.c.form, call.mean_of_classes = p.c.mean;
        call.cols_loss_weight = std::max(p.c.cols_loss_weight, 0.0);
        if (mode != FORWARD) call.d_inv_tau = &scalars[1];
        if (mode != FORWARD && p.softplus) call.d_bias = &scalars[2];
    }

    static std::vector<T> unwritten(int64_t n) { return std::vector<T>(n, std::numeric_limits<T>::quiet_NaN()); }

    fntx_side fill(int which) {
        const ProblemSide<Real>& side = p.sides[which];
        fntx_side out = {};
        nu[which] = unwritten(side.n);
        if (mode == BACKWARD) nu[which].assign(side.nu.begin(), side.nu.end());
        for (int64_t i = 0; i < side.n; ++i)  // the weight of a row without negatives is NaN, which must be ignored
            w[which].push_back(isinf(side.nu[i]) ? T(NAN) : T(side.w[i]));
        limits[which].assign(side.limits.begin(), side.limits.end());
        out.limits = p.c.limits == LIMITS_OF_ROWS ? limits[which].data() : nullptr;
        out.ids = p.c.ids && !p.c.classes ? side.ids.data() : nullptr;
        out.neg_lse = p.c.classes || (mode == LOSS && p.c.wanted != ALL_WANTED) ? nullptr : nu[which].data();
        out.d_neg_lse = mode == LOSS ? nullptr : w[which].data();
        for (int m : {0, 1}) {
            out.z[m] = side.z[m].view();
            if (mode == FORWARD || !(p.c.wanted >> (2 * which + m) & 1)) continue;
            d_z[which][m] = unwritten(side.z[m].n * p.c.D);
            out.d_z[m] = d_z[which][m].data();
        }
        return out;
    }

    std::string name() const {
        return p.c.name() + ": " + MODES[mode] + ", " + fntx_instruction_set() + ", threads " +
               std::to_string(call.threads) + ", workspace " + std::to_string(call.workspace);
    }

    // Make the call and return all outputs as bytes, or an empty string if the call failed.
    std::string bits() {
        std::string all;
        if (fntx_run(&call) != FNTX_OK) return all;
        for (const auto* x :
             {&nu[0], &nu[1], &d_z[0][0], &d_z[0][1], &d_z[1][0], &d_z[1][1], &pos, &d_against, &scalars})
            all.append(reinterpret_cast<const char*>(x->data()), x->size() * sizeof(T));
        return all;
    }

    // Require every element to be within absolute + relative |expected| of its expected value.
    void hold(const char* what, const std::vector<T>& got, const Real* expected, Real absolute, Real relative) const {
        for (size_t i = 0; i < got.size(); ++i) {
            const Real error = fabs(got[i] - expected[i]), bound = absolute + relative * fabs(expected[i]);
            if (got[i] == expected[i] || (!isinf(expected[i]) && error <= bound)) continue;
            char text[200];
            snprintf(text, sizeof text, ": %s[%d] is %.9g, expected %.9g +- %.2g", what, int(i), double(got[i]),
                     double(expected[i]), double(bound));
            expect(false, name() + text);
        }
        checks += !got.empty();
    }

    // Compare every output with the definition. `rounding` is the unit roundoff of the operands of d_z, if that is
    // coarser than T's, otherwise 0.
    void compare(Real rounding = 0) const {
        const Real epsilon = sizeof(T) == 4 ? 1.2e-7 : 2.3e-16, tolerance = 16 * epsilon * (1 + p.largest_logit());
        const Real of_gradient = tolerance + rounding;
        const Real least = std::numeric_limits<T>::min();
        const Gradient<Real>& gradient = mode == LOSS ? p.of_loss : p.of_weights;
        for (int side = 0; side <= p.last; ++side) {
            if (mode != BACKWARD && (side ? cols : call.rows).neg_lse)
                hold(side ? "neg_lse of cols" : "neg_lse", nu[side], p.sides[side].nu.data(), tolerance, tolerance);
            const Real *first = gradient.d_z[side].data(), *second = first + p.sides[side].z[0].n * p.c.D;
            hold(side ? "d_z[0] of cols" : "d_z[0]", d_z[side][0], first, of_gradient * gradient.size_of_z + least, 0);
            hold(side ? "d_z[1] of cols" : "d_z[1]", d_z[side][1], second, of_gradient * gradient.size_of_z + least, 0);
        }
        if (call.pos) hold("pos", pos, p.pos.data(), tolerance, tolerance);
        if (call.d_against) hold("d_against", d_against, p.d_against.data(), tolerance, tolerance);
        if (call.loss) hold("loss", {scalars[0]}, &p.loss, tolerance, tolerance);
        if (call.d_inv_tau)
            hold("d_inv_tau", {scalars[1]}, &gradient.d_inv_tau, tolerance * gradient.size_of_inv_tau + least, 0);
        if (call.d_bias) hold("d_bias", {scalars[2]}, &gradient.d_bias, tolerance * gradient.size_of_bias + least, 0);
    }
};
