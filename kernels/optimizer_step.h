// The fused step of one tensor's chunks: decode, method, encode. Included by each of
// optimizer_{scalar,avx2,avx512}.cpp, once for each vector `V` that it has, in a namespace of its own.
//
// Every codec goes with every method through buffers of one chunk, which stay in the first cache.
// The common combinations also have a loop that goes from codes to values and back block by block
// (`fused`), from the same codecs and methods; what is left of a row's end takes the buffers.

using Float = V::Float;
using Int = V::Int;

#include "optimizer_tables.h"

#include "optimizer_codecs.h"

#include "optimizer_floats.h"

#include "optimizer_methods.h"

#include "optimizer_buffers.h"

#include "optimizer_states.h"

// What is the same for all chunks of a tensor.
struct Scalars {
    Float c[EVERSTEP_OPTIMIZER_SCALARS];
    Float grad_scale;
    const float* plain;
};

template <class M>
inline void update(Element& e, const Scalars& scalars) {
    if (M::with_gradient) {
        e.g = e.g * scalars.grad_scale;
        if (M::decays_gradient) e.g = e.g + e.p * scalars.c[M::kL2];
    }
    M::step(e, scalars.c, scalars.plain);
}

// The method's loop over a chunk in buffers.
template <class M>
__attribute__((flatten)) void update_buffers(uint64_t count, const Scalars& shared, float* p,
                                             const float* g, float* direction,
                                             float* const* s) {
    const Scalars scalars = shared;  // which no store can change, so they stay in registers
    for (uint64_t at = 0; at < count; at += V::kLanes) {
        Element e;
        if (M::reads_parameter) e.p = V::load(p + at);
        if (M::with_gradient) e.g = V::load(g + at);
        if (M::reads_direction) e.direction = V::load(direction + at);
        for (int k = 0; k < M::kStates; ++k) e.s[k] = V::load(s[k] + at);
        update<M>(e, scalars);
        if (M::writes_parameter) V::store(p + at, e.p);
        if (M::writes_direction) V::store(direction + at, e.direction);
        for (int k = 0; k < M::kStates && k < M::kWritten; ++k) V::store(s[k] + at, e.s[k]);
    }
}

template <class M>
void through_buffers(const Place& place, const Scalars& scalars) {
    const everstep_optimizer_tensor& tensor = *place.tensor;
    alignas(64) float p_buffer[kChunk], g_buffer[kChunk], d_buffer[kChunk];
    alignas(64) float s_buffers[EVERSTEP_OPTIMIZER_STATES][kChunk];
    float* s[EVERSTEP_OPTIMIZER_STATES];
    float* p = M::reads_parameter ? read_parameter(place, p_buffer) : nullptr;
    const float* g = M::with_gradient ? read_gradient(place, g_buffer) : nullptr;
    float* direction = M::reads_direction    ? read_fp32(place, tensor.direction, d_buffer)
                       : M::writes_direction ? d_buffer
                                             : nullptr;
    for (int k = 0; k < M::kStates; ++k) s[k] = read_state(place, tensor.states[k], s_buffers[k]);
    update_buffers<M>(place.padded(), scalars, p, g, direction, s);
    if (M::writes_parameter) write_parameter(place, p);
    if (M::writes_direction) write_fp32(place, direction, tensor.direction);
    for (int k = 0; k < M::kStates && k < M::kWritten; ++k) {
        write_state(place, tensor.states[k], s[k]);
    }
}

// One state of a chunk in `fused`.
template <class C>
struct Held {
    uint8_t* stored;
    float* scales;

    Held(const Place& place, const everstep_optimizer_state& state)
        : stored(codes_of<C>(place, state)), scales(scales_of<C>(place, state)) {}

    // A block while it is computed.
    struct Open {
        static constexpr uint64_t kStored = C::kNibbles ? C::kBlock / 2 : C::kBlock;
        Float values[C::kBlock / V::kLanes];
        alignas(64) uint8_t bytes[C::kBlock];
        uint8_t* const stored;
        uint8_t* const codes;
        float* const scales;
        const typename C::Decoding decoding;
        Int most, least;

        Open(const Held& held, uint64_t number)
            : stored(held.stored + number * kStored),
              codes(C::kNibbles ? bytes : stored),
              scales(held.scales + number * C::kScales),
              decoding(scales),
              most(V::integers(0)),
              least(V::integers(-1)) {
            if (C::kNibbles) unpack(stored, kStored, bytes);
        }

        Float decode(uint64_t at) const {
            return decoding(V::load_bytes(reinterpret_cast<const typename C::Code*>(codes) + at));
        }
        void keep(uint64_t at, const Float& x) {
            values[at / V::kLanes] = measured<C>(x, most, least);
        }
        void encode() {
            const auto measure = [this](uint64_t at) { return values[at / V::kLanes]; };
            encode_block<C>(measure, C::kBlock, most, least, codes, scales);
            if (C::kNibbles) pack(bytes, kStored, stored);
        }
    };
};

struct NoState {
    NoState(const Place&, const everstep_optimizer_state&) {}
    struct Open {
        Open(const NoState&, uint64_t) {}
        Float decode(uint64_t) const { return V::broadcast(0.0f); }
        void keep(uint64_t, const Float&) {}
        void encode() {}
    };
};

// Whole blocks only. Values stay in registers from codes to codes.
template <class M, class First, class Second, uint64_t block>
__attribute__((flatten)) void fused(const Place& place, const Scalars& shared) {
    const Scalars scalars = shared;  // which no store can change, so they stay in registers
    const everstep_optimizer_tensor& tensor = *place.tensor;
    alignas(64) float p_buffer[kChunk], g_buffer[kChunk];
    float* p = read_parameter(place, p_buffer);
    const float* g = read_gradient(place, g_buffer);
    const First first(place, tensor.states[0]);
    const Second second(place, tensor.states[1]);
    for (uint64_t begin = 0; begin < place.count; begin += block) {
        typename First::Open one(first, begin / block);
        typename Second::Open two(second, begin / block);
        for (uint64_t at = 0; at < block; at += V::kLanes) {
            Element e;
            e.p = V::load(p + begin + at);
            e.g = V::load(g + begin + at);
            e.s[0] = one.decode(at);
            e.s[1] = two.decode(at);
            update<M>(e, scalars);
            V::store(p + begin + at, e.p);
            one.keep(at, e.s[0]);
            two.keep(at, e.s[1]);
        }
        one.encode();
        two.encode();
    }
    write_parameter(place, p);
}

// A loop for these codecs, and the elements of its blocks.
struct Fused {
    void (*run)(const Place&, const Scalars&);
    uint64_t block;
};

inline bool usual(const everstep_optimizer_state& state, Codec codec, uint64_t block) {
    return state.codec == codec && state.block == block;
}

template <class M>
Fused fused_for(const everstep_optimizer_tensor&) {
    return {nullptr, kChunk};
}

template <>
Fused fused_for<Adam>(const everstep_optimizer_tensor& tensor) {
    const everstep_optimizer_state &m = tensor.states[0], &v = tensor.states[1];
    if (usual(m, kInt8Signed, 64) && usual(v, kInt8Second, 64)) {
        return {fused<Adam, Held<Int8Signed>, Held<Int8Second>, 64>, 64};
    }
    if (usual(m, kFourbitSigned, 128) && usual(v, kFourbitSecond, 128)) {
        return {fused<Adam, Held<FourbitSigned>, Held<FourbitSecond>, 128>, 128};
    }
    if (usual(m, kFp8Signed, 128) && usual(v, kFp8Second, 128)) {
        return {fused<Adam, Held<Fp8<false>>, Held<Fp8<true>>, 128>, 128};
    }
    return {nullptr, kChunk};
}

template <>
Fused fused_for<Lion>(const everstep_optimizer_tensor& tensor) {
    if (!usual(tensor.states[0], kInt8Signed, 64)) return {nullptr, kChunk};
    return {fused<Lion, Held<Int8Signed>, NoState, 64>, 64};
}

template <class M>
void step_span(const Span& span) {
    const everstep_optimizer_tensor& tensor = *span.tensor;
    Scalars scalars;
    for (int i = 0; i < M::kScalars; ++i) scalars.c[i] = V::broadcast(tensor.scalars[i]);
    scalars.grad_scale = V::broadcast(span.grad_scale);
    scalars.plain = tensor.scalars;
    const Fused loop = fused_for<M>(tensor);
    const uint64_t chunks_of_row = (tensor.row + kChunk - 1) / kChunk;
    for (uint64_t chunk = span.first; chunk < span.first + span.count; ++chunk) {
        const uint64_t offset = chunk % chunks_of_row * kChunk;
        const uint64_t left = tensor.row - offset;
        const uint64_t count = left < kChunk ? left : kChunk;
        const uint64_t whole = loop.run ? count - count % loop.block : 0;
        Place place = {&tensor, chunk / chunks_of_row, offset, whole};
        if (whole) loop.run(place, scalars);
        place.offset += whole;
        place.count = count - whole;
        if (place.count) through_buffers<M>(place, scalars);
    }
}

const SpanStep kSteps[kMethodCount] = {
    step_span<Adam>,   step_span<Lion>,    step_span<Sgd>,  step_span<Ademamix>,
    step_span<Exadam>, step_span<Sophia>,  step_span<Hessian>, step_span<Spam>,
    step_span<AdamDirection>, step_span<MomentumDirection>, step_span<Apply>,
};

// Whether no vector is larger than a block.
inline bool blocks_fit(const everstep_optimizer_tensor& tensor) {
    for (const everstep_optimizer_state& state : tensor.states) {
        if (state.block && state.block < V::kLanes) return false;
    }
    return true;
}
