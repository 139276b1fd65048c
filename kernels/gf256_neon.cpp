// The engine of gf256.h for aarch64: table look-ups of nibbles.
#include "gf256.h"

#if defined(__aarch64__)

#include <arm_neon.h>

namespace everstep {

namespace {

template <int rows, int vectors>
inline void neon_block(const Pass& pass, uint64_t at) {
    uint8x16_t sum[rows][vectors];
    for (int row = 0; row < rows; ++row) {
        for (int part = 0; part < vectors; ++part) {
            sum[row][part] = pass.accumulating ? vld1q_u8(pass.targets[row] + at + 16 * part)
                                               : vdupq_n_u8(0);
        }
    }
    for (uint64_t source = 0; source < pass.source_count; ++source) {
        const uint8_t* input = pass.sources[source] + at;
        uint8x16_t low[vectors], high[vectors];
        for (int part = 0; part < vectors; ++part) {
            const uint8x16_t data = vld1q_u8(input + 16 * part);
            low[part] = vandq_u8(data, vdupq_n_u8(15));
            high[part] = vshrq_n_u8(data, 4);
        }
        for (int row = 0; row < rows; ++row) {
            const uint8_t* nibbles = kField.nibbles[pass.coefficients[row][source]];
            const uint8x16_t of_low = vld1q_u8(nibbles), of_high = vld1q_u8(nibbles + 16);
            for (int part = 0; part < vectors; ++part) {
                const uint8x16_t product =
                    veorq_u8(vqtbl1q_u8(of_low, low[part]), vqtbl1q_u8(of_high, high[part]));
                sum[row][part] = veorq_u8(sum[row][part], product);
            }
        }
    }
    for (int row = 0; row < rows; ++row) {
        for (int part = 0; part < vectors; ++part) {
            vst1q_u8(pass.targets[row] + at + 16 * part, sum[row][part]);
        }
    }
}

template <int rows>
void neon_pass(const Pass& pass) {
    const uint64_t head = bytes_to_line(pass);
    bytewise(pass, 0, head);
    uint64_t at = head;
    for (; at + kLineBytes <= pass.bytes; at += kLineBytes) neon_block<rows, 4>(pass, at);
    bytewise(pass, at, pass.bytes);
}

void neon_run(const Pass& pass) {
    switch (pass.rows) {
        case 1: return neon_pass<1>(pass);
        case 2: return neon_pass<2>(pass);
        case 3: return neon_pass<3>(pass);
        default: return neon_pass<4>(pass);
    }
}

}  // namespace

Engine256 neon_engine() { return neon_run; }

}  // namespace everstep

#else

namespace everstep {

Engine256 neon_engine() { return nullptr; }

}  // namespace everstep

#endif
