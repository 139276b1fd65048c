// The optimizer step for AVX2 and F16C. Compiled with these instructions throughout, so nothing
// here may have external linkage but the entry, or the linker could choose it for an older machine.
#include "optimizer.h"

#if defined(__AVX2__) && defined(__F16C__)

#include <immintrin.h>

namespace everstep {

namespace {

// See optimizer_scalar.cpp, which says in plain C++ what these functions do.
struct Vector {
    using Float = __m256;
    using Int = __m256i;
    static constexpr uint64_t kLanes = 8;

    static Float broadcast(float x) { return _mm256_set1_ps(x); }
    static Float load(const float* at) { return _mm256_loadu_ps(at); }
    static void store(float* at, Float x) { _mm256_storeu_ps(at, x); }
    static Float root(Float x) { return _mm256_sqrt_ps(x); }
    static Float floor(Float x) { return _mm256_floor_ps(x); }
    static Float least(Float a, Float b) { return _mm256_min_ps(a, b); }
    static Float most(Float a, Float b) { return _mm256_max_ps(a, b); }
    static Float magnitude(Float x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

    static Float sign(Float x) {
        const Float unit = _mm256_or_ps(_mm256_and_ps(x, _mm256_set1_ps(-0.0f)),
                                        _mm256_set1_ps(1.0f));
        const Float some = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_OQ);
        return _mm256_blendv_ps(_mm256_and_ps(unit, some), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }

    static Float where_greater(Float a, Float b, Float yes, Float no) {
        return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
    }

    static Int bits(Float x) { return _mm256_castps_si256(x); }
    static Float floats(Int x) { return _mm256_castsi256_ps(x); }
    static Int integers(int32_t x) { return _mm256_set1_epi32(x); }
    static Int both(Int a, Int b) { return _mm256_and_si256(a, b); }
    static Int sum(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Int difference(Int a, Int b) { return _mm256_sub_epi32(a, b); }
    static Int unsigned_most(Int a, Int b) { return _mm256_max_epu32(a, b); }
    static Int unsigned_least(Int a, Int b) { return _mm256_min_epu32(a, b); }
    template <int bits>
    static Int left(Int x) { return _mm256_slli_epi32(x, bits); }
    template <int bits>
    static Int right(Int x) { return _mm256_srli_epi32(x, bits); }

    static uint32_t unsigned_most_of(Int x) {
        __m128i most = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4E));
        most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xB1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(most));
    }

    static uint32_t unsigned_least_of(Int x) {
        __m128i least = _mm_min_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        least = _mm_min_epu32(least, _mm_shuffle_epi32(least, 0x4E));
        least = _mm_min_epu32(least, _mm_shuffle_epi32(least, 0xB1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(least));
    }

    static Int where_greater(Float a, Float b, Int yes, Int no) {
        return bits(where_greater(a, b, floats(yes), floats(no)));
    }

    static Int where_greater(Int a, Int b, Int yes, Int no) {
        return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(a, b));
    }

    static Int twice_and(Int index, Float a, Float b) {
        return difference(sum(index, index), bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
    }

    static Float convert(Int x) { return _mm256_cvtepi32_ps(x); }
    static Int nearest(Float x) { return _mm256_cvtps_epi32(x); }

    static Int load_bytes(const int8_t* at) {
        return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
    }
    static Int load_bytes(const uint8_t* at) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
    }

    static void store_bytes(uint8_t* at, Int x) {
        const __m256i lowest = _mm256_shuffle_epi8(
            x, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
        const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(lowest),
                                                  _mm256_extracti128_si256(lowest, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(at), joined);
    }

    static Int load_halves(const uint16_t* at) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
    static void store_halves(uint16_t* at, Int x) {
        const __m128i packed =
            _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), packed);
    }
    static Float load_fp16(const uint16_t* at) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
    static void store_fp16(uint16_t* at, Float x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at),
                         _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    template <int count>
    static Float entry(const float* table, Int index) {
        if (count > 16) {
            return _mm256_i32gather_ps(table, both(index, integers(count - 1)), 4);
        }
        const Float low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
        if (count == 8) return low;
        const Float high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + count - 8), index);
        return _mm256_blendv_ps(low, high, floats(left<28>(index)));
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

const SpanStep* avx2_steps(const everstep_optimizer_tensor& tensor) {
    const bool there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (!there) return nullptr;
    return has_long_chains(tensor) && wide::blocks_fit(tensor) ? wide::kSteps : narrow::kSteps;
}

}  // namespace everstep

#else

namespace everstep {

const SpanStep* avx2_steps(const everstep_optimizer_tensor&) { return nullptr; }

}  // namespace everstep

#endif
