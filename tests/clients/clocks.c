// Moves the clocks of one process (LD_PRELOAD), while it runs: the file $CLOCKS holds how far, in nanoseconds, as two
// 64-bit integers: CLOCK_REALTIME, CLOCK_BOOTTIME. The latter alone moves when a host has slept.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *moved;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CLOCKS");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) abort();
    void *memory = mmap(NULL, 2 * sizeof *moved, PROT_READ, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) abort();
    close(fd);
    moved = memory;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (failed || !moved) return failed;
    int64_t by = 0;
    switch (clock) {
    case CLOCK_REALTIME:
    case CLOCK_REALTIME_COARSE:
        by = moved[0];
        break;
    case CLOCK_BOOTTIME:
        by = moved[1];
        break;
    }
    int64_t sum = now->tv_sec * INT64_C(1000000000) + now->tv_nsec + by;
    now->tv_sec = sum / 1000000000;
    now->tv_nsec = sum % 1000000000;
    return 0;
}
