// Arithmetic over GF(2^8) with the polynomial 0x11D, in two layers: an engine per instruction set
// multiplies and adds over ranges that all sources cover (gf256_x86.cpp, gf256_neon.cpp, and the
// portable one in gf256.cpp), the rest is portable (gf256.cpp).
#ifndef EVERSTEP_GF256_H
#define EVERSTEP_GF256_H

#include <stdint.h>

namespace everstep {

constexpr uint64_t kMaxSources = 255;
// The outputs that one pass over the sources computes: as many accumulators as registers hold.
constexpr int kMaxRows = 4;
constexpr uint64_t kLineBytes = 64;

// One pass: target r becomes, or with `accumulating` is added to, the sum over all sources j of
// coefficients[r][j] * sources[j]. Every source and target has `bytes` bytes.
struct Pass {
    const uint8_t* sources[kMaxSources];
    uint8_t coefficients[kMaxRows][kMaxSources];
    uint8_t* targets[kMaxRows];
    uint64_t source_count;
    uint64_t bytes;
    int rows;
    bool accumulating;
    bool streaming;  // past the caches
};

using Engine256 = void (*)(const Pass&);

struct FieldTables {
    // The products with 0x00 to 0x0F, then those with 0x00, 0x10, to 0xF0.
    alignas(32) uint8_t nibbles[256][32];
    // The 8x8 bit matrix of the multiplication, as GF2P8AFFINEQB wants it.
    uint64_t matrix[256];
};
extern const FieldTables kField;

inline uint8_t product(uint8_t coefficient, uint8_t value) {
    const uint8_t* nibbles = kField.nibbles[coefficient];
    return nibbles[value & 15] ^ nibbles[16 + (value >> 4)];
}

// The bytes [begin, end) of a pass, one by one: what is left over beside whole vectors.
void bytewise(const Pass& pass, uint64_t begin, uint64_t end);

// The bytes before the first target is aligned to a line.
inline uint64_t bytes_to_line(const Pass& pass) {
    const uint64_t head = -reinterpret_cast<uintptr_t>(pass.targets[0]) % kLineBytes;
    return head < pass.bytes ? head : pass.bytes;
}

// Null where the machine, or the build, lacks it.
Engine256 gfni_engine();
Engine256 avx2_engine();
Engine256 neon_engine();

}  // namespace everstep

#endif
