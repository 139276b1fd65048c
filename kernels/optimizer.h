// The fused optimizer step, in two layers: an engine per instruction set steps chunks of one
// tensor (optimizer_step.h, compiled for each), the rest is portable (optimizer.cpp).
//
// Every engine gives the same bits: fp32, round to nearest even, no fused multiply-add, IEEE
// division and square root, denormals kept. So the compiler is told not to contract (see
// CMakeLists.txt), and the rounding mode is set by optimizer.cpp.
#ifndef EVERSTEP_OPTIMIZER_H
#define EVERSTEP_OPTIMIZER_H

#include <stdint.h>
#include <string.h>

#include "abi.h"

namespace everstep {

constexpr uint64_t kChunk = EVERSTEP_OPTIMIZER_CHUNK;

// As in kernels/optimizer_work.py.
enum Codec : uint32_t {
    kFp32,
    kBf16,
    kBf16Int8,
    kInt8Signed,
    kInt8Second,
    kDynamicSigned,
    kDynamicSecond,
    kFourbitSigned,
    kFourbitSecond,
    kFp8Signed,
    kFp8Second,
};

enum Method : int {
    kAdam,
    kLion,
    kSgd,
    kAdemamix,
    kExadam,
    kSophia,
    kHessian,
    kSpam,
    kAdamDirection,
    kMomentumDirection,
    kApply,
    kMethodCount,
};

enum Type : uint32_t { kTypeFp32, kTypeBf16, kTypeFp16 };

// Some chunks of one tensor, counted from its own first.
struct Span {
    const everstep_optimizer_tensor* tensor;
    uint64_t first;
    uint64_t count;
    float grad_scale;
};

using SpanStep = void (*)(const Span&);

// The functions by method for a tensor; null where the machine, or the build, lacks the instructions.
const SpanStep* avx512_steps(const everstep_optimizer_tensor& tensor);
const SpanStep* avx2_steps(const everstep_optimizer_tensor& tensor);
const SpanStep* scalar_steps();

// Whether a tensor's codecs are long chains of operations, of which several vectors at a time pay.
inline bool has_long_chains(const everstep_optimizer_tensor& tensor) {
    for (const everstep_optimizer_state& state : tensor.states) {
        const bool dynamic = state.codec == kDynamicSigned || state.codec == kDynamicSecond;
        if (dynamic || state.codec == kFp8Signed || state.codec == kFp8Second) return true;
    }
    return false;
}

}  // namespace everstep

#endif
