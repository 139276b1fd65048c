// Many copies by a function of the caller's, in one call from Python and without its lock.
#include "abi.h"

extern "C" {

int everstep_copy_each(everstep_copy_function copy, const everstep_copy* copies, uint64_t count,
                       int kind, void* stream, uint64_t* done) {
    for (*done = 0; *done < count; ++*done) {
        const everstep_copy& row = copies[*done];
        if (!row.bytes) continue;
        const int error = copy(row.target, row.source, row.bytes, kind, stream);
        if (error) return error;
    }
    return 0;
}

}  // extern "C"
