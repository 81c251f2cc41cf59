// Makes calls of the C library fail, below the preload library: LD_PRELOAD="liblitefs.so faults.so". Which of the calls
// on files below $FAULTS_DIR fail, one in $FAULTS_ONE_IN, follows from $FAULTS_SEED. While the file $FAULTS_DIR.off
// exists none do.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static unsigned long long state;
static unsigned long one_in;
static const char *directory;

__attribute__((constructor)) static void begin(void) {
    const char *seed = getenv("FAULTS_SEED"), *rate = getenv("FAULTS_ONE_IN");
    directory = getenv("FAULTS_DIR");
    state = seed ? strtoull(seed, NULL, 10) : 1;
    one_in = rate ? strtoul(rate, NULL, 10) : 0;
}

static unsigned long next(void) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return (unsigned long)(state >> 33);
}

static int is_off(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s.off", directory);
    return access(path, F_OK) == 0;
}

static int below(const char *path) {
    return directory && path && strncmp(path, directory, strlen(directory)) == 0;
}

// Whether a call on this path fails now.
static int fails(const char *path) {
    int before = errno;
    int yes = one_in && below(path) && next() % one_in == 0 && !is_off();
    errno = before;
    return yes;
}

static int fails_on(int fd) {
    char link[64], path[4096];
    if (!one_in || !directory) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length <= 0) return 0;
    path[length] = 0;
    return fails(path);
}

static int error_of_writing(void) {
    static const int errors[] = {EIO, ENOSPC, EINTR};
    return errors[next() % 3];
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// An error, or fewer bytes than were given.
#define WRITE(name, offset_type)                                                     \
    ssize_t name(int fd, const void *data, size_t length, offset_type offset) {      \
        if (fails_on(fd)) {                                                          \
            if (length > 1 && next() % 2) return REAL(name)(fd, data, 1 + next() % (length - 1), offset); \
            errno = error_of_writing();                                              \
            return -1;                                                               \
        }                                                                            \
        return REAL(name)(fd, data, length, offset);                                 \
    }
WRITE(pwrite, off_t)
WRITE(pwrite64, off64_t)

#define SYNC(name)                                                                   \
    int name(int fd) {                                                               \
        if (fails_on(fd)) return errno = next() % 2 ? EIO : ENOSPC, -1;              \
        return REAL(name)(fd);                                                       \
    }
SYNC(fsync)
SYNC(fdatasync)

#define TRUNCATE(name, offset_type)                                                  \
    int name(int fd, offset_type length) {                                           \
        if (fails_on(fd)) return errno = next() % 2 ? EIO : EINTR, -1;               \
        return REAL(name)(fd, length);                                               \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

int unlink(const char *path) {
    if (fails(path)) return errno = EIO, -1;
    return REAL(unlink)(path);
}

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        __builtin_va_list arguments;                                                 \
        __builtin_va_start(arguments, flags);                                        \
        unsigned mode = __builtin_va_arg(arguments, unsigned);                       \
        __builtin_va_end(arguments);                                                 \
        if (fails(path)) return errno = next() % 2 ? EIO : EINTR, -1;                \
        return REAL(name)(path, flags, mode);                                        \
    }
OPEN(open)
OPEN(open64)

// The memory of the wal-index cannot be had.
#define FCNTL(name)                                                                  \
    int name(int fd, int command, ...) {                                             \
        __builtin_va_list arguments;                                                 \
        __builtin_va_start(arguments, command);                                      \
        unsigned long argument = __builtin_va_arg(arguments, unsigned long);         \
        __builtin_va_end(arguments);                                                 \
        if ((command == F_SETLK || command == F_SETLKW) && fails_on(fd)              \
            && ((struct flock *)argument)->l_type != F_UNLCK)                        \
            return errno = next() % 2 ? EIO : EINTR, -1;                             \
        return REAL(name)(fd, command, argument);                                    \
    }
FCNTL(fcntl)
FCNTL(fcntl64)
