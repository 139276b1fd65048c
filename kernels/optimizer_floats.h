// 16-bit floats, what a bf16 value lacks of its fp32 one, and random numbers. Included by
// optimizer_step.h.

// The upper half of fp32, ties to even.
inline Int to_bf16(Float x) {
    const Int raw = V::bits(x);
    const Int odd = V::both(V::right<16>(raw), V::integers(1));
    const Int upper = V::right<16>(V::sum(raw, V::sum(odd, V::integers(0x7FFF))));
    const Int rest = V::both(raw, V::integers(INT32_MAX));
    return V::where_greater(rest, V::integers(0x7F800000), V::integers(0x7FC0), upper);
}

// Up or down with the probability of its nearness; `random` has 16 bits.
inline Int to_bf16_by_chance(Float x, Int random) {
    const Int raw = V::bits(x);
    const Int rest = V::both(raw, V::integers(INT32_MAX));
    const Int upper = V::right<16>(V::sum(raw, random));
    return V::where_greater(V::integers(0x7F800000), rest, upper, to_bf16(x));
}

inline Float from_bf16(Int upper) { return V::floats(V::left<16>(upper)); }

// Half a unit in the last place of a bf16 value; zero of those too small, infinite or NaN.
inline Float half_unit(Int upper) {
    const Int exponent = V::both(V::right<7>(upper), V::integers(255));
    const Int shifted = V::left<23>(V::difference(exponent, V::integers(8)));
    const Int finite = V::where_greater(V::integers(255), exponent, shifted, V::integers(0));
    return V::floats(V::where_greater(exponent, V::integers(8), finite, V::integers(0)));
}

// A correction is in 1/127 of half a unit.
inline Float from_corrected(Int upper, Int correction) {
    const Float step = half_unit(upper) * V::broadcast(1.0f / 127);
    return from_bf16(upper) + V::convert(correction) * step;
}

inline Int correction_of(Float x, Int upper) {
    const Float half = half_unit(upper);
    const Float part = (x - from_bf16(upper)) / half * V::broadcast(127.0f);
    const Int correction = V::nearest(clamped(part, -127.0f, 127.0f));
    return V::where_greater(half, V::broadcast(0.0f), correction, V::integers(0));
}

// The first word of Philox4x32-10 of the counter (at, 0, 0, 0).
inline uint32_t philox(uint32_t at, uint64_t seed) {
    uint32_t c0 = at, c1 = 0, c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        const uint32_t n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(b);
        c3 = static_cast<uint32_t>(a);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}
