// A CUDA runtime without a device: the functions that Everstep calls, and what a test may ask of
// them (names that begin with `fake_`). Copies happen at once. As in the real one, a copy whose
// host side crosses the border of a registered range is an invalid argument, and the last error
// is remembered for each thread until it is read.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>

namespace {

struct Range {
    uint64_t bytes;
    unsigned flags;
    int device;
};

std::mutex lock;
std::condition_variable changed;
std::map<uint64_t, Range> registered;
thread_local int last_error = 0;
thread_local int device = 0;
thread_local int capture_mode = 0;
int register_calls = 0, register_fails_at = -1, register_error = 0, unregister_error = 0;
int copy_calls = 0, copy_fails_at = -1, device_error = 0, relaxed_calls = 0;
bool gate_closed = false;
int at_gate = 0;

int result(int error) {
    if (error) last_error = error;
    return error;
}

bool crosses(const void* host, size_t bytes) {
    const uint64_t begin = reinterpret_cast<uint64_t>(host), end = begin + bytes;
    for (const auto& [address, range] : registered) {
        const uint64_t border = address + range.bytes;
        if (begin < border && end > address && (begin < address || end > border)) return true;
    }
    return false;
}

}  // namespace

extern "C" {

int cudaHostRegister(void* address, size_t bytes, unsigned flags) {
    std::unique_lock<std::mutex> held(lock);
    const int call = register_calls++;
    if (capture_mode == 2) ++relaxed_calls;
    ++at_gate;
    changed.notify_all();
    changed.wait(held, [] { return !gate_closed; });
    --at_gate;
    if (call == register_fails_at) return result(register_error);
    const uint64_t begin = reinterpret_cast<uint64_t>(address);
    for (const auto& [other, range] : registered)
        if (begin < other + range.bytes && other < begin + bytes) return result(712);
    registered[begin] = {bytes, flags, device};
    return 0;
}

int cudaHostUnregister(void* address) {
    std::lock_guard<std::mutex> held(lock);
    if (unregister_error) return result(unregister_error);
    return registered.erase(reinterpret_cast<uint64_t>(address)) ? 0 : result(713);
}

int cudaMemcpyAsync(void* target, const void* source, size_t bytes, int kind, void*) {
    std::lock_guard<std::mutex> held(lock);
    if (copy_calls++ == copy_fails_at) return result(999);
    if (kind != 4 || crosses(target, bytes) || crosses(source, bytes)) return result(1);
    memcpy(target, source, bytes);
    return 0;
}

int cudaGetDevice(int* current) {
    *current = device;
    return result(device_error);
}

int cudaSetDevice(int wanted) {
    device = wanted;
    return result(wanted > 7 ? 101 : 0);
}

int cudaThreadExchangeStreamCaptureMode(int* mode) {
    const int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}

int cudaGetLastError(void) {
    const int error = last_error;
    last_error = 0;
    return error;
}

const char* cudaGetErrorName(int error) {
    return error == 1 ? "cudaErrorInvalidValue" : "cudaErrorOther";
}

const char* cudaGetErrorString(int error) {
    return error == 1 ? "invalid argument" : "something else";
}

int fake_last_error(void) { return last_error; }

int fake_capture_mode(void) { return capture_mode; }

int fake_relaxed_calls(void) { return relaxed_calls; }

int fake_copies(void) { return copy_calls; }

int fake_registrations(void) { return register_calls; }

uint64_t fake_ranges(uint64_t* rows, uint64_t most) {
    std::lock_guard<std::mutex> held(lock);
    uint64_t count = 0;
    for (const auto& [address, range] : registered) {
        if (count == most) break;
        const uint64_t row[4] = {address, range.bytes, range.flags,
                                 static_cast<uint64_t>(range.device)};
        memcpy(rows + 4 * count++, row, sizeof row);
    }
    return count;
}

void fake_fail_register(int call, int error) {
    register_fails_at = register_calls + call;
    register_error = error;
}

void fake_fail_unregister(int error) { unregister_error = error; }

void fake_fail_copy(int call) { copy_fails_at = call < 0 ? -1 : copy_calls + call; }

void fake_fail_device(int error) { device_error = error; }

void fake_gate(int closed) {
    std::lock_guard<std::mutex> held(lock);
    gate_closed = closed;
    changed.notify_all();
}

// Whether a call to register was blocked at the gate within the time.
int fake_wait_at_gate(int timeout_ms) {
    std::unique_lock<std::mutex> held(lock);
    return changed.wait_for(held, std::chrono::milliseconds(timeout_ms),
                            [] { return gate_closed && at_gate > 0; });
}

}  // extern "C"
