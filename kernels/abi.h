// The C ABI of libeverstep_kernels: plain pointers and sizes, loaded by kernels/native.py.
//
// Promises: no function here starts a thread, allocates, throws, or keeps a pointer after it
// returns; every range is given by the caller, so threads may share the work by units. Results
// are the same bytes on every instruction set.
// Does not promise: any check of pointers or sizes. The Python wrappers do that.
//
// A unit is `unit_bytes` of an image, the last one possibly shorter. A digest is the XXH3-128 of
// a unit (default secret, seed 0), 16 bytes in canonical big-endian order.
//
// `isa`: 0 is the best this machine has, 1 scalar, 2 AVX2, 3 AVX-512; one that the machine lacks
// means the best it has. Products over GF(2^8) use AVX-512 only where GFNI is, too.
#ifndef EVERSTEP_ABI_H
#define EVERSTEP_ABI_H

#include <stddef.h>
#include <stdint.h>

#define EVERSTEP_ABI 4
#define EVERSTEP_DIGEST_BYTES 16
#define EVERSTEP_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// One source (capture) or destination (restore) of a byte range of the image. Arrays of pieces
// are sorted by offset and do not overlap. A null address, like a gap between two pieces, means
// that the image's own bytes are neither written (capture) nor copied out (restore).
typedef struct {
    uint8_t* address;
    uint64_t offset;
    uint64_t bytes;
} everstep_piece;

EVERSTEP_EXPORT uint32_t everstep_abi(void);
EVERSTEP_EXPORT int everstep_best_isa(void);

// Writes one digest a unit.
EVERSTEP_EXPORT void everstep_digest_units(const uint8_t* data, uint64_t bytes,
                                           uint64_t unit_bytes, uint8_t* digests, int isa);

// Returns the number of units whose digest differs; sets one byte a unit, 1 where it differs.
EVERSTEP_EXPORT uint64_t everstep_verify_units(const uint8_t* data, uint64_t bytes,
                                               uint64_t unit_bytes, const uint8_t* expected,
                                               uint8_t* bad, int isa);

// Copies the pieces' bytes in units [first_unit, first_unit + unit_count) into the image and
// writes these units' digests; `digests` is indexed from unit 0 and may be null (copy only).
// Everything stored is visible to other threads once this returns.
EVERSTEP_EXPORT void everstep_capture_units(const everstep_piece* pieces, uint64_t piece_count,
                                            uint8_t* image, uint64_t image_bytes,
                                            uint64_t unit_bytes, uint64_t first_unit,
                                            uint64_t unit_count, uint8_t* digests, int isa);

// Checks each unit of the range against its digest (`expected` is indexed from unit 0) and
// copies it out to the pieces only if it matches. Returns the number of units that do not;
// `bad` has one byte for each unit of the range, the first for `first_unit`.
EVERSTEP_EXPORT uint64_t everstep_restore_units(const everstep_piece* pieces,
                                                uint64_t piece_count, const uint8_t* image,
                                                uint64_t image_bytes, uint64_t unit_bytes,
                                                uint64_t first_unit, uint64_t unit_count,
                                                const uint8_t* expected, uint8_t* bad, int isa);

// Writes a 64-bit fingerprint of each source: of its first and last 8 bytes and of `samples`
// windows of 8 bytes, at positions that depend on the seed and the source's bytes. A source of
// at most max(16, 8 * samples) bytes is hashed whole.
EVERSTEP_EXPORT void everstep_sample(const uint8_t* const* sources, const uint64_t* bytes,
                                     uint64_t count, uint32_t samples, uint64_t seed,
                                     uint64_t* fingerprints);

// GF(2^8), polynomial 0x11D: target[i] ^= coefficient * source[i]. The two do not overlap.
EVERSTEP_EXPORT void everstep_gf256_accumulate(uint8_t coefficient, const uint8_t* source,
                                               uint8_t* target, uint64_t bytes, int isa);

// targets[r][i] = the sum over j of coefficients[r * source_count + j] * sources[j][i], for all i
// below `bytes`. At most 255 sources, each of at most `bytes` bytes: beyond its end a source is
// zeros. No target overlaps a source or another target. Everything stored is visible to other
// threads once this returns.
EVERSTEP_EXPORT void everstep_gf256_dots(const uint8_t* coefficients, uint64_t row_count,
                                         uint64_t source_count, const uint8_t* const* sources,
                                         const uint64_t* source_bytes, uint8_t* const* targets,
                                         uint64_t bytes, int isa);

// One copy of many.
typedef struct {
    void* target;
    const void* source;
    uint64_t bytes;
} everstep_copy;

// cudaMemcpyAsync, as its library exports it. 0 is success.
typedef int (*everstep_copy_function)(void* target, const void* source, size_t bytes, int kind,
                                      void* stream);

// Calls `copy` for each row that has bytes, in order, up to the first that fails. Returns that
// one's error, or 0; `done` is how many rows succeeded, which is the index of the one that failed.
EVERSTEP_EXPORT int everstep_copy_each(everstep_copy_function copy, const everstep_copy* copies,
                                       uint64_t count, int kind, void* stream, uint64_t* done);

// One optimizer step. Numbers of codecs and methods, and the order of a method's states and
// scalars, are those of kernels/optimizer_work.py. Types are 0 fp32, 1 bf16, 2 fp16.
#define EVERSTEP_OPTIMIZER_CHUNK 512
#define EVERSTEP_OPTIMIZER_STATES 3
#define EVERSTEP_OPTIMIZER_SCALARS 16

typedef struct {
    uint8_t* codes;
    float* scales;        // null if the codec has none
    int8_t* correction;   // of bf16_int8 only
    uint32_t codec;
    uint32_t block;
} everstep_optimizer_state;

// A tensor's chunks are its rows' ones, in order: each row is cut into chunks, the last shorter.
typedef struct {
    void* parameter;
    const void* gradient;
    int8_t* correction;   // what a bf16 parameter lacks of its master value, or null
    float* direction;     // of the methods that write or read one
    uint64_t rows;
    uint64_t row;
    uint64_t first_chunk; // of the table; ascending
    uint64_t seed;        // of stochastic rounding to bf16; 0 rounds to nearest
    uint32_t parameter_type;
    uint32_t gradient_type;
    everstep_optimizer_state states[EVERSTEP_OPTIMIZER_STATES];
    float scalars[EVERSTEP_OPTIMIZER_SCALARS];
} everstep_optimizer_tensor;

// Steps the chunks [first_chunk, first_chunk + chunk_count) of a table. Gradients are multiplied
// by *grad_scale (by 1 if it is null); nothing is done if *found_inf is not 0 (it may be null).
EVERSTEP_EXPORT void everstep_optimizer_step(const everstep_optimizer_tensor* tensors,
                                             uint64_t tensor_count, int method,
                                             const float* grad_scale, const float* found_inf,
                                             uint64_t first_chunk, uint64_t chunk_count, int isa);

#ifdef __cplusplus
}
#endif

#endif
