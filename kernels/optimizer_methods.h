// The methods: what becomes of a parameter `p` and its states `s`, given the gradient `g`, a vector
// at a time. Included by optimizer_step.h.
//
// A method's scalars and states are in the order of kernels/optimizer_work.py, its arithmetic,
// brackets included, is that of client/optim/methods. `with_gradient` is false where none is read,
// `decays_gradient` where the parameter is no part of it.

// What one vector of elements is; `direction` is read by `apply` and written by others.
struct Element {
    Float p, g, direction;
    Float s[3];
};

struct Update {
    static constexpr bool with_gradient = true;
    static constexpr bool decays_gradient = true;
    static constexpr bool reads_parameter = true;
    static constexpr bool writes_parameter = true;
    static constexpr bool reads_direction = false;
    static constexpr bool writes_direction = false;
    static constexpr int kWritten = 3;  // states before this one are written
    static constexpr int kL2 = 2;       // the scalar's place
};

template <int root, int eps>
inline Float adam_moments(Element& e, const Float* c) {
    e.s[0] = e.s[0] * c[3] + e.g * c[4];
    e.s[1] = e.s[1] * c[5] + (e.g * e.g) * c[6];
    return e.s[0] / (V::root(e.s[1]) * c[root] + c[eps]);
}

struct Adam : Update {
    static constexpr int kStates = 2, kScalars = 9;
    static void step(Element& e, const Float* c, const float*) {
        const Float direction = adam_moments<7, 8>(e, c);
        e.p = e.p * c[1] - c[0] * direction;
    }
};

struct AdamDirection : Adam {
    static constexpr bool writes_parameter = false;
    static constexpr bool writes_direction = true;
    static void step(Element& e, const Float* c, const float*) {
        e.direction = adam_moments<7, 8>(e, c);
    }
};

struct Spam : Adam {
    static constexpr int kScalars = 10;
    static void step(Element& e, const Float* c, const float* plain) {
        if (plain[9] > 0) {
            const Float most = e.s[1] * c[9];
            e.g = V::where_greater(e.g * e.g, most, V::sign(e.g) * V::root(most), e.g);
        }
        Adam::step(e, c, plain);
    }
};

struct Lion : Update {
    static constexpr int kStates = 1, kScalars = 7;
    static void step(Element& e, const Float* c, const float*) {
        const Float blend = e.s[0] * c[3] + e.g * c[4];
        e.s[0] = e.s[0] * c[5] + e.g * c[6];
        e.p = e.p * c[1] - c[0] * V::sign(blend);
    }
};

struct Sgd : Update {
    static constexpr int kStates = 1, kScalars = 7;
    static void step(Element& e, const Float* c, const float*) {
        e.s[0] = e.s[0] * c[3] + e.g * c[4];
        e.p = e.p * c[1] - c[0] * (e.g * c[5] + e.s[0] * c[6]);
    }
};

struct Ademamix : Update {
    static constexpr int kStates = 3, kScalars = 13;
    static void step(Element& e, const Float* c, const float*) {
        e.s[0] = e.s[0] * c[3] + e.g * c[4];
        e.s[1] = e.s[1] * c[7] + e.g * c[8];
        e.s[2] = e.s[2] * c[5] + (e.g * e.g) * c[6];
        const Float above = e.s[0] * c[9] + e.s[1] * c[10];
        e.p = e.p * c[1] - c[0] * (above / (V::root(e.s[2]) * c[11] + c[12]));
    }
};

struct Exadam : Update {
    static constexpr int kStates = 2, kScalars = 12;
    static void step(Element& e, const Float* c, const float*) {
        const Float one = V::broadcast(1.0f), eps = c[11];
        e.s[0] = e.s[0] * c[3] + e.g * c[4];
        e.s[1] = e.s[1] * c[5] + (e.g * e.g) * c[6];
        const Float first = one + (e.s[1] / (e.s[1] + eps)) * c[10];
        const Float square = e.s[0] * e.s[0];
        const Float second = one + (square / (square + eps)) * c[9];
        const Float scale = c[7] * first;
        const Float above = e.s[0] * scale + e.g * scale;
        e.p = e.p * c[1] - c[0] * (above / (V::root((e.s[1] * c[8]) * second) + eps));
    }
};

struct Sophia : Update {
    static constexpr int kStates = 2, kScalars = 6, kWritten = 1;
    static void step(Element& e, const Float* c, const float*) {
        e.s[0] = e.s[0] * c[3] + e.g * c[4];
        const Float below = e.s[1] * c[5] + V::broadcast(1e-15f);
        const Float ratio = V::least(V::broadcast(1.0f), V::magnitude(e.s[0]) / below);
        e.p = e.p * c[1] - c[0] * (V::sign(e.s[0]) * ratio);
    }
};

struct Hessian : Update {
    static constexpr bool decays_gradient = false, reads_parameter = false;
    static constexpr bool writes_parameter = false;
    static constexpr int kStates = 1, kScalars = 2;
    static void step(Element& e, const Float* c, const float*) {
        e.s[0] = e.s[0] * c[0] + (e.g * e.g) * c[1];
    }
};

struct MomentumDirection : Update {
    static constexpr bool decays_gradient = false, reads_parameter = false;
    static constexpr bool writes_parameter = false, writes_direction = true;
    static constexpr int kStates = 1, kScalars = 4;
    static void step(Element& e, const Float* c, const float*) {
        e.s[0] = e.s[0] * c[0] + e.g * c[1];
        e.direction = e.g * c[2] + e.s[0] * c[3];
    }
};

struct Apply : Update {
    static constexpr bool with_gradient = false, decays_gradient = false, reads_direction = true;
    static constexpr int kStates = 0, kScalars = 2;
    static void step(Element& e, const Float* c, const float*) {
        e.p = e.p * c[1] - c[0] * e.direction;
    }
};
