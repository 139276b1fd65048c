// Sums of products over GF(2^8): the field's tables, the portable engine, and the ABI.
#include "gf256.h"

#include <string.h>

#include "abi.h"

namespace everstep {

namespace {

// Targets at least this large, together, are stored past the caches: an ordinary store would first
// read the line. On Zen 4 (1 MiB of L2) that was faster for two targets of any size: by 5 to 8 %
// at 512 KiB and 1 MiB each, by 18 to 31 % from 2 to 16 MiB. But a single parity unit of 1 MiB is
// digested next, and an ordinary store leaves it where that finds it.
constexpr uint64_t kStreamBytes = 2 << 20;

constexpr uint8_t slow_product(unsigned left, unsigned right) {
    unsigned result = 0;
    for (; right; right >>= 1) {
        if (right & 1) result ^= left;
        left = (left << 1) ^ (left & 0x80 ? 0x11D : 0);
    }
    return static_cast<uint8_t>(result);
}

constexpr FieldTables make_tables() {
    FieldTables tables{};
    for (unsigned factor = 0; factor < 256; ++factor) {
        for (unsigned nibble = 0; nibble < 16; ++nibble) {
            tables.nibbles[factor][nibble] = slow_product(factor, nibble);
            tables.nibbles[factor][16 + nibble] = slow_product(factor, nibble << 4);
        }
        // Byte 7 - i holds the input bits whose parity is output bit i.
        for (unsigned input = 0; input < 8; ++input) {
            const uint64_t column = slow_product(factor, 1u << input);
            for (unsigned output = 0; output < 8; ++output) {
                tables.matrix[factor] |= (column >> output & 1) << (8 * (7 - output) + input);
            }
        }
    }
    return tables;
}

// Every byte of a word times 2.
inline uint64_t doubled(uint64_t word) {
    const uint64_t carry = (word >> 7) & 0x0101010101010101;
    return ((word << 1) & 0xFEFEFEFEFEFEFEFE) ^ carry ^ carry << 2 ^ carry << 3 ^ carry << 4;
}

constexpr int kPlaneWords = 32;
constexpr uint64_t kPlaneBytes = 8 * kPlaneWords;

// A source is added to plane b if its coefficient has bit b; the result is the sum of plane b
// times 2^b. Plain loops over words, which compilers turn into whatever vectors there are.
void portable_block(const Pass& pass, int row, uint64_t at) {
    uint64_t planes[8][kPlaneWords] = {};
    uint8_t* target = pass.targets[row] + at;
    if (pass.accumulating) memcpy(planes[0], target, kPlaneBytes);
    for (uint64_t source = 0; source < pass.source_count; ++source) {
        uint64_t words[kPlaneWords];
        memcpy(words, pass.sources[source] + at, kPlaneBytes);
        for (int bit = 0; bit < 8; ++bit) {
            if (!(pass.coefficients[row][source] >> bit & 1)) continue;
            for (int word = 0; word < kPlaneWords; ++word) planes[bit][word] ^= words[word];
        }
    }
    for (int bit = 7; bit > 0; --bit) {
        for (int word = 0; word < kPlaneWords; ++word) {
            planes[bit - 1][word] ^= doubled(planes[bit][word]);
        }
    }
    memcpy(target, planes[0], kPlaneBytes);
}

void portable_engine(const Pass& pass) {
    uint64_t at = 0;
    for (; at + kPlaneBytes <= pass.bytes; at += kPlaneBytes) {
        for (int row = 0; row < pass.rows; ++row) portable_block(pass, row, at);
    }
    bytewise(pass, at, pass.bytes);
}

Engine256 engine256(int isa) {
    if (isa == 1) return portable_engine;
    if (isa != 2 && gfni_engine()) return gfni_engine();
    if (avx2_engine()) return avx2_engine();
    return neon_engine() ? neon_engine() : portable_engine;
}

// The sources that reach beyond `begin`, and the rows' coefficients for them; sets how far all of
// them go, up to `end`.
void select_sources(Pass& pass, const uint8_t* coefficients, uint64_t source_count,
                    const uint8_t* const* sources, const uint64_t* source_bytes, uint64_t begin,
                    uint64_t end) {
    pass.source_count = 0;
    for (uint64_t source = 0; source < source_count; ++source) {
        if (source_bytes[source] <= begin) continue;
        if (source_bytes[source] < end) end = source_bytes[source];
        for (int row = 0; row < pass.rows; ++row) {
            pass.coefficients[row][pass.source_count] = coefficients[row * source_count + source];
        }
        pass.sources[pass.source_count++] = sources[source] + begin;
    }
    pass.bytes = end - begin;
}

}  // namespace

constexpr FieldTables kField = make_tables();

void bytewise(const Pass& pass, uint64_t begin, uint64_t end) {
    for (int row = 0; row < pass.rows; ++row) {
        for (uint64_t at = begin; at < end; ++at) {
            uint8_t sum = pass.accumulating ? pass.targets[row][at] : 0;
            for (uint64_t source = 0; source < pass.source_count; ++source) {
                sum ^= product(pass.coefficients[row][source], pass.sources[source][at]);
            }
            pass.targets[row][at] = sum;
        }
    }
}

}  // namespace everstep

using namespace everstep;

extern "C" {

void everstep_gf256_accumulate(uint8_t coefficient, const uint8_t* source, uint8_t* target,
                               uint64_t bytes, int isa) {
    Pass pass;
    pass.sources[0] = source;
    pass.coefficients[0][0] = coefficient;
    pass.targets[0] = target;
    pass.source_count = 1;
    pass.bytes = bytes;
    pass.rows = 1;
    pass.accumulating = true;
    pass.streaming = false;
    engine256(isa)(pass);
}

void everstep_gf256_dots(const uint8_t* coefficients, uint64_t row_count, uint64_t source_count,
                         const uint8_t* const* sources, const uint64_t* source_bytes,
                         uint8_t* const* targets, uint64_t bytes, int isa) {
    const Engine256 engine = engine256(isa);
    Pass pass;
    pass.accumulating = false;
    pass.streaming = row_count * bytes >= kStreamBytes;
    for (uint64_t first = 0; first < row_count; first += kMaxRows) {
        pass.rows = row_count - first < kMaxRows ? static_cast<int>(row_count - first) : kMaxRows;
        for (uint64_t begin = 0; begin < bytes; begin += pass.bytes) {
            select_sources(pass, coefficients + first * source_count, source_count, sources,
                           source_bytes, begin, bytes);
            for (int row = 0; row < pass.rows; ++row) {
                pass.targets[row] = targets[first + row] + begin;
            }
            engine(pass);
        }
    }
}

}  // extern "C"
