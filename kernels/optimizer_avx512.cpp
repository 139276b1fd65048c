// The optimizer step for AVX-512. Compiled with these instructions throughout, so nothing here may
// have external linkage but the entry, or the linker could choose it for an older machine.
#include "optimizer.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__)

#include <immintrin.h>

namespace everstep {

namespace {

// See optimizer_scalar.cpp, which says in plain C++ what these functions do.
struct Vector {
    using Float = __m512;
    using Int = __m512i;
    static constexpr uint64_t kLanes = 16;

    static Float broadcast(float x) { return _mm512_set1_ps(x); }
    static Float load(const float* at) { return _mm512_loadu_ps(at); }
    static void store(float* at, Float x) { _mm512_storeu_ps(at, x); }
    static Float root(Float x) { return _mm512_sqrt_ps(x); }
    static Float floor(Float x) { return _mm512_floor_ps(x); }
    static Float least(Float a, Float b) { return _mm512_min_ps(a, b); }
    static Float most(Float a, Float b) { return _mm512_max_ps(a, b); }
    static Float magnitude(Float x) { return _mm512_abs_ps(x); }

    static Float sign(Float x) {
        const __m512i unit = _mm512_ternarylogic_epi32(
            _mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN),
            _mm512_castps_si512(_mm512_set1_ps(1.0f)), 0xEA);
        const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_OQ);
        const __mmask16 odd = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_mask_mov_ps(_mm512_maskz_mov_ps(some, _mm512_castsi512_ps(unit)), odd, x);
    }

    static Float where_greater(Float a, Float b, Float yes, Float no) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
    }

    static Int bits(Float x) { return _mm512_castps_si512(x); }
    static Float floats(Int x) { return _mm512_castsi512_ps(x); }
    static Int integers(int32_t x) { return _mm512_set1_epi32(x); }
    static Int both(Int a, Int b) { return _mm512_and_si512(a, b); }
    static Int sum(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Int difference(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    static Int unsigned_most(Int a, Int b) { return _mm512_max_epu32(a, b); }
    static Int unsigned_least(Int a, Int b) { return _mm512_min_epu32(a, b); }
    static uint32_t unsigned_most_of(Int x) { return _mm512_reduce_max_epu32(x); }
    static uint32_t unsigned_least_of(Int x) { return _mm512_reduce_min_epu32(x); }
    template <int bits>
    static Int left(Int x) { return _mm512_slli_epi32(x, bits); }
    template <int bits>
    static Int right(Int x) { return _mm512_srli_epi32(x, bits); }

    static Int where_greater(Float a, Float b, Int yes, Int no) {
        return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
    }

    static Int where_greater(Int a, Int b, Int yes, Int no) {
        return _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a, b), no, yes);
    }

    static Int twice_and(Int index, Float a, Float b) {
        const Int twice = _mm512_add_epi32(index, index);
        return _mm512_mask_add_epi32(twice, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), twice,
                                     _mm512_set1_epi32(1));
    }

    static Float convert(Int x) { return _mm512_cvtepi32_ps(x); }
    static Int nearest(Float x) { return _mm512_cvtps_epi32(x); }

    static Int load_bytes(const int8_t* at) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
    static Int load_bytes(const uint8_t* at) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
    static void store_bytes(uint8_t* at, Int x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(x));
    }
    static Int load_halves(const uint16_t* at) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }
    static void store_halves(uint16_t* at, Int x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(x));
    }
    static Float load_fp16(const uint16_t* at) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }
    static void store_fp16(uint16_t* at, Float x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at),
                            _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    template <int count>
    static Float entry(const float* table, Int index) {
        if constexpr (count == 8) {
            return _mm512_permutexvar_ps(index, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
        } else if constexpr (count == 16) {
            return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
        } else if constexpr (count == 32) {
            return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index,
                                          _mm512_loadu_ps(table + 16));
        } else if constexpr (count <= 128) {
            const __mmask16 upper = _mm512_test_epi32_mask(index, integers(count / 2));
            return _mm512_mask_blend_ps(upper, entry<count / 2>(table, index),
                                        entry<count / 2>(table + count / 2, index));
        } else {
            return _mm512_i32gather_ps(both(index, integers(count - 1)), table, 4);
        }
    }
};

#include "optimizer_wide.h"

namespace narrow {
using V = Vector;
#include "optimizer_step.h"
}  // namespace narrow

namespace wide {
using V = Wide<Vector, 4>;
#include "optimizer_step.h"
}  // namespace wide

}  // namespace

const SpanStep* avx512_steps(const everstep_optimizer_tensor& tensor) {
    const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!there) return nullptr;
    return has_long_chains(tensor) && wide::blocks_fit(tensor) ? wide::kSteps : narrow::kSteps;
}

}  // namespace everstep

#else

namespace everstep {

const SpanStep* avx512_steps(const everstep_optimizer_tensor&) { return nullptr; }

}  // namespace everstep

#endif
