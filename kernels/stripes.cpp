// The stripe loops of XXH3 and the copies fused with them, once for each instruction set.
//
// Source bytes are read once and stored past the caches: an image is larger than any cache, and
// an ordinary store would first read the line that it is about to overwrite.
#include "xxh3.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace everstep {

namespace {

// The stripes from `position` to the next scramble, or to the end.
inline uint64_t run_length(uint64_t position, uint64_t left) {
    const uint64_t room = kStripesPerBlock - position % kStripesPerBlock;
    return left < room ? left : room;
}

inline const uint8_t* stripe_secret(uint64_t position) {
    return kSecret + 8 * (position % kStripesPerBlock);
}

void scalar_stripe(Accumulators& state, const uint8_t* input, const uint8_t* secret) {
    for (int lane = 0; lane < 8; ++lane) {
        const uint64_t word = load64(input + 8 * lane);
        const uint64_t key = word ^ load64(secret + 8 * lane);
        state.lane[lane ^ 1] += word;
        state.lane[lane] += (key & 0xFFFFFFFF) * (key >> 32);
    }
}

void scalar_scramble(Accumulators& state) {
    for (int lane = 0; lane < 8; ++lane) {
        const uint64_t value = state.lane[lane];
        state.lane[lane] =
            (value ^ (value >> 47) ^ load64(kSecret + kScrambleSecret + 8 * lane)) * kPrime32_1;
    }
}

template <bool storing>
void scalar_absorb(Accumulators& state, const uint8_t* input, uint8_t* output, uint64_t first,
                   uint64_t count) {
    for (const uint64_t end = first + count; first < end;) {
        const uint8_t* secret = stripe_secret(first);
        for (uint64_t left = run_length(first, end - first); left > 0; --left, ++first) {
            scalar_stripe(state, input, secret);
            if (storing) {
                memcpy(output, input, kStripeBytes);
                output += kStripeBytes;
            }
            input += kStripeBytes;
            secret += 8;
        }
        if (first % kStripesPerBlock == 0) scalar_scramble(state);
    }
}

void scalar_last(Accumulators& state, const uint8_t* input) {
    scalar_stripe(state, input, kSecret + kLastStripeSecret);
}

void scalar_copy(uint8_t* output, const uint8_t* input, uint64_t bytes) {
    memcpy(output, input, bytes);
}

void scalar_fence() {}

const Engine kScalar = {
    [](Accumulators& state, const uint8_t* input, uint64_t first, uint64_t count) {
        scalar_absorb<false>(state, input, nullptr, first, count);
    },
    scalar_absorb<true>, scalar_last, scalar_copy, scalar_fence};

#if defined(__x86_64__)

#define EVERSTEP_AVX2 __attribute__((target("avx2")))
#define EVERSTEP_AVX512 __attribute__((target("avx512f")))

// How far ahead of the loads lines are asked for: hardware prefetchers stop at page ends.
constexpr uint64_t kPrefetchBytes = 1024;

inline void prefetch(const uint8_t* input) {
    _mm_prefetch(reinterpret_cast<const char*>(input + kPrefetchBytes), _MM_HINT_T0);
}

void store_fence() { _mm_sfence(); }

// The bytes before `output` is 64-byte aligned, which an ordinary store must write.
inline uint64_t head_bytes(const uint8_t* output, uint64_t bytes) {
    const uint64_t head = -reinterpret_cast<uintptr_t>(output) % kStripeBytes;
    return head < bytes ? head : bytes;
}

EVERSTEP_AVX2 inline __m256i load256(const void* address) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(address));
}

EVERSTEP_AVX2 inline void stream256(uint8_t* address, __m256i value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(address), value);
}

EVERSTEP_AVX2 inline __m256i round256(__m256i state, __m256i word, const uint8_t* secret) {
    const __m256i key = _mm256_xor_si256(word, load256(secret));
    const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    const __m256i swapped = _mm256_shuffle_epi32(word, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(_mm256_add_epi64(state, swapped), product);
}

EVERSTEP_AVX2 inline __m256i scramble256(__m256i state, const uint8_t* secret) {
    const __m256i prime = _mm256_set1_epi64x(static_cast<int64_t>(kPrime32_1));
    state = _mm256_xor_si256(state, _mm256_srli_epi64(state, 47));
    state = _mm256_xor_si256(state, load256(secret));
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(state, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(state, prime), _mm256_slli_epi64(high, 32));
}

template <bool storing>
EVERSTEP_AVX2 void avx2_absorb(Accumulators& state, const uint8_t* input, uint8_t* output,
                               uint64_t first, uint64_t count) {
    __m256i left_half = load256(state.lane), right_half = load256(state.lane + 4);
    for (const uint64_t end = first + count; first < end;) {
        const uint8_t* secret = stripe_secret(first);
        for (uint64_t left = run_length(first, end - first); left > 0; --left, ++first) {
            const __m256i left_word = load256(input), right_word = load256(input + 32);
            prefetch(input);
            if (storing) {
                stream256(output, left_word);
                stream256(output + 32, right_word);
                output += kStripeBytes;
            }
            left_half = round256(left_half, left_word, secret);
            right_half = round256(right_half, right_word, secret + 32);
            input += kStripeBytes;
            secret += 8;
        }
        if (first % kStripesPerBlock == 0) {
            left_half = scramble256(left_half, kSecret + kScrambleSecret);
            right_half = scramble256(right_half, kSecret + kScrambleSecret + 32);
        }
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(state.lane), left_half);
    _mm256_store_si256(reinterpret_cast<__m256i*>(state.lane + 4), right_half);
}

EVERSTEP_AVX2 void avx2_copy(uint8_t* output, const uint8_t* input, uint64_t bytes) {
    const uint64_t head = head_bytes(output, bytes);
    memcpy(output, input, head);
    uint64_t done = head;
    for (; done + kStripeBytes <= bytes; done += kStripeBytes) {
        const __m256i left = load256(input + done), right = load256(input + done + 32);
        prefetch(input + done);
        stream256(output + done, left);
        stream256(output + done + 32, right);
    }
    memcpy(output + done, input + done, bytes - done);
}

EVERSTEP_AVX512 inline __m512i round512(__m512i state, __m512i word, const uint8_t* secret) {
    const __m512i key = _mm512_xor_si512(word, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    const __m512i swapped = _mm512_shuffle_epi32(word, static_cast<_MM_PERM_ENUM>(0x4E));
    return _mm512_add_epi64(_mm512_add_epi64(state, swapped), product);
}

EVERSTEP_AVX512 inline __m512i scramble512(__m512i state) {
    const __m512i prime = _mm512_set1_epi64(static_cast<int64_t>(kPrime32_1));
    state = _mm512_xor_si512(state, _mm512_srli_epi64(state, 47));
    state = _mm512_xor_si512(state, _mm512_loadu_si512(kSecret + kScrambleSecret));
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(state, 32), prime);
    return _mm512_add_epi64(_mm512_mul_epu32(state, prime), _mm512_slli_epi64(high, 32));
}

template <bool storing>
EVERSTEP_AVX512 void avx512_absorb(Accumulators& state, const uint8_t* input, uint8_t* output,
                                   uint64_t first, uint64_t count) {
    __m512i lanes = _mm512_load_si512(state.lane);
    for (const uint64_t end = first + count; first < end;) {
        const uint8_t* secret = stripe_secret(first);
        for (uint64_t left = run_length(first, end - first); left > 0; --left, ++first) {
            const __m512i word = _mm512_loadu_si512(input);
            prefetch(input);
            if (storing) {
                _mm512_stream_si512(reinterpret_cast<__m512i*>(output), word);
                output += kStripeBytes;
            }
            lanes = round512(lanes, word, secret);
            input += kStripeBytes;
            secret += 8;
        }
        if (first % kStripesPerBlock == 0) lanes = scramble512(lanes);
    }
    _mm512_store_si512(state.lane, lanes);
}

EVERSTEP_AVX512 void avx512_copy(uint8_t* output, const uint8_t* input, uint64_t bytes) {
    const uint64_t head = head_bytes(output, bytes);
    memcpy(output, input, head);
    uint64_t done = head;
    for (; done + kStripeBytes <= bytes; done += kStripeBytes) {
        const __m512i word = _mm512_loadu_si512(input + done);
        prefetch(input + done);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(output + done), word);
    }
    memcpy(output + done, input + done, bytes - done);
}

const Engine kAvx2 = {
    [](Accumulators& state, const uint8_t* input, uint64_t first, uint64_t count) {
        avx2_absorb<false>(state, input, nullptr, first, count);
    },
    avx2_absorb<true>, scalar_last, avx2_copy, store_fence};

const Engine kAvx512 = {
    [](Accumulators& state, const uint8_t* input, uint64_t first, uint64_t count) {
        avx512_absorb<false>(state, input, nullptr, first, count);
    },
    avx512_absorb<true>, scalar_last, avx512_copy, store_fence};

#endif

}  // namespace

int best_isa() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return 3;
    if (__builtin_cpu_supports("avx2")) return 2;
#endif
    return 1;
}

const Engine& engine(int isa) {
    const int best = best_isa();
    if (isa <= 0 || isa > best) isa = best;
#if defined(__x86_64__)
    if (isa == 3) return kAvx512;
    if (isa == 2) return kAvx2;
#endif
    return kScalar;
}

}  // namespace everstep
