/* Makes chosen system calls of a process fail, for tests: built with `gcc -shared -fPIC`, loaded by
   LD_PRELOAD. A file named by SHIM_SWITCH says what fails, read at each call, so that a running
   process can be broken and mended; while it is missing nothing does:

       CALL ERRNO NTH MARKER

   CALL is pwrite, write, fsync, fdatasync, fallocate or rename; calls on paths that contain MARKER
   are counted from the moment the switch's content changes, and the NTH fails; 0 means all. ERRNO
   0 tears instead: half of the data is written, and the process is killed. ERRNO -2 is a short
   write: half of the data, without any error. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char last[512];
static long calls;

/* The errno to fail with, 0 to tear, -2 to write half, -1 to go on. */
static int verdict(const char *call, const char *path) {
    const char *name = getenv("SHIM_SWITCH");
    char text[512], wanted[32], marker[256];
    int number;
    long nth;
    if (!name) return -1;
    int file = (int)syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC, 0);
    if (file < 0) return -1;
    ssize_t size = syscall(SYS_read, file, text, sizeof text - 1);
    syscall(SYS_close, file);
    if (size <= 0) return -1;
    text[size] = 0;
    if (sscanf(text, "%31s %d %ld %255s", wanted, &number, &nth, marker) != 4) return -1;
    if (strcmp(wanted, call) || !strstr(path, marker)) return -1;
    pthread_mutex_lock(&lock);
    if (strcmp(text, last)) {
        strcpy(last, text);
        calls = 0;
    }
    int due = ++calls == nth || nth == 0;
    pthread_mutex_unlock(&lock);
    return due ? number : -1;
}

static int verdict_on(const char *call, int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return -1;
    path[size] = 0;
    return verdict(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(number) do { errno = (number); return -1; } while (0)

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    int number = verdict_on("pwrite", file);
    if (number > 0) FAIL(number);
    if (number == -2 && size > 8192) size = size / 2 / 4096 * 4096;
    if (number == 0) {
        REAL(pwrite)(file, data, size / 2 / 4096 * 4096, offset);
        kill(getpid(), SIGKILL);
    }
    return REAL(pwrite)(file, data, size, offset);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    return pwrite(file, data, size, offset);
}

ssize_t write(int file, const void *data, size_t size) {
    int number = verdict_on("write", file);
    if (number > 0) FAIL(number);
    if (number == -2 && size > 1) size /= 2;
    if (number == 0) {
        syscall(SYS_write, file, data, size / 2);
        kill(getpid(), SIGKILL);
    }
    return syscall(SYS_write, file, data, size);
}

int fsync(int file) {
    int number = verdict_on("fsync", file);
    if (number > 0) FAIL(number);
    return REAL(fsync)(file);
}

int fdatasync(int file) {
    int number = verdict_on("fdatasync", file);
    if (number > 0) FAIL(number);
    return REAL(fdatasync)(file);
}

int posix_fallocate(int file, off_t offset, off_t size) {
    int number = verdict_on("fallocate", file);
    return number > 0 ? number : REAL(posix_fallocate)(file, offset, size);
}

int posix_fallocate64(int file, off64_t offset, off64_t size) {
    return posix_fallocate(file, offset, size);
}

int renameat(int from, const char *old, int to, const char *new) {
    int number = verdict("rename", new);
    if (number > 0) FAIL(number);
    return REAL(renameat)(from, old, to, new);
}
