// XXH3-128 of units: the portable part of the algorithm, and the digest and verify kernels.
#include "abi.h"
#include "xxh3.h"

namespace everstep {

alignas(64) const uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

namespace {

uint32_t load32(const uint8_t* address) {
    uint32_t value;
    memcpy(&value, address, sizeof value);
    return value;
}

uint64_t secret64(uint64_t offset) { return load64(kSecret + offset); }

// XXH64's final mix; XXH3 keeps it for inputs of at most 3 bytes.
uint64_t avalanche64(uint64_t hash) {
    hash = (hash ^ (hash >> 33)) * kPrime64_2;
    hash = (hash ^ (hash >> 29)) * kPrime64_3;
    return hash ^ (hash >> 32);
}

uint64_t avalanche(uint64_t hash) {
    hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9;
    return hash ^ (hash >> 32);
}

Digest multiply(uint64_t left, uint64_t right) {
    const auto product = static_cast<unsigned __int128>(left) * right;
    return {static_cast<uint64_t>(product), static_cast<uint64_t>(product >> 64)};
}

uint64_t multiply_fold(uint64_t left, uint64_t right) {
    const Digest product = multiply(left, right);
    return product.low ^ product.high;
}

Digest digest_1_to_3(const uint8_t* data, uint64_t bytes) {
    const uint32_t first = data[0], middle = data[bytes / 2], last = data[bytes - 1];
    const uint32_t low =
        first << 16 | middle << 24 | last | static_cast<uint32_t>(bytes) << 8;
    const uint32_t swapped = __builtin_bswap32(low);
    const uint32_t high = swapped << 13 | swapped >> 19;
    return {avalanche64(low ^ uint64_t{load32(kSecret) ^ load32(kSecret + 4)}),
            avalanche64(high ^ uint64_t{load32(kSecret + 8) ^ load32(kSecret + 12)})};
}

Digest digest_4_to_8(const uint8_t* data, uint64_t bytes) {
    const uint64_t word = load32(data) | uint64_t{load32(data + bytes - 4)} << 32;
    Digest mixed = multiply(word ^ secret64(16) ^ secret64(24), kPrime64_1 + (bytes << 2));
    mixed.high += mixed.low << 1;
    mixed.low ^= mixed.high >> 3;
    mixed.low = (mixed.low ^ (mixed.low >> 35)) * 0x9FB21C651E98DF25;
    mixed.low ^= mixed.low >> 28;
    return {mixed.low, avalanche(mixed.high)};
}

Digest digest_9_to_16(const uint8_t* data, uint64_t bytes) {
    const uint64_t low = load64(data);
    uint64_t high = load64(data + bytes - 8);
    Digest mixed = multiply(low ^ high ^ secret64(32) ^ secret64(40), kPrime64_1);
    mixed.low += (bytes - 1) << 54;
    high ^= secret64(48) ^ secret64(56);
    mixed.high += high + (high & 0xFFFFFFFF) * (kPrime32_2 - 1);
    mixed.low ^= __builtin_bswap64(mixed.high);
    Digest result = multiply(mixed.low, kPrime64_2);
    result.high += mixed.high * kPrime64_2;
    return {avalanche(result.low), avalanche(result.high)};
}

uint64_t mix_16(const uint8_t* data, uint64_t secret) {
    return multiply_fold(load64(data) ^ secret64(secret), load64(data + 8) ^ secret64(secret + 8));
}

void mix_32(Digest& state, const uint8_t* left, const uint8_t* right, uint64_t secret) {
    state.low += mix_16(left, secret);
    state.low ^= load64(right) + load64(right + 8);
    state.high += mix_16(right, secret + 16);
    state.high ^= load64(left) + load64(left + 8);
}

Digest finish_middle(Digest state, uint64_t bytes) {
    const uint64_t high =
        state.low * kPrime64_1 + state.high * kPrime64_4 + bytes * kPrime64_2;
    return {avalanche(state.low + state.high), 0 - avalanche(high)};
}

Digest digest_17_to_128(const uint8_t* data, uint64_t bytes) {
    Digest state = {bytes * kPrime64_1, 0};
    // Pairs of 16 bytes from both ends inwards, the innermost first.
    for (uint64_t pair = (bytes - 1) / 32 + 1; pair-- > 0;)
        mix_32(state, data + 16 * pair, data + bytes - 16 * (pair + 1), 32 * pair);
    return finish_middle(state, bytes);
}

Digest digest_129_to_240(const uint8_t* data, uint64_t bytes) {
    Digest state = {bytes * kPrime64_1, 0};
    for (uint64_t round = 0; round < 4; ++round)
        mix_32(state, data + 32 * round, data + 32 * round + 16, 32 * round);
    state = {avalanche(state.low), avalanche(state.high)};
    for (uint64_t round = 4; round < bytes / 32; ++round)
        mix_32(state, data + 32 * round, data + 32 * round + 16, 3 + 32 * (round - 4));
    mix_32(state, data + bytes - 16, data + bytes - 32, 136 - 17 - 16);
    return finish_middle(state, bytes);
}

Digest digest_short(const uint8_t* data, uint64_t bytes) {
    if (bytes == 0)
        return {avalanche64(secret64(64) ^ secret64(72)), avalanche64(secret64(80) ^ secret64(88))};
    if (bytes <= 3) return digest_1_to_3(data, bytes);
    if (bytes <= 8) return digest_4_to_8(data, bytes);
    if (bytes <= 16) return digest_9_to_16(data, bytes);
    if (bytes <= 128) return digest_17_to_128(data, bytes);
    return digest_129_to_240(data, bytes);
}

uint64_t merge(const Accumulators& state, uint64_t secret, uint64_t start) {
    for (uint64_t pair = 0; pair < 4; ++pair)
        start += multiply_fold(state.lane[2 * pair] ^ secret64(secret + 16 * pair),
                               state.lane[2 * pair + 1] ^ secret64(secret + 16 * pair + 8));
    return avalanche(start);
}

}  // namespace

Digest finish(const Accumulators& state, uint64_t bytes) {
    return {merge(state, 11, bytes * kPrime64_1),
            merge(state, kScrambleSecret - 11, ~(bytes * kPrime64_2))};
}

Digest digest(const uint8_t* data, uint64_t bytes, const Engine& engine) {
    if (bytes <= kShortBytes) return digest_short(data, bytes);
    Accumulators state;
    engine.absorb(state, data, 0, leading_stripes(bytes));
    engine.absorb_last(state, data + bytes - kStripeBytes);
    return finish(state, bytes);
}

void write_canonical(Digest digest, uint8_t* output) {
    const uint64_t words[2] = {__builtin_bswap64(digest.high), __builtin_bswap64(digest.low)};
    memcpy(output, words, sizeof words);
}

}  // namespace everstep

using namespace everstep;

extern "C" {

uint32_t everstep_abi(void) { return EVERSTEP_ABI; }

int everstep_best_isa(void) { return best_isa(); }

void everstep_digest_units(const uint8_t* data, uint64_t bytes, uint64_t unit_bytes,
                           uint8_t* digests, int isa) {
    const Engine& loops = engine(isa);
    for (uint64_t begin = 0; begin < bytes; begin += unit_bytes) {
        const uint64_t size = bytes - begin < unit_bytes ? bytes - begin : unit_bytes;
        write_canonical(digest(data + begin, size, loops), digests);
        digests += EVERSTEP_DIGEST_BYTES;
    }
}

uint64_t everstep_verify_units(const uint8_t* data, uint64_t bytes, uint64_t unit_bytes,
                               const uint8_t* expected, uint8_t* bad, int isa) {
    const Engine& loops = engine(isa);
    uint64_t bad_count = 0;
    for (uint64_t begin = 0; begin < bytes; begin += unit_bytes) {
        const uint64_t size = bytes - begin < unit_bytes ? bytes - begin : unit_bytes;
        uint8_t actual[EVERSTEP_DIGEST_BYTES];
        write_canonical(digest(data + begin, size, loops), actual);
        *bad = memcmp(actual, expected, sizeof actual) != 0;
        bad_count += *bad++;
        expected += EVERSTEP_DIGEST_BYTES;
    }
    return bad_count;
}

}  // extern "C"
