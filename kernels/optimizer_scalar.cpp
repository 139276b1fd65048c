// The optimizer step in plain C++, for every machine; it says what the vectors' functions do.
#include "optimizer.h"

namespace everstep {

namespace {

// One element at a time. Minimum and maximum give the second operand if either is NaN, as x86 does.
struct Vector {
    using Float = float;
    using Int = int32_t;
    static constexpr uint64_t kLanes = 1;

    static Float broadcast(float x) { return x; }
    static Float load(const float* at) {
        float x;
        memcpy(&x, at, sizeof x);
        return x;
    }
    static void store(float* at, Float x) { memcpy(at, &x, sizeof x); }
    static Float root(Float x) { return __builtin_sqrtf(x); }
    // For magnitudes below 2^31; of -0 it is 0.
    static Float floor(Float x) {
        const Float toward_zero = static_cast<float>(static_cast<int32_t>(x));
        return toward_zero > x ? toward_zero - 1.0f : toward_zero;
    }
    static Float least(Float a, Float b) { return a < b ? a : b; }
    static Float most(Float a, Float b) { return a > b ? a : b; }
    static Float magnitude(Float x) { return floats(bits(x) & INT32_MAX); }
    // NaN of NaN, and 0 of both zeros.
    static Float sign(Float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? 0.0f : x; }
    static Float where_greater(Float a, Float b, Float yes, Float no) { return a > b ? yes : no; }

    static Int bits(Float x) {
        int32_t raw;
        memcpy(&raw, &x, sizeof raw);
        return raw;
    }
    static Float floats(Int raw) {
        float x;
        memcpy(&x, &raw, sizeof x);
        return x;
    }
    static Int integers(int32_t x) { return x; }
    static Int both(Int a, Int b) { return a & b; }
    static Int sum(Int a, Int b) { return signed_of(unsigned_of(a) + unsigned_of(b)); }
    static Int difference(Int a, Int b) { return signed_of(unsigned_of(a) - unsigned_of(b)); }
    static Int unsigned_most(Int a, Int b) { return unsigned_of(a) > unsigned_of(b) ? a : b; }
    static Int unsigned_least(Int a, Int b) { return unsigned_of(a) < unsigned_of(b) ? a : b; }
    static uint32_t unsigned_most_of(Int x) { return unsigned_of(x); }
    static uint32_t unsigned_least_of(Int x) { return unsigned_of(x); }
    template <int bits>
    static Int left(Int x) { return signed_of(unsigned_of(x) << bits); }
    template <int bits>
    static Int right(Int x) { return signed_of(unsigned_of(x) >> bits); }
    static Int where_greater(Float a, Float b, Int yes, Int no) { return a > b ? yes : no; }
    static Int where_greater(Int a, Int b, Int yes, Int no) { return a > b ? yes : no; }
    // The next index of a binary search: twice the last, and one more if a > b.
    static Int twice_and(Int index, Float a, Float b) { return index + index + (a > b); }

    static Float convert(Int x) { return static_cast<float>(x); }
    // Ties to even; for magnitudes below 2^22.
    static Int nearest(Float x) { return static_cast<int32_t>((x + 12582912.0f) - 12582912.0f); }

    static Int load_bytes(const int8_t* at) { return *at; }
    static Int load_bytes(const uint8_t* at) { return *at; }
    static void store_bytes(uint8_t* at, Int x) { *at = static_cast<uint8_t>(x); }
    static Int load_halves(const uint16_t* at) {
        uint16_t x;
        memcpy(&x, at, sizeof x);
        return x;
    }
    static void store_halves(uint16_t* at, Int x) {
        const uint16_t half = static_cast<uint16_t>(x);
        memcpy(at, &half, sizeof half);
    }

    static Float load_fp16(const uint16_t* at) {
        const Int half = load_halves(at);
        const Int rest = half & 0x7FFF;
        const Int sign = left<16>(half & 0x8000);
        if (rest >= 0x7C00) return floats(sign | 0x7F800000 | rest << 13);
        if (rest >= 0x400) return floats(sign | ((rest << 13) + (112 << 23)));
        return floats(sign | bits(static_cast<float>(rest) * 5.9604644775390625e-8f));
    }

    static void store_fp16(uint16_t* at, Float x) {
        const Int sign = right<16>(bits(x)) & 0x8000;
        const Int rest = bits(x) & INT32_MAX;
        Int half = 0;
        if (rest > 0x7F800000) {
            half = 0x7E00 | (rest >> 13 & 0x3FF);
        } else if (rest >= 0x47800000) {
            half = 0x7C00;
        } else if (rest >= 0x38800000) {
            half = (rest - (112 << 23) + 0xFFF + (rest >> 13 & 1)) >> 13;
        } else {
            half = bits(floats(rest) + 0.5f) - bits(0.5f);  // in units of 2^-24, ties to even
        }
        store_halves(at, sign | half);
    }

    // The entry of a table of `count`, a power of two from 8 to 256, by the index's low bits.
    template <int count>
    static Float entry(const float* table, Int index) { return table[index & (count - 1)]; }

   private:
    static uint32_t unsigned_of(Int x) { return static_cast<uint32_t>(x); }
    static Int signed_of(uint32_t x) { return static_cast<Int>(x); }
};

using V = Vector;

#include "optimizer_step.h"

}  // namespace

const SpanStep* scalar_steps() { return kSteps; }

}  // namespace everstep
