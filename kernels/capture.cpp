// Copies between scattered pieces and a shard's image, fused with the digests of its units.
#include "abi.h"
#include "xxh3.h"

namespace everstep {

namespace {

// Below this a copy's ordinary stores cost less than going past the caches.
constexpr uint64_t kStreamingBytes = 8192;

uint64_t smaller(uint64_t left, uint64_t right) { return left < right ? left : right; }
uint64_t larger(uint64_t left, uint64_t right) { return left > right ? left : right; }

uint64_t end_of(const everstep_piece& piece) { return piece.offset + piece.bytes; }

// The first piece that ends after `offset`, or the end of the array.
const everstep_piece* find_piece(const everstep_piece* pieces, uint64_t count, uint64_t offset) {
    while (count > 0) {
        const uint64_t half = count / 2;
        if (end_of(pieces[half]) <= offset) {
            pieces += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return pieces;
}

// Moves forward through the pieces as the image is walked from its beginning to its end.
struct Cursor {
    const everstep_piece* piece;
    const everstep_piece* end;

    void advance(uint64_t offset) {
        while (piece != end && end_of(*piece) <= offset) ++piece;
    }
};

// Calls `copy(piece address, image offset, bytes)` for each part of [begin, end) that a piece
// with an address covers.
template <typename Copy>
void for_overlaps(Cursor& cursor, uint64_t begin, uint64_t end, Copy copy) {
    for (cursor.advance(begin); cursor.piece != cursor.end; ++cursor.piece) {
        const everstep_piece& piece = *cursor.piece;
        const uint64_t from = larger(begin, piece.offset), to = smaller(end, end_of(piece));
        if (piece.address && from < to) copy(piece.address + (from - piece.offset), from, to - from);
        if (end_of(piece) >= end) return;
    }
}

class Capture {
public:
    Capture(Cursor cursor, uint8_t* image, const Engine& loops)
        : cursor_(cursor), image_(image), loops_(loops) {}

    void copy(uint64_t begin, uint64_t end) {
        for_overlaps(cursor_, begin, end, [this](uint8_t* address, uint64_t offset, uint64_t bytes) {
            if (bytes < kStreamingBytes)
                memcpy(image_ + offset, address, bytes);
            else
                loops_.copy(image_ + offset, address, bytes);
        });
    }

    Digest copy_and_digest(uint64_t begin, uint64_t end) {
        const bool aligned = reinterpret_cast<uintptr_t>(image_ + begin) % kStripeBytes == 0;
        if (end - begin <= kShortBytes || !aligned) {
            copy_cached(begin, end);
            return digest(image_ + begin, end - begin, loops_);
        }
        Accumulators state;
        const uint64_t stripes = leading_stripes(end - begin);
        for (uint64_t done = 0; done < stripes;)
            done += absorb_run(state, begin + done * kStripeBytes, done, stripes - done);
        copy_cached(begin + stripes * kStripeBytes, end);
        loops_.absorb_last(state, image_ + end - kStripeBytes);
        return finish(state, end - begin);
    }

private:
    void copy_cached(uint64_t begin, uint64_t end) {
        for_overlaps(cursor_, begin, end, [this](uint8_t* address, uint64_t offset, uint64_t bytes) {
            memcpy(image_ + offset, address, bytes);
        });
    }

    // Absorbs the stripes from `offset` on that come from one place, or one that comes from
    // several. Returns how many.
    uint64_t absorb_run(Accumulators& state, uint64_t offset, uint64_t first, uint64_t most) {
        cursor_.advance(offset);
        const bool any = cursor_.piece != cursor_.end;
        const bool covered = any && cursor_.piece->offset <= offset;
        const uint64_t run_end = covered ? end_of(*cursor_.piece)
                                 : any   ? cursor_.piece->offset
                                         : offset + most * kStripeBytes;
        const uint64_t run = smaller((run_end - offset) / kStripeBytes, most);
        uint8_t* output = image_ + offset;
        if (run == 0) {
            copy_cached(offset, offset + kStripeBytes);
            loops_.absorb(state, output, first, 1);
            return 1;
        }
        if (covered && cursor_.piece->address) {
            const uint8_t* input = cursor_.piece->address + (offset - cursor_.piece->offset);
            loops_.absorb_and_store(state, input, output, first, run);
        } else {
            loops_.absorb(state, output, first, run);
        }
        return run;
    }

    Cursor cursor_;
    uint8_t* const image_;
    const Engine& loops_;
};

uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
    return value ^ (value >> 31);
}

uint64_t fingerprint(const uint8_t* source, uint64_t bytes, uint32_t samples, uint64_t stream) {
    if (bytes <= larger(16, uint64_t{8} * samples)) return digest(source, bytes, engine(0)).low;
    uint64_t state = mix(load64(source) ^ bytes);
    for (uint32_t window = 0; window < samples; ++window) {
        stream += 0x9E3779B97F4A7C15;
        const auto product = static_cast<unsigned __int128>(mix(stream)) * (bytes - 7);
        state = mix(state + load64(source + static_cast<uint64_t>(product >> 64)));
    }
    return mix(state + load64(source + bytes - 8));
}

}  // namespace

}  // namespace everstep

using namespace everstep;

extern "C" {

void everstep_capture_units(const everstep_piece* pieces, uint64_t piece_count, uint8_t* image,
                            uint64_t image_bytes, uint64_t unit_bytes, uint64_t first_unit,
                            uint64_t unit_count, uint8_t* digests, int isa) {
    const Engine& loops = engine(isa);
    uint64_t begin = first_unit * unit_bytes;
    const uint64_t end = smaller(image_bytes, begin + unit_count * unit_bytes);
    const everstep_piece* first = find_piece(pieces, piece_count, begin);
    Capture capture({first, pieces + piece_count}, image, loops);
    if (digests) {
        uint8_t* output = digests + first_unit * EVERSTEP_DIGEST_BYTES;
        for (; begin < end; begin += unit_bytes, output += EVERSTEP_DIGEST_BYTES)
            write_canonical(capture.copy_and_digest(begin, smaller(end, begin + unit_bytes)),
                            output);
    } else if (begin < end) {
        capture.copy(begin, end);
    }
    loops.fence();
}

uint64_t everstep_restore_units(const everstep_piece* pieces, uint64_t piece_count,
                                const uint8_t* image, uint64_t image_bytes, uint64_t unit_bytes,
                                uint64_t first_unit, uint64_t unit_count, const uint8_t* expected,
                                uint8_t* bad, int isa) {
    const Engine& loops = engine(isa);
    uint64_t begin = first_unit * unit_bytes, bad_count = 0;
    const uint64_t end = smaller(image_bytes, begin + unit_count * unit_bytes);
    Cursor cursor = {find_piece(pieces, piece_count, begin), pieces + piece_count};
    expected += first_unit * EVERSTEP_DIGEST_BYTES;
    for (; begin < end; begin += unit_bytes, expected += EVERSTEP_DIGEST_BYTES, ++bad) {
        const uint64_t unit_end = smaller(end, begin + unit_bytes);
        uint8_t actual[EVERSTEP_DIGEST_BYTES];
        write_canonical(digest(image + begin, unit_end - begin, loops), actual);
        *bad = memcmp(actual, expected, sizeof actual) != 0;
        bad_count += *bad;
        if (*bad) continue;
        for_overlaps(cursor, begin, unit_end, [&](uint8_t* address, uint64_t offset, uint64_t bytes) {
            if (bytes < kStreamingBytes)
                memcpy(address, image + offset, bytes);
            else
                loops.copy(address, image + offset, bytes);
        });
    }
    loops.fence();
    return bad_count;
}

void everstep_sample(const uint8_t* const* sources, const uint64_t* bytes, uint64_t count,
                     uint32_t samples, uint64_t seed, uint64_t* fingerprints) {
    for (uint64_t index = 0; index < count; ++index)
        fingerprints[index] =
            fingerprint(sources[index], bytes[index], samples, mix(seed + 1) ^ mix(~bytes[index]));
}

}  // extern "C"
