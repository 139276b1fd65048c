// The codecs with scales: one block to codes and back, a vector at a time. Included by
// optimizer_step.h.
//
// A codec has `Decoding`, made from a block's scales, and `Encoding`, made from the bits of the
// greatest of the block's `measure`s (and of the least but zero, for those with two scales), which
// are neither infinite nor NaN. The arithmetic, brackets included, is that of client/optim/codecs.

constexpr float kLeastNormal = 1.17549435e-38f;

inline float float_of(uint32_t raw) {
    float x;
    memcpy(&x, &raw, sizeof x);
    return x;
}

// `above` / scale, or zero where the scale is too small.
inline float ratio(float above, float scale, float enough = kLeastNormal) {
    return scale >= enough ? above / scale : 0.0f;
}

inline Float clamped(Float x, float lowest, float highest) {
    return V::most(V::least(x, V::broadcast(highest)), V::broadcast(lowest));
}

struct ByteCodec {
    using Code = uint8_t;
    static constexpr int kScales = 1;
    static constexpr bool kNibbles = false;
    static constexpr bool kPositive = false;  // measures have no sign, not even that of zero
    static Float measure(Float x) { return x; }
};

struct Int8Signed : ByteCodec {
    using Code = int8_t;
    static constexpr uint64_t kBlock = 64;

    struct Decoding {
        Float scale;
        explicit Decoding(const float* scales) : scale(V::broadcast(scales[0])) {}
        Float operator()(Int code) const {
            const Float x = V::convert(code);
            return x / (V::broadcast(254.0f) - V::magnitude(x)) * scale;
        }
    };

    struct Encoding {
        float scales[1];
        Float inverse;
        Encoding(uint32_t most, uint32_t)
            : scales{float_of(most)}, inverse(V::broadcast(ratio(1.0f, scales[0]))) {}
        Int operator()(Float x) const {
            // As rint(127 ((z + z) / (1 + |z|))), which differs by exact powers of two. There is no
            // clamp of z as it is less than 1 + 2^-20, which has the code of 1.
            const Float z = x * inverse;
            const Float half = z / (V::broadcast(1.0f) + V::magnitude(z));
            return V::nearest(half * V::broadcast(254.0f));
        }
    };
};

struct Int8Second : ByteCodec {
    static constexpr uint64_t kBlock = 64;
    static constexpr bool kPositive = true;

    struct Decoding {
        Float step;
        explicit Decoding(const float* scales) : step(V::broadcast(scales[0] * (1.0f / 255))) {}
        Float operator()(Int code) const {
            const Float root = V::convert(code) * step;
            return root * root;
        }
    };

    static Float measure(Float x) { return V::root(x); }

    struct Encoding {
        float scales[1];
        Float inverse;
        Encoding(uint32_t most, uint32_t)
            : scales{float_of(most)}, inverse(V::broadcast(ratio(255.0f, scales[0]))) {}
        Int operator()(Float root) const {
            const Int code = V::nearest(V::most(root * inverse, V::broadcast(1.0f)));
            return V::where_greater(root, V::broadcast(0.0f), code, V::integers(0));
        }
    };
};

struct FourbitSigned : ByteCodec {
    static constexpr uint64_t kBlock = 128;
    static constexpr bool kNibbles = true;

    struct Decoding {
        Float scale;
        explicit Decoding(const float* scales) : scale(V::broadcast(scales[0])) {}
        Float operator()(Int code) const { return V::template entry<16>(kFourbit.values, code) * scale; }
    };

    struct Encoding {
        float scales[1];
        Float inverse;
        Encoding(uint32_t most, uint32_t)
            : scales{float_of(most)}, inverse(V::broadcast(ratio(1.0f, scales[0]))) {}
        Int operator()(Float x) const { return search(x * inverse, kFourbit); }
    };
};

struct FourbitSecond : ByteCodec {
    static constexpr uint64_t kBlock = 128;
    static constexpr bool kNibbles = true;

    struct Decoding {
        Float step;
        explicit Decoding(const float* scales) : step(V::broadcast(scales[0] * 0.0625f)) {}
        Float operator()(Int code) const {
            return V::convert(V::sum(code, V::integers(1))) * step;
        }
    };

    struct Encoding {
        static constexpr float kEnough = 7.52316385e-37f;  // 2^-120: 16 / 2^-126 overflows
        float scales[1];
        float lowest;
        Float inverse;
        Encoding(uint32_t most, uint32_t)
            : scales{float_of(most)},
              lowest(scales[0] >= kEnough ? 1.0f : 16.0f),
              inverse(V::broadcast(ratio(16.0f, scales[0], kEnough))) {}
        Int operator()(Float x) const {
            const Float k = V::most(x * inverse, V::broadcast(lowest));
            return V::difference(V::nearest(k), V::integers(1));
        }
    };
};

template <bool second>
struct Dynamic : ByteCodec {
    static constexpr uint64_t kBlock = 256;
    static constexpr const Map<256>& kMap = second ? kDynamicOfSecond : kDynamicOfSigned;

    struct Decoding {
        Float scale;
        explicit Decoding(const float* scales) : scale(V::broadcast(scales[0])) {}
        Float operator()(Int code) const { return V::template entry<256>(kMap.values, code) * scale; }
    };

    struct Encoding {
        float scales[1];
        Float inverse;
        Encoding(uint32_t most, uint32_t)
            : scales{float_of(most)}, inverse(V::broadcast(ratio(1.0f, scales[0]))) {}
        Int operator()(Float x) const {
            const Int code = search(x * inverse, kMap);
            if (!second) return code;
            // Code 0 is zero, and is for zero alone.
            const Int other = V::where_greater(code, V::integers(0), code, V::integers(1));
            return V::where_greater(x, V::broadcast(0.0f), other, code);
        }
    };
};

inline Float log2_of(Float x) {
    const Int raw = V::bits(x);
    const Float exponent = V::convert(V::difference(V::right<23>(raw), V::integers(127)));
    const Int fraction = V::both(raw, V::integers(0x7FFFFF));
    const Float t = V::floats(V::sum(fraction, V::integers(0x3F800000))) - V::broadcast(1.0f);
    Float q = V::broadcast(kLog2[5]);
    for (int i = 4; i >= 0; --i) q = q * t + V::broadcast(kLog2[i]);
    return exponent + t * q;
}

inline Float exp2_of(Float power) {
    power = V::most(power, V::broadcast(-126.0f));
    const Float whole = V::floor(power);
    const Float f = power - whole;
    Float q = V::broadcast(kExp2[3]);
    for (int i = 2; i >= 0; --i) q = q * f + V::broadcast(kExp2[i]);
    q = q * f + V::broadcast(1.0f);
    return q * V::floats(V::left<23>(V::sum(V::nearest(whole), V::integers(127))));
}

// log2 of a block's values relative to its greatest.
inline Float relative(Float x, Float inverse) {
    return log2_of(clamped(x * inverse, kLeastNormal, 1.0f));
}

// Sixteen times the power that stretches a block.
inline Float sixteenths(float most, float least) {
    const Float low = relative(V::broadcast(most == most ? least : 0.0f),
                               V::broadcast(ratio(1.0f, most)));
    const Float spread = V::most(V::broadcast(0.0f) - low, V::broadcast(1.0f));
    return clamped(V::floor(V::broadcast(kFp8Range) / spread), 1.0f, 256.0f);
}

template <bool second>
struct Fp8 : ByteCodec {
    static constexpr uint64_t kBlock = 128;
    static constexpr int kScales = 2;

    struct Decoding {
        Float scale, root;
        explicit Decoding(const float* scales)
            : scale(V::broadcast(scales[0])),
              root(V::broadcast(16.0f) / sixteenths(scales[0], scales[1])) {}
        Float operator()(Int code) const {
            const Int part = V::both(code, V::integers(127));
            const Float power = V::template entry<128>(kFp8Logarithms.of, part) * root;
            const Float share = V::floats(V::where_greater(
                part, V::integers(0), V::bits(exp2_of(power)), V::integers(0)));
            const Float x = scale * share;
            return V::floats(V::sum(V::bits(x), V::left<24>(V::difference(code, part))));
        }
    };

    struct Encoding {
        float scales[2];
        bool tiny;
        Float inverse, sixteen;
        Encoding(uint32_t most, uint32_t least)
            : scales{float_of(most), float_of(least)},
              tiny(scales[0] < kLeastNormal),
              inverse(V::broadcast(ratio(1.0f, scales[0]))),
              sixteen(sixteenths(scales[0], scales[1])) {}
        Int operator()(Float x) const {
            const Float size = V::magnitude(x);
            const Float power = relative(size, inverse) * sixteen * V::broadcast(0.0625f);
            Int code = to_e4m3(exp2_of(power) * V::broadcast(448.0f));
            if (tiny) code = V::integers(0);
            if (second) code = V::where_greater(code, V::integers(0), code, V::integers(1));
            code = V::where_greater(size, V::broadcast(0.0f), code, V::integers(0));
            if (second) return code;
            const Int with_sign = V::where_greater(
                code, V::integers(0), V::sum(code, V::integers(128)), code);
            return V::where_greater(V::broadcast(0.0f), x, with_sign, code);
        }

        // Of 0 to 448, ties to even.
        static Int to_e4m3(Float y) {
            const Int raw = V::bits(y);
            const Int odd = V::both(V::right<20>(raw), V::integers(1));
            const Int rounded = V::sum(V::sum(raw, V::integers(0x7FFFF)), odd);
            const Int normal = V::difference(V::right<20>(rounded), V::integers(960));
            const Int small = V::nearest(y * V::broadcast(512.0f));
            const Int code =
                V::where_greater(V::broadcast(0.015625f), y, small, normal);
            return V::where_greater(code, V::integers(126), V::integers(126), code);
        }
    };
};
