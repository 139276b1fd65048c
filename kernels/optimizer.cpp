// The optimizer step's entry: which tensors and chunks a range is, and which engine takes them.
#include "optimizer.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace everstep {

namespace {

const SpanStep* steps(const everstep_optimizer_tensor& tensor, int isa) {
    const SpanStep* widest = isa <= 0 || isa >= 3 ? avx512_steps(tensor) : nullptr;
    if (widest) return widest;
    const SpanStep* wide = isa != 1 ? avx2_steps(tensor) : nullptr;
    return wide ? wide : scalar_steps();
}

// Rounding to nearest and denormals kept, while it lives, whatever the caller has set.
class Exact {
   public:
#if defined(__x86_64__)
    Exact() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~Exact() { _mm_setcsr(before_); }

   private:
    unsigned before_;
#elif defined(__aarch64__)
    Exact() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
        __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~Exact() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

   private:
    uint64_t before_;
#else
    Exact() {}
    ~Exact() {}
#endif
};

// The tensor that has this chunk of the table.
uint64_t tensor_of(const everstep_optimizer_tensor* tensors, uint64_t count, uint64_t chunk) {
    uint64_t low = 0;
    while (count > 1) {
        const uint64_t half = count / 2;
        const bool later = tensors[low + half].first_chunk <= chunk;
        if (later) low += half;
        count = later ? count - half : half;
    }
    return low;
}

}  // namespace

}  // namespace everstep

extern "C" {

void everstep_optimizer_step(const everstep_optimizer_tensor* tensors, uint64_t tensor_count,
                             int method, const float* grad_scale, const float* found_inf,
                             uint64_t first_chunk, uint64_t chunk_count, int isa) {
    using namespace everstep;
    if (found_inf && *found_inf != 0) return;
    if (!tensor_count || method < 0 || method >= kMethodCount) return;
    const float scale = grad_scale ? *grad_scale : 1.0f;
    const Exact exact;
    const uint64_t end = first_chunk + chunk_count;
    uint64_t at = tensor_of(tensors, tensor_count, first_chunk);
    for (; at < tensor_count && tensors[at].first_chunk < end; ++at) {
        const everstep_optimizer_tensor& tensor = tensors[at];
        const uint64_t chunks = tensor.rows * ((tensor.row + kChunk - 1) / kChunk);
        const uint64_t last = tensor.first_chunk + chunks;
        const uint64_t from = first_chunk > tensor.first_chunk ? first_chunk : tensor.first_chunk;
        const uint64_t to = last < end ? last : end;
        if (from >= to) continue;
        steps(tensor, isa)[method]({&tensor, from - tensor.first_chunk, to - from, scale});
    }
}

}  // extern "C"
