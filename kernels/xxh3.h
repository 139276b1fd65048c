// XXH3-128 in two layers, shared by the kernels: an engine per instruction set feeds whole
// 64-byte stripes into eight accumulators (stripes.cpp), the rest is portable (digest.cpp).
// Written after the public specification, github.com/Cyan4973/xxHash, doc/xxhash_spec.md.
#ifndef EVERSTEP_XXH3_H
#define EVERSTEP_XXH3_H

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "images, windows and digests are read as little-endian words"
#endif

namespace everstep {

constexpr uint64_t kStripeBytes = 64;
constexpr uint64_t kStripesPerBlock = 16;
constexpr uint64_t kShortBytes = 240;  // up to here XXH3 does not use stripes
constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9, kPrime64_4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5;

constexpr uint64_t kSecretBytes = 192;
constexpr uint64_t kScrambleSecret = kSecretBytes - kStripeBytes;
constexpr uint64_t kLastStripeSecret = kScrambleSecret - 7;
extern const uint8_t kSecret[kSecretBytes];

struct Digest {
    uint64_t low;
    uint64_t high;
};

struct alignas(64) Accumulators {
    uint64_t lane[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                        kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
};

// The inner loops of one instruction set. `first` is the index, within its unit, of the first
// stripe at `input`: it selects the secret, and the accumulators are scrambled after every 16th.
struct Engine {
    void (*absorb)(Accumulators& state, const uint8_t* input, uint64_t first, uint64_t count);
    // Also stores each stripe at `output`, which is 64-byte aligned, past the caches.
    void (*absorb_and_store)(Accumulators& state, const uint8_t* input, uint8_t* output,
                             uint64_t first, uint64_t count);
    // The final stripe of a unit, which may overlap those before it.
    void (*absorb_last)(Accumulators& state, const uint8_t* input);
    // memcpy that stores past the caches.
    void (*copy)(uint8_t* output, const uint8_t* input, uint64_t bytes);
    // Orders the stores past the caches before any later store.
    void (*fence)();
};

int best_isa();
const Engine& engine(int isa);

inline uint64_t load64(const uint8_t* address) {
    uint64_t value;
    memcpy(&value, address, sizeof value);
    return value;
}

// The stripes of a unit before its final one.
inline uint64_t leading_stripes(uint64_t bytes) { return (bytes - 1) / kStripeBytes; }

Digest finish(const Accumulators& state, uint64_t bytes);
Digest digest(const uint8_t* data, uint64_t bytes, const Engine& engine);
void write_canonical(Digest digest, uint8_t* output);

}  // namespace everstep

#endif
