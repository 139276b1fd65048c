// Between a chunk's place in memory and buffers of fp32. Included by optimizer_step.h.
//
// Buffers are filled up with zeros to whole vectors of every instruction set. A tensor's memory is
// read and written in place only where that does not reach beyond the chunk: its neighbours may be
// another thread's, or not there.

constexpr uint64_t kWidest = V::kLanes;

// Some elements of a row; `offset` is at the beginning of a block of every state.
struct Place {
    const everstep_optimizer_tensor* tensor;
    uint64_t row, offset, count;

    uint64_t first() const { return row * tensor->row + offset; }
    uint64_t padded() const { return (count + kWidest - 1) & ~(kWidest - 1); }
    bool whole() const { return count % kWidest == 0; }
};

template <class T>
inline T* at_first(const Place& place, const void* base) {
    return const_cast<T*>(static_cast<const T*>(base)) + place.first();
}

// Elements to read: where they are, or copied and filled up.
template <class T>
inline T* readable(const Place& place, const void* base, T* buffer) {
    if (place.whole()) return at_first<T>(place, base);
    memcpy(buffer, at_first<T>(place, base), place.count * sizeof(T));
    memset(buffer + place.count, 0, (place.padded() - place.count) * sizeof(T));
    return buffer;
}

// Where to write elements, to be followed by `written`.
template <class T>
inline T* writable(const Place& place, void* base, T* buffer) {
    return place.whole() ? at_first<T>(place, base) : buffer;
}

template <class T>
inline void written(const Place& place, const T* from, void* base) {
    T* target = at_first<T>(place, base);
    if (from != target) memcpy(target, from, place.count * sizeof(T));
}

inline float* read_fp32(const Place& place, const void* base, float* buffer) {
    return readable<float>(place, base, buffer);
}

inline void write_fp32(const Place& place, const float* from, void* base) {
    written<float>(place, from, base);
}

__attribute__((flatten, noinline)) void read_bf16(const Place& place, const void* base, float* buffer) {
    uint16_t halves[kChunk];
    const uint16_t* from = readable<uint16_t>(place, base, halves);
    for (uint64_t at = 0; at < place.padded(); at += V::kLanes) {
        V::store(buffer + at, from_bf16(V::load_halves(from + at)));
    }
}

__attribute__((flatten, noinline)) void write_bf16(const Place& place, const float* from, void* base) {
    uint16_t halves[kChunk];
    uint16_t* to = writable<uint16_t>(place, base, halves);
    for (uint64_t at = 0; at < place.padded(); at += V::kLanes) {
        V::store_halves(to + at, to_bf16(V::load(from + at)));
    }
    written<uint16_t>(place, to, base);
}

__attribute__((flatten, noinline)) void write_bf16_by_chance(const Place& place, const float* from, void* base,
                                 uint64_t seed) {
    uint16_t halves[kChunk];
    uint16_t chances[kChunk];
    uint16_t* to = writable<uint16_t>(place, base, halves);
    const uint32_t first = static_cast<uint32_t>(place.first());
    for (uint32_t i = 0; i < place.padded(); ++i) {
        chances[i] = static_cast<uint16_t>(philox(first + i, seed));
    }
    for (uint64_t at = 0; at < place.padded(); at += V::kLanes) {
        const Int random = V::load_halves(chances + at);
        V::store_halves(to + at, to_bf16_by_chance(V::load(from + at), random));
    }
    written<uint16_t>(place, to, base);
}

__attribute__((flatten, noinline)) void read_corrected(const Place& place, const void* base, const void* corrections,
                           float* buffer) {
    uint16_t halves[kChunk];
    int8_t bytes[kChunk];
    const uint16_t* from = readable<uint16_t>(place, base, halves);
    const int8_t* correction = readable<int8_t>(place, corrections, bytes);
    for (uint64_t at = 0; at < place.padded(); at += V::kLanes) {
        const Int upper = V::load_halves(from + at);
        V::store(buffer + at, from_corrected(upper, V::load_bytes(correction + at)));
    }
}

__attribute__((flatten, noinline)) void write_corrected(const Place& place, const float* from, void* base,
                            void* corrections) {
    uint16_t halves[kChunk];
    uint8_t bytes[kChunk];
    uint16_t* to = writable<uint16_t>(place, base, halves);
    uint8_t* correction = writable<uint8_t>(place, corrections, bytes);
    for (uint64_t at = 0; at < place.padded(); at += V::kLanes) {
        const Float x = V::load(from + at);
        const Int upper = to_bf16(x);
        V::store_halves(to + at, upper);
        V::store_bytes(correction + at, correction_of(x, upper));
    }
    written<uint16_t>(place, to, base);
    written<uint8_t>(place, correction, corrections);
}

__attribute__((flatten, noinline)) void read_fp16(const Place& place, const void* base, float* buffer) {
    uint16_t halves[kChunk];
    const uint16_t* from = readable<uint16_t>(place, base, halves);
    for (uint64_t at = 0; at < place.padded(); at += V::kLanes) {
        V::store(buffer + at, V::load_fp16(from + at));
    }
}

__attribute__((flatten, noinline)) void write_fp16(const Place& place, const float* from, void* base) {
    uint16_t halves[kChunk];
    uint16_t* to = writable<uint16_t>(place, base, halves);
    for (uint64_t at = 0; at < place.padded(); at += V::kLanes) {
        V::store_fp16(to + at, V::load(from + at));
    }
    written<uint16_t>(place, to, base);
}

__attribute__((noinline)) const float* read_gradient(const Place& place, float* buffer) {
    const everstep_optimizer_tensor& tensor = *place.tensor;
    if (tensor.gradient_type == kTypeFp32) return read_fp32(place, tensor.gradient, buffer);
    if (tensor.gradient_type == kTypeBf16) {
        read_bf16(place, tensor.gradient, buffer);
    } else {
        read_fp16(place, tensor.gradient, buffer);
    }
    return buffer;
}

__attribute__((noinline)) float* read_parameter(const Place& place, float* buffer) {
    const everstep_optimizer_tensor& tensor = *place.tensor;
    if (tensor.parameter_type == kTypeFp32) return read_fp32(place, tensor.parameter, buffer);
    if (tensor.parameter_type == kTypeFp16) {
        read_fp16(place, tensor.parameter, buffer);
    } else if (tensor.correction) {
        read_corrected(place, tensor.parameter, tensor.correction, buffer);
    } else {
        read_bf16(place, tensor.parameter, buffer);
    }
    return buffer;
}

__attribute__((noinline)) void write_parameter(const Place& place, const float* from) {
    const everstep_optimizer_tensor& tensor = *place.tensor;
    if (tensor.parameter_type == kTypeFp32) return write_fp32(place, from, tensor.parameter);
    if (tensor.parameter_type == kTypeFp16) return write_fp16(place, from, tensor.parameter);
    if (tensor.correction) {
        return write_corrected(place, from, tensor.parameter, tensor.correction);
    }
    if (tensor.seed) return write_bf16_by_chance(place, from, tensor.parameter, tensor.seed);
    write_bf16(place, from, tensor.parameter);
}
