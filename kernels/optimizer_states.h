// Between a chunk of a coded state and a buffer of fp32. Included by optimizer_step.h.

// 4-bit codes lie two in a byte, the even element in the low half; a row begins with a new byte.
inline void unpack(const uint8_t* stored, uint64_t bytes, uint8_t* codes) {
    for (uint64_t i = 0; i < bytes; ++i) {
        codes[2 * i] = stored[i] & 15;
        codes[2 * i + 1] = stored[i] >> 4;
    }
}

inline void pack(const uint8_t* codes, uint64_t bytes, uint8_t* stored) {
    for (uint64_t i = 0; i < bytes; ++i) {
        stored[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    }
}

template <class C>
inline uint8_t* codes_of(const Place& place, const everstep_optimizer_state& state) {
    if (!C::kNibbles) return state.codes + place.first();
    return state.codes + place.row * ((place.tensor->row + 1) / 2) + place.offset / 2;
}

template <class C>
inline float* scales_of(const Place& place, const everstep_optimizer_state& state) {
    const uint64_t blocks_of_row = (place.tensor->row + state.block - 1) / state.block;
    return state.scales + (place.row * blocks_of_row + place.offset / state.block) * C::kScales;
}

// The element as its codec measures it, which is taken into the block's extremes.
template <class C>
inline Float measured(const Float& x, Int& most, Int& least) {
    const Float measure = C::measure(x);
    const Int size = C::kPositive ? V::bits(measure) : V::bits(V::magnitude(measure));
    most = V::unsigned_most(most, size);
    // One less, so that zero is the greatest.
    if (C::kScales == 2) least = V::unsigned_least(least, V::difference(size, V::integers(1)));
    return measure;
}

// From `measured` elements and their extremes to codes, one a byte, and scales.
template <class C, class Measure>
inline void encode_block(const Measure& measure, uint64_t count, const Int& most,
                         const Int& least, uint8_t* codes, float* scales) {
    const uint32_t greatest = V::unsigned_most_of(most);
    if (greatest >= 0x7F800000) {
        for (int i = 0; i < C::kScales; ++i) scales[i] = float_of(0x7FC00000);
        memset(codes, 0, count);
        return;
    }
    const uint32_t smallest = C::kScales == 2 ? V::unsigned_least_of(least) + 1 : 0;
    const typename C::Encoding encoding(greatest, smallest);
    for (int i = 0; i < C::kScales; ++i) scales[i] = encoding.scales[i];
    for (uint64_t at = 0; at < count; at += V::kLanes) {
        V::store_bytes(codes + at, encoding(measure(at)));
    }
}

inline uint64_t lesser(uint64_t a, uint64_t b) { return a < b ? a : b; }

template <class C>
__attribute__((flatten)) void decode_blocks(const Place& place, const everstep_optimizer_state& state, float* buffer) {
    using Code = typename C::Code;
    alignas(64) uint8_t bytes[kChunk];
    const uint8_t* stored = codes_of<C>(place, state);
    const uint8_t* codes = stored;
    if (C::kNibbles) {
        unpack(stored, (place.count + 1) / 2, bytes);
        codes = bytes;
    } else if (!place.whole()) {
        memcpy(bytes, stored, place.count);
        codes = bytes;
    }
    if (codes == bytes) memset(bytes + place.count, 0, place.padded() - place.count);
    const float* scales = scales_of<C>(place, state);
    for (uint64_t begin = 0; begin < place.padded(); begin += state.block) {
        const typename C::Decoding decoding(scales);
        scales += C::kScales;
        const uint64_t end = lesser(begin + state.block, place.padded());
        for (uint64_t at = begin; at < end; at += V::kLanes) {
            const Int code = V::load_bytes(reinterpret_cast<const Code*>(codes) + at);
            V::store(buffer + at, decoding(code));
        }
    }
}

template <class C>
__attribute__((flatten)) void encode_blocks(const Place& place, const everstep_optimizer_state& state, float* buffer) {
    alignas(64) uint8_t bytes[kChunk];
    uint8_t* stored = codes_of<C>(place, state);
    uint8_t* codes = C::kNibbles || !place.whole() ? bytes : stored;
    float* scales = scales_of<C>(place, state);
    for (uint64_t begin = 0; begin < place.padded(); begin += state.block) {
        const uint64_t end = lesser(begin + state.block, place.padded());
        Int most = V::integers(0), least = V::integers(-1);
        for (uint64_t at = begin; at < end; at += V::kLanes) {
            V::store(buffer + at, measured<C>(V::load(buffer + at), most, least));
        }
        const auto measure = [=](uint64_t at) { return V::load(buffer + begin + at); };
        encode_block<C>(measure, end - begin, most, least, codes + begin, scales);
        scales += C::kScales;
    }
    if (C::kNibbles) {
        if (place.count % 2) bytes[place.count] = 0;
        pack(bytes, (place.count + 1) / 2, stored);
    } else if (codes == bytes) {
        memcpy(stored, bytes, place.count);
    }
}

// Where a state's elements are, which is `buffer` unless they are fp32 and need no filling up.
inline float* read_state(const Place& place, const everstep_optimizer_state& state,
                         float* buffer) {
    switch (state.codec) {
        case kBf16: read_bf16(place, state.codes, buffer); break;
        case kBf16Int8: read_corrected(place, state.codes, state.correction, buffer); break;
        case kInt8Signed: decode_blocks<Int8Signed>(place, state, buffer); break;
        case kInt8Second: decode_blocks<Int8Second>(place, state, buffer); break;
        case kDynamicSigned: decode_blocks<Dynamic<false>>(place, state, buffer); break;
        case kDynamicSecond: decode_blocks<Dynamic<true>>(place, state, buffer); break;
        case kFourbitSigned: decode_blocks<FourbitSigned>(place, state, buffer); break;
        case kFourbitSecond: decode_blocks<FourbitSecond>(place, state, buffer); break;
        case kFp8Signed: decode_blocks<Fp8<false>>(place, state, buffer); break;
        case kFp8Second: decode_blocks<Fp8<true>>(place, state, buffer); break;
        default: return read_fp32(place, state.codes, buffer);
    }
    return buffer;
}

// From where `read_state` has put them; changes a buffer.
inline void write_state(const Place& place, const everstep_optimizer_state& state,
                        float* buffer) {
    if (state.codec == kFp32) return write_fp32(place, buffer, state.codes);
    memset(buffer + place.count, 0, (place.padded() - place.count) * sizeof(float));
    switch (state.codec) {
        case kBf16: return write_bf16(place, buffer, state.codes);
        case kBf16Int8: return write_corrected(place, buffer, state.codes, state.correction);
        case kInt8Signed: return encode_blocks<Int8Signed>(place, state, buffer);
        case kInt8Second: return encode_blocks<Int8Second>(place, state, buffer);
        case kDynamicSigned: return encode_blocks<Dynamic<false>>(place, state, buffer);
        case kDynamicSecond: return encode_blocks<Dynamic<true>>(place, state, buffer);
        case kFourbitSigned: return encode_blocks<FourbitSigned>(place, state, buffer);
        case kFourbitSecond: return encode_blocks<FourbitSecond>(place, state, buffer);
        case kFp8Signed: return encode_blocks<Fp8<false>>(place, state, buffer);
        case kFp8Second: return encode_blocks<Fp8<true>>(place, state, buffer);
        default: return;
    }
}
