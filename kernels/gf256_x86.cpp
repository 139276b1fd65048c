// The engines of gf256.h for x86: GFNI with AVX-512, and AVX2.
//
// For each block of the targets the loop goes over all sources with the sums in registers, so
// that every source byte is read once and every target byte written once. On Zen 4, measured:
// blocks of four lines instead of one gain 13 % in the caches where all buffers are equally far
// from their pages' beginnings (loads that look as if they followed a store 4 KiB away), and
// asking for lines ahead, as stripes.cpp does, costs eight sources in DRAM over a third of their
// speed and four of them a seventh or more, at 512 to 4096 bytes: the hardware follows them all.
#include "gf256.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace everstep {

namespace {

#define EVERSTEP_AVX2 __attribute__((target("avx2")))
#define EVERSTEP_GFNI __attribute__((target("avx512f,avx512bw,gfni")))

// Whether all targets are as far from a line's beginning as the first.
inline bool targets_agree(const Pass& pass, uint64_t line) {
    for (int row = 1; row < pass.rows; ++row) {
        if ((pass.targets[row] - pass.targets[0]) % static_cast<int64_t>(line)) return false;
    }
    return true;
}

// The coefficients' matrices in the order in which the loop uses them.
struct Matrices {
    uint64_t of[kMaxSources * kMaxRows];
};

// Up to one line, masked.
template <int rows>
EVERSTEP_GFNI void gfni_edge(const Pass& pass, const Matrices& matrices, uint64_t at,
                             uint64_t bytes) {
    const __mmask64 mask = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
    __m512i sum[rows];
    for (int row = 0; row < rows; ++row) {
        sum[row] = pass.accumulating ? _mm512_maskz_loadu_epi8(mask, pass.targets[row] + at)
                                     : _mm512_setzero_si512();
    }
    const uint64_t* matrix = matrices.of;
    for (uint64_t source = 0; source < pass.source_count; ++source) {
        const __m512i data = _mm512_maskz_loadu_epi8(mask, pass.sources[source] + at);
        for (int row = 0; row < rows; ++row) {
            const __m512i factor = _mm512_set1_epi64(static_cast<int64_t>(*matrix++));
            sum[row] = _mm512_xor_si512(sum[row], _mm512_gf2p8affine_epi64_epi8(data, factor, 0));
        }
    }
    for (int row = 0; row < rows; ++row) {
        _mm512_mask_storeu_epi8(pass.targets[row] + at, mask, sum[row]);
    }
}

template <int rows, int lines, bool streaming>
EVERSTEP_GFNI inline void gfni_block(const Pass& pass, const Matrices& matrices, uint64_t at) {
    __m512i sum[rows][lines];
    for (int row = 0; row < rows; ++row) {
        for (int line = 0; line < lines; ++line) {
            sum[row][line] = pass.accumulating
                                 ? _mm512_loadu_si512(pass.targets[row] + at + 64 * line)
                                 : _mm512_setzero_si512();
        }
    }
    const uint64_t* matrix = matrices.of;
    for (uint64_t source = 0; source < pass.source_count; ++source) {
        const uint8_t* input = pass.sources[source] + at;
        __m512i data[lines];
        for (int line = 0; line < lines; ++line) {
            data[line] = _mm512_loadu_si512(input + 64 * line);
        }
        for (int row = 0; row < rows; ++row) {
            const __m512i factor = _mm512_set1_epi64(static_cast<int64_t>(*matrix++));
            for (int line = 0; line < lines; ++line) {
                sum[row][line] = _mm512_xor_si512(
                    sum[row][line], _mm512_gf2p8affine_epi64_epi8(data[line], factor, 0));
            }
        }
    }
    for (int row = 0; row < rows; ++row) {
        for (int line = 0; line < lines; ++line) {
            uint8_t* output = pass.targets[row] + at + 64 * line;
            if (streaming) {
                _mm512_stream_si512(reinterpret_cast<__m512i*>(output), sum[row][line]);
            } else {
                _mm512_storeu_si512(output, sum[row][line]);
            }
        }
    }
}

template <int rows, bool streaming>
EVERSTEP_GFNI void gfni_lines(const Pass& pass, const Matrices& matrices, uint64_t at) {
    constexpr int lines = 4;
    for (; at + 64 * lines <= pass.bytes; at += 64 * lines) {
        gfni_block<rows, lines, streaming>(pass, matrices, at);
    }
    for (; at < pass.bytes; at += 64) {
        const uint64_t left = pass.bytes - at;
        gfni_edge<rows>(pass, matrices, at, left < 64 ? left : 64);
    }
}

template <int rows>
EVERSTEP_GFNI void gfni_pass(const Pass& pass) {
    Matrices matrices;
    uint64_t* matrix = matrices.of;
    for (uint64_t source = 0; source < pass.source_count; ++source) {
        for (int row = 0; row < rows; ++row) {
            *matrix++ = kField.matrix[pass.coefficients[row][source]];
        }
    }
    const uint64_t head = bytes_to_line(pass);
    if (head) gfni_edge<rows>(pass, matrices, 0, head);
    if (pass.streaming && targets_agree(pass, 64)) {
        gfni_lines<rows, true>(pass, matrices, head);
        _mm_sfence();
    } else {
        gfni_lines<rows, false>(pass, matrices, head);
    }
}

void gfni_run(const Pass& pass) {
    switch (pass.rows) {
        case 1: return gfni_pass<1>(pass);
        case 2: return gfni_pass<2>(pass);
        case 3: return gfni_pass<3>(pass);
        default: return gfni_pass<4>(pass);
    }
}

template <int rows, int vectors, bool streaming>
EVERSTEP_AVX2 inline void avx2_block(const Pass& pass, uint64_t at) {
    const __m256i low_bits = _mm256_set1_epi8(15);
    __m256i sum[rows][vectors];
    for (int row = 0; row < rows; ++row) {
        for (int part = 0; part < vectors; ++part) {
            sum[row][part] = pass.accumulating
                                 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                                       pass.targets[row] + at + 32 * part))
                                 : _mm256_setzero_si256();
        }
    }
    for (uint64_t source = 0; source < pass.source_count; ++source) {
        const uint8_t* input = pass.sources[source] + at;
        __m256i low[vectors], high[vectors];
        for (int part = 0; part < vectors; ++part) {
            const __m256i data =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(input + 32 * part));
            low[part] = _mm256_and_si256(data, low_bits);
            high[part] = _mm256_and_si256(_mm256_srli_epi16(data, 4), low_bits);
        }
        for (int row = 0; row < rows; ++row) {
            const __m128i* nibbles = reinterpret_cast<const __m128i*>(
                kField.nibbles[pass.coefficients[row][source]]);
            const __m256i of_low = _mm256_broadcastsi128_si256(_mm_load_si128(nibbles));
            const __m256i of_high = _mm256_broadcastsi128_si256(_mm_load_si128(nibbles + 1));
            for (int part = 0; part < vectors; ++part) {
                const __m256i product = _mm256_xor_si256(_mm256_shuffle_epi8(of_low, low[part]),
                                                         _mm256_shuffle_epi8(of_high, high[part]));
                sum[row][part] = _mm256_xor_si256(sum[row][part], product);
            }
        }
    }
    for (int row = 0; row < rows; ++row) {
        for (int part = 0; part < vectors; ++part) {
            __m256i* output = reinterpret_cast<__m256i*>(pass.targets[row] + at + 32 * part);
            if (streaming) {
                _mm256_stream_si256(output, sum[row][part]);
            } else {
                _mm256_storeu_si256(output, sum[row][part]);
            }
        }
    }
}

template <int rows, bool streaming>
EVERSTEP_AVX2 void avx2_lines(const Pass& pass, uint64_t at) {
    constexpr int vectors = rows == 1 ? 4 : 2;
    for (; at + 32 * vectors <= pass.bytes; at += 32 * vectors) {
        avx2_block<rows, vectors, streaming>(pass, at);
    }
    bytewise(pass, at, pass.bytes);
}

template <int rows>
EVERSTEP_AVX2 void avx2_pass(const Pass& pass) {
    const uint64_t head = bytes_to_line(pass);
    bytewise(pass, 0, head);
    if (pass.streaming && targets_agree(pass, 32)) {
        avx2_lines<rows, true>(pass, head);
        _mm_sfence();
    } else {
        avx2_lines<rows, false>(pass, head);
    }
}

void avx2_run(const Pass& pass) {
    switch (pass.rows) {
        case 1: return avx2_pass<1>(pass);
        case 2: return avx2_pass<2>(pass);
        case 3: return avx2_pass<3>(pass);
        default: return avx2_pass<4>(pass);
    }
}

}  // namespace

Engine256 gfni_engine() {
    const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("gfni");
    return there ? gfni_run : nullptr;
}

Engine256 avx2_engine() { return __builtin_cpu_supports("avx2") ? avx2_run : nullptr; }

}  // namespace everstep

#else

namespace everstep {

Engine256 gfni_engine() { return nullptr; }
Engine256 avx2_engine() { return nullptr; }

}  // namespace everstep

#endif
