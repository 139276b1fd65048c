// The constants of kernels/optimizer_tables.py, made anew when compiled, and ordered for searches.
// Included by optimizer_step.h.

// An ascending map. Its thresholds are the nodes of a search tree: 1 is the root, 2n and 2n + 1 are
// below n.
template <int count>
struct Map {
    alignas(64) float values[count];
    alignas(64) float halves[count];
};

template <int count>
constexpr void set_halves(Map<count>& map) {
    for (int width = 1; width < count; width *= 2) {
        const int stride = count / width;
        for (int place = 0; place < width; ++place) {
            const int below = stride * place + stride / 2 - 1;
            const double sum = static_cast<double>(map.values[below]) + map.values[below + 1];
            map.halves[width + place] = static_cast<float>(sum / 2);
        }
    }
}

constexpr Map<16> fourbit_map() {
    // Four of them are not the fp32 numbers nearest to .0325 and .2125: see optimizer_tables.py.
    Map<16> map = {{-.8875f, -.6625f, -.4375f, -.21249999f, -.0775f, -.0325000025f, -.0055f, 0,
                    .0055f, .0325000025f, .0775f, .21249999f, .4375f, .6625f, .8875f, 1},
                   {}};
    set_halves(map);
    return map;
}

// torch.linspace(0.1, 1, steps)[i].
constexpr float tenth_to_one(int i, int steps) {
    const double start = 0.1f;
    const double step = static_cast<float>(static_cast<float>(1 - start) / (steps - 1.0));
    return static_cast<float>(i < steps / 2 ? start + step * i : 1 - step * (steps - 1 - i));
}

// bitsandbytes' create_dynamic_map.
constexpr Map<256> dynamic_map(bool sign) {
    constexpr float decades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1};
    Map<256> map = {};
    const int zero = sign ? 127 : 0;
    int at = zero + 1;
    for (int exponent = 0; exponent < 7; ++exponent) {
        const int count = sign ? 1 << exponent : 2 << exponent;
        for (int i = 0; i < count; ++i, ++at) {
            const double low = tenth_to_one(i, count + 1);
            const float middle = static_cast<float>(low + tenth_to_one(i + 1, count + 1)) / 2;
            const float value = decades[exponent] * middle;
            map.values[at] = value;
            if (sign) map.values[zero - (at - zero)] = -value;
        }
    }
    map.values[at] = 1;
    set_halves(map);
    return map;
}

constexpr Map<16> kFourbit = fourbit_map();
constexpr Map<256> kDynamicOfSigned = dynamic_map(true);
constexpr Map<256> kDynamicOfSecond = dynamic_map(false);

// The next node: the right one below if x is greater than this one's threshold.
template <int level, int count>
inline Int next_node(const Map<count>& map, const Int& node, const Float& x) {
    constexpr int width = 1 << level;
    return V::twice_and(node, x, V::template entry<width < 8 ? 8 : width>(
                                     map.halves + (width < 8 ? 0 : width), node));
}

// The thresholds that are less than x.
inline Int search(const Float& x, const Map<16>& map) {
    Int node = V::twice_and(V::integers(1), x, V::broadcast(map.halves[1]));
    node = next_node<1>(map, node, x);
    node = next_node<2>(map, node, x);
    node = next_node<3>(map, node, x);
    return V::both(node, V::integers(15));
}

inline Int search(const Float& x, const Map<256>& map) {
    Int node = V::twice_and(V::integers(1), x, V::broadcast(map.halves[1]));
    node = next_node<1>(map, node, x);
    node = next_node<2>(map, node, x);
    node = next_node<3>(map, node, x);
    node = next_node<4>(map, node, x);
    node = next_node<5>(map, node, x);
    node = next_node<6>(map, node, x);
    node = next_node<7>(map, node, x);
    return V::both(node, V::integers(255));
}

// Of log2(1 + t) = t * (c0 + ...) and 2^f = 1 + f * (c0 + ...).
constexpr float kLog2[6] = {1.442553162574768f,   -0.7182819247245789f, 0.45827075839042664f,
                            -0.27953803539276123f, 0.12345138192176819f, -0.026457414031028748f};
constexpr float kExp2[4] = {0.6930185556411743f, 0.24144551157951355f, 0.051950547844171524f,
                            0.013581248000264168f};
constexpr float kFp8Range = 265.8353575f;

// What the FP8 codec's log2_of gives of the codes without their sign, as parts of the largest.
struct Logarithms {
    alignas(64) float of[128];
};

constexpr float log2_of_normal(float x) {
    float exponent = 0;
    for (; x < 1; x *= 2) exponent -= 1;
    for (; x >= 2; x /= 2) exponent += 1;
    const float t = x - 1;
    float q = kLog2[5];
    for (int i = 4; i >= 0; --i) {
        const float product = q * t;
        q = product + kLog2[i];
    }
    const float product = t * q;
    return exponent + product;
}

constexpr Logarithms fp8_logarithms() {
    Logarithms logarithms = {};
    for (int code = 0; code < 128; ++code) {
        float value = static_cast<float>(code < 8 ? code : code % 8 + 8) * 0.001953125f;
        for (int doubled = 1; doubled < code / 8; ++doubled) value *= 2;
        if (code == 0) value = 0.001953125f;
        logarithms.of[code] = log2_of_normal(value * (1.0f / 448));
    }
    return logarithms;
}

constexpr Logarithms kFp8Logarithms = fp8_logarithms();
